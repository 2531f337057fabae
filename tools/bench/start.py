"""Time the start of a run: from `launch(train, config, task)` in a notebook to the end of the first training step.

    python tools/bench/start.py                  # the text generation recipe, two processes, nine launches

The worker server has imported torch by then, as in a notebook after its first cell. The first launch prepares the
data; the medians are those of the others, which begin anew on the prepared data. The last rows are the user's own: a
trial of two batches of the evaluation, and the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, installed or not

from kaggle_mgpu import distributed, launch, train
from kaggle_mgpu.recipes.text_generation import Config, TextGeneration
from kaggle_mgpu.training import evaluation, loop

STAGES = {
    "the workers": "launch to function",
    "build_parts": "process group, data, model, strategy",
    "open_checkpoints": "the folder of checkpoints",
    "starting_point": "the search for a checkpoint",
    "settle_micro_batch": "the micro-batch",
    "Evaluation": "the plan of evaluations",
    "trial": "the trial of an evaluation",
    "Log": "records and display",
    "Saving": "the plan of saves",
    "take_step": "the first step",
}


def timed(config: Config, task: TextGeneration, began: float) -> dict[str, float]:
    """Train, and return the seconds of each stage up to the end of the first step."""
    found, last = {"the workers": time.monotonic() - began}, time.monotonic()

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            result = function(*args, **kwargs)
            if name not in found:
                found[name], last = time.monotonic() - last, time.monotonic()
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in [name for name in STAGES if hasattr(loop, name)]:
            stack.enter_context(mock.patch.object(loop, name, marked(name, getattr(loop, name))))
        trial = marked("trial", evaluation.Evaluation.trial)
        stack.enter_context(mock.patch.object(evaluation.Evaluation, "trial", lambda *args: trial(*args)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        train(config, task)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--launches", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.mkdir("logs")
        launch(distributed.barrier, nproc=2)
        config = Config(
            n_layer=4, n_head=4, n_embd=128, block_size=128, global_batch_size=16, max_steps=2, eval_every="end",
            sample_tokens=0, resume="never", output_dir="run",
        )  # fmt: skip
        first, *others = (
            launch(timed, config, TextGeneration(config), time.monotonic(), nproc=2)[0] for _ in range(given.launches)
        )
    print(f"{'seconds, two processes':40} {'first':>7} {'median':>7}")
    medians = {name: statistics.median(other[name] for other in others) for name in STAGES}
    for name, what in STAGES.items():
        print(f"{what:40} {first[name]:7.3f} {medians[name]:7.3f}")
    users = {"trial", "take_step"}
    whole = sum(medians.values())
    print(f"{'together':40} {sum(first.values()):7.3f} {whole:7.3f}")
    print(f"{'without trial and first step':40} {'':7} {whole - sum(medians[name] for name in users):7.3f}")


if __name__ == "__main__":
    main()
