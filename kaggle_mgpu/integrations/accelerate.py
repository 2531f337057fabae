"""Save, stop, show and resume a loop written with accelerate.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
with Session(accelerator, "run", max_steps=1000, seed=0) as session:
    for batch in session.batches(loader):          # epoch after epoch, from where the last session ended
        with accelerator.accumulate(model):
            ...                                    # as before
        session.step(loss)                         # records, saves every 15 minutes; `batches` ends at a stop
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator, skip_first_batches

from . import session


class Session:
    """Resume, seed, record, save and stop a loop. Every rank makes the same calls, after `accelerator.prepare`.

    Args:
        accelerator: the Accelerator that has prepared the models, optimizers and loaders.
        output_dir: the run's folder; checkpoints by `accelerator.save_state` lie in checkpoints/step-N.
        max_steps: optimizer steps of the run; `batches` ends after them.
        seed: for the order of samples, augmentation and dropout.
        time_limit: "11h30m", or seconds; the end of Kaggle's session is a limit too.
        save_every: time between two saves, "15m" or seconds; None: save only before the end.
        keep_last: number of checkpoints to keep, the newest.
        log_every: steps between two records in metrics.jsonl.

    Raises:
        ValueError: time_limit or save_every is not a duration.
        LockedError: another run has the folder.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: str | Path, *, max_steps: int, seed: int = 0,
        time_limit: str | float | None = None, save_every: str | float | None = "15m", keep_last: int = 2,
        log_every: int = 10,
    ) -> None:  # fmt: skip
        self.accelerator, self.max_steps, self.finished = accelerator, max_steps, False
        self._seed, self._keep_last, self._log_every = seed, keep_last, log_every
        self._output_dir = Path(output_dir)
        start = self.resume()
        weights = sum(p.nbytes for model in accelerator._models for p in model.parameters())
        self._session = session.Session(
            output_dir, max_steps=max_steps, step=self.steps_taken, seed=seed, time_limit=time_limit,
            save_every=save_every, nbytes=4 * weights, history=None if start is None else start.parent.parent,
            unit="steps", position=self._position,
        )  # fmt: skip

    def resume(self) -> Path | None:
        """Load the newest checkpoint (see `session.newest`); return its folder, or None without a checkpoint."""
        start = session.newest(self._output_dir)
        self.steps_taken, self._position = 0, (0, 0)
        if start is not None:
            facts = json.loads((start / "state.json").read_text())
            self.accelerator.load_state(str(start))
            self.steps_taken, self._position = facts["step"], tuple(facts["position"])
        self._saved = self.steps_taken
        return start

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the loader's batches from the run's position, epoch after epoch, until the run ends or must stop."""
        samples = session.seeded(loader, self._seed)

        def passes(epoch: int, skip: int) -> Any:
            if samples is not None:
                samples.set_epoch(epoch)
            rest = skip_first_batches(loader, skip) if skip else loader
            rest.iteration = epoch
            session.seed_order(rest, self._seed, epoch)
            return rest

        return self._session.batches(passes)

    def begin_step(self, number: int, epoch: int = 0) -> None:
        """Seed all random generators from (seed, number, epoch, rank), in a loop that does not use `batches`.

        Args:
            number: the micro-batch's number in the epoch, or in the run if `epoch` is always 0.
        """
        self._session.seed(number, epoch)

    @property
    def should_stop(self) -> bool:
        """Whether the ranks have agreed to stop, for the session's end or a request."""
        return self._session.leaving

    def step(self, loss: Any = None) -> bool:
        """If this micro-batch ended an optimizer step, record and save when due; return whether to leave the loop.

        Args:
            loss: a number or a 0-d tensor, of this rank; read on rank 0 when a record is due.
        """
        if not self.accelerator.sync_gradients:
            return False
        self.steps_taken += 1
        if self._session.train_step(self.steps_taken, self._log_every, None if loss is None else {"loss": loss}):
            self.save()
        return self._session.over

    def save(self) -> None:
        """Save with `accelerator.save_state`; the folder gets its final name when all ranks have written."""
        if self._saved == self.steps_taken:
            return
        self._saved = self.steps_taken
        with self._session.checkpoint(self.steps_taken, self._keep_last, position=self._session.position) as folder:
            self.accelerator.save_state(str(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.save()
        self.finished = self._session.close(error)
