"""Help a launched function other than `train`: report its steps to `launch`, find mistakes, explain torch's errors.

watch_steps(store, rank, count)     # before the function is called
advise(error)                 # adds a note with the remedy to an error of torch.distributed
"""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path
from typing import Any

STEPS = 3
"""Optimizer steps after which a loop is checked for mistakes: by then its process group and event files exist."""
_EVENTS = "tensorboard"
_STARTS_PROCESSES = (
    "launch has started one process for each GPU already. Give launch the function that each of them calls, not one "
    "that starts processes itself (mp.spawn, notebook_launcher, torchrun)."
)
_ADVICE = {
    "Default process group has not been initialized": (
        "A launched function makes its process group itself, by torch.distributed.init_process_group() or "
        "kaggle_mgpu.distributed.init()."
    ),
    "initialize the default process group twice": (
        "A collective of kaggle_mgpu.distributed has made the group already: call init_process_group before the first "
        "such collective, or leave the call out."
    ),
}


def advise(error: BaseException) -> None:
    """Add a note with the remedy to an error that comes from the way in which the function was launched."""
    with contextlib.suppress(Exception):  # an error's own __str__ may fail
        for text in (text for text in _ADVICE if text in str(error)):
            error.add_note(_ADVICE[text])
    spawn = os.path.join("torch", "multiprocessing", "spawn.py")
    if any(frame.filename.endswith(spawn) for frame in traceback.extract_tb(error.__traceback__)):
        error.add_note(_STARTS_PROCESSES)


def watch_steps(store: Any, rank: int, count: int) -> None:
    """Report each optimizer step of this process to the launcher, and check for two mistakes.

    At step STEPS rank 0 prints a warning if there is no process group. Another rank that has written TensorBoard events
    notes this in the store for `print_mistakes`. A single rank is not checked.

    Args:
        store: torch's store that all ranks share.
        rank: this process's rank.
        count: number of ranks.
    """
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from ..parallel import distributed

    steps, groups = 0, list[Any]()

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        # keep the group alive: torch 2.13 may deadlock if a script destroys the group and then frees its DDP model.
        # gloo's destructor holds the GIL and waits for a thread, and this thread waits for the GIL
        if dist.is_initialized() and dist.group.WORLD not in groups:
            groups.append(dist.group.WORLD)
        # alive() without a step, since alive(step) would start `launch`'s default timeout. An evaluation in the
        # function gives no sign of life, and may take longer than the timeout
        distributed.alive()
        if steps != STEPS or count == 1:
            return
        if rank == 0 and not dist.is_initialized():
            print(
                f"WARNING: the {count} ranks train without a process group: {count} separate trainings of the same "
                f"model, which write over each other's files. With Lightning give Trainer(devices={count}, "
                f'strategy="ddp"), else wrap the model in DistributedDataParallel; for separate runs use launch_each.',
                flush=True,
            )
        if rank > 0 and (events := _open_event_file()) is not None:
            store.set(_EVENTS, f"rank {rank} has written TensorBoard events too, to {events.parent}")

    register_optimizer_step_post_hook(after_step)


def print_mistakes(store: Any) -> None:
    """Print the mistakes noted by the ranks. Rank 0 calls `print_mistakes` after the function has returned."""
    if store.check([_EVENTS]):
        print(f"NOTE: {store.get(_EVENTS).decode()}: make the SummaryWriter on rank 0 alone.", flush=True)


def _open_event_file() -> Path | None:
    """Return an event file of TensorBoard that this process has open."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if ".tfevents." in (target := os.readlink(link)):
                return Path(target)
    return None
