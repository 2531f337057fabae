"""Segmentation of volumes: the recipe's network and loss beside MONAI's UNet and DynUNet, on a head and on sheets.

A T1 scan from Debian's mricron-data at 2 mm, its label the brain: trained on the left half, measured on the right half.
The sheets are the recipe's synthetic volumes, measured on the held-out one. All get the same patches of 32^3 in the
same order, AdamW and a cosine; MONAI's networks have its loss, DiceCELoss, and as many channels as the kit's. The kit's
sliding window predicts for all. MONAI's UNet halves the resolution first and takes a quarter of the kit's time for a
step, so it also gets 4 times the steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaggle_mgpu import train
from kaggle_mgpu.recipes.surface_segmentation.data import read_label
from kaggle_mgpu.recipes.surface_segmentation.inference import sliding_window
from kaggle_mgpu.recipes.surface_segmentation.metrics import measures
from kaggle_mgpu.recipes.surface_segmentation.stacks import read_stack
from kaggle_mgpu.recipes.surface_segmentation.training import Config, SurfaceSegmentation

from . import common

STEPS = {True: 25, False: 240}
CHANNELS = (8, 16, 32)


def task(run: common.Run, sheets: bool = False, longer: int = 1, **changes: Any) -> SurfaceSegmentation:
    """Return the recipe with a cosine, on the head or on synthetic sheets, for `longer` times the number of steps."""
    data = changes if sheets else {"data_path": str(run.data), "val_fraction": 0, "patches_per_volume": 64} | changes
    return SurfaceSegmentation(
        Config(
            cache_dir=str(run.output / "cache"), output_dir=str(run.output), patch_size=32,
            width=CHANNELS[0], micro_batch_size=None, max_steps=longer * run.steps, schedule="cosine", seed=run.seed,
            eval_every="end", strategy="single", nproc=1, **data,
        )
    )  # fmt: skip


def scores(run: common.Run, surface: SurfaceSegmentation, model: nn.Module) -> dict[str, float]:
    """Return the figures of a network on the right half of the head, or on the held-out sheets."""
    model.eval()
    if held := surface.split[1]:
        image, label = read_stack(held[0].image), read_label(held[0])
    else:
        image, label = read_stack(str(run.data / "test_images" / "right.tif")), np.load(run.data / "right.npy")
    planes = [part for _, part in sliding_window(model, image, size=32)]
    figures = measures((np.concatenate(planes) > 0).astype(np.uint8), label)
    return {"Dice": figures["dice"], "surface Dice": figures["surface_dice"], "M": common.parameters(model) / 1e6}


def kit(run: common.Run, **changes: Any) -> dict[str, float]:
    """Train the recipe."""
    surface = task(run, **changes)
    return scores(run, surface, train(surface.config, surface).load(surface.model()))


def monai(
    run: common.Run, network: type[nn.Module], *, sheets: bool = False, longer: int = 1, **sizes: Any
) -> dict[str, float]:
    """Train a network of MONAI with a loop written by hand, for `longer` times the number of steps."""
    from monai.losses import DiceCELoss

    surface = task(run, sheets, longer)
    c, measure = surface.config, DiceCELoss(sigmoid=True)
    torch.manual_seed(run.seed)
    model = network(spatial_dims=3, in_channels=1, out_channels=1, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, betas=(0.9, 0.95))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        image, label = batch
        found: Tensor = measure(model(image), (label == 1)[:, None].float())
        return found

    patches = common.batches(surface.train_data(), 8, run.seed)
    common.fit(model, patches, loss, optimizer, steps=c.max_steps or 0, lr=c.lr, min_lr=c.min_lr, warmup=0.05)
    return scores(run, surface, model)


def unet(run: common.Run, **options: Any) -> dict[str, float]:
    """Train MONAI's UNet with residual units."""
    from monai.networks.nets import UNet

    return monai(run, UNet, channels=CHANNELS, strides=(2, 2), num_res_units=2, **options)


def dynunet(run: common.Run) -> dict[str, float]:
    """Train MONAI's DynUNet, which has nnU-Net's form, with residual blocks."""
    from monai.networks.nets import DynUNet

    return monai(
        run, DynUNet, filters=CHANNELS, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2),
        res_block=True,
    )  # fmt: skip


CONTENDERS: dict[str, common.Contender] = {
    "kit": kit,
    "MONAI's DynUNet": dynunet,
    "MONAI's UNet": unet,
    "MONAI's UNet, 4 x the steps": partial(unet, longer=4),
    "kit, half stem, 4 x the steps": partial(kit, stem="half", longer=4),
    "kit, sheets": partial(kit, sheets=True),
    "kit, half stem, sheets, 4 x the steps": partial(kit, sheets=True, stem="half", longer=4),
    "MONAI's UNet, sheets, 4 x the steps": partial(unet, sheets=True, longer=4),
}
