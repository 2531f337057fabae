"""Make one call on a set of workers, and collect the values or the error.

    workers = Workers((function, args, kwargs), count=2, gpus=[], logs=Path("logs"), settings=settings, attempt=0)
    values = workers.run(interrupts=[], limit=1800.0, from_start=False)

`launch` decides on the number of workers and on restarts, and the worker server (server.py) forks them. This module
shows their output, receives their values and errors, and notices a rank that hangs.
"""

from __future__ import annotations

import contextlib
import linecache
import mmap
import os
import pickle
import re
import signal
import socket
import sys
import time
import uuid
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ..env import worker_server
from ..errors import HangError, RestartError, WorkerDiedError, WorkerError, WorkerTraceback, is_communication_error
from ..machine import cpu, devices, session
from . import pickling, server
from .output import Output
from .server import END, PULSE, SIGNAL, SIZE
from .settings import ProcessSettings

START_ATTEMPTS = 3
"""How many servers are tried, one after another, until one of them starts the workers."""
GRACE_SECONDS = 10.0
"""How long to wait, after a first failure, for the end of the failed worker, and for another rank's failure that may be
the cause. On a busy machine the news of a killed rank may come seconds after the errors that the kill causes."""
SAVE_SECONDS = 120.0
"""How long to wait for a checkpoint that is being written while another rank fails. A sharded checkpoint of `train` is
not waited for, since the failed rank's part is missing."""
END_SECONDS = 10.0
"""How long workers that have given their value may take to end."""
STACK_SECONDS = 2.0
"""How long a rank that hangs may take to write its stack when asked."""
_OUTERMOST_FRAME = re.compile(r'^  (File "<string>", line 1 in <module>|\.\.\.)\n', re.MULTILINE)
"""The last line of a stack from faulthandler: the server's program, or "..." if the stack is too deep to print."""


class Workers:
    """A set of worker processes, from their start to the last value or the first error.

    Args:
        call: function, arguments and keyword arguments.
        count: number of workers.
        gpus: the GPUs that the workers may use.
        logs: the folder for their logs.
        settings: the run's settings for its processes.
        attempt: 0 for the first attempt, which empties the logs; restart 1, 2, … appends to the logs.
        quiet: write the output only to the logs.

    Raises:
        TypeError: the call cannot be pickled.
    """

    def __init__(
        self, call: Any, count: int, gpus: list[devices.GPU], logs: Path, settings: ProcessSettings, attempt: int,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.quiet = quiet
        self.count, self.log_paths = count, [logs / f"rank{rank}.log" for rank in range(count)]
        self.call = pickling.dumps(call, "the function, with its arguments,")
        self.request = server.Request(
            count=count,
            variables=_variables(count, gpus, settings),
            path=list(sys.path),
            folder=_folder(),
            # IPython keeps the source of cells in linecache; workers read the source of modules from files
            sources={name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None},
            semaphores=f"/mp-{uuid.uuid4().hex[:12]}",
            threads=cpu.threads_per_worker(count),
            timeout=settings.collective_timeout_minutes * 60,
            can_draw=session.can_draw() and not quiet,
            can_show=session.can_show(),
        )
        self.server: worker_server.Server | None = None
        self.values: dict[int, Any] = {}
        self.failures: dict[int, BaseException] = {}
        self.ended: set[int] = set()
        self.unread = [bytearray() for _ in range(count)]
        self.log_sizes: list[int] = []
        self.log_grew = time.monotonic()
        logs.mkdir(parents=True, exist_ok=True)
        for path in self.log_paths:
            if attempt == 0:
                path.write_bytes(b"")
            else:
                with open(path, "a") as log:
                    log.write(f"--- restart {attempt} ---\n")

    def run(self, interrupts: list[float], limit: float, from_start: bool) -> list[Any]:
        """Run the call on the workers until every value has arrived; leave no process behind.

        Args:
            interrupts: the list of `collect_interrupts`. The first interrupt is passed on to the workers.
            limit: seconds without a sign of life of any rank after which a HangError is raised.
            from_start: whether the limit also holds before the first step.

        Returns:
            Each rank's value.

        Raises:
            WorkerError: no worker could be started, or a worker's exception cannot be raised in this process.
            WorkerDiedError: a worker was killed, crashed or ended without a result.
            HangError: no rank made progress for `limit` seconds.
            KeyboardInterrupt: there was a second interrupt, or one before the workers had started.
            Exception: what the function raised in a worker.
        """
        with contextlib.ExitStack() as stack:
            self.output = stack.enter_context(Output(self.log_paths[0], self.quiet))
            self._start(stack, interrupts)
            interrupt_sent = False
            try:
                while len(self.values) < self.count:
                    self._next(0.1)
                    if self.failures:
                        interrupts_before = len(interrupts)
                        self._collect_failures()
                        failure = self._first_failure()  # before the other ranks fail as a consequence
                        self._wait_for_writes(failure, interrupts, interrupts_before)
                        raise failure
                    if len(interrupts) > 1:
                        raise KeyboardInterrupt
                    if interrupts and not interrupt_sent:
                        # workers are in process sessions of their own, so this process's SIGINT does not reach them
                        interrupt_sent = True
                        self._signal(signal.SIGINT)
                    self._check_pulse(limit, from_start)
                self._wait_for_the_end(END_SECONDS)
            finally:
                self._signal(signal.SIGKILL)
                self._wait_for_the_end(END_SECONDS)
                if self.server is not None and self.server.process.poll() is not None:
                    self.server.stop()  # the server was killed: end its other launches too
                server.remove_semaphores(self.request.semaphores)  # the supervisor does this, unless it was killed
                self._show_output()
        return [self.values[rank] for rank in range(self.count)]

    def _start(self, stack: contextlib.ExitStack, interrupts: list[float]) -> None:
        self.links: list[socket.socket] = []
        with contextlib.ExitStack() as theirs:  # files for the workers, closed here after sending
            call, request = _file_in_memory(self.call), _file_in_memory(pickle.dumps(self.request))
            pulse = _file_in_memory(PULSE.pack(-1, 0, 0, 0) * self.count)
            self.pulse = stack.enter_context(mmap.mmap(pulse.fileno(), 0))
            given: list[Any] = [request, call, pulse]
            for path in self.log_paths:
                ours, link = socket.socketpair()
                ours.setblocking(False)
                self.links.append(stack.enter_context(ours))
                given += [link, open(path, "ab")]  # noqa: SIM115
            for item in given:
                theirs.enter_context(item)
            for _ in range(START_ATTEMPTS):
                current = self.server = worker_server.ready(interrupts)
                self.channel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(self.channel)
                with channel, contextlib.suppress(ConnectionError):
                    socket.send_fds(current.control, [b"launch"], [item.fileno() for item in [channel, *given]])
                while not connection.wait([self.channel], 0.1):
                    if interrupts:
                        raise KeyboardInterrupt
                if self.channel.recv(END.size):
                    self.started = time.monotonic_ns()
                    return
                server_output = current.output()
                current.stop()  # the server was just killed, or could not start a worker
        raise WorkerError(f"no worker could be started by {START_ATTEMPTS} servers; the last said: {server_output}")

    def _next(self, timeout: float) -> None:
        """Handle the messages that arrive from any worker within `timeout` seconds, and show new output."""
        waiting = [self.channel, *(link for link in self.links if link.fileno() >= 0)]
        for ready in connection.wait(waiting, timeout):
            if ready is self.channel:
                self._receive_end()
            else:
                self._receive(self.links.index(ready))  # type: ignore[arg-type]
        self._show_output()

    def _show_output(self) -> None:
        """Show rank 0's new output, except the traceback of its error, which the exception shows."""
        size = self.output.size()
        self._receive(0)  # an error message sets output.end, so read messages first
        self.output.show(size)

    def _receive_end(self) -> None:
        try:
            message = self.channel.recv(END.size)
        except ConnectionError:  # the supervisor ended before it read a signal; a later call reads its messages
            return
        for rank, status in [END.unpack(message)] if message else [(rank, None) for rank in range(self.count)]:
            while self._receive(rank):  # read the last messages first
                pass
            if rank not in self.values and rank not in self.failures and rank not in self.ended:
                self.failures[rank] = WorkerDiedError(self._death(rank, status))
            self.ended.add(rank)

    def _receive(self, rank: int) -> bool:
        """Read without waiting, since a worker may stop amid a message; return whether there was anything to read."""
        link, unread = self.links[rank], self.unread[rank]
        try:
            read = link.recv(1 << 20)
        except BlockingIOError:
            return False
        except OSError:
            read = b""
        if not read:
            link.close()
        unread += read
        while len(unread) >= SIZE.size and len(unread) >= (end := SIZE.size + SIZE.unpack_from(unread)[0]):
            message = pickle.loads(memoryview(unread)[SIZE.size : end])
            del unread[:end]
            self._handle(rank, *message)
        return bool(read)

    def _handle(self, rank: int, kind: str, log_size: int, *content: Any) -> None:
        if kind == "show":
            if rank == 0:
                self.output.show(log_size)
            with contextlib.suppress(Exception):  # an error of the front end must not end training
                session.show(*content)
        elif kind == "value":
            try:
                self.values[rank] = pickle.loads(content[0])  # safe: only the worker can write to this socket
            except Exception as error:
                what = f"rank {rank}'s return value cannot be read here: {type(error).__name__}: {error}"
                self.failures[rank] = TypeError(f"{what}. Return plain values, tensors or a path.")
        elif kind == "error":
            if rank == 0:
                self.output.end = log_size  # the traceback that follows is shown with the exception
            self.failures[rank] = self._error(rank, *content)

    def _error(self, rank: int, pickled: bytes | None, line: str, trace: str, in_collective: bool) -> BaseException:
        error: BaseException = WorkerError(f"rank {rank}: {line}")
        with contextlib.suppress(Exception):  # its class may not unpickle here
            error = error if pickled is None else pickle.loads(pickled)
        if isinstance(error, SystemExit):  # raising it would end this process
            error = WorkerError(f"rank {rank} called sys.exit({error.code!r})")
        error.__cause__ = WorkerTraceback(f"rank {rank}:\n{trace}", in_collective, str(self.log_paths[rank]))
        return error

    def _collect_failures(self) -> None:
        """Wait for the failed ranks' tracebacks, and for a failure of another rank that may explain the first."""
        until = time.monotonic() + GRACE_SECONDS
        while (left := until - time.monotonic()) > 0:
            known = not all(is_consequence(error) for error in self.failures.values())
            complete = len(self.values) + len(self.failures) == self.count
            if (known or complete) and self.ended.issuperset(self.failures):
                return
            self._next(min(left, 0.1))

    def _wait_for_writes(self, failure: BaseException, interrupts: list[float], interrupts_before: int) -> None:
        """Wait, at most SAVE_SECONDS, for the checkpoint that a rank is writing.

        After a RestartError also wait, at most GRACE_SECONDS, until the other ranks have ended: rank 0 may still have
        to record the step before the failed step. Ranks end by themselves, as collectives fail without the failed rank.

        Args:
            interrupts_before: number of interrupts when the failure became known; a further interrupt ends the wait.
        """
        restarts, began = isinstance(failure, RestartError), time.monotonic()
        while len(interrupts) == interrupts_before:
            waited, running = time.monotonic() - began, set(range(self.count)) - self.ended
            pulses = self._pulses()
            saving = waited < SAVE_SECONDS and any(pulses[rank][3] for rank in running)
            if not (saving or (restarts and running and waited < GRACE_SECONDS)):
                return
            self._next(0.1)

    def _first_failure(self) -> BaseException:
        """Return the likeliest cause: errors that the end of another rank may have caused come last."""
        ranked = sorted(self.failures.items(), key=lambda item: (is_consequence(item[1]), item[0]))
        return ranked[0][1]

    def _death(self, rank: int, status: int | None) -> str:
        if status is None:
            how = "because the supervisor of its launch was killed"
        elif os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            likely = {
                "SIGKILL": "killed, most often for lack of memory: lower micro_batch_size or data_workers",
                "SIGSEGV": "a crash in native code",
                "SIGABRT": "native code called abort()",
                "SIGBUS": "most often /dev/shm is full: lower data_workers",
            }.get(name, "ended by a signal")
            how = f"by {name} ({likely})"
        else:
            how = f"with exit code {os.WEXITSTATUS(status)}, without an exception"
        path = self.log_paths[rank]
        lines = path.read_text(errors="replace").splitlines()[-30:] if path.exists() else []
        tail = "\n  ".join(lines) or "(nothing)"
        return f"rank {rank} of {self.count} ended {how}. Its log {path} ends:\n  {tail}"

    def _pulses(self) -> list[tuple[Any, ...]]:
        return [PULSE.unpack_from(self.pulse, PULSE.size * rank) for rank in range(self.count)]

    def _check_pulse(self, limit: float, from_start: bool) -> None:
        sizes = [path.stat().st_size if path.exists() else 0 for path in self.log_paths]
        if sizes != self.log_sizes:  # sizes, since the files' times follow the system clock, which may jump
            self.log_sizes, self.log_grew = sizes, time.monotonic()
        pulses = self._pulses()
        silent = (time.monotonic_ns() - max(self.started, *(pulse[2] for pulse in pulses))) / 1e9
        if silent < limit or not (from_start or any(step >= 0 for step, *_ in pulses)):
            return
        if time.monotonic() - self.log_grew < limit:
            return  # output is a sign of life too
        behind = min(range(self.count), key=lambda rank: pulses[rank][:2])
        level = all(pulse[:2] == pulses[0][:2] for pulse in pulses)
        where = [
            f"rank {rank}: " + (f"step {step}, {beats} signs of life since" if step >= 0 else f"{beats} signs of life")
            for rank, (step, beats, *_) in enumerate(pulses)
        ]
        stacks = [f"Stack of rank {rank}:\n{self._stack(rank)}" for rank in range(self.count)]
        raise HangError(
            f"no rank made progress for {silent:.0f} s (timeout {limit:g} s); "
            + ("all ranks are at the same point" if level else f"rank {behind} is behind")
            + f" ({'; '.join(where)}).\n"
            + "\n".join(stacks)
        )

    def _stack(self, rank: int) -> str:
        """Ask a rank for its Python stack, which faulthandler writes into the log; return the text."""
        text = ""
        with contextlib.suppress(OSError), open(self.log_paths[rank], "rb") as log:
            before = log.seek(0, os.SEEK_END)
            if rank == 0:
                self.output.end = before
            self._signal(signal.SIGQUIT, rank)
            until = time.monotonic() + STACK_SECONDS
            while time.monotonic() < until and not _OUTERMOST_FRAME.search(text):
                time.sleep(0.1)
                log.seek(before)
                text = log.read(20_000).decode(errors="replace")
        return text.strip() or "(no answer: the process is stopped or waits in the kernel)"

    def _signal(self, number: signal.Signals, rank: int = -1) -> None:
        with contextlib.suppress(OSError):
            self.channel.send(SIGNAL.pack(number, rank))

    def _wait_for_the_end(self, seconds: float) -> None:
        """Wait, at most `seconds`, for the end of the supervisor and all its workers."""
        until = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while (left := until - time.monotonic()) > 0:
                if connection.wait([self.channel], left) and not self.channel.recv(END.size):
                    return


def _variables(count: int, gpus: list[devices.GPU], settings: ProcessSettings) -> dict[str, str]:
    """Return this process's environment variables plus the variables for the workers."""
    variables = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PYTHONUNBUFFERED": "1"}
    # programs that workers start find the same modules
    variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    defaults = {
        "OMP_NUM_THREADS": str(cpu.threads_per_worker(count)),
        # all workers are on this machine. By default gloo looks up the machine's name, and NCCL takes the first network
        # card: both fail or stall in a session without internet
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    # every worker sees all GPUs, and takes the GPU with the number LOCAL_RANK
    return {**defaults, **variables, **without_peer_access(gpus, settings), **visible(gpus)}


def without_peer_access(gpus: list[devices.GPU], settings: ProcessSettings) -> dict[str, str]:
    """Return the variables that NCCL needs between GPUs without peer access, except variables that are set already.

    nccl_p2p="auto" assumes that only T4s have no peer access. With peer access the result is {}.
    """
    off = settings.nccl_p2p == "off" or (settings.nccl_p2p == "auto" and any("T4" in gpu.name.split() for gpu in gpus))
    found = {"NCCL_P2P_DISABLE": "1"} if off else {}
    if {**found, **os.environ}.get("NCCL_P2P_DISABLE") == "1":
        # without peer access NCCL >= 2.24 takes host buffers from cuMem, which fails on some drivers' T4s at the first
        # collective ("CUDA error 217"; ray #64109, nccl #1838)
        found["NCCL_CUMEM_HOST_ENABLE"] = "0"
    return {name: value for name, value in found.items() if name not in os.environ}


def visible(gpus: list[devices.GPU]) -> dict[str, str]:
    """Return the environment variables that limit a process to these GPUs, numbered as by nvidia-smi; {} for none."""
    if not gpus:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # deleted in the meantime
        return None


def _file_in_memory(content: bytes) -> Any:
    """Create a nameless file in memory whose descriptor other processes can receive."""
    file = os.fdopen(os.memfd_create("kaggle_mgpu"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def is_consequence(error: BaseException) -> bool:
    """Return whether another rank's end explains the error, by its origin in torch.distributed or by its text.

    The wording of these errors differs between versions of torch, but their origin does not. Errors of backward and of
    a wait for a collective do not come from torch.distributed's Python code, and are recognised by their text.
    """
    if isinstance(error, WorkerDiedError | HangError):
        return False  # its text quotes the worker's log, which may contain messages of gloo
    if isinstance(error.__cause__, WorkerTraceback) and error.__cause__.in_collective:
        return True
    return is_communication_error(error)
