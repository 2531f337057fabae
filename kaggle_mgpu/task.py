"""What a run works on and what it comes to: `Task` says what to train, `Result` what became of it.

A task says nothing of GPUs, precision or how the batch is split; `trainer.train` takes it from there.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from . import checkpoint, data, optim, progress, strategy
from .config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Task:
    """What to train. How many GPUs, which precision, how the batch is split: none of the task's business.

    Losses and metrics are sums with counts, not means: that is what makes one gradient, and one figure, out of any
    split of the batch. A task may be defined in a notebook cell.
    """

    name: str = ""
    """Says whose checkpoint it is. Default: the class's name."""
    unit: str = "samples"
    """What `count` counts; throughput is logged in it."""
    backend: str = "torch"
    """What makes the model trainable (a fine-tuning library, say): checkpoints of one are not another's."""

    def model(self) -> nn.Module:
        """The model, on the CPU, with weights drawn from torch's random generator (which is seeded before)."""
        raise NotImplementedError(f"{type(self).__name__}.model: return the nn.Module to train")

    def train_data(self) -> Dataset[Any]:
        """A map-style dataset. One with a method `batch(indices: int64 tensor)` is asked for whole batches; of one with
        `sample_lengths`, a number for each sample, those of a step that are about as long share a micro-batch."""
        raise NotImplementedError(f"{type(self).__name__}.train_data: return a dataset with __len__ and __getitem__")

    def val_data(self) -> Dataset[Any] | None:
        """What is evaluated, each sample once; None: nothing."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples; torch's default_collate unless overridden."""
        return default_collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The SUM of the loss over the batch's terms (samples, tokens, voxels), a scalar."""
        raise NotImplementedError(f"{type(self).__name__}.loss: return the sum of the batch's losses")

    def count(self, batch: Any) -> int:
        """How many terms `loss` sums over for this batch (still on the CPU). Default: its samples."""
        return data.samples_in(batch)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """Sums and counts over a batch of val_data; over all batches and ranks sum / count is reported.

        Sums may be tensors of any shape (a confusion matrix); `summary` then makes numbers of them. Call the model
        equally often for every batch, whatever is in it, or within `shards.gathered(model)`: where weights are spread
        over the ranks, each call is one that all of them make together.
        """
        return {"loss": (self.loss(model, batch), self.count(batch))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """From the means over val_data to what is reported: the place for a perplexity or an F1 score."""
        return {name: float(value) for name, value in metrics.items()}

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """AdamW, with weight decay on matrices only. A group's `lr_scale` multiplies the learning rate for it."""
        return optim.adamw(model, config.lr, config.weight_decay)

    def fsdp_units(self, model: nn.Module) -> list[nn.Module] | None:
        """Under fsdp, the modules whose weights are gathered one at a time; None: the blocks that the model repeats.

        Each must be called as a module (`block(x)`, not `block.attention(x)`), and by every rank if by any.
        """
        return None

    def on_record(self, record: dict[str, Any]) -> None:
        """Called on rank 0 with every record before it is logged (wandb, prints)."""


@dataclass
class TrainState:
    """Where a run is. With weights, optimizer and random states it is all that a resumed run needs."""

    step: int = 0
    """Optimizer steps taken."""
    samples_seen: int = 0
    """Position in the data: samples taken in all epochs together."""
    evaluated: int = 0
    """The step of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What it gave."""
    best: float | None = None
    """The best value of best_metric so far."""
    seconds: float = 0.0
    """Time spent, over all sessions."""


# What other trainers call a task's methods, for those that are silently not called under their name
_ELSEWHERE = {
    "val_dataset": "val_data", "valid_data": "val_data", "validation_data": "val_data", "eval_data": "val_data",
    "eval_dataset": "val_data", "val_dataloader": "val_data", "collate_fn": "collate", "compute_metrics": "metrics",
    "validation_step": "metrics", "configure_optimizers": "optimizer", "configure_optimizer": "optimizer",
}  # fmt: skip


def expect(config: object, task: object, who: str) -> None:
    """Raise TypeError unless these are a TrainConfig and a Task, in this order, and the task's methods well named."""
    if not isinstance(config, TrainConfig) or not isinstance(task, Task):
        got = [
            f"the class {it.__name__}" if isinstance(it, type) else f"a {type(it).__name__}" for it in (config, task)
        ]
        raise TypeError(
            f"{who} expects a TrainConfig and a Task (an instance, not the class), got {got[0]} and {got[1]}"
        )
    _expect_no_misspelt_method(task)


def _expect_no_misspelt_method(task: Task) -> None:
    """Of a task that defines `metric` and no `metrics`, the kit would call neither, and say nothing."""
    ours = [name for name, value in vars(Task).items() if callable(value) and name[0] != "_"]
    own = vars(task)
    missing = [name for name in ours if getattr(type(task), name) is getattr(Task, name) and name not in own]
    # plain functions of the task's own classes: not a class, a loss object, or what a base of another library brings
    kinds = [kind for kind in type(task).__mro__[::-1] if issubclass(kind, Task)]
    defined = {name: it for kind in kinds for name, it in vars(kind).items()}
    functions = {name: it for name, it in defined.items() if inspect.isfunction(it)}
    called = {name for it in functions.values() for name in it.__code__.co_names}
    for name in functions:
        if name.startswith("_") or name in called or name in own or hasattr(Task, name):
            continue
        meant = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, missing, 1, 0.85)), "")
        if meant in missing:
            raise TypeError(
                f"{type(task).__name__}.{name} is no method of Task, and nothing would call it. Did you mean {meant}? "
                f"A method for your own use may begin with an underscore."
            )


@dataclass
class Result:
    """What a run came to; also in output_dir/result.json."""

    output_dir: str
    finished: bool
    """False where it stopped before its last step; run the same again and it goes on."""
    reason: str
    step: int
    max_steps: int
    samples_seen: int
    metrics: dict[str, float]
    """The last evaluation."""
    best: float | None
    seconds: float
    """Training time over all sessions."""
    world_size: int
    strategy: str
    precision: str
    skipped_steps: int
    """Steps not taken because the gradient was not finite."""
    remaining_steps: int = 0
    """What is left to do where it is not finished."""
    remaining_seconds: float | None = None
    """How long that will take, at this session's pace."""
    weights: dict[str, int] = field(default_factory=dict)
    """Length ("bytes") and checksum ("crc32") of model.safetensors, as it was written."""

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one dictionary a line."""
        return progress.read(self.output_dir)

    def plot(self) -> Figure:
        """Loss, learning rate, throughput and where the time went; also run.png and run.svg in the folder."""
        return progress.plot(self.output_dir)

    def load(self, model: nn.Module, which: str = "final") -> nn.Module:
        """Load the trained weights ("final", or the "best" by validation) into `model`; returns it, in eval mode."""
        if which not in ("final", "best"):
            raise ValueError(f"which: expected 'final' or 'best', got {which!r}")
        name = {"final": "model.safetensors", "best": "best/model.safetensors"}[which]
        if self.best is None:  # nothing was evaluated, and what is in best/ may be an earlier run's
            name = "model.safetensors"
        path = Path(self.output_dir) / name
        weights = checkpoint.read_tensors(path)
        checkpoint.check_model(weights, strategy.saved_state(model), str(path))
        strategy.load_saved_state(model, weights)
        return model.eval()


class DivergedError(FloatingPointError):
    """The gradient is not a number any more."""
