"""What a run looks like while it trains: the panel, its numbers, its layout in a real browser, and attach()."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

import browser
from kaggle_mgpu import session
from kaggle_mgpu.progress import (
    View,
    attach,
    display,
    format_count,
    format_duration,
    panel_html,
    progress,
    read,
    records,
)
from runs import START, Clock, executed, gpu, make, story, train, write

ROOT = Path(__file__).parents[2]


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
            "Tesla T4 x2, 2 processes",
            "step 40 |  / 100 (40%)",
            "throughput | 812 samples/s",
            "training loss | 0.04878",
            "validation loss | 1.5",
            "time to go | 0:06",  # 30 steps in 3 s, 60 to go
        ):
            assert part in text
        widths = [re.search(r"width:([\d.]+)%", attrs.get("style", "")) for _, attrs in page.tags]
        assert [match[1] for match in widths if match] == ["40.0"]
        training, validation = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
        assert training.split()[0].startswith("0,")
        assert training.split()[-1] == "600,66.0"
        assert validation == "600,4.0"

    def test_text_is_escaped(self, tmp_path, shown):
        progress = make(tmp_path, display="panel", device_line="<script>alert(1)</script>", max_steps=10)
        progress.note('<img src=x onerror="alert(1)"> & more')
        progress.clock.now += 1
        progress.record({"kind": "eval", "step": 1, "name": "<b>bold</b>", "val_<i>": 1.0})
        progress.close({"reason": "</div><h1>"})
        page = Checked(shown[-1][0])
        assert {tag for tag, _ in page.tags} == {"div", "span"}
        assert '<img src=x onerror="alert(1)"> & more' in page.texts

    def test_colours_are_the_pages_own(self, tmp_path, shown):
        progress = make(tmp_path, display="panel")
        for step in range(1, 5):
            progress.clock.now += 1
            progress.record(train(step))
        style = Checked(shown[-1][0]).tags[0][1]["style"]
        for name, system in (("background", "Canvas"), ("color", "CanvasText")):  # both from one source, or neither
            assert re.search(rf";{name}:var\(--vscode-[a-z-]+,var\(--jp-[a-z0-9-]+,{system}\)\)", style)

    def test_a_long_run_stays_a_small_panel_with_its_last_loss(self, tmp_path, shown):
        progress = make(tmp_path, display="panel", max_steps=5000)
        for step in range(1, 5001):
            progress.clock.now += 0.1
            progress.record(train(step, loss=math.nan if step == 7 else 5000.0 - step))
        progress.close({"finished": True})
        assert len(shown[-1][0]) < 8000
        assert "loss 0 to 4999, steps 1 to 5000" in shown[-1][0]
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
            "the progress panel failed (ConnectionError: front end gone); text lines follow instead",
            "step 1/100 (1%)  loss 1  lr 3.0e-04  1 process",
            "finished: step 100/100  in 0:01  1 process",
        ]

    def test_in_a_notebook_it_is_one_output_and_the_plot_a_picture(self, tmp_path):
        nbformat, _ = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        panel = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from kaggle_mgpu.progress import Progress, plot
with Progress({str(tmp_path)!r}, max_steps=3, main=True, display="panel") as progress:
    for step in (1, 2, 3):
        progress.record({{"kind": "train", "step": step, "loss": 1.0 / step, "lr": 0.1}})
    progress.close({{"finished": True, "step": 3}})
"""
        cells = [nbformat.v4.new_code_cell(panel), nbformat.v4.new_code_cell(f"plot({str(tmp_path)!r})")]
        notebook = nbformat.v4.new_notebook(cells=cells)
        executed(notebook)
        (output,) = notebook.cells[0].outputs
        assert output.output_type == "display_data"
        assert "finished: step 3/3" in output.data["text/html"]
        assert output.data["text/plain"].startswith("finished: step 3/3")
        (picture,) = notebook.cells[1].outputs
        assert "image/png" in picture.data


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


needs_chromium = pytest.mark.skipif(browser.PROGRAM is None, reason="Chromium is not installed")


def drawn(upto=1240, status="running", **more):
    """The panel of the story at its end, or some steps before."""
    clock = Clock()
    view = View(clock=clock)
    for record in story(upto=upto):
        clock.now = 1000.0 + record.get("time", 0.0)
        view.take(record)
    view.gpus = [gpu(0), gpu(1, 64, None)]
    return panel_html(view, status=status, **more)


class TestView:
    def test_a_save_told_of_late_does_not_turn_the_steps_back(self):
        view = View(100)
        view.take(train(40))
        view.take({"kind": "save", "step": 30, "seconds": 1.0})
        assert (view.step, view.lines["save"]) == (40, "save  step 30/100")

    def test_a_resume_does(self):
        view = View(100)
        view.take(train(40))
        view.take({**START, "step": 30, "max_steps": 100})
        assert view.step == 30

    def test_pace_and_deadline_are_this_sessions(self):
        clock = Clock()
        view = View(clock=clock)
        view.take({**START, "max_steps": 100, "time_left": 500.0})
        view.take(train(10))
        clock.now += 60
        view.take(train(20, time=90.0))
        assert view.eta() == 480
        assert "deadline</div>" in panel_html(view)
        assert "in 7:20" in panel_html(view)
        clock.now += 10
        view.take({**START, "step": 15, "max_steps": 100, "time_left": None})  # started again, without a limit
        assert view.eta() is None
        assert view.seconds() == 0.0  # as that record says
        assert "deadline" not in panel_html(view)

    def test_a_curve_with_one_high_value_is_logarithmic_and_says_so(self):
        view = View(100)
        for step, loss in enumerate((100.0, 2.0, 1.0), 1):
            view.take(train(step, loss=loss))
        assert "loss 1 to 100 (logarithmic)" in panel_html(view)
        (points,) = [attrs["points"] for tag, attrs in Checked(panel_html(view)).tags if tag == "polyline"]
        assert points.split()[1] == "300,56.7"  # linear: 65.4

    def test_what_a_gpu_does_not_tell_is_left_out(self):
        view = View(100)
        unknown = {"index": 3, "utilization": None, "memory_used": None, "memory_total": None, "temperature": None}
        view.gpus = [unknown, {**unknown, "index": 4, "memory_used": 2**30}]
        texts = [text for text in Checked(panel_html(view)).texts if text.strip()]
        assert texts[-4:] == ["GPU 3", "GPU 4", "1.0 GiB", "1 process"]


@needs_chromium
class TestInABrowser:
    @pytest.mark.parametrize("dark", [False, True])
    def test_values_are_there_and_readable(self, dark):
        measured = browser.measure(browser.page(drawn()), dark=dark)
        (found,) = measured["panels"]
        assert measured["errors"] == []
        rate = re.fullmatch(r"1[12]\.\dk tokens/s", found["values"].pop("throughput"))
        assert rate is not None
        assert float(found["values"].pop("training loss")) == pytest.approx(3.3, abs=0.2)
        assert found["values"] == {
            "validation loss": "3.594",
            "learning rate": "1.14e-04",
            "epoch": "1.24 / 2",
            "elapsed": "8:16",
            "time to go": "5:04",
            "session's deadline": "in 8:15:04",
            "last checkpoint": "step 1,000",
        }
        for part in ("step 1,240 / 2,000 (62%)", "97 %", "9.1 / 14.6 GiB", "71 °C", "accuracy 0.41", "Tesla T4"):
            assert part in found["text"]
        assert found["lines"] == 2
        assert (found["paper"] == "rgb(255, 255, 255)") is not dark
        assert browser.contrast(found["ink"], found["paper"]) > 10

    @pytest.mark.parametrize("width", [280, 1600])
    def test_nothing_sticks_out_however_narrow(self, width):
        long = "x" * 300
        html = drawn(outcome=f"stopped ({long})", status="stopped")
        (found,) = browser.measure(html, width=width)["panels"]
        assert found["out"] == []
        assert long in found["text"]
        assert found["width"] <= width
        assert found["right"] <= max(width, 500)

    def test_what_sticks_out_would_be_found(self):
        html = drawn().replace("overflow-wrap:anywhere", "white-space:nowrap", 1).replace("Tesla T4", "y" * 300)
        (found,) = browser.measure(html, width=280)["panels"]
        assert found["out"] != []

    @pytest.mark.parametrize("scheme", ["jp", "vscode"])
    def test_a_themes_variables_decide_before_the_system(self, scheme):
        names = {
            "jp": ("--jp-layout-color0", "--jp-content-font-color1"),
            "vscode": ("--vscode-editor-background", "--vscode-foreground"),
        }[scheme]
        theme = f"<style>:root{{{names[0]}:rgb(17, 17, 17);{names[1]}:rgb(250, 250, 250)}}</style>"
        (found,) = browser.measure(browser.page(theme + drawn()), dark=False)["panels"]
        assert (found["paper"], found["ink"]) == ("rgb(17, 17, 17)", "rgb(250, 250, 250)")


BATCH = """
import os, sys
os.environ["KAGGLE_KERNEL_RUN_TYPE"] = "Batch"
from runs import Clock, gpu, START
from kaggle_mgpu.progress import Progress
clock = Clock()
with Progress({folder!r}, max_steps=6000, main=True, clock=clock) as progress:  # ten minutes, ten steps a second
    progress.record(dict(START, max_steps=6000))
    for step in range(1, 6001):
        clock.now = 1000 + step / 10
        record = {{"kind": "train", "step": step, "loss": 9 / step, "lr": 1e-3, "tokens_per_s": 1e4, "time": step / 10}}
        if step % 10 == 0:
            progress.record(record)
        if step % 50 == 0:  # an evaluation and a save every five seconds
            progress.record({{"kind": "eval", "step": step, "val_loss": 9 / step, "val_accuracy": 0.5}})
            progress.record({{"kind": "save", "step": step, "seconds": 0.5}})
        progress._display.view.gpus = [gpu(0), gpu(1)]
    progress.close({{"finished": True, "step": 6000, "metrics": {{"loss": 0.0015}}, "seconds": 600.0}})
"""


@pytest.fixture(scope="module")
def batch_notebook(tmp_path_factory):
    """Ten minutes of a Batch session by our own clock, as a notebook saved by a real kernel, with the run's picture."""
    nbformat, _ = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("batch")
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]"
    picture = f"from kaggle_mgpu import progress; progress.plot({str(folder)!r})"
    sources = [paths + BATCH.format(folder=str(folder)), picture]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    executed(notebook)
    return notebook


class TestBatch:
    def test_ten_minutes_are_a_small_notebook_and_a_short_log(self, batch_notebook):
        outputs = batch_notebook.cells[0].outputs
        said = "".join(output.text for output in outputs if output.output_type == "stream").splitlines()
        (panel_output,) = (output for output in outputs if output.output_type != "stream")
        assert 40 < len(said) < 100
        assert said[-1] == "finished: step 6000/6000  loss 0.0015  in 10:00  2 processes"
        lines = [line for line in said if line.startswith("step ")]
        steps = [int(re.match(r"step (\d+)/", line)[1]) for line in lines]
        assert all(150 <= later - earlier <= 600 for earlier, later in pairwise(steps))
        assert panel_output.output_type == "display_data"
        assert "finished" in panel_output.data["text/html"]
        size = len(json.dumps(batch_notebook))
        assert 10_000 < size < 50_000  # the run's picture included

    @needs_chromium
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_the_saved_page_shows_the_panel(self, batch_notebook, theme):
        nbconvert = pytest.importorskip("nbconvert")
        html, _ = nbconvert.HTMLExporter(template_name="lab", theme=theme).from_notebook_node(batch_notebook)
        measured = browser.measure(html, dark=theme == "light")  # the theme wins over the system
        (found,) = measured["panels"]
        assert found["values"]["training loss"] == "0.0015"
        assert found["values"]["throughput"] == "10.0k tokens/s"
        assert "in 10:00 · 2 processes" in found["text"]
        assert "time to go" not in found["values"]
        assert found["out"] == []
        assert found["right"] <= found["page"]
        assert browser.contrast(found["ink"], found["paper"]) > 10
        assert (browser.contrast(found["paper"], "rgb(0, 0, 0)") > 10) is (theme == "light")
        assert "Progress" not in "".join(measured["errors"])


class TestAttach:
    def test_the_code_in_a_panel_that_stands_still_shows_how_the_run_ended(self, tmp_path, capsys, monkeypatch):
        shown = []
        monkeypatch.setattr(session, "show", lambda html, text, display_id: shown.append(html))
        run = make(tmp_path, display="panel")
        for record in story():
            run.record(record)
        saved = "".join(Checked(shown[-1]).texts)
        end = {"finished": True, "step": 1240, "metrics": {}, "seconds": 496.0}
        run.record({"kind": "stop", **end})
        run.close(end)
        code = re.search(r"from kaggle_mgpu import progress; progress\.attach\(.*\)", saved)[0]
        exec(code, {})
        assert "finished: step 1240" in capsys.readouterr().out
        assert "reload" not in shown[-1], "the panel of a run that has ended"

    def test_an_ended_run_is_shown_as_it_ended(self, tmp_path, capsys, monkeypatch):
        shown = []
        monkeypatch.setattr(session, "show", lambda html, text, display_id: shown.append((html, text, display_id)))
        end = {"kind": "stop", "step": 1240, "reason": "time limit", "finished": False, "seconds": 496.0}
        write(tmp_path, [*story(), {**end, "metrics": {"loss": 3.4}}])
        attach(tmp_path, display="panel")
        html, text, _ = shown[-1]
        assert text == "stopped (time limit): step 1240/2000  loss 3.4  in 8:16  2 processes"
        assert len({display_id for _, _, display_id in shown}) == 1
        page = " | ".join(Checked(html).texts)
        for part in ("stopped", "elapsed | 8:16", "last checkpoint | step 1,000", "GPU 1"):
            assert part in page
        assert "time to go" not in page
        assert capsys.readouterr().out == ""

    def writer(self, folder, body):
        script = f"""if True:
            import os, sys, time
            from kaggle_mgpu.progress import Progress
            progress = Progress(sys.argv[1], max_steps=1000, main=True, display="lines", log=lambda text: None)
            progress.record({{"kind": "start", "step": 0, "max_steps": 1000, "time": 0.0}})
            progress.record({{"kind": "train", "step": 1, "loss": 1.0}})
            print("begun", flush=True)
            {body}
        """
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        return process

    def on_its_way(self, monkeypatch, process):
        """The process gets a line when it has been looked at for the first time."""
        told = []

        def sleep(seconds):
            if not told:
                told.append(process.stdin.write("go on\n"))
                process.stdin.flush()
            time.sleep(seconds)

        monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=sleep))

    def test_a_running_one_is_followed_to_its_end(self, tmp_path, capsys, monkeypatch):
        body = """sys.stdin.readline()
            for step in range(2, 31):
                progress.record({"kind": "train", "step": step, "loss": 1.0})
            progress.note("a note")
            progress.record({"kind": "stop", "step": 30, "reason": "asked to stop", "seconds": 9.0})"""
        process = self.writer(tmp_path, body)
        self.on_its_way(monkeypatch, process)
        attach(tmp_path, display="lines", poll=0.02)
        assert process.wait(600) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-2:] == ["a note", "stopped (asked to stop): step 30/1000  in 0:09  1 process"]

    def test_one_that_was_killed_has_an_end_too(self, tmp_path, capsys):
        process = self.writer(tmp_path, "time.sleep(600)")
        process.kill()
        process.wait(600)
        attach(tmp_path, display="lines", poll=0.02, patience=0.1)
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith("stopped (no process and no final record: killed, or on another machine): step 1/1000")

    def test_one_that_ends_while_it_is_looked_at_has_the_end_that_it_wrote(self, tmp_path, capsys, monkeypatch):
        """Between the look at its records and the look for its process."""
        write(tmp_path, [{**START, **records.owner()}, train(10)])

        def ends(found):
            end = {"kind": "stop", "step": 2000, "finished": True, "seconds": 9.0}
            write(tmp_path, [{**START, **records.owner()}, train(10), end])
            return False

        monkeypatch.setattr(display, "running", ends)
        attach(tmp_path, follow=False, display="lines")
        assert capsys.readouterr().out.splitlines()[-1] == "finished: step 2000/2000  in 0:09  2 processes"

    def test_one_that_broke_off_may_be_started_again(self, tmp_path, capsys, monkeypatch):
        """As a launch with max_restarts does: the new start replaces the file."""
        first = make(tmp_path, max_steps=50)
        for step in range(1, 31):
            first.record(train(step))
        with pytest.raises(RuntimeError), first:
            raise RuntimeError("a worker died")
        body = """progress.close()
            progress = Progress(sys.argv[1], max_steps=40, main=True, resumed_step=0, display="lines", log=print)
            progress.record({"kind": "start", "step": 0, "max_steps": 40})
            progress.record({"kind": "train", "step": 40, "loss": 1.0})
            progress.record({"kind": "stop", "step": 40, "reason": "finished", "finished": True, "seconds": 2.0})"""
        process = self.writer(tmp_path, "sys.stdin.readline()\n            " + body)
        self.on_its_way(monkeypatch, process)
        attach(tmp_path, display="lines", poll=0.02, patience=600)
        process.communicate(timeout=600)
        assert capsys.readouterr().out.splitlines()[-1] == "finished: step 40/40  in 0:02  1 process"

    def test_an_interrupt_ends_the_looking_and_not_the_run(self, tmp_path):
        run = self.writer(tmp_path, "time.sleep(600)")
        script = """if True:
            import sys, time
            from kaggle_mgpu import progress
            sleep = time.sleep
            time.sleep = lambda seconds: (print("looking", flush=True), sleep(seconds))
            progress.attach(sys.argv[1], display="bar")
        """
        looking = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert looking.stdout.readline() == "looking\n"
            looking.send_signal(signal.SIGINT)
            out, err = looking.communicate(timeout=600)
            said = "no longer followed; the run goes on. attach(…) shows it again\n"
            assert out.replace("looking\n", "") == said
            assert "1/1000" in err
            assert "Traceback" not in err
            assert looking.returncode == 0
            assert run.poll() is None
        finally:
            run.kill()
            run.communicate()

    def test_as_it_stands(self, tmp_path, capsys, monkeypatch):
        write(tmp_path, [{**START, **records.owner()}, train(10)])  # of this process, which lives
        shown = []
        monkeypatch.setattr(session, "show", lambda html, text, display_id: shown.append(html))
        attach(tmp_path, follow=False, display="panel")
        assert "Watching only: " in shown[-1]  # the stop button would not stop the run
        attach(tmp_path, follow=False, display="lines")
        assert capsys.readouterr().out == "step 10/2000 (0%)  loss 0.1818  lr 3.0e-04  2 processes\n"

    def test_no_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"metrics.jsonl does not exist: expected the output_dir of a run"):
            attach(tmp_path)


class TestWatcher:
    def test_gpus_are_sampled_shown_and_recorded(self, tmp_path, monkeypatch):
        shown = []
        monkeypatch.setattr(session, "show", lambda html, text, display_id: shown.append(html))
        monkeypatch.setattr(progress, "SAMPLE_SECONDS", 0.0)
        asked = []

        def sample():
            asked.append(1)
            return [gpu(0, 90 + len(asked)), gpu(1, 50, 60 + len(asked))]

        run = make(tmp_path, display="panel", sample=sample)
        run.record(train(1))
        wait_for(lambda: len(asked) >= 1 and len(read(tmp_path)) >= 2)
        run.clock.now += 3.0
        wait_for(lambda: "GPU 1" in shown[-1])
        run.clock.now += 60.0
        wait_for(lambda: read(tmp_path)[-1].get("time", 0.0) >= 60.0)
        run.close({"finished": True})
        run._watcher.join(600)
        assert run._watcher.is_alive() is False
        found = [record for record in read(tmp_path) if record["kind"] == "gpus"]
        assert found[0]["gpus"][0] == {**gpu(0, 91), "temperature": 71}
        assert 61 < found[-1]["gpus"][1]["temperature"] <= 60 + len(asked)
        assert found[-1]["time"] > found[0]["time"]

    def test_means_and_maxima(self):
        merged = progress._means([[gpu(0, 10, 50)], [gpu(0, 30, 70)], [gpu(0, 20, None)]])
        assert merged == [{**gpu(0, 20.0), "temperature": 70}]

    def test_a_run_is_asked_to_stop_from_elsewhere(self, tmp_path):
        script = """if True:
            import sys
            from kaggle_mgpu import TrainConfig, train
            from tasks import Regression
            given = {"max_steps": 10**6, "global_batch_size": 8, "log_every": 10, "data_workers": 0}
            result = train(TrainConfig(output_dir=sys.argv[1], **given), Regression())
            print("RESULT", result.finished, result.reason)
        """
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-c", script, str(tmp_path)]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
        try:
            wait_for(lambda: any(record["kind"] == "train" for record in read(tmp_path)))
            progress.stop(tmp_path)
            out, _ = run.communicate(timeout=600)
        finally:
            run.kill()
        assert out.splitlines()[-1] == "RESULT False asked to stop"
        end = read(tmp_path)[-1]
        assert end["kind"] == "stop"
        assert (tmp_path / f"checkpoints/step-{end['step']:08}/state.json").is_file()
        assert not (tmp_path / progress.STOP).exists()
        with pytest.raises(ValueError, match="no run is active in this folder on this machine"):
            progress.stop(tmp_path)

    def test_a_driver_that_does_not_answer_is_asked_less_and_less(self, tmp_path):
        run, asked = make(tmp_path), []

        class Seconds:
            """The event that ends the watching, by our own clock: after ten minutes."""

            def is_set(self):
                return False

            def wait(self, seconds):
                run.clock.now += seconds
                return run.clock.now >= 1600

        run._over = Seconds()
        run._watch(lambda: asked.append(run.clock.now - 1000) or ([gpu(0)] if run.clock.now < 1010 else []))
        assert asked == [0, 5, 10, 20, 40, 80, 160, 320]

    def test_a_request_is_seen_at_a_record_too_and_gone_before_the_run_can_end_by_it(self, tmp_path, monkeypatch):
        run, known, unlink = make(tmp_path), [], Path.unlink
        run.record({"kind": "start", "step": 0})
        progress.stop(tmp_path)
        assert not run.stop_requested
        monkeypatch.setattr(Path, "unlink", lambda path: known.append(run.stop_requested) or unlink(path))
        run.record(train(1))
        assert run.stop_requested
        assert known == [False]
        assert not (tmp_path / progress.STOP).exists()

    def test_an_old_request_does_not_stop_a_new_run(self, tmp_path):
        (tmp_path / progress.STOP).touch()
        run = make(tmp_path, sample=list)
        run.close()
        run._watcher.join(600)  # it has looked once at least
        assert not run.stop_requested


def wait_for(condition, seconds=600.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)
