"""Lint, format and types, as part of the tests."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
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
