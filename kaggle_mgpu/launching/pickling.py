"""Pickle calls for the workers, and their values and exceptions for the notebook's process.

data = pickling.dumps(value, "the value")  # a TypeError names the part that cannot be pickled
value = pickle.loads(data)
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any


def dumps(value: Any, what: str) -> bytes:
    """Pickle a value, with functions and classes of a notebook's cells by value, and with tensors on the CPU.

    Args:
        what: the value's name in an error message.

    Raises:
        TypeError: the value cannot be pickled; the message names the part that cannot.
    """
    try:
        return _pickled(value)
    except Exception as error:
        name, part = _culprit(value, "value", 8)
        raise TypeError(
            f"{what} cannot be sent to another process: {name} is a {type(part).__module__}.{type(part).__qualname__} "
            f"({type(error).__name__}: {error}). Pass what the object is made from, for example a path, and make the "
            f"object in the other process."
        ) from error


def _pickled(value: Any) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, CodeType):
                make, arguments = self.dispatch_table[CodeType](item)[:2]
                return _code, (item.co_filename, make, arguments)
            torch = sys.modules.get("torch")
            if torch is not None and isinstance(item, torch.Tensor) and (there := _travelling(item)) is not item:
                return there.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return super().reducer_override(item)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _code(filename: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """Make a code object with its file name; cloudpickle from 3.1.3 on sends "<dynamic-code>" instead of the name.

    Tracebacks find the source line by that name.
    """
    return make(*arguments).replace(co_filename=filename)


def _travelling(tensor: Any) -> Any:
    """Return the tensor on the CPU, without its graph and without unused parts of its storage."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    part = plain and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() > tensor.nbytes
    if tensor.device.type in ("cpu", "meta") and tensor.grad_fn is None and not part:
        return tensor
    moved = tensor.detach().clone() if part else tensor.detach().cpu()
    return torch.nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved


def _culprit(value: Any, name: str, depth: int) -> tuple[str, Any]:
    """Return the name and the value of the smallest part that pickle refuses, at most `depth + 1` levels deep."""
    parts: dict[str, Any] = {}
    if isinstance(value, dict):
        parts = {f"{name}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        parts = {f"{name}[{index}]": item for index, item in enumerate(value)}
    elif (code := getattr(value, "__code__", None)) is not None:
        cells = zip(code.co_freevars, value.__closure__ or (), strict=False)
        parts = {f"{variable} (in {value.__qualname__})": cell.cell_contents for variable, cell in cells}
        used = [variable for variable in code.co_names if variable in value.__globals__]
        parts |= {f"{variable} (in {value.__qualname__})": value.__globals__[variable] for variable in used}
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        parts = {f"{name}.{key}": item for key, item in vars(value).items()}
    for where, part in parts.items():
        try:
            _pickled(part)
        except Exception:
            return _culprit(part, where, depth - 1) if depth else (where, part)
    return name, value


class _Rebuilt:
    """Wrap an exception whose own pickling fails, most often because __init__ needs more than `args`."""

    def __init__(self, error: BaseException) -> None:
        self.parts = (type(error), error.args, dict(error.__dict__))

    def __reduce__(self) -> Any:
        return _rebuild, self.parts


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def dumps_error(error: BaseException) -> bytes | None:
    """Pickle an exception so that unpickling gives the same type and text; return None if impossible."""
    for form in (error, _Rebuilt(error)):
        with contextlib.suppress(Exception):
            data = _pickled(form)
            copy = pickle.loads(data)
            if type(copy).__qualname__ == type(error).__qualname__ and str(copy) == str(error):
                return data
    return None
