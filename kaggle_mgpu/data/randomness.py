"""Chance as a function of what it is for, (seed, sample of an epoch) or (seed, step on a rank), and of nothing else.

Before a sample is fetched and before a step is computed, Python's, NumPy's and torch's global generators are seeded
for just that. So it does not matter how many loader workers there are, what was evaluated or logged in between, or how
often the run was killed: there is no random state to save, and none to lose. A dataset, a collate function, a model or
a loss that draws from the global generators is repeated exactly without knowing of it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_64 = 2**64 - 1


def key(seed: int, what: str) -> int:
    """A starting point for `seed_for`: another one for each seed and each purpose."""
    return _mix(seed + 0x9E3779B97F4A7C15 * zlib.crc32(what.encode()))


def seed_for(key: int, major: int, minor: int) -> None:
    """Seed the global generators for (epoch, sample) or (step, rank): under 10 µs."""
    value = _mix(key + 0xD1342543DE82EF95 * major + 0xAF251AF3B0F025B5 * minor)
    # not torch.manual_seed: where CUDA sleeps it takes down the stack for later, which costs 80 µs
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        for index, generator in enumerate(torch.cuda.default_generators):
            generator.manual_seed(value + index & _64)  # replicas in one process must not drop out alike
    np.random.seed(value >> 32)
    random.seed(value)


def seed_everything(seed: int) -> None:
    """Seed torch's (CPU and GPU), NumPy's and Python's global random generators, as one seeds a script."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the global generators go on afterwards as if it had not been."""
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
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    value &= _64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64
    return value ^ value >> 31
