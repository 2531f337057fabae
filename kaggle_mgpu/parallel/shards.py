"""This module reads, gathers and writes tensors that are sharded over the ranks.

    whole(parameter)            # the full tensor on every rank: a collective
    copy_(parameter, tensor)    # each rank takes its own rows of a full tensor
    shard_of(parameter)         # this rank's rows and their position in the full tensor

A sharded tensor is torch's DTensor, cut along its first dimension as torch.chunk does. All functions except `shard_of`
and `spread_like` also accept unsharded tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A Shard is a range of rows of a tensor."""

    rows: Tensor
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    start: int
    """Index of the first row in the full tensor."""


class Pieces:
    """Pieces is a tensor with its rows in several files; `pieces[2:5]` reads rows 2 to 4 and no others."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = torch.Size(shape)
        self.blocks: list[tuple[int, Tensor]] = []

    def add(self, start: int, rows: Tensor) -> None:
        """Add rows, the first with index `start` in the full tensor."""
        self.blocks.append((start, rows))

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self.shape[0])
        parts = [part[max(first - start, 0) : max(end - start, 0)] for start, part in self.blocks]
        parts = [part for part in parts if len(part)] or parts[:1]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is sharded, without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows, which share the tensor's memory; return an unsharded tensor unchanged."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank, without gradients; all ranks must call `whole` for the same tensor.

    An unsharded tensor is returned unchanged. On a CPU torch's full_tensor may deadlock (torch 2.13): full_tensor holds
    the GIL while it waits for the lock of gloo's queue, and gloo's thread, which has the lock, may need the GIL to
    free a tensor. all_gather releases the GIL.
    """
    if not is_sharded(tensor):
        return tensor
    spread = cast(Any, tensor)
    if spread.device.type != "cpu" or not spread.placements[0].is_shard(0):
        return cast(Tensor, spread.detach().full_tensor())
    shard, mesh = shard_of(tensor), spread.device_mesh
    own = shard.rows.detach().new_zeros((-(-shard.shape[0] // mesh.size()), *shard.shape[1:]))
    own[: len(shard.rows)] = shard.rows.detach()
    parts = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(parts, own, group=mesh.get_group())
    return torch.cat(parts)[: shard.shape[0]]


def shard_of(tensor: Tensor) -> Shard:
    """Return this rank's rows of a sharded tensor."""
    spread = cast(Any, tensor)
    rows, ranks, rank = tensor.shape[0], spread.device_mesh.size(), spread.device_mesh.get_local_rank()
    return Shard(spread.to_local(), tuple(tensor.shape), min(rank * -(-rows // ranks), rows))


def rows_of(full: Any, like: Tensor) -> Any:
    """Return this rank's rows of a full tensor (or of its `Pieces`), cut in the way the tensor `like` is sharded."""
    if not is_sharded(like):
        return full
    shard = shard_of(like)
    return full[shard.start : shard.start + len(shard.rows)]


@torch.no_grad()
def copy_(target: Tensor, source: Any) -> None:
    """Copy a full tensor into a possibly sharded tensor; each rank takes its rows, without communication."""
    local(target).copy_(rows_of(source, target))


def spread_like(value: Any, like: Tensor) -> Tensor:
    """Shard a full tensor (or its `Pieces`) like the tensor `like` of the same shape, on the same device."""
    from torch.distributed.tensor import DTensor

    spread = cast(Any, like)
    rows = rows_of(value, like).to(local(like).device, copy=True)
    return DTensor.from_local(
        rows, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def each(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a copy of a tree of dictionaries, lists and tuples, with `change(tensor)` in place of each tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: each(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        make = getattr(type(tree), "_make", type(tree))  # a namedtuple takes separate fields
        return make(each(value, change) for value in tree)
    return tree


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep all weights gathered on every rank during a `with` block, which all ranks must enter.

    Within the block, ranks may call the model different numbers of times, for example to generate text. The block
    needs memory for all weights. Without sharded weights, `gathered` does nothing.

    Raises:
        RuntimeError: the weights are sharded by ZeRO's stage 3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("under ZeRO stage 3 a model cannot be gathered: use strategy='fsdp', or stage 2")
    module = sys.modules.get("torch.distributed.fsdp")
    units: list[Any] = [] if module is None else [m for m in model.modules() if isinstance(m, module.FSDPModule)]
    before = [setting for unit in units for setting in _reshard_settings(unit)]
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


def _reshard_settings(unit: Any) -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, value) for each value that `set_reshard_after_forward` changes; torch has no getter.

    The root's values differ from other units' values: torch keeps the root gathered after a forward pass.
    """
    state = unit._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)
    groups = getattr(state, "_fsdp_param_groups", [one] if one is not None else [])
    places = [(state, "_auto_reshard_after_forward"), *((group, "post_forward_mesh_info") for group in groups)]
    return [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]
