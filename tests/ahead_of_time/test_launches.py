"""The launches of attention, without a GPU: nothing is compiled, a recorder takes the launches.

What the first call of a signature finds must serve later ones, and nothing that changes from step
to step may ask for another compiled kernel.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from rowmax.bench.tuning import ahead_of_time
from rowmax.kernels import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    KeyLengths,
    Window,
)
from rowmax.kernels.api.attention import attention_problem
from rowmax.kernels.backends import gpu_triton
from rowmax.kernels.backends.gpu_triton import attention_launch, configs, plans
from rowmax.kernels.backends.gpu_triton.configs import Key, ranked
from rowmax.kernels.backends.gpu_triton.norm_launch import norms
from rowmax.kernels.ops.problem import (
    AddLayerNormProblem,
    AddNormInputs,
    AttentionProblem,
    BackwardInputs,
)

HALF = torch.bfloat16


def binding(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Triton's specialisation of a call: each argument's type and properties, and options."""
    _, specialization, options = kernel.device_caches[0][4](**arguments)
    return specialization, options


def heads(batch: int, count: int, length: int, dim: int = 64, layout: str = "bhld") -> Tensor:
    if layout == "blhd":
        return torch.zeros(batch, length, count, dim, dtype=HALF).transpose(1, 2)
    return torch.zeros(batch, count, length, dim, dtype=HALF)


def problem_of(
    mask: Any = None,
    bias: Any = None,
    lengths: tuple[int, int] = (96, 96),
    layout: str = "bhld",
    **options: Any,
) -> AttentionProblem:
    q, k, v = (
        heads(2, n, length, layout=layout)
        for n, length in zip((8, 2, 2), (lengths[0], lengths[1], lengths[1]), strict=True)
    )
    settings: dict[str, Any] = {"softcap": None, "dropout_p": 0.0, "seed": None, "sinks": None}
    return attention_problem(q, k, v, mask, bias, None, draw_seed=True, **(settings | options))


IDS = torch.arange(96).expand(2, -1).contiguous() // 10
PROBLEMS: dict[str, Callable[[], AttentionProblem]] = {
    "full": problem_of,
    "layout": lambda: problem_of(Causal(), layout="blhd"),
    "padded": lambda: problem_of(Causal() & KeyLengths(torch.tensor([96, 50]))),
    "dropout": lambda: problem_of(dropout_p=0.1, seed=3),
    "dense": lambda: problem_of(Dense(torch.ones(96, 96, dtype=torch.bool))),
    "documents": lambda: problem_of(Documents(IDS.clone())),
    "bias": lambda: problem_of(bias=torch.zeros(2, 8, 96, 96, dtype=HALF)),
    "shared_bias": lambda: problem_of(bias=torch.zeros(1, 8, 96, 96, dtype=HALF)),
    "alibi": lambda: problem_of(bias=ALiBi(torch.rand(8))),
    "band": lambda: problem_of(Causal(torch.tensor([0, 9]))),
    "prefix": lambda: problem_of(Causal(prefix=torch.tensor([9, 0]))),
    "window": lambda: problem_of(Window(5, 5), softcap=30.0),
    "sinks": lambda: problem_of(sinks=torch.zeros(8)),
    "decoding": lambda: problem_of(KeyLengths(torch.tensor([2000, 7])), lengths=(1, 2048)),
    "packed": lambda: ahead_of_time.pack(problem_of(Causal())),
}


def both(problem: AttentionProblem) -> dict[str, Any]:
    """The tensors of forward and backward by name."""
    out, lse = attention_launch.attention(problem)
    grad_out = torch.zeros_like(out)
    wanted = problem.bias is not None
    gradients = attention_launch.attention_backward(
        problem, BackwardInputs(grad_out, None, out, lse, wanted, problem.sinks is not None)
    )
    names = ("d_query", "d_key", "d_value", "d_bias")
    fields = [field for field in problem.flat() if isinstance(field, Tensor)]
    return {
        **{str(at): field for at, field in enumerate(fields)},
        "out": out,
        "lse": lse,
        "grad": grad_out,
        **dict(zip(names, gradients, strict=False)),
    }


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plan_launches_what_the_first_call_did(name: str, launched: Any) -> None:
    first, again = PROBLEMS[name](), PROBLEMS[name]()
    tensors = both(first)
    expected = launched.in_names(tensors)
    assert len(plans.cache) == 2
    launched.clear()
    replayed = both(again)
    assert len(plans.cache) == 2
    assert len(launched) >= 4
    assert launched.in_names(replayed) == expected
    for key, tensor in tensors.items():
        if tensor is None:
            assert replayed[key] is None
            continue
        assert (replayed[key].shape, replayed[key].stride()) == (tensor.shape, tensor.stride())
        assert replayed[key].dtype == tensor.dtype


def test_a_plan_of_shared_tensors_serves_separate_ones(launched: Any) -> None:
    """Tensors that were one object at the first call have places of their own."""
    shared, mask = heads(1, 2, 96), KeyLengths(torch.tensor([50]))
    defaults = (None, None, 0.0, None, None)  # scale, softcap, dropout_p, seed, sinks
    attention_launch.attention(
        attention_problem(shared, shared, shared, mask, None, *defaults, draw_seed=True)
    )
    q, k, v = (heads(1, 2, 96) for _ in range(3))
    attention_launch.attention(attention_problem(q, k, v, mask, None, *defaults, draw_seed=True))
    assert len(plans.cache) == 1
    _, _, arguments = launched[-1]
    assert [part[0] for part in arguments[:3]] == [x.data_ptr() for x in (q, k, v)]


def test_a_call_that_has_a_plan_takes_few_steps(launched: Any, steps_of: Any) -> None:
    problem = problem_of()
    out, lse = attention_launch.attention(problem)
    inputs = BackwardInputs(torch.zeros_like(out), None, out, lse)
    calls: dict[int, Callable[[], Any]] = {
        30: lambda: attention_launch.attention(problem),
        55: lambda: attention_launch.attention_backward(problem, inputs),
    }
    for bound, call in calls.items():
        call()
        assert 10 < steps_of(call) <= bound


def test_what_is_copied_first_keeps_no_plan(launched: Any) -> None:
    """The copy is another tensor at each call, and no argument of it."""
    q = torch.zeros(2, 8, 64, 96, dtype=HALF).mT
    for _ in range(2):
        problem = attention_problem(
            *(q, q, q, None, None, None, None, 0.0, None, None), draw_seed=True
        )
        attention_launch.attention(problem)
    assert not plans.cache
    assert len(launched) == 2


def test_plans_do_not_pile_up(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MAX_PLANS", 3)
    for length in range(1, 9):
        attention_launch.attention(problem_of(lengths=(length, length)))
        assert len(plans.cache) <= 3
    assert len(launched) == 8


# --- what is compiled -----------------------------------------------------------------------------


@pytest.fixture
def variants(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The compiled kernels that are asked for, by name; `take` notes those of an attention."""
    seen: dict[str, set[str]] = defaultdict(set)

    def run(kernel: Any, *, grid: Any, warmup: bool, **arguments: Any) -> Any:
        seen[kernel.fn.__name__].add(str(binding(kernel, arguments)))
        return SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def take(problem: AttentionProblem, backward: bool = False) -> None:
    launch = attention_launch.launch_kernel
    out, lse = attention_launch.attention(problem, launch)
    if backward:
        attention_launch.attention_backward(problem, BackwardInputs(out, None, out, lse), launch)


LOOPS: dict[str, Callable[[int], AttentionProblem]] = {
    "a cache that grows": lambda at: problem_of(Causal("lower_right"), lengths=(1, at)),
    "a cache that is longer": lambda at: problem_of(
        KeyLengths(torch.tensor([at, at - 3])), lengths=(1, 1100)
    ),
    "a window": lambda at: problem_of(Window(64, 0, "lower_right"), lengths=(1, at)),
    "a short cache": lambda at: problem_of(Causal("lower_right"), lengths=(1, at - 1000)),
    "several queries": lambda at: problem_of(Causal("lower_right"), lengths=(at % 5 + 1, at)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_decoding_loop_compiles_once(name: str, variants: dict[str, set[str]]) -> None:
    """40 steps, across the length from which keys are split over programs."""
    for at in range(1004, 1044):
        take(LOOPS[name](at))
    counted = {kernel: len(found) for kernel, found in variants.items()}
    # a tile of decoding has 16, 32 or 64 rows
    assert counted.pop("decode", 1) <= (2 if name == "several queries" else 1)
    assert set(counted.values()) == {1}


def test_lengths_of_a_training_run(variants: dict[str, set[str]]) -> None:
    """Rows of lse that are aligned or not are the one difference that is compiled for."""
    for length in (96, 97, 100, 112, 125, 256):
        take(problem_of(Causal(), lengths=(length, length)), backward=True)
    counted = {kernel: len(found) for kernel, found in variants.items()}
    assert counted == {"forward": 1, "backward_preprocess": 1, "backward_dkdv": 2, "backward_dq": 2}


@pytest.mark.parametrize("kind", ["dense", "bias"])
def test_masks_and_biases_of_any_length(kind: str, variants: dict[str, set[str]]) -> None:
    """Rows that are read in chunks and rows that are not: two kernels each, whatever the length."""
    for length in (92, 96, 97, 100, 112, 120, 122, 256):
        dense, bias = (
            torch.ones(96, length, dtype=torch.bool),
            torch.zeros(8, 96, length, dtype=HALF),
        )
        options: dict[str, Any] = {"mask": Dense(dense)} if kind == "dense" else {"bias": bias}
        take(problem_of(**options, lengths=(96, length)), backward=True)
    assert {len(found) for found in variants.values() if len(found) > 1} == {2}


@pytest.mark.parametrize("op", ["attention", "add_layer_norm"])
def test_seeds_and_probabilities_compile_once(op: str, variants: dict[str, set[str]]) -> None:
    x = torch.zeros(4, 64)
    for dropout_p in (0.1, 0.25, 0.5, 0.6, 0.9, 1.0):
        for seed in (None, 0, 1, 16, 2**31, 2**40, -1):
            if op == "attention":
                take(problem_of(dropout_p=dropout_p, seed=seed), backward=True)
            else:
                add_layer_norm_once(x, dropout_p, seed)
    assert {len(found) for found in variants.values()} == {1}
    assert len(variants) == (4 if op == "attention" else 2)


def add_layer_norm_once(x: Tensor, dropout_p: float, seed: int | None) -> None:
    drawn = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    problem = AddLayerNormProblem(x, x, None, None, 1e-5, dropout_p, drawn)
    y, total, mean, rstd = norms.add_layer_norm(problem)
    norms.add_layer_norm_backward(problem, AddNormInputs(y, None, total, mean, rstd))


# --- configs that do not fit ----------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, kernel: str, count: int) -> None:
    """The first `count` configs of `kernel` ask for more shared memory than there is."""
    warmup, left = JITFunction.warmup, Counter({kernel: count})

    def short(function: Any, **arguments: Any) -> Any:
        if left[function.fn.__name__] > 0:
            left[function.fn.__name__] -= 1
            raise OutOfResources(300_000, 232_448, "shared memory")
        return warmup(function, **arguments)

    monkeypatch.setattr(JITFunction, "warmup", short)


def test_the_next_form_is_taken(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "forward", 1)
    problem = problem_of(lengths=(200, 200))
    _, second, *_ = ranked(configs.key_of("forward", problem, "sm_90"))
    with pytest.warns(RuntimeWarning, match=r"forward runs with the config .*shared memory"):
        attention_launch.attention(problem)
    ((kernel, programs, _),) = launched
    assert (kernel, programs) == ("forward", -(-200 // second.block_m) * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_launch.attention(problem)


@pytest.mark.parametrize("kernel", ["backward_preprocess", "backward_dq"])
def test_nothing_is_launched_where_no_form_fits(
    kernel: str, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of()
    out, lse = attention_launch.attention(problem)
    launched.clear()
    refusing(monkeypatch, kernel, 100)
    with pytest.raises(
        RuntimeError, match=rf"no config of the Triton kernel {kernel} fits.*shared"
    ):
        attention_launch.attention_backward(problem, BackwardInputs(out, None, out, lse))
    assert not launched


def test_an_error_that_is_no_form_s_is_not_swallowed(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Any, **arguments: Any) -> Any:
        raise KeyError("a mistake")

    monkeypatch.setattr(JITFunction, "warmup", broken)
    with pytest.raises(KeyError):
        attention_launch.attention(problem_of())


def test_unknown_gpus_are_served_as_the_nearest_lower_one() -> None:
    key = Key("sm_90", "forward", 16, 128, "base")
    for unknown, known in (("sm_95", "sm_90"), ("sm_107", "sm_103"), ("sm_130", "sm_121")):
        found = ranked(key._replace(arch=unknown))
        assert found == ranked(key._replace(arch=known))
        assert found[-1] == configs.SAFE


@pytest.mark.parametrize("capability,declined", [(75, True), (80, False), (121, False)])
def test_bfloat16_needs_its_instructions(
    capability: int, declined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_triton, "_capability", lambda device: capability)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 2, 32, 64, dtype=HALF, device="cuda")
        problem = problem_of()._replace(query=q, key=q, value=q)
        reason = gpu_triton.declines(problem)
        assert gpu_triton.declines(problem._replace(query=q.half())) is None
    assert (reason is not None) == declined
    if reason is not None:
        assert reason == "bfloat16 needs compute capability 8.0, and cuda:0 has 7.5"
