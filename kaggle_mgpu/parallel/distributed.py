"""Who am I among the processes of this run, and the few things that they do together.

Everything here works in a single process too: a world of one. So neither the loop nor a task asks how many there are.

    distributed.init()                    # under torchrun, or with the store that the launcher made
    total = distributed.sum(my_count)     # the same number on every rank
    if distributed.agree(out_of_time): …  # true everywhere as soon as it is true anywhere
"""

from __future__ import annotations

import builtins
import datetime
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import torch
import torch.distributed as dist

T = TypeVar("T")

# Longer than any one rank may keep the others waiting: rank 0 tokenising a corpus, writing a checkpoint to a slow disk.
TIMEOUT = datetime.timedelta(minutes=30)


def active() -> bool:
    """Whether a process group of more than this process is there."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """0 … world_size - 1, over all machines."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Number of processes, over all machines."""
    return dist.get_world_size() if active() else 1


def local_rank() -> int:
    """0 … local_world_size - 1 on this machine; the index of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if active() else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if active() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and speaks."""
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def under_torchrun() -> bool:
    """Whether torchrun (or a scheduler that sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def init(
    store: dist.Store | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: datetime.timedelta = TIMEOUT,
) -> None:
    """Join the process group: through `store`, or through the variables that torchrun sets. Twice does nothing.

    CPU tensors go over gloo and GPU tensors over NCCL in the same group, so that a count or a decision never has to
    wait for the GPU. A collective that lasts longer than `timeout` is an error.
    """
    if active() or (store is None and not under_torchrun()):
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        assert rank is not None and world_size is not None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def shutdown() -> None:
    """Leave the process group."""
    if active():
        dist.destroy_process_group()


# Where this rank writes for the launcher to see: step, signs of life since, when (time.monotonic_ns), saving or not
_pulse: Any = None


def set_pulse(pulse: Any) -> None:
    """Four int64 that the launcher reads; set by the launcher's worker."""
    global _pulse
    _pulse = pulse


def alive(step: int | None = None) -> None:
    """Tell the launcher that this rank gets on, and at which step it is: half a microsecond, no communication.

    `train` and the functions of this room say it; say it in loops of your own, so that a hang is told from hard work
    and the launcher can name the rank that is behind.
    """
    if _pulse is None:
        return
    if step is None:
        _pulse[1] += 1
    else:
        _pulse[0], _pulse[1] = step, 0
    _pulse[2] = time.monotonic_ns()


def saving(now: bool) -> None:
    """Tell the launcher whether this process writes a checkpoint: another rank's failure lets it end that first."""
    if _pulse is not None:
        _pulse[3] = now


@overload
def sum(value: int) -> int: ...
@overload
def sum(value: float) -> float: ...
@overload
def sum(value: torch.Tensor) -> torch.Tensor: ...
def sum(value: Any) -> Any:
    """The sum over all ranks: an int for an int, a float for a float, a new tensor for a tensor."""
    return sum_later(value)()


def sum_later(value: T) -> Callable[[], T]:
    """Start summing over all ranks; calling what this returns waits for the sum and returns it.

    Between the two there is room for work: the count of a step's terms travels while its first forward pass runs.
    """
    total: Any = value.detach().clone() if isinstance(value, torch.Tensor) else value
    if not active():
        return lambda: total
    alive()
    if not isinstance(value, torch.Tensor):
        total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    work = dist.all_reduce(total, async_op=True)
    done: list[Any] = []

    def wait() -> Any:
        if not done:
            work.wait()
            done.append(total if isinstance(value, torch.Tensor) else total.item())
        return done[0]

    return wait


def agree(flag: bool) -> bool:
    """True on every rank as soon as it is true on any."""
    return sum(int(flag)) > 0


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank (pickled: for small plain objects)."""
    if not active():
        return value
    alive()
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, in the order of ranks (pickled: for small plain objects)."""
    if not active():
        return [value]
    alive()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    sum(0)


def from_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; what it raises there is raised everywhere, so nobody waits on."""
    if not active():
        return action()
    value: T | None = None
    failure: Exception | None = None
    if is_main():
        try:
            value = action()
        except Exception as error:
            failure = error
    value, theirs = broadcast((value, _sendable(failure)))
    if failure is not None or theirs is not None:
        raise cast(Exception, failure or theirs)  # rank 0 its own, which still knows where it was raised
    return cast(T, value)


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or its text where it cannot be pickled: one of a class from a notebook's cell, say."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def lost_a_rank(error: BaseException) -> bool:
    """Return whether an error means that another rank has ended, by the text of the error."""
    words = ("gloo", "nccl", "connection closed", "connection was closed", "connection reset", "broken pipe")
    return active() and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


class RankVote:
    """Decisions that depend on each rank's own clock and signals, made alike on every rank.

    A collective on every step would cost a small model more than a tenth of its time, so the ranks vote about every
    `seconds`, and also agree on the number of steps until the next vote. A world of one decides at once.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self.steps = 0
        self.next = 1
        self.interval = 1
        self.since = time.monotonic()

    def vote(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank raised it; all are false on the steps between two votes."""
        if not active():
            return list(flags)
        self.steps += 1
        if self.steps < self.next:
            return [False] * len(flags)
        alive()
        now = time.monotonic()
        pace = (now - self.since) / self.interval
        answers = torch.tensor([*(float(flag) for flag in flags), pace], dtype=torch.float64)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        *raised, slowest = answers.tolist()
        # at most doubled each time, so that one quick step after a slow start does not silence the ranks for long
        self.interval = builtins.max(
            1, builtins.min(int(self.seconds / builtins.max(slowest, 1e-6)), 2 * self.interval)
        )
        self.next = self.steps + self.interval
        self.since = now
        return [value > 0 for value in raised]


def returns_rank0(function: Callable[..., T]) -> Callable[..., T]:
    """Mark a function whose result is one and the same for the whole run: `launch` then returns rank 0's alone."""
    function.returns_rank0 = True  # type: ignore[attr-defined]
    return function
