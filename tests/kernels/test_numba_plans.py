"""A forward call of the Numba backend is prepared once: nothing it depends on may be forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, Window, attention
from rowmax.kernels.backends import dispatch

from .cases import BY_NAME, lay_out
from .support import assert_parity, run

if dispatch.unavailable("numba"):
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_numba import attention_launch
from rowmax.kernels.backends.cpu_numba.attention_forward import FORWARD
from rowmax.kernels.backends.cpu_numba.call import Plan


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    attention_launch._plans.clear()
    yield
    attention_launch._plans.clear()


def calls(queries: int) -> list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]:
    """Calls that differ in one thing each."""
    generator = torch.Generator().manual_seed(0)

    def heads(length: int, dim: int = 16, count: int = 4, dtype: Any = torch.float32) -> Tensor:
        made = torch.randn(2, count, length, dim, generator=generator, dtype=torch.float64)
        return made.to(dtype)

    q, k, v = heads(queries), heads(40), heads(40)
    plain = (q, k, v)
    return [
        (plain, {}),
        ((heads(queries), heads(40), heads(40)), {}),
        (plain, {"scale": 0.5}),
        (plain, {"softcap": 1.0}),
        (plain, {"mask": Causal(4)}),
        (plain, {"mask": Window(3, 3, 4)}),
        (plain, {"mask": Window(9, 3, 4)}),
        ((q, heads(41), heads(41)), {}),
        ((q, k, heads(40, 24)), {}),
        ((q, heads(40, count=2), heads(40, count=2)), {}),
        ((lay_out(q, "heads_last"), k, v), {}),
        ((q, lay_out(k, "sliced"), v), {}),
        ((q, k, lay_out(v, "expanded")), {}),
        ((q.double(), k.double(), v.double()), {}),
        ((q.half(), k.half(), v.half()), {}),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {}),
    ]


@pytest.mark.parametrize("queries", [3, 30], ids=["decoded", "tiled"])
def test_the_second_call_is_the_first_again(queries: int) -> None:
    todo = calls(queries)
    first = []
    for tensors, options in todo:
        attention_launch._plans.clear()
        first.append(attention(*tensors, **options, return_lse=True, backend="numba"))
    attention_launch._plans.clear()
    for _ in range(2):
        for (tensors, options), expected in zip(todo, first, strict=True):
            got = attention(*tensors, **options, return_lse=True, backend="numba")
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert got[0].stride() == expected[0].stride()
    assert len(attention_launch._plans) == len(todo) - 1  # the second differs in its data alone


def test_what_holds_tensors_has_no_plan() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    attention(q, k, v, torch.rand(9, 9) < 0.5, backend="numba")
    attention(q, k, v, bias=torch.zeros(9), backend="numba")
    attention(q, k, v, sinks=torch.zeros(2), backend="numba")
    attention(q, k, v, dropout_p=0.5, seed=1, backend="numba")
    assert not attention_launch._plans


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "_MAX_CACHED_PLANS", 4)
    for length in range(1, 12):
        q = torch.randn(1, 1, length, 8)
        out = attention(q, q, q, backend="numba")
        assert torch.isfinite(out).all()
        assert len(attention_launch._plans) <= 4


@pytest.mark.parametrize(
    "name", ["sinks", "decode_sinks", "alibi_per_batch_causal", "layout_strided", "bias_strided"]
)
def test_copies_made_for_a_call_outlive_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record holds addresses: memory freed before the kernel runs would be someone else's."""
    original = Plan.run

    def run_late(plan: Plan, *addresses: int) -> None:
        sizes = [2**n for n in range(14)]
        others = [torch.full((size,), torch.nan, dtype=torch.float64) for size in sizes * 8]
        original(plan, *addresses)
        del others

    monkeypatch.setattr(Plan, "run", run_late)
    arguments = BY_NAME[name].build(torch.float32)
    assert_parity(run("numba", arguments), arguments)


@pytest.mark.parametrize("queries", [3, 40], ids=["decoded", "tiled"])
def test_out_alone_is_the_same_out(queries: int) -> None:
    for (q, k, v), options in calls(queries):
        for _ in range(2):  # the second time by the plan of the first
            out = attention(q, k, v, **options, backend="numba")
            beside_lse, _ = attention(q, k, v, **options, return_lse=True, backend="numba")
            assert torch.equal(out, beside_lse)


@pytest.mark.parametrize("change", [{"heads": None}, {"head_count": 4}], ids=["missing", "unknown"])
def test_a_record_has_the_fields_of_its_definition(change: dict[str, int | None]) -> None:
    given = dict.fromkeys(FORWARD.names, 1) | change
    fields = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(
        TypeError, match=f"^forward: fields missing or unknown: {next(iter(change))}"
    ):
        FORWARD.plan(torch.float32, 1, 64, fields)
