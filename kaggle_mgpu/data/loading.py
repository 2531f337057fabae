"""This module assigns samples to steps and ranks, and loads their batches.

The order of samples depends on (seed, epoch) alone. A step takes the next `global_batch_size` samples in this order;
each rank takes its share of the slice and cuts it into micro-batches. One GPU and four GPUs therefore see the same
samples at the same step, and `samples_seen` alone gives the position in the data. Random augmentation of a sample
depends on (seed, epoch, sample), not on the process that fetches the sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import tempfile
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from ..parallel import distributed
from . import randomness
from .batch_plan import BatchPlan


class Order:
    """An Order is a pseudo-random permutation of range(size), computed only at the requested positions.

    A Feistel network is a bijection of 2^k numbers for any round function; repeating the network until the number is
    below size makes a bijection of range(size) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The
    order does not depend on any library's random generator.
    """

    ROUNDS = 8

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        # at least 8 bits, since shorter halves would allow only few permutations of tiny datasets
        self.half_bits = max(4, math.ceil((size - 1).bit_length() / 2))
        self.mask = np.uint64((1 << self.half_bits) - 1)
        state = _mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(epoch)
        self.keys = _mix(state + np.arange(1, self.ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        # tiny datasets need many repetitions: a table of all 256 numbers is 15 times as fast
        self.table: np.ndarray | None = None
        if self.half_bits == 4:
            self.table = self._permute(np.arange(256, dtype=np.uint64))

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the samples at these positions, as int64[number of positions]."""
        values = self._permute(np.arange(*positions.indices(self.size)).astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        if self.table is not None:
            return self.table[values]
        bits = np.uint64(self.half_bits)
        left, right = values >> bits, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & self.mask)
        return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash each value with splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Share(NamedTuple):  # made every step; a frozen dataclass takes five times as long
    """A Share is one rank's part of one global batch: the sample indices of each micro-batch."""

    micro_batches: list[np.ndarray]
    real: list[bool]
    """False for a stand-in: a rank without samples for a micro-step computes the batch's first sample with weight 0,
    since all ranks must take part in every gradient all-reduce."""
    samples: int
    """Samples in the global batch, over all ranks."""
    epoch: int = 0


class Sampler:
    """A Sampler yields this rank's Share of each global batch, endlessly, from `samples_seen` on.

    If samples have lengths, samples of similar length within a global batch share a micro-batch, longest first, and
    all ranks get similar lengths. This saves padding; the global batch is unchanged.

    `rank` and `world_size` are by default those of this process.
    """

    def __init__(
        self,
        plan: BatchPlan,
        *,
        seed: int,
        samples_seen: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.plan, self.seed, self.samples_seen = plan, seed, samples_seen
        self.lengths: np.ndarray | None = None
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.micro = plan.per_process(self.world_size)

    # Number of positions per evaluation of the permutation, to spread NumPy's call overhead.
    BLOCK = 1 << 15

    def __iter__(self) -> Iterator[Share]:
        size, batch = self.plan.dataset_size, self.plan.global_batch_size
        epoch, position = divmod(self.samples_seen, size)
        while True:
            order = Order(size, self.seed, epoch)
            while position < size:
                block = order[position : position + max(self.BLOCK // batch, 1) * batch]
                for start in range(0, len(block), batch):
                    yield self._share(block[start : start + batch], epoch)
                position += len(block)
            epoch, position = epoch + 1, 0

    def _share(self, indices: np.ndarray, epoch: int) -> Share:
        count, ranks = len(indices), self.world_size
        if self.lengths is None:
            mine = indices[count * self.rank // ranks : count * (self.rank + 1) // ranks]
        else:
            mine = indices[np.argsort(-self.lengths[indices], kind="stable")][self.rank :: ranks]
        micro_steps = math.ceil(math.ceil(count / ranks) / self.micro)
        parts = [mine[i * self.micro : (i + 1) * self.micro] for i in range(micro_steps)]
        real = [len(part) > 0 for part in parts]
        return Share([part if len(part) else indices[:1] for part in parts], real, count, epoch)


@dataclass
class Step:
    """A Step holds one rank's micro-batches for one optimizer step."""

    micro_batches: list[Any]
    weights: list[float]
    """1.0, or 0.0 for a stand-in micro-batch (see `Share.real`)."""
    samples: int
    """Samples in the global batch, over all ranks."""
    terms: Callable[[], int]
    """Returns the number of loss terms in the global batch, after waiting for the counts of all ranks."""
    own_terms: int = 0
    """Number of loss terms in this rank's micro-batches."""
    next_terms: distributed.Count | None = None
    """Number of loss terms in the next step, if this step's gradient all-reduce also sums that number; else None."""
    load_ahead: Callable[[], None] | None = None
    """Loads the batches after those loaded so far; for a time when this process would only wait for other ranks."""


def size_of(dataset: Dataset[Any], what: str) -> int:
    """Return len(dataset); raise TypeError, naming the dataset as `what`, if length or indexing is missing."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{what} is a stream, {type(dataset).__name__}: expected a map-style dataset (__len__ and __getitem__). "
            f"Exact resume needs samples that can be asked for by number. Index the shards once (file and position of "
            f"each sample) and read sample i in __getitem__; or launch a loop of your own over the stream."
        )
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        lacks, next_step = "has no length or no __getitem__", ""
        if isinstance(dataset, DataLoader):
            lacks = "is a loader"
            next_step = " Return the loader's dataset; its collate_fn becomes Task.collate."
        raise TypeError(
            f"{what} {lacks}: expected a map-style dataset (__len__ and __getitem__), got "
            f"{type(dataset).__name__}. Exact resume needs samples that can be asked for by number.{next_step}"
        )
    return len(dataset)


class Fetch(Dataset[Any]):
    """Fetch makes a batch from sample indices, by the dataset's own `batch(indices)` or by collating items.

    The global random generators are seeded before each sample, and before a custom collate with a seed that depends on
    the batch's first sample. If a dataset makes several samples at a time (`batch`, `__getitems__`), the generators are
    seeded once, for the first of these samples; random values then depend on the split into micro-batches.

    A dataset may have `sample_lengths`, the length of each sample as a number; `Sampler` says how lengths are used.

    Args:
        seed: the run's seed.
        purpose: a name that gives training and evaluation different random numbers.

    Raises:
        ValueError: `sample_lengths` does not have one number for each sample.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] = default_collate,
        *,
        seed: int = 0,
        purpose: str = "sample",
    ) -> None:
        self.dataset, self.collate = dataset, collate
        lengths = getattr(dataset, "sample_lengths", None)
        self.lengths = None if lengths is None else np.asarray(lengths)
        if self.lengths is not None and self.lengths.shape != (len(cast(Any, dataset)),):
            raise ValueError(
                f"sample_lengths: expected a number for each of the {len(cast(Any, dataset))} samples, got an array of "
                f"shape {self.lengths.shape}"
            )
        self.keys = randomness.key(seed, purpose), randomness.key(seed, f"{purpose}, collate")
        self.get_batch: Callable[[torch.Tensor], Any] | None = getattr(dataset, "batch", None)
        self.draws = True  # whether the dataset may draw random numbers
        if self.get_batch is None and type(dataset) is TensorDataset and collate is default_collate:
            # Indexing whole tensors is 30 times as fast as collating rows, with an equal result, a list of tensors.
            self.get_batch = lambda indices: [_rows(tensor, indices) for tensor in dataset.tensors]
            self.draws = False
        self.get_items: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)
        if type(dataset) is Subset and not hasattr(dataset.dataset, "__getitems__"):
            self.get_items = None  # Subset.__getitems__ would fetch samples one by one, without seeding each

    def __getitem__(self, part: np.ndarray | tuple[int, np.ndarray]) -> Any:
        """Return the batch for `part`: (epoch, indices), or indices alone, for epoch 0."""
        epoch, indices = part if isinstance(part, tuple) else (0, part)
        if self.draws and (self.get_batch or self.get_items):
            randomness.seed_for(self.keys[0], epoch, int(indices[0]))
        if self.get_batch is not None:
            return self.get_batch(torch.from_numpy(np.ascontiguousarray(indices)))
        rows = indices.tolist()
        samples = self.get_items(rows) if self.get_items else [self._sample(epoch, row) for row in rows]
        if self.collate is not default_collate:
            randomness.seed_for(self.keys[1], epoch, rows[0])
        return self.collate(samples)

    def _sample(self, epoch: int, row: int) -> Any:
        randomness.seed_for(self.keys[0], epoch, row)
        return self.dataset[row]


NOT_SELECTABLE = torch.uint16, torch.uint32, torch.uint64
"""Types of a one-dimensional CPU tensor for which torch 2.13 has no `index_select`."""


def _rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return tensor[indices]; `index_select` takes half the time for 64 short rows, 1/14 for 64 uint8 images of 32²."""
    if tensor.is_cpu and tensor.is_contiguous() and tensor.dtype not in NOT_SELECTABLE:
        return tensor.index_select(0, indices)
    return tensor[indices]


def workers_for(fetch: Fetch, wanted: int | Literal["auto"], cpus: int, ranks: int) -> int:
    """Return the number of loader processes per rank.

    "auto" is min(4, cpus) // ranks; 0 on one CPU or for a dataset that makes whole batches (`fetch.get_batch`).

    Args:
        cpus: the CPUs of this machine.
        ranks: the ranks on this machine.
    """
    if wanted != "auto":
        return wanted
    return 0 if fetch.get_batch is not None else min(4, cpus) // max(1, ranks) if cpus > 1 else 0


LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
"""Limit in characters: Linux's limit for a socket's path, minus the part that multiprocessing appends."""


def load(fetch: Fetch, index_batches: Any, *, workers: int, pin_memory: bool, prefetch: int = 2) -> Iterator[Any]:
    """Yield the batch for each of the `index_batches`, in order, fetched here or by `workers` loader processes.

    Args:
        index_batches: an iterable of the arguments that `Fetch.__getitem__` takes.
        prefetch: batches that each loader process fetches in advance.

    Raises:
        ValueError: the path of the temporary folder is too long for loader processes.
    """
    if workers == 0:  # a DataLoader takes 67 µs a batch, and this generator 16
        batches = (fetch[indices] for indices in index_batches)
        return map(pinned, batches) if pin_memory else batches
    if len(tempfile.gettempdir()) > LONGEST_TMPDIR:
        # a loader process would only log this error, and training would wait for ever
        raise ValueError(
            f"the path of the temporary folder, {tempfile.gettempdir()}, has {len(tempfile.gettempdir())} characters: "
            f"expected at most {LONGEST_TMPDIR}, since loader processes make sockets in this folder, and the path of a "
            f"socket may have 107. Set TMPDIR to a shorter path, or data_workers=0."
        )
    if sys.version_info < (3, 12) and distributed.active():
        # Before Python 3.12 a process hangs for ever if it is forked while another thread makes a Python thread state
        # (6 of 855 forks under stress; none of 12 359 on 3.12). After a collective, gloo does so to free tensors.
        time.sleep(0.02)
    loader: DataLoader[Any] = DataLoader(
        fetch,
        batch_size=None,
        sampler=cast(Any, index_batches),
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise iter() draws from the global generator
    )
    return iter(loader)


class Batches:
    """Batches yields endless `Step`s for training, from the sampler's position on.

    Args:
        count: returns the number of loss terms in a batch; if None, each sample is one term.
        carried: whether each step gets `next_terms`, so that the all-reduce of its gradients also sums the next step's
            count over the ranks; needs `count`.
        workers, pin_memory, prefetch: as for `load`.
    """

    def __init__(
        self,
        sampler: Sampler,
        fetch: Fetch,
        *,
        count: Callable[[Any], int] | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
        carried: bool = False,
    ) -> None:
        self.count, self.fetch, self.carried = count, fetch, carried
        self.coming: Step | None = None
        self.ahead: Step | Exception | None = None
        """What `load_ahead` has loaded, or its error."""
        sampler.lengths = fetch.lengths
        self.shares = iter(sampler)
        self.loaded: Iterator[Any] | None = None  # None: `fetch` makes the batches in this process
        if workers or pin_memory:
            self.loaded = load(fetch, _IndexBatches(sampler), workers=workers, pin_memory=pin_memory, prefetch=prefetch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        if self.carried:
            step, self.coming = self.coming or self._take(), self._take()
            step.next_terms = cast(distributed.Count, self.coming.terms)
        else:
            step = self._take()
            if isinstance(step.terms, distributed.Count):
                step.terms.start()
        step.load_ahead = self.load_ahead
        return step

    def load_ahead(self) -> None:
        """Load the batches after those loaded so far; a later `next` returns them, or raises the error of loading."""
        if self.ahead is not None:
            return
        try:
            self.ahead = self._load()
        except Exception as error:
            self.ahead = error

    def _take(self) -> Step:
        """Return what `load_ahead` has loaded, else load now."""
        ahead, self.ahead = self.ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        return ahead or self._load()

    def _load(self) -> Step:
        share = next(self.shares)
        if self.loaded is None:
            batches = [self.fetch[share.epoch, part] for part in share.micro_batches]
        else:
            batches = [next(self.loaded) for _ in share.micro_batches]
        distributed.alive()
        weights = [float(real) for real in share.real]
        if self.count is None:
            own = sum(len(part) for part, real in zip(share.micro_batches, share.real, strict=True) if real)
            return Step(batches, weights, share.samples, lambda: share.samples, own)
        # The batches are still on the CPU here, so counting does not wait for the GPU.
        own = sum(int(self.count(batch)) for batch, real in zip(batches, share.real, strict=True) if real)
        return Step(batches, weights, share.samples, distributed.Count(own), own)


class _IndexBatches:
    """_IndexBatches yields (epoch, indices) of each micro-batch for the loader."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return ((share.epoch, part) for share in self.sampler for part in share.micro_batches)


def evaluation_batches(
    fetch: Fetch,
    size: int,
    batch_size: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    device: torch.device | None = None,
) -> Iterator[Any]:
    """Yield this rank's batches of one pass over `size` samples; all ranks together use each sample exactly once.

    Batches stay on the CPU if `device` is None; otherwise they are copied to `device`.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    starts: Sequence[int] = range(rank * batch_size, size, ranks * batch_size)
    indices = [np.arange(start, min(start + batch_size, size)) for start in starts]
    batches = load(fetch, indices, workers=workers, pin_memory=pin_memory)
    return batches if device is None or device.type == "cpu" else (move(batch, device) for batch in batches)


def move(batch: Any, device: torch.device) -> Any:
    """Copy a batch's tensors to `device`, also inside dicts, lists, tuples and objects with `.to`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, UserDict):  # transformers' BatchEncoding, whose own `to` waits for the copies
        moved = copy.copy(batch)
        moved.data = move(batch.data, device)
        return moved
    if isinstance(batch, PackedSequence):  # a namedtuple whose batch_sizes must stay on the CPU
        return cast(Any, batch).to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    if not hasattr(batch, "to"):
        return batch
    return batch.to(device, non_blocking=True) if _takes_non_blocking(cast(Any, type(batch))) else batch.to(device)


@functools.cache
def _takes_non_blocking(kind: type[Any]) -> bool:
    """Return whether the class's method `to` has a parameter non_blocking."""
    try:
        return "non_blocking" in inspect.signature(kind.to).parameters
    except (ValueError, TypeError, AttributeError):  # the class has no `to`, or Python cannot tell its parameters
        return False


def on_device(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """Yield steps with their batches on `device`; a GPU copies the next batch while computing a step."""
    if device.type != "cuda":
        yield from steps
        return
    copying = torch.cuda.Stream(device)

    def start_copy(step: Step) -> Step:
        # The copy may reuse the memory of an earlier batch, so it waits for all steps queued so far. The step yielded
        # next is queued after this wait, so its computation overlaps with the copy.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            return replace(step, micro_batches=[move(batch, device) for batch in step.micro_batches])

    coming = start_copy(next(steps))
    while True:
        torch.cuda.current_stream(device).wait_stream(copying)
        step, coming = coming, start_copy(next(steps))
        yield step


def samples_in(batch: Any) -> int:
    """Return the length of the first dimension of the first tensor in the batch.

    Raises:
        TypeError: the batch has no tensor.
    """
    found = next(_tensors(batch), None)
    if found is None or found.ndim == 0:
        raise TypeError(f"cannot count the samples of a batch of type {type(batch).__name__}: define Task.count")
    return int(found.shape[0])


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)
