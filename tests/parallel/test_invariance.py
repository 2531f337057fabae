"""One gradient, however it is split: the weights do not depend on the strategy, the processes or the accumulation.

pytest tests/parallel/test_invariance.py -s    # prints the table
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kaggle_mgpu import TrainConfig, launch, train
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.data import Order
from tasks import Language, MeanOfMeans, NextToken, Sequences, token_losses

EPOCHS, BATCH, LR, SEED, SAMPLES = 5, 36, 0.5, 7, 100  # 100 = 36 + 36 + 28: the last global batch does not divide
ACCUMULATIONS = (1, 2, 3)


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        global_batch_size=BATCH,
        epochs=EPOCHS,
        lr=LR,
        schedule="constant",
        max_norm=None,
        seed=SEED,
        eval_every="end",
        output_dir=str(folder),
    ).replace(**changes)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


def by_hand() -> torch.Tensor:
    """The same training without the kit: the whole global batch at once, the mean over its tokens, plain SGD."""
    torch.manual_seed(SEED)
    model, data = NextToken(), Sequences(SAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for epoch in range(EPOCHS):
        order = Order(SAMPLES, SEED, epoch)[:]
        for start in range(0, SAMPLES, BATCH):
            rows = torch.from_numpy(order[start : start + BATCH])
            token_losses(model, {"tokens": data.tokens[rows], "length": data.lengths[rows]}).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    return torch.cat([state[name].flatten() for name in sorted(state)])


def sweep(root: str, strategy: str, replicas: int, task: Language) -> None:
    for accumulation in ACCUMULATIONS:
        folder = Path(root) / f"{type(task).__name__}-{strategy}-{replicas}-{accumulation}"
        settings = config(folder, strategy=strategy, gradient_accumulation_steps=accumulation)
        train(settings.replace(nproc=replicas), task)


CASES = [("single", 1), ("dp", 2), ("dp", 3), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("invariance")
    for strategy, replicas in CASES:
        launch(sweep, str(root), strategy, replicas, Language(SAMPLES), nproc=1 if strategy == "dp" else replicas)
    launch(sweep, str(root), "ddp", 2, MeanOfMeans(SAMPLES), nproc=2)
    return root


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_weights_equal_one_process_with_the_whole_batch(runs: Path) -> None:
    expected = by_hand()
    torch.manual_seed(SEED)
    first = NextToken().state_dict()
    start = torch.cat([first[name].flatten() for name in sorted(first)])
    print(f"\nfinal weights against a whole-batch loop (which moved them by {relative(start, expected):.2f})")
    print("strategy  replicas  accumulation  relative difference")
    errors = []
    for strategy, replicas in CASES:
        for accumulation in ACCUMULATIONS:
            found = weights(runs / f"Language-{strategy}-{replicas}-{accumulation}")
            errors.append(relative(found, expected))
            print(f"{strategy:<8}  {replicas:>8}  {accumulation:>12}  {errors[-1]:.1e}")
    for accumulation in ACCUMULATIONS:
        found = weights(runs / f"MeanOfMeans-ddp-2-{accumulation}")
        print(f"{'mean of means, ddp':<18}{2:>2}  {accumulation:>10}  {relative(found, expected):.1e}")
    assert relative(start, expected) > 0.1, "the training must move the weights, or equality means nothing"
    assert max(errors) < 1e-6


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_the_mean_of_means_is_told_apart(runs: Path, accumulation: int) -> None:
    assert relative(weights(runs / f"MeanOfMeans-ddp-2-{accumulation}"), by_hand()) > 1e-2


def test_validation_loss_does_not_depend_on_the_split(runs: Path) -> None:
    import json

    names = [f"Language-{s}-{r}-{a}" for s, r in CASES for a in ACCUMULATIONS]
    losses = [json.loads((runs / name / "result.json").read_text())["metrics"]["loss"] for name in names]
    assert np.ptp(losses) < 1e-6 * losses[0]
