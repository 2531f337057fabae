"""The things ranks do together, alone and in two or three real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from kaggle_mgpu import TrainConfig, distributed, launch, progress, train
from kaggle_mgpu.parallel import distributed as module
from kaggle_mgpu.parallel.distributed import RankVote
from kaggle_mgpu.training import build_parts, take_step
from tasks import Language

ROOT = Path(__file__).resolve().parents[2]


class TestAWorldOfOne:
    def test_who_am_i(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "3")  # left over from something else: no process group, no such rank
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert not distributed.active()
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)
        assert distributed.is_main()

    def test_everything_gives_back_what_it_got(self) -> None:
        assert distributed.sum(3) == 3
        assert distributed.sum(0.5) == 0.5
        assert distributed.sum_later(7)() == 7
        assert distributed.agree(True) is True
        assert distributed.agree(False) is False
        value = {"a": object()}  # never pickled
        assert distributed.broadcast(value) is value
        assert distributed.gather(value) == [value]
        assert distributed.from_main(lambda: value) is value
        distributed.barrier()

    def test_the_sum_of_a_tensor_is_a_new_one(self) -> None:
        mine = torch.ones(2, requires_grad=True)
        total = distributed.sum(mine)
        assert total.tolist() == [1, 1]
        assert not total.requires_grad
        total.zero_()
        assert mine.tolist() == [1, 1]

    def test_what_main_raises_comes_as_it_is(self) -> None:
        with pytest.raises(LookupError, match=r"^gone$"):
            distributed.from_main(lambda: fail(LookupError("gone")))

    def test_a_vote_answers_every_step(self) -> None:
        ranks = RankVote(seconds=1e9)
        answers = [ranks.vote(i == 1, i == 2) for i in range(4)]
        assert answers == [
            [False, False],
            [True, False],
            [False, True],
            [False] * 2,
        ]

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({}, False),
            ({"RANK": "0", "WORLD_SIZE": "1"}, False),
            ({"RANK": "0", "WORLD_SIZE": "2"}, True),
            ({"WORLD_SIZE": "2"}, False),  # a scheduler's, for something else
            ({"RANK": "1"}, False),
        ],
    )
    def test_under_torchrun(self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert distributed.under_torchrun() is expected

    def test_without_torchrun_init_does_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        distributed.init()
        distributed.shutdown()
        assert not distributed.active()

    def test_returns_rank0_marks_and_keeps_the_function(self) -> None:
        assert distributed.returns_rank0(fail) is fail
        assert fail.returns_rank0 is True  # type: ignore[attr-defined]


def fail(error: Exception) -> Any:
    raise error


class TwoArguments(Exception):  # noqa: N818
    """Pickles, but does not unpickle."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")


def caught(error: Exception) -> tuple[str, str]:
    """What this rank sees when rank 0 raises `error`."""
    try:
        distributed.from_main(lambda: fail(error))
    except Exception as found:
        return type(found).__name__, str(found)
    return "", ""


def together() -> dict[str, Any]:
    class FromACell(Exception):  # noqa: N818
        """Does not even pickle, as a class of the notebook's does not."""

    rank, found = distributed.rank(), {}
    found["who"] = (rank, distributed.world_size(), distributed.local_rank(), distributed.local_world_size())
    found["is_main"] = distributed.is_main()
    found["made when needed"] = not torch.distributed.is_initialized()
    distributed.init()
    group = torch.distributed.group.WORLD
    distributed.init()  # again, and under the variables that torchrun too would set
    found["init twice"] = (distributed.under_torchrun(), torch.distributed.group.WORLD is group)

    found["int"] = distributed.sum(rank + 1)
    found["big int"] = distributed.sum(2**60 + rank)
    found["float"] = distributed.sum(0.1 * (rank + 1))
    mine = torch.tensor([rank, 2.0**40], dtype=torch.float64, requires_grad=True)
    found["tensor"] = distributed.sum(mine)
    found["left alone"] = mine.tolist() == [rank, 2.0**40] and not found["tensor"].requires_grad
    later = [distributed.sum_later(rank), distributed.sum_later(10 * rank), distributed.sum_later(torch.tensor(rank))]
    # asked for in another order, and twice, on each rank; the collectives went out in one
    found["later"] = [int(later[(i + rank) % 3]()) for i in range(6)]

    found["agree"] = [distributed.agree(rank in who) for who in ((), (0,), (2,), (0, 1, 2))]
    found["broadcast"] = distributed.broadcast({"rank": rank, "text": "ä" * rank})
    found["gather"] = distributed.gather({"rank": rank, "list": [0] * rank})
    calls: list[int] = []
    found["from_main"] = distributed.from_main(lambda: calls.append(rank) or f"made by {rank}")
    found["calls"] = calls
    found["caught"] = caught(LookupError("no such file"))
    found["two arguments"] = caught(TwoArguments("broken", 3))
    found["from a cell"] = caught(FromACell("in the middle"))

    time.sleep(0.1 * rank)
    folder = Path(os.environ["BARRIER"])
    (folder / str(rank)).touch()
    distributed.barrier()
    found["all were there"] = len(list(folder.iterdir()))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BARRIER", str(tmp_path_factory.mktemp("barrier")))
        return list(launch(together, nproc=3))


class TestThreeProcesses:
    def test_who_am_i(self, ranks: list[dict[str, Any]]) -> None:
        assert [found["who"] for found in ranks] == [(rank, 3, rank, 3) for rank in range(3)]
        assert [found["is_main"] for found in ranks] == [True, False, False]
        assert all(found["init twice"] == (True, True) for found in ranks)

    def test_sums(self, ranks: list[dict[str, Any]]) -> None:
        for found in ranks:
            assert found["int"] == 6
            assert type(found["int"]) is int
            assert found["big int"] == 3 * 2**60 + 3  # exact, which a float64 would not be
            assert found["float"] == pytest.approx(0.6, rel=1e-12)
            assert type(found["float"]) is float
            assert found["tensor"].tolist() == [3, 3 * 2.0**40]
            assert found["left alone"]
        assert ranks[0]["later"] == [3, 30, 3, 3, 30, 3]
        assert ranks[1]["later"] == [30, 3, 3, 30, 3, 3]

    def test_agreement_and_objects(self, ranks: list[dict[str, Any]]) -> None:
        for found in ranks:
            assert found["agree"] == [False, True, True, True]
            assert found["broadcast"] == {"rank": 0, "text": ""}
            assert found["gather"] == [{"rank": rank, "list": [0] * rank} for rank in range(3)]
            assert found["all were there"] == 3

    def test_from_main(self, ranks: list[dict[str, Any]]) -> None:
        assert [found["from_main"] for found in ranks] == ["made by 0"] * 3
        assert [found["calls"] for found in ranks] == [[0], [], []]
        assert [found["caught"] for found in ranks] == [("LookupError", "no such file")] * 3
        # what cannot travel is itself on rank 0, which speaks, and its text elsewhere; nobody waits
        assert [found["two arguments"] for found in ranks] == [
            ("TwoArguments", "broken 3"),
            *[("RuntimeError", "TwoArguments: broken 3")] * 2,
        ]
        assert [found["from a cell"] for found in ranks] == [
            ("FromACell", "in the middle"),
            *[("RuntimeError", "FromACell: in the middle")] * 2,
        ]


STEP_SECONDS = [0.002, 0.006, 0.001]
SECONDS = 0.06


def votes(steps: int) -> dict[str, Any]:
    """Two flags, raised by rank 2 from step 20 and by rank 0 from step 33 on, until they are seen."""
    rank, now = distributed.rank(), [0.0]
    distributed.time = SimpleNamespace(monotonic=lambda: now[0], monotonic_ns=time.monotonic_ns)  # type: ignore
    ranks = RankVote(SECONDS)
    asked, answers = [], []
    for step in range(1, steps + 1):
        now[0] += STEP_SECONDS[rank]
        if step >= ranks.next:
            asked.append(step)
        answer = ranks.vote(rank == 2 and step >= 20, rank == 0 and step >= 33)
        assert all(type(flag) is bool for flag in answer)
        answers.append(tuple(answer))
    return {"asked": asked, "answers": answers}


def test_a_vote_answers_alike_on_all_ranks_and_in_time() -> None:
    first, *others = launch(votes, 80, nproc=3)
    assert all(found == first for found in others)
    asked, answers = first["asked"], first["answers"]
    # one step after a question: whether any rank had raised the flag by then; else false
    expected = [(step - 1 in asked and step > 20, step - 1 in asked and step > 33) for step in range(1, 81)]
    assert answers == expected
    gaps = [b - a for a, b in pairwise(asked)]
    assert asked[0] == 1
    # the slowest rank needs 6 ms a step, so 60 ms are 10 steps (a little less, as floats are), led there by doubling
    assert gaps[:3] == [2, 4, 8]
    assert set(gaps[3:]) <= {9, 10}


SCRIPT = """
import os, sys
from kaggle_mgpu import distributed
assert distributed.under_torchrun() and not distributed.active()
distributed.init()
distributed.init()
total = distributed.sum(distributed.rank() + 1)
line = f"rank {distributed.rank()} of {distributed.world_size()}: {total}"
lines = distributed.gather(line)
if distributed.is_main():
    print("\\n".join(lines))
distributed.shutdown()
assert not distributed.active()
sys.stdout.flush()
os._exit(0)  # torch's threads now and then abort a process that has ended well
"""


def test_under_real_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.10
    assert said == ["rank 0 of 2: 3", "rank 1 of 2: 3"]


def test_votes_that_are_asked_for_do_not_slow_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote after every tenth step of 40 ms, as where a record may end the run: half a second stays the goal."""
    now = [0.0]
    monkeypatch.setattr(module, "active", lambda: True)
    monkeypatch.setattr(module, "_group", lambda *_: None)
    monkeypatch.setattr(module.dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    ranks = RankVote(seconds=0.5)
    for step in range(2000):
        now[0] += 0.04
        ranks.vote(False)
        ranks.vote_next(step % 10 == 0)
    assert 10 <= ranks.interval <= 13


class Many(Language):
    """A task whose counts are large and odd, and differ between samples."""

    def count(self, batch: Any) -> int:
        return (1 << 26) + int(batch["length"].sum())


def test_each_ranks_loss_stands_in_the_records(tmp_path: Path) -> None:
    settings = TrainConfig(
        global_batch_size=12, max_steps=2, lr=0.1, output_dir=str(tmp_path), eval_every="end", nproc=2
    )
    launch(train, settings, Language(24))
    train_records = [record for record in progress.read(tmp_path) if record.get("kind") == "train"]
    assert len(train_records) == 2
    for record in train_records:
        low, high = sorted(record[f"rank{rank}_loss"] for rank in range(2))
        assert low < record["loss"] < high, "the mean over all terms lies between the ranks' own"


def counts_of_steps(config: TrainConfig, task: Language) -> tuple[list[int], list[int], int]:
    """Return the counts of four steps: as the strategy has them, as one collective each gives them, and the number of
    collectives that the strategy's took.
    """
    parts, asked, own = build_parts(config, task), [], []
    with mock.patch.object(module, "sum_later", wraps=module.sum_later) as sums:
        batches = parts.batches(0)
        for step in range(4):
            batch = next(batches)
            mine = [task.count(part) for part, weight in zip(batch.micro_batches, batch.weights, strict=True) if weight]
            take_step(parts, batch, step)
            asked.append(batch.terms())
            own.append(sum(mine))
        used = sums.call_count
    return asked, [distributed.sum(mine) for mine in own], used


@pytest.mark.parametrize(("nproc", "changes", "collectives"), [
    (2, {}, 1), (2, {"gradient_accumulation_steps": 3}, 1), (3, {}, 1),
    (2, {"gradient_compression": "fp16"}, 4), (2, {"find_unused_parameters": True}, 4),
])  # fmt: skip
def test_gradients_carry_the_number_of_terms(
    tmp_path: Path, nproc: int, changes: dict[str, Any], collectives: int
) -> None:
    plain = TrainConfig(global_batch_size=12, max_steps=4, output_dir=str(tmp_path), data_workers=0, **changes)
    for asked, expected, used in launch(counts_of_steps, plain, Many(20), nproc=nproc):
        assert asked == expected
        assert used == collectives, "only the first step's count is exchanged apart"


@pytest.mark.parametrize(("value", "got"), [(torch.tensor(1.0), "a scalar"), ([1.0], "a list")])
def test_what_gather_cannot_gather_is_named(value: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"a row per sample, float\[samples, …\], not {got}$"):
        distributed.Gather(value)
