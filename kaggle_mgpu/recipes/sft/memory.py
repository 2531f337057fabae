"""Estimate the memory of fine-tuning from a model's configuration, and measure its peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import models


@dataclass(frozen=True)
class Estimate:
    """The estimated bytes on one GPU; `parameters` and `trainable` are numbers of parameters."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def sentence(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        return f"{size(self.total)} = " + " + ".join(f"{name} {size(getattr(self, name))}" for name in parts)


def size(nbytes: float) -> str:
    """Write bytes as GiB or MiB.

    >>> size(2_500_000_000), size(3_000_000)
    ('2.33 GiB', '2.9 MiB')
    """
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def estimate(
    path: str, config: Any, *, base_dtype: torch.dtype, precision: str, tokens: int, learnt: int
) -> tuple[Estimate, list[str]]:
    """Estimate the memory of training, and name the layers for adapters, from a model on the meta device.

    Bytes per trained parameter: weights 4, gradients 4, AdamW 8. Under full in half precision, linear layers take 2
    more for autocast's copy. Bytes per frozen parameter: the size of base_dtype; under qlora 0.5 in linear layers but
    the head, plus 0.016 for scales (1 per 64 weights and 4 per 16384: Dettmers et al. 2023, arXiv 2305.14314).

    Activations: for each token a layer keeps c h + 2 kv + 5 i numbers for backward, and 2 r for each adapter. h is the
    hidden size, kv the width of the keys, i the intermediate size, r the rank. c is 9 for full and 5 for adapters in
    fp32; in half precision, where norms keep fp32, c is 17 and 9. These numbers were counted for Llamas with torch's
    saved_tensors_hooks. With gradient checkpointing a layer keeps h numbers for each token, and only the layer that is
    being recomputed keeps all. The logits of learnt tokens are kept once in the run's precision and twice in fp32.
    Measured on Llamas of two sizes, activations took 0.8 to 1.1 of the estimate.

    Args:
        path: the model's folder or its name on the hub.
        config: the run's `Config`.
        tokens: number of tokens in a micro-batch.
        learnt: number of these tokens that belong to answers.

    Raises:
        ValueError: the model is no causal language model.
    """
    transformers = models.require("transformers")
    about = models.from_pretrained(transformers.AutoConfig, path)
    try:
        with torch.device("meta"), models.quiet():
            model = transformers.AutoModelForCausalLM.from_config(about)
    except ValueError as error:  # not a causal language model
        raise ValueError(f"model: {path} is not a causal language model: {models.short(str(error))}") from None
    names = models.targets(model, config.lora_targets) if config.mode != "full" else []
    head = models.head_of(model)
    conv = transformers.pytorch_utils.Conv1D
    linear = adapters = places = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | conv) and module is not head:
            linear += module.weight.numel()
            if name in names or name.rpartition(".")[2] in names:
                adapters += config.lora_rank * sum(module.weight.shape)
                places += 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    half = 2 if precision in ("fp16", "bf16") else 4
    rest = base_dtype.itemsize
    trainable = parameters if config.mode == "full" else adapters
    weights = {
        "full": parameters * 4 + (linear * 2 if half == 2 else 0),
        "lora": parameters * rest + adapters * 4,
        "qlora": linear * (0.5 + 1 / 64 + 4 / 16384) + (parameters - linear) * rest + adapters * 4,
    }[config.mode]
    text = about.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = getattr(text, "num_attention_heads", 1)
    kv = hidden * (getattr(text, "num_key_value_heads", None) or heads) // heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    wide = {(True, 4): 9, (True, 2): 17, (False, 4): 5, (False, 2): 9}[config.mode == "full", half]
    layer = wide * hidden + 2 * kv + 5 * inner + 2 * config.lora_rank * places // max(layers, 1)
    kept = layers * hidden + layer if config.gradient_checkpointing else layers * layer
    logits = learnt * text.vocab_size * (half + 4 + 4)
    found = Estimate(
        parameters, trainable, int(weights), 4 * trainable, 8 * trainable, tokens * kept * half + int(logits)
    )
    return found, names


def peak_memory() -> int:
    """Return this process's peak memory in bytes: of the GPU if the process uses CUDA, else of main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
