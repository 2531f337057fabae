"""Text generation: the recipe beside nanoGPT's form, on the King James Bible.

The form is written from its description: learned positions, LayerNorm, GELU, no biases, a tied head, AdamW with betas
0.9 and 0.95, a cosine that ends at a tenth of the rate. Both get the same token file and the same blocks in the same
order. The form's MLP is 6 times as wide as the model, not 4, which gives it as many parameters as the kit has.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaggle_mgpu import train
from kaggle_mgpu.recipes.text_generation import Config, TextGeneration

from . import common

SIZES: dict[bool, dict[str, Any]] = {
    True: {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 128, "global_batch_size": 8},
    False: {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "global_batch_size": 16},
}
STEPS = {True: 120, False: 400}


def config(run: common.Run, lr: float, **settings: Any) -> Config:
    """Return the recipe's settings; what is not named here or in SIZES is its default."""
    return Config(
        data_path=str(run.data), output_dir=str(run.output), max_steps=run.steps, lr=lr, seed=run.seed,
        eval_every="end", sample_tokens=0, strategy="single", nproc=1, **SIZES[run.small], **settings,
    )  # fmt: skip


def kit(run: common.Run, lr: float, **settings: Any) -> dict[str, float]:
    """Train the recipe."""
    task = TextGeneration(config(run, lr, **settings))
    found = train(task.config, task).metrics
    return {"nats a token": found["loss"], "bits a byte": found["bits_per_byte"], "M": _millions(task.model())}


class Block(nn.Module):
    """Causal self-attention and an MLP with GELU; LayerNorm before each."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, ratio * width, bias=False), nn.Linear(ratio * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Form(nn.Module):
    """A GPT of GPT-2's form. Tokens (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, layers: int, heads: int, width: int, context: int, ratio: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def form(run: common.Run, lr: float) -> dict[str, float]:
    """Train nanoGPT's form with a loop written by hand."""
    c = config(run, lr)
    corpus = TextGeneration(c).corpus
    torch.manual_seed(run.seed)
    model = Form(corpus.n_vocab, c.n_layer, c.n_head, c.n_embd, c.block_size, ratio=6)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def loss(batch: tuple[Tensor, Tensor], reduction: str = "mean") -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction=reduction)

    size = SIZES[run.small]["global_batch_size"]
    blocks = common.batches(corpus.blocks("train", c.block_size), size, run.seed)
    common.fit(model, blocks, loss, optimizer, steps=run.steps, lr=lr, min_lr=lr / 10, warmup=0.03)
    held = corpus.blocks("val", c.block_size)
    with torch.no_grad():
        total = sum(float(loss(held.batch(i), "sum")) for i in torch.arange(len(held)).split(64))
    nats = total / (corpus.val_tokens - 1)
    return {"nats a token": nats, "bits a byte": corpus.bits_per_byte(nats), "M": _millions(model)}


def _millions(model: nn.Module) -> float:
    return common.parameters(model) / 1e6


CONTENDERS: dict[str, common.Contender] = {
    "kit": partial(kit, lr=1e-3),
    "nanoGPT's form": partial(form, lr=1e-3),
    "kit, lr 3e-3": partial(kit, lr=3e-3),
    "nanoGPT's form, lr 3e-3": partial(form, lr=3e-3),
    "kit, optimizer muon, lr 3e-3": partial(kit, lr=3e-3, optimizer="muon"),
}
