"""tools/stops.py: processes of a command stand still now and then, and it ends as it would have."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import stops

ROOT = Path(__file__).parents[2]

WAITS_UNTIL_IT_WAS_STOPPED = """
import subprocess, sys, time
if len(sys.argv) == 1:  # not it but what it starts
    sys.exit(subprocess.run([sys.executable, __file__, "child"]).returncode)
since = time.monotonic()
while (now := time.monotonic()) - since < 0.3:
    since = now
print("stood still")
sys.exit(7)
"""


def test_what_the_command_starts_is_stopped_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITS_UNTIL_IT_WAS_STOPPED)
    command = [sys.executable, ROOT / "tools" / "stops.py", "--mean", "1", "--", sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (7, "stood still\n"), done.stderr


def test_of_what_runs_only_that_is_stopped() -> None:
    mine = [sys.executable, "-c", "input()"]
    marked, other = (
        subprocess.Popen(mine, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=variables)
        for variables in ({stops.MARK: "1"}, {stops.MARK: "12"})
    )
    try:
        while not (found := stops._running(f"{stops.MARK}=1".encode())):
            time.sleep(0.01)
        assert found == [marked.pid]
    finally:
        for process in (marked, other):
            process.communicate(b"\n")
    assert stops._running(f"{stops.MARK}=1".encode()) == []
