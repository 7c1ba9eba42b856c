"""The notebook of examples/ runs from top to bottom and draws; it is kept without output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install "rowmax[examples]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install "rowmax[examples]"')

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = FOLDER / "tour.ipynb"


def texts(outputs: list[Any]) -> str:
    return "".join(one.get("text", "") for one in outputs if one["output_type"] == "stream")


@pytest.mark.slow
def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [{kind for one in cell.outputs for kind in one.get("data", {})} for cell in cells]
    pictures = [cell for cell, kind in zip(cells, kinds, strict=True) if "text/html" in kind]
    assert len(pictures) == 2
    assert all("<svg" in cell.outputs[0]["data"]["text/html"] for cell in pictures)
    assert "image/png" in kinds[-1]
    said = [texts(cell.outputs) for cell in cells]
    assert any("a cell stands for 171 x 171" in text for text in said)
    assert any("the original in every layer" in text for text in said), said
    assert any("9 of 9 sites swapped" in text for text in said)


def test_it_is_kept_without_output() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
