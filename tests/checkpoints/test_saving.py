"""Saves behind the training, on full disks, and damage of every kind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kaggle_mgpu import TrainConfig, checkpoint, progress, train
from kaggle_mgpu.checkpoints import Checkpoints, files
from kaggle_mgpu.errors import CheckpointError, DiskFullError
from kaggle_mgpu.progress.records import comparable
from tasks import Regression


def begin(checkpoints: Checkpoints, step: int, numbers: int = 300) -> None:
    checkpoints.begin(
        step,
        tensors={"model": {"weight": torch.full((numbers,), float(step))}},
        state={"optimizer": {"exp_avg": torch.full((5,), -float(step)), "lr": 0.5}},
        facts={"config": {}},
    )


def save(checkpoints: Checkpoints, step: int, numbers: int = 300) -> Path:
    begin(checkpoints, step, numbers)
    (saved,) = checkpoints.wait()
    assert saved.path is not None, saved.note
    return saved.path


def steps(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in checkpoint.all_in(folder))


class Gate:
    """`files.write` that waits, and then may fail."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.reached, self.open, self.error, self.write = threading.Event(), threading.Event(), error, files.write
        patch.setattr(files, "write", self)

    def __call__(self, path: Path, pieces: Any) -> dict[str, int]:
        self.reached.set()
        assert self.open.wait(600)
        if self.error is not None:
            raise self.error
        return self.write(path, pieces)


# Behind the training
def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpoints, weight = Gate(monkeypatch), Checkpoints(tmp_path), torch.ones(100)
    checkpoints.begin(1, tensors={"model": {"weight": weight}}, state={}, facts={})
    assert gate.reached.wait(600)
    weight.fill_(2.0)  # the next step
    assert checkpoints.all() == []
    assert not checkpoints.save_ended
    assert checkpoints.collect() == []
    gate.open.set()
    (saved,) = checkpoints.wait()
    assert (saved.step, saved.path, saved.note) == (1, tmp_path / "step-00000001", "")
    assert saved.seconds > 0
    assert (checkpoint.load(saved.path).tensors["model"]["weight"] == 1.0).all()


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpoints = Gate(monkeypatch), Checkpoints(tmp_path)
    begin(checkpoints, 1)
    second = threading.Thread(target=begin, args=(checkpoints, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second waits for the first"
    gate.open.set()
    second.join()
    assert [saved.step for saved in checkpoints.wait()] == [1, 2]
    for step in (1, 2):
        assert (checkpoint.load(tmp_path / f"step-{step:08d}").tensors["model"]["weight"] == step).all()


def test_a_save_that_ends_while_others_are_told_of_is_told_of_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, told = Checkpoints(tmp_path), []

    def saved(*values: Any) -> checkpoint.Saved:
        """In the writer's thread: between looking where to put the word of a save and putting it there."""
        if values[0] == 2:
            told.extend(checkpoints.collect())
        return Saved(*values)

    begin(checkpoints, 1)
    checkpoints._join()
    Saved = checkpoint.Saved  # noqa: N806
    monkeypatch.setattr(checkpoint, "Saved", saved)
    begin(checkpoints, 2)
    checkpoints._join()
    assert [each.step for each in told] == [1]
    assert checkpoints.save_ended
    assert [each.step for each in checkpoints.collect()] == [2]


def test_the_last_one_is_waited_for_also_when_an_error_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.open.set).start()

    def broken_run() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            begin(checkpoints, 1)
            raise KeyError

    with pytest.raises(KeyError):
        broken_run()
    assert checkpoint.damage(tmp_path / "step-00000001") is None


def test_an_error_is_told_at_the_next_question_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = save(checkpoints, 1)
    with monkeypatch.context() as patch:
        gate = Gate(patch, OSError(errno.EIO, "Input/output error"))
        gate.open.set()
        begin(checkpoints, 2)
        checkpoints._join()
    assert checkpoints.save_ended
    (failed,) = checkpoints.collect()
    assert failed.path is None
    assert isinstance(failed.error, OSError)
    assert (
        failed.note == "the checkpoint of step 2 was not saved: [Errno 5] Input/output error; the save will be repeated"
    )
    assert checkpoints.collect() == []
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert checkpoint.damage(first) is None
    save(checkpoints, 3)


def test_the_third_error_in_a_row_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Counting(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            seen.append(model.training)
            return super().loss(model, batch)

    begin = Checkpoints.begin

    def begin_and_fail(self: Checkpoints, step: int, **everything: Any) -> None:
        begin(self, step, **everything)
        self._join()  # it has failed before the next step begins
        assert self.save_ended

    monkeypatch.setattr(Checkpoints, "begin", begin_and_fail)
    gate = Gate(monkeypatch, OSError(errno.EROFS, "Read-only file system"))
    gate.open.set()
    settings = TrainConfig(output_dir=str(tmp_path), global_batch_size=50, save_every=1)
    monkeypatch.setattr(checkpoint, "write_text", lambda path, text: None)  # config.json is not what this is about
    with pytest.raises(OSError, match="Read-only file system"):
        train(settings, Counting())
    assert sum(seen) == 4  # in training


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"optimizer/hook is a function: a checkpoint holds only tensors, .* dictionaries"
    ):
        Checkpoints(tmp_path).begin(1, tensors={}, state={"optimizer": {"hook": print and (lambda: 0)}}, facts={})
    with pytest.raises(TypeError, match=r"has the key \(1, 2\): expected text or a whole number"):
        Checkpoints(tmp_path).begin(1, tensors={}, state={(1, 2): 3}, facts={})


def test_any_plain_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "none": None, "true": True, "int": 2**70, "float": 0.1, "nan": float("inf"), "text": "ü\n", "": "empty",
        "tuple": (1, [2, (3,)], {}), "numbers": {0: "a", 1: torch.tensor(2.5)}, "tensor": torch.arange(6).view(2, 3),
        "a/b": {"c": torch.ones(1)}, "dict": {"tensor": "x"},
    }  # fmt: skip
    path = Checkpoints(tmp_path).save(1, tensors={}, state=state, facts={})
    found = checkpoint.load(path).state
    assert torch.equal(found["tensor"], state.pop("tensor")) and found.pop("tensor") is not None
    assert found["numbers"].pop(1) == state["numbers"].pop(1)
    assert found.pop("a/b")["c"] == state.pop("a/b")["c"]
    assert found == state
    assert list(found) == list(state)
    assert type(found["tuple"][1][1]) is tuple


def test_what_it_writes_the_safetensors_library_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    odd = {
        "bool": torch.tensor([True, False, True]), "byte": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3).half(), "bfloat": torch.randn(3, 1).bfloat16(), "double": torch.randn(2).double(),
        "scalar": torch.tensor(7), "empty": torch.empty(0, 4), "transposed": torch.randn(3, 4).t(),
        "complex": torch.randn(2, dtype=torch.complex64), "float8": torch.randn(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    direct = tmp_path / "direct.safetensors"
    files.replace_tensors(direct, odd)
    held = files.Buffer().hold({"a": files.Layout.of({"x": torch.ones(3)}), "b": files.Layout.of(odd)})["b"]
    assert b"".join(held) == direct.read_bytes()
    found = load_file(direct)
    assert found.keys() == odd.keys()
    for name, tensor in odd.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name
    assert files.shapes(direct) == {name: tuple(tensor.shape) for name, tensor in odd.items()}


# A full disk
@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


MB = 250_000
"""float32 numbers in a megabyte"""


def test_a_full_disk_loses_nothing_and_says_what_is_missing(disk: Path) -> None:
    (disk / "other").write_bytes(bytes(5 * 10**6))
    checkpoints = Checkpoints(disk / "checkpoints", keep_last=4)
    first = save(checkpoints, 1, MB)
    begin(checkpoints, 2, 4 * MB)
    (saved,) = checkpoints.wait()
    assert saved.path is None
    free = shutil.disk_usage(disk).free
    assert "checkpoint of step 2 was not saved: the disk is full: 5,04" in saved.note, (
        saved.note
    )  # 4 MB, 1 MiB to spare
    assert saved.note.endswith(
        f" bytes needed, {free:,} free, and deleting older checkpoints would not make room. Free some space."
    )
    assert os.listdir(disk / "checkpoints") == ["step-00000001"]
    assert checkpoint.damage(first) is None
    with pytest.raises(DiskFullError, match="would not make room"):
        checkpoints.save(2, tensors={"model": {"w": torch.ones(4 * MB)}}, state={}, facts={})
    (disk / "other").unlink()
    save(checkpoints, 3, 4 * MB)
    assert steps(disk / "checkpoints") == [1, 3]


def test_the_oldest_are_dropped_where_that_makes_room(disk: Path) -> None:
    checkpoints = Checkpoints(disk / "checkpoints", keep_last=9)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, MB + MB // 2)
    begin(checkpoints, 5, MB + MB // 2)
    (saved,) = checkpoints.wait()
    assert saved.path is not None
    assert saved.note.endswith("Deleted to make room: step-00000001")
    assert "bytes needed" in saved.note
    assert steps(disk / "checkpoints") == [2, 3, 4, 5]
    begin(checkpoints, 6, 7 * MB)  # more than all but the newest would make
    (saved,) = checkpoints.wait()
    assert saved.path is None
    assert steps(disk / "checkpoints") == [2, 3, 4, 5], "none was dropped in vain"
    assert all(checkpoint.damage(path) is None for path in checkpoints.all())


def test_the_newest_valid_one_is_never_dropped(disk: Path) -> None:
    checkpoints = Checkpoints(disk / "checkpoints", keep_last=9)
    for step in (1, 2, 3):
        save(checkpoints, step, 2 * MB)
    for step in (2, 3):
        os.truncate(disk / "checkpoints" / f"step-{step:08d}" / "state.json", 9)
    begin(checkpoints, 4, 2 * MB)
    (saved,) = checkpoints.wait()
    assert saved.path is not None
    assert steps(disk / "checkpoints") == [1, 3, 4]


def test_a_quota_that_the_disk_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(checkpoints, step, MB)
    write, failures = os.write, [errno.EDQUOT]

    def limited(descriptor: int, data: Any) -> int:
        if failures and len(data) > 1000:
            raise OSError(failures.pop(), "Disk quota exceeded")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    begin(checkpoints, 4, MB // 2)
    (saved,) = checkpoints.wait()
    assert saved.path is not None
    assert steps(tmp_path) == [3, 4], "two were needed to make that room for certain"


class Large(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))


def written() -> None:
    """Wait for the checkpoint that is written behind the steps: a busy machine takes its time over it."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


def test_a_run_on_a_full_disk_goes_on_and_saves_once_there_is_room(disk: Path, tmp_path: Path) -> None:
    """0.8 MB a checkpoint; everything but the records fills the disk, and the records wait for room too."""

    class Filling(Large):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            self.calls += model.training
            if self.calls == 8 and model.training:
                written()
                with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                assert shutil.disk_usage(disk).free == 0
            if self.calls == 22 and model.training:
                written()  # else step 20 may still find the room that is made here
                (disk / "filler").unlink()
            return super().loss(model, batch)

    settings = TrainConfig(
        output_dir=str(disk / "run"), global_batch_size=50, epochs=3, save_every=5, log_every=1, eval_every=6
    )
    result = train(settings, Filling())
    assert (result.finished, result.step) == (True, 30)
    assert steps(disk / "run" / "checkpoints") == [5, 25, 30]
    records = progress.read(disk / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 31))
    notes = [r["text"] for r in records if r["kind"] == "note"]
    assert any(text.startswith("the checkpoint of step 10 was not saved: the disk is full: ") for text in notes)
    assert any("best/model.safetensors could not be written: the disk is full" in text for text in notes)
    twin = train(settings.replace(output_dir=str(tmp_path / "twin")), Large())
    assert (disk / "run" / "model.safetensors").read_bytes() == (
        Path(twin.output_dir) / "model.safetensors"
    ).read_bytes()
    assert comparable(records) == comparable(twin.records())


# Damage
def test_any_flipped_bit_is_recognised(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    chance = random.Random(5)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        positions = range(len(whole) * 8) if len(whole) < 100 else chance.sample(range(len(whole) * 8), 150)
        for bit in positions:
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            file.write_bytes(broken)
            problem = checkpoint.damage(path)
            if problem is None:  # of the JSON only blanks may change: the values are what is checked
                assert file.name == "state.json"
                assert json.loads(broken) == json.loads(whole)
        file.write_bytes(whole)
        assert checkpoint.damage(path) is None


def test_any_truncation_is_recognised(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for length in range(0, len(whole), 7):
            file.write_bytes(whole[:length])
            assert checkpoint.damage(path) is not None, (file.name, length)
        file.write_bytes(whole)


def test_a_foreign_folder_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    mine = save(checkpoints, 1)
    foreign = tmp_path / "step-00000009"
    foreign.mkdir()
    (foreign / "state.json").write_text(json.dumps({"global_step": 9}))
    (foreign / "pytorch_model.bin").write_bytes(b"\x80\x02")
    said: list[str] = []
    assert checkpoints.newest(said.append) == mine
    assert "state.json does not list a checkpoint's files" in said[0]
    with pytest.raises(CheckpointError, match="does not list a checkpoint's files"):
        checkpoint.load(foreign)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    train(TrainConfig(output_dir=str(tmp_path), global_batch_size=50, ema_decay=0.9, precision="fp16"), Regression())
    for path in checkpoint.all_in(tmp_path / "checkpoints"):
        for file in path.iterdir():
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                size = int.from_bytes(file.read_bytes()[:8], "little")
                json.loads(file.read_bytes()[8 : 8 + size])


# Rotation
def test_rotation_never_leaves_fewer_valid_ones_than_there_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 12):
        before = sum(checkpoint.damage(path) is None for path in checkpoints.all())
        save(checkpoints, step)
        after = sum(checkpoint.damage(path) is None for path in checkpoints.all())
        assert after >= before
        if step in (3, 7):
            os.truncate(checkpoints.all()[step % 2] / "model.safetensors", 5)
    assert steps(tmp_path) == [10, 11]


def test_what_a_checkpoint_relies_on_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "metrics.jsonl"
    records.write_text("{}\n")
    order: list[str] = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (order.append(f"flush {Path(path).name}"), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"rename {Path(b).name}"), replace(a, b)))
    save(Checkpoints(tmp_path / "checkpoints", flush_first=[records]), 1)
    name = f".writing-step-00000001-{os.getpid()}"
    assert order == [f"flush {name}", "flush metrics.jsonl", "rename step-00000001", "flush checkpoints"]


class Adapted(Regression):
    """Most of it is frozen and made anew each time; checkpoints hold the last layer."""

    def model(self) -> nn.Module:
        model = super().model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("3."))
        model.saved_names = frozenset({"3.weight", "3.bias"})
        return model


def test_what_a_model_says_it_is_saved_in_part_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = TrainConfig(max_steps=6, eval_every=2, save_every=2, ema_decay=0.5, output_dir=str(tmp_path / "whole"))
    whole = train(config, Adapted())
    halves = config.replace(output_dir=str(tmp_path / "halves"))
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for name in ("result.json", "model.safetensors", "checkpoints/step-00000006"):
        path = tmp_path / "halves" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(halves, Adapted())
    for name in ("model.safetensors", "best/model.safetensors", "checkpoints/step-00000006/model.safetensors"):
        then, now = (files.read_tensors(tmp_path / run / name) for run in ("whole", "halves"))
        assert sorted(then) == sorted(now) == ["3.bias", "3.weight"]
        assert all(torch.equal(then[key], now[key]) for key in then)
    torch.manual_seed(config.seed)
    fresh = Adapted().model()
    before = fresh[0].weight.clone()
    whole.load(fresh)
    assert torch.equal(fresh[3].weight, files.read_tensors(tmp_path / "whole" / "model.safetensors")["3.weight"])
    assert torch.equal(fresh[0].weight, before)
