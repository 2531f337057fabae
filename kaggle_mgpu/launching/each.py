"""Give every GPU a job of its own: folds of a cross-validation, seeds, settings.

results = launch_each(train_fold, range(5))                # two at a time on two GPUs
results = launch_each(train, [config.replace(lr=lr) for lr in rates], task)
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import inspect
import io
import json
import os
import pickle
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..env import worker_server
from ..errors import WorkerError
from ..machine import devices, session
from . import lock
from .launcher import attempts, collect_interrupts
from .settings import ProcessSettings, is_run_settings


@dataclass
class _Job:
    """A call with one item; the thread that makes the call sets `value` or `error`, and the last `state`."""

    name: str
    item: Any
    folder: Path
    digest: str | None = None
    """The digest of the call, by which a later launch recognises a kept value. None if the item is a config (its run
    folder holds the result), or if the call cannot be pickled."""
    state: str = "waiting"
    value: Any = None
    error: BaseException | None = None
    value_saved: bool = True
    """False if `save_value` has failed to write the value."""

    def line(self) -> str:
        """Return the job's name, state and last line of output."""
        last_line = ""
        with contextlib.suppress(OSError, IndexError):
            last_line = (
                (self.folder / "logs" / "rank0.log").read_text(errors="replace")[-2000:].strip().splitlines()[-1]
            )
        return f"{self.name}: {self.state}" + (f"  {last_line[:160]}" if self.state != "waiting" and last_line else "")

    def load_value(self) -> bool:
        """Return whether an earlier launch has finished the same call, and read the value if so."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads((self.folder / "value.json").read_text(encoding="utf-8"))
            if self.digest is not None and document["digest"] == self.digest:
                self.state, self.value = "finished", document["value"]
        return self.state == "finished"

    def save_value(self) -> None:
        """Write the value to value.json, unless JSON changes the value, or an unfinished run returned the value."""
        if self.digest is None or (isinstance(self.value, dict) and self.value.get("finished") is False):
            return
        self.value_saved = False
        with contextlib.suppress(OSError, TypeError, ValueError):
            text = json.dumps({"digest": self.digest, "value": self.value}, allow_nan=False)
            if json.loads(text)["value"] == self.value:
                (self.folder / ".value.json").write_text(text, encoding="utf-8")
                os.replace(self.folder / ".value.json", self.folder / "value.json")
                self.value_saved = True


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
    After an interrupt (the stop button) no further job starts, and the running jobs are asked to stop; the value of a
    job that has not returned is None. When the same call is made again, finished jobs return at once and interrupted
    runs go on from their checkpoints. Values are kept in output_dir if JSON can hold them; if the item is a config, its
    run folder holds the result. A kept value is used only if item, arguments and code are unchanged: the code of the
    function and of the notebook functions it calls. Changes in modules are not noticed.

    Args:
        function: any function that takes an item as the first argument.
        items: numbers, names, or configs (such as a TrainConfig). If two configs share an output_dir, each config gets
            a subfolder fold0, fold1, … of its output_dir.
        output_dir: logs and values are kept in its subfolders fold0, fold1, …; of no effect for configs.
        at_once: jobs at the same time. Default: one for each GPU, or one without GPUs.
        gpu_ids: which GPUs, as "0,1". Default: all.
        timeout: as in `launch`, for each job.
        max_restarts: as in `launch`, for each job.

    Raises:
        ExceptionGroup: jobs failed. Its `results` has the values of all jobs, None for those that failed.
        ValueError: at_once is below 1 or more than the number of GPUs, or gpu_ids names a missing GPU.
        WorkerError: the worker server does not start.
    """
    jobs = _jobs(list(items), Path(output_dir))
    gpus = devices.select(gpu_ids)
    count = max(1, len(gpus)) if at_once is None else at_once
    if count < 1 or (gpus and count > len(gpus)):
        raise ValueError(f"at_once={count}: expected 1 to {max(1, len(gpus))}, one job for each GPU")
    if shared := _digest((function, args, kwargs)):
        for job in jobs:
            if not is_run_settings(job.item) and (own := _digest(job.item)):
                job.digest = f"{shared}-{own}"
    waiting = [job for job in jobs if not job.load_value()]
    if loaded := [job.name for job in jobs if job.state == "finished"]:
        print(f"kept from an earlier launch: {', '.join(loaded)}", flush=True)
    display, shown = f"kaggle-mgpu-{uuid.uuid4().hex[:12]}", ""
    with collect_interrupts() as interrupts, contextlib.ExitStack() as stack:
        if waiting:
            stack.enter_context(
                worker_server.pinned(interrupts)
            )  # keep this server for all jobs, since the end of a server ends the jobs that it forked
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
    if errors := [job.error for job in jobs if job.state == "failed" and isinstance(job.error, Exception)]:
        group = ExceptionGroup(f"{len(errors)} of {len(jobs)} jobs failed", errors)
        group.results = results  # type: ignore[attr-defined]
        raise group
    if lost := [job.name for job in jobs if job.state == "finished" and not job.value_saved]:
        print(
            f"the values of {', '.join(lost)} could not be saved as JSON, so the same call computes them again. JSON "
            f"holds numbers, texts, and lists and dicts of them: return these, or the path of a file.",
            flush=True,
        )
    if interrupts:
        count = sum(job.state == "finished" for job in jobs)
        print(f"interrupted: {count} of {len(jobs)} jobs have finished. Run the same again to continue.", flush=True)
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
        if config is not None:  # raise LockedError before this launch empties the logs of the run that has the lock
            with lock.held(config.output_dir):
                pass
        job.value = attempts(
            (function, (job.item, *args), kwargs), config, settings, 1, gpus, job.folder / "logs",
            settings.hang_timeout_minutes * 60 if timeout is None else timeout, restarts, interrupts,
            from_start=timeout is not None, quiet=True,
        )[0]  # fmt: skip
        if not interrupts:  # an interrupted job may have returned early
            job.save_value()
        job.state = "finished"
    except BaseException as error:
        job.state = "interrupted" if interrupts and isinstance(error, KeyboardInterrupt) else "failed"
        job.error = error
        if not isinstance(error, Exception):  # an ExceptionGroup takes only Exceptions
            job.error = WorkerError(f"{type(error).__name__}: {error}")
            job.error.__cause__ = error
        job.error.add_note(f"in job {job.name}; its log is {job.folder / 'logs' / 'rank0.log'}")


def _digest(value: Any) -> str | None:
    """Return a digest of a value and of its functions' code, the same in all processes; None if pickling fails.

    Plain pickles differ: a cell's code has the process's id in its file name, a cell's class has a random id, and
    a tensor's storage has its address. A function of a module is in a pickle by name only.
    """
    import cloudpickle

    torch = sys.modules.get("torch")

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, CodeType):  # a frozenset's order differs between processes
                constants = [
                    sorted(map(repr, part)) if isinstance(part, frozenset) else part for part in item.co_consts
                ]
                return tuple, ([item.co_code, constants, item.co_names, item.co_varnames, item.co_freevars],)
            if torch is not None and isinstance(item, torch.Tensor):
                raw = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                return tuple, ([str(item.dtype), tuple(item.shape), raw],)
            reduced = super().reducer_override(item)
            if reduced is NotImplemented and isinstance(item, FunctionType):
                inner = getattr(inspect.unwrap(item), "__code__", None)  # below a decorator's wrapper
                return tuple, ([item.__qualname__, item.__code__, inner, item.__defaults__, item.__kwdefaults__],)
            if isinstance(item, type) and isinstance(reduced, tuple):
                random = [isinstance(part, str) and re.fullmatch("[0-9a-f]{32}", part) for part in reduced[1]]
                stable = tuple(part for part, drop in zip(reduced[1], random, strict=True) if not drop)
                return reduced[0], stable, *reduced[2:]
            return reduced

    buffer = io.BytesIO()
    try:
        Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception:  # the job's launch then raises a TypeError that names the part that cannot be pickled
        return None
    return hashlib.sha256(buffer.getvalue()).hexdigest()
