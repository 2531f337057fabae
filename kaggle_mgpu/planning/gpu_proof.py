"""Prove on real GPUs, in under eight minutes, that training there is right and quick.

    make gpu-proof                                        # JSON lines in build/gpu_proof.jsonl, and a table
    from kaggle_mgpu.planning import gpu_proof; gpu_proof.run("gpu_proof.json")   # the same in a notebook cell

Each section runs in workers of its own with a time limit, and fails by itself. A section returns plain values with
`right`, its verdict. The sections for two GPUs are left out where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.data import Dataset, TensorDataset

from .. import progress
from ..checkpoints import Checkpoints, read_tensors
from ..config import TrainConfig
from ..errors import WorkerDiedError
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..recipes import sft, text_generation
from ..training import Parts, Task, build_parts, take_step, train
from .compare import compare_strategies

STEPS = 40
RELATIVE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.05}
"""Allowed relative difference of the weights from the CPU's after STEPS steps of SGD: rounding of 24, 8 and 11 bits."""
_BLOCKS = {1: (4, 256), 5: (12, 1024), 20: (24, 2048)}
"""Blocks and width of models that take about 1, 5 and 20 ms a step on a T4, by these milliseconds."""


class Blocks(nn.Module):
    """Residual blocks on 16 numbers, with BatchNorm at first if wanted."""

    def __init__(self, depth: int, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


@dataclasses.dataclass
class Sum(Task):
    """Learns the sum of 16 numbers; killed after a checkpoint if told so, short of memory beyond `most` samples."""

    depth: int = 3
    width: int = 64
    batch_norm: bool = False
    adamw: bool = False
    killed: bool = False
    most: int = 0

    def model(self) -> nn.Module:
        return Blocks(self.depth, self.width, self.batch_norm)

    def train_data(self) -> Dataset[Any]:
        x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True) / 4)

    def val_data(self) -> Dataset[Any]:
        return self.train_data()

    def count(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if self.most and model.training and len(x) > self.most:  # more than any GPU has
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        return (model(x).float() - y).square().sum()

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        if self.adamw:
            return super().optimizer(model, config)
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)

    def on_record(self, record: dict[str, Any]) -> None:
        if self.killed and record.get("kind") == "save":  # the first checkpoint is on the disk
            os.kill(os.getpid(), signal.SIGKILL)


def _config(folder: str, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        output_dir=folder, global_batch_size=32, max_steps=STEPS, log_every=20, save_every=10, eval_every="end",
        lr=1e-3, strategy="single", nproc=1, precision="fp32",
    )  # fmt: skip
    return base.replace(**changes)


def _train(folder: str, task: Task, **changes: Any) -> str:
    """Train in workers, and return the run's folder."""
    result = launch(train, _config(folder, **changes), task, in_worker=True)
    assert result.finished, result.reason
    return str(result.output_dir)


def _weights(folder: str) -> Tensor:
    named = read_tensors(Path(folder) / "model.safetensors")
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(named.items())])


def _difference(folder: str, other: str) -> float:
    """Return the distance of two runs' weights, relative to the second's length."""
    one, two = _weights(folder), _weights(other)
    return float((one - two).norm() / two.norm())


# --- sections -------------------------------------------------------------------------------------------------------


def facts(folder: str, quick: bool) -> dict[str, Any]:
    """List the machine's GPUs and versions."""
    report = str(devices.report())
    return {"right": bool(devices.gpus()), "torch": torch.__version__, "cuda": torch.version.cuda, "report": report}


def _in_worker() -> list[Any]:
    distributed.init()
    tensor = torch.ones(4, device=distributed.device())
    dist.all_reduce(tensor)  # with one rank too
    return [torch.cuda._is_in_bad_fork(), tensor.tolist(), distributed.sum(3)]


def worker(folder: str, quick: bool) -> dict[str, Any]:
    """Use CUDA in this process, then reduce over NCCL in workers: in a single rank, and in a rank for each GPU."""
    before = torch.cuda.is_available()
    if before:
        torch.ones(1, device="cuda")
    counts = sorted({1, len(devices.gpus())})
    found = {str(n): launch(_in_worker, nproc=n, in_worker=True) for n in counts}
    right = all(found[str(n)] == [[False, [float(n)] * 4, 3 * n]] * n for n in counts)
    return {"right": right and (before or quick), "cuda_before": before, "found": found}


def precisions(folder: str, quick: bool) -> dict[str, Any]:
    """Train in each precision twice, and compare with the CPU."""
    with _hidden_gpus():
        on_cpu = _train(f"{folder}/cpu", Sum())
    kinds = [kind for kind in RELATIVE if kind != "bf16" or devices.precision("auto", devices.gpus())[0] == "bf16"]
    found: dict[str, Any] = {}
    for kind in kinds[:1] if quick else kinds:
        first, again = (_train(f"{folder}/{kind}{i}", Sum(), precision=kind) for i in (1, 2))
        found[kind] = {"from the CPU's": _difference(first, on_cpu), "from its repetition": _difference(again, first)}
    right = all(
        off["from the CPU's"] < RELATIVE[kind] and not off["from its repetition"] for kind, off in found.items()
    )
    return {"right": right, **found}


def resumed(folder: str, quick: bool) -> dict[str, Any]:
    """Kill a run with SIGKILL, resume it, and compare byte for byte with a run that nobody disturbed."""
    undisturbed = _train(f"{folder}/undisturbed", Sum(adamw=True))
    died = False
    try:
        _train(f"{folder}/killed", Sum(adamw=True, killed=True))
    except WorkerDiedError:
        died = True
    after = _train(f"{folder}/killed", Sum(adamw=True))
    starts = [record["step"] for record in progress.read(after) if record["kind"] == "start"]
    right = died and starts[-1] > 0 and torch.equal(_weights(after), _weights(undisturbed))
    return {"right": right, "starts": starts, "off": _difference(after, undisturbed)}


def batch_norm(folder: str, quick: bool) -> dict[str, Any]:
    """Train with BatchNorm, averaged weights and an automatic micro-batch."""
    task = Sum(batch_norm=True, adamw=True)
    result = launch(train, _config(folder, ema_decay=0.9, micro_batch_size="auto"), task, in_worker=True)
    return {"right": bool(result.finished and result.metrics["loss"] < 10), **result.metrics}


def out_of_memory(folder: str, quick: bool) -> dict[str, Any]:
    """Run out of the GPU's memory for real, and finish with smaller micro-batches and the same weights."""
    short, enough = _train(f"{folder}/short", Sum(most=8)), _train(f"{folder}/enough", Sum())
    return {"right": _difference(short, enough) < RELATIVE["fp32"], "off": _difference(short, enough)}


def compiled(folder: str, quick: bool) -> dict[str, Any]:
    """Train a compiled model."""
    off = _difference(_train(f"{folder}/c", Sum(), compile=True), _train(f"{folder}/plain", Sum()))
    return {"right": off < 1e-3, "off": off}


def _waits(folder: str) -> dict[str, int]:
    """Count the waits of the host in five steps by torch's own debug mode, for optimizers and precisions."""
    found = {}
    for adamw in (True, False):
        for precision in ("fp32", "fp16"):
            parts = build_parts(_config(folder, precision=precision), Sum(batch_norm=True, adamw=adamw))
            batches = parts.batches(0)
            for step in range(3):
                take_step(parts, next(batches), step)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                for step in range(3, 8):
                    take_step(parts, next(batches), step)
                torch.cuda.set_sync_debug_mode("default")
            name = f"{'AdamW' if adamw else 'SGD'} {precision}"
            found[name] = sum("synchronizing" in str(warning.message) for warning in told)
    return found


def host_waits(folder: str, quick: bool) -> dict[str, Any]:
    """Count the waits of the host in five steps."""
    found = launch(_waits, folder, nproc=1, in_worker=True)[0]
    return {"right": not any(found.values()), **found}


def _kernels(step: Callable[[], None]) -> int | None:
    """Count the kernels of a step; None without torch's profiler of CUDA."""
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return None
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
        for event in found.events() or ()
    )


def _timed(loops: dict[str, Callable[[], None]], steps: int) -> dict[str, dict[str, Any]]:
    """Time the steps of loops in turns; return each loop's best ms a step by clock and by events, and its kernels."""
    found: dict[str, dict[str, Any]] = {name: {"ms": math.inf, "gpu_ms": math.inf} for name in loops}
    for turn in range(4):
        for name, step in loops.items():
            step()
            torch.cuda.synchronize()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            began = time.perf_counter()
            events[0].record()
            for _ in range(steps):
                step()
            events[1].record()
            torch.cuda.synchronize()
            best, seconds = found[name], time.perf_counter() - began
            best["ms"] = min(best["ms"], seconds / steps * 1e3)
            best["gpu_ms"] = min(best["gpu_ms"], events[0].elapsed_time(events[1]) / steps)
            if turn == 3:
                best["kernels"] = _kernels(step)
    return found


def _stepper(parts: Parts) -> Callable[[], None]:
    """Return a function for the kit's next step."""
    batches = parts.batches(0)

    def step() -> None:
        take_step(parts, next(batches), 1)

    return step


def _speed(folder: str, milliseconds: int, steps: int) -> dict[str, Any]:
    depth, width = _BLOCKS[milliseconds]
    task = Sum(depth=depth, width=width, adamw=True)
    parts = build_parts(_config(folder, global_batch_size=1024), task)
    model = task.model().to(parts.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, y = (tensor[:1024].to(parts.device) for tensor in task.train_data().tensors)  # type: ignore[attr-defined]

    def by_hand() -> None:
        ((model(x) - y).square().sum() / 1024).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _timed({"kit": _stepper(parts), "by_hand": by_hand}, steps)


def overhead(folder: str, quick: bool) -> dict[str, Any]:
    """Compare the kit's step with a hand-written loop at about 1, 5 and 20 ms a step; expected 1.01 at 5 ms."""
    found: dict[str, Any] = {}
    for size in (1,) if quick else _BLOCKS:
        times = launch(_speed, folder, size, 2 if quick else 40, nproc=1, in_worker=True)[0]
        found[f"{size} ms"] = {**times, "ratio": times["kit"]["ms"] / times["by_hand"]["ms"]}
    return {"right": quick or found["5 ms"]["ratio"] <= 1.01, **found}


def _plain_gpt(task: text_generation.TextGeneration, device: torch.device, precision: str) -> Callable[[], None]:
    """Return a function for a plain loop's next step, in the form of nanoGPT's train.py, with the recipe's model."""
    config, path = task.config, Path(task.corpus.folder) / "train.bin"
    model = task.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    size, count = config.block_size, config.global_batch_size or 1
    taken = 0

    def batch() -> list[Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - size, (count,)).tolist()
        pairs = [
            torch.stack([torch.from_numpy(data[i + at : i + at + size].astype(np.int64)) for i in starts])
            for at in (0, 1)
        ]
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in pairs]

    x, y = batch()

    def step() -> None:
        nonlocal x, y, taken
        taken += 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * min(1.0, taken / 1000)))
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        x, y = batch()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpt(folder: str, quick: bool) -> dict[str, Any]:
    text = Path(folder, "text.txt")
    text.write_text("\n".join(f"Line {i} of a text: {i * i} is the square of {i}." for i in range(20000)))
    small: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "global_batch_size": 4}
    config = text_generation.Config(
        output_dir=folder, data_path=str(text), tokenizer="byte", strategy="single", **(small if quick else {})
    )
    task = text_generation.TextGeneration(config)
    parts = build_parts(config, task)
    precision = parts.strategy.precision
    loops = {"kit": _stepper(parts), "plain": _plain_gpt(task, parts.device, precision)}
    times = _timed(loops, 2 if quick else 20)
    tokens = parts.plan.global_batch_size * config.block_size
    return {
        "precision": precision, **times, **{f"{n}_tokens_per_s": tokens / times[n]["ms"] * 1e3 for n in times},
    }  # fmt: skip


def gpt(folder: str, quick: bool) -> dict[str, Any]:
    """Compare the tokens per second of text generation with a plain loop of the same model, in nanoGPT's form."""
    found = launch(_gpt, folder, quick, nproc=1, in_worker=True)[0]
    return {"right": quick or found["kit"]["ms"] <= 1.05 * found["plain"]["ms"], **found}


def _adapters(folder: str, tuning: Any, quick: bool) -> dict[str, Any]:
    base, rows = Path(folder, "base"), Path(folder, "rows.jsonl")
    if not rows.exists():
        sizes: dict[str, int] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
        sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
        questions = [{"question": f"What is {i} times {i}?", "answer": f"It is {i * i}."} for i in range(1000)]
        rows.write_text("\n".join(map(json.dumps, questions)))
        sft.models.make_tiny(base, [row["answer"] for row in questions], 0, **({} if quick else sizes))
    config = sft.Config(
        output_dir=f"{folder}/{tuning}", model=str(base), data_path=str(rows), tuning=tuning, strategy="single",
        lr=1e-3, max_length=64 if quick else 512, global_batch_size=2 if quick else 8, max_steps=1000, warmup_steps=0,
    )  # fmt: skip
    parts = build_parts(config, sft.Finetune(config))
    torch.cuda.reset_peak_memory_stats()
    first = next(parts.batches(0))
    losses = [float(take_step(parts, first, step).losses[0]) for step in range(5)]
    times = _timed({"step": _stepper(parts)}, 1 if quick else 10)["step"]
    return {"losses": losses, "memory_mib": torch.cuda.max_memory_allocated() / 2**20, **times}


def adapters(folder: str, quick: bool) -> dict[str, Any]:
    """Take steps of fine-tuning with adapters on 16-bit and on 4-bit weights (qlora)."""
    missing = [name for name in ("transformers", "peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        return {"right": True, "left_out": f"not installed: {', '.join(missing)}"}
    # bitsandbytes brings kernels of its own for CUDA, so a dry run without a GPU stays with lora
    names = ("lora",) if quick else ("lora", "qlora")
    found = {name: launch(_adapters, folder, name, quick, nproc=1, in_worker=True)[0] for name in names}
    return {"right": all(row["losses"][-1] < row["losses"][0] for row in found.values()), **found}


def _save(folder: str, quick: bool) -> dict[str, Any]:
    depth, width = (1, 16) if quick else (12, 2048)
    parts = build_parts(_config(folder, global_batch_size=64), Sum(depth=depth, width=width, adamw=True))
    step, ms, stalls = _stepper(parts), [], []
    with Checkpoints(Path(folder, "checkpoints")) as checkpoints:
        for number in range(3):  # the first one also allocates page-locked memory
            began = time.perf_counter()
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            ms.append((time.perf_counter() - began) * 100)  # the first without a save beside it
            began = time.perf_counter()
            held = parts.strategy.held_state(parts.optimizer)
            checkpoints.begin(number, tensors={"model": held.pop("model")}, state=held, facts={})
            stalls.append(time.perf_counter() - began)
        written = checkpoints.wait()
    sizes = [file.stat().st_size for file in Path(folder, "checkpoints", "step-00000002").iterdir()]
    right = all(saved.path is not None for saved in written)
    return {"right": right, "bytes": sum(sizes), "stall_s": stalls, "step_ms": ms}


def save(folder: str, quick: bool) -> dict[str, Any]:
    """Save 600 MB three times: the seconds for which training stands still, and ms a step before and during saves."""
    found: dict[str, Any] = launch(_save, folder, quick, nproc=1, in_worker=True)[0]
    return {**found, "right": found["right"] and (quick or found["bytes"] > 5.5e8)}


def two_ranks(folder: str, quick: bool) -> dict[str, Any]:
    """Train with two ranks on one GPU over gloo, and compare each strategy with one process."""
    one = _train(f"{folder}/one", Sum())
    found: dict[str, Any] = {}
    cases: list[dict[str, Any]] = [
        {"strategy": "ddp"}, {"strategy": "ddp", "gradient_accumulation_steps": 4},
        {"strategy": "ddp", "precision": "fp16"}, {"strategy": "fsdp"}, {"strategy": "fsdp", "cpu_offload": True},
    ]  # fmt: skip
    for number, case in enumerate(cases[:1] if quick else cases):
        name = " ".join(f"{key}={value}" for key, value in case.items())
        from_one = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        variables = {**os.environ, **from_one, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "0"}
        variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        variables["MASTER_PORT"] = str(20000 + os.getpid() % 10000)
        command = [sys.executable, "-m", "kaggle_mgpu.planning.gpu_proof", f"{folder}/two{number}", json.dumps(case)]
        ranks = [
            subprocess.Popen(command, env={**variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL)
            for rank in range(2)
        ]  # fmt: skip
        try:
            told = [rank.communicate(timeout=600 if quick else 60)[1] for rank in ranks]
            failed = next((text for rank, text in zip(ranks, told, strict=True) if rank.returncode), "")
            found[name] = failed[-300:] or _difference(f"{folder}/two{number}", one)
        except subprocess.TimeoutExpired:
            found[name] = "no end in time"
        finally:
            for rank in ranks:
                rank.kill()
    limits = [RELATIVE[case.get("precision", "fp32")] for case in cases]
    right = all(isinstance(off, float) and off < limit for off, limit in zip(found.values(), limits, strict=False))
    return {"right": right, **found}


def both_gpus(folder: str, quick: bool) -> dict[str, Any]:
    """Train on all GPUs over NCCL under ddp, dp and fsdp, against one; then measure how much faster they are."""
    one, count = _train(f"{folder}/one", Sum()), len(devices.gpus())
    names = ("ddp",) if quick else ("ddp", "dp", "fsdp")
    off = {n: _difference(_train(f"{folder}/{n}", Sum(), strategy=n, nproc=count), one) for n in names}
    task, settings = (
        Sum(depth=3 if quick else 12, width=64 if quick else 512, adamw=True),
        _config(folder, global_batch_size=64 if quick else 1024, nproc="auto"),
    )
    rows = [dataclasses.asdict(row) for row in compare_strategies(settings, task, steps=1 if quick else 10)]
    return {"right": max(off.values()) < RELATIVE["fp32"], "off": off, "peer_access": _peers(), "speed": rows}


def gpu_tests(folder: str, quick: bool) -> dict[str, Any]:
    """Run the tests marked `gpu`, where a checkout and pytest are at hand."""
    root = Path(__file__).parents[2]
    if not (root / "tests").is_dir() or importlib.util.find_spec("pytest") is None:
        return {"right": True, "left_out": "no checkout with tests, or no pytest"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["tests/training/test_on_gpus.py"] if quick else []
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {"right": done.returncode == 0 and " passed" in done.stdout, "tail": done.stdout[-300:]}


def _peers() -> bool:
    return bool(launch(torch.cuda.can_device_access_peer, 0, 1, nproc=1, in_worker=True)[0])


SECTIONS: dict[Callable[[str, bool], dict[str, Any]], int] = {
    facts: 20, worker: 40, precisions: 80, resumed: 40, batch_norm: 40, host_waits: 40, out_of_memory: 40, overhead: 60,
    gpt: 60, save: 60, two_ranks: 120, both_gpus: 120, compiled: 90, adapters: 90, gpu_tests: 120,
}  # fmt: skip
"""The sections with their limits in seconds."""
LIMIT = 480
"""Seconds for all sections together; sections that have not begun by then are left out."""


@contextlib.contextmanager
def _hidden_gpus() -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(path: str | os.PathLike[str], only: list[str] | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Run the sections, write a JSON line for each to `path`, and print a table.

    Args:
        only: names of the sections to run. Default: all.
        quick: take a few steps of small models, to try this module itself; the speeds then say nothing.

    Returns:
        The lines: `section`, `right`, `seconds`, with the section's values or its `error`.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not devices.gpus():
        raise RuntimeError(f"gpu_proof needs a GPU: {devices.report().reason}. Choose one in Settings > Accelerator.")
    began, lines, patience = time.monotonic(), [], 10 if quick else 1  # other programs may keep the CPU busy
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for section, limit in SECTIONS.items():
            name = section.__name__
            if (only is not None and name not in only) or (section is both_gpus and len(devices.gpus()) < 2):
                continue
            started = time.monotonic()
            line: dict[str, Any] = {"section": name, "right": False}
            left = LIMIT * patience - int(started - began)
            if left < 1:
                line["error"] = "left out: no time"
            else:
                with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-proof-") as folder:
                    try:
                        with _at_most(min(limit * patience, left)), contextlib.redirect_stdout(sys.stderr):
                            line |= section(folder, quick)
                    except Exception as error:
                        line["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            line["seconds"] = round(time.monotonic() - started, 1)
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                f"{'right' if line['right'] else 'WRONG':6} {name:14} {line['seconds']:6.1f} s  {_told(line)}",
                flush=True,
            )
    return lines


def _told(line: dict[str, Any]) -> str:
    values = {key: value for key, value in line.items() if key not in ("section", "right", "seconds", "report")}
    return json.dumps(values)[:200]


if __name__ == "__main__":  # a rank of two_ranks
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:gloo")
    train(_config(sys.argv[1], **{"nproc": "auto", **json.loads(sys.argv[2])}), Sum())
    os._exit(0)
