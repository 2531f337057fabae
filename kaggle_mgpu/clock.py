"""Where the time of a run goes, and how much of it must be kept back for stopping in good order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Training time in all, throughput since the last record, and how long a step, an evaluation and a save take.

    Args:
        before: seconds that earlier sessions of the run took.
        save: a guess at a save, until one has been measured.
        evaluation: how many steps an evaluation is worth, until one has been measured.
    """

    def __init__(self, before: float = 0.0, *, save: float = 0.0, evaluation: float = 0.0) -> None:
        self.before, self.began = before, time.monotonic()
        self.since = self.counted = self.began
        self.samples = self.terms = self.steps = 0
        self.paused = 0.0
        self.first_step = self.longest_step = 0.0
        self.save, self.evaluation, self.evaluation_in_steps = save, 0.0, evaluation

    def seconds(self) -> float:
        """Of this run, over all sessions."""
        return self.before + time.monotonic() - self.began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent on something else than steps: it does not count as throughput."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.since += took
        self.counted += took
        self.paused += took

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A pause for an evaluation."""
        start = time.monotonic()
        with self.pause():
            yield
        self.evaluation = max(self.evaluation, time.monotonic() - start)

    def saved(self, seconds: float) -> None:
        """A save took so long, from its beginning to the last byte on the disk."""
        self.save = max(self.save, seconds)

    def count(self, samples: int, terms: int) -> None:
        """One step is taken."""
        now = time.monotonic()
        if self.steps == 0:  # imports, compiles and tunes: the others are not like it
            self.first_step = now - self.counted
        else:
            self.longest_step = max(self.longest_step, now - self.counted)
        self.counted = now
        self.steps += 1
        self.samples += samples
        self.terms += terms

    def throughput(self, unit: str) -> dict[str, float]:
        """Since this was last asked; the GPU has just been waited for, so the time is its time."""
        now = time.monotonic()
        rate = (self.samples if unit == "samples" else self.terms) / max(now - self.since, 1e-9)
        self.since, self.samples, self.terms = now, 0, 0
        return {f"{unit.replace(' ', '_')}_per_s": rate}

    def margin(self, steps: int, evaluation: bool) -> float:
        """Seconds to keep back before a deadline: half as much again as `steps` steps and a save took at their longest.

        And as an evaluation did, where one comes next.
        """
        step = self.longest_step or self.first_step
        needed = steps * step + self.save
        if evaluation:
            needed += self.evaluation or self.evaluation_in_steps * step
        return 1.5 * needed

    def left(self, steps: int) -> float | None:
        """Seconds that so many steps will take, at the pace of this session; None before its first."""
        if self.steps == 0:
            return None
        return steps * (self.counted - self.began - self.paused) / self.steps
