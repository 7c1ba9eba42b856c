"""`compare`: the original and the swapped model on the caller's own batch, beside float64."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..api.checks import fail_type, fail_value
from .differences import PARAMETER, LayerDifference, Run, call_of, differences_of, real_tokens
from .packing import Packing
from .report import SwapReport, columns
from .swap import Filter, swap
from .torch_modules.instances import Form


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    seconds: medians of runs in turns. saved_bytes: what forward keeps for backward, beside the
    parameters. Peaks: the most memory beyond what was taken before, gradients included; on a GPU
    what torch's allocator hands out, on the CPU the rise of the process's resident memory; None
    where the system can't tell.
    """

    inference_seconds: float
    training_seconds: float
    saved_bytes: int
    inference_peak_bytes: int | None
    training_peak_bytes: int | None


class ComparisonReport:
    """What `compare` found; `print` shows it."""

    def __init__(
        self, report: SwapReport, layers: Sequence[LayerDifference], original: Cost, swapped: Cost
    ) -> None:
        self.report = report
        self.layers = tuple(layers)
        self.original = original
        self.swapped = swapped

    @property
    def passed(self) -> bool:
        """Whether no layer of the swapped model is further from float64 than it may be."""
        return self._judged and all(layer.agrees for layer in self.layers)

    @property
    def _judged(self) -> bool:
        """Whether float64 gives a number for any of the model's own output."""
        return any(layer.unjudged < 1.0 for layer in self.layers if layer.name == "")

    @property
    def verdict(self) -> str:
        """One sentence."""
        faster = self.original.training_seconds / self.swapped.training_seconds
        memory = self.swapped.saved_bytes / max(1, self.original.saved_bytes)
        cost = (
            f"a training step is {faster:.2f} times as fast and keeps {memory:.2f} of the memory "
            "for its backward pass"
        )
        unjudged = sum(layer.unjudged > 0.0 for layer in self.layers)
        if self.passed:
            but = ""
            if unjudged:
                where = f"{unjudged} of {len(self.layers)} comparisons"
                but = f", but where float64 gives NaN, in {where}"
            return f"PASS: as close to float64 as the original in every layer{but}; {cost}"
        wrong = [layer for layer in self.layers if not layer.agrees]
        if not wrong:
            return (
                "UNDECIDED: the original's output in float64 is all NaN, which judges nothing; "
                "`real=` names the tokens that count"
            )
        worst = max(wrong, key=lambda layer: layer.error_swapped / max(layer.allowed, 1e-300))
        return (
            f"FAIL: {len(wrong)} of {len(self.layers)} comparisons are further from float64 than "
            f"they may be, the worst {worst.what} of {worst.name or 'the model'}: error "
            f"{worst.error_swapped:.1e}, allowed {worst.allowed:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "layers": [asdict(layer) for layer in self.layers],
            "original": asdict(self.original),
            "swapped": asdict(self.swapped),
            "report": self.report.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("", "of", "difference", "original's error", "swapped's error", "allowed")
        ]
        for layer in self.layers:
            errors = layer.difference, layer.error_original, layer.error_swapped, layer.allowed
            shown = (f"{error:.1e}" for error in errors)
            rows.append((layer.name or "(the model)", layer.shown, *shown))
        costs = [("", "original", "swapped", "ratio")]
        for title, read, unit in _COSTS:
            one, other = read(self.original), read(self.swapped)
            if one is not None and other is not None:
                ratio = f"{one / other:.2f}" if other else "-"
                costs.append((title, f"{one * unit:.2f}", f"{other * unit:.2f}", ratio))
        head = f"{self.report.model_name}: {len(self.report.swapped)} sites swapped"
        note = "errors are shares of the largest value of the float64 run"
        return "\n".join([f"{head}; {note}", *columns(rows), "", *columns(costs), "", self.verdict])

    def __repr__(self) -> str:
        return f"<ComparisonReport: {self.verdict}>"


_COSTS: tuple[tuple[str, Callable[[Cost], float | None], float], ...] = (
    ("inference, ms", lambda cost: cost.inference_seconds, 1e3),
    ("training step, ms", lambda cost: cost.training_seconds, 1e3),
    ("kept for backward, MiB", lambda cost: cost.saved_bytes, 2**-20),
    ("peak of inference, MiB", lambda cost: cost.inference_peak_bytes, 2**-20),
    ("peak of training, MiB", lambda cost: cost.training_peak_bytes, 2**-20),
)


def compare(
    model: nn.Module,
    inputs: Any,
    *,
    real: Tensor | None = None,
    attention: bool = True,
    norms: bool = True,
    filter_fn: Filter | None = None,
    backend: str = "auto",
    pack: bool = False,
    seconds: float = 2.0,
) -> ComparisonReport:
    """Run `model` and a swapped copy of it on `inputs`, forward and backward, and tell them apart.

    The model is not changed: copies run, and so does a copy in float64, the truth. Differences are
    taken without dropout, times in the mode that the model is in.

    Args:
        model: not swapped yet.
        inputs: of one call: a tensor, a tuple (positional) or a dict (keyword arguments).
        real: bool (B, L), True for tokens that count; what models give for padding differs. By
            default the 2-D `attention_mask` of a dict, or the inverse of `src_key_padding_mask`;
            with `pack`, where neither is given, the tokens that the encoders keep.
        attention, norms, filter_fn, backend, pack: as in `swap`.
        seconds: to spend on the times.

    Returns:
        A report: print it. `passed` and `verdict` say in short what the layers' table shows: the
        swapped model's error against float64 may be twice the original's plus a few roundings.
        A model that fails is run up to three times more with all weights moved by a few
        roundings, and the best run is shown: gradients jump where a ReLU's input is 0.
        Where the original gives NaN in float64, as eager attention of transformers does for
        padding, nothing can be judged: the report names these places and counts the others.

    Raises:
        ValueError: the model is swapped already, or, as in `swap`, nothing can be; or encoders
            drop different tokens, and `real` is not given.
    """
    if not isinstance(model, nn.Module):
        fail_type("compare", "model", type(model).__name__, "a torch.nn.Module")
    if any(isinstance(module, Form) for module in model.modules()):
        fail_value("compare", "model", "one that is swapped", "the original; restore it first")
    args, kwargs = call_of(inputs)
    original, other, truth = (copy.deepcopy(model) for _ in range(3))
    report = swap(
        other, attention=attention, norms=norms, filter_fn=filter_fn, backend=backend, pack=pack
    )
    truth.double()
    counts = real_tokens(kwargs) if real is None else real
    if counts is None and pack:
        counts = _kept_tokens(other, args, kwargs)
    names = _layers_of(model, report)

    def differences() -> list[LayerDifference]:
        runs = []
        for which, wide in ((original, False), (other, False), (truth, True)):
            which.eval()
            call = _widened((args, kwargs)) if wide else (args, kwargs)
            runs.append(_run(which, call[0], call[1], names, counts))
            which.train(model.training)
        return differences_of(*runs)

    from ..testing.tolerance import CHANCES  # not at import: it would load all of testing

    found = [differences()]
    generator = torch.Generator().manual_seed(0)
    while len(found) <= CHANCES and not all(row.agrees for row in _shown(found)):
        _move_weights((original, other, truth), generator)
        found.append(differences())
    layers = _shown(found)
    costs = _costs((original, other), args, kwargs, seconds)
    return ComparisonReport(report, layers, *costs)


def _kept_tokens(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """bool (B, L), the tokens that a swapped model's packed encoders keep; None where they pack
    nothing."""
    found: list[Packing] = []

    def look(_: nn.Module, given: Any, named: dict[str, Any]) -> None:
        found.extend(item for item in (*given, *named.values()) if isinstance(item, Packing))

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for layers in lists for layer in layers]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    kept = [packing.real() for packing in found]
    if any(not torch.equal(each, kept[0]) for each in kept):
        got = "None, where the model's encoders drop different tokens"
        fail_value("compare", "real", got, "a bool tensor (B, L), True for the tokens that count")
    return kept[0] if kept else None


def _widened(value: Any) -> Any:
    """The same arguments with float tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _widened(item) for name, item in value.items()}
    return type(value)(map(_widened, value)) if isinstance(value, tuple | list) else value


def _layers_of(model: nn.Module, report: SwapReport) -> list[str]:
    """The members of the outermost lists of layers; without any, the swapped sites.

    Inside a layer nothing is hooked: a hooked norm would not be fused.
    """
    names: list[str] = []
    known = dict(model.named_modules())
    for name, module in known.items():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(module, nn.ModuleList) and not inside:
            names += [f"{name}.{index}" for index in range(len(module))]
    names = [name for name in names if name in known]  # a module in several places has one name
    return names or [site.name for site in report.swapped if site.name]


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[str],
    counts: Tensor | None,
) -> Run:
    """Outputs and gradients by layer, those of the parameters too, padding left out."""
    seen: dict[str, tuple[Tensor, Packing | None]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, named: dict[str, Any], output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.requires_grad:
                tensor.retain_grad()
                found = (item for item in (*given, *named.values()) if isinstance(item, Packing))
                seen[name] = (tensor, next(found, None))

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name), with_kwargs=True) for name in names]
    try:
        with torch.enable_grad():
            final = _first_tensor(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if final is None:
        got = "no float tensor in its output"
        fail_value("compare", "model", got, "one, to compare and derive")
    shown = _counted(final, counts)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shown.shape, generator=generator, dtype=torch.float64)
    (shown * weights.to(shown)).sum().backward()
    found: Run = {}
    for name, (tensor, packing) in seen.items():
        for what, value in (("output", tensor), ("gradient", tensor.grad)):
            if value is None:
                continue
            if packing is not None:
                value = packing.unpack(value.reshape(-1, value.shape[-1]))
            found[name, what] = _counted(value, counts).detach()
    found["", "output"] = shown.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name, PARAMETER] = parameter.grad
    model.zero_grad(set_to_none=True)
    return found


def _first_tensor(output: Any) -> Tensor | None:
    """The first float tensor of more than one element in an output; a loss is none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.dim() > 0 else None
    items = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return None
    return next((tensor for item in items if (tensor := _first_tensor(item)) is not None), None)


def _counted(tensor: Tensor, counts: Tensor | None) -> Tensor:
    """The tokens that count, of a tensor (B, L, ...) or (L, B, ...)."""
    if counts is not None and tensor.dim() > 2:
        if tensor.shape[:2] == counts.shape:
            return tensor[counts]
        if tensor.shape[:2] == counts.T.shape:
            return tensor[counts.T]
    return tensor


def _move_weights(models: Sequence[nn.Module], generator: torch.Generator) -> None:
    """Moves all weights, the same in each model: see `perturbed`."""
    from ..testing.tolerance import perturbed

    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            if same[0].is_floating_point():
                moved = perturbed(same[0], generator)
                for parameter in same:
                    parameter.copy_(moved)


def _shown(found: Sequence[Sequence[LayerDifference]]) -> list[LayerDifference]:
    """Of several runs, the one in which the worst comparison is the best."""

    def worst(rows: Iterable[LayerDifference]) -> float:
        ratios = [row.error_swapped / row.allowed for row in rows]
        return max((ratio if ratio == ratio else float("inf") for ratio in ratios), default=0.0)

    return list(min(found, key=worst))


def _costs(
    models: tuple[nn.Module, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
) -> tuple[Cost, Cost]:
    """Time and memory of both, in turns."""

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    def train(model: nn.Module) -> None:
        with torch.enable_grad():
            output = _first_tensor(model(*args, **kwargs))
            assert output is not None
            output.sum().backward()
        model.zero_grad(set_to_none=True)

    # loaded here: no model that is only swapped needs it
    from ..testing.memory import peak_bytes

    device = next((parameter.device.type for parameter in models[0].parameters()), "cpu")
    times: list[dict[int, list[float]]] = []
    for step in (infer, train):
        of_step: dict[int, list[float]] = {0: [], 1: []}
        began = time.perf_counter()
        while len(of_step[1]) < 4 or time.perf_counter() - began < seconds / 2:
            for index, model in enumerate(models):
                before = time.perf_counter()
                step(model)
                _wait()
                of_step[index].append(time.perf_counter() - before)
        times.append(of_step)
    one, other = (
        Cost(
            statistics.median(times[0][index][1:]),  # the first of each compiles
            statistics.median(times[1][index][1:]),
            _saved_bytes(model, args, kwargs),
            peak_bytes(partial(infer, model), device),
            peak_bytes(partial(train, model), device),
        )
        for index, model in enumerate(models)
    )
    return one, other


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _saved_bytes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the distinct tensors that autograd keeps between forward and backward."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*args, **kwargs)
    del output
    return sum(saved.values())
