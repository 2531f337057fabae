"""Out of memory is not the end: the error is injected here, by the size of a micro-batch."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import TrainConfig, distributed, launch, progress, train
from kaggle_mgpu.checkpoints import format as checkpoint_files
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.data import BatchPlan, randomness
from kaggle_mgpu.launching import workers
from kaggle_mgpu.progress import Progress
from kaggle_mgpu.progress.records import comparable
from kaggle_mgpu.training import is_out_of_memory, micro_batch
from tasks import Regression

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Tight(Regression):
    """A device on which `room` samples fit; on `rank` only, from its `since`-th forward pass in training on."""

    name = "Regression"

    def __init__(self, room: int, *, rank: int | None = None, since: int = 0, norm: bool = False) -> None:
        super().__init__()
        self._room, self._rank, self._since, self.calls, self.norm = room, rank, since, 0, norm
        self.sizes: list[int] = []

    def model(self) -> nn.Module:
        norm = nn.BatchNorm1d(16) if self.norm else nn.Identity()
        return nn.Sequential(nn.Linear(8, 16), norm, nn.Tanh(), nn.Linear(16, 1))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)  # the statistics have moved by the time it fails
        if model.training and self._rank in (None, distributed.rank()):
            self.calls += 1
            self.sizes.append(len(batch[0]))
            if len(batch[0]) > self._room and self.calls > self._since:
                raise torch.OutOfMemoryError(FULL)
        return loss


def slow_disk() -> None:
    """In this worker: rank 0's checkpoint of step 4 is not there yet when another rank ends."""
    if distributed.active() and distributed.is_main():
        write = checkpoint_files.write_facts

        def slow(folder: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
            time.sleep(0.5 if facts["step"] == 4 else 0)
            write(folder, written, facts)

        checkpoint_files.write_facts = slow


def config(folder: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(global_batch_size=24, epochs=2, lr=0.01, log_every=1, save_every=4, output_dir=str(folder))
    return plain.replace(**changes)


def weights(folder: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


def trained(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [r for r in progress.read(folder) if r["kind"] == kind]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine takes to tell that a rank has ended."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 600.0)


# Halved
def test_the_largest_that_fits_takes_few_tries() -> None:
    for sizes in ([1, 2, 4, 8, 16, 32, 64], list(range(1, 40)), [1], [1, 3, 5, 15]):
        for room in range(sizes[-1] + 2):
            tried: list[int] = []

            def fits(size: int, room: int = room, tried: list[int] = tried) -> bool:
                tried.append(size)
                return size <= room

            expected = max((size for size in sizes if size <= room), default=None)
            assert micro_batch.largest_that_fits(sizes, fits) == expected
            assert len(tried) == len(set(tried))
            assert len(tried) <= 2 * len(sizes).bit_length() + 1


def test_smaller_micro_batches_keep_the_global_one() -> None:
    plan = BatchPlan.make(dataset_size=1000, num_replicas=2, global_batch_size=48, micro_batch_size=24)
    for at_most, expected in ((12, (12, 2)), (11, (8, 3)), (5, (4, 6)), (1, (1, 24)), (99, (24, 1))):
        other = plan.with_micro_batch_size(at_most)
        assert (other.micro_batch_size, other.gradient_accumulation_steps) == expected
        assert other.micro_batch_size * 2 * other.gradient_accumulation_steps == other.global_batch_size == 48


@pytest.mark.parametrize("kind", ["single", "dp"])
def test_a_micro_batch_that_is_too_much_is_halved_and_nothing_is_lost(kind: str, tmp_path: Path, capsys: Any) -> None:
    nproc = 2 if kind == "dp" else 1
    task = Tight(6, since=3 * nproc)
    result = train(config(tmp_path / "tight", strategy=kind, nproc=nproc), task)
    assert result.finished
    largest = 24 // nproc
    assert set(task.sizes[: 3 * nproc]) == {largest}
    notes = [r["text"] for r in trained(tmp_path / "tight", "note")]
    halves = [24, 12, 6] if kind == "single" else [12, 6]
    assert notes == [
        f"out of memory with micro_batch_size {before} in step 4: {after} from here on, with {24 // nproc // after} "
        f"accumulation steps, so that the batch stays the same"
        for before, after in itertools.pairwise(halves)
    ]
    train(config(tmp_path / "roomy", strategy=kind, nproc=nproc), Tight(99))
    ours, theirs = trained(tmp_path / "tight"), trained(tmp_path / "roomy")
    assert [(r["step"], r["samples"]) for r in ours] == [(r["step"], r["samples"]) for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    relative = (weights(tmp_path / "tight") - weights(tmp_path / "roomy")).norm() / weights(tmp_path / "roomy").norm()
    assert relative < 1e-6

    # the next session starts with what was learned
    document = json.loads((tmp_path / "tight" / "checkpoints" / micro_batch.FILE).read_text())
    assert (document["micro_batch_size"], document["why"]) == (6, "12 was too much in step 4: out of memory")
    task = Tight(6)
    train(config(tmp_path / "tight", strategy=kind, nproc=nproc, epochs=3), task)
    assert set(task.sizes) <= {6, 2, 4, 1}  # the last batch of an epoch is smaller
    assert "micro_batch_size 6: 12 was too much in step 4: out of memory" in capsys.readouterr().out


def test_running_statistics_do_not_move_twice(tmp_path: Path) -> None:
    """From the step of the error on it is the run that had half the micro-batch all along, from the same weights."""
    train(config(tmp_path / "tight", max_steps=8), Tight(12, since=4, norm=True))
    train(config(tmp_path / "other", max_steps=8), Stopping(4))
    train(config(tmp_path / "other", max_steps=8, micro_batch_size=12), Tight(99, norm=True))
    assert trained(tmp_path / "other", "start")[1]["step"] == 4
    one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in ("tight", "other"))
    assert one.keys() == two.keys() and "1.running_mean" in one
    for name in one:
        assert torch.equal(one[name], two[name]), name


class Stopping(Tight):
    def __init__(self, at: int) -> None:
        super().__init__(99, norm=True)
        self._at = at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if self.calls == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss


def test_not_even_one_sample(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"micro_batch_size 1: not even one sample fits\. Try gradient_ch"):
        train(config(tmp_path), Tight(0))


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    class Broken(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(config(tmp_path), Broken())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("out of cheese"))


def test_a_cpu_that_has_no_memory_says_so_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_what_was_trained_before_not_even_one_sample_fits_is_kept(tmp_path: Path) -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match=r"not even one .* The state after step 6 is in (.*): the next run"
    ) as said:
        train(config(tmp_path / "run"), Tight(0, since=6))
    assert str(tmp_path / "run" / "checkpoints" / "step-00000006") in str(said.value)
    train(config(tmp_path / "run"), Tight(99))
    assert trained(tmp_path / "run", "start")[1]["step"] == 6
    train(config(tmp_path / "roomy"), Tight(99))
    # its micro-batches have been smaller since
    relative = (weights(tmp_path / "run") - weights(tmp_path / "roomy")).norm() / weights(tmp_path / "roomy").norm()
    assert relative < 1e-6


# In the evaluation
class TightEvaluation(Regression):
    """A device on which `room` samples fit in an evaluation once training has begun; on `rank` only."""

    name = "Regression"
    began = False

    def __init__(self, room: int, rank: int | None = None) -> None:
        super().__init__(val_samples=77)
        self._room, self._rank = room, rank
        self.sizes: list[int] = []

    def train_data(self) -> Any:
        slow_disk()
        return super().train_data()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.began |= model.training
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        sums = super().metrics(model, batch)
        if not self.began:  # the trial before training
            return sums
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > self._room and self._rank in (None, distributed.rank()):
            raise torch.OutOfMemoryError(FULL)
        return sums


def evaluated(folder: Path) -> list[float]:
    return [record["val_loss"] for record in trained(folder, "eval")]


@pytest.mark.parametrize("kind", ["single", "dp", "ddp"])
def test_an_evaluation_that_is_too_much_takes_fewer_samples_at_a_time(kind: str, tmp_path: Path) -> None:
    nproc = 1 if kind == "single" else 2
    settings = config(tmp_path / "tight", strategy=kind, nproc=nproc, eval_every=20, ema_decay=0.9)
    # under dp the two replicas have half of 7 each, or 3 and 4: so much fits
    tight = TightEvaluation(7 if kind != "dp" else 4, rank=1 if kind == "ddp" else None)
    assert launch(train, settings, tight).finished
    notes = [record["text"] for record in trained(tmp_path / "tight", "note")]
    before, after = (12, 6) if kind == "ddp" else (24, 6)
    assert notes == [
        f"out of memory in the evaluation after step 20 with {before} samples at a time: {after} from here on, with "
        f"the same result"
    ]
    if kind == "single":
        assert [tight.sizes[0], *tight.sizes[1:3]] == [24, 12, 6]
        assert max(tight.sizes[3:]) == 6, "and in later evaluations at once"
    assert launch(train, settings.replace(output_dir=str(tmp_path / "roomy")), TightEvaluation(99)).finished
    assert evaluated(tmp_path / "tight") == pytest.approx(evaluated(tmp_path / "roomy"), rel=1e-6)
    assert len(evaluated(tmp_path / "tight")) == 3
    assert torch.equal(weights(tmp_path / "tight"), weights(tmp_path / "roomy")), "training has not noticed"


def test_an_evaluation_without_room_for_one_sample_loses_nothing(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", eval_every=10, save_every=None, ema_decay=0.9)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(settings, TightEvaluation(0))
    kept = tmp_path / "run" / "checkpoints" / "step-00000010"
    assert str(caught.value).startswith(
        f"out of memory in the evaluation after step 10, with one sample at a time: {FULL} The state after step 10 is "
        f"in {kept}: the next run continues from there. Try smaller samples in val_data"
    )
    # the weights in it are the trained ones, not their averages, which the evaluation had put in their place
    train(settings, TightEvaluation(99))
    assert trained(tmp_path / "run", "start")[1]["step"] == 10
    train(settings.replace(output_dir=str(tmp_path / "roomy")), TightEvaluation(99))
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "roomy"))
    assert evaluated(tmp_path / "run") == evaluated(tmp_path / "roomy")


def test_an_evaluation_of_ranks_that_compute_together_starts_again_with_smaller_micro_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        tmp_path / "tight", strategy="fsdp", nproc=2, eval_every=7, save_every=4, max_steps=10, micro_batch_size="auto"
    )  # where ranks compute together, auto begins with the largest
    assert launch(train, settings, TightEvaluation(6, rank=1)).finished
    said = capsys.readouterr().out
    assert "micro_batch_size 12: a GPU's whole share; if memory runs out, a restart halves it" in said
    assert "rank 1 ran out of memory with micro_batch_size 12 in the evaluation after step 7: 6 from here on" in said
    assert "The newest checkpoint is from before that evaluation: run the same again and it goes on from there" in said
    assert [(r["step"], r["micro_batch_size"]) for r in trained(tmp_path / "tight", "start")] == [(0, 12), (4, 6)]
    assert len(evaluated(tmp_path / "tight")) == 2


# In the optimizer
class Breaking(torch.optim.AdamW):
    """Runs out of memory in its `at`-th step, when it has changed the first of the weights and its moments."""

    at, steps = 0, 0
    after: Path | None = None

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == self.at:
            while self.after is not None and not self.after.is_dir():
                time.sleep(0.01)  # another rank writes it, behind its steps
            with torch.no_grad():
                first = self.param_groups[0]["params"][0]
                first.mul_(2)
                for moment in self.state.get(first, {}).values():
                    moment.mul_(3)
            raise torch.OutOfMemoryError(FULL)
        return super().step(closure)


class TightOptimizer(Regression):
    name = "Regression"

    def __init__(self, at: int, rank: int | None = None, after: Path | None = None) -> None:
        super().__init__()
        self._at, self._rank, self._after = at, rank, after

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        made = Breaking(model.parameters(), lr=config.lr)
        made.after = self._after
        made.at = self._at if self._rank in (None, distributed.rank()) else 0
        return made


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_weights_that_an_optimizer_has_half_changed_are_not_saved(kind: str, tmp_path: Path) -> None:
    nproc = 1 if kind == "single" else 2
    settings = config(tmp_path / "run", strategy=kind, nproc=nproc, ema_decay=0.9)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        launch(train, settings, TightOptimizer(7, rank=nproc - 1, after=newest if nproc > 1 else None))
    text = (
        "out of memory in the optimizer's part of step 7. Some weights may have been updated and others not, so the "
        f"state in memory is not saved. The newest checkpoint is {newest}. Smaller micro-batches do not help here. Try "
    )
    assert str(caught.value).startswith(text)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [newest.name]
    assert launch(train, settings, TightOptimizer(0)).finished
    assert trained(tmp_path / "run", "start")[1]["step"] == 4
    launch(train, settings.replace(output_dir=str(tmp_path / "roomy")), TightOptimizer(0))
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "roomy"))


def test_an_optimizer_without_room_for_its_moments(tmp_path: Path) -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match=r"part of step 1\. .* not saved\. There is no checkpoint yet\. Sm"
    ):
        train(config(tmp_path), TightOptimizer(1))
    assert list((tmp_path / "checkpoints").glob("*")) == []


# With several ranks
class SlowToTell(Tight):
    """Rank 0 has not written down the last step when rank 1 has saved it and ends."""

    def __init__(self, room: int, *, rank: int, since: int, saved: Path) -> None:
        super().__init__(room, rank=rank, since=since)
        self._saved = saved

    def model(self) -> nn.Module:
        # not in on_record, after which the ranks meet to hear whether the run shall end
        write = Progress.record

        def slow(progress: Progress, record: dict[str, Any]) -> None:
            if distributed.is_main() and record["kind"] == "train" and record["step"] == self._since:
                while not self._saved.is_dir():
                    time.sleep(0.01)
                time.sleep(0.5)
            write(progress, record)

        Progress.record = slow  # type: ignore[method-assign]
        return super().model()


def test_one_rank_of_two_runs_out_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tight"
    settings = config(folder, strategy="ddp", nproc=2, save_every=None)
    task = SlowToTell(6, rank=1, since=5, saved=folder / "checkpoints" / "step-00000005")
    result = launch(train, settings, task)  # which starts the workers again, in the same call
    assert result.finished
    said = capsys.readouterr().out
    assert "rank 1 ran out of memory with micro_batch_size 12 in step 6: 6 from here on, with 2 acc" in said
    assert f"is in {folder / 'checkpoints' / 'step-00000005'}: run the same again and it goes on from there" in said
    assert "starting again\n" in said
    assert trained(folder, "start")[1]["micro_batch_size"] == 6
    launch(train, settings.replace(output_dir=str(tmp_path / "roomy")), Tight(99))
    ours, theirs = trained(folder), trained(tmp_path / "roomy")
    assert [(r["step"], r["samples"]) for r in ours] == [(r["step"], r["samples"]) for r in theirs]
    relative = (weights(folder) - weights(tmp_path / "roomy")).norm() / weights(tmp_path / "roomy").norm()
    assert relative < 1e-6


class SlowToSave(Tight):
    def train_data(self) -> Any:
        slow_disk()
        return super().train_data()


def test_a_rank_without_room_for_one_sample_keeps_what_rank_0_has_only_begun_to_save(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", strategy="ddp", nproc=2, micro_batch_size=1)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"not even one .* The state after step 4 is in .*-00000004: the next run"
    ):
        launch(train, settings, SlowToSave(0, rank=1, since=4 * 12))
    launch(train, settings.replace(max_steps=5), Tight(99))
    assert [record["step"] for record in trained(tmp_path / "run", "start")] == [0, 4]


def test_under_fsdp_no_rank_has_all_of_it_and_the_newest_checkpoint_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path / "tight", strategy="fsdp", nproc=2, save_every=2)
    assert launch(train, settings, SlowToSave(6, rank=1, since=5)).finished
    said = capsys.readouterr().out
    assert "rank 1 ran out of memory with micro_batch_size 12 in step 6: 6 from here on, with 2 acc" in said
    assert "The newest checkpoint is from before that step: run the same again and it goes on from there" in said
    starts = trained(tmp_path / "tight", "start")
    assert [(r["step"], r["micro_batch_size"]) for r in starts] == [(0, 12), (4, 6)]
    launch(train, settings.replace(output_dir=str(tmp_path / "roomy")), Tight(99))
    relative = (weights(tmp_path / "tight") - weights(tmp_path / "roomy")).norm() / weights(tmp_path / "roomy").norm()
    assert relative < 1e-6


# auto
@pytest.mark.parametrize(("room", "expected"), [(99, 24), (26, 12), (13, 8), (11, 8), (8, 6), (2, 1), (1, 1)])
def test_auto_finds_the_largest_with_a_tenth_to_spare(room: int, expected: int, tmp_path: Path) -> None:
    """24 wants room for 27, 12 for 14, 8 for 9."""
    task = Tight(room)
    result = train(config(tmp_path, micro_batch_size="auto", max_steps=2), task)
    assert result.finished
    assert trained(tmp_path, "start")[0]["micro_batch_size"] == expected
    document = json.loads((tmp_path / "checkpoints" / micro_batch.FILE).read_text())
    assert document["micro_batch_size"] == expected


def test_auto_leaves_no_trace(tmp_path: Path) -> None:
    """The run is, bit for bit, the one that was given that size."""
    train(config(tmp_path / "auto", micro_batch_size="auto", ema_decay=0.9), Tight(13, norm=True))
    train(config(tmp_path / "given", micro_batch_size=8, ema_decay=0.9), Tight(99, norm=True))
    files = ["model.safetensors"]
    files += [f"checkpoints/step-00000042/{name}.safetensors" for name in ("model", "ema", "optimizer")]
    for name in files:
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "given" / name).read_bytes(), name
    assert comparable(progress.read(tmp_path / "auto")) == comparable(progress.read(tmp_path / "given"))


def test_weights_optimizer_and_chance_are_afterwards_what_they_were() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = torch.get_rng_state()
    with micro_batch.unchanged(model, optimizer):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.step()
        randomness.seed_everything(1)
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert optimizer.state == {}
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_is_the_least_over_the_ranks_and_is_remembered(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", micro_batch_size="auto", strategy="ddp", nproc=2, max_steps=6)
    launch(train, settings, Tight(5, rank=1))
    assert trained(tmp_path / "run", "start")[0]["micro_batch_size"] == 4
    # the next session knows, and where only the checkpoints are left too; it does not try
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints")
    task = Tight(5, since=10**6)
    results = launch(_sizes, settings.replace(output_dir=str(tmp_path / "copy"), max_steps=8), task, nproc=2)
    assert results == [[4, 4, 4] * 2] * 2
    # another plan is another question
    launch(train, config(tmp_path / "run2", micro_batch_size="auto", max_steps=2), Tight(99))
    assert trained(tmp_path / "run2", "start")[0]["micro_batch_size"] == 24


def _sizes(settings: TrainConfig, task: Tight) -> list[int]:
    train(settings, task)
    return task.sizes


def test_auto_with_accumulation_given(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"micro_batch_size='auto' with gradient_accumulation_steps=2: the first determines"
    ):
        train(config(tmp_path, micro_batch_size="auto", gradient_accumulation_steps=2), Regression())


def test_the_best_that_could_not_be_written_is_not_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the writing of best/, no checkpoint says of it what it does not hold."""
    from kaggle_mgpu import checkpoint

    def no_memory(path: Path, tensors: Any) -> None:
        raise torch.OutOfMemoryError("the host has none")

    monkeypatch.setattr(checkpoint, "replace_tensors", no_memory)
    settings = TrainConfig(
        global_batch_size=50, max_steps=12, save_every=2, eval_every=4, output_dir=str(tmp_path), best_metric="loss"
    )
    with pytest.raises(torch.OutOfMemoryError, match="the host has none"):
        train(settings, Regression())
    for facts in tmp_path.glob("checkpoints/*/state.json"):
        assert json.loads(facts.read_text())["state"]["best"] is None
