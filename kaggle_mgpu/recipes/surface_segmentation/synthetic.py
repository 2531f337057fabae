"""Synthetic volumes, to try the recipe without data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stacks import IGNORED, write_stack


def synthesise(folder: Path, size: int = 64, train: int = 8, test: int = 2) -> None:
    """Write synthetic volumes of size^3 voxels in the competition's format, unless they exist.

    The volumes hold rolled, wavy sheets in noise and uneven light. They show that the code works; a model trained on
    them is useless for scans.

    A corner of each volume is unlabelled. Test volumes have no labels.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    ids = [f"synthetic_{i}" for i in range(train + test)]
    # three scrolls for training; the last has a single volume, which is held out
    scrolls = ["c" if i == train - 1 else "ab"[i % 2] for i in range(train)] + ["d"] * test
    for seed, (name, scroll) in enumerate(zip(ids, scrolls, strict=True)):
        image, label = synthetic_volume(seed, size, pitch={"a": 11.0, "b": 13.0, "c": 12.0, "d": 12.0}[scroll])
        part = "train" if seed < train else "test"
        write_stack(making / f"{part}_images" / f"{name}.tif", image)
        if part == "train":
            write_stack(making / "train_labels" / f"{name}.tif", label)
    rows = [f"{name},{scroll}\n" for name, scroll in zip(ids, scrolls, strict=True)]
    (making / "train.csv").write_text("id,scroll_id\n" + "".join(rows[:train]))
    (making / "test.csv").write_text("id,scroll_id\n" + "".join(rows[train:]))
    try:
        os.rename(making, folder)
    except OSError:  # another process was first
        shutil.rmtree(making)


def synthetic_volume(seed: int, size: int, pitch: float = 10.0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the image and the label of a synthetic volume, both (size, size, size) uint8.

    Args:
        pitch: voxels from one turn of the sheet to the next.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 3, indexing="ij")
    centre = rng.uniform(-0.6, -0.2, 2) * size
    dy, dx = y - np.float32(centre[0]), x - np.float32(centre[1])
    wave = sum(
        a * np.sin(2 * np.pi * (k[0] * z + k[1] * y + k[2] * x) / size + p)
        for a, k, p in zip(rng.uniform(0.5, 2, 4), rng.uniform(-1.2, 1.2, (4, 3)), rng.uniform(0, 6.3, 4), strict=True)
    )
    turns = (np.hypot(dy, dx) + wave) / pitch - np.arctan2(dy, dx) / (2 * np.pi)
    steep = np.sqrt(sum(slope**2 for slope in np.gradient(turns)))
    off = (turns - np.round(turns)) / steep  # voxels from the sheet's middle
    light = 1 + 0.5 * np.sin(2 * np.pi * (x * rng.uniform(-1, 1) + z * rng.uniform(-1, 1)) / size + rng.uniform(0, 6))
    specks = (_smooth(rng.standard_normal((size,) * 3)) > 1.6) * 40.0  # crumbs as bright as papyrus
    grey = 70 * light + 45 * np.exp(-((off / 1.5) ** 2)) + specks + rng.normal(0, 28, (size,) * 3)
    label = (np.abs(off) < 1.5).astype(np.uint8)
    label[: size // 4, : size // 4, : size // 4] = IGNORED
    return np.clip(grey, 0, 255).astype(np.uint8), label


def _smooth(noise: NDArray[Any]) -> NDArray[Any]:
    for axis in range(3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return noise / noise.std()
