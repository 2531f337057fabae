"""Check in ten seconds whether this machine trains correctly.

    python -m kaggle_mgpu check                      # exit code 1 if a check failed
    from kaggle_mgpu import check; check.run()       # the same in a notebook cell

The report has a line for each check: passed, failed or skipped, the finding, and advice if there is any. Tests that
need torch or a GPU run in workers of `launch`, so this process neither imports torch nor creates a CUDA context. With
fewer than two GPUs the workers are two processes on the CPU; a single GPU is then tested in a third process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import env
from ..env import worker_server
from ..machine import devices, session

Status = Literal["passed", "failed", "skipped"]

TIMEOUT = 60.0
"""Seconds without a sign of life before the workers count as hanging. NCCL's first collective takes a few seconds."""
SHARED_MEMORY = 256 << 20
"""Free bytes expected in /dev/shm: four loader processes with two batches of up to 20 MB each, and NCCL's buffers
between GPUs without peer access. Docker's default of 64 MB is too small."""
DISK = 2 << 30
"""Free bytes expected for runs: five checkpoints (four kept, one being written) of a model of 30 M parameters, with
the weights and the two moments of Adam."""
MEMORY_FREE = 0.5
"""Expected free share of a GPU's memory."""
TOLERANCE = 1e-4
"""Allowed relative difference of two float32 gradients. Another order of addition changes a gradient by about 1e-6, and
a wrong scale by at least 0.01, since the numbers of terms in `selftest.gradients` are uneven."""
STAGES = ("workers", "precision", "all-reduce", "gradients", "checkpoint")
"""The tests in the workers, in this order."""

_ADVICE = {
    "workers": "the message says which worker ended and how. Restart the session; if memory was short, stop what else "
    "runs there",
    "precision": "the GPU or its driver computes wrongly: ask for another session; precision='fp32' avoids what failed",
    "all-reduce": "NCCL_DEBUG=INFO in the environment shows where NCCL stops. Set nccl_p2p='off' in the config (or "
    "NCCL_P2P_DISABLE=1); on T4s it is off already",
    "gradients": "do not train with the strategy named here: it would give another model. Use strategy='single' until "
    "the cause is known",
    "checkpoint": "free some space, or choose an output_dir that can be written to",
}


@dataclass(frozen=True)
class Line:
    """The finding of one check, with advice if there is any."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """The findings of :func:`run`. Print the report, or make it the last value of a notebook cell."""

    lines: tuple[Line, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all lines passed or were skipped."""
        return not self.failed

    @property
    def failed(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.status == "failed")

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        text = []
        for line in self.lines:
            text.append(f"{line.status:8} {line.name:{width}}  {line.found}")
            if line.advice:
                text.append(f"{'':8} {'':{width}}  -> {line.advice}")
        verdict = "this machine trains correctly" if self.ok else f"{len(self.failed)} failed"
        skipped = sum(line.status == "skipped" for line in self.lines)
        also = f"; {skipped} skipped" if skipped else ""
        return "\n".join([*text, f"{verdict}{also} ({self.seconds:.1f} s)"])

    def _ipython_display_(self) -> None:
        print(self)

    def save(self, folder: str | os.PathLike[str], **more: Any) -> Path:
        """Write the report to `folder`/result.json and return the path; `finished` is true if no line failed.

        Args:
            more: further JSON values to write.
        """
        path = Path(folder) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = "; ".join(f"{line.name}: {line.found}" for line in self.failed) or "finished"
        lines = list(map(asdict, self.lines))
        document = {"finished": self.ok, "reason": reason, "seconds": self.seconds, "lines": lines, **more}
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return path


def run(output_dir: str | os.PathLike[str] | None = None, shared_memory: str = "/dev/shm") -> Report:
    """Check this machine's GPUs, memory, disk, packages and training.

    Args:
        output_dir: the folder for runs. Its free space is checked, and a checkpoint is written there and read back.
            Default: Kaggle's working folder, or the current folder.
        shared_memory: the folder of the file system for shared memory.
    """
    started = time.monotonic()
    report = env.fix(verbose=False, start_workers=False)
    if not worker_server.running():
        worker_server.start()  # imports torch while this process checks the rest
    folder = Path(output_dir) if output_dir is not None else session.working()
    gpus = devices.gpus()
    lines = [_gpus(gpus), *_memory(gpus), _protobuf(report), _shared_memory(shared_memory), _disk(folder)]
    lines += _workers(gpus, folder)
    return Report(tuple(lines), time.monotonic() - started)


# --- without a worker -------------------------------------------------------------------------------


def _gpus(gpus: list[devices.GPU]) -> Line:
    found = devices.report()
    if not gpus:
        where = "Settings > Accelerator > GPU T4 x2" if session.on_kaggle() else "an NVIDIA GPU and its driver"
        return Line("GPUs", "skipped", f"none ({found.reason}): the other tests run on the CPU", f"to use one: {where}")
    names = ", ".join(f"{gpu.index}: {gpu.name}" for gpu in gpus)
    one = "choose 'GPU T4 x2' in Settings > Accelerator to use two" if len(gpus) == 1 and session.on_kaggle() else ""
    return Line("GPUs", "passed", f"{names}; {found.mode.partition(': choose')[0]}", one)


def _memory(gpus: list[devices.GPU]) -> list[Line]:
    if not gpus:
        return []
    load = {sample["index"]: (sample["memory_used"], sample["memory_total"]) for sample in devices.sample()}
    free = {i: (total - used, total) for i, (used, total) in load.items() if used is not None and total is not None}
    if not free:
        return [Line("GPU memory", "skipped", "nvidia-smi does not report the memory")]
    found = ", ".join(f"GPU {i}: {left / 2**30:.1f} of {size / 2**30:.1f} GiB free" for i, (left, size) in free.items())
    if any(left < MEMORY_FREE * total for left, total in free.values()):
        advice = "another process or notebook uses this memory: shut it down, or restart this session"
        return [Line("GPU memory", "failed", found, advice)]
    return [Line("GPU memory", "passed", found)]


def _protobuf(report: env.Report) -> Line:
    bad = ("refused", "broken")
    late = [item for item in report.items if item.action == "too late" and item.name.startswith("protobuf")]
    problems = [item for item in report.items if item.action in bad] + late
    versions = ", ".join(f"{item.name} {item.value}" for item in report.items if item.action == "found")
    if problems:
        found = "; ".join(f"{item.name} {item.value}".strip() + f": {item.why}" for item in problems)
        advice = "run the command in this line; import nothing before env.fix() has run, and restart the session"
        return Line("protobuf", "failed", found, advice)
    shimmed = [item.name for item in report.items if item.action == "shimmed"]
    done = f"; repaired by env.fix(): {', '.join(shimmed)}" if shimmed else ""
    return Line("protobuf", "passed", (versions or "not installed, not needed") + done)


def _shared_memory(path: str) -> Line:
    """Allocate shared memory, since a container may allow less than the file system shows."""
    name = "shared memory"
    advice = (
        "set data_workers=0: loader processes pass batches through shared memory, and die with SIGBUS when it is full. "
        "In a container of your own: docker run --shm-size=1g"
    )
    try:
        total = os.statvfs(path).f_frsize * os.statvfs(path).f_blocks
        file = tempfile.TemporaryFile(dir=path, prefix="kaggle_mgpu-")  # noqa: SIM115
    except OSError as error:
        return Line(name, "failed", f"{path}: {error.strerror}", advice)
    with file:
        try:
            os.posix_fallocate(file.fileno(), 0, SHARED_MEMORY)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return Line(name, "skipped", f"{path}: {error.strerror}")
            found = f"{path} has {total >> 20:,} MiB in all, but not {SHARED_MEMORY >> 20} MiB free"
            return Line(name, "failed", found, advice)
    return Line(name, "passed", f"{path}: {total >> 20:,} MiB, {SHARED_MEMORY >> 20} MiB of it could be allocated")


def _disk(folder: Path) -> Line:
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:,.1f} GiB free in {existing}"
    if free < DISK:
        expected = f"expected {DISK / 2**30:.0f} GiB"
        advice = f"a run keeps several checkpoints: free some space ({expected}), or lower keep_last"
        return Line("disk", "failed", found, advice)
    return Line("disk", "passed", found)


# --- with workers -----------------------------------------------------------------------------------


def _workers(gpus: list[devices.GPU], folder: Path) -> list[Line]:
    """Run the tests on all GPUs; with one GPU, in two CPU processes and then on the GPU; with none, on the CPU only."""
    if len(gpus) > 1:
        return _lines(*_launch(folder, len(gpus)), gpus, STAGES)
    with env.variables({"CUDA_VISIBLE_DEVICES": ""}):
        pair = _launch(folder, 2)
    if not gpus:
        return _lines(*pair, [], STAGES)
    alone = _lines(*_launch(folder, 1), gpus, ("workers", "precision", "gradients"))
    on_cpu = _lines(*pair, [], tuple(stage for stage in STAGES if stage != "precision"))
    return [*on_cpu, *(replace(line, name=f"{line.name}, GPU") for line in alone)]


def _lines(
    done: dict[str, Any], error: Exception | None, gpus: list[devices.GPU], stages: tuple[str, ...]
) -> list[Line]:
    """Return the lines of one launch: for each of `stages` the finding, the error, or "skipped"."""
    judges: dict[str, Callable[[Any], list[Line]]] = {
        "workers": lambda found: [_judge_workers(found, gpus)],
        "precision": _judge_precision,
        "all-reduce": _judge_all_reduce,
        "gradients": _judge_gradients,
        "checkpoint": _judge_checkpoint,
    }
    lines: list[Line] = []
    broken = next((stage for stage in STAGES if stage not in done), "")
    for stage in stages:
        if stage in done:
            lines += judges[stage](done[stage])
        # the error belongs to the stage `broken`; if `stages` lacks `broken`, the next of `stages` shows the error
        elif stage == broken or (broken not in stages and not any(line.status == "failed" for line in lines)):
            first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            lines.append(Line(stage, "failed", f"{type(error).__name__}: {first}", _ADVICE[broken]))
        else:
            lines.append(Line(stage, "skipped", f"not run, because the stage {broken} failed"))
    return lines


def _launch(folder: Path, count: int) -> tuple[dict[str, Any], Exception | None]:
    """Run the stages in workers; return the finding of each stage, and the error that ended the workers.

    The workers write the findings to files, so that no finding is lost when a worker dies.
    """
    from ..launching import launch

    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-check-") as notes:
        error = None
        try:
            launch(_in_worker, notes, str(folder), nproc=count, timeout=TIMEOUT, in_worker=True)
        except Exception as problem:
            error = problem
        return {path.stem: json.loads(path.read_text()) for path in Path(notes).glob("*.json")}, error


def _judge_workers(found: dict[str, Any], gpus: list[devices.GPU]) -> Line:
    where = ", ".join(dict.fromkeys(found["devices"]))
    if gpus and not any(found["on_gpu"]):
        advice = (
            "install a torch built for this driver's CUDA; on Kaggle restart the session: its image has such a torch"
        )
        return Line("workers", "failed", f"torch {found['torch']} sees none of the {len(gpus)} GPUs", advice)
    return Line("workers", "passed", f"{found['count']} launched, on {where}; torch {found['torch']}")


def _judge_precision(found: dict[str, Any]) -> list[Line]:
    wrong = [name for name, difference in found["differences"].items() if not difference < 0.02]
    status: Status = "failed" if wrong else "passed"
    text = f"{found['precision']}: {found['reason']}"
    if wrong:
        text += "; a product of two matrices is wrong in " + ", ".join(wrong)
    return [Line("precision", status, text, _ADVICE["precision"] if wrong else "")]


def _judge_all_reduce(found: dict[str, Any]) -> list[Line]:
    text = f"{found['backend']}, {found['ranks']} ranks: {found['gigabytes_per_s']:.2f} GB/s"
    if found["right"]:
        lines = [Line("all-reduce", "passed", text)]
    else:
        lines = [Line("all-reduce", "failed", f"{text}; the sum is wrong", _ADVICE["all-reduce"])]
    peers = found["peers"]
    if peers is None:
        return [*lines, Line("peer access", "skipped", "fewer than two GPUs")]
    text = "yes, between all GPUs" if peers else "no: NCCL copies through shared memory, as on Kaggle's T4s"
    return [*lines, Line("peer access", "passed", text)]


def _judge_gradients(found: dict[str, float]) -> list[Line]:
    wrong = {name: difference for name, difference in found.items() if not difference < TOLERANCE}
    if wrong:
        text = ", ".join(f"{name} differs by {difference:.2g}" for name, difference in wrong.items())
        text = f"against one device with the whole batch: {text}; expected a relative difference below {TOLERANCE:g}"
        return [Line("gradients", "failed", text, _ADVICE["gradients"])]
    text = ", ".join(f"{name} {difference:.1g}" for name, difference in found.items())
    return [Line("gradients", "passed", f"relative difference from one device's gradient: {text}")]


def _judge_checkpoint(found: dict[str, str]) -> list[Line]:
    if found["error"]:
        return [Line("checkpoint", "failed", found["error"], _ADVICE["checkpoint"])]
    return [Line("checkpoint", "passed", found["found"])]


# --- in a worker ------------------------------------------------------------------------------------


def _in_worker(notes: str, folder: str) -> None:
    """Run every stage on every rank; rank 0 writes the findings to files."""
    from ..parallel import distributed
    from . import selftest  # imports torch

    stages: dict[str, Callable[[], Any]] = {
        "workers": selftest.workers,
        "precision": selftest.precision,
        "all-reduce": selftest.all_reduce_bandwidth,
        "gradients": selftest.gradients,
        "checkpoint": lambda: selftest.save_and_load(folder) if distributed.is_main() else None,
    }
    for name in STAGES:
        distributed.alive()
        found = stages[name]()
        distributed.barrier()
        if distributed.is_main():
            note = Path(notes) / f"{name}.json"
            note.with_suffix(".part").write_text(json.dumps(found))
            note.with_suffix(".part").rename(note)
        distributed.barrier()  # the file is written before a rank can die in the next stage
