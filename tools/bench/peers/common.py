"""What the contenders share: a run's description, the kit's order of samples, and a plain training loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaggle_mgpu.data import Fetch, Order


@dataclass(frozen=True)
class Run:
    """One training run of one contender."""

    seed: int
    steps: int
    small: bool
    data: Path
    output: Path
    """An empty folder."""


Contender = Callable[[Run], dict[str, float]]
"""Trains, and returns figures by name."""


def batches(dataset: Any, size: int, seed: int) -> Iterator[Any]:
    """Yield the batches that the kit's own loop trains on with this seed, endlessly."""
    fetch = Fetch(dataset, seed=seed)
    for epoch in itertools.count():
        order = Order(len(dataset), seed, epoch)[:]
        for start in range(0, len(order), size):
            yield fetch[epoch, order[start : start + size]]


def fit(
    model: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    lr: float,
    min_lr: float,
    warmup: float,
) -> None:
    """Train with linear warm-up, a cosine down to min_lr and a gradient clipped to norm 1.

    Args:
        loss: returns the mean loss of a batch.
        warmup: a fraction of the steps.
    """
    model.train()
    rising = round(warmup * steps)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        fallen = 0.5 - 0.5 * math.cos(math.pi * max(0, step - rising) / (steps - rising))
        rate = lr * (step + 1) / rising if step < rising else lr + (min_lr - lr) * fallen
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
