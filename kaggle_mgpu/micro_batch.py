"""The micro-batch size of a run: the largest that fits, what an earlier session learned, or half of what was too much.

    plan, because = sizes.settle(plan, auto=True, folders=[checkpoints])   # before the first step
    plan, text = sizes.halve(plan, "in step 7")                            # after one that was out of memory

The global batch stays what it is: what a micro-batch loses, accumulation steps gain.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import data, distributed, memory
from .config import TrainConfig
from .devices import GPU
from .strategy import Strategy

LARGEST = "the largest that fits, with a tenth to spare"
NOT_EVEN_ONE = (
    "out of memory with micro_batch_size 1: not even one sample fits. Try gradient_checkpointing=True, "
    "precision='fp16', shorter or smaller samples, or a smaller model."
)


class MicroBatchSizes:
    """Finds, remembers and halves the micro-batch size, the same on every rank.

    Args:
        folder: where it is remembered.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: data.BatchPlan,
        how: Strategy,
        optimizer: torch.optim.Optimizer,
        fetch: data.Fetch,
        gpus: Sequence[GPU],
        folder: Path,
    ) -> None:
        self.how, self.optimizer, self.fetch, self.folder, self.seed = how, optimizer, fetch, folder, config.seed
        # what a size that fits depends on, beside the model's shapes
        self.about = {
            "devices": [[gpu.name, gpu.memory_bytes] for gpu in gpus[: plan.num_replicas]] or "cpu",
            "global_batch_size": plan.global_batch_size,
            "num_replicas": plan.num_replicas,
            "strategy": how.name,
            "precision": how.precision,
            "compile": config.compile,
            "gradient_checkpointing": config.gradient_checkpointing,
        }

    def settle(self, plan: data.BatchPlan, *, auto: bool, folders: Sequence[Path]) -> tuple[data.BatchPlan, str]:
        """The plan with the size to begin with, and why it is that one: "" where it is as it was given.

        Args:
            auto: find the size, unless one of `folders` knows it; else a smaller one that they know is taken.

        Raises:
            OutOfMemoryError: not even one sample fits.
        """
        known = distributed.from_main(lambda: memory.remembered(folders, self._conditions()))
        if known is not None and (auto or known[0] < plan.micro_batch_size):
            return plan.with_micro_batch_size(known[0]), known[1]
        if not auto:
            return plan, ""
        with memory.as_it_was(self.how.model, self.optimizer):
            size = memory.largest_that_fits(plan.micro_batch_sizes, lambda size: self._fits(plan, size))
        if size is None:
            raise torch.OutOfMemoryError(NOT_EVEN_ONE)
        plan = plan.with_micro_batch_size(size)
        if distributed.is_main():
            self._remember(plan, LARGEST)
        return plan, LARGEST

    def halve(self, plan: data.BatchPlan, when: str) -> tuple[data.BatchPlan, str]:
        """The plan with half the size, which is remembered, and a sentence that says so. Any rank may ask for it.

        Raises:
            OutOfMemoryError: the size was 1.
        """
        before = plan.micro_batch_size
        if before == 1:
            raise torch.OutOfMemoryError(NOT_EVEN_ONE)
        plan = plan.with_micro_batch_size(before // 2)
        # two ranks that write the same at the same time: one finds its file gone, renamed by the other
        with contextlib.suppress(FileNotFoundError):
            self._remember(plan, f"{before} was too much {when}: out of memory")
        return plan, (
            f"out of memory with micro_batch_size {before} {when}: {plan.micro_batch_size} from here on, with "
            f"{plan.gradient_accumulation_steps} accumulation steps, so that the batch stays the same"
        )

    def _fits(self, plan: data.BatchPlan, micro_batch_size: int) -> bool:
        """Whether every rank can take a real step with a micro-batch a tenth larger."""
        size = micro_batch_size + math.ceil(micro_batch_size / 10) if micro_batch_size > 1 else 1
        size *= plan.num_replicas // distributed.world_size()
        failed = False
        try:
            batch = self.fetch[data.Order(plan.dataset_size, self.seed, 0)[:size]]
            self.how.try_step(data.move(batch, self.how.input_device), self.optimizer)
        except RuntimeError as error:
            if not memory.out_of_memory(error):
                raise
            failed = True
        if failed:  # here, where the error no longer holds on to what it was about
            self.how.model.zero_grad(set_to_none=True)
            memory.release()
        return not distributed.agree(failed)

    def _conditions(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in self.how.model.state_dict().items()}
        return {**self.about, "model": shapes}

    def _remember(self, plan: data.BatchPlan, why: str) -> None:
        memory.remember(self.folder, plan.micro_batch_size, why, self._conditions())
