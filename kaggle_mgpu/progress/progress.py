"""What a run says while it trains: metrics.jsonl, one display, TensorBoard, and the pictures afterwards.

    with Progress(output_dir, max_steps=1000, main=distributed.is_main()) as progress:
        progress.record({"kind": "train", "step": 10, "loss": 2.1, "lr": 3e-4, "samples_per_s": 812.0})
        progress.close({"finished": True, "step": 1000, "metrics": {"loss": 1.9}, "seconds": 171.0})
    read(output_dir)                 # every record, as written
    attach(output_dir)               # the display again, from another notebook or after a reload
    stop(output_dir)                 # ask a run to save and leave
    plot(output_dir)                 # a matplotlib figure; compare_plot([one, other]) of several runs

The trainer makes one on every rank; only the main one writes, draws or calls back. The work happens when a record is
logged, so a step that logs nothing pays nothing. Between records a thread looks every few seconds at the GPUs and for a
request to stop. What is shown is in panel.py and display.py, the pictures are in plots.py.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..env import import_hooks
from .display import Log, attach, choose, print_line, status_of
from .panel import View, format_count, format_duration
from .plots import compare_plot, pixels, plot
from .records import METRICS, Record, comparable, encode, numbers, owner, read, rewind, running, texts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "METRICS",
    "Progress",
    "attach",
    "comparable",
    "compare_plot",
    "format_count",
    "format_duration",
    "plot",
    "read",
    "stop",
]

STOP = "stop"
"""A file of this name in its folder asks a run to stop."""
SAMPLE_SECONDS = 5.0
"""How often the GPUs are asked how busy they are: nvidia-smi takes some 30 ms of one core."""


class Progress:
    """Records of one run: written to metrics.jsonl, shown, and handed to `on_record`.

    output_dir    the run's folder, made if missing
    max_steps     optimizer steps of the whole run
    main          does this process write (rank 0)? All methods do nothing where it is False
    resumed_step  the step the weights are at. Lines of later steps, which will be trained again, and torn
                  lines are dropped; at 0 the file starts empty. So each step stands in it once
    evaluated     the step of the last evaluation that the weights remember; lines of later ones are dropped too
    unit          what is counted: a record's "<unit>_per_s", else "samples_per_s", is the throughput shown
    on_record     called with each record before it is written; what it adds to the record is written too
    tensorboard   also write to output_dir/tensorboard: numbers, texts, the settings, the picture of the run (needs
                  the package, not TensorFlow)
    settings      what TensorBoard lists as hyperparameters
    history       folder the run is resumed from if it is another one: its records are continued here
    sample        what to ask for the GPUs' state every few seconds (devices.sample); None: no thread is started, and
                  requests to stop are looked for at records only
    display       "panel", "bar", "lines" or "auto"
    clock         seconds; only tests need another
    Raises ModuleNotFoundError for tensorboard=True without the package.
    """

    stop_requested = False
    """Whether somebody has asked for a stop by `stop(output_dir)`; on the main rank only."""

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        max_steps: int,
        main: bool,
        resumed_step: int = 0,
        evaluated: int | None = None,
        unit: str = "samples",
        on_record: Callable[[Record], None] | None = None,
        tensorboard: bool = False,
        settings: dict[str, Any] | None = None,
        world_size: int = 1,
        device_line: str = "",
        log: Log = print_line,
        history: str | os.PathLike[str] | None = None,
        sample: Callable[[], list[dict[str, Any]]] | None = None,
        display: str = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._closed = not main
        if not main:
            return
        self._folder = folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)  # it was for an earlier session
        kept = rewind(history or folder, folder / METRICS, resumed_step, evaluated)
        self._step = resumed_step
        self._on_record, self._settings = on_record, settings or {}
        self._writer = _summary_writer(folder / "tensorboard", resumed_step) if tensorboard else None
        view = View(max_steps, unit, world_size, device_line, clock)
        self._display = choose(display)(view, log)
        for record in kept:
            view.take(record, past=True)
        view.step = resumed_step
        self._failed: set[str] = set()
        self._untold: list[str] = []
        self._file = open(folder / METRICS, "ab", buffering=0)  # noqa: SIM115 (see close)
        self._unwritten = b""
        self._lock, self._over = threading.RLock(), threading.Event()
        self._try("the display", self._display.open)
        self._watcher = None
        if sample is not None:
            self._watcher = threading.Thread(target=self._watch, args=(sample,), name="progress", daemon=True)
            self._watcher.start()

    def record(self, record: Record) -> None:
        """Write one record, {"kind": …, "step": …, …}, as a line of strict JSON, and show it.

        Values: what JSON has, paths, and anything with `item()` (a 0-d tensor: copied from the GPU here). nan
        and infinity, which JSON does not have, are written as null, so that a column of numbers stays one;
        the display still says nan or inf. Raises TypeError for a value of another type.
        """
        if self._closed:
            return
        self._look_for_a_request()
        if record.get("kind") == "start":
            record |= owner()
        added = dict(record)
        if (on_record := self._on_record) is not None and self._try(
            "Task.on_record",
            lambda: (on_record(added), encode(added)),  # a record may not hold what was added
        ):
            record = added
        plain, line = encode(record)
        with self._lock:
            self._step = int(plain.get("step", self._step))
            self._write(line)  # one write a line: a killed process leaves at most one torn line, the last
            self._show(plain)
            self._try("the display", lambda: self._draw(plain))
        while self._untold:
            self.note(self._untold.pop(0))

    def _write(self, line: bytes) -> None:
        """Append to the file. What finds no room on the disk is kept, and written with the next line."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _draw(self, record: Record) -> None:
        self._display.view.take(record)
        self._display.show(str(record.get("kind")))

    def _show(self, record: Record) -> None:
        if (writer := self._writer) is not None:
            self._try("TensorBoard", lambda: _to_tensorboard(writer, record, self._step))

    def _try(self, what: str, action: Callable[[], object]) -> bool:
        """Call an action that only shows something; return whether it succeeded. Its first error becomes a note."""
        try:
            action()
            return True
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                traceback.print_exc()
                self._untold.append(f"{what} failed, and training goes on: {type(error).__name__}: {error}")
            return False

    def note(self, text: str) -> None:
        """Print a line of text, and record it as {"kind": "note", "step": …, "text": …}."""
        if not self._closed:
            self.record({"kind": "note", "step": self._step, "text": text})

    def _look_for_a_request(self) -> None:
        if not self.stop_requested and (self._folder / STOP).exists():
            with contextlib.suppress(OSError):
                (self._folder / STOP).unlink()
            self.stop_requested = True  # now: the run may end as soon as it knows, and the file would be left

    def _watch(self, sample: Callable[[], list[dict[str, Any]]]) -> None:
        """Until the end: see to requests to stop, sample the GPUs, keep the display's clock going."""
        clock = self._display.view.clock
        samples: list[list[dict[str, Any]]] = []
        sampled, written, began, pause = -math.inf, -math.inf, clock(), SAMPLE_SECONDS
        while True:
            self._look_for_a_request()
            now = clock()
            if now - sampled >= pause:
                sampled, latest = now, sample()  # takes its time: the lock is not held
                # a driver that does not answer is asked less and less often: each time may leave a process in it
                pause = SAMPLE_SECONDS if latest else min(300.0, 2 * pause)
                samples += [latest] * bool(latest)
                self._display.view.gpus = latest or self._display.view.gpus
            with self._lock:
                if self._over.is_set():
                    return
                # as often as a log has lines: every 5 s at first, every minute in a long run
                if samples and now - written >= min(60.0, max(SAMPLE_SECONDS, (now - began) / 20)):
                    means = _means(samples)
                    record = {"kind": "gpus", "step": self._step, "time": self._display.view.seconds(), "gpus": means}
                    self._write(encode(record)[1])
                    self._show(record)
                    samples, written = [], now
                self._try("the display", self._display.tick)
            if self._over.wait(1.0):
                return

    def close(self, result: dict[str, Any] | None = None) -> None:
        """Show how the run ended and close the files. A second call does nothing.

        result: of "finished", "step", "reason", "metrics" and "seconds" what there is; None if the run broke.
        """
        if self._closed:
            return
        self._closed = True
        self._over.set()
        with self._lock:  # the watcher does nothing any more once it sees that it is over
            if result is None or str(result.get("reason")).startswith("broke off"):
                stopped = {"kind": "stop", "step": self._step, **(result or {"reason": "broke off"})}
                self._write(encode(stopped)[1])
            self._write(b"")
            self._file.close()
            self._try("the display", lambda: self._display.close(self._display.view.outcome(result), status_of(result)))
        if self._watcher is not None:
            self._watcher.join(0.5)  # not longer: nvidia-smi may be waited for
        if (writer := self._writer) is not None:
            settings, step = self._settings, self._step
            self._try("TensorBoard", lambda: _finish_tensorboard(writer, self._folder, settings, result, step))
        for note in self._untold:  # too late for a record
            print_line(note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close(None)
        else:
            first = (str(error).splitlines() or [""])[0]
            self.close({"reason": f"broke off: {kind.__name__}: {first}"[:200]})


def _means(samples: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of several samples one: the mean utilisation of each GPU, the most of its memory and temperature."""
    merged = []
    for gpu in samples[-1]:
        same = [each for sample in samples for each in sample if each["index"] == gpu["index"]]
        busy = [each["utilization"] for each in same if each["utilization"] is not None]
        most = {
            name: max((each[name] for each in same if each[name] is not None), default=None)
            for name in ("memory_used", "memory_total", "temperature")
        }
        merged.append({"index": gpu["index"], "utilization": sum(busy) / len(busy) if busy else None, **most})
    return merged


def stop(output_dir: str | os.PathLike[str]) -> None:
    """Ask the run in this folder to stop: it finishes its step, saves and returns, as at an interrupt.

    For another notebook or a terminal: `python -c "from kaggle_mgpu import progress; progress.stop('run')"`. In the
    notebook whose cell trains, the stop button does the same.

    Raises:
        ValueError: no run goes on there.
    """
    if not running(read(output_dir)):
        raise ValueError(
            f"{Path(output_dir)}: no run goes on in this folder on this machine, so there is nothing to stop; expected "
            f"the output_dir of one that trains now"
        )
    (Path(output_dir) / STOP).touch()


# --- TensorBoard ------------------------------------------------------------------------------------


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


def _to_tensorboard(writer: SummaryWriter, record: Record, step: int) -> None:
    """The numbers of a record, and what it says in words: notes, and texts that Task.on_record has added."""
    kind = record.get("kind", "train")
    if kind in ("start", "stop"):
        return
    for key, value in numbers(record).items():
        writer.add_scalar(f"{kind}/{key}", value, step)
    for gpu in record.get("gpus", ()):
        for key, value in numbers(gpu).items():
            if key != "index":
                writer.add_scalar(f"gpu {gpu['index']}/{key}", value, step)
    for key, text in (texts(record) | ({"text": str(record["text"])} if "text" in record else {})).items():
        writer.add_text(f"{kind}/{key}", text, step)


def _finish_tensorboard(
    writer: SummaryWriter, folder: Path, settings: dict[str, Any], result: dict[str, Any] | None, step: int
) -> None:
    """The hyperparameters with what they led to, and the run's picture."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    metrics = numbers((result or {}).get("metrics") or {})
    if plain and metrics:
        # not writer.add_hparams, which opens a second run beside this one
        file_writer = writer._get_file_writer()
        for summary in hparams(plain, {f"final/{key}": value for key, value in metrics.items()}):
            file_writer.add_summary(summary)
        for key, value in metrics.items():
            writer.add_scalar(f"final/{key}", value, step)
    with contextlib.suppress(ValueError):  # nothing to draw yet
        writer.add_image("run", pixels(plot(folder, save=False)), step, dataformats="HWC")
    writer.close()
