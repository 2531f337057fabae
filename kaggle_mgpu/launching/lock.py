"""Lock a run's folder, since two runs would overwrite each other's checkpoints and records.

    with held(output_dir): …      # LockedError if another run has the lock

The kernel holds the lock and releases it when the process ends, so a killed run never blocks the next. The file `.lock`
names the process that has the lock, and is removed at the end of the run. Reading a folder needs no lock.
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
"""How long to wait for a lock. The kernel frees a killed process's memory before its lock, which may take seconds for a
process with GPU memory, or on a busy machine."""
ANNOUNCE_AFTER_SECONDS = 1.0
"""Seconds of waiting after which a line names the run that has the lock."""

_held: set[BinaryIO] = set()


@contextlib.contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder inside the `with` block.

    The block runs without a lock if the folder cannot be written to, or if its file system has no locks (as some
    network file systems).

    Raises:
        LockedError: another run still holds the lock after PATIENCE_SECONDS.
    """
    new = not os.path.lexists(folder)
    file = None if fcntl is None else _take(Path(folder))
    try:
        yield
    finally:
        if file is not None:
            _release(Path(folder), file)
            if new:
                with contextlib.suppress(OSError):  # fails if the run wrote anything
                    os.rmdir(folder)


def _take(folder: Path) -> BinaryIO | None:
    path = folder / FILE
    began, announced = time.monotonic(), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        try:
            file = _open(path)
        except FileNotFoundError:
            if not folder.is_dir():
                continue  # another run has just removed the folder
            return None
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                break
            file.close()  # the run that had the lock has ended and removed this file: lock a new one
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace")
            file.close()
            waited = time.monotonic() - began
            if waited > PATIENCE_SECONDS:
                raise LockedError(
                    f"another run trains in {folder.resolve()} ({owner or 'unknown process'}), and two would "
                    f"write over each other's checkpoints and records. Give this run another output_dir, or wait for "
                    f"the end of that run: progress.attach({str(folder)!r}) shows its progress, "
                    f"progress.stop({str(folder)!r}) makes that run save and end."
                ) from None
            if waited > ANNOUNCE_AFTER_SECONDS and not announced:
                announced = True
                print(f"waiting up to {PATIENCE_SECONDS:.0f} s for the run in {folder} ({owner}) to end", flush=True)
            time.sleep(0.05)
        except OSError as error:
            file.close()
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
    _held.add(file)
    with contextlib.suppress(OSError):  # on a full disk the file stays empty
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return file


def _release(folder: Path, file: BinaryIO) -> None:
    if file not in _held:  # in a forked process, whose parent has the lock
        return
    with contextlib.suppress(OSError):
        if _is_at(folder / FILE, file):  # else the folder was removed, and the file there now may be another run's
            (folder / FILE).unlink()  # before unlocking, so that a process that waits for the lock notices the removal
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # close() would not unlock while a forked process has a copy
    _held.discard(file)
    file.close()


def _open(path: Path) -> BinaryIO:
    """Open a lock file for writing, since NFS cannot lock a file opened for reading only.

    Another user's lock file is opened for reading only, which suffices on a local disk.

    Raises:
        OSError: the file cannot be made, or is a link or a folder, which must not be written to.
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
    """Close the lock files in a forked process, so a lock ends even when the parent is killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
