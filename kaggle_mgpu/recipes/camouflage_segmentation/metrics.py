"""The measures of camouflaged object detection for one image, equal to PySODMetrics 1.6.

    measure(prediction, mask)  # both (height, width); a dictionary of numbers and one curve
    report(means)              # from the means over all images to the names that papers use

PySODMetrics follows the authors' MATLAB code: Fan et al. 2017 (S-measure), Fan et al. 2018 (E-measure), Margolin et al.
2014 (weighted F). Its conventions are kept: a prediction is an 8-bit grey image of the mask's size, stretched to 0..1
by its own minimum and maximum; mask values above 128 are object. As in papers, each measure is averaged over the
images, and the maximum E-measure is that of the averaged curve. tests/data/sod_reference.py makes the values that the
tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPS = np.spacing(1)
THRESHOLDS = 256
Floats = NDArray[np.float64]


def measure(prediction: NDArray[np.uint8], mask: NDArray[Any]) -> dict[str, Any]:
    """Return all measures of one image.

    Args:
        prediction: (height, width) uint8, 255 where the object is certain.
        mask: (height, width), uint8 with the object above 128, or bool.

    Returns:
        s_measure, e_adaptive, e_curve (256 values, thresholds 255 to 0), weighted_f, mae, iou, dice. For iou and dice,
        values of the stretched prediction above 0.5 are object; both are 0 if prediction and mask have no object.

    Raises:
        ValueError: shapes that differ, or a prediction that is not uint8.
    """
    if prediction.shape != mask.shape or prediction.ndim != 2 or prediction.dtype != np.uint8:
        raise ValueError(
            f"measure: expected a uint8 prediction of the mask's size {mask.shape}, got {prediction.dtype} of "
            f"{prediction.shape}"
        )
    truth = mask if mask.dtype == bool else mask > 128
    values = prediction / 255
    if (low := values.min()) != (high := values.max()):
        values = (values - low) / (high - low)
    found = values > 0.5
    both, either = np.count_nonzero(found & truth), np.count_nonzero(found | truth)
    adaptive, curve = e_measure(values, truth)
    return {
        "s_measure": s_measure(values, truth),
        "e_adaptive": adaptive,
        "e_curve": curve,
        "weighted_f": weighted_f(values, truth),
        "mae": float(np.abs(values - truth).mean()),
        "iou": both / either if either else 0.0,
        "dice": 2 * both / (either + both) if either else 0.0,
    }


def report(means: Mapping[str, Any]) -> dict[str, float]:
    """Return the means over images of `measure`'s values as plain numbers: e_curve becomes e_mean and e_max."""
    numbers: dict[str, float] = {}
    for name, value in means.items():
        if name == "e_curve":
            numbers |= {"e_mean": float(value.mean()), "e_max": float(value.max())}
        else:
            numbers[name] = float(value)
    return numbers


def s_measure(values: Floats, truth: NDArray[np.bool_]) -> float:
    """Return the structure measure, alpha 0.5 (Fan et al. 2017), of values from 0 to 1.

    It is the mean of two similarities: of object and background, and of the four quarters around the object's centre.
    """
    share = truth.mean()
    if share in (0, 1):
        return float(values.mean() if share else 1 - values.mean())
    of_objects = share * _alike(values[truth]) + (1 - share) * _alike(1 - values[~truth])
    height, width = truth.shape
    # rounded half to even, plus one, since MATLAB's range 1:X includes X
    y, x = (int(centre) + 1 for centre in np.argwhere(truth).mean(0).round())
    weights = np.array([y * x, y * (width - x), (height - y) * x]) / truth.size
    weights = np.append(weights, 1 - weights[0] - weights[1] - weights[2])
    rows, columns = (slice(0, y), slice(y, height)), (slice(0, x), slice(x, width))
    parts = [_ssim(values[row, column], truth[row, column]) for row in rows for column in columns]
    return max(0.0, float(0.5 * of_objects + 0.5 * np.dot(weights, parts)))


def _alike(values: Floats) -> float:
    mean = values.mean()
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + deviation + EPS))


def _ssim(values: Floats, truth: NDArray[np.bool_]) -> float:
    if not values.size:
        return 0.0  # an empty part, of weight 0
    x, y, n = values.mean(), truth.mean(), values.size - 1 + EPS
    dx, dy = values - x, truth - y
    above = 4 * x * y * np.sum(dx * dy) / n
    below = (x**2 + y**2) * (np.sum(dx**2) / n + np.sum(dy**2) / n)
    return float(above / (below + EPS)) if above != 0 else float(below == 0)


def e_measure(values: Floats, truth: NDArray[np.bool_]) -> tuple[float, Floats]:
    """Return the enhanced alignment measure (Fan et al. 2018) at the threshold 2 x mean, and its curve at 255 ... 0."""
    threshold = min(2 * values.mean(), 1)
    at = values >= threshold
    levels = (values * 255).astype(np.uint8)
    hits = np.bincount(levels[truth], minlength=THRESHOLDS)[::-1].cumsum()
    false = np.bincount(levels[~truth], minlength=THRESHOLDS)[::-1].cumsum()
    hits = np.append(hits, np.count_nonzero(at & truth))
    false = np.append(false, np.count_nonzero(at & ~truth))
    scores = _aligned(hits, false, int(truth.sum()), truth.size)
    return float(scores[-1]), scores[:-1]


def _aligned(hits: NDArray[np.int64], false: NDArray[np.int64], objects: int, size: int) -> Floats:
    """Return the measure from four counts of pixels: found inside, found outside, in the object, in the image."""
    found = hits + false
    if objects == 0:
        total: Any = size - found
    elif objects == size:
        total = found
    else:
        share, truth = found / size, objects / size
        counts = (hits, false, objects - hits, size - found - (objects - hits))
        signs = ((1 - share, 1 - truth), (1 - share, -truth), (-share, 1 - truth), (-share, -truth))
        total = 0
        for count, (a, b) in zip(counts, signs, strict=True):
            total = total + count * (2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4
    return np.asarray(total / (size - 1 + EPS), np.float64)


def weighted_f(values: Floats, truth: NDArray[np.bool_]) -> float:
    """Return the weighted F-measure, beta 1 (Margolin et al. 2014); 0 for an empty mask."""
    if not truth.any():
        return 0.0
    error = np.abs(values - truth)
    squared, rows, columns = nearest(truth)
    # outside the object, smooth the error of the nearest object pixel; only pixels near the object are needed
    spread = _gaussian(np.where(truth, error, error[rows, columns]), truth)
    weighted = np.where(truth & (spread < error), spread, error)
    outside = weighted[~truth] * (2 - np.exp(np.log(0.5) / 5 * np.sqrt(squared[~truth])))
    inside = weighted[truth]
    hits, false = inside.size - inside.sum(), outside.sum()
    recall, precision = 1 - inside.mean(), hits / (hits + false + EPS)
    return float(2 * recall * precision / (recall + precision + EPS))


def _gaussian(values: Floats, truth: NDArray[np.bool_]) -> Floats:
    """Filter as MATLAB's imfilter(values, fspecial('gaussian', 7, 5)) in the object's bounding box; 0 elsewhere."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 50.0)
    kernel /= kernel.sum()
    (top, bottom), (left, right) = ((i.min(), i.max() + 1) for i in np.nonzero(truth))
    part = np.pad(values, 3)[top : bottom + 6, left : right + 6]
    part = sum(k * part[i : i + bottom - top] for i, k in enumerate(kernel))
    out = np.zeros_like(values)
    out[top:bottom, left:right] = sum(k * part[:, i : i + right - left] for i, k in enumerate(kernel))
    return out


def nearest(truth: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return each pixel's exact squared distance to the nearest True pixel, and the row and column of the nearest.

    All three are (height, width). Of equally near pixels, the smallest column wins, then the smallest row, as in
    scipy.ndimage.distance_transform_edt. The method is that of Maurer, Qi and Raghavan 2003, for all rows at once.

    Raises:
        ValueError: no pixel is True.
    """
    height, width = truth.shape
    if not truth.any():
        raise ValueError("nearest: expected at least one True pixel, got none")
    # within each column: the nearest True row at or above, and at or below
    far = 4 * (height + width)  # so far that no such column is ever the nearest
    y = np.arange(height)[:, None]
    above = np.maximum.accumulate(np.where(truth, y, -far), axis=0)
    below = np.minimum.accumulate(np.where(truth, y, height + far)[::-1], axis=0)[::-1]
    row = np.where(y - above <= below - y, above, below)
    gap = ((row - y) ** 2).T.copy()  # (width, height): the steps below go from column to column, all rows at once
    has = truth.any(axis=0)
    candidates = np.flatnonzero(has)
    # for each row the columns whose parabolas (x - column)^2 + gap make the lower envelope, as a stack
    lines = np.arange(height)
    stack = np.empty((len(candidates), height), np.int64)
    top = np.full(height, -1)
    for column in candidates:
        new = gap[column]
        active = lines[top >= 1]
        while active.size:
            middle, first = stack[top[active], active], stack[top[active] - 1, active]
            a, b = middle - first, column - middle
            c = a + b
            hidden = c * gap[middle, active] - b * gap[first, active] - a * new[active] - a * b * c > 0
            active = active[hidden]
            top[active] -= 1
            active = active[top[active] >= 1]
        top += 1
        stack[top, lines] = column
    squared = np.empty((width, height), np.int64)
    columns = np.empty((width, height), np.int64)
    at = np.zeros(height, np.int64)
    best = stack[0].copy()
    for x in range(width):
        here = (best - x) ** 2 + gap[best, lines]
        active = lines[at < top]
        while active.size:
            next_column = stack[at[active] + 1, active]
            there = (next_column - x) ** 2 + gap[next_column, active]
            better = there < here[active]
            active = active[better]
            at[active] += 1
            best[active] = next_column[better]
            here[active] = there[better]
            active = active[at[active] < top[active]]
        squared[x], columns[x] = here, best
    columns = columns.T
    return squared.T, row[np.arange(height)[:, None], columns], columns
