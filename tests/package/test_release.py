"""The workflow of a release: it refuses a wrong tag, and tries the oldest that is promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rowmax

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")


@pytest.mark.parametrize(
    "tag, status", [(f"v{rowmax.__version__}", 0), (rowmax.__version__, 1), ("v0.0.0", 1)]
)
def test_the_tag_is_the_version(tag: str, status: int) -> None:
    (command,) = re.findall(r'^ +run: (test "\$GITHUB_REF_NAME" .*)', WORKFLOW, re.M)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        env=os.environ | {"PATH": path, "GITHUB_REF_NAME": tag},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize(
    "kind, promised",
    [("python", r'requires-python = ">=([\d.]+)"'), ("torch", r'"torch>=([\d.]+)"')],
)
def test_the_oldest_that_is_promised_is_tried(kind: str, promised: str) -> None:
    (oldest,) = re.findall(promised, (ROOT / "pyproject.toml").read_text("utf-8"))
    (tried,) = re.findall(rf"^ +{kind}: \[(.*)\]", WORKFLOW, re.M)
    assert tried.split(",")[0].strip('"') in (oldest, f"{oldest}.0")
