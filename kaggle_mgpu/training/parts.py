"""The parts of a training run: a frozen dataclass, made from a config and a task in the same way on every rank.

A training step changes the tensors inside. A change of the micro-batch size makes a new Parts object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from .. import data
from ..checkpoints import resume
from ..config import TrainConfig, in_epochs
from ..data import randomness
from ..fields import parse_duration
from ..machine import devices, session
from ..parallel import Strategy, choose_strategy, distributed, sync_batch_norms
from . import fingerprint, optim
from .task import Task


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The parts for a single training step."""

    strategy: Strategy
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    """Gives the learning rate of the next step from the number of steps taken."""
    max_norm: float | None = None
    """The gradient is clipped to this norm. None: no clipping."""
    ema: optim.EMA | None = None
    """None: the run does not average weights."""
    rng_key: int = 0
    """Seeds the random generators before each step, together with the step and the rank."""
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Parts(StepParts):
    """All parts of a run on this rank."""

    config: TrainConfig
    task: Task
    output_dir: Path
    world_size: int
    device: torch.device
    gpus: list[devices.GPU]
    plan: data.BatchPlan
    fetch: data.Fetch
    workers: int
    """Loader processes of each rank for the training data."""
    val_fetch: data.Fetch | None
    val_samples: int
    deadline: session.Deadline | None
    """None without a time limit."""
    stamp: dict[str, Any]
    """Identifies the run in its checkpoints, together with the settings: task, backend, sizes of data and batch."""
    fingerprint: dict[str, str]
    """Identifies the task and its data, on rank 0; {} on other ranks."""
    header: tuple[str, str]
    """Two lines to print: about strategy and precision, then about learning rate and model."""
    micro_batch_reason: str = ""
    """Where the micro-batch size comes from; "" if from the config."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes files."""
        return self.rank == 0

    @property
    def unit(self) -> str:
        """The printed word for a replica's device: "GPU"; on the CPU, "replica" under dp, else "process"."""
        return "GPU" if self.gpus else "replica" if self.strategy.name == "dp" else "process"

    def batches(self, samples_seen: int) -> Iterator[data.Step]:
        """Return this rank's share of each global batch, on the device, from the position `samples_seen` on."""
        sampler = data.Sampler(self.plan, seed=self.config.seed, samples_seen=samples_seen)
        count = None if type(self.task).count is Task.count else self.task.count
        pinned = self.device.type == "cuda"
        steps = data.Batches(
            sampler, self.fetch, count=count, workers=self.workers, pin_memory=pinned,
            prefetch=self.config.prefetch_factor, carried=count is not None and self.strategy.carries_count,
        )  # fmt: skip
        return data.on_device(steps, self.strategy.input_device)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the averaged weights, if the run averages weights."""
        return nullcontext() if self.ema is None else self.ema.swap(self.strategy.model)


def build_parts(config: TrainConfig, task: Task) -> Parts:
    """Build the parts of a run. Every rank must call this.

    Raises:
        TypeError: Task.model returns no module, or a dataset has no length.
        ValueError: settings do not fit each other, the data or the machine.
    """
    distributed.init()
    allowed = parse_duration(config.time_limit) if config.time_limit else math.inf
    seconds = min(allowed, session.time_left())
    deadline = None if seconds == math.inf else session.Deadline(seconds)
    device, world_size = distributed.device(), distributed.world_size()
    gpus = devices.gpus() if device.type == "cuda" else []
    precision, precision_reason = devices.precision(config.precision, gpus)
    replicas = (len(gpus) or 1) if config.nproc == "auto" else int(config.nproc)
    kind, reason = choose_strategy(config.strategy, num_gpus=len(gpus), num_replicas=replicas, world_size=world_size)
    replicas = replicas if kind.name == "dp" else world_size
    if config.compile and kind.name == "dp":
        raise ValueError(
            "compile=True with strategy='dp': a compiled model stays on its first GPU, so the replicas would compute "
            "with the first GPU's weights. Use strategy='ddp', which is faster too, or compile=False."
        )

    randomness.seed_everything(config.seed)  # so that a random split is the same in every process and session
    train_set, val_set = task.train_data(), task.val_data()
    plan = _batch_plan(config, task, data.size_of(train_set, "train_data()"), replicas)
    if task.whole_batch_loss and (plan.gradient_accumulation_steps > 1 or (kind.name == "dp" and replicas > 1)):
        raise ValueError(
            f"{type(task).__name__}.whole_batch_loss is True, but strategy {kind.name!r} computes a global batch of "
            f"{plan.global_batch_size} in parts of {plan.micro_batch_size}, which are computed separately. Use "
            f"strategy='ddp' and no gradient_accumulation_steps; a smaller global_batch_size where memory is short."
        )
    val_samples = 0 if val_set is None else data.size_of(val_set, "val_data()")
    if val_set is not None and val_samples == 0:
        raise ValueError(
            "the validation data is empty: val_data() has length 0. Return None to train without validation."
        )
    collate = default_collate if type(task).collate is Task.collate else task.collate
    fetch = data.Fetch(train_set, collate, seed=config.seed)
    workers = data.workers_for(fetch, config.data_workers, devices.cpu_count(), distributed.local_world_size())
    val_fetch = None if val_set is None else data.Fetch(val_set, collate, seed=config.seed, purpose="evaluation")
    marks = fingerprint.of(task, fetch, val_fetch) if distributed.is_main() else {}

    randomness.seed_everything(config.seed)  # so that every rank makes the same weights
    strategy = kind(
        task.loss, task.metrics, precision=precision, device=device, num_replicas=replicas,
        find_unused_parameters=config.find_unused_parameters, **_strategy_options(kind.name, config, task),
    )  # fmt: skip
    lr = plan.scaled_lr(config.lr, config.lr_scaling, config.base_batch_size)
    warmup_steps = optim.resolve_warmup(_steps(config.warmup_steps, plan), plan.max_steps)
    lr_at = _schedule(config, task, plan, lr, warmup_steps)
    lr_at(0)  # reports an impossible schedule now
    with strategy.building():
        model = _model(task, config)
    number = count_parameters(model)
    strategy.prepare(model)
    stamp = _stamp(task, plan.dataset_size) | {"global_batch_size": plan.global_batch_size}
    scaled = f" ({config.lr:g} scaled {config.lr_scaling})" if lr != config.lr else ""
    header = (
        f"strategy {strategy.name}: {reason}; precision {precision}: {precision_reason}",
        f"learning rate {lr:g}{scaled}, {config.schedule if isinstance(lr_at, partial) else 'Task.schedule'}, "
        f"{warmup_steps} warm-up steps; {number:,} parameters; {workers} loader processes per rank",
    )
    optimizer = strategy.attach(_optimizer(task, task.optimizer(model, config.replace(lr=lr))))
    return Parts(
        config=config, task=task, output_dir=Path(config.output_dir), deadline=deadline, stamp=stamp, header=header,
        fingerprint=marks,
        strategy=strategy, optimizer=optimizer, lr_at=lr_at, max_norm=config.max_norm,
        ema=optim.EMA(model, config.ema_decay) if config.ema_decay else None,
        rng_key=randomness.key(config.seed, "step"), rank=distributed.rank(), world_size=world_size,
        device=device, gpus=gpus, plan=plan, fetch=fetch, workers=workers, val_fetch=val_fetch, val_samples=val_samples,
    )  # fmt: skip


def _steps(value: Any, plan: data.BatchPlan) -> Any:
    """Return "2 epochs" as a number of steps, and any other value unchanged."""
    epochs = in_epochs(value)
    return value if epochs is None else round(epochs * plan.steps_per_epoch)


def _schedule(
    config: TrainConfig, task: Task, plan: data.BatchPlan, lr: float, warmup_steps: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, by the task's own schedule or the config's.

    Raises:
        ValueError: the task has its own schedule, and warmup_steps or min_lr is set. The returned function raises
            ValueError if the task's factor is negative, nan or infinite.
    """
    if type(task).schedule is Task.schedule:
        return partial(
            optim.lr_at, schedule=config.schedule, lr=lr, max_steps=plan.max_steps, warmup_steps=warmup_steps,
            min_lr=config.min_lr, cycles=config.schedule_cycles, power=config.schedule_power,
            first_cycle=_steps(config.schedule_first_cycle, plan), cycle_factor=config.schedule_cycle_factor,
        )  # fmt: skip
    if warmup_steps or config.min_lr:
        raise ValueError(
            f"warmup_steps={config.warmup_steps}, min_lr={config.min_lr} with {type(task).__name__}.schedule: a "
            f"schedule of your own gives the factor of every step. Put them into it, or set them to 0."
        )

    def lr_at(step: int) -> float:
        factor = float(task.schedule(step, plan.max_steps))
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"{type(task).__name__}.schedule({step}, {plan.max_steps}) gave {factor}, expected 0 or more"
            )
        return lr * factor

    return lr_at


def _optimizer(task: Task, made: Any) -> torch.optim.Optimizer:
    """Return the result of Task.optimizer if this is an optimizer.

    Raises:
        TypeError: the result is something else, such as several optimizers.
        ValueError: Task.optimizer also made a scheduler of torch, which nothing would call.
    """
    who = f"{type(task).__name__}.optimizer"
    if isinstance(made, list | tuple | dict):
        raise TypeError(
            f"{who} returned a {type(made).__name__}, expected one optimizer. A schedule is a setting, or "
            f"Task.schedule; for several optimizers (a GAN, actor and critic) launch a loop of your own: launch(loop)."
        )
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{who} must return a torch.optim.Optimizer, got a {type(made).__name__}")
    kinds = torch.optim.lr_scheduler
    code = getattr(type(task).optimizer, "__code__", None)
    found = {name: getattr(kinds, name, None) for name in (code.co_names if code else ())}
    named = [name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, kinds.LRScheduler)]
    if named or hasattr(made.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            f"{who} makes a scheduler of torch ({', '.join(named) or 'torch.optim.lr_scheduler'}), which nothing would "
            f"call. Use the settings schedule, warmup_steps, schedule_first_cycle, …, or define Task.schedule(step, "
            f"max_steps), which returns the factor of the learning rate."
        )
    return made


def _stamp(task: Task, dataset_size: int) -> dict[str, Any]:
    """Return facts that identify a run in its checkpoints; the caller adds the global batch size."""
    return {"task": task.name or type(task).__name__, "backend": task.backend, "dataset_size": dataset_size}


def _batch_plan(config: TrainConfig, task: Task, dataset_size: int, num_replicas: int) -> data.BatchPlan:
    """Split each global batch over the replicas.

    If the config gives a size per GPU ("per_gpu:64"), a resumed run keeps the global batch of its first session.

    Raises:
        ValueError: settings do not fit each other or the data.
    """
    if config.micro_batch_size == "auto" and config.gradient_accumulation_steps:
        raise ValueError(
            f"micro_batch_size='auto' with gradient_accumulation_steps={config.gradient_accumulation_steps}: the "
            f"first determines the second. Give global_batch_size instead."
        )
    batch_at_start = None
    if isinstance(config.global_batch_size, str):
        batch_at_start = distributed.from_main(
            lambda: resume.batch_begun_with(
                Path(config.output_dir) / "checkpoints", resume=config.resume, config=config.to_dict(),
                may_change=config.MAY_CHANGE, stamp=_stamp(task, dataset_size), defaults=config.defaults(),
            )
        )  # fmt: skip
    return data.BatchPlan.make(
        dataset_size=dataset_size, num_replicas=num_replicas, epochs=config.epochs, max_steps=config.max_steps,
        global_batch_size=config.global_batch_size, batch_at_start=batch_at_start,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
    )  # fmt: skip


def _strategy_options(name: str, config: TrainConfig, task: Task) -> dict[str, Any]:
    """Return the arguments that only the named strategy takes."""
    if name == "ddp":
        return {
            "gradient_compression": config.gradient_compression, "bucket_mb": config.bucket_mb,
            "counts_terms": type(task).count is not Task.count,
        }  # fmt: skip
    if name == "fsdp":
        return {"units": task.fsdp_units, "cpu_offload": config.cpu_offload, "meta_init": config.meta_init}
    if name == "deepspeed":
        return {"file": config.deepspeed_config, "max_norm": config.max_norm, "averaged": config.ema_decay is not None}
    return {}


def _model(task: Task, config: TrainConfig) -> nn.Module:
    """Return the task's model in training mode, with gradient checkpointing and compilation as the config says.

    Raises:
        TypeError: Task.model does not return a module.
        ValueError: the model has no gradient checkpointing.
    """
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(task).__name__}.model must return an nn.Module, got {type(model).__name__}")
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                f"gradient_checkpointing=True, but {type(model).__name__} has no method gradient_checkpointing_enable. "
                f"Give the model this method, or leave the setting off."
            )
        enable()
    keep_4bit_layout(model)
    model.train()
    # a synchronised layer needs every rank, but with find_unused_parameters a rank may skip a layer
    if config.sync_batchnorm == "auto" and not config.find_unused_parameters and distributed.world_size() > 1:
        sync_batch_norms(model)
    if config.compile:
        model.compile()
    return model


def count_parameters(model: nn.Module) -> int:
    """Return a model's number of parameters; 4-bit weights of bitsandbytes, packed two in a byte, count unpacked."""
    states = [(p, getattr(p, "quant_state", None)) for p in model.parameters()]
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in states)


def keep_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights in another layout on CPUs with AVX512-BF16.

    bitsandbytes 0.50 packs and rounds a layer's weights permanently at its first call in eval mode, for a bf16 kernel
    without a backward pass. Training after an evaluation would then use changed weights. Under fsdp the gathered copy
    of the weights would change, but this rank's shards would not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
