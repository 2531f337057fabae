"""Find, read and check windows of inertial signals, and hold out some subjects.

    windows, reason = find(data_path=None, window=128, stride=64)   # searches the Kaggle inputs
    parts = split(windows, test_fraction=0.2, val_fraction=0.15)    # {"train": indices, "val": ..., "test": ...}

Three layouts are read, and every value is checked before training starts:

UCI HAR: a folder with `train/Inertial Signals/body_acc_x_train.txt` and the eight others (a window of 128 numbers per
line), `train/y_train.txt` (labels from 1), `train/subject_train.txt`, the same in `test`, and `activity_labels.txt`.

.npz: arrays `x` float (windows, channels, time), `y` (windows,) and `subject` (windows,), numbers or strings; optional
`classes` (names; y then counts from 0) and `channels` (names, such as acc_x).

.csv, a file or a folder of files, one row per time step: the columns `subject,label,time`, then one per channel. The
rows of a recording are consecutive. A recording ends where subject or label changes, or where time does not
increase or jumps by more than 1.5 times the file's median step. Recordings are cut into windows; rows that do not fill
a window are dropped.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import warnings
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaggle_mgpu.machine import session

from .embedded import embedded
from .windows import Windows

UCI_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
UCI_ACTIVITIES = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
CSV_FILES = "*.[cC][sS][vV]"
CSV_COLUMNS = ["subject", "label", "time"]
NPZ_ARRAYS = ("x", "y", "subject")
SHORTEST = 8
"""Fewest time steps in a window, since the network halves their number twice."""
LAYOUTS = (
    "the UCI HAR layout (train/Inertial Signals, test/Inertial Signals), an .npz file with the arrays x, y and "
    "subject, or .csv with the columns subject,label,time,CHANNEL,..."
)


def find(data_path: str | None, window: int = 128, stride: int = 64) -> tuple[Windows, str]:
    """Return the windows of `data_path`, else of the inputs, else of `embedded`, and the reason for the choice.

    Args:
        window, stride: rows in a window, and rows between the starts of two windows; for recordings (.csv, seglearn).

    Raises:
        FileNotFoundError: data_path does not exist, or a file of the layout is missing.
        ValueError: an unknown layout, or a wrong value, with its file and line.
    """
    if data_path is not None:
        path = Path(data_path).expanduser().resolve()
        if not path.exists():
            raise FileNotFoundError(f"data_path: no such file or folder: {path}")
        reason = "data_path"
    else:
        path, reason = session.input_root(), "found among the inputs"
    found = _find_layout(path)
    if found is not None:
        windows = _read(*found, window, stride)
    elif data_path is not None:
        raise ValueError(f"data_path: {path} is not in a known layout. Expected {LAYOUTS}")
    else:
        windows, reason = embedded(window, stride), "no data_path, and nothing in a known layout among the inputs"
    if windows.x.shape[2] < SHORTEST:
        raise ValueError(
            f"{windows.source}: windows of {windows.x.shape[2]} time steps are too short, expected {SHORTEST} or more"
        )
    return windows, reason


def _find_layout(place: Path) -> tuple[str, Path] | None:
    """Return the layout found in or below `place`: ("uci", folder), ("npz", file), ("csv", file or folder), or None."""
    if place.is_file():
        layout = place.suffix[1:].lower()
        return (layout, place) if layout in ("npz", "csv") else None
    # __MACOSX: what macOS leaves beside the files it zips
    signals = [path for path in session.find("Inertial Signals", [place]) if "__MACOSX" not in path.parts]
    if signals:
        return "uci", signals[0].parent.parent
    for file in session.find("*.npz", [place], ignore_case=True):
        if _npz_names(file) >= set(NPZ_ARRAYS):
            return "npz", file
    for file in session.find(CSV_FILES, [place]):
        if _csv_header(file)[:3] == CSV_COLUMNS:
            return "csv", file.parent
    return None


def _read(layout: str, path: Path, window: int, stride: int) -> Windows:
    if layout == "uci":
        return read_uci(path)
    if layout == "npz":
        return read_npz(path)
    files = [path] if path.is_file() else sorted(path.glob(CSV_FILES))
    return read_csv([f for f in files if f == path or _csv_header(f)[:3] == CSV_COLUMNS], window, stride)


# UCI HAR
def read_uci(folder: Path) -> Windows:
    """Read the folder with `train` and `test`, and keep the published split.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a line of the wrong length, a value that is not a finite number, a label out of range, files with
            different numbers of windows, a subject in both parts.
    """
    classes = _uci_classes(folder / "activity_labels.txt")
    xs, ys, subjects, counts, length = [], [], [], [], None
    for part in ("train", "test"):
        here = folder / part
        labels_file, subjects_file = here / f"y_{part}.txt", here / f"subject_{part}.txt"
        for needed in (here, here / "Inertial Signals", labels_file, subjects_file):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} is missing. Expected {LAYOUTS}")
        labels, who = _column(labels_file), _column(subjects_file)
        for number, label in labels:
            if not 1 <= label <= len(classes):
                raise ValueError(
                    f"{labels_file}, line {number}: label {label} is out of range, expected 1 to {len(classes)}"
                )
        if len(who) != len(labels):
            raise ValueError(f"{subjects_file}: {len(who)} subjects, but {labels_file} has {len(labels)} labels")
        signals = []
        for name in UCI_SIGNALS:
            file = here / "Inertial Signals" / f"{name}_{part}.txt"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing. Expected {LAYOUTS}")
            rows = _matrix(file, length)
            length = rows.shape[1]
            if len(rows) != len(labels):
                raise ValueError(f"{file}: {len(rows)} windows, but {labels_file} has {len(labels)} labels")
            signals.append(rows)
        xs.append(np.stack(signals, axis=1))
        ys.append(np.array([label - 1 for _, label in labels]))
        subjects.append(np.array([str(subject) for _, subject in who]))
        counts.append(len(labels))
    if both := sorted(set(subjects[0]) & set(subjects[1])):
        raise ValueError(
            f"{folder}: subjects {', '.join(both)} are in train and in test; expected different subjects in each"
        )
    return Windows(
        x=np.concatenate(xs),
        y=np.concatenate(ys),
        subject=np.concatenate(subjects),
        test=np.repeat([False, True], counts),
        classes=classes,
        channels=UCI_SIGNALS,
        source=f"UCI HAR layout in {folder}",
    )


def _uci_classes(file: Path) -> tuple[str, ...]:
    """Return the class names from lines such as "1 WALKING"; the published names if the file is missing."""
    if not file.is_file():
        return UCI_ACTIVITIES
    names: list[str] = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if words := line.split():
            if len(words) != 2 or words[0] != str(len(names) + 1):
                raise ValueError(f"{file}, line {number}: expected '{len(names) + 1} NAME', got {line.strip()!r}")
            names.append(words[1])
    return tuple(names)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def _not_utf8(file: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{file}: expected text in UTF-8, got byte {error.object[error.start]:#x}")


def _column(file: Path) -> list[tuple[int, int]]:
    """Return (line number, whole number) for each line with text."""
    found = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                found.append((number, int(line)))
            except ValueError:
                raise ValueError(f"{file}, line {number}: expected a whole number, got {line.strip()!r}") from None
    return found


def _matrix(file: Path, length: int | None) -> NDArray[np.float32]:
    """Read lines of `length` numbers each (None: as many as in the first line) as float32 (lines, length)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an empty file: reported below
            rows: NDArray[np.float32] = np.loadtxt(file, dtype=np.float32, ndmin=2, comments=None, encoding="utf-8-sig")
        good = rows.size > 0 and length in (None, rows.shape[1]) and bool(np.isfinite(rows).all())
    except ValueError:
        good = False
    if good:
        return rows
    # something is wrong: read line by line, to name the place
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not (words := line.split()):
            continue
        length = length or len(words)
        if len(words) != length:
            raise ValueError(f"{file}, line {number}: expected {length} numbers, got {len(words)}")
        _numbers(words, f"{file}, line {number}")
    raise ValueError(f"{file}: expected lines of numbers, found none")


def _numbers(words: Iterable[str], place: str) -> list[float]:
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise ValueError(f"{place}: expected a number, got {word!r}") from None
        if not np.isfinite(values[-1]):
            raise ValueError(f"{place}: expected a finite number, got {word!r}")
    return values


# .npz
def _npz_names(file: Path) -> set[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def read_npz(file: Path) -> Windows:
    """Read an .npz file with the arrays in this module's docstring.

    Raises:
        ValueError: an unreadable file, a missing array, or values or shapes that do not fit.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a readable .npz of plain arrays: {error}") from None
    if missing := [name for name in NPZ_ARRAYS if name not in arrays]:
        raise ValueError(f"{file}: no array {', '.join(missing)}; the file has {', '.join(arrays) or 'none'}")
    x, y, subject = (arrays[name] for name in NPZ_ARRAYS)
    if x.ndim != 3 or x.dtype.kind not in "fiu" or not x.size:
        raise ValueError(f"{file}: x: expected numbers of shape (windows, channels, time), got {x.dtype} {x.shape}")
    for name in ("y", "subject"):
        if arrays[name].shape != (len(x),):
            raise ValueError(
                f"{file}: {name}: expected shape ({len(x)},), one value per window of x, got {arrays[name].shape}"
            )
    if subject.dtype.kind == "f" and not np.isfinite(subject).all():
        at = int(np.flatnonzero(~np.isfinite(subject))[0])
        raise ValueError(f"{file}: subject[{at}]: expected a subject, got {subject[at]}")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        window, channel, time = (int(index) for index in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{file}: x[{window}, {channel}, {time}] is {x[window, channel, time]}, not a finite number")
    if "classes" in arrays:
        classes = tuple(map(str, arrays["classes"]))
        wrong = np.flatnonzero((y < 0) | (y >= len(classes))) if y.dtype.kind in "iu" else np.arange(len(y))
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"{file}: y[{at}]: label {y[at]} is out of range, expected 0 to {len(classes) - 1}")
    else:
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            at = int(np.flatnonzero(~np.isfinite(y))[0])
            raise ValueError(f"{file}: y[{at}]: expected a label, got {y[at]}")
        names, y = np.unique(y, return_inverse=True)
        classes = tuple(map(str, names))
    channels = tuple(map(str, arrays.get("channels", range(x.shape[1]))))
    if len(channels) != x.shape[1]:
        raise ValueError(f"{file}: channels: expected {x.shape[1]} names, one per channel of x, got {len(channels)}")
    return Windows(x, y.astype(np.int64), subject.astype(str), None, classes, channels, str(file))


def read_unlabelled(file: Path, channels: int) -> tuple[NDArray[np.float32], list[str]]:
    """Read windows to predict, float32 (windows, channels, time), and their ids: the array id, else numbers from 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file; no array x of finite numbers with `channels` channels and SHORTEST time steps or
            more; or not one id for each window.
    """
    if not file.is_file():
        raise FileNotFoundError(f"predict_path: no such file: {file}")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a readable .npz of plain arrays: {error}") from None
    x = arrays.get("x", np.empty(0))
    good = x.ndim == 3 and x.dtype.kind in "fiu" and x.shape[1] == channels and x.shape[2] >= SHORTEST
    if not good or not np.isfinite(x).all():
        raise ValueError(
            f"{file}: x: expected finite numbers (windows, {channels} channels, {SHORTEST} or more time steps), got "
            f"{x.dtype} {x.shape}"
        )
    ids = arrays.get("id", np.arange(len(x)))
    if ids.shape != (len(x),):
        raise ValueError(f"{file}: id: expected shape ({len(x)},), one id per window of x, got {ids.shape}")
    return x.astype(np.float32), [str(name) for name in ids]


# .csv
def _csv_header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return [name.strip() for name in next(csv.reader(lines), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _csv_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the number of its last line."""
    rows = csv.reader(lines)
    try:
        for row in rows:
            yield rows.line_num, row
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: {error}") from None


def read_csv(files: Sequence[Path], window: int, stride: int) -> Windows:
    """Read rows of `subject,label,time,CHANNEL,...`, and cut recordings into windows, one every `stride` rows.

    Raises:
        ValueError: another header, a row of the wrong length or a value that is not a finite number, with file and
            line; or no recording as long as a window.
    """
    header = _csv_header(files[0])
    if not header:
        _text(files[0])  # raises if the file is not UTF-8
    if header[:3] != CSV_COLUMNS or len(header) < 4:
        raise ValueError(
            f"{files[0]}, line 1: expected the columns subject,label,time,CHANNEL,..., got {','.join(header)}"
        )
    xs, labels, subjects = [], [], []
    for file in files:
        if (other := _csv_header(file)) != header:
            raise ValueError(
                f"{file}, line 1: expected the columns of {files[0].name}, {','.join(header)}, got {','.join(other)}"
            )
        whose: list[tuple[str, str]] = []
        known: dict[tuple[str, str], tuple[str, str]] = {}  # keeps each pair in memory once, not once per row
        values = array("d")
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = _csv_rows(file, lines)
            next(rows)
            for number, row in rows:
                if not row:
                    continue
                place = f"{file}, line {number}"
                if len(row) != len(header):
                    raise ValueError(f"{place}: expected {len(header)} values, as the first line has, got {len(row)}")
                if not row[0].strip() or not row[1].strip():
                    raise ValueError(f"{place}: expected a subject and a label, got {','.join(row[:2])!r}")
                pair = row[0].strip(), row[1].strip()
                whose.append(known.setdefault(pair, pair))
                values.extend(_numbers(row[2:], place))
        table = np.array(values).reshape(-1, len(header) - 2)
        steps = np.diff(table[:, 0])
        usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else np.inf
        breaks = (steps <= 0) | (steps > 1.5 * usual)
        changes = np.array([a != b for a, b in itertools.pairwise(whose)], dtype=bool)
        borders = [0, *(np.flatnonzero(breaks | changes) + 1).tolist(), len(whose)]
        for start, end in itertools.pairwise(borders):
            for at in range(start, end - window + 1, stride):
                xs.append(table[at : at + window, 1:].T.astype(np.float32))
                subjects.append(whose[start][0])
                labels.append(whose[start][1])
    if not xs:
        raise ValueError(
            f"{files[0]}: no recording (rows of one subject and label, without a jump in time) has window = {window} "
            f"rows or more: give a smaller window"
        )
    classes = tuple(sorted(set(labels)))
    return Windows(
        x=np.stack(xs),
        y=np.array([classes.index(label) for label in labels]),
        subject=np.array(subjects),
        test=None,
        classes=classes,
        channels=tuple(header[3:]),
        source=str(files[0] if len(files) == 1 else files[0].parent),
        note=f"cut into windows of {window} rows, one every {stride} rows",
    )


# Split
def split(
    windows: Windows,
    test_fraction: float,
    val_fraction: float,
    test_subjects: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, NDArray[np.int64]]:
    """Return the windows' indices of "train", "val" and "test", in order; no subject is in two parts.

    The test set is `test_subjects`, else the published one, else a `test_fraction` of the subjects, chosen by a digest
    of (seed, name). A `val_fraction` of the other subjects is for validation. If the data names no subjects, validation
    takes this fraction of each class.

    Raises:
        ValueError: test_subjects missing from the data; too few subjects; a class without training windows.
    """
    n = len(windows.y)
    everything = np.arange(n)
    whose = windows.subject if windows.subject is not None else np.array([f"window {i}" for i in range(n)])
    names = sorted(set(whose.tolist()))
    if windows.test is not None and not test_subjects:
        test = windows.test
    else:
        if unknown := sorted(set(test_subjects or ()) - set(names)):
            raise ValueError(
                f"test_subjects: {', '.join(unknown)} not in the data, which has the subjects {', '.join(names)}"
            )
        test = np.isin(whose, test_subjects or pick_by_digest(names, test_fraction, seed))
    rest = everything[~test]
    if windows.subject is None:
        held: list[str] = []
        for label in range(len(windows.classes)):
            held += pick_by_digest(whose[rest[windows.y[rest] == label]].tolist(), val_fraction, seed)
    else:
        held = pick_by_digest(sorted(set(whose[rest].tolist())), val_fraction, seed)
    val = np.isin(whose, held) & ~test
    parts = {"train": everything[~test & ~val], "val": everything[val], "test": everything[test]}
    if not len(parts["train"]) or not len(parts["test"]):
        raise ValueError(
            f"{windows.source}: {len(names)} subjects are too few to hold out a test_fraction of {test_fraction} and a "
            f"val_fraction of {val_fraction}: give data of more subjects, or val_fraction=0"
        )
    for label, name in enumerate(windows.classes):
        if label in windows.y and label not in windows.y[parts["train"]]:
            raise ValueError(
                f"{windows.source}: no subject left for training has a window of class {name!r}. Choose other "
                f"test_subjects or another split_seed, or leave the class out"
            )
    return parts


def pick_by_digest(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Return the share `fraction` of names with the smallest digests of (seed, name): at least one; for 0, none."""
    count = max(1, round(fraction * len(names))) if fraction else 0
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count]


def digest(windows: Windows, parts: dict[str, NDArray[np.int64]]) -> str:
    """Return a digest of values, labels, names and split; a run continues only on data with the same digest."""
    found = hashlib.sha256(repr((windows.x.shape, windows.classes, windows.channels)).encode())
    for values in (windows.x, windows.y, *parts.values()):
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()[:16]
