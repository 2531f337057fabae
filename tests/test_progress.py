"""What a run leaves behind and what it shows: real files, a real kill, a real notebook, our own clock."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kaggle_mgpu import session
from kaggle_mgpu.progress import METRICS, Progress, format_count, format_duration, plot, read


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def __call__(self):
        return self.now


def make(folder, **given):
    """A Progress that logs into `.said` by a clock in `.clock`."""
    said, clock = [], Clock()
    options = {
        "max_steps": 100,
        "main": True,
        "display": "lines",
        "log": said.append,
        "clock": clock,
        **given,
    }
    progress = Progress(folder, **options)
    progress.said, progress.clock = said, clock
    return progress


def train(step, **more):
    return {"kind": "train", "step": step, "loss": 2.0 / (1 + step), "lr": 3e-4, **more}


def lines(folder):
    return (Path(folder) / METRICS).read_text().splitlines()


def strict(line):
    """A reader without Python's NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


class TestFile:
    def test_every_record_is_one_line_at_once_and_reads_back(self, tmp_path):
        progress = make(tmp_path / "run" / "deep")
        records = [
            {"kind": "start", "step": 0},
            train(10, epoch=0.1),
            {"kind": "eval", "step": 10, "val_loss": 1.9},
        ]
        for count, record in enumerate(records, 1):
            progress.record(record)
            assert len(lines(tmp_path / "run" / "deep")) == count  # on disk before the next step
        assert read(tmp_path / "run" / "deep") == records

    def test_a_number_that_is_none_is_null_in_the_file_and_named_on_screen(self, tmp_path):
        progress = make(tmp_path)
        progress.record(train(1) | {"loss": math.nan, "grad_norm": math.inf, "deep": {"list": [1.5, -math.inf]}})
        record = strict(lines(tmp_path)[0])
        assert (record["loss"], record["grad_norm"], record["deep"]) == (None, None, {"list": [1.5, None]})
        assert "loss nan" in progress.said[-1]
        assert "grad inf" in progress.said[-1]

    def test_tensors_arrays_and_paths_are_written_as_numbers_and_text(self, tmp_path):
        numpy = pytest.importorskip("numpy")
        make(tmp_path).record(
            {
                "kind": "x",
                "step": 1,
                "a": torch.tensor(0.5),
                "b": numpy.float32(0.25),
                "c": tmp_path,
                "d": (1, True),
            }
        )
        assert read(tmp_path) == [{"kind": "x", "step": 1, "a": 0.5, "b": 0.25, "c": str(tmp_path), "d": [1, True]}]

    @pytest.mark.parametrize("value", [object(), torch.zeros(3)])
    def test_a_value_that_is_no_record_is_refused(self, tmp_path, value):
        with pytest.raises(TypeError, match=rf"a record holds numbers, .* got {type(value).__name__}: "):
            make(tmp_path).record(train(1, other=value))
        assert read(tmp_path) == []

    def test_nobody_has_written_yet(self, tmp_path):
        assert read(tmp_path / "nowhere") == []

    @pytest.mark.parametrize("torn", ['{"kind": "train", "st', "7", "\x00\x00\x00", '{"a": 1}{'])
    def test_a_torn_last_line_is_left_out(self, tmp_path, torn):
        make(tmp_path).record(train(1))
        with open(tmp_path / METRICS, "a") as file:
            file.write(torn)
        assert [record["step"] for record in read(tmp_path)] == [1]

    def test_on_record_comes_first_and_may_add(self, tmp_path):
        seen = []

        def on_record(record):
            seen.append((record["step"], len(read(tmp_path))))
            record["squared"] = record["loss"] ** 2

        progress = make(tmp_path, on_record=on_record)
        progress.record(train(1))
        progress.record(train(3))
        assert seen == [(1, 0), (3, 1)]
        assert [record["squared"] for record in read(tmp_path)] == [1.0, 0.25]

    def test_notes_carry_the_step_and_are_said(self, tmp_path):
        progress = make(tmp_path)
        progress.record(train(20))
        progress.note("a GPU is hot")
        assert read(tmp_path)[-1] == {"kind": "note", "step": 20, "text": "a GPU is hot"}
        assert progress.said[-1] == "a GPU is hot"

    def test_other_ranks_do_nothing(self, tmp_path, monkeypatch, capfd):
        def never(*arguments):
            raise AssertionError("a rank other than the main one wrote")

        monkeypatch.setattr(session, "show", never)
        for display in ("panel", "lines", "bar"):
            progress = Progress(
                tmp_path / "run", max_steps=10, main=False, on_record=never, display=display, tensorboard=True
            )
            progress.record(train(1))
            progress.note("hello")
            progress.close({"finished": True})
        assert not (tmp_path / "run").exists()
        assert capfd.readouterr() == ("", "")


class TestResume:
    def steps(self, folder):
        return [(record["kind"], record["step"]) for record in read(folder)]

    def test_each_step_stands_once_after_a_resume(self, tmp_path):
        first = make(tmp_path)
        first.record({"kind": "start", "step": 0})
        for step in range(1, 8):
            first.record(train(step))
        first.note("beyond the checkpoint")
        first.close()
        second = make(tmp_path, resumed_step=5)
        assert [step for _, step in self.steps(tmp_path)] == [0, 1, 2, 3, 4, 5]
        second.record({"kind": "start", "step": 5})
        for step in range(6, 9):
            second.record(train(step))
        kinds = self.steps(tmp_path)
        assert [step for kind, step in kinds if kind == "train"] == list(range(1, 9))
        assert [step for kind, step in kinds if kind == "start"] == [0, 5]
        assert not any(kind == "note" for kind, _ in kinds)

    def test_kept_lines_keep_their_numbers(self, tmp_path):
        progress = make(tmp_path)
        for step in range(1, 4):
            progress.record(train(step, loss=math.pi / step, lr=1e-17 / step, time=1 / 3))
        before = lines(tmp_path)
        make(tmp_path, resumed_step=3)
        assert lines(tmp_path) == before

    def test_a_run_from_the_start_begins_an_empty_file(self, tmp_path):
        make(tmp_path).record({"kind": "start", "step": 0})
        make(tmp_path)
        assert lines(tmp_path) == []

    def test_after_a_kill_in_mid_line(self, tmp_path):
        script = """if True:
            import os, signal, sys
            from kaggle_mgpu.progress import Progress
            progress = Progress(sys.argv[1], max_steps=100, main=True, display="lines")
            for step in range(1, 6):
                progress.record({"kind": "train", "step": step, "loss": 1.0})
            progress._file.write(b'{"kind": "train", "st')
            progress._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """
        ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, cwd=Path.cwd())
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert not lines(tmp_path)[-1].endswith("}")
        progress = make(tmp_path, resumed_step=5)
        progress.record(train(6))
        assert [strict(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]

    def test_the_rewrite_is_all_or_nothing(self, tmp_path, monkeypatch):
        progress = make(tmp_path)
        for step in (1, 2, 3):
            progress.record(train(step))
        before = lines(tmp_path)

        def killed(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, resumed_step=1)
        assert lines(tmp_path) == before

    def test_no_temporary_file_is_left(self, tmp_path):
        make(tmp_path).record(train(1))
        make(tmp_path, resumed_step=1)
        assert [path.name for path in tmp_path.iterdir()] == [METRICS]

    def test_history_comes_from_another_folder_and_stays_there(self, tmp_path):
        old = make(tmp_path / "input")
        for step in (1, 2, 3):
            old.record(train(step))
        make(tmp_path / "working", resumed_step=2, history=tmp_path / "input").record(train(3, loss=9.0))
        assert [record["loss"] for record in read(tmp_path / "working")] == [1.0, 2 / 3, 9.0]
        assert len(read(tmp_path / "input")) == 3


class TestLines:
    def test_the_line(self, tmp_path):
        progress = make(tmp_path, max_steps=2000, unit="tokens", world_size=2)
        progress.record(train(100))
        progress.clock.now += 20
        measured = {"tokens_per_s": 12345.6, "samples_per_s": 12.0, "grad_norm": 0.8123}
        progress.record(train(120) | {"loss": 2.3141, "lr": 2.9e-4} | measured)
        assert progress.said == [
            "step 100/2000 (5%)  loss 0.0198  lr 3.0e-04  2 processes",
            "step 120/2000 (6%)  loss 2.314  lr 2.9e-04  12.3k tokens/s  grad 0.81  ETA 31:20  2 processes",
        ]

    def test_the_pace_is_this_sessions_and_not_the_history(self, tmp_path):
        make(tmp_path).record(train(1))
        progress = make(tmp_path, resumed_step=50)
        progress.clock.now += 1000  # loading, compiling
        progress.record(train(60))
        progress.clock.now += 60
        progress.record(train(70))
        assert "ETA 3:00" in progress.said[-1]  # 30 steps of 6 s

    def test_training_lines_are_sparse_and_grow_sparser(self, tmp_path):
        progress = make(tmp_path, max_steps=10**6)
        at = []
        for second in range(3600):
            progress.clock.now = 1000.0 + second
            before = len(progress.said)
            progress.record(train(second + 1))
            at += [second] * (len(progress.said) - before)
        assert at[:3] == [0, 15, 30]
        pauses = [b - a for a, b in pairwise(at)]
        assert min(pauses) == 15
        assert max(pauses) == 60
        assert pauses == sorted(pauses)
        assert len(lines(tmp_path)) == 3600  # the file has them all

    def test_everything_else_is_always_said(self, tmp_path):
        progress = make(tmp_path, device_line="Tesla T4 x2, fp16")
        progress.record({"kind": "start", "step": 0, "world_size": 2})
        progress.record(train(1))
        progress.record(train(2))  # too soon
        progress.record({"kind": "eval", "step": 2, "samples": 64, "val_loss": 1.23456, "val_f1": 0.5, "time": 3.0})
        progress.record({"kind": "save", "step": 2, "path": "checkpoints/step-00000002"})
        progress.note("careful")
        progress.close({"finished": True, "step": 100, "metrics": {"loss": 1.9}, "seconds": 192.0})
        assert progress.said == [
            "step 1/100 (1%)  loss 1  lr 3.0e-04  1 process",
            "eval  step 2/100  val_loss 1.235  val_f1 0.5",
            "save  step 2/100  path checkpoints/step-00000002",
            "careful",
            "finished: step 100/100  loss 1.9  in 3:12  1 process",
        ]

    def test_how_it_ended(self, tmp_path):
        progress = make(tmp_path)
        progress.record(train(40))
        progress.close({"finished": False, "reason": "time limit", "seconds": 60.0})
        progress.close({"finished": True})  # the second says nothing
        assert progress.said[1:] == ["stopped (time limit): step 40/100  in 1:00  1 process"]

    def test_an_error_is_an_end_too(self, tmp_path):
        progress = make(tmp_path)
        with pytest.raises(KeyError), progress:
            raise KeyError("task")
        assert progress.said == ["stopped (broke off): step 0/100  in 0:00  1 process"]
        progress.record(train(1))  # closed: no line, no error on the way out
        assert read(tmp_path) == []

    def test_a_run_of_no_steps(self, tmp_path):
        progress = make(tmp_path, max_steps=0)
        progress.record({"kind": "eval", "step": 0, "val_loss": 1.0})
        progress.close({"finished": True, "seconds": 0})
        assert progress.said[-1] == "finished: step 0/0  in 0:00  1 process"

    def test_an_unknown_display_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="display='gui': expected auto, panel, bar, lines"):
            make(tmp_path, display="gui")

    def test_a_pipe_gets_lines_as_they_come(self, tmp_path):
        script = """if True:
            import os, sys
            from kaggle_mgpu.progress import Progress
            progress = Progress(sys.argv[1], max_steps=10, main=True)
            progress.record({"kind": "train", "step": 1, "loss": 1.0})
            os._exit(0)  # what is still in a buffer is lost
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE", "PYTHONUNBUFFERED"))}
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
        )
        assert (ended.stdout, ended.stderr) == ("step 1/10 (10%)  loss 1  1 process\n", "")


class Checked(HTMLParser):
    """Collects the text and the tags, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


class TestPanel:
    @pytest.fixture
    def shown(self, monkeypatch):
        shown = []
        monkeypatch.setattr(session, "show", lambda html, text, display_id: shown.append((html, text, display_id)))
        return shown

    def test_one_display_drawn_at_most_twice_a_second(self, tmp_path, shown):
        progress = make(tmp_path, display="panel")
        for step in range(1, 101):  # ten records a second, for ten seconds
            progress.clock.now = 1000.0 + step / 10
            progress.record(train(step))
        drawn = len(shown)
        assert 15 <= drawn <= 21
        progress.close({"finished": True, "step": 100, "seconds": 10})
        assert len(shown) == drawn + 1  # the end is always drawn
        assert "finished: step 100/100" in shown[-1][0]
        assert shown[-1][1] == "finished: step 100/100  in 0:10  1 process"
        assert len({display_id for _, _, display_id in shown}) == 1
        assert progress.said == []  # nothing printed beside it

    def test_two_runs_are_two_displays(self, tmp_path, shown):
        make(tmp_path / "a", display="panel")
        make(tmp_path / "b", display="panel")
        assert shown[0][2] != shown[1][2]

    def test_it_says_what_there_is(self, tmp_path, shown):
        progress = make(tmp_path, display="panel", device_line="Tesla T4 x2", world_size=2)
        for step in (10, 20, 40):
            progress.clock.now += 1
            progress.record(train(step, samples_per_s=812.0))
        progress.clock.now += 1
        progress.record({"kind": "eval", "step": 40, "val_loss": 1.5})
        page = Checked(shown[-1][0])
        text = " | ".join(page.texts)
        for part in (
            "Tesla T4 x2",
            "step 40/100 (40%)",
            "812 samples/s",
            "2 processes",
            "eval  step 40/100  val_loss 1.5",
        ):
            assert part in text
        widths = [re.search(r"width:([\d.]+)%", attrs.get("style", "")) for _, attrs in page.tags]
        assert [match[1] for match in widths if match] == ["40.0"]
        (points,) = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
        assert [tuple(map(float, point.split(","))) for point in points.split()] == [
            (0, 2),
            (200, 30.6),
            (600, 46),
        ]

    def test_text_is_escaped(self, tmp_path, shown):
        progress = make(tmp_path, display="panel", device_line="<script>alert(1)</script>", max_steps=10)
        progress.note('<img src=x onerror="alert(1)"> & more')
        progress.clock.now += 1
        progress.record({"kind": "eval", "step": 1, "name": "<b>bold</b>", "val_<i>": 1.0})
        progress.close({"reason": "</div><h1>"})
        page = Checked(shown[-1][0])
        assert {tag for tag, _ in page.tags} == {"div"}
        assert '<img src=x onerror="alert(1)"> & more' in page.texts

    def test_colours_are_the_pages_own(self, tmp_path, shown):
        progress = make(tmp_path, display="panel")
        for step in range(1, 5):
            progress.clock.now += 1
            progress.record(train(step))
        colours = re.findall(r"\b(?:color|background|border|stroke|fill)(?::|=\")([^;\"]+)", shown[-1][0])
        assert set(colours) == {"1px solid currentColor", "currentColor", "none"}

    def test_a_long_run_stays_a_small_panel_with_its_last_loss(self, tmp_path, shown):
        progress = make(tmp_path, display="panel", max_steps=5000)
        for step in range(1, 5001):
            progress.clock.now += 0.1
            progress.record(train(step, loss=math.nan if step == 7 else 5000.0 - step))
        progress.close({"finished": True})
        assert len(shown[-1][0]) < 6000
        assert "training loss 0 to 4999, steps 1 to 5000" in shown[-1][0]
        assert "nan" not in shown[-1][0]

    def test_notes_are_printed_too(self, tmp_path, shown):
        progress = make(tmp_path, display="panel")
        progress.note("remember")
        assert progress.said == ["remember"]

    def test_a_panel_that_fails_becomes_lines_and_training_goes_on(self, tmp_path, monkeypatch):
        def gone(*arguments):
            raise ConnectionError("front end gone")

        monkeypatch.setattr(session, "show", gone)
        progress = make(tmp_path, display="panel")
        progress.record(train(1))
        progress.close({"finished": True, "step": 100, "seconds": 1})
        assert progress.said == [
            "the progress panel is given up (ConnectionError: front end gone); lines follow",
            "step 1/100 (1%)  loss 1  lr 3.0e-04  1 process",
            "finished: step 100/100  in 0:01  1 process",
        ]

    def test_in_a_notebook_it_is_one_output_and_the_plot_a_picture(self, tmp_path):
        nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        panel = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from kaggle_mgpu.progress import Progress, plot
with Progress({str(tmp_path)!r}, max_steps=3, main=True, display="panel") as progress:
    for step in (1, 2, 3):
        progress.record({{"kind": "train", "step": step, "loss": 1.0 / step, "lr": 0.1}})
    progress.close({{"finished": True, "step": 3}})
"""
        cells = [nbformat.v4.new_code_cell(panel), nbformat.v4.new_code_cell(f"plot({str(tmp_path)!r})")]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
        (output,) = notebook.cells[0].outputs
        assert output.output_type == "display_data"
        assert "finished: step 3/3" in output.data["text/html"]
        assert output.data["text/plain"].startswith("finished: step 3/3")
        (picture,) = notebook.cells[1].outputs
        assert "image/png" in picture.data


class TestBar:
    def test_it_follows_the_steps_on_stderr(self, tmp_path, capsys):
        progress = make(tmp_path, display="bar", max_steps=20, resumed_step=5, device_line="cpu")
        progress.record(train(10))
        progress.record({"kind": "eval", "step": 10, "val_loss": 1.5})
        progress.record(train(20))
        progress.note("last words")
        progress.close({"finished": True, "step": 20, "seconds": 1})
        err = capsys.readouterr().err
        assert " 5/20 " in err
        assert "20/20" in err
        assert "loss 0.09524" in err
        assert progress.said == [
            "eval  step 10/20  val_loss 1.5",
            "last words",
            "finished: step 20/20  in 0:01  1 process",
        ]

    @pytest.mark.parametrize(("can_show", "tty", "kind"), [(1, 1, "_Panel"), (0, 1, "_Bar"), (0, 0, "_Lines")])
    def test_which_display_is_chosen(self, tmp_path, monkeypatch, can_show, tty, kind):
        monkeypatch.setattr(session, "can_show", lambda: bool(can_show))
        monkeypatch.setattr(session, "show", lambda *arguments: None)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(tty), raising=False)
        progress = make(tmp_path, display="auto")
        assert type(progress._display).__name__ == kind
        progress.close()


class TestTensorBoard:
    def test_the_numbers_arrive_and_tensorflow_does_not(self, tmp_path):
        """In a process of its own, with a TensorFlow that fails the test when it is imported."""
        pytest.importorskip("tensorboard")
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
        script = """if True:
            import sys
            from kaggle_mgpu.progress import Progress
            given = {"max_steps": 10, "main": True, "display": "lines", "tensorboard": True}
            with Progress(sys.argv[1], **given) as progress:
                progress.record({"kind": "train", "step": 1, "loss": 2.5, "note": "text"})
                progress.record({"kind": "train", "step": 2, "loss": 1.5})
                progress.record({"kind": "eval", "step": 2, "val_loss": 0.75})
            with Progress(sys.argv[1], **given, resumed_step=1) as progress:
                progress.record({"kind": "train", "step": 2, "loss": 1.25})
            assert "tensorflow" not in sys.modules
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            events = EventAccumulator(sys.argv[1] + "/tensorboard")
            events.Reload()
            for tag in sorted(events.Tags()["scalars"]):
                print("TAG", tag, [(event.step, event.value) for event in events.Scalars(tag)])
        """
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path / 'fake'}"}
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ended.returncode == 0, ended.stderr
        assert [line for line in ended.stdout.splitlines() if line.startswith("TAG")] == [
            "TAG eval/val_loss []",  # of the step that is trained again: hidden
            "TAG train/loss [(1, 2.5), (2, 1.25)]",
        ]

    def test_a_missing_package_is_named_before_anything_is_trained(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        monkeypatch.delitem(sys.modules, "tensorboard.compat.notf", raising=False)
        with pytest.raises(ModuleNotFoundError, match=r"tensorboard=True, but .* pip install tensorboard"):
            make(tmp_path, tensorboard=True)


class TestPlot:
    @pytest.fixture
    def run(self, tmp_path):
        progress = make(tmp_path)
        progress.record({"kind": "start", "step": 0})
        for step in (10, 20, 30):
            progress.record(train(step, loss=math.nan if step == 20 else 1.0 / step, tokens_per_s=100.0 * step))
        progress.record({"kind": "eval", "step": 30, "val_loss": 0.5})
        progress.close()
        progress = make(tmp_path, resumed_step=30)
        progress.record({"kind": "start", "step": 30})
        progress.record(train(40, loss=0.25, tokens_per_s=50.0))
        progress.close()
        return tmp_path

    def test_it_draws_what_was_recorded(self, run):
        figure = plot(run)
        loss, rate, pace = figure.axes
        drawn = {line.get_label(): line for line in loss.get_lines()}
        assert set(drawn) == {"training", "validation", "resumed"}
        steps, values = drawn["training"].get_data()
        assert list(steps) == [10, 20, 30, 40]
        assert list(values) == pytest.approx([0.1, math.nan, 1 / 30, 0.25], nan_ok=True)
        assert [list(part) for part in drawn["validation"].get_data()] == [[30], [0.5]]
        assert list(drawn["resumed"].get_xdata()) == [30, 30]
        assert list(rate.get_lines()[0].get_ydata()) == [3e-4] * 4
        assert list(pace.get_lines()[0].get_ydata()) == [1000, 2000, 3000, 50]
        assert (pace.get_ylabel(), pace.get_xlabel()) == ("tokens / s", "optimizer step")

    def test_training_and_validation_differ_in_grey_too(self, run):
        training, validation = plot(run).axes[0].get_lines()[:2]
        assert (training.get_linestyle(), training.get_marker()) == ("-", "None")
        assert (validation.get_linestyle(), validation.get_marker()) == ("--", "o")

    def test_it_saves_without_pyplot(self, run):
        script = """if True:
            import sys
            from kaggle_mgpu.progress import plot
            plot(sys.argv[1]).savefig(sys.argv[1] + "/curves.png")
            assert "matplotlib.pyplot" not in sys.modules
        """
        ended = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_a_run_with_evaluations_only(self, tmp_path):
        make(tmp_path).record({"kind": "eval", "step": 0, "val_loss": 3.0})
        assert plot(tmp_path).axes[0].get_lines()[-1].get_label() == "validation"

    def test_nothing_recorded_yet(self, tmp_path):
        make(tmp_path).record({"kind": "start", "step": 0})
        with pytest.raises(ValueError, match=r"metrics.jsonl: no training record yet, .* expected the output_dir of"):
            plot(tmp_path)


class TestFormats:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0:00"),
            (9.6, "0:10"),
            (59.6, "1:00"),
            (192, "3:12"),
            (3599.7, "1:00:00"),
            (3723, "1:02:03"),
            (100 * 3600, "100:00:00"),
            (-1, "0:00"),
            (None, "?"),
            (math.nan, "?"),
            (math.inf, "?"),
        ],
    )
    def test_durations(self, seconds, text):
        assert format_duration(seconds) == text

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0, "0"),
            (0.8123, "0.812"),
            (12.34, "12.3"),
            (950, "950"),
            (999.6, "1.0k"),
            (1200, "1.2k"),
            (12345, "12.3k"),
            (123456, "123k"),
            (999_950, "1.0M"),
            (124_439_808, "124M"),
            (1.5e9, "1.5B"),
            (2e12, "2.0T"),
            (-1200, "-1.2k"),
            (math.inf, "inf"),
            (math.nan, "nan"),
        ],
    )
    def test_counts(self, number, text):
        assert format_count(number) == text
