"""`Task` defines a model, its data and its loss; `TrainState` is a run's position, `Result` its outcome.

A task says nothing about GPUs, precision or the split of the batch: `loop.train` takes care of them.
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

from .. import data, parallel, progress
from ..checkpoints import checkpoint
from ..config import TrainConfig
from . import optim

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Task:
    """A model, its data and its loss, for `train`. A task may be defined in a notebook cell.

    Losses and metrics are sums with counts, not means, so that every split of the batch gives the same gradient and the
    same figures.
    """

    name: str = ""
    """Identifies the task in checkpoints. Default: the class's name."""
    unit: str = "samples"
    """The unit of `count`, and of the logged throughput."""
    backend: str = "torch"
    """The library that builds the model, if the task can use several (recipe sft: "hf", "bnb" or "unsloth"). A run does
    not resume from another backend's checkpoint."""

    whole_batch_loss: bool = False
    """Whether the loss compares samples with each other (SimCLR, CLIP, triplets), so that a batch cannot be computed in
    parts. `train` then refuses accumulation and strategy dp. `distributed.gather_with_gradients` gathers the samples'
    features from all ranks for such a loss."""

    def model(self) -> nn.Module:
        """Return the model on the CPU. torch's random generator is seeded before this call."""
        raise NotImplementedError(f"{type(self).__name__}.model: return the nn.Module to train")

    def train_data(self) -> Dataset[Any]:
        """Return a map-style dataset.

        If it has a method `batch(indices: int64 tensor)`, whole batches are fetched through it. If it has
        `sample_lengths`, a number for each sample, samples of similar length share a micro-batch within a step.
        Batches may be loaded some steps before the step that uses them.
        """
        raise NotImplementedError(f"{type(self).__name__}.train_data: return a dataset with __len__ and __getitem__")

    def val_data(self) -> Dataset[Any] | None:
        """Return the dataset for evaluations, or None for no evaluation."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples; torch's default_collate unless overridden."""
        return default_collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """Return the SUM of the loss over the batch's terms (samples, tokens, voxels), as a scalar tensor.

        May return (loss, {name: sum}) instead: records then show the means of these parts as loss_NAME.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss: return the sum of the batch's losses")

    def count(self, batch: Any) -> int:
        """Return the number of terms in the sum of `loss`, for a batch on the CPU. Default: the batch's samples."""
        return data.samples_in(batch)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Return {name: (sum, count)} over a batch of val_data, to be added up over batches and ranks, then divided.

        {name: distributed.Gather(tensor)} instead gives `summary` the rows of all samples, for example for an AUC.

        This method is also called once before training, on the first samples of val_data, so that a mistake shows at
        once. Sums may be tensors of any shape (a confusion matrix), from which `summary` makes numbers. Under fsdp a
        call of the model needs all ranks: call the model equally often for every batch, or within
        `shards.gathered(model)`.
        """
        found, count = self.loss(model, batch), self.count(batch)
        loss, parts = found if isinstance(found, tuple) else (found, {})
        return {"loss": (loss, count), **{f"loss_{name}": (part, count) for name, part in parts.items()}}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return the reported numbers from the means over val_data: a perplexity, an F1 score.

        A gathered metric arrives as a CPU tensor of all rows, in the order of val_data. This method is then called on
        rank 0 alone.
        """
        return {name: float(value) for name, value in metrics.items()}

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """Return the optimizer: AdamW with weight decay on matrices only. A group's `lr_scale` multiplies its rate."""
        return optim.adamw(model, config.lr, config.weight_decay)

    def schedule(self, step: int, max_steps: int) -> float:
        """Return the factor of the learning rate after `step` steps; if defined, it replaces the config's schedule.

        The result must depend on the arguments alone, so that a resumed run has the same rates.
        """
        raise NotImplementedError

    def fsdp_units(self, model: nn.Module) -> list[nn.Module] | None:
        """Return the modules whose weights fsdp gathers one module at a time; None: the blocks repeated in the model.

        Call each module itself (`block(x)`, not `block.attention(x)`), on all ranks or on none.
        """
        return None

    def on_record(self, record: dict[str, Any]) -> str | None:
        """Receive a record on rank 0 before the record is written, for wandb or prints.

        Entries added to the record are written too. A returned text ends the run as finished, with this text as the
        reason. The run ends at most one step after the record of a training step or an evaluation.
        """
        return None


@dataclass
class TrainState:
    """The position of a run. A checkpoint holds this beside weights and optimizer."""

    step: int = 0
    """Optimizer steps taken."""
    samples_seen: int = 0
    """Position in the data: samples taken in all epochs together."""
    evaluated: int = 0
    """The step of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last evaluation."""
    best: float | None = None
    """The best value of best_metric so far."""
    improved_to: float | None = None
    """The value of best_metric at its last improvement by more than min_delta; kept only with `patience`."""
    without_improvement: int = 0
    """Evaluations since this improvement."""
    seconds: float = 0.0
    """Time spent, over all sessions."""


# Names of a task's methods in other trainers: methods of these names would never be called here
_OTHER_NAMES = {
    "val_dataset": "val_data", "valid_data": "val_data", "validation_data": "val_data", "eval_data": "val_data",
    "eval_dataset": "val_data", "val_dataloader": "val_data", "collate_fn": "collate", "compute_metrics": "metrics",
    "validation_step": "metrics", "configure_optimizers": "optimizer", "configure_optimizer": "optimizer",
}  # fmt: skip


def expect(config: object, task: object, who: str) -> None:
    """Raise TypeError unless given a TrainConfig and a Task, in this order, without misspelt methods."""
    if not isinstance(config, TrainConfig) or not isinstance(task, Task):
        got = " and ".join(
            f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            for value in (config, task)
        )
        raise TypeError(f"{who} expects a TrainConfig and a Task (an instance, not the class), got {got}")
    _expect_no_misspelt_method(task)


def _expect_no_misspelt_method(task: Task) -> None:
    """Raise TypeError for a misspelt method, such as `metric` for `metrics`, because nothing would call it."""
    ours = [name for name, value in vars(Task).items() if callable(value) and name[0] != "_"]
    own = vars(task)
    missing = [name for name in ours if getattr(type(task), name) is getattr(Task, name) and name not in own]
    # only plain functions of the task's own classes: not classes, loss objects, or methods of another library's base
    kinds = [kind for kind in type(task).__mro__[::-1] if issubclass(kind, Task)]
    defined = {name: value for kind in kinds for name, value in vars(kind).items()}
    functions = {name: value for name, value in defined.items() if inspect.isfunction(value)}
    called = {name for function in functions.values() for name in function.__code__.co_names}
    for name in functions:
        if name.startswith("_") or name in called or name in own or hasattr(Task, name):
            continue
        meant = _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, missing, 1, 0.85)), "")
        if meant in missing:
            raise TypeError(
                f"{type(task).__name__}.{name} is no method of Task, and nothing would call it. Did you mean {meant}? "
                f"A method for your own use may begin with an underscore."
            )


FILES = {
    "model.safetensors": "the final weights",
    "best/model.safetensors": "the weights of the best evaluation",
    "checkpoints": "the states from which a stopped run continues",
    "metrics.jsonl": "every number that was logged",
    "tensorboard": "for TensorBoard",
    "config.json": "all parameters",
    "result.json": "how the run ended",
}
"""The meanings of the files in a run's output_dir."""


@dataclass
class Result:
    """The outcome of a run, also written to output_dir/result.json."""

    output_dir: str
    finished: bool
    """False if the run stopped before its last step. The same call continues from there."""
    reason: str
    step: int
    max_steps: int
    samples_seen: int
    metrics: dict[str, float]
    """The metrics of the last evaluation."""
    best: float | None
    """The best value of best_metric; None without an evaluation."""
    seconds: float
    """Training time over all sessions."""
    world_size: int
    strategy: str
    precision: str
    skipped_steps: int
    """Steps not taken because the gradient was not finite."""
    stopped_early: bool = False
    """Whether the run finished before max_steps: its patience ended, or Task.on_record ended the run."""
    remaining_steps: int = 0
    """Steps left to take, if not finished."""
    remaining_seconds: float | None = None
    """Seconds for the remaining steps at this session's pace."""
    weights: dict[str, int] = field(default_factory=dict)
    """Length ("bytes") and checksum ("crc32") of model.safetensors, as it was written."""

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, each as a dictionary."""
        return progress.read(self.output_dir)

    def _say_if_unfinished(self) -> None:
        """Print a line if the run is not finished, because Run All continues with the next cells after a stop."""
        if not self.finished:
            print(
                f"not finished: step {self.step} of {self.max_steps} ({self.reason}). This is the run so far; "
                f"run the same launch again to continue.",
                flush=True,
            )

    def plot(self) -> Figure:
        """Return a figure of loss, learning rate, throughput and use of time; also write run.png and run.svg."""
        self._say_if_unfinished()
        return progress.plot(self.output_dir)

    def files(self, others: dict[str, str] | None = None) -> str:
        """Return a text with one line for each file in output_dir, with the meaning of the file.

        Args:
            others: the meanings of further files by name; these replace the usual meanings.
        """
        own = others or {}
        meanings = own | {name: meaning for name, meaning in FILES.items() if name not in own}
        present = [name for name in meanings if (Path(self.output_dir) / name).exists()]
        return "\n".join([f"{self.output_dir}:", *(f"  {name:24} {meanings[name]}" for name in present)])

    def load(self, model: nn.Module, which: str = "final") -> nn.Module:
        """Load the trained weights ("final", or the "best" by validation); return the model in eval mode.

        Without an evaluation, "best" loads the final weights.

        Raises:
            ValueError: `which` has another value.
            CheckpointError: the weights are another model's.
        """
        if which not in ("final", "best"):
            raise ValueError(f"which: expected 'final' or 'best', got {which!r}")
        self._say_if_unfinished()
        name = {"final": "model.safetensors", "best": "best/model.safetensors"}[which]
        if self.best is None:  # nothing was evaluated, and what is in best/ may be an earlier run's
            name = "model.safetensors"
        path = Path(self.output_dir) / name
        weights = checkpoint.read_tensors(path)
        checkpoint.check_model(weights, parallel.saved_state(model), str(path))
        parallel.load_saved_state(model, weights)
        return model.eval()
