"""Plan a run: batch, steps, memory, time, number of sessions, and the speed-up from a second GPU.

    print(plan(config, task))                 # measures a few steps on the GPUs (or the CPU) of this machine
    print(plan(config, task, on="T4x2"))      # estimates for absent GPUs: T4x2, L4x4, A100, H200, RTX4090
    python -m kaggle_mgpu plan text_generation --max-steps 2000 --on T4x2

estimate.py has the formulas and figures of the estimates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..config import TrainConfig
from ..data import BatchPlan
from ..launching import launch
from ..machine import devices, session
from ..training import Task, expect, is_out_of_memory
from . import compare, estimate, selftest
from .counts import Facts, count_all
from .estimate import Exchange, Target

MEASURING_SECONDS = 5.0
"""Longest expected measurement on a CPU, in seconds; a longer measurement is replaced by an estimate."""
WEEKLY_HOURS = 30.0
"""Kaggle's weekly quota of GPU hours; an hour on two T4s counts as one hour."""


@dataclass
class Plan:
    """The result of :func:`plan`, to be printed. Unknown times are None."""

    sentence: str
    """The batch and the steps in words."""
    target: Target
    strategy: str
    precision: str
    precision_reason: str
    micro_batch_size: int
    max_steps: int
    memory: dict[str, float]
    """Bytes on one GPU, by their use."""
    measured_memory: int | None
    """Peak bytes on the fullest GPU, if steps were measured on GPUs."""
    in_use: list[dict[str, int | None]]
    """The load of this machine's GPUs before the measurement (`devices.sample`); [] for other GPUs."""
    step_seconds: float | None
    seconds: float | None
    """Duration of the whole run, evaluations included."""
    lower_bound_seconds: float | None
    """Seconds of the run at the full published figures; None unless `step_seconds` is estimated from these figures."""
    source: str
    """How `step_seconds` was found, or why not."""
    sessions: int | None
    """Number of Kaggle's batch sessions; None on a CPU."""
    quota: float | None
    """The run's time as a fraction of WEEKLY_HOURS; None on a CPU."""
    speedup: float | None
    """Speed of `speedup_of` GPUs divided by the speed of one GPU, with the same global batch."""
    speedup_of: int
    exchange: Exchange | None
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = self.target.name if self.target.on_cpu else f"{self.target.count} x {self.target.name}"
        lines = [self.sentence, f"on {where}: strategy {self.strategy}, precision {self.precision}"]
        lines[-1] += f" ({self.precision_reason})"
        total = sum(self.memory.values())
        parts = " + ".join(f"{name} {estimate.size(nbytes)}" for name, nbytes in self.memory.items())
        available = f" of {estimate.size(self.target.memory_bytes)}" if self.target.memory_bytes else ""
        peak = f"; measured peak {estimate.size(self.measured_memory)}" if self.measured_memory else ""
        rows = [("memory per GPU", f"{parts} = {estimate.size(total)}{available}{peak}, without CUDA's own memory")]
        used = [f"GPU {gpu['index']} {estimate.size(gpu['memory_used'] or 0)}" for gpu in self.in_use]
        rows += [("in use now", ", ".join(used))] if used else []
        if self.seconds is None or self.step_seconds is None:
            rows.append(("time", f"unknown: {self.source}"))
        else:
            best = f"; at best {_duration(self.lower_bound_seconds)}" if self.lower_bound_seconds is not None else ""
            rows.append(("time", f"{_duration(self.seconds)}, {_milliseconds(self.step_seconds)} a step{best}"))
            rows.append(("", f"{self.source}; slower data loading is not included"))
        if self.sessions is not None and self.quota is not None:
            hours = session.SESSION_HOURS["batch"]
            number = f"{self.sessions} session{'s' * (self.sessions > 1)} of {hours:g} h"
            share = f"{100 * self.quota:.1f} %" if self.quota >= 0.001 else "under 0.1 %"
            rows.append(("sessions", f"{number}; {share} of the week's {WEEKLY_HOURS:g} h"))
        bound = "" if self.target.here else "up to "
        gain = f"{bound}{self.speedup:.2f}x expected" if self.speedup is not None else "unknown"
        rows.append((f"{self.speedup_of} GPUs over 1", gain))
        rows += [("", reason) for reason in self.reasons]
        rows += [("advice" if i == 0 else "", text) for i, text in enumerate(self.advice)]
        return "\n".join([*lines, *(f"{name:15} {text}" for name, text in rows)])

    def _ipython_display_(self) -> None:
        print(self)


def plan(config: TrainConfig, task: Task, on: str | None = None, steps: int = 5) -> Plan:
    """Plan the training of `task` with `config`, on this machine or on the GPUs named in `on`.

    Args:
        on: "T4x2", "L4x4", "A100" (40 GB), "A100-80GB", "H100", "H200", "RTX4090", or any of these with another number.
            Default: this machine, measured in workers, so that no CUDA context stays in this process.
        steps: the number of measured steps.

    Raises:
        TypeError: `config` is no TrainConfig, or `task` is no Task.
        ValueError: `on` is malformed, `steps` is below 1, or the settings do not fit each other or the GPUs.
    """
    return plan_all([(config, task)], on, steps)[0]


def plan_all(runs: Sequence[tuple[TrainConfig, Task]], on: str | None = None, steps: int = 5) -> list[Plan]:
    """Plan several runs, such as the stages of a recipe; arguments and errors are as in `plan`."""
    for config, task in runs:
        expect(config, task, "plan")
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    settled = [_Settled.of(config, on) for config, _ in runs]
    to_count = [(config, task, each.precision != "fp32") for (config, task), each in zip(runs, settled, strict=True)]
    facts = count_all(to_count, on_cpu=any(each.target.on_cpu for each in settled))
    return [_plan(*run, each, found, steps) for run, each, found in zip(runs, settled, facts, strict=True)]


class _Settled(NamedTuple):
    """The GPUs, precision and number of replicas of a plan."""

    gpus: list[devices.GPU]
    target: Target
    precision: str
    precision_reason: str
    replicas: int

    @classmethod
    def of(cls, config: TrainConfig, on: str | None) -> _Settled:
        gpus = devices.select(config.gpu_ids) if on is None else []
        target = Target.at_hand(gpus) if on is None else Target.named(on)
        precision, why = devices.precision(config.precision, [] if target.on_cpu else gpus or target.gpus())
        if target.published is None and not target.here and config.precision == "auto":
            why = f"kaggle_mgpu does not know the capability of {target.name}"
        return cls(gpus, target, precision, why, _replicas(config, target))


def _plan(config: TrainConfig, task: Task, settled: _Settled, facts: Facts, steps: int) -> Plan:
    gpus, target, precision, why, replicas = settled
    batch = _batch(config, facts, target, replicas)
    strategy = config.strategy if config.strategy != "auto" else ("ddp" if replicas > 1 else "single")
    evaluated = _evaluations(config, batch) * facts.val_samples

    measured, step_seconds, step_lower_bound, link = None, None, None, None
    in_use = devices.sample() if gpus else []
    too_long = _too_long_to_measure(facts, batch, steps) if target.on_cpu else None
    if too_long is not None:
        step_seconds, source = too_long
    elif target.here:
        try:
            measured = compare.measure(config if strategy == "single" else config.replace(nproc=replicas), task, steps)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            source = f"out of memory with micro_batch_size {batch.micro_batch_size}"
        else:
            batch = batch.with_micro_batch_size(measured.micro_batch_size)
            step_seconds = measured.step_seconds
            source = f"measured here over {len(measured.seconds)} steps"
        if len(gpus) > 1 and replicas > 1:
            link = _measured_link(config, replicas)
    elif target.published is None:
        source = f"kaggle_mgpu has no figures of {target.name}; known: {', '.join(estimate.PUBLISHED)}"
    else:
        step_seconds = estimate.step_seconds(facts, batch, target.published, precision, strategy)
        step_lower_bound = estimate.step_seconds(facts, batch, target.published, precision, strategy, reached=1.0)
        source = (
            f"ESTIMATE from {target.name}'s published figures, assuming that {estimate.REACHED:.0%} of them are reached"
        )
    if link is None and target.published is not None:
        link = (target.published.link_bandwidth, target.published.link_source)

    unit = "process" if target.on_cpu else "GPU"
    out = Plan(
        sentence=batch.sentence(unit),
        target=target,
        strategy=strategy,
        precision=precision,
        precision_reason=why,
        micro_batch_size=batch.micro_batch_size,
        max_steps=batch.max_steps,
        memory=facts.memory(batch.micro_batch_size, config.ema_decay is not None, _shards(config, replicas)),
        measured_memory=max(measured.memory_bytes, default=None) if measured else None,
        in_use=in_use,
        step_seconds=step_seconds,
        seconds=None,
        lower_bound_seconds=None,
        source=source,
        sessions=None,
        quota=None,
        speedup=None,
        speedup_of=max(2, replicas),
        exchange=None,
    )
    if step_seconds is not None:
        # forward is taken as a third of a training step's time, and the replicas share the validation samples
        in_steps = batch.max_steps + evaluated / 3 / batch.global_batch_size
        out.seconds = in_steps * step_seconds
        out.lower_bound_seconds = None if step_lower_bound is None else in_steps * step_lower_bound
        if not target.on_cpu:
            out.sessions = max(1, math.ceil(out.seconds / (session.SESSION_HOURS["batch"] * 3600)))
            out.quota = out.seconds / (WEEKLY_HOURS * 3600)
    _add_speedup(out, facts, batch, link, target)
    _add_advice(out, facts, batch, config)
    return out


def summary_line(plans: list[Plan]) -> str:
    """Return a line with the time of runs that follow each other, and their share of the week's quota."""
    known = [each.seconds for each in plans if each.seconds is not None]
    time = _duration(sum(known)) if len(known) == len(plans) else "unknown"
    quota = [each.quota for each in plans if each.quota is not None]
    share = f", {100 * sum(quota):.1f} % of the week's {WEEKLY_HOURS:g} h" if len(quota) == len(plans) else ""
    steps = sum(each.max_steps for each in plans)
    return f"all {len(plans)} runs together: {steps:,} steps, {time}{share}"


# --- the parts of a plan ----------------------------------------------------------------------------


def _replicas(config: TrainConfig, target: Target) -> int:
    if config.strategy == "single":
        return 1
    wanted = target.count if config.nproc == "auto" else int(config.nproc)
    if wanted > target.count and not target.on_cpu:
        raise ValueError(
            f"nproc={wanted}, but the plan is for {target.count} x {target.name}: expected at most {target.count}"
        )
    return wanted


def _measured_link(config: TrainConfig, replicas: int) -> tuple[float, str]:
    """Measure the bytes per second between the GPUs of this machine; return the figure and its source."""
    found = launch(selftest.all_reduce_bandwidth, nproc=replicas, gpu_ids=config.gpu_ids, in_worker=True)[0]
    return found["gigabytes_per_s"] * 1e9, f"measured here, {'with' if found['peers'] else 'without'} peer access"


def _batch(config: TrainConfig, facts: Facts, target: Target, replicas: int) -> BatchPlan:
    """Return the batch plan of the run; micro_batch_size="auto" is estimated."""
    auto = config.micro_batch_size == "auto"
    batch = BatchPlan.make(
        dataset_size=facts.dataset_size,
        num_replicas=replicas,
        global_batch_size=config.global_batch_size,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
        gradient_accumulation_steps=None if auto else config.gradient_accumulation_steps,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    largest = _most_that_fits(facts, target, config, replicas)
    return batch.with_micro_batch_size(max(1, largest)) if auto and largest is not None else batch


def _shards(config: TrainConfig, replicas: int) -> int:
    """Return over how many GPUs the estimate splits weights, gradients and moments: all under fsdp, else one."""
    return replicas if config.strategy == "fsdp" else 1


def _most_that_fits(facts: Facts, target: Target, config: TrainConfig, replicas: int) -> int | None:
    """Estimate the largest micro-batch that fits in nine tenths of a GPU's memory; below 1: none; None: unknown."""
    if not target.memory_bytes or facts.sample_bytes <= 0:
        return None
    fixed = sum(facts.memory(0, config.ema_decay is not None, _shards(config, replicas)).values())
    return int((0.9 * target.memory_bytes - fixed) / facts.sample_bytes)


def _evaluations(config: TrainConfig, batch: BatchPlan) -> int:
    """Return the number of evaluations in a run."""
    every = {"epoch": batch.steps_per_epoch, "end": batch.max_steps, None: batch.max_steps}
    steps = config.eval_every if isinstance(config.eval_every, int) else every[config.eval_every]
    return math.ceil(batch.max_steps / steps)


def _too_long_to_measure(facts: Facts, batch: BatchPlan, steps: int) -> tuple[float, str] | None:
    """Return None if measuring on this CPU is fast enough, else a step's estimated seconds and the method in words."""
    side = 512
    matrix = torch.ones(side, side)
    matrix @ matrix
    began = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    speed = 4 * 2 * side**3 / (time.perf_counter() - began)
    seconds = facts.operations * batch.global_batch_size / speed / estimate.REACHED
    if seconds * (compare.WARM_UP + steps) <= MEASURING_SECONDS:
        return None
    return seconds, (
        f"ESTIMATE, since measuring would take too long: {facts.operations * batch.global_batch_size:.2g} operations "
        f"at {estimate.REACHED:.0%} of the {speed:.2g} per second that this CPU reaches in matrix products"
    )


def _add_speedup(out: Plan, facts: Facts, batch: BatchPlan, link: tuple[float, str] | None, target: Target) -> None:
    """Estimate the speed-up of `speedup_of` GPUs over one with the same global batch, and give the reasons."""
    count = out.speedup_of
    if target.on_cpu:
        out.reasons.append("processes on a CPU share its cores; name GPUs for an estimate (on='T4x2', --on T4x2)")
        return
    if out.step_seconds is None or link is None:
        what = "time of a step" if out.step_seconds is None else f"link between two {target.name}"
        out.reasons.append(f"the {what} is not known")
        return
    share = batch.global_batch_size // batch.num_replicas
    before, kind, steps = 0.0, out.strategy, batch.gradient_accumulation_steps
    if batch.num_replicas > 1:
        before = estimate.exchange(facts, batch.num_replicas, out.step_seconds / steps, *link, kind, steps).exposed
    else:
        kind = "ddp"  # as strategy "auto" chooses for two GPUs
    sample = max(out.step_seconds - before, 1e-9) / share
    micro = min(batch.micro_batch_size, math.ceil(batch.global_batch_size / count))
    out.exchange = estimate.exchange(facts, count, micro * sample, *link, kind, steps)
    alone = sample * batch.global_batch_size
    out.speedup = alone / (alone / count + out.exchange.exposed)
    e = out.exchange
    out.reasons.append(
        f"{e.what} takes {_milliseconds(e.seconds)} at {e.link_bandwidth / 1e9:.1f} GB/s; "
        f"{_milliseconds(e.seconds - e.exposed)} of it overlap with the backward pass ({_milliseconds(e.hidden)}), "
        f"{_milliseconds(e.exposed)} lengthen a step of {_milliseconds(alone / count)}"
    )
    out.reasons.append(f"the link between the GPUs: {e.source}")


def _add_advice(out: Plan, facts: Facts, batch: BatchPlan, config: TrainConfig) -> None:
    """Suggest settings that make the batch fit, or that raise the speed-up."""
    total, largest = sum(out.memory.values()), _most_that_fits(facts, out.target, config, batch.num_replicas)
    needed = max(total, out.measured_memory or 0)
    if out.target.here and out.step_seconds is None:
        out.advice.append(
            "micro_batch_size='auto' finds the largest size that fits, and accumulates the rest of the batch"
        )
    if largest is not None and out.target.memory_bytes and needed > 0.9 * out.target.memory_bytes:
        if largest < 1:
            out.advice.append(
                "not even one sample fits: gradient_checkpointing=True, a smaller model, or sharding the weights"
            )
        else:
            smaller = batch.with_micro_batch_size(largest)
            out.advice.append(
                f"the micro-batch of {batch.micro_batch_size} hardly fits: micro_batch_size={smaller.micro_batch_size} "
                f"with {smaller.gradient_accumulation_steps} accumulation steps gives the same batch"
            )
    e = out.exchange
    if e is None or out.step_seconds is None or e.exposed < 0.05 * out.step_seconds:
        if e is not None:
            out.advice.append(
                "the exchange of gradients is no bottleneck: accumulation or compression would save little"
            )
        return
    share = e.exposed / (out.step_seconds + (e.exposed if batch.num_replicas == 1 else 0.0))
    out.advice.append(
        f"the exchange of gradients is {share:.0%} of a step. The exchange happens once a step: a larger "
        f"global_batch_size with gradient_accumulation_steps={2 * batch.gradient_accumulation_steps} halves its "
        f"share (and changes the run: see lr_scaling)"
    )
    if out.strategy not in ("ddp", "single"):
        return
    half = max(e.seconds / 2 - e.hidden, e.seconds / 2 * min(1.0, estimate.BUCKET / e.nbytes))
    out.advice.append(
        f"gradients sent as fp16 (gradient_compression='fp16') would lengthen a step by {_milliseconds(half)} instead "
        f"of {_milliseconds(e.exposed)}, with small differences in the last digits"
    )
    if e.nbytes < 4 * estimate.BUCKET and e.seconds - e.hidden < e.exposed:
        better = max(1, e.nbytes // 8 >> 20)
        out.advice.append(
            f"the last bucket of gradients does not overlap with computation: bucket_mb={better} instead of "
            f"{estimate.BUCKET >> 20} starts earlier and leaves less for the end"
        )


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
