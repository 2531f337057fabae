"""Tensors that are spread over the ranks: what this rank has of one, the whole of it, and writing a whole one into it.

    whole(parameter)            # on every rank: a collective
    copy_(parameter, tensor)    # each rank takes its own rows of a whole tensor
    shard_of(parameter)         # this rank's rows, and where they lie in the whole

A spread tensor is torch's DTensor, cut along its first dimension as torch.chunk cuts. Any other tensor is its own whole
and its own part, so that callers need not ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """Some rows of a tensor."""

    rows: Tensor
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    """Which of the whole's rows is the first here."""


class Pieces:
    """A tensor whose rows lie in several files, put together only as far as they are asked for: `pieces[2:5]`."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = torch.Size(shape)
        self.found: list[tuple[int, Tensor]] = []

    def add(self, start: int, rows: Tensor) -> None:
        self.found.append((start, rows))

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self.shape[0])
        parts = [part[max(first - start, 0) : max(end - start, 0)] for start, part in self.found]
        parts = [part for part in parts if len(part)] or parts[:1]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is spread over the ranks. Imports nothing: where there is one, its module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows, sharing the tensor's memory; a tensor that is not spread as it is."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. A collective: every rank must ask for the same one."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor) -> Shard:
    """This rank's rows of a spread tensor."""
    spread = cast(Any, tensor)
    rows, ranks, rank = tensor.shape[0], spread.device_mesh.size(), spread.device_mesh.get_local_rank()
    return Shard(spread.to_local(), tuple(tensor.shape), min(rank * -(-rows // ranks), rows))


@torch.no_grad()
def copy_(target: Tensor, source: Any) -> None:
    """Copy a whole tensor into one that may be spread: each rank takes its rows, without asking another."""
    if is_sharded(target):
        shard = shard_of(target)
        shard.rows.copy_(source[shard.start : shard.start + len(shard.rows)])
    else:
        target.copy_(source)


def spread_like(value: Any, like: Tensor) -> Tensor:
    """A whole tensor (or its `Pieces`) spread over the ranks, and on the device, as `like` is, which has its shape."""
    from torch.distributed.tensor import DTensor

    shard, spread = shard_of(like), cast(Any, like)
    rows = value[shard.start : shard.start + len(shard.rows)].to(shard.rows.device, copy=True)
    return DTensor.from_local(
        rows, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def each(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a tree of dictionaries, lists and tuples in which every tensor is replaced by what `change` gives."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: each(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        make = getattr(type(tree), "_make", type(tree))  # a namedtuple wants its fields one by one
        return make(each(value, change) for value in tree)
    return tree


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every rank has the whole model, and may compute with it as often as it likes; to be entered by all.

    For what each rank does in a number of steps of its own, as generating text is. It takes the room that the whole
    weights take. Where nothing is spread, it does nothing.

    Raises:
        RuntimeError: the weights are spread by ZeRO's stage 3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("under ZeRO stage 3 a model cannot be gathered: use strategy='fsdp', or stage 2")
    module = sys.modules.get("torch.distributed.fsdp")
    units: list[Any] = [] if module is None else [m for m in model.modules() if isinstance(m, module.FSDPModule)]
    before = [kept for unit in units for kept in _set_when_resharded(unit)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        for unit in units:
            unit.reshard()


def _set_when_resharded(unit: Any) -> list[tuple[Any, str, Any]]:
    """What `set_reshard_after_forward` changes, with its values, which torch gives no other way to read.

    They differ: the root keeps its weights after a forward pass. Newer versions have several groups in a unit.
    """
    state = unit._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)
    groups = getattr(state, "_fsdp_param_groups", [one] if one is not None else [])
    places = [(state, "_auto_reshard_after_forward"), *((group, "post_forward_mesh_info") for group in groups)]
    return [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]
