"""An import hook repairs protobuf, filters TensorFlow's log lines and keeps TensorBoard from importing TensorFlow.

    install(shim=True, quiet=True, stub=True)   # as env.fix() does

One entry in `sys.meta_path` handles four module names; the ordinary finders still locate the modules:

- `google.protobuf.message_factory` and `.symbol_database` get back the method `GetPrototype`, removed in protobuf
  6.30.0. TensorFlow up to 2.19 calls the method from C++ at import. Without the method a notebook shows 1-6 error
  outputs, which end a papermill run. `GetMessageClass` (protobuf >= 4.22) is the same function under its new name.
- `tensorflow` is imported with file descriptor 2 redirected to a temporary file. Known, meaningless lines are dropped,
  all others are written to the original descriptor afterwards; the file remains if the process dies.
- `tensorboard.compat.notf` can be imported, as an empty module, as long as TensorFlow is not imported. Without this
  module TensorBoard imports an installed TensorFlow, which takes seconds and hundreds of megabytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PROTOBUF_CLASSES = {
    "google.protobuf.message_factory": "MessageFactory",
    "google.protobuf.symbol_database": "SymbolDatabase",
}
NOTF = "tensorboard.compat.notf"
SAVED_PREFIX = "kaggle_mgpu-tensorflow-"

# C++ code writes these lines whatever TF_CPP_MIN_LOG_LEVEL is (TensorFlow 2.17-2.21). The patterns are narrow, so that
# unknown lines are shown.
_REGISTRATION = re.compile(
    rb"Unable to register cu(FFT|DNN|BLAS) factory: Attempting to register factory for plugin "
    rb"|computation placer already registered\. Please check linkage"
    rb"|^WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
)
# TF_CPP_MIN_LOG_LEVEL=1 hides these lines up to TensorFlow 2.20, but not in 2.21.
_INFORMATION = re.compile(
    rb"^I0000 \S+ +\d+ (port|cpu_feature_guard|cudart_stub)\.cc:\d+\] |^To enable the following inst"
)


class Finder:
    """Finder is the entry in `sys.meta_path`; its only state is three switches (see `install`)."""

    def __init__(self, shim: bool = False, quiet: bool = False, stub: bool = False) -> None:
        self.shim, self.quiet, self.stub = shim, quiet, stub

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == NOTF and self.stub and "tensorflow" not in sys.modules:
            return ModuleSpec(name, _EmptyModule())  # type: ignore[arg-type]
        if self.shim and name in PROTOBUF_CLASSES:
            return self._wrapped(name, path, target, _then_patch)
        if self.quiet and name == "tensorflow":
            return self._wrapped(name, path, target, _filtered)
        return None

    def _wrapped(self, name: str, path: Any, target: Any, run: _Run) -> ModuleSpec | None:
        # Only finders after this entry are asked: two hooks that ask all finders would call each other for ever.
        position = sys.meta_path.index(self) + 1 if self in sys.meta_path else len(sys.meta_path)
        for finder in sys.meta_path[position:]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, run)  # type: ignore[assignment]
                return spec
        return None


def installed() -> Any | None:
    """Return the installed Finder, possibly of an earlier copy of this module, or None."""
    return next(filter(_is_ours, sys.meta_path), None)


def _is_ours(finder: Any) -> bool:
    return (type(finder).__module__, type(finder).__name__) == (__name__, Finder.__name__)


def install(shim: bool | None = None, quiet: bool | None = None, stub: bool | None = None) -> None:
    """Install the Finder first in `sys.meta_path` and set its switches; None leaves a switch as it is (at first off).

    Args:
        shim: add GetPrototype to a protobuf without the method.
        quiet: drop TensorFlow's known lines at its import.
        stub: make `tensorboard.compat.notf` importable, so that TensorBoard does not import TensorFlow.
    """
    old = installed()
    given = {"shim": shim, "quiet": quiet, "stub": stub}
    new = Finder(**{key: bool(getattr(old, key, False) if on is None else on) for key, on in given.items()})
    sys.meta_path[:] = [new, *(finder for finder in sys.meta_path if not _is_ours(finder))]


def add_get_prototype(module: ModuleType) -> bool:
    """Add GetPrototype to the class in a protobuf module; return whether the method was missing and is now added."""
    cls = getattr(module, PROTOBUF_CLASSES[module.__name__], None)
    get_class = getattr(sys.modules.get("google.protobuf.message_factory"), "GetMessageClass", None)
    if cls is None or get_class is None or hasattr(cls, "GetPrototype"):
        return False
    cls.GetPrototype = lambda self, descriptor: get_class(descriptor)
    return True


_Run = Callable[[Callable[[], None], ModuleType], None]


def _then_patch(run_module: Callable[[], None], module: ModuleType) -> None:
    run_module()
    add_get_prototype(module)


def _filtered(run_module: Callable[[], None], module: ModuleType) -> None:
    with filtered_stderr():
        run_module()


class _Loader:
    """_Loader wraps the real loader and runs code around the module's execution."""

    def __init__(self, real: Any, run: _Run) -> None:
        self._real, self._run = real, run

    def __getattr__(self, name: str) -> Any:
        if name == "_real":  # copy and pickle skip __init__; without _real this method would recurse
            raise AttributeError(name)
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._real  # inspect, pickle and reload see the ordinary loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._run(lambda: self._real.exec_module(module), module)


class _EmptyModule:
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        pass


# --- file descriptor 2 ------------------------------------------------------------------------------


@contextlib.contextmanager
def filtered_stderr() -> Any:
    """Hold back lines written to file descriptor 2, and at the end write all except the known, meaningless lines.

    The lines are kept in a file: a full pipe would stop the import, and a file outlives a crash. If no file can be
    made, nothing is filtered.
    """
    import tempfile  # here, to keep env.fix() fast

    _flush()
    try:
        saved = os.dup(2)
    except OSError:  # descriptor 2 is closed: nothing to filter
        yield
        return
    try:
        file, path = tempfile.mkstemp(prefix=f"{SAVED_PREFIX}{os.getpid()}-", suffix=".stderr", dir=folder())
    except OSError:
        os.close(saved)
        yield
        return
    os.dup2(file, 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved, 2)
        os.close(saved)
        _replay(file)
        os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(path)


def folder() -> str:
    """Return the folder of the temporary log files."""
    return os.environ.get("TMPDIR") or "/tmp"


def left_behind() -> list[tuple[int, str]]:
    """Return (process id, log file) for each of this user's processes that died while importing TensorFlow."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder()) as entries:
        for entry in entries:
            pid = re.match(rf"{SAVED_PREFIX}(\d+)-", entry.name)
            if pid and entry.stat(follow_symlinks=False).st_uid == os.getuid() and not _alive(int(pid[1])):
                found.append((int(pid[1]), entry.path))
    return sorted(found)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _flush() -> None:
    with contextlib.suppress(Exception):  # sys.stderr may be closed, or any object
        sys.stderr.flush()


def _replay(file: int) -> None:
    """Copy a file to file descriptor 2 without the known lines."""
    size = os.lseek(file, 0, os.SEEK_END)
    known = [_REGISTRATION]
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") not in ("", "0"):
        known.append(_INFORMATION)
    lines = os.pread(file, size, 0).splitlines(keepends=True)
    rest = b"".join(line for line in lines if not any(pattern.search(line) for pattern in known))
    with contextlib.suppress(OSError):  # a full disk or a closed pipe must not fail the import
        while rest:
            rest = rest[os.write(2, rest) :]
