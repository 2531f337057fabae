"""Measure the cost of a save: the stall of the training, and the slowdown of steps during the writing.

    python tools/bench/saving.py                     # 50 M parameters with AdamW's state: 600 MB
    python tools/bench/saving.py --rounds 9 --folder /kaggle/working/bench

The kit's save in the background and a blocking torch.save (without fsync and rename, which would take longer) take
turns in one process with the same state. Steps are timed without a save and during the writing. Figures are medians
over rounds; read the ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from kaggle_mgpu import optim
from kaggle_mgpu.checkpoints import Checkpoints
from kaggle_mgpu.parallel.state import named_optimizer_state


def model_of(parameters: int) -> nn.Module:
    width = 1024
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(max(1, parameters // (width * width + width)))))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(given.parameters)
    optimizer = optim.adamw(model, 1e-4, weight_decay=0.1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    x = torch.randn(given.batch, 1024, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    folder = Path(given.folder or tempfile.mkdtemp(prefix="bench-saving-"))
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    plain, stall, torch_save, alone, meanwhile, behind = [], [], [], [], [], []
    number = 0

    def begin() -> None:
        state = {"optimizer": named_optimizer_state(model, optimizer)}
        checkpoints.begin(number, tensors={"model": model.state_dict()}, state=state, facts={})

    for turn in range(given.rounds + 1):
        number += 1
        alone_now = [timed(step) for _ in range(8)]
        stall_now = timed(begin)
        began, during = time.perf_counter(), []
        while not checkpoints.save_ended:
            during.append(timed(step))
        behind_now = time.perf_counter() - began
        checkpoints.wait()
        alone_now += [timed(step) for _ in range(8)]
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch_now = timed(lambda state=state: torch.save(state, folder / "plain.pt"))  # type: ignore[misc]
        os.sync()  # the next round must not pay for these pages
        if turn == 0:
            print(f"first save, with a new buffer: stall {stall_now:.3f} s")
            continue
        stall.append(stall_now)
        torch_save.append(torch_now)
        alone.append(statistics.median(alone_now))
        meanwhile.append(statistics.median(during[:-1] or during))
        behind.append(behind_now)
        plain.append(meanwhile[-1] / alone[-1])
    shutil.rmtree(folder)
    size = sum(t.nbytes for t in model.state_dict().values()) * 3 / 1e6
    m = statistics.median
    print(f"{size:.0f} MB, {len(stall)} rounds, {os.cpu_count()} CPUs; medians, [least, most]")
    for name, values in {"torch.save": torch_save, "kit: stall": stall, "kit: written after": behind}.items():
        print(f"  {name:<22} {m(values):8.3f} s  [{min(values):.3f}, {max(values):.3f}]")
    for name, values in {"step alone": alone, "step meanwhile": meanwhile}.items():
        print(f"  {name:<22} {1e3 * m(values):8.1f} ms [{1e3 * min(values):.1f}, {1e3 * max(values):.1f}]")
    ratios = [a / b for a, b in zip(stall, torch_save, strict=True)]
    print(f"  stall / torch.save     {m(ratios):8.3f}    [{min(ratios):.3f}, {max(ratios):.3f}]   (at most 0.12)")
    print(f"  step meanwhile / alone {m(plain):8.3f}    [{min(plain):.3f}, {max(plain):.3f}]   (at most 1.08)")


if __name__ == "__main__":
    main()
