"""Measure how much faster a task trains on several GPUs of this machine, under each strategy.

    rows = compare_strategies(config, task, steps=20)   # prints a table: single, dp, ddp; returns its rows

Each strategy takes real steps on the same global batches with the same micro-batch per GPU, in new workers. With
micro_batch_size="auto" each strategy takes the largest micro-batch that fits. No checkpoint, evaluation or log is
written, and nothing stays in this process. `measure` times one strategy, also for `plan`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..data import BatchPlan
from ..fields import parse_per_gpu
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..training import Task, build_parts, expect, is_out_of_memory, settle_micro_batch, take_step

WARM_UP = 3
"""Steps before the timing starts: for imports, autotuning, and DistributedDataParallel's reordering of its buckets."""


@dataclass(frozen=True)
class Row:
    """The figures of a strategy. If the strategy could not run, the figures are None and `note` gives the reason."""

    strategy: str
    replicas: int
    """Replicas of the model: one per GPU; on a CPU, one per process (ddp) or several in one process (dp)."""
    samples_per_s: float | None = None
    step_seconds: float | None = None
    ratio: float | None = None
    """Throughput relative to the first row with a throughput."""
    memory_bytes: tuple[int, ...] = ()
    """Peak bytes of torch's allocator on each GPU; () on a CPU."""
    micro_batch_size: int | None = None
    terms_per_s: float | None = None
    """Throughput in the task's unit; None if the unit is samples."""
    note: str = ""


@dataclass
class Measured:
    """The measured steps of a rank; `samples` and `terms` are sums over all ranks."""

    seconds: list[float]
    samples: int
    terms: int
    memory_bytes: list[int]
    micro_batch_size: int

    @property
    def step_seconds(self) -> float:
        """Return the median of `seconds`, so that outliers of a busy machine have no influence."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def compare_strategies(
    config: TrainConfig,
    task: Task,
    steps: int = 20,
    nproc: int | None = None,
    strategies: Sequence[str] = ("single", "dp", "ddp"),
) -> list[Row]:
    """Take `steps` training steps under each strategy; print and return throughput, memory per GPU and ratio.

    Args:
        nproc: replicas for dp and ddp. Default: one per GPU; two on a CPU.
        strategies: the strategies in the order of the rows; the first that can run has the ratio 1.

    Raises:
        TypeError: `config` is no TrainConfig, or `task` is no Task.
        ValueError: `steps` or `nproc` is below 1, or `nproc` is above the number of GPUs (if there are any).
    """
    expect(config, task, "compare_strategies")
    for name, number in {"steps": steps, "nproc": 1 if nproc is None else nproc}.items():
        if number < 1:
            raise ValueError(f"{name}: expected 1 or more, got {number}")
    gpus = devices.select(config.gpu_ids)
    replicas = nproc or len(gpus) or 2
    if gpus and replicas > len(gpus):
        raise ValueError(f"nproc={replicas}: expected at most {len(gpus)}, the number of GPUs")
    shared = same_micro_batch(config, replicas)
    rows: list[Row] = []
    for name in strategies:
        count = 1 if name == "single" else replicas
        if name != "single" and replicas == 1:
            rows.append(Row(name, count, note="needs a second GPU"))
            continue
        try:
            measured = measure(shared.replace(strategy=name, nproc=count), task, steps)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows.append(Row(name, count, note="out of memory"))
            continue
        rows.append(_row(name, count, measured, rows, task.unit, not gpus))
    print(table(rows, task.unit), flush=True)
    if gpus and (hint := advice(rows)):
        print(hint, flush=True)
    return rows


def advice(rows: Sequence[Row]) -> str:
    """Return a hint if one job per GPU trains several runs at least 1.1 times as fast as ddp in turn; else ""."""
    rates = {row.strategy: row.samples_per_s for row in rows if row.samples_per_s}
    ddp = next((row for row in rows if row.strategy == "ddp" and row.samples_per_s), None)
    if ddp is None or "single" not in rates:
        return ""
    ddp_rate, separate_rate = rates["ddp"], ddp.replicas * rates["single"]
    if separate_rate < 1.1 * ddp_rate:
        return ""
    hint = (
        f"for several runs (folds, seeds, settings), launch_each with one job per GPU gives up to {separate_rate:.1f} "
        f"samples/s on {ddp.replicas} GPUs, {separate_rate / ddp_rate:.1f} times as many as ddp"
    )
    if ddp_rate < rates["single"]:  # T4s lack peer access: kohya-ss/sd-scripts #1434, huggingface/transformers #9371
        hint += ". A single run is faster on one GPU: the exchange of gradients takes longer than the second GPU saves"
    return hint


def same_micro_batch(config: TrainConfig, replicas: int) -> TrainConfig:
    """Return a config with the global batch and micro-batch sizes that `config` has with `replicas` replicas.

    A strategy with fewer replicas then reaches the same global batch by gradient accumulation. A micro-batch size of
    "auto" stays "auto".
    """
    if config.micro_batch_size == "auto":
        size = config.global_batch_size
        size = parse_per_gpu(size) * replicas if isinstance(size, str) else size
        return config.replace(global_batch_size=size, gradient_accumulation_steps=None)
    plan = BatchPlan.make(
        dataset_size=1,
        num_replicas=replicas,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    return config.replace(
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=None,
    )


def measure(config: TrainConfig, task: Task, steps: int) -> Measured:
    """Time `steps` training steps after a warm-up; return rank 0's times and every GPU's memory.

    Errors of the workers are raised here, such as torch.OutOfMemoryError.
    """
    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-measure-") as folder:
        quiet = config.replace(output_dir=folder, resume="never", max_restarts=0)
        every: list[Measured] = launch(_steps, quiet, task, steps, in_worker=True)
    first = every[0]
    first.memory_bytes = [nbytes for rank in every for nbytes in rank.memory_bytes]
    return first


def _steps(config: TrainConfig, task: Task, steps: int) -> Measured:
    """Time training steps without writing anything."""
    on_gpu = torch.cuda.is_available()
    mine = [distributed.device()] if on_gpu else []
    if on_gpu and config.strategy == "dp":
        mine = [torch.device("cuda", index) for index in range(int(config.nproc))]  # dp: one process uses all GPUs
    for device in mine:
        torch.cuda.reset_peak_memory_stats(device)
    parts = settle_micro_batch(build_parts(config, task), folders=[])
    # with a learning rate of 0 nothing diverges; only the time of a step matters
    parts = dataclasses.replace(parts, lr_at=lambda step: 0.0, ema=None)
    batches = parts.batches(samples_seen=0)
    seconds, samples, terms = [], 0, 0
    for number in range(WARM_UP + steps):
        distributed.alive(number)
        began = time.perf_counter()
        batch = next(batches)
        take_step(parts, batch, number)
        for device in mine:
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
            samples += batch.samples
            terms += batch.terms()
    memory_bytes = [torch.cuda.max_memory_allocated(device) for device in mine]
    return Measured(seconds, samples, terms, memory_bytes, parts.plan.micro_batch_size)


def _row(name: str, count: int, measured: Measured, rows: list[Row], unit: str, on_cpu: bool) -> Row:
    rate = measured.samples / len(measured.seconds) / measured.step_seconds
    first = next((row.samples_per_s for row in rows if row.samples_per_s), rate)
    return Row(
        strategy=name,
        replicas=count,
        samples_per_s=rate,
        step_seconds=measured.step_seconds,
        ratio=rate / first,
        memory_bytes=tuple(measured.memory_bytes),
        micro_batch_size=measured.micro_batch_size,
        terms_per_s=None if unit == "samples" else measured.terms / len(measured.seconds) / measured.step_seconds,
        note="no speed-up on a CPU: dp computes its replicas one after the other" if on_cpu and name == "dp" else "",
    )


def table(rows: Sequence[Row], unit: str = "samples") -> str:
    """Return the rows as lines of text."""
    heads = ["strategy", "replicas", "samples/s", *([f"{unit}/s"] if unit != "samples" else []), "ms a step", "ratio"]
    heads += ["micro-batch", "peak memory per GPU"]
    lines = [heads]
    for row in rows:
        if row.samples_per_s is None or row.step_seconds is None:
            lines.append([row.strategy, str(row.replicas), row.note])
            continue
        cells = [row.strategy, str(row.replicas), f"{row.samples_per_s:.1f}"]
        cells += [f"{row.terms_per_s:,.0f}"] if row.terms_per_s is not None else []
        cells += [f"{1000 * row.step_seconds:.1f}", f"{row.ratio:.2f}", str(row.micro_batch_size)]
        cells += [", ".join(f"{nbytes / 2**30:.2f} GiB" for nbytes in row.memory_bytes) or "-"]
        lines.append([*cells, *([f"({row.note})"] if row.note else [])])
    full = [cells for cells in lines if len(cells) >= len(heads)]
    widths = [max(len(cells[column]) for cells in full) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, [*widths, 0], strict=False)).rstrip()
        for cells in lines
    )
