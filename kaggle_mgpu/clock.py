"""Where the time of a run goes, and how much of it must be kept back for stopping in good order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

_T = TypeVar("_T")


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
        self.spent = {"data": 0.0, "evaluation": 0.0, "saving": 0.0}  # since it was last asked for
        self.spent_since, self.spent_steps = self.began, 0

    def seconds(self) -> float:
        """Of this run, over all sessions."""
        return self.before + time.monotonic() - self.began

    def next(self, batches: Iterator[_T]) -> _T:
        """The next batch, and how long it was waited for."""
        start = time.monotonic()
        batch = next(batches)
        self.spent["data"] += time.monotonic() - start
        return batch

    @contextlib.contextmanager
    def pause(self, what: str = "saving") -> Iterator[None]:
        """Time spent on something else than steps: it does not count as throughput."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.since += took
        self.counted += took
        self.paused += took
        self.spent[what] += took

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A pause for an evaluation."""
        start = time.monotonic()
        with self.pause("evaluation"):
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
        self.spent_steps += 1
        self.samples += samples
        self.terms += terms

    def throughput(self, unit: str) -> dict[str, float]:
        """Since this was last asked; the GPU has just been waited for, so the time is its time."""
        now = time.monotonic()
        rate = (self.samples if unit == "samples" else self.terms) / max(now - self.since, 1e-9)
        self.since, self.samples, self.terms = now, 0, 0
        return {f"{unit.replace(' ', '_')}_per_s": rate}

    def where(self, communication: float | None = None) -> dict[str, float]:
        """Seconds since this was last asked, by what they went into; they add up to all of them.

        "data" is what this process waited for batches (while a GPU may have been busy with earlier steps),
        "evaluation" and "saving" what training stood still for them, "steps" the rest: forward, backward, optimizer.

        Args:
            communication: seconds of a step in which the GPU does nothing but send gradients, where that is known: it
                is then taken out of "steps".
        """
        now = time.monotonic()
        steps = max(0.0, now - self.spent_since - sum(self.spent.values()))
        waited = {} if communication is None else {"communication": min(steps, communication * self.spent_steps)}
        found = {**self.spent, "steps": steps - sum(waited.values()), **waited}
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.spent_since, self.spent_steps = now, 0
        return {what: round(seconds, 4) for what, seconds in found.items() if seconds >= 5e-5}

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
