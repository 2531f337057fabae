"""The number of files that a reader of one training step goes through, and of those that set up a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "walk.py"


@pytest.mark.parametrize(("part", "most_files", "most_switches"), [("step", 6, 15), ("setup", 35, 150)])
def test_a_step_and_the_set_up_go_through_few_files(part: str, most_files: int, most_switches: int) -> None:
    done = subprocess.run([sys.executable, str(TOOL), part], capture_output=True, text=True, timeout=600, check=True)
    last = done.stdout.splitlines()[-1]
    files, switches = (int(word) for word in last.split() if word.isdigit())
    assert 0 < files <= most_files, last
    assert 0 < switches <= most_switches, last
