"""Give every GPU a job of its own: folds of a cross-validation, seeds, settings.

results = launch_each(train_fold, range(5))                # two at a time on two GPUs
results = launch_each(train, [config.replace(lr=lr) for lr in rates], task)
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..env import worker_server
from ..machine import devices, session
from .launcher import attempts, collect_interrupts
from .settings import ProcessSettings, is_run_settings


@dataclass
class _Job:
    """A call with one item; its thread sets `state`, and then `value` or `error`."""

    name: str
    item: Any
    folder: Path
    state: str = "waiting"
    value: Any = None
    error: BaseException | None = None

    def line(self) -> str:
        """Return the job's name, state and last line of output."""
        said = ""
        with contextlib.suppress(OSError, IndexError):
            said = (self.folder / "logs" / "rank0.log").read_text(errors="replace")[-2000:].strip().splitlines()[-1]
        return f"{self.name}: {self.state}" + (f"  {said[:160]}" if self.state != "waiting" and said else "")

    def kept(self) -> bool:
        """Whether an earlier launch has finished this job; its value is then read. A config's run knows by itself."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads((self.folder / "value.json").read_text(encoding="utf-8"))
            if document["item"] == repr(self.item):
                self.state, self.value = "finished", document["value"]
        return self.state == "finished"

    def keep(self) -> None:
        """Write the value, if JSON has it whole; another is computed again in a later launch."""
        with contextlib.suppress(OSError, TypeError, ValueError):
            text = json.dumps({"item": repr(self.item), "value": self.value}, allow_nan=False)
            if json.loads(text)["value"] == self.value:
                (self.folder / ".value.json").write_text(text, encoding="utf-8")
                os.replace(self.folder / ".value.json", self.folder / "value.json")


def launch_each(
    function: Callable[..., Any],
    items: Iterable[Any],
    *args: Any,
    output_dir: str | os.PathLike[str] = "folds",
    at_once: int | None = None,
    gpu_ids: str | None = None,
    timeout: float | None = None,
    max_restarts: int | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(item, *args, **kwargs)` for each item, each in a worker with one GPU; return the values in order.

    The next job starts as soon as a GPU is free. Jobs do not communicate, and a failed job does not end the others.
    After an interrupt (the stop button) no job starts, and those at work are asked to stop; None stands for a job that
    did not end. Run the same again: finished jobs return at once (values that JSON holds are kept in output_dir, a
    config's run knows by itself), and interrupted runs go on from their checkpoints.

    Args:
        items: numbers, names, or configs. Configs with one output_dir among them get its subfolders fold0, fold1, ….
        output_dir: logs and values are kept in its subfolders fold0, fold1, …; of no effect for configs.
        at_once: jobs at the same time. Default: one for each GPU, or one where there is none.
        gpu_ids: which GPUs, as "0,1". Default: all.
        timeout: as in `launch`, for each job.
        max_restarts: as in `launch`, for each job.

    Raises:
        ExceptionGroup: jobs failed. Its `results` has the others' values, and None for theirs.
    """
    jobs = _jobs(list(items), Path(output_dir))
    gpus = devices.select(gpu_ids)
    count = at_once or max(1, len(gpus))
    if count < 1 or (gpus and count > len(gpus)):
        raise ValueError(f"at_once={count}: expected 1 to {max(1, len(gpus))}, one job for each GPU")
    waiting = [job for job in jobs if is_run_settings(job.item) or not job.kept()]
    display, shown = f"kaggle-mgpu-{uuid.uuid4().hex[:12]}", ""
    with collect_interrupts() as interrupts:
        if waiting:
            worker_server.ready(interrupts)  # before threads would each start one
        free = [gpus[number : number + 1] for number in range(count)]
        running: list[tuple[threading.Thread, list[devices.GPU], _Job]] = []
        while running or (waiting and not interrupts):
            for ended in [entry for entry in running if not entry[0].is_alive()]:
                running.remove(ended)
                free.append(ended[1])
                print(ended[2].line(), flush=True)
            while free and waiting and not interrupts:
                job, slot = waiting.pop(0), free.pop(0)
                job.state = "running"
                given = (job, function, args, kwargs, slot, interrupts, timeout, max_restarts)
                running.append((threading.Thread(target=_run, args=given, name=job.name), slot, job))
                running[-1][0].start()
            text = "\n".join(job.line() for job in jobs)
            if text != shown and session.can_show():
                session.show(f"<pre>{html.escape(text)}</pre>", text, display)
            shown = text
            time.sleep(0.1 if running else 0.0)
    results = [job.value for job in jobs]
    if errors := [job.error for job in jobs if isinstance(job.error, Exception)]:
        group = ExceptionGroup(f"{len(errors)} of {len(jobs)} jobs failed", errors)
        group.results = results  # type: ignore[attr-defined]
        raise group
    if interrupts:
        count = sum(job.state == "finished" for job in jobs)
        print(f"interrupted: {count} of {len(jobs)} jobs have ended. Run the same again to go on.", flush=True)
    return results


def _jobs(items: list[Any], output_dir: Path) -> list[_Job]:
    """Return a job with a folder for each item."""
    if not (items and all(map(is_run_settings, items))):
        return [_Job(f"fold{i}", item, output_dir / f"fold{i}") for i, item in enumerate(items)]
    if len({item.output_dir for item in items}) < len(items):
        items = [item.replace(output_dir=str(Path(item.output_dir) / f"fold{i}")) for i, item in enumerate(items)]
    return [_Job(Path(item.output_dir).name, item, Path(item.output_dir)) for item in items]


def _run(
    job: _Job, function: Callable[..., Any], args: Any, kwargs: Any, gpus: list[devices.GPU], interrupts: list[float],
    timeout: float | None, max_restarts: int | None,
) -> None:  # fmt: skip
    config = job.item if is_run_settings(job.item) else None
    settings = ProcessSettings() if config is None else ProcessSettings.of(config)
    restarts = settings.max_restarts if max_restarts is None else max_restarts
    try:
        job.value = attempts(
            (function, (job.item, *args), kwargs), config, settings, 1, gpus, job.folder / "logs",
            settings.hang_timeout_minutes * 60 if timeout is None else timeout, restarts, interrupts,
            from_start=timeout is not None, quiet=True,
        )[0]  # fmt: skip
        job.state = "finished"
        if config is None:
            job.keep()
    except BaseException as error:
        error.add_note(f"in job {job.name}; its log is {job.folder / 'logs' / 'rank0.log'}")
        job.state, job.error = ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed"), error
