"""Count the operations and bytes that training a model takes, if possible from the shapes of tensors alone.

(facts,) = count_all([(config, task, True)])   # True: count as under a GPU's autocast
facts.memory(samples=32)                 # bytes on one GPU, by their use

The forward and backward passes run on torch's fake tensors, which have shapes and no data: a U-Net on cubes of 128^3
voxels is counted in seconds. A loss that reads values (`.item()`, numpy) fails on fake tensors; then the passes run on
real tensors. One step of the optimizer always runs on real tensors.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .. import data
from ..config import TrainConfig
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..training import Parts, Task, build_parts, count_parameters, is_out_of_memory, release


@dataclass(frozen=True)
class Facts:
    """The sizes of a run's data and model, and the cost of a forward and backward pass."""

    dataset_size: int
    val_samples: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    operations: float
    """Floating-point operations of forward and backward, per sample."""
    operators: int
    """Operators launched in forward and backward, independent of the number of samples."""
    fixed_bytes: float
    """Bytes kept for backward whatever the number of samples, such as half-precision copies of the weights."""
    sample_bytes: float
    """Bytes kept for backward, per sample."""

    def activations(self, samples: int) -> float:
        return self.fixed_bytes + samples * self.sample_bytes

    def memory(self, samples: int, ema: bool = False, shards: int = 1) -> dict[str, float]:
        """Return the bytes on one GPU by their use, for a micro-batch of `samples` samples.

        With `ema`, averaged weights are included. All except the activations are split over `shards` GPUs.
        """
        parts = {"weights": float(self.weight_bytes), "gradients": float(self.gradient_bytes)}
        parts |= {"optimizer": float(self.optimizer_bytes)} | ({"averages": float(self.weight_bytes)} if ema else {})
        return {name: nbytes / shards for name, nbytes in parts.items()} | {"activations": self.activations(samples)}


@dataclass(frozen=True)
class Pass:
    """The counts of a forward and backward pass."""

    samples: int
    operations: int
    operators: int
    saved_bytes: int
    """Bytes held for backward."""


class Operators(TorchDispatchMode):
    """Counts operators, except views of the same memory."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view and func.namespace != "prim"  # prim: queries such as a fake tensor's device
        return func(*args, **(kwargs or {}))


FP32_ON_CUDA = frozenset(
    "binary_cross_entropy_with_logits cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum exp expm1 "
    "group_norm huber_loss interpolate kl_div l1_loss layer_norm log log10 log1p log2 log_softmax logsumexp mse_loss "
    "nll_loss norm pow prod reciprocal rms_norm rsqrt smooth_l1_loss soft_margin_loss softmax softmin softplus sum "
    "__pow__ __rpow__ __rtruediv__".split()
)
"""Functions that CUDA's autocast always computes in fp32, and a CPU's autocast does not. The names are from the
documentation of torch.amp, without functions that models hardly use."""


class CudaAutocast(TorchFunctionMode):
    """Under a CPU's autocast, compute the functions of FP32_ON_CUDA in fp32, as a GPU's autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = [_as_fp32(value) for value in args]
            kwargs = {name: _as_fp32(value) for name, value in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _as_fp32(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def count_all(runs: Sequence[tuple[TrainConfig, Task, bool]], *, on_cpu: bool = False) -> list[Facts]:
    """Count runs in a worker, in turn, and return the counts in the same order.

    Args:
        runs: config, task, and whether to count under 16-bit autocast (fp16 and bf16 have the same sizes).
        on_cpu: whether the planned runs are on a CPU; a CPU's autocast uses 16 bits in other layers than a GPU's.
    """
    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-plan-") as folder:
        alone = {"strategy": "single", "nproc": 1, "compile": False, "resume": "never", "max_restarts": 0}
        alone |= {"global_batch_size": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
        quiet = [(config.replace(output_dir=folder, **alone), task, half) for config, task, half in runs]
        facts: list[list[Facts]] = launch(_count_each, quiet, on_cpu, nproc=1, in_worker=True)
    return facts[0]


def _count_each(runs: Sequence[tuple[TrainConfig, Task, bool]], on_cpu: bool) -> list[Facts]:
    return [_count(config, task, half, on_cpu) for config, task, half in runs]


def _count(config: TrainConfig, task: Task, half: bool, on_cpu: bool) -> Facts:
    """Count a pass of four samples and the kept bytes of two; the difference gives the kept bytes per sample."""
    here = devices.precision("auto", devices.gpus() if torch.cuda.is_available() else [])[0]
    # if "auto" is fp32 here (a CPU, a GPU before sm_70), count with the 16-bit type that the device can compute
    small = here if here != "fp32" else "fp16" if torch.cuda.is_available() else "bf16"
    parts = build_parts(config.replace(precision=small if half else "fp32"), task)
    model, size = parts.strategy.model, parts.plan.dataset_size
    autocast = CudaAutocast() if not on_cpu and parts.strategy.device.type == "cpu" else contextlib.nullcontext()
    try:
        with autocast, shapes_only(model) as fake:
            counted = _counted(parts, size, fake)
    except Exception:  # a loss that reads values; any other error is raised again below
        counted = None
    if counted is None:
        with autocast:
            counted = _counted_with_data(parts, model, size)
    last, samples, saved_bytes = counted
    per_sample = (last.saved_bytes - saved_bytes) / (last.samples - samples)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    parts.optimizer.step()
    moments = [v for state in parts.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return Facts(
        dataset_size=size,
        val_samples=parts.val_samples,
        parameters=count_parameters(model),
        weight_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        gradient_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        optimizer_bytes=sum(tensor.nbytes for tensor in moments),
        operations=last.operations / last.samples,
        operators=last.operators,
        fixed_bytes=max(0.0, last.saved_bytes - last.samples * per_sample),
        sample_bytes=max(0.0, per_sample),
    )


@contextlib.contextmanager
def shapes_only(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Replace the model's weights within a `with` block by tensors that have shapes and no data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    own: list[tuple[Any, str, torch.Tensor]] = []
    try:
        for module in model.modules():
            groups: list[Any] = [module._parameters, module._buffers]
            for tensors in groups:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        own.append((tensors, name, tensor))
                        tensors[name] = fake.from_tensor(tensor)
        yield fake
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


def _counted(parts: Parts, size: int, fake: FakeTensorMode | None = None) -> tuple[Pass, int, int]:
    """Count a pass of up to four samples, and the kept bytes of a forward pass of two samples.

    Return the pass, the samples of the second pass (2), and its kept bytes. Both are 0 for a dataset of 1 or 2 samples.
    """
    samples, fewer = min(4, size), 2 if size > 2 else 0
    saved_bytes = 0
    if fewer:
        batch = _batch(parts, fewer, fake)
        with fake or contextlib.nullcontext():
            saved_bytes = _forward(parts, batch)[1]
    return _pass(parts, samples, fake), fewer, saved_bytes


def _counted_with_data(parts: Parts, model: nn.Module, size: int) -> tuple[Pass, int, int]:
    """Count as `_counted` does, with real tensors; with one sample if memory does not suffice for more."""
    try:
        return _counted(parts, size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # outside the except block, since the error holds on to the tensors that did not fit
    model.zero_grad(set_to_none=True)
    release()
    return _pass(parts, 1), 0, 0


def _batch(parts: Parts, samples: int, fake: FakeTensorMode | None) -> Any:
    """Return a batch of the first samples on the device; with `fake`, made of fake tensors."""
    order = data.Order(parts.plan.dataset_size, parts.config.seed, 0)[:samples]
    batch = data.move(parts.fetch[order], parts.strategy.input_device)
    return batch if fake is None else tree_map_only(torch.Tensor, fake.from_tensor, batch)


def _forward(parts: Parts, batch: Any) -> tuple[torch.Tensor, int]:
    """Run forward; return the loss and the bytes held for backward."""
    model = parts.strategy.model
    weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address could be given to a new storage

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = parts.strategy.forward(batch)
    return loss, sum(saved.values())


def _pass(parts: Parts, samples: int, fake: FakeTensorMode | None = None) -> Pass:
    """Run forward and backward once for each counter, since the counters (operations, operators) disturb each other."""
    distributed.alive()
    strategy, model, batch = parts.strategy, parts.strategy.model, _batch(parts, samples, fake)
    without_values = fake or contextlib.nullcontext()
    # FlopCounterMode counts plain (math) attention, but not the fused attention kernels of a CPU
    with without_values, FlopCounterMode(display=False) as operations, sdpa_kernel(SDPBackend.MATH):
        strategy.forward(batch).backward()
    model.zero_grad(set_to_none=True)

    operators = Operators()
    with without_values, operators:
        loss, saved_bytes = _forward(parts, batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return Pass(samples, operations.get_total_flops(), operators.number, saved_bytes)
