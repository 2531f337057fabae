"""A run is one run: stopped anywhere, resumed anywhere, the same bits."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from everything import Config, Everything, Killed
from kaggle_mgpu import TrainConfig, checkpoint, distributed, launch, progress, session, train
from kaggle_mgpu.checkpoints import files, read_tensors
from kaggle_mgpu.data import Fetch, randomness
from kaggle_mgpu.errors import CheckpointError, DivergedError
from kaggle_mgpu.progress.records import comparable
from kaggle_mgpu.training import clock, saving
from kaggle_mgpu.training import loop as trainer
from runs import Clock as Seconds
from runs import by
from tasks import Regression

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("tools_chaos", ROOT / "tools" / "chaos.py")
assert spec is not None and spec.loader is not None
chaos = importlib.util.module_from_spec(spec)
sys.modules["tools_chaos"] = chaos  # its dataclasses look their module up
spec.loader.exec_module(chaos)


def config(folder: Path, **changes: Any) -> Config:
    return Config(output_dir=str(folder), max_steps=24, data_workers=0).replace(**changes)


def run(folder: Path, **changes: Any) -> Path:
    settings = config(folder, **changes)
    train(settings, Everything(settings))
    return folder


def broken_off(folder: Path, at_calls: list[int], **changes: Any) -> Path:
    """The same, breaking off in the middle of a step at these calls of loss, one a session, then to the end."""
    for call in at_calls:
        with pytest.raises(Killed):
            run(folder, fails_at=call, **changes)
    return run(folder, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed"))


def weights(folder: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


# Bit for bit
def test_killed_by_real_kills_it_is_the_same_run(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "chaos.py", ROOT / "tests" / "everything.py", "--kills", "4"]
    command += ["--output", tmp_path / "chaos", "--span", "0.7", "--report", tmp_path / "report.md"]
    flags = "--strategy ddp --nproc 2 --max-steps 100 --save-every 2"
    done = subprocess.run(
        [*map(str, command), "--flags", flags], capture_output=True, text=True, timeout=1500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# 4 kills: 4 of 4 identical")
    # one, or more where a run came to its end before the next kill
    ended = re.search(r"runs that ended: (\d+); identical to the undisturbed one, byte for byte: (\d+)$", text, re.M)
    assert ended is not None and ended[1] == ended[2] >= "1"


def test_what_differs_is_told_apart(undisturbed: Path, tmp_path: Path) -> None:
    assert chaos.differences(undisturbed, undisturbed) == []
    other = run(tmp_path / "other", seed=1)
    found = chaos.differences(undisturbed, other)
    for name in ("model.safetensors", "metrics.jsonl", "step-00000024/optimizer.safetensors", "/ema.safetensors"):
        assert any(name in line for line in found), (name, found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data_workers": 2},
        {"precision": "fp16"},
        {"strategy": "dp", "nproc": 2},
        {"save_every": 7, "keep_last": 1},
    ],
    ids=str,
)
def test_broken_off_in_mid_step_it_is_the_same_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = run(tmp_path / "one", **changes)
    calls = [3, 30, 9, 2] if "strategy" not in changes else [6, 60, 18, 4]
    other = broken_off(tmp_path / "other", calls, **changes)
    assert chaos.differences(one, other) == []
    starts = [r["step"] for r in progress.read(other) if r["kind"] == "start"]
    assert starts == sorted(starts)
    assert 0 < starts[-1] < 24


def test_the_scaler_halves_its_scale_at_the_same_steps(tmp_path: Path) -> None:
    one = run(tmp_path / "one", precision="fp16", lr=0.1)
    state = checkpoint.load(checkpoint.all_in(one / "checkpoints")[0]).state
    assert state["scaler"]["scale"] != 65536.0 or state["skipped"] == 0
    other = broken_off(tmp_path / "other", [5, 22], precision="fp16", lr=0.1)
    assert checkpoint.load(checkpoint.all_in(other / "checkpoints")[0]).state["scaler"] == state["scaler"]


def test_loader_workers_evaluations_and_saves_leave_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    for name, changes in {
        "one worker": {"data_workers": 1},
        "three workers": {"data_workers": 3},
        "no evaluation": {"eval_every": "end"},
        "saves": {"save_every": 1},
        "no saves": {"save_every": None},
    }.items():
        other = run(tmp_path / name, **changes)
        assert torch.equal(weights(other), weights(undisturbed)), name
        losses = [[r["loss"] for r in progress.read(folder) if r["kind"] == "train"] for folder in (undisturbed, other)]
        assert losses[0] == losses[1], name


def test_each_step_stands_once_in_the_records(tmp_path: Path) -> None:
    folder = broken_off(tmp_path, [3, 30, 9, 2])
    assert [r["step"] for r in progress.read(folder) if r["kind"] == "train"] == list(range(1, 25))
    assert [r["step"] for r in progress.read(folder) if r["kind"] == "eval"] == [10, 20, 24]


# Chance
def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_chance_is_a_function_of_what_it_is_for() -> None:
    first, other = randomness.key(7, "sample"), randomness.key(7, "step")
    drawn = {}
    for name, (key, major, minor) in {
        "a": (first, 0, 5), "epoch": (first, 1, 5), "sample": (first, 0, 6), "swapped": (first, 5, 0),
        "purpose": (other, 0, 5), "seed": (randomness.key(8, "sample"), 0, 5),
    }.items():  # fmt: skip
        randomness.seed_for(key, major, minor)
        drawn[name] = draw()
    for column in zip(*drawn.values(), strict=True):
        assert len(set(column)) == len(drawn)
    randomness.seed_for(first, 0, 5)
    assert draw() == drawn["a"]


def test_undisturbed_means_undisturbed() -> None:
    randomness.seed_everything(3)
    random.gauss(0, 1), np.random.randn()  # each leaves half a pair behind
    with randomness.undisturbed():
        inside = draw(), random.gauss(0, 1), np.random.randn()
    assert (draw(), random.gauss(0, 1), np.random.randn()) == inside


class Drawing(Dataset[Any]):
    def __init__(self, size: int = 50) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, *draw()], dtype=torch.float64)


class DrawingWhole(Drawing):
    def batch(self, indices: Tensor) -> Tensor:
        return torch.stack([self[int(index)] for index in indices])


def test_a_sample_is_augmented_alike_in_any_batch_and_otherwise_in_another_epoch() -> None:
    for dataset in (Drawing(), Subset(Drawing(), range(50))):
        fetch = Fetch(dataset, seed=3)
        whole = fetch[0, np.arange(10)]
        assert torch.equal(fetch[0, np.arange(4, 7)], whole[4:7])
        assert not torch.equal(fetch[1, np.arange(10)][:, 1:], whole[:, 1:])
        assert whole[:, 1:].unique().numel() == 30
        assert not torch.equal(Fetch(dataset, seed=4)[0, np.arange(10)][:, 1:], whole[:, 1:])
        assert not torch.equal(Fetch(dataset, seed=3, purpose="evaluation")[0, np.arange(10)][:, 1:], whole[:, 1:])


def test_a_batch_made_at_once_is_augmented_alike_when_asked_for_again() -> None:
    fetch = Fetch(DrawingWhole(), seed=3)
    first = fetch[2, np.arange(3, 9)]
    draw()
    assert torch.equal(fetch[2, np.arange(3, 9)], first)
    assert not torch.equal(fetch[3, np.arange(3, 9)][:, 1:], first[:, 1:])


# Another world size
SPLITTABLE: dict[str, Any] = {"augmented": "samples", "norm": False, "dropout": 0.0, "ema_decay": None}


def several(jobs: list[tuple[Config, bool]]) -> None:
    for settings, breaks in jobs:
        try:
            train(settings, Everything(settings))
        except Killed:
            assert breaks


def test_another_number_of_processes_sees_the_same_samples(tmp_path: Path) -> None:
    def settings(name: str, kind: str, nproc: int, **changes: Any) -> Config:
        return config(tmp_path / name, strategy=kind, nproc=nproc, **SPLITTABLE, **changes)

    whole = run(tmp_path / "whole", **SPLITTABLE)
    # ddp x 2, broken off in step 11 -> each of the others, broken off in step 19 -> ddp x 2 again
    launch(several, [(settings("a", "ddp", 2, fails_at=21), True)], nproc=2)
    kinds = {"single": ("single", 1), "dp": ("dp", 2), "ddp3": ("ddp", 3)}
    for name in kinds:
        shutil.copytree(tmp_path / "a", tmp_path / name)
    jobs = {
        name: (
            settings(name, kind, nproc, gradient_accumulation_steps=1, fails_at=10 * (2 if kind == "dp" else 1)),
            True,
        )
        for name, (kind, nproc) in kinds.items()
    }
    several([jobs["single"], jobs["dp"]])
    launch(several, [jobs["ddp3"]], nproc=3)
    launch(several, [(settings(name, "ddp", 2), False) for name in kinds], nproc=2)
    expected = weights(whole)
    for name, (kind, _) in kinds.items():
        records = progress.read(tmp_path / name)
        starts = [(r["strategy"], r["world_size"], r["step"]) for r in records if r["kind"] == "start"]
        assert [s[:2] for s in starts] == [("ddp", 2), (kind, 3 if name == "ddp3" else 1), ("ddp", 2)]
        assert starts[1][2] == 9
        assert 15 <= starts[2][2] <= 18
        relative = (weights(tmp_path / name) - expected).norm() / expected.norm()
        assert relative < 1e-6, name
        ours, theirs = ([r for r in progress.read(f) if r["kind"] == "train"] for f in (tmp_path / name, whole))
        assert [(r["step"], r["samples"], r["lr"]) for r in ours] == [
            (r["step"], r["samples"], r["lr"]) for r in theirs
        ]
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)


def test_three_processes_and_more_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """DistributedDataParallel lays out its buckets anew after the first step of a process: see data_parallel.py."""
    jobs = [(config(tmp_path / "one", strategy="ddp", nproc=3, width=64), False)]
    launch(several, jobs, nproc=3)
    launch(several, [(config(tmp_path / "two", strategy="ddp", nproc=3, width=64, fails_at=21), True)], nproc=3)
    launch(several, [(config(tmp_path / "two", strategy="ddp", nproc=3, width=64), False)], nproc=3)
    assert [r["step"] for r in progress.read(tmp_path / "two") if r["kind"] == "start"] == [0, 9]
    assert chaos.differences(tmp_path / "one", tmp_path / "two") == []


# By the clock
def test_the_margin_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = by(Seconds(), monkeypatch, clock)
    run = clock.Clock(save=2.0, evaluation=50.0)

    def step() -> None:
        run.taken.append(clock.StepTaken(now.now, now.now, now.now, 1, 1))

    assert run.margin(1, False) == 3.0, "nothing measured: the guess at a save, half as much again"
    now.now += 100  # a first step, which compiled
    step()
    now.now += 5
    step()
    assert run.margin(1, False) == 1.5 * (5 + 2)
    assert run.margin(3, False) == 1.5 * (15 + 2)
    assert run.margin(1, True) == 1.5 * (5 + 2 + 50), "unmeasured, it takes what the trial said"
    run.saved(7.0)
    run.saved(4.0)
    with run.evaluating():
        now.now += 11
    assert run.margin(1, True) == 1.5 * (5 + 7 + 11)
    assert run.left(10) == 10 * 105 / 2


class Slow(Everything):
    """A micro-step takes 20 ms, and nothing else takes any time."""

    name = "Everything"

    def __init__(self, config: Config, now: Seconds) -> None:
        super().__init__(config)
        self.now = now

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.now.now += 0.02 if model.training else 0
        return super().loss(model, batch)


def test_a_time_limit_ends_a_session_in_good_order(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, time_limit="0.75s", save_every=None)
    with monkeypatch.context() as patch:
        result = train(settings, Slow(settings, by(Seconds(), patch, clock, session, saving, trainer)))
    assert (result.finished, result.reason) == (False, "time limit")
    assert result.step == 10, (
        "half of a short limit is left to the steps, and the evaluation that is due then waits for the next session"
    )
    assert result.remaining_steps == 24 - result.step
    assert result.remaining_seconds == pytest.approx(0.04 * result.remaining_steps)
    document = json.loads((tmp_path / "result.json").read_text())
    assert (document["finished"], document["remaining_steps"]) == (False, result.remaining_steps)
    run(tmp_path, save_every=None)
    assert torch.equal(weights(tmp_path), weights(undisturbed))
    assert comparable(progress.read(tmp_path)) == comparable(progress.read(undisturbed))
    assert json.loads((tmp_path / "result.json").read_text())["remaining_steps"] == 0


# Where the next session finds it
@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    folder = tmp_path / "kaggle" / "input" / "notebooks" / "somebody" / "earlier-version"
    folder.mkdir(parents=True)
    return folder


def test_the_next_session_goes_on_from_an_input(undisturbed: Path, kaggle: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "first", fails_at=30)
    shutil.move(tmp_path / "first", kaggle / "run")
    for path in [*kaggle.rglob("*"), kaggle]:
        path.chmod(0o555 if path.is_dir() else 0o444)  # inputs are read-only
    second = run(tmp_path / "second", data_workers=1)
    out = capsys.readouterr().out
    assert f"going on from {kaggle}/run/checkpoints/step-00000012: step 12 of 24" in out
    assert "settings changed since the checkpoint, which is allowed: " in out
    assert "data_workers 0 -> 1" in out
    assert "fails_at 30 -> 0" in out
    for path in [*kaggle.rglob("*"), kaggle]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert torch.equal(weights(second), weights(undisturbed))
    assert comparable(progress.read(second)) == comparable(progress.read(undisturbed))
    assert (second / "best" / "model.safetensors").read_bytes() == (
        undisturbed / "best" / "model.safetensors"
    ).read_bytes()


def test_a_session_that_goes_on_from_an_input_holds_all_that_the_next_one_needs(
    undisturbed: Path, kaggle: Path, tmp_path: Path
) -> None:
    """Killed before it saves, or with nothing left to do: its own output has the checkpoint it began with."""
    with pytest.raises(Killed):
        run(kaggle / "run", fails_at=30)
    with pytest.raises(Killed):
        run(tmp_path / "second", fails_at=1, save_every=None)
    carried, copied = (folder / "checkpoints" / "step-00000012" for folder in (kaggle / "run", tmp_path / "second"))
    assert checkpoint.damage(copied) is None
    for file in carried.glob("*.safetensors"):
        assert (copied / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(kaggle / "run")
    shutil.copytree(undisturbed, kaggle / "run")
    done = run(tmp_path / "third", save_every=None)
    assert (done / "checkpoints" / "step-00000024" / "state.json").is_file()
    assert torch.equal(weights(done), weights(undisturbed))


def test_another_runs_checkpoint_among_the_inputs_is_named_and_not_used(
    undisturbed: Path, kaggle: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(undisturbed, kaggle / "run")
    run(tmp_path / "lr", lr=0.02, max_steps=2)
    out = capsys.readouterr().out
    newest = kaggle / "run" / "checkpoints" / "step-00000024"
    assert f"not resumed from the inputs: {newest} is from a run with other settings: lr was 0.01, is 0.02" in out

    class Wider(Everything):
        name = "Everything"

        def model(self) -> nn.Module:
            return nn.Sequential(super().model(), nn.Linear(1, 1))

    settings = config(tmp_path / "wider", max_steps=2)
    train(settings, Wider(settings))
    out = capsys.readouterr().out
    assert f"not resumed from the inputs: {newest} is from another model: 0.0.weight: not in the checkpoint; " in out

    class Tuned(Everything):
        name, backend = "Everything", "peft"

    settings = config(tmp_path / "tuned", max_steps=2)
    train(settings, Tuned(settings))
    assert "is from a run with other settings: backend was 'torch', is 'peft'" in capsys.readouterr().out
    shutil.copytree(undisturbed, tmp_path / "own")
    settings = config(tmp_path / "own", max_steps=30)
    with pytest.raises(
        CheckpointError, match=r"step-00000024 is from a run with other settings: backend was 'torch', is"
    ):
        train(settings, Tuned(settings))


def test_a_damaged_newest_is_moved_away(undisturbed: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(Killed):
        run(tmp_path, fails_at=30)
    newest = tmp_path / "checkpoints" / "step-00000012"
    os.truncate(newest / "model.safetensors", 99)
    run(tmp_path)
    out = capsys.readouterr().out
    assert f"checkpoint {newest} cannot be used: model.safetensors has 99 bytes" in out
    assert "going on from" in out and "step 9 of 24" in out
    assert f"checkpoints that this run does not continue from are now in {tmp_path / 'checkpoints-before-1'}" in out
    assert os.listdir(tmp_path / "checkpoints-before-1") == ["step-00000012"]
    assert chaos.differences(undisturbed, tmp_path) == []


def test_taken_back_to_an_earlier_checkpoint_the_later_ones_are_moved_away(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, fails_at=30, keep_last=4)
    back = tmp_path / "checkpoints" / "step-00000006"
    with pytest.raises(Killed):
        run(tmp_path, fails_at=8, keep_last=4, resume=str(back))
    assert sorted(os.listdir(tmp_path / "checkpoints-before-1")) == ["step-00000009", "step-00000012"]
    run(tmp_path, keep_last=4)
    starts = [r["step"] for r in progress.read(tmp_path) if r["kind"] == "start"]
    assert starts == [0, 6, 9]
    assert torch.equal(weights(tmp_path), weights(undisturbed))


# Divergence
class Poisoned(Regression):
    """From step `at` on the loss is nan, `times` times."""

    name = "Regression"

    def __init__(self, at: int, times: int) -> None:
        super().__init__()
        self.at, self.times, self.calls = at, times, 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        self.calls += model.training
        return loss * float("nan") if model.training and 0 <= self.calls - self.at < self.times else loss


def test_a_run_that_diverges_stops_and_says_where(tmp_path: Path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path), global_batch_size=50, log_every=100, save_every=5, epochs=3)
    with pytest.raises(DivergedError) as caught:
        train(settings, Poisoned(at=12, times=99))
    text = str(caught.value)
    assert text.startswith("the loss is nan at step 16 (learning rate ")
    assert "steps 12 to 16 were skipped, because the gradient was not finite. Step 12 had the samples " in text
    assert f"The last checkpoint from before is {tmp_path / 'checkpoints' / 'step-00000010'}. " in text
    note = next(r for r in progress.read(tmp_path) if r["kind"] == "note")
    seen: list[int] = []
    fetch = Fetch.__getitem__

    def spy(self: Fetch, part: Any) -> Any:
        if isinstance(part, tuple):  # of training
            seen[:] = part[1].tolist()
        return fetch(self, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fetch, "__getitem__", spy)
        with pytest.raises(Killed):
            train(settings.replace(output_dir=str(tmp_path / "again")), Stopping(12))
    assert note["indices"] == seen
    assert ", ".join(map(str, seen[:16])) in text
    assert "… (50 in all: see metrics.jsonl)" in text


class SavedLate(Poisoned):
    """Its checkpoints take seconds to write."""

    def train_data(self) -> Dataset[Any]:
        write = files.write

        def late(path: Path, pieces: Any) -> dict[str, int]:
            time.sleep(0.5)
            return write(path, pieces)

        files.write = late  # in a worker process
        return super().train_data()

    def on_record(self, record: dict[str, Any]) -> None:
        time.sleep(0.5 if record["kind"] == "note" else 0)


def test_of_two_processes_that_diverge_none_leaves_before_all_is_written(tmp_path: Path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path), global_batch_size=50, nproc=2, log_every=100, save_every=5)
    with pytest.raises(DivergedError) as caught:
        launch(train, settings.replace(epochs=3), SavedLate(at=6, times=99))
    newest = tmp_path / "checkpoints" / "step-00000005"
    assert f"The last checkpoint from before is {newest}. " in str(caught.value)
    assert checkpoint.damage(newest) is None
    (note,) = (r for r in progress.read(tmp_path) if r["kind"] == "note")
    assert (note["text"], len(note["indices"])) == ("diverged from step 6 on", 50)


class FailsInASave(SavedLate):
    """Rank 1 does, in step `at`, once rank 0 has begun to save."""

    def __init__(self, at: int, checkpoints: Path) -> None:
        super().__init__(at, times=0)
        self.checkpoints = checkpoints

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if distributed.rank() == 1 and self.calls == self.at:
            while not any(self.checkpoints.glob("*step-*")):
                time.sleep(0.01)
            raise Killed
        return loss


def test_what_rank_0_saves_while_another_rank_fails_is_whole(tmp_path: Path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path), global_batch_size=50, nproc=2, save_every=5)
    with pytest.raises(Killed):
        launch(train, settings, FailsInASave(6, tmp_path / "checkpoints"))
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-00000005"
    assert checkpoint.damage(saved) is None


class Stopping(Regression):
    name = "Regression"

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= model.training
        if self.left == 0:
            raise Killed
        return super().loss(model, batch)


def test_a_few_bad_steps_are_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path), global_batch_size=50, epochs=3)
    result = train(settings, Poisoned(at=12, times=4))
    assert (result.finished, result.skipped_steps) == (True, 4)


def test_a_batch_per_gpu_keeps_the_size_that_the_run_began_with(tmp_path: Path, kaggle: Path, capsys: Any) -> None:
    """From two replicas to one, in the same folder and from an input: the weights are those of the first size."""
    settings = TrainConfig(
        output_dir=str(tmp_path / "run"), global_batch_size="per_gpu:25", strategy="dp", nproc=2, max_steps=2,
        save_every=2, data_workers=0, lr=0.1, schedule="constant",
    )  # fmt: skip
    train(settings, Regression())
    assert "global batch 50 (per_gpu:25: the weights depend on the number of GPUs) = 25 per" in capsys.readouterr().out
    shutil.copytree(tmp_path / "run", kaggle / "run")
    alone: dict[str, Any] = {"strategy": "single", "nproc": 1, "max_steps": 4}
    for folder in (tmp_path / "run", tmp_path / "elsewhere"):
        train(settings.replace(**alone, output_dir=str(folder)), Regression())
        assert (
            "global batch 50 (per_gpu:25 gave 50 at the start, and would give 25 here: the" in capsys.readouterr().out
        )
    train(
        settings.replace(**alone, output_dir=str(tmp_path / "fifty"), resume="never", global_batch_size=50),
        Regression(),
    )
    weights = [read_tensors(tmp_path / name / "model.safetensors") for name in ("run", "elsewhere", "fifty")]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="global_batch_size was 50, is 10"):
        train(settings.replace(**alone, global_batch_size="per_gpu:10"), Regression())
    train(settings.replace(**alone, output_dir=str(tmp_path / "new"), resume="never"), Regression())
    assert "global batch 25 (per_gpu:25: the" in capsys.readouterr().out
