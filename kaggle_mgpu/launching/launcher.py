"""Run a function on N worker processes from a notebook cell, a script, or under torchrun.

    result = launch(train, config, task)      # one worker per GPU, or config.nproc workers: rank 0's result
    values = launch(lambda: rank(), nproc=2)  # any function: every rank's value, in the order of ranks

The workers are forked from a clean server process that has imported torch already (server.py), never from the notebook:
they are ready in a tenth of a second, and the notebook may have used CUDA before. Workers get the environment
variables, sys.path and working folder that the notebook has at the call; functions and classes from cells are sent by
value (cloudpickle). Rank 0's output appears in the cell, each rank's in logs/rankN.log. An exception in a worker is
raised here with its own type.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from .. import env
from ..errors import HangError, RestartError, WorkerDiedError
from ..machine import devices
from ..names import nearest
from . import lock, server
from .output import CELL_CHARACTERS
from .settings import ProcessSettings, RunSettings, is_run_settings
from .tracebacks import folded
from .workers import Workers, is_consequence, visible, without_peer_access

KEPT_LOGS = 10
"""How many log folders of failed launches are kept in the folder for temporary files."""


@contextlib.contextmanager
def _shared_memory_is_named() -> Iterator[None]:
    """Add a note to an error if /dev/shm is full, since the text "No space left on device" suggests a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # there is no /dev/shm
            status = os.statvfs("/dev/shm")
            free, total = (blocks * status.f_frsize / 2**20 for blocks in (status.f_bavail, status.f_blocks))
            if free < total / 20:
                error.add_note(
                    f"/dev/shm, the memory that processes share, is full: {free:.1f} of {total:.1f} MiB are free. "
                    f"Remove what other programs have left there, or set data_workers=0."
                )
        raise


@_shared_memory_is_named()
@folded
def launch(
    function: Callable[..., Any],
    *args: Any,
    nproc: int | Literal["auto"] | None = None,
    gpu_ids: str | None = None,
    timeout: float | None = None,
    max_restarts: int | None = None,
    in_worker: bool = False,
    **kwargs: Any,
) -> Any:
    """Call `function(*args, **kwargs)` on every worker; return all values in the order of ranks.

    If the function has the decorator `distributed.returns_rank0`, as `train` has, only rank 0's value is returned. An
    interrupt (the stop button) asks the workers to stop: `train` saves and returns. A second interrupt kills them.

    Args:
        function: any function that can be pickled with its arguments, from a module or from a cell.
        nproc: number of processes on this machine. Default: as a config among the arguments (a TrainConfig) says,
            else one for each GPU, or one without GPUs. A single process, and each process under torchrun, calls the
            function itself.
        gpu_ids: which GPUs, as "0,1". Default: the config's, else all.
        timeout: a HangError is raised after this many seconds in which no rank has called distributed.alive or printed
            anything, counted from the launch on. Default: the config's hang_timeout_minutes, else 30 minutes, but only
            after a first call of alive(step); `train` calls alive(step) after each step.
        max_restarts: how often the call is made again after a worker died or hung. Default: the config's, else 0.
        in_worker: start a worker even for a single process, so that no CUDA context stays in this process.

    Raises:
        TypeError: `function` is not callable, an argument or value cannot be pickled, or a name is misspelt (nprocs=2).
        ValueError: more processes than there are GPUs, or than a launch can start; gpu_ids names a missing GPU.
        LockedError: another run trains in the config's output_dir.
        WorkerDiedError: a worker was killed, crashed or ended without a result.
        HangError: no rank made progress for `timeout` seconds.
        WorkerError: no worker could be started, or a worker's exception cannot be raised in this process.
        KeyboardInterrupt: there was a second interrupt, or one before the workers had started.
        Exception: as raised by the function in a worker, with the worker's traceback as the cause.
    """
    if not callable(function):
        raise TypeError(
            f"launch expects a function first, got a {type(function).__name__}: launch(train, config, task)"
        )
    _check_names(function, kwargs)
    config = next((value for value in [*args, *kwargs.values()] if is_run_settings(value)), None)
    settings = ProcessSettings() if config is None else ProcessSettings.of(config)
    one_value = getattr(function, "returns_rank0", False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        from ..parallel import distributed  # not above, since this imports torch

        with env.variables(without_peer_access(devices.gpus(), settings)):
            distributed.offer(timeout=datetime.timedelta(minutes=settings.collective_timeout_minutes))
            value = function(*args, **kwargs)
        return value if one_value else distributed.gather(value)
    gpus = devices.select(gpu_ids or settings.gpu_ids)
    count = _number_of_processes(nproc, config, len(gpus))
    if count == 1 and not in_worker:
        # CUDA_VISIBLE_DEVICES has no effect once this process has used CUDA
        shown = visible(gpus) if gpu_ids or settings.gpu_ids else {}
        shown |= without_peer_access(gpus, settings)  # for strategy="dp", where this process uses several GPUs
        with env.variables(shown), _restored_handlers():
            try:
                value = function(*args, **kwargs)
            except ValueError as error:
                if "env:// rendezvous" in str(error):
                    error.add_note(
                        "With one process, launch calls the function in this process, which cannot make a process "
                        "group. launch(…, in_worker=True) starts a worker that can."
                    )
                raise
        return value if one_value else [value]

    if config is not None and one_value:  # raise LockedError before this launch empties the other run's logs
        with lock.held(config.output_dir):
            pass
    limit = timeout if timeout is not None else settings.hang_timeout_minutes * 60
    restarts = settings.max_restarts if max_restarts is None else max_restarts
    with _logs(config) as logs, collect_interrupts() as interrupts:
        values = attempts(
            (function, args, kwargs), config, settings, count, gpus, logs, limit, restarts, interrupts,
            from_start=timeout is not None,
        )  # fmt: skip
    return values[0] if one_value else values


def _check_names(function: Callable[..., Any], kwargs: Iterable[str]) -> None:
    """Raise TypeError for a name that is no parameter of the function, but resembles a parameter of `launch`."""
    try:
        accepted = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
        return
    own = ("nproc", "gpu_ids", "timeout", "max_restarts", "in_worker")
    for name in {*kwargs} - {parameter.name for parameter in accepted}:
        if near := nearest(name, own):
            called = getattr(function, "__name__", "the function")
            raise TypeError(f"{called} has no parameter {name!r}. Did you mean launch's {near[0]!r}?")


def attempts(
    call: Any, config: RunSettings | None, settings: ProcessSettings, count: int, gpus: list[devices.GPU], logs: Path,
    limit: float, restarts: int, interrupts: list[float], *, from_start: bool, quiet: bool = False,
) -> list[Any]:  # fmt: skip
    """Make a call on new workers, and again up to `restarts` times after a worker died or hung; return the values.

    `limit`, `from_start`, `quiet`, `interrupts` and the errors are those of `Workers` and `Workers.run`.
    """
    died = 0
    before = _checkpoint_marks(config)
    for attempt in itertools.count():
        resumed = call if attempt == 0 else _resumed(call, config, before)
        workers = Workers(resumed, count, gpus, logs, settings, attempt, quiet)
        try:
            return workers.run(interrupts, limit, from_start)
        except Exception as error:
            # a RestartError (out of memory) does not count towards max_restarts, since the next attempt uses smaller
            # micro-batches
            restart, suffix = isinstance(error, RestartError), ""
            if isinstance(error, WorkerDiedError | HangError) or is_consequence(error):
                died += 1
                restart, suffix = died <= restarts, f": restart {died} of {restarts}"
            if interrupts or not restart:
                raise
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{first_line}\nstarting again{suffix}", flush=True)
    raise AssertionError("not reached")


def _number_of_processes(nproc: int | str | None, config: RunSettings | None, gpus: int) -> int:
    """Return the number of processes: the argument, else the config's, else the number of GPUs."""
    wanted: int | str | None = nproc
    if wanted is None and config is not None:
        wanted = config.workers_wanted
    if wanted is None or wanted == "auto":
        return max(1, gpus)
    try:
        count = int(str(wanted))
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"nproc: expected 1 or more, or 'auto', got {wanted!r}")
    if count > server.MOST_WORKERS:
        raise ValueError(f"nproc={count}: expected at most {server.MOST_WORKERS} processes in a launch")
    if gpus and count > gpus:
        raise ValueError(
            f"nproc={count}, but there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}: expected at most {gpus}, one "
            f"process per GPU. Use nproc='auto', or choose 'GPU T4 x2' in the notebook's Settings > Accelerator."
        )
    return count


@contextlib.contextmanager
def _logs(config: RunSettings | None) -> Iterator[Path]:
    """Give the folder for the logs of a launch: the run's, or a temporary folder, which stays if the launch fails."""
    if config is not None:
        yield Path(config.output_dir) / "logs"
        return
    for old in sorted(Path(tempfile.gettempdir()).glob("kaggle_mgpu-logs-*-*"))[: 1 - KEPT_LOGS]:
        with contextlib.suppress(OSError), _locked(old):  # a running launch has locked its folder
            shutil.rmtree(old, ignore_errors=True)
    logs = Path(tempfile.mkdtemp(prefix=f"kaggle_mgpu-logs-{time.strftime('%Y%m%d-%H%M%S')}-"))
    with _locked(logs):
        yield logs
    with contextlib.suppress(OSError):
        if (
            os.path.getsize(logs / "rank0.log") < CELL_CHARACTERS
        ):  # keep a longer log: the cell shows its beginning and its end, and names the file
            shutil.rmtree(logs)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, or raise BlockingIOError; the folder's files stay as they are."""
    import fcntl  # not above, since Windows has no fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


@contextlib.contextmanager
def collect_interrupts() -> Iterator[list[float]]:
    """Inside the `with` block, add the time of each interrupt to a list instead of raising KeyboardInterrupt.

    The times are from time.monotonic(). Outside the main thread the list stays empty.
    """
    times: list[float] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield times  # only the main thread may set handlers; None is a handler set by C code, and could not be restored
        return
    signal.signal(signal.SIGINT, lambda *_: times.append(time.monotonic()))
    try:
        yield times
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _restored_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM after the `with` block: a loop that fails may not restore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: not set by Python
                    signal.signal(number, handler)


def _checkpoint_marks(config: RunSettings | None) -> set[tuple[int, int]]:
    """Return the inode and modification time of every checkpoint's state.json, to notice new checkpoints."""
    found = Path(config.output_dir).glob("checkpoints/*/state.json") if config else ()
    return {(status.st_ino, status.st_mtime_ns) for path in found for status in [path.stat()]}


def _resumed(call: Any, config: RunSettings | None, before: set[tuple[int, int]]) -> Any:
    """Return the call for a restart: resume="never" or a path becomes "auto" once the run has saved a checkpoint."""
    if config is None or config.resume == "auto":
        return call
    if not _checkpoint_marks(config) - before:
        return call
    changed = config.replace(resume="auto")

    def swap(value: Any) -> Any:
        return changed if value is config else value

    function, args, kwargs = call
    return function, tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}
