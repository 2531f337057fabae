"""Which samples, in which order, on which rank: arithmetic, permutations, shares, and getting them there."""

from __future__ import annotations

import math
import re
import tempfile
import traceback
import tracemalloc
from collections import Counter, namedtuple
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from kaggle_mgpu import distributed, launch
from kaggle_mgpu.data import (
    Batches,
    BatchPlan,
    Fetch,
    Order,
    Sampler,
    Share,
    evaluation_batches,
    move,
    on_device,
    samples_in,
    size_of,
    workers_for,
)
from kaggle_mgpu.data.loading import _mix, load

Pair = namedtuple("Pair", "x y")


class TestBatchPlan:
    @given(
        micro=st.integers(1, 64),
        replicas=st.integers(1, 9),
        accumulation=st.integers(1, 9),
        size=st.integers(1, 10**7),
        epochs=st.integers(1, 5),
        missing=st.sampled_from(["none", "global", "micro", "accumulation"]),
    )
    def test_any_two_give_the_third(
        self, micro: int, replicas: int, accumulation: int, size: int, epochs: int, missing: str
    ) -> None:
        whole = micro * replicas * accumulation
        sizes = {"global_batch_size": whole, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        sizes = {name: value for name, value in sizes.items() if not name.endswith(f"{missing}_steps")}
        sizes = {name: value for name, value in sizes.items() if not name.startswith(missing)}
        assert len(sizes) == (3 if missing == "none" else 2)
        plan = BatchPlan.make(dataset_size=size, num_replicas=replicas, epochs=epochs, **sizes)
        assert plan == BatchPlan(whole, micro, replicas, accumulation, size, plan.max_steps)
        assert (plan.steps_per_epoch - 1) * whole < size <= plan.steps_per_epoch * whole
        assert plan.max_steps == epochs * plan.steps_per_epoch

    @pytest.mark.parametrize(
        ("given", "replicas", "expected"),
        [
            ({}, 1, (32, 32, 1)),
            ({}, 2, (32, 16, 1)),
            ({"global_batch_size": 12}, 3, (12, 4, 1)),
            ({"micro_batch_size": 5}, 3, (15, 5, 1)),
            ({"gradient_accumulation_steps": 4}, 2, (32, 4, 4)),
        ],
    )
    def test_one_or_none_will_do(self, given: dict[str, int], replicas: int, expected: tuple[int, int, int]) -> None:
        plan = BatchPlan.make(dataset_size=100, num_replicas=replicas, **given)
        assert (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps) == expected

    @pytest.mark.parametrize(("replicas", "whole"), [(1, 64), (2, 128), (4, 256)])
    def test_a_size_per_gpu_grows_with_the_gpus_and_says_so(self, replicas: int, whole: int) -> None:
        plan = BatchPlan.make(dataset_size=1000, num_replicas=replicas, global_batch_size="per_gpu:64")
        assert (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps) == (whole, 64, 1)
        said = f"global batch {whole} (per_gpu:64: the weights depend on the number of GPUs) = 64 per GPU x {replicas} "
        assert plan.sentence().startswith(said)

    @pytest.mark.parametrize(
        ("replicas", "given", "split"),
        [(1, {}, (64, 2)), (4, {}, (32, 1)), (1, {"micro_batch_size": 16}, (16, 8)), (2, {}, (64, 1))],
    )
    def test_a_size_that_a_run_began_with_is_kept(
        self, replicas: int, given: dict[str, int], split: tuple[int, int]
    ) -> None:
        plan = BatchPlan.make(
            dataset_size=1000, num_replicas=replicas, global_batch_size="per_gpu:64", batch_at_start=128, **given
        )
        assert plan.global_batch_size == 128
        assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == split
        here = "" if replicas == 2 else f" gave 128 at the start, and would give {64 * replicas} here"
        assert plan.sentence().startswith(f"global batch 128 (per_gpu:64{here}: the weights depend")

    def test_max_steps_wins_over_epochs(self) -> None:
        assert BatchPlan.make(dataset_size=100, epochs=50, max_steps=7).max_steps == 7
        assert BatchPlan.make(dataset_size=100, epochs=3).max_steps == 3 * 4

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"dataset_size": 0}, "the training data is empty: train_data() has length 0. Check the path"),
            (
                {"global_batch_size": 64, "micro_batch_size": 8, "gradient_accumulation_steps": 3},
                "the batch sizes do not multiply: micro_batch_size 8 x 2 replicas x gradient_accumulation_steps 3 = "
                "48, but global_batch_size is 64. Leave one of the three out: the other two determine it.",
            ),
            (
                {"global_batch_size": 8, "micro_batch_size": 9, "num_replicas": 1},
                "micro_batch_size 9 is larger than global_batch_size 8. Expected at most 8 for 1 replica; lower it",
            ),
            (
                {"global_batch_size": 8, "micro_batch_size": 9},
                "micro_batch_size 9 is larger than global_batch_size 8. Expected at most 4 for 2 replicas; lower it",
            ),
            (
                {"global_batch_size": 32, "micro_batch_size": 5},
                "global_batch_size 32 cannot be made of micro_batch_size 5 x 2 replicas = 10 samples at a time. "
                "Choose global_batch_size 30 or 40, or another micro_batch_size.",
            ),
            (
                {"global_batch_size": 8, "micro_batch_size": 8},
                "global_batch_size 8 cannot be made of micro_batch_size 8 x 2 replicas = 16 samples at a time. "
                "Choose global_batch_size 16, or another",
            ),
            (
                {"global_batch_size": 7},
                "global_batch_size 7 cannot be shared by 2 replicas x gradient_accumulation_steps 1: it is not a "
                "multiple of 2. Choose global_batch_size 6 or 8, or another number of GPUs.",
            ),
            (
                {"global_batch_size": 1},
                "global_batch_size 1 cannot be shared by 2 replicas x gradient_accumulation_steps 1: it is not a "
                "multiple of 2. Choose global_batch_size 2, or another number of GPUs.",
            ),
            (
                {"num_replicas": 4, "gradient_accumulation_steps": 3},
                "global_batch_size 32 cannot be shared by 4 replicas x gradient_accumulation_steps 3: it is not a "
                "multiple of 12. Choose global_batch_size 24 or 36",
            ),
        ],
    )
    def test_what_cannot_be(self, given: dict[str, int], says: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
            BatchPlan.make(**{"dataset_size": 100, "num_replicas": 2, **given})

    @pytest.mark.parametrize("whole", [1, 5, 7, 30, 31, 97])
    def test_a_suggested_size_is_accepted(self, whole: int) -> None:
        with pytest.raises(ValueError, match="Choose global_batch_size") as error:
            BatchPlan.make(dataset_size=9, num_replicas=4, gradient_accumulation_steps=2, global_batch_size=whole)
        suggested = re.search(r"Choose global_batch_size (\d+)(?: or (\d+))?", str(error.value))
        assert suggested is not None
        for size in filter(None, suggested.groups()):
            BatchPlan.make(dataset_size=9, num_replicas=4, gradient_accumulation_steps=2, global_batch_size=int(size))

    def test_scaled_lr(self) -> None:
        plan = BatchPlan.make(dataset_size=100, global_batch_size=1024)
        assert plan.scaled_lr(0.1, "none", 256) == 0.1
        assert plan.scaled_lr(0.1, "linear", 256) == pytest.approx(0.4)
        assert plan.scaled_lr(0.1, "sqrt", 256) == pytest.approx(0.2)
        assert plan.scaled_lr(0.1, "linear", 2048) == pytest.approx(0.05)

    def test_sentence(self) -> None:
        plan = BatchPlan.make(dataset_size=12345, num_replicas=2, global_batch_size=64, micro_batch_size=8, epochs=30)
        assert plan.sentence() == (
            "global batch 64 = 8 per GPU x 2 GPUs x 4 accumulation steps; "
            "12,345 samples, 193 steps an epoch, 5,790 steps in all"
        )
        assert plan.sentence("process").startswith("global batch 64 = 8 per process x 2 processes x 4 accum")
        one = BatchPlan.make(dataset_size=10, global_batch_size=4)
        assert one.sentence("replica") == (
            "global batch 4 = 4 per replica x 1 replica x 1 accumulation step; "
            "10 samples, 3 steps an epoch, 3 steps in all"
        )
        least = BatchPlan.make(dataset_size=1, global_batch_size=1)
        assert least.sentence().endswith("1 accumulation step; 1 sample, 1 step an epoch, 1 step in all")


class TestOrder:
    @pytest.mark.parametrize("sizes", [range(1, 200), range(200, 1000), range(1000, 2001)])
    def test_a_bijection_for_every_small_size(self, sizes: range) -> None:
        for size in sizes:
            seen = np.bincount(Order(size, seed=size % 7, epoch=size % 3)[:], minlength=size)
            assert len(seen) == size
            assert (seen == 1).all()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 10**6), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
    @example(2**16, 0, 0)
    @example(2**16 + 1, 0, 0)
    @example(2**18 - 1, 0, 0)
    @example(10**6, 2**64 - 1, 1)
    def test_a_bijection(self, size: int, seed: int, epoch: int) -> None:
        order = Order(size, seed, epoch)[:]
        assert order.dtype == np.int64
        seen = np.bincount(order, minlength=size)
        assert len(seen) == size
        assert (seen == 1).all()

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 3000), st.integers(0, 2**40), st.data())
    def test_slices_are_parts_of_the_whole(self, size: int, seed: int, data: st.DataObject) -> None:
        order = Order(size, seed, 1)
        start, stop = data.draw(st.integers(-size - 2, size + 2)), data.draw(st.integers(-size - 2, size + 2))
        step = data.draw(st.sampled_from([1, 2, 7, -1, -3]))
        whole = order[:]
        assert (order[start:stop] == whole[start:stop]).all()
        assert (order[start:stop:step] == whole[start:stop:step]).all()

    @pytest.mark.parametrize(
        ("size", "seed", "epoch", "first"),
        [
            (10, 0, 0, [0, 6, 2, 1, 8, 3, 9, 5]),
            (10, 0, 1, [7, 3, 9, 4, 5, 1, 0, 6]),
            (10, 1, 0, [7, 4, 0, 5, 8, 6, 3, 2]),
            (1, 5, 5, [0]),
            (300, 1337, 0, [142, 279, 234, 25, 207, 246, 174, 64]),
            (5, 2**70 + 3, 2, [0, 2, 1, 3, 4]),
            (
                10**9,
                7,
                3,
                [438139731, 206006634, 869202656, 245734769, 56987648, 818996996, 145010480, 767634044],
            ),
        ],
    )
    def test_the_order_is_this_one_for_good(self, size: int, seed: int, epoch: int, first: list[int]) -> None:
        # a change here would give every resumed run samples it has seen, and every seed another run
        assert Order(size, seed, epoch)[:8].tolist() == first

    def test_the_mixing_function_is_splitmix64(self) -> None:
        # the published sequence of seed 0
        states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        assert [hex(x) for x in _mix(states).tolist()] == [
            "0xe220a8397b1dcdaf",
            "0x6e789e6aa1b965f4",
            "0x6c45d188009454f",
        ]

    def test_seeds_and_epochs_differ(self) -> None:
        orders = {(s, e): tuple(Order(50, s, e)[:].tolist()) for s in range(20) for e in range(20)}
        assert len(set(orders.values())) == 400

    @pytest.mark.parametrize("size", [1000, 1024, 5000])
    def test_nothing_correlates(self, size: int) -> None:
        orders = [Order(size, seed, epoch)[:] for seed in range(3) for epoch in range(3)]
        place = np.arange(size)
        bound = 4.5 / math.sqrt(size)  # standard deviation of the correlation of independent orders: 1 / sqrt(size)
        for i, order in enumerate(orders):
            assert abs(np.corrcoef(order, place)[0, 1]) < bound
            for lag in (1, 2, 16, 32):
                assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < bound
            for other in orders[:i]:
                assert abs(np.corrcoef(order, other)[0, 1]) < bound
            # a random order has one fixed point on average, and one step by one up
            assert (order == place).sum() < 9
            assert (np.diff(order) == 1).sum() < 9

    def test_every_sample_comes_first_equally_often(self) -> None:
        epochs, size = 3000, 60
        for place in (0, 30, 59):
            firsts = Counter(int(Order(size, 3, epoch)[place : place + 1][0]) for epoch in range(epochs))
            expected = epochs / size
            chi2 = sum((firsts[i] - expected) ** 2 / expected for i in range(size))
            assert 25 < chi2 < 110  # 59 degrees of freedom: 59 ± 11; 110 is 1 in 10,000


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchPlan, int]:
    """A plan, and the processes its replicas live in."""
    processes = draw(st.integers(1, 5))
    replicas = processes if processes > 1 else draw(st.integers(1, 4))  # dp: several replicas in one process
    plan = BatchPlan.make(
        dataset_size=draw(st.integers(1, 150)),
        num_replicas=replicas,
        micro_batch_size=draw(st.integers(1, 6)),
        gradient_accumulation_steps=draw(st.integers(1, 4)),
    )
    return plan, processes


def shares(plan: BatchPlan, processes: int, steps: int, *, seed: int = 3, samples_seen: int = 0) -> list[list[Share]]:
    """[step][rank]"""
    ranks = [
        iter(Sampler(plan, seed=seed, samples_seen=samples_seen, rank=rank, world_size=processes))
        for rank in range(processes)
    ]
    return [[next(rank) for rank in ranks] for _ in range(steps)]


def taken(share: Share) -> list[int]:
    return [int(i) for part, real in zip(share.micro_batches, share.real, strict=True) if real for i in part]


def same(a: list[list[Share]], b: list[list[Share]]) -> bool:
    def plain(steps: list[list[Share]]) -> Any:
        return [[([p.tolist() for p in s.micro_batches], s.real, s.samples) for s in step] for step in steps]

    return bool(plain(a) == plain(b))


class TestSampler:
    @settings(max_examples=60, deadline=None)
    @given(plans(), st.integers(0, 10**6))
    def test_each_sample_once_an_epoch_in_the_order_of_the_epoch(self, made: tuple[BatchPlan, int], seed: int) -> None:
        plan, processes = made
        size, whole = plan.dataset_size, plan.global_batch_size
        steps = shares(plan, processes, 2 * plan.steps_per_epoch, seed=seed)
        orders = [Order(size, seed, epoch)[:].tolist() for epoch in (0, 1)]
        expected = [order[k : k + whole] for order in orders for k in range(0, size, whole)]
        # the ranks' shares one after the other are the global slice: the same samples whatever the world size
        assert [[i for share in step for i in taken(share)] for step in steps] == expected
        assert [[share.samples for share in step] for step in steps] == [[len(e)] * processes for e in expected]

    @settings(max_examples=60, deadline=None)
    @given(plans())
    def test_of_a_global_batch_samples_of_a_length_come_together(self, made: tuple[BatchPlan, int]) -> None:
        plan, processes = made
        lengths = np.random.default_rng(plan.dataset_size).integers(1, 9, plan.dataset_size)
        ranks = [Sampler(plan, seed=3, rank=rank, world_size=processes) for rank in range(processes)]
        for sampler in ranks:
            sampler.lengths = lengths
        for step, plain in zip(zip(*ranks, strict=True), shares(plan, processes, plan.steps_per_epoch), strict=False):
            found = [[int(lengths[i]) for i in taken(share)] for share in step]
            assert sorted(i for share in step for i in taken(share)) == sorted(i for p in plain for i in taken(p))
            assert all(row == sorted(row, reverse=True) for row in found)
            # each rank has as much of every length
            assert all(x >= y for a in found for b in found for x, y in zip(a, b[1:], strict=False))
            assert [len(share.micro_batches) for share in step] == [len(share.micro_batches) for share in plain]
            assert {share.samples for share in step} == {plain[0].samples}

    @settings(max_examples=60, deadline=None)
    @given(plans())
    def test_micro_batches(self, made: tuple[BatchPlan, int]) -> None:
        plan, processes = made
        size = plan.micro_batch_size * (plan.num_replicas // processes)
        for step in shares(plan, processes, 2 * plan.steps_per_epoch):
            counts = {len(share.micro_batches) for share in step}
            assert len(counts) == 1, "every rank takes part in every all-reduce"
            assert 1 <= counts.pop() <= plan.gradient_accumulation_steps
            lengths = [len(taken(share)) for share in step]
            assert max(lengths) - min(lengths) <= 1
            for share in step:
                assert all(1 <= len(part) <= size for part in share.micro_batches)
                # a stand-in is one sample of this very batch, and only where the rank has none left
                for i, (part, real) in enumerate(zip(share.micro_batches, share.real, strict=True)):
                    left = len(taken(share)) - i * size
                    assert real == (left > 0)
                    assert len(part) == (min(size, left) if real else 1)
                    assert real or int(part[0]) in {j for other in step for j in taken(other)}
            if step[0].samples == plan.global_batch_size:
                assert all(share.real == [True] * plan.gradient_accumulation_steps for share in step)
                assert {len(part) for share in step for part in share.micro_batches} == {size}

    @settings(max_examples=60, deadline=None)
    @given(plans(), st.integers(0, 40))
    def test_starting_in_the_middle_is_having_come_there(self, made: tuple[BatchPlan, int], start: int) -> None:
        plan, processes = made
        steps = shares(plan, processes, start + 5)
        seen = sum(step[0].samples for step in steps[:start])
        assert same(shares(plan, processes, 5, samples_seen=seen), steps[start:])

    @settings(max_examples=60, deadline=None)
    @given(plans(), st.integers(0, 10**4), st.integers(1, 64))
    def test_blocks_are_a_matter_of_speed_alone(self, made: tuple[BatchPlan, int], seen: int, block: int) -> None:
        plan, processes = made
        steps = shares(plan, processes, 12, samples_seen=seen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "BLOCK", block)
            assert same(shares(plan, processes, 12, samples_seen=seen), steps)

    @settings(max_examples=60, deadline=None)
    @given(plans(), st.integers(0, 400))
    def test_from_any_position_the_rest_of_the_epoch_comes_once(self, made: tuple[BatchPlan, int], seen: int) -> None:
        plan, processes = made
        epoch, position = divmod(seen, plan.dataset_size)
        rest = Order(plan.dataset_size, 3, epoch)[position:].tolist()
        steps = shares(plan, processes, math.ceil(len(rest) / plan.global_batch_size), samples_seen=seen)
        assert [i for step in steps for share in step for i in taken(share)] == rest

    @settings(max_examples=25)
    @given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 30))
    def test_another_world_size_goes_on_where_the_first_stopped(self, size: int, factor: int, start: int) -> None:
        whole = 12 * factor
        slices = []
        for processes in (1, 2, 3, 4, 6):
            plan = BatchPlan.make(dataset_size=size, num_replicas=processes, global_batch_size=whole)
            first = shares(plan, processes, start)
            seen = sum(step[0].samples for step in first)
            other = BatchPlan.make(dataset_size=size, num_replicas=7 - processes, global_batch_size=420)
            assume(other.num_replicas > 0)
            then = shares(plan, processes, 4, samples_seen=seen)
            slices.append([[i for share in step for i in taken(share)] for step in first + then])
        assert all(found == slices[0] for found in slices)

    def test_a_start_anywhere_in_a_billion_samples_costs_nothing(self) -> None:
        plan = BatchPlan.make(dataset_size=10**9, num_replicas=2, global_batch_size=64)
        Order(10, 0, 0)[:]
        tracemalloc.start()
        try:
            share = next(iter(Sampler(plan, seed=0, samples_seen=7 * 10**9 + 5 * 10**8, rank=1, world_size=2)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 * 2**20  # an array of the order would be 8 GB
        expected = Order(10**9, 0, 7)[5 * 10**8 + 32 : 5 * 10**8 + 64]
        assert taken(share) == expected.tolist()

    def test_rank_and_world_size_are_this_processes_own(self) -> None:
        sampler = Sampler(BatchPlan.make(dataset_size=10), seed=0)
        assert (sampler.rank, sampler.world_size) == (0, 1)


class Items(Dataset[Any]):
    """Sample i is made of i, in the shape asked for; `asked` counts calls."""

    def __init__(self, size: int, shape: str = "dict") -> None:
        self.size, self.shape, self.asked = size, shape, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        assert type(i) is int
        self.asked += 1
        x, y = torch.full((2,), float(i)), i * 10
        return {"dict": {"x": x, "y": y}, "tuple": (x, y), "namedtuple": Pair(x, y), "tensor": x}[self.shape]


class Several(Items):
    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [Items.__getitem__(self, i) for i in rows]

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("asked one by one")


class Whole(Items):
    def batch(self, indices: Tensor) -> Tensor:
        assert indices.dtype == torch.int64
        return indices * 2

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("asked one by one")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


INDICES = np.array([4, 1, 8, 1])


class TestFetch:
    @pytest.mark.parametrize("shape", ["dict", "tuple", "namedtuple", "tensor"])
    @pytest.mark.parametrize("kind", [Items, Several])
    def test_samples_are_collated(self, kind: type[Items], shape: str) -> None:
        got = Fetch(kind(10, shape))[INDICES]
        assert equal(got, default_collate([Items(10, shape)[i] for i in (4, 1, 8, 1)]))
        assert samples_in(got) == 4

    def test_by_a_collate_of_ones_own(self) -> None:
        fetch = Fetch(Items(10, "tuple"), lambda rows: [y for _, y in rows])
        assert fetch[INDICES] == [40, 10, 80, 10]
        assert fetch.get_batch is None

    def test_a_batch_at_a_time(self) -> None:
        fetch = Fetch(Whole(10))
        assert fetch[INDICES].tolist() == [8, 2, 16, 2]
        # a slice of the order that is not contiguous
        assert fetch[np.arange(10)[::3]].tolist() == [0, 6, 12, 18]

    def test_a_tensor_dataset_gives_what_collating_its_rows_would(self) -> None:
        tensors = (torch.randn(10, 3), torch.arange(10), torch.randn(10, 2, 2).to(torch.float16))
        dataset = TensorDataset(*tensors)
        fetch = Fetch(dataset)
        assert fetch.get_batch is not None
        got = fetch[INDICES]
        assert equal(got, default_collate([dataset[i] for i in INDICES.tolist()]))
        got[0].zero_()
        assert tensors[0].any(), "a batch is a copy"

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint64, torch.bool, torch.complex64])
    def test_rows_of_any_type_and_layout(self, dtype: torch.dtype) -> None:
        images = torch.arange(10 * 2 * 3 * 4).reshape(10, 2, 3, 4).to(dtype)
        strided = images[:, 0], images[:, 0, 0, 0], images.to(memory_format=torch.channels_last)
        for tensor in (images, images[:, 0, 0, 0].clone(), *strided):
            (got,) = Fetch(TensorDataset(tensor))[INDICES]
            expected = tensor[torch.from_numpy(INDICES)]
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()

    def test_no_fast_path_where_it_would_give_something_else(self) -> None:
        class Flipped(TensorDataset):
            def __getitem__(self, i: int) -> tuple[Tensor, ...]:
                return tuple(-tensor for tensor in super().__getitem__(i))

        dataset = Flipped(torch.arange(10.0))
        assert equal(Fetch(dataset)[INDICES], [-torch.tensor([4.0, 1.0, 8.0, 1.0])])
        plain = TensorDataset(torch.arange(10.0))
        assert Fetch(plain, lambda rows: len(rows))[INDICES] == 4
        assert equal(Fetch(Subset(plain, [9, 8, 7]))[np.array([2, 0])], [torch.tensor([7.0, 9.0])])

    @pytest.mark.parametrize(
        ("wanted", "cpus", "ranks", "items", "whole"),
        [
            ("auto", 4, 2, 2, 0),  # Kaggle with two GPUs
            ("auto", 4, 1, 4, 0),
            ("auto", 2, 1, 2, 0),
            ("auto", 1, 1, 0, 0),
            ("auto", 64, 1, 4, 0),
            ("auto", 64, 2, 2, 0),
            ("auto", 2, 4, 0, 0),
            (3, 1, 8, 3, 3),
            (0, 64, 1, 0, 0),
        ],
    )
    def test_workers_for(self, wanted: Any, cpus: int, ranks: int, items: int, whole: int) -> None:
        assert workers_for(Fetch(Items(10)), wanted, cpus, ranks) == items
        assert workers_for(Fetch(Whole(10)), wanted, cpus, ranks) == whole
        assert workers_for(Fetch(TensorDataset(torch.zeros(3))), wanted, cpus, ranks) == whole

    def test_size_of(self) -> None:
        class Stream(IterableDataset[int]):
            def __iter__(self) -> Iterator[int]:
                return iter(range(3))

        assert size_of(Items(7), "train_data()") == 7
        with pytest.raises(
            TypeError,
            match=r"^train_data\(\) is a stream, Stream: expected a map-style dataset .* launch a loop of your own",
        ):
            size_of(Stream(), "train_data()")
        with pytest.raises(TypeError, match=r"^train_data\(\) has no length or no __getitem__: .*, got generator"):
            size_of((x for x in range(3)), "train_data()")  # type: ignore[arg-type]


def steps_of(batches: Batches, steps: int) -> list[Any]:
    return [(step.micro_batches, step.weights, step.samples, step.terms()) for step in islice(iter(batches), steps)]


class TestBatches:
    PLAN = BatchPlan.make(dataset_size=23, global_batch_size=8, micro_batch_size=3 - 1)

    def batches(self, dataset: Dataset[Any], seen: int = 0, **options: Any) -> Batches:
        return Batches(Sampler(self.PLAN, seed=1, samples_seen=seen), Fetch(dataset), **options)

    def test_samples_by_the_sampler(self) -> None:
        steps = steps_of(self.batches(Items(23)), 7)
        order = [*Order(23, 1, 0)[:].tolist(), *Order(23, 1, 1)[:].tolist(), *Order(23, 1, 2)[:].tolist()]
        assert [y // 10 for batches, *_ in steps for batch in batches for y in batch["y"].tolist()] == order[:54]
        # an epoch's last step has what is left: 23 = 8 + 8 + 7
        assert [samples for _, _, samples, _ in steps] == [8, 8, 7, 8, 8, 7, 8]
        assert [terms for *_, terms in steps] == [8, 8, 7, 8, 8, 7, 8]
        assert {weight for _, weights, *_ in steps for weight in weights} == {1.0}

    def test_a_temporary_folder_too_long_for_sockets_is_an_error_before_loaders_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deep = tmp_path / ("x" * 90)
        deep.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
        fetch = Fetch(TensorDataset(torch.arange(4)), default_collate, seed=1)
        with pytest.raises(
            ValueError, match=r"expected at most 75, .* Set TMPDIR to a shorter path, or data_workers=0\."
        ):
            load(fetch, [np.array([0])], workers=1, pin_memory=False)
        assert len(list(load(fetch, [np.array([0])], workers=0, pin_memory=False))) == 1

    @pytest.mark.parametrize("seen", [0, 16, 46 + 8])
    def test_loader_workers_give_the_same_in_the_same_order(self, seen: int) -> None:
        alone = steps_of(self.batches(Items(23), seen), 8)
        assert equal(steps_of(self.batches(Items(23), seen, workers=2), 8), alone)

    @pytest.mark.parametrize("count", [lambda batch: int(batch["y"].sum()), lambda batch: batch["y"].sum()])
    def test_terms_are_counted(self, count: Any) -> None:
        for batches, _, _, terms in steps_of(self.batches(Items(23), count=count), 5):
            assert type(terms) is int
            assert terms == sum(int(batch["y"].sum()) for batch in batches)

    def test_nothing_is_fetched_before_it_is_asked_for(self) -> None:
        dataset = Items(23)
        batches = self.batches(dataset)
        assert dataset.asked == 0
        next(batches)
        assert dataset.asked == 8

    def test_a_broken_sample_is_an_error_here(self) -> None:
        with pytest.raises(ZeroDivisionError, match="sample 3"):
            steps_of(self.batches(Broken(23)), 3)
        loaded = load(Fetch(Broken(23)), [np.array([2]), np.array([3])], workers=1, pin_memory=False)
        with pytest.raises(ZeroDivisionError, match="sample 3") as error:
            list(loaded)
        # let go of the loader here: the garbage collector would, later, wait 5 s for each of its processes
        traceback.clear_frames(error.value.__traceback__)
        del loaded

    def test_on_the_cpu_on_device_hands_the_steps_on(self) -> None:
        steps = list(islice(on_device(self.batches(Items(23)), torch.device("cpu")), 4))
        found = [(step.micro_batches, step.weights, step.samples, step.terms()) for step in steps]
        assert equal(found, steps_of(self.batches(Items(23)), 4))


class Broken(Items):
    def __getitem__(self, i: int) -> Any:
        if i == 3:
            raise ZeroDivisionError("sample 3")
        return super().__getitem__(i)


class Movable:
    def to(self, device: torch.device) -> str:
        return f"on {device}"


class TestMoving:
    def test_move(self) -> None:
        x, meta = torch.ones(2, 3), torch.device("meta")
        batch = {"a": x, "b": [x, (x, "text")], "c": Pair(x, 3), "d": Movable(), "e": None}
        got = move(batch, meta)
        assert got["a"].device == got["b"][0].device == got["b"][1][0].device == got["c"].x.device == meta
        assert got["b"][1][1] == "text"
        assert type(got["b"][1]) is tuple
        assert type(got["c"]) is Pair
        assert (got["c"].y, got["d"], got["e"]) == (3, "on meta", None)
        assert x.device.type == "cpu"

    def test_samples_in(self) -> None:
        x = torch.ones(5, 2)
        for batch in (x, [x], (x, torch.ones(3)), {"name": "n", "deep": {"x": x}}, Pair("y", x)):
            assert samples_in(batch) == 5
        for wrong in ("text", {"a": 3}, [], torch.tensor(1.0), None):
            kind = type(wrong).__name__
            with pytest.raises(
                TypeError, match=rf"^cannot count the samples of a batch of type {kind}: define Task.count$"
            ):
                samples_in(wrong)


CASES = [(size, batch) for size in (1, 2, 5, 6, 7, 12, 31) for batch in (1, 2, 5, 40)]


def on_each_rank() -> dict[str, Any]:
    """What one rank gets: its evaluation batches of each case, and its training steps with their terms."""
    found: dict[str, Any] = {"rank": distributed.rank()}
    for size, batch in CASES:
        for workers in (0, 1) if (size, batch) == (31, 5) else (0,):
            batches = evaluation_batches(Fetch(Items(size)), size, batch, workers=workers)
            found[f"{size} {batch} {workers}"] = [part["y"].tolist() for part in batches]
    plan = BatchPlan.make(dataset_size=10, num_replicas=distributed.world_size(), micro_batch_size=2)
    batches = Batches(Sampler(plan, seed=1), Fetch(Items(10)), count=lambda batch: int(batch["y"].sum()))
    found["steps"] = [
        ([batch["y"].tolist() for batch in step.micro_batches], step.weights, step.samples, step.terms())
        for step in islice(batches, 4)
    ]
    return found


def test_over_real_ranks() -> None:
    ranks = launch(on_each_rank, nproc=3)
    assert [found["rank"] for found in ranks] == [0, 1, 2]
    for size, batch in CASES:
        parts = [part for found in ranks for part in found[f"{size} {batch} 0"]]
        assert sorted(y for part in parts for y in part) == [10 * i for i in range(size)], "each exactly once"
        assert all(1 <= len(part) <= batch for part in parts)
        counts = [len(found[f"{size} {batch} 0"]) for found in ranks]
        assert max(counts) - min(counts) <= 1
    assert all(found["31 5 1"] == found["31 5 0"] for found in ranks)
    # training: 10 samples in batches of 6; the second has 4 for 3 ranks
    for step, (start, stop) in enumerate([(0, 6), (6, 10), (0, 6), (6, 10)]):
        expected = [10 * i for i in Order(10, 1, step // 2)[start:stop].tolist()]
        parts = [found["steps"][step] for found in ranks]
        assert [y for batches, *_ in parts for batch in batches for y in batch] == expected
        assert [(samples, terms) for _, _, samples, terms in parts] == [(stop - start, sum(expected))] * 3


def fillers() -> tuple[int, list[float], int]:
    """Two samples for three ranks: one has none, takes part with weight 0, and does not count."""
    plan = BatchPlan.make(dataset_size=2, num_replicas=3, micro_batch_size=1)
    step = next(Batches(Sampler(plan, seed=0), Fetch(Items(2)), count=lambda batch: 100 + len(batch["y"])))
    return len(step.micro_batches), step.weights, step.terms()


def test_a_rank_without_a_sample_stands_in() -> None:
    ranks = launch(fillers, nproc=3)
    assert [found[0] for found in ranks] == [1, 1, 1]
    assert sorted(found[1] for found in ranks) == [[0.0], [1.0], [1.0]]
    assert [found[2] for found in ranks] == [202, 202, 202]


def test_evaluation_in_one_process_and_on_a_device() -> None:
    fetch = Fetch(Items(7))
    assert [b["y"].tolist() for b in evaluation_batches(fetch, 7, 3)] == [[0, 10, 20], [30, 40, 50], [60]]
    moved = list(evaluation_batches(fetch, 7, 3, device=torch.device("meta")))
    assert {b["x"].device.type for b in moved} == {"meta"}
    assert list(load(fetch, [], workers=0, pin_memory=False)) == []


def test_lengths_of_other_samples_are_refused() -> None:
    class Lengths(TensorDataset):
        sample_lengths = (3, 4)

    with pytest.raises(ValueError, match=r"sample_lengths: expected a number for each of the 5 samples, got .*\(2,\)"):
        Fetch(Lengths(torch.zeros(5)), default_collate, seed=1)
