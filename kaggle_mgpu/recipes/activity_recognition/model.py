"""The network (convolutions over time, self-attention, pooling) and the augmentation of windows.

Nothing depends on how a batch is split (no batch statistics, no dropout), so one GPU and several give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_RANDOM = 6
"""Number of normally distributed random numbers that `augment` takes for each window."""


class ConvBlock(nn.Module):
    """ConvNeXt's block (Liu et al. 2022) in one dimension: a convolution within each channel, then two across channels.

    Each time step is normalised over channels; the residual path is not, so the signals' strength is kept.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # x (B, width, T)
        y = self.norm(self.mix(x).transpose(1, 2))
        return x + self.down(F.gelu(self.up(y))).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over time, then an MLP; a normalisation before each.

    There is no positional encoding: a window begins anywhere in an activity, so positions mean nothing, and the
    convolutions see the order of time steps.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # x (B, T, width); q, k, v (B, heads, T, width / heads)
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    """Compute the logits (B, classes) of windows (B, channels, T) in the units of the data.

    `mean` and `std` are saved with the weights, so prediction normalises as training did. T is 8 or more; two strided
    convolutions reduce the time steps to a quarter before attention.

    Args:
        mean, std: of each channel over the training windows, float (channels,).
        width: channels of the first convolutions; twice as many from the second half on.
        n_conv: convolution blocks at each of the two resolutions.
        n_attention: attention blocks.
        heads: attention heads, a divisor of 2 width.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, classes: int, width: int, n_conv: int, n_attention: int, heads: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        deep = 2 * width
        self.stem = nn.Conv1d(len(mean), width, 7, stride=2, padding=3)
        self.first = nn.Sequential(*(ConvBlock(width) for _ in range(n_conv)))
        self.shrink = nn.Conv1d(width, deep, 4, stride=2, padding=1)
        self.second = nn.Sequential(*(ConvBlock(deep) for _ in range(n_conv)))
        self.attention = nn.Sequential(*(AttentionBlock(deep, heads) for _ in range(n_attention)))
        self.norm = nn.LayerNorm(deep)
        self.weigh = nn.Linear(deep, 1, bias=False)  # a bias would not change the softmax
        self.head = nn.Linear(deep, classes)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                # as in GPT-2: the more layers add to the residual path, the smaller their initial weights
                weight.data /= math.sqrt(2 * (n_conv + n_attention))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean[:, None]) / self.std[:, None]  # type: ignore[index]
        x = self.second(self.shrink(self.first(self.stem(x)))).transpose(1, 2)
        x = self.norm(self.attention(x))
        weights = self.weigh(x).float().softmax(1)  # (B, T, 1): the weight of each time step
        return self.head((weights * x).sum(1))


# Augmentation
def triads(channels: Sequence[str]) -> list[list[int]]:
    """Return the channel indices [x, y, z] of each sensor: names that differ only in the final x, y or z.

    >>> triads(["acc_x", "acc_y", "acc_z", "heart rate"])
    [[0, 1, 2]]
    """
    at = {name.lower(): index for index, name in enumerate(channels)}
    stems = [name[:-1] for name in at if name.endswith("x")]
    found = [[at.get(stem + axis, -1) for axis in "xyz"] for stem in stems]
    return [three for three in found if -1 not in three]


def augment(
    x: Tensor, chance: Tensor, sensors: Sequence[Sequence[int]], degrees: float, stretch: float, shift: float
) -> Tensor:
    """Return the windows as if others had worn the device: rotated, scaled, stretched in time and shifted.

    No random number is drawn here: `chance` is drawn when a sample is fetched, so it does not depend on the batch.

    Args:
        x: (B, channels, T), not normalised: only a rotation of raw signals equals another orientation of the device.
        chance: (B, N_RANDOM), standard normal: three for the rotation, then scale, time scale and shift.
        sensors: the channels of each sensor (`triads`); all get the same rotation, since one device carries them.
        degrees: standard deviation of the rotation around each axis, in degrees.
        stretch: standard deviation of the logarithms of the time scale and of the signals' scale.
        shift: standard deviation of the shift in time, as a fraction of the window; beyond its ends a window is
            mirrored.
    """
    length = x.shape[-1]
    time = torch.arange(length, device=x.device) - (length - 1) / 2
    at = time * (stretch * chance[:, 4:5]).exp() + (length - 1) / 2 + shift * length * chance[:, 5:6]
    period = 2.0 * (length - 1)
    at = at.remainder(period)
    at = torch.where(at > length - 1, period - at, at)  # (B, T), mirrored at both ends
    before = at.floor().clamp(max=length - 2)
    part = (at - before)[:, None]
    index = before.long()[:, None].expand_as(x)
    x = x.gather(2, index) * (1 - part) + x.gather(2, index + 1) * part
    x = x * (stretch * chance[:, 3]).exp()[:, None, None]
    turn = rotations(math.radians(degrees) * chance[:, :3])
    rows = list(x.unbind(1))
    # sums of products, since autocast would compute a matrix product in half precision; and no index tensors, which
    # would be copied to the device in each step
    axes = [torch.stack([rows[sensor[k]] for sensor in sensors], 1) for k in range(3)] if sensors else []  # (B, n, T)
    for k in range(len(axes)):
        turned = sum(turn[:, k, i, None, None] * axis for i, axis in enumerate(axes))
        for sensor, row in zip(sensors, turned.unbind(1), strict=True):  # type: ignore[union-attr]
            rows[sensor[k]] = row
    return torch.stack(rows, 1)


def rotations(vectors: Tensor) -> Tensor:
    """Return the rotation matrices (B, 3, 3) around `vectors` (B, 3) by their lengths in radians (Rodrigues)."""
    angle = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    a, b, c = (vectors / angle).unbind(1)
    zero = torch.zeros_like(a)
    cross = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], 1).view(-1, 3, 3)
    square = (cross[..., None] * cross[:, None]).sum(2)
    eye = torch.eye(3, device=vectors.device)
    return eye + angle.sin()[..., None] * cross + (1 - angle.cos())[..., None] * square
