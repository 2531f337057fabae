"""The sections of `gpu_proof` that measure speed: training beside hand-written loops, LoRA, and saving.

Each section takes a folder to write to and `quick` (small models, few steps, speeds not judged), and returns its
measurements as JSON values, with `right`: whether the section passed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from ..checkpoints import Checkpoints
from ..launching import launch
from ..recipes import sft, text_generation
from ..training import Parts, build_parts, take_step
from .gpu_task import Sum, config_in

_BLOCKS = {1: (4, 256), 5: (12, 1024), 20: (24, 2048)}
"""The models of `overhead`: {estimated milliseconds per step on a T4: (number of blocks, width)}."""


def _kernels(step: Callable[[], None]) -> int | None:
    """Return the number of CUDA kernels in a step, or None if torch's profiler cannot record CUDA."""
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
    """Time training loops in turn, in four rounds of `steps` steps each.

    Return for each loop the milliseconds per step in the fastest round, by wall clock (`ms`) and by CUDA events
    (`gpu_ms`), and the number of CUDA kernels in a step (`kernels`).
    """
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
    """Return a function for training with kaggle_mgpu; each call takes the next step."""
    batches = parts.batches(0)

    def step() -> None:
        take_step(parts, next(batches), 1)

    return step


def _speed(folder: str, milliseconds: int, steps: int) -> dict[str, Any]:
    depth, width = _BLOCKS[milliseconds]
    task = Sum(depth=depth, width=width, adamw=True)
    parts = build_parts(config_in(folder, global_batch_size=1024), task)
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
    """Compare the time of a training step in kaggle_mgpu and in a hand-written loop.

    A step of the three models takes about 1, 5 and 20 ms on a T4. For the model of 5 ms, kaggle_mgpu may take at most
    1.01 times as long as the hand-written loop.
    """
    found: dict[str, Any] = {}
    for size in (1,) if quick else _BLOCKS:
        times = launch(_speed, folder, size, 2 if quick else 40, nproc=1, in_worker=True)[0]
        found[f"{size} ms"] = {**times, "ratio": times["kit"]["ms"] / times["by_hand"]["ms"]}
    return {"right": quick or found["5 ms"]["ratio"] <= 1.01, **found}


def _plain_gpt(task: text_generation.TextGeneration, device: torch.device, precision: str) -> Callable[[], None]:
    """Return a function that takes a step on the task's model at each call, like nanoGPT's train.py."""
    config, path = task.config, Path(task.corpus.folder) / "train.bin"
    model = task.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    size, count = config.block_size, int(config.global_batch_size or 1)
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
    """Compare the speed of the recipe text_generation with a loop like nanoGPT's train.py.

    Both train the same model; a step of kaggle_mgpu may take at most 1.05 times as long.
    """
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
    """Fine-tune with LoRA on 16-bit weights and on 4-bit weights (qlora); five steps on a batch must lower the loss.

    Without transformers, peft or bitsandbytes the section is left out.
    """
    missing = [name for name in ("transformers", "peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        return {"right": True, "left_out": f"not installed: {', '.join(missing)}"}
    # qlora needs a real GPU for bitsandbytes' kernels; `quick` also runs in tests that imitate GPUs
    names = ("lora",) if quick else ("lora", "qlora")
    found = {name: launch(_adapters, folder, name, quick, nproc=1, in_worker=True)[0] for name in names}
    return {"right": all(row["losses"][-1] < row["losses"][0] for row in found.values()), **found}


def _save(folder: str, quick: bool) -> dict[str, Any]:
    depth, width = (1, 16) if quick else (12, 2048)
    parts = build_parts(config_in(folder, global_batch_size=64), Sum(depth=depth, width=width, adamw=True))
    step, ms, stalls = _stepper(parts), [], []
    with Checkpoints(Path(folder, "checkpoints")) as checkpoints:
        for number in range(3):  # the first save takes longer: it allocates page-locked memory
            began = time.perf_counter()
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            # milliseconds per step: ms[0] before any save, ms[1:] while the previous save is being written
            ms.append((time.perf_counter() - began) * 100)
            began = time.perf_counter()
            state = parts.strategy.ungathered_state(parts.optimizer)
            checkpoints.begin(number, tensors={"model": state.pop("model")}, state=state, facts={})
            stalls.append(time.perf_counter() - began)
        written = checkpoints.wait()
    sizes = [file.stat().st_size for file in Path(folder, "checkpoints", "step-00000002").iterdir()]
    passed = all(saved.path is not None for saved in written)
    return {"right": passed, "bytes": sum(sizes), "stall_s": stalls, "step_ms": ms}


def save(folder: str, quick: bool) -> dict[str, Any]:
    """Save a model with its AdamW state (600 MB) three times in the background, with ten training steps before each.

    `stall_s`: seconds that each save delays training, a wait for the previous save included. `step_ms`: milliseconds
    per step before each save. `bytes`: the size of a checkpoint.
    """
    found: dict[str, Any] = launch(_save, folder, quick, nproc=1, in_worker=True)[0]
    return {**found, "right": found["right"] and (quick or found["bytes"] > 5.5e8)}
