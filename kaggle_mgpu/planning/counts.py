"""Count the operations and bytes of a model and its data, in a worker, over a pass of a few samples.

facts = count(config, task, half=True)   # under autocast
facts.memory(samples=32)                 # bytes on one GPU, by their use
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import data
from ..config import TrainConfig
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..training import Parts, Task, build_parts, is_out_of_memory, release


@dataclass(frozen=True)
class Facts:
    """The counts of a model and its data, over a forward and backward pass of a few samples."""

    dataset_size: int
    val_samples: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    operations: float
    """Of forward and backward, per sample."""
    operators: int
    """Launched in forward and backward, whatever the number of samples."""
    fixed_bytes: float
    """Kept for backward, whatever the number of samples: copies of the weights in half precision, say."""
    sample_bytes: float
    """Kept for backward, per sample."""

    def activations(self, samples: int) -> float:
        return self.fixed_bytes + samples * self.sample_bytes

    def memory(self, samples: int, ema: bool = False, shards: int = 1) -> dict[str, float]:
        """Return bytes on one GPU by their use; everything except activations is split over `shards` GPUs."""
        parts = {"weights": float(self.weight_bytes), "gradients": float(self.gradient_bytes)}
        parts |= {"optimizer": float(self.optimizer_bytes)} | ({"averages": float(self.weight_bytes)} if ema else {})
        return {name: nbytes / shards for name, nbytes in parts.items()} | {"activations": self.activations(samples)}


@dataclass(frozen=True)
class Pass:
    """The counts of a forward and backward pass."""

    samples: int
    operations: int
    operators: int
    kept: int
    """Bytes held for backward."""


class Operators(TorchDispatchMode):
    """Counts operators, except views of the same memory."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def count(config: TrainConfig, task: Task, half: bool) -> Facts:
    """Count in a worker, on the first GPU or the CPU.

    Args:
        half: under autocast, in fp16 or bf16, whose sizes are the same.
    """
    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-plan-") as folder:
        quiet = config.replace(
            strategy="single", nproc=1, compile=False, output_dir=folder, resume="never", max_restarts=0,
            global_batch_size=1, micro_batch_size=1, gradient_accumulation_steps=1,
        )  # fmt: skip
        facts: list[Facts] = launch(_count, quiet, task, half, nproc=1, in_worker=True)
    return facts[0]


def _count(config: TrainConfig, task: Task, half: bool) -> Facts:
    """Compare a pass of two samples with a pass of four: the difference is the cost per sample, the rest is fixed."""
    here = devices.precision("auto", devices.gpus() if torch.cuda.is_available() else [])[0]
    # where auto means fp32 (a P100, a CPU), take the 16-bit type that this machine can compute in
    small = here if here != "fp32" else "fp16" if torch.cuda.is_available() else "bf16"
    parts = build_parts(config.replace(precision=small if half else "fp32"), task)
    model, size = parts.strategy.model, parts.plan.dataset_size
    try:
        passes = [_pass(parts, samples) for samples in sorted({min(2, size), min(4, size)})]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        passes = []
    if not passes:
        model.zero_grad(set_to_none=True)
        release()
        passes = [_pass(parts, 1)]
    first, last = passes[0], passes[-1]
    apart = last.samples - first.samples
    per_sample = (last.kept - first.kept) / apart if apart else last.kept / last.samples
    parts.optimizer.step()
    moments = [v for state in parts.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return Facts(
        dataset_size=size,
        val_samples=parts.val_samples,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        gradient_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        optimizer_bytes=sum(tensor.nbytes for tensor in moments),
        operations=last.operations / last.samples,
        operators=last.operators,
        fixed_bytes=max(0.0, last.kept - last.samples * per_sample),
        sample_bytes=max(0.0, per_sample),
    )


def _pass(parts: Parts, samples: int) -> Pass:
    """Run forward and backward of the first samples twice, because the two ways of counting disturb each other."""
    distributed.alive()
    strategy, model = parts.strategy, parts.strategy.model
    order = data.Order(parts.plan.dataset_size, parts.config.seed, 0)[:samples]
    batch = data.move(parts.fetch[order], strategy.input_device)
    # torch counts the operations of plain attention, but none of a CPU's fused kernels
    with FlopCounterMode(display=False) as operations, sdpa_kernel(SDPBackend.MATH):
        strategy.forward(batch).backward()
    model.zero_grad(set_to_none=True)

    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    operators = Operators()
    with operators, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = strategy.forward(batch)
    kept = sum(held.values())
    with operators:
        loss.backward()
    return Pass(samples, operations.get_total_flops(), operators.number, kept)
