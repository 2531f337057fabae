"""Check all values in a checkpoint before a run goes on from it.

    examine(path, expected)     # returns the content of state.json, or raises a CheckpointError with the unfit value

A checksum shows that a file is undamaged, not that its content fits this run: a checkpoint among Kaggle's inputs may
come from anybody. So the type and range of each value are checked, and the names and shapes of tensors are compared
with this run's model, averaged weights and optimizer. The optimizer's state is tried in one step on meta tensors, which
need no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..parallel import shards
from . import format
from .format import OtherRunError

STATE = ("step", "samples_seen", "evaluated", "metrics", "best", "improved_to", "without_improvement", "seconds")
"""The fields of `TrainState`."""
MOST_STEPS = 10**12
"""Upper limit for the number of steps in a checkpoint; no run takes so many."""
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_NUM_UPDATES = ".num_updates"
_KERNEL = ("fused", "foreach", "capturable")
_CHECKED_FOR_NAN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Expected:
    """The content that a checkpoint must have for a run to go on from it."""

    model: Mapping[str, Tensor]
    """The model's state by name; only shapes and types count."""
    ema: Mapping[str, Tensor] | None
    """The averaged weights by name; None if the run averages no weights."""
    groups: Sequence[Sequence[str]]
    """The names of the optimizer's parameters, group by group."""
    optimizer: torch.optim.Optimizer
    """This run's optimizer, which the check does not change."""
    samples_at: Callable[[int], int]
    """Returns the number of samples seen after a given number of steps."""


def examine(path: Path, expected: Expected) -> dict[str, Any]:
    """Read a checkpoint, compare its content with the expected, and return its facts. The caller checked the checksums.

    Raises:
        OtherRunError: the checkpoint is of another model or another optimizer.
        CheckpointError: a value is impossible; the message names the value and the expected range.
    """
    try:
        facts = format.read_facts(path)
        _position(facts, expected)
        listed = {format.kind_of(name) for name in facts["files"]}
        for kind in ("model", "optimizer", *(["ema"] if expected.ema is not None else [])):
            if kind not in listed:
                raise CheckpointError(f"it holds no {kind}.safetensors")
        if unknown := listed - {"model", "optimizer", "ema"}:
            raise CheckpointError(f"it lists files that no checkpoint has: {', '.join(sorted(unknown)[:5])}")
        found = format.load_checked(path, facts, join=False)
        if problem := _tensors("model", found.tensors["model"], expected.model):
            raise OtherRunError(
                f"{path} is from another model: {problem}",
                "Give this run another output_dir, or restore the settings the checkpoint was made with.",
            )
        if expected.ema is not None:
            if problem := _tensors("ema", found.tensors["ema"], expected.ema):
                raise CheckpointError(f"ema.safetensors does not fit the weights beside it: {problem}")
            _whole_number(f"{_NUM_UPDATES} in ema.safetensors", found.tensors["ema"][_NUM_UPDATES].item(), MOST_STEPS)
        _optimizer(path, found.state, facts["step"], expected)
        for kind in ("model", "ema"):
            for name in (name for group in expected.groups for name in group):
                _finite(f"{name} in {kind}.safetensors", found.tensors.get(kind, {}).get(name))
    except CheckpointError:
        raise
    except Exception as error:  # a file from somebody else may have any content
        raise CheckpointError(f"it cannot be read: {type(error).__name__}: {error}"[:500]) from error
    return facts


def _position(facts: Mapping[str, Any], expected: Expected) -> None:
    state = facts.get("state", {})
    if unknown := set(state) - set(STATE):
        raise CheckpointError(f"its state has {', '.join(map(repr, sorted(unknown)))}, which is not known")
    step = _whole_number("step in its state", state.get("step"), MOST_STEPS)
    if step != facts["step"]:
        raise CheckpointError(
            f"step in its state is {step}, expected {facts['step']}, the step at the top of state.json"
        )
    samples = _whole_number("samples_seen in its state", state.get("samples_seen"), 10**30)
    if samples != (there := expected.samples_at(step)):
        raise CheckpointError(f"samples_seen in its state is {samples}, expected {there} after {step} steps")
    _whole_number("evaluated in its state", state.get("evaluated", 0), step)
    if not math.isfinite(seconds := _number("seconds in its state", state.get("seconds", 0.0))) or seconds < 0:
        raise CheckpointError(f"seconds in its state is {seconds!r}, expected a number of 0 or more")
    for name in ("best", "improved_to"):
        if state.get(name) is not None:
            _number(f"{name} in its state", state[name])
    _whole_number("without_improvement in its state", state.get("without_improvement", 0), step)
    metrics = state.get("metrics", {})
    if not isinstance(metrics, dict):
        raise CheckpointError(f"metrics in its state is {metrics!r:.80}, expected numbers with their names")
    for name, value in metrics.items():
        _number(f"metrics[{name!r}] in its state", value)


def _whole_number(what: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise CheckpointError(f"{what} is {value!r:.80}, expected a whole number from 0 to {most}")
    return value


def _number(what: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            pass
    raise CheckpointError(f"{what} is {value!r:.80}, expected a number")


def _tensors(kind: str, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """Return the differences of names and shapes, or ""; raise if a type is wrong or rows are missing."""
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if problem := format.other_model(shapes, expected):
        return problem
    for name, value in found.items():
        for part in _parts(f"{name} in {kind}.safetensors", value):
            if part.is_floating_point() != expected[name].is_floating_point():
                raise CheckpointError(f"{name} in {kind}.safetensors is {part.dtype}, expected {expected[name].dtype}")
    return ""


def _parts(what: str, value: Any) -> list[Tensor]:
    """Return [value], or the row blocks of a sharded tensor; raise unless the blocks cover every row once."""
    if isinstance(value, Tensor):
        return [value]
    parts = sorted(value.blocks, key=lambda part: part[0])
    position = 0
    for start, rows in parts:
        if len(rows) and (start != position or rows.shape[1:] != value.shape[1:]):
            break
        position += len(rows)
    else:
        if position == value.shape[0]:
            return [rows for _, rows in parts]
    raise CheckpointError(f"{what} is incomplete: some of its {value.shape[0]} rows are missing or stored twice")


def _finite(what: str, value: Any) -> None:
    """Refuse weights with nan or infinite values, since training cannot recover."""
    for part in [] if value is None else _parts(what, value):
        if not all(math.isfinite(bound) for bound in _bounds(part)):
            raise CheckpointError(f"{what} is nan or infinite")


def _bounds(part: Tensor) -> list[float]:
    """Return [minimum, maximum], both nan if any value is nan; [] if empty or not float. Faster than isfinite()."""
    if part.dtype not in _CHECKED_FOR_NAN or not part.numel():
        return []
    return [bound.item() for bound in torch.aminmax(part)]


# The optimizer
def _optimizer(path: Path, state: Any, step: int, expected: Expected) -> None:
    if not isinstance(state, dict) or not {"optimizer", "scaler", "skipped"} <= state.keys():
        raise CheckpointError(
            "optimizer.safetensors was not written by kaggle_mgpu: expected the entries optimizer, scaler and skipped"
        )
    skipped, scaler, saved = _whole_number("skipped", state["skipped"], step), state["scaler"], state["optimizer"]
    if not isinstance(scaler, dict) or (scaler and not scaler.keys() >= _SCALER):
        raise CheckpointError(f"the gradient scaler's state is {scaler!r:.80}, expected {', '.join(sorted(_SCALER))}")
    for name in _SCALER & scaler.keys():
        if not 0 <= _number(f"the gradient scaler's {name}", scaler[name]) < math.inf:
            raise CheckpointError(f"the gradient scaler's {name} is {scaler[name]!r}, expected 0 or more")
    if not isinstance(saved, dict) or not isinstance(saved.get("param_groups"), list):
        raise CheckpointError("the optimizer's state in optimizer.safetensors was not written by kaggle_mgpu")
    groups, moments = saved["param_groups"], saved["state"]
    if not all(isinstance(it, dict) for it in [*groups, moments]) or not all(
        isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError("the optimizer's state in optimizer.safetensors was not written by kaggle_mgpu")
    theirs, mine = [group["params"] for group in groups], [list(group) for group in expected.groups]
    if theirs != mine:
        differ = sorted({n for group in theirs for n in group} ^ {n for group in mine for n in group})
        raise OtherRunError(
            f"{path}: the checkpoint's optimizer holds other parameters than this run's: {', '.join(differ[:5])}"
            if differ
            else f"{path}: the checkpoint's optimizer has the parameters in other groups, or another order, than this "
            f"run's: groups of {[len(group) for group in theirs]} then, of {[len(group) for group in mine]} now",
            "Give this run another output_dir, or restore the optimizer the checkpoint was made with.",
        )
    for then, now in zip(groups, expected.optimizer.param_groups, strict=True):
        for key in (then.keys() & now.keys()) - {*_KERNEL, "params"}:
            if not _alike(then[key], now[key]):
                raise CheckpointError(
                    f"{key} of an optimizer's group is {then[key]!r:.80}, expected a value of the same kind as "
                    f"{now[key]!r}"
                )
    if unknown := set(moments) - {name for group in mine for name in group}:
        raise CheckpointError(
            f"the optimizer's state holds parameters that this run does not train: {sorted(unknown)[:5]}"
        )
    for name, values in moments.items():
        if not isinstance(values, dict):
            raise CheckpointError(f"the optimizer's state of {name} is {values!r:.80}, expected moments by name")
        for key, value in values.items():
            what = f"{key} of {name} in optimizer.safetensors"
            if isinstance(value, Tensor | shards.Pieces):
                for part in _parts(what, value):
                    if any(map(math.isnan, _bounds(part))):
                        raise CheckpointError(f"{what} is nan")
            if key == "step":
                taken = _number(what, value.item() if isinstance(value, Tensor) else value)
                if not 0 <= taken <= step:
                    raise CheckpointError(f"{what} is {taken:g}, expected 0 to {step}")
    _try(path, saved, step - skipped, expected)


def _alike(then: Any, now: Any) -> bool:
    """Return whether a saved setting fits the current one: the same type, a finite number, or an equally long list."""
    if isinstance(now, list | tuple):
        return type(then) is type(now) and len(then) == len(now) and all(map(_alike, then, now))
    if isinstance(now, int | float | Tensor) and not isinstance(now, bool):
        number = then.item() if isinstance(then, Tensor) and then.numel() == 1 else then
        return not isinstance(number, bool) and isinstance(number, int | float) and abs(number) < math.inf
    return type(then) is type(now)


def _try(path: Path, saved: Mapping[str, Any], steps: int, expected: Expected) -> None:
    """Compare the saved state with a new optimizer's after a step, then try a step from the saved state (meta tensors).

    Only optimizers of torch and kaggle_mgpu are tried, since the step of any other optimizer may wait for other ranks.
    In each group, one parameter of each shape and type is tried.
    """
    if not type(expected.optimizer).__module__.startswith(("torch.optim.", "kaggle_mgpu.")):
        return
    likes: dict[tuple[Any, ...], str] = {}
    like: dict[str, str] = {}
    for index, names in enumerate(expected.groups):
        for name in names:
            key = (index, tuple(expected.model[name].shape), expected.model[name].dtype)
            like[name] = likes.setdefault(key, name)
    chosen = set(likes.values())
    try:
        fresh, again = _Trial(expected, chosen), _Trial(expected, chosen)
        fresh.optimizer.step()
        again.optimizer.load_state_dict(fresh.optimizer.state_dict())
        again.optimizer.step()
    except Exception:  # the optimizer cannot step on meta tensors even without a checkpoint, so a step proves nothing
        return
    kind = type(expected.optimizer).__name__
    needed = {name: fresh.optimizer.state[tensor] for name, tensor in fresh.tensors.items()}
    there = {key for values in saved["state"].values() for key in values}
    if steps > 0 and (missing := {key for values in needed.values() for key in values} - there):
        raise OtherRunError(
            f"{path}: the checkpoint's optimizer has no {', '.join(sorted(missing))}, which this run's {kind} needs "
            f"to continue",
            "Give this run another output_dir, or restore the optimizer the checkpoint was made with.",
        )
    for name, values in saved["state"].items():
        for key, value in needed[like[name]].items():
            if key not in values:
                raise CheckpointError(f"the optimizer's state of {name} has no {key}, which {kind} needs to continue")
            if not isinstance(value, Tensor):
                continue
            shape, found = tuple(value.shape), tuple(getattr(values[key], "shape", ()))
            if not isinstance(values[key], Tensor | shards.Pieces) or found != shape:
                got = found if isinstance(values[key], Tensor | shards.Pieces) else repr(values[key])[:80]
                raise CheckpointError(f"{key} of {name} in optimizer.safetensors: expected shape {shape}, got {got}")
    try:
        trial = _Trial(expected, chosen, saved)
        trial.optimizer.step()
    except Exception as error:
        text = f"{kind} cannot continue from the checkpoint's optimizer state: {type(error).__name__}: {error}"
        raise CheckpointError(text[:500]) from error


class _Trial:
    """An optimizer of the run's type and groups, for tensors on the meta device.

    Args:
        chosen: the names of the parameters to include.
        saved: settings and state to load; None: the run's settings, and no state.
    """

    def __init__(self, expected: Expected, chosen: Collection[str], saved: Mapping[str, Any] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        groups: list[dict[str, Any]] = []
        number: dict[str, int] = {}
        for now, names in zip(expected.optimizer.param_groups, expected.groups, strict=True):
            inside = [name for name in names if name in chosen]
            for name in inside:
                like = expected.model[name]
                tensor = torch.empty(tuple(like.shape), dtype=like.dtype, device="meta", requires_grad=True)
                tensor.grad = torch.empty_like(tensor)
                self.tensors[name], number[name] = tensor, len(number)
            kernel = dict.fromkeys((key for key in _KERNEL if key in now), False)
            groups.append({**now, **kernel, "params": [self.tensors[name] for name in inside]})
        self.optimizer = type(expected.optimizer)(groups)  # type: ignore[call-arg]
        if saved is None:
            return
        loaded = [
            {**then, **dict.fromkeys(_KERNEL, False), "params": [number[n] for n in then["params"] if n in number]}
            for then in saved["param_groups"]
        ]
        state = {
            number[name]: {key: _meta(value) for key, value in values.items()}
            for name, values in saved["state"].items()
            if name in number
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": loaded})


def _meta(value: Any) -> Any:
    """Return a meta tensor of the same shape and type; a number or 0-d tensor is returned unchanged."""
    if isinstance(value, shards.Pieces):
        return torch.empty(tuple(value.shape), dtype=value.blocks[0][1].dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) and value.ndim else value
