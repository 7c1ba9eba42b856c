"""`swap`: find the sites, decide about each, and only then change anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..api.attention import attention_problem
from ..api.checks import FLOAT_DTYPES, fail_type, fail_value
from ..backends import dispatch
from ..ops.problem import LayerNormProblem, Problem, RMSNormProblem
from .huggingface import models as huggingface_models
from .huggingface.attention import is_registered
from .huggingface.configs import Aliases, ConfigChange, ConfigForm, is_alias
from .report import Change, Site, SwapReport
from .torch_modules import multihead, norms, transformer_layers
from .torch_modules.instances import ClassChange, Options, Swapped

Filter = Callable[[nn.Module, str], bool]

_FILTERED = "filter_fn left it out"


def swap(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    filter_fn: Filter | None = None,
    backend: str = "auto",
    pack: bool = False,
) -> SwapReport:
    """Make `model` attend and normalise by rowmax's kernels, in place and reversibly.

    Only instances change, by their class (`instances.py`) or, for models of Hugging Face
    transformers, by an alias of their config (`huggingface_configs.py`): `state_dict`, parameters,
    hooks, mode, device and dtype stay as they are. A deep copy is swapped too; a pickle is that of
    the original. A second swap finds nothing left to do and does nothing.

    Swapped are nn.MultiheadAttention, torch's Transformer layers (residual, dropout and norm become
    one call; their inference path that goes past its children is not taken), nn.LayerNorm,
    nn.RMSNorm, and in models of transformers the attention of the `AttentionInterface` and the
    RMS norms. Subclasses with a forward of their own are left, and the report says so.

    Args:
        attention, norms: which of the two to swap.
        filter_fn: called with each site and its name; what it returns False for is left.
        backend: "auto", or the name of one for all sites; see `rowmax.kernels.explain`.
        pack: nn.TransformerEncoder and BERT-like encoders drop the padding of a batch before their
            first layer and put zeros in its place after the last, so that padding costs nothing.
            What they give for real tokens is the same. Hooks on layers see packed tokens.

    Returns:
        The report: print it, or take `to_dict()` or `to_json()`. `restore()` undoes the swap.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: nothing to swap, nothing to pack where `pack` asks for it, or attention in a
            model of transformers that bypasses the interface. The model is untouched.
        RuntimeError: a named backend that can't do a site's dtype or device, or a version of
            transformers outside the range. The model is untouched.
    """
    if not isinstance(model, nn.Module):
        fail_type("swap", "model", type(model).__name__, "a torch.nn.Module")
    if filter_fn is not None and not callable(filter_fn):
        fail_type("swap", "filter_fn", type(filter_fn).__name__, "a function, or None")
    dispatch.check_name("swap", backend)
    plan = _Plan(Options(backend, pack), filter_fn)
    plan.torch_modules(model, attention, norms)
    if attention:
        for name, outermost in huggingface_models.outermost_models(model):
            plan.huggingface_model(name, outermost)
    plan.check_packing(model)
    plan.check_backend(model)
    report = SwapReport(type(model).__name__, backend, plan.in_order(model), plan.changes)
    if not report.swapped and not plan.swapped_before:
        raise ValueError(f"swap: nothing to swap, nothing was changed; {_explanation(report)}")
    for change in plan.changes:
        change.apply()
    return report


@contextlib.contextmanager
def swapped(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    filter_fn: Filter | None = None,
    backend: str = "auto",
    pack: bool = False,
) -> Iterator[SwapReport]:
    """`with swapped(model) as report:` swaps as `swap` does, and restores at the end."""
    report = swap(
        model, attention=attention, norms=norms, filter_fn=filter_fn, backend=backend, pack=pack
    )
    try:
        yield report
    finally:
        report.restore()


@dataclass
class _Plan:
    """What would be changed, and what is said about it."""

    options: Options
    filter_fn: Filter | None
    sites: dict[str, Site] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    problems: list[tuple[str, str, nn.Module]] = field(default_factory=list)
    swapped_before: bool = False

    def torch_modules(self, model: nn.Module, attention: bool, norms_too: bool) -> None:
        for name, module in model.named_modules():
            if isinstance(module, Swapped):
                backend = module.rowmax_options.backend
                self._note(name, module, _kind(module), False, f"swapped before ({backend})")
                self.swapped_before = True
                continue
            self._torch_module(name, module, attention, norms_too)
        if attention or norms_too:
            self._note_bypassed(model)

    def _torch_module(self, name: str, module: nn.Module, attention: bool, norms_too: bool) -> None:
        options = Options(self.options.backend)
        verdict = None
        if attention and (verdict := multihead.recognise(module)) is not None:
            kind = "attention"
        elif norms_too and (verdict := norms.recognise(module)) is not None:
            kind = "norm"
        elif (verdict := transformer_layers.recognise(module)) is not None:
            kind = "encoder" if isinstance(module, nn.TransformerEncoder) else "layer"
            options = self.options if kind == "encoder" else options
        if verdict is None:
            return
        form, why = verdict
        if kind == "layer" and form is not None and not norms_too:
            why = "calls its attention in inference too"
        if form is None or not self._takes(module, name):
            self._note(name, module, kind, False, _FILTERED if form else why)
            return
        if kind == "encoder" and self.options.pack:
            why += ", packed where the batch has a padding mask"
        self._note(name, module, kind, True, why)
        self.changes.append(ClassChange(name, module, form, options))
        if kind in ("attention", "norm"):
            self.problems.append((kind, name, module))

    def _note_bypassed(self, model: nn.Module) -> None:
        """A layer that is left goes past its attention in inference: say so where it matters."""
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.TransformerEncoderLayer):
                continue
            own = self.sites.get(name)
            child = f"{name}.self_attn" if name else "self_attn"
            site = self.sites.get(child)
            if own is None or own.swapped or isinstance(layer, Swapped) or site is None:
                continue
            if site.swapped:
                why = f"{site.reason}; in inference the layer, which is left, may go past it"
                self._note(child, layer.self_attn, site.kind, True, why)

    def huggingface_model(self, name: str, model: nn.Module) -> None:
        """The attention of one model of transformers, all of it or a part."""
        is_registered()
        attending: list[tuple[str, nn.Module]] = []
        left = 0
        for inner, module in model.named_modules():
            full = ".".join(filter(None, (name, inner)))
            if huggingface_models.attends(module):
                why = huggingface_models.why_not(module)
            elif huggingface_models.bypasses(module) and full not in self.sites:
                why = "its attention does not go through transformers' AttentionInterface"
            else:
                continue
            if huggingface_models.is_swapped(module):
                self._note(full, module, "attention", False, "swapped before")
                self.swapped_before = True
            elif not self._takes(module, full):
                self._note(full, module, "attention", False, _FILTERED)
                left += 1
            elif why is not None:
                _refuse(model, full, module, why)
            else:
                self._note(full, module, "attention", True, "attention and mask by the interface")
                attending.append((full, module))
        if attending:
            self._take_configs(name, model, attending, left > 0)
        if self.options.pack:
            self._pack_encoders(name, model, left)

    def _take_configs(
        self, outer: str, model: nn.Module, attending: list[tuple[str, nn.Module]], in_part: bool
    ) -> None:
        """Aliases for all configs of the model, masks included; or for the attention's alone."""
        aliases = Aliases(Options(self.options.backend))
        attentions = {id(module) for _, module in attending}
        for _, module in attending if in_part else ():
            implementation = module.__dict__["config"]._attn_implementation
            if implementation not in ("eager", "sdpa"):
                raise ValueError(
                    f"swap: with a part of {type(model).__name__} left, its masks stay those "
                    f'of attn_implementation {implementation!r}; expected "eager" or "sdpa". '
                    "Nothing was changed"
                )
        for inner, module in model.named_modules():
            full = ".".join(filter(None, (outer, inner)))
            config = module.__dict__.get("config")
            if not hasattr(config, "_attn_implementation") or is_alias(config):
                continue
            if id(module) in attentions or not in_part:
                self.changes.append(ConfigChange(full, module, aliases))
            elif hasattr(module, "set_attn_implementation"):
                self.changes.append(ClassChange(full, module, ConfigForm, Options()))
        self.problems += [("attention", name, module) for name, module in attending[:1]]

    def _pack_encoders(self, name: str, model: nn.Module, left: int) -> None:
        for inner, module in model.named_modules():
            if type(module).__name__ not in huggingface_models.PACKED_ENCODERS:
                continue
            full = ".".join(filter(None, (name, inner)))
            why = huggingface_models.why_not_packed(module)
            if left:
                why = "a part of the model's attention is left"
            if isinstance(module, Swapped):
                continue
            if why is None and not self._takes(module, full):
                why = _FILTERED
            self._note(full, module, "encoder", why is None, why or "packed where there is padding")
            if why is None:
                form = huggingface_models.SwappedBertEncoder
                self.changes.append(ClassChange(full, module, form, self.options))

    def check_packing(self, model: nn.Module) -> None:
        """Where packing was asked for, there has to be something that packs; say what does not."""
        if not self.options.pack or self.swapped_before:
            return
        encoders = [site for site in self.sites.values() if site.kind == "encoder" and site.swapped]
        if not encoders and self.changes:
            fail_value(
                "swap",
                "pack",
                f"True for {type(model).__name__}, which has none; nothing was changed",
                "a model with an nn.TransformerEncoder or a BERT-like encoder to pack",
            )
        modules = dict(model.named_modules())
        for site in encoders:
            encoder = modules[site.name]
            if not isinstance(encoder, nn.TransformerEncoder):
                continue
            for index in range(len(encoder.layers)):
                layer = ".".join(filter(None, (site.name, "layers", str(index))))
                for part in (layer, f"{layer}.self_attn"):
                    if part not in self.sites or not self.sites[part].swapped:
                        why = f"no nested tensors; not packed, because {part} is left"
                        self._note(site.name, encoder, "encoder", True, why)

    def check_backend(self, model: nn.Module) -> None:
        """A named backend has to be able to do what each site will ask of it."""
        if self.options.backend == "auto":
            return
        parameter = next(model.parameters(), torch.empty(0))
        for kind, name, module in self.problems:
            own = next(module.parameters(), parameter)
            if own.dtype not in FLOAT_DTYPES:
                continue
            reason = dispatch.refusal(self.options.backend, _problem(kind, module, own))
            if reason is not None:
                raise RuntimeError(
                    f"swap: backend {self.options.backend!r} can't do {name or 'the model'} "
                    f"({type(module).__name__}, {own.dtype}): {reason}. Nothing was changed; "
                    "backend='auto' takes one that can"
                )

    def in_order(self, model: nn.Module) -> list[Site]:
        return [self.sites[name] for name, _ in model.named_modules() if name in self.sites]

    def _takes(self, module: nn.Module, name: str) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(module, name))

    def _note(self, name: str, module: nn.Module, kind: str, swapped: bool, reason: str) -> None:
        self.sites[name] = Site(name, type(module).__name__, kind, swapped, reason)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(
        module, transformer_layers.SwappedEncoder | huggingface_models.SwappedBertEncoder
    ):
        return "encoder"
    if isinstance(module, norms.NORMS):
        return "norm"
    return "layer"


def _problem(kind: str, module: nn.Module, like: torch.Tensor) -> Problem:
    """The smallest problem of the kind that the module will pose."""
    if kind == "attention":
        q = like.new_empty((1, 1, 1, 8))
        return attention_problem(
            *(q, q, q, None, None, None, None, 0.0, None, None), draw_seed=False
        )
    rows = like.new_empty((1, 8))
    if isinstance(module, nn.LayerNorm):
        return LayerNormProblem(rows, None, None, 1e-5)
    return RMSNormProblem(rows, None, 1e-6)


def _refuse(model: nn.Module, name: str, module: nn.Module, why: str) -> None:
    raise ValueError(
        f"swap: {type(model).__name__}: {name} ({type(module).__name__}) can't be swapped: {why}. "
        "Nothing was changed. swap(model, attention=False) takes the norms alone; a filter_fn that "
        "returns False for it leaves it as it is"
    )


def _explanation(report: SwapReport) -> str:
    if not report.sites:
        return (
            f"{report.model_name} has no nn.MultiheadAttention, Transformer layer, LayerNorm or "
            "RMSNorm, and no attention of Hugging Face's interface. In code of your own, call "
            "rowmax.kernels.scaled_dot_product_attention"
        )
    if all(site.reason == _FILTERED for site in report.sites):
        return f"filter_fn left out all {len(report.sites)} sites"
    reasons = "; ".join(f"{site.name or 'the model'}: {site.reason}" for site in report.sites[:5])
    return f"none of {len(report.sites)} sites can be swapped: {reasons}"
