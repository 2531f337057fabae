"""Keep the records of a run: training steps, evaluations, saves, notes, start and end, with the time of each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data, progress
from ..checkpoints import checkpoint
from ..machine import devices, session
from ..parallel import distributed
from . import divergence
from .clock import Clock, disk_speed, floor
from .parts import Parts
from .task import Result, Task, TrainState

MOST_UNCOUNTED = 1000
"""The largest number of steps between two calls of `Log.step`, which also makes the clock count the steps."""


class Log:
    """Prints strategy, batch and learning rate, then writes the records and keeps the clock. Only rank 0 writes.

    Args:
        lines: further lines to print: how the run was resumed, warnings.
        history: folder of the run from which this run resumes; its records are continued.
        evaluation: a guess at the seconds of an evaluation.
    """

    def __init__(
        self, parts: Parts, state: TrainState, *, lines: Sequence[str] = (), history: Path | None = None,
        evaluation: float = 0.0,
    ) -> None:  # fmt: skip
        config, plan, task = parts.config, parts.plan, parts.task
        self.log_every, self.last = config.log_every, plan.max_steps
        self.has_callback = "on_record" in vars(task) or type(task).on_record is not Task.on_record
        """Whether the task defines on_record, which may end the run."""
        self.next_step = self._step_after(state.step)
        """The number of steps at which `step` must be called."""
        if parts.is_main:
            print("\n".join([parts.header[0], plan.sentence(parts.unit), parts.header[1], *lines]), flush=True)
            document = {**config.to_dict(), "stamp": parts.stamp}
            checkpoint.write_text(parts.output_dir / "config.json", json.dumps(document, indent=1))
            (parts.output_dir / "result.json").unlink(missing_ok=True)  # this run is not finished
        speed = distributed.from_main(lambda: disk_speed(parts.output_dir))
        nbytes = sum(tensor.nbytes for tensor in parts.strategy.described().values())
        limit = math.inf if parts.deadline is None else max(parts.deadline.remaining(), 0.0)
        self.clock = Clock(
            state.seconds, save=4 * nbytes / speed, weights=nbytes / speed, evaluation=min(evaluation, limit / 3),
            floor=0.0 if limit == math.inf else floor(limit, session.on_kaggle()),
        )  # fmt: skip
        device_line = ", ".join([*(gpu.name for gpu in parts.gpus[: plan.num_replicas]), parts.strategy.precision])
        self.progress = progress.Progress(
            parts.output_dir, max_steps=plan.max_steps, main=parts.is_main, resumed_step=state.step,
            evaluated=state.evaluated, unit=task.unit, on_record=task.on_record if self.has_callback else None,
            tensorboard=config.tensorboard, world_size=parts.world_size, history=history,
            device_line=device_line, settings=config.to_dict(), sample=devices.sample if parts.gpus else list,
        )  # fmt: skip
        # progress.attach and the plots read every entry of this record
        record = {"kind": "start", "step": state.step, "samples": state.samples_seen}
        record |= {"world_size": parts.world_size, "replicas": plan.num_replicas, "strategy": parts.strategy.name}
        record |= {"precision": parts.strategy.precision, "micro_batch_size": plan.micro_batch_size}
        record |= {"micro_batch_size_because": parts.micro_batch_reason}
        epochs, steps = divmod(plan.max_steps, plan.steps_per_epoch)
        record |= {"max_steps": plan.max_steps, "epochs": epochs + steps * plan.global_batch_size / plan.dataset_size}
        record |= {"unit": task.unit, "device_line": device_line}
        time_left = None if parts.deadline is None else parts.deadline.remaining()
        self.progress.record({**record, "time": self.clock.seconds(), "time_left": time_left})

    def _step_after(self, step: int) -> int:
        due = 1 if step < 1 else (step // self.log_every + 1) * self.log_every
        return min(due, self.last, step + MOST_UNCOUNTED)

    def note(self, text: str) -> None:
        """Print and record a line of text."""
        self.progress.note(text)

    def step(
        self, parts: Parts, state: TrainState, batch: data.Step, *, losses: list[Tensor], lr: float, norm: Tensor
    ) -> float | None:
        """Record the step just taken, if a record is due; return the step's loss if the run has diverged, else None.

        Only this call waits for the GPU. Every rank must call it after the same steps.
        """
        self.clock.count()
        due = state.step in (1, self.last) or state.step % self.log_every == 0
        self.next_step = self._step_after(state.step)
        in_a_row = parts.strategy.skipped_in_a_row
        if not due and (isinstance(in_a_row, Tensor) or in_a_row == 0):
            return None
        own = torch.stack([loss.double() for loss in losses]).sum(0).cpu().reshape(-1)
        gathered = distributed.all_gather(torch.cat([own, own.new_tensor([batch.own_terms])]))
        ranks = [each.tolist() for each in gathered]
        loss, *loss_parts = [sum(column) / batch.terms() for column in zip(*ranks, strict=True)][:-1]
        if divergence.is_hopeless(state.step, loss, int(in_a_row), parts.strategy.precision):
            return loss
        if due:
            record = {"kind": "train", "step": state.step, "samples": state.samples_seen}
            record["epoch"] = round(state.samples_seen / parts.plan.dataset_size, 4)
            record |= {f"loss_{name}": part for name, part in zip(parts.strategy.part_names, loss_parts, strict=True)}
            if len(ranks) > 1:  # each rank's mean over its own terms
                record |= {f"rank{i}_loss": each[0] / each[-1] for i, each in enumerate(ranks) if each[-1]}
            record |= {"loss": loss, "lr": lr, "grad_norm": float(norm), "skipped": int(parts.strategy.skipped)}
            self.progress.record({**record, **self.clock.throughput(parts.task.unit), **self._times(parts)})
        return None

    def _times(self, parts: Parts) -> dict[str, Any]:
        """Return the run's seconds so far, and the use of the time since the last record."""
        return {"time": self.clock.seconds(), "spent": self.clock.time_use(parts.strategy.communication())}

    def evaluated(self, parts: Parts, state: TrainState) -> None:
        """Record an evaluation."""
        record = {"kind": "eval", "step": state.step, "samples": state.samples_seen}
        record |= {f"val_{name}": value for name, value in state.metrics.items()}
        self.progress.record({**record, **self._times(parts)})

    def saves(self, saves: Sequence[checkpoint.Saved]) -> None:
        """Record checkpoints after their writing has ended or failed."""
        for saved in saves:
            self.clock.saved(saved.seconds)
            if saved.note:
                self.note(saved.note)
            if saved.path is not None:
                times = {"seconds": saved.seconds, "time": self.clock.seconds()}
                self.progress.record({"kind": "save", "step": saved.step, **times})

    def diverged(self, step: int, first: int, samples: list[int]) -> None:
        """Record the samples of the first step whose loss or gradient was not finite."""
        self.progress.record(
            {"kind": "note", "step": step, "text": f"diverged from step {first} on", "indices": samples}
        )

    def close(self, parts: Parts, state: TrainState, result: Result) -> None:
        """Record the end of this session and close the display."""
        record = {"kind": "stop", "step": state.step, "reason": result.reason, "finished": result.finished}
        record |= {"metrics": state.metrics, "seconds": state.seconds}
        self.progress.record({**record, **self._times(parts)})
        self.progress.close(dataclasses.asdict(result))
