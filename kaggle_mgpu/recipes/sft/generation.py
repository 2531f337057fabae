"""Answer prompts in batches, padded on the left, with cached keys and values, and keep the answers on disk.

texts = answer(model, tokenizer, prompts, max_new_tokens=64)   # the likeliest token each time
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kaggle_mgpu.checkpoints import files

from . import models


def stops(tokenizer: Any, model: nn.Module, examples: Sequence[Sequence[int]]) -> list[int]:
    """Return the ids of end tokens: the tokenizer's, the model's, and special tokens at the end of `examples`."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    special = set(tokenizer.all_special_ids)
    found |= {ids[-1] for ids in examples if ids and ids[-1] in special}
    return sorted(token for token in found if token is not None)


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Sequence[int],
    num_beams: int = 1,
) -> list[str]:  # fmt: skip
    """Continue each prompt (token ids), greedily or by beam search with `num_beams`, and return the answers as text.

    An answer ends at a token of `stop`, after max_new_tokens, or at the model's last position.

    Raises:
        ValueError: the longest prompt leaves no position for an answer.
    """
    transformers = models.require("transformers")
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # pad on the left, so that all prompts end at the same place
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    limit = models.max_positions(model.config)
    if limit is not None and limit <= width:
        raise ValueError(f"a prompt of {width} tokens leaves no room for an answer: the model has {limit} positions")
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - width),
        do_sample=False,
        num_beams=num_beams,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(stop) or None,
    )
    training = model.training
    model.eval()
    try:
        written = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings,
            synced_gpus=False,  # each rank has the whole model, also under fsdp
        )  # fmt: skip
    finally:
        model.train(training)
    texts = []
    for row in written[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        texts.append(str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip())
    return texts


def stored_answers(
    file: Path, weights: str, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]],
    *, max_new_tokens: int, stop: Sequence[int], num_beams: int = 1,
) -> list[str]:  # fmt: skip
    """Return the answers in a file, else call `answer` and write them there.

    The file is used only if weights, prompts and settings are the same as when it was written. This saves time after a
    kill during an evaluation, or when a notebook is run again.

    Args:
        weights: a digest of the model's weights.
    """
    asked = json.dumps([weights, [list(prompt) for prompt in prompts], max_new_tokens, list(stop), num_beams])
    key = hashlib.sha256(asked.encode()).hexdigest()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["key"] == key:
            return list(known["texts"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    texts = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop, num_beams=num_beams)
    files.write_text(file, json.dumps({"key": key, "texts": texts}, ensure_ascii=False))
    return texts
