"""`scaled_dot_product_attention` and the process-wide route against torch's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import bias as torch_bias

from rowmax.kernels import attention_as_sdpa, scaled_dot_product_attention
from rowmax.kernels.integrations import process_wide

from ..processes import printed

torch.manual_seed(0)
LENGTHS = (6, 9)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def both(*tensors: Tensor, **options) -> list[list[Tensor]]:
    """Output and gradients of all float tensors, by torch and by rowmax."""
    found = []
    leaves = [t for t in (*tensors, options.get("attn_mask")) if t is not None and t.requires_grad]
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        out = function(*tensors, **options)  # type: ignore[arg-type]
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    return found


def assert_like_torch(*tensors: Tensor, **options) -> None:
    expected, got = both(*tensors, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 6, 4), (2, 3, 9, 4), (2, 3, 9, 5)),
        ((6, 4), (9, 4), (9, 4)),
        ((3, 6, 4), (3, 9, 4), (3, 9, 4)),
        ((2, 5, 3, 6, 4), (2, 5, 3, 9, 4), (2, 5, 3, 9, 4)),
        ((2, 3, 6, 4), (1, 3, 9, 4), (2, 1, 9, 4)),
        ((1, 6, 4), (2, 3, 9, 4), (2, 3, 9, 4)),
        ((2, 3, 9, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
    ],
    ids=str,
)
def test_shapes(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    assert_like_torch(*(randn(*shape) for shape in shapes), **options)


@pytest.mark.parametrize("lead", [(2, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("ones", [(), (0,), (1,), (0, 1), (2,), (3,), (0, 1, 2)], ids=str)
def test_masks_broadcast(lead: tuple[int, ...], mask: str, ones: tuple[int, ...]) -> None:
    full = [*lead, *LENGTHS]
    shape = [1 if at - len(lead) + 2 in ones else size for at, size in enumerate(full)]
    if mask == "bool":
        tensor = torch.rand(shape) < 0.7
        tensor[..., 0] = True
    else:
        tensor = randn(*shape)
    query, key = LENGTHS
    q, k, v = randn(*lead, query, 4), randn(*lead, key, 4), randn(*lead, key, 4)
    assert_like_torch(q, k, v, attn_mask=tensor)
    if ones == ():  # and with fewer dimensions than there are
        assert_like_torch(q, k, v, attn_mask=tensor.detach()[0, 0])


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(lead: tuple[int, ...], causal: bool) -> None:
    q, k, v = randn(*lead, 6, 5, 4), randn(*lead, 2, 5, 4), randn(*lead, 2, 5, 4)
    assert_like_torch(q, k, v, enable_gqa=True, is_causal=causal)


@pytest.mark.parametrize("make", [torch_bias.causal_upper_left, torch_bias.causal_lower_right])
@pytest.mark.parametrize("lengths", [(6, 9), (6, 6)])
def test_causal_biases(make, lengths: tuple[int, int]) -> None:
    query, key = lengths
    q, k, v = randn(2, 3, query, 4), randn(2, 3, key, 4), randn(2, 3, key, 4)
    mask = make(*lengths)
    got = scaled_dot_product_attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask._materialize())
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="`attn_mask`: expected one for 6 and"):
        scaled_dot_product_attention(q, k, v, make(6, 20))


def test_a_row_that_allows_nothing_and_dropout() -> None:
    q, k, v = (torch.randn(2, 3, 6, 4) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    assert not scaled_dot_product_attention(q, k, v, mask)[:, :, 2].any()
    torch.manual_seed(5)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, scaled_dot_product_attention(q, k, v))


def test_a_mask_written_to_is_read_again() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for _ in range(2):
        got = scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask))
        mask[0, 3] = True
    got = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask))


def test_wrong_arguments() -> None:
    q = torch.randn(2, 3, 6, 4)
    with pytest.raises(ValueError, match="`is_causal`: expected False"):
        scaled_dot_product_attention(q, q, q, torch.ones(6, 6).bool(), is_causal=True)
    with pytest.raises(ValueError, match=r"`attn_mask`: expected a shape that broadcasts"):
        scaled_dot_product_attention(q, q, q, torch.ones(5, 6).bool())
    with pytest.raises(ValueError, match="leading dimensions"):
        scaled_dot_product_attention(q, torch.randn(3, 2, 6, 4), q)
    with pytest.raises(ValueError, match="`enable_gqa`"):
        scaled_dot_product_attention(q[0, 0], q[0, 0], q[0, 0], enable_gqa=True)
    with pytest.raises(ValueError, match=r"`query`: expected \(\.\.\., length, features\)"):
        scaled_dot_product_attention(q[0, 0, 0], q, q)
    with pytest.raises(TypeError, match="`key`"):
        scaled_dot_product_attention(q, q.long(), q)


# --- the whole process ----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each forward and backward that reaches rowmax."""
    made: list[str] = []
    problem = process_wide._problem

    def noted(*args):
        made.append("call")
        return problem(*args)

    monkeypatch.setattr(process_wide, "_problem", noted)
    return made


def mask_of(kind: str) -> dict[str, Any]:
    square = torch.rand(6, 6) < 0.6
    square[:, 0] = True
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": square},
        "bias": {"attn_mask": torch.randn(6, 6, dtype=torch.float64)},
        "scale": {"scale": 0.4},
    }
    return options[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "scale"])
def test_every_fused_call_runs_rowmax_and_torchs_again_afterwards(kind: str, calls) -> None:
    q, k, v = (randn(2, 3, 6, 4) for _ in range(3))
    options = mask_of(kind)

    def run() -> list[Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, **options)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected = run()
    assert calls == []
    with attention_as_sdpa():
        got = run()
        assert len(calls) == 2
    again = run()
    assert len(calls) == 2
    for a, b, c in zip(got, expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert torch.equal(b, c)


def test_what_is_not_reached_is_said_and_true(calls) -> None:
    q, k, v = (randn(2, 3, 6, 4) for _ in range(3))
    with attention_as_sdpa() as route:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        F.scaled_dot_product_attention(q, k, v, attn_mask=randn(6, 6))
        F.scaled_dot_product_attention(q, k, randn(2, 3, 6, 5))
        module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        x = torch.randn(2, 5, 8)
        module(x, x, x)
        assert calls == []
        module(x, x, x, need_weights=False)
        assert len(calls) == 1
    text = repr(route)
    for word in ("dropout_p > 0", "need_weights=True", "fast path", "wants a gradient"):
        assert word in text


def test_half_types_and_compiled_graphs(calls) -> None:
    q = torch.randn(2, 3, 6, 4, dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    x = torch.randn(2, 3, 6, 4)
    plain = F.scaled_dot_product_attention(x, x, x)
    with attention_as_sdpa():
        got = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        function = torch.compile(F.scaled_dot_product_attention, backend="aot_eager")
        compiled = function(x, x, x)
    assert len(calls) == 2
    assert (got - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(compiled, plain)


def test_opened_once_and_closed_whatever_happens() -> None:
    route = attention_as_sdpa()
    try:
        with pytest.raises(RuntimeError, match="open already"):
            attention_as_sdpa()
    finally:
        route.restore()
    route.restore()
    with pytest.raises(KeyError), attention_as_sdpa():
        raise KeyError
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_importing_activates_nothing() -> None:
    script = (
        "import rowmax.kernels, torch, sys\n"
        "assert torch.nn.attention.list_flash_attention_impls() == before\n"
        "assert torch.nn.attention.current_flash_attention_impl() is None\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    before = "import torch\nbefore = torch.nn.attention.list_flash_attention_impls()\n"
    printed("-c", before + script)


def test_a_torch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="has no torch.nn.attention.register_flash"):
        attention_as_sdpa()
