"""Predict whole volumes by a Gaussian-blended sliding window, even if sessions are killed; write submission.zip.

for start, logits in sliding_window(forward, volume, size=128): ...   # finished planes, in order
left = predict(forward, jobs, size=128, ...)                          # on every rank, each its share
write_submission(zip_path, predictions, test); validate_submission(zip_path, test_images)
"""

from __future__ import annotations

import io
import itertools
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaggle_mgpu.checkpoints import atomically, write_text
from kaggle_mgpu.parallel import distributed

from .data import stacks_in
from .metrics import without_specks
from .patches import crop
from .postprocessing import Choice, quantised
from .stacks import read_stack, shape_of, write_stack

Forward = Callable[[Tensor], Tensor]
"""Standardised windows (B, 1, size, size, size), on the CPU -> logits of the same shape, on the CPU, float32."""
LZW = 5  # LZW's value of the TIFF tag Compression


def importance(size: int, sigma_scale: float = 0.125) -> Tensor:
    """Return the weights of a window's voxels, (size, size, size): a Gaussian around its middle, at least 1e-3.

    The standard deviation is sigma_scale * size voxels: MONAI's formula (monai.data.utils.compute_importance_map).
    """
    x = torch.arange(-(size - 1) / 2, (size - 1) / 2 + 1)
    line = torch.exp(-(x**2) / (2 * (sigma_scale * size) ** 2))
    cube = line[:, None, None] * line[None, :, None] * line[None, None, :]
    return cube.clamp(min=max(float(cube.min()), 1e-3))


def starts(length: int, size: int, overlap: float) -> list[int]:
    """Return the windows' starts along an axis of length >= size: every size * (1 - overlap), and the last possible.

    monai.data.utils.dense_patch_slices chooses the same starts.
    """
    return [*range(0, length - size, max(1, int(size * (1 - overlap)))), length - size]


@torch.no_grad()
def sliding_window(
    forward: Forward,
    volume: NDArray[Any],
    *,
    size: int,
    overlap: float = 0.5,
    together: bool = False,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the blended logits of a volume in blocks of finished planes: (first plane's index, logits (planes, H, W)).

    Besides the volume, this takes the memory of seven slabs of size x H x W float32 (`together`: nine), for any D: 356
    MB measured for 128 x 320 x 320. A volume smaller than the window is padded with its mean, evenly on both sides.

    Args:
        volume: (D, H, W) uint8 or uint16; standardised by its own mean and deviation.
        size: side of the window in voxels.
        overlap: overlap of neighbouring windows, as a share of their side.
        together: all ranks call this; each computes a share of the windows, and gets all planes.
    """
    rank, world = (distributed.rank(), distributed.world_size()) if together else (0, 1)
    mean, std = np.float32(volume.mean(dtype=np.float64)), np.float32(max(volume.std(dtype=np.float64), 1.0))
    shape = [max(n, size) for n in volume.shape]
    before = [(padded - n) // 2 for padded, n in zip(shape, volume.shape, strict=True)]
    batch = max(1, min(8, 128**3 // size**3))  # a window of 128^3 fills a GPU; smaller ones are batched
    weight = importance(size)
    corners = list(itertools.product(starts(shape[1], size, overlap), starts(shape[2], size, overlap)))
    slab = (size, shape[1], shape[2])
    weights = torch.zeros(slab)  # the sum of the weights of all windows that begin at the same plane
    for y, x in corners:
        weights[:, y : y + size, x : x + size] += weight
    total, norm = torch.zeros(slab), torch.zeros(slab)
    planes = starts(shape[0], size, overlap)
    for z, following in zip(planes, [*planes[1:], shape[0]], strict=True):
        low, high = max(0, z - before[0]), min(volume.shape[0], z - before[0] + size)
        begin = [z - before[0] - low, -before[1], -before[2]]
        standard = torch.from_numpy(crop((volume[low:high].astype(np.float32) - mean) / std, begin, slab, 0))
        layer = torch.zeros(slab) if together else total
        mine = corners[rank::world]
        for i in range(0, len(mine), batch):
            some = mine[i : i + batch]
            logits = forward(torch.stack([standard[None, :, y : y + size, x : x + size] for y, x in some]))
            for (y, x), window in zip(some, logits[:, 0], strict=True):
                layer[:, y : y + size, x : x + size] += window * weight
            distributed.alive()
        if together:
            total += distributed.sum(layer)
        norm += weights
        done = following - z
        out = (total[:done] / norm[:done]).numpy()
        first, last = max(z, before[0]), min(following, before[0] + volume.shape[0])
        if first < last:
            inside = tuple(slice(b, b + n) for b, n in zip(before[1:], volume.shape[1:], strict=True))
            yield first - before[0], out[(slice(first - z, last - z), *inside)]
        for slabs in (total, norm):  # drop the finished planes
            slabs[: size - done] = slabs[done:].clone()
            slabs[size - done :] = 0


@dataclass(frozen=True)
class Job:
    """A volume to predict, and where its prediction goes."""

    image: str
    """The path of the image's TIFF stack."""
    path: Path
    """The file for the mask."""
    probability: Path | None = None
    """The file for the probabilities of the sheet, uint8 in steps of 1/255; None: no file."""

    def begun(self) -> bool:
        """Return whether the model has predicted the volume: the file of the mask or of the probabilities exists."""
        return self.path.is_file() or (self.probability is not None and self.probability.is_file())

    def missing(self, masks: bool) -> bool:
        """Return whether a wanted file is missing: the probabilities (unless None) or, with `masks`, the mask."""
        wanted = [self.path] * masks + ([self.probability] if self.probability else [])
        return not all(path.is_file() for path in wanted)


def predict(
    forward: Forward,
    jobs: Sequence[Job],
    *,
    size: int,
    overlap: float = 0.5,
    choice: Choice | None,
    seconds_left: float = math.inf,
    count: Path | None = None,
) -> int:
    """Predict the volumes whose predictions are missing, on all ranks; return the number left when the time is up.

    Each rank predicts whole volumes, so the result does not depend on the number of ranks. Only if fewer volumes are
    missing than there are ranks, all ranks share the windows of each. Predictions are written atomically: after a kill,
    the next call predicts the missing volumes, and makes missing masks from existing probabilities.

    Memory: 2 bytes per voxel of a uint8 volume (4 with probabilities), plus that of `sliding_window`. Later, instead of
    the windows' memory, min_component above 1 takes 12 bytes per voxel.

    Args:
        forward, size, overlap: as for `sliding_window`.
        choice: the threshold and the smallest component of masks; None: only probabilities are written.
        seconds_left: time for this call. A volume is begun only if 1.5 times the slowest volume's time so far is left.
        count: a file for the progress, {"predicted": N}.
    """

    def note() -> None:
        if count is not None and distributed.is_main():
            write_text(count, json.dumps({"predicted": sum(job.begun() for job in jobs)}))

    began, slowest = time.monotonic(), 0.0
    pending = distributed.from_main(lambda: [job for job in jobs if job.missing(choice is not None)])
    together = 0 < len(pending) < distributed.world_size()
    note()
    cut = 0.0 if choice is None else math.log(choice.threshold / (1 - choice.threshold))
    for job in pending if together else pending[distributed.rank() :: distributed.world_size()]:
        late = seconds_left - (time.monotonic() - began) < 1.5 * slowest
        if distributed.agree(late) if together else late:
            break
        start = time.monotonic()
        writes = not together or distributed.is_main()
        if job.probability is not None and job.probability.is_file():
            probability: NDArray[np.uint8] | None = read_stack(str(job.probability))
        else:
            volume = read_stack(job.image)
            probability = None if job.probability is None else np.zeros(volume.shape, np.uint8)
            mask = np.zeros(volume.shape, np.uint8)
            for first, logits in sliding_window(forward, volume, size=size, overlap=overlap, together=together):
                if probability is None:
                    mask[first : first + len(logits)] = logits > cut
                else:
                    probability[first : first + len(logits)] = quantised(logits)
            if writes and job.probability is not None and probability is not None:
                write_stack(job.probability, probability)
        if writes and choice is not None and not job.path.is_file():
            kept = without_specks(mask, choice.min_component) if probability is None else choice.mask(probability)
            write_stack(job.path, kept)
        note()
        slowest = max(slowest, time.monotonic() - start)
        if distributed.is_main():
            print(f"predicted {job.path.name} in {time.monotonic() - start:.1f} s", flush=True)
    distributed.barrier()
    note()  # once more, since the other ranks may have predicted volumes after rank 0's last one
    return distributed.from_main(lambda: sum(job.missing(choice is not None) for job in jobs))


# submission.zip
def write_submission(path: Path, predictions: dict[str, Path]) -> None:
    """Write a zip with each mask file, by id, as `<id>.tif`, atomically; the same files give the same bytes."""
    with atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(predictions):
            entry = zipfile.ZipInfo(f"{name}.tif", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, predictions[name].read_bytes())


def validate_submission(path: str | Path, test_images: str | Path) -> int:
    """Check every page of a submission.zip, and return its number of volumes.

    The zip must hold `<id>.tif` for each stack in the folder test_images, and nothing else. Each must be an
    LZW-compressed uint8 stack of 0 and 1, of the image's shape.

    Raises:
        ValueError: the zip does not fit this description; the message lists up to five faults.
    """
    wanted = stacks_in(Path(test_images))
    wrong: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wrong += [f"{name} is in the zip twice" for name in sorted({n for n in names if names.count(n) > 1})]
            wrong += [f"{i}.tif is missing in the zip" for i in sorted(wanted) if f"{i}.tif" not in names]
            for name in sorted(set(names)):
                if name.removesuffix(".tif") not in wanted or not name.endswith(".tif"):
                    wrong.append(f"{name} belongs to no volume of {test_images}")
                else:
                    expected = shape_of(str(wanted[name.removesuffix(".tif")]))
                    wrong += [f"{name}: {error}" for error in _wrong_in(archive.read(name), expected)]
    except (zipfile.BadZipFile, OSError) as error:
        wrong.append(f"not a readable zip: {error}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:5])}{more}")
    return len(wanted)


def _wrong_in(content: bytes, expected: tuple[int, int, int]) -> list[str]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["TIFF"]) as stack:
            shape = (int(getattr(stack, "n_frames", 1)), stack.height, stack.width)
            if shape != expected:
                return [f"expected the shape {expected}, got {shape}"]
            for i in range(shape[0]):
                stack.seek(i)
                tags: Any = stack.tag_v2  # type: ignore[attr-defined]
                if stack.mode != "L" or tags.get(258) not in (8, (8,)):
                    return [f"page {i}: expected uint8, got mode {stack.mode!r}"]
                if tags.get(259) != LZW:
                    return [f"page {i}: expected LZW (compression 5), got compression {tags.get(259)}"]
                page = np.asarray(stack)
                if page.shape != expected[1:] or page.max(initial=0) > 1:
                    got = f"values up to {page.max()} and shape {page.shape}"
                    return [f"page {i}: expected values 0 and 1 and shape {expected[1:]}, got {got}"]
    except (OSError, SyntaxError, EOFError, KeyError, TypeError, ValueError) as error:
        return [f"not a readable TIFF stack: {error}"]
    return []
