"""This module selects the strategy of a run."""

from __future__ import annotations

from typing import Literal

from . import data_parallel
from .strategy import Strategy


def choose_strategy(
    wanted: Literal["auto", "single", "dp", "ddp", "fsdp", "deepspeed"],
    *,
    num_gpus: int,
    num_replicas: int,
    world_size: int,
) -> tuple[type[Strategy], str]:
    """Return the strategy's class and the reason for the choice.

    Args:
        wanted: the strategy's name; auto is ddp in several processes, else single.
        num_gpus: GPUs of this machine; without a GPU, dp's replicas share the CPU.
        num_replicas: copies of the model that dp makes in this process.
        world_size: number of processes.

    Raises:
        ValueError: the strategy cannot run with this many processes or GPUs.
    """
    if wanted == "auto":
        if world_size > 1:
            return data_parallel.Distributed, f"{world_size} processes"
        return Strategy, "one process"
    if wanted in ("single", "dp") and world_size > 1:
        raise ValueError(
            f"strategy {wanted!r} runs in one process, but there are {world_size}. Use strategy='ddp', or start one "
            f"process."
        )
    if wanted == "dp" and num_gpus and num_replicas > num_gpus:
        raise ValueError(f"strategy 'dp' with nproc={num_replicas}: this machine has {num_gpus} GPUs")
    if wanted not in ("single", "dp") and world_size == 1:
        return Strategy, f"with one process, {wanted} is the same as single"
    if wanted == "fsdp":
        from .fsdp import Sharded  # here, since torch.distributed.fsdp takes two seconds to import

        return Sharded, "asked for"
    if wanted == "deepspeed":
        from .zero import ZeRO

        return ZeRO, "asked for"
    plain = {"single": Strategy, "dp": data_parallel.Replicated, "ddp": data_parallel.Distributed}
    return plain[wanted], "asked for"
