"""Compute confusion matrices, and the macro F1 score of a confusion matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count how often true class i (row) was predicted as class j (column): int64 (classes, classes)."""
    # a product of one-hot rows, since bincount is not deterministic on a GPU
    one_hot = [F.one_hot(labels, classes).double() for labels in (true, predicted)]
    with torch.autocast(true.device.type, enabled=False):
        return (one_hot[0].T @ one_hot[1]).round().long()


def macro_f1(matrix: Tensor) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN), from counts or shares.

    A class absent from labels and predictions does not count, as in scikit-learn's f1_score(average="macro").
    """
    matrix = matrix.double()
    both = matrix.sum(0) + matrix.sum(1)
    return float((2 * matrix.diagonal()[both > 0] / both[both > 0]).mean())
