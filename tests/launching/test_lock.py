"""One run at a time in a folder: real processes that train in the same one, one after the other, or killed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import TrainConfig, distributed, launch, progress, train
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.errors import LockedError
from kaggle_mgpu.launching import lock
from kaggle_mgpu.launching.lock import held
from tasks import Regression

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)


def config(folder: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(global_batch_size=50, max_steps=12, save_every=2, log_every=1, output_dir=str(folder))
    return plain.replace(**changes)


def until(true: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)


class Waiting(Regression):
    """Stands still at its `at`-th forward pass until there is a file `go` in `folder`."""

    name = "Regression"

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__()
        self._folder, self._at, self.calls = folder, at, 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += model.training
        if self.calls == self._at:
            (self._folder / "stands").touch()
            while not (self._folder / "go").exists():
                time.sleep(0.01)
        return super().loss(model, batch)


WAITING = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/launching"]
from test_lock import Waiting, config
from kaggle_mgpu import train
folder = Path(sys.argv[2])
train(config(folder / "run", data_workers=int(sys.argv[3])), Waiting(folder, 5))
"""


@contextlib.contextmanager
def waiting(folder: Path, data_workers: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains in folder/run, and stands still in step 5, when the checkpoint of step 4 is written."""
    command = [sys.executable, "-c", WAITING, str(ROOT / "tests"), str(folder), str(data_workers)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: (folder / "stands").exists(), process)
            until(lambda: (folder / "run" / "checkpoints" / "step-00000004").is_dir(), process)
            yield process
        finally:
            process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with waiting(tmp_path) as process:
        before = contents(run)
        for changes in ({}, {"resume": "never"}, {"lr": 7.0}):
            with pytest.raises(LockedError) as caught:
                train(config(run, **changes), Regression())
        host = re.escape(socket.gethostname())
        assert re.match(
            rf"another run trains in {re.escape(str(run))} \(process {process.pid} on {host}, since \d{{4}}-\d\d-\d\d "
            rf"\d\d:\d\d:\d\d UTC\), and two would write over each other's checkpoints and records\. Give this run "
            rf"another output_dir, or wait .* progress\.stop\('{re.escape(str(run))}'\) makes that run save and end\.$",
            str(caught.value),
        )
        progress.attach(run, follow=False)  # who only looks, may
        assert contents(run) == before
        (tmp_path / "go").touch()
        assert process.wait() == 0
    assert not (run / lock.FILE).exists(), "not a result that travels"
    train(config(tmp_path / "undisturbed"), Regression())
    final = [read_tensors(folder / "model.safetensors") for folder in (run, tmp_path / "undisturbed")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[1])
    # finished, it is anybody's
    assert train(config(run), Waiting(tmp_path, -1)).finished
    assert train(config(run, max_steps=14), Waiting(tmp_path, -1)).step == 14


@pytest.mark.parametrize("data_workers", [0, 1])
def test_after_a_kill_the_next_goes_on_at_once(
    data_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while loader processes, forked with the lock open, have not noticed that their parent is gone."""
    with waiting(tmp_path, data_workers) as process:
        process.kill()
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 600.0)
    assert f"process {process.pid} on" in (tmp_path / "run" / lock.FILE).read_text()
    result = train(config(tmp_path / "run"), Regression())
    assert (result.finished, result.step) == (True, 12)
    assert [r["step"] for r in progress.read(tmp_path / "run") if r["kind"] == "start"] == [0, 4]
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_forked_child_that_lives_on_has_no_part_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys, time\n"
        "from kaggle_mgpu.launching.lock import held\n"
        "with held(sys.argv[1]):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(LockedError, match=f"process {parent.pid} on"), held(tmp_path):
            pass
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it is still there
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 600.0)  # it may not have got to closing its copy yet
        with held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_a_forked_child_that_leaves_does_not_unlock(tmp_path: Path) -> None:
    with held(tmp_path):
        with held(tmp_path / "other"):
            child = os.fork()
            if not child:
                try:
                    raise SystemExit  # out of both, as an error in a forked process would
                except SystemExit:
                    file = next(iter(lock._held), None)
                    os._exit(file is not None)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(LockedError), held(tmp_path):
            pass


def test_it_is_free_after_the_end_after_an_error_and_for_other_folders(tmp_path: Path) -> None:
    class Broken(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            raise KeyError("broken")

    run = tmp_path / "run"
    with pytest.raises(KeyError):
        train(config(run), Broken())
    assert not (run / lock.FILE).exists()
    with held(tmp_path), held(tmp_path / "stage1"):  # a folder within another's, as stages have them
        assert train(config(run, max_steps=2), Regression()).finished
    assert [path.name for path in tmp_path.glob("**/.lock")] == []


def test_every_rank_hears_of_it(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", strategy="ddp", nproc=2, max_steps=2)
    with held(tmp_path / "run"):
        said = launch(_refused, settings, Regression(), nproc=2)
        assert [text.split(" trains in ")[0] for text in said] == ["another run", "another run"]
        # and before that the launcher, so that the logs of the run that is there stay
        (tmp_path / "run" / "logs" / "rank0.log").write_text("epoch 1\n")
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
            launch(train, settings, Regression())
        assert (tmp_path / "run" / "logs" / "rank0.log").read_text() == "epoch 1\n"
    assert launch(train, settings, Regression()).finished


def test_while_it_waits_it_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 3.0)
    passes = itertools.count()  # a second each time it looks, however long that takes
    monkeypatch.setattr(lock, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: float(next(passes))}))
    with held(tmp_path), pytest.raises(LockedError), held(tmp_path):
        pass
    said = capsys.readouterr().out
    assert said.startswith(f"waiting up to 3 s for the run in {tmp_path} (process {os.getpid()} on ")
    assert said.count("waiting") == 1


def test_a_run_that_comes_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad data"), held(tmp_path / "run"):
        raise ValueError("bad data")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_file_is_left_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("my thesis")
    run = tmp_path / "run"
    run.mkdir()
    if kind == "link":
        (run / ".lock").symlink_to(tmp_path / "precious.txt")
    elif kind == "fifo":
        os.mkfifo(run / ".lock")
    else:
        (run / ".lock").mkdir()
    with held(run), held(run):  # there is nothing to lock with
        pass
    assert (tmp_path / "precious.txt").read_text() == "my thesis"
    assert os.path.lexists(run / ".lock")


def test_a_lock_that_another_machine_removed_is_asked_for_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stale = os.path.samestat, [OSError(errno.ESTALE, "Stale file handle")]

    def samestat(*both: Any) -> bool:
        if stale:
            raise stale.pop()
        return real(*both)

    monkeypatch.setattr(os.path, "samestat", samestat)
    with held(tmp_path):
        assert not stale
        with pytest.raises(LockedError), held(tmp_path):
            pass


def _refused(settings: TrainConfig, task: Regression) -> str:
    lock.PATIENCE_SECONDS = 0.0
    try:
        train(settings, task)
    except LockedError as error:
        distributed.barrier()  # nobody else is in the middle of anything
        return str(error)
    return "trained"


def test_where_nothing_can_be_locked_it_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with held("/proc/nowhere"):  # read-only, for root too
        pass
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with held(tmp_path / "run"):
        assert train(config(tmp_path / "run", max_steps=2), Regression()).finished
    monkeypatch.setattr(lock, "fcntl", None)
    with held(tmp_path / "run"), held(tmp_path / "run"):
        assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_folder_that_was_removed_is_another_folder(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        with held(tmp_path / "run"):
            first = (tmp_path / "run" / lock.FILE).stat().st_ino
        with held(tmp_path / "run"):
            assert first
    with held(tmp_path / "run"):
        pass


COUNT = """
import sys
from pathlib import Path
from kaggle_mgpu.errors import LockedError
from kaggle_mgpu.launching.lock import held
folder, done = Path(sys.argv[1]), 0
while done < 40:
    try:
        with held(folder):
            (folder / "inside").touch(exist_ok=False)
            number = int((folder / "count").read_text())
            (folder / "count").write_text(str(number + 1))
            (folder / "inside").unlink()
            done += 1
    except LockedError:
        pass
"""


def test_of_many_that_come_and_go_only_one_is_ever_inside(tmp_path: Path) -> None:
    """The file goes with each that leaves, while others have it open: none may hold the lock of a file that is gone."""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == [b"", b"", b""]
    assert (tmp_path / "count").read_text() == "120"
