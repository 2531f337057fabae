"""Lock a run's folder, since two runs would overwrite each other's checkpoints and records.

    with held(output_dir): …      # LockedError where another run has it

The kernel holds the lock and lets go of it when the process ends, however it ends: a run that was killed never stands
in the way of the next. The file `.lock` only says whose the lock is; it is gone when the run is over, and so no result
that travels. Whoever only reads asks for no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import LockedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
PATIENCE_SECONDS = 30.0
"""How long a lock is waited for: of a process that was killed the kernel first clears the memory, then lets go, and
with a GPU's or on a busy machine that takes seconds."""
SAID_AFTER_SECONDS = 1.0
"""When a line says what is waited for."""

_held: set[BinaryIO] = set()


@contextlib.contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder inside the `with` block.

    Where there is nothing to lock with, nothing is locked, and nothing said: in a folder that cannot be written to no
    run does harm, and a file system that knows no locks (some network ones do not) is no reason not to train.

    Raises:
        LockedError: another run has the folder, and keeps it for PATIENCE_SECONDS.
    """
    new = not os.path.lexists(folder)
    file = None if fcntl is None else _take(Path(folder))
    try:
        yield
    finally:
        if file is not None:
            _release(Path(folder), file)
            if new:
                with contextlib.suppress(OSError):  # it is not empty, most often: else nothing came of the run
                    os.rmdir(folder)


def _take(folder: Path) -> BinaryIO | None:
    path = folder / FILE
    began, said = time.monotonic(), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        try:
            file = _open(path)
        except FileNotFoundError:
            if not folder.is_dir():
                continue  # a run that came to nothing has just removed it
            return None
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                break
            file.close()  # the one who had it has just removed it, at its end: there is, or will be, a new one
        except BlockingIOError:
            file.seek(0)
            whose = file.read(200).decode(errors="replace")
            file.close()
            waited = time.monotonic() - began
            if waited > PATIENCE_SECONDS:
                raise LockedError(
                    f"another run trains in {folder.resolve()} ({whose or 'it does not say which'}), and two would "
                    f"write over each other's checkpoints and records. Give this run another output_dir, or wait for "
                    f"the end of the other one: progress.attach({str(folder)!r}) shows how far it is, "
                    f"progress.stop({str(folder)!r}) has it save and end."
                ) from None
            if waited > SAID_AFTER_SECONDS and not said:
                said = True
                print(f"waiting up to {PATIENCE_SECONDS:.0f} s for the run in {folder} ({whose}) to end", flush=True)
            time.sleep(0.05)
        except OSError as error:
            file.close()
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):  # no locks here, so it is nobody's
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
    _held.add(file)
    with contextlib.suppress(OSError):  # a full disk: then it does not say whose it is
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return file


def _release(folder: Path, file: BinaryIO) -> None:
    if file not in _held:  # in a forked process that comes this way: the lock is its parent's
        return
    with contextlib.suppress(OSError):
        if _is_at(folder / FILE, file):  # else the folder was removed, and what is there now may be another run's
            (folder / FILE).unlink()  # while it is still locked: who opens it meanwhile sees that it is gone
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # for a forked process's copy too
    _held.discard(file)
    file.close()


def _open(path: Path) -> BinaryIO:
    """Open for writing, as a lock on NFS requires; open another user's file for reading, enough on a local disk.

    Raises:
        OSError: it cannot be made, or is a link or no file: what it leads to is not ours to write to.
    """
    flags = os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        mode = "ab+"
    except PermissionError:
        number = os.open(path, os.O_RDONLY | flags)
        mode = "rb"
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return cast(BinaryIO, os.fdopen(number, mode, buffering=0))


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # removed, here or by another machine
            return False
        raise


def _leave_to_parent() -> None:
    """Close a forked process's copy of the lock, so the copy cannot outlive a killed parent."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
