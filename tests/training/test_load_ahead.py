"""Under ddp on CPUs the next batches are loaded while the ranks exchange gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu import TrainConfig, checkpoint, launch, train
from kaggle_mgpu.checkpoints import Checkpoints
from kaggle_mgpu.data import Order
from tasks import Regression

EVENTS: list[str] = []


class Rows(Dataset[Any]):
    """Notes each load, and computes a gradient in it; the sample `broken` cannot be read."""

    def __init__(self, rows: Any, broken: int) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Any:
        if self.broken in indices.tolist():
            raise OSError(f"sample {self.broken} cannot be read")
        weight = torch.ones(1, requires_grad=True)
        (2 * weight).sum().backward()
        assert weight.grad == 2
        EVENTS.append("load")
        return self.rows[indices]


class Noted(Regression):
    def __init__(self, broken: int = -1) -> None:
        super().__init__(val_samples=0)
        self.broken = broken

    def train_data(self) -> Dataset[Any]:
        return Rows(super().train_data(), self.broken)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        EVENTS.append("loss")
        return super().loss(model, batch)

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        made = super().optimizer(model, config)
        made.register_step_pre_hook(lambda *_: EVENTS.append("update"))
        return made


class Counted(Noted):
    def count(self, batch: Any) -> int:
        return len(batch[0])


def config(folder: Path, nproc: int, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        max_steps=4, global_batch_size=8, micro_batch_size=4 // nproc, log_every=1, nproc=nproc, output_dir=str(folder)
    )
    return plain.replace(**changes)


def events(config: TrainConfig, task: Noted) -> tuple[list[str], list[dict[str, Any]]]:
    """Train; return the order of loads and updates, and the run's records of steps."""
    EVENTS.clear()
    records = train(config, task).records()
    return EVENTS[:], [record for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("task", [Noted(), Counted()])
def test_the_next_batches_are_loaded_before_the_update(tmp_path: Path, task: Noted) -> None:
    # a step has two micro-batches
    ((order, expected),) = launch(events, config(tmp_path / "1", 1), task, nproc=1)
    assert order[-20:] == 4 * ["load", "load", "loss", "loss", "update"]
    for order, records in launch(events, config(tmp_path / "2", 2), task, nproc=2):
        # the last step needs no batch after its own
        assert order[-18:] == [*(3 * ["loss", "loss", "load", "load", "update"]), "loss", "loss", "update"]
        assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in expected])


@pytest.mark.parametrize(("task", "nproc", "changes", "done"), [
    (Noted, 1, {}, 2), (Noted, 2, {}, 2), (Noted, 2, {"data_workers": 1}, 2), (Counted, 1, {}, 2),
    (Counted, 2, {}, 1),  # a count that travels with the gradients is needed a step earlier
    (Counted, 2, {"gradient_compression": "fp16"}, 2), (Counted, 2, {"find_unused_parameters": True}, 2),
])  # fmt: skip
def test_a_batch_that_cannot_be_loaded_costs_no_step(
    tmp_path: Path, task: type[Noted], nproc: int, changes: dict[str, Any], done: int
) -> None:
    settings = config(tmp_path, nproc, **changes)
    broken = int(Order(500, settings.seed, 0)[16:17][0])
    with pytest.raises(OSError, match=f"sample {broken} cannot be read"):
        launch(train, settings, task(broken))
    assert [checkpoint.step_of(path) for path in Checkpoints(tmp_path / "checkpoints").all()] == [done]


def test_a_batch_after_the_last_step_is_not_read(tmp_path: Path) -> None:
    settings = config(tmp_path, 2)
    after = int(Order(500, settings.seed, 0)[32:33][0])
    assert launch(train, settings, Noted(after)).finished
