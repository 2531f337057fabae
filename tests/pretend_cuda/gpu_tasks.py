"""Tasks for the pretend GPUs, and the mishaps that befall them; importable by workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kaggle_mgpu import Task, TrainConfig, distributed
from tasks import Language, Regression


class Rows(Dataset[Any]):
    """Rows of a TensorDataset one at a time, as loader processes fetch them."""

    def __init__(self, of: TensorDataset) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Any:
        return self.of[index]


class Normalised(Task):
    """A regression with BatchNorm, whose buffers have two dtypes, and AdamW as the kit has it."""

    def __init__(self, optimizer: str = "AdamW", rows: bool = False) -> None:
        self.kind, self.rows = optimizer, rows

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def train_data(self) -> Dataset[Any]:
        x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True) / 4)
        return Rows(data) if self.rows else data

    def val_data(self) -> Dataset[Any]:
        return self.train_data()

    def count(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x).float() - y).square().sum()

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        if self.kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
        return Own(model.parameters(), config.lr) if self.kind == "own" else super().optimizer(model, config)


class Around(nn.Module):
    """A module of our own: torch compiles no bare nn.Sequential in place (torch 2.13)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Compiled(Regression):
    """A task that `looks_like_a_mean` probes, with a model that can be compiled."""

    def model(self) -> nn.Module:
        return Around(super().model())


class Own(torch.optim.Optimizer):
    """An optimizer as a user writes it: a step against the sign of the gradient."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad * 0.1
                    parameter.sub_(state["mean"].sign(), alpha=group["lr"] / 10)


class ShortOfMemory(Language):
    """Fails with an error beyond `most` samples at a time, in the loss, on the ranks named, and in the metrics."""

    def __init__(self, error: str = "allocator", most: int = 4, ranks: tuple[int, ...] = (0, 1), where: str = "loss"):
        super().__init__()
        self.error, self.most, self.ranks, self.where = error, most, ranks, where

    def use_memory(self, batch: Any, where: str) -> None:
        from pretend_cuda import watch

        tokens = batch["tokens"]
        if where == self.where and distributed.rank() in self.ranks and len(tokens) > self.most:
            index = tokens.device.index
            watch.limit_memory(index, watch.used_memory(index) + 1000, self.error)
            try:
                torch.empty(2000, dtype=torch.uint8, device=tokens.device)
            finally:
                watch.limit_memory(index, 1 << 40)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.use_memory(batch, "loss")
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        self.use_memory(batch, "metrics")
        return {"loss": (super().loss(model, batch), self.count(batch))}


class Mishap(Language):
    """Meets with a mishap: rank 0 at the record of step 10 (kill, interrupt), the last rank in its 12th loss (hang)."""

    name = "Language"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.losses = kind, 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.losses += model.training
        if self.kind == "hang" and self.losses == 12 and distributed.rank() + 1 == distributed.world_size():
            time.sleep(60)
        return super().loss(model, batch)

    def on_record(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "train" and record["step"] == 10:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "interrupt":
                signal.raise_signal(signal.SIGINT)


class KilledOnce(Mishap):
    """Is killed at step 10 of its first attempt, when there is a checkpoint to go on from."""

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        self._checkpoints = Path(config.output_dir) / "checkpoints"
        return super().optimizer(model, config)

    def on_record(self, record: dict[str, Any]) -> None:
        while self.kind == "kill" and record.get("step") == 10 and not [*self._checkpoints.glob("step-*")]:
            time.sleep(0.01)
        if record.get("kind") == "start":
            self.kind = "" if record["step"] else "kill"
        super().on_record(record)


class Stopped(Language):
    """Asks its own process to stop, in the first step that it takes there."""

    name = "Language"

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)
