"""Prove on real GPUs, in under eight minutes, that training there is right and quick.

    make gpu-proof                                        # JSON lines in build/gpu_proof.jsonl, and a table
    from kaggle_mgpu.planning import gpu_proof; gpu_proof.run("gpu_proof.json")   # the same in a notebook cell

Each section runs in workers of its own with a time limit, and fails by itself. A section returns plain values with
`right`, its verdict. The sections for two GPUs are left out where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ..checkpoints import read_tensors
from ..config import TrainConfig
from ..errors import WorkerDiedError
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..training import Task, build_parts, take_step, train
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
    """Learns the sum of 16 numbers; killed at step 20 if told so, and short of memory beyond `most` samples."""

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
        if self.killed and record.get("kind") == "train" and record["step"] == 20:
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
    if distributed.world_size() > 1:
        dist.all_reduce(tensor)
    return [torch.cuda._is_in_bad_fork(), tensor.tolist(), distributed.sum(3)]


def worker(folder: str, quick: bool) -> dict[str, Any]:
    """Start a worker after CUDA, if this process has used it, and reduce over all GPUs."""
    count = len(devices.gpus())
    found = launch(_in_worker, nproc=count, in_worker=True)
    return {"right": found == [[False, [float(count)] * 4, 3 * count]] * count, "found": found}


def precisions(folder: str, quick: bool) -> dict[str, Any]:
    """Train in each precision twice, and compare with the CPU."""
    with _hidden_gpus():
        on_cpu = _train(f"{folder}/cpu", Sum())
    kinds = [kind for kind in RELATIVE if kind != "bf16" or devices.precision("auto", devices.gpus())[0] == "bf16"]
    found: dict[str, Any] = {}
    for kind in kinds[:1] if quick else kinds:
        first, again = (_train(f"{folder}/{kind}{i}", Sum(), precision=kind) for i in (1, 2))
        found[kind] = {"from the CPU's": _difference(first, on_cpu), "from its repetition": _difference(again, first)}
    right = all(found[kind]["from the CPU's"] < RELATIVE[kind] for kind in found)
    return {"right": right, **found}


def resumed(folder: str, quick: bool) -> dict[str, Any]:
    """Kill a run with SIGKILL, resume it, and compare byte for byte with a run that nobody disturbed."""
    undisturbed = _train(f"{folder}/undisturbed", Sum(adamw=True))
    with contextlib.suppress(WorkerDiedError):
        _train(f"{folder}/killed", Sum(adamw=True, killed=True))
    after = _train(f"{folder}/killed", Sum(adamw=True))
    return {"right": torch.equal(_weights(after), _weights(undisturbed)), "off": _difference(after, undisturbed)}


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


def _speed(folder: str, milliseconds: int, steps: int) -> list[float]:
    """Time steps of the kit and of a loop by hand, in turns; return the best ms a step of each."""
    depth, width = _BLOCKS[milliseconds]
    task = Sum(depth=depth, width=width, adamw=True)
    parts = build_parts(_config(folder, global_batch_size=1024), task)
    batches = parts.batches(0)
    model = task.model().to(parts.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, y = (tensor[:1024].to(parts.device) for tensor in task.train_data().tensors)  # type: ignore[attr-defined]

    def kit() -> None:
        take_step(parts, next(batches), 1)

    def by_hand() -> None:
        ((model(x) - y).square().sum() / 1024).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    best = []
    for step in (kit, by_hand):
        times = []
        for _ in range(4):
            step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / steps * 1e3)
        best.append(min(times))
    return best


def overhead(folder: str, quick: bool) -> dict[str, Any]:
    """Compare the kit's step with a hand-written loop at about 1, 5 and 20 ms a step; expected 1.01 at 5 ms."""
    found = {}
    for size in (1,) if quick else _BLOCKS:
        kit, by_hand = launch(_speed, folder, size, 2 if quick else 40, nproc=1, in_worker=True)[0]
        found[f"{size} ms"] = {"kit_ms": kit, "by_hand_ms": by_hand, "ratio": kit / by_hand}
    return {"right": quick or found["5 ms"]["ratio"] <= 1.01, **found}


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
            told = [rank.communicate(timeout=60)[1] for rank in ranks]
            failed = next((text for rank, text in zip(ranks, told, strict=True) if rank.returncode), "")
            found[name] = failed[-300:] or _difference(f"{folder}/two{number}", one)
        except subprocess.TimeoutExpired:
            found[name] = "no end after 60 s"
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


def _peers() -> bool:
    return bool(launch(torch.cuda.can_device_access_peer, 0, 1, nproc=1, in_worker=True)[0])


SECTIONS: dict[Callable[[str, bool], dict[str, Any]], int] = {
    facts: 20, worker: 40, precisions: 80, resumed: 40, batch_norm: 40, host_waits: 40, out_of_memory: 40, overhead: 60,
    two_ranks: 120, compiled: 90, both_gpus: 120,
}  # fmt: skip
"""The sections with their limits in seconds."""
LIMIT = 480.0
"""Seconds for all sections; what has not begun by then is left out."""


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
    began, lines = time.monotonic(), []
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for section, limit in SECTIONS.items():
            name = section.__name__
            if (only is not None and name not in only) or (section is both_gpus and len(devices.gpus()) < 2):
                continue
            started = time.monotonic()
            line: dict[str, Any] = {"section": name, "right": False}
            if started - began > LIMIT:
                line["error"] = "left out: no time"
            else:
                with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-proof-") as folder:
                    try:
                        with _at_most(limit), contextlib.redirect_stdout(sys.stderr):
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
