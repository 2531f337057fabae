"""When a run whose loss or gradient is not finite is given up, and what is said of it: the steps, and their samples."""

from __future__ import annotations

import math
from pathlib import Path

from . import data
from .task import DivergedError

# Steps left out one after the other before the run is given up. fp16 starts with a loss scale of 2^16, and halves it
# with each overflow: twenty in a row are nothing unusual.
GIVE_UP_AFTER = {"fp16": 30, "fp32": 5, "bf16": 5}


def beyond_hope(step: int, loss: float, left_out: int, precision: str) -> bool:
    """Whether to give the run up at `step`.

    Args:
        left_out: how many steps in a row, up to this one, were not taken because their gradient was not finite.
    """
    # in full precision the first step has no excuse: what is not finite then will not be later
    patience = 1 if step == 1 and precision != "fp16" else GIVE_UP_AFTER[precision]
    gradient_alone_is_finite = not math.isfinite(loss) and left_out == 0 and precision != "fp16"
    return left_out >= patience or gradient_alone_is_finite


def samples_of(step: int, plan: data.BatchPlan, seed: int) -> list[int]:
    """The indices of the samples that a step had, over all ranks."""
    epoch, start = divmod(step - 1, plan.steps_per_epoch)
    batch = plan.global_batch_size
    return data.Order(plan.dataset_size, seed, epoch)[start * batch : (start + 1) * batch].tolist()


def error(
    step: int, first: int, samples: list[int], *, left_out: int, loss: float, lr: float, norm: float, good: Path | None
) -> DivergedError:
    """What ends the run at `step`.

    Args:
        first: the first of the steps whose gradient was not finite.
        samples: that step's.
        good: the newest checkpoint from before it.
    """
    shown = ", ".join(map(str, samples[:16])) + (
        f", … ({len(samples)} in all: see metrics.jsonl)" if len(samples) > 16 else ""
    )
    which = f"step {step} was" if first == step else f"steps {first} to {step} were"
    return DivergedError(
        f"the loss is {loss} at step {step} (learning rate {lr:g}, gradient norm {norm:g})"
        + (f"; {which} left out, for want of a finite gradient. " if left_out else ". ")
        + f"Step {first} had the samples {shown}. "
        + (f"The last checkpoint from before is {good}. " if good else "There is no checkpoint from before. ")
        + "Look for nan in the data or a division by zero in Task.loss; else lower lr or raise warmup_steps."
    )
