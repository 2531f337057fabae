"""Training on this machine's GPUs, all of them: alike when repeated, in every precision, and after SIGKILL.

make test-gpu                                                                        # on real GPUs
python tests/pretend_cuda python -m pytest -m gpu tests/training/test_on_gpus.py     # on the pretend pair
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu import TrainConfig, devices, launch, train
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.errors import WorkerDiedError
from kaggle_mgpu.planning.gpu_task import Sum

pytestmark = pytest.mark.gpu


def trained(folder: Path, task: Sum, **changes: Any) -> torch.Tensor:
    """Train for 40 steps on all GPUs and return the weights."""
    config = TrainConfig(
        output_dir=str(folder), global_batch_size=32, max_steps=40, log_every=20, save_every=10, lr=1e-3
    ).replace(**changes)
    result = launch(train, config, task, in_worker=True)
    assert (result.finished, result.world_size) == (True, len(devices.gpus()))
    assert result.precision == changes.get("precision", result.precision)
    start = next(record for record in result.records() if record["kind"] == "start")
    assert start["device_line"].count(devices.gpus()[0].name) == len(devices.gpus()), start["device_line"]
    named = read_tensors(folder / "model.safetensors")
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(named.items())])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_twice_gives_the_same_bytes(precision: str, tmp_path: Path) -> None:
    if precision == "bf16" and devices.precision("auto", devices.gpus())[0] != "bf16":
        pytest.skip("needs a GPU with native bf16")
    first, again = (trained(tmp_path / name, Sum(adamw=True), precision=precision) for name in ("first", "again"))
    assert torch.equal(first, again)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = trained(tmp_path / "undisturbed", Sum(adamw=True))
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        trained(tmp_path / "killed", Sum(adamw=True, killed=True))
    assert torch.equal(trained(tmp_path / "killed", Sum(adamw=True)), undisturbed)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    starts = [record["step"] for record in map(json.loads, lines) if record["kind"] == "start"]
    assert starts[0] == 0 < starts[1], "from a checkpoint"
