"""A segmenter: hierarchical backbone, decoder with a mixture of experts at each scale, boundary head, and its loss.

    model = Segmenter(backbone("compact", width=40), width=64, num_experts=4)
    output = model(images)     # uint8 (B, 3, S, S), S a multiple of 32
    output.logits[-1]          # (B, 1, S/4, S/4): the mask; the other logits are coarser, for deep supervision
    loss = loss_terms(output, masks, balance_weight=0.01).sum()

No image depends on the rest of the batch: group normalisation, routing and its balance are per image, and a timm
backbone's BatchNorm keeps its pretrained statistics. So the gradient does not depend on how the batch is split.
Every expert is computed for every pixel, with weight 0 where top-k leaves it out: a few small convolutions are cheaper
than gathering pixels, and every parameter has a gradient, as DistributedDataParallel needs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STRIDES = (4, 8, 16, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of RGB in 0 to 1, for backbones that name no others."""
FIXED_SIZE = tuple("swin maxvit maxxvit coatnet coat_ gcvit efficientformerv2 hiera_ vit_ deit beit eva".split())
"""Prefixes of the names of timm backbones that are made for one image size."""
DILATIONS = (1, 2, 3, 5)
"""Dilations of the experts' kernels, in turn, so that experts see neighbourhoods of different sizes."""


class Output(NamedTuple):
    logits: list[Tensor]
    """(B, 1, S/s, S/s) for the strides 32, 16, 8, 4; the last is the prediction."""
    boundary: Tensor
    """(B, 1, S/4, S/4): logits of the object's edge."""
    balance: Tensor
    """(B,): how unevenly each image uses the experts: 1 if evenly; at most num_experts, with top-k num_experts / k."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation of about eight channels a group, which sees one image at a time."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


class Block(nn.Module):
    """Block is ResNet's basic block (He et al. 2016) with group normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            group_norm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            group_norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.inner(x))


class Compact(nn.Module):
    """Compact is a backbone of four levels of residual blocks, trained from scratch: it needs no package or download.

    At width 32, with the decoder of preset balanced: 2.5 M parameters. The features have width, 2, 4 and 8 times width
    channels. (ConvNeXt's blocks over a stem of two 3 x 3 kernels learn textures more slowly: IoU 0.24 against 0.51
    after 200 steps of 8 synthetic scenes, with one block per level, width 16 and plain cross entropy.)
    """

    def __init__(self, width: int = 32, depths: tuple[int, ...] = (2, 2, 2, 1)) -> None:
        super().__init__()
        self.channels = [width * 2**level for level in range(len(depths))]
        self.levels = nn.ModuleList()
        for level, (channels, depth) in enumerate(zip(self.channels, depths, strict=True)):
            # a wide first kernel, as in ResNet, sees textures before the resolution is too low
            below = channels if level == 0 else self.channels[level - 1]
            wide = [nn.Conv2d(3, width, 7, 2, 3, bias=False), group_norm(width), nn.GELU()] if level == 0 else []
            down = [nn.Conv2d(below, channels, 3, 2, 1, bias=False), group_norm(channels), nn.GELU()]
            self.levels.append(nn.Sequential(*wide, *down, *(Block(channels) for _ in range(depth))))
        self.checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self.levels:
            x = maybe_checkpoint(self, level, x)
            features.append(x)
        return features


def state_dict(path: str) -> dict[str, Tensor]:
    """Return the tensors in a file of torch.save by name; averaged (EMA) weights if the file has any.

    Raises:
        ValueError: the file cannot be read, or reading would run code from the file.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
            if isinstance(found.get(key), dict):
                found = found[key]
                break
        return {name.removeprefix("module."): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:
        raise ValueError(
            f"backbone_weights: {path}: cannot be read as plain tensors: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Give a .safetensors file."
        ) from error


class WeightsError(ValueError):
    """Raised for a file of weights that does not fit its backbone."""


class Timm(nn.Module):
    """Timm wraps a backbone of timm, and returns its features of strides 4 to 32.

    BatchNorm keeps its pretrained running statistics in training too, because batch statistics would depend on how the
    batch is split. With random weights these are 0 and 1, so choose a backbone without BatchNorm to train from scratch.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm cannot make the backbone, its features lack one of the STRIDES, or the weights do not fit.
    """

    def __init__(self, name: str, weights: str | None = None, image_size: int | None = None) -> None:
        super().__init__()
        timm = _timm(name)
        options: dict[str, Any] = {"features_only": True, "pretrained": weights is not None}
        if image_size is not None and name.startswith(FIXED_SIZE):
            options["img_size"] = image_size
        if weights is not None and weights != "download":
            own = Path(weights).suffix in (".safetensors", ".npz")  # any other kind is a pickle
            options["pretrained_cfg_overlay"] = {"file": weights} if own else {"state_dict": state_dict(weights)}
        try:
            rng_state = torch.random.get_rng_state()
            self.body = timm.create_model(name, **options)
            if weights is not None:
                self._check_loaded(timm, name, options, weights, rng_state)
        except WeightsError:
            raise
        except Exception as error:
            advice = "Look the name up with timm.list_models(); without internet give a file as backbone_weights."
            if "img_size" in options and "size mismatch" in str(error):
                advice = f"The weights are for another image_size than {image_size}, and timm does not resize weights."
            raise ValueError(
                f"backbone {name!r}, weights {weights!r}: timm cannot make this backbone: {type(error).__name__}: "
                f"{error}. {advice}"
            ) from error
        said: dict[str, Any] = {}
        for attribute in ("default_cfg", "pretrained_cfg"):
            said |= getattr(self.body, attribute, {})
            getattr(self.body, attribute, {}).pop("state_dict", None)  # else the loaded weights stay in memory
        self.mean, self.std = said.get("mean", MEAN), said.get("std", STD)
        info = self.body.feature_info
        strides = list(info.reduction())
        if not set(STRIDES) <= set(strides):
            raise ValueError(f"backbone {name!r}: expected features of strides {STRIDES}, got {strides}")
        self.wanted = [strides.index(stride) for stride in STRIDES]
        self.channels = [info.channels()[index] for index in self.wanted]

    def _check_loaded(self, timm: Any, name: str, options: dict[str, Any], weights: str, rng_state: Tensor) -> None:
        """Raise a WeightsError if a tensor still has the random values that the same seed gives without weights.

        timm loads weights by name and silently skips tensors that do not fit. Tensors with constant initial values
        (biases, norms) prove nothing and are left out.

        Args:
            rng_state: the state of torch's generator before the model was made.
        """
        plain = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(rng_state)
            unloaded = timm.create_model(name, **plain | {"pretrained": False}).state_dict()
        random = {
            key: tensor
            for key, tensor in unloaded.items()
            if tensor.numel() > 1 and (tensor != tensor.flatten()[0]).any()
        }
        missing = [
            key for key, tensor in self.body.state_dict().items() if key in random and torch.equal(tensor, random[key])
        ]
        if missing:
            raise WeightsError(
                f"backbone_weights: {weights} has no values for {len(missing)} of the {len(random)} randomly "
                f"initialised tensors of {name}, for example {missing[0]}. Expected weights of exactly this backbone, "
                f"with timm's names; or give backbone_weights='random' to train without pretrained weights."
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.body(x)
        return [
            f if f.shape[1] == channels else f.permute(0, 3, 1, 2)  # some of timm's have the channels last
            for f, channels in zip((features[index] for index in self.wanted), self.channels, strict=True)
        ]

    def train(self, mode: bool = True) -> Timm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def gradient_checkpointing_enable(self) -> None:
        # some of timm's wrappers for features have no such method of their own, but the model in them does
        owner = self.body if hasattr(self.body, "set_grad_checkpointing") else self.body.model
        owner.set_grad_checkpointing(True)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise ImportError(
            f"backbone {name!r} needs the package `timm`: pip install timm, or use backbone='compact'"
        ) from None


def backbone(name: str, *, width: int, weights: str | None = None, image_size: int | None = None) -> nn.Module:
    """Make `compact`, or a backbone of timm by its name. Its attribute `channels` lists the channels of its features.

    Images (B, 3, S, S) give four features (B, channels[i], S/s, S/s), s = 4, 8, 16, 32. Raises as `Timm` does.

    Args:
        width: channels of the compact backbone's first level.
        weights: for timm backbones: None (random), "download", or a file.
        image_size: pixels per side, for timm backbones that are made for one size.
    """
    return Compact(width) if name == "compact" else Timm(name, weights, image_size)


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return a backbone's parts in the order of its forward pass; stages unfreeze them from the last on."""
    parts = [child for child in module.children() if any(True for _ in child.parameters())]
    while len(parts) == 1 and any(True for _ in parts[0].children()):
        parts = [child for child in parts[0].children() if any(True for _ in child.parameters())]
    return parts


class Experts(nn.Module):
    """Experts mixes the outputs of several experts at each pixel: out = x + sum of gate x expert(x).

    Args:
        top_k: how many experts a pixel uses; None: all of them, weighted softly.
    """

    def __init__(self, width: int, num_experts: int, top_k: int | None) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = group_norm(width)
        self.router = nn.Conv2d(width, num_experts, 1)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=d, dilation=d, groups=width), nn.Conv2d(width, width, 1), nn.GELU(),
                nn.Conv2d(width, width, 1),
            )
            for d in (DILATIONS[i % len(DILATIONS)] for i in range(num_experts))
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, width, H, W), and the `balance` of each image, (B,)."""
        y = self.norm(x)
        weights, uneven = gates(self.router(y), self.top_k)
        out = x
        for index, expert in enumerate(self.experts):
            out = out + weights[:, index : index + 1].to(x.dtype) * expert(y)
        return out, uneven


def gates(scores: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return the weight of each expert at each position, fp32, and the balance of each image, (B,).

    Args:
        scores: a router's (B, num_experts, H, W).
        top_k: how many experts a position uses (the others have weight 0); None: all.
    """
    shares = scores.float().softmax(1)
    weights = shares
    if top_k is not None:
        weights = shares * torch.zeros_like(shares).scatter(1, shares.topk(top_k, dim=1).indices, 1.0)
        # with a single expert the share itself is the gate (Fedus et al. 2021): a constant 1 would have no gradient
        if top_k > 1:
            weights = weights / weights.sum(1, keepdim=True)
    return weights, balance(shares, top_k)


def balance(shares: Tensor, top_k: int | None) -> Tensor:
    """Return the load-balancing term of Fedus et al. 2021 (Switch Transformer, eq. 4), of each image by itself.

    The term is num_experts x sum over experts of (share of top-k choices that fall on the expert) x (mean router share
    of the expert): 1 if all experts are used equally. With soft routing both factors are the mean router share. A term
    over the batch would depend on how the batch is split.

    Args:
        shares: (B, num_experts, H, W), sum 1 over the experts.

    Returns:
        (B,)
    """
    mean = shares.mean((2, 3))
    if top_k is None:
        load = mean
    else:
        load = torch.zeros_like(shares).scatter(1, shares.topk(top_k, dim=1).indices, 1.0 / top_k).mean((2, 3))
    return shares.shape[1] * (load * mean).sum(1)


class Segmenter(nn.Module):
    """Segmenter joins a backbone and a decoder; stages train these two with different rates.

    Args:
        decoder: a class called with (channels, width, num_experts, top_k); maps features to an Output. None: Decoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, *, width: int, num_experts: int, top_k: int | None = None,
        decoder: Callable[..., nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = body
        self.decoder = (decoder or Decoder)(body.channels, width, num_experts, top_k)  # type: ignore[arg-type]
        self.register_buffer("mean", 255 * torch.tensor(getattr(body, "mean", MEAN)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(getattr(body, "std", STD)).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Output:
        """Args: images: uint8 (B, 3, S, S), S a multiple of 32."""
        return self.decoder(self.backbone((images - self.mean) / self.std))

    def gradient_checkpointing_enable(self) -> None:
        self.decoder.checkpointing = True  # type: ignore[assignment]
        if isinstance(self.backbone, Timm):
            self.backbone.gradient_checkpointing_enable()
        else:
            self.backbone.checkpointing = True  # type: ignore[assignment]

    def unfreeze(self, share: float) -> None:
        """Train the decoder and the last `share` of the backbone's blocks, rounded up; freeze the other blocks."""
        parts = blocks(self.backbone)
        # with share 1, parameters outside the blocks are trained too
        self.backbone.requires_grad_(share >= 1)
        for part in parts[len(parts) - math.ceil(share * len(parts)) :]:
            part.requires_grad_(True)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Return x, resized bilinearly to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def boundary_head(width: int) -> nn.Sequential:
    """Make the layers from the finest features to the boundary's logits, (B, width, H, W) to (B, 1, H, W)."""
    return nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.GELU(), nn.Conv2d(width // 2, 1, 1))


def final_head(width: int) -> nn.Sequential:
    """Make the layers from finest features and boundary, (B, width + 1, H, W), to the mask's logits, (B, 1, H, W)."""
    return nn.Sequential(
        nn.Conv2d(width + 1, width, 3, padding=1), group_norm(width), nn.GELU(), nn.Conv2d(width, 1, 1)
    )


class Decoder(nn.Module):
    """Decoder is a feature pyramid (Lin et al. 2017) with `Experts` and a prediction at each level."""

    def __init__(self, channels: list[int], width: int, num_experts: int, top_k: int | None) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mixtures = nn.ModuleList(Experts(width, num_experts, top_k) for _ in channels)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for _ in channels[1:])
        self.boundary, self.final = boundary_head(width), final_head(width)
        self.checkpointing = False

    def forward(self, features: list[Tensor]) -> Output:
        x: Tensor | None = None
        logits, balances = [], []
        for level in reversed(range(len(features))):
            here = self.lateral[level](features[level])
            x = here if x is None else here + resized(x, here)
            x, uneven = maybe_checkpoint(self, self.mixtures[level], x)
            balances.append(uneven)
            if level:
                logits.append(self.heads[level - 1](x))
        assert x is not None
        edge = self.boundary(x)
        logits.append(self.final(torch.cat([x, edge], 1)))
        return Output(logits, edge, torch.stack(balances).mean(0))


def maybe_checkpoint(owner: Any, part: nn.Module, x: Tensor) -> Any:
    """Call a part of `owner`; with gradient checkpointing, the backward pass recomputes the part to save memory."""
    if owner.checkpointing and owner.training:
        return checkpoint(part, x, use_reentrant=False)
    return part(x)


# Losses: one number per image, so that the sum does not depend on how the batch is split
def pixel_weights(target: Tensor) -> Tensor:
    """Return 1 + 5 |mean of the neighbourhood - pixel| of a mask (B, 1, H, W): 1 to 6, largest near the edge.

    The neighbourhood is a square with F3Net's side of 31 pixels for images of 352, in proportion for other sizes: on
    small images a square of 31 pixels would reach the edge from nearly everywhere.
    """
    side = max(3, round(31 * min(target.shape[2:]) / 352) | 1)
    # columns, then rows: the same mean in a fifteenth of the time
    mean = F.avg_pool2d(target, (side, 1), stride=1, padding=(side // 2, 0))
    mean = F.avg_pool2d(mean, (1, side), stride=1, padding=(0, side // 2))
    return 1 + 5 * (mean - target).abs()


def structure_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return weighted binary cross entropy + 1 - weighted IoU (Wei, Wang and Huang 2020, F3Net) of each image.

    This is the formula of the paper. (F3Net's published code and most copies average the cross entropy before the
    weighting, because they use a deprecated argument of torch.) In fp32, since sums over an image overflow fp16.

    Args:
        logits: (B, 1, H, W). target: the same, 0 to 1. weight: `pixel_weights(target)`, if already computed.

    Returns:
        (B,)
    """
    logits, target = logits.float(), target.float()
    weight = pixel_weights(target) if weight is None else weight
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    over = (1, 2, 3)
    entropy = (weight * entropy).sum(over) / weight.sum(over)
    found = logits.sigmoid()
    common, either = (found * target * weight).sum(over), ((found + target) * weight).sum(over)
    return entropy + 1 - (common + 1) / (either - common + 1)


def boundary_of(target: Tensor) -> Tensor:
    """Return (B, 1, H, W): 1 for the pixels on both sides of the object's edge, else 0."""
    solid = (target > 0.5).float()
    return F.max_pool2d(solid, 3, 1, 1) + F.max_pool2d(-solid, 3, 1, 1)


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross entropy + 1 - soft Dice of the edge, (B,), in fp32; logits and target are (B, 1, H, W)."""
    logits, edge = logits.float(), boundary_of(target.float())
    over = (1, 2, 3)
    entropy = F.binary_cross_entropy_with_logits(logits, edge, reduction="none").mean(over)
    found = logits.sigmoid()
    return entropy + 1 - (2 * (found * edge).sum(over) + 1) / ((found + edge).sum(over) + 1)


def loss_terms(output: Output, target: Tensor, *, balance_weight: float) -> Tensor:
    """Return the whole loss of each image, (B,).

    The loss is the sum of the structure loss of the final prediction; 1/2, 1/4 and 1/8 of those of the coarser ones;
    half of the boundary loss; and balance_weight times the balance of the experts.

    Args:
        target: (B, 1, S, S), 0 to 1.
    """
    size, weight = target.shape[2:], pixel_weights(target.float())
    total = balance_weight * output.balance.float() + 0.5 * boundary_loss(resized_fp32(output.boundary, size), target)
    for index, logits in enumerate(reversed(output.logits)):
        total = total + 0.5**index * structure_loss(resized_fp32(logits, size), target, weight)
    return total


def resized_fp32(logits: Tensor, size: Any) -> Tensor:
    """Resize logits or images bilinearly to `size` (height, width), in fp32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


# Cost
def cost(model: Segmenter, size: int) -> tuple[int, float, float]:
    """Count parameters, FLOPs of one image's forward pass, and bytes kept for its backward pass (fp32).

    `model` must be on torch's meta device (`model.to("meta")`), where nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, int] = {}
    alive: list[Tensor] = []
    own = {id(p) for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and (tensor._base is None or id(tensor._base) not in own):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # else another tensor may get the same address
        return tensor

    image = torch.zeros(1, 3, size, size, device="meta")
    model.train()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss_terms(model(image), image[:, :1], balance_weight=1.0)
    return sum(p.numel() for p in model.parameters()), float(counter.get_total_flops()), float(sum(kept.values()))
