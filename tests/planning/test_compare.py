"""compare_strategies: real steps under each strategy, and the table of what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kaggle_mgpu import TrainConfig, compare_strategies, devices, launch, plan, train
from kaggle_mgpu.planning.compare import Row, advice, measure, same_micro_batch, table
from tasks import Language, Regression


def test_three_strategies_on_the_same_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = compare_strategies(TrainConfig(global_batch_size=24), Language(), steps=3, nproc=2)
    assert [(row.strategy, row.replicas, row.micro_batch_size) for row in rows] == [
        ("single", 1, 12),
        ("dp", 2, 12),
        ("ddp", 2, 12),
    ]
    for row in rows:
        assert row.samples_per_s is not None and row.step_seconds is not None and row.ratio is not None
        assert row.terms_per_s is not None
        # the dataset has 100 samples: most steps take 24 of them, the fifth takes 4
        assert 4 <= row.samples_per_s * row.step_seconds <= 24
        assert row.ratio == pytest.approx(row.samples_per_s / (rows[0].samples_per_s or 1))
        assert row.terms_per_s > row.samples_per_s
        assert bool(row.memory_bytes) == bool(devices.gpus())
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("strategy", "replicas", "samples/s", "tokens/s", "ms", "a", "step", "ratio", "micro-batch"),
        *("peak", "memory", "per", "GPU"),
    ]
    assert [text.split()[0] for text in lines[1:]] == ["single", "dp", "ddp"]


def test_the_weights_stay_where_they_are() -> None:
    """Steps that are measured must not train: a rate that is too high would make numbers of another speed of them."""

    class Diverging(Regression):
        def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=config.lr)

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            loss = super().loss(model, batch)
            assert loss.isfinite()
            return loss

    got = measure(TrainConfig(global_batch_size=50, lr=1e9, nproc=1), Diverging(), steps=5)
    assert (len(got.seconds), got.samples, got.micro_batch_size) == (5, 250, 50)


def test_the_micro_batch_is_the_one_of_the_largest_number_of_replicas() -> None:
    shared = same_micro_batch(TrainConfig(global_batch_size=48, gradient_accumulation_steps=3), 4)
    assert (shared.micro_batch_size, shared.gradient_accumulation_steps, shared.global_batch_size) == (4, None, 48)
    shared = same_micro_batch(TrainConfig(micro_batch_size=6), 2)
    assert (shared.micro_batch_size, shared.global_batch_size) == (6, 12)
    assert (
        same_micro_batch(TrainConfig(micro_batch_size="auto", global_batch_size="per_gpu:6"), 2).global_batch_size == 12
    )
    auto = same_micro_batch(TrainConfig(micro_batch_size="auto", global_batch_size=12), 2)
    assert (auto.micro_batch_size, auto.global_batch_size) == ("auto", 12)


def test_what_does_not_fit_is_a_row_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Large(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            if len(batch[0]) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(model, batch)

    config = TrainConfig(global_batch_size=16, micro_batch_size=16)
    rows = compare_strategies(config, Large(), steps=1, nproc=1, strategies=("single", "ddp"))
    assert [(row.note, row.samples_per_s) for row in rows] == [("out of memory", None), ("needs a second GPU", None)]
    assert "out of memory" in capsys.readouterr().out


def test_an_error_of_the_task_is_raised_here() -> None:
    class Broken(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        compare_strategies(TrainConfig(), Broken(), steps=1, strategies=("single",))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        compare_strategies(TrainConfig(), Regression(), steps=0)
    with pytest.raises(ValueError, match="nproc: expected 1 or more, got -1"):
        compare_strategies(TrainConfig(), Regression(), nproc=-1)
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        plan(TrainConfig(), Regression(), steps=0)
    for function in (compare_strategies, plan):
        says = rf"^{function.__name__} expects a TrainConfig and a Task \(an instance, not the class\), got "
        with pytest.raises(TypeError, match=f"{says}a TrainConfig and the class Regression$"):
            function(TrainConfig(), Regression)  # type: ignore[operator]
        with pytest.raises(TypeError, match=f"{says}a Regression and a TrainConfig$"):
            function(Regression(), TrainConfig())  # type: ignore[operator]


def test_a_table_reads_in_columns() -> None:
    rows = [
        Row("single", 1, 100.0, 0.5, 1.0, (2**30,), 25),
        Row("ddp", 2, 190.0, 0.26, 1.9, (2**30, 2**29), 25),
        Row("dp", 2, note="out of memory"),
    ]
    assert table(rows).splitlines() == [
        "strategy  replicas  samples/s  ms a step  ratio  micro-batch  peak memory per GPU",
        "single    1         100.0      500.0      1.00   25           1.00 GiB",
        "ddp       2         190.0      260.0      1.90   25           1.00 GiB, 0.50 GiB",
        "dp        2         out of memory",
    ]


def test_one_job_per_gpu_is_advised_where_it_gives_more() -> None:
    def said(ddp: float | None, single: float = 100.0) -> str:
        return advice(
            [Row("single", 1, single), Row("dp", 2, 50.0), Row("ddp", 2, ddp, note="" if ddp else "out of memory")]
        )

    slow = (
        "for several runs (folds, seeds, settings), launch_each with one job per GPU gives up to 200.0 samples/s on 2 "
        "GPUs, "
    )
    assert said(150.0) == f"{slow}1.3 times as many as ddp"
    assert said(80.0).startswith(f"{slow}2.5 times as many as ddp. A single run is faster on one GPU: ")
    assert said(190.0) == said(None) == advice([Row("ddp", 2, 150.0)]) == ""


@pytest.mark.parametrize("changes", [{"gradient_compression": "fp16"}, {"bucket_mb": 1}])
def test_what_a_plan_advises_is_there_and_trains_as_it_should(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = TrainConfig(global_batch_size=20, max_steps=6, lr=0.05, nproc=2, eval_every="end", seed=3)
    weights = []
    for number, more in enumerate(({}, changes)):
        folder = tmp_path / str(number)
        result = launch(train, config.replace(output_dir=str(folder), **more), Language())
        weights.append(nn.utils.parameters_to_vector(result.load(Language().model()).parameters()).detach())
    plain, other = weights
    difference = float((plain - other).norm() / plain.norm())
    if "bucket_mb" in changes:
        assert difference == 0.0
    else:
        assert 1e-7 < difference < 1e-3, "rounded to fp16 on the way, and nothing else"


@pytest.mark.gpu
def test_memory_of_each_gpu() -> None:
    rows = compare_strategies(TrainConfig(global_batch_size=16), Regression(), steps=2)
    assert all(len(row.memory_bytes) == row.replicas for row in rows if row.samples_per_s is not None)
