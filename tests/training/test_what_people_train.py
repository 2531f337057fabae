"""A task that was edited, metrics over all predictions, parts of a loss, schedules and the end of a run before time."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from kaggle_mgpu import Task, TrainConfig, distributed, launch, progress, train
from kaggle_mgpu.checkpoints import checkpoint
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.machine import devices
from kaggle_mgpu.progress.records import comparable
from kaggle_mgpu.training import fingerprint
from tasks import Regression


def config(folder: Path, **changes: Any) -> TrainConfig:
    settings = TrainConfig(global_batch_size=50, lr=0.01, max_steps=4, data_workers=0, output_dir=str(folder))
    return settings.replace(**changes)


# A changed task
SCALE = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * self.layers(x)  # type: ignore[no-any-return]


class Folds(Regression):
    name = "Folds"

    def __init__(self, fold: int = 0, rows: list[float] | None = None) -> None:
        super().__init__()
        self.fold, self.rows, self.calls, self._cache = fold, rows or [], 0, object()

    def model(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += model.training
        return super().loss(model, batch)

    def on_record(self, record: dict[str, Any]) -> None:
        """Not part of what is trained."""


class OtherLoss(Folds):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) * 2


class OtherData(Folds):
    def data(self, seed: int, samples: int) -> Dataset[Any]:
        return super().data(seed + 1, samples)


class RandomData(Folds):
    """Its samples are not the same when asked for again, and tell nothing."""

    def data(self, seed: int, samples: int) -> Dataset[Any]:
        return Jittered(samples)


class Jittered(Dataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples, self.chance = samples, torch.Generator()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(8, generator=self.chance)
        return x, x[:1]


def edited_net(self: nn.Module, x: Tensor) -> Tensor:
    return self.layers(x) + 1  # type: ignore[no-any-return,operator]


def test_a_finished_run_is_not_the_result_of_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    settings = config(folder)
    first = Folds()
    train(settings, first)
    assert train(settings, first).finished  # it has counted its calls since
    assert train(settings, Folds()).step == 4
    differing: list[tuple[Task, str]] = [
        (Folds(fold=1), "task.fold was 0, is 1"), (Folds(rows=[1.0]), "task.rows was 0 items"),
        (OtherLoss(), "code of OtherLoss.loss is new"), (OtherData(), "the samples of train_data; the samples of val_"),
    ]  # fmt: skip
    for task, named in differing:
        with pytest.raises(CheckpointError, match=r"holds the finished run of another task: .*'never'") as caught:
            train(settings, task)
        assert named in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", edited_net)
        with pytest.raises(CheckpointError, match=r"code of edited_net is new"):
            train(settings.replace(max_steps=6), Folds())  # going on from the old weights is no better
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SCALE", 2.0)
        with pytest.raises(CheckpointError, match=r"code of Net\.forward was edited"):
            train(settings, Folds())
    assert train(settings.replace(resume="never"), Folds(fold=1)).finished
    # a run that goes on says what was edited
    assert train(settings.replace(max_steps=6), Folds(fold=1)).step == 6


def test_an_unfinished_run_goes_on_and_says_what_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path), Breaks())
    capsys.readouterr()
    assert train(config(tmp_path), Folds()).finished
    assert "NOTE: edited since" in (said := capsys.readouterr().out)
    assert "code of Breaks.loss is gone" in said
    # what a version without fingerprints has left is accepted
    (newest, *_) = checkpoint.all_in(tmp_path / "checkpoints")
    document = json.loads((newest / "state.json").read_text())
    for name in ("fingerprint", "crc32"):
        document.pop(name)
    for name in ("sync_batchnorm", "patience", "schedule_first_cycle"):
        document["config"].pop(name)
    document["crc32"] = zlib.crc32(json.dumps(document).encode())
    (newest / "state.json").write_text(json.dumps(document))
    assert train(config(tmp_path), Folds(fold=3)).step == 4


class Breaks(Folds):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training and self.calls == 2:
            raise ZeroDivisionError
        return super().loss(model, batch)


def test_data_that_is_never_the_same_does_not_hide_a_result(tmp_path: Path) -> None:
    train(config(tmp_path), RandomData())
    assert train(config(tmp_path), RandomData()).finished


def marks(task: Task) -> dict[str, str]:
    """Return the fingerprint of a task without its data."""
    return fingerprint.of(task, None, None)  # type: ignore[arg-type]


def holding(value: Any) -> dict[str, str]:
    """Return the fingerprint of a task with one attribute, `held`."""
    task = Folds()
    task.held = value  # type: ignore[attr-defined]
    return marks(task)


class Hostile:
    """Raises whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Table:
    """What pandas' DataFrame answers."""

    def __init__(self, rows: int, last: int = 0) -> None:
        self.rows, self.last, self.columns = range(rows), last, ["a"]

    def __len__(self) -> int:
        return len(self.rows)

    def head(self, rows: int) -> Table:
        return Table(rows)

    def tail(self, rows: int) -> Table:
        return Table(rows, self.last)

    def to_numpy(self) -> Any:
        assert len(self) < 1000, "the whole table was read"
        return np.full((len(self), 1), self.last)


class Archive(Mapping[str, Any]):
    """What numpy's NpzFile answers: it reads a whole array for each item."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_a_fingerprint_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Folds):
        broken = Hostile()

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) * HOSTILE["a"]

    task = Odd()
    # a class of tables is no table
    task.held, task.table, task.text = Hostile(), Table, 10**5000  # type: ignore[attr-defined]
    found = marks(task)
    assert (found["task.held"], found["task.text"]) == ("", "")
    assert found["task.table"] == "object Table"
    assert found["code of test_a_fingerprint_never_raises.Odd.loss"] != ""
    assert "code of Regression.loss" in found
    assert fingerprint.differences(found, {**found, "task.held": "1"}) == [], "it tells nothing"
    # an error in reading one function hides no other
    name = "code of Folds.model"
    monkeypatch.setattr(fingerprint, "_of_code", lambda code: 1 / 0 if code is Folds.model.__code__ else "")
    found = marks(task)
    assert [other for other, text in found.items() if other.startswith("code of ") and text == ""] == [name]
    assert fingerprint.differences(found, {**found, name: "1"}) == []


HOSTILE: dict[str, Any] = {"a": Hostile()}


def test_a_fingerprint_reads_little_of_large_values() -> None:
    # 8 TB each: a copy would fail
    large: list[Callable[[int], Any]] = [
        lambda add: np.broadcast_to(np.arange(add, (1 << 20) + add), (1 << 20, 1 << 20)),
        lambda add: torch.arange(add, (1 << 20) + add).expand(1 << 20, 1 << 20),
        lambda add: np.arange(add, (1 << 20) + add).reshape(1024, 1024).T,
        lambda add: Table(10**12, last=add),
        lambda add: {key: key for key in range(100_000 + add)},
        lambda add: bytes(2_000_000 + add),
        lambda add: "a" * (2_000_000 + add),
        lambda add: np.full(100_000, add).astype(object),
    ]
    for make in large:
        same, again, other = holding(make(0)), holding(make(0)), holding(make(1))
        assert same["task.held"] == again["task.held"] != ""
        assert same["task.held"] != other["task.held"], same["task.held"]
    assert holding(Archive("a", "b"))["task.held"] == holding(Archive("a", "b"))["task.held"] != ""
    assert holding(Archive("a"))["task.held"] != holding(Archive("b"))["task.held"]
    assert holding({*range(100_000)})["task.held"] == "", "a set has no ends"
    assert holding([[[0] * 100] * 100] * 100)["task.held"] == ""
    assert holding([0] * 10**6)["task.held"].startswith("1000000 items")


class Tokenizer:
    """The user's own, with a state that differs in each session."""

    def __init__(self, cache: str) -> None:
        self.cache = cache


@dataclasses.dataclass
class Settings:
    fold: int = 0


def test_only_plain_attributes_refuse_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusing: list[tuple[Any, Any]] = [
        (0, 1), (0.1, 0.2), ("a", "b"), (True, False), (None, 1), ([0], [1]), ({"a": {1}}, {"a": {2}}),
        (np.arange(3), np.ones(3)), (torch.zeros(2), torch.ones(2)), (Path("a"), Path("b")), (range(3), range(4)),
        (np.int64(1), np.int64(2)), (torch.float32, torch.float16), (Settings(0), Settings(1)), (b"a", b"b"), (b"", 1),
    ]  # fmt: skip
    for was, now in refusing:
        assert fingerprint.differences(holding(was), holding(now), notes=False), (was, now)
    noted: list[tuple[Any, Any]] = [
        (Tokenizer("a"), Tokenizer("b")), ([Tokenizer("a")], [Tokenizer("b")]), (None, Tokenizer("a")),
        (nn.ReLU(), nn.Tanh()), (math.sin, math.cos), (Net(), Net()),
    ]  # fmt: skip
    for was, now in noted:
        assert fingerprint.differences(holding(was), holding(now)), (was, now)
        without = {name: text for name, text in holding(now).items() if not name.startswith("code of ")}
        assert fingerprint.differences(without, {**without, "task.held": holding(was)["task.held"]}, notes=False) == []
    unseen: list[tuple[Any, Any]] = [
        (random.Random(0), random.Random(1)), (nn.Linear(1, 1), nn.Linear(1, 1)), (time.time(), time.time() - 86400),
        (collections.Counter, collections.Counter),
    ]  # fmt: skip
    for was, now in unseen:
        assert fingerprint.differences(holding(was), holding(now)) == [], (was, now)
    # a finished run with another object is handed out, with a note
    tasks = [Folds(), Folds(), Folds(fold=1)]
    for task, cache in zip(tasks, "aba", strict=True):
        task.held = Tokenizer(cache)  # type: ignore[attr-defined]
    assert train(config(tmp_path), tasks[0]).finished
    assert train(config(tmp_path), tasks[1]).finished
    assert "NOTE: edited since" in (said := capsys.readouterr().out)
    assert "task.held was object" in said
    assert "already finished" in said
    with pytest.raises(CheckpointError, match=r"another task: .*task\.fold was 0, is 1"):
        train(config(tmp_path), tasks[2])


# Read by Globals.loss
FACTORS: dict[str, Any] = {"a": [1.0]}
WEIGHTS = [1.0]
SETTINGS = Settings()
SEEN: dict[int, int] = {}
STARTED = time.time()


@functools.lru_cache
def factor(of: int) -> float:
    return 2.0 * of


def edited_factor(of: int) -> float:
    return 3.0 * of


def doubled(function: Callable[[int], float]) -> Callable[[int], float]:
    @functools.wraps(function)
    def twice(of: int) -> float:
        return 2 * function(of)

    return twice


def tripled(function: Callable[[int], float]) -> Callable[[int], float]:
    @functools.wraps(function)
    def thrice(of: int) -> float:
        return 3 * function(of)

    return thrice


class Globals(Folds):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        number = len(SEEN)
        SEEN[number] = 1
        return super().loss(model, batch) * FACTORS["a"][0] * WEIGHTS[0] * SETTINGS.fold * factor(1) * STARTED


def test_what_the_code_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = marks(Globals())
    edited = "code of Globals.loss was edited"
    changes: list[tuple[str, Any, str]] = [
        ("FACTORS", {"a": [2.0]}, edited), ("WEIGHTS", [2.0], edited), ("SETTINGS", Settings(1), edited),
        ("factor", functools.lru_cache(edited_factor), "code of edited_factor is new"),
    ]  # fmt: skip
    for name, value, said in changes:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], name, value)
            assert said in fingerprint.differences(before, marks(Globals())), name
    found = []
    for value in (doubled(edited_factor), tripled(edited_factor), doubled(factor.__wrapped__)):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "factor", value)
            found.append(marks(Globals()))
    assert fingerprint.differences(found[0], found[1]) == ["code of edited_factor was edited"], "the wrapper"
    assert "code of factor is new" in fingerprint.differences(found[0], found[2]), "the wrapped"
    for name, value in (("SEEN", {1: 1}), ("STARTED", time.time() - 9000)):  # a cache, a time of this session
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], name, value)
            assert fingerprint.differences(before, marks(Globals())) == [], name
    # a checkpoint of another rank than 0, or of an older form, tells nothing
    assert fingerprint.differences({}, before) == []
    assert fingerprint.differences({**before, "form": "1"}, marks(Globals())) == []
    # the user's folder may begin with the package's name
    assert not fingerprint._is_installed(fingerprint.PACKAGE + "_mine/task.py")
    assert fingerprint._is_installed(fingerprint.PACKAGE + "/task.py")


# All that a run remembers, killed
class All(Regression):
    """BatchNorm, a schedule of its own, gathered metrics, parts of the loss, and the end in the fourth evaluation."""

    name = "All"

    def __init__(self, folder: Path, fails_at: int = 0) -> None:
        super().__init__(samples=130, val_samples=23)
        self.folder, self._fails_at, self.calls = str(folder), fails_at, 0

    def model(self) -> nn.Module:
        # no bias: its gradient below BatchNorm is rounding alone, which Adam makes a whole step of
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

    def schedule(self, step: int, max_steps: int) -> float:
        return 1 / math.sqrt(1 + step)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += model.training
        if model.training and self.calls == self._fails_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        error = (model(batch[0]) - batch[1]).square().sum()
        tenth = 0.1 * len(batch[0])
        return error + tenth, {"square": error, "tenth": tenth}

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"predicted": distributed.Gather(model(batch[0])), "target": distributed.Gather(batch[1])}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        assert distributed.is_main(), "only rank 0 has the rows"
        x = self.val_data()[:][0]  # type: ignore[index]
        rows = len(metrics["target"])
        if rows != 23:
            raise ValueError("only one class in these few")  # as sklearn's roc_auc_score may say in the trial
        assert torch.equal(metrics["target"], (x.sum(1, keepdim=True) / 4).sin()[:rows]), "each once, in order"
        # from the fourth evaluation on, none is better: patience 2 ends the run at the sixth
        return {"loss": 1.0 / min(self.evaluations(), 4), "mean": float(metrics["predicted"].mean())}

    def evaluations(self) -> int:
        return 1 + sum(record["kind"] == "eval" for record in progress.read(self.folder))


def test_all_of_these_killed_are_the_same_run(tmp_path: Path) -> None:
    def run(name: str, nproc: int = 2, fails_at: int = 0, **changes: Any) -> Path:
        settings = config(
            tmp_path / name, global_batch_size=24, max_steps=40, eval_every=2, patience=2, save_every=3, log_every=1,
            lr=0.05, keep_last=2, **changes,
        )  # fmt: skip
        launch(train, settings, All(tmp_path / name, fails_at), nproc=nproc)
        return tmp_path / name

    one = run("one")
    # patience counts over the kill
    with pytest.raises(RuntimeError, match="SIGKILL"):
        run("two", fails_at=8)
    assert [r["step"] for r in progress.read(tmp_path / "two") if r["kind"] == "eval"][-1] < 8
    two = run("two")
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert comparable(progress.read(one)) == comparable(progress.read(two))
    result = json.loads((two / "result.json").read_text())
    assert (result["finished"], result["stopped_early"], result["remaining_steps"]) == (True, True, 0)
    assert result["step"] == 12
    assert result["reason"] == "stopped early: loss has not improved on 0.25 in 2 evaluations"
    records = [r for r in progress.read(two) if r["kind"] == "train"]
    assert [r["lr"] for r in records] == pytest.approx([0.05 / math.sqrt(1 + step) for step in range(12)])
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_square"] + record["loss_tenth"])
    # another number of processes gives the same
    three = run("three", nproc=3)
    losses = [[r["loss_square"] for r in progress.read(f) if r["kind"] == "train"] for f in (one, three)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    means = [[r["val_mean"] for r in progress.read(f) if r["kind"] == "eval"] for f in (one, three)]
    assert means[0] == pytest.approx(means[1], rel=1e-3)
    # the same again is done; more patience goes on
    assert launch(train, TrainConfig.load(_settings(two)), All(two), nproc=2).step == 12
    more = launch(train, TrainConfig.load(_settings(two)).replace(patience=4), All(two), nproc=2)
    assert (more.step, more.finished) == (16, True)


def _settings(folder: Path) -> Path:
    document = json.loads((folder / "config.json").read_text())
    path = folder / "settings.json"
    path.write_text(json.dumps({name: value for name, value in document.items() if name != "stamp"}))
    return path


# Ends before time
class Ends(Regression):
    def on_record(self, record: dict[str, Any]) -> str | None:
        if record["kind"] == "train" and record["step"] == 6:
            if self.dropout:
                progress.stop(self.folder)  # type: ignore[attr-defined]
                return None
            return "six is enough"
        return None


def test_on_record_ends_a_run_at_the_next_step_on_all_ranks(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", max_steps=400, log_every=2)
    result = launch(train, settings, Ends(), nproc=2)
    assert result.step <= 7
    assert (result.finished, result.stopped_early) == (True, True)
    assert result.reason == "stopped early: six is enough"
    assert launch(train, settings, Ends(), nproc=2).step == result.step
    asked = Ends(dropout=0.1)
    asked.folder = str(tmp_path / "asked")  # type: ignore[attr-defined]
    result = launch(train, settings.replace(output_dir=str(tmp_path / "asked")), asked, nproc=2)
    assert (result.finished, result.reason) == (False, "asked to stop")
    assert result.step <= 7


def test_an_improvement_is_more_than_min_delta(tmp_path: Path) -> None:
    class Slowly(Regression):
        def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
            return {"score": len([r for r in progress.read(tmp_path / "a") if r["kind"] == "eval"]) / 10}

    settings = config(tmp_path / "a", max_steps=20, eval_every=1, best_metric="score", best_mode="max", patience=3)
    assert train(settings.replace(min_delta=0.25), Slowly()).step == 20, "it improves every third time"
    shutil.rmtree(tmp_path / "a")
    assert train(settings.replace(min_delta=10.0), Slowly()).step == 4


# What is refused
def test_gathered_metrics_without_room_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "ram_bytes", lambda: 100)
    with pytest.raises(RuntimeError, match=r"gathered metrics of all samples need .* GiB, but this machine has"):
        train(config(tmp_path), All(tmp_path))


class Returns(Regression):
    def __init__(self, makes: Any) -> None:
        super().__init__()
        self.makes = makes

    def optimizer(self, model: nn.Module, config: TrainConfig) -> Any:
        return self.makes(torch.optim.SGD(model.parameters(), lr=config.lr))


class Scheduled(Regression):
    def optimizer(self, model: nn.Module, config: TrainConfig) -> Any:
        optimizer = super().optimizer(model, config)
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return optimizer


class Scheduler:
    """Made out of sight of the task's code."""

    def __call__(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return optimizer


class Negative(Regression):
    def schedule(self, step: int, max_steps: int) -> float:
        return 1.0 - step


class Stream(Regression):
    def train_data(self) -> Any:
        class Lines(IterableDataset[Any]):
            def __iter__(self) -> Any:
                yield torch.zeros(8)

        return Lines()


class Parts(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        return loss, {"a" if len(batch[0]) == 30 else "b": loss}


def test_what_a_task_cannot_say_is_a_sentence(tmp_path: Path) -> None:
    settings = config(tmp_path)
    refused: list[tuple[Task, type[Exception], str]] = [
        (Returns(lambda made: [made, made]), TypeError, "returned a list, expected one optimizer.*a GAN.* launch a "),
        (Returns(lambda made: None), TypeError, r"must return a torch\.optim\.Optimizer, got a NoneType"),
        (Returns(Scheduler()), ValueError, r"a scheduler of torch \(torch\.optim\.lr_scheduler\), which nothing would"),
        (Scheduled(), ValueError, r"Scheduled\.optimizer makes a scheduler of torch \(CosineAnnealingLR\)"),
        (Negative(), ValueError, r"Negative\.schedule\(2, 4\) gave -1\.0, expected 0 or more"),
        (Stream(), TypeError, r"is a stream, Lines: .* Index the shards once .* or launch a loop of your own"),
        (Parts(samples=130), ValueError, r"gave the parts \['a'\], but \['b'\] before"),
    ]  # fmt: skip
    for task, kind, says in refused:
        with pytest.raises(kind, match=says):
            train(settings.replace(resume="never"), task)
    with pytest.raises(ValueError, match=r"warmup_steps=3, min_lr=0\.0 with Negative\.schedule"):
        train(settings.replace(warmup_steps=3), Negative())


def test_warm_up_and_restarts_are_counted_in_epochs(tmp_path: Path) -> None:
    settings = config(
        tmp_path, max_steps=70, log_every=1, warmup_steps="1 epoch", schedule="cosine_restarts",
        schedule_first_cycle="2 epochs", schedule_cycle_factor=2, lr=0.5,
    )  # fmt: skip
    result = train(settings, Regression())  # 10 steps an epoch
    rates = [r["lr"] for r in result.records() if r["kind"] == "train"]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20, T_mult=2)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
