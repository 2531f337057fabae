"""Plot runs from their metrics.jsonl with matplotlib; the plots stay readable in greyscale.

    plot(output_dir)                           # one run; also run.png and run.svg in its folder
    compare_plot(["runs/one", "runs/two"])     # several, side by side
    style(axes, "loss")                        # a recipe's own axes, in the same style

The functions return figures and do not use pyplot. A notebook shows a figure that is the last value of a cell.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import METRICS, Record, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The uses of a run's time, in the order of the bar: key in a record's "spent", label, colour and hatch.
SPENT = {
    "data": ("loading data or waiting for it", "tab:orange", "//"),
    "steps": ("forward, backward, optimizer", "tab:blue", ""),
    "communication": ("communication", "tab:red", "xx"),
    "evaluation": ("evaluation", "tab:green", ".."),
    "saving": ("saving", "tab:purple", "\\\\"),
}
# Figures are transparent, to suit light and dark pages. This grey has a contrast of 4.3 or more against white and
# against #111; WCAG 2.1 asks for 3 in graphics.
INK = "#7a7a7a"
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
_OUT_OF_MEMORY = "out of memory"


def plot(output_dir: str | os.PathLike[str], *, save: bool = True) -> Figure:
    """Plot a run: loss and learning rate over steps, throughput and GPU utilisation over time, and the use of time.

    Checkpoints, resumes and out-of-memory events are marked. Panels without data, such as utilisation without GPUs,
    are left out.

    Args:
        save: also write run.png and run.svg into the folder, if the folder is writable.

    Raises:
        ValueError: nothing has been recorded yet.
    """
    records = read(output_dir)
    train, evals, starts, gpus = (_of_kind(records, kind) for kind in ("train", "eval", "start", "gpus"))
    if not train and not evals:
        raise ValueError(
            f"{Path(output_dir) / METRICS}: no training record yet, so nothing to plot; "
            f"expected the output_dir of a run that has logged at least once (log_every)"
        )
    spent = _time_use(records)
    memory = _memory(gpus)
    heights = [3.0, 1.0, 1.5] + [0.35] * bool(spent) + [0.25 + 0.25 * len(memory)] * bool(memory)
    figure = figure_of(8, 1.2 * sum(heights) + 1)
    loss, rate, pace, *more = figure.subplots(len(heights), 1, height_ratios=heights)

    loss.plot(*_series(train, "loss"), color="tab:blue", linewidth=1, label="training")
    if any("val_loss" in r for r in evals):
        loss.plot(*_series(evals, "val_loss"), color=INK, linestyle="--", marker="o", markersize=4, label="validation")
    rate.plot(*_series(train, "lr"), color=INK, linewidth=1)
    rate.sharex(loss)
    for axes in (loss, rate):
        resumes = [r["step"] for r in starts if r.get("step", 0) > 0]
        for index, step in enumerate(resumes):
            axes.axvline(step, color="gray", linestyle=":", label="" if index else "resumed")
    style(loss, "loss")
    style(rate, "learning rate", "optimizer step")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    loss.tick_params(labelbottom=False)
    loss.legend(frameon=False, labelcolor=INK)

    _over_time(pace, records)
    if spent:
        _time_use_bar(more.pop(0), spent)
    if memory:
        _memory_bars(more.pop(0), memory)
    if save:
        save_figure(figure, Path(output_dir) / "run")
    return figure


def compare_plot(
    output_dirs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Figure:
    """Compare runs: loss over steps and over time, throughput, duration and final validation loss.

    Args:
        labels: a name for each run; default: the names of the folders.
        save: a path without extension, for a .png and an .svg file.

    Raises:
        ValueError: there is no run, the labels do not match the runs in number, or a run has recorded nothing.
    """
    if isinstance(output_dirs, str | os.PathLike):
        output_dirs = [output_dirs]
    runs = [read(folder) for folder in output_dirs]
    names = [Path(folder).resolve().name for folder in output_dirs] if labels is None else list(labels)
    if not runs or len(names) != len(runs):
        raise ValueError(f"compare_plot: expected runs and a label for each, got {len(runs)} runs, {len(names)} labels")
    names = [_short(name) for name in names]
    for folder, records in zip(output_dirs, runs, strict=True):
        if not _of_kind(records, "train"):
            raise ValueError(f"{Path(folder) / METRICS}: no training record, so nothing to compare")
    figure = figure_of(10, 4.5 + 0.3 * len(runs))
    grid = figure.add_gridspec(2, 2, height_ratios=[3.2, 0.6 + 0.3 * len(runs)])
    by_step, by_time = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    by_time.sharey(by_step)
    speed, duration = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    last = max(float(r.get("time", 0.0)) for records in runs for r in records)
    scale, unit = _time_unit(last)
    for index, (name, records) in enumerate(zip(names, runs, strict=True)):
        train, evals = _of_kind(records, "train"), [r for r in _of_kind(records, "eval") if "val_loss" in r]
        line: dict[str, Any] = {"color": f"C{index}", "linestyle": _LINES[index % len(_LINES)]}
        dots: dict[str, Any] = {"color": f"C{index}", "linestyle": "", "marker": _MARKERS[index % len(_MARKERS)]}
        for axes, key, factor in ((by_step, "step", 1.0), (by_time, "time", 1 / scale)):
            for found, value, look in ((train, "loss", line), (evals, "val_loss", dots)):
                x = [r.get(key, math.nan) * factor for r in found]
                axes.plot(x, _series(found, value)[1], linewidth=1.2, markersize=4, **look)
        by_step.plot([], [], label=name, **line, marker=dots["marker"], markersize=4)
        key = _pace_key(train)
        rates = sorted(r[key] for r in train[1:] or train if isinstance(r.get(key), int | float))
        if rates:
            value = rates[len(rates) // 2]
            rounded = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            _labelled_bar(speed, index, value, f"{rounded} {key.replace('_per_s', '/s')}", f"C{index}")
        seconds = max((float(r.get("time", 0.0)) for r in records), default=0.0)
        final = f", validation loss {evals[-1]['val_loss']:.4g}" if evals and evals[-1]["val_loss"] is not None else ""
        _labelled_bar(duration, index, seconds / scale, f"{seconds / scale:.3g} {unit}{final}", f"C{index}")
    for axes in (speed, duration):
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    duration.set_yticks([])
    style(by_step, "loss (dots: validation)", "optimizer step")
    style(by_time, "", f"time ({unit})")
    style(speed, "", "median throughput")
    style(duration, "", f"whole run ({unit})")
    by_step.legend(frameon=False, labelcolor=INK)
    if save is not None:
        save_figure(figure, Path(save))
    return figure


def style(axes: Axes, ylabel: str, xlabel: str = "") -> None:
    """Give axes the labels, grid and frame of all plots."""
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    ink(axes)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def ink(axes: Axes) -> None:
    """Draw title, labels, ticks and frame in a grey for light and dark pages, on a transparent background."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    axes.spines[:].set_color(INK)
    offsets = (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text())
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *offsets):
        text.set_color(INK)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `stem`.png and `stem`.svg, if the folder is writable."""
    with contextlib.suppress(OSError):
        for ending in ("png", "svg"):
            figure.savefig(stem.with_name(f"{stem.name}.{ending}"), dpi=110)


def pixels(figure: Figure) -> Any:
    """Return the figure as an RGBA array, uint8[height, width, 4]."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def figure_of(width: float, height: float) -> Figure:
    """Return an empty figure with a transparent background; width and height are in inches."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # a notebook shows a bare Figure as text unless pyplot set it up
            from PIL import Image  # comes with matplotlib

            self.savefig(png := io.BytesIO(), format="png", dpi=80)
            # 64 colours take a third of the bytes, so a saved notebook stays small
            Image.open(png).quantize(64, method=Image.Quantize.FASTOCTREE).save(
                small := io.BytesIO(), format="png", optimize=True
            )
            return small.getvalue()

    return Picture(figsize=(width, height), layout="constrained", facecolor="none")


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]


def _series(records: list[Record], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Return the values of `x` and of `key`, with nan for values of `key` that were not finite."""
    found = [(r[x], math.nan if r[key] is None else float(r[key])) for r in records if key in r and x in r]
    return [at for at, _ in found], [value for _, value in found]


def _pace_key(train: list[Record]) -> str:
    """Return the key of the throughput in the task's own unit, else in samples."""
    rates = {key for record in train for key in record if key.endswith("_per_s")}
    return min(rates - {"samples_per_s"}, default="samples_per_s")


def _time_unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")


def _over_time(pace: Axes, records: list[Record]) -> None:
    """Plot throughput and GPU utilisation over the run's time, or over its steps if no times were recorded."""
    train, gpus = _of_kind(records, "train"), _of_kind(records, "gpus")
    timed = any("time" in r for r in train)
    x = "time" if timed else "step"
    scale, unit = _time_unit(max((float(r.get("time", 0)) for r in records), default=0.0)) if timed else (1.0, "")
    key = _pace_key(train)
    at, rates = _series(train, key, x)
    pace.plot([value / scale for value in at], rates, color=INK, linewidth=1, label="throughput")

    known = [(r["step"], r["time"] / scale) for r in train if "time" in r] or [(0, 0.0)]

    def when(record: Record) -> float:
        """Return the x at which the record's step ended; a save may be recorded some steps, and so some time, later."""
        import numpy as np

        steps, times = np.array(known).T
        return float(np.interp(record.get("step", 0), steps, times)) if timed else float(record.get("step", 0))

    low, high, height = 0.03, 0.94, pace.get_xaxis_transform()  # y is a fraction of the height
    if saves := _of_kind(records, "save"):
        at = [when(r) for r in saves]
        pace.plot(at, [low] * len(at), "^", color="tab:green", transform=height, label="checkpoint")
    for index, record in enumerate(r for r in _of_kind(records, "start") if r.get("step", 0) > 0):
        pace.axvline(when(record), color="gray", linestyle=":", label="" if index else "resumed")
    if events := [r for r in records if _OUT_OF_MEMORY in str(r.get("micro_batch_size_because", r.get("text", "")))]:
        at = [when(r) for r in events]
        pace.plot(at, [high] * len(at), "X", color="tab:red", transform=height, label=_OUT_OF_MEMORY)
    handles, names = pace.get_legend_handles_labels()
    if gpus and timed:
        busy = pace.twinx()
        for order, index in enumerate(sorted({gpu["index"] for r in gpus for gpu in r["gpus"]})):
            own = [(r, gpu) for r in gpus for gpu in r["gpus"] if gpu["index"] == index]
            points = [(r["time"] / scale, gpu["utilization"]) for r, gpu in own if gpu.get("utilization") is not None]
            if points:
                look: dict[str, Any] = {"color": "tab:blue", "linestyle": _LINES[(order + 1) % 4], "linewidth": 1}
                busy.plot(*zip(*points, strict=True), label=f"GPU {index} busy", **look)
        busy.set_ylim(0, 105)
        style(busy, "utilisation (%)")
        busy.grid(visible=False)
        busy.spines["right"].set_visible(True)
        handles, names = (a + b for a, b in zip((handles, names), busy.get_legend_handles_labels(), strict=True))
    style(pace, key.replace("_per_s", " / s"), f"time ({unit})" if timed else "optimizer step")
    pace.set_ylim(bottom=0)
    if len(names) > 1:
        pace.legend(handles, names, frameon=False, labelcolor=INK, fontsize="small", ncols=3)


def _time_use(records: list[Record]) -> dict[str, float]:
    """Return the run's seconds by their use, summed over the records, in the order of SPENT."""
    total: dict[str, float] = {}
    for record in records:
        for use, seconds in (record.get("spent") or {}).items():
            total[use] = total.get(use, 0.0) + seconds
    return {use: total[use] for use in SPENT if total.get(use, 0.0) > 0}


def _time_use_bar(axes: Axes, spent: dict[str, float]) -> None:
    total, start = sum(spent.values()), 0.0
    has_communication = "communication" in spent
    for use, seconds in spent.items():
        label, colour, hatch = SPENT[use]
        if use == "steps" and not has_communication:
            label = "forward, backward, optimizer, communication"
        if use == "communication":
            label = "communication not overlapped by backward"
        share = 100 * seconds / total
        name = f"{label} {share:.{0 if share >= 1 else 1}f} %"
        bar = axes.barh([0], [share], left=[start], color=colour, hatch=hatch, edgecolor=INK, label=name)
        if share >= 6:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.bar_label(bar, [f"{share:.0f} %"], label_type="center", fontsize="small", bbox=box)
        start += share
    axes.set_yticks([])
    axes.set_xlim(0, 100)
    scale, unit = _time_unit(total)
    style(axes, "", f"where {total / scale:.3g} {unit} went (%)")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _memory(gpus: list[Record]) -> dict[int, tuple[float, float | None]]:
    """Return each GPU's highest sampled memory use and total memory, in GiB."""
    found: dict[int, tuple[float, float | None]] = {}
    for gpu in (gpu for record in gpus for gpu in record["gpus"]):
        if gpu.get("memory_used") is not None:
            used, total = gpu["memory_used"] / 2**30, gpu.get("memory_total")
            before = found.get(gpu["index"], (0.0, None))[0]
            found[gpu["index"]] = max(before, used), None if total is None else total / 2**30
    return dict(sorted(found.items()))


def _memory_bars(axes: Axes, memory: dict[int, tuple[float, float | None]]) -> None:
    for place, (used, total) in enumerate(memory.values()):
        bar = axes.barh([place], [used], color="tab:purple", hatch="//", edgecolor=INK, height=0.6)
        if total is not None:
            bar = axes.barh([place], [total], color="none", edgecolor="gray", height=0.6)
        label = f" {used:.1f} GiB" + (f" of {total:.1f}" if total is not None else "")
        axes.bar_label(bar, [label], fontsize="small", color=INK)  # beside the bar and the frame
    axes.set_yticks(range(len(memory)), [f"GPU {index}" for index in memory])
    axes.set_ylim(len(memory) - 0.5, -0.5)
    style(axes, "", "peak memory in use (GiB)")
    axes.margins(x=0.2)


def _labelled_bar(axes: Axes, place: int, value: float, text: str, colour: str) -> None:
    """Draw a bar and a text over the bar, since a long bar leaves no space at its end."""
    axes.barh([place], [value], color=colour, alpha=0.6, height=0.6, hatch=("", "//", "..", "xx")[place % 4])
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    where = axes.get_yaxis_transform()  # x is a fraction of the width
    axes.text(0.02, place, text, transform=where, va="center", fontsize="small", bbox=box)
    axes.locator_params(axis="x", nbins=5)


def _short(name: str) -> str:
    """Shorten a name for the legend, to 24 characters at most."""
    return name if len(name) <= 24 else f"{name[:15]}…{name[-8:]}"
