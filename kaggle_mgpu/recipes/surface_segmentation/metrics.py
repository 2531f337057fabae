"""Score a predicted volume: Dice, surface Dice at a tolerance, variation of information (VOI), Betti numbers.

    measures(prediction, label)  # {"dice": ..., "surface_dice": ..., "voi_score": ..., "betti0_f1": ...}, one volume

Surface Dice and VOI are two of the three terms of the competition's score (0.30 topology + 0.35 surface Dice + 0.35
VOI), as its metric defines them. The topology term matches components, tunnels and cavities of prediction and label by
their places (Betti matching, Stucki et al. 2024); it is not computed here, for lack of a library. betti0_f1, betti1_f1
and betti2_f1 only count the three: with a in the prediction and b in the label, they are 2 min(a, b) / (a + b), an
upper bound of the F1 score of any matching. In all scores, voxels labelled 2 are background in prediction and label.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from .stacks import IGNORED, Array


def measures(prediction: Array, label: Array, tolerance: float = 2.0) -> dict[str, float]:
    """Return the scores of one volume, all 0 (bad) to 1 (good); voi_score is 1 / (1 + 0.3 VOI).

    Args:
        prediction: (D, H, W), nonzero is sheet.
        label: (D, H, W): 0, 1, or 2 for voxels that are ignored.
        tolerance: of surface Dice, in voxels.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"measures: expected prediction and label of one shape, got {prediction.shape} and {label.shape}"
        )
    known = label != IGNORED
    p, q = (prediction != 0) & known, (label == 1)
    numbers = zip(betti_numbers(p), betti_numbers(q), strict=True)
    return {
        "dice": dice(p, q),
        "surface_dice": surface_dice(p, q, tolerance),
        "voi_score": 1 / (1 + 0.3 * sum(variation_of_information(p, q))),
        **{f"betti{k}_f1": 2 * min(a, b) / (a + b) if a + b else 1.0 for k, (a, b) in enumerate(numbers)},
    }


def dice(p: Array, q: Array) -> float:
    """Return 2 |p and q| / (|p| + |q|) of two bool masks; 1 if both are empty."""
    total = int(p.sum()) + int(q.sum())
    return 2 * int((p & q).sum()) / total if total else 1.0


# Surface Dice (Nikolov et al. 2018, arXiv 1809.04430), as DeepMind's surface-distance computes it: each neighbourhood
# of 2x2x2 voxels has a surface element, with the area of marching cubes' triangles. Up to rotation and reflection there
# are 22 kinds among the 256 neighbourhoods; the table gives each kind's area, under the bits of one example.
_R2, _R3 = math.sqrt(2), math.sqrt(3)
_AREAS = {
    0: 0.0, 1: _R3 / 8, 3: _R2 / 2, 6: _R3 / 4, 7: 0.5 + 3 * _R3 / 8, 15: 1.0, 22: 3 * _R3 / 8, 23: 3 * _R3 / 4,
    24: _R3 / 4, 25: _R2 / 2 + _R3 / 8, 27: _R2 / 2 + _R3 / 2, 30: 0.5 + _R3 / 2, 31: 0.5 + 3 * _R3 / 8, 60: _R2,
    61: _R2 / 2 + _R3 / 8, 63: _R2 / 2, 105: _R3 / 2, 107: 3 * _R3 / 8, 111: _R3 / 4, 126: _R3 / 4, 127: _R3 / 8,
    255: 0.0,
}  # fmt: skip


@functools.cache
def _area_table() -> Array:
    """Return the areas of the 256 neighbourhoods; bit 7 of the index is voxel (0, 0, 0), bit 0 voxel (1, 1, 1)."""
    table = np.full(256, np.nan)
    bits = 1 << np.arange(7, -1, -1).reshape(2, 2, 2)
    for code, area in _AREAS.items():
        cube = (code & bits) > 0
        for axes in itertools.permutations(range(3)):
            for flips in itertools.product((1, -1), repeat=3):
                turned = cube.transpose(axes)[:: flips[0], :: flips[1], :: flips[2]]
                table[int((turned * bits).sum())] = area
    return table


def _surface(mask: Array) -> Array:
    """Return the bits of the 2x2x2 neighbourhood around each corner of the voxels, of shape mask.shape + 1."""
    padded = np.pad(mask, 1).astype(np.uint8)
    code = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, (z, y, x) in enumerate(itertools.product((1, 0), repeat=3)):
        ends = [n - 1 + at for n, at in zip(padded.shape, (z, y, x), strict=True)]
        code |= padded[z : ends[0], y : ends[1], x : ends[2]] << np.uint8(bit)
    return code


def _near(surface: Array, tolerance: float) -> Array:
    """Return the bool map of corners within `tolerance` voxels of a True corner of `surface`."""
    reach = int(tolerance)
    n = surface.shape
    out = np.zeros(n, bool)
    padded = np.pad(surface, reach)
    for offset in itertools.product(range(2 * reach + 1), repeat=3):
        if sum((o - reach) ** 2 for o in offset) <= tolerance**2:
            out |= padded[tuple(slice(o, o + k) for o, k in zip(offset, n, strict=True))]
    return out


def surface_dice(p: Array, q: Array, tolerance: float = 2.0) -> float:
    """Return the share of the area of both masks' surfaces that lies within `tolerance` voxels of the other surface.

    1 if both masks are empty, 0 if only one is.
    """
    codes = [_surface(p), _surface(q)]
    borders = [(code != 0) & (code != 255) for code in codes]
    if not borders[0].any() or not borders[1].any():
        return float(not borders[0].any() and not borders[1].any())
    near = total = 0.0
    for code, mine, other in zip(codes, borders, reversed(borders), strict=True):
        areas = _area_table()[code[mine]]
        total += float(areas.sum())
        near += float(areas[_near(other, tolerance)[mine]].sum())
    return near / total


def variation_of_information(p: Array, q: Array) -> tuple[float, float]:
    """Return the conditional entropies (split, merge) = (H(p | q), H(q | p)) of 26-connected components, in bits.

    Only voxels in p or q count. Several components of p on one of q raise split; one component of p on several of q
    raises merge (Meila 2007).
    """
    union = p | q
    if not union.any():
        return 0.0, 0.0
    a, b = components(p)[0][union].astype(np.int64), components(q)[0][union].astype(np.int64)
    joint = _entropy(a * (int(b.max()) + 1) + b)
    return joint - _entropy(b), joint - _entropy(a)


def betti_numbers(mask: Array) -> tuple[int, int, int]:
    """Return the exact numbers of connected components, tunnels and cavities of a bool mask (D, H, W).

    A voxel is a closed cube, so components are 26-connected and the background is 6-connected. Tunnels follow from the
    formula of Euler and Poincare, components - tunnels + cavities = corners - edges + faces - cubes. The right side is
    summed over 2x2x2 neighbourhoods (as scikit-image's `euler_number` does with connectivity 3).
    """
    from scipy import ndimage

    euler = int(np.bincount(_surface(mask).reshape(-1), minlength=256) @ _euler_table()) // 8
    parts = components(mask)[1]
    cavities = int(ndimage.label(np.pad(~mask, 1, constant_values=True))[1]) - 1
    return parts, parts + cavities - euler, cavities


@functools.cache
def _euler_table() -> NDArray[np.int64]:
    """Return eight times the contribution of each of the 256 neighbourhoods to corners - edges + faces - cubes.

    A neighbourhood counts the corner in its middle, half of six edges, a quarter of twelve faces, an eighth of 8 cubes.
    """
    table = np.zeros(256, np.int64)
    for code in range(256):
        cube = (code & (1 << np.arange(7, -1, -1).reshape(2, 2, 2))) > 0
        edges = sum(int(cube.any(axes).sum()) for axes in itertools.combinations(range(3), 2))
        faces = sum(int(cube.any(axis).sum()) for axis in range(3))
        table[code] = 8 * int(cube.any()) - 4 * edges + 2 * faces - int(cube.sum())
    return table


def _entropy(labels: Array) -> float:
    counts = np.unique(labels, return_counts=True)[1] / labels.size
    return float(-(counts * np.log2(counts)).sum())


def components(mask: Array) -> tuple[Array, int]:
    """Return an array of the mask's shape with its 26-connected components numbered from 1 on, and their count.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError(
            "connected components need the package `scipy`: pip install scipy (Kaggle's image has it)"
        ) from None
    numbers, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return numbers, int(count)


def without_specks(mask: Array, least: int) -> NDArray[np.uint8]:
    """Return a mask, as 0 and 1, without its 26-connected components of fewer than `least` voxels."""
    if least <= 1:
        return (mask != 0).astype(np.uint8)
    numbers, _ = components(mask)
    keep = np.bincount(numbers.reshape(-1)) >= least
    keep[0] = False
    return keep[numbers].astype(np.uint8)
