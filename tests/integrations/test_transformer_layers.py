"""torch's Transformer classes, swapped, compared with themselves before and restored."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowmax.kernels import swap, swapped
from rowmax.kernels.integrations.torch_modules import transformer_layers

from .support import assert_same, results

WIDTH, HEADS, BATCH, SOURCE, TARGET = 16, 4, 3, 9, 6
LENGTHS = torch.tensor([[9], [4], [2]])
PADDING = torch.arange(SOURCE) >= LENGTHS

warnings.filterwarnings("ignore", message="enable_nested_tensor is True")


def transformer(**options) -> nn.Transformer:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(
            *(WIDTH, HEADS, 2, 2, 32), dropout=0.0, dtype=torch.float64, **options
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(length: int, batch_first: bool) -> Tensor:
    torch.manual_seed(1)
    shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("masks", ["bool", "additive"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", torch.tanh], ids=["relu", "gelu", "function"]
)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_whole_transformer(
    batch_first: bool, norm_first: bool, activation: object, bias: bool, masks: str
) -> None:
    model = transformer(
        batch_first=batch_first, norm_first=norm_first, activation=activation, bias=bias
    )
    source, target = tokens(SOURCE, batch_first), tokens(TARGET, batch_first)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=torch.float64)
    padding = PADDING
    if masks == "additive":
        padding = torch.zeros(PADDING.shape, dtype=torch.float64).masked_fill(PADDING, -torch.inf)
    else:
        causal = causal < 0

    def call(own: nn.Module) -> Tensor:
        return own(
            *(source, target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )

    expected = results(model, call)
    for mode, pack in itertools.product((True, False), (False, True)):
        model.train(mode)
        report = swap(model, pack=pack)
        assert_same(results(model, call), expected, roundings=512)
        assert not report.left
        report.restore()
    model.train()
    assert torch.equal(call(model), expected["the output"])


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        *(WIDTH, HEADS, 32), dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=not options)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_inference_does_not_go_past_what_is_swapped(
    pack: bool, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's inference path is one C++ function a layer; a swapped layer calls its children."""
    model = encoder().eval()
    model.use_nested_tensor = nested
    source = tokens(SOURCE, True)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="torch's own path"):
            model(source, src_key_padding_mask=PADDING)
        with swapped(model, pack=pack):
            out = model(source, src_key_padding_mask=PADDING)
    monkeypatch.undo()
    with torch.no_grad():
        expected = model(source, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out[~PADDING], expected[~PADDING])


def refuse(*_: object) -> None:
    raise AssertionError("torch's own path")


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_left_layer_may_be_nested_inside_a_swapped_model(norm_first: bool) -> None:
    """An encoder that is left hands nested tensors to its layers, which are swapped."""
    model = encoder(norm_first=norm_first) if norm_first else encoder()
    model.eval()
    source = tokens(SOURCE, True)
    with torch.no_grad():
        expected = model(source, src_key_padding_mask=PADDING)
        with swapped(model, filter_fn=lambda module, _: type(module) is not nn.TransformerEncoder):
            out = model(source, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out[~PADDING], expected[~PADDING])


@pytest.mark.parametrize(
    "padding", ["right", "left", "scattered", "whole sequences", "all", "none"]
)
def test_packing_any_padding(padding: str) -> None:
    model, source = encoder(), tokens(SOURCE, True)
    torch.manual_seed(2)
    mask = {
        "right": PADDING,
        "left": PADDING.flip(1),
        "scattered": torch.rand(BATCH, SOURCE) < 0.5,
        "whole sequences": torch.tensor([[False], [True], [False]]).expand(BATCH, SOURCE),
        "all": torch.ones(BATCH, SOURCE, dtype=torch.bool),
        "none": torch.zeros(BATCH, SOURCE, dtype=torch.bool),
    }[padding]
    with swapped(model):
        expected = model(source, src_key_padding_mask=mask)
    with swapped(model, pack=True):
        out = model(source, src_key_padding_mask=mask)
    torch.testing.assert_close(out[~mask], expected[~mask])
    assert torch.isfinite(out).all()
    if mask.any():  # zeros before the last norm, whose bias is zero
        assert torch.equal(out[mask], torch.zeros_like(out[mask]))


def test_a_packed_encoder_computes_real_tokens_alone() -> None:
    model, seen = encoder(), []
    with swapped(model, pack=True):
        handle = model.layers[0].linear1.register_forward_hook(
            lambda _, given, __: seen.append(tuple(given[0].shape))
        )
        model(tokens(SOURCE, True), src_key_padding_mask=PADDING)
        handle.remove()
    assert seen == [(int(LENGTHS.sum()), WIDTH)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_inference_leaves_padding_out_where_torch_does(side: str) -> None:
    """Unasked, with torch's own zeros; and padded on the left torch computes it, so rowmax does."""
    model, source, seen = encoder().eval(), tokens(SOURCE, True), []
    padding = PADDING if side == "right" else PADDING.flip(1)
    with torch.no_grad():
        expected = model(source, src_key_padding_mask=padding)
        with swapped(model):
            model.layers[0].norm1.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
            out = model(source, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    total = (int(LENGTHS.sum()), WIDTH)
    assert seen == [total if side == "right" else (BATCH, SOURCE, WIDTH)]


@pytest.mark.parametrize("hint", [True, None])
def test_packing_with_a_causal_mask(hint: bool | None) -> None:
    model, source = encoder(), tokens(SOURCE, True)
    mask = torch.ones(SOURCE, SOURCE, dtype=torch.bool).triu(1)
    expected = model(source, mask=mask, src_key_padding_mask=PADDING, is_causal=hint)
    with swapped(model, pack=True):
        out = model(source, mask=mask, src_key_padding_mask=PADDING, is_causal=hint)
    torch.testing.assert_close(out[~PADDING], expected[~PADDING])
    assert torch.equal(out[PADDING], torch.zeros_like(out[PADDING])), "it was not packed"


def test_another_mask_has_no_packed_form() -> None:
    model, source = encoder(), tokens(SOURCE, True)
    mask = torch.rand(SOURCE, SOURCE) < 0.3
    mask.fill_diagonal_(False)
    mask[:, 0] = False
    expected = model(source, mask=mask, src_key_padding_mask=PADDING)
    with swapped(model, pack=True):
        out = model(source, mask=mask, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out, expected)


def test_add_and_norm_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a layer, three times in a decoder's; and not where a hook looks on."""
    calls = []
    fused = getattr(transformer_layers, "add_layer_norm")  # noqa: B009 (mypy: not exported)

    def counted(*args, **kwargs):
        calls.append(kwargs["dropout_p"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(transformer_layers, "add_layer_norm", counted)
    model = transformer(batch_first=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.25
    source, target = tokens(SOURCE, True), tokens(TARGET, True)
    swap(model)
    model(source, target)
    assert calls == [0.25] * (2 * 2 + 2 * 3)
    calls.clear()
    model.eval()(source, target)
    assert calls == [0.0] * (2 * 2 + 2 * 3)
    calls.clear()
    seen = []
    model.encoder.layers[0].norm1.register_forward_hook(lambda *_: seen.append(1))
    model(source, target)
    assert len(calls) == 9
    assert seen == [1]


def test_what_is_the_users_own_is_left_and_said() -> None:
    class Own(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return F.relu(x)

    model = nn.TransformerEncoder(Own(WIDTH, HEADS, 32, batch_first=True), 1).eval()
    report = swap(model)
    reasons = {site.name: site.reason for site in report.left}
    assert reasons == {"layers.0": "Own has a _ff_block of its own"}
    (attention,) = (site for site in report.swapped if site.kind == "attention")
    assert "may go past it" in attention.reason


def test_autocast_gives_what_torch_gives() -> None:
    model = copy.deepcopy(encoder()).float()
    source = tokens(SOURCE, True).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(source, src_key_padding_mask=PADDING)
        with swapped(model):
            out = model(source, src_key_padding_mask=PADDING)
    assert out.dtype == expected.dtype
    error = (out - expected)[~PADDING].abs().max()
    assert error <= 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_compiled() -> None:
    model, source = encoder(), tokens(SOURCE, True)
    expected = model(source, src_key_padding_mask=PADDING)
    with swapped(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(source, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out[~PADDING], expected[~PADDING])
