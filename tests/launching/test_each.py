"""launch_each: one job for each of two pretend GPUs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kaggle_mgpu import TrainConfig, launch_each, train
from kaggle_mgpu.errors import WorkerDiedError
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


def fold(number: int, ran: str, trouble: bool = True) -> dict[str, Any]:
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

    again = launch_each(fold, range(5), str(tmp_path), trouble=False)
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
