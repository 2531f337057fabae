"""Recognise an out-of-memory error, and end a run after such an error with advice.

A single process halves the micro-batch and tries the same samples again. With several ranks, the others wait in
a collective that never completes, so the run starts again in fresh processes. loop.py decides between the two.
"""

from __future__ import annotations

import gc
from typing import NoReturn

import torch

from ..errors import RestartError

# Messages of GPU libraries that allocate without torch; the last message is for the CPU. If cuBLAS cannot make its
# handle, or cuDNN finds no engine, the cause is most often a lack of memory.
_SIGNS = (
    *("CUDA error: out of memory", "CUDA driver error: out of memory", "Cuda failure 2 'out of memory'"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("unable to find an engine to execute this computation", "Triton Error [CUDA]: out of memory"),
    "DefaultCPUAllocator: can't allocate memory",
)


class OptimizerOutOfMemoryError(torch.OutOfMemoryError):
    """The optimizer ran out of memory, perhaps after changing some of the weights."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means a device without free memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Return cached memory to the device, so that the next attempt finds a large contiguous block.

    Call this outside the `except` clause: inside, the error still refers to the failed step's tensors.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def raise_restart(rank: int, halved: str, resume_from: str, error: BaseException) -> NoReturn:
    """Raise RestartError, after which `launch` starts the run again in fresh processes with half the micro-batch.

    Args:
        halved: the sentence that `halve_micro_batch` returned.
        resume_from: a sentence about the newest checkpoint, without a full stop.
    """
    raise RestartError(
        f"rank {rank} ran {halved}. {resume_from}: run the same again and it goes on from there."
    ) from error


def raise_optimizer_oom(step: int, resume_from: str, error: BaseException) -> NoReturn:
    """Raise OutOfMemoryError after the optimizer ran out of memory and may have changed a part of the weights."""
    raise torch.OutOfMemoryError(
        f"out of memory in the optimizer's part of step {step}. Some weights may have been updated and others not, so "
        f"the state in memory is not saved. {resume_from} Smaller micro-batches do not help here. Try strategy='fsdp', "
        f"which distributes weights and optimizer state over several GPUs (with cpu_offload=True they are in host "
        f"memory), an optimizer that keeps less per weight (Task.optimizer), ema_decay=None, or a smaller model."
    ) from error


def raise_evaluation_oom(step: int, error: BaseException, resume_from: str) -> NoReturn:
    """Raise OutOfMemoryError when there is too little memory to evaluate a single sample."""
    raise torch.OutOfMemoryError(
        f"out of memory in the evaluation after step {step}, with one sample at a time: {error} {resume_from} Try "
        f"smaller samples in val_data, a Task.metrics that needs less, precision='fp16', or a smaller model."
    ) from error
