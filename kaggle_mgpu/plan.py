"""What a run will take, before a GPU hour is spent: batch, steps, memory, time, sessions, and what a second GPU buys.

    print(plan(config, task))                 # a few steps are taken on the GPUs (or the CPU) at hand
    print(plan(config, task, on="T4x2"))      # an estimate for GPUs that are not here: T4x2, P100, L4x4, A100, H100
    python -m kaggle_mgpu plan text_generation --max-steps 2000 --on T4x2

The model of an estimate, all of it: a micro-step takes max(operations / peak, bytes / memory bandwidth) / REACHED
seconds, with the published peak of the precision, and at least LAUNCH for each operator. Operations are counted
(torch's FlopCounterMode) over a real forward and backward pass of a few samples, and so is what is kept for backward;
bytes are four times that (written and read in forward, read in backward, their gradients written) and three times the
weights. The optimizer reads and writes weights, gradients and its own state once more. An all-reduce of B bytes over n
GPUs takes 2 (n - 1) / n B / link seconds (a ring, as nccl-tests counts); what is sent while the last backward pass
runs, two thirds of a micro-step, is free; the last bucket always costs its time. Data loading is left out. What is not
known is said to be unknown.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from . import check, compare, devices, session
from .config import TrainConfig
from .facts import Facts, count
from .launch import launch
from .task import Task, expect

REACHED = 1 / 3
"""Share of a GPU's published figures that training is taken to reach; an assumption."""
LAUNCH = 10e-6
"""Seconds that Python and CUDA take to launch one operator on a core of 2 GHz; an assumption. It is what small models
wait for: operators are counted as they reach torch's dispatcher, forward and backward."""
WEEKLY_HOURS = 30.0
"""Kaggle's quota of GPU hours; an hour of two T4s counts as one."""
BUCKET = 25 << 20
"""Bytes of gradients that DistributedDataParallel sends at a time (its default bucket_cap_mb)."""


@dataclass(frozen=True)
class Published:
    """What is published of a GPU."""

    memory_bytes: float
    """As torch reports it, less than the box says."""
    capability: tuple[int, int]
    peak: dict[str, float]
    """Operations per second by precision, dense, without TF32, which torch leaves off."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the next GPU, one way."""
    link_source: str


_PCIE3 = "NCCL's own figure for PCIe 3.0 x16 (PCI_BW in src/graph/topo.h), an upper bound"
_PCIE4 = "NCCL's own figure for PCIe 3.0 x16, doubled for 4.0; an upper bound"
_NVLINK = "NVLink, as NCCL counts it"
# Peaks and bandwidths: NVIDIA's data sheets of T4, P100 PCIe 16 GB, L4, A100 40 GB, H100 SXM (tensor cores, dense).
# NVLink: NCCL's figure a link (SM80_NVLINK_BW, SM90_NVLINK_BW in src/graph/topo.h) times 12 and 18 links.
PUBLISHED = {
    "T4": Published(
        14.56 * 2**30, (7, 5), {"fp32": 8.1e12, "fp16": 65e12}, 320e9, 12e9,
        f"through shared memory, since two T4s have no peer access; {_PCIE3}",
    ),
    "P100": Published(15.9 * 2**30, (6, 0), {"fp32": 9.3e12, "fp16": 18.7e12}, 732e9, 12e9, _PCIE3),
    "L4": Published(
        22.0 * 2**30, (8, 9), {"fp32": 30.3e12, "fp16": 121e12, "bf16": 121e12}, 300e9, 24e9, _PCIE4
    ),
    "A100": Published(
        39.4 * 2**30, (8, 0), {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12}, 1555e9, 240e9, _NVLINK
    ),
    "H100": Published(
        79.1 * 2**30, (9, 0), {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12}, 3350e9, 371e9, _NVLINK
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The GPUs that a plan is for."""

    name: str
    count: int
    published: Published | None
    memory_bytes: float | None
    here: bool = False
    on_cpu: bool = False

    @classmethod
    def named(cls, text: str) -> Target:
        """From "T4x2" or "P100". A GPU without published figures here is kept, and its figures are unknown.

        Raises:
            ValueError: not a name with an optional number.
        """
        found = re.fullmatch(r"(?:(?:Tesla|NVIDIA)\s+)?([A-Za-z][A-Za-z0-9-]*?)(?:\s*[xX]\s*(\d+))?", str(text).strip())
        if found is None or found[2] == "0":
            raise ValueError(f"on={text!r}: expected a GPU and how many, such as 'T4x2'; known: {', '.join(PUBLISHED)}")
        name = found[1].upper()
        stem = re.sub(r"X(-\d+)?$", "", name)
        if stem != name and stem in PUBLISHED:
            raise ValueError(f"on={text!r}: how many? Did you mean {stem + 'x2'!r}?")
        published = PUBLISHED.get(name)
        return cls(name, int(found[2] or 1), published, published.memory_bytes if published else None)

    @classmethod
    def at_hand(cls, gpus: list[devices.GPU]) -> Target:
        if not gpus:
            return cls("CPU", 1, None, None, here=True, on_cpu=True)
        name = gpus[0].name
        words = re.findall(r"[A-Z]+\d+", name)
        published = next((PUBLISHED[word] for word in words if word in PUBLISHED), None)
        return cls(name, len(gpus), published, min(gpu.memory_bytes for gpu in gpus) or None, here=True)

    def gpus(self) -> list[devices.GPU]:
        """As `devices` has them, for the choice of precision."""
        capability = self.published.capability if self.published else None
        return [devices.GPU(i, self.name, int(self.memory_bytes or 0), capability) for i in range(self.count)]


@dataclass(frozen=True)
class Exchange:
    """What the GPUs tell each other in a step."""

    what: str
    nbytes: int
    seconds: float
    hidden: float
    """Seconds of backward that it can hide behind."""
    exposed: float
    """Seconds that a step is longer for it."""
    link: float
    source: str


@dataclass
class Plan:
    """What :func:`plan` found out; print it. Times are None where they are unknown."""

    sentence: str
    target: Target
    strategy: str
    precision: str
    precision_reason: str
    micro_batch_size: int
    max_steps: int
    memory: dict[str, float]
    """Bytes on one GPU, by what they are for."""
    measured_memory: int | None
    """What the fullest GPU really held at its peak, where steps were taken on GPUs."""
    step_seconds: float | None
    seconds: float | None
    """The whole run, evaluations included."""
    at_best: float | None
    """The whole run where the published figures were reached in full; None for what was measured."""
    source: str
    sessions: int | None
    quota: float | None
    """Share of a week's GPU hours."""
    speedup: float | None
    speedup_of: int
    """Number of GPUs that the speed-up is of, over one."""
    exchange: Exchange | None
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = self.target.name if self.target.on_cpu else f"{self.target.count} x {self.target.name}"
        lines = [self.sentence, f"on {where}: strategy {self.strategy}, precision {self.precision}"]
        lines[-1] += f" ({self.precision_reason})"
        total = sum(self.memory.values())
        parts = " + ".join(f"{name} {_size(nbytes)}" for name, nbytes in self.memory.items())
        room = f" of {_size(self.target.memory_bytes)}" if self.target.memory_bytes else ""
        peak = f"; measured peak {_size(self.measured_memory)}" if self.measured_memory else ""
        rows = [("memory per GPU", f"{parts} = {_size(total)}{room}{peak}, without CUDA's own")]
        if self.seconds is None or self.step_seconds is None:
            rows.append(("time", f"unknown: {self.source}"))
        else:
            best = f"; at best {_duration(self.at_best)}" if self.at_best is not None else ""
            rows.append(("time", f"{_duration(self.seconds)}, {_milliseconds(self.step_seconds)} a step{best}"))
            rows.append(("", f"{self.source}; data loading beyond that is not in it"))
        if self.sessions is not None and self.quota is not None:
            hours = session.SESSION_HOURS["batch"]
            many = "session" if self.sessions == 1 else "sessions"
            share = f"{100 * self.quota:.1f} %" if self.quota >= 0.001 else "under 0.1 %"
            rows.append(
                ("sessions", f"{self.sessions} {many} of {hours:g} h; {share} of the week's {WEEKLY_HOURS:g} h")
            )
        bound = "" if self.target.here else "up to "
        gain = f"{bound}{self.speedup:.2f}x expected" if self.speedup is not None else "unknown"
        rows.append((f"{self.speedup_of} GPUs over 1", gain))
        rows += [("", reason) for reason in self.reasons]
        rows += [("advice" if i == 0 else "", text) for i, text in enumerate(self.advice)]
        return "\n".join([*lines, *(f"{name:15} {text}" for name, text in rows)])

    def _ipython_display_(self) -> None:
        print(self)


def plan(config: TrainConfig, task: Task, on: str | None = None, steps: int = 5) -> Plan:
    """What training `task` as `config` says will take, here or on the GPUs named in `on`.

    Args:
        on: "T4x2", "P100", "L4x4", "A100", "H100", or any of these with another number. Default: what is at hand,
            measured over `steps` steps in workers, so that no CUDA context stays in this process.

    Raises:
        TypeError: not a TrainConfig and a Task.
        ValueError: settings that do not fit each other or the GPUs, as `train` would raise them.
    """
    expect(config, task, "plan")
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    gpus = devices.select(config.gpu_ids) if on is None else []
    target = Target.at_hand(gpus) if on is None else Target.named(on)
    precision, why = devices.precision(config.precision, [] if target.on_cpu else gpus or target.gpus())
    if target.published is None and not target.here and config.precision == "auto":
        why = f"{target.name} is unknown here"
    replicas = _replicas(config, target)
    facts = count(config, task, precision != "fp32")
    batch = _batch(config, facts, target, replicas)
    strategy = config.strategy if config.strategy != "auto" else ("ddp" if replicas > 1 else "single")
    evaluated = _evaluations(config, batch) * facts.val_samples

    measured, at_best, link, source = None, None, None, ""
    if target.here:
        name = "nproc" if strategy != "single" else None
        step_seconds: float | None = None
        try:
            measured = compare.measure(config.replace(**({name: replicas} if name else {})), task, steps)
        except Exception as error:
            if not compare.out_of_memory(error):
                raise
            source = f"out of memory with micro_batch_size {batch.micro_batch_size}"
        else:
            batch = batch.with_micro_batch_size(measured.micro_batch_size)
            step_seconds = measured.step_seconds
            source = f"measured here over {len(measured.seconds)} steps"
        if len(gpus) > 1 and replicas > 1:
            found = _launch_bandwidth(config, replicas)
            link = (
                found["gigabytes_per_s"] * 1e9,
                f"measured here, {'with' if found['peers'] else 'without'} peer access",
            )
    elif target.published is None:
        step_seconds, source = None, f"no figures of {target.name} are kept here; known: {', '.join(PUBLISHED)}"
    else:
        step_seconds = _estimated_step(facts, batch, target.published, precision, strategy)
        at_best = _estimated_step(facts, batch, target.published, precision, strategy, reached=1.0)
        source = f"ESTIMATE from {target.name}'s published figures, {REACHED:.0%} of them reached"
    if link is None and target.published is not None:
        link = (target.published.link, target.published.link_source)

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
        step_seconds=step_seconds,
        seconds=None,
        at_best=None,
        source=source,
        sessions=None,
        quota=None,
        speedup=None,
        speedup_of=max(2, replicas),
        exchange=None,
    )
    if step_seconds is not None:
        # an evaluated sample is the forward third of a trained one, and the replicas share them out
        in_steps = batch.max_steps + evaluated / 3 / batch.global_batch_size
        out.seconds = in_steps * step_seconds
        out.at_best = None if at_best is None else in_steps * at_best
        if not target.on_cpu:
            out.sessions = max(1, math.ceil(out.seconds / (session.SESSION_HOURS["batch"] * 3600)))
            out.quota = out.seconds / (WEEKLY_HOURS * 3600)
    _add_speedup(out, facts, batch, link, target)
    _add_advice(out, facts, batch, config)
    return out


# --- the parts of a plan ----------------------------------------------------------------------------


def _replicas(config: TrainConfig, target: Target) -> int:
    if config.strategy == "single":
        return 1
    wanted = target.count if config.nproc == "auto" else int(config.nproc)
    if wanted > target.count and not target.on_cpu:
        raise ValueError(f"nproc={wanted}, but the plan is for {target.count} x {target.name}: expected at most that")
    return wanted


def _batch(config: TrainConfig, facts: Facts, target: Target, replicas: int) -> Any:
    from .data import BatchPlan

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
    most = _most_that_fits(facts, target, config, replicas)
    return batch.with_micro_batch_size(max(1, most)) if auto and most is not None else batch


def _shards(config: TrainConfig, replicas: int) -> int:
    return replicas if str(config.strategy) == "fsdp" else 1


def _most_that_fits(facts: Facts, target: Target, config: TrainConfig, replicas: int) -> int | None:
    """Samples in a micro-batch that nine tenths of a GPU hold by this reckoning; None where its memory is unknown."""
    if not target.memory_bytes or facts.sample_bytes <= 0:
        return None
    rest = 0.9 * target.memory_bytes - sum(
        facts.memory(0, config.ema_decay is not None, _shards(config, replicas)).values()
    )
    return int(rest / facts.sample_bytes)


def _evaluations(config: TrainConfig, batch: Any) -> int:
    every = {"epoch": batch.steps_per_epoch, "end": batch.max_steps}
    steps = every[config.eval_every] if isinstance(config.eval_every, str) else config.eval_every
    return math.ceil(batch.max_steps / steps)


def _estimated_step(
    facts: Facts, batch: Any, gpu: Published, precision: str, strategy: str, reached: float = REACHED
) -> float:
    """Seconds, by the model in this file's docstring."""
    micro, accumulation, replicas = batch.micro_batch_size, batch.gradient_accumulation_steps, batch.num_replicas
    computing = facts.operations * micro / gpu.peak[precision] / reached
    moving = (4 * facts.activations(micro) + 3 * facts.weight_bytes) / gpu.bandwidth / reached
    micro_step = max(computing, moving, facts.operators * LAUNCH)
    optimizer = 2 * (facts.weight_bytes + facts.gradient_bytes + facts.optimizer_bytes) / gpu.bandwidth / reached
    between = 0.0
    if replicas > 1:
        between = _exchange(facts, replicas, micro_step, gpu.link, "", strategy, accumulation).exposed
    return micro_step * accumulation + optimizer + between


def _exchange(
    facts: Facts,
    replicas: int,
    micro_step: float,
    link: float,
    source: str,
    strategy: str = "ddp",
    accumulation: int = 1,
) -> Exchange:
    """Of one step. What `strategy` sends: see torch's DistributedDataParallel, fully_shard and DataParallel."""
    gradients, hidden = facts.gradient_bytes, micro_step * 2 / 3
    if strategy == "dp":
        nbytes = accumulation * (facts.weight_bytes + gradients)
        seconds = (replicas - 1) * nbytes / link
        what = f"weights out and gradients back through the first GPU, {_size(nbytes)} to each other one,"
        return Exchange(what, nbytes, seconds, 0.0, seconds, link, source)
    seconds = 2 * (replicas - 1) / replicas * gradients / link
    what = f"an all-reduce of {_size(gradients)} of gradients"
    if strategy == "fsdp":  # gathers the weights twice and scatters the gradients: three halves of an all-reduce
        seconds *= 1.5
        what = f"gathering {_size(facts.weight_bytes)} of weights twice and scattering their gradients"
    last = min(1.0, BUCKET / gradients) if gradients else 0.0
    return Exchange(what, gradients, seconds, hidden, max(seconds - hidden, seconds * last), link, source)


def _add_speedup(out: Plan, facts: Facts, batch: Any, link: tuple[float, str] | None, target: Target) -> None:
    """What `speedup_of` GPUs are over one, with the same global batch, and why."""
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
        before = _exchange(facts, batch.num_replicas, out.step_seconds / steps, *link, kind, steps).exposed
    else:
        kind = "ddp"  # what a second GPU would be used with
    sample = max(out.step_seconds - before, 1e-9) / share
    micro = min(batch.micro_batch_size, math.ceil(batch.global_batch_size / count))
    out.exchange = _exchange(facts, count, micro * sample, *link, kind, steps)
    alone = sample * batch.global_batch_size
    out.speedup = alone / (alone / count + out.exchange.exposed)
    e = out.exchange
    out.reasons.append(
        f"{e.what} takes {_milliseconds(e.seconds)} at {e.link / 1e9:.1f} GB/s; "
        f"{_milliseconds(e.seconds - e.exposed)} of it pass behind the backward pass ({_milliseconds(e.hidden)}), "
        f"{_milliseconds(e.exposed)} lengthen a step of {_milliseconds(alone / count)}"
    )
    out.reasons.append(f"the link: {e.source}")


def _add_advice(out: Plan, facts: Facts, batch: Any, config: TrainConfig) -> None:
    total, most = sum(out.memory.values()), _most_that_fits(facts, out.target, config, batch.num_replicas)
    held = max(total, out.measured_memory or 0)
    if out.target.here and out.step_seconds is None:
        out.advice.append(
            "micro_batch_size='auto' finds what fits; more of gradient_accumulation_steps makes up for it"
        )
    if most is not None and out.target.memory_bytes and held > 0.9 * out.target.memory_bytes:
        if most < 1:
            out.advice.append(
                "not even one sample fits: gradient_checkpointing=True, a smaller model, or sharding the weights"
            )
        else:
            smaller = batch.with_micro_batch_size(most)
            out.advice.append(
                f"the micro-batch of {batch.micro_batch_size} hardly fits: micro_batch_size={smaller.micro_batch_size} "
                f"with {smaller.gradient_accumulation_steps} accumulation steps is the same batch"
            )
    e = out.exchange
    if e is None or out.step_seconds is None or e.exposed < 0.05 * out.step_seconds:
        if e is not None:
            out.advice.append("the exchange of gradients is no bottleneck: accumulation or compression would not pay")
        return
    share = e.exposed / (out.step_seconds + (e.exposed if batch.num_replicas == 1 else 0.0))
    out.advice.append(
        f"the exchange of gradients is {share:.0%} of a step. It happens once a step: a larger global_batch_size with "
        f"gradient_accumulation_steps={2 * batch.gradient_accumulation_steps} halves its share (and changes the run: "
        f"see lr_scaling)"
    )
    if out.strategy not in ("ddp", "single"):
        return
    half = max(e.seconds / 2 - e.hidden, e.seconds / 2 * min(1.0, BUCKET / e.nbytes))
    out.advice.append(
        f"gradients sent as fp16 (gradient_compression='fp16') would leave {_milliseconds(half)} of "
        f"{_milliseconds(e.exposed)}; small differences in the last digits come with it"
    )
    if e.nbytes < 4 * BUCKET and e.seconds - e.hidden < e.exposed:
        better = max(1, e.nbytes // 8 >> 20)
        out.advice.append(
            f"the last bucket of gradients hides behind nothing: bucket_mb={better} instead of {BUCKET >> 20} starts "
            f"earlier and leaves less for the end"
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _launch_bandwidth(config: TrainConfig, count: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = launch(
        check.all_reduce_bandwidth, nproc=count, gpu_ids=config.gpu_ids, in_worker=True
    )
    return found[0]
