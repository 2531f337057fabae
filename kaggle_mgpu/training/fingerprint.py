"""A run's fingerprint: the values and the code of its task, and its data, each as a short text by name.

A finished run is not handed out as the result of another task, and a resumed run says what was edited. Settings are
compared elsewhere. Code is that of the user's own cells and files, without the packages that are installed.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data
from ..config import TrainConfig
from ..data import randomness
from .task import Task

PACKAGE = str(Path(__file__).resolve().parents[1])
MOST_BYTES = 1 << 20
"""Of a larger array the two ends are read, and some bytes between."""
MOST_SAMPLED = 4096
"""The number of these bytes."""
MOST_ITEMS = 1000
"""Of a longer list the two ends are read."""
REPORTS = ("on_record",)
"""Methods of a task that do not change its result."""


def of(task: Task, train: data.Fetch, val: data.Fetch | None) -> dict[str, str]:
    """Return {name: text} for all that identifies a run beside its settings. Takes a few samples from the data."""
    # what the task's own methods assign is their outcome: counters, caches
    assigned = {name for kind in _kinds(type(task)) for name in _assigned(kind)}
    found = {"Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name, value in sorted(vars(task).items()):
        if not name.startswith("_") and name not in assigned:
            with contextlib.suppress(Exception):  # whatever else an attribute may be
                found[f"task.{name}"] = _text(value)
    code: dict[int, tuple[str, str]] = {}
    for kind in _kinds(type(task)):
        _reach(kind, code, skip=REPORTS)
    for value in vars(task).values():
        _reach(value if isinstance(value, type | types.FunctionType) else type(value), code)
    found |= dict(sorted((f"code of {name}", text) for name, text in code.values()))
    for name, fetch in (("train_data", train), ("val_data", val)):
        if fetch is not None:
            found[name] = _samples(fetch)
    return found


def differences(then: Mapping[str, Any] | None, now: Mapping[str, str]) -> list[str]:
    """Return what differs, each in a few words; [] where an older version wrote no fingerprint."""
    if not isinstance(then, Mapping):
        return []
    other_python = then.get("Python") != now.get("Python")  # its bytecode is another
    listed = []
    for name in {**now, **then}:
        was, now_is = then.get(name), now.get(name)
        if was == now_is or name == "Python" or (other_python and name.startswith("code of ")):
            continue
        if name.startswith("code of "):
            listed.append(f"{name} {'is new' if was is None else 'is gone' if now_is is None else 'was edited'}")
        elif name.endswith("_data") and was and now_is:
            listed.append(f"the samples of {name}")
        elif was != "" and now_is != "":  # "": it cannot be told apart, or was not the same twice
            listed.append(f"{name} was {was or 'not there'}, is {now_is or 'not there'}")
    return listed


def _kinds(kind: type) -> Iterator[type]:
    """Yield a task's classes below Task that are not of this package, base first."""
    for each in kind.__mro__[: kind.__mro__.index(Task)][::-1]:
        if _is_own(each):
            yield each


def _is_own(thing: Any) -> bool:
    """Return whether a class, function or module is the user's: of a cell, or of a file that is not installed."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    if not isinstance(name, str) or name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # a notebook's cell, or sent from one
        return name == "__main__" or name not in sys.modules
    path = Path(file).resolve()
    return not str(path).startswith(PACKAGE) and not {"site-packages", "dist-packages"} & set(path.parts)


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that a member of a class is made of: plain, of a property, wrapped or partial."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if isinstance(member, property):
        for part in (member.fget, member.fset):
            yield from _functions(part)
    elif isinstance(member, functools.partial):
        yield from _functions(member.func)
    elif isinstance(member, types.FunctionType):
        yield member
        if inspect.unwrap(member) is not member:
            yield from _functions(inspect.unwrap(member))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _assigned(kind: type) -> Iterator[str]:
    """Yield the names of the attributes that a class's methods assign, __init__ apart."""
    for name, member in vars(kind).items():
        for function in _functions(member) if name != "__init__" else ():
            for code in _codes(function.__code__):
                yield from (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")


def _reach(thing: Any, found: dict[int, tuple[str, str]], skip: tuple[str, ...] = ()) -> None:
    """Add the code of a function or class of the user's, and of all that it uses, as (name, checksum)."""
    if id(thing) in found or not isinstance(thing, type | types.FunctionType) or not _is_own(thing):
        return
    name = thing.__qualname__.replace("<locals>.", "")
    if isinstance(thing, types.FunctionType):
        found[id(thing)] = name, ""  # before the functions that it uses, which may use it
        checked = [_of_code(thing.__code__), _text(thing.__defaults__), _text(thing.__kwdefaults__)]
        steps = [step for code in _codes(thing.__code__) for step in dis.get_instructions(code)]
        used = {str(step.argval) for step in steps if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))}
        # not all names of the code: in a worker a cell's function has only the globals that it loads
        loaded = sorted({str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
        values = [thing.__globals__[word] for word in loaded if word in thing.__globals__]
        for cell in thing.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for value in values:
            if isinstance(value, types.ModuleType) and _is_own(value):
                for word in sorted(used):
                    _reach(getattr(value, word, None), found)
            for part in _functions(value) if not isinstance(value, type) else (value,):
                _reach(part, found)
            if isinstance(value, int | float | str | tuple):  # a constant of the cell
                checked.append(_text(value))
        found[id(thing)] = name, _checksum(repr(checked))
        return
    plain = {
        key: _text(value)
        for key, value in vars(thing).items()
        if not key.startswith("__") and isinstance(value, int | float | str | tuple | list | dict)
    }
    found[id(thing)] = name, _checksum(repr(sorted(plain.items())))
    for base in thing.__bases__:
        if base is not Task:
            _reach(base, found)
    for key, member in vars(thing).items():
        if key not in skip:
            for part in (member,) if isinstance(member, type) else _functions(member):
                _reach(part, found)


def _of_code(code: types.CodeType) -> list[Any]:
    """Return what a function does, without its position in a file and its docstrings' whereabouts."""
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


def _text(value: Any, depth: int = 6, seen: tuple[int, ...] = ()) -> str:
    """Return a short text that tells values apart, the same in every process; "" for what cannot be told apart."""
    if value is None or isinstance(value, bool | int | float | str | Path):
        text = repr(str(value) if isinstance(value, Path) else value)
        return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters, {_checksum(text)})"
    if isinstance(value, TrainConfig) or depth == 0 or id(value) in seen:
        return ""
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta:
            return f"{value.dtype}{[*value.shape]}"
        flat = value.detach().cpu().contiguous().flatten()
        return f"{value.dtype}{[*value.shape]} {_of_bytes(flat.view(torch.uint8).numpy())}"
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return _text(value.ravel()[:MOST_ITEMS].tolist(), depth, seen)
        return f"{value.dtype}{[*value.shape]} {_of_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8))}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {_checksum(value)}"
    if isinstance(value, Mapping):
        items = [(_text(key, depth - 1, seen), _text(item, depth - 1, seen)) for key, item in _ends([*value.items()])]
        return f"{len(value)} items {_checksum(repr(sorted(items)))}"
    if isinstance(value, list | tuple):
        return f"{len(value)} items {_checksum(repr([_text(item, depth - 1, seen) for item in _ends(value)]))}"
    if isinstance(value, set | frozenset):
        return f"{len(value)} items {_checksum(repr(sorted(_text(item, depth - 1, seen) for item in value)))}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "to_numpy"):  # pandas' tables
        return f"{kind} {_text(value.to_numpy(), depth - 1, seen)}"
    if isinstance(value, torch.nn.Module):
        return f"{kind} {_text(value.state_dict(), depth - 1, seen)}"
    if isinstance(value, type | types.FunctionType | types.ModuleType):
        return getattr(value, "__qualname__", kind)
    state = {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return f"{kind} {_text(state, depth - 1, seen)}" if state else kind


def _ends(items: Any) -> Any:
    half = MOST_ITEMS // 2
    return items if len(items) <= MOST_ITEMS else [*items[:half], *items[-half:]]


def _of_bytes(flat: Any) -> str:
    """Return the checksum of an array of bytes; of a large one, of its ends and of some bytes between."""
    if flat.nbytes <= MOST_BYTES:
        return _checksum(flat.tobytes())
    end, stride = MOST_BYTES // 2, (flat.nbytes // MOST_SAMPLED) | 1  # odd, to meet every byte of a number
    return _checksum(b"".join(part.tobytes() for part in (flat[:end], flat[::stride], flat[-end:])))


def _samples(fetch: data.Fetch) -> str:
    """Return a text for the data's length and its first and last samples; "" if these differ when fetched again."""
    size = len(fetch.dataset)  # type: ignore[arg-type]
    try:
        with randomness.undisturbed():
            first, again = ([_text(fetch[np.array([row])]) for row in {0, size - 1}] for _ in range(2))
    except Exception:  # a collate that needs several samples; an error of the data shows in the first step
        return ""
    return f"{size} samples {_checksum(repr(first))}" if first == again else ""
