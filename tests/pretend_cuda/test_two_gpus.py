"""Whole runs on two pretend T4s: every strategy and precision against one CPU process, and what may go wrong.

pytest tests/pretend_cuda/test_two_gpus.py     # builds the pretend pair first, half a minute once
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu import TrainConfig, launch, train
from kaggle_mgpu.checkpoints import read_tensors
from tasks import Language

pytestmark = pytest.mark.usefixtures("gpus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder / name), global_batch_size=16, max_steps=20, log_every=10, eval_every="end", lr=0.3,
        schedule="constant", precision="fp32", max_norm=1.0,
    ).replace(**changes)  # fmt: skip


def weights(folder: str | Path) -> torch.Tensor:
    named = read_tensors(Path(folder) / "model.safetensors")
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(named.items())])


def difference(one: str | Path, other: str | Path) -> float:
    return float((weights(one) - weights(other)).norm() / weights(other).norm())


# --- the same weights as one CPU process ----------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single", "nproc": 1},
    "single, fp16": {"strategy": "single", "nproc": 1, "precision": "fp16"},
    "ddp": {},
    "ddp, fp16": {"precision": "fp16"},
    "ddp, accumulation": {"gradient_accumulation_steps": 4},
    "ddp, fp16, accumulation": {"precision": "fp16", "gradient_accumulation_steps": 4},
    "ddp, loader workers": {"data_workers": 1},
    "ddp, auto": {"micro_batch_size": "auto"},
    "ddp, fp16, auto": {"micro_batch_size": "auto", "precision": "fp16"},
    "ddp, compression": {"gradient_compression": "fp16"},
    "ddp, compiled": {"compile": True},
    "dp": {"strategy": "dp"},
    "dp, fp16": {"strategy": "dp", "precision": "fp16"},
    "dp, accumulation": {"strategy": "dp", "gradient_accumulation_steps": 4},
    "dp, loader workers": {"strategy": "dp", "data_workers": 1},
    "dp, auto": {"strategy": "dp", "micro_batch_size": "auto"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, fp16": {"strategy": "fsdp", "precision": "fp16"},
    "fsdp, accumulation": {"strategy": "fsdp", "gradient_accumulation_steps": 4},
    "fsdp, cpu_offload": {"strategy": "fsdp", "cpu_offload": True},
    "fsdp, cpu_offload, fp16": {"strategy": "fsdp", "cpu_offload": True, "precision": "fp16"},
}


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> str:
    """The folder of one process's run on the CPU, which all others are compared with."""
    return str(train(config(folder, "on the CPU", strategy="single"), Language()).output_dir)


@pytest.mark.parametrize("name", RUNS)
def test_two_gpus_give_the_weights_of_one_cpu_process(name: str, folder: Path, on_cpu: str) -> None:
    settings = config(folder, name, **RUNS[name])
    result = launch(train, settings, Language(), in_worker=True)
    assert result.finished
    assert (result.strategy, result.precision) == (name.split(",")[0], settings.precision)
    assert result.skipped_steps == 0 or "fp16" in name
    # fp16 has 11 bits, and its scaler may skip a step or two at first
    assert difference(result.output_dir, on_cpu) < (0.05 if "fp16" in str(RUNS[name]) else 1e-5)


def test_dp_refuses_a_compiled_model(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"compile=True with strategy='dp'.*strategy='ddp'"):
        launch(train, config(folder, "dp, compiled", strategy="dp", compile=True), Language(), in_worker=True)
