"""Read the smart-watch recordings in the installed package seglearn, without importing seglearn.

140 recordings at 50 Hz of accelerometer and gyroscope: seven shoulder exercises of ten people, both arms (Burns et al.
2018, arXiv 1802.01489). The file is a pickled dictionary; only NumPy's arrays are unpickled, so it can run no code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .windows import Windows

FILE = "data/watch_dataset.npy"
EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}
CHANNELS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
_ALLOWED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    """An unpickler of NumPy's arrays and plain Python values alone."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # the name before NumPy 2
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"its pickle would import {module}.{name}, but only arrays are allowed")
        return super().find_class(module, name)


def read_watch(file: Path, window: int, stride: int) -> Windows:
    """Read seglearn's watch_dataset.npy, and cut each recording into windows every `stride` rows; (6, window) each.

    Raises:
        ValueError: the file is not that of seglearn 1.2, or no recording is as long as a window.
    """
    xs, ys, subjects = [], [], []
    try:
        content = io.BytesIO(file.read_bytes())
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        read(content)
        found = _Arrays(content, encoding="latin1").load().item()
        classes = tuple(EXERCISES.get(name, name) for name in found["y_labels"])
        for signals, label, subject in zip(found["X"], found["y"], found["subject"], strict=True):
            if signals.shape[1:] != (len(CHANNELS),) or not np.isfinite(signals).all():
                raise ValueError(f"expected finite numbers (rows, {len(CHANNELS)}), got {signals.shape}")
            for at in range(0, len(signals) - window + 1, stride):
                xs.append(signals[at : at + window].T.astype(np.float32))
                ys.append(int(label))
                subjects.append(str(subject))
        if not ys:
            raise ValueError("expected a recording as long as a window, got none")
        if not 0 <= min(ys) <= max(ys) < len(classes):
            raise ValueError(f"expected labels 0 to {len(classes) - 1}, got {min(ys)} to {max(ys)}")
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError) as error:
        raise ValueError(
            f"{file}: not readable as the recordings of seglearn 1.2, cut into windows of {window} rows: {error}"
        ) from None
    return Windows(
        x=np.stack(xs),
        y=np.array(ys),
        subject=np.array(subjects),
        test=None,
        classes=classes,
        channels=CHANNELS,
        source=f"exercises of ten people with a smart watch, from the installed package seglearn ({file})",
        note=f"cut into windows of {window} rows at 50 Hz, one every {stride} rows",
    )
