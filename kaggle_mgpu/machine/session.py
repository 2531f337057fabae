"""This module detects the kind of Kaggle session, its folders, its remaining time and its display.

Three environment variables override detection: ``KAGGLE_MGPU_KAGGLE_ROOT`` (Kaggle's folders, default ``/kaggle``),
``KAGGLE_MGPU_SESSION_END`` (the session's end as a Unix time) and ``KAGGLE_MGPU_DISPLAY=live|lines``::

    from kaggle_mgpu import session
    session.kind()                       # "interactive", "batch", "rerun" or "local"
    session.find("train.csv")            # search all inputs
"""

from __future__ import annotations

import collections
import fnmatch
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

Kind = Literal["interactive", "batch", "rerun", "local"]
Channel = Callable[[str, str, str], None]

SESSION_HOURS = {"interactive": 12.0, "batch": 12.0, "rerun": 9.0}
"""Hours after which Kaggle ends a GPU session, by kind."""

_GROUP_DEPTH = {"datasets": 2, "notebooks": 2, "models": 2, "competitions": 1}  # levels: <owner>/<slug>, or <slug>


def kind() -> Kind:
    """Return "interactive" (editor), "batch" (Save & Run All), "rerun" (competition scoring) or "local" (no Kaggle)."""
    if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        return "rerun"
    run_type = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "").lower()
    if not run_type:
        return "local"
    return "interactive" if run_type == "interactive" else "batch"  # an unknown name: assume that nobody is watching


def on_kaggle() -> bool:
    """Return whether this process runs on Kaggle."""
    return kind() != "local"


# --- folders ----------------------------------------------------------------------------------------


def _root() -> Path:
    return Path(os.environ.get("KAGGLE_MGPU_KAGGLE_ROOT") or "/kaggle")


def input_root() -> Path:
    """Return the folder under which Kaggle mounts inputs; the folder may be missing."""
    return _root() / "input"


def working() -> Path:
    """Return Kaggle's folder for output files, or the current folder outside Kaggle."""
    folder = _root() / "working"
    return folder if folder.is_dir() else Path.cwd()


def inputs() -> list[Path]:
    """Return the folders of all mounted inputs, sorted.

    Kaggle mounts ``datasets/<owner>/<slug>``, ``notebooks/<owner>/<slug>``, ``models/<owner>/<slug>`` and
    ``competitions/<slug>``; older sessions have ``<slug>`` for every input."""
    sources: list[Path] = []
    for folder in _folders(input_root()):
        level = [folder]
        for _ in range(_GROUP_DEPTH.get(folder.name, 0)):
            level = [child for parent in level for child in _folders(parent)]
        sources += level
    return sorted(sources)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []


MOST_ENTRIES = 2_000_000
"""The most entries that :func:`find` reads in one input, which takes about 4 s on a local disk."""
_NOTHING_IN = {".git", ".ipynb_checkpoints", "__MACOSX", "__pycache__", "node_modules"}
"""Folders that :func:`find` skips."""


def find(
    pattern: str,
    roots: Iterable[Path | str] | None = None,
    max_depth: int = 10,
    limit: int = 1000,
    ignore_case: bool = False,
) -> list[Path]:
    """Return files and folders whose last path parts match ``pattern``: ``"train.csv"``, ``"step-*/state.json"``.

    Results are ordered by root, then depth, then name. A folder with several links is searched once; unreadable
    folders, folders such as ``.git`` and ``__MACOSX``, and files ``._NAME`` from macOS are skipped. The search reads
    about ``MOST_ENTRIES`` entries of each input (or given root), shallow entries first, and warns if an input has more.

    Args:
        pattern: ``*`` and ``?`` do not cross a ``/``.
        roots: folders to search; default: the folder of Kaggle's inputs.
        max_depth: levels of folders to search; the root's own entries have depth 1.
        limit: stop after this many results.
        ignore_case: whether ``*.txt`` finds NOTES.TXT.
    """
    *above, last = [
        re.compile(fnmatch.translate(part), re.IGNORECASE if ignore_case else 0).match for part in Path(pattern).parts
    ]
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    starts = set(inputs()) if roots is None else set()
    for root in [input_root()] if roots is None else map(Path, roots):
        level, looked = [(root, root)], collections.Counter[Path]()
        for _ in range(max_depth):
            below: list[tuple[Path, Path]] = []
            for folder, source in level:
                if looked[source] >= MOST_ENTRIES:
                    continue
                fits = len(above) <= len(folder.parts) and all(
                    part(name) for part, name in zip(reversed(above), reversed(folder.parts), strict=False)
                )
                matches, folders, count = _scan(folder, seen, last if fits else None)
                found += matches
                if len(found) >= limit:
                    return found[:limit]
                below += [(path, path if path in starts else source) for path in folders]
                looked[source] += count
            level = below
        for source, count in looked.items():
            if count >= MOST_ENTRIES:
                warnings.warn(
                    f"{source} holds more than {MOST_ENTRIES:,} files and folders: looked for {pattern!r} only "
                    f"among the {count:,} nearest to its top. Give the path of a file or folder that lies deeper.",
                    stacklevel=2,
                )
    return found


def find_prepared(folder: Path, last: str) -> Path:
    """Return `folder`; if `folder` is incomplete and Kaggle's inputs have a complete copy, return the copy.

    Args:
        folder: a folder named after a digest of its content, such as run/data/0123abcd. The path of a copy has the same
            last two parts.
        last: the name of the file that is written last, and so marks a complete folder.
    """
    if not (folder / last).exists() and (found := find(f"{folder.parent.name}/{folder.name}/{last}", limit=1)):
        return found[0].parent
    return folder


def _scan(
    folder: Path, seen: set[tuple[int, int]], matches: Callable[[str], object] | None
) -> tuple[list[Path], list[Path], int]:
    """Return a folder's matching entries, its folders to search, and its number of entries; [], [], 0 if seen."""
    names, folders, count = [], [], 0
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return [], [], 0
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            # only few entries become paths, since a path for each entry would take ten times as long
            for entry in entries:
                count += 1
                if matches is not None and matches(entry.name) and not entry.name.startswith("._"):
                    names.append(entry.name)
                if entry.name not in _NOTHING_IN and _is_folder(entry):
                    folders.append(entry.name)
    except OSError:
        return [], [], count
    return [folder / name for name in sorted(names)], [folder / name for name in sorted(folders)], count


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself or into an unreadable folder
        return False


# --- display ----------------------------------------------------------------------------------------

_channel: Channel | None = None
_channel_is_live = True
_shown: dict[str, int] = {}  # display id -> number of the cell it was last created in


def _shell() -> Any | None:
    """Return the running kernel's IPython shell, or None; IPython is never imported."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if hasattr(ipython, "get_ipython") else None  # type: ignore[union-attr]
    return shell if hasattr(shell, "kernel") else None


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs in this process (False in a terminal, a script, a worker)."""
    return _shell() is not None


def _override() -> str:
    value = os.environ.get("KAGGLE_MGPU_DISPLAY", "")
    if value not in ("", "live", "lines"):
        raise ValueError(f"KAGGLE_MGPU_DISPLAY is {value!r}, expected 'live' or 'lines': correct or unset it")
    return value


def live() -> bool:
    """Return whether displays can be updated in place: in a notebook with a viewer, not in a batch run or CI.

    Raises:
        ValueError: KAGGLE_MGPU_DISPLAY has another value than ``live`` or ``lines``.
    """
    if override := _override():
        return override == "live"
    return kind() in ("interactive", "local") and not os.environ.get("CI") and in_notebook()


def set_channel(channel: Channel | None, live: bool = True) -> None:
    """Send a worker's displays to the notebook's process through ``channel(html, text, display_id)``.

    ``live`` says whether the notebook can update displays in place. A channel of None removes the channel.
    """
    global _channel, _channel_is_live
    _channel, _channel_is_live = channel, live


def can_draw() -> bool:
    """Return whether :func:`show` adds an output to a notebook, with or without a viewer; errors as in :func:`live`."""
    return _override() != "lines" and (_channel is not None or in_notebook())


def can_show() -> bool:
    """Return whether :func:`show` reaches a viewer at once; if not, callers print lines. Errors as in :func:`live`."""
    return can_draw() and (live() if _channel is None else _channel_is_live)


def show(html: str, text: str, display_id: str) -> None:
    """Show a display in the running cell, or update this cell's display with the same id.

    In a worker with a channel the display goes to the notebook's process. In a process with neither a channel nor a
    notebook the function does nothing (see :func:`can_show`).

    Args:
        html: content for notebooks.
        text: the same content for viewers without HTML.
        display_id: the display's name.
    """
    if _channel is not None:
        _channel(html, text, display_id)
    elif (shell := _shell()) is not None:
        from IPython.display import display

        update = _shown.get(display_id) == shell.execution_count
        _shown[display_id] = shell.execution_count
        display({"text/html": html, "text/plain": text}, raw=True, display_id=display_id, update=update)


# --- time -------------------------------------------------------------------------------------------

PROC = Path("/proc")
_imported = time.monotonic()


class Deadline:
    """A Deadline is a time limit on the monotonic clock, unaffected by changes of the system clock.

    Example:
        >>> Deadline(None).remaining()
        inf
    """

    def __init__(self, seconds: float | None, started: float | None = None) -> None:
        """Set the end to ``seconds`` (None: no limit) after ``started``, a ``time.monotonic()`` value (None: now)."""
        self._end = math.inf if seconds is None else (time.monotonic() if started is None else started) + seconds

    def remaining(self) -> float:
        """Return the seconds left, negative after the limit; inf without a limit."""
        return self._end - time.monotonic()

    def reached(self, margin: float = 0.0) -> bool:
        """Return whether at most ``margin`` seconds are left."""
        return self.remaining() <= margin


def session_age() -> float:
    """Return an estimate of the session's age in seconds.

    On Kaggle the estimate is the age of process 1, which is too high if the container started before the session.
    Elsewhere the estimate is the age of this process.
    """
    ages = [_process_age("self"), _process_age("1") if on_kaggle() else None]
    return max((age for age in ages if age is not None), default=time.monotonic() - _imported)


def time_left() -> float:
    """Return the seconds until Kaggle ends this session (see ``SESSION_HOURS``), at least 0; inf outside Kaggle.

    Kaggle kills the session without a signal: stop early enough to save.

    Raises:
        ValueError: KAGGLE_MGPU_SESSION_END is not a number.
    """
    if end := os.environ.get("KAGGLE_MGPU_SESSION_END"):
        try:
            return max(0.0, float(end) - time.time())
        except ValueError:
            raise ValueError(
                f"KAGGLE_MGPU_SESSION_END is {end!r}, expected the Unix time at which the session ends: "
                f"correct or unset it"
            ) from None
    hours = SESSION_HOURS.get(kind())
    return math.inf if hours is None else max(0.0, hours * 3600.0 - session_age())


def _process_age(pid: str) -> float | None:
    """Return the seconds since a process started: field 22 of /proc/PID/stat counts ticks since boot (proc(5))."""
    try:
        stat = (PROC / pid / "stat").read_text()
        uptime = float((PROC / "uptime").read_text().split()[0])
        ticks = float(stat.rpartition(")")[2].split()[19])  # the name in field 2 may hold spaces and brackets
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return None
