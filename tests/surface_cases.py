"""Inputs that the surface recipe's figures are compared on, made the same way wherever the reference values are made.

tests/reference/surface_reference.json holds what independent packages say of them. Made in an environment of its own,
with surface-distance 0.1 (Dice, surface Dice), scikit-image 0.26 (variation of information, Betti numbers) and MONAI
1.6.1 (sliding window) beside torch 2.13: `python tests/surface_cases.py > tests/reference/surface_reference.json`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.uint8]
WINDOWS = [((20, 23, 17), 12, 0.5), ((9, 30, 12), 12, 0.25), ((24, 24, 24), 24, 0.5)]


def cases() -> dict[str, tuple[Array, Array]]:
    """Pairs of a prediction (0, 1) and a label (0, 1, 2)."""
    rng = np.random.default_rng(7)
    z, y, x = np.indices((24, 26, 28))
    sheets = (np.abs((y + 2 * np.sin(z / 4)) % 9 - 4) < 1.5).astype(np.uint8)
    noise = (rng.random(sheets.shape) < 0.02).astype(np.uint8)
    torn = sheets * ((x + z) % 17 > 3) | noise
    ignored = sheets.copy()
    ignored[:10, :, 14:] = 2
    blob = (((z - 12) ** 2 + (y - 13) ** 2 + (x - 14) ** 2) < 60).astype(np.uint8)
    empty = np.zeros_like(sheets)
    return {
        "equal": (sheets, sheets),
        "moved by 1": (np.roll(sheets, 1, 1), sheets),
        "moved by 4": (np.roll(sheets, 4, 1), sheets),
        "torn and noisy": (torn, sheets),
        "ignored corner": (torn, ignored),
        "merged": (sheets | blob, sheets),
        "random": ((rng.random(sheets.shape) < 0.3).astype(np.uint8), sheets),
        "touching the border": (np.roll(blob, 12, 0), np.roll(blob, 11, 0)),
        "nothing predicted": (empty, sheets),
        "nothing to find": (noise, empty),
    }


def volume(shape: tuple[int, int, int]) -> Array:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.uint8)


def predictor(x: Tensor) -> Tensor:
    """Logits that depend on the place in the window and on neighbours, so that blending shows. (B, 1, s, s, s)."""
    ramp = torch.linspace(-1, 1, x.shape[-1])
    place = ramp[:, None, None] + 2 * ramp[None, :, None] ** 2 - ramp[None, None, :]
    return x * (1.5 + place) + x.roll(1, -1) + place


def betti(mask: Array) -> list[int]:
    """The parts, tunnels and cavities of a mask by scikit-image."""
    from skimage.measure import euler_number, label

    parts = int(label(mask, connectivity=3).max())
    cavities = int(label(np.pad(mask == 0, 1, constant_values=True), connectivity=1).max()) - 1
    return [parts, parts + cavities - int(euler_number(mask, connectivity=3)), cavities]


def reference() -> dict[str, Any]:
    """What the independent packages say."""
    import scipy.ndimage as ndimage
    from monai.inferers import sliding_window_inference
    from skimage.measure import label as components
    from skimage.metrics import variation_of_information

    np.Inf = np.inf  # type: ignore[attr-defined] # what surface-distance 0.1 still asks numpy and scipy for
    ndimage.filters = ndimage.morphology = ndimage
    import surface_distance

    masks, windows = {}, {}
    for name, (p, q) in cases().items():
        a, b = (p != 0) & (q != 2), q == 1
        distances = surface_distance.compute_surface_distances(b, a, (1, 1, 1))
        union = a | b
        split, merge = variation_of_information(
            components(b, connectivity=3)[union], components(a, connectivity=3)[union]
        )
        masks[name] = {
            "dice": float(surface_distance.compute_dice_coefficient(b, a)),
            "surface_dice": float(surface_distance.compute_surface_dice_at_tolerance(distances, 2.0)),
            "split": float(split),
            "merge": float(merge),
            "betti": [betti(a), betti(b)],
        }
    for shape, size, overlap in WINDOWS:
        grey = volume(shape)
        x = (grey.astype(np.float32) - np.float32(grey.mean(dtype=np.float64))) / np.float32(grey.std(dtype=np.float64))
        y = sliding_window_inference(
            torch.from_numpy(x)[None, None], (size,) * 3, 3, predictor, overlap=overlap, mode="gaussian"
        )[0, 0]
        places = np.random.default_rng(0).integers(0, shape, (12, 3)).tolist()
        values = [float(y[tuple(place)]) for place in places]
        windows[json.dumps([shape, size, overlap])] = {
            "places": places,
            "values": values,
            "sum": float(y.double().sum()),
        }
    return {"masks": masks, "windows": windows}


if __name__ == "__main__":
    print(json.dumps(reference()))
