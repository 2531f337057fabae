"""How a run is shown while it trains: one panel in a notebook, a bar in a terminal, or lines in a log.

    display = choose("auto")(View(max_steps=1000), print)
    attach(output_dir)           # show a run again, from another notebook or after a reload of the page

A display draws when it is told of a record, never more often than eyes can follow. A Batch session gets sparse lines
and the panel as it stands at the end: bars and live outputs are lost there, or pile up.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import session
from .panel import View, panel_html
from .records import METRICS, Record, parse, running

Log = Callable[[str], None]


def print_line(text: str) -> None:
    print(text, flush=True)  # stdout is block-buffered in a pipe: a log would run minutes behind


class Lines:
    """A run as plain lines.

    Said at once: the first record of a kind, notes and the end. Then a training line every 15 s at first, at a
    twentieth of the time gone by later, up to 60 s: a minute's and a night's log can both be read. An evaluation or a
    save that follows the last one's line within 30 s is not said: the file has it, and the last line the last metrics.
    """

    def __init__(self, view: View, log: Log = print_line) -> None:
        self.view, self.log = view, log
        self.id = f"kaggle-mgpu-{uuid.uuid4().hex[:12]}"
        self.drawn: dict[str, float] = {}

    def due(self, kind: str, pause: float) -> bool:
        """Is it `pause` seconds since this was last true of the kind?"""
        now = self.view.clock()
        if now - self.drawn.get(kind, -math.inf) < pause:
            return False
        self.drawn[kind] = now
        return True

    def open(self) -> None:
        pass  # what the trainer printed before stands right above

    def say(self, text: str) -> None:
        self.log(text)

    def show(self, kind: str) -> None:
        """Show the view's latest record of a kind."""
        if kind in ("start", "stop", "gpus"):
            return  # for the file: the trainer says what it starts with, and the last line how it ended
        gone_by = self.view.clock() - self.view.started
        pause = {"train": min(60.0, max(15.0, gone_by / 20)), "note": 0.0}.get(kind, 30.0)
        if self.due(kind, pause):
            self.say(self.view.lines[kind])

    def tick(self) -> None:
        """Time has passed without a record."""

    def close(self, outcome: str, status: str) -> None:
        self.say(outcome)
        if session.can_draw():  # a log to follow, and a panel to read afterwards
            with contextlib.suppress(Exception):
                session.show(panel_html(self.view, outcome, status), outcome, self.id)


class Bar(Lines):
    """A terminal's progress bar on stderr; evaluations and notes pass above it."""

    def open(self) -> None:
        from tqdm import tqdm  # not tqdm.auto, whose widgets print nothing to a log

        view = self.view
        self._bar = tqdm(total=view.max_steps, initial=view.step, unit="step", file=sys.stderr, mininterval=0.5)

    def say(self, text: str) -> None:
        with self._bar.external_write_mode():
            self.log(text)

    def show(self, kind: str) -> None:
        if kind != "train":
            return super().show(kind)
        if self.view.curve:
            self._bar.set_postfix_str(f"loss {self.view.curve[-1][1]:.4g}", refresh=False)
        self._bar.update(self.view.step - self._bar.n)

    def close(self, outcome: str, status: str) -> None:
        self._bar.close()
        self.log(outcome)


class Panel(Lines):
    """One notebook output, replaced in place at most twice a second; lines once that fails."""

    works = True

    def open(self) -> None:
        self._draw(self.view.device_line)

    def show(self, kind: str) -> None:
        if kind == "note" or not self.works:  # a note is printed too: it is meant to be read after the run
            super().show(kind)
        elif self.due("panel", 0.5):
            self._draw(self.view.lines[kind])

    def tick(self) -> None:
        if self.works and self.due("panel", 2.0):
            self._draw(self.view.lines.get("train", self.view.device_line))

    def close(self, outcome: str, status: str) -> None:
        if self.works:
            self._draw(outcome, outcome, status)
        if not self.works:
            self.say(outcome)

    def _draw(self, text: str, outcome: str = "", status: str = "running") -> None:
        try:
            session.show(panel_html(self.view, outcome, status), text, self.id)
        except Exception as error:  # whatever the front end does, training goes on
            self.works = False
            self.say(f"the progress panel is given up ({type(error).__name__}: {error}); lines follow")


def choose(display: str) -> type[Lines]:
    """The display of that name: panel, bar, lines, or for "auto" what suits this place. Raises ValueError."""
    if display == "auto":
        display = "panel" if session.can_show() else "bar" if sys.stdout.isatty() else "lines"
    displays = {"panel": Panel, "bar": Bar, "lines": Lines}
    if display not in displays:
        raise ValueError(f"display={display!r}: expected auto, {', '.join(displays)}")
    return displays[display]


def status_of(result: dict[str, Any] | None) -> str:
    """How a run ended, in a word or two."""
    if result is None or str(result.get("reason", "")).startswith("broke off"):
        return "broke off"
    return "finished" if result.get("finished") else "stopped"


# --- a run of another process -----------------------------------------------------------------------


class _Tail:
    """The records of a file as they come; `view` begins anew when the file does, as it does when a run is resumed."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.offset, self.rest = path, -1, 0, b""
        self.records: list[Record] = []
        self.now = 0.0
        self.read_at = time.monotonic()

    def clock(self) -> float:
        """The run's own time: what the last record said, and what has passed since."""
        return self.now + time.monotonic() - self.read_at

    def more(self) -> bool:
        """Read what has been added. True: the file is another one, and all of it is to be taken anew."""
        with open(self.path, "rb") as file:
            facts = os.fstat(file.fileno())
            anew = facts.st_ino != self.file or facts.st_size < self.offset
            if anew:
                self.file, self.offset, self.rest, self.records = facts.st_ino, 0, b"", []
            file.seek(self.offset)
            *whole, self.rest = (self.rest + (added := file.read())).split(b"\n")
            self.offset += len(added)
        last = self.records[-1]["step"] if self.records else 0
        self.new = parse(b"\n".join(whole).decode(errors="replace"), last)
        self.records += self.new
        return anew

    def give(self, display: Lines, records: list[Record], shown: bool) -> None:
        for record in records:
            if isinstance(record.get("time"), int | float):
                self.now, self.read_at = float(record["time"]), time.monotonic()
            display.view.take(record)
            if shown:
                display.show(str(record.get("kind")))


def attach(
    output_dir: str | os.PathLike[str],
    *,
    follow: bool = True,
    display: str = "auto",
    poll: float = 1.0,
    patience: float = 30.0,
) -> None:
    """Show a run from its metrics.jsonl: after a reload of the page, from another notebook or from a terminal.

    A run that goes on is followed until it ends or this call is interrupted, which the run does not notice. One that
    ended without a word is told from one that goes on by its process, where that is on this machine.

    Args:
        follow: False: show it as it stands and return.
        display: as in Progress.
        poll: seconds between two looks at the file.
        patience: seconds that a run which broke off may take to be started again by its launch.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    tail = _Tail(Path(output_dir) / METRICS)
    if not tail.path.is_file():
        raise FileNotFoundError(
            f"{tail.path} does not exist: expected the output_dir of a run that has begun. "
            f"session.find('{METRICS}', ['.']) lists the runs below this folder."
        )
    kind, shown, still = choose(display), None, time.monotonic()
    identity, gone = None, False
    try:
        while True:
            if tail.more() or shown is None:
                shown = kind(View(clock=tail.clock))
                shown.view.hint = "Looking on: to interrupt this leaves the run alone, progress.stop(…) stops it."
                shown.id = identity = identity or shown.id
                tail.give(shown, tail.records, shown=False)
                age = max(0.0, time.time() - tail.path.stat().st_mtime)
                if running(tail.records):
                    tail.read_at -= age
                shown.open()
                if "train" in shown.view.lines:
                    shown.show("train")
                still = time.monotonic() - age
            elif tail.new:
                tail.give(shown, tail.new, shown=True)
                still = time.monotonic()
            else:
                shown.tick()
            stop = next((r for r in reversed(tail.records) if r.get("kind") in ("start", "stop")), {})
            over = stop.get("kind") == "stop"
            if over and (status_of(stop) != "broke off" or not follow or time.monotonic() - still > patience):
                shown.close(shown.view.outcome(stop), status_of(stop))
                return
            before, gone = gone, not over and not running(tail.records)
            if gone and not before:
                continue  # what it wrote last may not have been there yet when its records were read
            if gone and (not follow or time.monotonic() - still > patience):
                seconds = shown.view.seconds() - (time.monotonic() - still)
                reason = "ended without a word: it was killed, or is on another machine"
                shown.close(shown.view.outcome({"reason": reason, "seconds": seconds}), "broke off")
                return
            if not follow:
                return
            time.sleep(poll)
    except KeyboardInterrupt:
        if shown is not None:
            shown.close("no longer followed; the run does not notice. attach(…) shows it again", "left")
