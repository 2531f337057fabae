"""Small predictions and masks, and what PySODMetrics says of them: the values in sod_reference.json.

    python3 -m venv build/sod && build/sod/bin/pip install pysodmetrics==1.6.2
    build/sod/bin/python tests/reference/sod_reference.py > tests/reference/sod_reference.json

The package brings opencv, scikit-image and scipy, so it lives in an environment of its own. The tests make the inputs
anew with `cases`, whose numbers come from a small generator written out here: they do not depend on NumPy's version.
"""

from __future__ import annotations

import json
import sys

import numpy as np


def noise(shape: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 from a linear congruential generator (Knuth's MMIX constants), its upper bits."""
    state, values = seed, []
    for _ in range(shape[0] * shape[1]):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(state >> 56)
    return np.array(values, np.uint8).reshape(shape)


def blob(shape: tuple[int, int], y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).astype(np.uint8) * 255


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(prediction, mask), both uint8, by name."""
    shape, wide = (37, 53), (24, 61)
    disc, moved = blob(shape, 17, 20, 9), blob(shape, 20, 25, 8)
    two = np.maximum(blob(wide, 6, 10, 5), blob(wide, 16, 50, 6))
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    soft = np.clip(255 - 9 * np.hypot(rows - 18, columns - 22), 0, 255).astype(np.uint8)
    empty, full = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    one = empty.copy()
    one[0, 52] = 255
    return {
        "perfect": (disc, disc),
        "inverted": (255 - disc, disc),
        "moved": (moved, disc),
        "soft": (soft, disc),
        "soft and noisy": (soft // 2 + noise(shape, 1) // 3, disc),
        "noise": (noise(shape, 2), disc),
        "noise against noise": (noise(shape, 3), (noise(shape, 4) > 127).astype(np.uint8) * 255),
        "sparse noise": (noise(wide, 5), (noise(wide, 6) > 250).astype(np.uint8) * 255),
        "two objects": (noise(wide, 7) // 4 + two // 2, two),
        "soft mask": (soft, np.clip(disc.astype(int) - noise(shape, 8) // 2, 0, 255).astype(np.uint8)),
        "all background": (empty, disc),
        "all object": (full, disc),
        "grey": (np.full(shape, 100, np.uint8), disc),
        "empty mask": (soft, empty),
        "empty mask, empty prediction": (empty, empty),
        "full mask": (soft, full),
        "full mask, full prediction": (full, full),
        "one pixel in the corner": (soft, one),
        "object at the edge": (noise(shape, 9), blob(shape, 36, 52, 20)),
        "all but a pixel": (noise(shape, 10), 255 - one),
        "one row": (noise((1, 40), 11), blob((1, 40), 0, 12, 5)),
    }


def main() -> None:
    import py_sod_metrics as sod

    values = {}
    for name, (prediction, mask) in cases().items():
        s, e, f, mae = sod.Smeasure(), sod.Emeasure(), sod.WeightedFmeasure(), sod.MAE()
        handlers = {"iou": sod.IOUHandler, "dice": sod.DICEHandler}
        overlap = sod.FmeasureV2(
            {n: h(with_dynamic=False, with_adaptive=False, with_binary=True) for n, h in handlers.items()}
        )
        for meter in (s, e, f, mae, overlap):
            meter.step(pred=prediction, gt=mask)
        em, both = e.get_results()["em"], overlap.get_results()
        values[name] = {
            # 0 / 0 where the object's centre lies in the last row or column: no value to compare with
            "s_measure": None if np.isnan(structure := float(s.get_results()["sm"])) else structure,
            "e_adaptive": float(em["adp"]),
            "e_curve": [float(value) for value in em["curve"]],
            "weighted_f": float(f.get_results()["wfm"]),
            "mae": float(mae.get_results()["mae"]),
            "iou": float(both["iou"]["binary"]),
            "dice": float(both["dice"]["binary"]),
        }
    json.dump(values, sys.stdout)
    print()


if __name__ == "__main__":
    main()
