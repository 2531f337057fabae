"""Find, check and split scroll volumes, and read them from TIFF stacks.

    catalogue = find_volumes(None, Path("synthetic"))            # train_images/, train_labels/, test_images/, *.csv
    facts = survey(catalogue.train[0], Cache.at(None, max_gb=40))  # decodes image and label once: checks, statistics

The format is that of Kaggle's Vesuvius Challenge Surface Detection: uint8 (or uint16) stacks of LZW pages. Labels are 0
background, 1 sheet and 2 unlabelled; `Config.ignore_label` sets another value for unlabelled voxels. Without such data
among the inputs, small volumes are synthesised in the same format.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaggle_mgpu.machine import session

from .stacks import IGNORED, SUFFIXES, Array, bytes_of, read_stack, shape_of
from .synthetic import synthesise

MAX_POINTS = 4096


@dataclass(frozen=True)
class Volume:
    """The paths of one volume's image and label. Test images have the label None."""

    id: str
    image: str
    label: str | None = None
    scroll: str = ""
    """The scroll_id of train.csv; volumes of one scroll look alike."""
    ignore_label: int = IGNORED
    """The value of unannotated voxels in the label's file; `read_label` replaces this value by IGNORED."""


@dataclass(frozen=True)
class Catalogue:
    """The volumes of a data folder `source`, listed without decoding; `reason` says why this folder was chosen."""

    source: str
    reason: str
    train: tuple[Volume, ...]
    test: tuple[Volume, ...]
    digest: str
    """A digest of names and file sizes; a run continues only on data with the same digest."""
    synthetic: bool = False


@dataclass(frozen=True)
class Facts:
    """The shape, grey values and label counts of one volume."""

    shape: tuple[int, int, int]
    mean: float
    std: float
    counts: tuple[int, int, int]
    """Numbers of voxels labelled background, sheet and unlabelled."""


# Finding
def find_volumes(data_path: str | None, synthetic: Path, ignore_label: int = IGNORED) -> Catalogue:
    """Return the volumes under `data_path`, else among the Kaggle inputs, else synthesised ones under `synthetic`.

    Args:
        ignore_label: the value of unannotated voxels in the label files; synthetic labels always have IGNORED.

    Raises:
        FileNotFoundError: a folder is missing, or the label of an image, or the image of an id in a CSV file.
        ValueError: two stacks with one id, or a CSV file that is unreadable or has no column id.
    """
    if data_path is not None:
        root, reason = Path(data_path).expanduser().resolve(), "data_path"
        if not root.is_dir():
            raise FileNotFoundError(f"data_path: no such folder: {root}")
        if not (root / "train_images").is_dir():
            below = [folder for folder in session.find("train_images", [root], max_depth=4) if folder.is_dir()]
            root = below[0].parent if below else root
    else:
        found = [folder for folder in session.find("train_images") if folder.is_dir()]
        if not found:
            synthesise(synthetic)
            reason = (
                "no data_path, and no folder train_images among the inputs: SYNTHETIC volumes, only to try the recipe"
            )
            return replace(_catalogue(synthetic, reason, IGNORED), synthetic=True)
        root, reason = found[0].parent, f"the first of {len(found)} folders with train_images among the inputs"
    return _catalogue(root, reason, ignore_label)


def _catalogue(root: Path, reason: str, ignore_label: int) -> Catalogue:
    for name in ("train_images", "train_labels"):
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"{root / name}: no such folder. Expected train_images/, train_labels/ and, to predict, test_images/ "
                f"with one .tif stack per volume in {root}"
            )
    images, labels = stacks_in(root / "train_images"), stacks_in(root / "train_labels")
    test = stacks_in(root / "test_images") if (root / "test_images").is_dir() else {}
    for name, files, among in (("train.csv", images, "train_images"), ("test.csv", test, "test_images")):
        for row in _rows(root / name):
            if row["id"] not in files:
                raise FileNotFoundError(
                    f"{root / name} names {row['id']!r}, but there is no {root / among / (row['id'] + '.tif')}"
                )
    if not images:
        raise FileNotFoundError(f"no .tif file in {root / 'train_images'}")
    for name in images:
        if name not in labels:
            raise FileNotFoundError(
                f"{root / 'train_labels' / (name + '.tif')}: no such file, but there is the image {images[name]}"
            )
    scrolls = {row["id"]: row.get("scroll_id") or "" for row in _rows(root / "train.csv")}
    # all volumes with a label are trained on, also those that train.csv does not list
    train = tuple(Volume(i, str(images[i]), str(labels[i]), scrolls.get(i, ""), ignore_label) for i in sorted(images))
    tests = tuple(Volume(i, str(test[i])) for i in sorted(test))
    listing = [[v.id, os.path.getsize(v.image), os.path.getsize(str(v.label)), v.scroll, *_ignoring(v)] for v in train]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    return Catalogue(str(root), reason, train, tests, digest)


def stacks_in(folder: Path) -> dict[str, Path]:
    """Return the TIFF files in a folder by id, the name without suffix. Raises ValueError for two files with one id."""
    found: dict[str, Path] = {}
    for path in session.find("*", [folder], max_depth=1, limit=session.MOST_ENTRIES):
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in found:
            raise ValueError(f"{path}: the folder also has {found[path.stem].name}; expected one stack per name")
        found[path.stem] = path
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable .csv in UTF-8: {error}") from None
    if rows and "id" not in rows[0]:
        raise ValueError(f"{path}: expected a column 'id', got {', '.join(map(str, rows[0]))}")
    return rows


def folds_of(volumes: Sequence[Volume], folds: int) -> list[list[Volume]]:
    """Divide volumes into folds of similar size; volumes of one scroll stay together.

    Scrolls are assigned from the largest to the smallest, each to the fold with the fewest volumes so far. If all
    volumes are of one scroll, or no scroll is named, single volumes are assigned. Only ids and scrolls matter.

    Raises:
        ValueError: fewer than two folds, or more folds than scrolls (or single volumes).
    """
    scrolls: dict[str, list[Volume]] = {}
    for volume in volumes:
        scrolls.setdefault(volume.scroll, []).append(volume)
    what, groups = "scrolls", [*scrolls.values()]
    if len(groups) == 1:
        what, groups = "volumes", [[volume] for volume in volumes]
    if not 2 <= folds <= len(groups):
        raise ValueError(f"folds: expected 2 to {len(groups)}, the number of {what} with labels, got {folds}")
    parts: list[list[Volume]] = [[] for _ in range(folds)]
    for group in sorted(groups, key=lambda group: (-len(group), hashlib.sha256(group[0].id.encode()).hexdigest())):
        min(parts, key=len).extend(group)
    return [sorted(part, key=lambda volume: volume.id) for part in parts]


def split(volumes: Sequence[Volume], val_fraction: float) -> tuple[list[Volume], list[Volume], str]:
    """Return the volumes to train on, the held-out volumes, and whether these are "whole scrolls" or "single volumes".

    Volumes of one scroll are neighbours and look alike. So whole scrolls are held out, smallest first, as long as the
    held-out volumes are at most val_fraction of all volumes (or one volume). If no scroll is small enough, single
    volumes are held out, chosen by a digest of their ids. With val_fraction 0, or only one volume, none is held out.
    """
    wanted = max(1, round(val_fraction * len(volumes))) if val_fraction and len(volumes) > 1 else 0
    scrolls: dict[str, list[Volume]] = {}
    for volume in volumes:
        scrolls.setdefault(volume.scroll, []).append(volume)
    held: list[Volume] = []
    if len(scrolls) > 1:
        for _, members in sorted(scrolls.items(), key=lambda item: (len(item[1]), item[0])):
            if len(held) + len(members) <= wanted:
                held += members
    how = "whole scrolls"
    if not held:
        ranked = sorted(volumes, key=lambda volume: hashlib.sha256(volume.id.encode()).hexdigest())
        held, how = ranked[:wanted], "single volumes"
    names = {volume.id for volume in held}
    return [v for v in volumes if v.id not in names], sorted(held, key=lambda v: v.id), how


# The cache of decoded volumes
PREPARED = "volumes.json"
"""The file that lists the volumes decoded by `training.prepare`; written after all their files."""


def _identity(volume: Volume) -> str:
    """Return the volume's id and file sizes as text: unlike paths and times, these are the same in every session."""
    sizes = (os.path.getsize(file) for file in (volume.image, volume.label) if file)
    return json.dumps([volume.id, *sizes, *_ignoring(volume)])


def _ignoring(volume: Volume) -> list[int]:
    """Return [ignore_label] for a digest, but [] for the default, so that digests of earlier versions stay valid."""
    return [] if volume.ignore_label == IGNORED else [volume.ignore_label]


@dataclass
class Cache:
    """Decoded volumes as .npy files, memory-mapped by every process: they take disk space, and RAM as page cache only.

    Measured on one core: a standardised patch of 128^3 takes 5 ms from mapped files. From TIFF stacks of 320 x 320
    pixels it takes 0.5 s, half each for image and label. `survey` takes 1.3 s for image and label of 320^3.
    """

    folder: str
    max_bytes: int
    """Limit for all .npy files together. For volumes beyond it, each patch decodes the TIFF pages that it needs."""
    kept: set[str] = field(default_factory=set)
    """The ids of the volumes that the cache keeps decoded, from `plan`."""
    prepared: dict[Volume, str] = field(default_factory=dict)
    """The path prefix of the files that an earlier `training.prepare` has written; these files are never changed."""
    share: float = 0.5
    """The largest share of the free disk space that the cache may take."""

    @classmethod
    def at(cls, folder: str | None, max_gb: float) -> Cache:
        """Make a cache of at most max_gb (10^9 bytes) in a folder of this user, under `folder` or the temporary folder.

        Raises:
            PermissionError: the cache's folder is a symbolic link, or belongs to another user.
        """
        home = Path(folder or tempfile.gettempdir()) / f"kaggle_mgpu-volumes-{os.getuid()}"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.is_symlink() or home.stat().st_uid != os.getuid():
            raise PermissionError(f"{home} is a symbolic link or another user's folder: give another cache_dir")
        made = cls(str(home), int(max_gb * 1e9))
        made.tidy()
        return made

    def tidy(self) -> None:
        """Remove the partial files of killed processes, but not of running ones, which may still be writing."""
        for torn in Path(self.folder).glob(".writing-*"):
            pid = torn.name.split("-")[1]
            if not Path("/proc", pid).exists():
                torn.unlink(missing_ok=True)

    def path(self, volume: Volume, what: str) -> Path:
        """Return the path of a volume's file with ending `what`: the prepared file if it exists, else the cache's."""
        if volume in self.prepared and (found := Path(f"{self.prepared[volume]}.{what}")).exists():
            return found
        return Path(self.folder) / f"{self.key(volume)}.{what}"

    @staticmethod
    def key(volume: Volume) -> str:
        """Return a digest of the volume's paths, file sizes and modification times."""
        parts: list[Any] = _ignoring(volume)
        for file in (volume.image, volume.label):
            if file is not None:
                status = os.stat(file)
                parts.append([file, status.st_size, status.st_mtime_ns])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def note_prepared(self, volumes: Sequence[Volume]) -> None:
        """List the volumes with files in the folder, for `use_prepared`. Call this after all files are written."""
        listed = {_identity(volume): self.key(volume) for volume in volumes if self.path(volume, "json").exists()}
        self.save(Path(self.folder, PREPARED), json.dumps(listed))

    def use_prepared(self, folder: Path, volumes: Sequence[Volume], moved: bool) -> None:
        """Use the decoded files in a folder with a list by `note_prepared`; without a valid list do nothing.

        Args:
            moved: whether the folder comes from another session. Then paths and modification times are not compared.
        """
        try:
            listed = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
            keys = {volume: listed.get(_identity(volume)) for volume in volumes}
        except (OSError, ValueError, AttributeError):  # no list, or somebody else's file
            return
        for volume, key in keys.items():
            if isinstance(key, str) and (moved or key == self.key(volume)):
                self.prepared[volume] = str(folder / key)

    def plan(self, volumes: Sequence[Volume]) -> set[str]:
        """Return the ids of the volumes to keep decoded: prepared ones, then others in order while there is room."""
        disk = os.statvfs(self.folder)
        free, budget = int(disk.f_bavail * disk.f_frsize * self.share), self.max_bytes
        kept = {v.id for v in volumes if v in self.prepared and Path(f"{self.prepared[v]}.image.npy").exists()}
        for volume in volumes:
            if volume.id in kept:
                continue
            nbytes = bytes_of(volume.image) + math.prod(shape_of(volume.image))  # image and label
            budget -= nbytes
            if not self.path(volume, "image.npy").exists():  # else it is on the disk already
                free -= nbytes
            if min(free, budget) < 0:
                break
            kept.add(volume.id)
        return kept

    def save(self, path: Path, content: Array | str) -> None:
        """Write a file into the folder atomically; several processes may write the same file at once."""
        path = Path(self.folder, path.name)
        temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
        with temporary.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                np.save(file, content)
        os.replace(temporary, path)

    def read(self, volume: Volume, what: str, start: int, stop: int) -> Array:
        """Return pages start ... stop - 1 of the "image" or "label", from the cache or else from the TIFF stack."""
        path = self.path(volume, f"{what}.npy")
        if path.exists():
            pages: Array = np.load(path, mmap_mode="r")[start:stop]
            return pages
        return read_stack(volume.image, start, stop) if what == "image" else read_label(volume, start, stop)

    def points(self, volume: Volume) -> NDArray[np.uint16]:
        """Return (page, row, column) of up to MAX_POINTS sheet voxels, (points, 3), drawn at random once."""
        path = self.path(volume, "points.npy")
        if not path.exists():
            survey(volume, self)
        found: NDArray[np.uint16] = np.load(path)
        return found


def read_label(volume: Volume, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
    """Return pages start ... stop - 1 of a label, uint8 (pages, height, width): 0, 1, and IGNORED where unlabelled."""
    label = read_stack(str(volume.label), start, stop)
    return np.where(label == volume.ignore_label, IGNORED, label).astype(np.uint8)


def survey(volume: Volume, cache: Cache) -> Facts:
    """Decode and check a volume once; cache its `Facts` and sheet points, and for volumes in `cache.kept` the arrays.

    Raises:
        ValueError: image or label unreadable or of different shapes, a label that is not 0, 1 or the ignore_label, or
            all voxels unlabelled; the message names the path.
    """
    note = cache.path(volume, "json")
    parts = ["points", "image", "label"] if volume.id in cache.kept else ["points"]
    if note.exists() and all(cache.path(volume, f"{part}.npy").exists() for part in parts):
        known = json.loads(note.read_text())
        return Facts(tuple(known["shape"]), known["mean"], known["std"], tuple(known["counts"]))
    image = read_stack(volume.image)
    mean, std = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
    label = read_stack(str(volume.label))
    if label.shape != image.shape:
        raise ValueError(
            f"{volume.label}: the label has the shape {_shape(label)}, but the image {volume.image} has {_shape(image)}"
        )
    histogram = np.bincount(label.reshape(-1), minlength=volume.ignore_label + 1)
    if wrong := [int(value) for value in np.flatnonzero(histogram) if value not in (0, 1, volume.ignore_label)]:
        at = tuple(int(i) for i in np.argwhere(label == wrong[0])[0])
        raise ValueError(
            f"{volume.label}: expected the labels 0, 1 and {volume.ignore_label} (unlabelled; see ignore_label), got "
            f"{wrong[0]} at (page, row, column) {at}"
            + (f", and {', '.join(map(str, wrong[1:4]))}" if wrong[1:] else "")
        )
    counts = int(histogram[0]), int(histogram[1]), int(histogram[volume.ignore_label])
    if not counts[0] + counts[1]:
        raise ValueError(f"{volume.label}: all voxels are {volume.ignore_label} (unlabelled): leave the volume out")
    label = np.where(label == volume.ignore_label, IGNORED, label).astype(np.uint8)
    rng = np.random.default_rng(int(hashlib.sha256(volume.id.encode()).hexdigest()[:8], 16))
    sheet = np.flatnonzero(label.reshape(-1) == 1)
    some = np.sort(rng.choice(sheet, min(MAX_POINTS, len(sheet)), replace=False))
    cache.save(cache.path(volume, "points.npy"), np.stack(np.unravel_index(some, label.shape), 1).astype(np.uint16))
    if volume.id in cache.kept:
        cache.save(cache.path(volume, "image.npy"), image)
        cache.save(cache.path(volume, "label.npy"), label)
    facts = Facts(image.shape, mean, max(std, 1.0), counts)
    cache.save(note, json.dumps(asdict(facts)))
    return facts


def check_image(volume: Volume, cache: Cache) -> None:
    """Decode an image for prediction once, to check it; later calls find a note in the cache and return at once.

    Raises:
        ValueError: the image is unreadable; the message names its path.
    """
    note = cache.path(volume, "json")
    if not note.exists():
        cache.save(note, json.dumps({"shape": read_stack(volume.image).shape}))


def _shape(array: Array) -> str:
    return " x ".join(map(str, array.shape))
