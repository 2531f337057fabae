"""What is wrong is said where `launch` was called, with two processes, before a step is lost on it: text for text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import Task, TrainConfig, devices, distributed, launch, train
from kaggle_mgpu.env import environment as env
from kaggle_mgpu.errors import CheckpointError, DivergedError, WorkerTraceback
from kaggle_mgpu.recipes import text_generation
from tasks import Regression


class Wider(Regression):
    name = "Regression"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0), nn.Linear(32, 1))


class NotANumber(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) * float("nan")


class LabelError(Exception):
    """An error of the user's own."""


class OneRankRaises(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if distributed.rank() == 1:
            raise LabelError("row 17 has no label")  # this very line is in the traceback
        return super().loss(model, batch)


def another_model(config: TrainConfig) -> tuple[TrainConfig, Task]:
    assert train(config.replace(max_steps=2), Regression()).finished
    return config, Wider()


def missing_file(config: TrainConfig) -> tuple[TrainConfig, Task]:
    folder = Path(config.output_dir)
    recipe = text_generation.Config(data_path=str(folder / "none.txt"), nproc=2, output_dir=str(folder))
    return recipe, text_generation.task(recipe)


Case = tuple[Callable[[TrainConfig], tuple[TrainConfig, Task]], type[Exception], str]
CASES: dict[str, Case] = {
    "micro batch above the global one": (
        lambda config: (config.replace(micro_batch_size=40), Regression()),
        ValueError,
        "micro_batch_size 40 is larger than global_batch_size 32. Expected at most 16 for 2 replicas; lower it, or "
        "raise global_batch_size.",
    ),
    "a batch that two cannot share": (
        lambda config: (config.replace(global_batch_size=33), Regression()),
        ValueError,
        "global_batch_size 33 cannot be shared by 2 replicas x gradient_accumulation_steps 1: it is not a multiple of "
        "2. Choose global_batch_size 32 or 34, or another number of GPUs.",
    ),
    "an empty dataset": (
        lambda config: (config, Regression(samples=0)),
        ValueError,
        "the training data is empty: train_data() has length 0. Check the path it reads from.",
    ),
    "a missing file": (missing_file, FileNotFoundError, "data_path: no such file or folder: {folder}/none.txt"),
    "a checkpoint of another model": (
        another_model,
        CheckpointError,
        "{folder}/checkpoints/step-00000002 is from another model: 0.weight: (16, 8) in the checkpoint, (32, 8) in the "
        "model; 0.bias: (16,) in the checkpoint, (32,) in the model; 3.weight: (1, 16) in the checkpoint, (1, 32) in "
        "the model. Give this run another output_dir, or restore the settings the checkpoint was made with.",
    ),
    "nan in the first step": (
        lambda config: (config.replace(log_every=100), NotANumber()),
        DivergedError,
        "the loss is nan at step 1 (learning rate 0.01, gradient norm nan); step 1 was skipped, because the "
        "gradient was not finite. Step 1 had the samples 319, 310, 422, 406, 375, 246, 174, 64, 303, 5, 299, 61, 208, "
        "469, 193, 385, … (32 in all: see metrics.jsonl). There is no checkpoint from before. Look for nan in the data "
        "or a division by zero in Task.loss; else lower lr or raise warmup_steps.",
    ),
    "an error in one rank": (lambda config: (config, OneRankRaises()), LabelError, "row 17 has no label"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_caller_is_told(case: str, tmp_path: Path) -> None:
    make, kind, message = CASES[case]
    config = TrainConfig(global_batch_size=32, lr=0.01, nproc=2, output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    settings, task = make(config)
    with pytest.raises(kind) as caught:
        launch(train, settings, task)
    assert caught.type is kind
    assert str(caught.value) == message.format(folder=tmp_path / "run")
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert not (tmp_path / "run" / "result.json").exists() or case == "a checkpoint of another model"
    trace = str(caught.value.__cause__)
    assert re.search(r"rank [01]:\nTraceback \(most recent call last\):", trace)
    if case == "an error in one rank":
        assert "rank 1:" in trace
        assert "# this very line is in the traceback" in trace
        assert __file__ in trace


def test_more_processes_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1; do echo $i, GPU-$i, Tesla T4, 15360, 7.5; done\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(env, "NVIDIA_PATHS", ())
    monkeypatch.setattr(devices, "QUERY_TIMEOUT", 600.0)  # a busy machine may be slow to start even a shell
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    devices._query.cache_clear()
    config = TrainConfig(nproc=3, output_dir=str(tmp_path / "run"))
    try:
        for settings, visible in ((config, 2), (config.replace(gpu_ids="1"), 1)):
            there = "is 1 GPU" if visible == 1 else "are 2 GPUs"
            with pytest.raises(ValueError, match="nproc") as caught:
                launch(train, settings, Regression())
            assert str(caught.value) == (
                f"nproc=3, but there {there}: expected at most {visible}, one process per GPU. Use nproc='auto', or "
                f"choose 'GPU T4 x2' in the notebook's Settings > Accelerator."
            )
            assert caught.value.__cause__ is None, "no worker said this"
    finally:
        devices._query.cache_clear()
    assert not (tmp_path / "run").exists(), "nor was one started"


def test_one_process_is_told_the_same(tmp_path: Path) -> None:
    config = TrainConfig(global_batch_size=32, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=re.escape(CASES["an empty dataset"][2])):
        launch(train, config, Regression(samples=0))
    with pytest.raises(ValueError, match=r"the validation data is empty: val_data\(\) has length 0\. Return None to"):
        launch(train, config, EmptyValidation())
    with pytest.raises(ValueError, match=r"Task\.loss must return a scalar.*, the sum .*got shape \(32, 1\)"):
        launch(train, config.replace(max_steps=1), NotSummed())
    with pytest.raises(DivergedError, match=r"the loss is inf at step 1 .* There is no checkpoint from before"):
        launch(train, config.replace(max_steps=1), Infinite())


class EmptyValidation(Regression):
    def val_data(self) -> Any:
        return self.data(1, 0)


class NotSummed(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square()


class Infinite(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) + torch.inf
