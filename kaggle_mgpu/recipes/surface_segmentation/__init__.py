"""Surface segmentation: the papyrus sheets in 3-D scans of rolled scrolls, by a residual U-Net on patches.

    from kaggle_mgpu.recipes.surface_segmentation import Config, run
    result = run(Config(data_path="/kaggle/input/vesuvius-challenge-surface-detection"))

Or: `python -m kaggle_mgpu train surface_segmentation --epochs 20`. `run` trains, then predicts whole volumes: the held
out ones, whose figures it reports, and the test images, which it packs into output_dir/submission.zip. Killed anywhere,
the same call goes on; a finished model goes straight to the volumes that have no prediction yet. Without data it tries
itself on small made-up volumes, and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kaggle_mgpu import devices, distributed, session
from kaggle_mgpu.config import TrainConfig, parse_duration
from kaggle_mgpu.files import crc32, read_tensors, write_text
from kaggle_mgpu.launch import launch
from kaggle_mgpu.recipes.surface_segmentation import data
from kaggle_mgpu.recipes.surface_segmentation.data import Cache, Catalogue, Facts, Patches, Tiles, Volume
from kaggle_mgpu.recipes.surface_segmentation.inference import (
    Job,
    predict,
    sliding_window,
    validate_submission,
    write_submission,
)
from kaggle_mgpu.recipes.surface_segmentation.metrics import components, measures
from kaggle_mgpu.recipes.surface_segmentation.model import UNet, segmentation_loss
from kaggle_mgpu.task import Result, Task
from kaggle_mgpu.trainer import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Config",
    "SurfaceSegmentation",
    "baselines",
    "infer",
    "run",
    "sliding_window",
    "task",
    "validate_submission",
]


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train on patches and predict volumes. A sample, and a term of the loss, is a patch."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | frozenset(
        "data_path cache_dir cache_gb weights overlap threshold min_component".split()
    )

    data_path: str | None = None
    """The folder with train_images/, train_labels/ and test_images/. None: found among the Kaggle inputs, else
    synthetic volumes (no download)."""
    cache_dir: str | None = None
    """Where decoded volumes are kept. None: the temporary folder, which Kaggle gives 60 GB and forgets."""
    cache_gb: float = 40.0
    """Disk for decoded volumes (and never more than half of what is free): 2 bytes a voxel, so 600 pairs of 320^3. They
    are memory-mapped and shared by all loader processes, which so hold a patch each and nothing else in memory. What
    does not fit is decoded again for each patch, 0.3 s instead of 0.4 ms."""
    val_fraction: float = 0.05
    """Share of the volumes held out: whole scrolls where they are small enough, else single volumes. 0: none."""
    patch_size: int | Literal["auto"] = "auto"
    """Side of the cubes that are trained on, and of the sliding window. auto: 128; on synthetic volumes 32."""
    patches_per_volume: int = 4
    """Patches of each volume in an epoch."""
    sheet_fraction: float = 0.67
    """Share of the patches that are centred on a sheet; the others lie anywhere."""
    augment: bool = True
    """Flip, rotate and change the intensities of training patches."""
    width: int | Literal["auto"] = "auto"
    """Channels at full resolution; they double with each halving, up to 320. auto: 32; on synthetic volumes 8."""
    deep_supervision: bool = False
    """Also compare the coarser resolutions of the decoder with the label."""
    weights: Literal["best", "final"] = "best"
    """Which weights predict: the best by best_metric, or the last."""
    overlap: float = 0.5
    """Of neighbouring windows when a volume is predicted."""
    threshold: float = 0.5
    """Probability from which a voxel is sheet."""
    min_component: int = 0
    """Remove predicted parts of fewer voxels. 0: keep all."""

    global_batch_size: int | None = 8
    """Patches per optimizer step over all GPUs."""
    micro_batch_size: int | Literal["auto"] | None = "auto"
    """Patches per forward pass on one GPU; the rest of the global batch is accumulation. auto: as many as fit."""
    epochs: int = 40
    """Passes over the volumes, patches_per_volume patches of each. Ignored when max_steps is given."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = "cosine_restarts"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int | float = 0.05
    """Steps of linear warm-up; below 1 it is a fraction of the run."""
    min_lr: float = 1e-6
    """Where each cycle of the schedule ends."""
    best_metric: str = "dice"
    """The validation metric that decides which weights are kept in best/."""
    best_mode: Literal["min", "max"] = "max"
    """Whether best_metric is better when smaller or larger."""
    output_dir: str = "surface_segmentation"
    """The run's folder: config, metrics, logs, checkpoints, weights, predictions, submission.zip, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.patch_size
        if isinstance(size, int) and (size < 8 or size % 2 ** (_levels(size) - 1)):
            raise ValueError(
                f"Config.patch_size: expected 8 or more, and a multiple of {2 ** (_levels(size) - 1)} (it is halved "
                f"{_levels(size) - 1} times), got {size}"
            )
        for name, least in {"patches_per_volume": 1, "width": 1, "min_component": 0, "cache_gb": 0}.items():
            value = getattr(self, name)
            if value != "auto" and not value >= least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {value!r}")
        bounds = {
            "val_fraction": (0, 0.5),
            "sheet_fraction": (0, 1),
            "overlap": (0, 0.9),
            "threshold": (1e-6, 1 - 1e-6),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Config.{name}: expected {low} to {high}, got {getattr(self, name)!r}")


def _levels(size: int) -> int:
    """Resolutions of the U-Net: until 8 voxels a side are left, at most 5."""
    return max(1, min(5, int(math.log2(size / 8)) + 1)) if size >= 8 else 1


class SurfaceSegmentation(Task):
    """Sheet or not, for every voxel. A batch: images (B, 1, p, p, p) float32, labels (B, p, p, p) uint8, 2 ignored."""

    unit = "patches"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._catalogue: Catalogue | None = None
        self._facts: dict[str, Facts] = {}
        self._cache: Cache | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The volumes there are. At first all ranks ask for it together: rank 0 looks, the others wait."""
        if self._catalogue is None:
            components(np.zeros((1, 1, 1)))  # a missing scipy is found out now, not after hours of training
            found: Callable[[], Catalogue] = lambda: data.find_volumes(  # noqa: E731
                self.config.data_path, Path(self.cache.folder) / "synthetic-1"
            )
            self._catalogue = distributed.from_main(found)
            # Stamps the checkpoints: other volumes make another run
            self.name = f"SurfaceSegmentation {self._catalogue.digest}"
        return self._catalogue

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
        """Volumes to train on, volumes held out, and how they were chosen."""
        train_volumes, held, how = data.split(self.catalogue.train, self.config.val_fraction)
        return train_volumes, held, how

    def describe(self) -> str:
        """Source, why it was chosen, volumes, split, patches and model, in three lines."""
        c, (train_volumes, held, how) = self.catalogue, self.split
        parameters = sum(p.numel() for p in self.model().parameters())
        return (
            f"volumes: {c.source} ({c.reason})\n"
            f"{len(train_volumes)} to train on, {len(held)} held out ({how}), {len(c.test)} to predict\n"
            f"{self.config.patches_per_volume} patches of {self.patch_size}^3 a volume and epoch, "
            f"{parameters:,} parameters, {_levels(self.patch_size)} resolutions"
        )

    def prepare(self) -> None:
        """Read every volume to train or validate on once, each rank its share: errors, statistics, decoded copies.

        About a second a pair of 320^3, unless an earlier call has left its notes; a finished run needs none of it.

        Raises:
            ValueError: a malformed volume, a label of another shape, a label out of range; named with its path.
        """
        if self._facts or _finished(self.config.output_dir):
            return
        c, cache = self.catalogue, self.cache
        cache.held = distributed.from_main(lambda: cache.plan(c.train))
        facts: dict[str, Facts] = {}
        error: Exception | None = None
        said = time.monotonic()
        try:
            for volume in c.test[distributed.rank() :: distributed.world_size()]:
                data.shape_of(volume.image)
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

    def model(self) -> nn.Module:
        width = self.config.width
        channels = width if isinstance(width, int) else 8 if self.catalogue.synthetic else 32
        return UNet(channels, _levels(self.patch_size), self.config.deep_supervision)

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
        )

    def val_data(self) -> Tiles | None:
        held = self.split[1]
        return Tiles(held, self._facts, self.cache, size=self.patch_size) if held else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, label = batch
        return segmentation_loss(model(image), label)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
        image, label = batch
        logits = model(image)
        p, q, known = logits[:, 0] > 0, label == 1, label != data.IGNORED
        voxels = torch.stack([(p & q).sum(), (p & ~q & known).sum(), (~p & q).sum()])
        return {"loss": (segmentation_loss(logits, label), len(label)), "voxels": (voxels, len(label))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """loss (a patch), and dice, precision and recall of all held-out voxels together, unblended."""
        hit, false, missed = metrics["voxels"].tolist()
        return {
            "loss": float(metrics["loss"]),
            "dice": 2 * hit / (2 * hit + false + missed) if hit + false + missed else 1.0,
            "precision": hit / (hit + false) if hit + false else 0.0,
            "recall": hit / (hit + missed) if hit + missed else 0.0,
        }


def task(config: Config) -> SurfaceSegmentation:
    """What the command line trains."""
    return SurfaceSegmentation(config)


def run(config: Config, surface: SurfaceSegmentation | None = None) -> Result:
    """Train, then predict the held-out volumes and the test images on all GPUs. Called again it goes on where it was.

    Until the predictions are whole, result.json says `finished: false`.
    """
    surface = surface or SurfaceSegmentation(config)
    began = time.monotonic()
    result: Result = launch(train, config, surface)
    if not result.finished:
        return result
    limit = parse_duration(config.time_limit) - (time.monotonic() - began) if config.time_limit else math.inf
    # under dp one process trains on all GPUs; each GPU predicts in a process of its own
    nproc = config.nproc if config.strategy == "dp" else None
    result = launch(infer, config, surface, limit, nproc=nproc)
    return result


def _finished(output_dir: str) -> bool:
    """Whether the folder holds a finished training, which needs no training data any more."""
    try:
        document = json.loads((Path(output_dir) / "result.json").read_text(encoding="utf-8"))
        return bool(document["step"] >= document["max_steps"]) and (Path(output_dir) / "model.safetensors").is_file()
    except (OSError, ValueError, KeyError):
        return False


@distributed.returns_rank0
def infer(config: Config, surface: SurfaceSegmentation, time_limit: float = math.inf) -> Result:
    """On every rank: predict what has no prediction yet, measure the held-out volumes, pack submission.zip.

    Predictions are stamped with the checksum of the weights and with all that shapes them: others start anew.
    """
    out, main = Path(config.output_dir), distributed.is_main()
    began = time.monotonic()
    result = Result(**json.loads((out / "result.json").read_text(encoding="utf-8")))
    weights = out / "best" / "model.safetensors"
    if config.weights == "final" or result.best is None or not weights.is_file():
        weights = out / "model.safetensors"
    folder, held, test = out / "predictions", surface.split[1], surface.catalogue.test
    size = surface.patch_size
    stamp = {
        "weights": crc32(weights),
        "settings": [size, config.overlap, config.threshold, config.min_component],
        "volumes": _digest([*held, *test]),
    }

    def begin() -> None:
        # whoever looks at result.json while this is not done must not take it for done
        _write(out, dataclasses.replace(result, finished=False, reason="trained; the predictions are not complete"))
        for torn in folder.rglob(".writing-*"):  # by a session that was killed
            torn.unlink()
        if _read(folder / "stamp.json") != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "test").mkdir(parents=True)
            write_text(folder / "stamp.json", json.dumps(stamp))

    distributed.from_main(begin)
    forward = _forward(config, surface.model(), weights)
    jobs = [
        Job(v.image, folder / part / f"{v.id}.tif") for part, vs in (("held_out", held), ("test", test)) for v in vs
    ]
    left = predict(
        forward,
        jobs,
        size=size,
        overlap=config.overlap,
        threshold=config.threshold,
        min_component=config.min_component,
        seconds_left=min(time_limit, session.time_left()) - (time.monotonic() - began) - 60 * session.on_kaggle(),
    )
    if left:
        result = dataclasses.replace(result, finished=False, reason="time limit")
        if main:
            print(f"{left} of {len(jobs)} volumes have no prediction yet: the time is up. Run the same again.")
            _write(out, result)
        return result
    figures = _measure(held, folder / "held_out")
    if main and test:
        write_submission(out / "submission.zip", {v.id: folder / "test" / f"{v.id}.tif" for v in test})
        count = validate_submission(out / "submission.zip", Path(test[0].image).parent)
        where = out / "submission.zip"
        if session.on_kaggle():  # where the competition looks for it
            where = Path(shutil.copy(where, session.working() / "submission.zip"))
        print(f"{where}: {count} volumes, checked", flush=True)
    metrics = {**result.metrics, **{f"volume_{name}": value for name, value in figures.items()}}
    result = dataclasses.replace(result, finished=True, reason="finished", metrics=metrics)
    if main:
        if held:
            figure(surface).savefig(out / "slices.png", dpi=110)
        _write(out, result)
    distributed.barrier()
    return result


def _write(out: Path, result: Result) -> None:
    write_text(out / "result.json", json.dumps(dataclasses.asdict(result), indent=1))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(volumes: list[Volume]) -> str:
    listing = [[volume.id, Path(volume.image).stat().st_size] for volume in volumes]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _forward(config: Config, model: nn.Module, weights: Path) -> Callable[[Tensor], Tensor]:
    """The trained model as `sliding_window` wants it, on this rank's device and in the run's precision."""
    device = distributed.device()
    model.load_state_dict(read_tensors(weights))
    model.to(device).eval()
    chosen = devices.precision(config.precision, devices.gpus() if device.type == "cuda" else [])[0]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(chosen)

    def forward(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits: Tensor = model(windows.to(device))
        return logits.float().cpu()

    return forward


def _measure(held: list[Volume], folder: Path) -> dict[str, float]:
    """`measures` of the held-out volumes, averaged over volumes; all of them in folder/figures.json."""
    mine: dict[str, dict[str, float]] = {}
    for volume in held[distributed.rank() :: distributed.world_size()]:
        mine[volume.id] = measures(
            data.read_stack(str(folder / f"{volume.id}.tif")), data.read_stack(str(volume.label))
        )
        distributed.alive()
    every = {name: row for part in distributed.gather(mine) for name, row in part.items()}
    rows = [every[volume.id] for volume in held]
    if distributed.is_main() and held:
        write_text(folder / "figures.json", json.dumps(every, indent=1))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def baselines(surface: SurfaceSegmentation, volumes: int = 8) -> dict[str, dict[str, float]]:
    """`measures` of two trivial answers on the held-out volumes: all is sheet; what is brighter than a threshold is,
    the one with the best Dice on the first few training volumes."""
    train_volumes, held, _ = surface.split
    counts = np.zeros((2, 256))
    for volume in train_volumes[:volumes]:
        image, label = data.read_stack(volume.image), data.read_stack(str(volume.label))
        for value in (0, 1):
            counts[value] += np.bincount(image[label == value], minlength=256)
    from_here_up = counts[:, ::-1].cumsum(1)[:, ::-1]
    dices = 2 * from_here_up[1] / np.maximum(from_here_up.sum(0) + counts[1].sum(), 1)
    best = int(dices.argmax())
    rows: dict[str, list[dict[str, float]]] = {"all is sheet": [], f"brighter than {best - 1}": []}
    for volume in held:
        image, label = data.read_stack(volume.image), data.read_stack(str(volume.label))
        for name, mask in zip(rows, (np.ones_like(image), image >= best), strict=True):
            rows[name].append(measures(mask, label))
    return {
        name: {key: sum(row[key] for row in given) / len(given) for key in given[0]}
        for name, given in rows.items()
        if given
    }


def figure(surface: SurfaceSegmentation, most: int = 3) -> Figure:
    """Middle slices of held-out volumes: image, label, prediction."""
    from matplotlib.figure import Figure

    held = surface.split[1][:most]
    drawn = Figure(figsize=(9, 3.2 * len(held)), layout="constrained")
    axes = drawn.subplots(len(held), 3, squeeze=False)
    for row, volume in zip(axes, held, strict=True):
        middle = data.shape_of(volume.image)[0] // 2
        predicted = Path(surface.config.output_dir) / "predictions" / "held_out" / f"{volume.id}.tif"
        paths = {"image": volume.image, "label (grey: unlabelled)": str(volume.label), "prediction": str(predicted)}
        for axis, (title, path) in zip(row, paths.items(), strict=True):
            page = data.read_stack(path, middle, middle + 1)[0]
            shown = page if title == "image" else np.array([0.0, 1.0, 0.5])[page]
            axis.imshow(shown, cmap="gray", interpolation="nearest")
            axis.set_title(f"{volume.id}, slice {middle}: {title}", fontsize=8)
            axis.set_axis_off()
    return drawn
