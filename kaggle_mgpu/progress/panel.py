"""Turn the records of a run into numbers and lines (`View`), and draw them as HTML (`panel_html`).

view = View(max_steps=1000)
for record in records.read(output_dir):
    view.take(record)
panel_html(view)                # one HTML element: no script, no external file, no style sheet
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable
from typing import Any

from .records import Record, numbers, texts

POINTS = 200
"""Maximum number of points of a curve in the panel. When a curve is full, every second point is dropped."""

# Text and background colours come from the same source, so they always contrast: VS Code's variables, JupyterLab's
# (nbconvert's HTML has them too), or the browser's own pair, which follows the system's light or dark mode.
_TEXT = "var(--vscode-foreground,var(--jp-content-font-color1,CanvasText))"
_BACKGROUND = "var(--vscode-editor-background,var(--jp-layout-color0,Canvas))"
# Contrast at least 3:1 against white and against #111 (WCAG 2.1, 1.4.11). The two curves also differ in shape.
_TRAIN, _VAL, _MEMORY, _BAD = "#3b82f6", "#d97706", "#8b5cf6", "#ef4444"
_LINE = "rgba(128,128,128,.35)"


def format_duration(seconds: float | None) -> str:
    """Write seconds as 3:12 or 1:02:03, rounded; None, nan and infinity become "?"."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_count(number: float) -> str:
    """Write a number with three significant digits and k, M, B or T: 0.81, 950, 1.2k, 12.3k, 124M; also nan, inf."""
    number = float(f"{number:.3g}")  # rounded before the unit is chosen, or 999 950 would be 1000k
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < math.inf:
            return f"{number / size:.{0 if abs(number) >= 100 * size else 1}f}{letter}"
    return f"{number:g}"


class View:
    """The current state of a run: step, latest numbers, curves and pace, from the records so far.

    A "start" record overrides the arguments.

    Args:
        max_steps: optimizer steps of the run.
        unit: the unit of the throughput: the panel shows "<unit>_per_s" of a record, or else "samples_per_s".
        world_size: number of processes.
        device_line: the devices and the precision.
        clock: gives the time in seconds.
    """

    hint = "The stop button (interrupt the kernel) saves and ends the run."
    """Advice shown during the run."""

    def __init__(
        self,
        max_steps: int = 0,
        unit: str = "samples",
        world_size: int = 1,
        device_line: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps, self.unit, self.world_size, self.device_line = max_steps, unit, world_size, device_line
        self.replicas = world_size  # under dp, one process has several replicas
        self.clock, self.started = clock, clock()
        self.step, self.epochs, self.time_left = 0, None, math.inf
        self.latest: dict[str, Record] = {}  # the last record of each kind
        self.lines: dict[str, str] = {}  # the last record of each kind, as text
        self.notes: list[str] = []
        self.curve: list[tuple[int, float]] = []
        self.val_curve: list[tuple[int, float]] = []
        self.gpus: list[Record] = []
        self.recorded_time = (
            0.0,
            self.started,
        )  # seconds of the run in the last timed record, and the clock at that record
        self.pace: tuple[float, int] | None = None  # time and step of this session's first training record

    def take(self, record: Record, past: bool = False) -> None:
        """Add a record.

        Args:
            past: whether the record is from an earlier session.
        """
        kind, now = str(record.get("kind")), self.clock()
        step = int(record.get("step", self.step))
        self.step = step if kind == "start" else max(step, self.step)  # a save may be recorded some steps later
        if isinstance(record.get("time"), int | float):
            self.recorded_time = record["time"], now
        if kind == "start":
            self.pace, self.gpus = None, []
            for name in ("max_steps", "unit", "world_size", "replicas", "device_line", "epochs"):
                if (value := record.get(name)) is not None:
                    setattr(self, name, value)
            left = record.get("time_left")
            self.time_left = math.inf if left is None else now + left
        elif kind == "train":
            if self.pace is None and not past:  # the first steps, which import, compile and tune, do not count
                self.pace = now, self.step
            _add(self.curve, self.step, record.get("loss"))
        elif kind == "eval":
            _add(self.val_curve, self.step, record.get("val_loss"))
        elif kind == "note":
            self.notes = [*self.notes[-2:], self.line(record)]
        elif kind == "gpus":
            self.gpus = record.get("gpus", [])
        self.latest[kind], self.lines[kind] = record, self.line(record)

    def seconds(self) -> float:
        """Return the seconds of the run until now, over all sessions."""
        return self.recorded_time[0] + self.clock() - self.recorded_time[1]

    def fraction(self) -> float:
        """Return the finished share of the run, 0 to 1."""
        return min(1.0, self.step / self.max_steps) if self.max_steps > 0 else 1.0

    def eta(self) -> float | None:
        """Return the remaining seconds at this session's average pace, evaluations and saves included."""
        if self.pace is None or not self.pace[1] < self.step < self.max_steps:
            return None
        return (self.clock() - self.pace[0]) / (self.step - self.pace[1]) * (self.max_steps - self.step)

    def epoch(self) -> str:
        """Return the last recorded epoch and the number of epochs as text, such as 0.52 / 3; "" if unknown."""
        epoch = self.latest.get("train", {}).get("epoch")
        return "" if epoch is None else f"{epoch:.2f}" + (f" / {round(self.epochs, 2):g}" if self.epochs else "")

    def processes(self) -> str:
        replicas = f" with {self.replicas} replicas" if self.replicas > self.world_size else ""
        return f"{self.world_size} process{'' if self.world_size == 1 else 'es'}{replicas}"

    def throughput(self, record: Record) -> str:
        """Return a record's throughput as text, such as 12.3k tokens/s; "" if unknown."""
        name = self.unit.replace(" ", "_")
        unit, name = (self.unit, name) if f"{name}_per_s" in record else ("samples", "samples")
        rate = numbers(record).get(f"{name}_per_s")
        return "" if rate is None else f"{format_count(rate)} {unit}/s"

    def line(self, record: Record) -> str:
        """Return a record as a line of text: step 120/2000 (6%)  loss 2.314  lr 2.9e-04  12.3k tokens/s …"""
        if record.get("kind") == "note":
            return str(record.get("text", ""))
        measured, at = numbers(record), f"step {record.get('step', self.step)}/{self.max_steps}"
        if record.get("kind") != "train":
            words = [f"{key} {' '.join(text.split())[:80]}" for key, text in texts(record).items()]
            return "  ".join([str(record.get("kind")), at, *(f"{k} {v:.4g}" for k, v in measured.items()), *words])
        labels = {"loss": "loss {:.4g}", "lr": "lr {:.1e}", "grad_norm": "grad {:.2g}"}
        shown = {key: form.format(measured[key]) for key, form in labels.items() if key in measured}
        grad, eta = shown.pop("grad_norm", ""), self.eta()
        parts = [f"{at} ({100 * self.fraction():.0f}%)", *shown.values(), self.throughput(record), grad]
        parts += [f"ETA {format_duration(eta)}" if eta is not None else "", self.processes()]
        return "  ".join(part for part in parts if part)

    def outcome(self, result: dict[str, Any] | None) -> str:
        """Return the last line of a run; `result` may have "finished", "reason", "step", "metrics" and "seconds"."""
        result = result or {"reason": "broke off"}
        head = "finished" if result.get("finished") else f"stopped ({result.get('reason') or 'no reason given'})"
        metrics = [f"{key} {value:.4g}" for key, value in numbers(result.get("metrics") or {}).items()]
        took = format_duration(result.get("seconds", self.clock() - self.started))
        at = f"step {result.get('step', self.step)}/{self.max_steps}"
        return "  ".join([f"{head}: {at}", *metrics, f"in {took}", self.processes()])


def _add(curve: list[tuple[int, float]], step: int, value: Any) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        if len(curve) >= POINTS:
            del curve[1::2]
        curve.append((step, float(value)))


# --- HTML -------------------------------------------------------------------------------------------


def panel_html(view: View, outcome: str = "", status: str = "running") -> str:
    """Return the panel as one HTML element with inline styles; the width follows the notebook's.

    Args:
        outcome: a sentence about the end of the run; "" during the run.
        status: a word beside the steps: running, finished, stopped, broke off, or left if `attach` was interrupted.
    """
    ended = bool(outcome)
    colour = {"finished": "#16a34a", "stopped": _VAL, "broke off": _BAD}.get(status, _TRAIN)
    percent = f"({100 * view.fraction():.0f}%)"
    head = (
        f'<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em">'
        f'<div><span style="font-weight:600">step {view.step:,}</span> / {view.max_steps:,} {percent}</div>'
        f'<div style="color:{colour};font-weight:600">{html.escape(status)}</div></div>'
        + _bar(view.fraction(), colour, "0.5em")
    )
    tiles = "".join(
        f'<div style="min-width:0"><div style="opacity:.65;font-size:.85em">{html.escape(name)}</div>'
        f'<div style="font-size:1.05em;overflow-wrap:anywhere">{html.escape(value)}</div></div>'
        for name, value in _tiles(view, ended)
        if value
    )
    grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(8em,100%),1fr));gap:.4em 1em;margin:.6em 0"
    rows = [*view.notes, outcome.replace("  ", " · ")]
    if not ended and view.lines:
        rows.append(view.hint)
    devices = ", ".join(part for part in (view.device_line, view.processes()) if part)
    return (
        f'<div class="kaggle-mgpu" style="color-scheme:light dark;background:{_BACKGROUND};color:{_TEXT};'
        f"border:1px solid {_LINE};border-radius:6px;padding:.7em .9em;margin:.2em 0;max-width:60em;"
        "box-sizing:border-box;font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);"
        'font-variant-numeric:tabular-nums;overflow-wrap:anywhere">'
        + head
        + (f'<div style="{grid}">{tiles}</div>' if tiles else "")
        + _sparkline(view.curve, view.val_curve)
        + _metrics(view)
        + "".join(map(_gpu, view.gpus))
        + "".join(f'<div style="margin-top:.3em">{html.escape(row)}</div>' for row in rows if row)
        + f'<div style="opacity:.65;font-size:.85em;margin-top:.4em">{html.escape(devices)}</div></div>'
    )


def _tiles(view: View, ended: bool) -> list[tuple[str, str]]:
    """Return labels and values; the panel leaves out empty values."""
    train, evaluated, saved = (view.latest.get(kind, {}) for kind in ("train", "eval", "save"))
    left = view.time_left - view.clock()
    loss = "" if "loss" not in train else "nan" if train["loss"] is None else f"{train['loss']:.4g}"
    measured, seconds = numbers(train), view.seconds()
    return [
        ("training loss", loss),
        ("validation loss", f"{evaluated['val_loss']:.4g}" if "val_loss" in numbers(evaluated) else ""),
        ("throughput", view.throughput(train)),
        ("learning rate", f"{measured['lr']:.2e}" if "lr" in measured else ""),
        ("epoch", view.epoch()),
        ("elapsed", format_duration(view.latest.get("stop", {}).get("seconds", seconds) if ended else seconds)),
        ("time to go", "" if ended else format_duration(view.eta())),
        ("session's deadline", "" if ended or math.isinf(left) else f"in {format_duration(left)}"),
        ("last checkpoint", f"step {saved['step']:,}" if saved else ""),
    ]


def _metrics(view: View) -> str:
    """Return a line with the metrics of the last evaluation, apart from the loss."""
    evaluated = view.latest.get("eval", {})
    found = {key.removeprefix("val_"): value for key, value in numbers(evaluated).items() if key != "val_loss"}
    if not found:
        return ""
    text = " · ".join(f"{key} {value:.4g}" for key, value in list(found.items())[:12])
    return f'<div style="margin-top:.3em">validation, step {evaluated.get("step")}: {html.escape(text)}</div>'


def _bar(fraction: float, colour: str, height: str) -> str:
    return (
        f'<div style="background:{_LINE};height:{height};border-radius:3px;overflow:hidden">'
        f'<div style="background:{colour};height:100%;width:{100 * fraction:.1f}%"></div></div>'
    )


def _gpu(gpu: Record) -> str:
    """Return a row for a GPU: utilisation, memory and temperature, as far as known."""
    busy, used, total, celsius = (gpu.get(k) for k in ("utilization", "memory_used", "memory_total", "temperature"))
    parts = []
    if busy is not None:
        parts.append((f"{busy:.0f} %", _bar(busy / 100, _TRAIN, ".5em")))
    if used is not None:
        of = f" / {total / 2**30:.1f}" if total else ""
        parts.append((f"{used / 2**30:.1f}{of} GiB", _bar(used / total, _MEMORY, ".5em") if total else ""))
    cells = "".join(
        f'<div style="display:flex;align-items:center;gap:.5em;flex:1 1 11em;min-width:0">'
        f'<div style="flex:1 1 3em">{bar}</div><div style="flex:0 0 auto">{text}</div></div>'
        for text, bar in parts
    )
    heat = "" if celsius is None else f"{celsius:.0f} °C"
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:0 1em;margin-top:.2em">'
        f'<div style="flex:0 0 4em">GPU {html.escape(str(gpu.get("index", "?")))}</div>{cells}'
        f'<div style="flex:0 0 4em;text-align:right">{heat}</div></div>'
    )


def _sparkline(train: list[tuple[int, float]], val: list[tuple[int, float]]) -> str:
    """Draw training loss as a line, validation loss as a dashed line with dots, and a legend with the range below."""
    points = train + val
    if len(train) < 2 and len(val) < 2:
        return ""
    width, height = 600, 70
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    # with a linear scale, a high value at the start would flatten the rest
    logarithmic = low > 0 and high / low > 20
    scale: Callable[[float], float] = math.log if logarithmic else float
    x, y = width / max(1, last - first), (height - 8) / ((scale(high) - scale(low)) or 1.0)

    def place(curve: list[tuple[int, float]]) -> list[str]:
        return [f"{(step - first) * x:.0f},{4 + (scale(high) - scale(loss)) * y:.1f}" for step, loss in curve]

    line = 'fill="none" stroke-linejoin="round" stroke-linecap="round" vector-effect="non-scaling-stroke"'
    drawn = f'<polyline points="{" ".join(place(train))}" {line} stroke="{_TRAIN}" stroke-width="1.5"/>'
    if val:
        dots = " ".join(f"M{point}h0" for point in place(val))  # a round stroke of length 0 stays a circle at any scale
        drawn += (
            f'<polyline points="{" ".join(place(val))}" {line} stroke="{_VAL}" stroke-dasharray="4 4"/>'
            f'<path d="{dots}" {line} stroke="{_VAL}" stroke-width="6"/>'
        )
    legend = f'<span style="color:{_TRAIN}">━</span> training'
    legend += f' &nbsp;<span style="color:{_VAL}">●</span> validation' if val else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" height="{height}" preserveAspectRatio="none" '
        f'style="display:block;overflow:visible" role="img" aria-label="loss curve">{drawn}</svg>'
        '<div style="display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em;opacity:.8;font-size:.85em">'
        f"<div>{legend}</div><div>loss {low:.4g} to {high:.4g}{' (logarithmic)' * logarithmic}, "
        f"steps {first} to {last}</div></div>"
    )
