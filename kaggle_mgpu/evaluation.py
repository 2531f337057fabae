"""Metrics over val_data, each sample once over all ranks, and whether they are the best so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import data, distributed, randomness
from .config import TrainConfig
from .strategy import Strategy
from .task import Task, TrainState


def evaluate(
    task: Task, how: Strategy, fetch: data.Fetch, batch_size: int, *, step: int, seed: int, workers: int
) -> dict[str, float]:
    """The task's metrics over the data that `fetch` gets: on every rank the same. A collective.

    Args:
        batch_size: samples that a rank takes at a time.
        step: with `seed` it decides chance in the model, where there is any.
    """
    randomness.seed_for(randomness.key(seed, "metrics"), step, distributed.rank())
    batches = data.evaluation_batches(
        fetch,
        data.size_of(fetch.dataset, "val_data()"),
        batch_size,
        workers=workers,
        pin_memory=how.device.type == "cuda",
        device=how.input_device,
    )
    how.model.eval()
    parts = distributed.gather(how.evaluate(batches))
    how.model.train()
    return _merge(task, parts)


def _merge(task: Task, parts: list[dict[str, tuple[Tensor, int]]]) -> dict[str, float]:
    """One figure a metric from every rank's sums and counts, added up in the order of ranks."""
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        total, count = torch.stack([total for total, _ in found]).sum(0), sum(count for _, count in found)
        means[name] = total / count if count else torch.full_like(total, float("nan"))
    return task.summary(means)


def better(config: TrainConfig, state: TrainState) -> bool:
    """Whether the last evaluation's best_metric is the best so far.

    Raises:
        ValueError: it gave no such metric.
    """
    if config.best_metric not in state.metrics:
        raise ValueError(
            f"best_metric is {config.best_metric!r}, but the evaluation gave {', '.join(state.metrics) or 'nothing'}. "
            f"Set best_metric to one of them, or add it to Task.metrics."
        )
    value = state.metrics[config.best_metric]
    if state.best is None or math.isnan(state.best):  # anything is better than nan, and nothing is worse
        return True
    return value < state.best if config.best_mode == "min" else value > state.best
