"""The settings `Config` and the task `SurfaceSegmentation`: sheet or background for each voxel of a patch."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kaggle_mgpu.config import Schedule, TrainConfig
from kaggle_mgpu.data import counted
from kaggle_mgpu.machine import session
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.training import Task

from . import data
from .data import Cache, Catalogue, Facts, Volume
from .ensemble import averaged
from .metrics import components
from .model import UNet, segmentation_loss, skeleton_recall_loss
from .patches import Patches, Tiles
from .stacks import IGNORED


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train on patches and predict volumes. A sample is a patch; patches without labelled voxels have loss 0."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | frozenset(
        "data_path cache_dir cache_gb weights overlap threshold min_component tta_axes save_probabilities".split()
    )

    data_path: str | None = None
    """The folder with train_images/, train_labels/ and test_images/. None: found among the Kaggle inputs, else
    synthetic volumes (no download)."""
    cache_dir: str | None = None
    """Folder for decoded volumes. None: the temporary folder (60 GB on Kaggle, lost with the session)."""
    cache_gb: float = 40.0
    """Disk space for decoded volumes, at most half of the free space: 2 bytes a voxel (3 for 16-bit images), so 40 GB
    hold 600 volumes of 320^3. Loader processes share the volumes by memory mapping; each holds one patch in memory.
    Volumes that do not fit are decoded again for each patch: 0.5 s instead of 5 ms."""
    ignore_label: int = 2
    """The value of unannotated voxels in the labels; loss and scores leave them out. 255 in many data sets."""
    val_fraction: float = 0.05
    """Share of the volumes held out: whole scrolls if small enough, else single volumes. 0: none."""
    folds: int | None = None
    """Divide the volumes into this many folds, of whole scrolls if there are several, and hold out fold number `fold`
    instead of val_fraction. `cross_validate` trains a model for each fold."""
    fold: int = 0
    """The number of the held-out fold, from 0 on; only with `folds`."""
    patch_size: int | Literal["auto"] = "auto"
    """Side of the training cubes and of the sliding window. auto: 128; on synthetic volumes 32."""
    patches_per_volume: int = 4
    """Patches of each volume in an epoch."""
    sheet_fraction: float = 0.67
    """Share of the patches centred on a sheet; the others lie anywhere."""
    augment: bool = True
    """Flip, rotate and change the intensities of training patches."""
    width: int | Literal["auto"] = "auto"
    """Channels at the finest resolution, doubled with each halving up to 320. auto: 32; on synthetic volumes 8."""
    stem: Literal["full", "half"] = "full"
    """half: the finest features have half the resolution, as in MONAI's UNet; a step takes a quarter of the time, so
    give the run more epochs. In equal CPU time (full 240 steps, half 960; three seeds) Dice is 0.926 (full) and 0.949
    (half) on synthetic sheets, 0.819 and 0.956 on the brain in a head's scan. Not measured on a GPU or on scrolls."""
    deep_supervision: bool = False
    """Add the loss of predictions at the decoder's coarser resolutions."""
    skeleton_recall: float = 0.0
    """Weight of a loss for the missed share of the sheets' medial surface (Kirchhoff et al. 2024). 0: no such loss.
    With 1 on synthetic sheets, 4 seeds of 100 steps, mean Dice rises from 0.888 to 0.893 (and rises with each seed);
    surface Dice, VOI score and Betti scores are about equal. The model finds more sheet, so keep threshold="auto": at
    0.5 Dice falls from 0.871 to 0.851."""
    weights: str | tuple[str, ...] = "best"
    """The weights for prediction: best (by best_metric), final, or a .safetensors file (then nothing is trained).
    Several files of the same model, as a list or separated by commas, predict the mean of their probabilities."""
    overlap: float = 0.5
    """Overlap of neighbouring windows when a volume is predicted, as a share of their side."""
    tta_axes: tuple[int, ...] = ()
    """Axes to mirror in prediction, from 0 (D), 1 (H) and 2 (W); the probabilities of all flips are averaged.
    (0, 1, 2): eight flips, for eight times the work."""
    tta_in_training: bool = False
    """Mirror the axes of tta_axes in the evaluations during training too."""
    threshold: float | Literal["auto"] = "auto"
    """Lowest probability of a sheet voxel. auto: the value of best Dice on the held-out volumes, kept in
    postprocessing.json beside the weights, for later predictions with these weights and settings."""
    min_component: int | Literal["auto"] = "auto"
    """Remove predicted connected components of fewer voxels. 0: keep all. auto: chosen as threshold is."""
    save_probabilities: bool = False
    """Also keep the probabilities of all predicted volumes, as uint8 stacks in steps of 1/255."""

    global_batch_size: int | str | None = 8
    """Patches per optimizer step over all GPUs."""
    micro_batch_size: int | Literal["auto"] | None = "auto"
    """Patches per forward pass on one GPU; accumulation makes up the global batch. auto: as many as fit."""
    epochs: int = 40
    """Passes over the volumes, patches_per_volume patches of each. Ignored when max_steps is given."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine_restarts"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int | float | str = 0.05
    """Steps of linear warm-up; below 1, a fraction of the run."""
    min_lr: float = 1e-6
    """Learning rate at the end of each cycle of the schedule."""
    best_metric: str = "dice"
    """The validation metric for the choice of the weights in best/."""
    best_mode: Literal["min", "max"] = "max"
    """Whether best_metric is better when smaller or larger."""
    output_dir: str = "surface_segmentation"
    """The run's folder: config, metrics, logs, checkpoints, weights, predictions, submission.zip, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.weight_files or ("",)
        if self.weights not in ("best", "final") and not all(name.endswith(".safetensors") for name in named):
            raise ValueError(f"Config.weights: expected best, final or .safetensors files, got {self.weights!r}")
        if not set(self.tta_axes) <= {0, 1, 2} or len(set(self.tta_axes)) < len(self.tta_axes):
            raise ValueError(f"Config.tta_axes: expected some of 0, 1 and 2, each once, got {self.tta_axes!r}")
        if not 2 <= self.ignore_label <= 65535:
            raise ValueError(f"Config.ignore_label: expected 2 to 65535, got {self.ignore_label!r}")
        size = self.patch_size
        halvings = _levels(size) - (self.stem == "full") if isinstance(size, int) else 0
        if isinstance(size, int) and (size < 8 or size % 2**halvings):
            raise ValueError(
                f"Config.patch_size: expected 8 or more, and a multiple of {2**halvings} (the network "
                f"halves it {halvings} times), got {size}"
            )
        least_of = {"patches_per_volume": 1, "width": 1, "min_component": 0, "cache_gb": 0, "skeleton_recall": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value != "auto" and not value >= least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {value!r}")
        if self.folds is None and self.fold:
            raise ValueError(f"Config.fold: fold={self.fold} needs folds, the number of folds")
        if self.folds is not None and not 0 <= self.fold < self.folds:
            raise ValueError(f"Config.fold: expected 0 to {self.folds - 1} (below folds), got {self.fold}")
        bounds = {
            "val_fraction": (0, 0.5),
            "sheet_fraction": (0, 1),
            "overlap": (0, 0.9),
            "threshold": (1e-6, 1 - 1e-6),
        }
        for name, (low, high) in bounds.items():
            if getattr(self, name) != "auto" and not low <= getattr(self, name) <= high:
                raise ValueError(f"Config.{name}: expected {low} to {high}, got {getattr(self, name)!r}")

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Return the weights files named by `weights`; () for best and final, the run's own weights."""
        if self.weights in ("best", "final"):
            return ()
        return tuple(self.weights.split(",")) if isinstance(self.weights, str) else self.weights


def _levels(size: int) -> int:
    """Return the U-Net's number of resolutions: halving until 8 voxels a side are left, at most 5."""
    return max(1, min(5, int(math.log2(size / 8)) + 1)) if size >= 8 else 1


class SurfaceSegmentation(Task):
    """Classify voxels as sheet or not. A batch: images (B, 1, p, p, p) float32, labels (B, p, p, p) uint8, 2 ignored.

    With `skeleton_recall` a training batch has the labels' medial surfaces too, (B, p, p, p) bool.
    """

    unit = "patches"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._catalogue: Catalogue | None = None
        self._facts: dict[str, Facts] = {}
        self._cache: Cache | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The volumes. All ranks must make the first access together: rank 0 searches while the others wait."""
        if self._catalogue is None:
            components(np.zeros((1, 1, 1)))  # raises if scipy is missing, before hours of training
            self._catalogue, self.cache.prepared = distributed.from_main(self._find)
            # checkpoints record this name: a run does not continue with other volumes or another fold
            fold = "" if self.config.folds is None else f" fold {self.config.fold} of {self.config.folds}"
            self.name = f"SurfaceSegmentation {self._catalogue.digest}{fold}"
        return self._catalogue

    def _find(self) -> tuple[Catalogue, dict[Volume, str]]:
        c = self.config
        found = data.find_volumes(c.data_path, Path(self.cache.folder) / "synthetic-1", c.ignore_label)
        folder = session.find_prepared(own := prepared_folder(self.config, found), data.PREPARED)
        self.cache.use_prepared(folder, [*found.train, *found.test], moved=folder != own)
        return found, self.cache.prepared

    @property
    def cache(self) -> Cache:
        if self._cache is None:
            self._cache = Cache.at(self.config.cache_dir, self.config.cache_gb)
        return self._cache

    @property
    def patch_size(self) -> int:
        size = self.config.patch_size
        return size if isinstance(size, int) else 32 if self.catalogue.synthetic else 128

    @property
    def split(self) -> tuple[list[Volume], list[Volume], str]:
        """Return the volumes to train on, the held-out volumes, and a phrase about the split."""
        c, volumes = self.config, self.catalogue.train
        if c.folds is None:
            return data.split(volumes, c.val_fraction)
        held = data.folds_of(volumes, c.folds)[c.fold]
        return [volume for volume in volumes if volume not in held], held, f"fold {c.fold} of {c.folds}"

    def leave_out_tests(self) -> None:
        """Drop the test images from the catalogue: in a cross-validation only the ensemble predicts test images."""
        self._catalogue = replace(self.catalogue, test=())

    def describe(self) -> str:
        """Describe the source, the reason for the source, volumes, split, patches and model in three lines."""
        c, (train_volumes, held, how) = self.catalogue, self.split
        parameters = sum(p.numel() for p in self.model().parameters())
        return (
            f"volumes: {c.source} ({c.reason})\n"
            f"{len(train_volumes)} to train on, {len(held)} held out ({how}), {len(c.test)} to predict\n"
            f"{self.config.patches_per_volume} patches of {self.patch_size}^3 per volume and epoch, "
            f"{parameters:,} parameters, {_levels(self.patch_size)} resolutions"
        )

    def prepare(self) -> None:
        """Read and check every volume once, each rank its share; keep statistics and copies of labelled volumes.

        Image and label of 320^3 take 1.3 s, an image to predict half of this, an already checked volume no time.
        Nothing is read if this run's training has finished, in output_dir or in an earlier output among the inputs.

        Raises:
            ValueError: a malformed volume, a label of another shape, a label out of range; the message names the path.
        """
        c, cache = self.catalogue, self.cache  # all ranks together, before rank 0 alone uses the catalogue in _trained
        trained = distributed.from_main(self._trained)
        if self._facts or trained:
            return
        cache.kept = distributed.from_main(lambda: cache.plan(c.train))
        facts: dict[str, Facts] = {}
        error: Exception | None = None
        began = said = time.monotonic()
        try:
            for volume in c.test[distributed.rank() :: distributed.world_size()]:
                data.check_image(volume, cache)
                distributed.alive()
            for volume in c.train[distributed.rank() :: distributed.world_size()]:
                facts[volume.id] = data.survey(volume, cache)
                distributed.alive()
                if distributed.is_main() and time.monotonic() - said > 15:
                    said = time.monotonic()
                    print(f"read {len(facts) * distributed.world_size()} of {len(c.train)} volumes", flush=True)
        except (ValueError, OSError) as caught:
            error = caught
        for theirs, failure in distributed.gather((facts, error)):
            if failure is not None:
                raise failure
            self._facts |= theirs
        if distributed.is_main():
            known = sum(volume in cache.prepared for volume in c.train)
            earlier = f", {known} of them from {Path(next(iter(cache.prepared.values()))).parent}" if known else ""
            print(f"{len(c.train)} volumes checked in {time.monotonic() - began:.1f} s{earlier}", flush=True)

    def _trained(self) -> bool:
        """Return whether this run's training has finished, from its checkpoints."""
        c, patches = self.config, len(self.split[0]) * self.config.patches_per_volume
        if c.resume != "auto":
            return False
        for folder in [Path(c.output_dir), *(path.parent for path in session.find("result.json"))]:
            result, settings = read_json(folder / "result.json"), read_json(folder / "config.json")
            try:
                size = c.global_batch_size
                batch = settings["stamp"]["global_batch_size"] if isinstance(size, str) else size
                wanted = c.max_steps or (c.epochs * -(-patches // batch) if batch else -1)
                if result["step"] == result["max_steps"] == wanted and settings["stamp"]["task"] == self.name:
                    return (folder / "model.safetensors").is_file()
            except (KeyError, TypeError):
                continue
        return False

    def model(self) -> nn.Module:
        width = self.config.width
        channels = width if isinstance(width, int) else 8 if self.catalogue.synthetic else 32
        return UNet(channels, _levels(self.patch_size), self.config.deep_supervision, self.config.stem == "half")

    def train_data(self) -> Patches:
        self.prepare()
        c = self.config
        return Patches(
            self.split[0],
            self._facts,
            self.cache,
            size=self.patch_size,
            per_volume=c.patches_per_volume,
            sheet_fraction=c.sheet_fraction,
            augment=c.augment,
            medial=c.skeleton_recall > 0,
        )

    def val_data(self) -> Tiles | None:
        held = self.split[1]
        return Tiles(held, self._facts, self.cache, size=self.patch_size) if held else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        image, label, *medial = batch
        logits = model(image)
        loss = segmentation_loss(logits, label)
        return loss + self.config.skeleton_recall * skeleton_recall_loss(logits, *medial) if medial else loss

    def count(self, batch: tuple[Tensor, ...]) -> int:
        """Return the number of patches with a labelled voxel; the loss of the others is 0."""
        return int((batch[1] != IGNORED).flatten(1).any(1).sum())

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
        image, label = batch
        logits = averaged([model], self.config.tta_axes if self.config.tta_in_training else ())(image)
        p, q, known = logits[:, 0] > 0, label == 1, label != IGNORED
        voxels = torch.stack([(p & q).sum(), (p & ~q & known).sum(), (~p & q).sum()])
        return {"loss": (segmentation_loss(logits, label), self.count(batch)), "voxels": (voxels, len(label))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return loss (per patch), and dice, precision and recall of sheet voxels in the tiles of held-out volumes."""
        hit, false, missed = metrics["voxels"].tolist()
        return {
            "loss": float(metrics["loss"]),
            "dice": 2 * hit / (2 * hit + false + missed) if hit + false + missed else 1.0,
            "precision": hit / (hit + false) if hit + false else 0.0,
            "recall": hit / (hit + missed) if hit + missed else 0.0,
        }


def prepare(config: Config) -> str:
    """Check all volumes, and decode them into output_dir/data, for later sessions that have this output as an input.

    cache_gb and nine tenths of the free disk space limit the decoded volumes; on Kaggle, which keeps 20 GB of output,
    18 GB: 270 volumes of 320^3.

    Returns:
        A sentence about the result.

    Raises:
        ValueError: a malformed volume; the message names the path.
    """
    surface = SurfaceSegmentation(config)
    c = surface.catalogue
    folder = prepared_folder(config, c)
    folder.mkdir(parents=True, exist_ok=True)
    most = min(config.cache_gb, 18) if session.on_kaggle() else config.cache_gb
    cache = surface._cache = Cache(str(folder), int(most * 1e9), share=0.9)
    cache.tidy()
    surface.prepare()
    cache.note_prepared([*c.train, *c.test])
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    rest = "" if len(cache.kept) == len(c.train) else "; cache_gb or the free disk space is too small for the others"
    return (
        f"{c.source} ({c.reason}): {len(cache.kept)} of {len(c.train)} volumes decoded ({size:.1f} GB), "
        f"{counted(len(c.test), 'test volume')} checked, in {folder}{rest}"
    )


def prepared_folder(config: Config, catalogue: Catalogue) -> Path:
    """Return the folder that `prepare` writes, named by a digest of the data."""
    return Path(config.output_dir).resolve() / "data" / catalogue.digest


def task(config: Config) -> SurfaceSegmentation:
    """Return the task of a config."""
    return SurfaceSegmentation(config)


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; None if the file is missing or is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
