"""Cross-validate over subjects: each window is predicted by a model trained without the window's subject."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kaggle_mgpu.training import train

from .._folds import configs_of, launch_folds, table
from .evaluation import predict
from .metrics import confusion, macro_f1
from .settings import Config
from .sources import pick_by_digest, split
from .training import ActivityRecognition


@dataclass
class CrossValidation:
    """Predictions for all windows, each by a model trained without the window's subject."""

    classes: tuple[str, ...]
    subjects: list[tuple[str, ...]]
    """The held-out subjects of each fold."""
    probabilities: Tensor
    """Float (windows, classes), in the order of `ActivityRecognition.windows`."""
    confusion: list[Tensor]
    """By fold: counts of windows by true class (row) and predicted class (column)."""

    def scores(self) -> dict[str, list[float]]:
        """Return accuracy and macro F1 by fold."""
        accuracy = [float(matrix.trace() / matrix.sum()) for matrix in self.confusion]
        return {"accuracy": accuracy, "macro_f1": [macro_f1(matrix) for matrix in self.confusion]}

    def __str__(self) -> str:
        people = [len(names) for names in self.subjects]
        windows = [int(matrix.sum()) for matrix in self.confusion]
        return table({"subjects": people, "windows": windows}, self.scores())


def cross_validate(config: Config, folds: int = 5) -> CrossValidation | None:
    """Train one model per fold without the fold's subjects, one fold per GPU at a time; predict the fold's windows.

    Writes out_of_fold.npz (probabilities, y, subject, fold) and folds.json into the run's folder. Call this again after
    an interrupt or in the next session: finished folds return at once, the others continue.

    Args:
        config: nproc is the number of folds to train at the same time; "auto": one per GPU.
        folds: the number of parts that the subjects are divided into.

    Returns:
        None while folds have not finished.

    Raises:
        ValueError: fewer than two folds, more folds than subjects, or a fold that `split` refuses.
    """
    windows = ActivityRecognition(config).windows
    whose = [] if windows.subject is None else windows.subject.tolist()
    names = pick_by_digest(sorted(set(whose)), 1.0, config.split_seed)
    if not 2 <= folds <= len(names):
        raise ValueError(f"folds: expected 2 to {len(names)}, the number of subjects in the data, got {folds}")
    subjects = [tuple(names[number::folds]) for number in range(folds)]
    configs = configs_of(config, [{"test_subjects": held} for held in subjects])
    parts = [split(windows, c.test_fraction, c.val_fraction, c.test_subjects, c.split_seed) for c in configs]
    if (predicted := launch_folds(_predict_fold, config, configs)) is None:
        return None
    probabilities, number_of = torch.empty(len(whose), len(windows.classes)), np.empty(len(whose), np.int64)
    confusions = []
    for number, (part, given) in enumerate(zip(parts, predicted, strict=True)):
        probabilities[part["test"]], number_of[part["test"]] = given, number
        y = torch.from_numpy(windows.y[part["test"]].astype(np.int64))
        confusions.append(confusion(y, given.argmax(1), len(windows.classes)))
    found = CrossValidation(windows.classes, subjects, probabilities, confusions)
    folder = Path(config.output_dir)
    np.savez(
        folder / "out_of_fold.npz",
        probabilities=probabilities.numpy(),
        y=windows.y,
        subject=np.array(whose),
        fold=number_of,
    )
    document = {"classes": windows.classes, "subjects": subjects, **found.scores()}
    (folder / "folds.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return found


def _predict_fold(config: Config) -> Tensor | None:
    """Train a fold's model; return its probabilities for the fold's windows, or None if the run has not finished."""
    task = ActivityRecognition(config)
    result = train(config, task)
    if not result.finished:
        return None
    return predict(result.load(task.model(), "final" if result.best is None else "best"), task.part("test")[0])
