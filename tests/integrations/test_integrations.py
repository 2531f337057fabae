"""Other libraries' loops in two processes: a run, a stop, a kill, and what a resumed run differs by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loops
from kaggle_mgpu import launch, progress
from kaggle_mgpu.errors import WorkerDiedError

LIBRARIES = {
    loops.by_hand: "torch",
    loops.plain_loop: "torch",
    loops.with_accelerate: "accelerate",
    loops.with_trainer: "transformers",
    loops.with_lightning: "lightning",
    loops.with_fabric: "lightning",
    loops.with_trl: "trl",
}
CASES = [pytest.param(loop, marks=pytest.mark.trl if name == "trl" else ()) for loop, name in LIBRARIES.items()]


@pytest.mark.parametrize("loop", CASES, ids=lambda loop: loop.__name__)
def test_a_loop_that_was_killed_or_stopped_ends_with_the_weights_of_one_that_was_not(
    loop: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(LIBRARIES[loop])
    whole, other = launch(loop, str(tmp_path / "whole"), nproc=2)
    assert whole[:2] == other[:2] == (True, loops.STEPS)
    assert torch.equal(whole[2], other[2])
    assert "no process group" not in capsys.readouterr().out

    with pytest.raises(WorkerDiedError, match="rank 1 of 2 ended by SIGKILL"):
        launch(loop, str(tmp_path / "cut"), 9, nproc=2)
    cut, _ = launch(loop, str(tmp_path / "cut"), nproc=2)
    starts = [record["step"] for record in progress.read(tmp_path / "cut") if record["kind"] == "start"]
    assert starts == [0, 8]
    assert cut[:2] == (True, loops.STEPS)
    difference = (cut[2] - whole[2]).abs().max().item()
    with capsys.disabled():
        print(f"\n{loop.__name__}: {difference} after a SIGKILL in mid-epoch")
    assert difference == 0.0

    stopped, _ = launch(loop, str(tmp_path / "stopped"), None, 5, nproc=2)
    assert not stopped[0]
    assert 5 <= stopped[1] < loops.STEPS
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert (result["finished"], result["reason"], result["step"]) == (False, "asked to stop", stopped[1])
    # the second session has no time at all: it stops after a step, with that step saved
    late, _ = launch(loop, str(tmp_path / "stopped"), None, None, 1e-3, nproc=2)
    assert stopped[1] < late[1] < loops.STEPS
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["reason"] == "time limit"
    ended, _ = launch(loop, str(tmp_path / "stopped"), nproc=2)
    assert ended[:2] == (True, loops.STEPS)
    assert torch.equal(ended[2], whole[2])
    records = progress.read(tmp_path / "stopped")
    steps = [record["step"] for record in records if record["kind"] == "start"]
    assert steps == [0, stopped[1], late[1]]
    assert {"train", "save", "stop"} <= {record["kind"] for record in records}
