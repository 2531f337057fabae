"""Synchronised BatchNorm layers of every kind: they compute what one process does, and can be copied and pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import distributed, launch
from kaggle_mgpu.parallel import sync_batch_norms

KINDS: dict[str, Any] = {
    "plain": lambda: nn.BatchNorm2d(4),
    "without weights": lambda: nn.BatchNorm2d(4, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "in bf16": lambda: nn.BatchNorm2d(4).bfloat16(),
}


def batch(kind: str) -> Tensor:
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return x.to(torch.bfloat16 if kind == "in bf16" else torch.float32)


def outcome(kind: str, rows: slice) -> list[Tensor]:
    """The output and the gradients of the input and the weights, for a loss of squares."""
    layer, x = KINDS[kind](), batch(kind)[rows].requires_grad_()
    if distributed.world_size() > 1:
        sync_batch_norms(layer)
    output = layer(x)
    (output.float() * batch(kind)[rows].float().roll(1, 1)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]  # type: ignore[list-item]


def on_two_ranks() -> dict[str, list[Tensor]]:
    distributed.init()
    rows = slice(0, 4) if distributed.rank() == 0 else slice(4, 6)
    with distributed.computing("step"):
        return {kind: outcome(kind, rows) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Tensor]]]:
    return list(launch(on_two_ranks, nproc=2))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_what_one_process_does(ranks: list[dict[str, list[Tensor]]], kind: str) -> None:
    output, gradient, *others = outcome(kind, slice(0, 6))
    first, second = ranks[0][kind], ranks[1][kind]
    near = {"rtol": 0.05, "atol": 0.05} if kind == "in bf16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), output, **near)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), gradient, **near)
    weights = len(list(KINDS[kind]().parameters()))
    for a, b, expected in zip(first[2 : 2 + weights], second[2 : 2 + weights], others[:weights], strict=True):
        torch.testing.assert_close(a + b, expected, **near)
    for a, expected in zip(first[2 + weights :], others[weights:], strict=True):
        torch.testing.assert_close(a, expected, **near)


def test_a_pickled_layer_is_plain_and_a_copy_stays_synchronised() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    sync_batch_norms(model)
    assert type(pickle.loads(pickle.dumps(model))[1]) is nn.BatchNorm1d
    copied = copy.deepcopy(model)
    assert type(copied[1]) is type(model[1])
    assert copied[1].weight is not model[1].weight
    assert list(copied.state_dict()) == list(model.state_dict())
