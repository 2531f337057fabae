"""Measure where a run's time goes, and the time to reserve for saving and stopping before a deadline."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WORTH_A_SAVE = 2.0
"""Seconds. The state is saved before a longer evaluation, so that few steps are lost if the evaluation is killed."""


def floor(limit: float, on_kaggle: bool) -> float:
    """Return the least number of seconds to reserve before a time limit of `limit` seconds.

    The notebook's next cells need this time. Kaggle then also converts the notebook to a web page and saves the
    output, 2 min per GB.
    """
    return min(max(0.02 * limit, 180.0 if on_kaggle else 5.0), limit / 2)  # half of a short limit is left for steps


def disk_speed(folder: Path) -> float:
    """Return the write speed of the folder's disk in bytes/s, from trial writes of up to 8 MiB; 50e6 on a full disk."""
    probe, size, took = folder / f".speed-{os.getpid()}", 1 << 18, 0.0
    try:
        with open(probe, "wb", buffering=0) as file:
            while took < 0.05 and size < 1 << 23:
                size *= 2
                start = time.monotonic()
                file.write(bytes(size))
                os.fsync(file.fileno())
                took = time.monotonic() - start
        return size / max(took, 1e-3)
    except OSError:  # usually a full disk
        return 50e6
    finally:
        probe.unlink(missing_ok=True)


class StepTaken(NamedTuple):
    """The times of a training step (batch requested, batch received, step finished; time.monotonic) and its size."""

    requested: float
    arrived: float
    finished: float
    samples: int
    terms: int
    """Terms in the sum of the loss over the global batch; see Task.count."""
    loading: float = 0.0
    """Seconds of loading later batches within this step, while gradients were exchanged."""


class Clock:
    """The total training time, the throughput since the last record, and the times of a step, an evaluation and a save.

    The loop appends each step to the list `taken`, which is cheap. `count` later adds these steps to the totals.

    Args:
        before: seconds that earlier sessions of the run took.
        save: a guess at the seconds of a save, used until a save takes longer.
        weights: a guess at the seconds of writing the weights alone, at the write speed assumed for `save`.
        evaluation: a guess at the seconds of an evaluation, used until an evaluation is measured.
        floor: the least number of seconds to reserve before a deadline.
    """

    def __init__(
        self, before: float = 0.0, *, save: float = 0.0, weights: float = 0.0, evaluation: float = 0.0,
        floor: float = 0.0,
    ) -> None:  # fmt: skip
        self.before, self.began = before, time.monotonic()
        self.taken: list[StepTaken] = []
        self.since = self.counted = self.began
        self.samples = self.terms = self.steps = 0
        self.paused = 0.0
        self.first_step = self.longest_step = 0.0
        self.save, self.evaluation, self.evaluation_guess = save, 0.0, evaluation
        self.save_guess, self.weights_guess, self.floor = save, weights, floor
        self.spent = {"data": 0.0, "evaluation": 0.0, "saving": 0.0}  # since `time_use` was last called
        self.spent_since, self.spent_steps = self.began, 0

    def seconds(self) -> float:
        """Return the training time over all sessions."""
        return self.before + time.monotonic() - self.began

    def count(self) -> None:
        """Count the steps in `taken`. Methods whose result depends on the steps call this first."""
        for step in self.taken:
            took = step.finished - self.counted
            if self.steps == 0:  # imports, compilation and tuning make the first step slower than the others
                self.first_step = took
            else:
                self.longest_step = max(self.longest_step, took)
            self.counted = step.finished
            self.spent["data"] += step.arrived - step.requested + step.loading
            self.samples += step.samples
            self.terms += step.terms
        self.steps += len(self.taken)
        self.spent_steps += len(self.taken)
        self.taken.clear()

    @contextlib.contextmanager
    def pause(self, what: str = "saving") -> Iterator[None]:
        """Measure time spent on `what` ("saving", "evaluation"), and leave this time out of the throughput."""
        self.count()
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.since += took
        self.counted += took
        self.paused += took
        self.spent[what] += took

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure an evaluation, and keep the longest time for `margin`."""
        start = time.monotonic()
        with self.pause("evaluation"):
            yield
        self.evaluation = max(self.evaluation, time.monotonic() - start)

    def saved(self, seconds: float) -> None:
        """Keep the longest duration of a save, from its beginning to the last byte on the disk, or the longer guess."""
        self.save = max(self.save, seconds)

    def outlasts_a_save(self) -> bool:
        """Return whether an evaluation may take longer than a save and than WORTH_A_SAVE; if so, a save comes first."""
        return (self.evaluation or self.evaluation_guess) > max(self.save, WORTH_A_SAVE)

    def throughput(self, unit: str) -> dict[str, float]:
        """Return {"UNIT_per_s": rate} since the last call, of samples or of terms. Wait for the GPU before calling."""
        self.count()
        now = time.monotonic()
        rate = (self.samples if unit == "samples" else self.terms) / max(now - self.since, 1e-9)
        self.since, self.samples, self.terms = now, 0, 0
        return {f"{unit.replace(' ', '_')}_per_s": rate}

    def time_use(self, communication: float | None = None) -> dict[str, float]:
        """Return the seconds since the last call by their use; the parts add up to the whole.

        "data" is the time that this process loaded batches or waited for them (the GPU may have been busy with earlier
        steps), "evaluation" and "saving" are the times of `pause`, "steps" is the rest: forward, backward, optimizer.

        Args:
            communication: seconds per step in which the GPU only exchanges gradients, subtracted from "steps". None:
                unknown, and not subtracted.
        """
        self.count()
        now = time.monotonic()
        steps = max(0.0, now - self.spent_since - sum(self.spent.values()))
        waited = {} if communication is None else {"communication": min(steps, communication * self.spent_steps)}
        found = {**self.spent, "steps": steps - sum(waited.values()), **waited}
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.spent_since, self.spent_steps = now, 0
        return {what: round(seconds, 4) for what, seconds in found.items() if seconds >= 5e-5}

    def margin(self, steps: int, evaluation: bool) -> float:
        """Return the seconds to reserve before a deadline: 1.5 times the remaining work, at least the floor.

        The remaining work is `steps` steps, each as long as the longest step so far, then the longest save, then
        writing the final weights at the speed of that save.

        Args:
            evaluation: whether an evaluation comes next. If so, the longest evaluation so far is added, or the guess
                before the first evaluation.
        """
        self.count()
        step = self.longest_step or self.first_step
        weights = self.weights_guess * (self.save / self.save_guess if self.save_guess else 1.0)
        needed = steps * step + self.save + weights
        if evaluation:
            needed += self.evaluation or self.evaluation_guess + weights  # the best weights are written too
        return max(1.5 * needed, self.floor)

    def left(self, steps: int) -> float | None:
        """Return the seconds for this many steps at the pace of this session; None before its first step."""
        self.count()
        if self.steps == 0:
            return None
        return steps * (self.counted - self.began - self.paused) / self.steps
