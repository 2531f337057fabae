"""What went wrong on GPUs alone, each on the pretend pair; and the pair's own strictness.

One launch computes the findings of a group of tests, so each test costs milliseconds.
"""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from kaggle_mgpu import TrainConfig, distributed, launch, train
from kaggle_mgpu.checkpoints.files import Buffer, Layout
from kaggle_mgpu.data.loading import Fetch, Step, load, move, on_device
from kaggle_mgpu.parallel import Strategy
from kaggle_mgpu.training.out_of_memory import is_out_of_memory
from pretend_cuda import watch
from pretend_cuda.gpu_tasks import Compiled, Own

pytestmark = pytest.mark.usefixtures("gpus")


def findings(checks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run each check in a worker; return its value, or its error as text."""
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# --- the pair itself ------------------------------------------------------------------------------------------------


def late_copy() -> list[bool]:
    target = torch.zeros(2).pin_memory()
    target.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    before = bool(target.isnan().all())
    torch.cuda.synchronize()
    return [before, bool((target == 1).all())]


def seen_waits() -> list[str]:
    x = torch.ones(3, device="cuda")
    with watch.waits() as found:
        x.sum().item()
        torch.as_tensor(3, device="cuda")
        x.cpu()
        x[x > 0]
        x.to("cuda:1")
        x + 1
    return [wait.operation for wait in found]


def seen_streams() -> list[Any]:
    stream = torch.cuda.Stream()
    with watch.operations() as found, torch.cuda.stream(stream):
        torch.ones(3, device="cuda")
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    return [found[0][1:] == (0, stream.stream_id), found[-1] == ("wait_stream", 0, stream.stream_id, 0)]


def short_memory(error: str) -> str:
    watch.limit_memory(1, watch.used_memory(1) + 100, error)
    try:
        torch.ones(1000, device="cuda:1")
        return "no error"
    except RuntimeError as raised:
        return f"{type(raised).__name__}: {raised}"
    finally:
        watch.limit_memory(1, 1 << 40)


PAIR: dict[str, Callable[[], Any]] = {
    "two": lambda: [
        torch.cuda.device_count(),
        torch.ones(2, device="cuda:1").device.index,
        torch.cuda.get_device_name(),
    ],
    "garbage": lambda: bool(torch.empty(5, device="cuda").isnan().all()),
    "mixed GPUs": lambda: torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1"),
    "mixed with the CPU": lambda: nn.Linear(2, 2).cuda()(torch.ones(1, 2)),
    "late copy": late_copy,
    "waits": seen_waits,
    "streams": seen_streams,
    "pinned": lambda: [torch.empty(3, pin_memory=True).is_pinned(), torch.empty(3).is_pinned()],
    "memory": lambda: {error: short_memory(error) for error in watch.MEMORY_ERRORS},
}


@pytest.fixture(scope="module")
def pair(gpus: None) -> dict[str, Any]:
    return launch(findings, PAIR, nproc=1, in_worker=True)[0]


EXPECTED = {
    "two": [2, 1, "Tesla T4"], "garbage": True, "late copy": [True, True], "streams": [True, True],
    "pinned": [True, False],
    "waits": ["item", "copy_ to a GPU", "copy_ to the CPU", "aten::nonzero", "aten::index"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_pretend_pair_behaves_as_cuda_does(pair: dict[str, Any], name: str) -> None:
    assert pair[name] == EXPECTED[name]


@pytest.mark.parametrize("name", ["mixed GPUs", "mixed with the CPU"])
def test_the_pretend_pair_refuses_mixed_devices(pair: dict[str, Any], name: str) -> None:
    assert "RuntimeError: Expected all tensors to be on the same device" in pair[name]


# --- skipping a step on the device ----------------------------------------------------------------------------------


def skipped_step(make: str, precision: str) -> dict[str, Any]:
    """Take three finite steps and an infinite one; compare weights and state before and after the last."""
    strategy = Strategy(
        lambda model, x: (model(x) * x).sum(), None, precision=precision, device=torch.device("cuda", 0)
    )
    torch.manual_seed(0)
    model = strategy.prepare(nn.Linear(4, 4))
    optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "own": lambda p: Own(p, lr=0.1),
        "unfused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    }[make](model.parameters())

    def held() -> list[torch.Tensor]:
        state = [v.cpu().clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [p.detach().cpu().clone() for p in model.parameters()] + state

    def step(value: float) -> None:
        strategy.backward(torch.full((2, 4), value, device="cuda:0"), 1.0, lambda: 2)
        strategy.step(optimizer, max_norm=1.0)

    for _ in range(3):
        step(0.1)
    before = held()
    with watch.waits() as waits:
        step(float("inf"))
    after, skipped = held(), int(strategy.skipped)
    step(0.1)
    return {
        "same": all(map(torch.equal, before, after)),
        "skipped": skipped,
        "moves": not torch.equal(held()[0], after[0]) and bool(held()[0].isfinite().all()),
        "waits": len(waits),
    }


SKIPS = [
    (make, precision)
    for make in ("SGD", "momentum", "own", "unfused AdamW", "fused AdamW")
    for precision in ("fp32", "fp16")
]


@pytest.fixture(scope="module")
def skips(gpus: None) -> dict[str, Any]:
    checks = {f"{make} {precision}": (lambda m=make, p=precision: skipped_step(m, p)) for make, precision in SKIPS}
    return launch(findings, checks, nproc=1, in_worker=True)[0]


@pytest.mark.parametrize(("make", "precision"), SKIPS)
def test_a_step_with_an_infinite_gradient_changes_nothing(skips: dict[str, Any], make: str, precision: str) -> None:
    waits = 1 if make == "unfused AdamW" else 0  # its step counts are on the CPU, which must know
    expected = {"same": True, "skipped": 1, "moves": True}
    found = skips[f"{make} {precision}"]
    assert {name: found[name] for name in expected} == expected
    assert found["waits"] == 0 if waits == 0 else found["waits"] >= 1


# --- copies and memory ----------------------------------------------------------------------------------------------


class Encoding(UserDict):
    """A batch with a `to` of its own that waits, as transformers' BatchEncoding has."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """A batch with a `to` that need not wait, as torch_geometric's Data has."""

    def __init__(self, edges: torch.Tensor) -> None:
        self.edges = edges

    def to(self, device: torch.device, non_blocking: bool = False) -> Graph:
        return Graph(self.edges.to(device, non_blocking=non_blocking))


def moved(make: Callable[[], Any], tensor: Callable[[Any], torch.Tensor]) -> list[Any]:
    batch = make()
    with watch.waits() as waits:
        on_gpu = move(batch, torch.device("cuda", 1))
    return [str(tensor(on_gpu).device), type(on_gpu) is type(batch), len(waits)]


def packed() -> PackedSequence:
    return nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])


def held_memory() -> list[Any]:
    """Hold 9 MiB of a GPU's tensors, in files whose tensors cross the ends of pieces."""
    values = {f"t{i}": torch.full((3, 100_000), float(i), device="cuda") for i in range(7)}
    values["odd"] = torch.arange(250_001, device="cuda", dtype=torch.int64).t()
    layouts = {"a": Layout.of(values), "b": Layout.of({"x": torch.ones(10, device="cuda", dtype=torch.float16)})}
    held = Buffer().hold(layouts)
    read = safetensors.torch.load(b"".join(held["a"]))
    right = all(torch.equal(read[name], tensor.cpu()) for name, tensor in values.items())
    return [right, watch.library.pinned_bytes() / sum(layout.nbytes for layout in layouts.values()) < 1.12]


def evaluated() -> list[int]:
    strategy = Strategy(lambda *_: torch.zeros(()), lambda model, x: {"a": (model(x).sum(), len(x)), "b": (1.5, 2)},
                        precision="fp32", device=torch.device("cuda", 0))  # fmt: skip
    strategy.prepare(nn.Linear(2, 2))
    batches = [torch.ones(4, 2, device="cuda") for _ in range(5)]
    with watch.waits() as waits:
        found = strategy.evaluate(iter(batches))
    return [len(waits), found["a"][1], found["b"][1], float(found["b"][0])]


class Calls(TorchDispatchMode):
    """Collects the dtypes in each call of _foreach_copy_."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[set[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_copy_" in str(func):
            self.dtypes.append({str(tensor.dtype) for tensors in args for tensor in tensors})
        return func(*args, **(kwargs or {}))


def copied_buffers() -> list[Any]:
    strategy = Strategy(lambda *_: torch.zeros(()), None, precision="fp32", device=torch.device("cuda", 0))
    model = strategy.prepare(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    with Calls() as calls:
        strategy.begin_step()
    model[0].num_batches_tracked += 1
    strategy.undo_step()
    return [sorted(map(sorted, calls.dtypes)), int(model[0].num_batches_tracked)]


def loaded() -> list[Any]:
    fetch = Fetch(TensorDataset(torch.arange(6.0)))
    batches = load(fetch, [np.array([0, 1]), np.array([2])], workers=0, pin_memory=True)
    found = list(batches)
    return [isinstance(batches, _BaseDataLoaderIter), [batch[0].is_pinned() for batch in found], found[1][0].tolist()]


def order_of_copies() -> list[Any]:
    """The copy of the next batch is on a stream of its own, and a step's stream waits for its batch."""
    steps = iter([Step([torch.ones(2).pin_memory()], [1.0], 2, lambda: 2) for _ in range(3)])
    batches = on_device(steps, torch.device("cuda", 0))
    with watch.operations() as found:
        next(batches).micro_batches[0] + 1
    copies = [event for event in found if event[0] == "copy_"]
    [add] = [i for i, event in enumerate(found) if "add" in event[0]]
    waited = [event[3] for event in found[:add] if event[0] == "wait_stream" and event[2] == 0]
    return [len(copies), {stream for _, _, stream in copies} == set(waited) != {0}, found[add][2]]


COPIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "a PackedSequence": (lambda: moved(packed, lambda b: b.data), ["cuda:1", True, 0]),
    "a BatchEncoding": (lambda: moved(lambda: Encoding(x=torch.ones(2)), lambda b: b["x"]), ["cuda:1", True, 0]),
    "an object with `to`": (lambda: moved(lambda: Graph(torch.ones(2)), lambda b: b.edges), ["cuda:1", True, 0]),
    "page-locked memory of a save": (held_memory, [True, True]),
    "an evaluation": (evaluated, [4, 20, 10, 7.5]),  # the sum and the count of two metrics, read once
    "buffers by dtype": (copied_buffers, [[["torch.float32"], ["torch.int64"]], 0]),
    "loading in this process": (loaded, [False, [True, True], [2.0]]),
    "the order of copies": (order_of_copies, [2, True, 0]),
}


@pytest.fixture(scope="module")
def copies(gpus: None) -> dict[str, Any]:
    return launch(findings, {name: check for name, (check, _) in COPIES.items()}, nproc=1, in_worker=True)[0]


@pytest.mark.parametrize("name", COPIES)
def test_copies_neither_wait_nor_waste(copies: dict[str, Any], name: str) -> None:
    assert copies[name] == COPIES[name][1]


@pytest.mark.parametrize("error", watch.MEMORY_ERRORS)
def test_every_message_of_short_memory_is_recognised(pair: dict[str, Any], error: str) -> None:
    kind, _, text = pair["memory"][error].partition(": ")
    assert kind == "OutOfMemoryError" if error == "allocator" else text.startswith(watch.MEMORY_ERRORS[error])
    assert is_out_of_memory(torch.OutOfMemoryError(text) if error == "allocator" else RuntimeError(text))


# --- two ranks ------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, Any]:
    distributed.init()
    mine, other = torch.cuda.current_device(), 1 - torch.cuda.current_device()
    bad = {
        "a type": torch.ones(2, dtype=torch.int16, device=f"cuda:{mine}"),
        "a device": torch.ones(2, device=f"cuda:{other}"),
        "strides": torch.ones(2, 3, device=f"cuda:{mine}").t(),
    }
    return findings({name: (lambda t=tensor: dist.broadcast(t, src=0)) for name, tensor in bad.items()})


@pytest.fixture(scope="module")
def refused(gpus: None) -> dict[str, Any]:
    return launch(refusals)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a type", "not supported for NCCL"), ("a device", "current device is"), ("strides", "contiguous")],
)
def test_the_process_group_refuses_what_nccl_refuses(refused: dict[str, Any], name: str, text: str) -> None:
    assert text in refused[name]


def graphs(config: TrainConfig) -> int:
    """Train a task whose loss is probed before the first step; return how often the model was compiled."""
    from torch._dynamo.utils import counters

    train(config, Compiled(val_samples=0))
    return counters["stats"]["unique_graphs"]


def test_all_ranks_compile_the_same_graphs(gpus: None, tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), compile=True, max_steps=2, global_batch_size=16, precision="fp32")
    on_ranks = launch(graphs, config)
    assert on_ranks[0] == on_ranks[1] > 0


def server_then_worker() -> list[Any]:
    distributed.init()
    tensor = torch.ones(4, device="cuda")
    dist.all_reduce(tensor)
    return [torch.cuda._is_in_bad_fork(), tensor.tolist(), os.environ["CUDA_VISIBLE_DEVICES"], dist.get_backend()]


def test_workers_have_both_gpus_and_the_chosen_order(gpus: None) -> None:
    assert launch(server_then_worker, gpu_ids="1,0") == [[False, [2.0] * 4, "1,0", "pretend_nccl"]] * 2
    assert launch(
        lambda: [os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()], gpu_ids="1", in_worker=True
    ) == [["1", 1]]
