"""This module derives all random numbers from (seed, epoch, sample) or (seed, step, rank) alone.

Python's, NumPy's and torch's global generators are seeded before each sample is fetched and before each step is
computed. Results therefore do not depend on the number of loader workers, on evaluation or logging in between, or on
restarts, and there is no random state to save. Datasets, collate functions, models and losses use the global generators
as usual.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_64 = 2**64 - 1


def key(seed: int, purpose: str) -> int:
    """Return the `rng_key` that `seed_for` takes: a number that differs between seeds and between purposes."""
    return _mix(seed + 0x9E3779B97F4A7C15 * zlib.crc32(purpose.encode()))


def seed_for(rng_key: int, major: int, minor: int) -> None:
    """Seed the global generators for (major, minor), which is (epoch, sample) or (step, rank); takes under 10 µs."""
    value = _mix(rng_key + 0xD1342543DE82EF95 * major + 0xAF251AF3B0F025B5 * minor)
    # not torch.manual_seed, which takes 80 µs while CUDA is not initialized
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        for index, generator in enumerate(torch.cuda.default_generators):
            generator.manual_seed(value + index & _64)  # so that replicas in one process differ in dropout
    np.random.seed(value >> 32)
    random.seed(value)


def seed_everything(seed: int) -> None:
    """Seed the global random generators of torch (CPU and GPU), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the state of all global random generators at the end of a `with` block."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)


def _mix(value: int) -> int:
    """Hash a value with splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    value &= _64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64
    return value ^ value >> 31
