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
from tasks import Images, Language, MeanOfMeans, NextToken, Pairs, Sequences, token_losses

EPOCHS, BATCH, LR, SEED, SAMPLES = 5, 36, 0.5, 7, 100  # 100 = 36 + 36 + 28: the last global batch does not divide
ACCUMULATIONS = (1, 2, 3)
WHOLE = (Images(74), Pairs(74))
"""Tasks whose samples see each other: by BatchNorm, and in the loss. 74 = 36 + 36 + 2: of three ranks one has none."""


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


def whole_by_hand(task: Images) -> dict[str, torch.Tensor]:
    """The state after the same training without the kit, of a task that needs the whole global batch at once."""
    torch.manual_seed(SEED)
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR / 5)
    for epoch in range(EPOCHS):
        order = Order(task.samples, SEED, epoch)[:]
        for start in range(0, task.samples, BATCH):
            batch = data[torch.from_numpy(order[start : start + BATCH])]
            (task.loss(model, batch) / len(batch[0])).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def sweep(root: str, strategy: str, replicas: int, task: Language) -> None:
    for accumulation in ACCUMULATIONS:
        folder = Path(root) / f"{type(task).__name__}-{strategy}-{replicas}-{accumulation}"
        settings = config(folder, strategy=strategy, gradient_accumulation_steps=accumulation)
        train(settings.replace(nproc=replicas), task)
    for whole in WHOLE if strategy != "dp" else ():
        folder = Path(root) / f"{type(whole).__name__}-{strategy}-{replicas}"
        train(config(folder, strategy=strategy, lr=LR / 5), whole)


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


@pytest.mark.parametrize("task", WHOLE, ids=lambda task: type(task).__name__)
def test_samples_that_see_each_other_see_those_of_all_ranks(runs: Path, task: Images) -> None:
    expected = whole_by_hand(task)
    torch.manual_seed(SEED)
    start = {name: tensor.detach() for name, tensor in task.model().named_parameters()}
    assert max(relative(value, expected[name]) for name, value in start.items()) > 0.1, "the weights must move"
    print(f"\n{type(task).__name__}: tensors of the final state against a whole-batch loop, the furthest")
    for strategy, replicas in CASES:
        if strategy != "dp":
            found = read_tensors(runs / f"{type(task).__name__}-{strategy}-{replicas}" / "model.safetensors")
            assert found.keys() == expected.keys()
            errors = {name: relative(found[name].double(), expected[name].double()) for name in expected}
            print(f"{strategy:<8}  {replicas:>8}  {max(errors.values()):.1e}")
            assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_the_mean_of_means_is_told_apart(runs: Path, accumulation: int) -> None:
    assert relative(weights(runs / f"MeanOfMeans-ddp-2-{accumulation}"), by_hand()) > 1e-2


def test_validation_loss_does_not_depend_on_the_split(runs: Path) -> None:
    import json

    names = [f"Language-{s}-{r}-{a}" for s, r in CASES for a in ACCUMULATIONS]
    losses = [json.loads((runs / name / "result.json").read_text())["metrics"]["loss"] for name in names]
    assert np.ptp(losses) < 1e-6 * losses[0]
