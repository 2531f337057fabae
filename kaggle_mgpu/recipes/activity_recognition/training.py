"""The task `ActivityRecognition`: a class for each window of signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from kaggle_mgpu.data import counted
from kaggle_mgpu.training import Task

from .metrics import confusion, macro_f1
from .model import N_RANDOM, Network, augment, triads
from .settings import Config
from .sources import Windows, digest, find, read_unlabelled, split

Part = Literal["train", "val", "test"]


class Signals(Dataset[Any]):
    """Windows in memory, `repeats` times per epoch; `batch` gives (x (B, channels, T), y (B,))."""

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

    batch = None  # type: ignore[assignment]  # fetch one by one: numbers drawn per batch would depend on its split

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return *super().__getitem__(index), torch.randn(N_RANDOM)


class ActivityRecognition(Task):
    """Classify windows. A batch: (x float32 (B, channels, T), y int64 (B,)), plus (B, N_RANDOM) if augmented."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._read: tuple[Windows, str, dict[str, NDArray[np.int64]]] | None = None
        self.unlabelled: tuple[NDArray[np.float32], list[str]] | None = None
        """The windows of predict_path and their ids, once the data has been read."""

    def _data(self) -> tuple[Windows, str, dict[str, NDArray[np.int64]]]:
        """Return windows, reason and parts: read and checked at first use, then pickled with the task."""
        if self._read is None:
            c = self.config
            windows, reason = find(c.data_path, c.window, c.stride)
            if (windows.y == windows.y[0]).all():
                name = windows.classes[windows.y[0]]
                raise ValueError(f"{windows.source}: all windows are of one class, {name!r}; expected two or more")
            parts = split(windows, c.test_fraction, c.val_fraction, c.test_subjects, c.split_seed)
            if c.predict_path is not None:  # read now, so that a malformed file is found before training
                self.unlabelled = read_unlabelled(Path(c.predict_path).expanduser(), windows.x.shape[1])
            self._read = windows, reason, parts
            # checkpoints store the name: a run does not continue with other data, another split or order of classes
            self.name = f"ActivityRecognition {digest(windows, parts)}"
        return self._read

    @property
    def windows(self) -> Windows:
        """All windows; `part` selects train, val or test."""
        return self._data()[0]

    def rows(self, name: Part) -> NDArray[np.int64]:
        """Return the indices of a part's windows in `windows`, in order."""
        return self._data()[2][name]

    def part(self, name: Part) -> tuple[Tensor, Tensor]:
        """Return (x float32 (windows, channels, T), y int64 (windows,)) of "train", "val" or "test"."""
        rows = self.rows(name)
        return torch.from_numpy(self.windows.x[rows]), torch.from_numpy(self.windows.y[rows].astype(np.int64))

    def subjects(self, name: Part) -> list[str]:
        """Return the subjects of a part; [] where the data names none."""
        whose = self.windows.subject
        return [] if whose is None else sorted(set(whose[self.rows(name)].tolist()), key=_number_first)

    def describe(self) -> str:
        """Describe the source and the reason for it, the shape, the classes and the three parts in a few lines."""
        w, reason, parts = self._data()
        lines = [
            f"signals: {w.source} ({reason})",
            f"{len(w.y):,} windows of {w.x.shape[1]} channels ({', '.join(w.channels)}) x {w.x.shape[2]} time steps; "
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
        # from the training windows alone, so that nothing about the held-out windows enters the model
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
        x, y, *noise = batch
        if noise:
            x = augment(x, noise[0], triads(self.windows.channels), self.config.turn_degrees, 0.1, 0.1)
        smoothing = self.config.label_smoothing if model.training else 0.0
        return F.cross_entropy(model(x).float(), y, reduction="sum", label_smoothing=smoothing)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, int]]:
        """Return (sum, number of windows) for the loss in nats and the confusion matrix (true, predicted class)."""
        x, y = batch
        logits = model(x).float()
        found = confusion(y, logits.argmax(1), len(self.windows.classes))
        return {"loss": (F.cross_entropy(logits, y, reduction="sum"), len(y)), "confusion": (found, len(y))}

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return loss (nats per window), accuracy and macro_f1."""
        shares = metrics["confusion"]
        return {"loss": float(metrics["loss"]), "accuracy": float(shares.trace()), "macro_f1": macro_f1(shares)}


def _number_first(name: str) -> tuple[float, str]:
    return (float(name) if name.isdigit() else float("inf")), name


def task(config: Config) -> ActivityRecognition:
    """Return the task of a config."""
    return ActivityRecognition(config)
