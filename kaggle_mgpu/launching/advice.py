"""Watch a launched loop that is not the kit's: signs of life, two usual mistakes, advice on torch's errors.

watch(store, rank, count)     # from the first optimizer step on
advise(error)                 # adds the next step to an error of torch.distributed
"""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path
from typing import Any

STEPS = 3
"""Optimizer steps after which a loop's process group and log files must be there."""
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
        "A collective of kaggle_mgpu.distributed has made the group already: call init_process_group before, or not."
    ),
}


def advise(error: BaseException) -> None:
    """Add a note with the next step to an error whose cause is how the function was launched."""
    with contextlib.suppress(Exception):  # an error's own __str__ may fail
        for text in (text for text in _ADVICE if text in str(error)):
            error.add_note(_ADVICE[text])
    spawn = os.path.join("torch", "multiprocessing", "spawn.py")
    if any(frame.filename.endswith(spawn) for frame in traceback.extract_tb(error.__traceback__)):
        error.add_note(_STARTS_PROCESSES)


def watch(store: Any, rank: int, count: int) -> None:
    """Tell the launcher of each optimizer step of this process, and note the mistakes that `tell` prints."""
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from ..parallel import distributed

    steps, groups = 0, list[Any]()

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        # gloo's destructor, in a script that frees its DDP model after destroy_process_group, waits for a thread which
        # waits for the interpreter's lock to free the context that backward gave it (torch 2.13): so nothing frees it
        if dist.is_initialized() and dist.group.WORLD not in groups:
            groups.append(dist.group.WORLD)
        # without the step, which would start the default time limit: an evaluation of one's own may be silent for long
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


def tell(store: Any) -> None:
    """Print what the ranks have noted. Only rank 0 calls this, at the end."""
    if store.check([_EVENTS]):
        print(f"NOTE: {store.get(_EVENTS).decode()}: make the SummaryWriter on rank 0 alone.", flush=True)


def _open_event_file() -> Path | None:
    """Return an event file of TensorBoard that this process has open."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if ".tfevents." in (target := os.readlink(link)):
                return Path(target)
    return None
