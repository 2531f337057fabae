"""Saves that fail: an error of the disk that passes, one that stays, a full disk at the end, weights damaged later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu import Result, TrainConfig, checkpoint, launch, progress, train
from kaggle_mgpu.checkpoints import Checkpoints, files
from kaggle_mgpu.errors import DiskFullError
from tasks import Regression
from test_saving import Large
from test_saving import disk as disk

EIO = OSError(errno.EIO, "Input/output error")
MODEL = "model.safetensors"


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Ten steps; a save after each."""
    settings = TrainConfig(output_dir=str(folder), global_batch_size=50, data_workers=0, log_every=1, save_every=1)
    return settings.replace(**changes)


def failing(patch: pytest.MonkeyPatch, wrong: Callable[[str, str], OSError | None]) -> None:
    """`os.replace` raises what `wrong(from, to)` gives; each save ends before the next step begins."""
    replace, begin = os.replace, Checkpoints.begin

    def replacing(source: Any, target: Any, **more: Any) -> None:
        if error := wrong(str(source), str(target)):
            raise error
        replace(source, target, **more)

    def begin_and_wait(self: Checkpoints, step: int, **contents: Any) -> None:
        begin(self, step, **contents)
        self._join()

    patch.setattr(os, "replace", replacing)
    patch.setattr(Checkpoints, "begin", begin_and_wait)


def notes(folder: Path) -> list[str]:
    return [record["text"] for record in progress.read(folder) if record["kind"] == "note"]


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.all_in(folder / "checkpoints")]


# An error that passes
@pytest.mark.parametrize("which", [1, 10])
def test_one_rename_that_fails_is_noted_and_the_next_save_is_written(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def wrong(source: str, target: str) -> OSError | None:
        if "checkpoints/step-" not in target:
            return None
        calls.append(target)
        return EIO if len(calls) == which else None

    failing(monkeypatch, wrong)
    result = train(config(tmp_path / "run"), Regression())
    assert result.finished
    assert [text for text in notes(tmp_path / "run") if "was not saved" in text] == [
        f"the checkpoint of step {which} was not saved: [Errno 5] Input/output error; the save will be repeated"
    ]
    assert steps(tmp_path / "run")[0] == 10  # where the last save failed, it was made again
    assert not list((tmp_path / "run").rglob(".writing-*"))


def test_two_failures_and_a_save_and_two_again_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def wrong(source: str, target: str) -> OSError | None:
        if "checkpoints/step-" not in target:
            return None
        calls.append(target)
        return EIO if len(calls) in (1, 2, 4, 5) else None

    failing(monkeypatch, wrong)
    assert train(config(tmp_path), Regression()).finished
    assert sum("was not saved" in text for text in notes(tmp_path)) == 4


def test_three_failures_in_a_row_end_the_run_and_say_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda source, target: EIO if "step-" in target and target[-1] in "456" else None)
    with pytest.raises(OSError, match=r"3 saves in a row failed, the last after step 6: Input/output error") as caught:
        train(config(tmp_path), Regression())
    assert f"the newest checkpoint is {tmp_path}/checkpoints/step-00000003" in str(caught.value)
    assert caught.value.errno == errno.EIO
    # the error is met after step 7, and the state in memory is saved before it ends the run
    assert steps(tmp_path) == [7, 3, 2, 1]
    monkeypatch.undo()
    assert train(config(tmp_path), Regression()).finished


def test_a_failed_save_is_tried_again_before_the_interval_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaggle_mgpu.training import saving

    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    calls: list[str] = []

    def wrong(source: str, target: str) -> OSError | None:
        calls.extend([target] * ("step-" in target))
        return EIO if "step-" in target and len(calls) == 1 else None

    failing(monkeypatch, wrong)
    train(config(tmp_path, save_every=3, epochs=1, max_steps=8), Regression())
    saved = [record["step"] for record in progress.read(tmp_path) if record["kind"] == "save"]
    assert saved == [4, 6, 8], "step 3 failed; without another try the next would be step 6"


def test_a_run_that_is_stopped_and_cannot_save_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(Regression):
        def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
            if model.training and (tmp_path / "metrics.jsonl").exists():
                progress.stop(tmp_path)
            return super().loss(model, batch)

    failing(monkeypatch, lambda source, target: EIO if "step-" in target else None)
    with pytest.raises(OSError, match=r"3 saves in a row failed, .* there is no checkpoint yet"):
        train(config(tmp_path, save_every=None), Stopping())
    assert not (tmp_path / "result.json").exists()


def test_what_is_trained_to_the_end_is_kept_where_only_checkpoints_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda source, target: EIO if "step-00000010" in target else None)
    result = train(config(tmp_path), Regression())
    assert result.finished
    assert any("3 saves in a row failed, the last after step 10" in text for text in notes(tmp_path))
    monkeypatch.undo()
    assert train(config(tmp_path), Regression()).step == 10
    assert files.crc32(tmp_path / MODEL) == result.weights["crc32"]


def test_the_best_weights_that_cannot_be_written_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []

    def wrong(source: str, target: str) -> OSError | None:
        if target.endswith("best/model.safetensors") and not failed:
            failed.append(target)
            return EIO
        return None

    failing(monkeypatch, wrong)
    result = train(config(tmp_path, eval_every=2), Regression())
    assert result.finished
    assert result.best is not None
    assert any("best/model.safetensors could not be written: Input/output error" in text for text in notes(tmp_path))


@pytest.mark.parametrize("times", [1, 3])
def test_the_final_weights_are_tried_three_times(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []

    def wrong(source: str, target: str) -> OSError | None:
        if target == str(tmp_path / MODEL) and len(failed) < times:
            failed.append(target)
            return EIO
        return None

    failing(monkeypatch, wrong)
    if times < 3:
        assert train(config(tmp_path), Regression()).finished
        return
    with pytest.raises(OSError, match=r"trained to the end, but .*model\.safetensors could not be written: Input/outp"):
        train(config(tmp_path), Regression())
    assert not (tmp_path / "result.json").exists()
    assert train(config(tmp_path), Regression()).finished


def test_a_rotation_that_fails_does_not_make_a_save_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda source, target: EIO if ".removing-" in target else None)
    assert train(config(tmp_path, keep_last=2), Regression()).finished
    assert steps(tmp_path) == list(range(10, 0, -1))
    assert any("older checkpoints could not be removed" in text for text in notes(tmp_path))


def first_save_fails(config: TrainConfig) -> Result:
    """`train` in a worker in which rank 0's first checkpoint cannot be renamed."""
    failed: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrong(source: str, target: str) -> OSError | None:
        if "checkpoints/step-" in target and not failed:
            failed.append(target)
            return EIO
        return None

    failing(patch, wrong)
    try:
        return train(config, Regression())
    finally:
        patch.undo()


def test_the_first_save_of_two_processes_fails(tmp_path: Path) -> None:
    settings = config(tmp_path, nproc=2, strategy="ddp", save_every=None, max_restarts=0)
    results = launch(first_save_fails, settings, nproc=2)
    assert all(result.finished for result in results)
    assert steps(tmp_path) == [10]
    assert any(text.startswith("the checkpoint of step 10 was not saved: [Errno 5]") for text in notes(tmp_path))


# A full disk at the end
def full(patch: pytest.MonkeyPatch, folder: Path, room: Callable[[], int]) -> None:
    """A disk that has no more room than `room` says for what is written outside the checkpoints."""
    write = files.write

    def writing(path: Path, pieces: Any) -> dict[str, int]:
        content = [bytes(piece) for piece in pieces]
        if path.parent == folder and path.name.endswith(MODEL) and sum(map(len, content)) > room():
            raise DiskFullError(errno.ENOSPC, "the disk is full")
        return write(path, content)

    patch.setattr(files, "write", writing)


def test_at_the_end_older_checkpoints_make_room(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real file system, filled up between the last save and the weights."""
    wait = Checkpoints.wait

    def wait_and_fill(self: Checkpoints) -> Any:
        done = wait(self)
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return done

    monkeypatch.setattr(Checkpoints, "wait", wait_and_fill)
    settings = config(disk / "run", save_every=2, log_every=10)
    result = train(settings, Large())
    assert result.finished
    kept = steps(disk / "run")
    assert kept[0] == 10 and len(kept) < 4
    assert files.crc32(disk / "run" / MODEL) == result.weights["crc32"]
    assert json.loads((disk / "run" / "result.json").read_text())["finished"] is True
    monkeypatch.undo()
    twin = train(settings.replace(output_dir=str(tmp_path)), Large())
    assert twin.weights == result.weights


def test_where_dropping_would_not_make_room_nothing_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 0 if path == tmp_path else 10**9)
    full(monkeypatch, tmp_path, lambda: 0)
    with pytest.raises(DiskFullError, match="trained to the end, but the disk has no room for"):
        train(config(tmp_path, max_steps=4), Regression())
    assert steps(tmp_path) == [4, 3, 2, 1]


# Weights that are damaged after the run
def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit(folder: Path) -> None:
    document = json.loads((folder / "result.json").read_text())
    document.pop("weights")  # as an older version wrote it
    (folder / "result.json").write_text(json.dumps(document))
    os.truncate(folder / MODEL, 100)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda folder: flip(folder / MODEL),
    "truncated": lambda folder: os.truncate(folder / MODEL, 200),
    "truncated to nothing": lambda folder: os.truncate(folder / MODEL, 0),
    "other weights": lambda folder: files.replace_tensors(folder / MODEL, {"a": torch.zeros(3)}),
    "truncated, of an older version": edit,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_of_a_finished_run_are_named_and_made_again(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, ema_decay=0.9, eval_every=5)
    result = train(settings, Regression())
    before = (tmp_path / MODEL).read_bytes()
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["weights"] == {"bytes": len(before), "crc32": files.crc32(tmp_path / MODEL)}
    DAMAGE[kind](tmp_path)
    capsys.readouterr()
    again = train(settings, Regression())
    said = capsys.readouterr().out
    assert f"{tmp_path / MODEL} is damaged: " in said
    assert "The file is written again from the newest checkpoint." in said
    assert "already finished" not in said
    assert (tmp_path / MODEL).read_bytes() == before
    assert (again.finished, again.step, again.metrics) == (True, 10, result.metrics)
    train(settings, Regression())
    assert "already finished after 10 steps" in capsys.readouterr().out


# Folders with another name than their step
def test_a_copied_checkpoint_is_told_by_the_step_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, max_steps=4), Regression())
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000012")
    result = train(config(tmp_path, max_steps=6), Regression())
    said = capsys.readouterr().out
    assert (result.finished, result.step) == (True, 6)
    assert "step-00000012 is of step 3" in said
    assert "step-00000004: step 4 of 6" in said


def test_a_renamed_checkpoint_gets_its_name_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, max_steps=4, keep_last=1), Regression())
    folder = tmp_path / "checkpoints"
    (folder / "step-00000004").rename(folder / "step-00000012")
    result = train(config(tmp_path, max_steps=6), Regression())
    assert (result.finished, result.step) == (True, 6)
    assert "going on from" in (said := capsys.readouterr().out) and "step-00000004: step 4 of 6" in said
