"""What is read from nvidia-smi (a fake one on PATH), and what follows from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kaggle_mgpu import devices
from kaggle_mgpu.env import environment as env
from kaggle_mgpu.machine import GPU, cpu

ROOT = Path(__file__).resolve().parents[2]

T4 = "{i}, GPU-{i}aaa-bbb, Tesla T4, 15360, 7.5"
MACHINES = {
    "T4x2": [T4.format(i=0), T4.format(i=1)],
    "T4": [T4.format(i=0)],
    "A100": ["0, GPU-a100, NVIDIA A100-SXM4-40GB, 40960, 8.0"],
    "P100": ["0, GPU-p100, Tesla P100-PCIE-16GB, 16384, 6.0"],
    "H200": ["0, GPU-h200, NVIDIA H200, 143771, 9.0"],
    "mixed": [T4.format(i=0), "1, GPU-a100, NVIDIA A100-SXM4-40GB, 40960, 8.0"],
    "secretive": ["0, GPU-gb10, NVIDIA GB10, [N/A], [N/A]"],
}

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put an ``nvidia-smi`` with this body on PATH; the file it returns has one line for each time it ran."""
    for name in ("CUDA_VISIBLE_DEVICES", "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_IS_COMPETITION_RERUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(env, "NVIDIA_PATHS", ())
    for name in ("QUERY_TIMEOUT", "SAMPLE_TIMEOUT"):  # a busy machine may be slow to start even a shell
        monkeypatch.setattr(devices, name, 600.0)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def write(machine: str = "", body: str = "", samples: str = "") -> Path:
        calls = tmp_path / "calls"
        calls.touch()
        rows = "\n".join(MACHINES.get(machine, []))
        if not body:
            body = f'case "$1" in *utilization*) cat <<A\n{samples}\nA\n;; *) cat <<B\n{rows}\nB\n;; esac'
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{body}\n')
        program.chmod(0o755)
        devices._query.cache_clear()
        return calls

    return write


def test_two_t4(install: Install) -> None:
    calls = install("T4x2")
    assert devices.gpus() == [
        GPU(0, "Tesla T4", 15360 * 2**20, (7, 5), "GPU-0aaa-bbb"),
        GPU(1, "Tesla T4", 15360 * 2**20, (7, 5), "GPU-1aaa-bbb"),
    ]
    devices.gpus()
    assert calls.read_text().splitlines() == [
        "--query-gpu=index,uuid,name,memory.total,compute_cap --format=csv,noheader,nounits"  # asked once
    ]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1", [0, 1]),
        ("1,0", [1, 0]),
        ("1", [1]),
        ("GPU-1aaa-bbb,GPU-0", [1, 0]),
        ("GPU-", []),  # not one GPU alone
        ("0,-1,1", [0]),
        ("1,1,0", [1]),
        ("-1", []),
        ("", []),
        ("7", []),
    ],
)
def test_cuda_visible_devices(
    install: Install, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    install("T4x2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in devices.gpus()] == indices
    assert devices.report().reason == ("" if indices else f"CUDA_VISIBLE_DEVICES={visible!r} hides all 2 GPUs")


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(env, "NVIDIA_PATHS", ())
    assert devices.gpus() == []
    assert devices.sample() == []
    assert devices.report().reason == "nvidia-smi is not on PATH"
    monkeypatch.setattr(env, "NVIDIA_PATHS", (os.devnull,))
    assert devices.report().reason == "nvidia-smi is not on PATH, although an NVIDIA driver is loaded"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            r"\(18\): Failed to initialize NVML",
        ),
        ("exit 9", r"nvidia-smi failed \(9\): no output"),
        ("echo 'No devices were found'", "not a table: No devices were found"),
        ("exit 0", "nvidia-smi lists no GPU"),
    ],
)
def test_broken_nvidia_smi(install: Install, body: str, reason: str) -> None:
    install(body=body)
    assert devices.gpus() == []
    assert re.search(reason, devices.report().reason)
    assert str(devices.report()).startswith("no GPU: training uses the CPU (nvidia-smi")


def test_hanging_nvidia_smi_is_given_up_once(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "QUERY_TIMEOUT", 0.5)
    install(body="exec sleep 300")
    assert devices.gpus() == []
    asked_again = tmp_path / "asked again"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ntouch '{asked_again}'\n")
    assert devices.report().reason == "nvidia-smi gave no answer in 0.5 s: the driver hangs; restart the session"
    assert devices.sample() == []
    assert not asked_again.exists()


def test_not_executable_by_this_machine(install: Install, tmp_path: Path) -> None:
    install("T4")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF rubbish")
    assert devices.gpus() == []
    assert "nvidia-smi does not start" in devices.report().reason


def test_old_driver_without_compute_cap(install: Install) -> None:
    install(
        body="case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;;"
        " *) echo '0, GPU-0, Tesla T4, 15360';; esac"
    )
    assert devices.gpus() == [GPU(0, "Tesla T4", 15360 * 2**20, None, "GPU-0")]


def test_select(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("T4x2")
    assert [gpu.index for gpu in devices.select(None)] == [0, 1]
    assert [gpu.index for gpu in devices.select("1, 0")] == [1, 0]
    for wrong in ("", "0,", "zero", "-1", "0;1"):
        with pytest.raises(ValueError, match="expected numbers separated by commas, such as '0' or '0,1'"):
            devices.select(wrong)
    with pytest.raises(ValueError, match="gpu_ids='0,0' names a GPU twice"):
        devices.select("0,0")
    with pytest.raises(
        ValueError, match=r"gpu_ids='0,2': no GPU 2; available: 0 \(Tesla T4\), 1 \(Tesla T4\); gpu_ids=None"
    ):
        devices.select("0,2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ValueError, match=r"no GPU 0; available: 1 \(Tesla T4\) \(CUDA_VISIBLE_DEVICES=1\)"):
        devices.select("0")


def test_select_without_gpus(install: Install) -> None:
    install()
    assert devices.select(None) == []
    with pytest.raises(ValueError, match=r"no GPU 0; no GPU was found \(nvidia-smi lists no GPU\)"):
        devices.select("0")


@pytest.mark.parametrize(
    ("machine", "expected", "why"),
    [
        ("T4x2", "fp16", "Tesla T4 has capability 7.5: fast fp16, no native bf16"),
        ("A100", "bf16", "NVIDIA A100-SXM4-40GB has capability 8.0: native bf16 from 8.0 on"),
        ("H200", "bf16", "NVIDIA H200 has capability 9.0: native bf16 from 8.0 on"),
        ("P100", "fp32", "Tesla P100-PCIE-16GB has capability 6.0: no fast fp16 below 7.0"),
        ("mixed", "fp16", "Tesla T4 has capability 7.5: fast fp16, no native bf16"),
        (
            "secretive",
            "fp32",
            "nvidia-smi does not report NVIDIA GB10's capability: choose precision='fp16' or 'bf16' if this GPU "
            "supports it",
        ),
        ("none", "fp32", "no GPU"),
    ],
)
def test_auto_precision_and_its_reason(install: Install, machine: str, expected: str, why: str) -> None:
    install(machine)
    assert devices.precision("auto", devices.gpus()) == (expected, why)


def test_explicit_precision(install: Install) -> None:
    t4 = GPU(0, "Tesla T4", 0, (7, 5))
    p100 = GPU(0, "Tesla P100", 0, (6, 0))
    unknown = GPU(1, "GB10", 0, None)
    with pytest.raises(
        ValueError, match=r"Tesla T4 has capability 7\.5, expected at least 8\.0.*Choose precision='fp16'"
    ):
        devices.precision("bf16", [GPU(0, "A100", 0, (8, 0)), t4])
    with pytest.raises(ValueError, match="Choose precision='fp32'"):
        devices.precision("bf16", [p100])
    assert devices.precision("bf16", [unknown])[0] == "bf16"
    assert devices.precision("fp16", [p100]) == ("fp16", "chosen")
    assert devices.precision("fp32", [t4]) == devices.precision("fp32", []) == ("fp32", "chosen")
    for choice in ("fp16", "bf16"):
        assert devices.precision(choice, []) == (choice, "chosen; no GPU: slow on a CPU, useful only for tests")
    with pytest.raises(ValueError, match="precision='half': expected 'auto', 'fp32', 'fp16' or 'bf16'"):
        devices.precision("half", [t4])


def test_report_of_two_t4(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("T4x2")
    monkeypatch.setattr(devices, "cpu_count", lambda: 4)
    monkeypatch.setattr(devices, "ram_bytes", lambda: 31 * 2**30)
    assert str(devices.report()).splitlines() == [
        "2 GPUs: one process each, DistributedDataParallel",
        "  GPU 0: Tesla T4, 15.0 GiB",
        "  GPU 1: Tesla T4, 15.0 GiB",
        "  precision fp16: Tesla T4 has capability 7.5: fast fp16, no native bf16",
        "  4 CPUs, 31.0 GiB RAM",
    ]


def test_report_with_the_load(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("T4x2", samples="0, 97, 14000, 15360, 71\n1, [N/A], [N/A], 15360, [Not Supported]")
    assert str(devices.report(load=True)).splitlines()[1:3] == [
        "  GPU 0: Tesla T4, 15.0 GiB; now 97 % busy, 13.7 GiB in use, 71 °C",
        "  GPU 1: Tesla T4, 15.0 GiB",
    ]
    install("T4x2", samples="GPU is lost")
    assert devices.report(load=True) == devices.report()


def test_report_of_one_gpu_advises_on_kaggle_only(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("T4")
    assert devices.report().mode == "1 GPU"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    advice = "1 GPU: choose 'GPU T4 x2' in the notebook's Settings > Accelerator to use two"
    assert devices.report().mode == advice
    install("secretive")
    assert "  GPU 0: NVIDIA GB10, memory unknown\n" in str(devices.report())


def test_sample(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("T4x2", samples="0, 97, 14000, 15360, 71\n1, [N/A], [N/A], 15360, [Not Supported]")
    busy = {
        "index": 0,
        "utilization": 97,
        "memory_used": 14000 * 2**20,
        "memory_total": 15360 * 2**20,
        "temperature": 71,
    }
    silent = {
        "index": 1,
        "utilization": None,
        "memory_used": None,
        "memory_total": 15360 * 2**20,
        "temperature": None,
    }
    assert devices.sample() == [busy, silent]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.sample() == [silent]


def test_sample_is_empty_when_nvidia_smi_fails_later(install: Install) -> None:
    install("T4x2", samples="Unable to determine the device handle for GPU: GPU is lost")
    assert len(devices.gpus()) == 2
    assert devices.sample() == []


def test_ram_obeys_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CGROUP", tmp_path)
    machine = devices.ram_bytes()
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.ram_bytes() == machine
    (tmp_path / "memory.max").write_text("1048576\n")
    assert devices.ram_bytes() == 2**20


def test_looking_imports_no_torch(install: Install) -> None:
    install("T4x2")
    code = (
        "import sys; from kaggle_mgpu import devices; devices.QUERY_TIMEOUT = devices.SAMPLE_TIMEOUT = 600.0;"
        "print(len(devices.gpus())); print(devices.report()); devices.sample(); "
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = result.stdout.splitlines()
    assert lines[0] == "2", result.stderr
    assert lines[1] == "2 GPUs: one process each, DistributedDataParallel"
    assert lines[-1] == "set()"


@pytest.mark.gpu
@pytest.mark.skipif(not env.nvidia_present(), reason="needs an NVIDIA GPU")
def test_agrees_with_torch() -> None:
    import torch

    found = devices.gpus()
    assert len(found) == torch.cuda.device_count()
    for number, gpu in enumerate(found):
        assert gpu.capability == torch.cuda.get_device_capability(number)
    assert len(devices.sample()) == len(found)
