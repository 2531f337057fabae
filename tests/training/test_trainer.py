"""Whole runs: what they learn and write, and how they stop, resume and finish, with one process and with two."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu import Result, TrainConfig, checkpoint, launch, optim, progress, train
from kaggle_mgpu.checkpoints import Checkpoints, read_tensors
from kaggle_mgpu.data import Order
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.recipes import text_generation
from kaggle_mgpu.training import clock
from kaggle_mgpu.training import loop as trainer
from runs import by
from tasks import Language, Regression, token_losses

BATCH, STEPS = 50, 10  # 500 samples: steps of an epoch
Job = tuple[TrainConfig, Any]


def config(folder: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(global_batch_size=BATCH, lr=0.01, log_every=1, data_workers=0, output_dir=str(folder))
    return plain.replace(**changes)


def several(jobs: list[Job]) -> list[Any]:
    """Train one after the other in the same processes; what each returned or raised (the same on all ranks)."""
    outcomes: list[Any] = []
    for settings, task in jobs:
        try:
            outcomes.append(train(settings, task))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def records(run: Result | Path, kind: str = "train") -> list[dict[str, Any]]:
    folder = Path(run.output_dir) if isinstance(run, Result) else run
    return [
        r for line in (folder / "metrics.jsonl").read_text().splitlines() if (r := json.loads(line))["kind"] == kind
    ]


def steps(run: Result | Path, kind: str = "train") -> list[int]:
    return [record["step"] for record in records(run, kind)]


def weights(run: Result | Path, name: str = "model.safetensors") -> Tensor:
    folder = Path(run.output_dir) if isinstance(run, Result) else run
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / name).items())])


def timeless(run: Result | Path) -> list[dict[str, Any]]:
    """The records of what was trained, evaluated, without times."""
    names = ("time", "seconds", "spent", "samples_per_s", "tokens_per_s")
    found = [r for r in Result.records(run) if r["kind"] in ("train", "eval")] if isinstance(run, Result) else []
    return [{key: value for key, value in record.items() if key not in names} for record in found]


def saved_steps(run: Result) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in Checkpoints(Path(run.output_dir) / "checkpoints").all())


def loss_by_hand(task: Any, model: nn.Module) -> float:
    data = task.val_data()
    batch = torch.utils.data.default_collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        return float(task.loss(model.eval(), batch)) / task.count(batch)


class Stopping(Regression):
    """Sends its process SIGTERM in the forward pass of step `stop_at`."""

    name = "Regression"

    def __init__(self, stop_at: int, **options: Any) -> None:
        super().__init__(**options)
        self.stop_at = stop_at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training and self.stop_at:
            self.stop_at -= 1
            if self.stop_at == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)


class StoppingLanguage(Stopping, Language):
    name = "Language"

    def __init__(self, stop_at: int) -> None:
        Language.__init__(self, 475)
        self.stop_at = stop_at

    model, train_data, val_data = Language.model, Language.train_data, Language.val_data  # type: ignore[assignment]
    optimizer, count = Language.optimizer, Language.count

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        Stopping.loss(self, nn.Identity().train(model.training), (torch.zeros(1), torch.zeros(1)))
        return token_losses(model, batch).sum()


class Slow(Regression):
    """Takes 20 ms and more for each training step, so that a run of 100 steps cannot end within a second."""

    name = "Regression"

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.02 if model.training else 0)
        return super().loss(model, batch)


class Untouched(Regression):
    """Not to be trained any more, unless it says so: by an attribute with an underscore, which is no part of a run."""

    def __init__(self, trains: bool = False) -> None:
        super().__init__()
        self._trains = trains

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training and not self._trains:
            raise AssertionError("a finished run was trained")
        return super().loss(model, batch)  # the trial of an evaluation, where there are more steps to take


@pytest.fixture(autouse=True)
def _unkillable() -> Iterator[None]:
    """A SIGTERM that train does not take must fail a test, not end them all."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


# With two processes: started once, all runs one after the other. Ranks agree on a stop some steps after one of them
# asked, at most at three times that step: with 40 steps an epoch it is in the middle of one.
LONG = 60  # steps of the Language runs
TWO = {"strategy": "ddp", "nproc": 2}
LARGE = 1990  # samples of Regression
KINDS = ("single", "dp", "ddp")
FULL: dict[str, Any] = {"epochs": 4, "ema_decay": 0.9, "eval_every": 7, "warmup_steps": 0.1, "save_every": 8}


def language(folder: Path, kind: str, **changes: Any) -> TrainConfig:
    settings = config(folder, global_batch_size=12, lr=0.5, max_steps=LONG, schedule="linear", eval_every=20)
    return settings.replace(strategy=kind, nproc=1 if kind == "single" else 2, **changes)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs. NAME-A-B was stopped under strategy A and finished under B; single, dp, ddp are undisturbed."""
    root = tmp_path_factory.mktemp("two")
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    for kind in ("single", "dp"):
        train(language(root / kind, kind), Language(475))
        stopped = train(language(root / f"{kind}-", kind), StoppingLanguage(20))
        assert (stopped.finished, stopped.step) == (False, 20 if kind == "single" else 10)  # dp: two replicas call loss
        for other in KINDS:
            shutil.copytree(root / f"{kind}-", root / f"{kind}-{other}")
    signal.signal(signal.SIGTERM, handler)
    full = config(root / "full", **TWO, **{**FULL, "epochs": 2})
    first: list[Job] = [
        (full, Regression(LARGE)),
        (full.replace(output_dir=str(root / "stopped")), Stopping(13, samples=LARGE)),
        (full.replace(output_dir=str(root / "stopped")), Regression(LARGE)),
        (full.replace(output_dir=str(root / "timed"), time_limit="0.5s"), Slow(LARGE)),
        (full.replace(output_dir=str(root / "timed")), Regression(LARGE)),
        (language(root / "ddp", "ddp"), Language(475)),
        (language(root / "single-ddp", "ddp"), Language(475)),
        (language(root / "dp-ddp", "ddp"), Language(475)),
        (language(root / "ddp-", "ddp"), StoppingLanguage(10)),
        tiny(root / "tiny", max_steps=12, **TWO),
    ]
    outcomes = launch(several, first, nproc=2)
    for ranks in zip(*outcomes, strict=True):
        assert [type(outcome) for outcome in ranks] == [Result, Result], ranks
    for other in ("single", "dp"):
        shutil.copytree(root / "ddp-", root / f"ddp-{other}")
        train(language(root / f"ddp-{other}", other), Language(475))
        for kind in ("single", "dp"):
            train(language(root / f"{kind}-{other}", other), Language(475))
    (root / "outcomes.json").write_text(json.dumps([vars(outcome) for outcome in outcomes[0]]))
    return root


def result(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text()))


def test_two_processes_learn(two: Path) -> None:
    run = result(two / "full")
    losses = [record["loss"] for record in records(run)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert (run.world_size, run.strategy, run.finished, run.reason) == (2, "ddp", True, "finished")
    assert (run.step, run.max_steps, run.samples_seen) == (80, 80, 2 * LARGE)
    assert run.metrics["loss"] == pytest.approx(loss_by_hand(Regression(), run.load(Regression().model())), rel=1e-6)


def test_a_result_lists_the_files_that_are_there(two: Path) -> None:
    run = result(two / "full")
    lines = run.files({"result.json": "the end", "notes.txt": "not written"}).splitlines()
    assert lines[0] == f"{run.output_dir}:"
    assert "  model.safetensors        the final weights" in lines
    assert "  result.json              the end" in lines
    assert all((Path(run.output_dir) / line.split()[0]).exists() for line in lines[1:])


def test_what_shows_an_unfinished_run_says_so(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the stop button, Run All carries on with the cells that use the result."""
    run = result(two / "full")
    run.load(Regression().model())
    assert capsys.readouterr().out == ""
    run = replace(run, finished=False, step=12, reason="asked to stop")
    said = (
        "not finished: step 12 of 80 (asked to stop). This is the run so far; run the same launch again to continue.\n"
    )
    for show in (lambda: run.load(Regression().model()), run.plot):
        show()
        assert capsys.readouterr().out == said


def test_two_processes_stopped_in_mid_epoch_end_with_the_same_bits(two: Path) -> None:
    outcomes = [Result(**outcome) for outcome in json.loads((two / "outcomes.json").read_text())]
    stopped, timed = outcomes[1], outcomes[3]
    assert (stopped.finished, stopped.reason) == (False, "asked to stop")
    assert 13 <= stopped.step < 40, "in the middle of an epoch"
    assert (timed.finished, timed.reason) == (False, "time limit")
    assert timed.step < 80
    for name in ("stopped", "timed"):
        assert timeless(result(two / name)) == timeless(result(two / "full"))
        for file in ("model.safetensors", "best/model.safetensors", "checkpoints/step-00000080/ema.safetensors"):
            assert torch.equal(weights(two / name, file), weights(two / "full", file)), (name, file)
        assert result(two / name).step == 80


# not ddp from ddp: above, bit for bit
@pytest.mark.parametrize(("first", "then"), [(a, b) for a in KINDS for b in KINDS if not a == b == "ddp"])
def test_any_strategy_goes_on_from_any_other(two: Path, first: str, then: str) -> None:
    found, expected = result(two / f"{first}-{then}"), result(two / "single")
    assert (found.finished, found.strategy, found.samples_seen) == (True, then, expected.samples_seen)
    moves = [record for record in found.records() if record["kind"] == "start"]
    assert [move["strategy"] for move in moves] == [first, then]
    assert 10 <= moves[1]["step"] < 40, "in the middle of an epoch"
    relative = (weights(found) - weights(expected)).norm() / weights(expected).norm()
    assert relative < 1e-6
    ours, theirs = records(found), records(expected)
    assert [r["step"] for r in ours] == list(range(1, LONG + 1))
    for name in ("samples", "epoch", "lr"):
        assert [r[name] for r in ours] == [r[name] for r in theirs]
    # another sample anywhere would show here
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert steps(found, "eval") == [20, 40, 60]
    assert [r["val_loss"] for r in records(found, "eval")] == pytest.approx(
        [r["val_loss"] for r in records(expected, "eval")], rel=1e-5
    )


def test_no_prefix_in_any_file(two: Path) -> None:
    files = sorted(two.rglob("*.safetensors"))
    assert len(files) > 50
    assert all("module." not in name for file in files for name in read_tensors(file))
    names: set[str] = set()
    for folder in two.rglob("step-*"):
        state = checkpoint.load(folder).state["optimizer"]
        assert "module." not in str(state)
        names |= set(state["state"])
    assert "0.weight" in names
    for file in two.rglob("*.json*"):
        assert "module." not in file.read_text()


# With one process
def test_one_process_learns_and_writes_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    by(lambda: next(ticks) / 1000, monkeypatch, clock, trainer)  # each look at the clock takes a millisecond
    task = Regression()
    settings = config(tmp_path / "run", epochs=4, eval_every=15, warmup_steps=5, min_lr=1e-4)
    run = launch(train, settings, task)
    lines = records(run)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert set(lines[0]) == {
        "kind", "step", "samples", "epoch", "loss", "lr", "grad_norm", "skipped", "samples_per_s", "time",
        "spent",
    }  # fmt: skip
    assert [line["samples"] for line in lines] == [BATCH * step for step in range(1, 41)]
    assert [line["epoch"] for line in lines] == [step / STEPS for step in range(1, 41)]
    assert [line["lr"] for line in lines] == [
        optim.lr_at(step, schedule="cosine", lr=0.01, max_steps=40, warmup_steps=5, min_lr=1e-4) for step in range(40)
    ]
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 and line["samples_per_s"] > 0 for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    # every second of the run went somewhere, and the last line has them all behind it
    (end,) = records(run, "stop")
    spent = [line["spent"] for kind in ("train", "eval", "stop") for line in records(run, kind)]
    assert sum(sum(parts.values()) for parts in spent) == pytest.approx(end["time"], abs=0.002)
    assert {what for parts in spent for what in parts} == {"data", "steps", "evaluation", "saving"}
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])

    torch.manual_seed(settings.seed)  # the loss of step 1 is that of the seed's weights over the order's first samples
    x, y = task.train_data()[Order(500, settings.seed, 0)[:BATCH]]
    assert lines[0]["loss"] == pytest.approx(float(task.loss(task.model(), (x, y)) / BATCH), rel=1e-5)
    evaluations = records(run, "eval")
    assert [set(line) for line in evaluations] == 3 * [{"kind", "step", "samples", "val_loss", "time", "spent"}]
    assert steps(run, "eval") == [15, 30, 40]
    assert run.metrics == {"loss": evaluations[-1]["val_loss"]}
    assert run.metrics["loss"] == pytest.approx(loss_by_hand(task, run.load(task.model())), rel=1e-6)
    assert steps(run, "start") == [0]
    assert [(line["step"], line["reason"]) for line in records(run, "stop")] == [(40, "finished")]
    assert steps(run, "save") == saved_steps(run) == [40]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == vars(run)
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    assert document.pop("stamp") == {
        "task": "Regression", "backend": "torch", "global_batch_size": BATCH, "dataset_size": 500,
    }  # fmt: skip
    assert TrainConfig.from_dict(document) == settings
    written = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert written == [
        "best/model.safetensors",
        *(f"checkpoints/step-00000040/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
    ]
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("changes", "logged", "evaluated", "saved"),
    [
        ({"log_every": 7}, [1, 7, 14, 20], [10, 20], [20]),
        ({"eval_every": "end", "log_every": 100}, [1, 20], [20], [20]),
        ({"eval_every": 6, "log_every": 10, "save_every": 5}, [1, 10, 20], [6, 12, 18, 20], [5, 10, 15, 20]),
        ({"save_every": 3, "keep_last": 2, "log_every": 20, "max_steps": 17}, [1, 17], [10, 17], [15, 17]),
        ({"save_interval_minutes": 0, "keep_last": 3, "log_every": 20}, [1, 20], [10, 20], [18, 19, 20]),
    ],
)
def test_when_it_looks_and_when_it_saves(
    tmp_path: Path, changes: dict[str, Any], logged: list[int], evaluated: list[int], saved: list[int]
) -> None:
    run = train(config(tmp_path, epochs=2).replace(**changes), Regression())
    assert steps(run) == logged
    assert steps(run, "eval") == evaluated
    assert saved_steps(run) == saved


def test_the_best_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    task = Regression()
    # the loss falls, so its highest value comes first
    run = train(config(tmp_path, epochs=2, eval_every=4, best_mode="max"), task)
    losses = [record["val_loss"] for record in records(run, "eval")]
    assert losses.index(max(losses)) == 0
    assert run.best == losses[0]
    assert loss_by_hand(task, run.load(task.model(), "best")) == pytest.approx(losses[0], rel=1e-6)
    assert loss_by_hand(task, run.load(task.model(), "final")) == pytest.approx(losses[-1], rel=1e-6)
    assert losses[-1] < 0.9 * losses[0]
    assert not run.load(task.model(), "best").training


class Undefined(Regression):
    """A metric that is nan in the first evaluations, as an F1 score is before the first hit."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = -1  # the first one is the trial before training

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        self.evaluations += 1
        return {"score": [math.nan, math.nan, 0.5, 0.25, math.nan][self.evaluations - 1]}


def test_an_undefined_metric_is_never_the_best_for_long(tmp_path: Path) -> None:
    run = train(config(tmp_path, eval_every=2, best_metric="score", save_every=8), Undefined())
    assert run.best == 0.25
    assert torch.equal(
        weights(run, "best/model.safetensors"), weights(run, "checkpoints/step-00000008/model.safetensors")
    )


def test_a_best_metric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best_metric is 'f1', but the evaluation gave loss\. Set best_metric to one"):
        train(config(tmp_path, best_metric="f1"), Regression())


def test_without_validation_data(tmp_path: Path) -> None:
    train(config(tmp_path), Regression())
    first = weights(tmp_path, "best/model.safetensors")
    run = train(config(tmp_path, resume="never", seed=3, best_metric="f1"), Regression(val_samples=0))
    assert (run.metrics, run.best, run.finished) == ({}, None, True)
    assert records(run, "eval") == []
    best = torch.cat([p.flatten() for _, p in sorted(run.load(Regression().model(), "best").state_dict().items())])
    assert torch.equal(best, weights(run))
    assert not torch.equal(best, first), "the weights of the run before"


def test_averaged_weights_are_evaluated_written_and_resumed(tmp_path: Path) -> None:
    settings = config(tmp_path / "a", epochs=2, eval_every=5, save_every=5, ema_decay=0.9)
    task = Regression()
    run = train(settings, task)
    newest = tmp_path / "a" / "checkpoints" / "step-00000020"
    average, raw = (read_tensors(newest / f"{name}.safetensors") for name in ("ema", "model"))
    assert average.pop(".num_updates") == 20
    final = read_tensors(tmp_path / "a" / "model.safetensors")
    assert final.keys() == average.keys() == raw.keys()
    assert all(torch.equal(final[name], average[name]) for name in final)
    assert not any(torch.equal(final[name], raw[name]) for name in final)
    assert run.metrics["loss"] == pytest.approx(loss_by_hand(task, run.load(task.model())), rel=1e-6)
    assert run.best == min(record["val_loss"] for record in records(run, "eval"))
    assert run.best == pytest.approx(loss_by_hand(task, run.load(task.model(), "best")), rel=1e-6)

    resumed = settings.replace(output_dir=str(tmp_path / "b"))
    assert train(resumed, Stopping(13)).step == 13
    again = train(resumed, task)
    assert timeless(again) == timeless(run)
    assert torch.equal(weights(again), weights(run))


def test_linear_and_square_root_scaling(tmp_path: Path) -> None:
    for scaling, factor in (("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        settings = config(tmp_path / scaling, lr_scaling=scaling, global_batch_size=48, base_batch_size=12, max_steps=4)
        run = train(settings, Regression())
        expected = [optim.lr_at(step, schedule="cosine", lr=0.01 * factor, max_steps=4) for step in range(4)]
        assert [record["lr"] for record in records(run)] == expected


class Padded(Regression):
    """Samples of different lengths, which only a collate of its own can make a batch of."""

    def data(self, seed: int, samples: int) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(1 + i % 8, generator=generator) for i in range(samples)]  # type: ignore[return-value]

    def collate(self, samples: list[Tensor]) -> Any:
        x = torch.stack([nn.functional.pad(sample, (0, 8 - len(sample))) for sample in samples])
        return x, x.sum(1, keepdim=True).sin()


class Confusion(Regression):
    """A 2 x 2 table of signs, from which accuracy is made."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        x, y = batch
        true, said = (y[:, 0] > 0).long(), (model(x)[:, 0] > 0).long()
        table = torch.zeros(4, device=x.device).index_add(0, 2 * true + said, torch.ones(len(x), device=x.device))
        return {"table": (table.view(2, 2), 1), "loss": (self.loss(model, batch), self.count(batch))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        table = metrics["table"]
        assert table.shape == (2, 2)
        return {"accuracy": float(table.trace() / table.sum()), "loss": float(metrics["loss"])}


def test_a_collate_of_ones_own_with_a_loader_process(tmp_path: Path) -> None:
    runs = [train(config(tmp_path / str(n), data_workers=n, max_steps=5), Padded(60, 7)) for n in (0, 1)]
    assert timeless(runs[0]) == timeless(runs[1])
    assert len(records(runs[0])) == 5


def test_sums_may_be_tensors(tmp_path: Path) -> None:
    settings = config(tmp_path / "single", epochs=3, best_metric="accuracy", best_mode="max")
    run = train(settings, Confusion())
    data = Confusion().val_data()
    x, y = torch.utils.data.default_collate([data[i] for i in range(len(data))])  # type: ignore[index,arg-type]
    with torch.no_grad():
        by_hand = float(((run.load(Confusion().model())(x) > 0) == (y > 0)).float().mean())
    assert run.metrics["accuracy"] == pytest.approx(by_hand, abs=1e-6)
    assert run.metrics["accuracy"] > 0.6
    assert run.best == max(record["val_accuracy"] for record in records(run, "eval"))
    replicated = train(settings.replace(output_dir=str(tmp_path / "dp"), strategy="dp", nproc=2), Confusion())
    assert replicated.metrics == pytest.approx(run.metrics, rel=1e-4)


class Listed(Regression):
    def model(self) -> Any:
        return [super().model()]


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Listed\.model must return an nn\.Module, got list"):
        train(config(tmp_path), Listed())
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True, but Sequential has no method gradient_checkp"):
        train(config(tmp_path, gradient_checkpointing=True), Regression())
    assert list(tmp_path.iterdir()) == []


class Checkpointing(Regression):
    def model(self) -> nn.Module:
        model = super().model()
        model.gradient_checkpointing_enable = lambda: self.enabled.append(True)  # type: ignore[assignment]
        return model

    def __init__(self) -> None:
        super().__init__()
        self.enabled: list[bool] = []


def test_gradient_checkpointing_is_asked_for(tmp_path: Path) -> None:
    task = Checkpointing()
    train(config(tmp_path / "off", max_steps=1), task)
    assert task.enabled == []
    train(config(tmp_path / "on", max_steps=1, gradient_checkpointing=True), task)
    assert task.enabled == [True]


# Stopping and going on
def test_stopped_by_a_signal_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = config(tmp_path / "a", **FULL)
    undisturbed = train(settings, Regression(dropout=0.1))
    split = settings.replace(output_dir=str(tmp_path / "b"))
    handler = signal.getsignal(signal.SIGTERM)
    run = train(split, Stopping(13, dropout=0.1))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (run.finished, run.reason, run.step, run.max_steps) == (False, "asked to stop", 13, 40)
    assert json.loads((tmp_path / "b" / "result.json").read_text())["finished"] is False
    assert saved_steps(run) == [8, 13]
    assert (tmp_path / "b" / "model.safetensors").is_file()
    for stop in (8, 13):  # 21 steps; then 34
        run = train(split, Stopping(stop, dropout=0.1))
    assert run.step == 34
    run = train(split, Regression(dropout=0.1))
    assert run.finished
    assert timeless(run) == timeless(undisturbed)
    assert steps(run, "start") == [0, 13, 21, 34]
    for name in ("model.safetensors", "best/model.safetensors"):
        assert torch.equal(weights(run, name), weights(undisturbed, name))


def test_a_time_limit_stops_it_in_good_order(tmp_path: Path) -> None:
    settings = config(tmp_path / "a", epochs=10, eval_every=15)
    undisturbed = train(settings, Regression())
    split = settings.replace(output_dir=str(tmp_path / "b"))
    run = train(split.replace(time_limit="0.8s"), Slow())  # 100 steps of 20 ms and more
    assert (run.finished, run.reason, run.max_steps) == (False, "time limit", 100)
    assert run.step < 100
    document = json.loads((tmp_path / "b" / "result.json").read_text())
    assert (document["finished"], document["reason"], document["step"]) == (False, "time limit", run.step)
    assert run.step == 0 or saved_steps(run)[-1] == run.step
    again = train(split, Regression())
    assert again.finished
    assert timeless(again) == timeless(undisturbed)
    assert torch.equal(weights(again), weights(undisturbed))


def test_a_finished_run_returns_at_once_and_more_steps_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, max_steps=15, schedule="constant")
    run = train(settings, Untouched(trains=True))

    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = content()
    capsys.readouterr()
    again = train(settings, Untouched())
    assert again == run
    assert content() == before
    assert "already finished after 15 steps" in capsys.readouterr().out
    assert launch(train, settings.replace(strategy="dp", nproc=2), Untouched()) == run  # under another strategy too

    more = train(settings.replace(max_steps=25), Untouched(trains=True))
    assert (more.finished, more.step) == (True, 25)
    assert steps(more) == list(range(1, 26))
    assert steps(more, "start") == [0, 15]
    whole = train(settings.replace(max_steps=25, output_dir=str(tmp_path / "whole")), Untouched(trains=True))
    assert torch.equal(weights(more), weights(whole))


def test_a_continued_run_that_breaks_is_not_said_to_be_finished(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=5)
    assert train(settings, Untouched(trains=True)).finished
    with pytest.raises(AssertionError, match="a finished run was trained"):
        train(settings.replace(max_steps=10), Untouched())
    assert not (tmp_path / "result.json").exists()


def test_never_puts_the_checkpoints_aside(tmp_path: Path) -> None:
    first = train(config(tmp_path, max_steps=6, save_every=3), Regression())
    again = train(config(tmp_path, max_steps=6, lr=0.02, resume="never"), Regression())
    assert again.finished
    assert steps(again) == [1, 2, 3, 4, 5, 6]
    assert records(again)[0]["lr"] == 0.02
    assert saved_steps(again) == [6]
    assert [p.name for p in Checkpoints(tmp_path / "checkpoints-before-1").all()] == ["step-00000006", "step-00000003"]
    assert first.finished


def test_from_a_checkpoint_given_by_its_path(tmp_path: Path) -> None:
    settings = config(tmp_path / "a", max_steps=9, save_every=3, schedule="constant")
    whole = train(settings, Regression())
    chosen = tmp_path / "a" / "checkpoints" / "step-00000003"
    branch = settings.replace(output_dir=str(tmp_path / "b"), resume=str(chosen))
    run = train(branch, Regression())
    assert steps(run, "start") == [0, 3]
    assert steps(run) == list(range(1, 10))
    assert torch.equal(weights(run), weights(whole))
    with pytest.raises(CheckpointError, match=r"step-00000004 is not a usable checkpoint: state\.json is missing"):
        train(branch.replace(resume=str(chosen.with_name("step-00000004"))), Regression())


def test_from_kaggles_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle = tmp_path / "kaggle"
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(kaggle))
    inputs = kaggle / "input"
    # what is best comes first and is never beaten
    settings = config(tmp_path / "new", epochs=4, eval_every=4, best_mode="max")
    old = settings.replace(output_dir=str(inputs / "notebooks" / "me" / "first" / "run"))
    assert train(old, Stopping(7)).step == 7
    shutil.copytree(inputs / "notebooks", inputs / "datasets")  # an older copy of it
    newest = train(old, Stopping(6))
    assert newest.step == 13
    for name, changes in {"lr": {"lr": 0.02}, "seed": {"seed": 2}}.items():  # further, but other runs
        train(settings.replace(output_dir=str(inputs / name / "run"), **changes), Regression())
    for part in inputs.rglob("*"):
        part.chmod(0o555 if part.is_dir() else 0o444)  # as inputs are
    run = train(settings, Regression())
    for part in inputs.rglob("*"):
        part.chmod(0o755 if part.is_dir() else 0o644)
    monkeypatch.delenv("KAGGLE_MGPU_KAGGLE_ROOT")
    undisturbed = train(settings.replace(output_dir=str(tmp_path / "undisturbed")), Regression())
    assert run.finished
    assert steps(run, "start") == [0, 7, 13]
    assert timeless(run) == timeless(undisturbed)
    for name in ("model.safetensors", "best/model.safetensors"):
        assert torch.equal(weights(run, name), weights(undisturbed, name)), name


def test_other_settings_are_refused_and_where_it_runs_may_change(tmp_path: Path) -> None:
    settings = config(tmp_path, epochs=2)
    assert train(settings, Stopping(7)).step == 7
    with pytest.raises(CheckpointError, match=r"other settings: lr was 0\.01, is 0\.02\. Set them back") as caught:
        train(settings.replace(lr=0.02, log_every=2), Regression())
    assert "step-00000007" in str(caught.value)
    with pytest.raises(CheckpointError, match="global_batch_size was 50, is 25"):
        train(settings.replace(global_batch_size=25), Regression())
    with pytest.raises(CheckpointError, match="task was 'Regression', is 'Padded'"):
        train(settings, Padded())
    moved = settings.replace(strategy="dp", nproc=2, micro_batch_size=5, gradient_accumulation_steps=5, time_limit="1h")
    run = train(moved.replace(eval_every="end", save_every=4, keep_last=9, log_every=3), Regression())
    assert run.finished
    assert saved_steps(run) == [7, 8, 12, 16, 20]


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Straight(Regression):
    def model(self) -> nn.Module:
        return OneLayer()


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_names(tmp_path: Path) -> None:
    settings, task = config(tmp_path / "plain", max_steps=4), Straight(val_samples=0)  # ten seconds of compiling
    plain = train(settings, task)
    compiled = train(settings.replace(compile=True, output_dir=str(tmp_path / "compiled")), task)
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    names = read_tensors(tmp_path / "compiled" / "model.safetensors").keys()
    assert names == read_tensors(tmp_path / "plain" / "model.safetensors").keys() == {"layer.weight", "layer.bias"}
    assert torch.allclose(weights(compiled), weights(plain), rtol=1e-5, atol=1e-6)


# From a shell
SCRIPT = """
import sys
import torch
from kaggle_mgpu import Task, TrainConfig, launch, train

class Line(Task):
    slope = 3.0

    def model(self):
        return torch.nn.Linear(1, 1)

    def train_data(self):
        x = torch.linspace(-1, 1, 64)[:, None]
        return torch.utils.data.TensorDataset(x, self.slope * x)

    def loss(self, model, batch):
        return squared(model(batch[0]), batch[1])

def squared(a, b):
    return (a - b).square().sum()

Line.slope = -2.0  # after it was defined, as in a later cell
result = launch(train, TrainConfig(nproc=2, lr=0.1, weight_decay=0, max_steps=150, output_dir=sys.argv[1]), Line())
print(result.world_size, result.finished, round(result.load(torch.nn.Linear(1, 1)).weight.item(), 1))
"""


def test_a_task_defined_in_a_script_trains_in_two_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "run"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "2 True -2.0"


TINY = {
    "tokenizer": "byte", "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "global_batch_size": 4,
    "schedule": "constant", "warmup_steps": 0, "lr": 0.01, "log_every": 1, "eval_every": "end", "save_every": 100,
}  # fmt: skip


TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


def cli(folder: Path, *launcher: str, **settings: Any) -> subprocess.Popen[str]:
    """`python -m kaggle_mgpu train text_generation` in tiny, writing to folder."""
    corpus = folder.with_suffix(".txt")
    corpus.write_text(TEXT)
    settings = {**TINY, "data_path": corpus, "output_dir": folder, **settings}
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, *launcher, "-m", "kaggle_mgpu", "train", "text_generation", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def complete(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    return output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def tiny(folder: Path, **settings: Any) -> Job:
    """The same, to be trained here."""
    folder.with_suffix(".txt").write_text(TEXT)
    whole = {**TINY, "data_path": str(folder.with_suffix(".txt")), "output_dir": str(folder), **settings}
    made = text_generation.Config.from_dict(whole)
    return made, text_generation.task(made)


@pytest.mark.parametrize(("number", "nproc"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_in_mid_training_saves_and_returns(tmp_path: Path, number: signal.Signals, nproc: int) -> None:
    process = cli(tmp_path / "run", nproc=nproc, strategy="ddp", max_steps=10**6)
    # progress.read leaves out a line that is only half there
    wait_for(lambda: sum(record["kind"] == "train" for record in progress.read(tmp_path / "run")) >= 5, process)
    process.send_signal(number)
    complete(process)
    stopped = result(tmp_path / "run")
    assert (stopped.finished, stopped.reason, stopped.world_size) == (False, "asked to stop", nproc)
    assert stopped.step >= 5
    assert saved_steps(stopped)[-1] == stopped.step
    # and on, here: with one process the bits are those of a run that was left alone
    resumed = train(*tiny(tmp_path / "run", max_steps=stopped.step + 5, nproc=1))
    assert steps(resumed, "start") == [0, stopped.step]
    assert steps(resumed) == list(range(1, stopped.step + 6))
    undisturbed = train(*tiny(tmp_path / "alone", max_steps=stopped.step + 5, nproc=1))
    if nproc == 1:
        assert torch.equal(weights(resumed), weights(undisturbed))
        assert timeless(resumed) == timeless(undisturbed)


def test_torchrun_gives_the_weights_that_launch_gives(two: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    complete(cli(tmp_path / "run", *torchrun, max_steps=12))
    a, b = result(tmp_path / "run"), result(two / "tiny")
    assert (a.world_size, a.strategy, a.finished) == (b.world_size, b.strategy, b.finished) == (2, "ddp", True)
    assert torch.equal(weights(a), weights(b))
    assert timeless(a) == timeless(b)
