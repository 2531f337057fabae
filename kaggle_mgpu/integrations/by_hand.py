"""Save, stop, show and resume a training loop written by hand.

with watch("run", max_steps=1000, model=model, optimizer=optimizer) as run:
    for batch in run.batches(loader):       # goes on where the last session ended
        loss = ...; loss.backward(); optimizer.step(); optimizer.zero_grad()
        run.step(loss)                      # records, saves every 15 minutes; `batches` ends when the run must stop
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from ..checkpoints import Checkpoints, checkpoint, resume
from ..parallel import distributed, shards
from . import session


class Run:
    """The run of a loop, made by `watch`. Every rank makes the same calls.

    After the `with` block, `finished` is True if all steps are taken. `steps_taken` counts earlier sessions too.

    Args:
        checkpoints: the checkpoints in the run's folder.
        objects: models, optimizers and other objects with `state_dict` and `load_state_dict`, by name.
        options: further arguments of `session.Session`; the other arguments are those of `watch`.

    Raises:
        TypeError, ValueError, CheckpointError, LockedError: as `watch`.
    """

    def __init__(
        self, checkpoints: Checkpoints, objects: dict[str, Any], *, max_steps: int, seed: int, log_every: int,
        **options: Any,
    ) -> None:  # fmt: skip
        self.max_steps, self.finished = max_steps, False
        self._checkpoints, self._seed, self._log_every = checkpoints, seed, log_every
        for name, given in objects.items():
            if not (hasattr(given, "state_dict") and hasattr(given, "load_state_dict")):
                raise TypeError(
                    f"watch: {name} is a {type(given).__name__}, expected a model, an optimizer or another object with "
                    f"state_dict and load_state_dict. Leave out what needs no saving."
                )
            _check_whole(name, given)
        parallel = (DistributedDataParallel, DataParallel)
        inner = {name: o.module if isinstance(o, parallel) else o for name, o in objects.items()}
        self._models = {name: o for name, o in inner.items() if isinstance(o, nn.Module)}
        self._others = {name: o for name, o in objects.items() if name not in self._models}
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in self._models.items()}
        self._stamp = {"watched": sorted(objects), "parameters": sizes, "seed": seed}
        start = distributed.from_main(
            lambda: resume.starting_point(checkpoints, resume="auto", config={}, may_change=(), stamp=self._stamp)
        )
        self.steps_taken, self._position, self._saved = 0, (0, 0), 0
        if start is not None:
            self._load(start)
        weights = sum(p.nbytes for model in self._models.values() for p in model.parameters())
        self.session = session.Session(
            checkpoints.folder.parent, max_steps=max_steps, step=self.steps_taken, seed=seed, nbytes=4 * weights,
            unit="steps", history=None if start is None else start.parent.parent, position=self._position, **options,
        )  # fmt: skip

    def _load(self, start: Path) -> None:
        saved = copy.deepcopy(checkpoint.load(start))  # the loaded tensors are memory maps of the file
        for name, model in self._models.items():
            model.load_state_dict(saved.tensors[name])
        for name, other in self._others.items():
            other.load_state_dict(saved.state[name])
        self.steps_taken = self._saved = saved.facts["step"]
        self._position = tuple(saved.facts["position"])
        if distributed.is_main():
            print(f"going on from {start}: step {self.steps_taken} of {self.max_steps}", flush=True)

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the loader's batches, epoch after epoch, from the run's position until the run ends or must stop.

        The order of samples, their augmentation and the dropout of each batch depend only on the seed and the position.
        An iterable dataset is read from its start and decides itself on order and augmentation. Call `batches` once,
        and `step` after each optimizer step, before the next batch.

        Raises:
            ValueError: the loader has no batch, or the loop never calls `step`.
        """

        if distributed.joined() and distributed.world_size() > 1 and _same_everywhere(loader):
            self.session.progress.note(
                "WARNING: the loader has no DistributedSampler, so every rank trains on the same samples: "
                "DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset))"
            )

        def passes(epoch: int, skip: int) -> Iterator[Any]:
            samples = session.seeded(loader, self._seed, skip)
            if samples is not None:
                samples.set_epoch(epoch)
            session.seed_order(loader, self._seed, epoch)
            # without a batch sampler that skips batches, these are read and dropped
            drops = samples is None or getattr(loader, "batch_sampler", None) is None
            return itertools.islice(loader, skip if drops else 0, None)

        return self.session.batches(passes)

    def step(self, loss: Any = None, **numbers: Any) -> bool:
        """Record the optimizer step just taken, and save if a save is due; return whether to leave the loop.

        Args:
            loss: a number or a 0-d tensor, of this rank; read on rank 0 when a record is due.
            numbers: further numbers or 0-d tensors for the record.
        """
        self.steps_taken += 1
        given = numbers if loss is None else {"loss": loss, **numbers}
        if self.session.train_step(self.steps_taken, self._log_every, given):
            self.save()
        if self.steps_taken == self.max_steps + 1:
            self.session.progress.note(
                f"NOTE: the loop goes on after max_steps={self.max_steps}: iterate over run.batches(loader), which "
                f"ends after max_steps and before the session's end, or leave the loop when run.step(…) returns True"
            )
        return self.session.over

    def save(self) -> None:
        """Save now, in the background: every rank has the same state, and rank 0 writes it."""
        if self._saved == self.steps_taken:
            return
        self._saved = self.steps_taken
        with self.session.saving(self.steps_taken):
            if distributed.is_main():
                models = {name: model.state_dict() for name, model in self._models.items()}
                others = {name: other.state_dict() for name, other in self._others.items()}
                facts = {"position": self.session.position, "stamp": self._stamp, "config": {}}
                self._checkpoints.begin(self.steps_taken, tensors=models, state=others, facts=facts)

    def close(self, error: BaseException | None = None) -> None:
        """Save and write result.json, unless an error ended the loop; wait for saves, and unlock the folder."""
        if error is None:
            self.save()
        for saved in self._checkpoints.wait() if distributed.is_main() else []:
            if saved.note:
                self.session.progress.note(saved.note)
        self.finished = self.session.close(error)


def _check_whole(name: str, given: Any) -> None:
    """Raise a ValueError unless every rank has the whole of a model's or an optimizer's state."""
    modules = [*given.modules()] if isinstance(given, nn.Module) else []
    split = any(shards.is_sharded(parameter) for module in modules for parameter in module.parameters(recurse=False))
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in modules)
    if split or wrapped or hasattr(given, "consolidate_state_dict"):
        raise ValueError(
            f"watch: {name} is split over the ranks, but rank 0 saves only its own part: expected the same state on "
            f"every rank. Use DistributedDataParallel and a plain optimizer, or launch(train, config, task), which "
            f"shards with strategy='fsdp'"
        )


def _same_everywhere(loader: Any) -> bool:
    """Return whether a loader has a sampler of torch's that gives all ranks the same samples."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    plain = batches is None or (type(batches) is BatchSampler and batches.sampler is sampler)
    return plain and type(sampler) in (RandomSampler, SequentialSampler)


def _check_group() -> None:
    """Print a warning if several ranks run the loop without a process group, and so exchange no gradients."""
    if distributed.world_size() > 1 and not distributed.joined() and distributed.is_main():
        print(
            f"WARNING: watch: the {distributed.world_size()} ranks have no process group, so each trains a model of "
            f"its own, and rank 0 saves its own. Before watch call torch.distributed.init_process_group(), wrap the "
            f"model in DistributedDataParallel and give the loader a DistributedSampler; for separate runs use "
            f"launch_each.",
            flush=True,
        )


@contextlib.contextmanager
def watch(
    output_dir: str | Path, *, max_steps: int, seed: int = 0, time_limit: str | float | None = None,
    save_every: str | float | None = "15m", keep_last: int = 2, log_every: int = 10, **objects: Any,
) -> Iterator[Run]:  # fmt: skip
    """Resume a run from its folder or Kaggle's inputs; record, save and stop the run inside the `with` block.

    Args:
        output_dir: the run's folder.
        max_steps: optimizer steps of the run; `Run.batches` ends after them.
        seed: for the order of samples, augmentation and dropout.
        time_limit: "11h30m", or seconds; the end of Kaggle's session is a limit too.
        save_every: time between two saves, "15m" or seconds; None: save only before the end.
        keep_last: number of checkpoints to keep, the newest.
        log_every: steps between two records in metrics.jsonl.
        objects: what to save and restore, by a name of your choice: model=model, optimizer=optimizer, scheduler=….

    Raises:
        TypeError: an object has no state_dict or load_state_dict.
        ValueError: a model or an optimizer is split over the ranks (fully_shard, FSDP, ZeroRedundancyOptimizer), or
            time_limit or save_every is not a duration.
        CheckpointError: the folder holds a run of other objects or another seed.
        LockedError: another run has the folder.
    """
    _check_group()
    folder = Path(output_dir)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=keep_last)
    run = Run(
        checkpoints, objects, max_steps=max_steps, seed=seed, log_every=log_every, time_limit=time_limit,
        save_every=save_every,
    )  # fmt: skip
    try:
        yield run
    except BaseException as error:
        run.close(error)
        raise
    run.close()
