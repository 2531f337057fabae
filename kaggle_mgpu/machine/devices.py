"""This module lists GPUs with their abilities and current load, as ``nvidia-smi`` reports them.

torch is never imported and no CUDA context is created, so workers can be forked afterwards::

    from kaggle_mgpu import devices
    print(devices.report())
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from .. import env
from . import cpu, session
from .cpu import cpu_count

__all__ = ["GPU", "Report", "cpu_count", "gpus", "precision", "ram_bytes", "report", "sample", "select"]

Precision = Literal["fp32", "fp16", "bf16"]

QUERY_TIMEOUT = 20.0
"""Seconds to wait for the first answer of nvidia-smi, which may have to wake the driver."""
SAMPLE_TIMEOUT = 5.0
"""Seconds to wait for each later answer."""


@dataclass(frozen=True)
class GPU:
    """A GPU as listed by nvidia-smi; ``index`` is nvidia-smi's number, independent of CUDA_VISIBLE_DEVICES.

    ``memory_bytes`` is 0 if unknown; ``capability`` is CUDA's (major, minor), None if unknown."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int] | None
    uuid: str = ""


@dataclass(frozen=True)
class _Answer:
    gpus: tuple[GPU, ...]
    reason: str  # why the list is empty


# --- which GPUs -------------------------------------------------------------------------------------


def gpus() -> list[GPU]:
    """Return the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES, else of nvidia-smi.

    nvidia-smi is asked once; CUDA_VISIBLE_DEVICES is read at every call. :func:`report` says why the list is empty.
    """
    return list(_visible().gpus)


def select(gpu_ids: str | None) -> list[GPU]:
    """Return the GPUs listed in ``gpu_ids``, such as ``"0,1"``, in this order; all GPUs for None.

    Raises:
        ValueError: ``gpu_ids`` is not a list of numbers, or names a GPU twice or a missing GPU.
    """
    here = gpus()
    if gpu_ids is None:
        return here
    words = [word.strip() for word in gpu_ids.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"gpu_ids={gpu_ids!r}: expected numbers separated by commas, such as '0' or '0,1'")
    wanted = [int(word) for word in words]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"gpu_ids={gpu_ids!r} names a GPU twice: each one gets one process")
    by_index = {gpu.index: gpu for gpu in here}
    if missing := [index for index in wanted if index not in by_index]:
        names = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in here)
        there = f"available: {names}" if here else f"no GPU was found ({_visible().reason})"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES={visible})" if here and visible is not None else ""
        raise ValueError(f"gpu_ids={gpu_ids!r}: no GPU {missing[0]}; {there}{hint}; gpu_ids=None takes all GPUs")
    return [by_index[index] for index in wanted]


def _visible() -> _Answer:
    """Return all GPUs not hidden by CUDA_VISIBLE_DEVICES.

    The first invalid entry hides all later entries (CUDA C++ Programming Guide, "CUDA Environment Variables")."""
    answer = _installed()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not answer.gpus:
        return answer
    chosen: list[GPU] = []
    for word in map(str.strip, listed.split(",")):
        if word.isdecimal():
            matches = [gpu for gpu in answer.gpus if gpu.index == int(word)]
        else:  # a UUID may be shortened to a unique prefix
            matches = [gpu for gpu in answer.gpus if word and gpu.uuid.startswith(word)]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return _Answer(
        tuple(chosen), "" if chosen else f"CUDA_VISIBLE_DEVICES={listed!r} hides all {len(answer.gpus)} GPUs"
    )


def _installed() -> _Answer:
    program = shutil.which("nvidia-smi")
    if program is None:
        driver = ", although an NVIDIA driver is loaded" if env.nvidia_present() else ""
        return _Answer((), f"nvidia-smi is not on PATH{driver}")
    return _query(program)


@functools.lru_cache(maxsize=8)
def _query(program: str) -> _Answer:
    try:
        try:
            rows = _nvidia_smi(program, "index,uuid,name,memory.total,compute_cap", QUERY_TIMEOUT)
        except _SmiError as error:
            if "compute_cap" not in str(error):
                raise
            rows = [[*row, ""] for row in _nvidia_smi(program, "index,uuid,name,memory.total", QUERY_TIMEOUT)]
    except _SmiError as error:
        return _Answer((), str(error))
    found = []
    for index, uuid, name, memory, capability in rows:
        major, _, minor = capability.partition(".")
        known = major.isdecimal() and minor.isdecimal()
        mebibytes = _number(memory) or 0
        found.append(GPU(int(index), name, mebibytes * 2**20, (int(major), int(minor)) if known else None, uuid))
    return _Answer(tuple(found), "" if found else "nvidia-smi lists no GPU")


class _SmiError(Exception):
    """nvidia-smi gave no usable answer; the message gives the reason."""


def _nvidia_smi(program: str, fields: str, timeout: float) -> list[list[str]]:
    """Run nvidia-smi and return one row of values per GPU."""
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # an interrupt meant for the notebook does not reach nvidia-smi
        )
    except OSError as error:
        raise _SmiError(f"nvidia-smi does not start: {error}") from error
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Not subprocess.run, which waits for ever if the killed process is stuck in the driver.
        process.kill()
        if process.stdout is not None:
            process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        raise _SmiError(f"nvidia-smi gave no answer in {timeout:g} s: the driver hangs; restart the session") from None
    except BaseException:
        process.kill()
        raise
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if process.returncode != 0:
        raise _SmiError(f"nvidia-smi failed ({process.returncode}): {' '.join(lines)[:300] or 'no output'}")
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    if bad := [row for row in rows if len(row) != fields.count(",") + 1 or not row[0].isdecimal()]:
        raise _SmiError(f"nvidia-smi gave an answer that is not a table: {', '.join(bad[0])[:300]}")
    return rows


def _number(value: str) -> int | None:
    """Return an integer, or None for "[N/A]", "[Not Supported]" and the like."""
    return int(value) if value.isdecimal() else None


# --- precision --------------------------------------------------------------------------------------


def precision(choice: str, gpus: Sequence[GPU]) -> tuple[Precision, str]:
    """Return the precision for training on these GPUs, and the reason.

    "auto" is bf16 if every GPU has capability 8.0 (Ampere) or more, fp16 if every GPU has 7.0 (Volta; T4: 7.5) or more,
    else fp32. torch's ``is_bf16_supported()`` is not used, since it returns True for a T4, which only emulates bf16.

    Args:
        choice: auto, fp32, fp16 or bf16.
        gpus: the GPUs of the run; [] for the CPU.

    Raises:
        ValueError: `choice` has another value, or is bf16 on a GPU that only emulates bf16.
    """
    if choice not in ("auto", "fp32", "fp16", "bf16"):
        raise ValueError(f"precision={choice!r}: expected 'auto', 'fp32', 'fp16' or 'bf16'")
    capabilities = [gpu.capability for gpu in gpus]
    known = [capability for capability in capabilities if capability is not None]
    least = min(known, default=(0, 0))
    weakest = next((gpu for gpu in gpus if gpu.capability == least), None)
    label = f"{weakest.name} has capability {least[0]}.{least[1]}" if weakest else ""
    if choice == "bf16" and weakest and least < (8, 0):
        instead = "fp16" if least >= (7, 0) else "fp32"
        raise ValueError(
            f"precision='bf16': {label}, expected at least 8.0: it only emulates bf16, slowly. "
            f"Choose precision='{instead}', or 'auto'"
        )
    if choice != "auto":
        on_cpu = "; no GPU: slow on a CPU, useful only for tests" if not gpus and choice != "fp32" else ""
        return cast(Precision, choice), f"chosen{on_cpu}"
    if not gpus:
        return "fp32", "no GPU"
    if len(known) < len(capabilities):
        name = next(gpu.name for gpu in gpus if gpu.capability is None)
        return "fp32", (
            f"nvidia-smi does not report {name}'s capability: choose precision='fp16' or 'bf16' if this GPU supports it"
        )
    if least >= (8, 0):
        return "bf16", f"{label}: native bf16 from 8.0 on"
    if least >= (7, 0):
        return "fp16", f"{label}: fast fp16, no native bf16"
    return "fp32", f"{label}: no fast fp16 below 7.0"


# --- report and samples -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A Report is a printable summary: ``mode`` says how training uses the devices, ``reason`` why there is no GPU."""

    gpus: tuple[GPU, ...]
    precision: Precision
    precision_reason: str
    cpus: int
    ram_bytes: int
    mode: str
    reason: str = ""
    load: tuple[dict[str, int | None], ...] = ()
    """The load of each GPU (`sample`) at the time of the report; empty unless requested."""

    def __str__(self) -> str:
        lines = [self.mode + (f" ({self.reason})" if self.reason else "")]
        for gpu in self.gpus:
            memory = _gib(gpu.memory_bytes) if gpu.memory_bytes else "memory unknown"
            now = "".join(_in_words(each) for each in self.load if each["index"] == gpu.index)
            lines.append(f"  GPU {gpu.index}: {gpu.name}, {memory}{now}")
        lines.append(f"  precision {self.precision}: {self.precision_reason}")
        lines.append(f"  {self.cpus} CPU{'s' * (self.cpus != 1)}, {_gib(self.ram_bytes)} RAM")
        return "\n".join(lines)


def _in_words(load: dict[str, int | None]) -> str:
    """Return "; now 97 % busy, 13.7 GiB in use, 71 °C" for a GPU's load, without unknown values."""
    busy, used, heat = load["utilization"], load["memory_used"], load["temperature"]
    parts = [f"{busy} % busy"] if busy is not None else []
    parts += [f"{_gib(used)} in use"] if used is not None else []
    parts += [f"{heat} °C"] if heat is not None else []
    return f"; now {', '.join(parts)}" if parts else ""


def report(load: bool = False) -> Report:
    """Return a summary of this machine's hardware.

    Args:
        load: whether to include each GPU's utilization, memory in use and temperature.
    """
    answer = _visible()
    count = len(answer.gpus)
    if count > 1:
        mode = f"{count} GPUs: one process each, DistributedDataParallel"
    elif count == 1:
        advice = ": choose 'GPU T4 x2' in the notebook's Settings > Accelerator to use two"
        mode = "1 GPU" + advice * session.on_kaggle()
    else:
        mode = "no GPU: training uses the CPU"
    chosen, why = precision("auto", answer.gpus)
    now = tuple(sample()) if load else ()
    return Report(answer.gpus, chosen, why, cpu_count(), ram_bytes(), mode, answer.reason, now)


def ram_bytes() -> int:
    """Return the bytes of main memory that this process may use (machine's or container's limit), 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = _number(cpu.cgroup("memory.max") or cpu.cgroup("memory/memory.limit_in_bytes") or "")
    return min(total, limit) if limit else total


def sample() -> list[dict[str, int | None]]:
    """Return the load of each visible GPU, or [] if nvidia-smi gives no answer.

    Keys: ``index``, ``utilization`` (%), ``memory_used`` and ``memory_total`` (bytes), ``temperature`` (degrees C).
    A value is None if the GPU does not report it."""
    visible = [gpu.index for gpu in gpus()]
    program = shutil.which("nvidia-smi")
    if not visible or program is None:
        return []
    fields = "index,utilization.gpu,memory.used,memory.total,temperature.gpu"
    try:
        rows = {int(row[0]): [_number(value) for value in row] for row in _nvidia_smi(program, fields, SAMPLE_TIMEOUT)}
    except _SmiError:
        return []
    names = "index", "utilization", "memory_used", "memory_total", "temperature"
    samples = [dict(zip(names, rows[index], strict=True)) for index in visible if index in rows]
    for values in samples:
        for name in ("memory_used", "memory_total"):
            values[name] = None if (mebibytes := values[name]) is None else mebibytes * 2**20
    return samples


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
