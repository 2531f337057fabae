"""This module starts, checks, replaces and stops the server from which `launch` forks its workers.

    worker_server.start()       # milliseconds: the server imports torch in the background
    worker_server.ready([])     # waits for these imports; replaces a server that is out of date

`env.fix` or the first launch starts the server, whose own code is launching/server.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import WorkerError

if TYPE_CHECKING:
    import socket
    import subprocess

START_SECONDS = 300.0
"""Time limit for the server's imports."""
MARK = "KAGGLE_MGPU_SERVER"
"""Environment variable that marks the processes below a server."""

# Libraries read these variables when the server loads them, so a change needs a new server. All other variables
# (CUDA_VISIBLE_DEVICES, NCCL_*, TORCH_NCCL_*, GLOO_*, the user's own) reach a worker at its launch.
_READ_AT_START = re.compile(
    r"(LD|OMP|GOMP|MKL|OPENBLAS|MALLOC|ATEN|PYTORCH)_|PYTHON(?!PATH)|TORCH(?!INDUCTOR_CACHE_DIR|_NCCL)"
)


@dataclass
class Server:
    """A Server is a started server process with the means to reach it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    """Socket for launch requests."""
    log: BinaryIO
    """The server's output."""
    owner: int
    """Id of the process that started the server; a process forked from the owner must start another server."""
    mark: str
    """"NAME=value" of an environment variable that all processes below the server have."""
    variables: dict[str, str]
    """The environment variables that libraries read only at the server's start, with their values at the start."""
    watched: dict[str, tuple[str, int]] | None = None
    """Files that the server has imported, as {module: (path, st_mtime_ns)}; None until the imports are finished."""

    def output(self) -> str:
        """Return the server's output."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()

    def stop(self) -> None:
        """Kill the server and every process below it, and close the files; in a forked process only close the files."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            # The operating system ends supervisors and workers with the server, but not the workers' children.
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if self.mark.encode() in path.read_bytes():
                        os.kill(int(path.parent.name), signal.SIGKILL)
        self.control.close()
        self.log.close()


current: Server | None = None
"""The server last started by this process, or before the fork if this process is forked; None at first."""
_lock = threading.RLock()
"""Held while a server is replaced, since several threads may launch."""
_pins = 0
"""Number of `pinned` blocks in progress."""


def running() -> bool:
    """Return whether a server started by this process is still alive."""
    return current is not None and current.owner == os.getpid() and current.process.poll() is None


def start() -> Server:
    """Start a server in place of any earlier server; its imports continue in the background."""
    import atexit
    import socket
    import subprocess
    import tempfile
    import uuid

    global current
    with _lock:
        if current is None:
            atexit.register(lambda: current.stop() if current is not None else None)
        else:
            current.stop()
        current = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server lives)
        # The server gets this process's sys.path with the current folder last, so that no file there shadows a module.
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
            start_new_session=True,  # an interrupt of the notebook does not reach the server
        )
        theirs.close()
        current = Server(process, ours, log, os.getpid(), f"{MARK}={mark}", _read_at_start())
        return current


def _read_at_start() -> dict[str, str]:
    """Return the variables whose change requires a new server."""
    return {name: value for name, value in os.environ.items() if _READ_AT_START.match(name)}


def ready(interrupts: Sequence[float]) -> Server:
    """Return a server that has imported the current files; wait for the imports, and start a new server if necessary.

    Args:
        interrupts: the time.monotonic() of each interrupt. A signal handler may append entries; an entry ends the wait.

    Raises:
        WorkerError: the server ended (the message has its output) or has not imported torch within START_SECONDS.
        KeyboardInterrupt: `interrupts` has an entry before the server is ready.
    """
    fresh = 0
    with _lock:
        while True:
            if current is None or not running() or not (_pins or current.variables == _read_at_start()):
                server = start()
                fresh += 1
            else:
                server = current
            if _has_imported(server, interrupts, patient=fresh < 3):
                # A fresh server is accepted unchecked, since another fresh server would import the same files.
                if fresh or _pins or _is_current(server.watched or {}):
                    return server
                start()
                fresh += 1


@contextlib.contextmanager
def pinned(interrupts: Sequence[float]) -> Iterator[None]:
    """Make a server ready; until the `with` block ends, `ready` keeps a live server, since a new server ends launches.

    Raises:
        WorkerError, KeyboardInterrupt: as `ready`.
    """
    global _pins
    ready(interrupts)
    _pins += 1
    try:
        yield
    finally:
        _pins -= 1


def _has_imported(server: Server, interrupts: Sequence[float], patient: bool) -> bool:
    """Wait for the server's list of imported files; return False if the server was killed.

    Args:
        patient: if False, a killed server raises a WorkerError too.

    Raises:
        WorkerError, KeyboardInterrupt: as `ready`.
    """
    import pickle
    from multiprocessing import connection

    deadline = time.monotonic() + START_SECONDS
    while server.watched is None:
        if interrupts:
            raise KeyboardInterrupt
        if connection.wait([server.control], 0.1):
            if message := server.control.recv(1 << 20):
                server.watched = pickle.loads(message)
                break
            code = server.process.wait(10)
            if code < 0 and patient:
                return False
            raise WorkerError(f"the worker server ended with code {code}:\n{server.output()}")
        if time.monotonic() > deadline:
            raise WorkerError(
                f"the worker server has not imported torch within {START_SECONDS:g} s: the machine or its disk is very "
                f"busy. Run the cell again."
            )
    return True


def _is_current(watched: dict[str, tuple[str, int]]) -> bool:
    """Return whether a new process would import the same, unchanged files."""
    import importlib.util

    for name, (path, modified) in watched.items():
        try:
            if os.stat(path).st_mtime_ns != modified:
                return False
            if "." in name:  # find_spec would import the module's package, such as torch
                continue
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin != path:
                return False
        except (ValueError, ImportError, OSError):
            return False
    return True
