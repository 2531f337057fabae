"""Muon: its update against torch's, AdamW beside it; the weights of several processes, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes.text_generation import Config, TextGeneration
from kaggle_mgpu.training import Muon, train
from kaggle_mgpu.training.muon import orthogonalised


@pytest.mark.parametrize("shape", [(3, 40, 20), (2, 20, 40), (1, 30, 30)])
def test_singular_values_come_near_1(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert 0.6 < found.min() < found.max() < 1.25


def test_matrices_move_as_under_torchs_muon_and_the_rest_as_under_adamw() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(8))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    start = mine[0].detach().clone()
    groups = [{"params": mine[:2], "muon": True}, {"params": mine[2:], "weight_decay": 0.0}]
    optimizers: list[Any] = [
        Muon(groups, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs[:2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[2:], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # torch's iterations are in bfloat16, with 8 significant bits
    assert (mine[0] - theirs[0]).norm() < 0.02 * (mine[0] - start).norm()
    assert torch.equal(mine[2], theirs[2])


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"expected matrices, got a parameter of shape \(8,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(8))], "muon": True}])


def config(folder: Path, **changes: Any) -> Config:
    text = folder.parent / "book.txt"
    text.write_text("".join(f"line {i} of the only book\n" for i in range(60)), encoding="utf-8")
    values: dict[str, Any] = {
        "data_path": str(text), "tokenizer": "byte", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
        "global_batch_size": 8, "max_steps": 4, "save_every": 2, "lr": 1e-2, "sample_tokens": 0, "optimizer": "muon",
        "strategy": "single", "nproc": 1, "output_dir": str(folder), **changes,
    }  # fmt: skip
    return Config(**values)


def weights(folder: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("muon") / "alone"
    train(config(folder), TextGeneration(config(folder)))
    return folder


@pytest.mark.parametrize("strategy", ["dp", "ddp", "fsdp"])
def test_two_replicas_give_the_weights_of_one(alone: Path, tmp_path: Path, strategy: Any) -> None:
    c = config(tmp_path / "two", strategy=strategy, nproc=2)
    assert launch(train, c, TextGeneration(c)).strategy == strategy
    one, two = weights(alone), weights(tmp_path / "two")
    assert (one - two).norm() < 1e-5 * one.norm()


def test_resumed_it_is_the_same_run_and_goes_on_under_no_other_optimizer(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "model.safetensors").unlink()
    c = config(tmp_path / "run", data_path=str(alone.parent / "book.txt"))
    other = c.replace(optimizer="adamw")
    with pytest.raises(CheckpointError):
        train(other, TextGeneration(other))
    assert train(c, TextGeneration(c)).step == 4
    assert torch.equal(weights(alone), weights(tmp_path / "run"))


def test_zero_which_cuts_matrices_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer='muon' needs whole matrices"):
        config(tmp_path / "run", strategy="deepspeed")
