"""What must be true before anything else is imported: quiet logs, the allocator, protobuf's missing method.

Use it in the first cell of a notebook, before torch, TensorFlow or transformers::

    from kaggle_mgpu import env
    env.fix()

or look at what it would do with ``python -m kaggle_mgpu.env``. Standard library only, imports nothing
heavy, can be called any number of times, and never changes a variable that the user has set.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

if TYPE_CHECKING:
    import socket
    import subprocess

Action = Literal["set", "kept", "removed", "patched", "too late"]

NVIDIA_PATHS = ("/dev/nvidia0", "/proc/driver/nvidia")
CGROUP = Path("/sys/fs/cgroup")
_PROTOBUF_CLASSES = {
    "google.protobuf.message_factory": "MessageFactory",
    "google.protobuf.symbol_database": "SymbolDatabase",
}


@dataclass(frozen=True)
class Item:
    """One thing looked at: its name, its value now ("" if none), what was done about it, and why."""

    name: str
    value: str
    action: Action
    why: str


@dataclass(frozen=True)
class Report:
    """What :func:`fix` found and did, in order."""

    items: tuple[Item, ...]

    @property
    def changed(self) -> tuple[Item, ...]:
        """The items that this call changed, or came too late for."""
        return tuple(item for item in self.items if item.action != "kept")

    @property
    def summary(self) -> str:
        """One line: ``environment ready: 4 set, 1 patched``."""
        actions = [item.action for item in self.changed]
        counts = [f"{actions.count(action)} {action}" for action in dict.fromkeys(actions)]
        return f"environment ready: {', '.join(counts) or 'nothing to change'}"

    def __str__(self) -> str:
        return "\n".join([self.summary, *_table(self.items)])


def _table(items: Sequence[Item]) -> list[str]:
    names = [f"{item.name}={item.value}" if item.value else item.name for item in items]
    width = max(map(len, names), default=0)
    return [f"  {item.action:8}  {name:{width}}  {item.why}" for item, name in zip(items, names, strict=True)]


def fix(verbose: bool = True, start_workers: bool | None = None) -> Report:
    """Prepare this process, and every process started from it, for a quiet and correct import of the rest.

    Call it before torch, TensorFlow and transformers are imported. Called later it does what still
    helps (processes started afterwards inherit the variables) and marks the rest "too late".

    Args:
        verbose: print the summary line, and below it what was changed.
        start_workers: let the processes behind ``launch`` import torch from now on, in the background. Default: in a
            notebook with more than one GPU.
    """
    gpu = nvidia_present()
    items = [
        _default(
            "TF_CPP_MIN_LOG_LEVEL",
            "2" if gpu else "3",
            "TensorFlow's C++ log: GPU errors stay visible" if gpu else "TensorFlow's C++ log: no GPU to report on",
            reader="tensorflow",
        ),
        _default("USE_TF", "0", "transformers does not import TensorFlow", reader="transformers"),
        _default("USE_FLAX", "0", "transformers does not import Flax", reader="transformers"),
        _default("TOKENIZERS_PARALLELISM", "false", "no warning or deadlock in loader workers"),
    ]
    if gpu:
        items.append(_fix_allocator())
    if os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") == "":
        del os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"]
        why = "protobuf fails to import with an empty value"
        items.append(Item("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "", "removed", why))
    items.append(_fix_protobuf())
    if start_workers or (start_workers is None and "ipykernel" in sys.modules and os.path.exists("/dev/nvidia1")):
        if not server_runs():
            start_server()
        items.append(Item("worker server", "", "set", "imports torch in the background, for launch"))
    report = Report(tuple(items))
    if verbose:
        print("\n".join([report.summary, *_table(report.changed)]), flush=True)
    return report


def nvidia_present() -> bool:
    """Whether this machine has an NVIDIA driver loaded; asks the file system only."""
    return any(os.path.exists(path) for path in NVIDIA_PATHS)


def _default(name: str, value: str, why: str, reader: str | None = None) -> Item:
    """Set one variable unless it is there already; ``reader`` is the package that reads it at its import."""
    present = os.environ.get(name)
    if present is not None:
        return Item(name, present, "kept", "set already")
    os.environ[name] = value
    if reader in sys.modules:
        return Item(name, value, "too late", f"{reader} is already imported: holds in new processes only")
    return Item(name, value, "set", why)


def _fix_allocator() -> Item:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:  # either is read, so a second one could contradict the user's
            return _default(name, "", "")
    # torch 2.9's CUDA allocator reads the old name only, although it warns that it is deprecated;
    # from 2.10 on it reads both (c10/cuda/CUDAAllocatorConfig.h of 2.9.0, 2.9.1, 2.10.0, 2.11.0, 2.15.0).
    old = _torch_version() < (2, 10)
    name = "PYTORCH_CUDA_ALLOC_CONF" if old else "PYTORCH_ALLOC_CONF"
    return _default(name, "expandable_segments:True", "less GPU memory lost to fragmentation", reader="torch")


def _torch_version() -> tuple[int, int]:
    """(major, minor) of the installed torch, read from its file so that torch is not imported."""
    spec = PathFinder.find_spec("torch")
    try:
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except OSError:
        text = ""
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (99, 0)  # not there (yet): what comes will be new


# --- protobuf ---------------------------------------------------------------------------------------
# protobuf 6.30.0 removed MessageFactory.GetPrototype, which TensorFlow <= 2.19 still calls from C++ at
# import: 1-6 AttributeErrors, which become error outputs in a kernel and end a papermill run.
# GetMessageClass (protobuf >= 4.22) is the same function under its new name.


def _fix_protobuf() -> Item:
    name, tensorflow = "protobuf GetPrototype", "tensorflow" in sys.modules
    loaded = [module for module in map(sys.modules.get, _PROTOBUF_CLASSES) if module is not None]
    patched = [_add_get_prototype(module) for module in loaded]
    hooked = any(type(finder).__name__ == _ProtobufFinder.__name__ for finder in sys.meta_path)
    if not hooked:
        sys.meta_path.insert(0, _ProtobufFinder())
    if any(patched):
        late = "; what tensorflow printed at its import stays printed" if tensorflow else ""
        return Item(name, "", "patched", f"this protobuf lacks the method{late}")
    if loaded:
        return Item(name, "", "kept", "this protobuf has the method")
    if hooked:
        return Item(name, "", "kept", "patched when protobuf loads, by an earlier fix()")
    return Item(name, "", "patched", "added when protobuf loads, if it lacks the method")


def _add_get_prototype(module: ModuleType) -> bool:
    """Give ``module``'s class the method it lacks; False where there is nothing to do."""
    cls = getattr(module, _PROTOBUF_CLASSES[module.__name__], None)
    get_class = getattr(sys.modules.get("google.protobuf.message_factory"), "GetMessageClass", None)
    if cls is None or get_class is None or hasattr(cls, "GetPrototype"):
        return False
    cls.GetPrototype = lambda self, descriptor: get_class(descriptor)
    return True


class _ProtobufFinder:
    """A ``sys.meta_path`` entry that lets the finders after it find, and patches once the module has run.

    It keeps no state: ``importlib.util.find_spec`` may ask any number of times without importing.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _PROTOBUF_CLASSES or self not in sys.meta_path:
            return None
        # Only the finders *after* this one: two such hooks can then never call each other in a circle.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _PatchingLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _PatchingLoader:
    """The real loader, with one step more after the module has run."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name == "_real":  # copied or unpickled without __init__: no endless recursion
            raise AttributeError(name)
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._real  # inspect, pickle and reload see the ordinary loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._real.exec_module(module)
        _add_get_prototype(module)


# --- the worker server ------------------------------------------------------------------------------


@dataclass
class Server:
    """The process that ``launch`` has its workers from, as the one who started it sees it; see server.py."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    log: BinaryIO
    owner: int
    """The process that started it: a fork of that one must start its own."""
    mark: str
    """An environment variable with its value, which all processes below the server have."""
    variables: dict[str, str]
    """Those of this environment that only a start reads."""
    watched: dict[str, tuple[str, int]] | None = None
    """Once it is ready: the files it has imported, as {module: (path, st_mtime_ns)}."""

    def stop(self) -> None:
        """End it, and with it every process below it."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            # supervisors and workers end with it, by the operating system; children of workers may not, but they
            # have its mark: forks the environment that it was started with, programs that of the worker
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if self.mark.encode() in path.read_bytes():
                        os.kill(int(path.parent.name), signal.SIGKILL)
        self.control.close()
        self.log.close()


server: Server | None = None
SERVER_MARK = "KAGGLE_MGPU_SERVER"

# Read when libraries load, too early for a worker, which is forked from a process that has loaded them. All others
# (CUDA_VISIBLE_DEVICES, NCCL_*, TORCH_NCCL_*, GLOO_*, the user's own) are a worker's as they are at its launch.
_READ_AT_START = re.compile(
    r"(LD|OMP|GOMP|MKL|OPENBLAS|MALLOC|ATEN|PYTORCH)_|PYTHON(?!PATH)|TORCH(?!INDUCTOR_CACHE_DIR|_NCCL)"
)


def read_at_start() -> dict[str, str]:
    """The variables whose change a running server cannot follow."""
    return {name: value for name, value in os.environ.items() if _READ_AT_START.match(name)}


def server_runs() -> bool:
    """Whether this process has a server that has not ended."""
    return server is not None and server.owner == os.getpid() and server.process.poll() is None


def start_server() -> None:
    """Start the server, in place of the one before; takes milliseconds, its imports go on in the background."""
    import atexit
    import socket
    import subprocess
    import tempfile
    import uuid

    global server
    if server is None:
        atexit.register(lambda: server.stop() if server is not None else None)
    else:
        server.stop()
    server = None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = tempfile.TemporaryFile()  # noqa: SIM115 (the server's as long as it lives)
    # what this process would find, but nothing of the current folder may shadow a module (-P; last on the path)
    path = sorted((entry or os.getcwd() for entry in sys.path), key=lambda entry: entry == os.getcwd())
    program = f"from kaggle_mgpu.server import main; main({theirs.fileno()})"
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-c", program],  # type: ignore[attr-defined]
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path), SERVER_MARK: mark},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # an interrupt meant for the notebook is not for it
    )
    theirs.close()
    server = Server(process, ours, log, os.getpid(), f"{SERVER_MARK}={mark}", read_at_start())


# --- processors -------------------------------------------------------------------------------------


def cpu_count() -> int:
    """How many CPUs this process may use: its affinity, and its container's quota (rounded up)."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    quota, period = _cpu_quota()
    if quota > 0 and period > 0:
        count = min(count, math.ceil(quota / period))
    return max(1, count)


def _cpu_quota() -> tuple[int, int]:
    """The container's CPU time and the period it is granted for, in microseconds; (0, 0) where unlimited."""
    words = (cgroup("cpu.max") or "").split()  # cgroup 2: "150000 100000" or "max 100000"
    if not words:  # cgroup 1: two files, -1 where unlimited
        words = [cgroup(f"cpu/cpu.cfs_{part}_us") or "0" for part in ("quota", "period")]
    try:
        return int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return 0, 0


def cgroup(name: str) -> str | None:
    """The text of one of this process's control-group files, such as ``cpu.max``; None where it has none."""
    folder = ""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        folder = next((line[4:] for line in lines if line.startswith("0::/")), "")
    except OSError:
        pass
    for path in (CGROUP / folder / name, CGROUP / name):
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return None


def threads_per_worker(nproc: int) -> int:
    """A good OMP_NUM_THREADS for each of ``nproc`` worker processes: the user's own, else an equal share.

    It is not set in the notebook's own process, which has all CPUs to itself between runs.
    """
    if nproc < 1:
        raise ValueError(f"threads_per_worker: nproc is {nproc}, expected at least 1")
    own = os.environ.get("OMP_NUM_THREADS", "")
    return int(own) if own.isdecimal() and int(own) > 0 else max(1, cpu_count() // nproc)


if __name__ == "__main__":
    fix()
