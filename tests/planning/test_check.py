"""The check: what it says of a machine that is well, and of each fault planted in one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kaggle_mgpu import check, devices, env
from kaggle_mgpu.launching import workers
from kaggle_mgpu.planning.check import Line, Report
from test_env import generated, package

ROOT = Path(__file__).resolve().parents[2]
REAL = check._in_worker


def status(report: Report) -> dict[str, str]:
    return {line.name: line.status for line in report.lines}


def line(report: Report, name: str) -> Line:
    return next(each for each in report.lines if each.name == name)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, used: int, count: int = 2) -> None:
    """A machine whose nvidia-smi tells of T4s with `used` MiB in use."""
    rows = "\n".join(f"{i}, GPU-{i}, Tesla T4, 15360, 7.5" for i in range(count))
    samples = "\n".join(f"{i}, 3, {used}, 15360, 40" for i in range(count))
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in *utilization*) echo "{samples}" ;; *) echo "{rows}" ;; esac\n')
    program.chmod(0o755)
    for name in ("QUERY_TIMEOUT", "SAMPLE_TIMEOUT"):  # a busy machine may be slow to start even a shell
        monkeypatch.setattr(devices, name, 600.0)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


# A machine that is well
def test_every_line_passes_and_this_process_stays_clean(tmp_path: Path) -> None:
    """As in a notebook: afterwards neither torch is imported nor a worker left, and the folder is as it was."""
    code = (
        "import sys, json, pathlib\n"
        "from kaggle_mgpu import check\n"
        f"report = check.run({str(tmp_path / 'new')!r})\n"
        "print(json.dumps({l.name: l.status for l in report.lines}))\n"
        "report._ipython_display_()\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
        "report.save('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    first, *text, modules = done.stdout.splitlines()
    found = json.loads(first)
    assert {name: found.pop(name) for name in ("GPUs", "peer access")} == dict.fromkeys(
        ("GPUs", "peer access"), "passed" if len(devices.gpus()) > 1 else "skipped"
    )
    assert list(found.values()) == ["passed"] * len(found)
    assert [*check.STAGES, "protobuf", "shared memory", "disk"] == [
        *(name for name in found if name in check.STAGES),
        *(name for name in found if name not in {*check.STAGES, "GPU memory"}),
    ]
    assert text[-1].startswith("this machine trains correctly")
    assert any("dp " in row and "ddp " in row for row in text)
    assert modules == "[]"
    assert not (tmp_path / "new").exists()
    assert json.loads((tmp_path / "done" / "result.json").read_text())["finished"] is True


# Faults. Each is planted in the workers, or in what they stand on
def last_step_alone(notes: str, folder: str) -> None:
    """Every rank keeps its own gradient: they are never added up."""
    from kaggle_mgpu.parallel import data_parallel

    data_parallel.Distributed.micro_step = lambda self, *, sync: self.parallel.no_sync()  # type: ignore
    REAL(notes, folder)


def world_size_forgotten(notes: str, folder: str) -> None:
    """DistributedDataParallel divides by the world size; whoever does not know gets a gradient that is too small."""
    from kaggle_mgpu.parallel import data_parallel

    prepare = data_parallel.Distributed.prepare

    def forgetful(self: Any, model: Any) -> Any:
        model = prepare(self, model)
        self.loss_multiplier = 1
        return model

    data_parallel.Distributed.prepare = forgetful  # type: ignore
    REAL(notes, folder)


def mean_of_replicas(notes: str, folder: str) -> None:
    """What DataParallel's gathered losses are usually made into."""
    from kaggle_mgpu.parallel import data_parallel

    data_parallel.Replicated.forward = lambda self, batch: self.parallel(batch, "losses").mean()  # type: ignore
    REAL(notes, folder)


def mean_of_means(notes: str, folder: str) -> None:
    """Each micro-batch divided by its own terms: what accumulation usually does."""
    from kaggle_mgpu.parallel import strategy

    backward = strategy.Strategy.backward

    def own(self: Any, batch: Any, weight: float, terms: Any) -> Any:
        return backward(self, batch, weight, lambda: int(batch["count"].sum()))

    strategy.Strategy.backward = own  # type: ignore
    REAL(notes, folder)


@pytest.mark.parametrize(
    ("plant", "wrong", "right"),
    [
        (last_step_alone, ["ddp"], ["dp"]),
        (world_size_forgotten, ["ddp"], ["dp"]),
        (mean_of_replicas, ["dp"], ["ddp"]),
        (mean_of_means, ["dp", "ddp"], []),
    ],
)
def test_a_wrong_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, wrong: list[str], right: list[str]
) -> None:
    monkeypatch.setattr(check, "_in_worker", plant)
    report = check.run(tmp_path)
    assert not report.ok
    assert [each.name for each in report.failed] == ["gradients"]
    found = report.failed[0]
    assert all(f" {name} differs by " in found.found for name in wrong), found.found
    assert not any(f" {name} differs by " in found.found for name in right), found.found
    assert "do not train with the strategy named here" in found.advice


def dies_before(stage: str) -> Callable[[], Any]:
    def dies(*_: Any) -> None:
        from kaggle_mgpu import distributed

        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier()

    return dies


def dies_at_once(notes: str, folder: str) -> None:
    dies_before("workers")()


def dies_in_the_all_reduce(notes: str, folder: str) -> None:
    """Rank 1, that is, while rank 0 is slow to write down what the stage before has found."""
    from kaggle_mgpu import distributed
    from kaggle_mgpu.planning import selftest as probes

    meet = distributed.barrier

    def leave_late() -> None:
        meet()
        time.sleep(0.5 if distributed.is_main() else 0)

    distributed.barrier = leave_late
    probes.all_reduce_bandwidth = dies_before("all-reduce")
    REAL(notes, folder)


@pytest.mark.parametrize(
    ("plant", "passed", "failed"),
    [(dies_at_once, [], "workers"), (dies_in_the_all_reduce, ["workers", "precision"], "all-reduce")],
)
def test_a_dead_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, passed: list[str], failed: str
) -> None:
    monkeypatch.setattr(check, "_in_worker", plant)
    monkeypatch.setattr(workers, "GRACE_SECONDS", 600.0)  # until it is told which of them was killed
    report = check.run(tmp_path)
    found = status(report)
    assert [name for name in passed if found[name] == "passed"] == passed
    assert [each.name for each in report.failed] == [failed]
    assert "rank 1 of 2 ended by SIGKILL (killed, most often for lack of memory" in report.failed[0].found
    after = check.STAGES[check.STAGES.index(failed) + 1 :]
    assert {found[name] for name in after} == {"skipped"}
    assert line(report, "checkpoint").found == f"not run, because the stage {failed} failed"


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "2m") as disk:
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        report = check.run(disk)
    assert [each.name for each in report.failed] == ["disk", "checkpoint"]
    assert report.failed[0].found == f"0.0 GiB free in {disk}"
    assert "DiskFullError" in report.failed[1].found or "No space left" in report.failed[1].found
    assert report.failed[1].advice.startswith("free some space")


def test_a_tiny_shared_memory() -> None:
    """Docker's default, mounted as /dev/shm where nobody else sees it."""
    code = "from kaggle_mgpu import check; print(check._shared_memory('/dev/shm'))"
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
    command = ["unshare", "--mount", "sh", "-c", mount + '"$0" "$@"', sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting takes root")
    assert "status='failed', found='/dev/shm has 64 MiB in all, but not 256 MiB free'" in done.stdout, done.stderr
    assert "set data_workers=0" in done.stdout


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    found = check._shared_memory(str(tmp_path / "none"))
    assert (found.status, found.found) == ("failed", f"{tmp_path / 'none'}: No such file or directory")


def test_a_bad_protobuf_pair_and_the_exit_code(tmp_path: Path) -> None:
    here = package(
        tmp_path / "site", google__protobuf__x="", tensorflow__core__framework__types_pb2=generated("5.28.3")
    )
    (here / "google/protobuf/__init__.py").write_text("__version__ = '4.25.8'\n")
    search = os.pathsep.join([str(here), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "kaggle_mgpu", "check", "--output-dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": search},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [row for row in done.stdout.splitlines() if row.startswith("failed")]
    assert len(rows) == 1
    assert "tensorflow: needs protobuf 5.28.3, but 4.25.8 is installed: pip install" in rows[0]
    assert done.stdout.splitlines()[-1].startswith("1 failed")


def test_what_came_too_late_for_others_is_no_fault_of_protobufs() -> None:
    late = env.Item("USE_TF", "0", "too late", "transformers is already imported: takes effect in new processes only")
    assert check._protobuf(env.Report((late,))).status == "passed"
    late = env.Item("protobuf GetPrototype", "", "too late", "tensorflow is already imported")
    assert check._protobuf(env.Report((late,))).status == "failed"


def test_one_gpu_has_lines_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on the CPU, and one on the GPU, which here is as blind as a driver that does not fit."""
    if devices.gpus():
        pytest.skip("this torch sees GPUs")
    smi(tmp_path, monkeypatch, used=100, count=1)
    report = check.run(tmp_path)
    found = status(report)
    assert {found[name] for name in ("workers", "all-reduce", "gradients", "checkpoint")} == {"passed"}
    assert [each.name for each in report.failed] == ["workers, GPU"]
    assert "precision" not in found and "precision, GPU" in found
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None


def test_a_protobuf_that_env_mends_passes() -> None:
    items = (
        env.Item("protobuf", "6.33.6", "found", "installed"),
        env.Item("protobuf GetPrototype", "", "shimmed", "this protobuf lacks the method"),
    )
    found = check._protobuf(env.Report(items))
    assert found == Line("protobuf", "passed", "protobuf 6.33.6; repaired by env.fix(): protobuf GetPrototype")


def test_a_torch_that_does_not_see_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if devices.gpus():
        pytest.skip("this torch sees GPUs")
    smi(tmp_path, monkeypatch, used=100)
    report = check.run(tmp_path)
    assert line(report, "GPUs").found == "0: Tesla T4, 1: Tesla T4; 2 GPUs: one process each, DistributedDataParallel"
    assert line(report, "GPU memory").found == "GPU 0: 14.9 of 15.0 GiB free, GPU 1: 14.9 of 15.0 GiB free"
    assert [each.name for each in report.failed] == ["workers"]
    assert "sees none of the 2 GPUs" in report.failed[0].found


def test_memory_that_somebody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, used=12000, count=1)
    (found,) = check._memory(devices.gpus())
    assert (found.status, found.found) == ("failed", "GPU 0: 3.3 of 15.0 GiB free")
    assert "restart this session" in found.advice


def test_a_wrong_sum_a_wrong_product_and_a_bad_save_fail() -> None:
    (total, peer) = check._judge_all_reduce(
        {"backend": "nccl", "ranks": 2, "gigabytes_per_s": 5.0, "right": False, "peers": False}
    )
    assert (total.status, peer.status) == ("failed", "passed")
    assert "nccl_p2p='off'" in total.advice
    (product,) = check._judge_precision({"precision": "fp16", "reason": "x", "differences": {"fp16": float("inf")}})
    assert (product.status, product.found) == (
        "failed",
        "fp16: x; a product of two matrices is wrong in fp16",
    )
    (nan,) = check._judge_gradients({"ddp": float("nan")})
    assert nan.status == "failed"
    report = Report((product, peer), 1.0)
    assert str(report).splitlines()[-1] == "1 failed (1.0 s)"


def test_a_failed_check_leaves_a_result_that_says_so(tmp_path: Path) -> None:
    report = Report((Line("disk", "failed", "0.0 GiB free in /x", "free some space"),), 1.0)
    said = json.loads(report.save(tmp_path / "out").read_text())
    assert (said["finished"], said["reason"]) == (False, "disk: 0.0 GiB free in /x")
    assert said["lines"][0]["advice"] == "free some space"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    report = check.run(tmp_path)
    assert report.ok, str(report)
    assert "GPU against CPU" in line(report, "gradients").found
