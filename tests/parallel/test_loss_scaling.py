"""fp16's loss scaling skips the same steps whatever the number of GPUs, so the weights stay the same too.

The micro-batch is the same in what is compared: a gradient is added up in fp16 within a micro-batch, so a larger
micro-batch overflows earlier, on one GPU as on several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kaggle_mgpu import Result, Task, TrainConfig, launch, train
from kaggle_mgpu.checkpoints import read_tensors

CASES = [("single", 2), ("single", 3), ("dp", 2), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)]
"""(strategy, the number of micro-batches that a global batch is cut into, one after the other or side by side)"""


class SomeLossesAreSteep(Task):
    """Each sample's loss has a slope of its own, 2⁻² to 2⁵: a scale that suits one sample is too large for another."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_data(self) -> Dataset[Any]:
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, 2 ** torch.linspace(-2, 5, 48))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, slope = batch
        return (model(x).squeeze(1).float() * slope).sum()

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=config.lr)


def train_under_each_strategy(root: str, cases: list[tuple[str, int]]) -> list[Result]:
    results = []
    for strategy, parts in cases:
        config = TrainConfig(
            global_batch_size=6, micro_batch_size=6 // parts, epochs=2, lr=1e-3, schedule="constant", max_norm=None,
            precision="fp16", strategy=strategy, nproc=1 if strategy == "single" else parts,
            output_dir=f"{root}/{strategy}{parts}",
        )  # fmt: skip
        results.append(train(config, SomeLossesAreSteep()))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Result]]:
    root, found = tmp_path_factory.mktemp("scaling"), {}
    for nproc in (1, 2, 3):
        cases = [(s, n) for s, n in CASES if (1 if s in ("single", "dp") else n) == nproc]
        found |= dict(zip(cases, launch(train_under_each_strategy, str(root), cases, nproc=nproc)[0], strict=True))
    return root, found


def test_one_process_skips_steps(runs: tuple[Path, dict[tuple[str, int], Result]]) -> None:
    assert runs[1]["single", 2].skipped_steps in range(2, 8)


@pytest.mark.parametrize(("strategy", "parts"), CASES[2:])
def test_every_strategy_skips_the_steps_that_one_process_skips(
    runs: tuple[Path, dict[tuple[str, int], Result]], strategy: str, parts: int
) -> None:
    root, results = runs
    assert results[strategy, parts].skipped_steps == results["single", parts].skipped_steps
    expected = read_tensors(root / f"single{parts}" / "model.safetensors")
    for name, tensor in read_tensors(root / f"{strategy}{parts}" / "model.safetensors").items():
        # a step moves the bias by about 0.03; fsdp rounds a gradient to fp16 before the sum over the ranks, too
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4)
