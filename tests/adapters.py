"""A tiny Llama with LoRA adapters, on fp32 or nf4 weights, as peft and bitsandbytes make them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu import Task, TrainConfig
from tasks import Sequences


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def in_four_bits(model: nn.Module) -> nn.Module:
    """Every linear layer but the head with its weights in nf4."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=new)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to("cpu"))
    return model


class Adapters(Task):
    """Next tokens with SGD, so that a gradient of the wrong scale shows."""

    unit = "tokens"

    def __init__(self, four_bits: bool) -> None:
        self.four_bits = four_bits

    def model(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = tiny_llama()
        model = in_four_bits(model) if self.four_bits else model
        model.requires_grad_(False)
        adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start: half of the gradients would be
                nn.init.normal_(parameter, std=0.1)
        adapted.saved_names = frozenset(name for name, p in adapted.named_parameters() if p.requires_grad)
        return adapted

    def train_data(self) -> Dataset[Any]:
        return Sequences(60)

    def val_data(self) -> Dataset[Any]:
        return Sequences(13)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        tokens, length = batch["tokens"], batch["length"]
        logits = model(input_ids=tokens[:, :-1]).logits
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return (losses.reshape(len(tokens), -1) * (torch.arange(24) < length[:, None])).sum()

    def count(self, batch: Any) -> int:
        return int(batch["length"].sum())

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr)
