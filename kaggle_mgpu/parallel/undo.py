"""This module lets the GPU undo an optimizer step with an infinite gradient, so the CPU need not wait for the norm.

    if can_undo(optimizer, parameters, device):
        step_unless(not_finite, optimizer, parameters)

A fused Adam's kernel skips a step with an infinite gradient by itself. Every other optimizer takes the step;
`torch.where` then restores the weights and the optimizer state if the gradient's norm was inf or nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shards

LARGEST = 64 << 20
"""Most bytes of weights and state to copy; with more, the CPU waits for the gradient's norm. A T4 copies and restores
64 MiB in a millisecond (320 GB/s, NVIDIA's data sheet). A wait costs about as much, since the GPU then idles."""


def can_undo(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether `step_unless` can undo a step: weights and state are on the device, at most `LARGEST` bytes.

    If the optimizer counts steps on the CPU, as torch's Adam does without `fused`, no step can be undone.
    """
    nbytes = 0
    for tensor in [*parameters, *(value for *_, value in _state(optimizer, parameters))]:
        if not isinstance(tensor, Tensor) or shards.local(tensor).device != device:
            return False
        nbytes += shards.local(tensor).nbytes
    return nbytes <= LARGEST


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers in the optimizer's groups; the device cannot undo a step that changes such a number."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


@torch.no_grad()
def step_unless(not_finite: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Take an optimizer step; the device undoes the step if its boolean scalar `not_finite` is true."""
    weights = [shards.local(parameter).clone() for parameter in parameters]
    state = [(parameter, key, shards.local(value).clone()) for parameter, key, value in _state(optimizer, parameters)]
    optimizer.step()
    for parameter, before in zip(parameters, weights, strict=True):
        _restore(parameter, before, not_finite)
    for parameter, key, before in state:  # by key, since an optimizer may put new tensors in place of the old
        _restore(optimizer.state[parameter][key], before, not_finite)


def _restore(tensor: Tensor, before: Tensor, not_finite: Tensor) -> None:
    local = shards.local(tensor)
    torch.where(not_finite, before, local, out=local)


def _state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[tuple[Tensor, str, Tensor]]:
    """Return (parameter, key, value) for each entry of the optimizer's state except None."""
    states = ((parameter, optimizer.state.get(parameter, {})) for parameter in parameters)
    return [(parameter, key, v) for parameter, state in states for key, v in state.items() if v is not None]
