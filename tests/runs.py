"""Runs that nobody trained: records by our own clock, for what shows and draws them."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kaggle_mgpu.progress import Progress

GIB = 2**30


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def by(clock: Any, patch: Any, *modules: Any) -> Any:
    """These modules see the clock's time: how long a step or a start takes is then what a test says."""
    for module in modules:
        patch.setattr(module, "time", SimpleNamespace(**{**vars(time), "monotonic": clock}))
    return clock


def make(folder: Any, **given: Any) -> Any:
    """A Progress that logs into `.said` by a clock in `.clock`."""
    said: list[str] = []
    clock = Clock()
    options = {"max_steps": 100, "main": True, "display": "lines", "log": said.append, "clock": clock, **given}
    progress: Any = Progress(folder, **options)
    progress.said, progress.clock = said, clock
    return progress


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.0 / (1 + step), "lr": 3e-4, **more}


START = {
    "kind": "start", "step": 0, "time": 0.0, "max_steps": 2000, "unit": "tokens", "world_size": 2, "epochs": 2.0,
    "device_line": "Tesla T4, Tesla T4, fp16", "micro_batch_size": 32, "time_left": 42000.0,
}  # fmt: skip


def gpu(index: int, busy: float = 97, warm: int | None = 71) -> dict[str, Any]:
    memory = {"memory_used": int((9.1 - index) * GIB), "memory_total": int(14.5625 * GIB)}
    return {"index": index, "utilization": busy, **memory, "temperature": warm}


def story(seconds_per_step: float = 0.4, upto: int = 1240, seed: int = 0) -> list[dict[str, Any]]:
    """A run of two GPUs with evaluations, saves, a resume at 500 and lost memory at 800."""
    chance, records = random.Random(seed), [dict(START)]
    for step in range(10, upto + 1, 10):
        time = step * seconds_per_step
        loss = 6 * math.exp(-step / 300) + 3.2 + chance.gauss(0, 0.06)
        spent = {"data": 0.2, "steps": 10 * seconds_per_step - 0.7, "communication": 0.5}
        measured = {"lr": 3e-4 * (1 - step / 2000), "grad_norm": 0.8, "tokens_per_s": 12000 + chance.gauss(0, 300)}
        record = {"kind": "train", "step": step, "epoch": step / 1000, "loss": loss, **measured}
        records.append({**record, "time": time, "spent": spent})
        if step % 50 == 0:
            busy = [gpu(0, 95 + chance.gauss(0, 2)), gpu(1, 64 + chance.gauss(0, 6), None)]
            records.append({"kind": "gpus", "step": step, "time": time, "gpus": busy})
        if step % 250 == 0:
            metrics = {"val_loss": loss + 0.2, "val_accuracy": 0.41}
            records.append({"kind": "eval", "step": step, "time": time, **metrics, "spent": {"evaluation": 9.0}})
            records.append({"kind": "save", "step": step, "seconds": 1.2, "time": time})
        if step == 500:
            records.append({**START, "step": 500, "time": time, "time_left": 30000.0})
        if step == 800:
            text = "out of memory with micro_batch_size 32 in step 801: 16 from here on"
            records.append({"kind": "note", "step": 800, "text": text})
    return records


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    """A run's folder with these records."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def free_port() -> int:
    """A port of this machine that is free, and that nobody is given who asks for any: those lie above 32768.

    One of the system's choice would be free now and might be taken until it is used, by another test's processes.
    """
    import os
    import socket

    for port in range(12000 + os.getpid() % 5000 * 2, 32000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


NO_KERNEL = "Kernel died before replying to kernel_info"
"""What is said where one of the ports that were chosen for a kernel was taken before the kernel had it: it has run
nothing yet, and may be started again."""


def papermill(start: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """Start a notebook, once more where there was no kernel."""
    for _ in range(3):
        done = start()
        if NO_KERNEL not in done.stderr:
            break
    return done


def executed(notebook: Any) -> Any:
    """A notebook by a real kernel, with its outputs; once more where there was no kernel."""
    import nbclient

    # iopub_timeout: what a cell has shown is otherwise given up 4 s after its last statement
    patience = {"timeout": 600, "startup_timeout": 600, "iopub_timeout": 600}
    for last in (False, False, True):
        try:
            return nbclient.NotebookClient(notebook, kernel_name="python3", **patience).execute()
        except RuntimeError as error:
            if last or NO_KERNEL not in str(error):
                raise
    raise AssertionError("not reached")
