"""The server that `launch` has its workers from, as the notebook's process sees it: started, asked, replaced, ended.

    worker_server.start()       # milliseconds: it imports torch in the background
    worker_server.ready([])     # waits until it has; starts another one where it would be out of date

`env.fix` starts it, else the first launch does. What runs in it is server.py. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import WorkerError

if TYPE_CHECKING:
    import socket
    import subprocess

START_SECONDS = 300.0
"""How long the server's imports may take."""
MARK = "KAGGLE_MGPU_SERVER"
"""The environment variable by which the processes below a server are known."""

# Read when libraries load, too early for a worker, which is forked from a process that has loaded them. All others
# (CUDA_VISIBLE_DEVICES, NCCL_*, TORCH_NCCL_*, GLOO_*, the user's own) are a worker's as they are at its launch.
_READ_AT_START = re.compile(
    r"(LD|OMP|GOMP|MKL|OPENBLAS|MALLOC|ATEN|PYTORCH)_|PYTHON(?!PATH)|TORCH(?!INDUCTOR_CACHE_DIR|_NCCL)"
)


@dataclass
class Server:
    """A server that was started, and what this process keeps of it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    """Through it launches are asked for."""
    log: BinaryIO
    """What it has said."""
    owner: int
    """The process that started it: a fork of that one must start its own."""
    mark: str
    """An environment variable with its value, which all processes below the server have."""
    variables: dict[str, str]
    """Those of this environment that only a start reads."""
    watched: dict[str, tuple[str, int]] | None = None
    """Once it is ready: the files it has imported, as {module: (path, st_mtime_ns)}."""

    def stop(self) -> None:
        """End it, and with it every process below it."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            # supervisors and workers end with it, by the operating system; children of workers may not, but they
            # have its mark: forks the environment that it was started with, programs that of the worker
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if self.mark.encode() in path.read_bytes():
                        os.kill(int(path.parent.name), signal.SIGKILL)
        self.control.close()
        self.log.close()


current: Server | None = None
"""The one that this process, or the one it was forked from, started last."""


def running() -> bool:
    """Whether this process has a server that has not ended."""
    return current is not None and current.owner == os.getpid() and current.process.poll() is None


def start() -> Server:
    """Start a server, in place of the one before; takes milliseconds, its imports go on in the background."""
    import atexit
    import socket
    import subprocess
    import tempfile
    import uuid

    global current
    if current is None:
        atexit.register(lambda: current.stop() if current is not None else None)
    else:
        current.stop()
    current = None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = tempfile.TemporaryFile()  # noqa: SIM115 (the server's as long as it lives)
    # what this process would find, but nothing of the current folder may shadow a module (-P; last on the path)
    path = sorted((entry or os.getcwd() for entry in sys.path), key=lambda entry: entry == os.getcwd())
    program = f"from kaggle_mgpu.launching.server import main; main({theirs.fileno()})"
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-c", program],  # type: ignore[attr-defined]
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path), MARK: mark},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # an interrupt meant for the notebook is not for it
    )
    theirs.close()
    current = Server(process, ours, log, os.getpid(), f"{MARK}={mark}", _read_at_start())
    return current


def _read_at_start() -> dict[str, str]:
    """The variables whose change a running server cannot follow."""
    return {name: value for name, value in os.environ.items() if _READ_AT_START.match(name)}


def ready(interrupts: Sequence[float]) -> Server:
    """The server, started if there is none, or if what it has imported is not what would be imported now.

    Args:
        interrupts: it is given up as soon as there is one in this list.

    Raises:
        WorkerError: it does not start; the message has what it said.
        KeyboardInterrupt: there was an interrupt while it imported.
    """
    fresh = 0
    while True:
        if current is None or not running() or current.variables != _read_at_start():
            server = start()
            fresh += 1
        else:
            server = current
        if _has_imported(server, interrupts, patient=fresh < 3):
            # a fresh one is as good as can be, also where it and this process would never import the same
            if fresh or _is_current(server.watched or {}):
                return server
            start()
            fresh += 1


def _has_imported(server: Server, interrupts: Sequence[float], patient: bool) -> bool:
    """Wait until the server says what it has imported; False if it was killed."""
    import pickle
    import select

    deadline = time.monotonic() + START_SECONDS
    while server.watched is None:
        if interrupts:
            raise KeyboardInterrupt
        if select.select([server.control], [], [], 0.1)[0]:
            if message := server.control.recv(1 << 20):
                server.watched = pickle.loads(message)
                break
            code = server.process.wait(10)
            if code < 0 and patient:
                return False
            server.log.seek(0)
            said = server.log.read().decode(errors="replace").strip()
            raise WorkerError(f"the worker server ended with code {code}:\n{said}")
        if time.monotonic() > deadline:
            raise WorkerError(
                f"the worker server has not imported torch within {START_SECONDS:g} s: the machine or its disk is very "
                f"busy. Run the cell again."
            )
    return True


def _is_current(watched: dict[str, tuple[str, int]]) -> bool:
    """Whether a process started now would import the same files, unchanged."""
    import importlib.util

    for name, (path, modified) in watched.items():
        try:
            if os.stat(path).st_mtime_ns != modified:
                return False
            if "." in name:  # to find the spec of a module in a package would import the package, and torch with it
                continue
            spec = importlib.util.find_spec(name)  # what this process has imported, where it has
            if spec is None or spec.origin != path:
                return False
        except (ValueError, ImportError, OSError):
            return False
    return True
