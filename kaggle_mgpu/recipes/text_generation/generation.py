"""Generate text from a trained model, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import GPT, KVCache
from .tokenizer import Tokenizer


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return the probabilities of the next token: softmax(logits / temperature), with unlikely tokens left out.

    top_k keeps the top_k likeliest tokens. top_p then keeps the smallest number of likeliest tokens with a total
    probability of at least top_p (Holtzman et al. 2020, arXiv 1904.09751). None: no such limit. With temperature 0 the
    likeliest token has probability 1.

    Args:
        logits: (n_vocab,).

    Returns:
        (n_vocab,) float32, of sum 1.

    Raises:
        ValueError: temperature, top_k or top_p outside its range.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            "probabilities: expected temperature >= 0, top_k >= 1 and 0 < top_p <= 1, "
            f"got {temperature}, {top_k} and {top_p}"
        )
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    order = logits.float().argsort(descending=True, stable=True)
    p = (logits.float()[order] / temperature).softmax(0)
    if top_k is not None:
        p[top_k:] = 0
        p /= p.sum()
    if top_p is not None:
        p[p.cumsum(0) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """Return the prompt and the model's continuation, up to the end of the document or max_new_tokens.

    Keys and values are cached. When the cache holds block_size tokens, the older half is dropped and the newer half is
    computed again from position 0. Of a long text the model then sees the latest block_size // 2 to block_size tokens,
    at positions used in training. Random numbers come from a CPU generator, so they are the same on any device.

    Args:
        temperature, top_k, top_p: see `probabilities`.

    Raises:
        TypeError: the model is no GPT.
        ValueError: temperature, top_k or top_p outside its range.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"generate: expected a model of class GPT, without a wrapper, got {type(model).__name__}")
    tokens = [tokenizer.separator, *tokenizer.encode(prompt)]
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    cache, start = KVCache(model), 0
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if len(tokens) - start > model.block_size:
                start, cache.length = len(tokens) - model.block_size // 2, 0
            new = torch.tensor([tokens[start + cache.length :]], device=device)
            p = probabilities(model(new, cache)[0, -1].cpu(), temperature, top_k, top_p)
            token = int(torch.multinomial(p, 1, generator=generator))
            if token == tokenizer.separator:
                break
            tokens.append(token)
    finally:
        model.train(training)
    return tokenizer.decode(tokens)
