"""What a second GPU buys, measured on this machine with this task, not promised.

    rows = compare_strategies(config, task, steps=20)   # prints a table: single, dp, ddp; returns its rows

Each strategy takes the same real steps on the same global batch with the same micro-batch per GPU, in workers of its
own: no checkpoint, evaluation or log is written, and nothing stays in this process. `measure` does one of them, and
`plan` begins with it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import devices
from .config import TrainConfig
from .launch import launch
from .task import Task, expect

WARM_UP = 3
"""Steps before the clock starts: imports, autotuning, DistributedDataParallel's new bucket order after its first."""


@dataclass(frozen=True)
class Row:
    """What one strategy came to; figures are None where it could not run, and `note` says why."""

    strategy: str
    replicas: int
    """Replicas of the model: GPUs, or on a CPU processes (ddp) or stand-ins in one process (dp)."""
    samples_per_s: float | None = None
    step_seconds: float | None = None
    ratio: float | None = None
    """Throughput against the first row that has one."""
    memory_bytes: tuple[int, ...] = ()
    """Peak of torch's allocator on each GPU; () on a CPU."""
    micro_batch_size: int | None = None
    terms_per_s: float | None = None
    """In the task's unit, where that is not samples."""
    note: str = ""


@dataclass
class Measured:
    """Some steps of one rank."""

    seconds: list[float]
    samples: int
    terms: int
    memory_bytes: list[int] = field(default_factory=list)
    micro_batch_size: int = 0
    gradient_accumulation_steps: int = 0
    num_replicas: int = 0
    val_samples: int = 0
    sentence: str = ""
    header: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The middle one: a busy machine's outliers do not count."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def compare_strategies(
    config: TrainConfig,
    task: Task,
    steps: int = 20,
    nproc: int | None = None,
    strategies: Sequence[str] = ("single", "dp", "ddp"),
) -> list[Row]:
    """Take `steps` training steps under each strategy, print throughput, memory per GPU and the ratio; the rows.

    Args:
        nproc: replicas for dp and ddp. Default: one per GPU; two where there is none.
        strategies: which, in the order of the rows; ratios are to the first.

    Raises:
        TypeError: not a TrainConfig and a Task.
        ValueError: fewer than one step, or more replicas than there are GPUs.
    """
    expect(config, task, "compare_strategies")
    for name, number in {"steps": steps, "nproc": 1 if nproc is None else nproc}.items():
        if number < 1:
            raise ValueError(f"{name}: expected 1 or more, got {number}")
    gpus = devices.select(config.gpu_ids)
    replicas = nproc or len(gpus) or 2
    if gpus and replicas > len(gpus):
        raise ValueError(f"nproc={replicas}: expected at most {len(gpus)}, the GPUs there are")
    shared = same_micro_batch(config, replicas)
    rows: list[Row] = []
    for name in strategies:
        count = 1 if name == "single" else replicas
        if name != "single" and replicas == 1:
            rows.append(Row(name, count, note="needs a second GPU"))
            continue
        try:
            got = measure(shared.replace(strategy=name, nproc=count), task, steps)
        except Exception as error:
            if not out_of_memory(error):
                raise
            rows.append(Row(name, count, note="out of memory"))
            continue
        rows.append(_row(name, count, got, rows, task.unit, not gpus))
    print(table(rows, task.unit), flush=True)
    return rows


def same_micro_batch(config: TrainConfig, replicas: int) -> TrainConfig:
    """The config with the micro-batch that so many replicas have, whatever their number: the rest is accumulated."""
    from .data import BatchPlan

    if config.micro_batch_size == "auto":
        return config.replace(gradient_accumulation_steps=None)
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
    """Take `steps` steps as `train` takes them, after a few that do not count. Rank 0's times; every GPU's memory."""
    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-measure-") as folder:
        quiet = config.replace(output_dir=folder, resume="never", max_restarts=0)
        every: list[Measured] = launch(_steps, quiet, task, steps, in_worker=True)
    first = every[0]
    first.memory_bytes = [nbytes for rank in every for nbytes in rank.memory_bytes]
    return first


def _steps(config: TrainConfig, task: Task, steps: int) -> Measured:
    """The loop of `train` with a clock in it, and nothing that is written."""
    import torch

    from . import data, distributed, optim
    from .run import Run

    on_gpu = torch.cuda.is_available()
    mine = [distributed.device()] if on_gpu else []
    if on_gpu and config.strategy == "dp":
        mine = [torch.device("cuda", index) for index in range(int(config.nproc))]  # one process, all of them
    for device in mine:
        torch.cuda.reset_peak_memory_stats(device)
    run = Run(config, task)
    run.fit_micro_batch()
    batches, how = run.batches(), run.strategy
    seconds, samples, terms = [], 0, 0
    for number in range(WARM_UP + steps):
        distributed.alive(number)
        began = time.perf_counter()
        step = next(batches)
        how.begin_step()
        for i, batch in enumerate(step.micro_batches):
            with how.micro_step(sync=i == len(step.micro_batches) - 1):
                how.backward(batch, step.weights[i], step.terms)
        optim.set_lr(run.optimizer, 0.0)  # the gradient is all that is asked for: nothing diverges
        how.step(run.optimizer, max_norm=config.max_norm)
        for device in mine:
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
            samples += step.samples
            terms += step.terms()
    val = 0 if run.val_fetch is None else data.size_of(run.val_fetch.dataset, "val_data()")
    return Measured(
        seconds=seconds,
        samples=samples,
        terms=terms,
        memory_bytes=[torch.cuda.max_memory_allocated(device) for device in mine],
        micro_batch_size=run.plan.micro_batch_size,
        gradient_accumulation_steps=run.plan.gradient_accumulation_steps,
        num_replicas=run.plan.num_replicas,
        val_samples=val,
        sentence=run.plan.sentence(run.unit),
        header=run.header,
    )


def _row(name: str, count: int, got: Measured, rows: list[Row], unit: str, on_cpu: bool) -> Row:
    rate = got.samples / len(got.seconds) / got.step_seconds
    first = next((row.samples_per_s for row in rows if row.samples_per_s), rate)
    return Row(
        strategy=name,
        replicas=count,
        samples_per_s=rate,
        step_seconds=got.step_seconds,
        ratio=rate / first,
        memory_bytes=tuple(got.memory_bytes),
        micro_batch_size=got.micro_batch_size,
        terms_per_s=None if unit == "samples" else got.terms / len(got.seconds) / got.step_seconds,
        note="a stand-in: replicas in one process, one after the other" if on_cpu and name == "dp" else "",
    )


def table(rows: Sequence[Row], unit: str = "samples") -> str:
    """The rows as text, one line each."""
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


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries, for JSON."""
    return [dataclasses.asdict(row) for row in rows]


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had no room for what was measured."""
    from . import memory

    return memory.out_of_memory(error)
