"""What others read: JSON by its published schema, CSV, Markdown, and a GitHub Actions summary."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import torch
from torch import nn

from rowmax.bench import cli, diverge, record, verify_model
from rowmax.bench.render import markdown
from rowmax.bench.render.json_text import json_text
from rowmax.bench.verification.outcome import CSV_FIELDS

pytestmark = pytest.mark.usefixtures("known_limits")

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "docs" / "schemas"
VERIFY = ["verify", "--backend", "reference", "--dtype", "float32", "--op", "rms_norm", "--quick"]
SPEED = ["speed", "--suite", "cpu-norms", "--shape", "8,16", "--kind", "rms_norm,layer_norm"]
SPEED += ["--peers", "torch,naive", "--seconds", "0.02", "--dtype", "float32", "--backend", "numba"]


@pytest.fixture(autouse=True)
def no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(markdown.SUMMARY, raising=False)


def valid(name: str, text: str) -> Any:
    """The document, where its schema accepts it."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8"))
    document = json.loads(text)
    check = fastjsonschema.compile(schema)
    check(document)
    for key in schema["required"]:  # the schema is one: it misses what is gone, and what is new
        with pytest.raises(fastjsonschema.JsonSchemaException):
            check({name: value for name, value in document.items() if name != key})
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check({**document, "news": 1})
    return document


def test_verify_in_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv(markdown.SUMMARY, str(summary))
    paths = {name: tmp_path / f"verify.{name}" for name in ("json", "csv", "markdown")}
    files = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert cli.main([*VERIFY, *files, "--github-summary"]) == 0
    document = valid("verify", paths["json"].read_text("utf-8"))
    rows = list(csv.DictReader(io.StringIO(paths["csv"].read_text("utf-8"))))
    assert tuple(rows[0]) == CSV_FIELDS
    cases = document["implementations"][0]["cases"]
    assert len(rows) == sum(len(case["results"]) or 1 for case in cases) > 10
    assert {row["tensor"] for row in rows} >= {"out", "d_x", "d_weight"}
    text = paths["markdown"].read_text("utf-8")
    assert text.startswith("### rowmax verify: passed ✅\n")
    assert "| reference | rms_norm | " in text
    assert " broken kernels and cheats are rejected." in text
    assert summary.read_text("utf-8") == f"before\n{text}\n"


def test_a_failure_is_told(tmp_path: Path) -> None:
    path, written = tmp_path / "verify.md", tmp_path / "verify.json"
    file = tmp_path / "wrong.py"
    file.write_text("def rms_norm(x, weight=None, eps=1e-6):\n    return x / float('inf')\n")
    arguments = ["verify", "--function", str(file), "--dtype", "float32", "--quick"]
    arguments += ["--check", "accuracy", "--markdown", str(path), "--json", str(written)]
    assert cli.main(arguments) == 1
    text = path.read_text("utf-8")
    assert text.startswith("### rowmax verify: FAILED ❌\n")
    assert re.search(r"^Failures: \d+$", text, re.MULTILINE)
    assert f"- {file}: rms_norm" in text
    valid("verify", written.read_text("utf-8"))


def test_speed_and_compare(tmp_path: Path) -> None:
    written, text = tmp_path / "speed.json", tmp_path / "speed.md"
    assert cli.main([*SPEED, "--json", str(written), "--markdown", str(text)]) == 0
    document = valid("speed", written.read_text("utf-8"))
    lines = text.read_text("utf-8").splitlines()
    head = next(line for line in lines if line.startswith("| case"))
    assert head == "| case | rowmax | torch | naive | fastest peer / rowmax |"
    rows = [line for line in lines if line.startswith(("| rms_norm", "| layer_norm"))]
    assert len(rows) == len(document["rows"]) == 4
    assert all(line.count("**") == 2 for line in rows)  # the fastest of each

    slower = copy.deepcopy(document)
    timing = slower["rows"][1]["seconds"]["rowmax"]
    for name in ("median", "low_quartile", "high_quartile"):
        timing[name] *= 1e3
    timing["interval"] = [1e3 * value for value in timing["interval"]]
    other = tmp_path / "slower.json"
    other.write_text(json.dumps(slower))
    found = tmp_path / "compare.md"
    assert cli.main(["compare", str(written), str(other), "--markdown", str(found)]) == 1
    told = found.read_text("utf-8")
    assert told.startswith("### rowmax compare: 1 slower ❌\n")
    first = next(line for line in told.splitlines() if line.startswith("| cpu-norms"))
    assert first.endswith("| 1000.00 | SLOWER |")
    assert cli.main(["compare", str(written), str(written), "--markdown", str(found)]) == 0
    assert found.read_text("utf-8").startswith("### rowmax compare: no regression ✅\n")


def test_the_other_documents(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    valid("verify-model", verify_model(model, x).as_json())
    valid("diverge", diverge(model, copy.deepcopy(model), x).as_json())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[1].weight.fill_(torch.nan)  # what JSON has no number for
    valid("diverge", diverge(model, broken, x).as_json())
    with record(tmp_path / "shapes.json"):
        model(x)
    valid("shapes", (tmp_path / "shapes.json").read_text("utf-8"))


def test_json_has_neither_nan_nor_infinity() -> None:
    text = json_text({"a": [float("inf"), 1.0], "b": {"c": float("nan")}, "d": (1, None, "x")})
    assert json.loads(text) == {"a": [None, 1.0], "b": {"c": None}, "d": [1, None, "x"]}


def test_no_summary_outside_of_github_actions(refused: Any) -> None:
    assert "$GITHUB_STEP_SUMMARY is not set" in refused(*VERIFY, "--github-summary")
    assert "$GITHUB_STEP_SUMMARY is not set" in refused(*SPEED, "--github-summary")
    assert "--markdown: can't write" in refused(*VERIFY, "--markdown", "/nonexistent-folder/x")


def test_the_example_workflow_is_understood() -> None:
    """Each command of bench in it has options that exist, and it is what the page shows."""
    text = (ROOT / "docs" / "kernel-check.yml").read_text("utf-8")
    found = re.findall(r"python -m rowmax\.bench ((?:[^\n\\]|\\\n)*)", text)
    assert [words.split()[0] for words in found] == ["verify", "speed", "speed", "compare"]
    for words in found:
        cli.build_parser().parse_args(shlex.split(words.replace("\\\n", " ")))
