"""The seconds that a run keeps back before a deadline, and clocks that jump."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import TrainConfig, distributed, launch, progress, train
from kaggle_mgpu.errors import HangError
from kaggle_mgpu.machine import session
from kaggle_mgpu.training import clock, evaluation, log, saving
from kaggle_mgpu.training import loop as trainer
from runs import Clock, by
from tasks import Regression

HOUR = 3600.0


@pytest.mark.parametrize(
    ("limit", "on_kaggle", "seconds"),
    [
        (HOUR, False, 72.0),
        (60.0, False, 5.0),
        (12.0, False, 5.0),
        (6.0, False, 3.0),
        (12 * HOUR, True, 864.0),
        (HOUR, True, 180.0),
        (300.0, True, 150.0),
    ],
)
def test_some_time_is_kept_back_in_any_case(limit: float, on_kaggle: bool, seconds: float) -> None:
    assert clock.floor(limit, on_kaggle) == pytest.approx(seconds)
    assert clock.Clock(floor=clock.floor(limit, on_kaggle)).margin(1, True) == pytest.approx(seconds)


def test_the_final_weights_are_counted_at_the_speed_of_the_saves() -> None:
    run = clock.Clock(save=4.0, weights=1.0, evaluation=20.0)
    assert run.margin(1, False) == 1.5 * (4 + 1)
    assert run.margin(1, True) == 1.5 * (4 + 1 + 20 + 1), "an evaluation may write the best weights"
    run.saved(12.0)
    assert run.margin(1, False) == 1.5 * (12 + 3)


class Priced(Regression):
    """By the test's own clock, a training step takes 1 s and a batch of an evaluation 2 s, if not told otherwise."""

    def __init__(self, now: Clock, step: float = 1.0, evaluation: float = 2.0) -> None:
        super().__init__()
        self.now, self.step, self.evaluation = now, step, evaluation

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.now.now += self.step if model.training else self.evaluation
        return super().loss(model, batch)


def timed(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, Clock]:
    now = by(Clock(), monkeypatch, clock, session, saving, trainer, evaluation)
    settings = TrainConfig(global_batch_size=24, max_steps=1000, log_every=1, output_dir=str(folder))
    return train(settings.replace(**changes), Priced(now)), now


def test_an_evaluation_is_begun_only_where_the_trial_says_that_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """77 samples, 24 at a time, take 8 s, and at step 15 less than one and a half times 1 + 8 s are left."""
    result, _ = timed(tmp_path, monkeypatch, eval_every=15, time_limit="30s")
    assert (result.step, result.reason) == (15, "time limit")
    assert not any(record["kind"] == "eval" for record in progress.read(tmp_path))


def timed_ranks(folder: str, step: float, batch: float, changes: dict[str, Any]) -> tuple[int, str]:
    """One of two ranks: a training step takes `step` seconds and a batch of an evaluation `batch`."""
    with pytest.MonkeyPatch.context() as patch:
        now = by(Clock(), patch, clock, session, saving, trainer, evaluation, sys.modules[distributed.__name__])
        settings = TrainConfig(global_batch_size=24, max_steps=60, output_dir=folder).replace(**changes)
        result = train(settings, Priced(now, step, batch))
    return result.step, result.reason


def test_ranks_begin_no_evaluation_for_which_there_is_no_time(tmp_path: Path) -> None:
    """An evaluation of 40 s, and 21 s are left after 293 quick steps: the answer of a vote must not come later."""
    changes = {"eval_every": 293, "time_limit": "100s", "max_steps": 400}
    assert launch(timed_ranks, str(tmp_path), 0.1, 10.0, changes, nproc=2)[0] == (293, "time limit")
    assert not any(record["kind"] == "eval" for record in progress.read(tmp_path))


def test_ranks_with_slow_steps_save_once_an_interval(tmp_path: Path) -> None:
    changes = {"save_interval_minutes": 3 / 60, "save_every": None, "eval_every": "end", "max_steps": 40}
    launch(timed_ranks, str(tmp_path), 0.3, 0.0, changes, nproc=2)
    saved = [record["step"] for record in progress.read(tmp_path) if record["kind"] == "save"]
    assert len(saved) > 3 and all(later - earlier > 5 for earlier, later in itertools.pairwise(saved[:-1])), saved


@pytest.mark.parametrize(("kaggle", "limit", "left"), [(False, "1m", 5.0), (True, "10m", 180.0)])
def test_a_run_ends_with_that_much_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kaggle: bool, limit: str, left: float
) -> None:
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    began = Clock.now
    result, now = timed(tmp_path, monkeypatch, eval_every="end", max_steps=10**6, log_every=10**6, time_limit=limit)
    assert result.reason == "time limit"
    seconds = 60.0 if limit == "1m" else 600.0
    assert left - 1.0 <= seconds - (now.now - began) <= left


def test_a_slow_disk_is_noticed_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Watched(clock.Clock):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            given.append(self.save)

    flush = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.1)
        flush(file)

    monkeypatch.setattr(log, "Clock", Watched)
    monkeypatch.setattr(clock, "os", SimpleNamespace(**{**vars(os), "fsync": slow}))
    train(TrainConfig(global_batch_size=24, max_steps=2, output_dir=str(tmp_path)), Regression())
    nbytes = 4 * sum(parameter.nbytes for parameter in Regression().model().parameters())
    assert given[0] >= nbytes / (2**19 / 0.1)
    assert not list(tmp_path.glob(".speed-*"))


def test_a_disk_without_room_has_a_speed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clock, "os", SimpleNamespace(**{**vars(os), "fsync": full}))
    assert clock.disk_speed(tmp_path) > 0
    assert not any(tmp_path.iterdir())


# Clocks that jump
def test_a_log_from_the_future_hides_no_hang(tmp_path: Path) -> None:
    """As if the system's clock had been set back by an hour since its last line."""
    logs = tmp_path / "logs"

    def function(config: TrainConfig) -> None:
        print("a line")
        for path in logs.glob("*.log"):
            os.utime(path, (time.time() + HOUR,) * 2)
        (tmp_path / f"set-{distributed.rank()}").touch()
        time.sleep(30)  # then the launch would return without an error

    with pytest.raises(HangError, match="no rank made progress"):
        launch(function, TrainConfig(output_dir=str(tmp_path), nproc=2), timeout=1)
    assert (tmp_path / "set-0").exists()


class SetsTheClockBack(Regression):
    """Rank 1 is killed in a step of the first attempt, when all that is saved looks older than the launch."""

    def __init__(self, flag: Path, step: int, checkpoints: Path) -> None:
        super().__init__(val_samples=0)
        self.flag, self.left, self.checkpoints = flag, step, checkpoints

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and distributed.rank() == 1 and not self.flag.exists():
            while not (saved := list(self.checkpoints.glob("step-*/state.json"))):
                time.sleep(0.01)
            for path in saved:
                os.utime(path, (time.time() - HOUR,) * 2)
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def test_a_restart_goes_on_whatever_the_clock_says(tmp_path: Path) -> None:
    settings = TrainConfig(global_batch_size=50, nproc=2, max_steps=12, save_every=5, output_dir=str(tmp_path / "run"))
    task = SetsTheClockBack(tmp_path / "flag", 8, tmp_path / "run" / "checkpoints")
    assert launch(train, settings.replace(resume="never", max_restarts=1), task).finished
    starts = [record["step"] for record in progress.read(tmp_path / "run") if record["kind"] == "start"]
    assert starts == [0, 5]
