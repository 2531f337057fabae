"""What a run says while it trains: metrics.jsonl, one display, TensorBoard, and the curves afterwards.

    with Progress(output_dir, max_steps=1000, main=distributed.is_main()) as progress:
        progress.record({"kind": "train", "step": 10, "loss": 2.1, "lr": 3e-4, "samples_per_s": 812.0})
        progress.close({"finished": True, "step": 1000, "metrics": {"loss": 1.9}, "seconds": 171.0})
    read(output_dir)                 # every record, as written
    plot(output_dir)                 # a matplotlib figure

The trainer makes one on every rank; only the main one writes, draws or calls back. All work happens when a
record is logged, so a step that logs nothing pays nothing. The display is chosen once: one HTML panel updated
in place where a notebook can show it, a progress bar in a terminal, sparse plain lines in a log (a Batch
session, CI, a pipe), where bars and live outputs are lost or pile up.
"""

from __future__ import annotations

import errno
import html
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kaggle_mgpu import import_hooks, session

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
_Log = Callable[[str], None]
# Bookkeeping of a record, as against what was measured.
_FACTS = {"kind", "step", "samples", "epoch", "time", "seconds", "text"}


def _print(text: str) -> None:
    print(text, flush=True)  # stdout is block-buffered in a pipe: a log would run minutes behind


class Progress:
    """Records of one run: written to metrics.jsonl, shown, and handed to `on_record`.

    output_dir    the run's folder, made if missing
    max_steps     optimizer steps of the whole run
    main          does this process write (rank 0)? All methods do nothing where it is False
    resumed_step  the step the weights are at. Lines of later steps, which will be trained again, and torn
                  lines are dropped; at 0 the file starts empty. So each step stands in it once
    unit          what is counted: a record's "<unit>_per_s", else "samples_per_s", is the throughput shown
    on_record     called with each record before it is written; what it adds to the record is written too
    tensorboard   also write the numbers to output_dir/tensorboard (needs the package, not TensorFlow)
    history       folder the run is resumed from if it is another one: its records are continued here
    display       "panel", "bar", "lines" or "auto"
    clock         seconds; only tests need another
    Raises ModuleNotFoundError for tensorboard=True without the package.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        max_steps: int,
        main: bool,
        resumed_step: int = 0,
        unit: str = "samples",
        on_record: Callable[[dict[str, Any]], None] | None = None,
        tensorboard: bool = False,
        world_size: int = 1,
        device_line: str = "",
        log: _Log = _print,
        history: str | os.PathLike[str] | None = None,
        display: str = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._closed = not main
        if not main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = _rewind(history or folder, folder / METRICS, resumed_step)
        self._step = resumed_step
        self._on_record = on_record
        self._writer = _summary_writer(folder / "tensorboard", resumed_step) if tensorboard else None
        self._display = _choose(display)(max_steps, unit, world_size, device_line, log, clock)
        for record in kept:
            self._display.take(record, past=True)
        self._display.step = resumed_step
        self._display.open()
        self._file = open(folder / METRICS, "ab", buffering=0)  # noqa: SIM115 (see close)
        self._unwritten = b""

    def record(self, record: dict[str, Any]) -> None:
        """Write one record, {"kind": …, "step": …, …}, as a line of strict JSON, and show it.

        Values: what JSON has, paths, and anything with `item()` (a 0-d tensor: copied from the GPU here). nan
        and infinity, which JSON does not have, are written as null, so that a column of numbers stays one;
        the display still says nan or inf. Raises TypeError for a value of another type.
        """
        if self._closed:
            return
        self._step = int(record.get("step", self._step))
        if self._on_record is not None:
            self._on_record(record)
        text = json.dumps(record, default=_item)
        strict = json.loads(text, parse_constant=lambda constant: None)
        # One write a line: a killed process leaves at most one torn line, the last.
        self._write((json.dumps(strict, allow_nan=False) + "\n").encode("ascii"))
        plain = json.loads(text)  # plain values, nan and infinity still among them
        if self._writer is not None:
            for key, value in _numbers(plain).items():
                self._writer.add_scalar(f"{plain.get('kind', 'train')}/{key}", value, self._step)
        self._display.take(plain)
        self._display.show(str(plain.get("kind")))

    def _write(self, line: bytes) -> None:
        """Append to the file. What finds no room on the disk is kept, and written with the next line."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def note(self, text: str) -> None:
        """Print a line of text, and record it as {"kind": "note", "step": …, "text": …}."""
        if not self._closed:
            self.record({"kind": "note", "step": self._step, "text": text})

    def close(self, result: dict[str, Any] | None = None) -> None:
        """Show how the run ended and close the files. A second call does nothing.

        result: of "finished", "step", "reason", "metrics" and "seconds" what there is; None if the run broke.
        """
        if self._closed:
            return
        self._closed = True
        self._write(b"")
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._display.close(self._display.outcome(result))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None)


def read(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a run, oldest first; [] if there are none yet. Lines torn by a kill are left out."""
    path, records = Path(output_dir) / METRICS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def comparable(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run that was stopped and resumed has in common with one that was not: all that was measured, but time.

    Records of training and evaluation are that. Starts, saves, stops and notes belong to a session.
    """
    return [
        {key: value for key, value in record.items() if key not in ("time", "seconds") and not key.endswith("_per_s")}
        for record in records
        if record.get("kind") in ("train", "eval")
    ]


def _rewind(source: str | os.PathLike[str], target: Path, step: int) -> list[dict[str, Any]]:
    """Write to `target` the records of `source` up to `step`, all or nothing, and return them."""
    kept = [r for r in read(source) if isinstance(r.get("step", 0), int) and r.get("step", 0) <= step] if step else []
    temporary = target.with_name(f".writing-{target.name}")
    with open(temporary, "w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return kept


def _item(value: Any) -> Any:
    """What json cannot write: a path as text, a 0-d tensor or array as its number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    with suppress(AttributeError, ValueError, RuntimeError):  # an array of several values has no item
        return value.item()
    raise TypeError(
        f"a record holds numbers, strings, lists and dicts of them, paths and 0-d tensors, got "
        f"{type(value).__name__}: {value!r:.80}; convert it before it is recorded"
    )


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The measured numbers of a record: no facts, no flags, no text."""
    return {
        key: value
        for key, value in record.items()
        if key not in _FACTS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _summary_writer(folder: Path, resumed_step: int) -> SummaryWriter:
    import_hooks.install(stub=True)  # or TensorBoard imports TensorFlow where there is one: 7.5 s, 750 MB, noise
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tensorboard=True, but the package cannot be imported ({error}): pip install tensorboard, "
            f"or leave it off: metrics.jsonl has the same numbers"
        ) from error
    # purge_step hides what an earlier session wrote of the steps that are trained again.
    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)


# -- what there is to show ---------------------------------------------------------------------------------


def format_duration(seconds: float | None) -> str:
    """3:12, 1:02:03; "?" for None, nan and infinity. Rounded to whole seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_count(number: float) -> str:
    """Three significant digits and k, M, B or T: 0.81, 950, 1.2k, 12.3k, 124M, 1.5B; nan and inf as such."""
    number = float(f"{number:.3g}")  # before the unit is chosen, or 999 950 would be 1000k
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < math.inf:
            return f"{number / size:.{0 if abs(number) >= 100 * size else 1}f}{letter}"
    return f"{number:g}"


class _Lines:
    """A run as plain lines, and what the other displays draw from: latest records, loss curve, pace.

    Shown at once: the first record, evaluations, saves, notes and the end. A training line every 15 s at
    first, then at a twentieth of the time gone by, up to 60 s: a minute's and a night's log can both be read.
    """

    def __init__(
        self,
        max_steps: int,
        unit: str,
        world_size: int,
        device_line: str,
        log: _Log,
        clock: Callable[[], float],
    ) -> None:
        self.max_steps, self.unit, self.device_line, self.log, self.clock = (
            max_steps,
            unit,
            device_line,
            log,
            clock,
        )
        self.processes = f"{world_size} process{'' if world_size == 1 else 'es'}"
        self.step, self.started, self.drawn = 0, clock(), -math.inf
        self.latest: dict[str, str] = {}  # the last line of each kind
        self.notes: list[str] = []
        self.curve: list[tuple[int, float]] = []
        self.pace: tuple[float, int] | None = None  # when this session's first line came, and its step

    def take(self, record: dict[str, Any], past: bool = False) -> None:
        """Remember a record; of the past, if it comes from an earlier session."""
        kind, loss = str(record.get("kind")), record.get("loss")
        self.step = int(record.get("step", self.step))
        if kind == "train":
            if self.pace is None and not past:  # the first steps, which import, compile and tune, do not count
                self.pace = self.clock(), self.step
            if isinstance(loss, int | float) and math.isfinite(loss):
                if len(self.curve) >= 300:
                    del self.curve[1::2]
                self.curve.append((self.step, float(loss)))
        elif kind == "note":
            self.notes = [*self.notes[-2:], self.line(record)]
        self.latest[kind] = self.line(record)

    def line(self, record: dict[str, Any]) -> str:
        """A record in one line: step 120/2000 (6%)  loss 2.314  lr 2.9e-04  12.3k tokens/s …"""
        if record.get("kind") == "note":
            return str(record.get("text", ""))
        numbers, at = _numbers(record), f"step {self.step}/{self.max_steps}"
        if record.get("kind") != "train":
            words = [f"{k} {v}" for k, v in record.items() if isinstance(v, str) and k not in _FACTS]
            return "  ".join([str(record.get("kind")), at, *(f"{k} {v:.4g}" for k, v in numbers.items()), *words])
        unit = self.unit if f"{self.unit}_per_s" in numbers else "samples"
        labels = {"loss": "loss {:.4g}", "lr": "lr {:.1e}", f"{unit}_per_s": "", "grad_norm": "grad {:.2g}"}
        shown = [
            form.format(numbers[key]) if form else f"{format_count(numbers[key])} {unit}/s"
            for key, form in labels.items()
            if key in numbers
        ]
        if self.pace is not None and self.pace[1] < self.step < self.max_steps:
            # This session's average, with its evaluations and saves: what the rest will cost too.
            seconds = (self.clock() - self.pace[0]) / (self.step - self.pace[1])
            shown.append(f"ETA {format_duration(seconds * (self.max_steps - self.step))}")
        return "  ".join([f"{at} ({100 * self.fraction():.0f}%)", *shown, self.processes])

    def fraction(self) -> float:
        return min(1.0, self.step / self.max_steps) if self.max_steps > 0 else 1.0

    def outcome(self, result: dict[str, Any] | None) -> str:
        """The last line of a run."""
        result = result or {"reason": "broke off"}
        head = "finished" if result.get("finished") else f"stopped ({result.get('reason') or 'no reason given'})"
        metrics = [f"{key} {value:.4g}" for key, value in (result.get("metrics") or {}).items()]
        took = format_duration(result.get("seconds", self.clock() - self.started))
        at = f"step {result.get('step', self.step)}/{self.max_steps}"
        return "  ".join([f"{head}: {at}", *metrics, f"in {took}", self.processes])

    def due(self, pause: float) -> bool:
        """Is it `pause` seconds since this was last true?"""
        now = self.clock()
        if now - self.drawn < pause:
            return False
        self.drawn = now
        return True

    def open(self) -> None:
        pass  # what the trainer printed before stands right above

    def say(self, text: str) -> None:
        self.log(text)

    def show(self, kind: str) -> None:
        if kind in ("start", "stop"):
            return  # for the file: the trainer says what it starts with, and the last line how it ended
        if kind != "train" or self.due(min(60.0, max(15.0, (self.clock() - self.started) / 20))):
            self.say(self.latest[kind])

    def close(self, outcome: str) -> None:
        self.say(outcome)


class _Bar(_Lines):
    """A terminal's progress bar on stderr; evaluations and notes pass above it."""

    def open(self) -> None:
        from tqdm import tqdm  # not tqdm.auto, whose widgets print nothing to a log

        self._bar = tqdm(total=self.max_steps, initial=self.step, unit="step", file=sys.stderr, mininterval=0.5)
        super().open()

    def say(self, text: str) -> None:
        with self._bar.external_write_mode():
            self.log(text)

    def show(self, kind: str) -> None:
        if kind != "train":
            return super().show(kind)
        if self.curve:
            self._bar.set_postfix_str(f"loss {self.curve[-1][1]:.4g}", refresh=False)
        self._bar.update(self.step - self._bar.n)

    def close(self, outcome: str) -> None:
        self._bar.close()
        self.log(outcome)


class _Panel(_Lines):
    """One notebook output, replaced in place at most twice a second; lines once that fails."""

    def open(self) -> None:
        self._works, self._id = True, f"kaggle-mgpu-{uuid.uuid4().hex[:12]}"
        self._draw(self.device_line)

    def show(self, kind: str) -> None:
        if kind == "note" or not self._works:  # a note is printed too: it is meant to be read after the run
            super().show(kind)
        elif self.due(0.5):
            self._draw(self.latest[kind])

    def close(self, outcome: str) -> None:
        if self._works:
            self._draw(outcome, outcome)
        if not self._works:
            self.say(outcome)

    def _draw(self, text: str, outcome: str = "") -> None:
        try:
            session.show(panel_html(self, outcome), text, self._id)
        except Exception as error:  # whatever the front end does, training goes on
            self._works = False
            self.say(f"the progress panel is given up ({type(error).__name__}: {error}); lines follow")


def panel_html(state: _Lines, outcome: str = "") -> str:
    """The panel. Sizes in em and every colour the text's own, so that it reads on light and dark pages."""
    latest = [state.latest[kind] for kind in ("train", "eval", "save") if kind in state.latest]
    rows = [state.device_line, *latest, *state.notes, outcome]
    return (
        '<div style="font-family:ui-monospace,monospace;font-size:0.9em;line-height:1.5;max-width:60em">'
        '<div style="border:1px solid currentColor;height:0.7em;margin:0.3em 0">'
        f'<div style="background:currentColor;opacity:0.6;height:100%;width:{100 * state.fraction():.1f}%">'
        f"</div></div>{_sparkline(state.curve)}"
        + "".join(f"<div>{html.escape(row)}</div>" for row in rows if row)
        + "</div>"
    )


def _sparkline(curve: list[tuple[int, float]], width: int = 600, height: int = 48) -> str:
    """The training loss between its smallest and its largest value, which stand below it."""
    if len(curve) < 2:
        return ""
    (first, _), (last, _), losses = curve[0], curve[-1], [loss for _, loss in curve]
    low, high = min(losses), max(losses)
    x, y = width / max(1, last - first), (height - 4) / ((high - low) or 1.0)
    path = " ".join(f"{(step - first) * x:.0f},{2 + (high - loss) * y:.1f}" for step, loss in curve)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" height="{height}" preserveAspectRatio="none">'
        f'<polyline points="{path}" fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"/>'
        "</svg>"
        f'<div style="opacity:0.7">training loss {low:.4g} to {high:.4g}, steps {first} to {last}</div>'
    )


def _choose(display: str) -> type[_Lines]:
    if display == "auto":
        display = "panel" if session.can_show() else "bar" if sys.stdout.isatty() else "lines"
    displays = {"panel": _Panel, "bar": _Bar, "lines": _Lines}
    if display not in displays:
        raise ValueError(f"display={display!r}: expected auto, {', '.join(displays)}")
    return displays[display]


# -- afterwards --------------------------------------------------------------------------------------------


def plot(output_dir: str | os.PathLike[str]) -> Figure:
    """Loss (training and validation), learning rate and throughput over the steps; resumes are marked.

    Told apart by line style and marker, not colour alone, so that a print in grey can be read. A figure by
    itself, no pyplot state; a notebook shows it as a cell's last value, `savefig` saves it.
    Raises ValueError if nothing has been recorded yet.
    """
    from matplotlib.figure import Figure

    records = read(output_dir)
    train = [r for r in records if r.get("kind") == "train"]
    evals = [r for r in records if r.get("kind") == "eval"]
    if not train and not evals:
        raise ValueError(
            f"{Path(output_dir) / METRICS}: no training record yet, so nothing to plot; "
            f"expected the output_dir of a run that has logged at least once (log_every)"
        )

    class Curves(Figure):
        def _repr_png_(self) -> bytes:  # a notebook shows a bare Figure as text unless pyplot set it up
            self.savefig(png := io.BytesIO(), format="png", dpi=80)
            return png.getvalue()

    figure = Curves(figsize=(8, 7), layout="constrained")
    loss, rate, pace = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    loss.plot(*_series(train, "loss"), color="tab:blue", linewidth=1, label="training")
    if any("val_loss" in r for r in evals):
        loss.plot(*_series(evals, "val_loss"), color="black", linestyle="--", marker="o", label="validation")
    rate.plot(*_series(train, "lr"), color="black", linewidth=1)
    rates = {key for record in train for key in record if key.endswith("_per_s")}
    unit = min(rates - {"samples_per_s"}, default="samples_per_s")  # the task's own unit where it has one
    pace.plot(*_series(train, unit), color="black", linewidth=1)
    resumes = [r["step"] for r in records if r.get("kind") == "start" and r.get("step", 0) > 0]
    for axes, label in ((loss, "loss"), (rate, "learning rate"), (pace, unit.replace("_per_s", " / s"))):
        for index, step in enumerate(resumes):
            axes.axvline(step, color="gray", linestyle=":", label="" if index else "resumed")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    pace.set_ylim(bottom=0)
    pace.set_xlabel("optimizer step")
    loss.legend()
    return figure


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; a value that was not finite is a gap."""
    found = [(r["step"], math.nan if r[key] is None else float(r[key])) for r in records if key in r]
    return [step for step, _ in found], [value for _, value in found]
