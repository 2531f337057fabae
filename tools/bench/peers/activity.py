"""Activity recognition: the recipe beside aeon's MiniRocket (Dempster et al. 2021), on a smartwatch's signals.

Shoulder exercises of ten people from the package seglearn, in windows of 128 moments, one every 64. Subjects 4 and 6
are the test set, which neither contender trains on. The kit holds further subjects back to choose its weights by;
MiniRocket chooses nothing, and trains on these too.
"""

from __future__ import annotations

from typing import Any

import torch

from kaggle_mgpu import train
from kaggle_mgpu.recipes.activity_recognition import (
    ActivityRecognition,
    Config,
    baselines,
    confusion,
    macro_f1,
    predict,
)

from . import common

STEPS = {True: 150, False: 600}
"""600 are the recipe's 20 epochs."""


def task(run: common.Run, **settings: Any) -> ActivityRecognition:
    """Return the recipe with its defaults."""
    return ActivityRecognition(
        Config(
            data_path=str(run.data), output_dir=str(run.output), test_subjects=("4", "6"), max_steps=run.steps,
            seed=run.seed, strategy="single", nproc=1, **settings,
        )
    )  # fmt: skip


def scores(matrix: torch.Tensor) -> dict[str, float]:
    """Return the figures of a confusion matrix."""
    return {"accuracy": float(matrix.trace() / matrix.sum()), "macro F1": macro_f1(matrix)}


def kit(run: common.Run) -> dict[str, float]:
    """Train the recipe; the weights that validation chose are tested."""
    recognition = task(run)
    result = train(recognition.config, recognition)
    model = result.load(recognition.model(), "best")
    x, y = recognition.part("test")
    return scores(confusion(y, predict(model, x).argmax(1), len(recognition.windows.classes)))


def minirocket(run: common.Run) -> dict[str, float]:
    """Fit a ridge classifier to 9 996 features of fixed kernels."""
    from aeon.classification.convolution_based import MiniRocketClassifier

    recognition = task(run)
    parts = [recognition.part(part) for part in ("train", "val")]
    x, y = (torch.cat(both).numpy() for both in zip(*parts, strict=True))
    x_test, y_test = recognition.part("test")
    found = MiniRocketClassifier(random_state=run.seed, n_jobs=1).fit(x, y).predict(x_test.numpy())
    return scores(confusion(y_test, torch.from_numpy(found), len(recognition.windows.classes)))


def centroid(run: common.Run) -> dict[str, float]:
    """Take the class of the nearest mean of simple features."""
    return scores(baselines(task(run))["nearest_centroid"])


CONTENDERS: dict[str, common.Contender] = {"kit": kit, "MiniRocket": minirocket, "nearest centroid": centroid}
