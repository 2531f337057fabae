"""Measure a finished run on the test set, beside two baselines, and write predictions as .csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kaggle_mgpu.checkpoints import write_text
from kaggle_mgpu.data import counted
from kaggle_mgpu.launching import launch
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.progress import plots
from kaggle_mgpu.training import Result, train

from .metrics import confusion, macro_f1
from .settings import Config
from .training import ActivityRecognition, task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def baselines(task: ActivityRecognition) -> dict[str, Tensor]:
    """Return the confusion matrices on the test set of two simple models: majority class and nearest centroid.

    majority: always the most frequent class of the training windows. nearest_centroid: a window is described by the
    mean and standard deviation of each channel, standardised over the training windows, and gets the class with the
    nearest mean (Euclidean distance).
    """
    (x, y), (x_test, y_test) = task.part("train"), task.part("test")
    classes = len(task.windows.classes)

    def features(x: Tensor) -> Tensor:
        return torch.cat([x.double().mean(2), x.double().std(2)], 1)

    known = features(x)
    mean, std = known.mean(0), known.std(0).clamp(min=1e-12)
    present = [label for label in range(classes) if (y == label).any()]
    centroids = torch.stack([((known[y == label] - mean) / std).mean(0) for label in present])
    nearest = torch.cdist((features(x_test) - mean) / std, centroids).argmin(1)
    majority = torch.bincount(y, minlength=classes).argmax()
    return {
        "majority": confusion(y_test, majority.expand(len(y_test)), classes),
        "nearest_centroid": confusion(y_test, torch.tensor(present)[nearest], classes),
    }


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Return class probabilities, float (windows, classes) on the CPU, for windows x (windows, channels, T), in fp32.

    Pass the windows as they are read, since the model normalises them. The model runs on the device of its weights.
    """
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).float().softmax(1).cpu() for part in x.split(batch_size)])


@dataclass
class Report:
    """The scores of a run on the test set; printing a report shows a table."""

    weights: str
    """"best" by validation, or "final" if nothing was held out for validation."""
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
                f"{counted(len(self.by_subject), 'subject')}; the lowest accuracy is {self.by_subject[worst]:.4f}, of "
                f"subject {worst}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Draw the confusion matrix: colours are shares of each true class, numbers are counts."""
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


def write_predictions(
    path: Path, ids: Sequence[str | int], probabilities: Tensor, classes: Sequence[str], digits: int = 6
) -> None:
    """Write a .csv with a row per window: id, label (the most probable class), and the probability of each class.

    Args:
        probabilities: float (windows, classes).
        digits: decimals of each probability.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "label", *classes])
    for name, row in zip(ids, probabilities.tolist(), strict=True):
        rows.writerow([name, classes[row.index(max(row))], *(f"{value:.{digits}f}" for value in row)])
    write_text(path, text.getvalue())


def measure(task: ActivityRecognition, result: Result) -> Report:
    """Measure a finished run on the test set; write test.json, confusion.png and test_predictions.csv.

    The ids in test_predictions.csv are the windows' numbers in the data. The predictions for predict_path, if given, go
    into predictions.csv. All files are in the run's folder.

    Raises:
        RuntimeError: the run has not finished.
    """
    if not result.finished:
        raise RuntimeError(
            f"the run in {result.output_dir} stopped at step {result.step} of {result.max_steps} ({result.reason}). "
            f"The test set is measured after training: run the same cell or command again"
        )
    which = "best" if result.best is not None else "final"
    # on the CPU, which takes seconds: a CUDA context would occupy GPU memory until this process (the notebook) ends
    model = result.load(task.model(), which)
    x, y = task.part("test")
    probabilities = predict(model, x)
    predicted = probabilities.argmax(1)
    classes = task.windows.classes
    whose = task.windows.subject
    by_subject: dict[str, float] = {}
    if whose is not None:
        of_test = whose[task.rows("test")]
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
    write_predictions(folder / "test_predictions.csv", task.rows("test").tolist(), probabilities, classes)
    if task.unlabelled is not None:
        windows, ids = task.unlabelled
        write_predictions(folder / "predictions.csv", ids, predict(model, torch.from_numpy(windows)), classes)
    (folder / "test.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    report.plot().savefig(folder / "confusion.png", dpi=110)
    return report


def run(config: Config) -> Result:
    """Train, then measure on the test set when training has finished, as the command line does."""
    distributed.init()  # under torchrun several processes are here, and only rank 0 prints
    what = task(config)
    if distributed.is_main():
        print(what.describe(), flush=True)
    result: Result = launch(train, config, what)
    if result.finished and distributed.is_main():
        print(measure(what, result), flush=True)
    return result
