"""Times configs of one Triton attention kernel: on inputs of its own, checked, in turns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Causal, Dense, Mask
from ...kernels.api.attention import attention_problem
from ...kernels.backends.gpu_triton import interpreting
from ...kernels.backends.gpu_triton.attention_decode import CHUNK
from ...kernels.backends.gpu_triton.attention_launch import launch_kernel
from ...kernels.backends.gpu_triton.configs import TF32_BITS, Config, Key, launch_config
from ...kernels.ops.problem import AttentionProblem
from ..measure.timing import Budget, Timer, geometric_mean, interleave
from .ahead_of_time import launch_of, products_in

BUDGET = Budget(seconds=1.0, min_rounds=5, max_rounds=40)
# Configs slower than the best by more than this factor, after one sample, are not timed again.
MAX_SLOWDOWN = 1.5
WIDTH = 2048  # heads times head size
# Of each width of a type: batch and length.
SIZES = {16: (4, 4096), TF32_BITS: (4, 2048), 32: (4, 2048), 64: (2, 1024)}
# Largest difference from the config in the table, as a share of the largest element.
DIFFERENCE = {16: 2e-2, TF32_BITS: 5e-3, 32: 1e-4, 64: 1e-9}
OUTPUTS = {
    "forward": ("out", "lse"),
    "decode": ("partial", "maxima", "sums"),
    "backward_dkdv": ("d_key", "d_value"),
    "backward_dq": ("d_query", "d_bias"),
    "backward_dbias": ("d_bias",),
}


class Launched(NamedTuple):
    """A kernel with all that one launch of it takes, to be launched again in other configs."""

    kernel: Any
    extent: tuple[int, int, int]
    arguments: dict[str, Any]

    def outputs(self) -> dict[str, Tensor]:
        """The tensors that it writes."""
        found: dict[str, Tensor] = {}
        for name in OUTPUTS[self.kernel.fn.__name__]:
            value = self.arguments.get(name)
            if value is not None:
                found[name] = value if isinstance(value, Tensor) else value[0]
        return found

    def run(self, config: Config) -> None:
        programs, constants = launch_config(self.kernel, self.extent, config)
        self.kernel[(programs,)](**self.arguments, **constants)

    def compile(self, config: Config) -> None:
        _, constants = launch_config(self.kernel, self.extent, config)
        self.kernel.warmup(**self.arguments, **constants, grid=(1,))


class Trials:
    """Measures configs on `device` with `timer`; 16-bit kernels in the type `half`."""

    def __init__(
        self,
        timer: Timer,
        device: torch.device,
        half: torch.dtype = torch.bfloat16,
        sizes: Mapping[int, tuple[int, int]] = SIZES,
        width: int = WIDTH,
        log: Callable[[str], None] = print,
    ) -> None:
        self._timer = timer
        self._device = device
        self._dtypes = {16: half, TF32_BITS: torch.float32, 32: torch.float32, 64: torch.float64}
        self._sizes, self._width, self._log = sizes, width, log

    def time_configs(self, key: Key, configs: Sequence[Config]) -> dict[Config, float]:
        """Seconds of each config that works, the geometric mean over several problems."""
        times: dict[Config, list[float]] = {config: [] for config in configs}
        with products_in(key.bits):
            for problem in self.problems(key):
                measured = self._time_on(problem, key, list(times))
                times = {config: [*times[config], seconds] for config, seconds in measured.items()}
        return {config: geometric_mean(seconds) for config, seconds in times.items()}

    def compile(self, key: Key, configs: Sequence[Config]) -> None:
        """All that `time_configs` would compile."""
        with products_in(key.bits):
            for problem in self.problems(key):
                _compile_all(_launched(problem, key.kernel), configs)

    def problems(self, key: Key) -> Iterator[AttentionProblem]:
        """Problems of the key's features, one with all pairs and one that leaves some out."""
        batch, length = self._sizes[key.bits]
        heads = max(1, self._width // key.dim)
        group, queries = 1, length
        if key.kernel == "decode":
            group, queries, length = min(8, heads), 1, max(length, 2 * CHUNK)
        generator = torch.Generator(self._device).manual_seed(7)

        def normal(*size: int) -> Tensor:
            tensor = torch.randn(size, generator=generator, device=self._device)
            return tensor.to(self._dtypes[key.bits])

        q = normal(batch, heads, queries, key.dim)
        k, v = (normal(batch, heads // group, length, key.dim) for _ in range(2))
        causal = Causal("lower_right")
        dropout_p = 0.1 if "dropout" in key.features else 0.0

        def problem(mask: Mask | None, bias: Tensor | None) -> AttentionProblem:
            options: dict[str, Any] = {"scale": None, "softcap": None, "sinks": None}
            options |= {"dropout_p": dropout_p, "seed": 7, "draw_seed": True}
            return attention_problem(q, k, v, mask, bias, **options)

        if "score_mod" not in key.features:
            yield problem(None, None)
            yield problem(causal, None)
            return
        yield problem(None, normal(1, heads, queries, length))
        if key.kernel != "backward_dbias":
            coins = torch.rand(queries, length, generator=generator, device=self._device) < 0.5
            coins[:, 0] = True  # nobody is left without a key
            yield problem(causal & Dense(coins), None)

    def _time_on(
        self, problem: AttentionProblem, key: Key, configs: Sequence[Config]
    ) -> dict[Config, float]:
        launched = _launched(problem, key.kernel)
        expected = {name: tensor.clone() for name, tensor in launched.outputs().items()}
        _compile_all(launched, configs)
        runs = {}
        for config in configs:
            fault = self._fault(launched, config, expected, DIFFERENCE[key.bits])
            if fault is None:
                runs[config] = partial(launched.run, config)
            else:
                self._log(f"  {list(config)} {fault}")
        times = {config: self._timer.sample(run, 1) for config, run in runs.items()}
        limit = MAX_SLOWDOWN * min(times.values(), default=0.0)
        close = {str(list(config)): config for config, seconds in times.items() if seconds <= limit}
        calls = {name: runs[config] for name, config in close.items()}
        for name, timing in interleave(calls, BUDGET, self._timer).items():
            times[close[name]] = timing.median
        return times

    def _fault(
        self, launched: Launched, config: Config, expected: Mapping[str, Tensor], difference: float
    ) -> str | None:
        """Why the config fails; None where it runs and agrees with the one in the table."""
        try:
            for name, tensor in launched.outputs().items():
                # d_bias is given as zeros, and may keep them where nothing is attended
                tensor.fill_(0.0 if name == "d_bias" else torch.nan)
            launched.run(config)
            outputs = launched.outputs()
            for name, right in expected.items():
                found = float((outputs[name] - right).abs().max())
                largest = float(right.abs().max())
                if not found <= difference * largest:  # so that NaN is a fault
                    return (
                        f"differs from the config in the table: {name} {found:.3g} of {largest:.3g}"
                    )
        except Exception as error:
            # Too much shared memory, or a stage of the compiler that gave up: no candidate. Where
            # the GPU itself was lost, this raises again, and ends the search for this key.
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return f"does not work: {type(error).__name__}: {reason(error)}"
        return None


def reason(error: Exception) -> str:
    """The error's text on one line, of a reasonable length."""
    return " ".join((str(error) or "no reason given").split())[:200]


def _launched(problem: AttentionProblem, kernel: str) -> Launched:
    """`kernel` as `problem` launches it; it has run, in the config of the table."""
    return Launched(*launch_of(kernel, problem, launch_kernel))


def _compile_all(launched: Launched, configs: Sequence[Config]) -> None:
    """Compiles side by side, so that the GPU waits for the slowest only; errors come up later."""
    if interpreting():
        return

    def attempt(config: Config) -> None:
        with contextlib.suppress(Exception):
            launched.compile(config)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, configs))
