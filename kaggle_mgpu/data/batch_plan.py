"""The arithmetic of a run: how a global batch is split over GPUs and micro-batches, and how many steps that makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

DEFAULT_GLOBAL_BATCH_SIZE = 32


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of a run, checked once: global = micro x replicas x accumulation, and the steps that makes."""

    global_batch_size: int
    micro_batch_size: int
    num_replicas: int
    gradient_accumulation_steps: int
    dataset_size: int
    max_steps: int

    @classmethod
    def make(
        cls,
        *,
        dataset_size: int,
        num_replicas: int = 1,
        global_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        epochs: int = 1,
        max_steps: int | None = None,
    ) -> Self:
        """Fill in what was not given, and check what was.

        Raises:
            ValueError: an empty dataset; three numbers that do not multiply; a batch that the replicas cannot share.
        """
        if dataset_size < 1:
            raise ValueError("the training data is empty: train_data() has length 0. Check the path it reads from.")
        whole, micro, accumulation = global_batch_size, micro_batch_size, gradient_accumulation_steps
        if whole is None and (micro is None or accumulation is None):
            if micro is None:
                whole = DEFAULT_GLOBAL_BATCH_SIZE
            else:
                accumulation = 1
        if whole is None:
            assert micro is not None and accumulation is not None
            whole = micro * num_replicas * accumulation
        replicas = f"{num_replicas} {'replica' if num_replicas == 1 else 'replicas'}"
        if micro is not None and accumulation is not None:
            if micro * num_replicas * accumulation != whole:
                raise ValueError(
                    f"the batch sizes do not multiply: micro_batch_size {micro} x {replicas} x "
                    f"gradient_accumulation_steps {accumulation} = {micro * num_replicas * accumulation}, but "
                    f"global_batch_size is {whole}. Leave one of the three out and it follows from the others."
                )
        elif micro is not None:
            if micro > whole:
                raise ValueError(
                    f"micro_batch_size {micro} is larger than global_batch_size {whole}. Expected at most "
                    f"{max(1, whole // num_replicas)} for {replicas}; lower it, or raise global_batch_size."
                )
            if whole % (micro * num_replicas):
                near = _nearest(whole, micro * num_replicas)
                raise ValueError(
                    f"global_batch_size {whole} cannot be made of micro_batch_size {micro} x {replicas} = "
                    f"{micro * num_replicas} samples at a time. Choose global_batch_size {near}, or another "
                    f"micro_batch_size."
                )
            accumulation = whole // (micro * num_replicas)
        else:
            accumulation = accumulation or 1
            if whole % (num_replicas * accumulation):
                near = _nearest(whole, num_replicas * accumulation)
                raise ValueError(
                    f"global_batch_size {whole} cannot be shared by {replicas} x gradient_accumulation_steps "
                    f"{accumulation}: it is not a multiple of {num_replicas * accumulation}. Choose global_batch_size "
                    f"{near}, or another number of GPUs."
                )
            micro = whole // (num_replicas * accumulation)
        steps = max_steps if max_steps is not None else epochs * math.ceil(dataset_size / whole)
        return cls(whole, micro, num_replicas, accumulation, dataset_size, steps)

    def with_micro_batch_size(self, at_most: int) -> Self:
        """The same global batch in micro-batches of at most so many samples: the largest that divides a replica's."""
        share = self.global_batch_size // self.num_replicas
        micro = max((size for size in self.micro_batch_sizes if size <= at_most), default=1)
        return replace(self, micro_batch_size=micro, gradient_accumulation_steps=share // micro)

    @property
    def micro_batch_sizes(self) -> list[int]:
        """Those that divide a replica's share of the global batch, smallest first."""
        share = self.global_batch_size // self.num_replicas
        return [size for size in range(1, share + 1) if share % size == 0]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data; the last one takes what is left."""
        return math.ceil(self.dataset_size / self.global_batch_size)

    def scaled_lr(self, lr: float, lr_scaling: str, base_batch_size: int) -> float:
        """The learning rate for this global batch: linear (Goyal et al. 2017) or square root (Krizhevsky 2014)."""
        ratio = self.global_batch_size / base_batch_size
        return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[lr_scaling]

    def sentence(self, unit: str = "GPU") -> str:
        """The plan in words; `unit` is what one replica runs on."""
        return (
            f"global batch {self.global_batch_size} = {self.micro_batch_size} per {unit} x "
            f"{counted(self.num_replicas, unit)} x "
            f"{counted(self.gradient_accumulation_steps, 'accumulation step')}; "
            f"{counted(self.dataset_size, 'sample')}, {counted(self.steps_per_epoch, 'step')} an epoch, "
            f"{counted(self.max_steps, 'step')} in all"
        )


def counted(number: int, noun: str) -> str:
    """ "1 step", "1,200 steps", "2 processes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def _nearest(value: int, factor: int) -> str:
    below, above = value // factor * factor, math.ceil(value / factor) * factor
    return f"{below} or {above}" if below else str(above)
