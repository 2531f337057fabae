"""The data package selects the samples of each step and loads them as batches.

The package uses no models, strategies or configs. Start reading at `BatchPlan` in batch_plan.py, then `Order`,
`Sampler` and `Batches` in loading.py; randomness.py derives random numbers from (seed, epoch, sample).
"""

from . import randomness
from .batch_plan import DEFAULT_GLOBAL_BATCH_SIZE, BatchPlan, counted
from .loading import (
    Batches,
    Fetch,
    Order,
    Sampler,
    Share,
    Step,
    evaluation_batches,
    move,
    on_device,
    samples_in,
    size_of,
    workers_for,
)

__all__ = [
    "BatchPlan",
    "Batches",
    "DEFAULT_GLOBAL_BATCH_SIZE",
    "Fetch",
    "Order",
    "Sampler",
    "Share",
    "Step",
    "counted",
    "evaluation_batches",
    "move",
    "on_device",
    "randomness",
    "samples_in",
    "size_of",
    "workers_for",
]
