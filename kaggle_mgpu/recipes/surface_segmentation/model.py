"""A residual 3-D U-Net with normalisation independent of the batch size, and its loss.

model = UNet(width=32, levels=5)
logits = model(image)                                # (B, 1, D, H, W) -> (B, 1, D, H, W); each side a multiple of 16
total = segmentation_loss(logits, label)             # the sum over patches; label (B, D, H, W), 2 is ignored
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .stacks import IGNORED


class Residual(nn.Module):
    """Two 3x3x3 convolutions with instance normalisation, and a shortcut; the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        # per sample, so the micro-batch size does not matter; group norm would, under autocast, run in fp32
        self.norm1, self.norm2 = nn.InstanceNorm3d(outputs, affine=True), nn.InstanceNorm3d(outputs, affine=True)
        same = inputs == outputs and stride == 1
        self.short = nn.Identity() if same else nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.short(x), 0.01)


class Doubled(nn.Module):
    """Make logits at twice the features' resolution: a transposed convolution, then a smoothing convolution."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.enlarge, self.correct = nn.ConvTranspose3d(inputs, 1, 2, stride=2), nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.enlarge(x)
        return logits + self.correct(logits)


class UNet(nn.Module):
    """Encoder and decoder of `levels` resolutions with `width`, 2 width, 4 width ... (at most 320) channels.

    The finest resolution is the image's. With `half` it is half of the image's, and the heads double their resolution.

    Returns logits (B, 1, D, H, W), the log-odds of the sheet; in training with `deep_supervision` a list of the logits
    of every resolution but the lowest, finest first.
    """

    def __init__(self, width: int = 32, levels: int = 5, deep_supervision: bool = False, half: bool = False) -> None:
        super().__init__()
        channels = [min(width * 2**i, 320) for i in range(levels)]
        self.levels, self.deep_supervision, self.checkpointing = levels, deep_supervision, False
        self.down = nn.ModuleList(
            Residual(1 if i == 0 else channels[i - 1], channels[i], 2 if i or half else 1) for i in range(levels)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(channels[i + 1], channels[i], 2, stride=2) for i in range(levels - 1)
        )
        self.merge = nn.ModuleList(Residual(2 * channels[i], channels[i]) for i in range(levels - 1))
        heads = max(1, levels - 1) if deep_supervision else 1
        self.heads = nn.ModuleList(Doubled(c) if half else nn.Conv3d(c, 1, 1) for c in channels[:heads])
        self.divisor = 2 ** (levels if half else levels - 1)
        """The sides of an image must be multiples of this number."""

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map images (B, 1, D, H, W) to logits. Raises ValueError if a side is not a multiple of `divisor`."""
        if any(side % self.divisor for side in x.shape[2:]):
            raise ValueError(f"UNet: expected sides that are multiples of {self.divisor}, got {tuple(x.shape[2:])}")
        skips: list[Tensor] = []
        for block in self.down:
            x = self._run(block, x)
            skips.append(x)
        outputs = [skips.pop()]
        for i in reversed(range(self.levels - 1)):
            x = self._run(self.merge[i], torch.cat((self.up[i](outputs[0]), skips.pop()), 1))
            outputs.insert(0, x)
        if self.deep_supervision and self.training:
            return [head(x) for head, x in zip(self.heads, outputs, strict=False)]
        logits: Tensor = self.heads[0](outputs[0])
        return logits

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def segmentation_loss(logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
    """Return the sum over patches of cross entropy (mean over the patch's labelled voxels) + 1 - soft Dice.

    Each patch is a separate term, so gradients do not depend on how patches are split into micro-batches and over GPUs.
    (With a Dice or a mean over the whole batch they would.) The Dice term is left out for a patch without sheet; a
    patch without labels gives 0. Computed in fp32, since an fp16 sum over a patch overflows.

    Args:
        logits: (B, 1, D, H, W); for deep supervision a list, each level with half the resolution and half the weight of
            the level before; the weights sum to 1 (as in nnU-Net, Isensee et al. 2021).
        label: (B, D, H, W): 0, 1, or 2 for voxels that are ignored.
    """
    if not isinstance(logits, Tensor):
        weights = [0.5**i for i in range(len(logits))]
        levels = [
            w / sum(weights) * segmentation_loss(level, label[:, :: 2**i, :: 2**i, :: 2**i])
            for i, (w, level) in enumerate(zip(weights, logits, strict=True))
        ]
        return torch.stack(levels).sum()
    x = logits.float().flatten(1)
    labelled = (label != IGNORED).flatten(1).float()
    target = (label == 1).flatten(1).float()
    entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none") * labelled
    entropy = entropy.sum(1) / labelled.sum(1).clamp(min=1)
    p = x.sigmoid() * labelled
    dice = (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    return (entropy + (1 - dice) * (target.sum(1) > 0)).sum()


def skeleton_recall_loss(logits: Tensor | Sequence[Tensor], medial: Tensor) -> Tensor:
    """Return the sum over patches of 1 - soft recall of the sheet's medial surface, in fp32; 0 without a sheet.

    The loss is that of Kirchhoff et al. 2024 (arXiv 2404.03010) for each patch alone, but with the medial surface of
    `patches.medial_surface` instead of a skeleton widened to a tube. For a list only the finest logits count, since at
    half the resolution the surface would have holes.

    Args:
        logits: (B, 1, D, H, W), or a list of them, finest first.
        medial: (B, D, H, W) bool.
    """
    x = (logits if isinstance(logits, Tensor) else logits[0]).float().flatten(1)
    surface = medial.flatten(1).float()
    recall = ((x.sigmoid() * surface).sum(1) + 1) / (surface.sum(1) + 1)
    return (1 - recall).sum()
