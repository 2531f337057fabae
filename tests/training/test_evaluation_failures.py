"""A mistake in an evaluation shows before the first step, and an error later on loses nothing of the training."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from everything import Killed
from kaggle_mgpu import TrainConfig, distributed, launch, train
from kaggle_mgpu.checkpoints import checkpoint, read_tensors
from kaggle_mgpu.progress import display, progress
from kaggle_mgpu.progress.records import comparable, read
from kaggle_mgpu.training import evaluation
from tasks import Regression


def config(folder: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(global_batch_size=50, max_steps=12, lr=0.01, log_every=1, output_dir=str(folder))
    return plain.replace(**changes)


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read(folder) if record["kind"] == kind]


def same_weights(one: Path, two: Path) -> bool:
    first, second = (read_tensors(folder / "model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Counting(Regression):
    """Counts its forward passes in training."""

    name = "Regression"
    trained = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.trained += model.training
        return super().loss(model, batch)


class Misspelt(Counting):
    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": (losss, 1)}  # type: ignore[name-defined]  # noqa: F821


class BareTensor(Counting):
    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": self.loss(model, batch)}


class TwoNumbers(Counting):
    """A tensor of two values is no pair, though it unpacks like one."""

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": torch.zeros(2)}


class NoDict(Counting):
    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return self.loss(model, batch), len(batch[0])


class OtherName(Counting):
    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"error": (self.loss(model, batch), len(batch[0]))}


class BadSummary(Counting):
    def summary(self, metrics: dict[str, Tensor]) -> Any:
        return {"loss": float(metrics["los"])}


class TensorSummary(Counting):
    """A checkpoint cannot hold a tensor among the metrics."""

    def summary(self, metrics: dict[str, Tensor]) -> Any:
        return metrics


class Penalty(Counting):
    """A loss that needs gradients of the model's output."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return super().loss(model, batch) + slope.square().sum()


class BadSample(Counting):
    def val_data(self) -> Any:
        return BrokenDataset()


class BrokenDataset(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        raise FileNotFoundError(f"no image {index}.png")


MISTAKES = [
    (Misspelt, r"Misspelt\.metrics failed .* NameError: name 'losss' is not defined \(.*\.py, line \d+: return \{"),
    (BareTensor, r"must return \{name: \(sum, count\)\}, got a Tensor for 'loss'\. Correct BareTensor\.metrics"),
    (TwoNumbers, r"must return \{name: \(sum, count\)\}, got a Tensor for 'loss'"),
    (NoDict, r"must return \{name: \(sum, count\)\}, got a tuple"),
    (OtherName, r"best_metric is 'loss', but the evaluation gave error\. Set best_metric to one of them"),
    (BadSummary, r"BadSummary\.summary failed .* KeyError: 'los' \(.* line \d+"),
    (TensorSummary, r"summary failed .* expected \{name: number\}, got a Tensor for 'loss': use float"),
    (Penalty, r"does not require grad.* define Task\.metrics.* use torch\.enable_grad\(\)"),
    (BadSample, r"BadSample\.val_data failed .* FileNotFoundError: no image 0\.png"),
]


# A trial before the first step
@pytest.mark.parametrize(("task", "message"), MISTAKES)
def test_a_mistake_shows_before_the_first_step(tmp_path: Path, task: type[Counting], message: str) -> None:
    made = task()
    with pytest.raises((RuntimeError, ValueError), match=message) as caught:
        train(config(tmp_path, eval_every="end"), made)
    assert made.trained == 0
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists()


def test_a_mistake_made_between_two_sessions_shows_before_the_next_step(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=6), Counting())
    made, newest = Misspelt(), tmp_path / "checkpoints" / "step-00000006"
    with pytest.raises(RuntimeError, match="name 'losss' is not defined"):
        train(config(tmp_path, resume=str(newest)), made)  # by name, since that run was finished with other code
    assert made.trained == 0
    assert train(config(tmp_path), Counting()).finished
    assert [record["step"] for record in kinds(tmp_path, "train")] == list(range(1, 13))


class OnRankOne(Regression):
    name = "Regression"

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        if distributed.rank() == 1:
            raise KeyError("a file of rank 1 alone")
        return super().metrics(model, batch)


def each_error(settings: TrainConfig) -> str:
    try:
        train(settings, OnRankOne())
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_all_ranks_fail_together_with_one_error(tmp_path: Path) -> None:
    said = launch(each_error, config(tmp_path, strategy="ddp"), nproc=2)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: OnRankOne.metrics failed in the trial evaluation")


class Statistics(Regression):
    """Draws from every global generator, moves buffers even in an evaluation, and keeps what it saw of them."""

    name = "Regression"

    def __init__(self, tried: bool = True, **given: Any) -> None:
        super().__init__(**given)
        self.tried = tried

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        model.insert(1, nn.BatchNorm1d(16))
        model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        model.register_buffer("unsaved", torch.zeros(()), persistent=False)
        return model

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        for name in ("calls", "unsaved"):
            model.get_buffer(name).add_(1)
        model.train()
        model(batch[0])
        model.eval()
        torch.rand(3), np.random.rand(3), random.random()
        with torch.enable_grad():
            self.loss(model, batch).backward()  # leaves a gradient, which no step may find
        return super().metrics(model, batch)


def test_a_trial_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path / "with", eval_every="end", max_steps=5)
    tried = train(settings, Statistics(dropout=0.2))
    assert "trial" in vars(evaluation.Evaluation)
    monkeypatch.setattr(evaluation.Evaluation, "trial", lambda *_: 0.0)
    untried = train(settings.replace(output_dir=str(tmp_path / "without")), Statistics(dropout=0.2))
    assert tried.metrics == untried.metrics
    assert same_weights(tmp_path / "with", tmp_path / "without")
    both = [comparable(read(tmp_path / name)) for name in ("with", "without")]
    assert both[0] == both[1]


def test_a_trial_takes_one_micro_batch_and_no_loader_process(tmp_path: Path) -> None:
    class Sizes(Counting):
        sizes: list[int]

        def metrics(self, model: nn.Module, batch: Any) -> Any:
            if self.trained == 0:
                self.sizes.append(len(batch[0]))
                assert torch.utils.data.get_worker_info() is None
            return super().metrics(model, batch)

    task = Sizes()
    task.sizes = []
    train(config(tmp_path, micro_batch_size=10, max_steps=1), task)
    assert task.sizes == [10]


class TightTrial(Regression):
    name = "Regression"

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        if len(batch[0]) > 13 and distributed.rank() == distributed.world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().metrics(model, batch)


@pytest.mark.parametrize(("strategy", "nproc"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_trial_that_is_too_much_for_the_memory_ends_nothing(tmp_path: Path, strategy: str, nproc: int) -> None:
    assert launch(train, config(tmp_path, strategy=strategy, nproc=nproc, max_steps=4), TightTrial()).finished
    assert [record["step"] for record in kinds(tmp_path, "start")] == [0]


# Later on
class Fails(Regression):
    """Fails in a chosen place, once the steps `after` have been taken."""

    def __init__(self, where: str = "", error: BaseException | None = None, after: int = 6, rank: int = 0) -> None:
        super().__init__(dropout=0.2)
        self.where, self.error, self.after, self.rank, self.trained = where, error, after, rank, 0

    def fail(self, where: str) -> None:
        here = where == self.where and distributed.rank() == self.rank
        if self.error is not None and here and self.trained >= self.after:
            raise self.error

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        return model.insert(1, nn.BatchNorm1d(16))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if model.training:
            self.fail("loss")  # the running statistics have moved by now
            self.trained += 1
        return loss

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        self.fail("metrics")
        return super().metrics(model, batch)

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        self.fail("summary")
        return super().summary(metrics)

    def collate(self, samples: list[Any]) -> Any:
        self.fail("collate")
        return super().collate(samples)

    def on_record(self, record: dict[str, Any]) -> None:
        self.fail("on_record")

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        made = super().optimizer(model, config)
        made.register_step_pre_hook(lambda *_: self.fail("optimizer"))
        return made


BREAKS = [
    ("metrics", ValueError("no such class")),
    ("summary", ZeroDivisionError("no hit")),
    ("loss", RuntimeError("shapes cannot be multiplied")),
    ("collate", FileNotFoundError("no image 7.png")),
    *((where, KeyboardInterrupt()) for where in ("metrics", "summary", "loss", "collate", "on_record")),
]


def settings_of(folder: Path, **changes: Any) -> TrainConfig:
    return config(folder, eval_every=6, save_every=None, ema_decay=0.9, data_workers=0, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings_of(folder), Fails())
    return folder


@pytest.mark.parametrize(("where", "error"), BREAKS, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_an_error_that_leaves_the_weights_whole_loses_no_step(
    tmp_path: Path, undisturbed: Path, where: str, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        train(settings_of(tmp_path), Fails(where, error))
    saved = tmp_path / "checkpoints" / "step-00000006"
    assert caught.value.__notes__ == [f"The state after step 6 is in {saved}: the next run continues from there."]
    assert train(settings_of(tmp_path), Fails()).finished
    assert [record["step"] for record in kinds(tmp_path, "start")] == [0, 6]
    assert same_weights(tmp_path, undisturbed)
    if where != "on_record":  # an interrupt there comes before its record is written
        assert comparable(read(tmp_path)) == comparable(read(undisturbed))


@pytest.mark.parametrize("error", [RuntimeError("the driver is gone"), KeyboardInterrupt()], ids=repr)
def test_weights_that_an_update_may_have_changed_are_not_saved(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        train(settings_of(tmp_path), Fails("optimizer", error))
    (note,) = caught.value.__notes__
    assert note.startswith(
        "Some weights may have been updated and others not, so the state in memory is not saved. There"
    )
    assert not any((tmp_path / "checkpoints").glob("step-*"))


def test_an_error_of_one_rank_among_two_loses_no_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 1 alone") as caught:
        launch(train, settings_of(tmp_path, nproc=2), Fails("metrics", ValueError("rank 1 alone"), rank=1))
    (note,) = caught.value.__notes__
    assert note.startswith(
        f"The state after step 6 is in {tmp_path / 'checkpoints' / 'step-00000006'}: the next run continues"
    )
    assert launch(train, settings_of(tmp_path, nproc=2), Fails()).finished
    assert [record["step"] for record in kinds(tmp_path, "start")] == [0, 6]


class Slow(Counting):
    """An evaluation that the trial finds to take seconds, and that is killed."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        if self.trained == 0:
            time.sleep(0.3)
        elif self.checkpoint is not None:
            until = time.monotonic() + 20
            while not self.checkpoint.exists() and time.monotonic() < until:
                time.sleep(0.01)
            raise Killed
        return super().metrics(model, batch)


def test_the_state_is_saved_before_a_long_evaluation(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, micro_batch_size=5)
    saved = tmp_path / "checkpoints" / "step-00000006"
    with pytest.raises(Killed):
        train(settings, Slow(saved))
    assert checkpoint.damage(saved) is None
    train(settings, Slow(None))
    assert [record["step"] for record in kinds(tmp_path, "start")] == [0, 6]
    assert [record["step"] for record in kinds(tmp_path, "eval")] == [6, 12]


def test_an_evaluation_that_is_made_again_stands_once_in_the_records(tmp_path: Path) -> None:
    """It was recorded, and the checkpoint from before it is the newest."""
    settings = settings_of(tmp_path, micro_batch_size=5)
    with pytest.raises(Killed):
        train(settings, SlowThenKilled())
    assert [record["step"] for record in kinds(tmp_path, "eval")] == [6]
    train(settings, Slow(None))
    assert [record["step"] for record in kinds(tmp_path, "start")] == [0, 6]
    assert [record["step"] for record in kinds(tmp_path, "eval")] == [6, 12]


class SlowThenKilled(Slow):
    def __init__(self) -> None:
        super().__init__(None)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if model.training and self.trained > 6 * 10:
            raise Killed
        return loss


# What only shows something
def test_an_error_in_on_record_is_told_once_and_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(settings_of(tmp_path), Fails("on_record", ConnectionError("wandb is away"), after=2)).finished
    notes = [record["text"] for record in kinds(tmp_path, "note")]
    assert notes == ["Task.on_record failed, and training goes on: ConnectionError: wandb is away"]
    assert [record["step"] for record in kinds(tmp_path, "train")] == list(range(1, 13))
    assert capfd.readouterr().err.count("in on_record\n") == 1


def test_a_value_that_no_record_holds_is_left_out(tmp_path: Path) -> None:
    class Adds(Regression):
        def on_record(self, record: dict[str, Any]) -> None:
            record["model"] = nn.Linear(1, 1)

    assert train(config(tmp_path), Adds()).finished
    (note,) = (record["text"] for record in kinds(tmp_path, "note"))
    assert note.startswith("Task.on_record failed, and training goes on: TypeError: a record holds numbers")
    assert [record["step"] for record in kinds(tmp_path, "train")] == list(range(1, 13))


@pytest.mark.parametrize("broken", ["_to_tensorboard", "_finish_tensorboard"])
def test_an_error_of_tensorboard_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], broken: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress, broken, full)
    monkeypatch.setattr(progress, "_summary_writer", lambda *_: object())
    if broken == "_finish_tensorboard":
        monkeypatch.setattr(progress, "_to_tensorboard", lambda *_: None)
    assert train(config(tmp_path, tensorboard=True), Regression()).finished
    said = capfd.readouterr()
    assert said.out.count("TensorBoard failed, and training goes on: OSError: [Errno 28] No space left") == 1
    assert said.err.count("in full\n") == 1


@pytest.mark.parametrize("method", ["show", "close", "open"])
def test_an_error_of_the_display_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("cannot draw")

    monkeypatch.setattr(display.Lines, method, broken)
    assert train(config(tmp_path), Regression()).finished
    notes = [record["text"] for record in kinds(tmp_path, "note")]
    expected = ["the display failed, and training goes on: ValueError: cannot draw"]
    assert notes == ([] if method == "close" else expected)
