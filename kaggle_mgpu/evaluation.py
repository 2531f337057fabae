"""Metrics over val_data, each sample once over all ranks, in batches that fit; and whether they are the best so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import data, distributed, memory, randomness
from .config import TrainConfig
from .strategy import Strategy
from .task import Task, TrainState


def evaluate(
    task: Task, how: Strategy, fetch: data.Fetch, batch_size: int, *, step: int, seed: int, workers: int
) -> tuple[dict[str, float], int]:
    """The task's metrics over the data that `fetch` gets, and the batch size they were had with. A collective.

    Where a batch is too much for a rank's memory, all of them begin again with half of it: sums and counts do not
    depend on how the data is split.

    Args:
        batch_size: samples that a rank takes at a time.
        step: with `seed` it decides chance in the model, where there is any.

    Raises:
        OutOfMemoryError: a single sample is too much. Where ranks compute together, as under fsdp, any batch that is:
            the others wait inside, and cannot begin again.
    """
    chance = randomness.key(seed, "metrics")
    how.model.eval()
    while True:
        randomness.seed_for(chance, step, distributed.rank())
        parts = distributed.gather(_sums(how, fetch, batch_size, workers))
        failed = [part for part in parts if isinstance(part, str)]
        if not failed:
            break
        if batch_size == 1:
            raise torch.OutOfMemoryError(failed[0])
        batch_size //= 2
    how.model.train()
    return _merge(task, parts), batch_size


def _sums(how: Strategy, fetch: data.Fetch, batch_size: int, workers: int) -> Any:
    """This rank's sums and counts, or the text of the error where it had no memory for them."""
    batches = data.evaluation_batches(
        fetch,
        data.size_of(fetch.dataset, "val_data()"),
        batch_size,
        workers=workers,
        pin_memory=how.device.type == "cuda",
        device=how.input_device,
    )
    try:
        return how.evaluate(batches)
    except RuntimeError as error:
        if not (how.alone and memory.out_of_memory(error)):
            raise
        failure = str(error)
    memory.release()  # here, where the error no longer holds on to what it was about
    return failure


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
