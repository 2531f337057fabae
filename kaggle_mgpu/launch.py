"""Run a function on N worker processes from a notebook cell, a script, or under torchrun.

    result = launch(train, config, task)      # one worker per GPU; config.nproc says otherwise
    values = launch(lambda: rank(), nproc=2)  # any function: every rank's value, in the order of ranks

Workers are fresh Python processes, never forks of the notebook: what it did before, CUDA included, does not matter.
Functions and classes defined in cells travel by value (cloudpickle). Rank 0's lines appear in the cell, each rank's in
logs/rankN.log; a worker's exception is raised here, as itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import devices, distributed, env, session
from .config import TrainConfig

T = TypeVar("T")

# After one worker failed, the others get this long to report an error of their own: theirs may be the first cause.
GRACE_SECONDS = 1.0


class WorkerError(RuntimeError):
    """A worker ended without an exception that could be raised here: killed, crashed, or not picklable."""


class WorkerTraceback(Exception):  # noqa: N818 (it is the cause of an error, as concurrent.futures' is)
    """The traceback of an exception as the worker saw it; the `__cause__` of the exception raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def launch(function: Callable[..., Any], *args: Any, nproc: int | Literal["auto"] | None = None, **kwargs: Any) -> Any:
    """Call `function(*args, **kwargs)` on every worker; the list of their values, or for `train` the one result.

    Args:
        nproc: number of processes on this machine. Default: what a TrainConfig among the arguments says, else one for
            each GPU, or one where there is none. With one, and under torchrun, the call is made in this process.

    Raises:
        ValueError: more processes than there are GPUs.
        WorkerError: a worker died; the message says how, and ends with its last lines.
        Exception: whatever the function raised in a worker, of its own type, with the worker's traceback as its cause.
    """
    config = next((value for value in [*args, *kwargs.values()] if isinstance(value, TrainConfig)), None)
    alone = getattr(function, "returns_rank0", False)
    if distributed.under_torchrun():
        distributed.init()
        return function(*args, **kwargs)
    gpus = devices.select(config.gpu_ids if config else None)
    count = _number_of_processes(nproc, config, len(gpus))
    if count == 1:
        with _visible_gpus(gpus if config and config.gpu_ids else []):
            value = function(*args, **kwargs)
        return value if alone else [value]
    logs = Path(config.output_dir) / "logs" if config else Path(tempfile.mkdtemp(prefix="kaggle_mgpu-logs-"))
    values = _Workers(count, gpus, logs).run(function, args, kwargs)
    return values[0] if alone else values


def _number_of_processes(nproc: int | str | None, config: TrainConfig | None, gpus: int) -> int:
    wanted: int | str | None = nproc
    if wanted is None and config is not None:
        wanted = config.workers_wanted
    if wanted is None or wanted == "auto":
        return max(1, gpus)
    count = int(wanted)
    if count < 1:
        raise ValueError(f"nproc: expected 1 or more, or 'auto', got {nproc!r}")
    if gpus and count > gpus:
        raise ValueError(
            f"nproc={count}, but there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}: expected at most {gpus}, one "
            f"process per GPU. Use nproc='auto', or choose 'GPU T4 x2' in the notebook's Settings > Accelerator."
        )
    return count


@contextlib.contextmanager
def _visible_gpus(gpus: list[devices.GPU]) -> Any:
    """Restrict this process to some GPUs; of no effect once it has used CUDA."""
    if not gpus:
        yield
        return
    changed = {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Workers:
    """N worker processes, from their start to the last value or the first error."""

    def __init__(self, count: int, gpus: list[devices.GPU], logs: Path) -> None:
        self.count, self.logs = count, logs
        logs.mkdir(parents=True, exist_ok=True)
        self.log_paths = [logs / f"rank{rank}.log" for rank in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.links: list[connection.Connection] = []
        self.values: dict[int, Any] = {}
        self.failures: dict[int, BaseException] = {}
        self.output: int | None = None
        self.variables = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "PYTHONUNBUFFERED": "1",
            # the workers find what this process finds: a checkout, an install, or a notebook's unpacked payload
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        self.variables.setdefault("OMP_NUM_THREADS", str(env.threads_per_worker(count)))
        # gloo would look this machine's name up otherwise, which fails or stalls where there is no network
        self.variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if gpus:
            # all of them for each worker, which takes its own by LOCAL_RANK; numbered as nvidia-smi numbers them
            self.variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in gpus)
            self.variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        """Start the workers, hand them the call, and see it through."""
        payload = _pickled((function, args, kwargs), "the function and its arguments")
        interrupted = False
        try:
            for rank in range(self.count):
                self._start(rank)
            for link in self.links:
                with contextlib.suppress(OSError):  # it died at once: noticed below, with its log
                    link.send((payload, session.can_show()))
            while len(self.values) + len(self.failures) < self.count:
                try:
                    self._wait(None)
                    if self.failures:
                        self._others_may_speak()
                        raise self._first_failure()
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    # in a session of their own, the workers have not heard of it: `train` saves and returns
                    interrupted = True
                    self._signal(signal.SIGINT)
            return [self.values[rank] for rank in range(self.count)]
        finally:
            self._end()

    def _start(self, rank: int) -> None:
        ours, theirs = connection.Pipe()
        log = open(self.log_paths[rank], "wb")  # noqa: SIM115 (the worker's from here on)
        stdout: Any = log
        if rank == 0:
            # not an inherited stdout: a kernel's would show each line twice, and torn between ranks
            self.output, stdout = os.pipe()
            self.log0 = open(self.log_paths[0], "wb")  # noqa: SIM115 (closed in _end)
        variables = {**self.variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", "from kaggle_mgpu.launch import _worker; _worker()", str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        log.close()
        if rank == 0:
            os.close(stdout)
        self.processes.append(process)
        self.links.append(ours)

    def _wait(self, timeout: float | None) -> None:
        """Deal with whatever comes next from any worker."""
        waiting: list[Any] = [link for link in self.links if not link.closed]
        if self.output is not None:
            waiting.append(self.output)
        for ready in connection.wait(waiting, timeout):
            if ready == self.output:
                self._show_output()
            else:
                self._receive(self.links.index(ready))  # type: ignore[arg-type]

    def _receive(self, rank: int) -> None:
        link = self.links[rank]
        try:
            kind, *content = link.recv()
        except (EOFError, OSError):
            link.close()
            if rank not in self.values and rank not in self.failures:
                self.failures[rank] = self._death(rank)
            return
        if kind == "port":
            for other in self.links[1:]:
                with contextlib.suppress(OSError):
                    other.send(content[0])
        elif kind == "show":
            session.show(*content)
        elif kind == "value":
            self.values[rank] = _unpickled(content[0])
        elif kind == "error":
            self.failures[rank] = _error(rank, *content)

    def _show_output(self) -> None:
        assert self.output is not None
        chunk = os.read(self.output, 1 << 16)
        if not chunk:
            os.close(self.output)
            self.output = None
            return
        self.log0.write(chunk)
        self.log0.flush()
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()

    def _others_may_speak(self) -> None:
        until = time.monotonic() + GRACE_SECONDS
        while (left := until - time.monotonic()) > 0 and len(self.values) + len(self.failures) < self.count:
            self._wait(left)

    def _first_failure(self) -> BaseException:
        """The likeliest cause: when one rank fails, the others' collectives do, and those say nothing."""
        ranked = sorted(self.failures.items(), key=lambda item: (_is_consequence(item[1]), item[0]))
        return ranked[0][1]

    def _death(self, rank: int) -> WorkerError:
        code = self.processes[rank].wait(10)
        while self.output is not None and rank == 0:
            self._show_output()
        if code < 0:
            name = signal.Signals(-code).name
            likely = {
                "SIGKILL": "killed, most often for want of memory: lower micro_batch_size or data_workers",
                "SIGSEGV": "a crash in native code",
                "SIGBUS": "most often /dev/shm is full: lower data_workers",
            }.get(name, "ended by a signal")
            how = f"by {name} ({likely})"
        else:
            how = f"with exit code {code}, without an exception"
        lines = self.log_paths[rank].read_text(errors="replace").splitlines()[-15:]
        tail = "\n  ".join(lines) or "(nothing)"
        return WorkerError(f"rank {rank} of {self.count} ended {how}. Its log {self.log_paths[rank]} ends:\n  {tail}")

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _end(self) -> None:
        """Leave nothing behind: finished workers are waited for, the others killed."""
        deadline = time.monotonic() + (10 if len(self.values) == self.count else 0)
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link in self.links:
            link.close()
        if self.output is not None:
            with contextlib.suppress(OSError):
                while self.output is not None and connection.wait([self.output], 0):
                    self._show_output()
            if self.output is not None:
                os.close(self.output)
        if hasattr(self, "log0"):
            self.log0.close()


def _is_consequence(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("DistBackendError", "Connection closed by peer", "Connection reset", "[Gloo]"))


def _error(rank: int, pickled: bytes | None, kind: str, message: str, trace: str) -> BaseException:
    error: BaseException
    try:
        error = _unpickled(pickled) if pickled is not None else WorkerError(f"{kind}: {message}")
    except Exception:  # its class does not unpickle here
        error = WorkerError(f"{kind}: {message}")
    error.__cause__ = WorkerTraceback(f"rank {rank}:\n{trace}")
    return error


def _pickled(value: Any, what: str) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise TypeError(f"{what} cannot be sent to another process: {type(error).__name__}: {error}") from error


def _unpickled(data: bytes) -> Any:
    import pickle

    return pickle.loads(data)  # from our own worker, over a pipe nobody else has


def _worker() -> None:
    """What a worker process runs: receive the call, join the group, make the call, send its value or its error."""
    # die with the notebook, however that dies (prctl's PR_SET_PDEATHSIG is 1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    env.fix(verbose=False)  # variables are inherited, the protobuf finder is not
    link = connection.Connection(int(sys.argv[1]))
    sys.argv = [""]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        payload, can_show = link.recv()
        if can_show:
            session.set_channel(lambda *shown: link.send(("show", *shown)))
        import torch.distributed as dist

        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
            link.send(("port", store.port))
        else:
            store = dist.TCPStore("127.0.0.1", link.recv(), world_size, is_master=False)
        distributed.init(store, rank=rank, world_size=world_size)
        function, args, kwargs = _unpickled(payload)
        value = function(*args, **kwargs)
        if getattr(function, "returns_rank0", False) and rank != 0:
            value = None
        answer: tuple[Any, ...] = ("value", _pickled(_on_cpu(value), f"rank {rank}'s return value"))
        distributed.barrier()  # nobody leaves while another still talks to it
    except BaseException as error:
        try:
            pickled = _pickled(error, "the error")
        except TypeError:
            pickled = None
        answer = ("error", pickled, type(error).__name__, str(error), traceback.format_exc())
        traceback.print_exc(file=_LogOnly())
    with contextlib.suppress(OSError):  # the notebook is gone: so is anybody who would listen
        link.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: destructors of a broken process group may hang, and there is nothing left to do
    os._exit(0)


class _LogOnly:
    """Where a worker's traceback goes: rank 0's output is the cell's, which shows the error itself."""

    def write(self, text: str) -> int:
        return len(text) if os.environ["RANK"] == "0" else sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _on_cpu(value: Any) -> Any:
    """The value with its tensors on the CPU: a GPU's memory does not outlive the worker."""
    if hasattr(value, "cpu") and hasattr(value, "device"):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on_cpu(item) for item in value))
    return type(value)(_on_cpu(item) for item in value) if type(value) in (list, tuple) else value
