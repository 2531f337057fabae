"""Cut volumes into training patches and evaluation tiles.

patch = Patches(volumes, facts, cache, ...)[0]    # image (1, p, p, p) float32, label (p, p, p) uint8
tile = Tiles(volumes, facts, cache, size=128)[0]  # the same; all tiles together cover each volume once
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .data import Cache, Facts, Volume, survey
from .stacks import IGNORED, Array, shape_of

MAX_TRIES = 20


def crop(volume: Array, start: Sequence[int], size: Sequence[int], fill: int) -> Array:
    """Return the box of `size` voxels at `start` (may be negative) of a volume, with `fill` outside the volume."""
    out = np.full(tuple(size), fill, volume.dtype)
    low = [max(0, s) for s in start]
    high = [min(n, s + p) for n, s, p in zip(volume.shape, start, size, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[inside] = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return out


class Patches(Dataset[tuple[Tensor, ...]]):
    """`per_volume` random cubes of each volume per epoch, drawn from torch's generator.

    An item is (image, label) as from `cut`, and with `medial` also the `medial_surface` of the sheets, (size, size,
    size) bool. A cube without any labelled voxel is drawn again, up to MAX_TRIES times.

    A share `sheet_fraction` of the cubes is centred on a voxel of the sheet (shifted by up to a quarter of the cube's
    side), so that rare sheets are seen too; the others lie anywhere.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        facts: dict[str, Facts],
        cache: Cache,
        *,
        size: int,
        per_volume: int,
        sheet_fraction: float,
        augment: bool,
        medial: bool = False,
    ) -> None:
        self.volumes, self.facts, self.cache, self.medial = list(volumes), facts, cache, medial
        self.size, self.per_volume, self.sheet_fraction, self.augment = size, per_volume, sheet_fraction, augment

    def __len__(self) -> int:
        return len(self.volumes) * self.per_volume

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        volume = self.volumes[index // self.per_volume]
        facts = self.facts.get(volume.id) or survey(volume, self.cache)
        image, label = cut(self.cache, volume, facts, self.place(volume, facts), self.size)
        # a patch without a label teaches nothing, and a step of such patches alone would have no loss
        for _ in range(MAX_TRIES if facts.counts[2] else 0):
            if (label != IGNORED).any():
                break
            image, label = cut(self.cache, volume, facts, self.place(volume, facts), self.size)
        masks = (label, torch.from_numpy(medial_surface(label.numpy() == 1))) if self.medial else (label,)
        return augmented(image, *masks) if self.augment else (image, *masks)

    def place(self, volume: Volume, facts: Facts) -> list[int]:
        """Draw the start (page, row, column) of a cube; a volume smaller than the cube lies in the cube's middle."""
        room = [n - self.size for n in facts.shape]
        if float(torch.rand(())) < self.sheet_fraction and facts.counts[1]:
            points = self.cache.points(volume)
            centre = points[int(torch.randint(len(points), ()))].astype(int)
            start = [int(c) - self.size // 2 + _random_offset(self.size // 4) for c in centre]
            start = [min(max(0, s), max(0, r)) for s, r in zip(start, room, strict=True)]
        else:
            start = [int(torch.randint(max(0, r) + 1, ())) for r in room]
        return [s if r >= 0 else r // 2 for s, r in zip(start, room, strict=True)]


class Tiles(Dataset[tuple[Tensor, Tensor]]):
    """Cubes, as from `cut`, covering each volume exactly once; voxels beyond the volume are unlabelled."""

    def __init__(self, volumes: Sequence[Volume], facts: dict[str, Facts], cache: Cache, *, size: int) -> None:
        self.volumes, self.facts, self.cache, self.size = list(volumes), facts, cache, size
        self.places: list[tuple[Volume, tuple[int, ...]]] = []
        for volume in volumes:
            shape = facts[volume.id].shape if volume.id in facts else shape_of(volume.image)
            corners = itertools.product(*(range(0, side, size) for side in shape))
            self.places += [(volume, corner) for corner in corners]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        volume, start = self.places[index]
        facts = self.facts.get(volume.id) or survey(volume, self.cache)
        return cut(self.cache, volume, facts, start, self.size)


def _random_offset(reach: int) -> int:
    return int(torch.randint(-reach, reach + 1, ()))


def cut(cache: Cache, volume: Volume, facts: Facts, start: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Return a cube of a volume: image (1, size, size, size) float32 and label (size, size, size) uint8.

    The image is standardised by the volume's mean and standard deviation. Outside the volume, image is 0 and label 2.
    """
    low = [max(0, s) for s in start]
    high = [min(n, s + size) for n, s in zip(facts.shape, start, strict=True)]
    inside = (slice(None), slice(low[1], high[1]), slice(low[2], high[2]))
    image = cache.read(volume, "image", low[0], high[0])[inside].astype(np.float32)
    label = cache.read(volume, "label", low[0], high[0])[inside]
    begin = [s - first for s, first in zip(start, low, strict=True)]
    image = crop((image - np.float32(facts.mean)) / np.float32(facts.std), begin, [size] * 3, 0)
    return torch.from_numpy(image)[None], torch.from_numpy(crop(label, begin, [size] * 3, IGNORED))


def medial_surface(sheet: Array) -> NDArray[np.bool_]:
    """Return the voxels in the middle of the sheets of a bool mask (D, H, W), as a mask; 50 ms for 128^3.

    In the middle no neighbour has a larger city-block distance to the background. A skeleton by thinning (Lee et al.
    1994, scikit-image) would consist of lines: they have 1.5 % of the voxels of sheets 3 voxels thick, or 29 % if
    widened to tubes by 2 voxels. The middle has 43 % of the voxels, and reaches everywhere in the sheets.
    """
    from scipy import ndimage

    depth = ndimage.distance_transform_cdt(sheet, "taxicab")
    middle: NDArray[np.bool_] = sheet & (depth == ndimage.maximum_filter(depth, 3))
    return middle


def augmented(image: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
    """Apply one of the cube's 48 flips and rotations, then contrast, brightness and noise, from torch's generator.

    Args:
        image: (1, D, H, W) float32; only its values change.
        masks: (D, H, W) each; flipped and rotated as the image.
    """
    axes = torch.randperm(3).tolist()
    flips = [axis for axis in range(3) if float(torch.rand(())) < 0.5]
    image, *moved = (x.permute(axes).flip(flips) for x in (image[0], *masks))
    contrast, brightness, noise = (torch.rand(3) - 0.5).tolist()
    image = image[None] * (1 + 0.4 * contrast) + 0.4 * brightness
    if noise > 0:  # in half of the patches
        image = image + 0.4 * noise * torch.randn(image.shape)
    return image.contiguous(), *(mask.contiguous() for mask in moved)
