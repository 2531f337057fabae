"""The dry run of `make gpu-proof`: every section, with a few steps of small models, on two pretend T4s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_proof as command
from kaggle_mgpu.planning import gpu_proof

SECTIONS = [section.__name__ for section in gpu_proof.SECTIONS]


@pytest.fixture(scope="module")
def lines(gpus: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("proof") / "gpu_proof.jsonl"
    gpu_proof.run(path, quick=True)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["section"]: line for line in found}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_of_the_proof_is_right(lines: dict[str, Any], section: str) -> None:
    assert lines[section]["right"], lines[section]


def test_a_section_fails_by_itself_and_in_time(
    gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: str, quick: bool) -> dict[str, Any]:
        raise ValueError("of a driver")

    def slow(folder: str, quick: bool) -> dict[str, Any]:
        raise AssertionError(subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False))

    monkeypatch.setattr(gpu_proof, "SECTIONS", {broken: 5, slow: 1, gpu_proof.facts: 20})
    found = {line["section"]: line for line in gpu_proof.run(tmp_path / "p.json")}
    assert found["broken"]["error"] == "ValueError: of a driver"
    assert found["slow"]["error"] == "TimeoutError: not done after 1 s"
    assert found["facts"]["right"]
    assert "WRONG  broken" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu_proof", str(tmp_path / "p.json")])
    with pytest.raises(RuntimeError, match=r"gpu_proof needs a GPU: .* Choose one in Settings > Accelerator"):
        command.main()
