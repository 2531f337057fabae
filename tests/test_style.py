"""Lint, format, types and the wording of docstrings, as part of the tests."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.quick
@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_clean(command: str) -> None:
    numpy = f"numpy=={importlib.metadata.version('numpy')}"
    if command == "mypy" and numpy not in (ROOT / ".ci" / "constraints.txt").read_text().splitlines():
        pytest.skip(f"{numpy} has other types than the lock's")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


LEANING = frozenset("it what which that those one they them whose".split())
"""Words that often stand in a docstring for a noun that the reader cannot know yet."""


def first_lines(path: Path) -> Iterator[str]:
    """The first line of each docstring in a file, those below a module's and a class's names included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for before, after in pairwise([None, *body] if isinstance(body, list) else []):
            documented = isinstance(before, ast.Assign | ast.AnnAssign) or (
                before is None and not isinstance(node, ast.If)
            )
            if documented and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                yield str(after.value.value).strip().splitlines()[0]


@pytest.mark.quick
def test_docstrings_begin_with_nouns() -> None:
    lines = [line for path in (ROOT / "kaggle_mgpu").rglob("*.py") for line in first_lines(path)]
    words = [word for line in lines for word in re.findall(r"[a-z']+", line.lower())]
    assert len(lines) > 1500
    assert sum(word in LEANING for word in words) < 0.025 * len(words)
