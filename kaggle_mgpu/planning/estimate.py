"""How long a training step takes on GPUs that are not here, from published figures and what is counted of a model.

    gpus = Target.named("T4x2")
    seconds = step_seconds(facts, batch, gpus.published, "fp16", "ddp")

The model, all of it: a micro-step takes max(operations / peak, bytes / memory bandwidth) / REACHED seconds, with the
published peak of the precision, and at least LAUNCH for each operator. Operations are counted (torch's FlopCounterMode)
over a real forward and backward pass of a few samples, and so is what is kept for backward; bytes are four times that
(written and read in forward, read in backward, their gradients written) and three times the weights. The optimizer
reads and writes weights, gradients and its own state once more. An all-reduce of B bytes over n GPUs takes
2 (n - 1) / n B / link seconds (a ring, as nccl-tests counts); what is sent while the last backward pass runs, two
thirds of a micro-step, is free; the last bucket always costs its time. Data loading is left out. What is not known is
said to be unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..data import BatchPlan
from ..machine import devices
from .counts import Facts

REACHED = 1 / 3
"""Share of a GPU's published figures that training is taken to reach; an assumption."""
LAUNCH = 10e-6
"""Seconds that Python and CUDA take to launch one operator on a core of 2 GHz; an assumption. It is what small models
wait for: operators are counted as they reach torch's dispatcher, forward and backward."""
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
    """Of one of them; None where it is unknown."""
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
        """The GPUs of this machine, or its CPU where there are none."""
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
    """What the GPUs send each other in a step."""

    what: str
    nbytes: int
    seconds: float
    hidden: float
    """Seconds of backward that it can hide behind."""
    exposed: float
    """Seconds that a step is longer for it."""
    link: float
    """Bytes per second."""
    source: str
    """Where the link's figure is from."""


def step_seconds(
    facts: Facts, batch: BatchPlan, gpu: Published, precision: str, strategy: str, reached: float = REACHED
) -> float:
    """Seconds of an optimizer step, by the model in this file's docstring.

    Args:
        strategy: single, dp, ddp, fsdp or deepspeed.
        reached: share of the published figures; 1.0 for the best that can be.
    """
    micro, accumulation, replicas = batch.micro_batch_size, batch.gradient_accumulation_steps, batch.num_replicas
    computing = facts.operations * micro / gpu.peak[precision] / reached
    moving = (4 * facts.activations(micro) + 3 * facts.weight_bytes) / gpu.bandwidth / reached
    micro_step = max(computing, moving, facts.operators * LAUNCH)
    optimizer = 2 * (facts.weight_bytes + facts.gradient_bytes + facts.optimizer_bytes) / gpu.bandwidth / reached
    between = 0.0
    if replicas > 1:
        between = exchange(facts, replicas, micro_step, gpu.link, "", strategy, accumulation).exposed
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
    """Of one step. What `strategy` sends: see torch's DistributedDataParallel, fully_shard and DataParallel.

    Args:
        micro_step: seconds of one, forward and backward.
        link: bytes per second from one GPU to the next; `source`: where that figure is from.
        accumulation: micro-steps in a step, in each of which dp sends all.
    """
    gradients, hidden = facts.gradient_bytes, micro_step * 2 / 3
    if strategy == "dp":
        nbytes = accumulation * (facts.weight_bytes + gradients)
        seconds = (replicas - 1) * nbytes / link
        what = f"weights out and gradients back through the first GPU, {size(nbytes)} to each other one,"
        return Exchange(what, nbytes, seconds, 0.0, seconds, link, source)
    seconds = 2 * (replicas - 1) / replicas * gradients / link
    what = f"an all-reduce of {size(gradients)} of gradients"
    if strategy == "fsdp":  # gathers the weights twice and scatters the gradients: three halves of an all-reduce
        seconds *= 1.5
        what = f"gathering {size(facts.weight_bytes)} of weights twice and scattering their gradients"
    last = min(1.0, BUCKET / gradients) if gradients else 0.0
    return Exchange(what, gradients, seconds, hidden, max(seconds - hidden, seconds * last), link, source)


def size(nbytes: float) -> str:
    """As people write it: 1.5 GiB, 20.0 MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
