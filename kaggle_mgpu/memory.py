"""What fits into memory: found by trying, remembered beside the checkpoints, and halved where it was too much.

size = largest_that_fits(plan.micro_batch_sizes, fits)   # a few tries: it doubles, then bisects
with as_it_was(model, optimizer): …                      # what was tried leaves no trace
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import files, randomness

FILE = "micro_batch_size.json"
# What libraries below torch say when they, and not its allocator for GPUs, find no memory; the last on a CPU
_SIGNS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


class Attempt:
    """Around what may run out of memory: where it did, it has `failed`, and `instead` was called with the error.

    Nothing is raised then but what `instead` raises; other errors pass.
    """

    def __init__(self, instead: Callable[[BaseException], None]) -> None:
        self.instead, self.failed = instead, False

    def __enter__(self) -> None:
        self.failed = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not out_of_memory(error):
            return False
        self.failed = True
        self.instead(error)
        return True


def none_for_the_optimizer(step: int, newest: str) -> torch.OutOfMemoryError:
    """What ends a run whose optimizer had no memory in its step; `newest` says where the run can go on from."""
    return torch.OutOfMemoryError(
        f"out of memory in the optimizer's part of step {step}, when some weights may have moved and others not: what "
        f"is in memory is not saved. {newest} Smaller micro-batches do not help here. Try strategy='fsdp' on several "
        f"GPUs, which shares weights and optimizer state out (with cpu_offload=True they are in host memory), an "
        f"optimizer that keeps less per weight (Task.optimizer), ema_decay=None, or a smaller model."
    )


def none_for_the_evaluation(step: int, error: str, kept: str) -> torch.OutOfMemoryError:
    """What ends a run that cannot evaluate a single sample; `kept` says where it can go on from."""
    return torch.OutOfMemoryError(
        f"out of memory in the evaluation after step {step}, with one sample at a time: {error} {kept} Try smaller "
        f"samples in val_data, a Task.metrics that needs less, precision='fp16', or a smaller model."
    )


def release() -> None:
    """Give back what a failed attempt held, so that the next one finds one piece."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of some rising sizes that fits, given that whatever is smaller fits too; None if none does.

    >>> largest_that_fits([1, 2, 4, 8, 16, 32], lambda size: size <= 11)
    8
    """
    # From the second on: a normalisation over the batch does not work with one sample, which rarely is the answer.
    good, bad, at = -1, len(sizes), min(1, len(sizes) - 1)
    while at < bad:  # the first half of the way is found by doubling: too large a try is the dearest
        if not fits(sizes[at]):
            bad = at
            break
        good = at
        at = next((i for i in range(at + 1, bad) if sizes[i] >= 2 * sizes[at]), bad)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return sizes[good] if good >= 0 else None


@contextmanager
def as_it_was(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps may be taken inside: weights, buffers, optimizer and random generators are afterwards what they were.

    For an optimizer that has not taken a step yet.
    """
    # frozen weights do not move: on the host, copies of a large model's would be too much
    tensors = [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]
    before = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with randomness.undisturbed():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
            optimizer.state.clear()
            model.zero_grad(set_to_none=True)
            release()


def remember(folder: Path, size: int, why: str, conditions: Mapping[str, Any]) -> None:
    """Note a micro-batch size that fits, and what it was found under."""
    text = json.dumps({"micro_batch_size": size, "why": why, "conditions": conditions}, indent=1)
    files.write_text(folder / FILE, text)


def remembered(folders: Sequence[Path], conditions: Mapping[str, Any]) -> tuple[int, str] | None:
    """The size that the first of some folders knows for exactly these conditions, and why it is that one."""
    for folder in folders:
        try:
            document = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if document["conditions"] == json.loads(json.dumps(conditions)):
                return int(document["micro_batch_size"]), str(document["why"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
