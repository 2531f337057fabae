"""Whole runs on two pretend T4s: every strategy and precision against one CPU process, and what may go wrong.

pytest tests/pretend_cuda/test_two_gpus.py     # builds the pretend pair first, half a minute once
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu import TrainConfig, check, compare_strategies, devices, launch, plan, train
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.errors import HangError, WorkerDiedError
from kaggle_mgpu.recipes import text_generation
from pretend_cuda.gpu_tasks import KilledOnce, Mishap, Normalised, ShortOfMemory, Stopped
from tasks import Language

pytestmark = pytest.mark.usefixtures("gpus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder / name), global_batch_size=16, max_steps=20, log_every=10, eval_every="end", lr=0.3,
        schedule="constant", precision="fp32", max_norm=1.0,
    ).replace(**changes)  # fmt: skip


def weights(folder: str | Path) -> torch.Tensor:
    named = read_tensors(Path(folder) / "model.safetensors")
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(named.items())])


def difference(one: str | Path, other: str | Path) -> float:
    return float((weights(one) - weights(other)).norm() / weights(other).norm())


# --- the same weights as one CPU process ----------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single", "nproc": 1},
    "single, fp16": {"strategy": "single", "nproc": 1, "precision": "fp16"},
    "ddp": {},
    "ddp, fp16": {"precision": "fp16"},
    "ddp, accumulation": {"gradient_accumulation_steps": 4},
    "ddp, fp16, accumulation": {"precision": "fp16", "gradient_accumulation_steps": 4},
    "ddp, loader workers": {"data_workers": 1},
    "ddp, auto": {"micro_batch_size": "auto"},
    "ddp, fp16, auto": {"micro_batch_size": "auto", "precision": "fp16"},
    "ddp, compression": {"gradient_compression": "fp16"},
    "ddp, compiled": {"compile": True},
    "dp": {"strategy": "dp"},
    "dp, fp16": {"strategy": "dp", "precision": "fp16"},
    "dp, accumulation": {"strategy": "dp", "gradient_accumulation_steps": 4},
    "dp, loader workers": {"strategy": "dp", "data_workers": 1},
    "dp, auto": {"strategy": "dp", "micro_batch_size": "auto"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, fp16": {"strategy": "fsdp", "precision": "fp16"},
    "fsdp, accumulation": {"strategy": "fsdp", "gradient_accumulation_steps": 4},
    "fsdp, cpu_offload": {"strategy": "fsdp", "cpu_offload": True},
    "fsdp, cpu_offload, fp16": {"strategy": "fsdp", "cpu_offload": True, "precision": "fp16"},
}


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> str:
    """The folder of one process's run on the CPU, which all others are compared with."""
    return str(train(config(folder, "on the CPU", strategy="single"), Language()).output_dir)


@pytest.mark.parametrize("name", RUNS)
def test_two_gpus_give_the_weights_of_one_cpu_process(name: str, folder: Path, on_cpu: str) -> None:
    settings = config(folder, name, **RUNS[name])
    result = launch(train, settings, Language(), in_worker=True)
    assert result.finished
    assert (result.strategy, result.precision) == (name.split(",")[0], settings.precision)
    assert result.skipped_steps == 0 or "fp16" in name
    # fp16 has 11 bits, and its scaler may skip a step or two at first
    assert difference(result.output_dir, on_cpu) < (0.05 if "fp16" in str(RUNS[name]) else 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_muon_gives_the_weights_of_one_cpu_process(precision: str, folder: Path) -> None:
    text = folder / "book.txt"
    text.write_text("".join(f"line {i} of the only book\n" for i in range(60)), encoding="utf-8")

    def run(name: str, **changes: Any) -> Path:
        settings = text_generation.Config(
            output_dir=str(folder / name), data_path=str(text), tokenizer="byte", n_layer=2, n_head=2, n_embd=32,
            block_size=16, global_batch_size=8, max_steps=20, lr=1e-3, sample_tokens=0, optimizer="muon",
        ).replace(**changes)  # fmt: skip
        task = text_generation.TextGeneration(settings)
        if settings.strategy == "single":
            return Path(train(settings, task).output_dir)
        return Path(launch(train, settings, task, in_worker=True).output_dir)

    one = run(f"muon on the CPU, {precision}", strategy="single", nproc=1, precision="fp32")
    two = run(f"muon, {precision}", strategy="ddp", nproc=2, precision=precision)
    assert difference(two, one) < (0.05 if precision == "fp16" else 1e-5)


def test_dp_refuses_a_compiled_model(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"compile=True with strategy='dp'.*strategy='ddp'"):
        launch(train, config(folder, "dp, compiled", strategy="dp", compile=True), Language(), in_worker=True)


# --- BatchNorm and averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["single", "ddp", "dp"])
def test_batch_norm_and_averages_train(strategy: str, folder: Path) -> None:
    more: dict[str, Any] = {"strategy": strategy, "nproc": 1 if strategy == "single" else 2, "precision": "fp16"}
    settings = config(folder, f"{strategy}, BatchNorm", ema_decay=0.9, lr=0.02, **more)
    result = launch(train, settings, Normalised(rows=strategy == "ddp"), in_worker=True)
    assert result.finished
    first, *_ = [record["loss"] for record in result.records() if record["kind"] == "train"]
    assert result.metrics["loss"] < first
    names = read_tensors(Path(result.output_dir) / "model.safetensors")
    assert int(names["1.num_batches_tracked"]) == 20
    assert all(tensor.isfinite().all() for tensor in names.values())


# --- out of memory ---------------------------------------------------------------------------------------------------

SHORT = [
    ("single", ShortOfMemory("driver")),
    ("dp", ShortOfMemory("cuBLAS")),
    ("ddp", ShortOfMemory("allocator")),
    ("ddp, rank 1", ShortOfMemory("NCCL", ranks=(1,))),
    ("fsdp", ShortOfMemory("Triton")),
    ("ddp, evaluation", ShortOfMemory("cuDNN, no engine", where="metrics")),
    ("dp, evaluation", ShortOfMemory("runtime", where="metrics")),
]


@pytest.mark.parametrize(("name", "task"), SHORT, ids=[name for name, _ in SHORT])
def test_a_run_short_of_memory_goes_on_with_smaller_batches(
    name: str, task: ShortOfMemory, folder: Path, on_cpu: str
) -> None:
    strategy = name.split(",")[0]
    nproc = 1 if strategy == "single" else 2
    settings = config(folder, f"{name}, short of memory", strategy=strategy, nproc=nproc)
    result = launch(train, settings, task, in_worker=True)
    assert result.finished
    assert difference(result.output_dir, on_cpu) < 1e-5
    told = [r.get("text", "") + r.get("micro_batch_size_because", "") for r in result.records()]
    assert "out of memory" in " ".join(told)


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_largest_micro_batch_that_fits_is_found(nproc: int, folder: Path) -> None:
    settings = config(folder, f"auto {nproc}", nproc=nproc, micro_batch_size="auto", max_steps=2)
    result = launch(train, settings, ShortOfMemory("cuBLAS, no handle"), in_worker=True)
    start = next(r for r in result.records() if r["kind"] == "start")
    assert result.finished
    assert start["micro_batch_size"] == 2  # three are tried, a tenth more; four samples are the most


# --- kills, stops and hangs ------------------------------------------------------------------------------------------


# dp is one process, which only a worker's launcher can outlive: hence in_worker
BOTH = pytest.mark.parametrize("strategy", ["ddp", "dp"])


@BOTH
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(strategy: str, folder: Path) -> None:
    undisturbed, killed = (
        config(folder, f"{strategy}, {name}", strategy=strategy, save_every=10) for name in ("undisturbed", "killed")
    )
    launch(train, undisturbed, Language(), in_worker=True)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        launch(train, killed, Mishap("kill"), in_worker=True)
    result = launch(train, killed, Language(), in_worker=True)
    assert (result.finished, result.strategy) == (True, strategy)
    assert torch.equal(weights(killed.output_dir), weights(undisturbed.output_dir))


@BOTH
def test_a_restart_needs_no_second_call(strategy: str, folder: Path, on_cpu: str) -> None:
    settings = config(folder, f"{strategy}, restarted", strategy=strategy, max_restarts=1, save_every=5)
    assert launch(train, settings, KilledOnce("kill"), in_worker=True).finished
    assert difference(settings.output_dir, on_cpu) < 1e-5


def test_a_run_moves_from_gpus_to_the_cpu_and_back(folder: Path, on_cpu: str) -> None:
    settings = config(folder, "moved", save_every=5)
    with pytest.raises(WorkerDiedError):
        launch(train, settings, Mishap("kill"))  # at step 10, on two GPUs
    hidden = settings.replace(strategy="single", max_steps=20, nproc=1)
    assert not train(hidden, Stopped()).finished  # in this process, which has no GPU
    result = launch(train, settings.replace(strategy="dp"), Language(), in_worker=True)
    assert (result.finished, result.strategy) == (True, "dp")
    assert difference(result.output_dir, on_cpu) < 1e-5


@BOTH
def test_an_interrupt_saves_and_the_run_goes_on(strategy: str, folder: Path, on_cpu: str) -> None:
    settings = config(folder, f"{strategy}, interrupted", strategy=strategy)
    stopped = launch(train, settings, Mishap("interrupt"), in_worker=True)
    assert (stopped.finished, stopped.strategy) == (False, strategy)
    assert stopped.reason.startswith("asked to stop")
    assert launch(train, settings, Language(), in_worker=True).finished
    assert difference(settings.output_dir, on_cpu) < 1e-5


@pytest.mark.parametrize(("strategy", "behind"), [("ddp", "rank 1"), ("dp", "rank 0")])
def test_a_hang_names_the_rank_that_is_behind(strategy: str, behind: str, folder: Path) -> None:
    """Under dp a replica that comes to no end keeps the only process from its next step."""
    with pytest.raises(HangError, match=behind):
        launch(
            train, config(folder, f"{strategy}, hung", strategy=strategy), Mishap("hang"), timeout=4.0, in_worker=True
        )


# --- before and beside training --------------------------------------------------------------------------------------


def test_the_report_has_two_t4s() -> None:
    report = devices.report()
    assert [gpu.name for gpu in report.gpus] == ["Tesla T4", "Tesla T4"]
    assert (report.precision, report.mode) == ("fp16", "2 GPUs: one process each, DistributedDataParallel")


def test_the_check_passes_on_both_gpus(folder: Path) -> None:
    report = check.run(folder / "check")
    assert not report.failed, report
    text = str(report)
    assert "nccl, 2 ranks" in text
    assert "GPU against CPU" in text


def test_strategies_are_compared(folder: Path) -> None:
    rows = compare_strategies(
        config(folder, "compared"), Language(), steps=2, strategies=("single", "dp", "ddp", "fsdp")
    )
    assert [(row.strategy, row.replicas, len(row.memory_bytes)) for row in rows] == [
        ("single", 1, 1), ("dp", 2, 2), ("ddp", 2, 2), ("fsdp", 2, 2),
    ]  # fmt: skip
    assert all(row.samples_per_s and min(row.memory_bytes) > 0 for row in rows)


def test_a_run_on_both_is_planned(folder: Path) -> None:
    assert "2 x Tesla T4" in str(plan(config(folder, "planned"), Language()))
