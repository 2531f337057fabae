"""One batch session: a notebook run by papermill in a working folder of its own, until it ends or is killed.

The environment is built from nothing: Kaggle's variables, no kaggle_mgpu, a HOME and a temporary folder that are empty.
All processes of the session, workers that left its process group included, carry its name in their environment; by that
they are found, stopped and killed as one, which is how a container ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from pause_at import PauseAt
from runs import NO_KERNEL

# As Kaggle does it: no kernel is named here, so a notebook that names none fails. Not as Kaggle does it: where one of
# the kernel's ports was taken before it had it, which happens on a machine of many tests, another kernel is tried
RUN = f"""\
import sys, papermill
for last in (False, False, True):
    try:
        papermill.execute_notebook(sys.argv[1], "__notebook__.ipynb", progress_bar=False, autosave_cell_every=5,
                                   start_timeout=600, iopub_timeout=600, stdout_file=sys.stdout, stderr_file=sys.stderr)
        break
    except RuntimeError as error:
        if last or {NO_KERNEL!r} not in str(error):
            raise
"""
MARK = "KAGGLE_CONTAINER_NAME"


class Session:
    """A running or ended session of one version of a kernel.

    Args:
        inputs: folders by their path under /kaggle/input.
        limit: seconds until it is killed.
        kill_in_save: kill it in the middle of writing a checkpoint, once it has saved something of its own. It waits
            there for that: of the first two checkpoints one may be what it was given.
        slow_save: seconds that pass there instead, by the clock of the process that saves.
        variables: more environment, over what Kaggle has.
        python: the interpreter of the image.
    """

    def __init__(
        self,
        folder: Path,
        notebook: str,
        inputs: Mapping[str, Path],
        *,
        limit: float,
        kill_in_save: bool = False,
        slow_save: float = 0.0,
        variables: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.folder, self.limit, self.slow_save = folder, limit, slow_save
        self.working = folder / "kaggle" / "working"
        self.state, self.message = "RUNNING", ""
        self.killed: str = ""
        """"limit" or "save", where it was killed."""
        self.left_by_the_kill: list[str] = []
        """Names in the checkpoint folder after a kill in a save."""
        self.log: list[dict[str, object]] = []
        self.written = threading.Condition()
        # as short as Kaggle's /tmp, and as little kept: sockets in it may have 107 characters
        self.temporary = tempfile.TemporaryDirectory(prefix="kaggle-", ignore_cleanup_errors=True)
        for name in ("home", "src", "kaggle/working", "kaggle/input"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, source in inputs.items():
            target = folder / "kaggle" / "input" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, copy_function=os.link)
        (folder / "src" / "__notebook__.ipynb").write_text(notebook, encoding="utf-8")
        self.name = f"{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
        environment = {
            "PATH": f"{Path(python).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(folder / "home"),
            "TMPDIR": self.temporary.name,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(folder.parent / "matplotlib"),  # Kaggle's image has its fonts listed already
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_URL_BASE": "https://www.kaggle.com",
            "KAGGLE_DATA_PROXY_PROJECT": "kaggle-161607",
            "KAGGLE_MGPU_KAGGLE_ROOT": str(folder / "kaggle"),
            "KAGGLE_MGPU_SESSION_END": str(time.time() + limit),  # process 1 is not this session's here
            MARK: self.name,
            **(variables or {}),
        }
        self.hold: PauseAt | None = None
        if kill_in_save or slow_save:  # the tensors are there, and what says so is not
            self.hold = PauseAt(folder / "hold", "open", r"/checkpoints/\.writing-step-\d+-\d+/state\.json$", before=2)
            environment |= self.hold.variables(environment)
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [python, "-c", RUN, str(folder / "src" / "__notebook__.ipynb")],
            cwd=self.working,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream, name), daemon=True)
            for stream, name in ((self.process.stdout, "stdout"), (self.process.stderr, "stderr"))
        ]
        self._life = threading.Thread(target=self._live, daemon=True)
        for thread in [*self._readers, self._life]:
            thread.start()

    def wait(self, timeout: float | None = None) -> None:
        self._life.join(timeout)

    def kill(self) -> None:
        """As a container ends: all at one instant, without a signal that they could hear; none is left on return."""
        stopped: set[int] = set()
        while new := set(self.processes()) - stopped:  # what was forked meanwhile, too
            _send(new, signal.SIGSTOP)
            stopped |= new
        _send(stopped, signal.SIGKILL)
        while left := self.processes():  # each is there until it has had the processor once more
            _send(left, signal.SIGKILL)  # and one that was just being executed had no environment to be found by
            time.sleep(0.01)

    def processes(self) -> list[int]:
        """Every process that has this session's name in its environment."""
        mark = f"{MARK}={self.name}\0".encode()
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in Path(entry.path, "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def outputs(self) -> dict[str, Path]:
        """What is kept, by path, once it has ended."""
        if self.state == "RUNNING":
            return {}
        files = (path for path in sorted(self.working.rglob("*")) if path.is_file())
        return {path.relative_to(self.working).as_posix(): path for path in files}

    def log_text(self) -> str:
        with self.written:
            return json.dumps(self.log)

    # Threads
    def _read(self, stream: IO[str], name: str) -> None:
        for line in stream:
            with self.written:
                self.log.append({"stream_name": name, "time": round(time.monotonic() - self._began, 3), "data": line})
                self.written.notify_all()

    def _live(self) -> None:
        while self.process.poll() is None:
            if time.monotonic() - self._began > self.limit:
                self.killed = "limit"
            elif self.hold is not None and self.hold.reached():
                if self.slow_save:
                    self.hold.release(self.slow_save)
                    self.hold = None
                else:
                    self.killed = "save"
            if self.killed:
                self.kill()
                break
            time.sleep(0.05)
        code = self.process.wait()
        self.kill()  # nothing of a session outlives it
        for reader in self._readers:
            reader.join(600)
        if self.killed == "save":
            self.left_by_the_kill = sorted(path.name for path in self.working.glob("*/checkpoints/*"))
        if self.killed == "limit":
            self.message = "Your notebook was stopped because it ran out of time."
        with self.written:
            self.state = "COMPLETE" if code == 0 else "ERROR"
            self.written.notify_all()


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
