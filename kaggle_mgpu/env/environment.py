"""`fix` prepares a process for later imports: quiet logs, GPU memory allocator, a working protobuf.

Call `fix` in the first cell of a notebook, before torch, TensorFlow or transformers are imported::

    from kaggle_mgpu import env
    env.fix()                 # prints one line if everything can work
    print(env.fix())          # prints every finding and change, with the reason

From a shell the exit code is 1 if an installed package cannot work::

    python -m kaggle_mgpu.env
    python -m kaggle_mgpu.env --protobuf pin

The module uses the standard library only. `fix` takes a few milliseconds and may be called again at any time.
Environment variables that the user has set stay unchanged, except PYTHONPATH (extended in a notebook) and an empty
PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION (removed).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, get_args

from . import import_hooks, protobuf_fix, worker_server

Action = Literal[
    "found", "set", "kept", "removed", "shimmed", "filtered", "installed", "refused", "too late", "left", "broken"
]
Protobuf = Literal["auto", "shim", "pin", "off"]

NVIDIA_PATHS = ("/dev/nvidia0", "/proc/driver/nvidia")
IMPLEMENTATION = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"

_set_here: dict[str, str] = {}  # set by fix() in this process; fix(quiet=False) unsets only a log level in here


@dataclass(frozen=True)
class Item:
    """An Item is one setting or package: its name, current value ("" if none), the action taken, and the reason."""

    name: str
    value: str
    action: Action
    why: str


@dataclass(frozen=True)
class Report:
    """A Report lists the findings and changes of :func:`fix`, in order."""

    items: tuple[Item, ...]
    _cell: int | None = field(default=None, compare=False, repr=False)

    @property
    def changed(self) -> tuple[Item, ...]:
        """The items with a change or a problem."""
        return tuple(item for item in self.items if item.action not in ("kept", "found"))

    @property
    def problems(self) -> tuple[Item, ...]:
        """The items with a problem: refused, too late, broken, or a file left by a dead process."""
        return tuple(item for item in self.items if item.action in ("refused", "too late", "left", "broken"))

    @property
    def ok(self) -> bool:
        """True if no item was refused or is broken."""
        return not any(item.action in ("refused", "broken") for item in self.items)

    @property
    def summary(self) -> str:
        """The line ``environment ready (protobuf 6.33.6, tensorflow 2.19.0): 4 set, 1 shimmed, 1 filtered``."""
        actions = [item.action for item in self.changed]
        counts = [f"{actions.count(action)} {action}" for action in dict.fromkeys(actions)]
        versions = [f"{item.name} {item.value}" for item in self.items if item.action == "found"]
        what = f" ({', '.join(versions)})" if versions else ""
        failed = dict.fromkeys(item.name for item in self.items if item.action in ("refused", "broken"))
        state = f"ready except for {', '.join(failed)}" if failed else "ready"
        return f"environment {state}{what}: {', '.join(counts) or 'nothing to change'}"

    def __str__(self) -> str:
        return "\n".join([self.summary, *_table(self.items)])

    def _ipython_display_(self) -> None:
        """Show the report in a notebook, except in the cell in which ``fix`` has already printed its summary."""
        if self._cell is None or self._cell != _cell():
            print(self)


def _table(items: Sequence[Item]) -> list[str]:
    names = [f"{item.name}={item.value}" if item.value else item.name for item in items]
    width = max(map(len, names), default=0)
    return [f"  {item.action:9} {name:{width}}  {item.why}" for item, name in zip(items, names, strict=True)]


def fix(
    protobuf: Protobuf = "auto",
    quiet: bool | None = None,
    verbose: bool = True,
    start_workers: bool | None = None,
) -> Report:
    """Prepare this process and its children for quiet and correct imports of torch, TensorFlow and transformers.

    Call `fix` before these packages are imported. A later call still sets the variables, which new processes inherit,
    and marks settings without effect in this process "too late".

    Args:
        protobuf: ``"auto"`` installs nothing: TensorFlow up to 2.19 gets the method that newer protobufs lack, and
            the report names the command that repairs incompatible versions. ``"off"`` leaves protobuf alone, also in
            workers and in later calls with ``"auto"``. ``"shim"`` is ``"auto"``, but ends ``"off"``, as ``"pin"`` does.
            ``"pin"`` installs protobuf==3.20.3 within a minute, unless an installed package would break or protobuf
            is already imported; the report then gives the reason, and the shim is used.
        quiet: hide TensorFlow's known, meaningless lines at its import; False shows all lines, here and in workers.
            Default: the value of an earlier call or of the parent process, else True.
        verbose: print the summary line, and below it the items with a problem.
        start_workers: start the server behind ``launch``, which imports torch in the background. Default: True in a
            notebook with more than one GPU.

    Raises:
        ValueError: ``protobuf`` has another value.
    """
    if protobuf not in get_args(Protobuf):
        raise ValueError(f"protobuf={protobuf!r}: expected 'auto', 'shim', 'pin' or 'off'")
    off, quiet = _decide(protobuf, quiet)
    before = import_hooks.installed()
    pinned = [_pin()] if protobuf == "pin" else []  # first, since the installed version may change
    items = _findings()
    items += _fix_variables(quiet)
    import_hooks.install(shim=not off, quiet=quiet, stub=os.environ["USE_TF"].upper() not in ("1", "ON", "YES", "TRUE"))
    items += pinned
    if off:
        items.append(Item("protobuf", "", "kept", "not changed, because fix(protobuf='off') was called"))
    else:
        items += [*_fix_implementation(), _fix_get_prototype(before), *_impossible()]
    items += _fix_lines(before, quiet)
    if start_workers or (start_workers is None and "ipykernel" in sys.modules and os.path.exists("/dev/nvidia1")):
        if not worker_server.running():
            worker_server.start()
        items.append(Item("worker server", "", "set", "imports torch in the background, for launch"))
    report = Report(tuple(items), _cell() if verbose else None)
    if verbose:
        print("\n".join([report.summary, *_table(report.problems)]), flush=True)
    return report


def _decide(protobuf: Protobuf, quiet: bool | None) -> tuple[bool, bool]:
    """Return (leave protobuf alone, be quiet), and store both in environment variables for workers and later calls."""
    if protobuf != "auto":
        _set_or_unset("KAGGLE_MGPU_PROTOBUF", "off" if protobuf == "off" else None)
    if quiet is not None:
        _set_or_unset("KAGGLE_MGPU_QUIET", None if quiet else "0")
    return os.environ.get("KAGGLE_MGPU_PROTOBUF") == "off", os.environ.get("KAGGLE_MGPU_QUIET") != "0"


def _set_or_unset(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def variables(changed: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a `with` block, then restore the former values."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            _set_or_unset(name, value)


def _cell() -> int | None:
    """Return the number of the running notebook cell; None outside a notebook. IPython is never imported."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get_ipython() if get_ipython else None, "execution_count", None)


# --- variables --------------------------------------------------------------------------------------


def nvidia_present() -> bool:
    """Return whether an NVIDIA driver is loaded, judged by the file system alone."""
    return any(os.path.exists(path) for path in NVIDIA_PATHS)


def _fix_variables(quiet: bool) -> list[Item]:
    gpu = nvidia_present()
    level = "TF_CPP_MIN_LOG_LEVEL"
    items = []
    if quiet:
        why = "TensorFlow's C++ log: GPU errors stay visible" if gpu else "TensorFlow's C++ log: no GPU to report on"
        items.append(_default(level, "2" if gpu else "3", why, reader="tensorflow"))
    elif level in _set_here and os.environ.get(level) == _set_here.pop(level):
        del os.environ[level]
        items.append(Item(level, "", "removed", "an earlier fix() had set it"))
    items += [
        _default("USE_TF", "0", "transformers does not import TensorFlow", reader="transformers"),
        _default("USE_FLAX", "0", "transformers does not import Flax", reader="transformers"),
        _default("TOKENIZERS_PARALLELISM", "false", "no warning or deadlock in loader workers"),
    ]
    if gpu:
        items.append(_fix_allocator())
    return items + _fix_path()


def _fix_path() -> list[Item]:
    """In a notebook, add the folder of an uninstalled kaggle_mgpu to PYTHONPATH, so that shell commands find it."""
    folder, paths = os.path.dirname(os.path.dirname(os.path.dirname(__file__))), os.environ.get("PYTHONPATH", "")
    installed = os.path.basename(folder) in ("site-packages", "dist-packages")
    if "ipykernel" not in sys.modules or installed or folder in paths.split(os.pathsep):
        return []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, paths]))
    return [Item("PYTHONPATH", folder, "set", "shell commands in cells find kaggle_mgpu too")]


def _default(name: str, value: str, why: str, reader: str | None = None) -> Item:
    """Set a variable that is not set yet; ``reader`` is the package that reads the variable at its import, if any."""
    present = os.environ.get(name)
    if present is not None:
        return Item(name, present, "kept", "set already")
    os.environ[name] = _set_here[name] = value
    if reader in sys.modules:
        return Item(name, value, "too late", f"{reader} is already imported: takes effect in new processes only")
    return Item(name, value, "set", why)


def _fix_allocator() -> Item:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:  # torch reads both names, so the other name could contradict the user's value
            return _default(name, "", "")
    # torch 2.9's CUDA allocator reads only the old name, although torch warns that this name is deprecated; from 2.10
    # on the allocator reads both (c10/cuda/CUDAAllocatorConfig.h of 2.9.0, 2.9.1, 2.10.0, 2.11.0, 2.15.0).
    old = _torch_version() < (2, 10)
    name = "PYTORCH_CUDA_ALLOC_CONF" if old else "PYTORCH_ALLOC_CONF"
    return _default(name, "expandable_segments:True", "less GPU memory lost to fragmentation", reader="torch")


def _torch_version() -> tuple[int, int]:
    """Return (major, minor) of the installed torch, read from its file without importing torch."""
    spec = PathFinder.find_spec("torch")
    try:
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except OSError:
        text = ""
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (99, 0)  # not installed (yet): assume a new version


# --- protobuf and TensorFlow ------------------------------------------------------------------------


def _findings() -> list[Item]:
    """Report the installed versions, and the log files left by processes that died while importing TensorFlow."""
    items = []
    if protobuf := protobuf_fix.installed():
        items.append(Item("protobuf", protobuf_fix.text(protobuf), "found", "installed"))
    if tensorflow := _tensorflow_version():
        items.append(Item("tensorflow", tensorflow, "found", "installed"))
    for pid, path in import_hooks.left_behind():
        why = f"process {pid} died while importing tensorflow; this file has its output; delete the file after reading"
        items.append(Item(path, "", "left", why))
    return items


def _tensorflow_version() -> str | None:
    """Return TensorFlow's version from the name of its .dist-info folder, whichever variant is installed, or None."""
    package = protobuf_fix.locate("tensorflow/__init__.py")
    if package is None:
        return None
    pattern = re.compile(r"(?:tensorflow|tf_nightly)(?:_cpu|_intel|_rocm|_macos|_cpu_aws)?-(\d[^-]*)\.dist-info")
    try:
        names = sorted(os.listdir(package.parent.parent))
    except OSError:
        return None
    return next((found[1] for found in map(pattern.fullmatch, names) if found), None)


def _pin() -> Item:
    name = f"protobuf=={protobuf_fix.text(protobuf_fix.PINNED)}"
    try:
        done = protobuf_fix.pin()
    except protobuf_fix.RefusedError as error:
        return Item(name, "", "refused", f"{error}; protobuf='auto' works without this version")
    return Item(name, "", "kept" if done == "installed already" else "installed", done)


def _fix_implementation() -> list[Item]:
    value, version = os.environ.get(IMPLEMENTATION), protobuf_fix.installed()
    if value is None:
        return []
    if value == "":
        del os.environ[IMPLEMENTATION]
        return [Item(IMPLEMENTATION, "", "removed", "protobuf fails to import with an empty value")]
    if value == "python":
        return [
            Item(IMPLEMENTATION, value, "kept", "set already; it repairs nothing and makes parsing 15-20 times slower")
        ]
    if version is None or (value == "upb" and version[0] > 3):
        return [Item(IMPLEMENTATION, value, "kept", "set already")]
    why = f"protobuf {protobuf_fix.text(version)} cannot be imported with this value: unset it, then restart"
    return [Item(IMPLEMENTATION, value, "broken", why)]


def _fix_get_prototype(before: Any) -> Item:
    name, version = "protobuf GetPrototype", protobuf_fix.installed()
    loaded = [module for module in map(sys.modules.get, import_hooks.PROTOBUF_CLASSES) if module is not None]
    if any([import_hooks.add_get_prototype(module) for module in loaded]):
        if "tensorflow" in sys.modules:
            why = "added too late to prevent tensorflow's messages about the missing method at its import; restart"
            return Item(name, "", "too late", why)
        return Item(name, "", "shimmed", "this protobuf lacks the method")
    if loaded or (version and version < (6, 30, 0)):
        return Item(name, "", "kept", "this protobuf has the method")
    if before is not None and before.shim:
        return Item(name, "", "kept", "added when protobuf loads, by an earlier fix()")
    if version is None and protobuf_fix.locate("google/protobuf") is None:
        return Item(
            name, "", "kept", "protobuf is not installed; if it is installed later, it is checked when imported"
        )
    return Item(name, "", "shimmed", "added when protobuf loads, if it lacks the method")


def _impossible() -> list[Item]:
    """Report packages that cannot load with the installed protobuf; one command repairs all."""
    version = protobuf_fix.installed()
    loaded = getattr(sys.modules.get("google.protobuf"), "__version__", None)
    items: list[Item] = []
    if version is None:
        return items
    here = protobuf_fix.text(version)
    if isinstance(loaded, str) and loaded != here:
        items.append(
            Item("protobuf", here, "too late", f"{loaded} is already imported in this process: restart the process")
        )
    floors = protobuf_fix.floors(version)
    mend = protobuf_fix.command(max(floors.values(), default=version))
    for name, floor in floors.items():
        if floor > version:
            why = f"needs protobuf {protobuf_fix.text(floor)}, but {here} is installed: {mend}, then restart"
            items.append(Item(name, "", "broken", why))
    return items


def _fix_lines(before: Any, quiet: bool) -> list[Item]:
    name = "tensorflow's lines at import"
    if protobuf_fix.locate("tensorflow/__init__.py") is None and "tensorflow" not in sys.modules:
        return []
    if not quiet:
        return [Item(name, "", "kept", "all are shown, because fix(quiet=False) was called")]
    if before is not None and before.quiet:
        return [Item(name, "", "kept", "an earlier fix() made the import drop known lines")]
    if "tensorflow" in sys.modules:
        return [Item(name, "", "too late", "tensorflow is already imported, and has written its lines")]
    why = (
        "known lines are dropped, others are shown after the import; if the process dies, all are in "
        f"{import_hooks.folder()}"
    )
    return [Item(name, "", "filtered", why)]


# --- command line -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of :func:`fix`; the exit code is 1 if an item was refused or is broken, else 0."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m kaggle_mgpu.env", description="Print the report of env.fix().")
    parser.add_argument("--protobuf", choices=get_args(Protobuf), default="auto", help="pin installs protobuf==3.20.3")
    report = fix(parser.parse_args(arguments).protobuf, verbose=False)
    print(report)
    return 0 if report.ok else 1
