"""Other libraries' loops in this process: streams, resumed order, what a model's checkpoint holds, interrupts."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import loops
from kaggle_mgpu import launch, watch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


class Stream(IterableDataset[Any]):
    """24 samples in order, without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(24):
            x = torch.randn(8, generator=torch.Generator().manual_seed(index))
            yield {"x": x, "labels": x.sum()[None]}


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 24


def stream_loader(kind: str) -> DataLoader[Any]:
    if kind == "batches of its own":
        batches = [{"x": torch.randn(4, 8), "labels": torch.randn(4, 1)} for _ in range(6)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return DataLoader(StreamWithLength() if kind == "length" else Stream(), 4)


def shuffled_loader() -> DataLoader[Any]:
    return DataLoader(loops.Augmented(), 4, shuffle=True, num_workers=1, persistent_workers=True)


def by_hand(folder: Path, loader: DataLoader[Any], stop: int | None = None) -> Tensor:
    model = loops.network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with watch(folder, max_steps=20, model=model, optimizer=optimizer) as run:
        for batch in run.batches(loader):
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            if run.steps_taken == stop:
                break
    return loops.weights(model)


def with_accelerate(folder: Path, loader: DataLoader[Any], stop: int | None = None) -> Tensor:
    from accelerate import Accelerator

    from kaggle_mgpu.integrations.accelerate import Session

    accelerator = Accelerator(cpu=True)
    model = loops.network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with Session(accelerator, folder, max_steps=20) as session:
        for batch in session.batches(loader):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            if session.steps_taken == stop:
                break
    return loops.weights(model)


def with_lightning(folder: Path, loader: DataLoader[Any], stop: int | None = None, **options: Any) -> Tensor:
    import lightning

    from kaggle_mgpu.integrations.lightning import SessionCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = loops.network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    class Stops(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == stop:
                os.kill(os.getpid(), signal.SIGINT)

    keeper = SessionCallback(folder)
    trainer = lightning.Trainer(
        devices=1, accelerator="cpu", max_steps=20, logger=False, callbacks=[keeper, Stops()],
        enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=1, enable_model_summary=False,
        **options,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader, ckpt_path=keeper.find_checkpoint())
    assert keeper.finished == (stop is None)
    return loops.weights(module)


def with_trainer(folder: Path, data: Any, fail: int | None = None) -> int:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kaggle_mgpu.integrations.transformers import SessionCallback

    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == fail:
                raise RuntimeError("out of luck")

    args = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(loops.network(), args, train_dataset=data, callbacks=[SessionCallback(), Fails()])
    trainer.train()
    return trainer.state.global_step


def test_the_lines_of_the_readme_around_a_trainer_run_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from kaggle_mgpu.integrations.transformers import find_checkpoint

    (diff,) = re.findall(r"```diff\n( # transformers.*?)\n\n", README, re.DOTALL)
    added = "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=16, use_cpu=True, report_to=[], disable_tqdm=True
    )
    for before in (None, "checkpoint-3"):
        found = find_checkpoint(args.output_dir)
        assert (found and Path(found).name) == before
        names: dict[str, Any] = {
            "Trainer": Trainer, "model": loops.network(), "args": args, "data": loops.Augmented(),
        }  # fmt: skip
        exec(added, names)
        assert names["trainer"].state.global_step == 3


def test_the_lines_of_the_page_around_an_accelerate_loop_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    page = (Path(__file__).parents[2] / "notebooks" / "README.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n.*?( # accelerate.*?)```", page, re.DOTALL)
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    assert code.count(": ...") == 1, "the place of the user's own lines"
    own = 'loss = model(**batch)["loss"]; accelerator.backward(loss); optimizer.step(); optimizer.zero_grad()'
    monkeypatch.chdir(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    network = loops.network()
    prepared = accelerator.prepare(
        network, torch.optim.SGD(network.parameters(), 1e-3), DataLoader(loops.Augmented(), 4)
    )
    names: dict[str, Any] = dict(zip(("model", "optimizer", "loader"), prepared, strict=True))
    names["accelerator"] = accelerator
    exec(code.replace(": ...", f": {own}"), names)
    assert (names["session"].finished, names["session"].steps_taken) == (True, 1000)


def test_a_loop_that_passes_by_its_last_step_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with watch(tmp_path, max_steps=2, model=loops.network()) as run:
        for _ in range(4):
            run.step()
    assert (
        capsys.readouterr().out.count("NOTE: the loop goes on after max_steps=2: iterate over run.batches(loader)") == 1
    )


def test_a_loop_that_was_stopped_or_is_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = "not finished: step 1 of 3. Run the same launch again to continue."
    for limit, said in ((1e-3, unfinished), (None, "finished: step 3/3")):
        with watch(tmp_path, max_steps=3, time_limit=limit, model=loops.network()) as run:
            for _ in run.batches(torch.utils.data.DataLoader([1, 2, 3])):
                run.step()
        assert said in capsys.readouterr().out
    with watch(tmp_path, max_steps=3, model=loops.network()):
        pass
    assert "already finished after 3 steps: the loop's body does not run again" in capsys.readouterr().out


def test_a_finished_trainer_takes_no_step_more(tmp_path: Path) -> None:
    """Trainer itself takes one step on resuming a run whose max_steps ended within an epoch."""
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from kaggle_mgpu.integrations.transformers import SessionCallback, find_checkpoint

    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    ends = []
    for _ in range(2):
        keeper = SessionCallback()
        trainer = Trainer(loops.network(), args, train_dataset=loops.Augmented(), callbacks=[keeper])
        trainer.train(resume_from_checkpoint=find_checkpoint(args.output_dir))
        assert (trainer.state.global_step, keeper.finished) == (3, True)
        ends.append(loops.weights(trainer.model))
    assert torch.equal(*ends)


LOOPS = {by_hand: "torch", with_accelerate: "accelerate", with_lightning: "lightning"}
CASES = [(loop, kind) for loop in LOOPS for kind in ("length", "no length", "shuffled")]


@pytest.mark.parametrize(("loop", "kind"), [*CASES, (by_hand, "batches of its own")])
def test_a_loop_over_any_loader_resumes_with_the_weights_of_one_that_was_not_cut(
    loop: Any, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip(LOOPS[loop])

    def loader() -> DataLoader[Any]:
        torch.manual_seed(3)
        return shuffled_loader() if kind == "shuffled" else stream_loader(kind)

    whole = loop(tmp_path / "whole", loader())
    loop(tmp_path / "cut", loader(), 9 if kind != "shuffled" else 15)  # in the second epoch
    assert torch.equal(loop(tmp_path / "cut", loader()), whole)


def test_what_has_no_state_is_an_error_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError, match="watch: history is a list, expected a model, an optimizer or another object"),
        watch(tmp_path / "run", max_steps=6, model=torch.nn.Linear(1, 1), history=[1, 2]),
    ):
        pass


def test_a_loop_that_never_calls_step_is_an_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    data = DataLoader(TensorDataset(torch.ones(40, 1)), 4)
    with (
        watch(tmp_path / "run", max_steps=6, model=model) as run,
        pytest.raises(ValueError, match=r"260 batches without a call of step\(\)\. .* Call step\(loss\) after each"),
    ):
        for _ in run.batches(data):
            pass


@pytest.mark.parametrize("loop", [by_hand, with_accelerate])
def test_a_loader_without_a_batch_is_an_error(loop: Any, tmp_path: Path) -> None:
    pytest.importorskip(LOOPS[loop])
    few = Subset(loops.Augmented(), range(3))
    with pytest.raises(ValueError, match="the loader has no batch, since its data is empty"):
        loop(tmp_path, DataLoader(few, 4, drop_last=True))


def test_a_checkpoint_holds_the_whole_of_a_model_that_has_a_part_named_module(tmp_path: Path) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    model, parallel = WithHead(), nn.DataParallel(nn.Linear(2, 2))
    ema = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    ema.update_parameters(nn.Linear(2, 2))
    with watch(tmp_path, max_steps=2, model=model, ema=ema, parallel=parallel) as run:
        run.step()
    restored, ema = WithHead(), torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    # saved without the wrapper
    with watch(tmp_path, max_steps=2, model=restored, ema=ema, parallel=nn.Linear(2, 2)):
        assert torch.equal(restored.head.weight, model.head.weight)
        assert ema.n_averaged == 1


def test_watch_refuses_what_is_split_over_the_ranks(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(nn.Linear(2, 2), mesh=dist.init_device_mesh("cpu", (1,)))
        zero = ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.AdamW)
        for part in (sharded, zero):
            with (
                pytest.raises(ValueError, match="part is split over the ranks"),
                watch(tmp_path, max_steps=1, part=part),
            ):
                pass
    finally:
        dist.destroy_process_group()


def test_a_trainer_that_broke_off_leaves_interrupts_and_its_folder_as_they_were(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="out of luck"):
        launch(with_trainer, tmp_path, loops.Augmented(), 2, nproc=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert launch(with_trainer, tmp_path, StreamWithLength(), nproc=1) == [8]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_lightning_stops_when_asked_before_its_fewest_epochs(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    with_lightning(tmp_path, DataLoader(loops.Augmented(), 8), 2, min_epochs=3, min_steps=18)
    assert [path.name for path in tmp_path.glob("checkpoints/step-00000003/*.ckpt")] == ["model.ckpt"]
