"""The config of a camouflage run, its presets and its stages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kaggle_mgpu.checkpoints import Checkpoints
from kaggle_mgpu.config import TrainConfig, in_epochs

from .data import SCENE_SIZE, Found
from .model import FIXED_SIZE, STRIDES

Preset = Literal["balanced", "fast", "high_resolution"]
PRESETS: dict[str, dict[str, int]] = {
    "balanced": {"image_size": 320, "global_batch_size": 32, "width": 32, "decoder_width": 48, "num_experts": 4},
    "fast": {"image_size": 320, "global_batch_size": 48, "width": 24, "decoder_width": 32, "num_experts": 2},
    "high_resolution": {"image_size": 352, "global_batch_size": 24, "width": 40, "decoder_width": 64, "num_experts": 4},
}
"""Values of each preset for fields left None. SINet, PFNet and the base scale of ZoomNet use 352 pixels."""
EXPERTS: dict[str, dict[str, int]] = {
    "balanced": {"decoder_width": 64, "num_experts": 7},
    "fast": {"decoder_width": 32, "num_experts": 7},
    "high_resolution": {"decoder_width": 128, "num_experts": 7},
}
"""Values that replace those in PRESETS where decoder is experts."""
SCENES_BATCH = {"balanced": 16, "fast": 32, "high_resolution": 16}
"""global_batch_size of each preset on the 200 synthetic scenes: larger batches would leave few steps."""


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train a segmenter of camouflaged objects.

    Fields left None are set by `preset`, or as their text says. Stage 1 uses the `frozen_…` settings, stage 2 `lr`,
    `schedule` and so on. The last part of stage 2 trains everything for `epochs`, each earlier part the decoder and a
    share of the backbone for `partial_epochs`.
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {"data_path"}  # checkpoints have the data's digest
    OTHER_NAMES: ClassVar[dict[str, str]] = {
        "dataset_path": "data_path", "img_size": "image_size", "stage1_epochs": "frozen_epochs",
        "stage1_lr": "frozen_lr", "stage1_batch_size": "frozen_batch_size", "stage2_lr": "lr",
        "stage2_epochs": "epochs", "stage2_batch_size": "global_batch_size", "progressive_unfreeze": "unfreeze_parts",
    }  # fmt: skip

    data_path: str | None = None
    """A folder with Train/Image and Train/GT_Object (COD10K-v3), TrainDataset/Imgs and TrainDataset/GT, or Imgs and
    GT. None: searched among the Kaggle inputs; else synthetic scenes are drawn."""
    test_set: str | None = None
    """The folder in TestDataset to evaluate on. None: COD10K, or all folders where COD10K is missing."""
    val_fraction: float = 0.1
    """Share of the images held out where the data have no test folder. 0: none."""
    scenes: int = 200
    """How many synthetic scenes to train on, where there are no files."""
    val_scenes: int = 50
    """How many further synthetic scenes to hold out."""

    preset: Preset = "balanced"
    """Values for image_size, global_batch_size, width, decoder_width and num_experts left None. fast: a smaller
    model and a larger batch; high_resolution: 352 pixels instead of 320."""
    image_size: int | None = None
    """Side of the resized images in pixels, a multiple of 32. None: the preset's (synthetic scenes: 96, their own
    size)."""
    backbone: str = "compact"
    """compact: the recipe's own; or the name of a timm backbone, such as edgenext_base, where timm is installed."""
    backbone_weights: str | None = None
    """Pretrained weights of a timm backbone: a file, `download` (needs internet), or `random`. None: a .safetensors
    file among the inputs with the backbone's name in the name of the file or its folder. Without such a file, stage 1
    (backbone frozen) is refused."""
    width: int | None = None
    """Channels of the compact backbone's first level; the others have 2, 4 and 8 times as many."""
    decoder: Literal["small", "experts"] = "small"
    """small: dilated convolutions as experts, 0.05 to 0.24 M parameters. experts: experts of seven kinds (texture,
    attention, hybrid, frequency, edge, context, contrast: experts.py), 0.7 (fast), 2.8 (balanced) or 10.7 M; 13.5 M
    with decoder_width=144. On synthetic scenes small is better after the same time: S-measure 0.893 against 0.860
    in short runs from random weights, 0.907 against 0.896 on pretrained ones (experts of width 32, three seeds:
    tools/bench/README.md). Not compared on photographs."""
    decoder_width: int | None = None
    """Channels of the decoder; where decoder is experts, of its finest level."""
    num_experts: int | None = None
    """Experts in each of the decoder's four mixtures. Where decoder is experts, the kinds are taken in turn."""
    routing: Literal["soft", "topk"] = "soft"
    """soft: each pixel uses all experts, weighted; topk: its top_k best ones."""
    top_k: int = 2
    """Experts a pixel uses where routing is topk."""
    balance_weight: float = 0.01
    """Weight of the term for even use of the experts, computed for each image by itself."""

    frozen_epochs: int = 2
    """Stage 1: epochs with the backbone frozen. 0: no stage 1."""
    frozen_lr: float = 1e-3
    """Stage 1: peak learning rate."""
    frozen_batch_size: int | None = None
    """Stage 1: images per optimizer step over all GPUs. None: global_batch_size."""
    frozen_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Stage 1: shape of the learning rate after the warm-up."""
    unfreeze_parts: int = 3
    """Number of parts of stage 2, each a run that unfreezes more of the backbone from the top; the last part trains
    everything."""
    partial_epochs: int = 1
    """Epochs of each part before the last. 0: only the last part."""
    backbone_lr_scale: float | None = None
    """The backbone's learning rate, as a multiple of the decoder's. None: 1 for compact, which begins with random
    weights, 0.1 for timm's."""
    layer_decay: float | None = None
    """Ratio of a backbone block's learning rate to the next higher block's. None: 1 for compact, 0.8 for timm's."""

    epochs: int = 30
    """Passes over the training data in the last part."""
    max_steps: int | None = None
    """Optimizer steps of each stage and part, instead of their epochs: for a quick look."""
    lr: float = 1e-3
    """Peak learning rate of stage 2."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay, applied to matrices only."""
    warmup_steps: int | float | str = 0.05
    """Steps of linear warm-up in each stage and part; below 1, a fraction of its steps; "2 epochs": so many epochs. A
    shorter stage or part is warm-up to its end."""
    ema_decay: float | None = 0.999
    """Average the weights with this decay; evaluation and the next stage then use the average."""
    eval_every: int | Literal["epoch", "end"] | None = None  # type: ignore[assignment]
    """When to evaluate in the last part (the others: at their end). None: ten times on synthetic scenes, four times
    on files: the measures are exact, at the masks' own size, and take 0.35 s for an image of COD10K's size."""
    best_metric: str = "s_measure"
    """The validation metric for the choice of the weights in best/."""
    best_mode: Literal["min", "max"] = "max"
    """Whether best_metric is better when smaller or larger."""
    rotation: float = 0.0
    """Rotate training images by a random angle of at most this many degrees; 15 in SINet-V2 (Fan et al. 2021). On
    synthetic scenes 15 gives no gain: S-measure 0.851 against 0.856 after 150 steps (three seeds)."""
    train_scales: tuple[float, ...] = (1.0,)
    """Multi-scale training: the loss is the mean over these multiples of image_size, each rounded to a multiple of 32.
    PraNet (Fan et al. 2020) takes a step at each of 0.75, 1 and 1.25. The mean does not depend on how a batch is split,
    and for these three scales costs 3.1 times the work. Not for backbones that are made for one size. On synthetic
    scenes, whose objects have one scale, there is no gain: S-measure 0.833 against 0.856 after 150 steps (three
    seeds). Not measured on photographs."""
    tta: bool = False
    """Evaluate and predict with the mean of the predictions for an image and for its mirror image."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of each stage, here or among the inputs; never: begin anew; or the folder
    of an earlier run with the same settings, whose stages are continued."""
    output_dir: str = "camouflage_segmentation"
    """The run's folder: a folder for each stage and part, and the results of all together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {
            "scenes": 1, "val_scenes": 0, "image_size": 32, "width": 2, "decoder_width": 2, "num_experts": 1,
            "top_k": 1, "frozen_epochs": 0, "frozen_batch_size": 1, "unfreeze_parts": 1, "partial_epochs": 0,
            "frozen_lr": 0, "balance_weight": 0, "backbone_lr_scale": 0, "layer_decay": 0,
            "rotation": 0,
        }  # fmt: skip
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {value!r}")
        if isinstance(self.global_batch_size, str):
            raise ValueError(
                f"Config.global_batch_size: expected a number, since the stages' lengths are computed from it, got "
                f"{self.global_batch_size!r}"
            )
        for name, factor in {"image_size": STRIDES[-1], "width": 2, "decoder_width": 2}.items():
            if (getattr(self, name) or 0) % factor:
                raise ValueError(f"Config.{name}: expected a multiple of {factor}, got {getattr(self, name)}")
        if not self.train_scales or not all(0.25 <= scale <= 4 for scale in self.train_scales):
            raise ValueError(f"Config.train_scales: expected numbers from 0.25 to 4, got {self.train_scales!r}")
        if self.train_scales != (1.0,) and self.backbone.startswith(FIXED_SIZE):
            raise ValueError(
                f"Config.train_scales: backbone {self.backbone!r} is made for one image size, so it cannot train at "
                f"{self.train_scales!r}. Leave train_scales out, or choose another backbone, such as pvt_v2_b2."
            )
        if not 0 <= self.val_fraction <= 0.5:
            raise ValueError(f"Config.val_fraction: expected 0 to 0.5, got {self.val_fraction}")
        most = self.num_experts or self._preset()["num_experts"]
        if self.routing == "topk" and self.top_k > most:
            raise ValueError(f"Config.top_k: expected at most num_experts = {most}, got {self.top_k}")
        if self.strategy == "deepspeed" and _zero_stage(self.deepspeed_config) == 3:
            raise ValueError(
                f"Config.deepspeed_config: {self.deepspeed_config} asks for ZeRO stage 3, under which all ranks must "
                f"compute in step, but this recipe evaluates image by image, and ranks have different numbers of "
                f"images. Use stage 2, or strategy='fsdp', which also splits the weights over the GPUs."
            )

    def _preset(self) -> dict[str, int]:
        """Return the preset's values, as a new dictionary."""
        return PRESETS[self.preset] | (EXPERTS[self.preset] if self.decoder == "experts" else {})

    def settled(self, *, drawn: bool) -> Config:
        """Return a copy with the preset's values in the fields left None.

        Args:
            drawn: whether the data are synthetic scenes.
        """
        values = self._preset()
        if drawn:
            values |= {"image_size": SCENE_SIZE, "global_batch_size": SCENES_BATCH[self.preset]}
        if self.micro_batch_size not in (None, "auto") and self.gradient_accumulation_steps is not None:
            del values["global_batch_size"]  # computed from micro-batch, accumulation and number of GPUs
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return self.replace(**missing) if missing else self


def _zero_stage(file: str | None) -> Any:
    """Return the ZeRO stage of a DeepSpeed file; None where the file names none (zero.py reports that)."""
    try:
        return json.loads(Path(file or "").read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Stage:
    """One of the runs that follow each other: stage 1, or a part of stage 2."""

    name: str
    config: Config
    share: float
    """Share of the backbone's blocks that are trained, from the last on."""
    max_steps: int
    """Optimizer steps of the whole stage."""


def stages(config: Config, found: Found) -> list[Stage]:
    """Return stage 1 and the parts of stage 2, each with its own folder, length, rate, batch and schedule."""
    config = config.settled(drawn=found.drawn)
    parts = config.unfreeze_parts if config.partial_epochs else 1
    frozen: dict[str, Any] = {
        "epochs": config.frozen_epochs,
        "lr": config.frozen_lr,
        "min_lr": min(config.min_lr, config.frozen_lr),
        "schedule": config.frozen_schedule,
        "global_batch_size": config.frozen_batch_size or config.global_batch_size,
    }
    planned: list[tuple[str, float, dict[str, Any]]] = [("stage1", 0.0, frozen)] if config.frozen_epochs else []
    for part in range(1, parts + 1):
        last = part == parts
        name = "stage2" if parts == 1 else f"stage2-{part}"
        planned.append((name, part / parts, {"epochs": config.epochs if last else config.partial_epochs}))
    made = []
    for name, share, changes in planned:
        one = config.replace(output_dir=str(Path(config.output_dir) / name), **changes)
        replicas = one.workers_wanted or 1
        micro = one.micro_batch_size if isinstance(one.micro_batch_size, int) else 1
        batch = one.global_batch_size or micro * replicas * (one.gradient_accumulation_steps or 1)
        assert not isinstance(batch, str)
        steps = one.max_steps or one.epochs * math.ceil(len(found.train) / batch)
        epochs = in_epochs(one.warmup_steps)
        warmup = float(one.warmup_steps) if epochs is None else epochs * math.ceil(len(found.train) / batch)
        if warmup > steps:  # meant for the last part, which is longer
            one = one.replace(warmup_steps=steps)
        if name != planned[-1][0]:
            one = one.replace(eval_every="end")
        elif one.eval_every is None:
            one = one.replace(eval_every=max(1, math.ceil(steps / (10 if found.drawn else 4))))
        made.append(Stage(name, one.replace(resume=_resume(config, name)), share, steps))
    return made


def _resume(config: Config, stage: str) -> str:
    """Return one stage's `resume`: for the folder of an earlier run, the stage's newest checkpoint there.

    Raises:
        FileNotFoundError: there is no run of this recipe in the folder.
    """
    if config.resume in ("auto", "never") or Checkpoints(Path(config.output_dir) / stage / "checkpoints").newest():
        return "never" if config.resume == "never" else "auto"
    if not any(Path(config.resume).glob("stage*/checkpoints")):
        raise FileNotFoundError(
            f"resume: expected auto, never, or the folder of an earlier run, with {stage}/checkpoints in it; "
            f"got {Path(config.resume).resolve()}"
        )
    newest = Checkpoints(Path(config.resume) / stage / "checkpoints").newest()
    return "auto" if newest is None else str(newest)
