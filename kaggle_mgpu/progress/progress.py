"""Record and show a run while it trains: metrics.jsonl, a display, TensorBoard, and plots afterwards.

    with Progress(output_dir, max_steps=1000, main=distributed.is_main()) as progress:
        progress.record({"kind": "train", "step": 10, "loss": 2.1, "lr": 3e-4, "samples_per_s": 812.0})
        progress.close({"finished": True, "step": 1000, "metrics": {"loss": 1.9}, "seconds": 171.0})
    stop(output_dir)                 # ask a run to save and leave

Every rank makes a Progress, and only rank 0 writes, draws or calls on_record. The training loop does this work when a
record comes. A thread looks for stop requests every second, samples the GPUs every 5 s, and redraws the display.
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
from .display import Printer, choose_display, print_line, status_of
from .panel import View
from .plots import pixels, plot
from .records import METRICS, Record, encode, numbers, owner, read, rewind, running, texts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STOP = "stop"
"""The name of the file that asks a run to stop, in the run's folder."""
SAMPLE_SECONDS = 5.0
"""Seconds between two samples of the GPUs: nvidia-smi takes about 30 ms of one core."""


class Progress:
    """Write the records of a run to metrics.jsonl, show them, and hand them to `on_record`.

    Args:
        output_dir: the run's folder, made if missing.
        max_steps: optimizer steps of the run.
        main: whether this process is rank 0. Elsewhere all methods do nothing.
        resumed_step: the step of the loaded weights. Records of later steps, which will be trained again, are dropped,
            so each step is recorded once; 0 empties the file.
        evaluated: the step of the last evaluation before the loaded checkpoint; records of later evaluations are
            dropped, because these will be repeated. None: resumed_step.
        unit: the unit of the throughput: the display shows "<unit>_per_s" of a record, or else "samples_per_s".
        on_record: called with a copy of each record before writing; may add values to the copy. A returned text
            becomes `end_reason`.
        tensorboard: also write numbers, texts, settings and the run's plot to output_dir/tensorboard.
        settings: the hyperparameters for TensorBoard.
        world_size: number of processes, for the display.
        device_line: the devices and the precision, for the display.
        log: prints a line.
        history: the folder of the run to continue, if not output_dir; its records are copied.
        sample: returns the load of each GPU, as devices.sample does. None: no thread starts, and stop requests are
            noticed only when a record comes.
        display: "panel", "bar", "lines" or "auto".
        clock: gives the time in seconds; for tests.

    Raises:
        ModuleNotFoundError: tensorboard=True without the package.
        ValueError: `display` is not the name of a display.
    """

    stop_requested = False
    """Whether `stop(output_dir)` was called somewhere; known on rank 0 only."""
    end_reason = ""
    """The text that on_record returned to end the run."""

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        max_steps: int,
        main: bool,
        resumed_step: int = 0,
        evaluated: int | None = None,
        unit: str = "samples",
        on_record: Callable[[Record], object] | None = None,
        tensorboard: bool = False,
        settings: dict[str, Any] | None = None,
        world_size: int = 1,
        device_line: str = "",
        log: Printer = print_line,
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
        (folder / STOP).unlink(missing_ok=True)  # meant for an earlier session
        earlier = rewind(history or folder, folder / METRICS, resumed_step, evaluated)
        self._step = resumed_step
        self._on_record, self._settings = on_record, settings or {}
        self._writer = _summary_writer(folder / "tensorboard", resumed_step) if tensorboard else None
        view = View(max_steps, unit, world_size, device_line, clock)
        attach_again = f"from kaggle_mgpu import progress; progress.attach({os.fspath(output_dir)!r})"
        view.hint += (
            f" After a reload of the page this panel is no longer updated; to see the run again: {attach_again}"
        )
        self._display = choose_display(display)(view, log)
        for record in earlier:
            view.take(record, past=True)
        view.step = resumed_step
        self._failed_parts: set[str] = set()
        self._pending_notes: list[str] = []
        self._file = open(folder / METRICS, "ab", buffering=0)  # noqa: SIM115 (see close)
        self._unwritten = b""
        self._lock, self._over = threading.RLock(), threading.Event()
        self._try("the display", self._display.open)
        self._watcher = None
        if sample is not None:
            self._watcher = threading.Thread(target=self._watch, args=(sample,), name="progress", daemon=True)
            self._watcher.start()

    def record(self, record: Record) -> None:
        """Write a record, {"kind": …, "step": …, …}, as a line of strict JSON, and show the record.

        Values are JSON values, paths, and objects with `item()` (a 0-d tensor is copied from the GPU here). nan and
        infinity are written as null; the display shows nan and inf.

        Raises:
            TypeError: a value of another type.
        """
        if self._closed:
            return
        if record.get("kind") == "start":
            record |= owner()
        added = dict(record)
        if self._on_record is not None and self._try("Task.on_record", lambda: self._call_on_record(added)):
            record = added
        self._look_for_a_request()  # on_record may have called `stop`
        plain, line = encode(record)
        with self._lock:
            self._step = int(plain.get("step", self._step))
            self._write(line)  # one write per line: a killed process tears at most the last line
            self._show(plain)
            self._try("the display", lambda: self._draw(plain))
        while self._pending_notes:
            self.note(self._pending_notes.pop(0))

    def _call_on_record(self, record: Record) -> None:
        """Give a record to on_record, which may add to the record and may end the run."""
        assert self._on_record is not None
        answer = self._on_record(record)
        if isinstance(answer, str):
            self.end_reason = self.end_reason or answer
        encode(record)  # raises a TypeError here if on_record added a value that cannot be written

    def _write(self, line: bytes) -> None:
        """Append to the file; if the disk is full, keep the bytes for the next call."""
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
        """Call an action of the part named `what`; return False after an error. A part's first error becomes a note."""
        try:
            action()
            return True
        except Exception as error:
            if what not in self._failed_parts:
                self._failed_parts.add(what)
                traceback.print_exc()
                self._pending_notes.append(f"{what} failed, and training goes on: {type(error).__name__}: {error}")
            return False

    def note(self, text: str) -> None:
        """Print a text and record {"kind": "note", "step": …, "text": …}."""
        if not self._closed:
            self.record({"kind": "note", "step": self._step, "text": text})

    def _look_for_a_request(self) -> None:
        if not self.stop_requested and (self._folder / STOP).exists():
            with contextlib.suppress(OSError):
                (self._folder / STOP).unlink()
            self.stop_requested = True  # last, since the run may end as soon as this is True, and the file must be gone

    def _watch(self, sample: Callable[[], list[dict[str, Any]]]) -> None:
        """Look for stop requests, sample the GPUs and update the display until the run ends."""
        clock = self._display.view.clock
        samples: list[list[dict[str, Any]]] = []
        sampled, written, began, pause = -math.inf, -math.inf, clock(), SAMPLE_SECONDS
        while True:
            self._look_for_a_request()
            now = clock()
            if now - sampled >= pause:
                sampled, latest = now, sample()  # slow, so outside the lock
                # back off while the driver hangs: each call may leave a stuck process
                pause = SAMPLE_SECONDS if latest else min(300.0, 2 * pause)
                samples += [latest] * bool(latest)
                self._display.view.gpus = latest or self._display.view.gpus
            with self._lock:
                if self._over.is_set():
                    return
                # every 5 s at first, every minute in a long run
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
        """Show the outcome and close the files. A second call does nothing.

        Args:
            result: any of "finished", "step", "reason", "metrics" and "seconds"; None if the run broke off.
        """
        if self._closed:
            return
        self._closed = True
        self._over.set()
        with self._lock:
            if result is None or str(result.get("reason")).startswith("broke off"):
                stopped = {"kind": "stop", "step": self._step, **(result or {"reason": "broke off"})}
                self._write(encode(stopped)[1])
            self._write(b"")
            self._file.close()
            self._try("the display", lambda: self._display.close(self._display.view.outcome(result), status_of(result)))
        if self._watcher is not None:
            self._watcher.join(0.5)  # not longer, since the thread may be waiting for nvidia-smi
        if (writer := self._writer) is not None:
            settings, step = self._settings, self._step
            self._try("TensorBoard", lambda: _finish_tensorboard(writer, self._folder, settings, result, step))
        for note in self._pending_notes:  # the file is closed, so no record is possible
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
    """Return the mean utilisation, and the maximum memory and temperature, of each GPU over several samples."""
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
    """Ask the run in this folder to finish the current step, save and return, as after an interrupt.

    For another notebook or a terminal: `python -c "from kaggle_mgpu import progress; progress.stop('run')"`. In the
    notebook whose cell trains, the stop button does the same.

    Raises:
        ValueError: no run is active in the folder.
    """
    if not running(read(output_dir)):
        raise ValueError(
            f"{Path(output_dir)}: no run is active in this folder on this machine, so there is nothing to stop; "
            f"expected the output_dir of a run that is training now"
        )
    (Path(output_dir) / STOP).touch()


# --- TensorBoard ------------------------------------------------------------------------------------


def _summary_writer(folder: Path, resumed_step: int) -> SummaryWriter:
    import_hooks.install(stub=True)  # otherwise TensorBoard imports an installed TensorFlow: 7.5 s, 750 MB, log noise
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tensorboard=True, but the package cannot be imported ({error}): pip install tensorboard, "
            f"or tensorboard=False: metrics.jsonl has the same numbers"
        ) from error
    # purge_step hides values that an earlier session wrote for steps that are now trained again
    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)


def _to_tensorboard(writer: SummaryWriter, record: Record, step: int) -> None:
    """Write the numbers and texts of a record to TensorBoard."""
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
    """Write the hyperparameters with the final metrics, and the run's plot, and close TensorBoard's file."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    metrics = numbers((result or {}).get("metrics") or {})
    if plain and metrics:
        # writer.add_hparams would open a second run
        file_writer = writer._get_file_writer()
        for summary in hparams(plain, {f"final/{key}": value for key, value in metrics.items()}):
            file_writer.add_summary(summary)
        for key, value in metrics.items():
            writer.add_scalar(f"final/{key}", value, step)
    with contextlib.suppress(ValueError):  # nothing to draw yet
        writer.add_image("run", pixels(plot(folder, save=False)), step, dataformats="HWC")
    writer.close()
