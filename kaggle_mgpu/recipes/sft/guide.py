"""Translate the settings of the fine-tuning guide into fields of `Config`, and report each translation.

    settings, said = flattened({"tuning": {"mode": "qlora"}, "train": {"batch_size": 1, "grad_accum": 32}})
    settings, said = flattened(nested({"TRAIN_BATCH_SIZE": "1", "NUM_GPUS": "1"}))

"The guide" is a scheme of names from outside this package. Its YAML file has the sections model, tuning (with lora
below it) and train. Variables of its Makefile are named SECTION_NAME: TRAIN_BATCH_SIZE is batch_size in train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaggle_mgpu.names import check_names

NAMES = {
    "model.name": "model",
    "model.max_seq_len": "max_length",
    "tuning.mode": "tuning",
    "tuning.backend": "backend",
    "tuning.lora.r": "lora_rank",
    "tuning.lora.alpha": "lora_alpha",
    "tuning.lora.dropout": "lora_dropout",
    "tuning.lora.target_modules": "lora_targets",
    "train.batch_size": "micro_batch_size",
    "train.grad_accum": "gradient_accumulation_steps",
    "train.learning_rate": "lr",
    "train.epochs": "epochs",
    "train.num_epochs": "epochs",
    "train.max_steps": "max_steps",
    "train.warmup_ratio": "warmup_steps",
    "train.warmup_steps": "warmup_steps",
    "train.weight_decay": "weight_decay",
    "train.max_grad_norm": "max_norm",
    "train.seed": "seed",
    "train.output_dir": "output_dir",
    "train.logging_steps": "log_every",
    "train.save_steps": "save_every",
    "train.gradient_checkpointing": "gradient_checkpointing",
    "train.ddp_find_unused_parameters": "find_unused_parameters",
    "train.ddp_bucket_cap_mb": "bucket_mb",
    "train.dataloader_num_workers": "data_workers",
    "train.generation_max_new_tokens": "max_new_tokens",
    "train.generation_num_beams": "generation_num_beams",
    "train.eval_steps": "eval_every",
    "num_gpus": "nproc",
}
"""The guide's names, section first -> fields of `Config`."""
SWITCHES: dict[str, dict[Any, dict[str, Any]]] = {
    "train.bf16": {True: {"precision": "auto"}, False: {}},
    "train.fp16": {True: {"precision": "fp16"}, False: {}},
    "train.predict_with_generate": {True: {"eval_generate_samples": 16}, False: {"eval_generate_samples": 0}},
    "train.eval_strategy": {
        "steps": {},
        "epoch": {"eval_every": "epoch"},
        "no": {"eval_every": "end"},
        False: {"eval_every": "end"},  # YAML reads an unquoted no as False
    },
}
"""Guide's name -> value -> settings. bf16 becomes precision="auto", which is bf16 only where the GPU supports bf16."""
WITHOUT_EFFECT = {
    "train.ddp_broadcast_buffers": "buffers are the same on every GPU",
    "train.dataloader_pin_memory": "batches for a GPU are pinned",
    "train.eval_do_concat_batches": "evaluation keeps sums, no batches",
    "train.eval_accumulation_steps": "evaluation keeps sums, no batches",
}
SECTIONS = ("model", "tuning", "train")


def nested(variables: Mapping[str, str]) -> dict[str, Any]:
    """Make the guide's nested settings from its make variables; values are parsed as numbers, else as YAML.

    Raises:
        TypeError: a variable that the guide does not have; the message suggests the nearest.
    """
    import yaml

    known = {name.replace(".", "_").upper(): name for name in [*NAMES, *SWITCHES, *WITHOUT_EFFECT]}
    check_names(variables, list(known), where="the fine-tuning guide")
    found: dict[str, Any] = {}
    for variable, text in variables.items():
        try:
            value = float(text)
            value = int(value) if value.is_integer() and "." not in text and "e" not in text.lower() else value
        except ValueError:
            value = yaml.safe_load(text)
        *sections, last = known[variable].split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return found


def flattened(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate the guide's settings; return settings by fields of `Config`, and a sentence for each translation.

    Other settings are returned as they are.

    Raises:
        TypeError: a name in one of the guide's sections that the guide does not have.
        ValueError: a value, or a combination of values, without a counterpart here.
    """
    flat: dict[str, Any] = {}
    of_guide: dict[str, Any] = {}
    for name, value in settings.items():
        if name in SECTIONS and isinstance(value, Mapping):
            of_guide |= _named(value, name)
        elif name in NAMES:
            of_guide[name] = value
        else:
            flat[name] = value
    check_names(of_guide, [*NAMES, *SWITCHES, *WITHOUT_EFFECT], where="the fine-tuning guide")
    said = []
    for name, value in of_guide.items():
        if name in WITHOUT_EFFECT:
            said.append(f"{name}: no effect here, {WITHOUT_EFFECT[name]}")
            continue
        if name in SWITCHES:
            if value not in SWITCHES[name]:
                allowed = ", ".join(map(str, SWITCHES[name]))
                raise ValueError(f"{name}: expected {allowed}, got {value!r}")
            means = SWITCHES[name][value]
        elif value == "auto" and name == "train.grad_accum":
            means = {}  # computed from global_batch_size
        elif name == "train.eval_steps" and of_guide.get("train.eval_strategy", "steps") != "steps":
            means = {}
        else:
            means = {NAMES[name]: ",".join(value) if isinstance(value, list) else value}
        shown = ", ".join(f"{key}={one!r}" for key, one in means.items()) or "nothing to set"
        said.append(f"{name}={value!r}: {shown}")
        flat |= means
    sizes = (flat.get("micro_batch_size"), flat.get("gradient_accumulation_steps"))
    if of_guide and isinstance(sizes[0], int) and isinstance(sizes[1], int) and flat.get("global_batch_size") is None:
        flat["global_batch_size"] = None
        said.append(f"global_batch_size: computed as {sizes[0]} per GPU x {sizes[1]} x the number of GPUs")
    elif of_guide and sizes[0] == "auto" and sizes[1] is not None:
        raise ValueError(
            "train.batch_size='auto' with a number for train.grad_accum: give 'auto' for train.grad_accum too, or a "
            "number for train.batch_size"
        )
    return flat, said


def _named(section: Mapping[str, Any], above: str) -> dict[str, Any]:
    """Return a section's settings by their full names, such as tuning.lora.r."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        full = f"{above}.{name}"
        found |= _named(value, full) if isinstance(value, Mapping) else {full: value}
    return found
