"""Evaluation over val_data: each sample once over all ranks, in batches that fit into memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..config import TrainConfig
from ..data import randomness
from ..errors import RestartError
from ..machine import devices
from ..parallel import distributed
from .micro_batch import halve_micro_batch
from .out_of_memory import is_out_of_memory, raise_restart, release
from .parts import Parts
from .task import Task, TrainState

T = TypeVar("T")
NO_GRADIENT = "does not require grad"
"""Part of torch's message for a backward pass through a tensor without a gradient."""


class Evaluation:
    """Evaluates a run, and knows when an evaluation is due."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        every = parts.config.eval_every
        self.last = parts.plan.max_steps
        named = {"epoch": parts.plan.steps_per_epoch, "end": self.last, None: self.last}
        self.every = every if isinstance(every, int) else named[every]
        self.rng_key = randomness.key(parts.config.seed, "metrics")
        self.batch_size: int | None = None
        """Samples per batch on each rank, found to fit after an evaluation ran out of memory; None before."""
        self.next_step: float = math.inf
        """The number of steps at which the next evaluation is due."""
        if parts.val_fetch is not None:
            reached = state.step > 0 and (state.step % self.every == 0 or state.step >= self.last)
            due_now = reached and state.evaluated != state.step
            self.next_step = state.step if due_now else self._step_after(state.step)

    def _step_after(self, step: int) -> float:
        return math.inf if step >= self.last else min((step // self.every + 1) * self.every, self.last)

    def trial(self, parts: Parts, state: TrainState) -> float:
        """Evaluate the first micro-batch of val_data, and return the seconds that all of val_data takes at this pace.

        A mistake in the task's metrics then shows before the first step instead of after an epoch. Every rank must
        call this; an error on one rank ends all. Weights, buffers, random generators and `state` stay as they are.

        Raises:
            RuntimeError: a sample of val_data, Task.metrics or Task.summary fails.
            ValueError: the evaluation gives no best_metric.
            Exception: the task has no metrics of its own, and its loss fails.
            RestartError: out of memory where ranks compute together (fsdp, deepspeed).
        """
        if self.next_step == math.inf:
            return 0.0
        assert parts.val_fetch is not None
        fetch, strategy = parts.val_fetch, parts.strategy
        rows = min(parts.plan.per_process(parts.world_size), parts.val_samples)
        buffers = [(buffer, buffer.detach().clone()) for buffer in strategy.model.buffers()]
        began = time.monotonic()
        try:
            with randomness.undisturbed():
                strategy.model.eval()
                batch = _try(parts, "val_data", lambda: data.move(fetch[np.arange(rows)], strategy.input_device))
                randomness.seed_for(self.rng_key, state.step, parts.rank)
                own = _try(parts, "metrics", lambda: _trial_sums(parts, batch))
                pace = time.monotonic() - began
                _try(parts, "metrics", lambda: _expect_room(own or {}, parts.val_samples / rows, parts.world_size))
                sums, gathered = _split_off_rows(own)
                if not parts.is_main:  # all ranks evaluated the same samples: rank 0's rows suffice
                    gathered = {}
                found = distributed.gather(sums)
                if all(part is not None for part in found):  # None: out of memory; `run` will take fewer samples
                    metrics = _try(parts, "summary", lambda: _trial_summary(parts, cast(Any, found), gathered))
                    if metrics is not None:
                        is_best(parts.config, dataclasses.replace(state, metrics=metrics))
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            strategy.model.zero_grad(set_to_none=True)
            strategy.model.train()
        return pace * math.ceil(parts.val_samples / (rows * parts.world_size))

    def run(self, parts: Parts, state: TrainState) -> str:
        """Write the metrics over val_data into `state.metrics`; return a note about memory, or "".

        Every rank must call this. When a batch does not fit into one rank's memory, all ranks start again with half
        the batch size. The result is the same, because sums and counts do not depend on how the data is split.

        Raises:
            OutOfMemoryError: a single sample does not fit; or, where ranks compute together (fsdp, deepspeed), a batch
                does not fit: the other ranks wait inside a collective, and cannot start again.
        """
        first_size = parts.plan.per_process(parts.world_size)
        first_size = min(first_size, self.batch_size or first_size)
        strategy, size = parts.strategy, first_size
        with parts.averaged_weights():
            strategy.sync_buffers()
            strategy.model.eval()
            while True:
                randomness.seed_for(self.rng_key, state.step, parts.rank)
                own, gathered = _split_off_rows(_sums(parts, size))
                sums = distributed.gather(own)
                failed = [text for text in sums if isinstance(text, str)]
                if not failed:
                    break
                if size == 1:
                    raise torch.OutOfMemoryError(failed[0])
                size //= 2
            strategy.model.train()
            state.metrics = _numbers(_merge(parts.task, sums, gathered))
        self.next_step = self._step_after(state.step)
        if size == first_size:
            return ""
        self.batch_size = size
        return (
            f"out of memory in the evaluation after step {state.step} with {first_size} samples at a time: {size} from "
            f"here on, with the same result"
        )


def _trial_sums(parts: Parts, batch: Any) -> dict[str, Any] | None:
    """Return the sums and counts of one batch, or None if this rank has too little memory for the batch."""
    try:
        return parts.strategy.evaluate(iter([batch]))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if not parts.strategy.computes_alone:  # the other ranks wait inside a collective
            _, halved = halve_micro_batch(parts, "in the trial evaluation before training")
            raise_restart(parts.rank, halved, "Nothing has been trained since the newest checkpoint", error)
    release()
    return None


def _numbers(metrics: Any) -> dict[str, float]:
    """Return the result of Task.summary, checked to be {name: number}, since a checkpoint must hold the result.

    Raises:
        TypeError: the result is something else.
    """
    if not isinstance(metrics, dict):
        raise TypeError(f"expected {{name: number}}, got a {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(value, int | float):
            raise TypeError(f"expected {{name: number}}, got a {type(value).__name__} for {name!r}: use float(value)")
    return metrics


def _try(parts: Parts, method: str, action: Callable[[], T]) -> T:
    """Return the action's value; if the action fails on a rank, raise one error on every rank.

    A task without its own metrics is evaluated by its loss. An error in this loss is raised unchanged, by the rank
    where it occurs. If the default summary cannot convert the loss to a number, nothing is raised, because the first
    training step gives a better error.

    Raises:
        RuntimeError: the action failed. The text names the method and the line of the task, and a remedy.
        Exception: the task's loss failed.
    """
    value, failure = None, None
    try:
        value = action()
    except Exception as error:
        if isinstance(error, RestartError) or distributed.lost_a_rank(error):
            raise
        failure = error
    texts = ["" if failure is None else _explained(parts, method, failure)]
    if parts.strategy.computes_alone or method != "metrics":  # else the other ranks may wait inside a collective
        texts = distributed.gather(texts[0])
    kind = type(parts.task)
    by_loss = kind.metrics is Task.metrics and (
        method == "metrics" or (method == "summary" and kind.summary is Task.summary)
    )
    for rank, text in enumerate(texts):
        if text:
            if by_loss and NO_GRADIENT not in text:
                if failure is not None and method == "metrics":
                    raise failure
                continue  # the failed rank raises its own error, which also ends this rank's next collective
            raise RuntimeError(text if parts.world_size == 1 else f"rank {rank}: {text}") from failure
    return cast(T, value)


def _explained(parts: Parts, method: str, error: Exception) -> str:
    """Return the error text: the failed method, the line in the task's code, and a remedy."""
    kind, package = type(parts.task), str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((package, str(Path(torch.__file__).parent)))]
    where = f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    advice = f"Correct {kind.__name__}.{method}, or the model that it calls, and run the same again."
    if method == "metrics" and kind.metrics is Task.metrics:
        advice = f"{kind.__name__} has no own metrics, so the evaluation calls its loss and count: define Task.metrics."
    if NO_GRADIENT in str(error):
        advice += " An evaluation keeps no gradients: use torch.enable_grad() around code that needs a gradient."
    return (
        f"{kind.__name__}.{method} failed in the trial evaluation, on the first samples of val_data: "
        f"{type(error).__name__}: {error}{where}. {advice} No step has been taken yet in this session."
    )


def _sums(parts: Parts, batch_size: int) -> Any:
    """Return this rank's sums and counts, or the text of its out-of-memory error."""
    assert parts.val_fetch is not None
    workers = data.workers_for(
        parts.val_fetch, parts.config.data_workers, devices.cpu_count(), distributed.local_world_size()
    )
    batches = data.evaluation_batches(
        parts.val_fetch, parts.val_samples, batch_size, workers=workers,
        pin_memory=parts.device.type == "cuda", device=parts.strategy.input_device,
    )  # fmt: skip
    try:
        return parts.strategy.evaluate(batches)
    except RuntimeError as error:
        if not (parts.strategy.computes_alone and is_out_of_memory(error)):
            raise
        failure = str(error)
    release()
    return failure


def _split_off_rows(own: Any) -> tuple[Any, dict[str, list[Tensor]]]:
    """Return this rank's sums, with [] for each metric of gathered rows, and these rows by metric name."""
    if not isinstance(own, dict):
        return own, {}
    rows = {name: value for name, value in own.items() if isinstance(value, list)}
    return own | {name: [] for name in rows}, rows


def _trial_summary(parts: Parts, sums: list[Any], gathered: dict[str, list[Tensor]]) -> dict[str, float] | None:
    """Return the task's numbers in the trial; print a note and return None if its summary of gathered rows fails."""
    try:
        return _numbers(_merge(parts.task, sums, gathered))
    except Exception as error:
        if not any(isinstance(value, list) for value in sums[0].values()):
            raise
        if parts.is_main:
            text = f"{type(parts.task).__name__}.summary failed on the first samples of val_data alone"
            print(f"NOTE: {text}; it may succeed with all of val_data: {type(error).__name__}: {error}", flush=True)
        return None


def _expect_room(own: dict[str, Any], batches: float, world_size: int) -> None:
    """Raise MemoryError if this machine cannot hold the gathered rows of `batches` batches like the one in `own`.

    With several ranks, three copies of the rows exist at once (received, sorted, joined), otherwise two.
    """
    nbytes = sum(rows.nbytes for value in own.values() if isinstance(value, list) for rows in value)
    needed, available = int(nbytes * batches * (3 if world_size > 1 else 2)), devices.ram_bytes()
    if needed > available > 0:
        raise MemoryError(
            f"the gathered metrics of all samples need {needed / 2**30:.1f} GiB, but this machine has "
            f"{available / 2**30:.1f} GiB. Gather less per sample: half precision, fewer values, or sums and counts"
        )


def _merge(
    task: Task, sums: list[dict[str, tuple[Tensor, int]]], gathered: dict[str, list[Tensor]]
) -> dict[str, float]:
    """Add up every rank's sums and counts in the order of ranks, and let the task summarise the means.

    Args:
        gathered: this rank's rows by metric name, one tensor for each batch. The ranks take turns in the batches of
            val_data, so the joined rows also alternate between the ranks, batch by batch.
    """
    means: dict[str, Tensor] = {}
    names = dict.fromkeys(name for part in sums for name in part)
    if wanted := [name for name in names if any(isinstance(part.get(name), list) for part in sums)]:
        every = distributed.gather_to_main(gathered)
        for name in wanted if every else ():
            turns = itertools.zip_longest(*(part.get(name, []) for part in every))
            means[name] = torch.cat([rows for turn in turns for rows in turn if rows is not None])
        sums = [{name: part[name] for name in part if name not in wanted} for part in sums]
    for name in [name for name in names if name not in wanted]:
        found = [part[name] for part in sums if name in part]
        total, count = torch.stack([total for total, _ in found]).sum(0), sum(count for _, count in found)
        means[name] = total / count if count else torch.full_like(total, float("nan"))
    return distributed.from_main(lambda: task.summary(means)) if wanted else task.summary(means)


def count_patience(config: TrainConfig, state: TrainState) -> None:
    """Count the evaluations without an improvement of best_metric by more than min_delta. Every rank must call this."""
    value, sign = state.metrics[config.best_metric], 1 if config.best_mode == "min" else -1
    before = state.improved_to
    # written so that nan is no improvement, and any number improves on nan
    if before is None or math.isnan(before) or sign * (before - value) > config.min_delta:
        state.improved_to, state.without_improvement = value, 0
    else:
        state.without_improvement += 1


def out_of_patience(config: TrainConfig, state: TrainState) -> str:
    """Return why the run stops early, or ""."""
    if config.patience is None or state.without_improvement < config.patience:
        return ""
    return (
        f"stopped early: {config.best_metric} has not improved on {state.improved_to:g} in "
        f"{data.counted(state.without_improvement, 'evaluation')}"
    )


def is_best(config: TrainConfig, state: TrainState) -> bool:
    """Return whether the last evaluation's best_metric is the best so far.

    Raises:
        ValueError: the evaluation gave no such metric.
    """
    if config.best_metric not in state.metrics:
        raise ValueError(
            f"best_metric is {config.best_metric!r}, but the evaluation gave {', '.join(state.metrics) or 'nothing'}. "
            f"Set best_metric to one of them, or add it to Task.metrics."
        )
    value = state.metrics[config.best_metric]
    if state.best is None or math.isnan(state.best):  # any number is better than nan
        return True
    return value < state.best if config.best_mode == "min" else value > state.best
