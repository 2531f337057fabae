"""Decide for a loop when to save and when to stop; seed its random generators; record and show its steps."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from .. import progress, training
from ..checkpoints import write_text
from ..data import randomness
from ..fields import parse_duration
from ..launching import lock
from ..machine import devices, session
from ..parallel import distributed

HOLDERS = ("base_dataloader", "_dataloader")
"""Attributes in which accelerate's and Fabric's loaders hold the DataLoader that reads the data."""
MOST_WITHOUT_A_STEP = 256
"""`batches` raises an error if an epoch ends at least this many batches after the last call of `after_step`."""


class Session:
    """A Session tells a loop when to save and stop, seeds it, and records its steps. All ranks make the same calls.

    Args:
        output_dir: the run's folder, for metrics.jsonl and result.json; locked while the run lasts.
        max_steps: optimizer steps of the run.
        step: optimizer steps of earlier sessions.
        seed: of the run, for the random generators.
        time_limit: "11h30m", or seconds; the end of Kaggle's session is a limit too.
        save_every: time between two saves, "15m" or seconds; None: save only before the end.
        nbytes: bytes of a checkpoint, to estimate the duration of the first save.
        history: folder of the run to continue, if not output_dir.
        unit: what `after_step` gets as `samples`: "samples" or "steps"; the throughput is recorded as UNIT_per_s.
        position: where `batches` begins: (epoch, number of batches of this epoch that are done already).

    Raises:
        ValueError: time_limit or save_every is not a duration.
        LockedError: another run has the folder.
    """

    def __init__(
        self, output_dir: str | Path, *, max_steps: int, step: int = 0, seed: int = 0,
        time_limit: str | float | None = None, save_every: str | float | None = "15m", nbytes: int = 0,
        history: Path | None = None, unit: str = "samples", position: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        folder = self.output_dir = Path(output_dir)
        self.max_steps, self.step, self.unit, self.reason, self.position = max_steps, step, unit, "", position
        self.metrics: dict[str, Any] = {}
        self.leaving = False
        """Whether the ranks have agreed to stop."""
        self._stack, self._vote = contextlib.ExitStack(), distributed.RankVote()
        self._rank, self._key = distributed.rank(), randomness.key(seed, "step")
        limit = min(math.inf if time_limit is None else parse_duration(time_limit), session.time_left())
        self._deadline = session.Deadline(None if limit == math.inf else limit)
        self._pause = math.inf if save_every is None else parse_duration(save_every)
        distributed.from_main(lambda: self._stack.enter_context(lock.held(folder)))
        speed = distributed.from_main(lambda: training.disk_speed(folder))
        earlier = [r.get("time") or 0.0 for r in progress.read(history or folder) if r["step"] <= step]
        floor = 0.0 if limit == math.inf else training.floor(limit, session.on_kaggle())
        self.clock = training.Clock(max(earlier, default=0.0) if step else 0.0, save=nbytes / speed, floor=floor)
        cuda = torch.cuda.is_available()
        names = ", ".join(gpu.name for gpu in devices.gpus()) if cuda and self._rank == 0 else "CPU"
        self.progress = progress.Progress(
            folder, max_steps=max_steps, main=self._rank == 0, resumed_step=step, unit=unit, history=history,
            world_size=distributed.world_size(), device_line=names, sample=devices.sample if cuda else list,
        )  # fmt: skip
        self._stack.enter_context(self.progress)
        start = {"max_steps": max_steps, "unit": unit, "device_line": names, "world_size": distributed.world_size()}
        self.record("start", **start, time_left=None if limit == math.inf else limit)
        if step >= max_steps:
            self.progress.note(f"already finished after {step} steps: the loop's body does not run again")
        self._stop = self._stack.enter_context(training.stop_requests())
        self._last_step_at, self._since_step = time.monotonic(), 0
        self._next_save = self._last_step_at + self._pause

    def seed(self, number: int, epoch: int = 0) -> None:
        """Seed all random generators of this rank from (seed, epoch, number, rank).

        Args:
            number: the number of the batch in the epoch; if `epoch` is always 0, of the batch or step in the run.
        """
        randomness.seed_for(self._key, (epoch << 32) + number, self._rank)

    def batches(self, passes: Callable[[int, int], Iterable[Any]]) -> Iterator[Any]:
        """Yield batches, epoch after epoch, from the run's position until the run ends or must stop; seed each.

        Args:
            passes: a function of (epoch, skip) that returns an epoch's batches without the first `skip`.

        Raises:
            ValueError: an epoch has no batch, or the loop never calls `after_step`.
        """
        epoch, skip = self.position
        while not self.over:
            number = skip - 1
            for number, batch in enumerate(passes(epoch, skip), skip):
                self._since_step += 1
                self.position = epoch, number + 1
                self.seed(number, epoch)
                yield batch
                if self.over:
                    return
            if number < 0:
                raise ValueError("batches: the loader has no batch, since its data is empty, or smaller than a batch")
            if self._since_step >= MOST_WITHOUT_A_STEP:
                raise ValueError(
                    f"batches: the data has ended, after {self._since_step} batches without a call of step(). step() "
                    f"counts the steps, so the loop would never end. Call step(loss) after each optimizer.step()."
                )
            epoch, skip = epoch + 1, 0
            self.position = epoch, 0

    def after_step(self, step: int, samples: int = 0) -> tuple[bool, bool]:
        """Count an optimizer step; return (whether to stop now, whether to save); every stop comes with a save.

        All ranks get the same answers.

        Args:
            step: optimizer steps taken so far in the run.
            samples: number of units (see `unit`) in this step.
        """
        now, self.step, self._since_step = time.monotonic(), step, 0
        self.clock.taken.append(training.StepTaken(self._last_step_at, self._last_step_at, now, samples, samples))
        self._last_step_at = now
        distributed.alive(step)
        if not self.leaving:
            stop, no_time, save = self._vote.vote(
                self._stop.is_set() or self.progress.stop_requested,
                self._deadline.remaining() <= self.clock.margin(self._vote.most_steps, False),
                now >= self._next_save,
            )
            self.leaving = stop or no_time
            self.reason = "asked to stop" if stop else "time limit" if no_time else ""
            return self.leaving, self.leaving or save
        return True, True

    @property
    def over(self) -> bool:
        """Whether to leave the loop: the ranks have agreed to stop, or all steps are taken."""
        return self.leaving or self.step >= self.max_steps

    def train_step(self, step: int, log_every: int, values: Mapping[str, Any] | None) -> bool:
        """Count an optimizer step, and record the step when a record is due; return whether to save.

        Args:
            log_every: steps between two records.
            values: numbers or 0-d tensors of this rank, read on rank 0 alone. None: record nothing.
        """
        _, save = self.after_step(step, 1)
        due = step in (1, self.max_steps) or step % log_every == 0
        if due and values is not None and self._rank == 0:
            plain = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            self.record("train", **{name: float(value) for name, value in plain.items()})
        return save

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Measure and record the duration of the save made in the `with` block."""
        began = time.monotonic()
        distributed.saving(True)
        with self.clock.pause():
            yield
        distributed.saving(False)
        self.saved(step, time.monotonic() - began)

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep_last: int, **facts: Any) -> Iterator[Path]:
        """Yield a temporary folder for a checkpoint, and rename the folder to step-N when all ranks have written.

        Args:
            keep_last: number of checkpoints to keep, the newest.
            facts: further values for state.json.
        """
        folder = self.output_dir / "checkpoints"
        final = folder / f"step-{step:08d}"
        temporary = folder / f".writing-{final.name}"
        with self.saving(step):
            distributed.from_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            yield temporary
            distributed.barrier()
            if self._rank == 0:
                write_text(temporary / "state.json", json.dumps({"step": step, **facts}))
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                for old in sorted(folder.glob("step-*"))[:-keep_last]:
                    shutil.rmtree(old)

    def saved(self, step: int, seconds: float) -> None:
        """Record a save that took `seconds`; the time until the next save starts now."""
        self.clock.saved(seconds)
        self._next_save = time.monotonic() + self._pause
        self.progress.record({"kind": "save", "step": step, "seconds": seconds, "time": self.clock.seconds()})

    def record(self, kind: str, **values: Any) -> None:
        """Write a "start", "train", "eval" or "stop" record of values, with the step and the run's seconds of training.

        A "train" record also gets the throughput. The values of the last "eval" become the metrics in result.json.
        """
        if kind == "train":
            values = {**values, **self.clock.throughput(self.unit)}
        if kind == "eval":
            self.metrics = values
        self.progress.record({"kind": kind, "step": self.step, **values, "time": self.clock.seconds()})

    def close(self, error: BaseException | None = None) -> bool:
        """Unlock the folder, and without an error write result.json; return whether the run is finished."""
        finished = error is None and self.step >= self.max_steps
        reason = "finished" if finished else self.reason or "the loop ended before its last step"
        result = {"finished": finished, "reason": reason, "step": self.step, "max_steps": self.max_steps}
        result |= {"metrics": self.metrics, "seconds": self.clock.seconds(), "world_size": distributed.world_size()}
        if error is None:
            if self._rank == 0:
                write_text(self.output_dir / "result.json", json.dumps(result, indent=1, default=str))
            self.record("stop", **{name: result[name] for name in ("finished", "reason", "metrics", "seconds")})
            self.progress.close(result)
            if self.leaving and not finished and self._rank == 0:
                at = f"step {self.step} of {self.max_steps}"
                print(f"not finished: {at}. Run the same launch again to continue.", flush=True)
        self._stack.__exit__(*(None, None, None) if error is None else (type(error), error, error.__traceback__))
        return finished


def newest(output_dir: Path) -> Path | None:
    """Return a run's newest checkpoint, from its folder or from a folder of its name among Kaggle's inputs.

    Every rank gets the same answer, None without a checkpoint.
    """

    def find() -> Path | None:
        name = output_dir.resolve().name
        files = [*output_dir.glob("checkpoints/step-*/state.json")] or [
            path for path in session.find("checkpoints/step-*/state.json") if path.parents[2].name == name
        ]
        found = max((file.parent for file in files), key=lambda path: path.name, default=None)
        if found is not None:
            print(f"going on from {found}", flush=True)
        return found

    return distributed.from_main(find)


class SeededSamples(Dataset[Any]):
    """A dataset that seeds the random generators from (seed, epoch, sample) before each sample, in loader workers too.

    If the dataset makes several samples at a time (`__getitems__`), the first sample's seed is used.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.key = dataset, randomness.key(seed, "sample")
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so persistent workers see a change
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._several

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: Any) -> Any:
        randomness.seed_for(self.key, int(self.epoch), int(index))
        return self.dataset[index]

    def _several(self, indices: list[Any]) -> Any:
        randomness.seed_for(self.key, int(self.epoch), int(indices[0]))
        return self.dataset.__getitems__(indices)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class Skipping:
    """A batch sampler without its first batches, in its first pass only."""

    def __init__(self, batch_sampler: Any, skip: int) -> None:
        self.batch_sampler, self.skip = batch_sampler, skip

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        for number, indices in enumerate(self.batch_sampler):
            if number >= skip:
                yield indices

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def seeded(loader: Any, seed: int, skip: int = 0) -> SeededSamples | None:
    """Make a loader seed its samples and skip its first `skip` batches once; return the SeededSamples.

    For an iterable dataset do nothing and return None. Without a batch sampler (batch_size=None) no batch is skipped.
    """
    inner = next((getattr(loader, name) for name in HOLDERS if hasattr(loader, name)), loader)
    if isinstance(inner.dataset, IterableDataset) or not hasattr(inner.dataset, "__len__"):
        return None
    known = isinstance(inner.dataset, SeededSamples)
    samples = inner.dataset if known else SeededSamples(inner.dataset, seed)
    for part in {id(loader): loader, id(inner): inner}.values():
        if (skip or not known) and getattr(part, "_iterator", None) is not None:
            part._iterator = None  # drop persistent workers, which have the old dataset and sampler
        part.__dict__["dataset"] = samples  # DataLoader forbids the plain assignment
        if skip and part.batch_sampler is not None:
            part.__dict__["batch_sampler"] = Skipping(part.batch_sampler, skip)
    return samples


def seed_order(loader: Any, seed: int, epoch: int) -> None:
    """Make the order of an epoch's samples a function of (seed, epoch), before the loader is iterated over."""
    randomness.seed_for(randomness.key(seed, "order"), epoch, 0)
    value = torch.initial_seed()
    owners: list[Any] = []
    waiting = [loader]
    while waiting:
        if (owner := waiting.pop()) is not None and all(owner is not other for other in owners):
            owners.append(owner)
            waiting += [getattr(owner, name, None) for name in (*HOLDERS, "sampler", "batch_sampler")]
    for owner in owners:
        if isinstance(owner, Sampler) and getattr(owner, "generator", 0) is None:
            # otherwise the order would come from the global generator, which depends on all earlier draws
            vars(owner)["generator"] = torch.Generator()
        for name in ("generator", "synchronized_generator"):
            if isinstance(generator := getattr(owner, name, None), torch.Generator):
                generator.manual_seed(value)
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
        if hasattr(owner, "_num_iter_calls"):  # Fabric's loader takes this for the epoch
            owner._num_iter_calls = epoch
