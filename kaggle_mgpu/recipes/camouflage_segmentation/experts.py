"""A decoder with experts of seven kinds, each after a published method: Config.decoder="experts".

    decoder = ExpertsDecoder([32, 64, 128, 256], width=64, num_experts=7, top_k=2)
    output = decoder(features)    # a model.Output, as from model.Decoder

An expert maps (B, C, H, W) to the same shape, each image by itself. A router weights the experts at each position, so
that their use can be balanced within each image. With one weight per image, use could be balanced only over the batch,
and the gradient would depend on how the batch is split.

All experts are computed everywhere, with weight 0 where top-k leaves them out. So every parameter has a gradient in
every step, as DistributedDataParallel needs, and no shape depends on data, as torch.compile needs. This takes
num_experts / top_k times the operations of a sparse computation. Experts have half the channels of their decoder level,
to save part of this cost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import DILATIONS, Output, boundary_head, final_head, gates, group_norm, maybe_checkpoint, resized

KEYS = 8
"""Side of the pooled map that the attention expert looks at: 64 keys, whatever the image's size."""
BINS = (1, 2, 3, 6)
"""Sides of the context expert's pooled maps (Zhao et al. 2017)."""
SURROUNDS = (3, 7, 15)
"""Sides of the squares around a position whose means the contrast expert subtracts."""


def at_least_fp32(x: Tensor) -> Tensor:
    """Return half precision as fp32, other tensors as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def output_layers(inputs: int, outputs: int) -> nn.Sequential:
    """Make the last layers of an expert: (B, inputs, H, W) to (B, outputs, H, W)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), group_norm(outputs), nn.GELU())


def pooled(x: Tensor, bins: int) -> Tensor:
    """Return the means of x (B, C, H, W) over at most bins x bins rectangles."""
    return F.avg_pool2d(x, [math.ceil(side / bins) for side in x.shape[2:]], ceil_mode=True)


def heads_of(width: int) -> int:
    """Return the number of attention heads for `width` channels, about 32 channels each."""
    return math.gcd(width, max(1, width // 32))


class Texture(nn.Module):
    """Texture looks around a position at four distances at once.

    Parallel dilated convolutions, after the receptive field block (Liu, Huang and Wang 2018), which SINet (Fan et al.
    2020) uses to search for camouflaged objects.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(width, width // 4, 3, padding=d, dilation=d) for d in DILATIONS)
        self.out = output_layers(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(torch.cat([branch(x) for branch in self.branches], 1)))


class Attention(nn.Module):
    """Attention compares a position with the whole image (Vaswani et al. 2017).

    Keys and values are pooled, as in the Pyramid Vision Transformer (Wang et al. 2021): the cost grows with the number
    of positions, not with its square.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.query = nn.Conv2d(width, width, 1)
        self.keys_values = nn.Conv2d(width, 2 * width, 1)
        self.out = output_layers(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.query(x), *self.keys_values(pooled(x, KEYS)).chunk(2, 1))
        query, key, value = (p.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for p in parts)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out(x + found.transpose(2, 3).reshape(x.shape))


class Hybrid(nn.Module):
    """Hybrid is a depth-wise convolution, then attention between channels.

    The convolution sees the neighbourhood, cross-covariance attention (El-Nouby et al. 2021, XCiT) the whole image, as
    in EdgeNeXt (Maaz et al. 2022).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.parts = nn.Conv2d(width, 3 * width, 1)
        self.scale = nn.Parameter(torch.ones(self.heads))
        self.out = output_layers(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.near(x)
        query, key, value = (p.flatten(2).unflatten(1, (self.heads, -1)) for p in self.parts(x).chunk(3, 1))
        # fp32: squares overflow fp16
        query, key = F.normalize(at_least_fp32(query), dim=3), F.normalize(at_least_fp32(key), dim=3)
        shares = (query @ key.transpose(2, 3) * self.scale.view(-1, 1, 1)).softmax(3)
        return self.out(x + (shares.to(value.dtype) @ value).reshape(x.shape))


class Frequency(nn.Module):
    """Frequency mixes the channels of each frequency of the whole image.

    A fast Fourier convolution (Chi, Jiang and Mu 2020), with group normalisation. Camouflaged objects are easier to
    detect by their frequencies (Zhong et al. 2022, FDCOD). The transform is in fp32, since cuFFT takes only powers of
    two in half precision.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spectral = output_layers(2 * width, 2 * width)
        self.out = output_layers(width, width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(at_least_fp32(x), norm="ortho"))
        real, imaginary = at_least_fp32(self.spectral(torch.cat(spectrum.unbind(-1), 1))).chunk(2, 1)
        back = torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[2:], norm="ortho")
        return self.out(x + back.to(x.dtype))


class Edge(nn.Module):
    """Edge measures the slope of features (Sobel) and the change of the slope (Laplace).

    Edges help where an object hardly differs from its surroundings (Sun et al. 2022, BGNet).
    """

    kernels: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        second = torch.tensor([[1.0, 1.0, 1.0], [1.0, -8.0, 1.0], [1.0, 1.0, 1.0]]) / 8
        kernels = torch.stack([across, across.T, second])[:, None].repeat(width, 1, 1, 1)
        self.register_buffer("kernels", kernels, persistent=False)
        self.out = output_layers(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        changes = F.conv2d(x, self.kernels.to(x.dtype), padding=1, groups=x.shape[1])
        across, down, second = at_least_fp32(changes).unflatten(1, (-1, 3)).unbind(2)
        steep = (across.square() + down.square() + 1e-6).sqrt()  # the square root has no finite gradient at 0
        return self.out(torch.cat([x, steep.to(x.dtype), second.to(x.dtype)], 1))


class Context(nn.Module):
    """Context adds the means of large parts of the image: pyramid pooling (Zhao et al. 2017, PSPNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.Conv2d(width, width // 4, 1) for _ in BINS)
        self.out = output_layers(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        means = (pool(pooled(x, bins)) for pool, bins in zip(self.pools, BINS, strict=True))
        return self.out(torch.cat([x, *(resized(mean, x) for mean in means)], 1))


class Contrast(nn.Module):
    """Contrast subtracts from a position the mean of its surroundings, at three sizes.

    Centre-surround differences (Itti, Koch and Niebur 1998) of learned features, as in Ding et al. 2018 (context
    contrasted local features).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = output_layers(len(SURROUNDS) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([x - around(x, side) for side in SURROUNDS], 1))


def around(x: Tensor, side: int) -> Tensor:
    """Return the mean of x (B, C, H, W) over the square around each position, computed cheaply as two 1-D means."""
    x = F.avg_pool2d(x, (side, 1), 1, (side // 2, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, side), 1, (0, side // 2), count_include_pad=False)


KINDS: dict[str, type[nn.Module]] = {
    "texture": Texture, "attention": Attention, "hybrid": Hybrid, "frequency": Frequency, "edge": Edge,
    "context": Context, "contrast": Contrast,
}  # fmt: skip
"""The kinds of experts, in the order in which num_experts takes them."""


class Mixture(nn.Module):
    """Mixture adds to its input the experts' outputs, weighted at each position.

    One convolution makes the inputs of all experts, and one sums their weighted outputs. Two convolutions per expert
    would give the same result, but with more and smaller matrix products.

    Args:
        top_k: how many experts a position uses; None: all of them, weighted softly.
    """

    def __init__(self, width: int, num_experts: int, top_k: int | None) -> None:
        super().__init__()
        self.top_k = top_k
        inner = 4 * math.ceil(width / 8)  # half of width, a multiple of 4 for the branches of Texture and Context
        kinds = list(KINDS.values())
        self.norm = group_norm(width)
        self.router = nn.Conv2d(width, num_experts, 1)
        self.reduce = nn.Conv2d(width, num_experts * inner, 1)
        self.experts = nn.ModuleList(kinds[index % len(kinds)](inner) for index in range(num_experts))
        self.expand = nn.Conv2d(num_experts * inner, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, width, H, W), and the `balance` of each image, (B,)."""
        y = self.norm(x)
        weights, uneven = gates(self.router(y), self.top_k)
        parts = self.reduce(y).chunk(len(self.experts), 1)
        found = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        weighted = [weight.to(out.dtype) * out for weight, out in zip(weights.split(1, 1), found, strict=True)]
        return x + self.expand(torch.cat(weighted, 1)), uneven


class ExpertsDecoder(nn.Module):
    """ExpertsDecoder predicts from the coarsest feature to the finest; each prediction guides the next.

    Like `model.Decoder`, this is a feature pyramid with a head at each scale and one for the boundary, with two
    differences. The levels have 1, 2, 4 and 4 times `width` channels, from fine to coarse. Each finer level masks its
    features by the coarser prediction, once for the object and once for the background (background alone: reverse
    attention, Fan et al. 2020, PraNet; both: Mei et al. 2021, PFNet).
    """

    def __init__(self, channels: list[int], width: int, num_experts: int, top_k: int | None) -> None:
        super().__init__()
        sizes = [width * min(2**level, 4) for level in range(len(channels))]
        self.lateral = nn.ModuleList(nn.Conv2d(c, size, 1) for c, size in zip(channels, sizes, strict=True))
        self.narrow = nn.ModuleList(nn.Conv2d(sizes[i + 1], size, 1) for i, size in enumerate(sizes[:-1]))
        self.refine = nn.ModuleList(nn.Conv2d(2 * size, size, 1) for size in sizes[:-1])
        self.mixtures = nn.ModuleList(Mixture(size, num_experts, top_k) for size in sizes)
        self.heads = nn.ModuleList(nn.Conv2d(size, 1, 3, padding=1) for size in sizes[1:])
        self.boundary, self.final = boundary_head(width), final_head(width)
        self.checkpointing = False
        self._begin()

    def _begin(self) -> None:
        """Initialise as a plain feature pyramid: the outputs of experts and refinement begin at 0."""
        plain, added = [*self.lateral, *self.narrow], [*self.refine, *(mixture.expand for mixture in self.mixtures)]
        for layer in (*plain, *(mixture.reduce for mixture in self.mixtures)):
            nn.init.xavier_uniform_(layer.weight)
        for layer in added:
            nn.init.zeros_(layer.weight)
        for layer in (*plain, *added):
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> Output:
        """Args: features: (B, channels[i], S/s, S/s) for the strides s = 4, 8, 16, 32, of images of side S."""
        x: Tensor | None = None
        logits: list[Tensor] = []
        balances = []
        for level in reversed(range(len(features))):
            here = self.lateral[level](features[level])
            if x is not None:
                here = here + resized(self.narrow[level](x), here)
                likely = resized(logits[-1], here).sigmoid().to(here.dtype)
                here = here + self.refine[level](torch.cat([likely * here, (1 - likely) * here], 1))
            x, uneven = maybe_checkpoint(self, self.mixtures[level], here)
            balances.append(uneven)
            if level:
                logits.append(self.heads[level - 1](x))
        assert x is not None
        edge = self.boundary(x)
        logits.append(self.final(torch.cat([x, edge], 1)))
        return Output(logits, edge, torch.stack(balances).mean(0))
