"""`bench compare` and the history: the output, and the exit status that holds the line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rowmax.bench import cli
from rowmax.bench.measure import history
from rowmax.bench.options import UsageError

from .results import document


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    "factor, threshold, status, word",
    [
        (1.0, "5", 0, "level"),
        (1.015, "0", 0, "level"),  # within the intervals of both
        (1.04, "5", 0, "within the threshold"),
        (1.04, "3", 1, "SLOWER"),
        (1.2, "5", 1, "SLOWER"),
        (1.2, "25", 0, "within the threshold"),
        (0.8, "5", 0, "faster"),
    ],
)
def test_verdicts(
    factor: float, threshold: str, status: int, word: str, save: Any, shown: Any
) -> None:
    files = [save("a.json", document()), save("b.json", document(factor))]
    lines = shown("compare", *files, "--threshold", threshold, status=status).splitlines()
    assert max(map(len, lines)) <= 110
    cases = [line for line in lines if line.startswith(" cpu-")]
    assert len(cases) == 4
    assert all(line.endswith(word) for line in cases)
    assert f"geometric mean of B/A {factor:.3f}" in lines[-1]


def test_a_former_kind_is_the_same_case(save: Any, shown: Any) -> None:
    older, newer = document(), document()
    for found, kind in ((older, "plain+dropout"), (newer, "full+dropout")):
        found["rows"][0]["kind"] = kind
    assert "full+dropout (8,8,128,64)" in shown(
        "compare", save("a.json", older), save("b.json", newer)
    )


def test_by_ratio_a_slower_machine_is_level(save: Any, shown: Any) -> None:
    slow = document()
    for row in slow["rows"]:
        for timing in row["seconds"].values():
            timing["median"] *= 3
            timing["interval"] = [3 * edge for edge in timing["interval"]]
    slow["machine"] = {**slow["machine"], "cpu": "another"}
    slow["noise"]["complaints"] = ["it was busy"]
    slow["settings"] = {**slow["settings"], "memory": "kept", "layout": "blhd"}
    files = [save("a.json", document()), save("b.json", slow)]
    output = shown("compare", *files, status=1)
    assert "other machines (cpu)" in output
    assert "B was noisy: it was busy" in output
    assert "A has fresh memory for results, B kept" in output
    assert "A has tensors in bhld, B in blhd" in output
    assert cli.main(["compare", *files, "--by", "ratio"]) == 0


def test_wrong_calls(save: Any, tmp_path: Path, refused: Any) -> None:
    good = save("good.json", document())
    empty = save("empty.json", {**document(), "rows": []})
    for arguments, words in (
        ([good, str(tmp_path / "none.json")], "can't read"),
        ([good, save("text.json", "what?")], "is no JSON"),
        ([good, save("list.json", [1])], "got schema None"),
        ([save("old.json", {**document(), "schema": 2}), good], "with schema 3, got schema 2"),
        ([good, save("verify.json", {"schema": "rowmax-verify-1"})], "'rowmax-verify-1'"),
        ([empty, empty], "neither file has a case of rowmax"),
        ([good, good, "--candidate", "flex"], "neither file has a case of flex"),
        ([good, good, "--threshold", "-1"], "--threshold: expected a number >= 0"),
        ([good, good, "--threshold", "nan"], "--threshold: expected a number >= 0"),
        ([good, good, "--by", "ratio", "--candidate", "sdpa"], "--candidate: --by ratio is"),
    ):
        assert words in refused("compare", *arguments)


@pytest.mark.parametrize("at", [0, 1])
def test_cases_of_one_run_alone_are_named(at: int, save: Any, shown: Any) -> None:
    """Left out, or no longer timed since the kernel failed: status 1, as where it became slower."""
    less = document()
    del less["rows"][1]
    failed = less["rows"][2]
    del failed["seconds"]["rowmax"]
    failed["faults"]["rowmax"] = "largest error 1"
    files = [save("whole.json", document()), save("less.json", less)]
    output = shown("compare", *(files if at == 1 else files[::-1]), status=1)
    whole, other = ("A", "B") if at == 1 else ("B", "A")
    only = f"only in {whole}, not in {other}: "
    assert output.splitlines()[-2:] == [
        f"{only}cpu-attention float32 causal (8,8,512,64) fwd",
        f"{only}cpu-norms float32 layer_norm (4096,512) fwd, where rowmax failed: largest error 1",
    ]


def test_runs_with_nothing_in_common(save: Any, shown: Any) -> None:
    files = [save("all.json", document()), save("none.json", {**document(), "rows": []})]
    output = shown("compare", *files, status=1).splitlines()
    assert output[-5] == "no case in common"
    assert all(line.startswith("only in A, not in B: cpu-") for line in output[-4:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("rows"),
        lambda found: found.update(rows=None),
        lambda found: found.update(rows=[1]),
        lambda found: found.pop("machine"),
        lambda found: found.pop("noise"),
        lambda found: found["rows"][0].pop("shape"),
        lambda found: found["rows"][0].update(shape=["x"]),
        lambda found: found["rows"][0].update(fastest_peer=[]),
        lambda found: found["rows"][0]["seconds"]["sdpa"].pop("interval"),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(median=0),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(median=float("nan")),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(median="fast"),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(interval=[1.0]),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(interval=[3.0, 4.0]),
        lambda found: found["rows"][0]["seconds"]["rowmax"].update(median=10**400),
        lambda found: found["rows"][0].update(shape=[float("inf")]),
        lambda found: found["rows"][0].update(faults=[]),
        lambda found: found["rows"][0].update(kind="\ud800"),
        lambda found: found["machine"].update(cpu="\ud800"),
        lambda found: found["machine"].update(packages=[]),
        lambda found: found["noise"].update(complaints=["\udfff"]),
        lambda found: found["rows"][0].update(fastest_peer="\udfff"),
    ],
)
def test_a_damaged_file(damage: Any, save: Any, refused: Any) -> None:
    damaged = document()
    damage(damaged)
    files = [save("good.json", document()), save("damaged.json", damaged)]
    for order in (files, files[::-1]):
        message = refused("compare", *order, "--by", "ratio")
        assert message.startswith("rowmax.bench: ")
        assert "damaged.json is damaged: " in message


def test_deep_json_and_a_byte_order_mark(save: Any, refused: Any) -> None:
    good = save("good.json", document())
    assert "deep.json is no JSON" in refused("compare", good, save("deep.json", "[" * 100_000))
    assert cli.main(["compare", good, save("mark.json", "\ufeff" + json.dumps(document()))]) == 0


def test_the_history_grows_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history.check(path)
    history.append(path, document())
    first = path.read_text("utf-8")
    path.write_text("\ufeff" + first, "utf-8")  # as a spreadsheet saves it
    history.check(path)
    path.write_text(first, "utf-8")
    history.append(path, document(2.0, complaints=("busy",)))
    assert path.read_text("utf-8").startswith(first)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3
    assert {row["candidate"] for row in rows} == {"rowmax", "sdpa", "naive"}
    assert (rows[0]["noisy_run"], rows[-1]["noisy_run"]) == ("False", "True")
    assert float(rows[12]["median_s"]) == 2 * float(rows[0]["median_s"])
    assert rows[0]["shape"] == "8x8x128x64"
    assert rows[0]["cpu"] == "Some CPU <of ours>"


def test_a_history_of_another_kind_is_left_alone(tmp_path: Path, refused: Any) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(UsageError, match="other columns"):
        history.check(path)
    assert path.read_text("utf-8") == "a,b\n1,2\n"
    refused("speed", "--suite", "cpu-norms", "--csv", str(path))
