"""Warnings about a task before training: the loss is a mean, or methods were edited since the last session.

Neither ends a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data
from ..data import randomness
from .parts import Parts
from .task import Task

A_MEAN = (
    "WARNING: Task.loss looks like a mean over the batch. It should be the SUM over its samples (reduction='sum'): as "
    "it is, the gradient is too small and depends on how the batch is split."
)


def looks_like_a_mean(parts: Parts) -> bool:
    """Return whether the loss of two samples is the mean of their losses and not the sum, a mistake hidden by Adam."""
    strategy, plan = parts.strategy, parts.plan
    samples = min(plan.dataset_size, plan.micro_batch_size)
    if samples < 2 or type(parts.task).count is not Task.count or not strategy.alone:
        return False
    # A compiled model would be compiled for another batch size here, with dynamic shapes, and on rank 0 alone.
    eager = torch.compiler.set_stance("force_eager") if parts.config.compile else contextlib.nullcontext()
    strategy.model.eval()
    try:
        with torch.no_grad(), randomness.undisturbed(), eager:
            batches = (parts.fetch[np.array(rows)] for rows in ([0, 1], [0], [1]))
            both, one, other = (float(strategy.call(data.move(batch, strategy.device))) for batch in batches)
    except Exception:  # the model may not take a single sample
        return False
    finally:
        strategy.model.train()
    total = one + other
    return math.isclose(both, total / 2, rel_tol=1e-3) and not math.isclose(both, total, rel_tol=1e-2)


def code_of(task: Task) -> int:
    """Return a checksum of the code of the task's methods."""
    parts: list[Any] = []

    def add(code: types.CodeType) -> None:
        parts.append((code.co_code, code.co_names, code.co_varnames))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):  # a function within the function
                add(constant)
            else:  # a set's order changes from process to process
                parts.append(sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))

    for kind in type(task).__mro__[: type(task).__mro__.index(Task)]:
        for name, member in sorted(vars(kind).items()):
            if isinstance(member, types.FunctionType):
                parts.append(name)
                add(member.__code__)
    return zlib.crc32(repr(parts).encode())


def code_then(folder: Path) -> int | None:
    """Return the checksum in a run's folder, or None."""
    try:
        code: int | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("code")
        return code
    except (OSError, ValueError, AttributeError):
        return None
