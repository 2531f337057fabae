"""`Config` has the settings of fine-tuning: model, adapters, data and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from kaggle_mgpu.config import TrainConfig

from . import guide


@dataclass(frozen=True)
class Config(TrainConfig):
    """Config describes a fine-tuning run. A sample is a pack of conversations (without packing, one conversation)."""

    MAY_CHANGE = TrainConfig.MAY_CHANGE | set(
        "model data_path val_path tuning backend eval_generate_samples eval_generate_batch_size max_new_tokens "
        "generation_num_beams".split()
    )
    # even so, a run cannot resume with other data, another model or another backend: checkpoints store `Finetune.name`
    # and `Finetune.backend`

    model: str | None = None
    """A model's folder, the last parts of a folder's path among the Kaggle inputs, or the model's name on the hub (with
    the internet on). None: a tiny Llama with random weights, made on the spot."""
    tuning: Literal["auto", "full", "lora", "qlora"] = "auto"
    """full: every weight, in fp32; lora: adapters in fp32 on frozen weights; qlora: adapters on 4-bit weights. auto:
    lora; full for the tiny model, since adapters cannot make up for random weights."""
    backend: Literal["auto", "hf", "bnb", "unsloth"] = "auto"
    """hf: transformers and peft, for full and lora; bnb: bitsandbytes too, for qlora; unsloth: for all three, if
    installed. auto: bnb for qlora, else hf."""
    base_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Type of frozen weights. auto: the run's precision. Trained weights are fp32 in any case."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters. Above 0, the trained weights depend on the number of GPUs."""
    lora_targets: str = "auto"
    """Layers with adapters, such as "q_proj,v_proj". auto: all linear layers but the head and expert routers."""
    data_path: str | None = None
    """A .jsonl, .json, .csv or .parquet file of conversations, or a folder of such files. Each row has either a list of
    messages, in the field messages or conversations (ShareGPT), or a question and its answer, in two of the fields:
    instruction/output (Alpaca), instruction/response (Dolly), user/assistant, prompt/completion, prompt/response,
    question/answer or input/target. Optional fields: system, and tools (descriptions of the tools that messages call).
    None: the largest such file among the Kaggle inputs, else docstrings of Python's standard library."""
    val_path: str | None = None
    """Conversations to evaluate on. None: val_fraction of the data."""
    val_fraction: float = 0.1
    """Share of the conversations held out. Conversations with equal messages before the first answer stay together."""
    max_length: int = 1024
    """Tokens of a sample at most. Longer conversations are cut, and the description counts them."""
    packing: bool = True
    """Fill samples with several conversations, which do not see each other. False: one conversation per sample, padded,
    in micro-batches of similar lengths."""
    eval_generate_samples: int = 0
    """Number of held-out questions to answer at each evaluation, for ROUGE-L. 0: loss and perplexity only."""
    eval_generate_batch_size: int = 8
    """Questions answered at a time."""
    max_new_tokens: int = 64
    """Tokens of an answer at most."""
    generation_num_beams: int = 1
    """Beams of the beam search for an answer. 1: greedy, the likeliest token each time."""
    global_batch_size: int | str | None = 16
    """Packs per optimizer step over all GPUs."""
    epochs: int = 3
    """Passes over the training data. Ignored when max_steps is given."""
    lr: float = 2e-4
    """Peak learning rate: 2e-4 is usual for adapters, a tenth of it for full."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, applied to matrices only."""
    warmup_steps: int | float | str = 0.03
    """Steps of linear warm-up; below 1, a fraction of the run."""
    output_dir: str = "sft"
    """The run's folder: config, data, metrics, logs, checkpoints, weights, adapter, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {
            "lora_rank": 1, "max_length": 8, "eval_generate_samples": 0, "eval_generate_batch_size": 1,
            "max_new_tokens": 1, "generation_num_beams": 1, "lora_alpha": 0,
        }  # fmt: skip
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {getattr(self, name)!r}")
        if not 0 <= self.val_fraction <= 0.5 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                "Config: expected 0 <= val_fraction <= 0.5 and 0 <= lora_dropout < 1, "
                f"got {self.val_fraction} and {self.lora_dropout}"
            )
        fits = {"auto": ("full", "lora", "qlora"), "hf": ("full", "lora"), "bnb": ("qlora",)}
        if self.mode not in fits.get(self.backend, fits["auto"]):
            raise ValueError(
                f"Config: backend={self.backend!r} cannot do tuning={self.mode!r}: hf does full and lora, bnb (4-bit "
                f"weights) does qlora, unsloth all three. With backend='auto' the backend is chosen from tuning."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from names and values; translate names of the fine-tuning guide (guide.py) and print each.

        Raises:
            TypeError: a name that no field has; the message suggests the nearest.
            ValueError: a value that the field cannot take.
        """
        flat, said = guide.flattened(values)
        if said and os.environ.get("RANK", "0") == "0":
            print("settings of the fine-tuning guide, translated to fields of Config:", *said, sep="\n  ", flush=True)
        return super().from_dict(flat)

    @classmethod
    def variables(cls, given: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings in `base`, overridden by the guide's make variables in `given` (TRAIN_BATCH_SIZE=1).

        The names in `base` and in the result are fields of Config.

        Raises:
            TypeError: a variable that the guide does not have; the message suggests the nearest.
            ValueError: a value without a counterpart here.
        """
        flat, said = guide.flattened(guide.nested(given))
        if said and os.environ.get("RANK", "0") == "0":
            print("make variables, translated to fields of Config:", *said, sep="\n  ", flush=True)
        return {**base, **flat}

    @property
    def mode(self) -> str:
        """Return the way of tuning, with "auto" resolved."""
        return self.tuning if self.tuning != "auto" else "lora" if self.model is not None else "full"

    @property
    def library(self) -> str:
        """Return the backend, with "auto" resolved."""
        return self.backend if self.backend != "auto" else "bnb" if self.mode == "qlora" else "hf"
