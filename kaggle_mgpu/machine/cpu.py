"""This module counts the CPUs that a process may use under its affinity and control group."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cpu_count() -> int:
    """Return the number of usable CPUs, limited by affinity and by the container's quota (rounded up)."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    quota, period = _cpu_quota()
    if quota > 0 and period > 0:
        count = min(count, math.ceil(quota / period))
    return max(1, count)


def _cpu_quota() -> tuple[int, int]:
    """Return the container's CPU quota and period in microseconds; (0, 0) if unlimited."""
    words = (cgroup("cpu.max") or "").split()  # cgroup 2: "150000 100000" or "max 100000"
    if not words:  # cgroup 1: two files, -1 where unlimited
        words = [cgroup(f"cpu/cpu.cfs_{part}_us") or "0" for part in ("quota", "period")]
    try:
        return int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return 0, 0


def cgroup(name: str) -> str | None:
    """Return the text of a control-group file of this process, such as ``cpu.max``; None if missing."""
    folder = ""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        folder = next((line[4:] for line in lines if line.startswith("0::/")), "")
    except OSError:
        pass
    for path in (CGROUP / folder / name, CGROUP / name):
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return None


def threads_per_worker(nproc: int) -> int:
    """Return OMP_NUM_THREADS for each of ``nproc`` worker processes: the user's value, else an equal share of the CPUs.

    Raises:
        ValueError: ``nproc`` is less than 1.
    """
    if nproc < 1:
        raise ValueError(f"threads_per_worker: nproc is {nproc}, expected at least 1")
    own = os.environ.get("OMP_NUM_THREADS", "")
    return int(own) if own.isdecimal() and int(own) > 0 else max(1, cpu_count() // nproc)
