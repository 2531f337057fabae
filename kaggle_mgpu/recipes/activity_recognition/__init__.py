"""Recognise people's activities from windows of accelerometer and gyroscope signals.

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.activity_recognition import ActivityRecognition, Config, measure
    task = ActivityRecognition(Config(data_path="/kaggle/input/uci-har", epochs=40))
    print(task.describe())
    result = launch(train, task.config, task)
    print(measure(task, result))  # accuracy and macro F1 on people the model has never seen, beside two baselines

Or: `python -m kaggle_mgpu train activity_recognition --data-path "UCI HAR Dataset"`. What can be read: `sources.py`.

Three parts, and no person in two of them: training; validation, which chooses the weights that are kept as the best;
and a test set, the published one where there is one, which nothing looks at before training has finished. (Papers on
UCI HAR often choose their epoch by the test set: their figures are a little too good, and not comparable to these.)
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.data import BatchPlan, counted
from kaggle_mgpu.launching import launch, launch_each
from kaggle_mgpu.machine import devices
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.progress import plots
from kaggle_mgpu.training import Result, Task, train

from .model import CHANCES, Network, augment, triads
from .sources import SHORTEST, Windows, chosen, digest, find, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train on windows of inertial signals. A sample is a window."""

    # what the data is stands in the checkpoint's stamp by a digest; where it is mounted may change
    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {"data_path"}

    data_path: str | None = None
    """A folder in the UCI HAR layout, an .npz file, a .csv file or a folder of .csv files. None: the first of these
    among the Kaggle inputs, else BasicMotions from an installed package, else synthetic signals."""
    test_fraction: float = 0.2
    """Share of the subjects kept for the test, where the data has no published test set."""
    test_subjects: tuple[str, ...] | None = None
    """The names of the test's subjects, in place of test_fraction or of the published test set."""
    val_fraction: float = 0.15
    """Share of the other subjects kept for validation, which chooses the best weights. 0: train on all others and test
    the final weights."""
    split_seed: int = 0
    """Another number holds out other subjects. Separate from `seed`, so that seeds compare on the same split."""
    window: int = 128
    """Rows in a window, where windows are cut from .csv recordings."""
    stride: int = 64
    """Rows from the start of one window to the start of the next."""
    width: int = 48
    """Channels of the first convolutions; later ones and attention have twice as many."""
    n_conv: int = 2
    """Convolution blocks at each of two resolutions."""
    n_attention: int = 2
    """Attention blocks."""
    n_head: int = 4
    """Attention heads."""
    augment: bool = True
    """Show each window in each epoch as if another had worn the device: turned, shifted, stretched in time and
    strength. What is drawn for a window does not depend on how the batch is split."""
    turn_degrees: float = 10.0
    """Standard deviation of the random turn around each axis; for channels named as NAME_x, NAME_y, NAME_z. Measured
    on the synthetic signals, whose people carry the device 12 degrees askew: test accuracy 0.94 with 10 degrees,
    0.92 with 5, 0.85 without any augmentation."""
    label_smoothing: float = 0.1
    """In the training loss alone."""
    global_batch_size: int | None = 64
    """Windows per optimizer step over all GPUs."""
    lr: float = 1e-3
    """Peak learning rate for base_batch_size."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "linear"
    """A batch k times as large takes steps k times as long (Goyal et al. 2017, arXiv 1706.02677, who warm up too)."""
    base_batch_size: int = 64
    """The batch size of lr, for lr_scaling."""
    warmup_steps: int | float | str = 0.1
    """Steps of linear warm-up; below 1, a fraction of the run."""
    ema_decay: float | None = 0.99
    """Average the weights with this decay; evaluation and the saved weights then use the average."""
    epochs: int = 20
    """Passes over the training data. Ignored when max_steps is given."""
    epoch_windows: int = 1920
    """Windows in an epoch at the least: a smaller training set is gone through several times in each."""
    data_workers: int | Literal["auto"] = 0
    """Loader processes per rank. The signals are in memory: fetching a window here costs less than sending one."""
    output_dir: str = "activity_recognition"
    """The run's folder: config, metrics, logs, checkpoints, weights, result, test.json and confusion.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {
            "window": SHORTEST, "stride": 1, "width": 1, "n_conv": 0, "n_attention": 0, "n_head": 1, "split_seed": 0,
            "epoch_windows": 1,
        }  # fmt: skip
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {getattr(self, name)!r}")
        if 2 * self.width % self.n_head:
            raise ValueError(
                f"Config.width: expected 2 x width to be a multiple of n_head = {self.n_head}, got {self.width}"
            )
        for name, low in (("test_fraction", 0.01), ("val_fraction", 0.0), ("label_smoothing", 0.0)):
            if not low <= getattr(self, name) <= 0.9:
                raise ValueError(f"Config.{name}: expected {low} to 0.9, got {getattr(self, name)!r}")


class Signals(Dataset[Any]):
    """Windows in memory, in whole batches: (x (B, channels, T), y (B,))."""

    def __init__(self, x: Tensor, y: Tensor, repeats: int = 1) -> None:
        self.x, self.y, self.repeats = x, y, repeats

    def __len__(self) -> int:
        return len(self.y) * self.repeats

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.x[index % len(self.y)], self.y[index % len(self.y)]

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the samples of int64 indices (B,) by one indexing operation instead of B."""
        return self.x[indices % len(self.y)], self.y[indices % len(self.y)]


class Augmented(Signals):
    """Windows one by one, each with random numbers drawn from a generator seeded by (seed, epoch, sample)."""

    batch = None  # type: ignore[assignment]  # a batch's chance would depend on how it is split

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return *super().__getitem__(index), torch.randn(CHANCES)


class ActivityRecognition(Task):
    """Classes of windows. A batch: (x float32 (B, channels, T), y int64 (B,)), in training with (B, CHANCES) more."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._read: tuple[Windows, str, dict[str, NDArray[np.int64]]] | None = None

    def _data(self) -> tuple[Windows, str, dict[str, NDArray[np.int64]]]:
        """The windows, read and checked at first use; they travel to the workers with the task."""
        if self._read is None:
            c = self.config
            windows, reason = find(c.data_path, c.window, c.stride)
            if (windows.y == windows.y[0]).all():
                raise ValueError(f"{windows.source}: all windows are of one class, {windows.classes[windows.y[0]]!r}")
            parts = split(windows, c.test_fraction, c.val_fraction, c.test_subjects, c.split_seed)
            self._read = windows, reason, parts
            # Stamps the checkpoints: other data, another split or another order of classes is another task
            self.name = f"ActivityRecognition {digest(windows, parts)}"
        return self._read

    @property
    def windows(self) -> Windows:
        """All windows; `part` selects train, val or test."""
        return self._data()[0]

    def part(self, name: Part) -> tuple[Tensor, Tensor]:
        """(x float32 (windows, channels, T), y int64 (windows,)) of "train", "val" or "test"."""
        rows = self._data()[2][name]
        return torch.from_numpy(self.windows.x[rows]), torch.from_numpy(self.windows.y[rows].astype(np.int64))

    def subjects(self, name: Part) -> list[str]:
        """Return the subjects of a part; [] where the data names none."""
        whose = self.windows.subject
        return [] if whose is None else sorted(set(whose[self._data()[2][name]].tolist()), key=_number_first)

    def describe(self) -> str:
        """Describe the source, the reason for the source, shape, classes and the three parts in a few lines."""
        w, reason, parts = self._data()
        lines = [
            f"signals: {w.source} ({reason})",
            f"{len(w.y):,} windows of {w.x.shape[1]} channels ({', '.join(w.channels)}) x {w.x.shape[2]} moments; "
            f"{len(w.classes)} classes: {', '.join(w.classes)}",
        ]
        if w.note:
            lines.insert(1, f"note: {w.note}")
        published = "published" if w.test is not None and not self.config.test_subjects else "by subject"
        for name, what in {"train": "training", "val": "validation", "test": f"test ({published})"}.items():
            whose = self.subjects(name)  # type: ignore[arg-type]
            text = (
                f", {counted(len(whose), 'subject')}: {', '.join(whose[:30])}{', …' * (len(whose) > 30)}"
                if whose
                else ""
            )
            lines.append(f"{what}: {counted(len(parts[name]), 'window')}{text}")
        return "\n".join(lines)

    def model(self) -> Network:
        c, (x, _) = self.config, self.part("train")
        # of the training windows alone: what is known about the others is not known yet
        mean, std = x.double().mean((0, 2)), x.double().std((0, 2))
        std = torch.where(std > 1e-8, std, 1.0)  # a channel that never changes
        return Network(mean, std, len(self.windows.classes), c.width, c.n_conv, c.n_attention, c.n_head)

    def train_data(self) -> Dataset[Any]:
        x, y = self.part("train")
        return (Augmented if self.config.augment else Signals)(x, y, -(-self.config.epoch_windows // len(y)))

    def val_data(self) -> Dataset[Any] | None:
        x, y = self.part("val")
        return Signals(x, y) if len(y) else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross entropy in nats, summed over windows; smoothed in training."""
        x, y, *chance = batch
        if chance:
            x = augment(x, chance[0], triads(self.windows.channels), self.config.turn_degrees, 0.1, 0.1)
        smoothing = self.config.label_smoothing if model.training else 0.0
        return F.cross_entropy(model(x).float(), y, reduction="sum", label_smoothing=smoothing)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, int]]:
        """Return the loss and the confusion matrix (true class, predicted class) of a batch."""
        x, y = batch
        logits = model(x).float()
        found = confusion(y, logits.argmax(1), len(self.windows.classes))
        return {"loss": (F.cross_entropy(logits, y, reduction="sum"), len(y)), "confusion": (found, len(y))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """loss (nats per window), accuracy and macro_f1."""
        shares = metrics["confusion"]
        return {"loss": float(metrics["loss"]), "accuracy": float(shares.trace()), "macro_f1": macro_f1(shares)}


def _number_first(name: str) -> tuple[float, str]:
    return (float(name) if name.isdigit() else float("inf")), name


# Figures of merit
def confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often class i (row) was taken for class j (column), int64 (classes, classes)."""
    # a product of one-hot rows: bincount has no deterministic form on a GPU
    one_hot = [F.one_hot(labels, classes).double() for labels in (true, predicted)]
    with torch.autocast(true.device.type, enabled=False):
        return (one_hot[0].T @ one_hot[1]).round().long()


def macro_f1(matrix: Tensor) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN), from counts or shares.

    A class absent from labels and predictions does not count, as in scikit-learn's f1_score(average="macro").
    """
    matrix = matrix.double()
    both = matrix.sum(0) + matrix.sum(1)
    return float((2 * matrix.diagonal()[both > 0] / both[both > 0]).mean())


def baselines(task: ActivityRecognition) -> dict[str, Tensor]:
    """Return the confusion matrices on the test set of two simple models: majority class and nearest centroid.

    majority: always the most frequent class. nearest_centroid: each window is the mean and standard deviation of its
    channels, each of these scaled by its own standard deviation; the class whose mean is nearest (Euclidean).
    """
    (x, y), (x_test, y_test) = task.part("train"), task.part("test")
    classes = len(task.windows.classes)

    def features(x: Tensor) -> Tensor:
        return torch.cat([x.double().mean(2), x.double().std(2)], 1)

    known = features(x)
    mean, std = known.mean(0), known.std(0).clamp(min=1e-12)
    there = [label for label in range(classes) if (y == label).any()]
    centroids = torch.stack([((known[y == label] - mean) / std).mean(0) for label in there])
    nearest = torch.cdist((features(x_test) - mean) / std, centroids).argmin(1)
    majority = torch.bincount(y, minlength=classes).argmax()
    return {
        "majority": confusion(y_test, majority.expand(len(y_test)), classes),
        "nearest_centroid": confusion(y_test, torch.tensor(there)[nearest], classes),
    }


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Probabilities float (windows, classes) of windows (windows, channels, T), on the CPU, in full precision.

    The windows as they are read: the model normalises them itself. It runs where its weights are.
    """
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).float().softmax(1).cpu() for part in x.split(batch_size)])


@dataclass
class Report:
    """The scores of a run on the test set; printed, a table."""

    weights: str
    """"best" by validation, or "final" where there is none."""
    classes: tuple[str, ...]
    confusion: dict[str, Tensor]
    """By model: "majority", "nearest_centroid" and "this model"."""
    by_subject: dict[str, float]
    """Accuracy of this model on each test subject; {} where the data names no subjects."""

    def accuracy(self, model: str = "this model") -> float:
        matrix = self.confusion[model].double()
        return float(matrix.trace() / matrix.sum())

    def macro_f1(self, model: str = "this model") -> float:
        return macro_f1(self.confusion[model])

    def __str__(self) -> str:
        count = int(self.confusion["this model"].sum())
        lines = [f"on {counted(count, 'window')} of the test set, {self.weights} weights", f"{'':18}accuracy  macro F1"]
        for name in self.confusion:
            lines.append(f"{name.replace('_', ' '):18}{self.accuracy(name):8.4f}  {self.macro_f1(name):8.4f}")
        if self.by_subject:
            worst = min(self.by_subject, key=lambda subject: self.by_subject[subject])
            lines.append(
                f"{counted(len(self.by_subject), 'subject')}; the worst is {worst} with {self.by_subject[worst]:.4f}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The confusion matrix: shares of each true class, with counts."""
        counts = self.confusion["this model"]
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        size = 2.5 + 0.7 * len(counts)
        figure = plots.figure_of(size + 1, size)
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="Greys", vmin=0, vmax=1)
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                axes.text(j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
        axes.set_xticks(range(len(counts)), self.classes, rotation=45, ha="right")
        axes.set_yticks(range(len(counts)), self.classes)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"test: accuracy {self.accuracy():.3f}, macro F1 {self.macro_f1():.3f}")
        figure.colorbar(image, label="share of the true class", shrink=0.8)
        for drawn in figure.axes:
            plots.ink(drawn)
        return figure


def measure(task: ActivityRecognition, result: Result) -> Report:
    """Measure a finished run on the test set, once: writes test.json and confusion.png into its folder.

    Raises:
        RuntimeError: the run has not finished.
    """
    if not result.finished:
        raise RuntimeError(
            f"the run in {result.output_dir} stopped at step {result.step} of {result.max_steps} ({result.reason}). "
            f"The test set is for when it has finished: run the same again"
        )
    which = "best" if result.best is not None else "final"
    # on the CPU, where it takes seconds: a CUDA context here would stay on the GPU for all that this notebook does
    model = result.load(task.model(), which)
    x, y = task.part("test")
    predicted = predict(model, x).argmax(1)
    classes = task.windows.classes
    whose = task.windows.subject
    by_subject: dict[str, float] = {}
    if whose is not None:
        of_test = whose[task._data()[2]["test"]]
        hits = (predicted == y).numpy()
        by_subject = {name: float(hits[of_test == name].mean()) for name in task.subjects("test")}
    found = {**baselines(task), "this model": confusion(y, predicted, len(classes))}
    report = Report(which, classes, found, by_subject)
    scores = {name: {"accuracy": report.accuracy(name), "macro_f1": report.macro_f1(name)} for name in found}
    document = {
        "weights": which,
        "source": task.windows.source,
        **scores.pop("this model"),
        "baselines": scores,
        "by_subject": by_subject,
        "classes": classes,
        "confusion": found["this model"].tolist(),
        "channels": task.windows.channels,
        "subjects": {name: task.subjects(name) for name in ("train", "val", "test")},
    }
    folder = Path(result.output_dir)
    (folder / "test.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    report.plot().savefig(folder / "confusion.png", dpi=110)
    return report


# Cross-validation
@dataclass
class CrossValidation:
    """Predictions for all windows, each by the model of its fold, trained without the window's subject."""

    classes: tuple[str, ...]
    subjects: list[tuple[str, ...]]
    """By fold."""
    probabilities: Tensor
    """Float (windows, classes), in the order of `ActivityRecognition.windows`."""
    confusion: list[Tensor]
    """By fold."""

    def scores(self) -> dict[str, list[float]]:
        """Return accuracy and macro F1 by fold."""
        accuracy = [float(matrix.trace() / matrix.sum()) for matrix in self.confusion]
        return {"accuracy": accuracy, "macro_f1": [macro_f1(matrix) for matrix in self.confusion]}

    def __str__(self) -> str:
        scores = list(zip(*self.scores().values(), strict=True))
        lines = [f"{'':20}subjects  windows  accuracy  macro F1"]
        for number, (people, matrix, row) in enumerate(zip(self.subjects, self.confusion, scores, strict=True)):
            lines.append(f"fold {number:<15}{len(people):8}{int(matrix.sum()):9}{row[0]:10.4f}{row[1]:10.4f}")
        for name, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            lines.append(f"{name:37}" + "".join(f"{of(column):10.4f}" for column in zip(*scores, strict=True)))
        return "\n".join(lines)


def cross_validate(config: Config, folds: int = 5) -> CrossValidation | None:
    """Train on all subjects but those of a fold, for each fold, one fold per GPU at a time; predict the fold's windows.

    Writes out_of_fold.npz (probabilities, y, subject, fold) and folds.json into the run's folder. Call it again after
    an interrupt or in the next session: finished folds return at once, the others go on.

    Args:
        config: nproc is the number of folds at the same time.

    Returns:
        None while folds have not finished.

    Raises:
        ValueError: fewer than two folds or more than there are subjects, or a fold that cannot be.
    """
    windows = ActivityRecognition(config).windows
    whose = [] if windows.subject is None else windows.subject.tolist()
    names = chosen(sorted(set(whose)), 1.0, config.split_seed)
    if not 2 <= folds <= len(names):
        raise ValueError(f"folds: expected 2 to {len(names)}, the number of subjects in the data, got {folds}")
    subjects = [tuple(names[number::folds]) for number in range(folds)]
    configs = [
        config.replace(test_subjects=held, nproc=1, strategy="single", output_dir=f"{config.output_dir}/{folds}-fold")
        for held in subjects
    ]
    parts = [split(windows, c.test_fraction, c.val_fraction, c.test_subjects, c.split_seed) for c in configs]
    at_once = None if config.nproc == "auto" else int(config.nproc)
    predicted = launch_each(_predict_fold, configs, at_once=at_once, gpu_ids=config.gpu_ids)
    if missing := sum(each is None for each in predicted):
        print(f"{folds - missing} of {folds} folds have finished: run this again, and the others go on", flush=True)
        return None
    probabilities, number_of = torch.empty(len(whose), len(windows.classes)), np.empty(len(whose), np.int64)
    confusions = []
    for number, (part, given) in enumerate(zip(parts, predicted, strict=True)):
        probabilities[part["test"]], number_of[part["test"]] = given, number
        y = torch.from_numpy(windows.y[part["test"]].astype(np.int64))
        confusions.append(confusion(y, given.argmax(1), len(windows.classes)))
    found = CrossValidation(windows.classes, subjects, probabilities, confusions)
    folder = Path(config.output_dir)
    np.savez(
        folder / "out_of_fold.npz",
        probabilities=probabilities.numpy(),
        y=windows.y,
        subject=np.array(whose),
        fold=number_of,
    )
    document = {"classes": windows.classes, "subjects": subjects, **found.scores()}
    (folder / "folds.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return found


def _predict_fold(config: Config) -> Tensor | None:
    """Train a fold's model; return its probabilities for the fold's windows, or None if the run has not finished."""
    task = ActivityRecognition(config)
    result = train(config, task)
    if not result.finished:
        return None
    return predict(result.load(task.model(), "final" if result.best is None else "best"), task.part("test")[0])


# Side by side
@distributed.returns_rank0
def _measured(config: TrainConfig, task: Task) -> tuple[Result, list[int]]:
    """Train, and return the result with the peak memory of torch on each GPU (bytes; [] without a GPU)."""
    if torch.cuda.is_initialized():  # one process trains where it was called: what was there before does not count
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    result = train(config, task)
    used = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    return result, [nbytes for rank in distributed.gather(used) for nbytes in rank if nbytes]


def side_by_side(config: Config, task: Task, steps: int = 60) -> list[dict[str, Any]]:
    """Take the same `steps` training steps under each strategy possible on this machine; on a CPU, two replicas.

    Returns:
        One row a strategy: strategy, replicas, samples_per_s (the median of a few records, the first left out),
        memory (bytes of the fullest GPU, None without one), and what validation gave at the end: loss, accuracy.
        The same figures in all rows are the point: to 1e-6 in fp32, to rounding in half precision.
    """
    gpus = len(devices.select(config.gpu_ids))
    replicas = (gpus or 2) if config.nproc == "auto" else int(config.nproc)
    # the batch that so many replicas have, whatever their number: with micro_batch_size alone it would be another one
    batch = BatchPlan.make(
        dataset_size=1,
        num_replicas=replicas,
        global_batch_size=config.global_batch_size,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    ).global_batch_size
    config = config.replace(global_batch_size=batch, gradient_accumulation_steps=None)
    rows = []
    for strategy in ("single", "dp", "ddp") if replicas > 1 else ("single",):
        folder = Path(config.output_dir) / "compare" / strategy
        shutil.rmtree(folder, ignore_errors=True)
        changes: dict[str, Any] = {"strategy": strategy, "nproc": 1 if strategy == "single" else replicas}
        changes |= {
            "max_steps": steps,
            "log_every": max(1, steps // 6),
            "eval_every": "end",
            "resume": "never",
            "tensorboard": False,
        }
        result, memory = launch(_measured, config.replace(**changes, output_dir=str(folder)), task)
        paces = [r["samples_per_s"] for r in result.records() if r["kind"] == "train"]
        rows.append(
            {
                "strategy": strategy,
                "replicas": changes["nproc"],
                "samples_per_s": statistics.median(paces[1:] or paces),
                "memory": max(memory, default=None),
                "loss": result.metrics.get("loss"),
                "accuracy": result.metrics.get("accuracy"),
            }
        )
    return rows


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `side_by_side` as a table."""
    lines = ["strategy  replicas  windows/s  ratio  memory per GPU  validation loss  accuracy"]
    for row in rows:
        memory = "no GPU" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
        ratio = row["samples_per_s"] / rows[0]["samples_per_s"]
        loss, accuracy = ("-" if row[name] is None else f"{row[name]:.6f}" for name in ("loss", "accuracy"))
        lines.append(
            f"{row['strategy']:8}  {row['replicas']:8}  {row['samples_per_s']:9,.0f}  {ratio:5.2f}  {memory:>14}  "
            f"{loss:>15}  {accuracy:>8}"
        )
    return "\n".join(lines)


def task(config: Config) -> ActivityRecognition:
    """Return the task of a config."""
    return ActivityRecognition(config)


def run(config: Config) -> Result:
    """Train, and test when the training has finished: the work of the command line."""
    distributed.init()  # under torchrun this is one of several, of whom one speaks
    what = task(config)
    if distributed.is_main():
        print(what.describe(), flush=True)
    result: Result = launch(train, config, what)
    if result.finished and distributed.is_main():
        print(measure(what, result), flush=True)
    return result
