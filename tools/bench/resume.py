"""Measure the cost of a resume in the middle of the data: the time to the first batches from sample 0 and 10 000 000.

    python tools/bench/resume.py
    python tools/bench/resume.py --workers 2 --peer     # compare with skipping, over a hundredth of the way

The two starts take turns; figures are medians over rounds; read the ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from kaggle_mgpu.data import Batches, BatchPlan, Fetch, Sampler


class Numbers(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def seconds_to_batches(plan: BatchPlan, fetch: Fetch, start: int, workers: int, batches: int) -> float:
    began = time.perf_counter()
    steps: Any = Batches(Sampler(plan, seed=7, samples_seen=start), fetch, workers=workers)
    for _ in range(batches):
        next(steps)
    took = time.perf_counter() - began
    del steps
    return took


def seconds_to_skip(dataset: Numbers, start: int, batch: int, workers: int) -> float:
    began = time.perf_counter()
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)
    next(itertools.islice(iter(loader), start // batch, None))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=20_000_000)
    parser.add_argument("--start", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--peer", action="store_true", help="also time skipping, from --start / 100")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dataset = Numbers(given.size)
    plan = BatchPlan.make(dataset_size=given.size, global_batch_size=given.batch)
    fetch = Fetch(dataset, seed=7)
    times: dict[int, list[float]] = {0: [], given.start - given.start % given.batch: []}
    for turn in range(given.rounds + 1):
        for start, taken in times.items():
            took = seconds_to_batches(plan, fetch, start, given.workers, given.batches)
            if turn:
                taken.append(took)
    for start, taken in times.items():
        took = 1e3 * statistics.median(taken)
        print(f"start at {start:>12,} of {given.size:,}: {took:8.2f} ms to {given.batches} batches")
    zero, middle = times.values()
    ratio = statistics.median(b / a for a, b in zip(zero, middle, strict=True))
    print(f"ratio, median of {given.rounds} pairs: {ratio:.3f} (at most 1.2)")
    if given.peer:
        start = given.start // 100
        took = seconds_to_skip(dataset, start, given.batch, given.workers)
        print(f"skipping {start:,} samples with a DataLoader: {took:.1f} s, so {100 * took:.0f} s to {given.start:,}")


if __name__ == "__main__":
    main()
