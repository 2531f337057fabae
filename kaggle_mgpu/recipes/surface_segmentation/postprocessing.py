"""Choose the threshold and the smallest connected component of masks by the mean Dice of held-out volumes.

chosen = choose_by_dice(volumes, folder, threshold="auto", min_component="auto")   # folder: probabilities as <id>.tif
mask = chosen.mask(probability)                                            # uint8 0 ... 255 -> uint8 0 and 1
write_text(path, chosen.to_json()); Choice.read(path, made_for={})

Probabilities are stored in steps of 1/255, so chosen thresholds lie between two steps, at (k - 0.5) / 255.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kaggle_mgpu.parallel import distributed

from .data import Volume, read_label
from .metrics import components, without_specks
from .stacks import IGNORED, read_stack

FILE = "postprocessing.json"
SIZES = (0, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
"""The candidates for min_component, in voxels."""
Auto = Literal["auto"]


@dataclass(frozen=True)
class Choice:
    """The threshold and the smallest component (in voxels) of masks, and how both were chosen."""

    threshold: float = 0.5
    min_component: int = 0
    volumes: int = 0
    """Number of held-out volumes that the values were chosen on; 0: the values were given."""
    dice_before: float | None = None
    """Mean Dice of these volumes with the threshold 0.5 and all components kept."""
    dice_after: float | None = None
    """Mean Dice with the chosen values; slightly optimistic, since the values were chosen on the same volumes."""
    made_for: dict[str, Any] | None = None
    """The checksums of the weights and the settings of the predictions that the values were chosen for."""

    def mask(self, probability: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the mask, 1 for sheet, of a volume's probabilities in steps of 1/255, without small components."""
        return without_specks(probability >= step(self.threshold), self.min_component)

    def __str__(self) -> str:
        least = f"connected components of {self.min_component} voxels or more"
        text = f"threshold {self.threshold:.3f}, {least if self.min_component > 1 else 'all connected components'}"
        if self.dice_before is None or self.dice_after is None:
            return text
        many = f"{self.volumes} held-out volume{'s' * (self.volumes != 1)}"
        return f"{text}, chosen on {many}: Dice {self.dice_before:.4f} -> {self.dice_after:.4f}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path, made_for: dict[str, Any]) -> Choice | None:
        """Return the choice in a file; None if the file is missing or damaged, or its `made_for` differs."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            fits = (
                made_for.items() <= (found.made_for or {}).items()
                and 0 < found.threshold < 1
                and found.min_component >= 0
            )
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return found if fits else None


def known(
    threshold: float | Auto, min_component: int | Auto, made_for: dict[str, Any], files: Sequence[Path], held_out: bool
) -> Choice | None:
    """Return the choice in the settings or the first fitting file; None if the held-out volumes must decide first.

    A file fits if its choice was made for the weights and settings in `made_for`. If nothing is held out, a file fits
    if the weights are the same; if no file fits then, "auto" means threshold 0.5 and all components.
    """
    if threshold != "auto" and min_component != "auto":
        return Choice(threshold, min_component)
    for file in files:
        if found := Choice.read(file, made_for if held_out else {"weights": made_for["weights"]}):
            return found
    if held_out:
        return None
    defaults = Choice(0.5 if threshold == "auto" else threshold, 0 if min_component == "auto" else min_component)
    print(f"no held-out volumes to choose threshold and min_component on; using {defaults}", flush=True)
    return defaults


def step(threshold: float) -> int:
    """Return the smallest k of 1 ... 255 with (k - 0.5) / 255 >= threshold: stored values from k on are sheet."""
    return min(255, max(1, math.ceil(255 * threshold + 0.5 - 1e-9)))


def quantised(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return sigmoid(logits) as uint8, rounded to steps of 1/255."""
    return np.rint(255 / (1 + np.exp(-logits.clip(-30, 30)))).astype(np.uint8)


def choose_by_dice(
    volumes: Sequence[Volume],
    folder: Path,
    threshold: float | Auto,
    min_component: int | Auto,
    made_for: dict[str, Any] | None = None,
) -> Choice:
    """Choose the values that are "auto" by the mean Dice of the volumes; all ranks call this, each reads a share.

    First the threshold is chosen, with all components kept; then min_component, with this threshold. Among equally good
    values the function takes the threshold nearest to 0.5, and the smallest min_component.

    Args:
        folder: has the volumes' probabilities, <id>.tif.
        made_for: stored in the choice; see `Choice.made_for`.
    """
    mine = volumes[distributed.rank() :: distributed.world_size()]
    curve = _mean([dice_by_step(_probability(v, folder), read_label(v)) for v in mine])
    steps = sorted(range(1, 256), key=lambda k: (-curve[k - 1], abs(k - 128)))
    at = (steps[0] - 0.5) / 255 if threshold == "auto" else threshold
    least, after = min_component, curve[step(at) - 1]
    if least == "auto" or least > 0:
        sizes = SIZES if least == "auto" else (least,)
        by_size = _mean([dice_by_size(_probability(v, folder) >= step(at), read_label(v), sizes) for v in mine])
        best = int(by_size.argmax())
        least, after = sizes[best], by_size[best]
    return Choice(at, least, len(volumes), float(curve[step(0.5) - 1]), float(after), made_for)


def _probability(volume: Volume, folder: Path) -> NDArray[np.uint8]:
    return read_stack(str(folder / f"{volume.id}.tif"))


def _mean(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    distributed.alive()
    every = [row for part in distributed.gather(rows) for row in part]
    mean: NDArray[np.float64] = np.mean(every, axis=0)
    return mean


def dice_by_step(probability: NDArray[np.uint8], label: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Dice, as of `metrics.dice`, of the masks probability >= k for k = 1 ... 255, shape (255,)."""
    sheet = np.bincount(probability[label == 1], minlength=256)
    other = np.bincount(probability[label == 0], minlength=256)
    hits, found = (counts[::-1].cumsum()[::-1][1:] for counts in (sheet, sheet + other))
    return _dice(hits, found, int(sheet.sum()))


def dice_by_size(mask: NDArray[Any], label: NDArray[np.uint8], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Return the Dice of a mask without components below each size, float64 of the shape (len(sizes),).

    Unlabelled voxels count for the size of a component, but not for Dice.
    """
    numbers, count = components(mask)
    flat, known = numbers.reshape(-1), (label != IGNORED).reshape(-1)
    size = np.bincount(flat, minlength=count + 1)
    found = np.bincount(flat[known], minlength=count + 1)
    hits = np.bincount(flat[(label == 1).reshape(-1)], minlength=count + 1)
    for counts in (size, found, hits):
        counts[0] = 0  # the background
    kept = [size >= least for least in sizes]
    total = int((label == 1).sum())
    return _dice(np.array([hits[k].sum() for k in kept]), np.array([found[k].sum() for k in kept]), total)


def _dice(hits: NDArray[Any], found: NDArray[Any], sheet: int) -> NDArray[np.float64]:
    total = found + sheet
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)
