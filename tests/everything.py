"""A run with all that is random or remembered in it: what tools/chaos.py kills, and tests resume.

    python tests/everything.py --strategy ddp --nproc 2 --max-steps 100 --output-dir run

Augmentation that draws from Python, NumPy and torch, a collate and a loss that draw too, dropout, running statistics,
averaged weights, a schedule, accumulation, evaluation in between.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from kaggle_mgpu import Task, TrainConfig, launch, train


@dataclass(frozen=True)
class Config(TrainConfig):
    MAY_CHANGE = TrainConfig.MAY_CHANGE | {"fails_at"}

    global_batch_size: int | None = 24
    gradient_accumulation_steps: int | None = 2
    data_workers: int | Literal["auto"] = 2
    max_steps: int | None = 60
    lr: float = 0.01
    warmup_steps: int | float | str = 0.1
    ema_decay: float | None = 0.9
    eval_every: int | Literal["epoch", "end"] = 10
    log_every: int = 1
    save_every: int | None = 3
    keep_last: int = 2
    output_dir: str = "everything"
    width: int = 16
    augmented: Literal["no", "samples", "all"] = "all"
    """samples: as a function of the sample; all: also of the batch and the step, so of how it is split."""
    norm: bool = True
    dropout: float = 0.2
    fails_at: int = 0
    """The call of loss in training that breaks off, as if killed."""


class Killed(BaseException):
    """Instead of a real kill, where one process goes on to look at what is left. Nothing is saved, as after a kill."""


class Samples(Dataset[Any]):
    def __init__(self, samples: int, augmented: bool) -> None:
        self.x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(samples))
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = self.x[index]
        y = x.sum().sin()
        if self.augmented:
            x = x + 0.1 * torch.randn(8)
            x = x * float(np.random.uniform(0.9, 1.1))
            x = x.flip(0) if random.random() < 0.5 else x
        return {"x": x, "y": y}


class Everything(Task):
    def __init__(self, config: Config) -> None:
        self.config, self.calls = config, 0

    def model(self) -> nn.Module:
        width = self.config.width
        norm = nn.BatchNorm1d(width) if self.config.norm else nn.Identity()
        return nn.Sequential(nn.Linear(8, width), norm, nn.Tanh(), nn.Dropout(self.config.dropout), nn.Linear(width, 1))

    def train_data(self) -> Dataset[Any]:
        return Samples(500, self.config.augmented != "no")

    def val_data(self) -> Dataset[Any]:
        return Samples(50, self.config.augmented != "no")

    def collate(self, samples: list[Any]) -> Any:
        batch = default_collate(samples)
        if self.config.augmented == "all":
            batch["x"] = batch["x"] + 0.01 * random.gauss(0, 1)
        return batch

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch["x"], batch["y"]
        self.calls += model.training
        if model.training and self.calls == self.config.fails_at:
            raise Killed
        if self.config.augmented == "all" and model.training:
            x = x + 0.01 * np.random.beta(1, 1)
        return (model(x)[:, 0].float() - y).square().sum()

    def count(self, batch: Any) -> int:
        return len(batch["y"])


def main() -> None:
    parser = argparse.ArgumentParser()
    Config.add_arguments(parser)
    config = Config.from_arguments(parser.parse_args())
    launch(train, config, Everything(config))


if __name__ == "__main__":
    sys.path.insert(0, __file__.rpartition("/")[0])
    import everything  # by name, so that workers import it too

    everything.main()
