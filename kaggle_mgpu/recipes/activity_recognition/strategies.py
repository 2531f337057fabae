"""Take the same training steps under each strategy, and compare speed, memory and results."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.data import BatchPlan
from kaggle_mgpu.launching import launch
from kaggle_mgpu.machine import devices
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.training import Result, Task, train

from .settings import Config


@distributed.returns_rank0
def _measured(config: TrainConfig, task: Task) -> tuple[Result, list[int]]:
    """Train, and return the result with the peak memory of torch on each GPU (bytes; [] without a GPU)."""
    if torch.cuda.is_initialized():  # without worker processes, earlier work in this process may have left a peak
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    result = train(config, task)
    used = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    return result, [nbytes for rank in distributed.gather(used) for nbytes in rank if nbytes]


def side_by_side(config: Config, task: Task, steps: int = 60) -> list[dict[str, Any]]:
    """Take the same `steps` training steps with strategy single and, for several replicas, with dp and ddp.

    The number of replicas is nproc; "auto" means one for each GPU, or two on a CPU.

    Returns:
        One row per strategy: strategy, replicas, samples_per_s (the median over the log's records but the first),
        memory (peak bytes of the fullest GPU; None without one), and the final validation loss and accuracy. Loss and
        accuracy should be the same in all rows: to 1e-6 in fp32, to rounding in half precision.
    """
    gpus = len(devices.select(config.gpu_ids))
    replicas = (gpus or 2) if config.nproc == "auto" else int(config.nproc)
    # fix the global batch: from micro_batch_size alone, single would get a smaller global batch than dp and ddp
    batch = BatchPlan.make(
        dataset_size=1,
        num_replicas=replicas,
        global_batch_size=config.global_batch_size,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    ).global_batch_size
    config = config.replace(global_batch_size=batch, gradient_accumulation_steps=None)
    rows = []
    for strategy in ("single", "dp", "ddp") if replicas > 1 else ("single",):
        folder = Path(config.output_dir) / "compare" / strategy
        shutil.rmtree(folder, ignore_errors=True)
        changes: dict[str, Any] = {"strategy": strategy, "nproc": 1 if strategy == "single" else replicas}
        changes |= {
            "max_steps": steps,
            "log_every": max(1, steps // 6),
            "eval_every": "end",
            "resume": "never",
            "tensorboard": False,
        }
        result, memory = launch(_measured, config.replace(**changes, output_dir=str(folder)), task)
        paces = [r["samples_per_s"] for r in result.records() if r["kind"] == "train"]
        rows.append(
            {
                "strategy": strategy,
                "replicas": changes["nproc"],
                "samples_per_s": statistics.median(paces[1:] or paces),
                "memory": max(memory, default=None),
                "loss": result.metrics.get("loss"),
                "accuracy": result.metrics.get("accuracy"),
            }
        )
    return rows


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `side_by_side` as a table."""
    lines = ["strategy  replicas  windows/s  ratio  memory per GPU  validation loss  accuracy"]
    for row in rows:
        memory = "no GPU" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
        ratio = row["samples_per_s"] / rows[0]["samples_per_s"]
        loss, accuracy = ("-" if row[name] is None else f"{row[name]:.6f}" for name in ("loss", "accuracy"))
        lines.append(
            f"{row['strategy']:8}  {row['replicas']:8}  {row['samples_per_s']:9,.0f}  {ratio:5.2f}  {memory:>14}  "
            f"{loss:>15}  {accuracy:>8}"
        )
    return "\n".join(lines)
