"""Runs that stop at a point of their own, for a test to kill them there: nothing rests on who is quicker.

    held = PauseAt(tmp_path / "hold", "os.rename", r"/step-00000006$")
    process = subprocess.Popen(command, env={**os.environ, **held.variables(os.environ)})
    held.wait(process)                             # until one of its processes is about to make that name
    os.killpg(process.pid, signal.SIGKILL)         # or held.release(), and it goes on

Python tells of files that are opened and renamed (audit events "open" and "os.rename"). A sitecustomize, which every
Python of the run imports as it starts, listens, and keeps the thread that is about to do it; the others go on until
they need it. So the package is as it is, and a kill at that point is a real one.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

SITE = """\
import os, re, sys, time

_event, _pattern, _before, _folder = os.environ["TESTS_HOLD"].split("\\n")
_seen = []


def _hook(event, args):
    if event == _event and re.search(_pattern, str(args[event == "os.rename"])):
        _seen.append(event)
        if len(_seen) > int(_before) and not os.path.exists(_folder + "/released"):
            os.close(os.open(_folder + "/reached", os.O_CREAT | os.O_WRONLY))
            while not os.path.exists(_folder + "/released"):
                time.sleep(0.01)
            with open(_folder + "/released") as file:
                passed, real = float(file.read()), time.monotonic
            if passed:
                time.monotonic = lambda: real() + passed


sys.addaudithook(_hook)
"""


class PauseAt:
    """A point in a run.

    Args:
        folder: for the sitecustomize and the two marks; made.
        event: "open" or "os.rename".
        pattern: of the path that is opened, or renamed to (re.search).
        before: how many of these a process does undisturbed first.
    """

    def __init__(self, folder: Path, event: str, pattern: str, before: int = 0) -> None:
        self.folder, self.point = folder, "\n".join([event, pattern, str(before), str(folder)])
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(SITE)

    def variables(self, given: Mapping[str, str]) -> dict[str, str]:
        """What the run's environment needs beside what is given."""
        search = os.pathsep.join(filter(None, [str(self.folder), given.get("PYTHONPATH")]))
        return {"PYTHONPATH": search, "TESTS_HOLD": self.point}

    def reached(self) -> bool:
        return (self.folder / "reached").exists()

    def wait(self, process: subprocess.Popen[str] | subprocess.Popen[bytes], log: Path | None = None) -> None:
        """Until it is there; an error if it ends before."""
        while not self.reached():
            assert process.poll() is None, "it ended before: " + ("" if log is None else log.read_text())
            time.sleep(0.01)

    def release(self, passed: float = 0.0) -> None:
        """Let it go on; by the clock of the process that was held (`time.monotonic`) so many seconds have passed."""
        (self.folder / "releasing").write_text(str(passed))
        (self.folder / "releasing").rename(self.folder / "released")
