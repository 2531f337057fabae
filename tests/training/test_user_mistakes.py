"""Slips that people make, and files that other people give: what must not pass in silence, and must not end a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kaggle_mgpu import Task, TrainConfig, launch, plan, session, train
from kaggle_mgpu.parallel import Strategy
from kaggle_mgpu.training import expect
from tasks import Images, Pairs, Regression

CPU = torch.device("cpu")


def config(folder: Path, **changes: Any) -> TrainConfig:
    settings = TrainConfig(global_batch_size=50, lr=0.01, max_steps=4, data_workers=0, output_dir=str(folder))
    return settings.replace(**changes)


# Gradients
class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("form", ["squeeze", "view", "reshape", "sum"])
def test_a_parameter_that_is_added_to_the_loss_gets_its_own_gradient(form: str) -> None:
    """Its gradient is what backward began with: autograd hands that very tensor on, and accumulation writes to it."""
    forms = {
        "squeeze": lambda p: p.squeeze(), "view": lambda p: p.view(()), "reshape": lambda p: p.reshape(()),
        "sum": lambda p: p.sum(0),
    }  # fmt: skip

    def loss(model: Scalar, batch: Tensor) -> Tensor:
        return (model.w * batch).sum() + forms[form](model.p)

    how = Strategy(loss, None, precision="fp32", device=CPU)
    model = Scalar()
    how.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        for _ in range(4):
            how.backward(torch.ones(3), 1.0, lambda: 8)
        assert model.w.grad is not None
        assert model.p.grad is not None
        assert torch.equal(model.w.grad, torch.full((3,), 0.5))
        assert torch.equal(model.p.grad, torch.full((1,), 0.5))
        how.step(optimizer, max_norm=0.01)


class InDouble(Regression):
    dtype = torch.float64

    def model(self) -> nn.Module:
        return super().model().to(self.dtype)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x.to(self.dtype)) - y).square().sum()


class InBfloat16(InDouble):
    dtype = torch.bfloat16


@pytest.mark.parametrize("task", [InDouble(), InBfloat16()], ids=["float64", "bfloat16"])
def test_models_that_are_not_in_float32_are_clipped_too(task: Regression, tmp_path: Path) -> None:
    result = launch(train, config(tmp_path / "run", max_norm=1e-3), task)
    assert result.finished
    assert all(line["grad_norm"] > 1e-3 for line in result.records() if line["kind"] == "train")


class Unused(Regression):
    def model(self) -> nn.Module:
        model = super().model()
        model.register_parameter("spare", nn.Parameter(torch.ones(2)))
        return model


def test_a_parameter_that_the_loss_does_not_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no gradient reached spare: .*find_unused_parameters=True"):
        launch(train, config(tmp_path / "a", nproc=2), Unused())
    result = launch(train, config(tmp_path / "b", nproc=2, find_unused_parameters=True), Unused())
    assert result.finished
    assert torch.equal(result.load(Unused().model()).get_parameter("spare"), torch.ones(2))


# Tasks
class Mean(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) / len(batch[0])


def test_a_mean_instead_of_a_sum_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(train, config(tmp_path / "mean"), Mean())
    assert "WARNING: Task.loss looks like a mean over the batch. It should be the SUM" in capsys.readouterr().out
    launch(train, config(tmp_path / "sum"), Regression(dropout=0.5))
    assert "WARNING" not in capsys.readouterr().out


class Alone(Pairs):
    """The usual way to write it: each micro-batch by itself."""

    whole_batch_loss = False


class Broadcast(Regression):
    """Subtracts a row of targets from a column of predictions, which torch broadcasts to a square."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, [batch[0], batch[1][:, 0]])


class Noisy(Regression):
    """Draws random numbers in the loss, in an evaluation too."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, [batch[0] + torch.randn_like(batch[0]), batch[1]])


def test_samples_that_see_each_other_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(name: str, task: Task, **changes: Any) -> str:
        launch(train, config(tmp_path / name, **changes), task)
        return capsys.readouterr().out

    assert "set whole_batch_loss = True in the task and use distributed.gather_with" in said("alone", Alone(50))
    assert "predictions and targets have the same shape: (8, 1) - (8,) broadcasts to (8, 8)" in said(
        "broadcast", Broadcast()
    )
    for name, task in {"pairs": Pairs(50), "noisy": Noisy(), "images": Images(50)}.items():
        assert "NOTE" not in said(name, task), name
    note = r"NOTE: BatchNorm \(1 and 2 more\) takes its statistics from 25 samples at a time, not .* batch of 50"
    split: dict[str, dict[str, Any]] = {
        "off": {"nproc": 2, "sync_batchnorm": "off"}, "accumulated": {"gradient_accumulation_steps": 2},
        "dp": {"strategy": "dp", "nproc": 2},
    }  # fmt: skip
    for name, changes in split.items():
        assert re.search(note, said(name, Images(50), **changes)), name
    assert "NOTE" not in said("ddp", Images(50), nproc=2)
    for name in ("accumulated", "dp"):
        with pytest.raises(ValueError, match=r"Pairs\.whole_batch_loss is True, .* in parts of 25, which are computed"):
            launch(train, config(tmp_path / f"{name}-pairs", **split[name]), Pairs(50))


class Loader(Regression):
    def train_data(self) -> Any:
        return DataLoader(super().train_data(), batch_size=4)


def test_what_is_no_task_no_config_or_no_dataset(tmp_path: Path) -> None:
    settings = config(tmp_path / "run")
    with pytest.raises(TypeError, match=r"a Task \(an instance, not the class\), got a TrainConfig and the class Regr"):
        launch(train, settings, Regression)
    with pytest.raises(TypeError, match="got a Regression and a TrainConfig"):
        launch(train, Regression(), settings)
    with pytest.raises(
        TypeError, match=r"train_data\(\) is a loader: expected a map-style dataset.* Return the loader's dataset"
    ):
        launch(train, settings, Loader())
    with pytest.raises(TypeError, match=r"launch expects a function first, got a TrainConfig: launch\(train, "):
        launch(settings, Regression())  # type: ignore[arg-type]


def test_a_method_that_nothing_would_call(tmp_path: Path) -> None:
    def named(name: str, *more: str) -> Task:
        return type("Mine", (Task,), {each: lambda self, *_: None for each in (name, *more)})()

    settings = config(tmp_path / "run")
    for name, meant in {"metric": "metrics", "val_dataset": "val_data", "configure_optimizers": "optimizer"}.items():
        with pytest.raises(
            TypeError, match=rf"^Mine\.{name} is no method of Task, and nothing .* Did you mean {meant}\?"
        ):
            launch(train, settings, named(name))
    with pytest.raises(TypeError, match=r"Mine\.fsdp_unit is no method"):
        plan(settings, named("fsdp_unit"))
    assert not (tmp_path / "run").exists()
    # one's own: beside the method that is called, or under another name
    for names in (("metric", "metrics"), ("_metric",), ("val_dataset", "val_data"), ("augment",), ("losses",)):
        expect(settings, named(*names), "train")

    class Mixin:
        def configure_optimizers(self) -> None:
            """Of another library's, which may call it."""

    class Own(Mixin, Regression):
        metric = nn.L1Loss()
        val_dataset = TensorDataset

        def compute_metrics(self, values: Any) -> Any:
            return values

        def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
            return super().summary(self.compute_metrics(metrics))

        def collate_fn(self, samples: list[Any]) -> Any:
            return samples

        def __init__(self) -> None:
            super().__init__()
            self.collate = self.collate_fn

    expect(settings, Own(), "train")


def test_a_finished_run_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path / "run")
    first = launch(train, settings, Regression())
    capsys.readouterr()
    assert launch(train, settings, Regression()).step == first.step
    assert "already finished after 4 steps" in capsys.readouterr().out
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = launch(train, settings.replace(output_dir=str(tmp_path / "moved")), Regression())
    moved.load(Regression().model())


# Files from elsewhere
def rewritten(folder: Path, **changes: Any) -> None:
    """Change state.json, with a checksum that fits."""
    file = folder / "state.json"
    document = json.loads(file.read_text())
    document.pop("crc32")
    document = {**document, **changes}
    document["crc32"] = zlib.crc32(json.dumps(document).encode())
    file.write_text(json.dumps(document))


HOSTILE: dict[str, Any] = {
    "a header of 2^46 bytes": lambda p: overwrite(p / "model.safetensors", b"\0\0\0\0\0\x40\0\0"),
    "a header of 2^64 bytes": lambda p: overwrite(p / "model.safetensors", b"\xff" * 8),
    "no step": lambda p: rewritten(p, step=None),
    "a negative step": lambda p: rewritten(p, step=-3),
    "a step that is text": lambda p: rewritten(p, step="x"),
    "a list for the config": lambda p: rewritten(p, config=[]),
    "a number for a file": lambda p: rewritten(p, files={"model.safetensors": 3}),
    "no files": lambda p: rewritten(p, files={}),
    "no optimizer": lambda p: rewritten(p, files={name: it for name, it in listed(p).items() if "optim" not in name}),
    "a position below the start": lambda p: rewritten(p, state={"step": 2, "samples_seen": -5}),
    "a position that is text": lambda p: rewritten(p, state={"step": "2", "samples_seen": 20}),
    "more state than there is": lambda p: rewritten(p, state={"step": 2, "samples_seen": 20, "surprise": 1}),
    "a nest of lists": lambda p: (p / "state.json").write_text("[" * 100_000),
    "a file outside": lambda p: rewritten(p, files={"../../x": {"bytes": 1, "crc32": 0}}),
    "a folder for a file": lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()),
}


def listed(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((folder / "state.json").read_text())["files"]
    return files


def overwrite(path: Path, start: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(start)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_checkpoint_among_the_inputs_does_not_end_a_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    before = session.input_root() / "notebooks" / "somebody" / "run"
    launch(train, config(before, max_steps=2), Regression())
    (folder,) = (before / "checkpoints").iterdir()
    HOSTILE[kind](folder)
    capsys.readouterr()
    result = launch(train, config(tmp_path / "run"), Regression())
    assert result.finished
    assert result.step == 4
    said = capsys.readouterr().out
    assert f"checkpoint {folder} cannot be used" in said
    assert "going on from" not in said


def test_other_bad_files_of_an_input_do_not_end_a_run_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    before = session.input_root() / "notebooks" / "somebody" / "run"
    launch(train, config(before, max_steps=2, eval_every=1), Regression())
    (before / "best" / "model.safetensors").write_bytes(os.urandom(200))
    with open(before / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": "x"}\n{"kind": "train", "step": null}\n')
    capsys.readouterr()
    result = launch(train, config(tmp_path / "run", eval_every=1), Regression())
    said = capsys.readouterr().out
    assert "going on from" in said
    assert "the best evaluation is searched for again" in said
    assert result.finished
    assert result.best is not None
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert [line["step"] for line in result.records() if line["kind"] == "eval"] == [1, 2, 3, 4]


def test_a_tensor_dataset_is_a_dataset() -> None:
    """The check for loaders must not refuse what everybody uses."""
    from kaggle_mgpu.data import size_of

    assert size_of(TensorDataset(torch.zeros(3, 1)), "train_data()") == 3
