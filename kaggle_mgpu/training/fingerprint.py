"""A run's fingerprint: a dictionary of short texts about the task's values, the task's code, and the data.

`train` compares a checkpoint's fingerprint with the current one, so that a finished run is not returned as the result
of another task, and lists the edits when it resumes a run. Settings are compared in checkpoints/resume.py. Only code
of the user's own cells and files counts, not installed packages.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import dis
import enum
import functools
import itertools
import os
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from .. import data
from ..config import TrainConfig
from ..data import randomness
from .task import Task

VERSION = "2"
"""The version of the texts. Texts of another version are not compared."""
PACKAGE = str(Path(__file__).resolve().parents[1])
MOST_BYTES = 1 << 20
"""Arrays, texts and bytes up to this size are read whole; larger ones are sampled."""
MOST_SAMPLED = 1024
"""Elements read from the inside of a larger array; as many are read at its two ends."""
MOST_ITEMS = 1000
"""Longer lists are read at their two ends only."""
MOST_ROWS = 50
"""Rows read at each end of a table; rows between are not read."""
MOST_VISITED = 20_000
"""Values with more items, nested ones included, are not compared."""
RECENT_SECONDS = 7 * 86400
"""A float this close to the current Unix time is treated as a time of this session, and not compared."""
OBJECT = "object "
"""The first word of a text about an object: such texts may differ between sessions of the same task."""
CHANGES = frozenset({
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault",
    "update",
})  # fmt: skip
"""Methods that change their object. A variable with such calls is taken for a cache or history, and not compared."""
COUNTED = int | float | str | bytes | PurePath | tuple | list | dict | set | frozenset | np.ndarray | torch.Tensor
"""Types of global variables and class attributes whose values are compared along with the code that reads them."""
NOT_COMPARED = ("on_record",)
"""Methods of a task that do not affect the weights, and are not compared."""


def of(task: Task, train: data.Fetch, val: data.Fetch | None) -> dict[str, str]:
    """Return {name: text} for everything that identifies a run besides its settings. Reads a few samples."""
    if type(task).__module__.startswith("kaggle_mgpu.recipes."):
        return {}  # a recipe's settings and its digest of the data identify the run; fetching samples may take minutes
    found = {"form": VERSION, "Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    assigned = _assigned(type(task))
    for name, value in sorted(vars(task).items()):
        if not name.startswith("_") and name not in assigned:
            found[f"task.{name}"] = _text(value)
    code: dict[int, tuple[str, str]] = {}
    for kind in _kinds(type(task)):
        _reach(kind, code, skip=NOT_COMPARED)
    for value in vars(task).values():
        for part in (value, type(value), *_functions(value)):
            _reach(part, code)
    for name, text in sorted(code.values()):  # a function and its wrapper share a name, so their texts are joined
        found[f"code of {name}"] = f"{found.get(f'code of {name}', '')} {text}".strip()
    for name, fetch in (("train_data", train), ("val_data", val)):
        if fetch is not None:
            found[name] = _samples(fetch)
    return found


def differences(then: Mapping[str, Any] | None, now: Mapping[str, str], notes: bool = True) -> list[str]:
    """Return each difference in a few words; [] unless both fingerprints exist in the same version.

    Checkpoints of older versions have no fingerprint, and ranks other than 0 make none.

    Args:
        notes: also list attributes that hold objects, which may differ between sessions of the same task.
    """
    if not then or not isinstance(then, Mapping) or then.get("form") != now.get("form"):
        return []
    other_python = then.get("Python") != now.get("Python")  # the same code then has another bytecode
    listed = []
    for name in {**now, **then}:
        was, now_is = then.get(name), now.get(name)
        # "": the value cannot be compared, or the samples differed when fetched twice
        if was == now_is or "" in (was, now_is) or name == "Python" or (other_python and name.startswith("code of ")):
            continue
        if name.startswith("code of "):
            listed.append(f"{name} {'is new' if was is None else 'is gone' if now_is is None else 'was edited'}")
        elif name.endswith("_data") and not name.startswith("task."):
            if was and now_is:
                listed.append(f"the samples of {name}")
        elif notes or not all(text in (None, "None") or text.startswith(OBJECT) for text in (was, now_is)):
            listed.append(f"{name} was {was or 'not there'}, is {now_is or 'not there'}")
    return listed


def _kinds(kind: type) -> Iterator[type]:
    """Yield the user's classes in a task's inheritance, from the base class next to Task to the task's own class."""
    for each in kind.__mro__[: kind.__mro__.index(Task)][::-1]:
        if _is_own(each):
            yield each


def _is_own(thing: Any) -> bool:
    """Return whether a class, function or module is the user's: of a cell, or of a file that is not installed."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    if not isinstance(name, str) or name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # defined in a notebook's cell, or sent to this worker from one
        return name == "__main__" or name not in sys.modules
    return not _is_installed(file)


@functools.cache
def _is_installed(file: str) -> bool:
    """Return whether a file is of an installed package, or of this one."""
    path = Path(file).resolve()
    return str(path).startswith(PACKAGE + os.sep) or bool({"site-packages", "dist-packages"} & set(path.parts))


def _functions(member: Any, depth: int = 20) -> Iterator[types.FunctionType]:
    """Yield the plain functions inside a value or class member: a function, method, property, partial or wrapper."""
    parts: tuple[Any, ...] = ()
    with contextlib.suppress(Exception):  # an arbitrary value may raise anything
        if isinstance(member, property):
            parts = (member.fget, member.fset)
        elif isinstance(member, functools.partial | functools.cached_property):
            parts = (member.func,)
        elif isinstance(member, staticmethod | classmethod | types.MethodType):
            parts = (member.__func__,)
        elif not isinstance(member, type):  # from functools.wraps or lru_cache; getattr may answer for any name
            parts = (getattr(member, "__dict__", {}).get("__wrapped__"),)
    if type(member) is types.FunctionType:
        yield member
    for part in parts if depth else ():
        yield from _functions(part, depth - 1)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of its inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _assigned(kind: type) -> set[str]:
    """Return the attributes that a user's class assigns outside __init__: counters and caches, not compared."""
    return {
        step.argval
        for each in kind.__mro__
        if each is not Task and _is_own(each)
        for name, member in vars(each).items()
        if name not in ("__init__", "__post_init__")
        for function in _functions(member)
        for code in _codes(function.__code__)
        for step in dis.get_instructions(code)
        if step.opname == "STORE_ATTR"
    }


def _reach(thing: Any, found: dict[int, tuple[str, str]], skip: tuple[str, ...] = ()) -> None:
    """Add (name, checksum) to `found` for a user's function or class, and for all user code used there.

    The checksum is "" if the code cannot be read.
    """
    with contextlib.suppress(Exception):
        if id(thing) in found or not issubclass(type(thing), type | types.FunctionType) or not _is_own(thing):
            return
        name = thing.__qualname__.replace("<locals>.", "")
        found[id(thing)] = name, ""  # entered before the code that `thing` uses, because that code may use `thing`
        text = _of_function(thing, found) if isinstance(thing, types.FunctionType) else _of_class(thing, found, skip)
        found[id(thing)] = name, text


def _of_function(function: types.FunctionType, found: dict[int, tuple[str, str]]) -> str:
    """Return the checksum of a function's code and of the values read there; add the code used there to `found`."""
    checked = [_of_code(function.__code__), _text(function.__defaults__), _text(function.__kwdefaults__)]
    steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
    used = {str(step.argval) for step in steps if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))}
    # not co_names, which also has the names of attributes: a notebook's global may share such a name, but in a worker
    # a cell's function has only the globals that its code loads, and the checksums would differ
    loaded = {str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    values = {word: function.__globals__[word] for word in sorted(loaded) if word in function.__globals__}
    for word, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            values[word] = cell.cell_contents
    for module in [value for value in values.values() if type(value) is types.ModuleType and _is_own(value)]:
        values |= {f"{module.__name__}.{word}": vars(module)[word] for word in sorted(used & vars(module).keys())}
    changed = _changed(steps)
    for word, value in values.items():
        kind = type(value)  # not isinstance, which reads the value's __class__ and may raise
        _reach(value if issubclass(kind, type) else kind, found)
        for part in _functions(value):
            _reach(part, found)
        # a module may have other initial weights in each session
        own = _is_own(kind) and not issubclass(kind, torch.nn.Module | type)
        if (own or issubclass(kind, COUNTED)) and word not in changed:
            checked.append(_text(value))
    return _checksum(repr(checked))


def _changed(steps: list[dis.Instruction]) -> set[str]:
    """Return the names of the variables that a function assigns or changes in place: caches, not compared."""
    changed = {str(step.argval) for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    for step, after, later in zip(steps, steps[1:], steps[2:], strict=False):
        if (
            after.opname == "STORE_ATTR"
            or (after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and after.argval in CHANGES)
            or later.opname in ("STORE_SUBSCR", "DELETE_SUBSCR")
        ):
            changed.add(str(step.argval))
    return changed


def _of_class(kind: type, found: dict[int, tuple[str, str]], skip: tuple[str, ...]) -> str:
    """Return the checksum of a class's constants; add its methods and bases to `found`."""
    for base in kind.__bases__:
        if base is not Task:
            _reach(base, found)
    for key, member in vars(kind).items():
        if key not in skip:
            for part in (member, *_functions(member)):
                _reach(part, found)
    plain = {
        key: _text(value)
        for key, value in vars(kind).items()
        if not key.startswith("__") and issubclass(type(value), COUNTED)
    }
    return _checksum(repr(sorted(plain.items())))


def _of_code(code: types.CodeType) -> list[Any]:
    """Return a function's code as plain values, without its position in a file."""
    constants = [
        # a set's order changes from process to process
        sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each)
        for each in code.co_consts
        if not isinstance(each, types.CodeType)
    ]
    inner = [_of_code(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return [code.co_code, code.co_names, code.co_varnames, constants, inner]


def _checksum(text: str | bytes) -> str:
    return f"{zlib.crc32(text.encode() if isinstance(text, str) else text):08x}"


def _text(value: Any) -> str:
    """Return a short text for comparing a value, the same in every process; "" for a value without such a text."""
    reading = _Reading()
    try:
        text = reading.text(value)
    except Exception:  # an arbitrary value may raise anything; `_visit` raises for a value with too many items
        return ""
    return text if reading.plain else OBJECT + text


class _Reading:
    """Makes the text of one value, from a bounded number of its items."""

    def __init__(self) -> None:
        self.items_left = MOST_VISITED
        self.plain = True
        """Whether only plain data was read so far."""
        self.assigned: Callable[[type], set[str]] = functools.cache(_assigned)

    def text(self, value: Any, depth: int = 6) -> str:
        """Return the text of a value, or of an item in it.

        Raises:
            ValueError: the value has too many items.
            Exception: the value's own methods raised it.
        """
        self._visit(1)
        if isinstance(value, TrainConfig) or depth == 0:
            return ""
        if isinstance(value, float) and abs(time.time() - value) < RECENT_SECONDS:
            return ""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, enum.Enum):
            return f"{kind}.{value.name}"
        if isinstance(value, str | PurePath):
            return _shortened(str(value))
        if isinstance(value, np.void):  # a record
            value = value.item()
        if isinstance(value, np.generic | np.dtype | torch.dtype | torch.device):
            return f"{value}"
        if value is None or isinstance(value, int | float | complex | range):
            return _shortened(repr(value), quoted=False)
        if isinstance(value, bytes | bytearray):
            return f"{len(value)} bytes {self._of_array(np.asarray(memoryview(value)))}"
        if isinstance(value, torch.Tensor | np.ndarray):
            return f"{value.dtype}{[*value.shape]} {self._of_array(value, depth)}"
        if isinstance(value, dict):
            half = MOST_ITEMS // 2
            tail = itertools.islice(reversed(value.items()), min(half, max(0, len(value) - half)))
            pairs = [*itertools.islice(value.items(), half), *tail]
            items = [(self.text(key, depth - 1), self.text(item, depth - 1)) for key, item in pairs]
            return f"{len(value)} items {_checksum(repr(sorted(items)))}"
        if isinstance(value, list | tuple):
            return f"{len(value)} items {self._of_items(_ends(value), depth)}"
        if isinstance(value, set | frozenset):
            return f"{len(value)} items {_checksum(repr(sorted(self.text(item, depth - 1) for item in value)))}"
        if isinstance(value, types.SimpleNamespace | argparse.Namespace):
            return f"{kind} {self.text(vars(value), depth - 1)}"
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType):
            self.plain = False
            return str(getattr(value, "__qualname__", getattr(value, "__name__", kind)))
        if hasattr(type(value), "to_numpy"):  # a table or column
            if hasattr(type(value), "head"):
                ends = [value.head(MOST_ROWS), value.tail(MOST_ROWS)]
            else:
                ends = [value[:MOST_ROWS], value[-MOST_ROWS:]]
            read = [getattr(value, "columns", None), *(end.to_numpy() for end in ends)]
            return f"{kind} {len(value)} rows {self._of_items(read, depth)}"
        self.plain = self.plain and dataclasses.is_dataclass(value) and _is_own(type(value))
        if isinstance(value, Mapping):  # the keys only, because the values may be whole files
            return f"{kind} {len(value)} items {self._of_items(itertools.islice(value, MOST_ITEMS), depth)}"
        if not _is_own(type(value)):
            return kind
        if isinstance(value, torch.nn.Module):
            return f"{kind} {self.text(value.state_dict(), depth - 1)}"
        assigned = self.assigned(type(value))
        state = {
            name: item
            for name, item in getattr(value, "__dict__", {}).items()
            if not name.startswith("_") and name not in assigned
        }
        return f"{kind} {self.text(state, depth - 1)}" if state else kind

    def _visit(self, items: int) -> None:
        self.items_left -= items
        if self.items_left < 0:
            raise ValueError  # caught in `_text`

    def _of_items(self, items: Iterable[Any], depth: int) -> str:
        return _checksum(repr([self.text(item, depth - 1) for item in items]))

    def _of_array(self, value: Any, depth: int = 1) -> str:
        """Return the checksum of an array or tensor on any device; a large array is sampled."""
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta:
                return ""
            value = value.detach()
        else:
            value = np.asarray(value)
            if value.dtype.hasobject:
                half = MOST_ITEMS // 2
                return self._of_items([*value.flat[:half], *value.flat[max(half, value.size - half) :]], depth)
        if value.nbytes > MOST_BYTES:  # by index: a copy of the whole may not fit into memory
            size = int(np.prod(value.shape))
            ends = np.arange(min(size, MOST_SAMPLED // 2))
            spread = np.linspace(0, size - 1, MOST_SAMPLED).astype(np.int64)
            index = np.unravel_index(np.unique(np.concatenate([ends, spread, size - 1 - ends])), value.shape)
            value = value[tuple(map(torch.from_numpy, index)) if isinstance(value, torch.Tensor) else index]
        self._visit(value.nbytes >> 16)
        if isinstance(value, torch.Tensor):
            value = value.cpu().contiguous().flatten().view(torch.uint8).numpy()
        return _checksum(np.ascontiguousarray(value).tobytes())


def _shortened(text: str, quoted: bool = True) -> str:
    """Return a text in quotes; for a long text, its beginning, length and checksum."""
    half = MOST_BYTES // 2
    size, read = len(text), text if len(text) <= MOST_BYTES else text[:half] + text[-half:]
    read = repr(read) if quoted else read
    return read if len(read) <= 60 else f"{read[:40]}… ({size} characters, {_checksum(read)})"


def _ends(items: Any) -> Any:
    half = MOST_ITEMS // 2
    return items if len(items) <= MOST_ITEMS else [*items[:half], *items[-half:]]


def _samples(fetch: data.Fetch) -> str:
    """Return a text for the data's length and its first and last samples; "" if these differ when fetched again."""
    try:
        size = len(fetch.dataset)  # type: ignore[arg-type]
        with randomness.undisturbed():
            first, again = ([_text(fetch[np.array([row])]) for row in {0, size - 1}] for _ in range(2))
    except Exception:  # such as a collate that needs several samples; errors of the data show in the first step
        return ""
    return f"{size} samples {_checksum(repr(first))}" if first == again else ""
