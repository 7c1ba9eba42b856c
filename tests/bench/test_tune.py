"""The search for configs: what is tried, what is kept, and the trials themselves, interpreted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rowmax.bench.measure.timing import Budget, HostTimer
from rowmax.bench.tuning import trials, tune
from rowmax.bench.tuning.ahead_of_time import products_in
from rowmax.kernels.backends import gpu_triton
from rowmax.kernels.backends.gpu_triton import attention_decode, attention_launch
from rowmax.kernels.backends.gpu_triton.configs import Config, Key, key_of

KEY = Key("sm_90", "forward", 16, 64, "base")
FIRST, SECOND = tune.candidates(KEY)[:2]
OTHER = Config(16, 16, 1, 1)


def test_wide_types_and_heads_get_small_tiles() -> None:
    for key in tune.keys(["sm_90"]):
        configs = tune.candidates(key)
        assert len(configs) == len(set(configs)) > 1
        assert Config(16, 16, 4, 1) == configs[-1]
        largest = max(config.block_m * config.block_n for config in configs)
        assert largest <= {16: 128 * 128, 19: 128 * 64, 32: 64 * 32, 64: 32 * 32}[key.bits]
        assert key.dim < 256 or largest <= 64 * 64


def test_what_matters_most_comes_first() -> None:
    keys = tune.keys(["sm_90"])
    halves, tf32 = 3 * (4 * 4 + 2), 2 * (2 * 4 + 1)
    assert len(keys) == len(set(keys)) == halves + tf32 + 2 * (4 + 1) + (4 + 1)
    assert keys[:3] == [
        Key("sm_90", kernel, 16, 128, "base")
        for kernel in ("forward", "backward_dkdv", "backward_dq")
    ]
    assert keys[-1].bits == 64
    assert all(key.features != "base" for key in keys if key.kernel == "backward_dbias")


def test_the_table_is_written_after_each_key_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text('{"configs": {"sm_80/forward/16/64/base": [64, 64, 4, 2]}}')
    keys = [KEY, KEY._replace(dim=128), KEY._replace(dim=256)]
    written: list[int] = []

    def choose(key: Key) -> tune.Choice | None:
        written.append(len(tune.read(path)))
        return None if key.dim == 128 else (FIRST, "fast")

    lines: list[str] = []
    found = tune.search(keys, choose, path, None, log=lines.append)
    assert written == [1, 2, 2]
    assert found == {keys[0]: FIRST, keys[2]: FIRST}
    assert lines[0] == f"sm_90/forward/16/64/base: {list(FIRST)} fast; 0.0 s"
    nothing = "sm_90/forward/16/128/base: no candidate works; the table stays as it is; 0.0 s"
    assert lines[1] == nothing
    configs = json.loads(path.read_text())["configs"]
    assert configs == {
        "sm_80/forward/16/64/base": [64, 64, 4, 2],
        "sm_90/forward/16/64/base": list(FIRST),
        "sm_90/forward/16/256/base": list(FIRST),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["configs.json"]


def test_the_search_ends_with_its_time(tmp_path: Path) -> None:
    ticks = iter([0.0, 1.0, 4.0, 5.0, 9.5, 11.0])
    lines: list[str] = []
    keys = tune.keys(["sm_90"])[:5]
    found = tune.search(
        keys,
        lambda _: (FIRST, ""),
        tmp_path / "configs.json",
        10.0,
        clock=lambda: next(ticks),
        log=lines.append,
    )
    assert list(found) == keys[:2]
    assert [line.rsplit("; ")[-1] for line in lines[:2]] == ["3.0 s", "4.5 s"]
    assert lines[-1] == "stopped after 10 seconds: 3 keys not begun"


def test_the_fastest_wins_and_the_present_config_competes() -> None:
    asked: list[Config] = []

    def time_configs(_key: Key, configs: Sequence[Config]) -> dict[Config, float]:
        asked.extend(configs)
        return {OTHER: 2e-3, FIRST: 1e-3, SECOND: 3e-3}

    choice = tune.fastest(KEY, time_configs, OTHER)
    assert choice is not None
    config, remark = choice
    assert config == FIRST
    assert asked == [OTHER, *tune.candidates(KEY)]
    assert remark.startswith("1.000 ms, was [16, 16, 1, 1] 2.000 ms, of 3 that work")
    assert tune.fastest(KEY, lambda _key, _configs: {}, OTHER) is None


def test_candidates_that_compute_scores_twice_come_last() -> None:
    """16 rows a warp, of the tile that the first product has: queries, or backward_dkdv' keys."""
    wide = Config(128, 64, 8, 2)
    keys = KEY._replace(kernel="backward_dkdv")
    assert not tune.repeats(KEY, wide)
    assert tune.repeats(keys, wide)
    assert not tune.repeats(keys, Config(64, 128, 8, 2))
    assert not tune.repeats(keys._replace(arch="sm_100"), wide)  # tensor memory serves all warps
    assert tune.repeats(keys._replace(arch="sm_100"), Config(128, 32, 8, 2))
    assert not tune.repeats(keys._replace(bits=32), wide)  # no matrix instructions
    assert not tune.repeats(KEY._replace(kernel="backward_dbias"), Config(32, 64, 4, 2))
    for key in tune.keys(tune.ARCHS):
        repeated = [tune.repeats(key, config) for config in tune.candidates(key)]
        assert repeated == sorted(repeated)
        assert not repeated[0]


def test_the_cheapest_of_the_first_that_fit_is_taken() -> None:
    configs = tune.candidates(KEY)
    costs = dict(zip(configs[1:7], (5.0, 2.0, 1.0, 4.0, 0.5, 0.1), strict=True))
    asked: list[Config] = []

    def cost(_key: Key, config: Config) -> tuple[float, str] | None:
        return (costs[config], f"{costs[config]:g}") if config in costs else None

    def fits_all(_key: Key, config: Config) -> bool:
        asked.append(config)
        return config != configs[3]

    assert tune.cheapest(KEY, cost, fits_all) == (configs[5], "0.5")
    # the fifth costs more than the third
    assert asked == [*configs[1:4], configs[5]]
    assert tune.cheapest(KEY, lambda _key, _config: None, fits_all) is None
    found = tune.cheapest(KEY, lambda _key, _config: (1.0, "one"), fits_all, configs[5])
    assert found == (configs[5], "one")


def small_trials() -> trials.Trials:
    sizes = dict.fromkeys((16, 19, 32, 64), (2, 20))
    return trials.Trials(HostTimer(), torch.device("cpu"), sizes=sizes, width=16)


@pytest.mark.parametrize("features", tune.FEATURES)
def test_the_problems_are_those_of_the_key(features: str) -> None:
    for kernel in tune.KERNELS:
        key = Key("sm_90", kernel, 32, 16, features)
        problems = list(small_trials().problems(key))
        assert problems
        for problem in problems:
            assert key_of(kernel, problem, "sm_90") == key
            with products_in(19):
                assert key_of(kernel, problem, "sm_90") == key._replace(bits=19)
            if kernel == "backward_dbias" and "score_mod" in features:
                assert problem.bias is not None


needs_interpreter = pytest.mark.skipif(
    not gpu_triton.interpreting(), reason="needs TRITON_INTERPRET=1"
)
ONE_TILE, SMALL = Config(32, 32, 4, 1), Config(16, 32, 4, 1)
KEYS = [
    *(Key("sm_90", kernel, 32, 16, "base") for kernel in tune.KERNELS[:4]),
    Key("sm_90", "forward", 19, 16, "base"),
    Key("sm_90", "forward", 16, 16, "dropout"),
    Key("sm_90", "backward_dkdv", 64, 16, "score_mod"),
    Key("sm_90", "backward_dq", 32, 16, "score_mod"),
    Key("sm_90", "backward_dbias", 32, 16, "score_mod"),
]


@needs_interpreter
@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.kernel}-{key.bits}-{key.features}")
def test_configs_are_run_and_timed(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "BUDGET", Budget(0.0, 1, 1))
    for module in (trials, attention_decode, attention_launch):
        monkeypatch.setattr(module, "CHUNK", 32)
    times = small_trials().time_configs(key, [ONE_TILE, SMALL])
    assert set(times) == {ONE_TILE, SMALL}
    assert min(times.values()) > 0.0


@needs_interpreter
@pytest.mark.parametrize(
    "fault,reason",
    [
        ("wrong", "differs from the config in the table: d_value"),
        ("unwritten", "differs from the config in the table: d_key nan"),
        ("raises", "does not work: RuntimeError: out of resource: shared memory"),
    ],
)
def test_configs_that_do_not_work_are_left_out(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is lines why."""
    monkeypatch.setattr(trials, "BUDGET", Budget(0.0, 1, 1))
    run = trials.Launched.run

    def faulty(self: trials.Launched, config: Config) -> None:
        if config != SMALL:
            run(self, config)
        elif fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        elif fault == "wrong":
            run(self, config)
            self.outputs()["d_value"][0, 0, 7] *= 1.5

    monkeypatch.setattr(trials.Launched, "run", faulty)
    key = Key("sm_90", "backward_dkdv", 32, 16, "base")
    assert set(small_trials().time_configs(key, [ONE_TILE, SMALL])) == {ONE_TILE}
    assert f"  {list(SMALL)} {reason}" in capsys.readouterr().out


def test_outputs_are_found_by_name() -> None:
    """Where a kernel writes: tensors, or a tensor with its strides; an absent one is None."""

    def backward_dq() -> None: ...

    kernel: Any = type("Kernel", (), {"fn": backward_dq})
    d_query = torch.zeros(2, 2)
    arguments = {"d_query": (d_query, 2, 1), "d_bias": None, "query": (torch.ones(1), 1)}
    outputs = trials.Launched(kernel, (1, 1, 1), arguments).outputs()
    assert list(outputs) == ["d_query"]
    assert outputs["d_query"] is d_query
