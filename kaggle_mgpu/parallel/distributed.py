"""This module gives a process its rank and the collective operations between ranks.

Every function also works in a single process, so callers need not ask for the number of processes. In a function run
by `launch` the first collective makes the process group, unless the function has made one before.

    distributed.init()                    # under torchrun, or in a launched function
    total = distributed.sum(my_count)     # the same number on every rank
    if distributed.agree(out_of_time): …  # true on every rank if true on any rank
"""

from __future__ import annotations

import builtins
import contextlib
import datetime
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import torch
import torch.distributed as dist

from ..errors import is_communication_error

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""Time limit of a collective: longer than rank 0 takes to tokenize a corpus, or to write to a slow disk."""


class _Offer(NamedTuple):
    """Hold the arguments with which `init` joins a process group."""

    store: dist.Store | None
    rank: int
    world_size: int
    timeout: datetime.timedelta


_offer: _Offer | None = None
_cpu_group: tuple[Any, Any] = None, None  # a default group without a CPU backend, and the gloo group for CPU tensors


def joined() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def active() -> bool:
    """Return whether this process has joined a process group, or will join one at its first collective."""
    return joined() or _offer is not None


def rank() -> int:
    """Return this process's number, 0 … world_size - 1, over all machines."""
    return dist.get_rank() if joined() else _offer.rank if _offer else 0


def world_size() -> int:
    """Return the number of processes over all machines."""
    return dist.get_world_size() if joined() else _offer.world_size if _offer else 1


def local_rank() -> int:
    """Return this process's number on this machine, also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if active() else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if active() else 1


def is_main() -> bool:
    """Return whether this process is rank 0, which writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return this rank's GPU, or the CPU without GPUs."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def under_torchrun() -> bool:
    """Return whether torchrun, or a scheduler that sets the same variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def offer(store: dist.Store | None = None, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Keep the arguments for `init`, and select this rank's GPU. The first collective calls `init` if nobody has.

    The environment variables RANK and WORLD_SIZE must be set. A launched function may call
    `torch.distributed.init_process_group` before the first collective; this module then uses the function's group.

    Args:
        store: where the ranks meet. None: at the address in torchrun's variables.
        timeout: a longer collective is an error.
    """
    global _offer
    _offer = _Offer(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def init(timeout: datetime.timedelta = TIMEOUT) -> None:
    """Join the process group described by `offer`, or torchrun's; a second call does nothing.

    CPU tensors go over gloo and GPU tensors over NCCL in the same group, so counts and decisions never wait for the
    GPU. A collective that takes longer than the timeout raises an error. The argument `timeout` counts only if `offer`
    has not been called with another.
    """
    if joined():
        return
    if _offer is None:
        if not under_torchrun():
            return
        offer(timeout=timeout)
    assert _offer is not None
    store, rank, world_size, timeout = _offer
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # an interrupt is held back until the group is complete: ranks that have joined would wait for this one
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _group(tensor: torch.Tensor | None = None) -> Any:
    """Return the group for a tensor, or for objects and numbers on the CPU; None is the default group."""
    global _cpu_group
    init()
    default = dist.group.WORLD
    if (tensor is not None and tensor.is_cuda) or "cpu:" in str(dist.get_backend_config()):
        return None
    # the default group has NCCL only: a script has made it
    if _cpu_group[0] is not default:
        _cpu_group = default, dist.new_group(backend="gloo")
    return _cpu_group[1]


def shutdown() -> None:
    """Leave the process group."""
    global _offer
    _offer = None
    if joined():
        dist.destroy_process_group()


_pulse: Any = None


def set_pulse(pulse: Any) -> None:
    """Set the memory shared with the launcher; called by the launcher's worker.

    Args:
        pulse: four int64: step, signs of life since the step, time of the last sign (monotonic_ns), 1 while saving.
    """
    global _pulse
    _pulse = pulse


def alive(step: int | None = None) -> None:
    """Tell the launcher that this rank makes progress; takes half a microsecond, without communication.

    `train` and the collectives of this module call `alive`. Call it in your own loops too, so that the launcher can
    tell a hang from slow work and name the rank that is behind.

    Args:
        step: the number of the optimizer step just taken; None for a sign of life between two steps.
    """
    if _pulse is None:
        return
    if step is None:
        _pulse[1] += 1
    else:
        _pulse[0], _pulse[1] = step, 0
    _pulse[2] = time.monotonic_ns()


def saving(now: bool) -> None:
    """Tell the launcher whether this rank is writing a checkpoint; after a failure the launcher waits for the write."""
    if _pulse is not None:
        _pulse[3] = now


@overload
def sum(value: int) -> int: ...
@overload
def sum(value: float) -> float: ...
@overload
def sum(value: torch.Tensor) -> torch.Tensor: ...
def sum(value: Any) -> Any:
    """Return the sum over all ranks: an int for an int, a float for a float, a new tensor for a tensor."""
    return sum_later(value)()


def sum_later(value: T) -> Callable[[], T]:
    """Start a sum over all ranks and return a function; the function waits for the sum and returns the sum.

    Communication then overlaps with other work: the number of loss terms of a step is summed over the ranks during
    this step's first forward pass.
    """
    total: Any = value.detach().clone() if isinstance(value, torch.Tensor) else value
    if not active():
        return lambda: total
    alive()
    if not isinstance(value, torch.Tensor):
        total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    work = dist.all_reduce(total, group=_group(total), async_op=True)
    done: list[Any] = []

    def wait() -> Any:
        if not done:
            work.wait()
            done.append(total if isinstance(value, torch.Tensor) else total.item())
        return done[0]

    return wait


class Count:
    """A Count is this rank's part of a whole number; calling a Count returns the sum over all ranks.

    A Count is summed by a separate collective, or together with the gradients of the step before the counted step: see
    `Distributed` in data_parallel.py.
    """

    def __init__(self, own: int) -> None:
        self.own = own
        self.total: Callable[[], int] | None = None

    def start(self) -> None:
        """Start the collective. All ranks must call `start`, or none."""
        self.total = sum_later(self.own)

    def __call__(self) -> int:
        if self.total is None:
            self.start()
        assert self.total is not None
        return self.total()


def agree(flag: bool) -> bool:
    """Return True on every rank if `flag` is true on any rank."""
    return sum(int(flag)) > 0


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank (pickled: for small plain objects)."""
    if not active():
        return value
    alive()
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group(), device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Return the values of all ranks on every rank, in the order of ranks (pickled: for small plain objects)."""
    if not active():
        return [value]
    alive()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


# The kind of batch that this rank computes at the moment; "" outside `train`
_batch: Literal["", "step", "stand-in", "alone"] = ""


@contextlib.contextmanager
def computing(batch: Literal["step", "stand-in", "alone"]) -> Iterator[None]:
    """Set the kind of the batches computed in a `with` block.

    "step": this rank's part of a training step. "stand-in": a batch that does not count, computed only because other
    ranks wait. "alone": a batch for which other ranks compute nothing.
    """
    global _batch
    before, _batch = _batch, batch
    try:
        yield
    finally:
        _batch = before


def in_step() -> bool:
    """Return whether all ranks compute their parts of one training step at the moment."""
    return active() and _batch in ("step", "stand-in")


def stands_in() -> bool:
    """Return whether this rank's batch does not count: it is computed only because other ranks wait."""
    return _batch == "stand-in"


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all ranks, all of the same shape and type, on every rank; without gradients."""
    if not active():
        return [tensor.detach()]
    alive()
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own, group=_group(own))
    return parts


def gather_with_gradients(tensor: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """Return the rows of all ranks in order, and the slice of this rank's rows; gradients flow back to all ranks.

    For a loss over the whole batch, such as a contrastive loss: each rank compares its own rows with the rows of all
    ranks, and sums the losses of its own rows.

        every, own = distributed.gather_with_gradients(model(x))  # float[all samples, features]
        loss = cross_entropy(every[own] @ every.T, torch.arange(own.start, own.stop), reduction="sum")

    `tensor` is float[rows, …]; ranks may have different numbers of rows. In a single process, and in `train`'s
    evaluation, where ranks have different numbers of batches, only this rank's rows are returned.
    """
    if not active() or _batch == "alone":
        return tensor, slice(0, len(tensor))
    rows = [int(n) for n in all_gather(torch.tensor([0 if stands_in() else len(tensor)]))]
    start = builtins.sum(rows[: rank()])
    every: torch.Tensor = _GatherRows.apply(tensor, rows)
    if stands_in():  # these rows go to no other rank, but this rank's loss, of weight 0, needs rows of its own
        every = torch.cat([every[:start], tensor, every[start:]])
    return every, slice(start, start + len(tensor))


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks; the gradient of a row is the sum of its gradients on all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows, ctx.shape = rows, tensor.shape
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: rows[rank()]] = tensor[: rows[rank()]]
        return torch.cat([part[:n] for part, n in zip(all_gather(padded), rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # added up in the order of ranks, so that a resumed run has the same bits
        total = torch.stack(all_gather(gradient)).sum(0)
        start, count = builtins.sum(ctx.rows[: rank()]), ctx.rows[rank()]
        own = total.new_zeros(ctx.shape)
        own[:count] = total[start : start + count]
        return own, None


def gather_to_main(value: T) -> list[T]:
    """Return the values of all ranks on rank 0, and [] on other ranks (pickled)."""
    if not active():
        return [value]
    alive()
    values: list[Any] = [None] * world_size()
    dist.gather_object(value, values if is_main() else None, dst=0, group=_group())
    return values if is_main() else []


@dataclass(frozen=True)
class Gather:
    """A Gather as a value in Task.metrics' result makes Task.summary get the rows of all samples.

    Args:
        tensor: float[samples of the batch, …], one row per sample.

    Raises:
        TypeError: not a tensor, or a tensor without dimensions.
    """

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, torch.Tensor) or self.tensor.ndim == 0:
            got = "a scalar" if isinstance(self.tensor, torch.Tensor) else f"a {type(self.tensor).__name__}"
            raise TypeError(f"distributed.Gather expects a tensor with a row per sample, float[samples, …], not {got}")


def barrier() -> None:
    """Wait until every rank has called `barrier`."""
    sum(0)


def from_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result, or raise its exception, on every rank."""
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
        raise cast(Exception, failure or theirs)  # on rank 0 the original error with its traceback
    return cast(T, value)


def _sendable(error: Exception | None) -> Exception | None:
    """Return the error, or a RuntimeError with its text if the error cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def lost_a_rank(error: BaseException) -> bool:
    """Return whether an error means that another rank has ended, by the text of the error."""
    return active() and is_communication_error(error)


class RankVote:
    """A RankVote combines flags, raised by each rank's own clock and signals, into the same decision on all ranks.

    A collective in every step would cost a small model more than a tenth of its time. The ranks therefore vote about
    every `seconds` seconds, and each vote sets the number of steps until the next vote. A vote runs during the
    following step, and the next call of `vote` returns the answer. In two cases the call that starts the vote waits for
    the answer itself: after `vote_next`, and if steps are so slow that each has a vote. A single process decides alone.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self.steps = self.voted = 0
        self.next, self.at_once = 1.0, True
        self.interval = 1
        self.since = time.monotonic()
        self.pending: tuple[Any, torch.Tensor] | None = None
        """The collective of a vote whose answer is due at the next step, and its tensor."""

    @property
    def most_steps(self) -> int:
        """The largest number of steps until all ranks know a flag: `interval` to a vote, and one to its answer."""
        return self.interval + 1 if active() else 1

    def vote_next(self, wanted: bool = True) -> None:
        """If `wanted`, make the next call of `vote` start a vote and wait for its answer.

        All ranks must call `vote_next` after the same step with the same `wanted`.
        """
        if wanted:
            self.next, self.at_once = self.steps + 1, True

    def vote(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank raised the flag; all False in steps without the answer of a vote.

        All ranks must call `vote` once per step.
        """
        if not active():
            return list(flags)
        self.steps += 1
        answer = [False] * len(flags) if self.pending is None else self._answer()
        if self.steps >= self.next:
            alive()
            now = time.monotonic()
            pace = (now - self.since) / (self.steps - self.voted)  # `vote_next` may have cut the interval short
            votes = torch.tensor([*(float(flag) for flag in flags), pace], dtype=torch.float64)
            self.pending = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_group(), async_op=True), votes
            self.voted, self.since = self.steps, now
            at_once, self.next, self.at_once = self.at_once or self.interval == 1, math.inf, False
            if at_once:
                answer = [before or raised for before, raised in zip(answer, self._answer(), strict=True)]
        return answer

    def _answer(self) -> list[bool]:
        """Wait for the pending vote, set the step of the next vote, and return whether each flag was raised."""
        assert self.pending is not None
        work, votes = self.pending
        work.wait()
        self.pending = None
        *raised, slowest = votes.tolist()
        # at most doubled, so that one quick step after a slow start does not delay the next vote for long
        self.interval = builtins.max(
            1, builtins.min(int(self.seconds / builtins.max(slowest, 1e-6)), 2 * self.interval)
        )
        self.next = builtins.min(self.next, self.voted + self.interval)
        return [value > 0 for value in raised]


def returns_rank0(function: Callable[..., T]) -> Callable[..., T]:
    """Mark a function with the same result on all ranks: `launch` then returns rank 0's result, not a list."""
    function.returns_rank0 = True  # type: ignore[attr-defined]
    return function
