"""What a run notices about its task, and says: a loss that is a mean, methods that were edited since.

No more than hints. Neither ends a run, and neither is looked at again once it trains.
"""

from __future__ import annotations

import json
import math
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import data, randomness
from .strategy import Strategy
from .task import Task

A_MEAN = (
    "WARNING: Task.loss looks like a mean over the batch. It should be the SUM over its samples (reduction='sum'): as "
    "it is, the gradient is too small and depends on how the batch is split."
)


def looks_like_a_mean(task: Task, how: Strategy, fetch: data.Fetch, samples: int) -> bool:
    """Whether the loss of two samples is the mean of theirs and not the sum: the usual slip, which Adam hides.

    Args:
        samples: how many the model can be given at a time; with fewer than two there is no telling.
    """
    if samples < 2 or type(task).count is not Task.count:
        return False
    how.model.eval()
    try:
        with torch.no_grad(), randomness.undisturbed():
            batches = (fetch[np.array(rows)] for rows in ([0, 1], [0], [1]))
            both, one, other = (float(how.call(data.move(batch, how.device))) for batch in batches)
    except Exception:  # a model that cannot take a single sample, say: then it is not told
        return False
    finally:
        how.model.train()
    total = one + other
    return math.isclose(both, total / 2, rel_tol=1e-3) and not math.isclose(both, total, rel_tol=1e-2)


def code_of(task: Task) -> int:
    """A checksum of the task's methods, by which a run notices that they were edited."""
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
    """That checksum as the run in a folder has noted it; None where it has not."""
    try:
        code: int | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("code")
        return code
    except (OSError, ValueError, AttributeError):
        return None
