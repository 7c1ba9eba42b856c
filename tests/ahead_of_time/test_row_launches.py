"""The launches of norms and softmax, without a GPU: as in test_launches.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.jit import JITFunction

from rowmax.bench.tuning import ahead_of_time
from rowmax.kernels.api.masks import MaskStructure
from rowmax.kernels.backends.gpu_triton import cross_entropy_launch as loss
from rowmax.kernels.backends.gpu_triton import norm_launch, plans
from rowmax.kernels.backends.gpu_triton import softmax_launch as softmax
from rowmax.kernels.backends.gpu_triton.norm_launch import norms
from rowmax.kernels.ops.problem import (
    AddLayerNormProblem,
    AddNormInputs,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)

HALF = torch.bfloat16


def rows(count: int = 48, columns: int = 64, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(count, columns, dtype=dtype)


def layer_norm_both(x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    problem = LayerNormProblem(x, weight, weight, 1e-5)
    outputs = norms.layer_norm(problem)
    return [x, weight, *outputs, *norms.layer_norm_backward(problem, x, *outputs[1:])]


def add_layer_norm_both(x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    residual, seed = torch.zeros_like(x), torch.tensor(3)
    problem = AddLayerNormProblem(x, residual, weight, None, 1e-5, 0.1, seed)
    outputs = norms.add_layer_norm(problem)
    gradients = norms.add_layer_norm_backward(problem, AddNormInputs(x, residual, *outputs[1:]))
    return [x, weight, residual, seed, *outputs, *gradients]


def rms_norm_both(x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    problem = RMSNormProblem(x, weight, 1e-6)
    y, rstd = norms.rms_norm(problem)
    return [x, weight, y, rstd, *norms.rms_norm_backward(problem, x, rstd)]


def masked_softmax_both(x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    scores, lengths = x.view(2, 3, -1, x.shape[1]), torch.tensor([8, 5])
    dense = None if weight is None else torch.ones(1, 3, 1, x.shape[1], dtype=torch.bool)
    mask = MaskStructure(dense=dense, key_lengths=lengths, band_upper=3)
    weights = softmax.masked_softmax(SoftmaxProblem(scores, mask, 0.5))
    gradient = softmax.masked_softmax_backward(scores, weights, 0.5)
    return [x, dense, lengths, weights, gradient]


def cross_entropy_both(x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    target = torch.zeros(len(x), dtype=torch.int64)
    return [x, target, loss.cross_entropy(x, target, 0.1, -100, weight is not None)]


ROW_WISE: dict[str, Callable[[Tensor, Tensor | None], list[Tensor | None]]] = {
    "layer_norm": layer_norm_both,
    "add_layer_norm": add_layer_norm_both,
    "rms_norm": rms_norm_both,
    "masked_softmax": masked_softmax_both,
    "linear_cross_entropy": cross_entropy_both,
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("columns", [64, 40_000])
@pytest.mark.parametrize("name", ROW_WISE)
def test_a_row_wise_plan_launches_what_the_first_call_did(
    name: str, columns: int, weighted: bool, launched: Any
) -> None:
    """Whole rows and rows in blocks; tensors that are returned and those between kernels."""
    found = []
    steps = 1 if name == "linear_cross_entropy" else 2  # which does both passes at once
    for _ in range(2):
        launched.clear()
        weight = torch.zeros(columns, dtype=HALF) if weighted else None
        tensors = ROW_WISE[name](rows(columns=columns), weight)
        named = {str(at): each for at, each in enumerate(tensors) if each is not None}
        layouts = [(each.shape, each.stride(), each.dtype) for each in named.values()]
        found.append((launched.in_names(named), layouts))
        assert len(plans.cache) == steps
    assert len(launched) >= steps
    assert found[0] == found[1]


NORMS_OF_OTHER_KINDS: dict[str, Callable[[], LayerNormProblem]] = {
    "usual": lambda: LayerNormProblem(rows(), None, None, 1e-5),
    "another eps": lambda: LayerNormProblem(rows(), None, None, 1e-6),
    "another dtype": lambda: LayerNormProblem(rows(dtype=torch.float16), None, None, 1e-5),
    "another shape": lambda: LayerNormProblem(rows(49), None, None, 1e-5),
    "another stride": lambda: LayerNormProblem(rows(48, 80)[:, :64], None, None, 1e-5),
    "not aligned": lambda: LayerNormProblem(
        rows(49).flatten()[1:3073].view(48, 64), *(None,) * 2, 1e-5
    ),
    "a weight": lambda: LayerNormProblem(rows(), rows(1)[0], None, 1e-5),
    "a bias": lambda: LayerNormProblem(rows(), None, rows(1)[0], 1e-5),
    "a wide bias": lambda: LayerNormProblem(rows(), None, torch.zeros(64), 1e-5),
}


def test_what_a_norm_is_compiled_for_tells_plans_apart(launched: Any) -> None:
    for count, of in enumerate(NORMS_OF_OTHER_KINDS.values(), 1):
        for _ in range(2):
            norms.layer_norm(of())
            assert len(plans.cache) == count


def test_rows_that_are_copied_have_a_plan(launched: Any) -> None:
    """The copy is made before, and has the same layout at each call."""
    for _ in range(2):
        norms.layer_norm(LayerNormProblem(rows(64, 48).mT, None, None, 1e-5))
    assert len(plans.cache) == 1
    assert len({arguments[0] for _, _, arguments in launched} - {None}) >= 1


def test_rows_without_values_launch_nothing(launched: Any) -> None:
    for shape in ((0, 8), (3, 0)):
        y, mean, rstd = norms.layer_norm(LayerNormProblem(torch.zeros(shape), None, None, 1e-5))
        assert (y.shape, mean.shape, rstd.shape) == (shape, shape[:1], shape[:1])
        assert mean.isnan().all()
        assert rstd.isnan().all()
        weight = torch.ones(shape[1])
        problem = LayerNormProblem(torch.zeros(shape), weight, None, 1e-5)
        d_x, d_weight, d_bias = norms.layer_norm_backward(problem, y, mean, rstd)
        assert (d_x.shape, d_bias.numel()) == (shape, 0)
        assert torch.equal(d_weight, torch.zeros_like(weight))
    assert not launched


def test_another_device_is_made_the_current_one(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles for it, and launches and allocates there."""
    entered: list[torch.device] = []
    problem = LayerNormProblem(rows(), None, None, 1e-5)

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ahead_of_time._Driver, "get_current_device", lambda _: wanted.index)
            yield

    norms.layer_norm(problem)
    (expected,) = launched
    monkeypatch.setattr(torch.cuda, "device", device)

    class Second(Tensor):
        device = torch.device("cuda", 1)

    plans.run(
        norm_launch._plan_forward, [problem.x.as_subclass(Second), *[None] * 4], (1e-5, 0.0, True)
    )
    assert entered == [torch.device("cuda", 1)]
    assert len(plans.cache) == 2
    assert [call[:2] for call in launched] == [expected[:2]] * 2


def test_a_call_that_has_a_plan_takes_few_steps(launched: Any, steps_of: Any) -> None:
    norm, weights = LayerNormProblem(rows(), None, None, 1e-5), torch.zeros(1, 2, 8, 8)
    _, mean, rstd = norms.layer_norm(norm)
    scores = SoftmaxProblem(weights, MaskStructure(), 1.0)
    calls: list[tuple[int, Callable[[], Any]]] = [
        (30, lambda: norms.layer_norm(norm)),
        (45, lambda: norms.layer_norm_backward(norm, norm.x, mean, rstd)),
        (30, lambda: softmax.masked_softmax(scores)),
        (30, lambda: softmax.masked_softmax_backward(weights, weights, 1.0)),
    ]
    for bound, call in calls:
        call()
        assert 10 < steps_of(call) <= bound


def test_a_profiler_is_told_of_a_plan_s_launches(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks may come after the plan was made, and go again."""
    given: list[tuple[Any, ...]] = []
    compiled = SimpleNamespace(
        run=lambda *launch: given.append(launch[6:9]),
        function=None,
        packed_metadata=None,
        launch_metadata=lambda *_: "metadata",
    )
    monkeypatch.setattr(JITFunction, "warmup", lambda *_, **__: compiled)
    problem = LayerNormProblem(rows(), None, None, 1e-5)
    hook = knobs.runtime.launch_enter_hook
    norms.layer_norm(problem)
    hook.add(print)
    try:
        norms.layer_norm(problem)
    finally:
        hook.remove(print)
    norms.layer_norm(problem)
    assert given == [(None,) * 3, ("metadata", hook, knobs.runtime.launch_exit_hook), (None,) * 3]
