"""Time a training step of the kit, of a loop written by hand, of a usual loop, and of other libraries.

    python tools/bench/loop.py                  # both models, one process and two
    python tools/bench/loop.py --rounds 9 --peers hand,people

All train the same model on the same data with clipping and a cosine schedule, a block of steps at a time, in turn, in
one process group. A step is timed from one computation of the loss to the next, for all alike. Each round gives a
ratio to the loop by hand; printed are their median and the interval that holds it in 95 % of 2000 bootstrap samples.
The kit and the loop by hand take 5 steps each in turn within a block: a machine is faster and slower for hundreds of
steps at a time (blocks of 500 steps of two processes vary by 6 %, of independent steps by 2.5 %), and both share that.
A round's ratio varies by 2.5 % then, and by 7 % for blocks one after the other: `--rounds 31 --peers hand` tells 1 %.
`hand` is a loop with the kit's optimizer (fused AdamW, the learning rate written into the groups); `people` is the
usual loop (AdamW, LambdaLR, loss.item() each step).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from kaggle_mgpu import Task, TrainConfig, distributed, launch, optim, train

SAMPLES, LR, LOG_EVERY = 4096, 1e-3, 50
# untimed steps at the start of each block: some contenders start a new run for a block, whose first steps allocate
WARM_UP = 10
IN_TURN = 5
MOMENTS: list[float] = []
"""When each loss of the block was computed."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT of two layers of width 64: about 4 ms a step on one core."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, 64), nn.Embedding(64, 64)
        self.blocks = nn.Sequential(Block(64, 4), Block(64, 4))
        self.head = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]]))


class MLPTask(Task):
    """Train an MLP: about 0.5 ms a step."""

    batch = 64

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(
            torch.randn(SAMPLES, 64, generator=generator), torch.randint(0, 10, (SAMPLES,), generator=generator)
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class GPTTask(Task):
    batch, unit = 8, "tokens"

    def model(self) -> nn.Module:
        return GPT()

    def train_data(self) -> TensorDataset:
        tokens = torch.randint(0, 128, (SAMPLES, 65), generator=torch.Generator().manual_seed(0))
        return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")

    def count(self, batch: Any) -> int:
        return int(batch[1].numel())


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    MOMENTS.append(time.perf_counter())
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def rate(step: int, steps: int) -> float:
    return optim.lr_at(step, schedule="cosine", lr=LR, max_steps=steps)


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(step / 1000))


def loader(task: Any, batch: int) -> Any:
    """Yield batches of this rank's share without end, from a usual DataLoader."""
    data = task.train_data()
    sampler: Any = torch.utils.data.DistributedSampler(data) if distributed.active() else None
    batches = DataLoader(data, batch_size=batch, sampler=sampler, shuffle=sampler is None, drop_last=True)
    while True:
        yield from batches


def seconds_per_step(run: Callable[[int], None], steps: int) -> float:
    """Return the seconds per step of a block that ends with `steps` timed steps."""
    distributed.barrier()
    MOMENTS.clear()
    run(steps + WARM_UP)
    return (MOMENTS[-1] - MOMENTS[WARM_UP]) / (len(MOMENTS) - 1 - WARM_UP)


def kit(task: Any, batch: int) -> Callable[[int], None]:
    class Timed(type(task)):  # type: ignore[misc]
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            MOMENTS.append(time.perf_counter())
            return super().loss(model, batch)

    def run(steps: int) -> None:
        # all ranks must have the same folder
        with tempfile.TemporaryDirectory() as own, contextlib.redirect_stdout(io.StringIO()):
            config = TrainConfig(
                max_steps=steps, global_batch_size=batch * distributed.world_size(), lr=LR,
                log_every=LOG_EVERY, resume="never", output_dir=distributed.broadcast(own),
            )  # fmt: skip
            train(config, Timed())

    return run


def steps_by_hand(task: Any, batch: int, steps: int) -> Iterator[None]:
    """Take a step by hand at each `next`, with a new model: where tensors lie in memory changes a step by some %."""
    data, rank, world = task.train_data(), distributed.rank(), distributed.world_size()
    model = task.model()
    call = model
    if distributed.active():
        call = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optim.adamw(model, LR, weight_decay=0.1)  # the kit's: fused, in two groups
    order = torch.randperm(SAMPLES)
    for step in range(steps):
        start = step * batch * world % (SAMPLES - batch * world) + rank * batch
        rows = order[start : start + batch]
        loss = mean_loss(call, data.tensors[0][rows], data.tensors[1][rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            loss.item()
        yield


def hand(task: Any, batch: int) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in steps_by_hand(task, batch, steps):
            pass

    return run


def kit_beside_hand(task: Any, steps: int) -> tuple[float, float]:
    """Return the seconds per step of the kit, and the ratio to the loop by hand; both take IN_TURN steps in turn.

    The kit's optimizer calls a hook before each update, and every IN_TURN times the hook takes the steps by hand.
    """
    total = steps + 2 * IN_TURN  # the first two turns are a warm-up
    by_hand = steps_by_hand(task, task.batch, total)
    seconds = {"kit": 0.0, "hand": 0.0}
    taken, continued, within = 0, 0.0, False

    def take_turns(*arguments: Any) -> None:
        nonlocal taken, continued, within
        if within:  # the update of the loop by hand
            return
        stopped, taken, timed = time.perf_counter(), taken + 1, taken >= 2 * IN_TURN
        if timed:
            seconds["kit"] += stopped - continued
        if taken % IN_TURN == 0:
            within = True
            for _ in range(IN_TURN):
                next(by_hand)
            within = False
            if timed:
                seconds["hand"] += time.perf_counter() - stopped
        continued = time.perf_counter()

    hook = register_optimizer_step_pre_hook(take_turns)
    try:
        kit(task, task.batch)(total)
    finally:
        hook.remove()
    return seconds["kit"] / steps, seconds["kit"] / seconds["hand"]


def people(task: Any, batch: int) -> Callable[[int], None]:
    model = task.model()
    call = nn.parallel.DistributedDataParallel(model) if distributed.active() else model
    batches = loader(task, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = cosine(optimizer)

    def run(steps: int) -> None:
        total = 0.0
        for _ in range(steps):
            x, y = next(batches)
            optimizer.zero_grad()
            loss = mean_loss(call, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()

    return run


def accelerate(task: Any, batch: int) -> Callable[[int], None]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = DataLoader(task.train_data(), batch_size=batch, shuffle=True, drop_last=True)
    raw = task.model()
    optimizer = torch.optim.AdamW(raw.parameters(), lr=LR, fused=True)
    model, optimizer, data, schedule = accelerator.prepare(raw, optimizer, data, cosine(optimizer))

    def endless() -> Any:
        while True:
            yield from data

    batches = endless()

    def run(steps: int) -> None:
        for step in range(steps):
            x, y = next(batches)
            with accelerator.accumulate(model):
                loss = mean_loss(model, x, y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                loss.item()

    return run


def lightning(task: Any, batch: int) -> Callable[[int], None]:
    import lightning as library

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return mean_loss(self.model, *batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LR, fused=True)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"},
            }

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = library.Trainer(
                max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=1.0, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(Module(), DataLoader(task.train_data(), batch_size=batch, shuffle=True, drop_last=True))

    return run


def transformers(task: Any, batch: int) -> Callable[[int], None]:
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": mean_loss(self.model, x, y)}

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        xs, ys = zip(*samples, strict=True)
        return {"x": torch.stack(xs), "y": torch.stack(ys)}

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = TrainingArguments(
                output_dir=distributed.broadcast(folder), max_steps=steps, learning_rate=LR,
                per_device_train_batch_size=batch, lr_scheduler_type="cosine", optim="adamw_torch_fused",
                logging_steps=LOG_EVERY, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True, dataloader_drop_last=True, remove_unused_columns=False,
            )  # fmt: skip
            Trainer(Wrapped(), arguments, train_dataset=task.train_data(), data_collator=collate).train()

    return run


CONTENDERS: dict[str, Any] = {f.__name__: f for f in (hand, people, accelerate, transformers, lightning)}


def bench(names: list[str], rounds: int, steps: dict[str, int]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return for each model, contender and round the seconds per step and the ratio to the loop by hand.

    Every rank must call this.
    """
    distributed.init()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task in (MLPTask(), GPTTask()):
        label = "MLP" if isinstance(task, MLPTask) else "GPT"
        measures = {}
        for name in names:
            if name == "lightning" and dist.is_initialized():
                continue  # starts its own processes
            with contextlib.suppress(ImportError):
                measures[name] = CONTENDERS[name](task, task.batch)
        results[label] = {name: [] for name in ("kit", *measures)}
        names_in_turn = list(measures)
        for turn in range(rounds + 1):  # the first round warms up
            names_in_turn = names_in_turn[1:] + names_in_turn[:1]  # the first in a round pays for leftovers in memory
            took = {name: seconds_per_step(measures[name], steps[label]) for name in names_in_turn}
            found = {name: (seconds, seconds / took["hand"]) for name, seconds in took.items()}
            found["kit"] = kit_beside_hand(task, steps[label])
            for name, measured in found.items() if turn else ():
                results[label][name].append(measured)
    return results


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the bounds of the median: the 2.5th and 97.5th percentile of 2000 bootstrap medians."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def report(results: dict[str, dict[str, list[tuple[float, float]]]], processes: int) -> None:
    for label, contenders in results.items():
        print(f"\n{label}, {processes} process{'es' if processes > 1 else ''}: ms per step, ratio to the loop by hand")
        for name, measured in contenders.items():
            seconds, ratios = map(list, zip(*measured, strict=True))
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            print(f"  {name:<13} {1e3 * statistics.median(seconds):8.3f}  {middle:6.3f}  ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", default="1000,200", help="steps per block of the MLP and of the GPT")
    parser.add_argument("--nproc", default="1,2", help="numbers of processes, as 1,2,3")
    parser.add_argument("--peers", default=",".join(CONTENDERS), help="hand: the kit beside the loop by hand alone")
    given = parser.parse_args()
    names = [] if given.peers == "hand" else list(dict.fromkeys(["hand", *given.peers.split(",")]))
    steps = dict(zip(("MLP", "GPT"), map(int, given.steps.split(",")), strict=True))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("logs").mkdir()
        for nproc in map(int, given.nproc.split(",")):
            report(launch(bench, names, given.rounds, steps, nproc=nproc)[0], nproc)


if __name__ == "__main__":
    main()
