"""Print the files of kaggle_mgpu that a training step, or the set-up of a run, goes through.

    python tools/walk.py step     # one step in the middle of a run, without a record, an evaluation or a save
    python tools/walk.py setup    # from the call of `train` to the first forward pass in training

A small network is trained in one process, with its data in memory. sys.setprofile reports every call. A file counts
once one of its functions is called. A switch is a call whose nearest caller inside the package is in another file:
torch and the task between the two do not count, nor do returns and imports. A call that a loop repeats, with no other
call by the same function in between, counts once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = f"{Path(__file__).resolve().parents[1] / 'kaggle_mgpu'}/"
STEP = 20
"""The step to walk through: no record, evaluation or save is due around this step."""


def walk(part: str) -> Counter[tuple[str, str]]:
    """Count the calls of "step" or "setup" by (file of the caller, file of the called function)."""
    sys.path.insert(0, str(Path(PACKAGE).parent))
    import torch
    from torch import Tensor, nn

    from kaggle_mgpu import Task, TrainConfig, train

    calls: Counter[tuple[str, str]] = Counter()
    latest: dict[FrameType | None, CodeType] = {}

    def in_package(code: CodeType) -> bool:
        return code.co_filename.startswith(PACKAGE) and code.co_name != "<module>"

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and in_package(frame.f_code):
            caller = frame.f_back
            while caller is not None and not in_package(caller.f_code):
                caller = caller.f_back
            if latest.get(caller) != frame.f_code:
                here = frame.f_code.co_filename.removeprefix(PACKAGE)
                calls[here if caller is None else caller.f_code.co_filename.removeprefix(PACKAGE), here] += 1
            latest[caller] = frame.f_code

    class Small(Task):
        forward_passes = 0

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

        def train_data(self) -> torch.utils.data.TensorDataset:
            return torch.utils.data.TensorDataset(torch.randn(640, 8), torch.randn(640, 1))

        def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
            if model.training:
                self.forward_passes += 1
                if part == "setup" or self.forward_passes >= STEP:
                    sys.setprofile(on_event if part == "step" and self.forward_passes == STEP else None)
            return (model(batch[0]) - batch[1]).square().sum()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(max_steps=STEP + 5, global_batch_size=16, log_every=1000, output_dir=folder)
        config = config.replace(resume="never")
        train(config, Small())  # imports every module, so that the second run imports none
        calls.clear()
        sys.setprofile(on_event if part == "setup" else None)
        train(config, Small())
    return calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("part", choices=("step", "setup"))
    switches = walk(parser.parse_args().part)
    files = sorted({file for pair in switches for file in pair})
    switches = Counter({pair: count for pair, count in switches.items() if pair[0] != pair[1]})
    print("\n".join(f"{count:4} {there} -> {here}" for (there, here), count in sorted(switches.items())))
    print(f"{len(files)} files, {switches.total()} switches: {', '.join(files)}")
