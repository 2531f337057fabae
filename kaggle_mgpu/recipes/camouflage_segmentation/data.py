"""Images and masks of camouflaged objects: files in the layouts of COD10K, or drawn scenes.

    found = prepare(None, scenes=200, val_scenes=50)   # files among Kaggle's inputs, each checked; else drawn scenes
    train = Samples(found.train, size=256, augment=True)

A sample is {"image": (3, size, size), "mask": (height, width)}, both uint8. For training the mask has the image's size;
for evaluation the mask keeps its original size, since the measures are defined at this size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kaggle_mgpu.machine import session

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Formats that Pillow may read. Pillow ignores a file's suffix, and would run Ghostscript on PostScript content."""
FOLDERS = (("Image", "GT_Object"), ("Imgs", "GT"), ("Image", "GT"), ("images", "masks"))
"""Names of the folders of images and masks: COD10K's own, those of SINet's and later archives, two common pairs."""
SPLITS = (("Train", "Test"), ("TrainDataset", "TestDataset"), ("train", "test"))
NOT_CAMOUFLAGED = "COD10K-NonCAM-"
"""Prefix of COD10K's images without a hidden object; papers train and test without these images."""
SOFT_EDGE = 0.05
"""Largest allowed share of a mask's pixels between 0 and 255; resized masks have soft edges."""
EXPECTED = (
    "expected the folders Train/Image and Train/GT_Object (COD10K-v3, with Test beside Train), TrainDataset/Imgs and "
    "TrainDataset/GT (with TestDataset beside them), or Imgs and GT"
)
Pair = tuple[str, str]
SCENE_SIZE = 96
FIRST_VAL_SCENE = 10**9
"""Number of the first held-out scene."""


@dataclass(frozen=True)
class Scenes:
    """Scenes draws the synthetic scenes numbered `first` to `first + count - 1`."""

    first: int
    count: int
    size: int = SCENE_SIZE

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene-{self.first + index}"

    def load(self, index: int) -> tuple[Image, Image]:
        pil, (image, mask) = pillow(), scene(self.first + index, self.size)
        return pil.fromarray(image), pil.fromarray(mask)


@dataclass(frozen=True)
class Files:
    """Files reads pairs of an image and its mask."""

    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return Path(self.pairs[index][0]).stem

    def load(self, index: int) -> tuple[Image, Image]:
        image, mask = self.pairs[index]
        return _decoded(image, lambda its: its.convert("RGB")), _decoded(mask, grey)


Source = Scenes | Files


def distinct_names(source: Source) -> list[str]:
    """Return a distinct file name for each image: NAME, or SET/NAME if test sets have the same names.

    Equal names in one folder (a.jpg and a.png) are numbered.
    """
    names = [source.name(index) for index in range(len(source))]
    if isinstance(source, Files) and len(set(names)) < len(names):
        # SET/Imgs/NAME.jpg
        names = [f"{Path(image).parents[1].name}/{name}" for (image, _), name in zip(source.pairs, names, strict=True)]
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 1
        while names[index] in taken:
            number += 1
            names[index] = f"{name}-{number}"
        taken.add(names[index])
    return names


@dataclass(frozen=True)
class Found:
    """The data of a run: `where` names the folder, and `reason` says why it was chosen."""

    train: Source
    val: Source | None
    where: str
    reason: str
    digest: str
    """A digest of names and sizes; a run continues only on data with the same digest."""

    @property
    def drawn(self) -> bool:
        return isinstance(self.train, Scenes)


def pillow() -> Any:
    """Import and return Pillow's module Image.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("camouflage_segmentation needs the package `pillow`: pip install pillow") from None
    return Image


def grey(mask: Image) -> Image:
    """Return a mask as an 8-bit grey image; transparent pixels become background, 0."""
    if mask.mode not in ("LA", "PA", "RGBA") and "transparency" not in mask.info:
        return mask.convert("L")
    from PIL import ImageChops

    full = mask.convert("RGBA")
    return ImageChops.multiply(full.convert("L"), full.getchannel("A"))


def _decoded(path: str, converted: Callable[[Image], Image]) -> Image:
    try:
        with pillow().open(path, formats=FORMATS) as image:
            return converted(image)
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None


# Finding
def prepare(
    data_path: str | None, *, val_fraction: float = 0.1, test_set: str | None = None, scenes: int, val_scenes: int
) -> Found:
    """Find the data and check each pair of files.

    Args:
        val_fraction: share of the images to hold out if there is no test folder.
        test_set: the folder in TestDataset to hold out. None: COD10K, else all folders.
        scenes, val_scenes: numbers of scenes to draw where there are no files.

    Raises:
        FileNotFoundError: no such folder or test set, none of the layouts in the folder, or an image without a mask.
        ValueError: no images to train on or hold out, or unusable files; the message names up to five.
    """
    root, reason = _root(data_path)
    if root is None:
        digest = f"{scenes} and {val_scenes} scenes of {SCENE_SIZE}"
        val = Scenes(FIRST_VAL_SCENE, val_scenes) if val_scenes else None
        return Found(Scenes(0, scenes), val, "synthetic scenes, drawn for this run (not photographs)", reason, digest)
    train, val_pairs = _splits(root, test_set)
    if not val_pairs and val_fraction:
        reason += f"; no test folder, so {val_fraction:g} of the images are held out"
        held = _held_out(train, val_fraction)
        train, val_pairs = [pair for pair in train if pair not in held], [pair for pair in train if pair in held]
    if not train or (val_fraction and not val_pairs):
        raise ValueError(
            f"{root}: {len(train)} images to train on and {len(val_pairs)} to hold out; expected both, each a "
            f"{', '.join(IMAGES)} file"
        )
    check([*train, *val_pairs])
    listing = [[os.path.relpath(path, root), os.stat(path).st_size] for pair in [*train, *val_pairs] for path in pair]
    digest = hashlib.sha256(json.dumps([len(train), listing]).encode()).hexdigest()[:16]
    return Found(Files(tuple(train)), Files(tuple(val_pairs)) if val_pairs else None, str(root), reason, digest)


def _root(data_path: str | None) -> tuple[Path | None, str]:
    """Return the folder with one of the layouts (None: no such input), and the reason for the choice."""
    patterns = [f"{train}/{masks}" for train, _ in SPLITS for masks in dict.fromkeys(masks for _, masks in FOLDERS)]
    if data_path is None:
        # an input must have a training folder: folders called images and masks alone may belong to any data set
        for pattern in patterns:
            if found := session.find(pattern):
                return found[0].parents[1], f"found among the inputs by the folder {pattern}"
        return None, f"no data_path, and no {patterns[0]} or {patterns[1]} among the inputs"
    path = Path(data_path).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"data_path: no such folder: {path}")
    if any((path / masks).is_dir() for _, masks in FOLDERS):
        return path, "data_path"
    for pattern in patterns:
        if found := session.find(pattern, roots=[path], max_depth=4):
            return found[0].parents[1], "data_path"
    entries = sorted(entry.name for entry in path.iterdir())[:8]
    raise FileNotFoundError(f"data_path: {EXPECTED} in {path}; this folder holds {', '.join(entries) or 'nothing'}")


def _splits(root: Path, test_set: str | None) -> tuple[list[Pair], list[Pair]]:
    for train, test in SPLITS:
        if (pairs := _folder_pairs(root / train)) is not None:
            return pairs, _test_pairs(root / test, test_set)
    return _folder_pairs(root) or [], []


def _test_pairs(folder: Path, test_set: str | None) -> list[Pair]:
    if (pairs := _folder_pairs(folder)) is not None:
        if test_set is not None:
            raise FileNotFoundError(
                f"test_set: no {test_set!r} in {folder}, which is a single test set: leave test_set out"
            )
        return pairs
    have = _sets(folder)
    wanted = test_set or ("COD10K" if "COD10K" in have else None)
    if wanted is None:
        return [pair for pairs in have.values() for pair in pairs]
    if wanted not in have:
        raise FileNotFoundError(f"test_set: no {wanted!r} with images and masks in {folder}; it has {list(have)}")
    return have[wanted]


def _sets(folder: Path) -> dict[str, list[Pair]]:
    """Return the pairs of each test set in a folder of several test sets, by the set's name."""
    sets = {child.name: _folder_pairs(child) for child in sorted(folder.glob("*/"))}
    return {name: pairs for name, pairs in sets.items() if pairs is not None}


def test_sets(found: Found) -> dict[str, Files]:
    """Return all test sets beside the training data by name, even sets not used as held-out data; {} for drawn scenes.

    Raises:
        ValueError: unusable files; the message names up to five.
    """
    for train, test in () if found.drawn else SPLITS:
        if _folder_pairs(Path(found.where, train)) is not None:
            one = _folder_pairs(folder := Path(found.where, test))
            sets = _sets(folder) if one is None else {folder.name: one}
            check([pair for pairs in sets.values() for pair in pairs])
            return {name: Files(tuple(pairs)) for name, pairs in sets.items() if pairs}
    return {}


def _folder_pairs(folder: Path) -> list[Pair] | None:
    """Return the (image, mask) paths in a folder; None if the folder has no folder of masks."""
    for image_name, mask_name in FOLDERS:
        images, masks = folder / image_name, folder / mask_name
        if not masks.is_dir():
            continue
        if not images.is_dir():
            if any((folder / other).is_dir() for other, beside in FOLDERS if beside == mask_name):
                continue
            raise FileNotFoundError(f"missing folder of images: {images}, for the masks in {masks}")
        of_stem = {path.stem: path for path in _files(masks)}
        found = [path for path in _files(images) if not path.name.startswith(NOT_CAMOUFLAGED)]
        missing = [path for path in found if path.stem not in of_stem]
        if missing:
            more = f" (and {len(missing) - 1} more images without a mask)" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"{missing[0]}: no mask for this image, expected {masks / missing[0].stem}.png{more}"
            )
        return [(str(path), str(of_stem[path.stem])) for path in found]
    return None


def _files(folder: Path) -> list[Path]:
    found = session.find("*", [folder], max_depth=1, limit=session.MOST_ENTRIES)
    return [path for path in found if path.suffix.lower() in IMAGES]


def _held_out(pairs: Sequence[Pair], fraction: float) -> set[Pair]:
    """Choose the pairs whose image name has a digest, scaled to 0 ... 1, below `fraction`.

    Of several pairs at least the pair with the lowest digest is chosen. Unless no digest is below `fraction`, added
    images do not change the choice among the others.
    """
    place = {pair: int(hashlib.sha256(Path(pair[0]).name.encode()).hexdigest()[:8], 16) / 2**32 for pair in pairs}
    first = [min(pairs, key=lambda pair: place[pair])] if len(pairs) > 1 else []
    return {pair for pair in pairs if place[pair] < fraction} | set(first)


# Checking
def check(pairs: Sequence[Pair]) -> None:
    """Check before training that each image and mask can be read, and that the masks' sizes and values are valid.

    Raises:
        ValueError: unusable files; the message names up to five.
    """
    with ThreadPoolExecutor(8) as pool:  # threads help: Pillow decodes without the interpreter's lock
        problems = [problem for problem in pool.map(_problem, pairs) if problem]
    if problems:
        more = f"\n(and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("\n".join(problems[:5]) + more)


def _problem(pair: Pair) -> str | None:
    path, pil = pair[0], pillow()
    try:
        with pil.open(path, formats=FORMATS) as image:
            size = image.size
            image.draft("L", (1, 1))  # reads a JPEG to its end, but at low resolution: 1.7 ms instead of 2.7
            image.load()
        path = pair[1]
        with pil.open(path, formats=FORMATS) as mask:
            if mask.size != size:
                return f"{path}: expected a mask of {pair[0]}'s size {_by(size)}, got {_by(mask.size)}"
            counts = grey(mask).histogram()
            bands = np.reshape(mask.getextrema(), (-1, 2))[
                : 3 if mask.mode == "RGBA" else 1 if mask.mode == "LA" else None
            ]
            # in the mask's own values: palette indices or faint colours may differ and still all become grey 0
            differ = bool((bands[:, 0] < bands[:, 1]).any())
    except Exception as error:  # Pillow's decoders raise nearly anything
        return f"{path}: cannot be read as an image: {error}"
    values = [value for value, count in enumerate(counts) if count]
    between = 1 - (counts[0] + counts[255]) / sum(counts)
    # a mask of 0 and 1 would count as empty, since only values above 128 are object
    if between > SOFT_EDGE or 0 < values[-1] <= 128:
        return (
            f"{path}: expected a mask of 0 (background) and 255 (object), at most {SOFT_EDGE:.0%} of the pixels "
            f"between (soft edges); got values from {values[0]} to {values[-1]}, {between:.1%} of the pixels neither "
            f"0 nor 255"
        )
    if not values[-1] and differ:
        return f"{path}: converted to 8-bit grey, this mask is all 0, but its own values differ; expected 0 and 255"
    return None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# Samples
class Samples(Dataset[dict[str, Tensor]]):
    """Samples resizes a source's images, and augments them with torch's generator, which the loader seeds per sample.

    Args:
        size: side of the images in pixels.
        augment: whether the samples are for training: then image and mask go through `augmented`.
        rotation: the largest angle, in degrees, by which augmented images are rotated.
    """

    def __init__(self, source: Source, size: int, augment: bool, rotation: float = 0.0) -> None:
        self.source, self.size, self.augment, self.rotation = source, size, augment, rotation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, mask = self.source.load(index)
        if self.augment:
            image, mask = augmented(image, mask, self.size, self.rotation)
        return {"image": pixels(image, self.size), "mask": torch.from_numpy(np.array(mask))}


def pixels(image: Image, size: int) -> Tensor:
    """Return an RGB Pillow image, resized, as uint8 (3, size, size)."""
    if image.size != (size, size):
        image = image.resize((size, size), pillow().Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def augmented(image: Image, mask: Image, side: int, rotation: float = 0.0) -> tuple[Image, Image]:
    """Crop at random to 3/4 of each side or more, resize to `side` pixels, mirror, rotate, change colours."""
    from PIL import ImageEnhance, ImageStat

    pil = pillow()
    scale, left, top, mirror, *colours = torch.rand(7).tolist()
    scale = 0.75 + 0.25 * scale
    width, height = scale * image.width, scale * image.height
    x, y = left * (image.width - width), top * (image.height - height)
    box = (x, y, x + width, y + height)
    image = image.resize((side, side), pil.Resampling.BILINEAR, box)
    mask = mask.resize((side, side), pil.Resampling.BILINEAR, box)
    if mirror < 0.5:
        image = image.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    if rotation:
        angle = rotation * (2 * torch.rand(()).item() - 1)
        mean = tuple(round(value) for value in ImageStat.Stat(image).mean)  # for the corners, which rotation empties
        image = image.rotate(angle, pil.Resampling.BILINEAR, fillcolor=mean)
        mask = mask.rotate(angle, pil.Resampling.BILINEAR)
    for change, amount in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), colours, strict=True
    ):
        image = change(image).enhance(0.8 + 0.4 * amount)
    return image, mask


def collate(samples: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch: image (B, 3, S, S); mask (B, H, W), padded by 0 to the largest; size (B, 2), each mask's own."""
    samples = list(samples)
    sizes = torch.tensor([sample["mask"].shape for sample in samples])
    height, width = sizes.amax(0).tolist()
    masks = torch.zeros(len(samples), height, width, dtype=torch.uint8)
    for row, sample in zip(masks, samples, strict=True):
        row[: sample["mask"].shape[0], : sample["mask"].shape[1]] = sample["mask"]
    return {"image": torch.stack([sample["image"] for sample in samples]), "mask": masks, "size": sizes}


# Drawn scenes
@functools.lru_cache(maxsize=2048)
def scene(number: int, size: int = SCENE_SIZE) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw the image (size, size, 3) and mask (size, size) of a scene; a number always gives the same scene.

    An object with a smooth random outline lies in a texture of waves of one direction. The object's texture has the
    same colours and contrast, but finer waves of all directions, so neither brightness nor colour reveals the object.
    """
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:size, :size] / size
    # the outline: a radius that changes smoothly with the angle
    centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.13, 0.26)
    angle, outline = np.arctan2(y - centre[0], x - centre[1]), np.ones((size, size))
    for k in range(1, 6):
        outline += rng.uniform(0, 0.35) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    distance = np.hypot(y - centre[0], x - centre[1]) - radius * outline
    inside = np.clip(0.5 - distance * size, 0, 1)

    frequency, direction = rng.uniform(0.09, 0.14), rng.uniform(0, np.pi)
    image = np.broadcast_to(rng.uniform(90, 165, 3), (size, size, 3)).copy()
    for colour in rng.uniform(-34, 34, (2, 3)):
        around, within = _texture(rng, size, frequency, direction), _texture(rng, size, 1.4 * frequency, None)
        image += (around * (1 - inside) + within * inside)[..., None] * colour
    shade = rng.uniform(-30, 30, 2)
    image += (shade[0] * (y - 0.5) + shade[1] * (x - 0.5))[..., None] + rng.normal(0, 5, (size, size, 3))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), (inside >= 0.5).astype(np.uint8) * 255


def _texture(rng: np.random.Generator, size: int, frequency: float, direction: float | None) -> NDArray[np.float64]:
    """Draw waves of about `frequency` cycles per pixel along `direction` (radians; None: all); mean 0, variance 1."""
    v, u = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]
    if direction is None:
        keep = np.exp(-(((np.hypot(u, v) - frequency) / 0.03) ** 2) / 2)
    else:
        across, along = u * np.cos(direction) + v * np.sin(direction), v * np.cos(direction) - u * np.sin(direction)
        keep = np.exp(-(((np.abs(across) - frequency) / 0.03) ** 2 + (along / 0.06) ** 2) / 2)
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * keep).real
    return np.asarray((waves - waves.mean()) / waves.std(), np.float64)
