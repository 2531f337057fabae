"""The task: next-token prediction on the blocks of a corpus."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.data import counted
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.training import Muon, Task

from .corpus import IGNORED, Corpus, TokenBlocks, prepare
from .generation import generate
from .model import GPT
from .settings import Config


class TextGeneration(Task):
    """Next-token prediction. A batch: (inputs, targets), both (blocks, block_size) int64; -100 is ignored."""

    unit = "tokens"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._corpus: Corpus | None = None
        self._trained: GPT | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_trained": None}  # the trained model is not pickled for workers

    @property
    def corpus(self) -> Corpus:
        """The prepared text. All ranks must make the first access together: rank 0 prepares, the others wait."""
        if self._corpus is None:
            self._corpus = distributed.from_main(lambda: prepare(self.config))
            # the name is kept in checkpoints, because with another text or tokenizer the ids have another meaning
            self.name = f"TextGeneration {self._corpus.digest}"
        return self._corpus

    def describe(self) -> str:
        """Describe the source and the reason for it, documents, bytes, tokenizer, tokens and split in three lines."""
        c = self.corpus
        ratio = c.train_bytes / (c.train_tokens - 1)
        return (
            f"text: {c.source} ({c.reason}): {counted(c.documents, 'document')}, "
            f"{c.train_bytes + c.val_bytes:,} bytes\n"
            f"tokenizer: {c.kind}, {c.n_vocab:,} ids, {ratio:.2f} bytes per token\n"
            f"train {c.train_tokens - 1:,} tokens, validation {c.val_tokens - 1:,} tokens "
            f"({c.val_bytes:,} bytes held out), in {c.folder}"
        )

    def model(self) -> nn.Module:
        c = self.config
        self._trained = GPT(self.corpus.n_vocab, c.n_layer, c.n_head, c.n_embd, c.block_size, c.dropout)
        return self._trained

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """Return AdamW, or Muon with 3 times the learning rate for the embedding."""
        if self.config.optimizer == "adamw":
            return super().optimizer(model, config)
        named = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("embedding.")}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in named.values() if p.ndim == 2], "muon": True},
            {"params": [p for name, p in model.named_parameters() if name not in named], "lr_scale": 3.0},
            {"params": [p for p in named.values() if p.ndim != 2], "weight_decay": 0.0},
        ]
        return Muon(groups, lr=config.lr, weight_decay=config.weight_decay)

    def train_data(self) -> TokenBlocks:
        return self.corpus.blocks("train", self.config.block_size, self.config.random_shift)

    def val_data(self) -> TokenBlocks | None:
        return self.corpus.blocks("val", self.config.block_size) if self.config.val_fraction else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy in nats, summed over the targets in fp32: an fp16 sum would overflow at 65504."""
        inputs, targets = batch
        logits = model(inputs).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Return the number of targets, ignored targets left out."""
        return int((batch[1] != IGNORED).sum())

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return loss (nats per token), perplexity = exp(loss), and bits_per_byte, comparable across tokenizers."""
        loss = float(metrics["loss"])
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": self.corpus.bits_per_byte(loss)}

    def on_record(self, record: dict[str, Any]) -> None:
        """Add a short text, written with the current weights, to the record of an evaluation."""
        c = self.config
        whole = c.strategy not in ("fsdp", "deepspeed")  # there rank 0 alone does not have the whole model
        if record["kind"] == "eval" and c.sample_tokens and self._trained and whole:
            record["sample"] = self.sample(self._trained, c.sample_prompt, max_new_tokens=c.sample_tokens)

    def sample(self, model: nn.Module, prompt: str = "", **options: Any) -> str:
        """Call `generate` with this task's tokenizer."""
        return generate(model, self.corpus.tokenizer(), prompt, **options)


def task(config: Config) -> Task:
    """Return the task of a config."""
    return TextGeneration(config)
