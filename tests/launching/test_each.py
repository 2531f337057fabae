"""launch_each: one job for each of two pretend GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kaggle_mgpu import TrainConfig, launch_each, train
from kaggle_mgpu.env import worker_server
from kaggle_mgpu.errors import LockedError, WorkerDiedError, WorkerError
from kaggle_mgpu.launching import each, launcher, lock
from tasks import Regression

SMI = "#!/bin/sh\nprintf '0, GPU-a, Tesla T4, 15360, 7.5\\n1, GPU-b, Tesla T4, 15360, 7.5\\n'\n"


@pytest.fixture(autouse=True)
def two_pretend_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kaggle_mgpu.machine import devices

    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "QUERY_TIMEOUT", 600.0)


def fold(number: int, ran: str) -> dict[str, Any]:
    trouble = not Path(ran, "calm").exists()
    Path(ran, f"{number}-{os.getpid()}").touch()
    if trouble and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble and number == 3:
        raise ValueError("no data for fold 3")
    return {"fold": number, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "world": os.environ["WORLD_SIZE"]}


def test_a_failed_job_leaves_the_others_alone_and_only_unfinished_jobs_run_again(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup, match="2 of 5 jobs failed") as caught:
        launch_each(fold, range(5), str(tmp_path))
    died, failed = caught.value.exceptions
    assert isinstance(died, WorkerDiedError) and isinstance(failed, ValueError)
    assert "in job fold3" in failed.__notes__[-1]
    results: list[Any] = caught.value.results  # type: ignore[attr-defined]
    assert [result and result["fold"] for result in results] == [0, None, 2, None, 4]
    assert {result["gpu"] for result in results if result} <= {"0", "1"}
    assert {result["world"] for result in results if result} == {"1"}

    (tmp_path / "calm").touch()
    again = launch_each(fold, range(5), str(tmp_path))
    assert [result["fold"] for result in again] == [0, 1, 2, 3, 4]
    runs = [int(path.name.partition("-")[0]) for path in tmp_path.glob("?-*")]
    assert sorted(runs) == [0, 1, 1, 2, 3, 3, 4]


def slow(number: int) -> int:
    Path(f"started-{number}").touch()
    time.sleep(0.1 if number == 0 else 1000.0)
    return number


def test_an_interrupt_stops_the_jobs_at_work_and_starts_no_other(tmp_path: Path) -> None:
    def stop() -> None:
        files = [Path(name) for name in ("started-1", "started-2", "folds/fold0/value.json")]
        while not all(file.exists() for file in files):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    assert launch_each(slow, range(4)) == [0, None, None, None]
    assert not Path("started-3").exists()


def test_configs_are_trained_each_in_a_folder_of_its_own(tmp_path: Path) -> None:
    config = TrainConfig(max_steps=3, global_batch_size=8, output_dir="out")
    results = launch_each(train, [config.replace(lr=lr) for lr in (1e-3, 1e-2)], Regression())
    assert [result.step for result in results] == [3, 3]
    assert [Path(result.output_dir).name for result in results] == ["fold0", "fold1"]
    assert all(result.world_size == 1 for result in results)


def test_a_config_whose_folder_another_run_holds_fails_and_leaves_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    log = Path("held/logs/rank0.log")
    with lock.held("held"):
        log.parent.mkdir()
        log.write_text("epoch 1\n")
        with pytest.raises(ExceptionGroup) as caught:
            launch_each(train, [TrainConfig(max_steps=1, output_dir="held")], Regression())
        assert isinstance(caught.value.exceptions[0], LockedError)
        assert log.read_text() == "epoch 1\n"


def test_the_logs_of_a_launch_that_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(launcher, "KEPT_LOGS", 1 - 100)  # it removes up to a hundred
    with launcher._logs(None) as first, launcher._logs(None):
        assert first.is_dir()
    with launcher._logs(None):
        assert not first.exists()


def scaled(number: int, scale: int = 1) -> int:
    return number * scale


def cancelled(number: int) -> None:
    raise asyncio.CancelledError


def part(number: int) -> dict[str, Any]:
    return {"number": number, "finished": False}


def pair(number: int) -> tuple[int, int]:
    return number, number


def test_a_value_that_json_does_not_hold_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_each(pair, range(2)) == [(0, 0), (1, 1)]
    assert (
        "the values of fold0, fold1 could not be saved as JSON, so the same call computes them again."
        in capsys.readouterr().out
    )


def test_a_value_is_kept_for_the_same_call_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_each(scaled, range(2)) == [0, 1]
    assert launch_each(scaled, range(2)) == [0, 1]
    assert "kept from an earlier launch: fold0, fold1" in capsys.readouterr().out
    assert launch_each(scaled, range(2), scale=10) == [0, 10]
    assert launch_each(part, range(1)) == [{"number": 0, "finished": False}]
    assert "kept" not in capsys.readouterr().out
    assert launch_each(part, range(1)) == [{"number": 0, "finished": False}]
    assert "kept" not in capsys.readouterr().out
    with pytest.raises(ExceptionGroup) as caught:
        launch_each(cancelled, range(1))
    (error,) = caught.value.exceptions
    assert isinstance(error, WorkerError) and "CancelledError" in str(error) and "in job fold0" in error.__notes__[-1]


CELL = """
class Model:
    def size(self): return 1 if "a" in {"a", "b", "c", "d"} else 0
def helper(): return Model().size()
def job(number): return number + helper()
"""


def cell(source: str, file: str) -> Any:
    """The function `job` of a notebook's cell, which IPython compiles with a file name of the process's own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return names["job"]


def test_a_digest_is_of_code_and_values_and_not_of_the_process() -> None:
    import torch

    first = each._digest(cell(CELL, "/tmp/ipykernel_1/1.py"))
    assert first and first == each._digest(cell(CELL, "/tmp/ipykernel_2/2.py"))
    assert first != each._digest(cell(CELL.replace("return 1", "return 2"), "/tmp/ipykernel_1/1.py"))
    assert each._digest(scaled) not in (None, each._digest(part))
    values = torch.arange(5000.0)
    other = values.clone()
    assert each._digest(values) == each._digest(other)
    assert each._digest(values.numpy()) == each._digest(other.numpy())
    other[2500] = 0
    assert repr(values.numpy()) == repr(other.numpy()) and each._digest(values.numpy()) != each._digest(other.numpy())
    assert each._digest(values) != each._digest(other)
    assert each._digest(threading.Lock()) is None


def stops_early(number: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    Path("early").touch()
    while not stopped:
        time.sleep(0.02)
    return number


def test_a_value_returned_after_an_interrupt_is_not_kept() -> None:
    def stop() -> None:
        while not Path("early").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    assert launch_each(stops_early, [7]) == [7]
    assert not Path("folds/fold0/value.json").exists()


def waits_for(number: int) -> int:
    """Return the number; job 0 ends once job 2, which starts after a watched file has changed, has begun."""
    Path(f"began-{number}").touch()
    while number == 0 and not Path("began-2").exists():
        time.sleep(0.02)
    return number


def test_a_file_that_changes_ends_no_job_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_server, "_is_current", lambda watched: not Path("began-0").exists())
    assert launch_each(waits_for, range(3)) == [0, 1, 2]


def test_threads_share_one_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server, start = worker_server.ready([]), worker_server.start
    server.process.kill()
    server.process.wait()

    def start_late() -> worker_server.Server:
        time.sleep(0.3)  # both threads have seen by now that there is no server
        return start()

    monkeypatch.setattr(worker_server, "start", start_late)
    monkeypatch.setattr(worker_server, "_has_imported", lambda *_, patient: True)  # this test needs no import
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(worker_server.ready([]).process.pid)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 2 and found[0] != server.process.pid
