"""The loop: `train(config, task)` takes a task from its seed, or from where it was left, to its last step.

    result = launch(train, TrainConfig(global_batch_size=64, epochs=2), MyTask())  # on every GPU, from a notebook cell
    result = train(config, task)                                                   # in this process

There are no callbacks and no hidden state: what the loop works on is a `run.Run`, set up once; what a resumed run needs
is in `TrainState` and in what `Strategy.full_state` lists. Chance needs no state: it is a function of (seed, step,
rank) and of (seed, epoch, sample).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from . import distributed, lock, optim, randomness
from .config import TrainConfig
from .run import Run
from .task import DivergedError, Result, Task, TrainState, expect

__all__ = ["DivergedError", "Result", "Task", "TrainState", "train"]


@distributed.returns_rank0
def train(config: TrainConfig, task: Task) -> Result:
    """Train `task` as `config` says, from the newest checkpoint of this run or from the start.

    Runs on every rank of a process group, or alone. Returns when the last step is taken, when time_limit comes near, or
    when it is asked to stop (SIGINT, SIGTERM, progress.stop: it finishes the step, saves and returns).

    Raises:
        ValueError: settings that do not fit each other, the data or the machine.
        CheckpointError: the checkpoint found is another run's or another model's.
        DivergedError: the gradient was nan or infinite several steps in a row.
        OutOfMemoryError: not even one sample fits, or the optimizer's own state does not.
        RestartError: a rank among several ran out of memory; the run can go on with smaller micro-batches.
        LockedError: another run trains in output_dir.
    """
    expect(config, task, "train")
    distributed.init()
    with contextlib.ExitStack() as stack:
        # rank 0 holds the folder; where another run has it, all ranks hear so, before anything is made
        distributed.from_main(lambda: stack.enter_context(lock.held(config.output_dir)))
        run = Run(config, task)
        before = run.resume()
        return _loop(run) if before is None else before


def _loop(run: Run) -> Result:
    """From the step where the run is to its last."""
    config, state, how, poll, rank = run.config, run.state, run.strategy, run.poll, distributed.rank()
    chance = randomness.key(config.seed, "step")

    with run.start_log(), run.checkpoints, _stop_requests() as stop_request:
        batches = run.batches()
        while True:
            distributed.alive(state.step)  # so that the launcher can tell a hang, and which rank is behind
            done = state.step >= run.plan.max_steps
            evaluation_due = run.evaluation_is_due(done)
            # each rank has its own clock and its own signals, so these are decided together
            asked = stop_request.is_set() or run.log.stop_requested
            stop, no_time, save = poll(asked, run.out_of_time(evaluation_due), run.save_is_due())
            if evaluation_due and not (stop or no_time):  # else the next session begins with it
                run.evaluate()
            last = done or stop or no_time
            if state.step > run.saved_step and (last or save or _multiple(state.step, config.save_every)):
                run.save()  # copies; the writing goes on behind the next steps
            if last:
                break

            step = run.clock.next(batches)  # this rank's share of one global batch
            randomness.seed_for(chance, state.step, rank)
            how.begin_step()
            losses = []
            with run.attempt:
                for i, batch in enumerate(step.micro_batches):
                    with how.micro_step(sync=i == len(step.micro_batches) - 1):
                        losses.append(how.backward(batch, step.weights[i], step.terms))  # loss sum / terms of all ranks
            if run.attempt.failed:  # out of memory: the same samples again, in smaller micro-batches
                batches = run.batches()
                continue
            lr = run.lr_at(state.step)
            with run.update:  # out of memory in here is the end: some weights may have moved and others not
                optim.set_lr(run.optimizer, lr)
                norm = how.step(run.optimizer, max_norm=config.max_norm)
                if run.ema is not None:
                    run.ema.update(how.model)
            state.step += 1
            state.samples_seen += step.samples
            run.clock.count(step.samples, step.terms())
            run.log_step(losses, step, lr, norm)  # only here does a loss reach Python, every log_every steps

        return run.finish("asked to stop" if stop else "time limit")


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Within it SIGINT and SIGTERM ask for a stop at the next step; a second one acts as it did before."""
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return
    before: dict[int, Any] = {}

    process = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != process:
            return  # a loader process, forked with this handler in place: its parent has heard too
        request.set()
        signal.signal(number, before[number])
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
            print("asked to stop: finishing the step and saving. Ask again to stop at once.", flush=True)

    for wanted in (signal.SIGINT, signal.SIGTERM):
        before[wanted] = signal.signal(wanted, on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
