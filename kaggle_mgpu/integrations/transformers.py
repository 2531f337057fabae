"""Save, stop, show and resume a run of transformers' Trainer, or of a trainer derived from Trainer, such as TRL's.

trainer = Trainer(..., callbacks=[SessionCallback()])
trainer.train(resume_from_checkpoint=find_checkpoint(args.output_dir))
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..machine import session as machine
from ..parallel import distributed
from .session import SeededSamples, Session, seeded

_open: list[Session] = []  # a Trainer that fails calls no callback, so the next run closes its session
_histories: dict[Path, Path] = {}  # output folder -> the folder among the inputs from which the run continues


def find_checkpoint(output_dir: str | Path) -> str | None:
    """Return the path of a Trainer's newest complete checkpoint, in its folder or Kaggle's inputs; None without any.

    Among the inputs, a folder of the same name as `output_dir` is searched. An incomplete checkpoint, as left by a
    kill, is skipped. Every rank gets the same answer.
    """
    return distributed.from_main(lambda: _find(Path(output_dir)))


def _find(folder: Path) -> str | None:
    name = folder.resolve().name
    theirs = [path.parent for path in machine.find("checkpoint-*/trainer_state.json") if path.parents[1].name == name]
    for among in (list(folder.glob("checkpoint-*")), theirs):
        numbered = [path for path in among if path.name.rpartition("-")[2].isdecimal()]
        for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            if is_whole(path):
                if among is theirs:
                    _histories[folder.resolve()] = path.parent
                print(f"going on from {path}", flush=True)
                return str(path)
            print(f"checkpoint {path} is incomplete: trying the one before it", flush=True)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has trainer_state.json (the last file of a Trainer's save) and no truncated file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.iterdir():
            if path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
                if not zipfile.is_zipfile(path):  # torch.save writes a zip file, whose directory is at its end
                    return False
            elif path.suffix == ".safetensors":
                with open(path, "rb") as file:
                    header = json.loads(file.read(size := int.from_bytes(file.read(8), "little")))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                if path.stat().st_size != 8 + size + max(ends, default=0):
                    return False
    except (OSError, ValueError):
        return False
    return True


class SessionCallback(TrainerCallback):
    """Save at intervals, save and stop before the session ends or on request, and record metrics.

    A resumed run draws the same random numbers as an uninterrupted run: generators are seeded from (seed, step, rank)
    before each step, and from (seed, epoch, sample) before each sample of a map-style dataset. trainer.train
    raises the errors below, the constructor does not.

    Args:
        time_limit: "11h30m", or seconds; the end of Kaggle's session is a limit too.
        save_every: time between two saves of the callback, "15m" or seconds. None: only at a stop. The
            Trainer's own saves are not affected.

    Raises:
        ValueError: time_limit or save_every is not a duration.
        LockedError: another run has the folder.
    """

    def __init__(self, *, time_limit: str | float | None = None, save_every: str | float | None = "15m") -> None:
        self.time_limit, self.save_every = time_limit, save_every
        self.session: Session | None = None
        self.samples: SeededSamples | None = None
        self.finished = False
        """Whether the Trainer has taken all its steps."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        folder = Path(args.output_dir or ".")
        while _open:
            _open.pop().close(Exception("an error in training"))
        weights = sum(parameter.nbytes for parameter in given["model"].parameters())
        self.session = Session(
            folder, max_steps=state.max_steps, step=state.global_step, seed=args.seed, nbytes=4 * weights,
            time_limit=self.time_limit, save_every=self.save_every,
            history=_histories.get(folder.resolve()),
        )  # fmt: skip
        _open.append(self.session)
        self.batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # Trainer compares with max_steps only after a step, so a finished run would take another step: skip all batches
        over = state.global_step >= state.max_steps
        self.samples = seeded(given["train_dataloader"], args.seed, skip=sys.maxsize if over else 0)
        self.step_ended = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if self.samples is not None:
            self.samples.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.session is not None
        self.session.seed(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.session is not None
        leave, save = self.session.after_step(state.global_step, self.batch)
        self.step_ended = time.monotonic()
        control.should_save = control.should_save or save
        if leave:
            control.should_training_stop, control.should_evaluate = True, False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given["logs"]
        if self.session is not None and "loss" in logs and state.is_world_process_zero:
            names = {"learning_rate": "lr"}
            values = {names.get(k, k): v for k, v in logs.items() if isinstance(v, int | float)}
            self.session.record("train", **values)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.session is not None:
            values = {f"val_{name.removeprefix('eval_')}": v for name, v in given["metrics"].items() if name != "epoch"}
            self.session.record("eval", **{name: v for name, v in values.items() if isinstance(v, int | float)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.session is not None:
            self.session.saved(state.global_step, time.monotonic() - self.step_ended)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.session is not None:
            self.finished = self.session.close()
            _open.remove(self.session)
            self.session = None
