"""Estimate the time of a training step on absent GPUs, from published figures and the counts of a model.

    gpus = Target.named("T4x2")
    seconds = step_seconds(facts, batch, gpus.published, "fp16", "ddp")

A micro-step takes max(operations / peak, bytes / memory bandwidth) / REACHED seconds, with the published peak of the
precision, and at least LAUNCH seconds per operator. counts.py counts the operations, and the bytes kept for backward.
The moved bytes are four times the kept bytes (written and read in forward, read in backward, gradients written) plus
three times the weights. The optimizer reads and writes weights, gradients and its own state once. An all-reduce of B
bytes over n GPUs takes 2 (n - 1) / n B / link seconds (a ring, as nccl-tests counts). Under ddp and fsdp, communication
overlaps with the last backward pass (two thirds of a micro-step), except for the last bucket. Data loading is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..data import BatchPlan
from ..machine import devices
from .counts import Facts

REACHED = 1 / 3
"""The assumed share of a GPU's published figures that training reaches."""
LAUNCH = 10e-6
"""The assumed seconds to launch an operator from Python on a core of 2 GHz. Small models are limited by this."""
BUCKET = 25 << 20
"""Bytes of gradients in one message of DistributedDataParallel (its default bucket_cap_mb)."""


@dataclass(frozen=True)
class Published:
    """The published figures of a GPU."""

    memory_bytes: float
    """Bytes of memory as torch reports them: less than the nominal size."""
    capability: tuple[int, int]
    peak: dict[str, float]
    """Operations per second by precision, for dense matrices; fp32 without TF32, which is off in torch by default."""
    bandwidth: float
    """Bytes per second of the memory."""
    link_bandwidth: float
    """Bytes per second to the next GPU, one way."""
    link_source: str


_PCIE3 = "NCCL's own figure for PCIe 3.0 x16 (PCI_BW in src/graph/topo.h), an upper bound"
_PCIE4 = "NCCL's own figure for PCIe 3.0 x16, doubled for 4.0; an upper bound"
_NVLINK = "NCCL's own figure for NVLink"
# Peaks and bandwidths: NVIDIA's data sheets of T4, L4, A100 SXM (40 and 80 GB), H100 SXM and H200 SXM, and for the RTX
# 4090 NVIDIA's white paper on the Ada architecture (tensor cores, dense, sums in fp32).
# NVLink: NCCL's figure per link (SM80_NVLINK_BW, SM90_NVLINK_BW in src/graph/topo.h), times 12 links for the A100 and
# 18 for the H100 and H200.
PUBLISHED = {
    "T4": Published(
        14.56 * 2**30, (7, 5), {"fp32": 8.1e12, "fp16": 65e12}, 320e9, 12e9,
        f"through shared memory, since two T4s have no peer access; {_PCIE3}",
    ),
    "L4": Published(
        22.0 * 2**30, (8, 9), {"fp32": 30.3e12, "fp16": 121e12, "bf16": 121e12}, 300e9, 24e9, _PCIE4
    ),
    "A100": Published(
        39.4 * 2**30, (8, 0), {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12}, 1555e9, 240e9, _NVLINK
    ),
    "H100": Published(
        79.1 * 2**30, (9, 0), {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12}, 3350e9, 371e9, _NVLINK
    ),
    "A100-80GB": Published(
        79.1 * 2**30, (8, 0), {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12}, 2039e9, 240e9, _NVLINK
    ),
    "H200": Published(
        139.7 * 2**30, (9, 0), {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12}, 4800e9, 371e9, _NVLINK
    ),
    "RTX4090": Published(
        23.6 * 2**30, (8, 9), {"fp32": 82.6e12, "fp16": 165.2e12, "bf16": 165.2e12}, 1008e9, 24e9,
        f"through shared memory, since two RTX 4090s have no peer access; {_PCIE4}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The GPUs, or the CPU, of a planned run."""

    name: str
    count: int
    published: Published | None
    memory_bytes: float | None
    """Bytes of memory of a GPU, the smallest if GPUs differ; None if unknown."""
    here: bool = False
    """Whether the target is this machine, so that steps can be measured."""
    on_cpu: bool = False
    """Whether the target is a CPU; `count` is then 1."""

    @classmethod
    def named(cls, text: str) -> Target:
        """Return the target for a text such as "T4x2" or "A100"; an unknown GPU has no published figures.

        Raises:
            ValueError: the text is no GPU name with an optional count of at least 1.
        """
        # the X in RTX does not introduce a count
        pattern = r"(?:(?:Tesla|NVIDIA|GeForce)\s+)*([A-Za-z][A-Za-z0-9-]*?)(?:\s*(?<!RT)X\s*(\d+))?"
        found = re.fullmatch(pattern, re.sub(r"(?i)RTX\s+", "RTX", str(text).strip()), re.IGNORECASE)
        if found is None or found[2] == "0":
            raise ValueError(
                f"on={text!r}: expected a GPU and how many, such as 'T4x2'; known GPUs: {', '.join(PUBLISHED)}"
            )
        name = found[1].upper()
        stem = re.sub(r"X(-\d+)?$", "", name)
        if stem != name and stem in PUBLISHED:
            raise ValueError(f"on={text!r}: how many? Did you mean {stem + 'x2'!r}?")
        published = PUBLISHED.get(name)
        return cls(name, int(found[2] or 1), published, published.memory_bytes if published else None)

    @classmethod
    def at_hand(cls, gpus: list[devices.GPU]) -> Target:
        """Return this machine's GPUs, or its CPU, as a target."""
        if not gpus:
            return cls("CPU", 1, None, None, here=True, on_cpu=True)
        name = gpus[0].name
        words = re.findall(r"[A-Z]+\d+", name)
        published = next((PUBLISHED[word] for word in words if word in PUBLISHED), None)
        return cls(name, len(gpus), published, min(gpu.memory_bytes for gpu in gpus) or None, here=True)

    def gpus(self) -> list[devices.GPU]:
        """Return the GPUs as `devices.GPU` objects, the input of `devices.precision`."""
        capability = self.published.capability if self.published else None
        return [devices.GPU(i, self.name, int(self.memory_bytes or 0), capability) for i in range(self.count)]


@dataclass(frozen=True)
class Exchange:
    """The communication between the GPUs in a step."""

    what: str
    """The communication in words."""
    nbytes: int
    """Bytes of gradients. Under dp: bytes of weights and gradients that each GPU but the first exchanges in a step."""
    seconds: float
    """Seconds of the communication alone."""
    hidden: float
    """Seconds of the backward pass that can overlap with communication."""
    exposed: float
    """Seconds added to a step."""
    link_bandwidth: float
    """Bytes per second."""
    source: str
    """The source of the link's figure."""


def step_seconds(
    facts: Facts, batch: BatchPlan, gpu: Published, precision: str, strategy: str, reached: float = REACHED
) -> float:
    """Estimate the seconds of an optimizer step by the formulas in this file's docstring.

    Args:
        strategy: single, dp, ddp, fsdp or deepspeed.
        reached: the share of the published figures that training reaches; 1.0 gives a lower bound of the time.

    Raises:
        KeyError: the GPU has no published peak for this precision, such as bf16 on a T4.
    """
    micro, accumulation, replicas = batch.micro_batch_size, batch.gradient_accumulation_steps, batch.num_replicas
    computing = facts.operations * micro / gpu.peak[precision] / reached
    moving = (4 * facts.activations(micro) + 3 * facts.weight_bytes) / gpu.bandwidth / reached
    micro_step = max(computing, moving, facts.operators * LAUNCH)
    optimizer = 2 * (facts.weight_bytes + facts.gradient_bytes + facts.optimizer_bytes) / gpu.bandwidth / reached
    between = 0.0
    if replicas > 1:
        between = exchange(facts, replicas, micro_step, gpu.link_bandwidth, "", strategy, accumulation).exposed
    return micro_step * accumulation + optimizer + between


def exchange(
    facts: Facts,
    replicas: int,
    micro_step: float,
    link: float,
    source: str,
    strategy: str = "ddp",
    accumulation: int = 1,
) -> Exchange:
    """Estimate the communication of a step under a strategy.

    Args:
        micro_step: seconds of a forward and backward pass.
        link: bytes per second from one GPU to the next.
        source: the source of the link's figure.
        accumulation: micro-steps in a step. Under dp and fsdp each communicates, under the others only the last.
    """
    gradients, hidden = facts.gradient_bytes, micro_step * 2 / 3
    if strategy == "dp":
        nbytes = accumulation * (facts.weight_bytes + gradients)
        seconds = (replicas - 1) * nbytes / link
        what = f"sending weights from the first GPU and gradients back to it, {size(nbytes)} for each other GPU,"
        return Exchange(what, nbytes, seconds, 0.0, seconds, link, source)
    seconds = 2 * (replicas - 1) / replicas * gradients / link
    what = f"an all-reduce of {size(gradients)} of gradients"
    if strategy == "fsdp":  # each micro-step gathers weights twice and scatters gradients: each is half an all-reduce
        seconds, hidden = 1.5 * accumulation * seconds, accumulation * hidden
        what = f"gathering {size(facts.weight_bytes)} of weights twice and scattering their gradients"
        what += f", in each of {accumulation} micro-steps," if accumulation > 1 else ""
    last = min(1.0, BUCKET / gradients) if gradients else 0.0
    return Exchange(what, gradients, seconds, hidden, max(seconds - hidden, seconds * last), link, source)


def size(nbytes: float) -> str:
    """Write bytes as 1.5 GiB or 20.0 MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
