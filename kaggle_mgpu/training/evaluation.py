"""Evaluation over val_data: each sample once over all ranks, in batches that fit into memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..config import TrainConfig
from ..data import randomness
from ..machine import devices
from ..parallel import distributed
from .out_of_memory import is_out_of_memory, release
from .parts import Parts
from .task import Task, TrainState


class Evaluation:
    """Evaluates a run, and knows when an evaluation is due."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        every = parts.config.eval_every
        self.last = parts.plan.max_steps
        self.every = {"epoch": parts.plan.steps_per_epoch, "end": self.last}[every] if isinstance(every, str) else every
        self.rng_key = randomness.key(parts.config.seed, "metrics")
        self.batch_size: int | None = None
        """Samples that a rank takes at a time, once an evaluation has run out of memory with more."""
        self.next_step: float = math.inf
        """The number of steps at which the next evaluation is due."""
        if parts.val_fetch is not None:
            reached = state.step > 0 and (state.step % self.every == 0 or state.step >= self.last)
            due_now = reached and state.evaluated != state.step
            self.next_step = state.step if due_now else self._step_after(state.step)

    def _step_after(self, step: int) -> float:
        return math.inf if step >= self.last else min((step // self.every + 1) * self.every, self.last)

    def run(self, parts: Parts, state: TrainState) -> str:
        """Write the metrics over val_data into `state.metrics`; return a note about memory, or "".

        Every rank must call this. When a batch is too much for one rank's memory, all ranks begin again with half of
        it: sums and counts do not depend on how the data is split.

        Raises:
            OutOfMemoryError: a single sample is too much; or any batch, where ranks compute together as under fsdp: the
                other ranks wait inside a collective, and cannot begin again.
        """
        first_size = parts.plan.micro_batch_size * (parts.plan.num_replicas // parts.world_size)
        first_size = min(first_size, self.batch_size or first_size)
        strategy, size = parts.strategy, first_size
        with parts.averaged_weights():
            strategy.sync_buffers()
            strategy.model.eval()
            while True:
                randomness.seed_for(self.rng_key, state.step, parts.rank)
                sums = distributed.gather(_sums(parts, size))
                failed = [text for text in sums if isinstance(text, str)]
                if not failed:
                    break
                if size == 1:
                    raise torch.OutOfMemoryError(failed[0])
                size //= 2
            strategy.model.train()
            state.metrics = _merge(parts.task, sums)
        self.next_step = self._step_after(state.step)
        if size == first_size:
            return ""
        self.batch_size = size
        return (
            f"out of memory in the evaluation after step {state.step} with {first_size} samples at a time: {size} from "
            f"here on, with the same result"
        )


def _sums(parts: Parts, batch_size: int) -> Any:
    """Return this rank's sums and counts, or the text of its out-of-memory error."""
    assert parts.val_fetch is not None
    workers = data.workers_for(
        parts.val_fetch, parts.config.data_workers, devices.cpu_count(), distributed.local_world_size()
    )
    batches = data.evaluation_batches(
        parts.val_fetch, parts.val_samples, batch_size, workers=workers,
        pin_memory=parts.device.type == "cuda", device=parts.strategy.input_device,
    )  # fmt: skip
    try:
        return parts.strategy.evaluate(batches)
    except RuntimeError as error:
        if not (parts.strategy.alone and is_out_of_memory(error)):
            raise
        failure = str(error)
    release()
    return failure


def _merge(task: Task, sums: list[dict[str, tuple[Tensor, int]]]) -> dict[str, float]:
    """Add up every rank's sums and counts in the order of ranks, and let the task summarise the means."""
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in sums for name in part):
        found = [part[name] for part in sums if name in part]
        total, count = torch.stack([total for total, _ in found]).sum(0), sum(count for _, count in found)
        means[name] = total / count if count else torch.full_like(total, float("nan"))
    return task.summary(means)


def is_best(config: TrainConfig, state: TrainState) -> bool:
    """Return whether the last evaluation's best_metric is the best so far.

    Raises:
        ValueError: the evaluation gave no such metric.
    """
    if config.best_metric not in state.metrics:
        raise ValueError(
            f"best_metric is {config.best_metric!r}, but the evaluation gave {', '.join(state.metrics) or 'nothing'}. "
            f"Set best_metric to one of them, or add it to Task.metrics."
        )
    value = state.metrics[config.best_metric]
    if state.best is None or math.isnan(state.best):  # every value is better than nan
        return True
    return value < state.best if config.best_mode == "min" else value > state.best
