"""`python -m rowmax.bench tune`: finds and stores the configs of the Triton attention kernels.

On a GPU each candidate is timed. With `--compile`, for GPUs that are not there, the first ones that
fit are compared by what their loop issues. The table is written after each key, so that a search
that is stopped loses nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ...kernels.backends import gpu_triton
from ..options import UsageError, check_writable, listed, names_of, seconds_of, told

if TYPE_CHECKING:  # they need Triton
    from ...kernels.backends.gpu_triton.configs import Config, Key
    from .trials import Trials

KERNELS = ("forward", "backward_dkdv", "backward_dq", "decode", "backward_dbias")
FEATURES = ("base", "score_mod", "dropout", "score_mod_dropout")
# By the bits of a type, 19 are TF32's. Features without an entry take that of all features at once:
# a config that fits with them fits with fewer. Wide types have few entries: arithmetic limits them.
FEATURES_OF = {
    16: FEATURES,
    19: ("base", "score_mod_dropout"),
    32: ("score_mod_dropout",),
    64: ("score_mod_dropout",),
}
DIMS = (128, 64, 256)
# Of wide types larger heads than these take the safe config: a row alone fills the registers.
WIDEST = {16: 256, 19: 128, 32: 128, 64: 64}
FOREMOST = "sm_90"
# Serves all unknown GPUs: half types have two configs a size, all others the safe ones.
SMALL = "sm_89"
ARCHS = (FOREMOST, "sm_80", "sm_100", SMALL)
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
# Rows of a tile that a warp of a matrix product has at least. Where a product goes on into another
# one, Triton puts all warps below each other: of fewer rows, several compute the same scores.
ROWS_OF_WARP = 16
CHAINED = ("forward", "backward_dkdv", "backward_dq")
COMPARED = 3  # configs that fit, of which the cheapest is taken
LIMIT = 300.0  # seconds that the configs of one key are timed, or compiled
AT_ONCE = 8  # keys whose configs are compiled side by side
BITS = {"bfloat16": 16, "float16": 16, "tf32": 19, "float32": 32, "float64": 64}
TABLE = Path(gpu_triton.__file__).parent / "configs.json"

# (BLOCK_M, BLOCK_N, warps, stages), the most promising first and the safest last.
_QUERY_TILE_CONFIGS = (
    *((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
    *((128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    *((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    *((64, 16, 4, 1), (64, 32, 8, 2), (32, 32, 2, 2), (32, 16, 2, 1)),
    *((32, 32, 4, 2), (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
)
_KEY_TILE_CONFIGS = (
    *((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)),
    *((32, 64, 4, 2), (16, 128, 8, 2), (16, 64, 4, 2), (16, 64, 4, 1)),
    *((32, 32, 2, 2), (16, 32, 2, 2), (16, 32, 2, 1), (64, 64, 8, 2)),
    *((32, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    *((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
)
_DBIAS_CONFIGS = (
    *((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    *((32, 64, 8, 1), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    *((16, 32, 8, 1), (16, 16, 4, 1)),
)
# Most often there are no more than 16 rows: their number yields first.
_DECODE_CONFIGS = (
    *((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
    *((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)),
    *((16, 16, 4, 1),),
)
_CONFIGS = {
    "decode": _DECODE_CONFIGS,
    "forward": _QUERY_TILE_CONFIGS,
    "backward_dq": _QUERY_TILE_CONFIGS,
    "backward_dkdv": _KEY_TILE_CONFIGS,
    "backward_dbias": _DBIAS_CONFIGS,
}

Choice = tuple["Config", str]  # the config, and a remark for the log
Choose = Callable[["Key"], "Choice | None"]


def candidates(key: Key) -> list[Config]:
    """The configs that are worth a trial: a wider type or head needs smaller tiles.

    Those in which warps repeat each other's scores come last: large heads, or all features at once,
    leave no registers for others.
    """
    from ...kernels.backends.gpu_triton.configs import Config

    side = {16: 128, 19: 128, 32: 64, 64: 32}[key.bits]
    area, stages = side * side if key.dim < 256 else min(side * side, 64 * 64), 3
    if key.bits > 16:  # their blocks take the room of two
        area, stages = 128 * 64 if key.dim <= 64 else 64 * 64, 2
    if key.bits >= 32:  # without matrix instructions, or with those of float64: all in registers
        area //= 4
    configs = (Config(*config) for config in _CONFIGS[key.kernel])
    fitting = [
        config
        for config in configs
        if max(config.block_m, config.block_n) <= side
        and config.block_m * config.block_n <= area
        and config.num_stages <= stages
    ]
    return sorted(fitting, key=lambda config: repeats(key, config))


def repeats(key: Key, config: Config) -> bool:
    """Whether warps compute the same scores: of too few rows for them all.

    Not where products are FMAs, nor where sm_100's tensor memory serves all warps.
    """
    if key.kernel not in CHAINED or key.bits not in (16, 19):
        return False
    rows = config.block_n if key.kernel == "backward_dkdv" else config.block_m
    if key.arch.startswith("sm_10") and rows >= 64:
        return False
    return rows < ROWS_OF_WARP * config.num_warps


def keys(
    archs: Iterable[str],
    kernels: Sequence[str] = KERNELS,
    dims: Sequence[int] = DIMS,
    bits: Iterable[int] = (16, 19, 32, 64),
    features: Sequence[str] = FEATURES,
) -> list[Key]:
    """Every combination that has an entry of its own, what matters most first."""
    from ...kernels.backends.gpu_triton.configs import Key

    found = [
        Key(arch, kernel, width, dim, feature)
        for arch in archs
        for width in bits
        for feature in features
        for dim in dims
        for kernel in kernels
        if (kernel != "backward_dbias" or "score_mod" in feature) and feature in FEATURES_OF[width]
        if dim <= WIDEST[width]
        if arch != SMALL
        or (width == 16 and dim <= 128 and feature in ("base", "score_mod_dropout"))
    ]
    # a stable sort: heads of 256 after all the others of the type
    return sorted(found, key=lambda key: (key.arch != FOREMOST, key.arch, key.bits, key.dim >= 256))


def search(
    wanted: Iterable[Key],
    choose: Choose,
    path: Path,
    seconds: float | None,
    clock: Callable[[], float] = perf_counter,
    log: Callable[[str], None] = print,
) -> dict[Key, Config]:
    """Chooses a config for each key until the time is over; stores each in the table at `path`."""
    started = clock()
    found: dict[Key, Config] = {}
    wanted = list(wanted)
    for done, key in enumerate(wanted):
        begun = clock()
        if seconds is not None and begun - started >= seconds:
            log(f"stopped after {seconds:g} seconds: {len(wanted) - done} keys not begun")
            break
        choice = choose(key)
        took = f"{clock() - begun:.1f} s"
        if choice is None:
            log(f"{_name(key)}: no candidate works; the table stays as it is; {took}")
            continue
        config, remark = choice
        found[key] = config
        store(path, {key: config})
        log(f"{_name(key)}: {list(config)} {remark}; {took}")
    return found


def fastest(
    key: Key,
    time_configs: Callable[[Key, Sequence[Config]], Mapping[Config, float]],
    present: Config,
) -> Choice | None:
    """The fastest candidate or the config in the table; `time_configs` leaves out failures."""
    configs = _competing(key, present)
    times = time_configs(key, configs)
    if not times:
        return None
    best = min(times, key=lambda config: times[config])
    before = times.get(present, math.nan)
    remark = f"{1e3 * times[best]:.3f} ms, was {list(present)} {1e3 * before:.3f} ms"
    return best, f"{remark}, of {len(times)} that work out of {len(configs)}"


def _competing(key: Key, present: Config) -> list[Config]:
    return list(dict.fromkeys((present, *candidates(key))))


def cheapest(
    key: Key,
    cost: Callable[[Key, Config], tuple[float, str] | None],
    fits_all: Callable[[Key, Config], bool],
    begin: Config | None = None,
) -> Choice | None:
    """Of the first candidates that fit the GPU, none before `begin`, the one of least cost.

    `cost` is None where a config does not fit; `fits_all` checks the harder problems of the key.
    """
    configs = candidates(key)
    if begin in configs:
        configs = configs[configs.index(begin) :]
    found: list[tuple[float, Config, str]] = []
    for config in configs:
        costs = cost(key, config)
        # a dearer config than one that is found needs no check
        if costs is None or any(costs[0] >= other for other, _, _ in found):
            continue
        if fits_all(key, config):
            found.append((costs[0], config, costs[1]))
        if len(found) >= COMPARED:
            break
    if not found:
        return None
    _, config, remark = min(found, key=lambda one: one[0])
    return config, remark


def store(path: Path, configs: Mapping[Key, Config]) -> None:
    """Adds the configs to the table, or replaces those of the same keys."""
    names = {_name(key): list(config) for key, config in configs.items()}
    entries = {**read(path), **names}
    lines = [f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
    text = '{"configs": {\n' + ",\n".join(lines) + "\n}}\n"
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)  # whole or not at all


def read(path: Path) -> dict[str, list[int]]:
    """The entries of a table, none where there is no file yet. UsageError where it is no table."""
    try:
        text = path.read_text("utf-8-sig") if path.exists() else ""
        return dict(json.loads(text)["configs"]) if text else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is no table of configs: {error}") from error


def _name(key: Key) -> str:
    return "/".join(map(str, key))


def add_options(command: argparse.ArgumentParser) -> None:
    add_key_options(command)
    command.add_argument("--seconds", type=float, help="begin no further key after this")
    command.add_argument(
        "--limit", type=float, metavar="SECONDS", help=f"for a key; default: {LIMIT:g}"
    )
    command.add_argument(
        "--missing", action="store_true", help="only what the table does not hold yet"
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="without a GPU: the first config of each that compiles without spilling, and fits",
    )
    command.add_argument(
        "--arch", metavar="NAMES", help=f"with --compile; default: {','.join(ARCHS)}"
    )
    command.add_argument(
        "--output", metavar="FILE", type=Path, default=TABLE, help="default: the kernels' own table"
    )


def add_key_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--kernel", metavar="NAMES", help=f"of {listed(KERNELS)}; default: all")
    command.add_argument("--dim", metavar="SIZES", help="head sizes; default: 64,128,256")
    command.add_argument("--dtype", metavar="NAMES", help=f"of {listed(BITS)}; default: all")
    command.add_argument("--features", metavar="NAMES", help=f"of {listed(FEATURES)}; default: all")


def keys_chosen(options: argparse.Namespace) -> Callable[[Iterable[str]], list[Key]]:
    """For architectures, the keys that the options name."""
    kernels = names_of("--kernel", options.kernel, KERNELS)
    dims = [int(dim) for dim in names_of("--dim", options.dim, map(str, DIMS))]
    dtypes = names_of("--dtype", options.dtype, BITS)
    features = names_of("--features", options.features, FEATURES)
    bits = dict.fromkeys(BITS[name] for name in dtypes)
    return lambda archs: keys(archs, kernels, dims, bits, features)


def check_compiler(command: str, done: str) -> None:
    """UsageError where Triton's compiler, by which things are `done`, is not at work here."""
    if find_spec("triton") is None:
        raise UsageError(f'{command}: Triton is not installed: pip install "rowmax[triton]"')
    if gpu_triton.interpreting():
        raise UsageError(f"{command}: TRITON_INTERPRET is set; what is interpreted can't be {done}")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status, 1 where something was wanted and nothing found."""
    chosen = keys_chosen(options)
    seconds = seconds_of("--seconds", options.seconds)
    limit = seconds_of("--limit", options.limit) or LIMIT
    if options.arch is not None and not options.compile:
        raise UsageError("--arch: only with --compile; otherwise it is that of the GPU here")
    check_compiler("tune", "tuned")
    if options.compile:
        text = ",".join(ARCHS) if options.arch is None else options.arch
        archs = names_of("--arch", text, SHARED_LIMIT)
    else:
        if not torch.cuda.is_available():
            raise UsageError("tune: torch sees no GPU; --compile does without one")
        from ...kernels.backends.gpu_triton.configs import architecture

        archs = [architecture(torch.device("cuda", torch.cuda.current_device()))]
    check_writable("--output", options.output)
    present = read(options.output)
    wanted = chosen(archs)
    if options.missing:
        wanted = [key for key in wanted if _name(key) not in present]
    first = names_of("--dtype", options.dtype, BITS)[0]
    half = getattr(torch, first) if BITS[first] == 16 else torch.bfloat16
    choose = _by_compiling(options.output) if options.compile else _by_timing(wanted, half, limit)
    found = search(wanted, choose, options.output, seconds, log=_log)
    _log(f"{len(found)} of {len(wanted)} configs written to {options.output}")
    return 1 if wanted and not found else 0


def _log(line: str) -> None:
    print(line, flush=True)


def _by_timing(wanted: Sequence[Key], half: torch.dtype, seconds: float) -> Choose:
    """A key has a process of its own: one that loses the GPU, or never ends, stops no other.

    The configs of some keys are compiled side by side before the first of them is timed.
    """
    from ..measure import isolated

    ready: set[Key] = set()

    def compile_configs(key: Key) -> None:
        try:
            list(isolated.results(compiled, key, half, seconds=seconds))
        except isolated.LostError as error:
            _log(f"  {_name(key)}: compiling: {error}")

    def choose(key: Key) -> Choice | None:
        if key not in ready:
            at = wanted.index(key)
            ready.update(wanted[at : at + AT_ONCE])
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(compile_configs, wanted[at : at + AT_ONCE]))
        try:
            return next(iter(isolated.results(timed, key, half, seconds=seconds)), None)
        except isolated.LostError as error:
            _log(f"  {_name(key)}: {error}")
            return None

    return choose


def compiled(key: Key, half: torch.dtype) -> tuple[()]:
    """Leaves the configs of `key` in Triton's cache."""
    _trials(half).compile(key, _competing(key, _in_table(key)))
    return ()


def timed(key: Key, half: torch.dtype) -> list[Choice]:
    """The fastest config of `key` on the GPU here, if one works."""
    choice = fastest(key, _trials(half).time_configs, _in_table(key))
    return [] if choice is None else [choice]


def _in_table(key: Key) -> Config:
    from ...kernels.backends.gpu_triton.configs import lookup

    return lookup(key)


def _trials(half: torch.dtype) -> Trials:
    from ..measure.timing import timer_for
    from .trials import Trials

    return Trials(timer_for("cuda"), torch.device("cuda"), half, log=_log)


def _by_compiling(path: Path) -> Choose:
    """Larger tiles than FOREMOST fits_all are not tried elsewhere: most would be in vain."""
    from ...kernels.backends.gpu_triton.configs import Config
    from . import ahead_of_time

    def cost(key: Key, config: Config) -> tuple[float, str] | None:
        try:
            compiled = ahead_of_time.compile_config(key, config)
        except Exception as error:
            complain(config, error)
            return None
        if not compiled.fits(key.arch):
            return None
        cycles = f"{compiled.cycles:.0f} cycles for 4,096 scores"
        remark = f"{compiled.registers} registers, {compiled.shared} bytes shared, {cycles}"
        return compiled.cycles, remark

    def fits_all(key: Key, config: Config) -> bool:
        try:
            return ahead_of_time.fits_all(key, config)
        except Exception as error:
            complain(config, error)
            return False

    def complain(config: Config, error: Exception) -> None:
        """Any stage of the compiler may have failed: it may be a fault of the kernel too."""
        _log(f"  {list(config)} does not compile: {told(error)}")

    def choose(key: Key) -> Choice | None:
        known = read(path).get(_name(key._replace(arch=FOREMOST)))
        begin = None if known is None or key.arch == FOREMOST else Config(*known)
        return cheapest(key, cost, fits_all, begin)

    return choose
