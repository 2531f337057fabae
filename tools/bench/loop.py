"""Time a training step of the kit, of a loop written by hand, of a usual loop, and of other libraries.

    python tools/bench/loop.py                  # both models, one process and two
    python tools/bench/loop.py --rounds 9 --peers hand,people

All train the same model on the same data with clipping and a cosine schedule, a block of steps at a time, in turn, in
one process group. A step is timed from one computation of the loss to the next, for all alike. Each round gives a
ratio to the loop by hand; printed are their median and the interval that holds it in 95 % of 2000 bootstrap samples.
The noise of a step is nearly independent of the step before, so precision grows with rounds times steps, and longer
blocks spend less time on starts: `--rounds 81 --steps 1000,200` tells 1 %, in 15 minutes.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from kaggle_mgpu import Task, TrainConfig, distributed, launch, optim, train

SAMPLES, LR, LOG_EVERY = 4096, 1e-3, 50
# untimed steps at the start of each block: some contenders start a new run for a block, whose first steps allocate
WARM_UP = 10
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


def hand(task: Any, batch: int) -> Callable[[int], None]:
    data, rank, world = task.train_data(), distributed.rank(), distributed.world_size()

    def run(steps: int) -> None:
        model = task.model()  # anew in each block, as the kit's: where tensors lie in memory changes a step by some %
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

    return run


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


CONTENDERS: dict[str, Any] = {f.__name__: f for f in (kit, hand, people, accelerate, transformers, lightning)}


def bench(names: list[str], rounds: int, steps: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds per step of each model, contender and round; every rank must call this."""
    distributed.init()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[float]]] = {}
    for task in (MLPTask(), GPTTask()):
        label = "MLP" if isinstance(task, MLPTask) else "GPT"
        measures = {}
        for name in names:
            if name == "lightning" and dist.is_initialized():
                continue  # starts its own processes
            with contextlib.suppress(ImportError):
                measures[name] = CONTENDERS[name](task, task.batch)
        times: dict[str, list[float]] = {name: [] for name in measures}
        names_in_turn = list(measures)
        for turn in range(rounds + 1):  # the first round warms up
            names_in_turn.append(names_in_turn.pop(0))  # the first in a round pays for leftovers in memory
            for name in names_in_turn:
                took = seconds_per_step(measures[name], steps[label])
                if turn:
                    times[name].append(took)
        results[label] = times
    return results


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the bounds of the median: the 2.5th and 97.5th percentile of 2000 bootstrap medians."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def report(results: dict[str, dict[str, list[float]]], processes: int) -> None:
    for label, times in results.items():
        print(f"\n{label}, {processes} process{'es' if processes > 1 else ''}: ms per step, ratio to the loop by hand")
        for name, values in times.items():
            ratios = [value / by_hand for value, by_hand in zip(values, times["hand"], strict=True)]
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            print(f"  {name:<13} {1e3 * statistics.median(values):8.3f}  {middle:6.3f}  ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", default="200,50", help="steps per block of the MLP and of the GPT")
    parser.add_argument("--nproc", default="1,2", help="numbers of processes, as 1,2,3")
    parser.add_argument("--peers", default=",".join(name for name in CONTENDERS if name != "kit"))
    given = parser.parse_args()
    names = ["kit", *given.peers.split(",")]
    steps = dict(zip(("MLP", "GPT"), map(int, given.steps.split(",")), strict=True))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("logs").mkdir()
        for nproc in map(int, given.nproc.split(",")):
            report(launch(bench, names, given.rounds, steps, nproc=nproc)[0], nproc)


if __name__ == "__main__":
    main()
