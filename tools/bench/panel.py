"""Measure the cost of the live panel: a run switches the panel on and off every half second.

    python tools/bench/panel.py                        # 150 pairs of half seconds
    python tools/bench/panel.py --pairs 400 --seconds 1

On: the panel is drawn twice a second and sent through a pipe, as in a worker; in every tenth such half second a thread
calls nvidia-smi (the machine's own, or a stand-in that answers for two T4s): every 5 s, as in a real run. Off: lines
are discarded. A pair's figure is the ratio of CPU time per step, threads and started programs included; other load on
the machine affects both halves of a pair. The last lines give the cost of a drawing and of a sample of the GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from loop import GPTTask

from kaggle_mgpu import TrainConfig, devices, progress, session, train
from kaggle_mgpu.progress import View, panel_html
from kaggle_mgpu.progress.display import Lines, Panel

STAND_IN = """#!/bin/sh
case "$*" in
*utilization*) echo "0, 97, 9318, 15360, 71"; echo "1, 95, 9291, 15360, 70";;
*) echo "0, GPU-a, Tesla T4, 15360, 7.5"; echo "1, GPU-b, Tesla T4, 15360, 7.5";;
esac
"""
WARM_UP = 20


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, its threads and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


class Switched(progress.Progress):
    """A Progress with a display that changes every `seconds`, and the CPU time per step of each span."""

    seconds, pairs = 0.5, 150

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "sample": None, "display": "lines", "log": lambda text: None})
        view = self._display.view
        self.displays: list[Lines] = [Lines(view, lambda text: None), Panel(view, print)]
        self.turn, self.spans = -WARM_UP, [[], []]  # type: ignore[var-annotated]
        self.begin(0)

    def begin(self, step: int) -> None:
        # off on, on off: a drift cancels out
        self.on = (self.turn + 1) // 2 % 2
        self._display = self.displays[self.on]
        if self.on and self.turn % 20 in (1, 2):
            threading.Thread(target=devices.sample).start()
        self.began, self.cpu, self.first = time.perf_counter(), cpu_seconds(), step

    def record(self, record: dict[str, Any]) -> None:
        super().record(record)
        step = record.get("step", 0)
        if record["kind"] == "train" and time.perf_counter() - self.began >= self.seconds:
            if self.turn >= 0:
                self.spans[self.on].append((cpu_seconds() - self.cpu) / (step - self.first))
            self.turn += 1
            self.begin(step)
            self.stop_requested = self.turn >= 2 * self.pairs
        results[:] = self.spans


results: list[list[float]] = [[], []]


def drain(link: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            link.recv()


def each(function: Any, count: int) -> float:
    """Return the CPU milliseconds of a call."""
    began = cpu_seconds()
    for _ in range(count):
        function()
    return 1e3 * (cpu_seconds() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=Switched.pairs)
    parser.add_argument("--seconds", type=float, default=Switched.seconds)
    given = parser.parse_args()
    Switched.pairs, Switched.seconds = given.pairs, given.seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("nvidia-smi") is None:
            (program := Path(folder) / "nvidia-smi").write_text(STAND_IN)
            program.chmod(0o755)
            os.environ["PATH"] += os.pathsep + folder
        ours, theirs = multiprocessing.Pipe()
        reader = multiprocessing.get_context("spawn").Process(target=drain, args=(theirs,), daemon=True)
        reader.start()
        theirs.close()
        session.set_channel(lambda *shown: ours.send(("show", *shown)))
        progress.Progress = Switched  # type: ignore[misc]
        config = TrainConfig(
            max_steps=10**6, global_batch_size=8, log_every=5, data_workers=0, output_dir=f"{folder}/run"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train(config, GPTTask())
        ratios = sorted(on / off - 1 for off, on in zip(*results, strict=False))
        middle = ratios[len(ratios) // 10 : -(len(ratios) // 10) or None]
        spread = statistics.stdev(middle) / len(middle) ** 0.5
        print(f"{1e3 * statistics.median(results[0]):.2f} ms CPU a step; {len(ratios)} pairs")
        print(f"with the panel {100 * statistics.median(ratios):+.2f} % in the median, ", end="")
        print(f"{100 * statistics.mean(middle):+.2f} +- {100 * spread:.2f} % in the mean of the middle four fifths")

        view = View(1000)
        for step in range(1000):
            view.take({"kind": "train", "step": step, "loss": 1 / (1 + step), "lr": 1e-3, "samples_per_s": 900.0})
        view.gpus = devices.sample()
        draw = each(lambda: ours.send(("show", panel_html(view), "text", "id")), 500)
        look = each(devices.sample, 20)
        print(f"a drawing {draw:.2f} ms, twice a second: {2 * draw / 10:.3f} % of one core")
        print(f"a look at the GPUs {look:.1f} ms, every 5 s: {look / 50:.3f} % of one core, beside training")
        ours.close()
        reader.join(5)


if __name__ == "__main__":
    main()
