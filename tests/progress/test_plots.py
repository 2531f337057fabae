"""The pictures of a run, from its records."""

import io
import itertools
import math
import subprocess
import sys

import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text
from PIL import Image

import browser
from kaggle_mgpu.progress import compare_plot, pixels, plot, plots
from runs import make, story, train, write


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
        figure = plot(run, save=False)
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
        training, validation = plot(run, save=False).axes[0].get_lines()[:2]
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
        assert plot(tmp_path, save=False).axes[0].get_lines()[-1].get_label() == "validation"

    def test_nothing_recorded_yet(self, tmp_path):
        make(tmp_path).record({"kind": "start", "step": 0})
        with pytest.raises(ValueError, match=r"metrics.jsonl: no training record yet, .* expected the output_dir of"):
            plot(tmp_path, save=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("story"), story())


@pytest.fixture(scope="module")
def axes(folder):
    loss, rate, pace, spent, memory, busy = plot(folder).axes
    return {"loss": loss, "rate": rate, "pace": pace, "spent": spent, "memory": memory, "busy": busy}


class TestWholePicture:
    def test_marks_stand_where_it_happened(self, axes):
        """In minutes, at 0.4 s a step: checkpoints every 250 steps, a resume at 500, lost memory at 800."""
        drawn = {line.get_label(): line for line in axes["pace"].get_lines()}
        assert set(drawn) == {"throughput", "checkpoint", "resumed", "out of memory"}
        assert list(drawn["checkpoint"].get_xdata()) == pytest.approx(
            [step * 0.4 / 60 for step in (250, 500, 750, 1000)]
        )
        assert drawn["resumed"].get_xdata()[0] == pytest.approx(500 * 0.4 / 60)
        assert list(drawn["out of memory"].get_xdata()) == pytest.approx([800 * 0.4 / 60])
        assert axes["pace"].get_xlabel() == "time (minutes)"

    def test_a_restart_with_a_smaller_micro_batch_is_lost_memory_too(self, tmp_path):
        """With several ranks the one that notices ends: what is left of it is the reason of the next start."""
        records = [record for record in story() if record["kind"] != "note"]
        start = next(record for record in records if record["kind"] == "start" and record["step"])
        start["micro_batch_size_because"] = "32 was too much in step 501: out of memory"
        lines = plot(write(tmp_path, records), save=False).axes[2].get_lines()
        assert [list(line.get_xdata()) for line in lines if line.get_label() == "out of memory"] == [
            [pytest.approx(10 / 3)]
        ]

    def test_each_gpu_has_a_line_and_a_bar(self, axes):
        assert [line.get_label() for line in axes["busy"].get_lines()] == ["GPU 0 busy", "GPU 1 busy"]
        assert len({line.get_linestyle() for line in axes["busy"].get_lines()}) == 2
        assert [text.get_text().strip() for text in axes["memory"].texts] == ["9.1 GiB of 14.6", "8.1 GiB of 14.6"]

    def test_the_time_adds_up(self, axes):
        bars = axes["spent"].patches
        assert sum(bar.get_width() for bar in bars) == pytest.approx(100)
        labels = [text.get_text() for text in axes["spent"].get_legend().get_texts()]
        whole = 124 * 4.0 + 4 * 9  # seconds: 124 records of 4, four evaluations of 9
        assert labels == [
            f"loading data or waiting for it {100 * 124 * 0.2 / whole:.0f} %",
            f"forward, backward, optimizer {100 * 124 * 3.3 / whole:.0f} %",
            f"communication not overlapped by backward {100 * 124 * 0.5 / whole:.0f} %",
            f"evaluation {100 * 36 / whole:.0f} %",
        ]
        assert len({bar.get_hatch() for bar in bars}) == 4  # in grey too

    def test_communication_that_was_not_measured_is_said_to_be_in_the_steps(self, tmp_path):
        records = story(upto=100)
        for record in records:
            record.get("spent", {}).pop("communication", None)
        labels = [
            text.get_text() for text in plot(write(tmp_path, records), save=False).axes[3].get_legend().get_texts()
        ]
        assert any(label.startswith("forward, backward, optimizer, communication ") for label in labels)

    def test_files(self, folder, axes):
        assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / "run.svg").read_text()[:1000]
        assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "run.png", "run.svg"]

    def test_a_folder_that_cannot_be_written_to_is_drawn_all_the_same(self, folder, monkeypatch):
        from matplotlib.figure import Figure

        def read_only(*arguments, **options):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Figure, "savefig", read_only)
        assert len(plot(folder).axes) == 6

    def test_what_a_notebook_keeps_is_small(self, folder):
        png = plot(folder, save=False)._repr_png_()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 36_000

    def test_a_plot_can_be_read_on_a_light_page_and_on_a_dark_one(self, folder):
        figure = plot(folder, save=False)
        drawn = pixels(figure)
        assert drawn[0, 0].tolist()[3] == 0, "the ground is transparent"
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_bbox_patch() is None]
        inks = {str([255 * part for part in to_rgb(text.get_color())]) for text in texts}
        for ground in ("rgb(255, 255, 255)", "rgb(17, 17, 17)"):
            assert all(browser.contrast(ink, ground) > 3 for ink in inks), inks
        png = Image.open(io.BytesIO(figure._repr_png_())).convert("RGBA")
        assert png.getpixel((0, 0))[3] == 0


def test_the_axes_of_a_recipe_take_the_same_ink():
    axes = plots.figure_of(3, 3).subplots()
    axes.imshow([[0.0, 1e9]])
    axes.set(title="title", xlabel="x", ylabel="y")
    plots.ink(axes)
    texts = [text for text in axes.figure.findobj(Text) if text.get_text()]
    assert {"title", "x", "y"} <= {text.get_text() for text in texts}
    assert {text.get_color() for text in texts} == {plots.INK}
    assert {spine.get_edgecolor() for spine in axes.spines.values()} == {to_rgba(plots.INK)}
    assert axes.figure.get_facecolor()[3] == 0


class TestCompare:
    def test_runs_side_by_side(self, tmp_path):
        fast, slow = write(tmp_path / "two", story()), write(tmp_path / "one", story(seconds_per_step=0.8, upto=600))
        figure = compare_plot([fast, slow], save=tmp_path / "compare")
        by_step, by_time, speed, whole = figure.axes
        assert [text.get_text() for text in by_step.get_legend().get_texts()] == ["two", "one"]
        ends = [line.get_xdata()[-1] for line in by_time.get_lines() if len(line.get_xdata()) > 10]
        assert ends == pytest.approx([1240 * 0.4 / 60, 600 * 0.8 / 60])
        assert all("tokens/s" in text.get_text() for text in speed.texts)
        assert whole.texts[0].get_text().startswith("8.27 minutes, validation loss 3.59")
        assert len({line.get_linestyle() for line in by_time.get_lines() if len(line.get_xdata()) > 10}) == 2
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"compare.png", "compare.svg"}

    def test_everything_is_on_the_page_and_nothing_on_something_else(self, tmp_path):
        """Names of folders may be long, and the numbers of several runs stand close."""
        names = ["a_run_with_a_rather_long_name_on_two_gpus", "another_run_with_a_rather_long_name_on_one"]
        figure = compare_plot([write(tmp_path / name, story()) for name in names])
        pixels(figure)
        by_step, _, speed, whole = figure.axes
        legend = by_step.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [
            "a_run_with_a_ra…two_gpus",
            "another_run_wit…e_on_one",
        ]
        assert by_step.bbox.contains(*legend.get_window_extent().min)
        for axes in (speed, whole):
            boxes = [text.get_window_extent() for text in axes.texts]
            assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)
            ticks = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
            assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))

    def test_what_cannot_be_compared(self, tmp_path):
        with pytest.raises(ValueError, match="expected runs and a label for each, got 0 runs"):
            compare_plot([])
        with pytest.raises(ValueError, match=r"metrics.jsonl: no training record, so nothing to compare"):
            compare_plot([write(tmp_path, [])])
