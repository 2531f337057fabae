"""Time what a training step of the kit does besides forward, backward and the optimizer, piece by piece.

    python tools/bench/costs.py                 # µs a step in one process and in two, as a table

Each piece is called a thousand times as the loop calls it, in turn with the others; printed are medians of 15 turns. On
a busy machine the columns of two processes show waiting for a core besides. tools/bench/loop.py times whole steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from loop import LOG_EVERY, GPTTask  # first, since it makes the checkout importable

from kaggle_mgpu import TrainConfig, distributed, launch, optim
from kaggle_mgpu.data import randomness
from kaggle_mgpu.parallel.data_parallel import Distributed
from kaggle_mgpu.training import build_parts

CALLS, TURNS = 1000, 15
VOTES_PER_S, STEP_S = 2, 0.004


def pieces() -> dict[str, tuple[Callable[[], object], float]]:
    """Return by name a function, and how often a step calls it. Every rank must call this."""
    world = distributed.world_size()
    with tempfile.TemporaryDirectory() as own:
        settings = TrainConfig(global_batch_size=8 * world, max_steps=100_000, output_dir=distributed.broadcast(own))
        parts = build_parts(settings, GPTTask())
        distributed.barrier()
    strategy, optimizer, batches = parts.strategy, parts.optimizer, parts.batches(0)
    votes, vote_now, stop = distributed.RankVote(), distributed.RankVote(seconds=0.0), threading.Event()
    loss, total = torch.ones((), requires_grad=True), torch.zeros(2, dtype=torch.float64)
    data, batch, start = GPTTask().train_data().tensors, 8, SimpleNamespace(at=0)

    def indexed() -> object:
        start.at = (start.at + batch) % 4000
        rows = torch.arange(start.at, start.at + batch)
        return data[0].index_select(0, rows), data[1].index_select(0, rows)

    def vote() -> object:
        vote_now.vote_next()
        return vote_now.vote(False, False, False, False)

    # a call through the wrapper, with a loss that costs nothing
    strategy.call.loss = lambda model, batch: loss  # type: ignore[assignment]
    found: dict[str, tuple[Callable[[], object], float]] = {
        "the next batch, read in this process": (lambda: next(batches), 1),
        "… of which indexing the tensors": (indexed, -1),
        "random generators seeded": (lambda: randomness.seed_for(parts.rng_key, 1, 0), 1),
        "buffers noted for a step that is undone": (strategy.begin_step, 1),
        "the wrapper of model and loss": (lambda: strategy.call.forward(None), 1),
        "the learning rate written": (lambda: optim.set_lr(optimizer, parts.lr_at(10)), 1),
        "the pulse for the launcher": (distributed.alive, 4),
        "a vote's turn, no vote": (lambda: votes.vote(False, False, False, False), 1),
        "a vote, twice a second": (vote, VOTES_PER_S * STEP_S),
        "the sums of a record": (lambda: distributed.all_gather(total), 1 / LOG_EVERY),
        "a signal asked for": (stop.is_set, 1),
    }
    if isinstance(strategy, Distributed) and (carrier := strategy.carrier) is not None:

        def count() -> None:
            strategy.backward_from(loss * 1, 1.0)
            carrier.grad = None

        found["the count of terms in the gradients"] = (count, 1)
        found["… of which the backward pass"] = (lambda: (loss * 1).backward(), -1)
    return found


def measure() -> dict[str, float]:
    """Return the µs that each piece takes in a step; negative for a part that a loop by hand has too."""
    torch.set_num_threads(1)
    parts, times = pieces(), dict[str, list[float]]()
    for _ in range(TURNS):
        for name, (call, often) in parts.items():
            distributed.barrier()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.setdefault(name, []).append(1e6 * (time.perf_counter() - began) / CALLS * often)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    one, two = (launch(measure, nproc=nproc)[0] for nproc in (1, 2))
    print("| µs a step | one process | two |\n|---|---|---|")
    for name, value in two.items():
        print(
            f"| {name} | {abs(one[name]):.1f} | {abs(value):.1f} |"
            if name in one
            else f"| {name} | | {abs(value):.1f} |"
        )
    print(f"| together | {sum(one.values()):.1f} | {sum(two.values()):.1f} |")


if __name__ == "__main__":
    main()
