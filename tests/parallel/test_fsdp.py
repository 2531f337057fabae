"""fsdp: the same run as every other strategy's, with each rank holding a part of it.

How the weights come out with plain SGD is in test_invariance.py; here is all that is between: AdamW, averages,
precision, clipping, checkpoints whole and in shards that move between strategies, and sessions that are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from everything import Config, Everything
from kaggle_mgpu import TrainConfig, checkpoint, distributed, launch, progress, train
from kaggle_mgpu.checkpoints import Checkpoints, files, read_tensors
from kaggle_mgpu.checkpoints import format as checkpoint_files
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import workers
from kaggle_mgpu.parallel import Strategy, choose_strategy, shards
from tasks import Block, Language, Tied, TiedLanguage
from test_resume import SPLITTABLE, chaos, config, several
from test_strategy import loss, metrics, samples


def weights(folder: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# What is gathered at a time
def test_blocks_are_what_the_outermost_lists_repeat() -> None:
    from kaggle_mgpu.parallel.fsdp import repeated_blocks

    model = Tied()
    assert repeated_blocks(model) == list(model.blocks)
    assert repeated_blocks(nn.Linear(2, 2)) == []
    assert repeated_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Tanh(), nn.Tanh()])) == []

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    layers = nn.ModuleList([Experts(), Experts()])
    assert repeated_blocks(nn.Sequential(OrderedDict(layers=layers, norm=nn.LayerNorm(2)))) == list(layers)
    block = Block()
    assert repeated_blocks(nn.ModuleList([block, block, Block()]))[0] is block
    assert len(repeated_blocks(nn.ModuleList([block, block, Block()]))) == 2


def test_one_process_is_single() -> None:
    assert choose_strategy("fsdp", num_gpus=0, num_replicas=1, world_size=1) == (
        Strategy,
        "with one process, fsdp is the same as single",
    )


# Steps
class Deep(nn.Module):
    """A BatchNorm in it, which makes buffers; weights of 5 rows, which 2 and 3 ranks cannot share out evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.first(x))
        self.seen.append(x.dtype)
        return self.head(x)


def steps(strategy: Strategy, model: nn.Module, parts: list[slice], rank: int, world: int) -> dict[str, Any]:
    """Three steps of AdamW with clipping, the second with an infinity on the last rank alone."""
    from kaggle_mgpu import optim

    optimizer = optim.adamw(model, lr=0.1, weight_decay=0.1)
    norms = []
    for step in range(3):
        x, y = samples(12, seed=step)
        if step == 1:
            x[11, 0] = float("inf")
        for part in parts:
            strategy.backward((x[part], y[part]), 1.0, lambda: 1200)
        norms.append(strategy.step(optimizer, max_norm=0.05))
    state = strategy.full_state(optimizer)
    return {"norms": torch.stack(norms), "state": state}


def in_processes(world: int) -> dict[str, Any]:
    from kaggle_mgpu.parallel.fsdp import Sharded

    rank, found = distributed.rank(), {}
    for precision in ("fp32", "fp16", "bf16"):
        for offload in (False, True):
            strategy = Sharded(
                loss, metrics, precision=precision, device=torch.device("cpu"), num_replicas=world, cpu_offload=offload
            )
            model = strategy.prepare(Deep())
            share = 12 // world
            half = share // 2
            parts = [slice(rank * share, rank * share + half), slice(rank * share + half, (rank + 1) * share)]
            found[precision, offload] = steps(strategy, model, parts, rank, world)
            found[precision, offload]["dtypes"] = set(model.seen)
            local = shards.local(model.head.weight)
            found[precision, offload]["rows"] = len(local)
            # a rank without any batch, one with fewer than another, and the model sharded again afterwards
            batches = [samples(3, seed=9), samples(2, seed=8)]
            model.eval()
            sums = distributed.gather(strategy.evaluate(iter(batches if rank == 0 else [])))
            found["metrics", precision, offload] = sums
            found["sharded again"] = all(map(shards.is_sharded, model.parameters()))
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[Any, Any]]]:
    return {world: list(launch(in_processes, world, nproc=world)) for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_is_singles_clipped_and_skipped_by_all(
    ranks: dict[int, list[dict[Any, Any]]], world: int, offload: bool, precision: str
) -> None:
    alone = Strategy(loss, metrics, precision=precision, device=torch.device("cpu"))
    model = alone.prepare(Deep())
    expected = steps(alone, model, [slice(0, 4), slice(4, 12)], 0, 1)
    found = [rank[precision, offload] for rank in ranks[world]]
    # under autocast alone a norm or an addition may keep more digits than with weights of the half type
    tolerance = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}[precision]
    for rank in found:
        assert torch.equal(rank["norms"].nan_to_num(), found[0]["norms"].nan_to_num())
        assert rank["norms"][0] == pytest.approx(expected["norms"][0].item(), rel=max(tolerance / 4, 1e-5))
        assert not rank["norms"][1].isfinite()
        assert rank["state"]["skipped"] == 1
        assert rank["state"]["scaler"] == expected["state"]["scaler"]
        half = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        assert rank["dtypes"] == {half}
    ours, theirs = found[0]["state"], expected["state"]
    assert list(ours["model"]) == list(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert ours["model"][name].dtype == torch.float32
        assert relative(ours["model"][name], tensor) < tolerance, name
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert list(ours["optimizer"]["state"]) == list(theirs["optimizer"]["state"])
    for name, values in theirs["optimizer"]["state"].items():
        for key, value in values.items():
            assert relative(ours["optimizer"]["state"][name][key], value) < 2 * tolerance, (name, key)
    assert [rank["rows"] for rank in found] == [len(part) for part in torch.zeros(4).chunk(world)] + [0] * (
        world - len(torch.zeros(4).chunk(world))
    )


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_without_a_batch_compute_along(ranks: dict[int, list[dict[Any, Any]]], world: int) -> None:
    alone = Strategy(loss, metrics, precision="fp32", device=torch.device("cpu"))
    model = alone.prepare(Deep())
    model.load_state_dict(ranks[world][0]["fp32", False]["state"]["model"])
    model.eval()
    expected = alone.evaluate(iter([samples(3, seed=9), samples(2, seed=8)]))
    first, *others = ranks[world][0]["metrics", "fp32", False]
    assert others == [{}] * (world - 1), "what was computed to help along does not count"
    assert first["loss"][1] == 5
    torch.testing.assert_close(first["loss"][0], expected["loss"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["outer"][0], expected["outer"][0], rtol=1e-5, atol=1e-5)
    assert all(rank["sharded again"] for rank in ranks[world])


# Runs
def language(folder: Path, **changes: Any) -> TrainConfig:
    settings = TrainConfig(
        output_dir=str(folder), global_batch_size=12, gradient_accumulation_steps=2, max_steps=12, lr=0.01,
        schedule="constant", ema_decay=0.9, eval_every=5, save_every=4, log_every=1, data_workers=0,
    )  # fmt: skip
    return settings.replace(**changes)


def all_of(jobs: list[tuple[TrainConfig, TiedLanguage]]) -> list[list[str]]:
    for settings, task in jobs:
        train(settings, task)
    return [task.made_on for _, task in jobs]


def test_single_ddp_and_fsdp_are_one_run(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": "fsdp"},
        "meta": {"strategy": "fsdp", "meta_init": True},
        "offload": {"strategy": "fsdp", "cpu_offload": True},
        "checkpointing": {"strategy": "fsdp", "gradient_checkpointing": True},
        "bf16": {"strategy": "fsdp", "precision": "bf16"},
        "shards": {"strategy": "fsdp", "checkpoint_format": "sharded"},
        "one": {"strategy": "fsdp"},
    }  # fmt: skip
    jobs = [
        (language(tmp_path / name, **changes), TiedLanguage(val_samples=1 if name == "one" else 31))
        for name, changes in variants.items()
    ]
    made_on = launch(all_of, jobs, nproc=2)
    train(language(tmp_path / "single"), TiedLanguage())
    expected = weights(tmp_path / "single")
    for name in variants:
        error = relative(weights(tmp_path / name), expected)
        print(f"{name:<14} {error:.1e}")
        # AdamW divides by the root of a small number, which SGD does not; bf16 has three digits
        assert error < (5e-2 if name == "bf16" else 1e-5), name
        if name not in ("ddp", "one", "bf16"):
            assert torch.equal(weights(tmp_path / name), weights(tmp_path / "fsdp")), name
    assert made_on[0] == [["cpu"]] * 8
    assert made_on[1] == [["cpu"], ["cpu"], ["meta"], ["cpu"], ["cpu"], ["cpu"], ["cpu"], ["cpu"]]
    # tied weights are one tensor in every file, and one that is not saved is in none
    for name in ("single", "fsdp", "meta"):
        header = (tmp_path / name / "model.safetensors").read_bytes()[8:2000]
        assert b'"aliases":"{\\"head.weight\\": \\"embedding.weight\\"}"' in header, name
        assert "unsaved" not in read_tensors(tmp_path / name / "model.safetensors")
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("single", *variants)}
    assert {name: result["strategy"] for name, result in results.items() if name != "single"} == {
        name: changes["strategy"] for name, changes in variants.items()
    }
    for name in ("fsdp", "meta", "shards"):
        assert results[name]["metrics"]["loss"] == pytest.approx(results["single"]["metrics"]["loss"], rel=1e-5)
        assert results[name]["best"] == pytest.approx(results["single"]["best"], rel=1e-5)
        best = [read_tensors(tmp_path / run / "best" / "model.safetensors") for run in ("single", name)]
        assert all(relative(best[1][key], tensor) < 1e-5 for key, tensor in best[0].items())
    # the whole state and the one in parts are the same state
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoints" / "step-00000012") for name in ("fsdp", "shards"))
    assert sorted(parts.facts["files"]) == [
        f"{what}-0000{part}-of-00002.safetensors" for what in ("ema", "model", "optimizer") for part in (1, 2)
    ]
    assert sorted(whole.facts["files"]) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    assert whole.tensors.keys() == parts.tensors.keys() == {"model", "ema"}
    for group, tensors in whole.tensors.items():
        assert all(torch.equal(tensor, parts.tensors[group][name]) for name, tensor in tensors.items())
    one, other = (files.pack(saved.state) for saved in (whole, parts))
    assert one[1] == other[1] and all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


def test_what_only_rank_0_could_know_is_an_error(tmp_path: Path) -> None:
    class Odd(TiedLanguage):
        def model(self) -> nn.Module:
            model = super().model()
            model.blocks[1].table = torch.ones(3)
            return model

    settings = language(tmp_path, strategy="fsdp", meta_init=True, nproc=2)
    with pytest.raises(ValueError, match=r"^meta_init=True, but blocks.1.table is a tensor that is neither parameter"):
        launch(train, settings, Odd())


# From one strategy to another
def test_a_checkpoint_moves_in_every_direction(tmp_path: Path) -> None:
    steady = {"schedule": "constant", "warmup_steps": 0, **SPLITTABLE, "ema_decay": 0.9, "keep_last": 3}

    def settings(name: str, kind: str, steps: int, **changes: Any) -> Config:
        nproc = 1 if kind == "single" else 2
        return config(tmp_path / name, strategy=kind, nproc=nproc, max_steps=steps, **steady).replace(**changes)

    several([(settings("whole", "single", 21), False)])
    # each of the six ways from one to another once; in two runs, the second with checkpoints in shards
    way = ["single", "fsdp", "single", "ddp", "fsdp", "ddp", "single"]
    for step, kind in enumerate(way, 1):
        jobs = [(settings(form, kind, 3 * step, checkpoint_format=form), False) for form in ("full", "sharded")]
        several(jobs) if kind == "single" else launch(several, jobs, nproc=2)
    for form in ("full", "sharded"):
        starts = [(r["strategy"], r["step"]) for r in progress.read(tmp_path / form) if r["kind"] == "start"]
        assert starts == [(kind, 3 * index) for index, kind in enumerate(way)]
        assert relative(weights(tmp_path / form), weights(tmp_path / "whole")) < 1e-5
        newest = [checkpoint.load(checkpoint.all_in(tmp_path / run / "checkpoints")[0]) for run in (form, "whole")]
        for group in ("model", "ema"):
            for name, tensor in newest[1].tensors[group].items():
                assert relative(newest[0].tensors[group][name].double(), tensor.double()) < 1e-5, name
    parts = {path.name: len(checkpoint.read_facts(path)["files"]) for path in tmp_path.glob("sharded/checkpoints/*")}
    assert parts == {"step-00000015": 6, "step-00000018": 3, "step-00000021": 3}


def test_two_ranks_shards_are_threes(tmp_path: Path) -> None:
    first = language(tmp_path, strategy="fsdp", checkpoint_format="sharded", max_steps=4)
    launch(train, first, TiedLanguage(), nproc=2)
    launch(train, first.replace(max_steps=8), TiedLanguage(), nproc=3)
    other = language(tmp_path / "other", max_steps=8)
    train(other, TiedLanguage())
    assert relative(weights(tmp_path), weights(tmp_path / "other")) < 1e-5


class Ragged(TiedLanguage):
    """Its metrics take another number of forward passes on each rank, as generating text does."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        with shards.gathered(model):
            for _ in range(1 + 2 * distributed.rank()):
                found = super().metrics(model, batch)
        assert all(map(shards.is_sharded, model.blocks.parameters()))
        return found


def test_with_the_model_gathered_each_rank_computes_as_often_as_it_likes(tmp_path: Path) -> None:
    launch(train, language(tmp_path / "ragged", strategy="fsdp"), Ragged(), nproc=2)
    launch(train, language(tmp_path / "even", strategy="fsdp"), TiedLanguage(), nproc=2)
    assert torch.equal(weights(tmp_path / "ragged"), weights(tmp_path / "even"))
    records = [[r for r in progress.read(tmp_path / name) if r["kind"] == "eval"] for name in ("ragged", "even")]
    assert [r["val_loss"] for r in records[0]] == [r["val_loss"] for r in records[1]]


def kept_whole(_: object) -> None:
    from torch.distributed.fsdp import fully_shard

    class Root(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    for used in (True, False):
        model = Root()
        for block in model:
            fully_shard(block)
        fully_shard(model)
        x = torch.ones(2, 4)
        with torch.no_grad():
            if used:
                model(x)
            with shards.gathered(model):
                assert not any(map(shards.is_sharded, model.parameters()))
            assert all(map(shards.is_sharded, model.parameters()))
            model(x)
        assert all(map(shards.is_sharded, model[0].parameters()))
        assert not shards.is_sharded(model.scale), "torch keeps the root's for the backward pass"


def test_what_a_unit_keeps_after_its_forward_pass_is_as_before(tmp_path: Path) -> None:
    launch(kept_whole, TrainConfig(output_dir=str(tmp_path), strategy="fsdp", nproc=2), nproc=2)


def test_pieces_are_put_together_as_far_as_asked() -> None:
    whole = torch.arange(14.0).reshape(7, 2)
    pieces = shards.Pieces([7, 2])
    for start, end in ((0, 3), (3, 6), (6, 7), (7, 7)):
        pieces.add(start, whole[start:end])
    for first in range(8):
        for end in range(first, 8):
            assert torch.equal(pieces[first:end], whole[first:end]), (first, end)
    assert torch.equal(pieces[:], whole)


# Adapters
def tune(jobs: list[tuple[TrainConfig, Any]]) -> None:
    for settings, task in jobs:
        train(settings, task)


def test_adapters_on_fp32_and_on_nf4_weights_are_singles(tmp_path: Path) -> None:
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    from adapters import Adapters

    def settings(name: str, **changes: Any) -> TrainConfig:
        return TrainConfig(
            output_dir=str(tmp_path / name), global_batch_size=12, gradient_accumulation_steps=2, max_steps=6, lr=1.0,
            schedule="constant", max_norm=None, data_workers=0, save_every=3, eval_every="end",
        ).replace(**changes)  # fmt: skip

    bits = {"fp32": False, "nf4": True}
    for name, four_bits in bits.items():
        train(settings(f"{name}-single"), Adapters(four_bits))
        train(settings(f"{name}-moved", max_steps=3), Adapters(four_bits))
    jobs = []
    for name, four_bits in bits.items():
        for kind, changes in (("ddp", {}), ("fsdp", {}), ("moved", {"checkpoint_format": "sharded"})):
            strategy = "fsdp" if kind == "moved" else kind
            jobs.append((settings(f"{name}-{kind}", strategy=strategy, **changes), Adapters(four_bits)))
    launch(tune, jobs, nproc=2)
    for name in bits:
        expected = weights(tmp_path / f"{name}-single")
        for kind in ("ddp", "fsdp", "moved"):
            error = relative(weights(tmp_path / f"{name}-{kind}"), expected)
            print(f"{name} {kind:<6} {error:.1e}")
            assert error < 2e-6, (name, kind)
        saved = read_tensors(tmp_path / f"{name}-fsdp" / "model.safetensors")
        assert saved.keys() == read_tensors(tmp_path / f"{name}-single" / "model.safetensors").keys()
        assert all(".lora_" in key for key in saved)


# Killed
class Shot(Everything):
    """Kills its own process, once."""

    name = "Everything"

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        marker = Path(self.config.output_dir) / "shot"
        if model.training and self.calls == 2 * 13 and distributed.rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


@pytest.mark.parametrize(("world", "form"), [(2, "sharded"), (3, "full")])
def test_killed_and_started_again_it_is_the_same_run_bit_for_bit(
    tmp_path: Path, world: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 600.0)  # until it is told which of them was killed

    def settings(name: str) -> Config:
        return config(tmp_path / name, strategy="fsdp", nproc=world, width=64, checkpoint_format=form, max_restarts=1)

    launch(train, settings("whole"), Everything(settings("whole")))
    launch(train, settings("killed"), Shot(settings("killed")))
    starts = [r["step"] for r in progress.read(tmp_path / "killed") if r["kind"] == "start"]
    assert starts in ([0, 12], [0, 9]), "the write of step 12 may not have ended when it was killed"
    assert chaos.differences(tmp_path / "whole", tmp_path / "killed") == []


# Checkpoints in shards: there, or not there
def test_a_part_that_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    settings = language(tmp_path, strategy="fsdp", checkpoint_format="sharded")
    launch(train, settings, TiedLanguage(), nproc=2)
    newest = tmp_path / "checkpoints" / "step-00000012"
    assert checkpoint.damage(newest) is None
    broken = tmp_path / "broken"
    shutil.copytree(newest, broken)
    part = broken / "optimizer-00002-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    assert checkpoint.damage(broken) == f"{part.name} does not have the checksum it was written with"
    part.unlink()
    assert checkpoint.damage(broken) == f"{part.name} is missing"
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(broken)
    final = read_tensors(tmp_path / "model.safetensors")
    shapes = files.shapes(newest / "model-00001-of-00002.safetensors")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in final.items()}


def saving(folder: str, fault: str) -> list[tuple[int, bool, str]]:
    """Three saves of one tensor that is spread over two ranks; what each rank is told of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    spread = distribute_tensor(torch.arange(6.0).reshape(3, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    told = []
    with Checkpoints(Path(folder), keep_last=2) as checkpoints:
        for step in (1, 2, 3):
            if step == 3 and fault:
                break_(fault)
            checkpoints.begin_together(
                step, tensors={"model": {"w": spread + step}}, state={"lr": 0.1, "m": [spread]}, facts={"x": 1}
            )
            try:
                told += [(saved.step, saved.path is not None, saved.note) for saved in checkpoints.wait()]
            except OSError as error:
                told.append((step, False, str(error)))
    return told


def break_(fault: str) -> None:
    write, main = files.write, distributed.is_main()

    def full(path: Path, pieces: Any) -> dict[str, int]:
        raise files.DiskFullError(28, "the disk is full: 3 bytes needed, 2 free", str(path))

    def late(path: Path, pieces: Any) -> dict[str, int]:
        while "safetensors" in path.name and path.parent.exists():
            time.sleep(0.01)
        return write(path, pieces)

    if fault == "no room for rank 1" and not main:
        files.write = lambda path, pieces: full(path, pieces) if "safetensors" in path.name else write(path, pieces)
    if fault == "no room for rank 0":  # which has given up before rank 1 is done
        files.write = (lambda path, pieces: full(path, pieces)) if main else late
    if fault == "no room":
        files.free_bytes = lambda folder: 10
    if fault == "rank 1 is gone" and main:
        checkpoint_files.PART_SECONDS = 0.2
    if fault == "rank 1 is gone" and not main:
        checkpoint_files.write_part = lambda *args: None


def test_rank_0_names_it_when_all_parts_are_there_and_not_before(tmp_path: Path) -> None:
    cases = ["", "no room for rank 1", "no room for rank 0", "no room", "rank 1 is gone"]
    told = {fault: launch(saving, str(tmp_path / (fault or "well")), fault, nproc=2)[0] for fault in cases}
    for fault, folder in ((fault, tmp_path / (fault or "well")) for fault in cases):
        good = [2, 3] if not fault else [1, 2]
        assert sorted(os.listdir(folder)) == [f"step-0000000{step}" for step in good], fault
        assert told[fault][:2] == [(1, True, ""), (2, True, "")]
        for step in good:
            saved = checkpoint.load(folder / f"step-0000000{step}")
            assert torch.equal(saved.tensors["model"]["w"], torch.arange(6.0).reshape(3, 2) + step)
            assert saved.state["lr"] == 0.1 and torch.equal(saved.state["m"][0], torch.arange(6.0).reshape(3, 2))
            assert (saved.facts["step"], saved.facts["x"]) == (step, 1)
    assert told[""][2] == (3, True, "")
    assert told["no room for rank 1"][2][:2] == (3, False)
    assert "rank 1: the disk is full: 3 bytes needed, 2 free" in told["no room for rank 1"][2][2]
    assert told["no room for rank 0"][2] == (
        3,
        False,
        "the checkpoint of step 3 was not saved: the disk is full: 3 bytes needed, 2 free",
    )
    assert told["no room"][2][:2] == (3, False)
    assert "deleting older checkpoints would not make room" in told["no room"][2][2]
    assert told["rank 1 is gone"][2][:2] == (3, False)
    assert "rank 1 has not written its part of" in told["rank 1 is gone"][2][2]


def without_functional_collectives(config: TrainConfig, task: Language) -> bool:
    """Train and save where torch's functional collectives raise."""
    from torch.distributed import _functional_collectives as functional

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a functional collective on a CPU may stand still for ever")

    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather_tensor", "all_gather_single", "all_gather_into_tensor"):
            if hasattr(functional, name):
                stack.enter_context(mock.patch.object(functional, name, refused))
        return train(config, task).finished


def test_a_step_and_a_save_on_cpus_take_no_functional_collective(tmp_path: Path) -> None:
    """Torch 2.13 enqueues these with the GIL held, which gloo's thread may need while it holds the queue's lock."""
    plain = TrainConfig(global_batch_size=12, max_steps=2, strategy="fsdp", save_every=1, output_dir=str(tmp_path))
    assert launch(without_functional_collectives, plain, Language(24), nproc=2) == [True, True]
