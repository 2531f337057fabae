"""The Makefile's targets over the command line: what they run, and two of them for real."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make`, with this environment instead of .venv."""
    command = ["make", "--no-print-directory", "-o", ".venv/installed", f"BIN={BIN}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gpu-info"], "-m kaggle_mgpu gpus"),
        (["memory-check"], "-m kaggle_mgpu gpus"),
        (["memory-check", "RECIPE=sft", "NUM_GPUS=2"], "-m kaggle_mgpu plan sft --variable 'NUM_GPUS=2'"),
        (["memory-check", "ON=T4x2", "CONFIG=a.yaml"], "-m kaggle_mgpu plan text_generation --config a.yaml --on T4x2"),
        (["train-distributed", "CONFIG=a.yaml", "NPROC=2", "OUTPUT_DIR=out", "ARGS=--epochs 3"],
         "-m kaggle_mgpu train text_generation --config a.yaml --nproc 2 --output-dir out --epochs 3"),
        (["train-deepspeed", "RECIPE=sft", "DEEPSPEED_CONFIG=zero2.json"],
         "-m kaggle_mgpu train sft --strategy deepspeed --deepspeed-config zero2.json"),
        (["train-distributed", "RECIPE=sft", "TRAIN_BATCH_SIZE=1", "TRAIN_GRAD_ACCUM=32", "NUM_GPUS=1"],
         "-m kaggle_mgpu train sft --variable 'NUM_GPUS=1' --variable 'TRAIN_BATCH_SIZE=1' "
         "--variable 'TRAIN_GRAD_ACCUM=32'"),
        (["tensorboard", "OUTPUT_DIR=out"], "-m tensorboard.main --logdir out"),
        (["tensorboard"], "-m tensorboard.main --logdir text_generation"),
    ],
)  # fmt: skip
def test_what_a_target_runs(arguments: list[str], line: str) -> None:
    done = make("-n", *arguments)
    assert done.returncode == 0, done.stderr
    assert [" ".join(row.split()) for row in done.stdout.splitlines()] == [f"{BIN}/python {line}"]


def test_an_unknown_variable_is_an_error() -> None:
    done = make("-n", "train-distributed", "TRIAN_BATCH_SIZE=1")
    assert done.returncode != 0
    assert "unknown variable TRIAN_BATCH_SIZE: expected PYTHON" in done.stderr
    assert "unknown variable TRIAN_BATCH_SIZE" in make("-n", "memory-check", "TRIAN_BATCH_SIZE=1").stderr
    done = make("-n", "train-distributed", "RECIPE=sft", "TRAIN_BATCHSIZE=1")
    assert "--variable 'TRAIN_BATCHSIZE=1'" in done.stdout, "the command line knows the guide's names, and suggests"


def test_the_recipe_is_what_the_file_of_settings_is_for(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model:\n  name: x\n")
    done = make("-n", "train-distributed", f"CONFIG={tmp_path / 'a.yaml'}")
    assert f"train sft --config {tmp_path / 'a.yaml'}" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("text", "variables", "folder"),
    [
        ('include: a.yaml\noutput_dir: "runs/one"  # of today\nmodel: x\n', [], "runs/one"),
        ("train:\n  output_dir: runs/two\n", [], "runs/two"),
        ('{"output_dir": "runs/three", "model": "x"}', [], "runs/three"),
        ("train:\n  output_dir: runs/two\n", ["TRAIN_OUTPUT_DIR=runs/four"], "runs/four"),
        ("model: x\noutput_dir: runs/one\n", ["OUTPUT_DIR=runs/five"], "runs/five"),
        ("train:\n  epochs: 3\n", [], "sft"),
    ],
)
def test_tensorboard_looks_where_the_run_writes(tmp_path: Path, text: str, variables: list[str], folder: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    given = [f"CONFIG={tmp_path / 'a.yaml'}", "RECIPE=sft" if text[0] == "{" else "NPROC=2", *variables]
    for target in ("train-distributed-tb", "train-deepspeed-tb", "tensorboard"):
        assert f"--logdir {folder}" in make("-n", target, *given).stdout.split("&")[0]
    assert " train sft " in make("-n", "train-distributed", *given).stdout


def test_the_guides_other_targets() -> None:
    assert "nothing to set up" in make("setup-accelerate").stdout
    assert "make demo" in make("help").stdout
    done = make("-n", "train-deepspeed-tb", "RECIPE=sft")
    assert "train sft --tensorboard --strategy deepspeed" in " ".join(done.stdout.split())


def test_tensorboard_runs_beside_a_run_and_ends_with_it(tmp_path: Path) -> None:
    """A stand-in for python: TensorBoard serves until it is ended, and the run takes until TensorBoard serves."""
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*tensorboard.main*) echo "$@ at http://localhost:6006/"; echo $$ > {pid}; exec sleep 600 ;;
*) until test -s {pid}; do sleep 0.1; done; echo "$@"; exit 3 ;;
esac
"""
    )
    python.chmod(0o755)
    done = make("train-distributed-tb", "RECIPE=sft", "OUTPUT_DIR=out", f"BIN={tmp_path}")
    said = [line for line in done.stdout.splitlines() if line.startswith("-m")]
    assert said == [
        "-m tensorboard.main --logdir out at http://localhost:6006/",
        "-m kaggle_mgpu train sft --tensorboard --output-dir out",
    ]
    assert done.returncode != 0, "as the run ended"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(60)


def test_gpu_info() -> None:
    done = make("gpu-info")
    assert done.returncode == 0, done.stderr
    assert "precision " in done.stdout


def test_memory_check(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "tiny.yaml").write_text(
        "tokenizer: byte\nn_layer: 1\nn_head: 1\nn_embd: 8\nblock_size: 16\nglobal_batch_size: 4\n"
    )
    data = f"ARGS=--data-path {tmp_path / 'text.txt'}"
    where = [f"CONFIG={tmp_path / 'tiny.yaml'}", f"OUTPUT_DIR={tmp_path / 'run'}"]
    done = make("memory-check", *where, data, "ON=L4")
    assert done.returncode == 0, done.stderr
    assert "memory per GPU  weights " in done.stdout
    assert "of 22.0 GiB" in done.stdout
