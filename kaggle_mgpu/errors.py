"""Exception classes shared by several packages. This module imports nothing."""

from __future__ import annotations


class RestartError(RuntimeError):
    """The run must be started again in fresh processes, and will continue from its newest checkpoint."""


class DivergedError(FloatingPointError):
    """The loss or the gradient is no longer finite, so the run cannot continue."""


class WorkerError(RuntimeError):
    """A worker's failure that is no exception that could be raised here."""


class WorkerDiedError(WorkerError):
    """A worker was killed, crashed or left without a value; the message says how, and ends with its last lines."""


class HangError(WorkerError):
    """No rank got on for too long; the message says which is behind, and carries the Python stack of each."""


class WorkerTraceback(Exception):  # noqa: N818 (it is the cause of an error, as concurrent.futures' is)
    """The traceback of an exception as the worker saw it; the `__cause__` of the exception raised here.

    Args:
        text: the traceback.
        in_collective: the exception came out of torch.distributed.
    """

    def __init__(self, text: str, in_collective: bool = False) -> None:
        super().__init__(text)
        self.in_collective = in_collective

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class DiskFullError(OSError):
    """There is no room for a file; nothing of it is left."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


class LockedError(RuntimeError):
    """Another run trains in the folder; the message says which."""
