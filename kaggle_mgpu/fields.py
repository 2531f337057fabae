"""This module converts values to the annotated types of dataclass fields, and reads the fields' docstrings.

parse("Config.epochs", int, "3")        # 3, as from papermill or a YAML file; "fast" raises ValueError
docstrings(TrainConfig)["epochs"]       # the string below the field
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal


def types_of(cls: type) -> dict[str, Any]:
    """Return the type of each field by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _choices(annotation: Any) -> list[Any]:
    """Return the members of a union, or [annotation] for any other type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    return [annotation]


def describe(annotation: Any) -> str:
    """Return a type's description for users: int|none, auto|single|dp."""
    words = []
    for choice in _choices(annotation):
        if typing.get_origin(choice) is Literal:
            words += [str(value) for value in typing.get_args(choice)]
        else:
            words.append("none" if choice is types.NoneType else getattr(choice, "__name__", str(choice)))
    return "|".join(words)


def parse(name: str, annotation: Any, value: Any) -> Any:
    """Convert a value to the first matching type of an annotation. Lists become tuples.

    Args:
        name: the setting's name, for the error message.
        annotation: a type, a Literal, list[...], tuple[...] or a union of these.

    Raises:
        ValueError: the value matches no type, or has another number of items than the tuple.
    """
    # "none" on a command line or in papermill means None wherever None is allowed
    if types.NoneType in _choices(annotation) and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        return None
    for choice in _choices(annotation):
        origin = typing.get_origin(choice)
        if choice is Any:
            return value
        if origin is Literal:
            if value in typing.get_args(choice) and not isinstance(value, bool):
                return value
        elif origin in (list, tuple):
            if isinstance(value, str):
                value = [part for part in re.split(r"[,\s]+", value.strip("[]() ")) if part]
            if isinstance(value, list | tuple):
                inner = typing.get_args(choice) or (Any,)
                if origin is list or inner[-1] is ...:
                    inner = inner[:1] * len(value)
                if len(inner) != len(value):
                    raise ValueError(f"{name}: expected {len(inner)} values, got {len(value)}: {value!r}")
                return tuple(parse(f"{name}[{i}]", inner[i], item) for i, item in enumerate(value))
        elif choice is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "1", "0"):
                return value.lower() in ("true", "yes", "1")
        elif choice is int:
            # 1e3 from papermill is a float and means an int; 0.03 may match a later type
            if not isinstance(value, bool) and isinstance(value, int | float | str):
                try:
                    number = float(value)
                    if number == int(number):  # int(value) where possible: a float would round a long integer
                        return int(value) if isinstance(value, int) or not _has_point(value) else int(number)
                except (ValueError, OverflowError):
                    pass
        elif choice is float:
            if not isinstance(value, bool) and isinstance(value, int | float | str):
                try:
                    return float(value)
                except (ValueError, OverflowError):
                    pass
        elif choice is str:
            # papermill and YAML turn gpu_ids "0" and time_limit "3600" into numbers
            if isinstance(value, str | Path | int | float) and not isinstance(value, bool):
                return str(value)
        elif isinstance(value, origin or choice):
            return value
    raise ValueError(f"{name}: expected {describe(annotation)}, got {value!r:.200} ({type(value).__name__})")


def plain(value: Any) -> Any:
    """Convert tuples to lists, as JSON does."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _has_point(value: float | str) -> bool:
    return isinstance(value, float) or not value.strip().lstrip("+-").isdigit()


def docstrings(cls: type) -> dict[str, str]:
    """Return the docstring under each field, for --help; {} for a class without readable source."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        except (OSError, TypeError, SyntaxError):
            continue
        for line, following in itertools.pairwise(body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                texts[line.target.id] = inspect.cleandoc(str(following.value.value))
    return texts


def parse_per_gpu(text: str) -> int:
    """Return 64 for "per_gpu:64", a batch size that grows with the number of GPUs.

    Raises:
        ValueError: the text has another form, or the number is below 1.
    """
    found = re.fullmatch(r"per_gpu:\s*(\d+)", text.strip())
    if found is None or int(found[1]) < 1:
        raise ValueError(f"expected a number of samples, or 'per_gpu:64' for 64 on each GPU, got {text!r}")
    return int(found[1])


def parse_duration(text: str | float) -> float:
    """Return the seconds in "11h30m", "45m", "90s", "1d", or a plain number of seconds.

    Raises:
        ValueError: the text is not a duration, or the duration is not above zero.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    body = str(text).strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", body):
        seconds = float(body)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms])+", body):
        seconds = sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", body))
    else:
        raise ValueError(f"not a duration: {text!r}. Write it like '11h30m', '45m', '90s' or a number of seconds.")
    if seconds <= 0:
        raise ValueError(f"a duration must be above zero, got {text!r}")
    return seconds
