"""What is on the disk after each kind of failure: `pytest -s` of this file prints the table.

Each run has ten steps, with a save after every second step and an evaluation after every fifth. A failure in step 8
comes after one step that no save has. "step 7" on the disk is an undamaged checkpoint of that step, the newest.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu import Result, TrainConfig, checkpoint, distributed, launch, train
from kaggle_mgpu.checkpoints import Checkpoints, read_tensors
from kaggle_mgpu.launching import workers
from kaggle_mgpu.machine import session
from kaggle_mgpu.training import clock, evaluation, saving
from kaggle_mgpu.training import loop as trainer
from runs import Clock, by
from tasks import Regression

Fault = Callable[[], None]


def config(folder: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        global_batch_size=50, max_steps=10, save_every=2, eval_every=5, log_every=1, data_workers=0, keep_last=2,
        output_dir=str(folder),
    )  # fmt: skip
    return plain.replace(**changes)


class Breaking(Regression):
    """Calls `fault` in one of its methods, when `loss` has been called in training `after` times."""

    def __init__(self, method: str = "", fault: Fault = lambda: None, after: int = 0) -> None:
        super().__init__()
        self.method, self.fault, self.after, self.taken = method, fault, after, 0

    def reach(self, method: str) -> None:
        if method == self.method and self.taken == self.after:
            self.fault()

    def model(self) -> nn.Module:
        self.reach("model")
        return super().model()

    def train_data(self) -> Dataset[Any]:
        self.reach("train_data")
        return super().train_data()

    def val_data(self) -> Dataset[Any] | None:
        self.reach("val_data")
        return super().val_data()

    def collate(self, samples: list[Any]) -> Any:
        self.reach("collate")
        return super().collate(samples)

    def count(self, batch: Any) -> int:
        self.reach("count")
        return super().count(batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            self.reach("loss")
            self.taken += 1
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        self.reach("metrics")
        return super().metrics(model, batch)

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        self.reach("summary")
        return super().summary(metrics)

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        self.reach("optimizer")
        made = super().optimizer(model, config)
        made.register_step_pre_hook(lambda *_: self.reach("optimizer.step"))
        return made

    def fsdp_units(self, model: nn.Module) -> list[nn.Module] | None:
        self.reach("fsdp_units")
        return super().fsdp_units(model)

    def on_record(self, record: dict[str, Any]) -> None:
        self.reach("on_record")


# Runs that fail, each in its own way
Run = Callable[[Path, pytest.MonkeyPatch], Result]


def error() -> None:
    raise ValueError("a mistake")


def fails(method: str, after: int = 0) -> Run:
    return lambda folder, patch: train(config(folder), Breaking(method, error, after))


def fails_under_fsdp(folder: Path, patch: pytest.MonkeyPatch) -> Result:
    return launch(train, config(folder, strategy="fsdp", nproc=2), Breaking("fsdp_units", error))


def path_of(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)


def disk(call: str, number: int, path: str, times: int = 100) -> Run:
    """A function of `os` fails so many times where a path among its arguments matches."""

    def run(folder: Path, patch: pytest.MonkeyPatch) -> Result:
        real, failed = getattr(os, call), []

        def calling(*args: Any, **more: Any) -> Any:
            if len(failed) < times and any(re.search(path, path_of(arg)) for arg in args[: 1 + (call == "replace")]):
                failed.append(args)
                raise OSError(number, os.strerror(number))
            return real(*args, **more)

        patch.setattr(os, call, calling)
        result = train(config(folder), Breaking())
        assert failed
        return result

    return run


def send(*numbers: signal.Signals) -> Fault:
    def fault() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return fault


def in_worker(settings: TrainConfig, task: Breaking, renamed: str) -> Result:
    """`train` in a worker that is killed as it renames a file or a folder to what matches, if to anything."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if renamed and event == "os.rename" and re.search(renamed, os.fspath(args[1])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started by nohup
    patch = pytest.MonkeyPatch()
    patch.setattr(distributed, "RankVote", functools.partial(distributed.RankVote, 0.0))  # in each step
    save_before_the_next_step(patch)
    try:
        return train(settings, task)
    finally:
        patch.undo()


def signalled(*numbers: signal.Signals, method: str = "loss", after: int = 7) -> Run:
    def run(folder: Path, patch: pytest.MonkeyPatch) -> Result:
        check, saved = workers.Workers._check_pulse, folder / "checkpoints" / "step-00000006"
        patch.setattr(workers.Workers, "_check_pulse", lambda *given: saved.exists() and check(*given))
        patch.setattr(workers, "STACK_SECONDS", 0.1)  # one that is stopped shows none
        task, timeout = Breaking(method, send(*numbers), after), 0.5 if signal.SIGSTOP in numbers else None
        return launch(in_worker, config(folder), task, "", nproc=1, in_worker=True, timeout=timeout)[0]

    return run


def killed_at(renamed: str) -> Run:
    return lambda folder, patch: launch(in_worker, config(folder), Breaking(), renamed, nproc=1, in_worker=True)[0]


def out_of_time(limit: str, **seconds: float) -> Run:
    """A run by a clock of the test's own, by which each method takes so many seconds."""

    def run(folder: Path, patch: pytest.MonkeyPatch) -> Result:
        now = by(Clock(), patch, clock, session, saving, trainer, evaluation, sys.modules[Checkpoints.__module__])

        class Slow(Breaking):
            def reach(self, method: str) -> None:
                now.now += seconds.get(method, 0.0)

        write = Checkpoints._write_with_room

        def slowly(self: Checkpoints, *args: Any) -> Any:
            now.now += seconds.get("save", 0.0)
            return write(self, *args)

        patch.setattr(Checkpoints, "_write_with_room", slowly)
        return train(config(folder, time_limit=limit), Slow())

    return run


def save_before_the_next_step(patch: pytest.MonkeyPatch) -> None:
    begin = Checkpoints.begin

    def begin_and_wait(self: Checkpoints, step: int, **contents: Any) -> None:
        begin(self, step, **contents)
        self._join()

    patch.setattr(Checkpoints, "begin", begin_and_wait)


# What is left
def on_disk(folder: Path) -> str:
    found = []
    if saved := checkpoint.all_in(folder / "checkpoints"):
        assert [checkpoint.damage(path) for path in saved] == [None] * len(saved)
        found.append(f"step {checkpoint.step_of(saved[0])}")
    if (folder / "model.safetensors").exists():
        assert read_tensors(folder / "model.safetensors")
        found.append("weights")
    if (folder / "result.json").exists():
        found.append(f"result of step {json.loads((folder / 'result.json').read_text())['step']}")
    found += sorted({"unfinished files" for path in folder.rglob(".*") if path.name != ".lock"})
    return ", ".join(found) or ("only records" if (folder / "config.json").exists() else "nothing")


DONE, FULL = "step 10, weights, result of step 10", "step 2, weights, result of step 10"
SAVE, LATER = r"\.writing-step-00000004", r"(writing|rescue)-step-000000(0[4-9]|10)"
DIED = "WorkerDiedError"

TABLE: list[tuple[str, Run, str, str]] = [
    # an exception in each method of a task: in its first call, and later
    *((f"{name} raises", fails(name), "ValueError", "nothing") for name in ("model", "train_data", "val_data")),
    ("optimizer raises", fails("optimizer"), "ValueError", "nothing"),
    ("fsdp_units raises, on two ranks", fails_under_fsdp, "ValueError", "nothing"),
    *((f"{name} raises in the trial", fails(name), "RuntimeError", "nothing") for name in ("metrics", "summary")),
    *((f"{name} raises in the trial", fails(name), "RuntimeError", "nothing") for name in ("collate", "count")),
    ("loss raises in step 1", fails("loss"), "ValueError", "only records"),
    *((f"{name} raises in step 8", fails(name, 7), "ValueError", "step 7") for name in ("collate", "count", "loss")),
    ("optimizer.step raises in step 8", fails("optimizer.step", 8), "ValueError", "step 6"),
    *((f"{name} raises after step 5", fails(name, 5), "ValueError", "step 5") for name in ("metrics", "summary")),
    *((f"on_record raises after step {after}", fails("on_record", after), "finished", DONE) for after in (0, 7)),
    # an error of the disk
    *(
        (f"{call} fails in the save of step 4: EIO", disk(call, errno.EIO, SAVE, 1), "finished", DONE)
        for call in ("mkdir", "open", "write", "fsync", "replace")
    ),
    ("every write from step 4 on fails: EIO", disk("write", errno.EIO, LATER), "OSError", "step 2"),
    ("every write from step 4 on fails: EROFS", disk("write", errno.EROFS, LATER), "OSError", "step 2"),
    ("every write from step 4 on fails: EACCES", disk("write", errno.EACCES, LATER), "PermissionError", "step 2"),
    *(
        (f"no room for saves from step 4 on: {name}", disk("write", getattr(errno, name), LATER), "finished", FULL)
        for name in ("ENOSPC", "EDQUOT")
    ),
    ("old checkpoints cannot be removed: EIO", disk("replace", errno.EIO, "removing-step"), "finished", DONE),
    ("the best weights cannot be written: EIO", disk("replace", errno.EIO, "best/model"), "finished", DONE),
    ("the final weights fail once: EIO", disk("replace", errno.EIO, "run/model", 1), "finished", DONE),
    ("the final weights cannot be written: EIO", disk("replace", errno.EIO, "run/model"), "OSError", "step 10"),
    ("no room for the final weights: ENOSPC", disk("replace", errno.ENOSPC, "run/model"), "DiskFullError", "step 10"),
    ("result.json cannot be written: EIO", disk("replace", errno.EIO, "result.json"), "OSError", "step 10, weights"),
    # a signal in step 8
    *(
        (name, signalled(getattr(signal, name)), "asked to stop", "step 8, weights, result of step 8")
        for name in ("SIGINT", "SIGTERM")
    ),
    ("SIGINT twice", signalled(signal.SIGINT, signal.SIGINT), "KeyboardInterrupt", "step 7"),
    ("SIGTERM twice", signalled(signal.SIGTERM, signal.SIGTERM), DIED, "step 6"),
    *((name, signalled(getattr(signal, name)), "finished", DONE) for name in ("SIGQUIT", "SIGPIPE")),
    *(
        (name, signalled(getattr(signal, name)), DIED, "step 6")
        for name in ("SIGHUP", "SIGABRT", "SIGBUS", "SIGSEGV", "SIGKILL")
    ),
    ("SIGSTOP", signalled(signal.SIGSTOP), "HangError", "step 6"),
    # time_limit, by a clock of the test's own
    ("no time for a step", out_of_time("30s", metrics=40.0), "time limit", "weights, result of step 0"),
    ("time ends in the steps", out_of_time("12s", loss=1.0), "time limit", "step 7, weights, result of step 7"),
    (
        "no time for the evaluation of step 5", out_of_time("30s", metrics=7.0, loss=1.0), "time limit",
        "step 6, weights, result of step 6",
    ),
    (
        "time ends in slow saves", out_of_time("30s", loss=1.0, save=4.0), "time limit",
        "step 9, weights, result of step 9",
    ),
    # the session's end: SIGKILL
    ("killed in the evaluation after step 5", signalled(signal.SIGKILL, method="metrics", after=5), DIED, "step 4"),
    ("killed in the save of step 4", killed_at("/step-00000004$"), DIED, "step 2, unfinished files"),
    ("killed as step 2 is removed", killed_at("/.removing-step-00000002"), DIED, "step 6"),
    ("killed as the best weights are written", killed_at("best/model"), DIED, "step 4, unfinished files"),
    ("killed as the final weights are written", killed_at("run/model"), DIED, "step 10, unfinished files"),
    ("killed as result.json is written", killed_at("result.json"), DIED, "step 10, weights, unfinished files"),
]  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, str]]]:
    rows: list[tuple[str, str, str]] = []
    yield rows
    print("\n\n| failure | the run ends with | on the disk |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


@pytest.mark.parametrize(("failure", "run", "ends", "left"), TABLE, ids=[row[0] for row in TABLE])
def test_what_is_on_the_disk_after(
    failure: str, run: Run, ends: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Any
) -> None:
    save_before_the_next_step(monkeypatch)
    try:
        ended = run(tmp_path / "run", monkeypatch).reason
    except (Exception, KeyboardInterrupt) as raised:
        ended = type(raised).__name__
    table.append((failure, ended, on_disk(tmp_path / "run")))
    assert table[-1][1:] == (ends, left)
