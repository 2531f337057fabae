"""Which session this is, its folders, the search in them, the display in a real kernel, and the clock."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kaggle_mgpu import session
from runs import executed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_IS_COMPETITION_RERUN", "KAGGLE_MGPU_DISPLAY", "CI"):
        monkeypatch.delenv(name, raising=False)
    yield
    session.set_channel(None)


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Kaggle root with every kind of input; returns the input folder."""
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path))
    for name in (
        "datasets/ann/cod10k/train.csv",
        "datasets/bob/tiny/deep/er/train.csv",
        "notebooks/ann/run-1/checkpoints/step-00000200/state.json",
        "notebooks/ann/run-1/checkpoints/step-00000100/state.json",
        "models/google/gemma/transformers/2b/1/config.json",
        "competitions/titanic/train.csv",
        "older-slug/train.csv",
    ):
        path = tmp_path / "input" / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    return tmp_path / "input"


@pytest.mark.parametrize(
    ("run_type", "rerun", "kind"),
    [
        (None, None, "local"),
        ("Interactive", None, "interactive"),
        ("Batch", None, "batch"),
        ("Batch", "1", "rerun"),
        ("Something new", None, "batch"),
    ],
)
def test_kind(run_type: str | None, rerun: str | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if run_type:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type)
    if rerun:
        monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", rerun)
    assert session.kind() == kind
    assert session.on_kaggle() == (kind != "local")


def test_inputs_in_both_layouts(kaggle: Path) -> None:
    assert [path.relative_to(kaggle).as_posix() for path in session.inputs()] == [
        "competitions/titanic",
        "datasets/ann/cod10k",
        "datasets/bob/tiny",
        "models/google/gemma",
        "notebooks/ann/run-1",
        "older-slug",
    ]


def test_without_kaggle_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert session.working() == tmp_path
    assert session.inputs() == session.find("*") == []
    (tmp_path / "none/working").mkdir(parents=True)
    assert session.working() == tmp_path / "none/working"
    monkeypatch.delenv("KAGGLE_MGPU_KAGGLE_ROOT")
    assert session.input_root() == Path("/kaggle/input")


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_find_is_sorted_shallow_first(kaggle: Path) -> None:
    assert names(session.find("train.csv"), kaggle) == [
        "older-slug/train.csv",
        "competitions/titanic/train.csv",
        "datasets/ann/cod10k/train.csv",
        "datasets/bob/tiny/deep/er/train.csv",
    ]
    steps = names(session.find("checkpoints/step-*/state.json"), kaggle)
    assert [step.split("/")[-2] for step in steps] == ["step-00000100", "step-00000200"]
    assert names(session.find("deep"), kaggle) == ["datasets/bob/tiny/deep"]  # folders too


def test_find_may_ignore_capitals(kaggle: Path) -> None:
    (kaggle / "older-slug" / "TRAIN.CSV").touch()
    assert "older-slug/TRAIN.CSV" not in names(session.find("train.csv"), kaggle)
    assert "older-slug/TRAIN.CSV" in names(session.find("train.csv", ignore_case=True), kaggle)


def test_find_sorts_whatever_order_the_disk_has(tmp_path: Path) -> None:
    numbers = [number * 37 % 100 for number in range(100)]
    for number in numbers:
        (tmp_path / f"{number:03}").touch()
    assert names(session.find("*", [tmp_path]), tmp_path) == [f"{number:03}" for number in range(100)]


def test_find_is_bounded(kaggle: Path) -> None:
    assert len(session.find("train.csv", limit=2)) == 2
    assert len(session.find("train.csv", max_depth=4)) == 3
    roots = [kaggle / "datasets", kaggle / "absent", kaggle / "older-slug"]
    found = names(session.find("train.csv", roots), kaggle)
    assert found == [
        "datasets/ann/cod10k/train.csv",
        "datasets/bob/tiny/deep/er/train.csv",
        "older-slug/train.csv",
    ]


def test_a_huge_input_neither_takes_forever_nor_hides_another(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in "abcdefghijklmnopqrst":
        folder = kaggle / f"datasets/ann/cod10k/images/{number}"
        folder.mkdir(parents=True)
        (folder / "train.csv").touch()
    monkeypatch.setattr(session, "MOST_ENTRIES", 24)
    expected = r"cod10k holds more than 24 files and folders: looked for 'train\.csv' only among the 24 nearest"
    with pytest.warns(UserWarning, match=expected):
        found = names(session.find("train.csv"), kaggle)
    assert found == [
        "older-slug/train.csv",
        "competitions/titanic/train.csv",
        "datasets/ann/cod10k/train.csv",
        "datasets/ann/cod10k/images/a/train.csv",
        "datasets/ann/cod10k/images/b/train.csv",
        "datasets/bob/tiny/deep/er/train.csv",
    ]


def test_find_passes_over_the_companions_of_files_copied_by_macos(tmp_path: Path) -> None:
    for name in ("._a.csv", "a.csv", ".hidden.csv"):
        (tmp_path / name).touch()
    assert names(session.find("*.csv", [tmp_path]), tmp_path) == [".hidden.csv", "a.csv"]


def test_what_a_pattern_of_several_parts_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b/c.txt", "x/b/c.txt", "c.txt", "b/c.txt", "b/C.txt", "__MACOSX/b/c.txt", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(session.find("a/*/?.txt", [tmp_path]), tmp_path) == ["a/b/c.txt"]
    assert names(session.find("b/c.txt", [tmp_path]), tmp_path) == ["b/c.txt", "a/b/c.txt", "x/b/c.txt"]
    assert names(session.find("__MACOSX", [tmp_path]), tmp_path) == ["__MACOSX"]
    monkeypatch.chdir(tmp_path)
    assert session.find("c.txt", ["."])[0] == Path("c.txt")
    assert session.find("*/b/c.txt", ["."]) == [Path("a/b/c.txt"), Path("x/b/c.txt")]


def test_find_survives_circles_and_closed_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "closed").mkdir(mode=0o000)
    assert session.find("file", [tmp_path], max_depth=50) == [tmp_path / "a/file"]
    assert session.find("broken", [tmp_path]) == [tmp_path / "broken"]


def test_no_notebook_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not session.in_notebook()
    assert not session.live()
    assert not session.can_show()
    session.show("<b>1</b>", "1", "nobody-sees-it")
    monkeypatch.setenv("KAGGLE_MGPU_DISPLAY", "live")
    assert session.live()
    assert not session.can_show()


def test_display_override_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_DISPLAY", "panel")
    with pytest.raises(ValueError, match="KAGGLE_MGPU_DISPLAY is 'panel', expected 'live' or 'lines'"):
        session.live()


def test_a_worker_hands_displays_to_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, str, str]] = []
    session.set_channel(lambda *arguments: got.append(arguments))
    assert session.can_show()
    session.show("<b>1</b>", "1", "run-7")
    assert got == [("<b>1</b>", "1", "run-7")]
    session.set_channel(lambda *arguments: got.append(arguments), live=False)  # a Batch session's
    assert (session.can_show(), session.can_draw()) == (False, True)
    monkeypatch.setenv("KAGGLE_MGPU_DISPLAY", "lines")
    assert (session.can_show(), session.can_draw()) == (False, False)


def test_display_in_a_real_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    head = f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\nfrom kaggle_mgpu import session\n"
    cells = [
        head + "for i in range(3):\n    session.show(f'<b>{i}</b>', f'step {i}', 'panel')",
        "session.show('<b>again</b>', 'again', 'panel')",  # in a later cell it appears there
        "print(session.in_notebook(), session.live(), session.can_show())\n"
        "for name, value in [('KAGGLE_KERNEL_RUN_TYPE', 'Interactive'), ('KAGGLE_MGPU_DISPLAY', 'lines'),\n"
        "                    ('KAGGLE_MGPU_DISPLAY', ''), ('KAGGLE_KERNEL_RUN_TYPE', 'Batch'),\n"
        "                    ('KAGGLE_MGPU_DISPLAY', 'live'), ]:\n"
        "    os.environ[name] = value\n"
        "    print(value, session.live())\n"
        "sys.stdout.flush()  # as a kernel does by itself after a while: the rest is an output of its own\n"
        "os.environ.update(KAGGLE_KERNEL_RUN_TYPE='', KAGGLE_MGPU_DISPLAY='', CI='true')\n"
        "print('CI', session.live())",
        "import subprocess\n"
        "code = 'from kaggle_mgpu import session; print(session.in_notebook())'\n"
        f"command = dict(cwd={str(ROOT)!r}, capture_output=True, text=True)\n"
        "print(subprocess.run([sys.executable, '-c', code], **command).stdout)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    executed(notebook)
    first, second, *said = (cell.outputs for cell in notebook.cells)
    flags, child = ("".join(output.text for output in outputs) for outputs in said)
    assert len(first) == len(second) == 1
    # The same id: a later show updates every copy, so the first cell has the last state too.
    assert {output.data["text/html"] for output in [*first, *second]} == {"<b>again</b>"}
    assert second[0].data["text/plain"] == "again"
    assert flags.splitlines() == [
        "True True True",
        "Interactive True",
        "lines False",
        " True",
        "Batch False",
        "live True",
        "CI False",
    ]
    assert child.strip() == "False"


def test_imports_the_standard_library_only() -> None:
    code = "import sys; from kaggle_mgpu import session as s; s.live(); print({'torch', 'IPython'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.stdout == "set()\n", result.stderr


def test_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    deadline = session.Deadline(60)
    assert deadline.remaining() == 60
    assert not deadline.reached()
    assert deadline.reached(margin=60)
    assert session.Deadline(60, started=930.0).remaining() == -10
    assert session.Deadline(60, started=930.0).reached()
    never = session.Deadline(None)
    assert never.remaining() == math.inf
    assert not never.reached(margin=1e9)


def test_a_session_is_as_old_as_its_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {"self": 5.0, "1": 7200.0}
    monkeypatch.setattr(session, "_process_age", ages.get)
    assert session.session_age() == 5.0
    assert session.time_left() == math.inf
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert session.session_age() == 7200.0
    assert session.time_left() == 10 * 3600
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert session.time_left() == 7 * 3600
    ages["1"] = 1e6
    assert session.time_left() == 0.0


def test_the_end_of_the_session_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    monkeypatch.setenv("KAGGLE_MGPU_SESSION_END", "1060.5")
    assert session.time_left() == 60.5
    monkeypatch.setenv("KAGGLE_MGPU_SESSION_END", "900")
    assert session.time_left() == 0.0
    monkeypatch.setenv("KAGGLE_MGPU_SESSION_END", "noon")
    with pytest.raises(ValueError, match="KAGGLE_MGPU_SESSION_END is 'noon', expected the Unix time at which"):
        session.time_left()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")
def test_age_of_a_real_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        own, younger = session._process_age("self"), session._process_age(str(child.pid))
        child.communicate(b"\n")
    assert own is not None
    assert younger is not None
    assert 0 <= younger < own
    assert session._process_age("no-such-process") is None


def test_age_of_a_process_with_an_odd_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PROC", tmp_path)
    assert session._process_age("1") is None
    (tmp_path / "uptime").write_text("1000.00 3900.00\n")
    (tmp_path / "1").mkdir()
    fields = [*map(str, range(4, 22)), str(400 * os.sysconf("SC_CLK_TCK")), "23"]  # the 22nd: when it started
    (tmp_path / "1/stat").write_text(f"1 (odd ) 7 name) S {' '.join(fields)}\n")
    assert session._process_age("1") == 600.0


def test_a_link_to_itself_hides_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "train.csv").touch()
    assert session.find("train.csv", roots=[tmp_path]) == [tmp_path / "train.csv", tmp_path / "deeper" / "train.csv"]
