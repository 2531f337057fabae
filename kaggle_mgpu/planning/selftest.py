"""Measure a machine: products of matrices, an all-reduce, the gradient of each strategy, a checkpoint.

    launch(selftest.all_reduce_bandwidth, nproc=2, in_worker=True)[0]["gigabytes_per_s"]

Every rank of a launch calls these functions and gets the same plain values (`save_and_load` runs on one rank alone).
`check` judges the values; `plan` uses the bandwidth.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import data
from ..checkpoints import checkpoint
from ..machine import devices
from ..parallel import Distributed, Replicated, Strategy, distributed
from ..training import StepParts, take_step

ALL_REDUCE = {"cuda": 64 << 20, "cpu": 8 << 20}
"""Bytes of each rank's tensor in the all-reduce that measures the bandwidth, by kind of device."""


def workers() -> dict[str, Any]:
    """Return the number of workers (count), their devices, their use of GPUs (on_gpu), and torch's version."""
    device = distributed.device()
    on_gpu = device.type == "cuda"
    names = distributed.gather(torch.cuda.get_device_name(device) if on_gpu else "the CPU")
    count = distributed.world_size()
    return {"count": count, "devices": names, "on_gpu": distributed.gather(on_gpu), "torch": torch.__version__}


def precision() -> dict[str, Any]:
    """Compare a matrix product in each precision of the device with float64.

    Returns:
        `precision` and `reason`: auto's choice; `differences`: the worst rank's relative difference by precision.
    """
    device = distributed.device()
    gpus = devices.gpus() if device.type == "cuda" else []
    chosen, reason = devices.precision("auto", gpus)
    kinds = {"fp32": torch.float32} | ({"fp16": torch.float16, "bf16": torch.bfloat16} if gpus else {})
    if chosen == "fp16":
        del kinds["bf16"]  # these GPUs only emulate bf16, and training refuses bf16 on them
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    differences = {}
    for name, kind in kinds.items():
        product = (a.to(device, kind) @ b.to(device, kind)).cpu().double()
        differences[name] = max(distributed.gather(_difference(product, a @ b)))
    return {"precision": chosen, "reason": reason, "differences": differences}


def all_reduce_bandwidth() -> dict[str, Any]:
    """Measure the bytes per second of an all-reduce between all ranks.

    `gigabytes_per_s` is the "bus bandwidth" of nccl-tests (doc/PERFORMANCE.md): bytes x 2 (n - 1) / n / seconds. In a
    ring this is the rate of each link, for any number of ranks n.

    Returns:
        `gigabytes_per_s` (0.0 with one rank), `backend`, `ranks`, `right` (whether the sums were correct) and `peers`:
        whether each GPU can read each other GPU's memory; None with one rank or fewer than two GPUs.
    """
    world, device = distributed.world_size(), distributed.device()
    nbytes = ALL_REDUCE[device.type]
    peers = None
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        others = [index for index in range(torch.cuda.device_count()) if index != device.index]
        mine = all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
        peers = not distributed.agree(not mine)
    if world == 1:
        return {"backend": "none", "ranks": 1, "gigabytes_per_s": 0.0, "right": True, "peers": None}
    numbers = torch.empty(nbytes // 4, device=device)
    correct, best = True, float("inf")
    for _ in range(5):  # the first round also sets up the connections; the fastest round counts
        numbers.fill_(distributed.rank() + 1.0)
        distributed.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        correct = correct and bool((numbers == world * (world + 1) / 2).all())
        distributed.alive()
    rate = min(distributed.gather(nbytes * 2 * (world - 1) / world / best / 1e9))
    backend = "nccl" if device.type == "cuda" else "gloo"
    wrong = distributed.agree(not correct)
    return {"backend": backend, "ranks": world, "gigabytes_per_s": rate, "right": not wrong, "peers": peers}


def gradients() -> dict[str, float]:
    """Return the relative difference of dp's and of ddp's gradient from a single device's, on the same batch.

    The keys are "dp" (not with one GPU), "ddp" (with several ranks) and "GPU against CPU" (with GPUs).

    Samples have 1 to 9 terms each and the ranks' micro-batches are uneven, so a mean of means, a forgotten rank or a
    wrong scale changes the gradient. The gradient is taken from a step of SGD; a step of Adam would hide the scale.
    """
    world, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(7)
    replicas = max(2, torch.cuda.device_count() if device.type == "cuda" else world)
    samples = 8 * replicas
    counts = torch.randint(1, 10, (samples,), generator=generator)
    batch = {"x": torch.randn(samples, 9, 16, generator=generator), "count": counts}
    terms = int(counts.sum())

    def gradient(kind: type[Strategy], micro_batches: list[Any], on: torch.device, replicas: int = 1) -> Tensor:
        strategy = kind(_loss, None, precision="fp32", device=on, num_replicas=replicas)
        if kind is not Distributed:
            strategy.world_size = strategy.loss_multiplier = 1  # the other ranks take no part
        torch.manual_seed(3)
        model = strategy.prepare(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        moved = [data.move(micro_batch, strategy.input_device) for micro_batch in micro_batches]
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        parts = StepParts(strategy=strategy, optimizer=sgd, lr_at=lambda step: 1.0)
        take_step(parts, data.Step(moved, [1.0] * len(moved), samples, lambda: terms), 0)
        return (before - nn.utils.parameters_to_vector(model.parameters()).detach()).cpu().double()

    def part(start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop] for name, tensor in batch.items()}

    # every rank computes the reference; then rank 0 tests dp alone, while the other ranks wait in the barrier
    found = {}
    reference = gradient(Strategy, [batch], cpu)
    own = gradient(Strategy, [batch], device) if device.type == "cuda" else reference
    if device.type == "cuda":
        found["GPU against CPU"] = _difference(own, reference)
    if rank == 0 and (world > 1 or device.type == "cpu"):
        count = torch.cuda.device_count() if device.type == "cuda" else replicas
        found["dp"] = _difference(gradient(Replicated, [part(0, 5), part(5, samples)], device, count), own)
    distributed.barrier()
    if world > 1:
        first, last = samples * rank // world, samples * (rank + 1) // world
        parts = [part(first, first + 3), part(first + 3, last)]
        found["ddp"] = _difference(gradient(Distributed, parts, device), own)
    everybody = distributed.gather(found)
    return {name: max(theirs.get(name, 0.0) for theirs in everybody) for name in everybody[0]}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x, count = batch["x"], batch["count"]
    real = torch.arange(x.shape[1], device=x.device) < count[:, None]
    loss: Tensor = (model(x).square().sum(-1) * real).sum()
    return loss


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of `expected`; inf for nan."""
    difference = float((found - expected).norm() / expected.norm())
    return float("inf") if math.isnan(difference) else difference


def save_and_load(folder: str) -> dict[str, str]:
    """Save and load 1 MiB in `folder`, as a run does; return `found`, a sentence, and `error`, "" if all went well."""
    began = time.monotonic()
    numbers = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    is_new = not Path(folder).exists()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".kaggle_mgpu-check-") as place:
            saved = checkpoint.Checkpoints(Path(place)).save(1, tensors={"model": {"w": numbers}}, state={}, facts={})
            if (damage := checkpoint.damage(saved)) is not None:
                return {"error": f"{saved} is damaged: {damage}", "found": ""}
            if not torch.equal(checkpoint.load(saved).tensors["model"]["w"], numbers):
                return {"error": f"the values loaded from {saved} differ from the saved values", "found": ""}
        if is_new:
            Path(folder).rmdir()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "found": ""}
    return {"error": "", "found": f"1 MiB saved and loaded in {time.monotonic() - began:.2f} s in {folder}"}
