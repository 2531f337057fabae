"""Run the worker server: a process with torch imported forks the workers of each `launch`.

    the notebook ── server ── one supervisor for each launch ── its workers

The notebook's side is worker_server.py, which starts the server, and workers.py, which asks it for workers. The server
imports what a first training step needs, touches no GPU and starts no thread, so it can be forked at any time. A
launch's supervisor forks the workers, passes signals on to them, reports how each of them ended, and then ends whatever
they left behind. When one of these processes ends, all those to its right end too: the server notices that the notebook
is gone; the operating system kills the rest (PR_SET_PDEATHSIG).

multiprocessing's forkserver with preloaded modules is almost as fast (it starts two ranks in 0.080 s, this server in
0.070 s; medians of 12 launches), but leaves orphans and does not notice changes of code or environment variables.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import importlib
import linecache
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

from .. import env
from ..env import worker_server
from ..machine import session
from . import advice, pickling

PRELOAD = (
    "torch", "torch.distributed", "torch.nn.parallel.distributed", "torch.utils.data",
    # torch imports this, and sympy with it, at the first use of DistributedDataParallel and of the optimizers
    "torch._dynamo",
    "torch.profiler._cupti_monitor", "torch.utils.serialization", "numpy.ctypeslib", "cloudpickle", "safetensors.torch",
    "kaggle_mgpu.training",
)  # fmt: skip
"""Modules that a first training step needs."""

END = struct.Struct("ii")  # supervisor to notebook: rank, status from waitpid; (-1, 0) means: all workers are forked
SIGNAL = struct.Struct("ii")  # notebook to supervisor: signal, rank (-1: all)
SIZE = struct.Struct("q")  # worker to notebook: bytes of the pickle that follows: (kind, size of the log, *content)
PULSE = struct.Struct("qqqq")  # one rank's signs of life, see distributed.set_pulse

MOST_WORKERS = 124
"""A launch sends four file descriptors and two per worker; the kernel allows 253 in a message (SCM_MAX_FD)."""
SWEEP_SECONDS = 2.0
"""How long the processes that workers have left behind may take to end when asked."""


@dataclass
class Request:
    """Hold the state of the notebook's process at the time of a launch; the call travels separately."""

    count: int
    variables: dict[str, str]
    path: list[str]
    folder: str | None
    sources: dict[str, Any]
    """linecache's entries of notebook cells, for the source lines of tracebacks."""
    semaphores: str
    """The common prefix of multiprocessing's semaphores, to remove those of killed workers."""
    threads: int
    """Threads of torch in each worker."""
    timeout: float
    """Seconds that a collective may take."""
    can_draw: bool
    """Whether the workers may draw in the notebook (`session.can_draw`)."""
    can_show: bool
    """Whether a viewer sees the drawing at once (`session.can_show`)."""


# --- the server -------------------------------------------------------------------------------------


def main(control_fd: int) -> NoReturn:
    """Import PRELOAD, report the imported files, and fork a supervisor for each launch while the notebook lives."""
    me, parent = os.getpid(), os.getppid()
    control = socket.socket(fileno=control_fd)
    # workers inherit the blocked signal: an interrupt stays pending until the worker can handle it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the operating system
    _adopt_orphans()
    variables = dict(os.environ)
    # an import may call torch.cuda.is_available(), which would otherwise start CUDA, and CUDA cannot be forked
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    env.fix(verbose=False, start_workers=False)
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if name in ("torch", "cloudpickle"):
                raise
            if error.name != name:  # another version of torch may lack such a module
                print(f"not preloaded: {name} ({error})")
    os.environ.clear()
    os.environ.update(variables)
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page that the workers share
    sys.stdout.flush()
    supervisors: set[int] = set()
    with contextlib.suppress(ConnectionError):
        control.send(pickle.dumps(_watched()))
        while os.getppid() == parent:
            if connection.wait([control], 1.0):
                message, fds, _, _ = socket.recv_fds(control, 1, 4 + 2 * MOST_WORKERS)
                if not message:
                    break
                if (pid := os.fork()) == 0:
                    control.close()
                    _never_return(_supervise, me, fds)
                supervisors.add(pid)
                for fd in fds:
                    os.close(fd)
            _end_orphans(supervisors)
    deadline = time.monotonic() + 4 * SWEEP_SECONDS
    while _end_orphans(supervisors) and time.monotonic() < deadline:  # without the notebook they end by themselves
        time.sleep(0.05)
    os._exit(0)


def _end_orphans(supervisors: set[int]) -> bool:
    """Kill the processes left behind by a killed supervisor; return whether any process remains."""
    children = set(_children())
    # forget only supervisors that have ended: `children` may omit a running supervisor (see _children), and the
    # next call would kill a forgotten supervisor
    supervisors -= {pid for pid in supervisors - children if not os.path.exists(f"/proc/{pid}")}
    for pid in children - supervisors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(children or supervisors)


def _watched() -> dict[str, tuple[str, int]]:
    """Map this package's and all top-level modules to (path, mtime in ns); a change makes this server outdated."""
    found = {}
    for name, module in sys.modules.items():
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or name.startswith("_") or ("." in name and top != "kaggle_mgpu"):
            continue
        if (spec := getattr(module, "__spec__", None)) is not None and spec.has_location:
            with contextlib.suppress(OSError):
                found[name] = (spec.origin, os.stat(spec.origin).st_mtime_ns)
    return found


def _never_return(function: Callable[..., None], *args: Any) -> NoReturn:
    """Call a function in a forked process and exit, so the process never continues with the parent's code."""
    code = 70
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(70)


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


# --- the supervisor of a launch ---------------------------------------------------------------------


def _supervise(parent: int, fds: list[int]) -> None:
    """Fork the workers, pass signals on to them, report how each ends, and end the processes that remain.

    `fds`: the channel to the notebook, the Request, the pickled call, the pulse; then each rank's link and log.
    """
    _die_with(parent)
    _adopt_orphans()
    os.setsid()
    channel = socket.socket(fileno=fds[0])
    with open(fds[1], "rb") as file:
        file.seek(0)  # a supervisor that was killed may have read the file, and the position is shared
        request: Request = pickle.load(file)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # port 0 takes a free port; rank 0 inherits the bound socket, so no other program can take the port meanwhile
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    me, workers = os.getpid(), {}
    for rank in range(request.count):
        pid = os.fork()
        if pid == 0:
            channel.close()
            signal.set_wakeup_fd(-1)
            os.close(wake)
            os.close(waker)
            _never_return(_work, me, rank, request, listener, *fds[2:4], fds[4 + 2 * rank], fds[5 + 2 * rank], fds[4:])
        workers[pid] = rank
    listener.close()
    for fd in fds[2:]:
        os.close(fd)
    with contextlib.suppress(OSError):
        channel.send(END.pack(-1, 0))
    watched: list[Any] = [channel, wake]
    while workers:
        ready = connection.wait(watched)
        if wake in ready:
            os.read(wake, 4096)
            for pid, status in _reap():
                if (ended := workers.pop(pid, None)) is not None:
                    with contextlib.suppress(OSError):
                        channel.send(END.pack(ended, status))
        if channel in ready:
            try:
                message = channel.recv(SIGNAL.size)
            except ConnectionError:  # the notebook was killed before it read a message
                message = b""
            number, wanted = SIGNAL.unpack(message) if message else (signal.SIGKILL, -1)
            for pid, rank in workers.items():
                if wanted in (rank, -1):
                    os.kill(pid, number)
            if not message:
                watched.remove(channel)
    _sweep()
    remove_semaphores(request.semaphores)


def _reap() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def _sweep() -> None:
    """End the workers' remaining child processes."""
    start = time.monotonic()
    while (children := _children()) or _is_parent():
        waited = time.monotonic() - start
        if waited > 2 * SWEEP_SECONDS:  # stuck in the operating system
            break
        for pid in children:
            with contextlib.suppress(OSError):
                # multiprocessing's resource tracker cleans up and ends by itself after the other processes
                if waited > SWEEP_SECONDS or b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL if waited > SWEEP_SECONDS else signal.SIGTERM)
        time.sleep(0.02)


def remove_semaphores(prefix: str) -> None:
    """Remove the semaphores of a launch's processes after their end."""
    for path in Path("/dev/shm").glob(f"sem.{prefix.lstrip('/')}-*"):
        path.unlink(missing_ok=True)


def _children() -> list[int]:
    """List this process's children; the kernel may omit a child while another ends (proc(5))."""
    for _ in _reap():
        pass
    try:
        return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _is_parent() -> bool:
    """Return whether this process has any child; exact, unlike `_children`."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False


# --- a worker ---------------------------------------------------------------------------------------


def _work(
    parent: int,
    rank: int,
    request: Request,
    listener: socket.socket,
    call_fd: int,
    pulse_fd: int,
    link_fd: int,
    log_fd: int,
    others: list[int],
) -> None:
    """Take over the notebook's state, make the call, and send the value or the error."""
    _die_with(parent)
    os.setsid()
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    for fd in others:
        if fd not in (link_fd, log_fd):
            os.close(fd)
    sys.stdout.reconfigure(line_buffering=True, encoding="utf-8")  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    faulthandler.enable(log_fd, all_threads=True)  # not to descriptor 2, which the function may close
    faulthandler.register(signal.SIGQUIT, log_fd, all_threads=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore SIGINT
    multiprocessing.current_process()._config["semprefix"] = request.semaphores  # type: ignore[attr-defined]
    link, lock = socket.socket(fileno=link_fd), threading.Lock()
    link.setblocking(True)  # socket.setdefaulttimeout in the notebook would change this

    def send(kind: str, *content: Any) -> None:
        # the log's size lets the notebook first show the lines printed before this message, and only those
        message = pickle.dumps((kind, os.fstat(log_fd).st_size, *content))
        with lock, contextlib.suppress(OSError):  # the notebook is gone
            link.sendall(SIZE.pack(len(message)))
            link.sendall(message)

    def show(*content: Any) -> None:  # in a thread: KeyboardInterrupt in the main thread could cut a message
        sender = threading.Thread(target=send, args=("show", *content), daemon=True)
        sender.start()
        sender.join()

    try:
        _become(rank, request)
        if request.can_draw:
            session.set_channel(show, live=request.can_show)
        import torch.distributed as dist

        from ..parallel import distributed

        if dist.is_available() and sys.modules["torch"].cuda._is_in_bad_fork():
            raise RuntimeError(
                "an import in the worker server has started CUDA, so its forks cannot use CUDA: restart the session"
            )
        # the two maps are never closed, since their buffers are in use until the process ends
        pulses, call = mmap.mmap(pulse_fd, 0), mmap.mmap(call_fd, 0, access=mmap.ACCESS_READ)
        distributed.set_pulse(memoryview(pulses).cast("q")[4 * rank : 4 * rank + 4])
        (host, port), timeout = listener.getsockname(), datetime.timedelta(seconds=request.timeout)
        fd = listener.detach()
        if rank != 0:
            os.close(fd)
        # multi_tenant (True), so that the function's own init_process_group can use the same address
        store = dist.TCPStore(host, port, request.count, rank == 0, timeout, False, True, fd if rank == 0 else None)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        distributed.offer(dist.PrefixStore("kaggle_mgpu", store), timeout)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # a pending interrupt is delivered here
        function, args, kwargs = pickle.loads(call)
        if not getattr(function, "returns_rank0", False):
            advice.watch_steps(store, rank, request.count)
        value = function(*args, **kwargs)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: too late to interrupt it
        if getattr(function, "returns_rank0", False) and rank != 0:
            value = None
        answer = ("value", pickling.dumps(value, f"rank {rank}'s return value"))
        _meet(store, rank, request.count)  # no rank ends while another still communicates with it
        if rank == 0:
            advice.print_mistakes(store)
        _leave(send, answer, log_fd)
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        advice.advise(error)
        trace = _traceback(error)
        line = "".join(traceback.format_exception_only(error)).strip()  # works even if the error's __str__ fails
        in_collective = _came_from_a_collective(error)
        _leave(send, ("error", pickling.dumps_error(error), line, trace, in_collective), log_fd, trace)


def _become(rank: int, request: Request) -> None:
    """Take over the notebook's state at the time of the launch, and set this worker's rank."""
    mark = os.environ[worker_server.MARK]
    os.environ.clear()
    os.environ.update({**request.variables, "RANK": str(rank), "LOCAL_RANK": str(rank), worker_server.MARK: mark})
    if request.folder is not None:
        os.chdir(request.folder)
    sys.path[:] = request.path
    sys.argv = [""]
    importlib.invalidate_caches()  # there may be files newer than the server
    linecache.cache.update(request.sources)
    import numpy
    import torch

    # numpy's generator has the same state in every fork; Python seeds its own anew in each
    numpy.random.seed(random.getrandbits(32))
    torch.set_num_threads(request.threads)


def _meet(store: Any, rank: int, count: int) -> None:
    """Wait until every rank has called `_meet`. Rank 0 serves the store, and also waits until no rank needs the store.

    This is no collective, since the function may have destroyed its process group.
    """

    def count_up(what: str, expected: int) -> None:
        if store.add(what, 1) == expected:
            store.set(f"all {what}", "")

    with contextlib.suppress(RuntimeError):  # a rank died, or did not come within the store's timeout
        count_up("came", count)
        store.wait(["all came"])
        if rank > 0:
            count_up("left", count - 1)
        elif count > 1:
            store.wait(["all left"])


def _leave(send: Callable[..., None], answer: tuple[Any, ...], log_fd: int, trace: str = "") -> NoReturn:
    """Send the answer with the log's size, then write the traceback to the log and exit.

    The notebook shows the log up to that size, so the traceback appears only with the exception.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or the disk is full
            stream.flush()
    send(*answer)
    with contextlib.suppress(OSError):
        os.write(log_fd, trace.encode(errors="backslashreplace"))
    # not sys.exit: destructors of a broken process group may hang, and there is nothing left to do
    os._exit(0)


def _came_from_a_collective(error: BaseException) -> bool:
    """Return whether torch.distributed raised the error, so that the end of another rank may be the cause."""
    frames = traceback.extract_tb(error.__traceback__)
    places = (os.path.join("torch", "distributed", ""), os.path.join("torch", "nn", "parallel", "distributed.py"))
    return isinstance(error, RuntimeError | OSError) and bool(frames) and any(p in frames[-1].filename for p in places)


def _traceback(error: BaseException) -> str:
    """Format the traceback without its first frame, which is `_work`."""
    where = error.__traceback__.tb_next if error.__traceback__ and error.__traceback__.tb_next else error.__traceback__
    return "".join(traceback.format_exception(type(error), error, where))
