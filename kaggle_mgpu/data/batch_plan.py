"""This module splits a global batch over GPUs and micro-batches and counts a run's steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from ..fields import parse_per_gpu

DEFAULT_GLOBAL_BATCH_SIZE = 32


@dataclass(frozen=True)
class BatchPlan:
    """A BatchPlan holds a run's batch sizes (samples) and number of steps; global = micro x replicas x accumulation.

    A replica is a copy of the model, usually one per GPU; a micro-batch is a replica's samples in one forward pass.
    """

    global_batch_size: int
    micro_batch_size: int
    num_replicas: int
    gradient_accumulation_steps: int
    dataset_size: int
    max_steps: int
    per_gpu: int | None = None
    """N if the config gave "per_gpu:N" in place of a global batch size."""

    @classmethod
    def make(
        cls,
        *,
        dataset_size: int,
        num_replicas: int = 1,
        global_batch_size: int | str | None = None,
        micro_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_at_start: int | None = None,
    ) -> Self:
        """Derive the missing batch sizes and check the given sizes.

        Args:
            global_batch_size: samples, or "per_gpu:64" for 64 times the number of replicas.
            max_steps: the number of optimizer steps, in place of `epochs`.
            batch_at_start: the global batch size with which a "per_gpu:64" run began, perhaps on another number of
                GPUs.

        Raises:
            ValueError: the dataset is empty, the sizes contradict each other, or the replicas cannot share the batch.
        """
        if dataset_size < 1:
            raise ValueError("the training data is empty: train_data() has length 0. Check the path it reads from.")
        micro, accumulation, per_gpu = micro_batch_size, gradient_accumulation_steps, None
        if isinstance(global_batch_size, str):
            per_gpu = parse_per_gpu(global_batch_size)
            batch: int | None = batch_at_start or per_gpu * num_replicas
        else:
            batch = global_batch_size
        if batch is None:
            batch = DEFAULT_GLOBAL_BATCH_SIZE if micro is None else micro * num_replicas * (accumulation or 1)
        # A resumed run keeps its global batch, so the advice must not mention another global_batch_size.
        advice = "" if batch_at_start else "global_batch_size {}, or "
        replicas = f"{num_replicas} {'replica' if num_replicas == 1 else 'replicas'}"
        if micro is not None and accumulation is not None:
            if micro * num_replicas * accumulation != batch:
                raise ValueError(
                    f"the batch sizes do not multiply: micro_batch_size {micro} x {replicas} x "
                    f"gradient_accumulation_steps {accumulation} = {micro * num_replicas * accumulation}, but "
                    f"global_batch_size is {batch}. Leave one of the three out: the other two determine it."
                )
        elif micro is not None:
            if micro > batch:
                raise ValueError(
                    f"micro_batch_size {micro} is larger than global_batch_size {batch}. Expected at most "
                    f"{max(1, batch // num_replicas)} for {replicas}; lower it, or raise global_batch_size."
                )
            if batch % (micro * num_replicas):
                near = _nearest(batch, micro * num_replicas)
                raise ValueError(
                    f"global_batch_size {batch} cannot be made of micro_batch_size {micro} x {replicas} = "
                    f"{micro * num_replicas} samples at a time. Choose {advice.format(near)}another "
                    f"micro_batch_size."
                )
            accumulation = batch // (micro * num_replicas)
        else:
            accumulation = accumulation or 1
            if batch % (num_replicas * accumulation):
                near = _nearest(batch, num_replicas * accumulation)
                raise ValueError(
                    f"global_batch_size {batch} cannot be shared by {replicas} x gradient_accumulation_steps "
                    f"{accumulation}: it is not a multiple of {num_replicas * accumulation}. Choose "
                    f"{advice.format(near)}another number of GPUs."
                )
            micro = batch // (num_replicas * accumulation)
        steps = max_steps if max_steps is not None else epochs * math.ceil(dataset_size / batch)
        plan = cls(batch, micro, num_replicas, accumulation, dataset_size, steps, per_gpu)
        if per_gpu is not None and micro_batch_size is None and gradient_accumulation_steps is None:
            return plan.with_micro_batch_size(per_gpu)  # batch_at_start may exceed per_gpu x num_replicas
        return plan

    def with_micro_batch_size(self, at_most: int) -> Self:
        """Return a plan for the same global batch with the largest possible micro-batches up to `at_most`."""
        share = self.global_batch_size // self.num_replicas
        micro = max((size for size in self.micro_batch_sizes if size <= at_most), default=1)
        return replace(self, micro_batch_size=micro, gradient_accumulation_steps=share // micro)

    def per_process(self, world_size: int) -> int:
        """Return the number of samples that a process computes at a time: a micro-batch for each of its replicas."""
        return self.micro_batch_size * (self.num_replicas // world_size)

    @property
    def micro_batch_sizes(self) -> list[int]:
        """The possible micro-batch sizes: divisors of a replica's share of the global batch, smallest first."""
        share = self.global_batch_size // self.num_replicas
        return [size for size in range(1, share + 1) if share % size == 0]

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps per epoch; the last step takes the remaining samples."""
        return math.ceil(self.dataset_size / self.global_batch_size)

    def scaled_lr(self, lr: float, lr_scaling: str, base_batch_size: int) -> float:
        """Scale `lr` from `base_batch_size` to the global batch: none, linear (Goyal 2017), sqrt (Krizhevsky 2014)."""
        ratio = self.global_batch_size / base_batch_size
        return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[lr_scaling]

    def sentence(self, unit: str = "GPU") -> str:
        """Describe the plan in a sentence; `unit` names the place of one replica: GPU, replica or process."""
        size = f"global batch {self.global_batch_size}"
        if self.per_gpu is not None:
            here = self.per_gpu * self.num_replicas
            was = (
                ""
                if here == self.global_batch_size
                else f" gave {self.global_batch_size} at the start, and would give {here} here"
            )
            size += f" (per_gpu:{self.per_gpu}{was}: the weights depend on the number of GPUs)"
        return (
            f"{size} = {self.micro_batch_size} per {unit} x "
            f"{counted(self.num_replicas, unit)} x "
            f"{counted(self.gradient_accumulation_steps, 'accumulation step')}; "
            f"{counted(self.dataset_size, 'sample')}, {counted(self.steps_per_epoch, 'step')} an epoch, "
            f"{counted(self.max_steps, 'step')} in all"
        )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 step", "1,200 steps", "2 processes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def _nearest(value: int, factor: int) -> str:
    below, above = value // factor * factor, math.ceil(value / factor) * factor
    return f"{below} or {above}" if below else str(above)
