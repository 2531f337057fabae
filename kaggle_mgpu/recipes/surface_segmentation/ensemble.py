"""Average the probabilities of several models and of mirrored windows, and load such models for prediction.

forward = averaged([model], axes=(0, 1, 2))     # eight passes a window: each axis mirrored or not
logits = forward(windows)                       # (B, 1, D, H, W) -> the log-odds of the mean probability
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kaggle_mgpu.checkpoints import check_model, read_tensors
from kaggle_mgpu.machine import devices
from kaggle_mgpu.parallel import distributed

Predictor = Callable[[Tensor], Tensor]
EPS = 1e-6
"""Mean probabilities are kept this far from 0 and 1, so that their log-odds are finite."""


def averaged(models: Sequence[Predictor], axes: Sequence[int] = ()) -> Predictor:
    """Return a function that gives the log-odds of the mean probability over models and mirrored windows.

    Args:
        models: each maps windows (B, 1, D, H, W) to logits of the same shape. A single model without axes is returned
            as it is.
        axes: the axes to mirror, from 0 (D), 1 (H) and 2 (W); each window passes under all 2^len(axes) flips.
    """
    if len(models) == 1 and not axes:
        return models[0]
    flips = [[axis + 2 for axis in some] for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)]

    def forward(windows: Tensor) -> Tensor:
        mean = torch.zeros(windows.shape, dtype=torch.float32, device=windows.device)
        for model, dims in itertools.product(models, flips):
            mean += model(windows.flip(dims)).float().sigmoid().flip(dims) / (len(models) * len(flips))
        return torch.logit(mean, eps=EPS)

    return forward


def load(make: Callable[[], nn.Module], files: Sequence[Path], axes: Sequence[int], precision: str) -> Predictor:
    """Load a model from each of `files` to this rank's device, and return the `averaged` function of all models.

    The returned function takes and gives CPU tensors; its logits are float32.

    Args:
        make: returns the untrained model.
        axes: as for `averaged`.
        precision: as in TrainConfig.

    Raises:
        CheckpointError: the weights in a file do not fit the model.
    """
    device = distributed.device()
    chosen = devices.precision(precision, devices.gpus() if device.type == "cuda" else [])[0]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(chosen)
    models: list[nn.Module] = []
    for file in files:
        model, tensors = make(), read_tensors(file)
        check_model(tensors, model.state_dict(), str(file))
        model.load_state_dict(tensors)
        models.append(model.to(device).eval())
    predictor = averaged(models, axes)

    def forward(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = predictor(windows.to(device))
        return logits.float().cpu()

    return forward
