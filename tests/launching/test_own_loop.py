"""Launched loops that are not the kit's: plain DDP scripts, their process group, their mistakes."""

from __future__ import annotations

import runpy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kaggle_mgpu import distributed, launch, watch

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def main():
    dist.init_process_group({backend})
    model = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.init.ones_(model.module.weight)
    model(torch.full((1, 2), float(os.environ["RANK"]))).sum().backward()
    optimizer.step()
    print("world", dist.get_world_size(), "local rank", os.environ["LOCAL_RANK"])
    global weight
    weight = model.module.weight.flatten().tolist()
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("backend", ['"gloo"', "", '"gloo", init_method="env://"'])
def test_a_plain_script_makes_its_own_process_group(
    tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(backend=backend))

    def function() -> Any:
        before = distributed.rank(), distributed.world_size()
        weight = runpy.run_path(str(script), run_name="__main__")["weight"]
        # after the script has left its group, the kit's collectives make another
        return before, weight, distributed.sum(1)

    first, second = launch(function, nproc=2)
    # the mean of the two ranks' gradients, 0 and 1
    assert first == ((0, 2), pytest.approx([0.95, 0.95]), 2)
    assert second == ((1, 2), pytest.approx([0.95, 0.95]), 2)
    said = capsys.readouterr().out
    assert "world 2 local rank 0" in said
    assert "WARNING" not in said


def test_numbers_travel_beside_a_group_that_serves_gpus_alone() -> None:
    def function() -> Any:
        dist.init_process_group("cuda:gloo")  # as "nccl" does, it takes no tensor of the CPU
        mine = distributed.rank()
        votes = distributed.RankVote().vote(mine == 1)
        return distributed.sum(mine + 1), distributed.gather(mine), distributed.broadcast(mine), votes

    assert launch(function, nproc=2) == [(3, [0, 1], 0, [True])] * 2


def without_init() -> None:
    dist.all_reduce(torch.ones(1))


def init_too_late() -> None:
    distributed.barrier()
    dist.init_process_group("gloo")


@pytest.mark.parametrize(
    ("function", "advice"),
    [
        (without_init, "makes its process group itself"),
        (init_too_late, "has made the group already"),
        (lambda: torch.multiprocessing.spawn(lambda rank: None, nprocs=2), "one process for each GPU already"),
    ],
)
def test_an_error_of_torch_is_given_the_next_step(function: Callable[[], None], advice: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 (whichever torch raises)
        launch(function, nproc=2)
    assert any(advice in note for note in raised.value.__notes__)


def test_one_process_makes_its_group_in_a_worker() -> None:
    def function() -> int:
        dist.init_process_group("gloo")
        return dist.get_world_size()

    assert launch(function, nproc=1, in_worker=True) == [1]
    with pytest.raises(ValueError, match="RANK expected") as raised:
        launch(function, nproc=1)
    assert "in_worker=True" in raised.value.__notes__[0]


def signs_of_life() -> int:
    pulse: Any = distributed._pulse
    assert pulse[0] == -1, (
        "a step would start the default time limit, and a silent evaluation of an hour would be a hang"
    )
    return int(pulse[1])


def trains(folder: str, steps: int, events: bool) -> int:
    import os

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    if events:
        file = open(Path(folder) / f"events.out.tfevents.{os.getpid()}", "w")  # noqa: SIM115 (as SummaryWriter does)
    for _ in range(steps):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    if events:
        file.close()
    return signs_of_life()


def test_ranks_that_train_apart_are_warned_and_so_are_two_writers_of_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(trains, str(tmp_path), 4, False, nproc=2) == [4, 4]
    said = capsys.readouterr().out
    assert "the 2 ranks train without a process group" in said
    assert "TensorBoard" not in said
    launch(trains, str(tmp_path), 4, True, nproc=2)
    assert f"rank 1 has written TensorBoard events too, to {tmp_path}" in capsys.readouterr().out
    launch(trains, str(tmp_path), 4, True, nproc=1, in_worker=True)
    assert capsys.readouterr().out == ""


def watched(folder: str) -> int:
    model = nn.Linear(1, 1)
    with watch(folder, max_steps=1, model=model) as run:
        run.step()
    return run.steps_taken


def test_a_watched_loop_without_a_group_of_its_own_is_warned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(watched, str(tmp_path), nproc=2) == [1, 1]
    assert "the 2 ranks have no process group, so each trains a model of its own" in capsys.readouterr().out


def loaded(folder: str, kind: str) -> int:
    dist.init_process_group("gloo")
    data, model = TensorDataset(torch.randn(16, 1)), nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    loader = {
        "same": lambda: DataLoader(data, 4, shuffle=True),
        "shared": lambda: DataLoader(data, 4, sampler=DistributedSampler(data)),
        "batches of its own": lambda: DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
    }[kind]()
    with watch(folder, max_steps=2, model=model) as run:
        for (x,) in run.batches(loader):
            model(x).sum().backward()
            run.step()
    return run.steps_taken


@pytest.mark.parametrize(("kind", "warned"), [("same", True), ("shared", False), ("batches of its own", False)])
def test_a_watched_loader_that_gives_all_ranks_the_same_samples_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, warned: bool
) -> None:
    assert launch(loaded, str(tmp_path), kind, nproc=2) == [2, 2]
    assert ("the loader has no DistributedSampler" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(("name", "meant"), [("nprocs", "nproc"), ("num_gpus", "nproc"), ("gpu_id", "gpu_ids")])
def test_a_misspelt_argument_of_launch_is_told_from_the_functions_own(name: str, meant: str) -> None:
    def main(folder: str = "") -> None: ...

    with pytest.raises(TypeError, match=rf"^main has no parameter '{name}'. Did you mean launch's '{meant}'\?$"):
        launch(main, **{name: 2})
    assert launch(lambda **given: given, **{name: 2}) == [{name: 2}]


def test_a_script_that_spawns_runs_in_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spawning.py").write_text(
        textwrap.dedent("""
            import os, sys
            import torch, torch.distributed as dist, torch.multiprocessing as mp

            def child(rank, world, file):
                dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
                total = torch.ones(1)
                dist.all_reduce(total)
                open(f"{file}-{rank}", "w").write(str(total.item()))
                dist.destroy_process_group()  # torch 2.10 may abort at the end of a process that leaves it to the exit

            def main(file):
                mp.spawn(child, args=(2, file), nprocs=2)
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def function() -> None:
        import spawning

        spawning.main(str(tmp_path / "met"))

    launch(function, nproc=1, in_worker=True)
    assert [(tmp_path / f"met-{rank}").read_text() for rank in range(2)] == ["2.0", "2.0"]
