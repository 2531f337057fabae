"""Show an error in a notebook without this package's frames, which hide the user's own.

The exception keeps its whole traceback: only the text that IPython prints below the cell is shorter.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from ..errors import WorkerTraceback

_Given = ParamSpec("_Given")
_Value = TypeVar("_Value")

PACKAGE = str(Path(__file__).parents[1]) + os.sep
_WRAPPERS = (
    "contextlib.py",
    os.path.join("torch", "nn", "modules", "module.py"),
    os.path.join("torch", "nn", "parallel", "distributed.py"),
)
_ENTRY = re.compile(r'  File "(.+)", line \d+.*\n(?:    .*\n|  \[Previous.*\n)*')


def folded(function: Callable[_Given, _Value]) -> Callable[_Given, _Value]:
    """Wrap a function so that a notebook shows its exceptions without this package's frames (see `_hidden`)."""

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Value:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            with contextlib.suppress(AttributeError):  # some exceptions take no new attribute
                # IPython asks an exception for this method
                error._render_traceback_ = functools.partial(_rendered, error)  # type: ignore[attr-defined]
            raise

    return call


def _rendered(error: Exception) -> list[str]:
    """Return the lines that IPython shows for the error."""
    import IPython

    cause = error.__cause__
    if isinstance(cause, WorkerTraceback):
        error.__cause__ = WorkerTraceback(_shortened(str(cause.args[0]), cause.log), cause.in_collective, cause.log)
    try:
        tools = IPython.get_ipython().InteractiveTB
        lines: list[str] = tools.structured_traceback(
            type(error), error, _without_hidden(error.__traceback__), tb_offset=0
        )
    finally:
        error.__cause__ = cause
    return lines


def _hidden(file: str) -> bool:
    """Return whether a frame belongs to this package, to IPython, or to a wrapper around the user's function."""
    return file.startswith(PACKAGE) or f"{os.sep}IPython{os.sep}core{os.sep}" in file or file.endswith(_WRAPPERS)


def _without_hidden(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the hidden frames."""
    if trace is None:
        return None
    rest = _without_hidden(trace.tb_next)
    if _hidden(trace.tb_frame.f_code.co_filename):
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _shortened(text: str, log: str) -> str:
    """Return a worker's traceback without the hidden frames; a last line names the log with the full traceback."""
    left_out = 0

    def entry(found: re.Match[str]) -> str:
        nonlocal left_out
        hidden = _hidden(found[1])
        left_out += hidden
        return "" if hidden else found[0]

    shown = _ENTRY.sub(entry, text)
    if not left_out:
        return text
    frames = "1 frame" if left_out == 1 else f"{left_out} frames"
    verb = "is" if left_out == 1 else "are"
    return f"{shown.rstrip()}\n\n{frames} of kaggle_mgpu and of wrappers {verb} left out: {log} has all"
