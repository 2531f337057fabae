"""Find, remember and halve the micro-batch size of a run.

The global batch keeps its size: accumulation steps make up for smaller micro-batches. The size is remembered beside the
checkpoints, together with everything that decides whether it fits.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data
from ..checkpoints import files
from ..data import randomness
from ..parallel import distributed
from .out_of_memory import is_out_of_memory, release
from .parts import Parts

FILE = "micro_batch_size.json"
LARGEST = "the largest that fits, with a tenth to spare"
NOT_EVEN_ONE = (
    "out of memory with micro_batch_size 1: not even one sample fits. Try gradient_checkpointing=True, "
    "precision='fp16', shorter or smaller samples, or a smaller model."
)


def settle_micro_batch(parts: Parts, folders: Sequence[Path]) -> Parts:
    """Return the parts with the micro-batch size to start with: found, remembered, or given by the config.

    Args:
        folders: folders that may hold a remembered size; the first size remembered under the same conditions is used. A
            size in the config is replaced only by a smaller remembered size.

    Raises:
        OutOfMemoryError: not even one sample fits.
    """
    if parts.task.whole_batch_loss:  # its loss needs the whole batch in one micro-batch
        return parts
    auto, plan = parts.config.micro_batch_size == "auto", parts.plan
    known = distributed.from_main(lambda: remembered(folders, _conditions(parts)))
    if known is not None and (auto or known[0] < plan.micro_batch_size):
        return replace(parts, plan=plan.with_micro_batch_size(known[0]), micro_batch_reason=known[1])
    if not auto:
        return parts
    if not parts.strategy.computes_alone:  # a failed rank would leave the others waiting in a collective
        return replace(parts, micro_batch_reason="a GPU's whole share; if memory runs out, a restart halves it")
    with unchanged(parts.strategy.model, parts.optimizer):
        size = largest_that_fits(plan.micro_batch_sizes, lambda size: _fits(parts, size))
    if size is None:
        raise torch.OutOfMemoryError(NOT_EVEN_ONE)
    if parts.is_main:
        remember(parts.output_dir / "checkpoints", size, LARGEST, _conditions(parts))
    return replace(parts, plan=plan.with_micro_batch_size(size), micro_batch_reason=LARGEST)


def halve_micro_batch(parts: Parts, when: str) -> tuple[Parts, str]:
    """Return the parts with half the micro-batch size, and a sentence about the change. A rank may call this alone.

    Raises:
        OutOfMemoryError: the size was 1, or the loss is over the whole batch.
    """
    before = parts.plan.micro_batch_size
    if parts.task.whole_batch_loss:
        raise torch.OutOfMemoryError(
            f"out of memory with micro_batch_size {before} {when}. {type(parts.task).__name__}.whole_batch_loss is "
            f"True, so smaller micro-batches would change the loss. Try a smaller global_batch_size, "
            f"gradient_checkpointing=True, precision='fp16', or more GPUs."
        )
    if before == 1:
        raise torch.OutOfMemoryError(NOT_EVEN_ONE)
    plan = parts.plan.with_micro_batch_size(before // 2)
    # if two ranks write at the same time, one may find its temporary file renamed by the other
    with contextlib.suppress(FileNotFoundError):
        why = f"{before} was too much {when}: out of memory"
        remember(parts.output_dir / "checkpoints", plan.micro_batch_size, why, _conditions(parts))
    return replace(parts, plan=plan), (
        f"out of memory with micro_batch_size {before} {when}: {plan.micro_batch_size} from here on, with "
        f"{plan.gradient_accumulation_steps} accumulation steps, so that the batch stays the same"
    )


def _fits(parts: Parts, micro_batch_size: int) -> bool:
    """Return whether every rank can take a real step with a micro-batch a tenth larger, as a safety margin."""
    strategy, plan = parts.strategy, parts.plan
    size = micro_batch_size + math.ceil(micro_batch_size / 10) if micro_batch_size > 1 else 1
    size *= plan.num_replicas // parts.world_size
    failed = False
    try:
        batch = parts.fetch[data.Order(plan.dataset_size, parts.config.seed, 0)[:size]]
        strategy.try_step(data.move(batch, strategy.input_device), parts.optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if failed:
        strategy.model.zero_grad(set_to_none=True)
        release()
    return not distributed.agree(failed)


def _conditions(parts: Parts) -> dict[str, Any]:
    """Return everything on which the fitting size depends."""
    config, plan, strategy = parts.config, parts.plan, parts.strategy
    return {
        "devices": [[gpu.name, gpu.memory_bytes] for gpu in parts.gpus[: plan.num_replicas]] or "cpu",
        "global_batch_size": plan.global_batch_size,
        "num_replicas": plan.num_replicas,
        "strategy": strategy.name,
        "precision": strategy.precision,
        "compile": config.compile,
        "gradient_checkpointing": config.gradient_checkpointing,
        "model": {name: list(tensor.shape) for name, tensor in strategy.model.state_dict().items()},
    }


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest fitting size of an ascending list, or None. All sizes below a fitting size must fit.

    >>> largest_that_fits([1, 2, 4, 8, 16, 32], lambda size: size <= 11)
    8
    """
    # The search begins with the second size: one sample is rarely the answer, and BatchNorm fails with one.
    good, bad, at = -1, len(sizes), min(1, len(sizes) - 1)
    while at < bad:  # doubling comes before bisection, because an attempt with too large a size costs most
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


@contextlib.contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Allow steps inside, then restore weights, buffers, optimizer and random generators.

    The optimizer must not have taken a step before.
    """
    # steps do not change frozen weights; copies of a large frozen model would fill the host's memory
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
    """Write a micro-batch size and its conditions into a folder."""
    text = json.dumps({"micro_batch_size": size, "why": why, "conditions": conditions}, indent=1)
    files.write_text(folder / FILE, text)


def remembered(folders: Sequence[Path], conditions: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the first size, with its reason, that a folder remembers under exactly these conditions."""
    for folder in folders:
        try:
            document = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if document["conditions"] == json.loads(json.dumps(conditions)):
                return int(document["micro_batch_size"]), str(document["why"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
