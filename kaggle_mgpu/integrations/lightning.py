"""Save, stop, show and resume a run of Lightning's Trainer.

keeper = SessionCallback("run")
trainer = Trainer(devices=distributed.world_size(), strategy="ddp", callbacks=[keeper], ...)
trainer.fit(module, loader, ckpt_path=keeper.find_checkpoint())
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]

from ..parallel import distributed
from . import session


class SessionCallback(Callback):
    """Save at intervals, save and stop before the session ends or on request, and record metrics.

    A resumed run trains on the same samples with the same random numbers as a run without interruption. The errors
    below come from trainer.fit.

    Args:
        output_dir: the run's folder; checkpoints lie in checkpoints/step-N/model.ckpt.
        seed: for the order of samples, augmentation and dropout.
        time_limit: "11h30m", or seconds; the end of Kaggle's session is a limit too.
        save_every: time between two saves, "15m" or seconds; None: save only before the end.
        keep_last: number of checkpoints to keep, the newest.

    Raises:
        ValueError: the Trainer's world_size is not the number of processes; time_limit or save_every is not a duration.
        LockedError: another run has the folder.
    """

    def __init__(
        self, output_dir: str | Path, *, seed: int = 0, time_limit: str | float | None = None,
        save_every: str | float | None = "15m", keep_last: int = 2,
    ) -> None:  # fmt: skip
        self.output_dir, self.seed, self.keep_last = Path(output_dir), seed, keep_last
        self.limits: dict[str, Any] = {"time_limit": time_limit, "save_every": save_every}
        self.session: session.Session | None = None
        self.samples: list[session.SeededSamples] = []
        self.history: Path | None = None
        self.finished, self.began, self.saved = False, False, 0

    def find_checkpoint(self) -> str | None:
        """Return the path of the newest checkpoint in the run's folder or Kaggle's inputs; None without a checkpoint.

        Among the inputs, a folder of the same name as `output_dir` is searched.
        """
        found = session.newest(self.output_dir)
        self.history = None if found is None else found.parent.parent
        return None if found is None else str(found / "model.ckpt")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.world_size != distributed.world_size():
            raise ValueError(
                f"Lightning's Trainer has world_size {trainer.world_size}, but {distributed.world_size()} processes "
                f'run: expected Trainer(devices={distributed.local_world_size()}, strategy="ddp")'
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        weights = sum(parameter.nbytes for parameter in pl_module.parameters())
        steps = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        self.began, self.saved = True, trainer.global_step
        self.session = session.Session(
            self.output_dir, max_steps=steps, step=trainer.global_step, seed=self.seed, nbytes=4 * weights,
            history=self.history, unit="steps", **self.limits,
        )  # fmt: skip
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        skip = done if done < trainer.num_training_batches else 0  # else all batches of the epoch are done
        for loader in trainer.fit_loop._combined_loader.flattened:
            session.seed_order(loader, self.seed, trainer.current_epoch)
            if (samples := session.seeded(loader, self.seed, skip)) is not None:
                samples.set_epoch(trainer.current_epoch)
                self.samples.append(samples)
        fetcher = trainer.fit_loop._data_fetcher
        iter(fetcher)  # a new iterator, since the old iterator was made before these changes
        if not self.samples:  # an iterable dataset cannot jump: read the batches already trained on, and drop them
            for _ in range(skip):
                next(fetcher)
            fetcher.fetched -= skip  # Lightning counts the skipped batches itself

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for samples in self.samples:
            samples.set_epoch(trainer.current_epoch)
        for loader in trainer.fit_loop._combined_loader.flattened:
            session.seed_order(loader, self.seed, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.session is not None
        self.session.seed(batch_idx, trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.session is None or trainer.global_step == self.session.step:
            return  # a micro-batch that ended no optimizer step
        leave, save = self.session.after_step(trainer.global_step, 1)
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.is_global_zero:
            given = {"loss": outputs} if isinstance(outputs, torch.Tensor) else dict(outputs or {})
            numbers = {name: float(value) for name, value in given.items() if getattr(value, "ndim", 1) == 0}
            self.session.record("train", **numbers)
        if save:
            self.save(trainer)
        if leave:
            trainer.should_stop = True
            # otherwise Lightning trains on until both minimums are reached
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def save(self, trainer: Any) -> None:
        """Save now; every rank must call `save`. The folder gets its final name when the checkpoint is complete."""
        assert self.session is not None
        if self.saved == trainer.global_step:
            return
        self.saved = trainer.global_step
        with self.session.checkpoint(trainer.global_step, self.keep_last) as folder:
            trainer.save_checkpoint(folder / "model.ckpt")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.session is not None and trainer.is_global_zero and not trainer.sanity_checking:
            self.session.record("eval", **{name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.session is not None:
            self.save(trainer)
            self.finished, self.session = self.session.close(), None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        if not self.began:  # Lightning does not call on_train_start for a finished run
            self.finished = 0 < epochs <= trainer.current_epoch or 0 < steps <= trainer.global_step

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.session is not None:
            self.session.close(exception)
            self.session = None
