"""The search for forms: what is tried, what is kept, and the trials themselves, interpreted."""

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
from rowmax.kernels.backends.gpu_triton.configurations import Configuration, Key, key_of

KEY = Key("sm_90", "forward", 16, 64, "plain")
FIRST, SECOND = tune.candidates(KEY)[:2]
OTHER = Configuration(16, 16, 1, 1)


def test_wide_types_and_heads_get_small_tiles() -> None:
    for key in tune.keys(["sm_90"]):
        forms = tune.candidates(key)
        assert len(forms) == len(set(forms)) > 1
        assert Configuration(16, 16, 4, 1) == forms[-1]
        largest = max(form.block_m * form.block_n for form in forms)
        assert largest <= {16: 128 * 128, 19: 128 * 64, 32: 64 * 32, 64: 32 * 32}[key.bits]
        assert key.dim < 256 or largest <= 64 * 64


def test_what_matters_most_comes_first() -> None:
    keys = tune.keys(["sm_90"])
    halves, tf32 = 3 * (4 * 4 + 2), 2 * (2 * 4 + 1)
    assert len(keys) == len(set(keys)) == halves + tf32 + 2 * (4 + 1) + (4 + 1)
    assert keys[:3] == [
        Key("sm_90", kernel, 16, 128, "plain")
        for kernel in ("forward", "key_gradients", "query_gradients")
    ]
    assert keys[-1].bits == 64
    assert all(key.features != "plain" for key in keys if key.kernel == "bias_gradients")


def test_the_table_is_written_after_each_key_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "forms.json"
    path.write_text('{"forms": {"sm_80/forward/16/64/plain": [64, 64, 4, 2]}}')
    keys = [KEY, KEY._replace(dim=128), KEY._replace(dim=256)]
    written: list[int] = []

    def choose(key: Key) -> tune.Choice | None:
        written.append(len(tune.read(path)))
        return None if key.dim == 128 else (FIRST, "fast")

    said: list[str] = []
    found = tune.search(keys, choose, path, None, say=said.append)
    assert written == [1, 2, 2]
    assert found == {keys[0]: FIRST, keys[2]: FIRST}
    assert said[0] == f"sm_90/forward/16/64/plain: {list(FIRST)} fast; 0.0 s"
    nothing = "sm_90/forward/16/128/plain: no candidate works; the table stays as it is; 0.0 s"
    assert said[1] == nothing
    forms = json.loads(path.read_text())["forms"]
    assert forms == {
        "sm_80/forward/16/64/plain": [64, 64, 4, 2],
        "sm_90/forward/16/64/plain": list(FIRST),
        "sm_90/forward/16/256/plain": list(FIRST),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["forms.json"]


def test_the_search_ends_with_its_time(tmp_path: Path) -> None:
    ticks = iter([0.0, 1.0, 4.0, 5.0, 9.5, 11.0])
    said: list[str] = []
    keys = tune.keys(["sm_90"])[:5]
    found = tune.search(
        keys,
        lambda _: (FIRST, ""),
        tmp_path / "forms.json",
        10.0,
        clock=lambda: next(ticks),
        say=said.append,
    )
    assert list(found) == keys[:2]
    assert [line.rsplit("; ")[-1] for line in said[:2]] == ["3.0 s", "4.5 s"]
    assert said[-1] == "stopped after 10 seconds: 3 keys not begun"


def test_the_fastest_wins_and_the_present_form_competes() -> None:
    asked: list[Configuration] = []

    def time_forms(_key: Key, forms: Sequence[Configuration]) -> dict[Configuration, float]:
        asked.extend(forms)
        return {OTHER: 2e-3, FIRST: 1e-3, SECOND: 3e-3}

    choice = tune.fastest(KEY, time_forms, OTHER)
    assert choice is not None
    form, remark = choice
    assert form == FIRST
    assert asked == [OTHER, *tune.candidates(KEY)]
    assert remark.startswith("1.000 ms, was [16, 16, 1, 1] 2.000 ms, of 3 that work")
    assert tune.fastest(KEY, lambda _key, _forms: {}, OTHER) is None


def test_candidates_that_compute_scores_twice_come_last() -> None:
    """16 rows a warp, of the tile that the first product has: queries, or key_gradients' keys."""
    wide = Configuration(128, 64, 8, 2)
    keys = KEY._replace(kernel="key_gradients")
    assert not tune.repeats(KEY, wide)
    assert tune.repeats(keys, wide)
    assert not tune.repeats(keys, Configuration(64, 128, 8, 2))
    assert not tune.repeats(keys._replace(arch="sm_100"), wide)  # tensor memory serves all warps
    assert tune.repeats(keys._replace(arch="sm_100"), Configuration(128, 32, 8, 2))
    assert not tune.repeats(keys._replace(bits=32), wide)  # no matrix instructions
    assert not tune.repeats(KEY._replace(kernel="bias_gradients"), Configuration(32, 64, 4, 2))
    for key in tune.keys(tune.ARCHS):
        repeated = [tune.repeats(key, form) for form in tune.candidates(key)]
        assert repeated == sorted(repeated)
        assert not repeated[0]


def test_the_cheapest_of_the_first_that_fit_is_taken() -> None:
    forms = tune.candidates(KEY)
    costs = {
        forms[1]: 5.0,
        forms[2]: 2.0,
        forms[3]: 1.0,
        forms[4]: 4.0,
        forms[5]: 0.5,
        forms[6]: 0.1,
    }
    asked: list[Configuration] = []

    def cost(_key: Key, form: Configuration) -> tuple[float, str] | None:
        return (costs[form], f"{costs[form]:g}") if form in costs else None

    def bears(_key: Key, form: Configuration) -> bool:
        asked.append(form)
        return form != forms[3]

    assert tune.cheapest(KEY, cost, bears) == (forms[5], "0.5")
    assert asked == [forms[1], forms[2], forms[3], forms[5]]  # the fifth costs more than the third
    assert tune.cheapest(KEY, lambda _key, _form: None, bears) is None
    assert tune.cheapest(KEY, lambda _key, _form: (1.0, "one"), bears, forms[5]) == (
        forms[5],
        "one",
    )


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
            assert kernel != "bias_gradients" or problem.bias is not None or "rich" not in features


needs_interpreter = pytest.mark.skipif(
    not gpu_triton.interpreting(), reason="needs TRITON_INTERPRET=1"
)
ONE_TILE, SMALL = Configuration(32, 32, 4, 1), Configuration(16, 32, 4, 1)
KEYS = [
    *(Key("sm_90", kernel, 32, 16, "plain") for kernel in tune.KERNELS[:4]),
    Key("sm_90", "forward", 19, 16, "plain"),
    Key("sm_90", "forward", 16, 16, "dropout"),
    Key("sm_90", "key_gradients", 64, 16, "rich"),
    Key("sm_90", "query_gradients", 32, 16, "rich"),
    Key("sm_90", "bias_gradients", 32, 16, "rich"),
]


@needs_interpreter
@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.kernel}-{key.bits}-{key.features}")
def test_forms_are_run_and_timed(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "BUDGET", Budget(0.0, 1, 1))
    for module in (trials, attention_decode, attention_launch):
        monkeypatch.setattr(module, "CHUNK", 32)
    times = small_trials().time_forms(key, [ONE_TILE, SMALL])
    assert set(times) == {ONE_TILE, SMALL}
    assert min(times.values()) > 0.0


@needs_interpreter
@pytest.mark.parametrize(
    "fault,reason",
    [
        ("wrong", "differs from the form in the table: d_value"),
        ("unwritten", "differs from the form in the table: d_key nan"),
        ("raises", "does not work: RuntimeError: out of resource: shared memory"),
    ],
)
def test_forms_that_do_not_work_are_left_out(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said why."""
    monkeypatch.setattr(trials, "BUDGET", Budget(0.0, 1, 1))
    run = trials.Launched.run

    def faulty(self: trials.Launched, form: Configuration) -> None:
        if form != SMALL:
            run(self, form)
        elif fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        elif fault == "wrong":
            run(self, form)
            self.outputs()["d_value"][0, 0, 7] *= 1.5

    monkeypatch.setattr(trials.Launched, "run", faulty)
    key = Key("sm_90", "key_gradients", 32, 16, "plain")
    assert set(small_trials().time_forms(key, [ONE_TILE, SMALL])) == {ONE_TILE}
    assert f"  {list(SMALL)} {reason}" in capsys.readouterr().out


def test_outputs_are_found_by_name() -> None:
    """Where a kernel writes: tensors, or a tensor with its strides; an absent one is None."""

    def query_gradients() -> None: ...

    kernel: Any = type("Kernel", (), {"fn": query_gradients})
    d_query = torch.zeros(2, 2)
    arguments = {"d_query": (d_query, 2, 1), "d_bias": None, "query": (torch.ones(1), 1)}
    outputs = trials.Launched(kernel, (1, 1, 1), arguments).outputs()
    assert list(outputs) == ["d_query"]
    assert outputs["d_query"] is d_query
