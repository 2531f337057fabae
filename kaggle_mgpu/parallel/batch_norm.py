"""BatchNorm layers that take their statistics over the micro-batches of all ranks.

torch's SyncBatchNorm works only on GPUs. It would also include the samples of stand-in batches in the statistics. A
rank without data computes a stand-in batch only because the other ranks wait for the rank's part in each exchange.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import distributed

HALF_TYPES = (torch.float16, torch.bfloat16)


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of a model's BatchNorm layers in training mode."""
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, module in model.named_modules() if isinstance(module, kind) and module.training]


def sync_batch_norms(model: nn.Module) -> None:
    """Let a model's BatchNorm layers take their statistics over all ranks, only in training steps.

    Names, parameters and buffers stay the same, and subclasses of BatchNorm keep their own forward. All ranks must call
    each layer equally often, so a model that skips layers at random must not be synchronised. Pickling a layer gives
    the original class.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, _Synced):
            # decorated only if a model has BatchNorm, since the decorator's import of torch._dynamo takes two seconds
            members = {"forward": torch.compiler.disable(_Synced.forward)}
            module.__class__ = type(type(module).__name__, (_Synced, type(module)), members)


class _Synced(nn.Module):
    """A _Synced is a BatchNorm layer whose calls of torch's batch_norm use the statistics of all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        own: Any = super()
        if isinstance(self, nn.SyncBatchNorm):  # use BatchNorm's forward: SyncBatchNorm's needs a GPU
            own = super(nn.SyncBatchNorm, self)
        with _OverAllRanks() if self.training and distributed.in_step() else contextlib.nullcontext():
            return own.forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = type(self).__bases__[1]  # pickle cannot import this class, made at run time
        return copyreg._reconstructor, (plain, object, None), self.__dict__  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class _OverAllRanks(TorchFunctionMode):
    """Within this mode, torch's batch_norm normalises with the statistics of all ranks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is functional.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do the same as torch's batch_norm, in training with the statistics of all ranks' batches.

    Raises:
        ValueError: all ranks together have a single value per channel.
    """
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    # with statistics in fp32, torch's kernels accept inputs in half precision, but need weights in fp32
    weight, bias = (None if t is None else t.float() if t.dtype in HALF_TYPES else t for t in (weight, bias))
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalise.apply(input, weight, bias, eps)
    output, mean, var, count = found
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            # torch's running variance is the unbiased variance
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return output


class _Normalise(torch.autograd.Function):
    """Normalise with mean and variance of all ranks (combined as in Chan et al. 1979), with the exact gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [dim for dim in range(input.ndim) if dim != 1]
        exact = input.float() if input.dtype in HALF_TYPES else input
        var, mean = torch.var_mean(exact, over, correction=0)
        rows = 0 if distributed.stands_in() else input.numel() // input.shape[1]
        # one collective for mean, variance and count; sums go in the order of ranks, so a resumed run has the same bits
        own = torch.cat([mean, var, mean.new_full((1,), rows)])
        every = torch.stack(distributed.all_gather(own))
        means, variances, counts = every[:, : len(mean)], every[:, len(mean) : -1], every[:, -1:]
        count = counts.sum()
        # `count` is compared only if this rank has too few rows, since the comparison makes the CPU wait for the GPU
        if rows < 2 and count < 2:
            raise ValueError("BatchNorm has one value per channel over all ranks, expected 2 or more in training")
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        output = functional.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps, ctx.stands_in = eps, rows == 0
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight, mean, var, count = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        if not gradient.is_contiguous(memory_format=torch.channels_last):
            gradient = gradient.contiguous()
        # `constant` is the input's gradient with mean and variance taken as constants. `through` is the remaining part,
        # which follows from the gradients of weight and bias, summed over the ranks.
        scale = torch.ones_like(mean) if weight is None else weight  # CUDA's kernel fails without a weight
        constant, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, scale, mean, var, mean, inverse, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack(distributed.all_gather(torch.stack([by_weight, by_bias]))).sum(0)
        if not ctx.stands_in:
            scale = scale * inverse / count
            through = functional.batch_norm(input, mean, var, scale * sums[0], scale * sums[1], False, 0.0, ctx.eps)
            constant = constant - through
        return constant, None if weight is None else by_weight, None if weight is None else by_bias, None
