"""This module lets the GPU decide whether an optimizer step counts, so that the CPU need not wait for the gradient.

    if can_undo(optimizer, parameters, device):
        step_unless(infinite, optimizer, parameters)

A fused Adam's kernel skips a step by itself. Any other optimizer takes the step in any case; `torch.where` then puts
weights and optimizer state back as they were if the gradient was not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shards

LARGEST = 64 << 20
"""Bytes beyond which the CPU waits instead. A T4 copies and compares 64 MiB in a millisecond (320 GB/s, NVIDIA's data
sheet), about the time to launch the kernels of an optimizer step after a wait. Larger copies take longer."""


def can_undo(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether the parameters and their optimizer state are tensors on the device, of few bytes.

    A step count kept as a number or on the CPU, as in torch's own Adam without `fused`, is none.
    """
    nbytes = 0
    for tensor in [*parameters, *(value for *_, value in _state(optimizer, parameters))]:
        if not isinstance(tensor, Tensor) or shards.local(tensor).device != device:
            return False
        nbytes += shards.local(tensor).nbytes
    return nbytes <= LARGEST


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers in the optimizer's groups: those that a step changes could not be undone on the device."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


@torch.no_grad()
def step_unless(infinite: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Take an optimizer step, and undo the step on the device if the boolean scalar `infinite` is true there."""
    weights = [shards.local(parameter).clone() for parameter in parameters]
    state = [(parameter, key, shards.local(value).clone()) for parameter, key, value in _state(optimizer, parameters)]
    optimizer.step()
    for parameter, before in zip(parameters, weights, strict=True):
        _restore(parameter, before, infinite)
    for parameter, key, before in state:  # by key, since an optimizer may put new tensors in place of the old
        _restore(optimizer.state[parameter][key], before, infinite)


def _restore(tensor: Tensor, before: Tensor, infinite: Tensor) -> None:
    local = shards.local(tensor)
    torch.where(infinite, before, local, out=local)


def _state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[tuple[Tensor, str, Tensor]]:
    """Return (parameter, key, value) of the optimizer's state, without None."""
    states = ((parameter, optimizer.state.get(parameter, {})) for parameter in parameters)
    return [(parameter, key, v) for parameter, state in states for key, v in state.items() if v is not None]
