"""The small task that `gpu_proof` trains, its settings, and the comparison of two runs' weights."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ..checkpoints import read_tensors
from ..config import TrainConfig
from ..launching import launch
from ..training import Task, train

STEPS = 40
RELATIVE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.05}
"""Allowed relative difference between two runs' weights after STEPS steps of SGD, by precision. The significands have
24, 8 and 11 bits."""


class Blocks(nn.Module):
    """Residual blocks between two linear layers: float[samples, 16] to float[samples, 1]."""

    def __init__(self, depth: int, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


@dataclasses.dataclass
class Sum(Task):
    """Learn a quarter of the sum of 16 numbers.

    With `killed`, the process kills itself after the first checkpoint. With `max_samples` > 0, a training
    micro-batch of more than `max_samples` samples runs out of memory.
    """

    depth: int = 3
    width: int = 64
    batch_norm: bool = False
    adamw: bool = False
    killed: bool = False
    max_samples: int = 0

    def model(self) -> nn.Module:
        return Blocks(self.depth, self.width, self.batch_norm)

    def train_data(self) -> Dataset[Any]:
        x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True) / 4)

    def val_data(self) -> Dataset[Any]:
        return self.train_data()

    def count(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if self.max_samples and model.training and len(x) > self.max_samples:
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)  # 1 PiB, more than any GPU has
        return (model(x).float() - y).square().sum()

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        if self.adamw:
            return super().optimizer(model, config)
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)

    def on_record(self, record: dict[str, Any]) -> None:
        if self.killed and record.get("kind") == "save":  # the first checkpoint is on the disk
            os.kill(os.getpid(), signal.SIGKILL)


def config_in(folder: str, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        output_dir=folder, global_batch_size=32, max_steps=STEPS, log_every=20, save_every=10, eval_every="end",
        lr=1e-3, strategy="single", nproc=1, precision="fp32",
    )  # fmt: skip
    return base.replace(**changes)


def train_in(folder: str, task: Task, **changes: Any) -> str:
    """Train in workers, and return the run's folder."""
    result = launch(train, config_in(folder, **changes), task, in_worker=True)
    assert result.finished, result.reason
    return str(result.output_dir)


def weights(folder: str) -> Tensor:
    named = read_tensors(Path(folder) / "model.safetensors")
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(named.items())])


def difference(folder: str, other: str) -> float:
    """Return the distance between two runs' weights, divided by the norm of the second run's weights."""
    one, two = weights(folder), weights(other)
    return float((one - two).norm() / two.norm())


if __name__ == "__main__":  # one of the two ranks that gpu_proof.two_ranks starts
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:gloo")
    train(config_in(sys.argv[1], **{"nproc": "auto", **json.loads(sys.argv[2])}), Sum())
    os._exit(0)
