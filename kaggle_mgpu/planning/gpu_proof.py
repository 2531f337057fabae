"""Prove on real GPUs, in under eight minutes, that training gives the right weights and is fast.

    make gpu-proof                                        # JSON lines in build/gpu_proof.jsonl, and a table
    from kaggle_mgpu.planning import gpu_proof; gpu_proof.run("gpu_proof.json")   # the same in a notebook cell

Each section trains in new workers and has a time limit. If a section fails, the others still run. A section returns a
dict of JSON values with `right`: whether the section passed. `both_gpus` is left out on a machine with one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
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

from .. import env, progress
from ..errors import WorkerDiedError
from ..launching import launch
from ..machine import devices
from ..parallel import distributed
from ..training import build_parts, take_step, train
from .compare import compare_strategies
from .gpu_speed import adapters, gpt, overhead, save
from .gpu_task import RELATIVE, Sum, config_in, difference, train_in, weights

# --- sections -------------------------------------------------------------------------------------------------------


def facts(folder: str, quick: bool) -> dict[str, Any]:
    """List the machine's GPUs and the versions of torch and CUDA."""
    report = str(devices.report())
    return {"right": bool(devices.gpus()), "torch": torch.__version__, "cuda": torch.version.cuda, "report": report}


def _in_worker() -> list[Any]:
    distributed.init()
    tensor = torch.ones(4, device=distributed.device())
    dist.all_reduce(tensor)  # NCCL must also work with a single rank
    return [torch.cuda._is_in_bad_fork(), tensor.tolist(), distributed.sum(3)]


def worker(folder: str, quick: bool) -> dict[str, Any]:
    """Use CUDA in this process, then all-reduce over NCCL: in a single worker, and in a worker for each GPU."""
    before = torch.cuda.is_available()
    if before:
        torch.ones(1, device="cuda")
    counts = sorted({1, len(devices.gpus())})
    found = {str(n): launch(_in_worker, nproc=n, in_worker=True) for n in counts}
    passed = all(found[str(n)] == [[False, [float(n)] * 4, 3 * n]] * n for n in counts)
    return {"right": passed and (before or quick), "cuda_before": before, "found": found}


def precisions(folder: str, quick: bool) -> dict[str, Any]:
    """Train twice in each precision: the weights must be close to the CPU's, and the same in both runs."""
    with env.variables({"CUDA_VISIBLE_DEVICES": ""}):
        on_cpu = train_in(f"{folder}/cpu", Sum())
    kinds = [kind for kind in RELATIVE if kind != "bf16" or devices.precision("auto", devices.gpus())[0] == "bf16"]
    found: dict[str, Any] = {}
    for kind in kinds[:1] if quick else kinds:
        first, again = (train_in(f"{folder}/{kind}{i}", Sum(), precision=kind) for i in (1, 2))
        found[kind] = {"from the CPU's": difference(first, on_cpu), "from its repetition": difference(again, first)}
    passed = all(
        off["from the CPU's"] < RELATIVE[kind] and not off["from its repetition"] for kind, off in found.items()
    )
    return {"right": passed, **found}


def resumed(folder: str, quick: bool) -> dict[str, Any]:
    """Kill a run with SIGKILL and resume the run; the weights must equal an uninterrupted run's exactly."""
    undisturbed = train_in(f"{folder}/undisturbed", Sum(adamw=True))
    died = False
    try:
        train_in(f"{folder}/killed", Sum(adamw=True, killed=True))
    except WorkerDiedError:
        died = True
    after = train_in(f"{folder}/killed", Sum(adamw=True))
    starts = [record["step"] for record in progress.read(after) if record["kind"] == "start"]
    passed = died and starts[-1] > 0 and torch.equal(weights(after), weights(undisturbed))
    return {"right": passed, "starts": starts, "off": difference(after, undisturbed)}


def batch_norm(folder: str, quick: bool) -> dict[str, Any]:
    """Train with BatchNorm, an EMA of the weights and an automatic micro-batch; the final loss must be below 10."""
    task = Sum(batch_norm=True, adamw=True)
    result = launch(train, config_in(folder, ema_decay=0.9, micro_batch_size="auto"), task, in_worker=True)
    return {"right": bool(result.finished and result.metrics["loss"] < 10), **result.metrics}


def out_of_memory(folder: str, quick: bool) -> dict[str, Any]:
    """Run out of GPU memory: training must finish with smaller micro-batches and nearly the same weights."""
    short, enough = train_in(f"{folder}/short", Sum(max_samples=8)), train_in(f"{folder}/enough", Sum())
    return {"right": difference(short, enough) < RELATIVE["fp32"], "off": difference(short, enough)}


def compiled(folder: str, quick: bool) -> dict[str, Any]:
    """Train with torch.compile: the weights may differ by 0.1 % from an uncompiled run's."""
    off = difference(train_in(f"{folder}/c", Sum(), compile=True), train_in(f"{folder}/plain", Sum()))
    return {"right": off < 1e-3, "off": off}


def _waits(folder: str) -> dict[str, int]:
    """Count the host's waits for the GPU in five steps of each optimizer and precision (set_sync_debug_mode)."""
    found = {}
    for adamw in (True, False):
        for precision in ("fp32", "fp16"):
            parts = build_parts(config_in(folder, precision=precision), Sum(batch_norm=True, adamw=adamw))
            batches = parts.batches(0)
            for step in range(3):
                take_step(parts, next(batches), step)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                for step in range(3, 8):
                    take_step(parts, next(batches), step)
                torch.cuda.set_sync_debug_mode("default")
            name = f"{'AdamW' if adamw else 'SGD'} {precision}"
            found[name] = sum("synchronizing" in str(warning.message) for warning in caught)
    return found


def host_waits(folder: str, quick: bool) -> dict[str, Any]:
    """Count the host's waits for the GPU in five steps; there should be none."""
    found = launch(_waits, folder, nproc=1, in_worker=True)[0]
    return {"right": not any(found.values()), **found}


def two_ranks(folder: str, quick: bool) -> dict[str, Any]:
    """Train with two ranks on one GPU over gloo: under each strategy, the weights must match a single process's."""
    one = train_in(f"{folder}/one", Sum())
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
        command = [sys.executable, "-m", "kaggle_mgpu.planning.gpu_task", f"{folder}/two{number}", json.dumps(case)]
        ranks = [
            subprocess.Popen(command, env={**variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL)
            for rank in range(2)
        ]  # fmt: skip
        try:
            errors = [rank.communicate(timeout=600 if quick else 60)[1] for rank in ranks]
            failed = next((text for rank, text in zip(ranks, errors, strict=True) if rank.returncode), "")
            found[name] = failed[-300:] or difference(f"{folder}/two{number}", one)
        except subprocess.TimeoutExpired:
            found[name] = "did not end in time"
        finally:
            for rank in ranks:
                rank.kill()
    limits = [RELATIVE[case.get("precision", "fp32")] for case in cases]
    passed = all(isinstance(off, float) and off < limit for off, limit in zip(found.values(), limits, strict=False))
    return {"right": passed, **found}


def both_gpus(folder: str, quick: bool) -> dict[str, Any]:
    """Train on all GPUs under ddp, dp and fsdp: compare the weights with one GPU's; then measure the speed-up."""
    one, count = train_in(f"{folder}/one", Sum()), len(devices.gpus())
    names = ("ddp",) if quick else ("ddp", "dp", "fsdp")
    off = {n: difference(train_in(f"{folder}/{n}", Sum(), strategy=n, nproc=count), one) for n in names}
    task, settings = (
        Sum(depth=3 if quick else 12, width=64 if quick else 512, adamw=True),
        config_in(folder, global_batch_size=64 if quick else 1024, nproc="auto"),
    )
    rows = [dataclasses.asdict(row) for row in compare_strategies(settings, task, steps=1 if quick else 10)]
    return {"right": max(off.values()) < RELATIVE["fp32"], "off": off, "peer_access": _peers(), "speed": rows}


def gpu_tests(folder: str, quick: bool) -> dict[str, Any]:
    """Run the tests marked `gpu`, where a checkout and pytest are at hand."""
    root = Path(__file__).parents[2]
    if not (root / "tests").is_dir() or importlib.util.find_spec("pytest") is None:
        return {"right": True, "left_out": "needs a checkout of the repository, and pytest"}
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
"""The sections, each with its time limit in seconds."""
LIMIT = 480
"""Time limit of all sections together, in seconds; sections that have not begun by then are left out."""


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the `with` block after `seconds` seconds; for the main thread only."""

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
        quick: a test of this module: few steps of small models, ten times the time limits, and no judged speeds.

    Returns:
        The lines as dicts: `section` (its name), `right`, `seconds`, and the section's values or its `error`.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not devices.gpus():
        raise RuntimeError(f"gpu_proof needs a GPU: {devices.report().reason}. Choose one in Settings > Accelerator.")
    began, lines, limit_factor = time.monotonic(), [], 10 if quick else 1  # quick: a test's machine may be busy
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for section, limit in SECTIONS.items():
            name = section.__name__
            if (only is not None and name not in only) or (section is both_gpus and len(devices.gpus()) < 2):
                continue
            started = time.monotonic()
            line: dict[str, Any] = {"section": name, "right": False}
            left = LIMIT * limit_factor - int(started - began)
            if left < 1:
                line["error"] = "left out: the time limit of all sections has passed"
            else:
                with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-proof-") as folder:
                    try:
                        with _at_most(min(limit * limit_factor, left)), contextlib.redirect_stdout(sys.stderr):
                            line |= section(folder, quick)
                    except Exception as error:
                        line["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            line["seconds"] = round(time.monotonic() - started, 1)
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                f"{'right' if line['right'] else 'WRONG':6} {name:14} {line['seconds']:6.1f} s  {_shortened(line)}",
                flush=True,
            )
    return lines


def _shortened(line: dict[str, Any]) -> str:
    values = {key: value for key, value in line.items() if key not in ("section", "right", "seconds", "report")}
    return json.dumps(values)[:200]
