"""The network (convolutions over time, self-attention, pooling) and the augmentation of windows.

Nothing in it depends on how a batch is split (no batch statistics, no dropout): the weights that come out are the same
on one GPU and on several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANCES = 6
"""Numbers from a normal distribution for each window, as `augment` expects."""


class ConvBlock(nn.Module):
    """A residual block of one convolution within each channel and two between channels (ConvNeXt, Liu et al. 2022,
    in one dimension). Each moment is normalised over channels; the residual path keeps the signals' strength."""

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
    """Self-attention over time, then an MLP; a normalisation before each. The moments' order is the convolutions' to
    tell: a window begins anywhere in an activity, so a position in it means nothing."""

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
    """Logits of the classes for windows (B, channels, T) in the units of the data.

    Normalises by `mean` and `std`, which are saved with the weights: predictions then cannot be made with other ones.
    T may be any length from 8 on; it is quartered before attention looks at it.

    Args:
        mean, std: of each channel over the training windows, float (channels,).
        width: channels of the first convolutions; twice as many from the second half on.
        n_conv: convolution blocks at each of the two resolutions.
        n_attention: attention blocks.
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
        self.weigh = nn.Linear(deep, 1, bias=False)  # a softmax does not notice a bias
        self.head = nn.Linear(deep, classes)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                # GPT-2's: what adds to the residual stream is smaller the more layers there are
                weight.data /= math.sqrt(2 * (n_conv + n_attention))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean[:, None]) / self.std[:, None]  # type: ignore[index]
        x = self.second(self.shrink(self.first(self.stem(x)))).transpose(1, 2)
        x = self.norm(self.attention(x))
        weights = self.weigh(x).float().softmax(1)  # (B, T, 1): how much each moment says
        return self.head((weights * x).sum(1))


# Augmentation
def triads(channels: Sequence[str]) -> list[list[int]]:
    """Return the indices of the three axes of each sensor: channels with names equal but for a final x, y, z.

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
    """Each window as another wearer's: turned, stronger or weaker, faster or slower, begun earlier or later.

    A function of its arguments alone, on whatever device they are: the chance is drawn where the sample is fetched.

    Args:
        x: (B, channels, T), in the units of the data: a turn of raw signals is what carrying the device otherwise does.
        chance: (B, CHANCES), normally distributed.
        sensors: which channels turn together (`triads`); all by the same rotation, since one device carries them.
        degrees: standard deviation of the turn around each axis.
        stretch: of the logarithm of time's and the signals' scale.
        shift: of the beginning, as a fraction of the window. Beyond its ends a window goes on mirrored.
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
    # sums of products rather than a matrix product, which autocast would do in half precision; and no index that would
    # have to be copied to the device in each step
    axes = [torch.stack([rows[sensor[k]] for sensor in sensors], 1) for k in range(3)] if sensors else []  # (B, n, T)
    for k in range(len(axes)):
        turned = sum(turn[:, k, i, None, None] * axis for i, axis in enumerate(axes))
        for sensor, row in zip(sensors, turned.unbind(1), strict=True):  # type: ignore[union-attr]
            rows[sensor[k]] = row
    return torch.stack(rows, 1)


def rotations(vectors: Tensor) -> Tensor:
    """Return the matrices (B, 3, 3) of turns around `vectors` (B, 3) by their lengths in radians (Rodrigues)."""
    angle = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    a, b, c = (vectors / angle).unbind(1)
    zero = torch.zeros_like(a)
    cross = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], 1).view(-1, 3, 3)
    square = (cross[..., None] * cross[:, None]).sum(2)
    eye = torch.eye(3, device=vectors.device)
    return eye + angle.sin()[..., None] * cross + (1 - angle.cos())[..., None] * square
