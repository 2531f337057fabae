"""From a config and a task to what a run is made of: how its batches are split, the strategy's options, the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import data
from .config import TrainConfig
from .strategy import Strategy
from .task import Task


def batch_plan(config: TrainConfig, dataset_size: int, kind: type[Strategy], num_replicas: int) -> data.BatchPlan:
    """How each global batch is split over so many replicas.

    Raises:
        ValueError: settings that do not fit each other, the data or the strategy.
    """
    if config.micro_batch_size == "auto" and config.gradient_accumulation_steps:
        raise ValueError(
            f"micro_batch_size='auto' with gradient_accumulation_steps={config.gradient_accumulation_steps}: the "
            f"one follows from the other. Give global_batch_size instead."
        )
    if config.micro_batch_size == "auto" and not kind.alone:
        raise ValueError(
            f"micro_batch_size='auto' tries steps on each GPU by itself, which strategy {kind.name!r} cannot: give "
            f"a number. One that is too large is halved, and the run starts again from its newest checkpoint."
        )
    return data.BatchPlan.make(
        dataset_size=dataset_size,
        num_replicas=num_replicas,
        global_batch_size=config.global_batch_size,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )


def strategy_options(name: str, config: TrainConfig, task: Task) -> dict[str, Any]:
    """What only one strategy asks for."""
    if name == "ddp":
        return {"gradient_compression": config.gradient_compression, "bucket_mb": config.bucket_mb}
    if name == "fsdp":
        return {"units": task.fsdp_units, "cpu_offload": config.cpu_offload, "meta_init": config.meta_init}
    if name == "deepspeed":
        return {"file": config.deepspeed_config, "max_norm": config.max_norm, "averaged": config.ema_decay is not None}
    return {}


def model(task: Task, config: TrainConfig) -> nn.Module:
    """The task's model, ready for the strategy: in training mode, with gradient checkpointing and compiling as asked.

    Raises:
        TypeError: Task.model does not return a module.
        ValueError: the model cannot do what is asked.
    """
    made = task.model()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{type(task).__name__}.model must return an nn.Module, got {type(made).__name__}")
    if config.gradient_checkpointing:
        enable = getattr(made, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                f"gradient_checkpointing=True, but {type(made).__name__} has no method gradient_checkpointing_enable. "
                f"Give it one, or leave the setting off."
            )
        enable()
    made.train()
    if config.compile:
        made.compile()
    return made
