"""This module defines exception classes shared by several packages, and recognises errors of communication."""

from __future__ import annotations

import re

_COMMUNICATION = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe", re.IGNORECASE)


def is_communication_error(error: BaseException) -> bool:
    """Return whether an error's text is about communication between ranks, as after the death of another rank."""
    return isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)) is not None


class RestartError(RuntimeError):
    """The run must be started again in fresh processes, and will continue from its newest checkpoint."""


class DivergedError(FloatingPointError):
    """The loss or the gradient is no longer finite, so the run cannot continue."""


class WorkerError(RuntimeError):
    """A worker failed without an exception that the launching process could raise again."""


class WorkerDiedError(WorkerError):
    """A worker was killed, crashed or ended without a result; the message ends with its last output lines."""


class HangError(WorkerError):
    """No rank made progress for too long; the message names the slowest rank and shows each rank's Python stack."""


class WorkerTraceback(Exception):  # noqa: N818 (the cause of another error, like concurrent.futures' _RemoteTraceback)
    """A worker's traceback, set as the `__cause__` of the exception raised in this process.

    Args:
        text: the traceback.
        in_collective: whether torch.distributed raised the exception, perhaps because another rank ended.
        log: the path of the worker's log, which has the traceback too; "" if there is none.
    """

    def __init__(self, text: str, in_collective: bool = False, log: str = "") -> None:
        super().__init__(text)
        self.in_collective, self.log = in_collective, log

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class DiskFullError(OSError):
    """The disk has no space for a file; the partial file was removed."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message gives the reason."""


class LockedError(RuntimeError):
    """Another run uses the same folder; the message names the run."""
