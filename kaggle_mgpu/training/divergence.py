"""Decide when to end a run whose loss or gradient is not finite, and build an error with the steps and samples."""

from __future__ import annotations

import math
from pathlib import Path

from .. import data
from ..errors import DivergedError

# Steps skipped in a row before the run ends. fp16 starts with a loss scale of 2^16, halved after each overflow, so
# twenty skipped steps are not unusual.
PATIENCE = {"fp16": 30, "fp32": 5, "bf16": 5}


def is_hopeless(step: int, loss: float, skipped_in_a_row: int, precision: str) -> bool:
    """Return whether to end the run after `step`.

    Args:
        skipped_in_a_row: the number of consecutive steps, the last being `step`, that were skipped because their
            gradient was not finite.
    """
    # in fp16 the loss scale may be too high at first; in fp32 and bf16 the next step would fail for the same reason
    patience = 1 if step == 1 and precision != "fp16" else PATIENCE[precision]
    only_gradient_is_finite = not math.isfinite(loss) and skipped_in_a_row == 0 and precision != "fp16"
    return skipped_in_a_row >= patience or only_gradient_is_finite


def samples_of(step: int, plan: data.BatchPlan, seed: int) -> list[int]:
    """Return the indices of the samples in a step's global batch, over all ranks."""
    epoch, start = divmod(step - 1, plan.steps_per_epoch)
    batch = plan.global_batch_size
    return data.Order(plan.dataset_size, seed, epoch)[start * batch : (start + 1) * batch].tolist()


def diverged_error(
    step: int,
    first: int,
    samples: list[int],
    *,
    skipped: int,
    loss: float,
    lr: float,
    norm: float,
    good: Path | None,
    precision: str,
) -> DivergedError:
    """Return the error to end a run after `step`.

    Args:
        first: the first step whose gradient was not finite; `step` if only the loss was not.
        samples: the indices of the samples of step `first`.
        skipped: the number of skipped steps from `first` on.
        good: the newest checkpoint from before `first`; None without one.
    """
    shown = ", ".join(map(str, samples[:16])) + (
        f", … ({len(samples)} in all: see metrics.jsonl)" if len(samples) > 16 else ""
    )
    steps = f"step {step} was" if first == step else f"steps {first} to {step} were"
    return DivergedError(
        f"the loss is {loss} at step {step} (learning rate {lr:g}, gradient norm {norm:g})"
        + (f"; {steps} skipped, because the gradient was not finite. " if skipped else ". ")
        + f"Step {first} had the samples {shown}. "
        + (f"The last checkpoint from before is {good}. " if good else "There is no checkpoint from before. ")
        + "Look for nan in the data or a division by zero in Task.loss; else lower lr or raise warmup_steps."
        + " In fp16 values above 65504 are infinite: precision='fp32' shows whether this is the cause."
        * (precision == "fp16")
    )
