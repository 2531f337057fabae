"""Time launch_each with a job on each of two cores against the same jobs one after the other.

    python tools/bench/each.py
    python tools/bench/each.py --rounds 9 --jobs 4

A job trains a small network on one core for a fixed number of steps. A round runs all jobs both ways, the order of the
two changing from round to round; the figure is the median of the rounds' ratios. Two is the limit on two quiet cores;
what else runs on them lowers the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kaggle_mgpu import launch, launch_each


def job(number: int, steps: int) -> float:
    """Train; return the CPU seconds of the training."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(number)
    net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
    adam = torch.optim.AdamW(net.parameters())
    began = time.process_time()
    for _ in range(steps):
        net(torch.randn(256, 256)).square().mean().backward()
        adam.step()
        adam.zero_grad()
    return time.process_time() - began


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def main() -> None:
    """Print the ratio."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--jobs", type=int, default=4)
    options.add_argument("--steps", type=int, default=500)
    given = options.parse_args()
    jobs, steps = range(given.jobs), given.steps
    launch(job, 0, 1, nproc=1)  # starts the server of workers, which both ways use
    ratios, seconds = [], []
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:  # values kept there would spare the jobs
            ways: list[Callable[[], object]] = [
                lambda folder=folder: launch_each(job, jobs, steps, at_once=2, output_dir=folder),  # type: ignore[misc]
                lambda: [launch(job, each, steps, nproc=1) for each in jobs],
            ]
            order = (0, 1) if number % 2 else (1, 0)
            taken = {which: timed(ways[which]) for which in order}
        ratios.append(taken[1] / taken[0])
        seconds.append(taken[1])
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    print(
        f"{given.jobs} jobs, median of {given.rounds}: {statistics.median(seconds):.1f} s one after the other; ", end=""
    )
    print(f"two at a time {statistics.median(ratios):.2f} x as fast ({spread})")


if __name__ == "__main__":
    main()
