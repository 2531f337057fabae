"""The model: a GPT with rotary positions, and its cache of keys and values for generation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class KVCache:
    """Keys and values of the first `length` tokens, with room for block_size tokens, allocated once.

    `data` is (n_layer, 2, batch_size, n_head, block_size, n_embd // n_head): keys, then values.
    """

    def __init__(self, model: GPT, batch_size: int = 1) -> None:
        weight, head = model.embedding.weight, model.n_embd // model.n_head
        shape = (model.n_layer, 2, batch_size, model.n_head, model.block_size, head)
        self.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0


class Block(nn.Module):
    """Causal self-attention with rotary positions, then a SwiGLU MLP; RMSNorm before each."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.norm1, self.norm2 = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.up = nn.Linear(n_embd, 8 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, int] | None = None) -> Tensor:
        # x (B, T, C); q, k, v (B, heads, T, head size); past: this layer's cache (2, B, heads, block_size, head size)
        # and the number of cached tokens
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mask = None
        if past is not None:
            cache, length = past
            cache[0, :, :, length : length + t] = k
            cache[1, :, :, length : length + t] = v
            k, v = cache[:, :, :, : length + t].to(q.dtype)
            if length and t > 1:
                mask = torch.ones(t, length + t, dtype=torch.bool, device=x.device).tril(length)
        causal = mask is None and k.shape[2] == t
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(b, t, c)), dropout)
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), dropout)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864): rotate each pair of x[..., i] and x[..., i + D/2].

    x: (..., T, D); cos, sin: (T, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """A decoder-only transformer: no biases, and the embedding's matrix is also the head.

    The head has no parameter of its own, so each tensor is in state_dict() once, as safetensors needs.
    """

    def __init__(
        self, n_vocab: int, n_layer: int, n_head: int, n_embd: int, block_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_layer, self.n_head, self.n_embd, self.block_size = n_layer, n_head, n_embd, block_size
        self.checkpointing = False
        self.embedding = nn.Embedding(n_vocab, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        head = n_embd // n_head
        angles = torch.outer(torch.arange(block_size), 10000.0 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # as in GPT-2: the more layers add to the residual stream, the smaller their initial weights
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits (B, T, n_vocab) for tokens (B, T); with a cache the tokens follow the cached tokens.

        Raises:
            ValueError: more than block_size tokens, cached tokens included.
        """
        start = cache.length if cache else 0
        stop = start + tokens.shape[1]
        if stop > self.block_size:
            raise ValueError(f"GPT: expected at most block_size = {self.block_size} tokens, got {stop}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]  # type: ignore[index]
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, (cache.data[i], start) if cache else None)
        if cache:
            cache.length = stop
        return F.linear(self.norm(x), self.embedding.weight)
