"""The training loop: `train(config, task)` trains a task from its seed, or from a checkpoint, to its last step.

    result = launch(train, TrainConfig(global_batch_size=64, epochs=2), MyTask())  # on every GPU, from a notebook cell
    result = train(config, task)                                                   # in this process

`train` builds the parts of the run and finds its checkpoint. `_loop` repeats `take_step`, and decides when to evaluate,
save and stop. It uses evaluation.py, saving.py, log.py and out_of_memory.py, which do not depend on the loop. A resumed
run needs `TrainState` and the tensors of `Saving.checkpoint_contents`. Random generators have no state to save: they
are seeded from (seed, step, rank) before each step, and from (seed, epoch, sample) before each sample.
"""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import data
from ..checkpoints import checkpoint
from ..config import TrainConfig
from ..data import randomness
from ..errors import DivergedError
from ..launching import lock
from ..parallel import distributed
from . import divergence, optim, out_of_memory, task_checks
from .clock import Clock, StepTaken
from .evaluation import Evaluation, count_patience, is_best, out_of_patience
from .log import Log
from .micro_batch import halve_micro_batch, settle_micro_batch
from .out_of_memory import OptimizerOutOfMemoryError, is_out_of_memory
from .parts import Parts, StepParts, build_parts
from .saving import Saving, finished_result, open_checkpoints, restore, starting_point
from .stop_requests import stop_requests
from .task import Result, Task, TrainState, expect

__all__ = ["DivergedError", "Result", "Task", "TrainState", "train"]


@distributed.returns_rank0
def train(config: TrainConfig, task: Task) -> Result:
    """Train `task` as `config` says, from the newest checkpoint of this run or from the start.

    Every rank of a process group must call this, or one process alone. The call returns after the last step, shortly
    before time_limit, or when asked to stop (SIGINT, SIGTERM, progress.stop). It first finishes and saves the current
    step.

    Raises:
        ValueError: settings that do not fit each other, the data or the machine; the evaluation gives no best_metric.
        RuntimeError: val_data or the task's metrics fail in a trial before the first step.
        CheckpointError: the checkpoint found is another run's or another model's.
        DivergedError: the loss or the gradient is no longer finite.
        OutOfMemoryError: not even one sample fits, or the optimizer's own state does not.
        RestartError: a rank among several ran out of memory; the run can go on with smaller micro-batches.
        LockedError: another run trains in output_dir.
    """
    expect(config, task, "train")
    distributed.init()
    with contextlib.ExitStack() as stack:
        # rank 0 locks the folder before anything is made; if another run holds the lock, every rank raises
        distributed.from_main(lambda: stack.enter_context(lock.held(config.output_dir)))
        parts = build_parts(config, task)
        checkpoints = open_checkpoints(parts)
        start = distributed.from_main(lambda: starting_point(parts, checkpoints))
        if start is not None and (result := finished_result(parts)) is not None:
            return result
        parts = settle_micro_batch(parts, [checkpoints.folder, *([start.parent] if start else [])])
        state, lines = TrainState(), []
        if parts.micro_batch_reason:
            lines.append(f"micro_batch_size {parts.plan.micro_batch_size}: {parts.micro_batch_reason}")
        if start is not None:
            state, resumed = restore(parts, checkpoints, start)
            lines += resumed
        if parts.is_main and state.step == 0:
            lines += task_checks.notes(parts)
        evaluation = Evaluation(parts, state)
        trial = evaluation.trial(parts, state)
        log = Log(parts, state, lines=lines, history=start.parent.parent if start else None, evaluation=trial)
        stack.enter_context(log.progress)
        stack.enter_context(checkpoints)
        imported = start is not None and start.parent != checkpoints.folder
        saving = Saving(parts, checkpoints, state, imported)
        try:
            return _loop(parts, state, evaluation, saving, log)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            state.seconds = log.clock.seconds()
            saving.rescue_before(error, parts, state)
            raise
        finally:
            log.saves(saving.written)  # saves that ended while an error was handled


def _loop(parts: Parts, state: TrainState, evaluation: Evaluation, saving: Saving, log: Log) -> Result:
    """Take the steps from `state` to the last step."""
    clock, ranks, deadline = log.clock, distributed.RankVote(), parts.deadline
    batches, early = parts.batches(state.samples_seen), out_of_patience(parts.config, state)
    with stop_requests() as stop_request:
        while True:
            distributed.alive(state.step)  # lets the launcher detect a hang and find the slowest rank
            done = state.step >= parts.plan.max_steps
            evaluation_due = state.step >= evaluation.next_step
            # a due evaluation or save must wait for the result of a vote of the ranks
            if evaluation_due or state.step >= saving.next_step:
                ranks.vote_next()
            # each rank has its own clock and its own signals, so the ranks decide together
            stop, end, no_time, save = ranks.vote(
                stop_request.is_set() or log.progress.stop_requested,
                log.progress.end_reason != "",
                deadline is not None and deadline.remaining() <= clock.margin(ranks.most_steps, evaluation_due),
                time.monotonic() >= saving.next_time,
            )
            early = early or ("stopped early" if end else "")
            leave = done or stop or no_time or bool(early)
            if evaluation_due and not (stop or no_time):  # else the next session begins with the evaluation
                if state.step > saving.saved_step and distributed.broadcast(clock.outlasts_a_save()):
                    _save(parts, state, saving, clock)
                _evaluate(parts, state, evaluation, saving, log)
                early = early or out_of_patience(parts.config, state)
                leave = leave or bool(early)
                ranks.vote_next(log.has_callback)
            if state.step > saving.saved_step and (leave or save or state.step >= saving.next_step):
                _save(parts, state, saving, clock)
            if leave:
                break

            requested = time.monotonic()
            batch = next(batches)  # this rank's share of one global batch
            arrived = time.monotonic()
            if state.step + 1 == parts.plan.max_steps:
                batch.load_ahead = None  # no further step needs a batch
            try:
                outcome = take_step(parts, batch, state.step)
            except OptimizerOutOfMemoryError as error:  # some weights may have moved, so nothing is saved
                out_of_memory.raise_optimizer_oom(state.step + 1, saving.newest_sentence(parts), error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                parts.strategy.undo_step()  # the weights have not moved yet
                state.seconds = clock.seconds()
                parts, halved = _halve(parts, state, saving, f"in step {state.step + 1}", error)
                if parts.world_size > 1:  # the other ranks wait in a collective until their processes end
                    out_of_memory.raise_restart(parts.rank, halved, saving.rescue_for_restart(parts, state), error)
                outcome = None
            if outcome is None:  # the same samples again, in smaller micro-batches
                log.note(halved)
                out_of_memory.release()
                del batch  # holds the old loader
                batches = parts.batches(state.samples_seen)
                continue
            state.step += 1
            state.samples_seen += batch.samples
            parts.strategy.within = ""  # the update is complete: the weights are those after state.step steps
            loading, now = parts.strategy.seconds_while_waiting, time.monotonic()
            clock.taken.append(StepTaken(requested, arrived, now, batch.samples, batch.terms(), loading))
            if saving.checkpoints.save_ended:
                log.saves(saving.ended(saving.checkpoints.collect()))
            if state.step >= log.next_step or outcome.skipped:
                diverged = log.step(parts, state, batch, losses=outcome.losses, lr=outcome.lr, norm=outcome.norm)
                ranks.vote_next(log.has_callback)
                if diverged is not None:
                    _raise_diverged(parts, state, saving, log, outcome, diverged)
        reason = "asked to stop" if stop else "time limit" if no_time else ""
        return _finish(parts, state, evaluation, saving, log, reason, "" if reason else early)


class StepOutcome(NamedTuple):
    """The result of a training step."""

    losses: list[Tensor]
    """The summed loss of each micro-batch on this rank, still on the device."""
    lr: float
    norm: Tensor
    """The norm of the gradient before clipping."""
    skipped: bool
    """Whether the gradient was not finite; False if only the GPU knows."""


def take_step(parts: StepParts, batch: data.Step, step: int) -> StepOutcome:
    """Compute the gradient of a global batch, clip the gradient, and update the weights.

    Args:
        step: the number of steps taken before. Learning rate and random generators depend on it.

    Raises:
        OptimizerOutOfMemoryError: the update ran out of memory, perhaps after changing some weights.
    """
    strategy = parts.strategy
    randomness.seed_for(parts.rng_key, step, parts.rank)
    strategy.begin_step(batch.next_terms, while_waiting=batch.load_ahead)
    losses, last = [], len(batch.micro_batches) - 1
    for i, micro_batch in enumerate(batch.micro_batches):
        with strategy.micro_step(sync=i == last):
            # the sum of the loss, divided by the number of terms on all ranks
            losses.append(strategy.backward(micro_batch, batch.weights[i], batch.terms))
    lr = parts.lr_at(step)
    strategy.within = "update"
    try:
        optim.set_lr(parts.optimizer, lr)
        norm = strategy.step(parts.optimizer, max_norm=parts.max_norm)
        if parts.ema is not None:
            parts.ema.update(strategy.model)
    except Exception as error:
        if is_out_of_memory(error):
            raise OptimizerOutOfMemoryError(str(error)) from error
        raise
    in_a_row = strategy.skipped_in_a_row
    return StepOutcome(losses, lr, norm, skipped=not isinstance(in_a_row, Tensor) and in_a_row > 0)


def _save(parts: Parts, state: TrainState, saving: Saving, clock: Clock) -> None:
    """Copy the state for a checkpoint; a thread writes the copy during the next steps."""
    with clock.pause():
        state.seconds = clock.seconds()
        saving.save(parts, state)


def _evaluate(parts: Parts, state: TrainState, evaluation: Evaluation, saving: Saving, log: Log) -> None:
    """Evaluate the weights, and keep the best."""
    with log.clock.evaluating():
        try:
            note = evaluation.run(parts, state)
        except Exception as error:  # the weights are unchanged
            if not is_out_of_memory(error):
                raise
            state.seconds = log.clock.seconds()
            if parts.strategy.computes_alone:
                out_of_memory.raise_evaluation_oom(state.step, error, saving.rescue(parts, state))
            parts, halved = _halve(parts, state, saving, f"in the evaluation after step {state.step}", error)
            resume_from = "The newest checkpoint is from before that evaluation"
            out_of_memory.raise_restart(parts.rank, halved, resume_from, error)
        if note:
            log.note(note)
        if is_best(parts.config, state):
            failed = saving.write_weights(parts, parts.output_dir / "best" / "model.safetensors")
            if failed:
                log.note(failed)
            if not distributed.agree(bool(failed)):  # `best` always belongs to the weights in best/
                state.best = state.metrics[parts.config.best_metric]
        if parts.config.patience is not None:
            count_patience(parts.config, state)
        state.evaluated = state.step
    log.evaluated(parts, state)


def _halve(parts: Parts, state: TrainState, saving: Saving, when: str, error: BaseException) -> tuple[Parts, str]:
    """Return the parts with half the micro-batch, and a sentence about the change; at size 1 save and end the run."""
    try:
        return halve_micro_batch(parts, when)
    except torch.OutOfMemoryError as not_even_one:
        raise torch.OutOfMemoryError(f"{not_even_one} {saving.rescue(parts, state)}") from error


def _raise_diverged(
    parts: Parts, state: TrainState, saving: Saving, log: Log, outcome: StepOutcome, loss: float
) -> NoReturn:
    """End a run whose loss or gradient is no longer finite."""
    skipped = int(parts.strategy.skipped_in_a_row)
    first = state.step - max(skipped, 1) + 1
    samples = divergence.samples_of(first, parts.plan, parts.config.seed)
    saving.wait(parts)
    log.diverged(state.step, first, samples)
    distributed.barrier()  # a rank that raised sooner would end rank 0 before its checkpoint and record are written
    good = next((path for path in saving.checkpoints.all() if checkpoint.step_of(path) < first), None)
    raise divergence.diverged_error(
        state.step, first, samples, skipped=skipped, loss=loss, lr=outcome.lr, norm=float(outcome.norm), good=good,
        precision=parts.strategy.precision,
    )  # fmt: skip


def _finish(
    parts: Parts, state: TrainState, evaluation: Evaluation, saving: Saving, log: Log, reason: str, early: str
) -> Result:
    """Write the final weights and result.json, and return the result of the run so far."""
    state.seconds = log.clock.seconds()
    remaining = parts.plan.max_steps - state.step
    finished = remaining <= 0 and state.step < evaluation.next_step
    early = "" if finished else early  # a run that took its last step did not stop early
    if finished or early:
        given = f": {log.progress.end_reason}" if log.progress.end_reason else ""
        finished, remaining, reason = True, 0, f"{early}{given}" if early else "finished"
    if (note := _last_save(parts, state, saving, log, finished)) and not finished:
        reason += f"; {note}"
    strategy = parts.strategy
    result = Result(
        output_dir=str(parts.output_dir), finished=finished, reason=reason, step=state.step,
        max_steps=parts.plan.max_steps, samples_seen=state.samples_seen, metrics=state.metrics, best=state.best,
        seconds=state.seconds, world_size=parts.world_size, strategy=strategy.name, precision=strategy.precision,
        skipped_steps=int(strategy.skipped), stopped_early=bool(early), remaining_steps=remaining,
        remaining_seconds=log.clock.left(remaining),
    )  # fmt: skip
    if note := saving.write_result(parts, result):
        log.note(note)
    log.close(parts, state, result)
    distributed.barrier()  # no rank returns before the files are written
    return result


def _last_save(parts: Parts, state: TrainState, saving: Saving, log: Log, finished: bool) -> str:
    """Wait for the last save, and save again if it failed; return why there is no checkpoint of this step, or "".

    Every rank must call this.

    Raises:
        OSError: several saves in a row failed, and the run is not finished. A finished run needs only its weights.
    """
    while True:
        note, again = "", False
        error: OSError | None = None
        if parts.is_main:
            try:
                log.saves(saves := saving.checkpoints.wait())
                again = saving.checkpoints.may_try_again
                note = saves[-1].note if any(saved.path is None for saved in saves) else ""
            except OSError as failed:
                note, error = str(failed), failed
        if not distributed.agree(again):
            break
        _save(parts, state, saving, log.clock)
    if error is not None:
        if not finished:
            raise error
        log.note(note)
    return note
