"""Show a run while it trains: a panel in a notebook, a bar in a terminal, or lines in a log.

    display = choose_display("auto")(View(max_steps=1000), print)
    attach(output_dir)           # show a run again, from another notebook or after a reload of the page

A display draws after a record, at a limited rate. A Batch session gets a few lines and the final panel, because the
notebook that Kaggle saves then either lacks bars and live outputs or has every version of them that was drawn.
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

from ..machine import session
from .panel import View, panel_html
from .records import METRICS, Record, numbers, parse, running

Printer = Callable[[str], None]


def print_line(text: str) -> None:
    print(text, flush=True)  # stdout is block-buffered in a pipe: without flush a log lags by minutes


class Lines:
    """Print a run as plain lines.

    The first record of a kind, notes and the outcome are printed at once. The pause between two training lines is 15 s
    in the first 5 minutes, then 1/20 of the elapsed time, and at most 60 s. Evaluations and saves are printed at most
    every 30 s; metrics.jsonl has all of them.
    """

    def __init__(self, view: View, log: Printer = print_line) -> None:
        self.view, self.log = view, log
        self.id = f"kaggle-mgpu-{uuid.uuid4().hex[:12]}"
        self.drawn: dict[str, float] = {}

    def due(self, kind: str, pause: float) -> bool:
        """Return whether `pause` seconds have passed since the last True for this kind."""
        now = self.view.clock()
        if now - self.drawn.get(kind, -math.inf) < pause:
            return False
        self.drawn[kind] = now
        return True

    def open(self) -> None:
        """Show the display for the first time."""

    def say(self, text: str) -> None:
        self.log(text)

    def show(self, kind: str) -> None:
        """Show the view's latest record of a kind."""
        if kind in ("start", "stop", "gpus"):
            return  # the trainer prints the start itself, and `close` the outcome
        elapsed = self.view.clock() - self.view.started
        pause = {"train": min(60.0, max(15.0, elapsed / 20)), "note": 0.0}.get(kind, 30.0)
        if self.due(kind, pause):
            self.say(self.view.lines[kind])

    def tick(self) -> None:
        """Redraw the elapsed and the remaining time between two records, if the display shows them."""

    def close(self, outcome: str, status: str) -> None:
        """Show the end of the run; the arguments are those of `panel_html`."""
        self.say(outcome)
        if session.can_draw():  # even if nobody watches, since the saved notebook then shows the final panel
            with contextlib.suppress(Exception):
                session.show(panel_html(self.view, outcome, status), outcome, self.id)


class Bar(Lines):
    """Draw a progress bar on a terminal's stderr, with evaluations and notes as lines above."""

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
            epoch, lr = self.view.epoch(), numbers(self.view.latest["train"]).get("lr")
            parts = [f"epoch {epoch}" if epoch else "", f"loss {self.view.curve[-1][1]:.4g}"]
            parts += ["" if lr is None else f"lr {lr:.1e}", self.view.processes()]
            self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
        self._bar.update(self.view.step - self._bar.n)

    def close(self, outcome: str, status: str) -> None:
        self._bar.close()
        self.log(outcome)


class Panel(Lines):
    """Redraw a notebook output at most twice a second; if drawing fails, print lines from then on."""

    works = True

    def open(self) -> None:
        self._draw(self.view.device_line)

    def show(self, kind: str) -> None:
        if kind == "note" or not self.works:  # print notes, since the panel shows only the last three
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
        except Exception as error:  # an error of the notebook's front end must not end the training
            self.works = False
            self.say(f"the progress panel failed ({type(error).__name__}: {error}); text lines follow instead")


def choose_display(display: str) -> type[Lines]:
    """Return the display class for a name: panel, bar, lines, or auto, which depends on the session.

    Raises:
        ValueError: `display` is none of these names.
    """
    if display == "auto":
        display = "panel" if session.can_show() else "bar" if sys.stdout.isatty() else "lines"
    displays = {"panel": Panel, "bar": Bar, "lines": Lines}
    if display not in displays:
        raise ValueError(f"display={display!r}: expected auto, {', '.join(displays)}")
    return displays[display]


def status_of(result: dict[str, Any] | None) -> str:
    """Return the status of a run that ended: finished, stopped or broke off."""
    if result is None or str(result.get("reason", "")).startswith("broke off"):
        return "broke off"
    return "finished" if result.get("finished") else "stopped"


# --- a run of another process -----------------------------------------------------------------------


class _RecordsFollower:
    """Read a growing metrics.jsonl from another process."""

    def __init__(self, path: Path) -> None:
        self.path, self.inode, self.offset, self.incomplete_line = path, -1, 0, b""
        self.records: list[Record] = []
        self.new: list[Record] = []
        self.last_time = 0.0
        self.last_time_at = time.monotonic()

    def clock(self) -> float:
        """Return the run's time in seconds: the last recorded time plus the time since."""
        return self.last_time + time.monotonic() - self.last_time_at

    def read_more(self) -> bool:
        """Read added lines into `new`; return whether the file was replaced, as by a resumed run."""
        with open(self.path, "rb") as file:
            stat = os.fstat(file.fileno())
            replaced = stat.st_ino != self.inode or stat.st_size < self.offset
            if replaced:
                self.inode, self.offset, self.incomplete_line, self.records = stat.st_ino, 0, b"", []
            file.seek(self.offset)
            *lines, self.incomplete_line = (self.incomplete_line + (added := file.read())).split(b"\n")
            self.offset += len(added)
        last = self.records[-1]["step"] if self.records else 0
        self.new = parse(b"\n".join(lines).decode(errors="replace"), last)
        self.records += self.new
        return replaced

    def pass_to(self, display: Lines, records: list[Record], show: bool) -> None:
        """Hand records to a display's view; with `show`, also show each record."""
        for record in records:
            if isinstance(record.get("time"), int | float):
                self.last_time, self.last_time_at = float(record["time"]), time.monotonic()
            display.view.take(record)
            if show:
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

    The call follows an active run until the run ends or the call is interrupted; an interrupt does not affect the run.
    A run without a process on this machine counts as ended.

    Args:
        follow: False shows the current state and returns.
        display: as in Progress.
        poll: seconds between two reads of the file.
        patience: seconds to wait for a launch to restart a run that broke off.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: `display` is not the name of a display.
    """
    file = _RecordsFollower(Path(output_dir) / METRICS)
    if not file.path.is_file():
        raise FileNotFoundError(
            f"{file.path} does not exist: expected the output_dir of a run that has begun. "
            f"session.find('{METRICS}', ['.']) lists the runs below this folder."
        )
    kind, shown, last_change = choose_display(display), None, time.monotonic()
    identity, gone = None, False
    try:
        while True:
            if file.read_more() or shown is None:
                shown = kind(View(clock=file.clock))
                shown.view.hint = "Watching only: an interrupt here does not stop the run; progress.stop(…) does."
                shown.id = identity = identity or shown.id
                file.pass_to(shown, file.records, show=False)
                age = max(0.0, time.time() - file.path.stat().st_mtime)
                if running(file.records):
                    file.last_time_at -= age
                shown.open()
                if "train" in shown.view.lines:
                    shown.show("train")
                last_change = time.monotonic() - age
            elif file.new:
                file.pass_to(shown, file.new, show=True)
                last_change = time.monotonic()
            else:
                shown.tick()
            last = next((r for r in reversed(file.records) if r.get("kind") in ("start", "stop")), {})
            ended = last.get("kind") == "stop"
            waited = time.monotonic() - last_change > patience
            if ended and (status_of(last) != "broke off" or not follow or waited):
                shown.close(shown.view.outcome(last), status_of(last))
                return
            before, gone = gone, not ended and not running(file.records)
            if gone and not before:
                continue  # the process may have written its last records after the read above
            if gone and (not follow or waited):
                seconds = shown.view.seconds() - (time.monotonic() - last_change)
                reason = "no process and no final record: killed, or on another machine"
                shown.close(shown.view.outcome({"reason": reason, "seconds": seconds}), "broke off")
                return
            if not follow:
                return
            time.sleep(poll)
    except KeyboardInterrupt:
        if shown is not None:
            shown.close("no longer followed; the run goes on. attach(…) shows it again", "left")
