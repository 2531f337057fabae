"""Warn before training if a loss is not a sum over samples, or BatchNorm does not see the whole batch.

No warning ends a run.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch

from .. import data
from ..data import randomness
from ..parallel import batch_norms, distributed
from .parts import Parts
from .task import Task

A_MEAN = (
    "WARNING: Task.loss looks like a mean over the batch. It should be the SUM over its samples (reduction='sum'): as "
    "it is, the gradient is too small and depends on how the batch is split."
)

NOT_A_SUM = (
    "NOTE: the loss of {samples} samples is {whole:.4g}, but the losses of their two halves add up to {total:.4g}, so "
    "it depends on how the batch is split, and on the number of GPUs. Return the SUM over terms, and check that "
    "predictions and targets have the same shape: (8, 1) - (8,) broadcasts to (8, 8). If samples are compared with "
    "each other on purpose, set whole_batch_loss = True in the task and use distributed.gather_with_gradients."
)


def notes(parts: Parts) -> list[str]:
    """Return warnings about the task's loss and model. Only rank 0 calls this, before the first step."""
    return [note for note in (_about_loss(parts), _about_batch_norm(parts)) if note]


def _about_batch_norm(parts: Parts) -> str:
    """Return a note if BatchNorm's statistics are not of the whole global batch, or ""."""
    plan, names = parts.plan, batch_norms(parts.strategy.model)
    synchronised = parts.config.sync_batchnorm == "auto" and not parts.config.find_unused_parameters
    together = parts.world_size if synchronised else 1
    samples = plan.micro_batch_size * together
    if not names or samples == plan.global_batch_size:
        return ""
    return (
        f"NOTE: BatchNorm ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}) takes its statistics from "
        f"{samples} samples at a time, not from the global batch of {plan.global_batch_size}, so the weights depend on "
        f"how the batch is split. To avoid this: larger micro-batches without accumulation, under ddp; GroupNorm; or "
        f"frozen statistics (the layers in eval mode)."
    )


def _about_loss(parts: Parts) -> str:
    """Return a warning if the loss of a few samples is not the sum of the losses of its halves, or "".

    If the loss looks like a mean over the samples, the warning says that. The loss curve does not show this mistake
    with Adam, whose steps do not depend on the gradient's scale.
    """
    strategy, plan, task = parts.strategy, parts.plan, parts.task
    samples = min(plan.dataset_size, plan.micro_batch_size, 8) // 2 * 2
    if samples < 2 or task.whole_batch_loss or not strategy.computes_alone:
        return ""
    rows, half = np.arange(samples), samples // 2

    def loss(batch: Any) -> float:
        return float(strategy.call(data.move(batch, strategy.device)).flatten()[0])

    # A compiled model would be compiled for another batch size here, with dynamic shapes, and on rank 0 alone.
    eager = torch.compiler.set_stance("force_eager") if parts.config.compile else contextlib.nullcontext()
    strategy.model.eval()
    try:
        with torch.no_grad(), randomness.undisturbed(), distributed.computing("alone"), eager:
            batch = parts.fetch[rows]
            whole, again = loss(batch), loss(batch)
            if not math.isclose(whole, again, rel_tol=1e-4):  # the loss draws random numbers
                return ""
            total = loss(parts.fetch[rows[:half]]) + loss(parts.fetch[rows[half:]])
            if math.isclose(whole, total, rel_tol=1e-2):
                return ""
            if math.isclose(whole, total / 2, rel_tol=1e-3) and type(task).count is Task.count:
                return A_MEAN
            return NOT_A_SUM.format(samples=samples, whole=whole, total=total)
    except Exception:  # the model may not take so few samples
        return ""
    finally:
        strategy.model.train()
