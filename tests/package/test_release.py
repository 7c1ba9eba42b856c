"""The workflow of a release: it refuses a wrong tag, tries the oldest that is promised, and runs
actions that nobody can exchange."""

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
WORKFLOWS = [
    *sorted((ROOT / ".github" / "workflows").glob("*.yml")),
    ROOT / "docs/kernel-check.yml",
]
# Its authors recommend this branch.
BY_BRANCH = "pypa/gh-action-pypi-publish@release/v1"


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


def unpinned(workflow: str) -> list[str]:
    """The actions in it that are not a full commit hash with the version as a comment."""
    used = re.findall(r"^[ -]*uses: *(.+?) *$", workflow, re.M)
    pinned = re.compile(r"[\w-]+/[\w./-]+@[0-9a-f]{40} +# v\d+\.\d+\.\d+")
    return [action for action in used if not pinned.fullmatch(action) and action != BY_BRANCH]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_commits(path: Path) -> None:
    """A tag can be moved to another commit; `.github/dependabot.yml` proposes newer hashes."""
    workflow = path.read_text("utf-8")
    assert "uses: " in workflow
    assert not unpinned(workflow)
    folder = "/" if path.parent.name == "workflows" else f"/{path.parent.name}"
    dependabot = (ROOT / ".github" / "dependabot.yml").read_text("utf-8")
    assert f'"{folder}"' in re.findall(r"^ +directories: (.*)$", dependabot, re.M)[0]


@pytest.mark.parametrize(
    "action",
    ["a/b@v7", "a/b@main", f"a/b@{'1' * 7} # v7.0.1", f"a/b@{'1' * 40}", f"a/b@{'1' * 40} # v7"],
)
def test_an_action_that_is_not_pinned_is_found(action: str) -> None:
    """A tag, a branch, half a hash; and a hash of which nobody can tell the version."""
    assert unpinned(f"      - uses: {action}\n") == [action]
    assert unpinned(f"      - name: x\n        uses: {action}\n") == [action]


def test_an_action_has_one_hash_in_all_workflows() -> None:
    found = {
        action
        for path in WORKFLOWS
        for action in re.findall(r"uses: (\S+@[0-9a-f]{40} # .*)", path.read_text("utf-8"))
    }
    assert len(found) == len({action.partition("@")[0] for action in found}), sorted(found)
