"""The task (loss, measures, optimizer), predictions, figures and baselines."""

from __future__ import annotations

import dataclasses
import functools
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kaggle_mgpu.checkpoints import checkpoint, files
from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.machine import session
from kaggle_mgpu.parallel import distributed, shards
from kaggle_mgpu.progress import plots
from kaggle_mgpu.training import Task, optim

from . import data
from .data import Samples
from .experts import ExpertsDecoder
from .metrics import measure, report
from .model import STRIDES, Decoder, Segmenter, backbone, blocks, cost, loss_terms, resized_fp32, structure_loss
from .settings import PRESETS, Config, stages

DECODERS = {"small": Decoder, "experts": ExpertsDecoder}
Sizes = tuple[str, int | None, str, int | None, int | None, int | None]  # as returned by `_sizes`


def _sizes(config: Config) -> Sizes:
    """Return the settings that the number of parameters and operations depends on."""
    return (
        config.backbone, config.width, config.decoder, config.decoder_width, config.num_experts, config.image_size,
    )  # fmt: skip


def _segmenter(sizes: Sizes, *, weights: str | None = None, top_k: int | None = None) -> Segmenter:
    body, width, decoder, decoder_width, experts, size = sizes
    whole = backbone(body, width=width or 0, weights=weights, image_size=size)
    return Segmenter(whole, width=decoder_width or 0, num_experts=experts or 0, top_k=top_k, decoder=DECODERS[decoder])


@functools.cache  # a fifth of a second each
def _cost(sizes: Sizes) -> Any:
    """Return `cost` of a segmenter with random weights.

    Raises:
        ValueError: the backbone cannot compute images of this size.
    """
    model = _segmenter(sizes).to("meta")
    try:
        return cost(model, sizes[-1] or 0)
    except (RuntimeError, AssertionError) as error:  # on the meta device nothing else can fail
        raise ValueError(
            f"backbone {sizes[0]!r} cannot compute images of {sizes[-1]} pixels: {error}. Give the image_size that the "
            f"backbone is made for, or another backbone."
        ) from error


class CamouflageSegmentation(Task):
    """CamouflageSegmentation finds the object in each image; `data.collate` makes its batches.

    Args:
        found: the data; None: searched and checked when first needed.
        stage: the stage's name; checkpoints record this name.
        share: share of the backbone's blocks to train, from the last on; 0: the backbone is frozen.
        start: the weights to start from; None: random or pretrained ones.
    """

    unit = "images"

    def __init__(
        self,
        config: Config,
        *,
        found: data.Found | None = None,
        stage: str = "everything at once",
        share: float = 1.0,
        start: Path | None = None,
    ) -> None:
        self._unsettled, self._found = config, found
        self.stage, self.share, self.start = stage, share, start
        if found is not None:
            self._use(found)

    @property
    def found(self) -> data.Found:
        """The data. All ranks must make the first access together: rank 0 searches and checks, the others wait."""
        if self._found is None:
            self._use(distributed.from_main(lambda: find(self._unsettled)))
        assert self._found is not None
        return self._found

    def _use(self, found: data.Found) -> None:
        self._found = found
        # checkpoints record this name: a stage does not continue with other images or from other initial weights
        self.name = f"CamouflageSegmentation {found.digest}, {self.stage}"
        if self.start is not None:
            self.name += f" from {files.crc32(self.start):08x}"

    @property
    def config(self) -> Config:
        """The config, with the preset's values in the fields left None."""
        return self._unsettled.settled(drawn=self.found.drawn)

    def describe(self) -> str:
        """Describe the data and the reason for their choice, the stages, and the cost of each preset."""
        found, config = self.found, self.config
        count = 0 if found.val is None else len(found.val)
        parts = [f"{stage.name} {stage.config.epochs} ({stage.share:.0%})" for stage in stages(config, found)]
        return "\n".join(
            [
                f"images: {found.where} ({found.reason}): {len(found.train):,} to train on, {count:,} held out",
                f"backbone: {config.backbone}, weights: {weights_from(config)}",
                f"stages, epochs (share of the backbone that is trained): {', '.join(parts)}",
                *self._costs(),
            ]
        )

    def _costs(self) -> Iterator[str]:
        config = self.config
        batch = 8
        yield f"{'preset':16} pixels  batch  parameters  GFLOP per image  GB for {batch} images"
        for name in PRESETS:
            mine = name == config.preset
            # soft routing costs as much as top-k, and is valid even if the preset has fewer experts than top_k
            its = self._unsettled.replace(preset=name, routing="soft").settled(drawn=self.found.drawn)
            parameters, flops, kept = _cost(_sizes(its))
            # weights, gradients, AdamW's two moments and the averaged weights, four bytes each
            memory = batch * kept + 20 * parameters
            yield (
                f"{name + (' *' if mine else ''):16} {its.image_size:6}  {its.global_batch_size or '':>5}  "
                f"{parameters / 1e6:8.2f} M  {flops / 1e9:15.2f}  {memory / 1e9:15.2f}"
            )
        yield (
            "* chosen preset. GFLOP of a forward pass; memory of an fp32 training step, computed, not measured (fp16: "
            "about half)."
        )

    def network(self, config: Config | None = None, weights: str | None = None) -> Segmenter:
        """Make the segmenter of a `settled` config, by default the task's own."""
        config = config or self.config
        top_k = config.top_k if config.routing == "topk" else None
        return _segmenter(_sizes(config), weights=weights, top_k=top_k)

    def model(self) -> nn.Module:
        config = self.config
        model = self.network(config, None if self.start else pretrained(config))
        if self.start is not None:
            weights = checkpoint.read_tensors(self.start)
            checkpoint.check_model(weights, model.state_dict(), str(self.start))
            model.load_state_dict(weights)
        model.unfreeze(self.share)
        return model

    def train_data(self) -> Samples:
        return Samples(self.found.train, self.config.image_size or 0, augment=True, rotation=self._unsettled.rotation)

    def val_data(self) -> Samples | None:
        return Samples(self.found.val, self.config.image_size or 0, augment=False) if self.found.val else None

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return data.collate(samples)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum of `model.loss_terms` over the images; with several train_scales, the mean of these sums."""
        image, target = batch["image"], batch["mask"][:, None].float() / 255
        losses = []
        for scale in self._unsettled.train_scales:
            size = STRIDES[-1] * max(1, round(scale * image.shape[-1] / STRIDES[-1]))
            seen = image if size == image.shape[-1] else resized_fp32(image, (size, size))
            losses.append(loss_terms(model(seen), target, balance_weight=self._unsettled.balance_weight).sum())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """Return the measures of metrics.py, and the prediction's structure loss, at each mask's own size.

        Images are computed one at a time, so that no measure depends on how images are batched: the last bit of a
        convolution's result depends on the batch, and can decide on which side of a threshold a pixel falls. The
        measures, on the CPU, take longer than the forward passes.
        """
        rows = []
        with shards.gathered(model):  # ranks may have different numbers of images
            for image, mask, (height, width) in zip(batch["image"], batch["mask"], batch["size"].tolist(), strict=True):
                truth = mask[:height, :width]
                probability, logits = self.probability(model, image[None], (height, width))
                row = measure(to_uint8(probability), truth.cpu().numpy())
                row["loss"] = structure_loss(logits, truth[None, None].float() / 255).item()
                rows.append(row)
        names = ("loss", *(name for name in rows[0] if name != "loss"))
        return {name: (torch.as_tensor(np.sum([row[name] for row in rows], axis=0)), len(rows)) for name in names}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        return report({name: value.numpy() for name, value in metrics.items()})

    def probability(self, model: nn.Module, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the object's probability and logits in an image (1, 3, S, S), both (1, 1, *size).

        With `tta` the probability is the mean of the image's and the mirrored image's; the logits are the image's.
        """
        logits = resized_fp32(model(image).logits[-1], size)
        probability = logits.sigmoid()
        if self._unsettled.tta:
            mirrored = resized_fp32(model(image.flip(3)).logits[-1], size).sigmoid().flip(3)
            probability = (probability + mirrored) / 2
        return probability, logits

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """Make AdamW, with separate rates for the backbone's blocks."""
        assert isinstance(model, Segmenter) and isinstance(config, Config)
        own = config.backbone == "compact"
        scale = config.backbone_lr_scale if config.backbone_lr_scale is not None else 1.0 if own else 0.1
        decay = config.layer_decay if config.layer_decay is not None else 1.0 if own else 0.8
        parts = list(reversed(blocks(model.backbone)))
        rates = {id(p): scale * decay**depth for depth, part in enumerate(parts) for p in part.parameters()}
        # parameters outside the blocks get the rate of a block below the first
        for parameter in model.backbone.parameters():
            rates.setdefault(id(parameter), scale * decay ** len(parts))
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for group in optim.parameter_groups(model, config.weight_decay):
            for parameter in group["params"]:
                rate = rates.get(id(parameter), 1.0)
                key = (rate, group["weight_decay"])
                one = groups.setdefault(key, {"params": [], "weight_decay": key[1], "lr_scale": rate})
                one["params"].append(parameter)
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        return torch.optim.AdamW(list(groups.values()), lr=config.lr, fused=fused)

    # Predictions
    def predict(self, model: nn.Module, index: int) -> tuple[Any, NDArray[np.uint8], NDArray[np.uint8]]:
        """Return a held-out Pillow image, its mask and its prediction, both uint8 (height, width).

        Raises:
            ValueError: nothing is held out.
        """
        if self.found.val is None:
            raise ValueError("predict: nothing is held out (val_scenes or val_fraction is 0)")
        image, mask = self.found.val.load(index)
        pixels = data.pixels(image, self.config.image_size or 0)
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        with torch.no_grad():
            probability, _ = self.probability(model, pixels[None].to(device), (mask.height, mask.width))
        model.train(training)
        return image, np.array(mask), to_uint8(probability)

    def write_predictions(self, model: nn.Module, path: str | Path) -> Path:
        """Write a zip with each held-out image's prediction as NAME.png: 8 bits, its mask's size.

        Evaluation tools read such images. The output is a single file, since Kaggle limits the number of output files,
        and is written atomically. If names repeat among test sets, each set has a folder.
        """
        path = Path(path)
        with (
            files.atomically(path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
        ):  # PNG is compressed already
            for index, name in enumerate([] if self.found.val is None else data.distinct_names(self.found.val)):
                _, _, prediction = self.predict(model, index)
                data.pillow().fromarray(prediction).save(png := io.BytesIO(), format="PNG")
                archive.writestr(f"{name}.png", png.getvalue())
        return path

    def figure(self, model: nn.Module, path: str | Path, count: int = 4) -> Path:
        """Write one PNG: a row for each of the first `count` held-out images: image, mask, prediction, error."""
        count = min(count, 0 if self.found.val is None else len(self.found.val))
        figure = plots.figure_of(9, 2.3 * count)
        axes = figure.subplots(count, 4, squeeze=False)
        for index in range(count):
            image, mask, prediction = self.predict(model, index)
            error = np.abs(prediction.astype(int) - mask)
            values = measure(prediction, mask)
            shown = (image, mask, prediction, error)
            titles = ("image", "mask", f"prediction, IoU {values['iou']:.2f}", f"error, mean {values['mae']:.3f}")
            for axis, picture, title in zip(axes[index], shown, titles, strict=True):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
                axis.set_title(title, fontsize=9)
                plots.ink(axis)
                axis.set_axis_off()
        figure.savefig(path, dpi=100)
        return Path(path)


def find(config: Config) -> data.Found:
    """Find and check the data that the config names (see `data.prepare`)."""
    return data.prepare(
        config.data_path,
        val_fraction=config.val_fraction,
        test_set=config.test_set,
        scenes=config.scenes,
        val_scenes=config.val_scenes,
    )


def runs(config: Config) -> list[tuple[str, Config, CamouflageSegmentation]]:
    """Return the name, config and task of each stage for the command `plan`; no task loads another stage's weights."""
    found = find(config)
    _cost(_sizes(config.settled(drawn=found.drawn)))  # raises if the backbone cannot compute images of this size
    return [
        (s.name, s.config, CamouflageSegmentation(s.config, found=found, stage=s.name, share=s.share))
        for s in stages(config, found)
    ]


def pretrained(config: Config) -> str | None:
    """Return the source of a timm backbone's weights: a file, "download", or None for random ones.

    The inputs are searched for .safetensors files only: other files are pickles, which can run code, so the user names
    them.

    Raises:
        FileNotFoundError: backbone_weights names a missing file.
        ValueError: stage 1 would freeze a random backbone, and backbone_weights does not ask for a random one.
    """
    if config.backbone == "compact" or config.backbone_weights == "random":
        return None
    if config.backbone_weights is not None:
        if config.backbone_weights != "download" and not Path(config.backbone_weights).is_file():
            raise FileNotFoundError(f"backbone_weights: no such file: {config.backbone_weights}")
        return config.backbone_weights
    name = config.backbone.partition(".")[0]
    for pattern in (f"*{name}*.safetensors", f"*{name}*/*.safetensors", f"{name}/*/*/*.safetensors"):
        if found := session.find(pattern):
            return str(found[0])
    if config.frozen_epochs:
        raise ValueError(
            f"backbone {config.backbone!r}: no pretrained weights among the inputs (no .safetensors file with {name} "
            f"in the name of the file or its folder), and stage 1 would freeze random weights for "
            f"{config.frozen_epochs} epochs. Add the weights as an input; or set backbone_weights to a file, to "
            f"'download' (needs internet), or to 'random' if you want random weights; or set frozen_epochs=0."
        )
    return None


def weights_from(config: Config) -> str:
    """Return in words where the backbone's weights come from; raises as `pretrained` does."""
    source = pretrained(config)
    if source is None:
        return "random"
    return "timm's own, downloaded" if source == "download" else source


def to_uint8(probability: Tensor) -> NDArray[np.uint8]:
    """Convert probabilities (…, height, width), 0 to 1, to an 8-bit image (height, width); of a batch the first map."""
    image: NDArray[np.uint8] = (255 * probability.float()).round().to(torch.uint8).flatten(0, -3)[0].cpu().numpy()
    return image


@distributed.returns_rank0
def by_test_set(task: CamouflageSegmentation, weights: str | Path) -> dict[str, dict[str, float]]:
    """Measure a file of weights on every test set beside the training data, for a table: {set: {measure: mean}}.

    `launch(by_test_set, task, "camouflage_segmentation/best/model.safetensors")`: each rank measures its share of the
    images, about 0.35 s an image of COD10K's size on its CPU core. {} for synthetic scenes.

    Raises:
        ValueError: images that cannot be used. CheckpointError: weights of another model.
    """
    model, tensors = task.network(), checkpoint.read_tensors(Path(weights))
    checkpoint.check_model(tensors, model.state_dict(), str(weights))
    model.load_state_dict(tensors)
    model.to(distributed.device()).eval()
    table: dict[str, dict[str, float]] = {}
    for name, source in distributed.from_main(lambda: data.test_sets(task.found)).items():
        one = CamouflageSegmentation(task._unsettled, found=dataclasses.replace(task.found, val=source))
        rows = []
        for index in range(distributed.rank(), len(source), distributed.world_size()):
            _, mask, prediction = one.predict(model, index)
            rows.append(measure(prediction, mask))
            distributed.alive()
        every = [row for part in distributed.gather(rows) for row in part]
        table[name] = report({key: np.mean([row[key] for row in every], axis=0) for key in every[0]})
    return table


# Baselines
def baselines(task: CamouflageSegmentation) -> dict[str, dict[str, float]]:
    """Measure three predictions that need no model, over the held-out images.

    nothing: background everywhere. mean mask: the mean of training masks, the same for each image. local contrast:
    places with more fine detail than the image's mean.

    Raises:
        ValueError: nothing is held out.
    """
    size, found = task.config.image_size or 0, task.found
    if found.val is None:
        raise ValueError("baselines: nothing is held out (val_scenes or val_fraction is 0)")
    pil = data.pillow()
    few = range(0, len(found.train), max(1, len(found.train) // 200))
    masks = [found.train.load(index)[1].resize((size, size), pil.Resampling.BILINEAR) for index in few]
    mean = pil.fromarray(np.mean([np.array(mask) for mask in masks], axis=0).astype(np.uint8))
    rows: dict[str, list[dict[str, Any]]] = {"nothing": [], "mean mask": [], "local contrast": []}
    for index in range(len(found.val)):
        image, mask = found.val.load(index)
        truth = np.array(mask)
        rows["nothing"].append(measure(np.zeros_like(truth), truth))
        rows["mean mask"].append(measure(np.array(mean.resize(mask.size, pil.Resampling.BILINEAR)), truth))
        rows["local contrast"].append(measure(local_contrast(np.array(image.convert("L"))), truth))
    return {
        name: report({key: np.mean([row[key] for row in of], axis=0) for key in of[0]}) for name, of in rows.items()
    }


def local_contrast(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the local amount of fine detail, uint8 (height, width): 0 up to the image's mean, 255 at the maximum.

    Detail is |pixel - mean of 3 x 3 pixels|, averaged over squares of an eighth of the image's shorter side.
    """
    pixels = torch.from_numpy(grey).float()[None, None]

    def around(values: Tensor, side: int) -> Tensor:
        return nn.functional.avg_pool2d(values, side, 1, side // 2, count_include_pad=False)

    detail = around((pixels - around(pixels, 3)).abs(), max(3, min(grey.shape) // 8 | 1))
    above = (detail - detail.mean()).clamp(min=0)
    return to_uint8(above / above.max().clamp(min=1e-6))
