"""What a run leaves behind and what it shows: real files, a real kill, a real notebook, our own clock."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kaggle_mgpu import TrainConfig, launch, session
from kaggle_mgpu.progress import METRICS, Progress, read
from kaggle_mgpu.training import clock
from kaggle_mgpu.training import loop as trainer
from runs import make, train
from tasks import Regression


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
            "step 1/100 (1%)  loss 1  lr 3.0e-04  2 processes",
            "eval  step 2/100  val_loss 1.235  val_f1 0.5",
            "save  step 2/100  path checkpoints/step-00000002",
            "careful",
            "finished: step 100/100  loss 1.9  in 3:12  2 processes",
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
        assert progress.said == ["stopped (broke off: KeyError: 'task'): step 0/100  in 0:00  1 process"]
        progress.record(train(1))  # closed: no line, no error on the way out
        assert read(tmp_path) == [{"kind": "stop", "step": 0, "reason": "broke off: KeyError: 'task'"}]

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

    def test_it_shows_epoch_loss_rate_and_processes(self, tmp_path, capsys):
        progress = make(tmp_path, display="bar", max_steps=20)
        progress.record({"kind": "start", "step": 0, "world_size": 2, "epochs": 3.0})
        progress.record(train(20, epoch=0.5))
        progress.close({"finished": True, "step": 20, "seconds": 1})
        assert "epoch 0.50 / 3, loss 0.09524, lr 3.0e-04, 2 processes]" in capsys.readouterr().err

    def test_one_process_for_several_gpus_says_so(self, tmp_path, capsys):
        progress = make(tmp_path, display="bar", max_steps=20)
        progress.record({"kind": "start", "step": 0, "world_size": 1, "replicas": 2})
        progress.record(train(20))
        progress.close({"finished": True, "step": 20, "seconds": 1})
        assert "1 process with 2 replicas]" in capsys.readouterr().err
        assert progress.said[-1].endswith("1 process with 2 replicas")

    @pytest.mark.parametrize(("can_show", "tty", "kind"), [(1, 1, "Panel"), (0, 1, "Bar"), (0, 0, "Lines")])
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
            settings = {"lr": 0.5, "schedule": "cosine", "max_norm": None, "layers": (1, 2)}
            with Progress(sys.argv[1], **given, resumed_step=1, settings=settings) as progress:
                progress.record({"kind": "train", "step": 2, "loss": 1.25, "sample": "Once upon a time"})
                progress.close({"finished": True, "metrics": {"loss": 0.5, "perplexity": float("nan")}})
            assert "tensorflow" not in sys.modules
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            events = EventAccumulator(sys.argv[1] + "/tensorboard")
            events.Reload()
            for tag in sorted(events.Tags()["scalars"]):
                print("TAG", tag, [(event.step, event.value) for event in events.Scalars(tag)])
            tags = events.Tags()
            (said,) = events.Tensors("train/sample/text_summary")
            print("TEXT", said.step, said.tensor_proto.string_val)
            (image,) = events.Images("run")
            print("IMAGE", image.width > 500, image.height > 500, image.encoded_image_string[:4])
            from tensorboard.plugins.hparams import metadata
            for tag, data in events.summary_metadata.items():
                if data.plugin_data.plugin_name == "hparams" and tag == metadata.SESSION_START_INFO_TAG:
                    content = metadata.parse_session_start_info_plugin_data(data.plugin_data.content)
                    print("SETTINGS", {k: v.string_value or v.number_value for k, v in sorted(content.hparams.items())})
        """
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path / 'fake'}"}
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ended.returncode == 0, ended.stderr
        assert [line for line in ended.stdout.splitlines() if line.startswith("TAG")] == [
            "TAG eval/val_loss []",  # of the step that is trained again: hidden
            "TAG final/loss [(2, 0.5)]",
            "TAG final/perplexity [(2, nan)]",
            "TAG train/loss [(1, 2.5), (2, 1.25)]",
        ]
        rest = [line for line in ended.stdout.splitlines() if line.split()[0] in ("TEXT", "IMAGE", "SETTINGS")]
        assert rest == [
            "TEXT 2 [b'Once upon a time']",
            "IMAGE True True b'\\x89PNG'",
            "SETTINGS {'layers': '(1, 2)', 'lr': 0.5, 'schedule': 'cosine'}",
        ]

    def test_a_missing_package_is_named_before_anything_is_trained(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        monkeypatch.delitem(sys.modules, "tensorboard.compat.notf", raising=False)
        with pytest.raises(ModuleNotFoundError, match=r"tensorboard=True, but .* pip install tensorboard"):
            make(tmp_path, tensorboard=True)


class TestWhereTheTimeWent:
    def test_all_of_it_is_accounted_for(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

        def step() -> None:
            run.taken.append(clock.StepTaken(now[0], now[0], now[0], 8, 8))

        run = clock.Clock()
        now[0] += 2.0
        asked, arrived = 100.0, now[0]
        now[0] += 5.0
        run.taken.append(clock.StepTaken(asked, arrived, now[0], 8, 8))
        assert run.time_use() == {"data": 2.0, "steps": 5.0}
        with run.evaluating():
            now[0] += 3.0
        with run.pause():
            now[0] += 1.0
        assert run.time_use() == {"evaluation": 3.0, "saving": 1.0}
        now[0] += 4.0
        step()
        step()
        assert run.time_use(communication=0.5) == {"steps": 3.0, "communication": 1.0}
        now[0] += 1.0
        step()
        assert run.time_use(communication=9.0) == {"communication": 1.0}  # never more than there was
        assert run.time_use() == {}
        now[0] += 4.0
        run.taken.append(clock.StepTaken(now[0], now[0], now[0], 8, 8, loading=1.0))
        assert run.time_use(communication=0.5) == {"data": 1.0, "steps": 2.5, "communication": 0.5}

    def test_two_processes_know_their_communication(self, tmp_path):
        given = {"max_steps": 24, "global_batch_size": 8, "log_every": 8, "data_workers": 0, "nproc": 2}
        result = launch(trainer.train, TrainConfig(output_dir=str(tmp_path), **given), Regression())
        spent = [record["spent"] for record in result.records() if record["kind"] == "train"]
        assert all(parts.get("communication", 0) >= 0 for parts in spent)
        assert sum(parts.get("communication", 0) for parts in spent) > 0


def test_records_of_somebody_else_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    good = {"kind": "train", "step": 1, "loss": None}
    bad: list[dict[str, object]] = [
        {"kind": "train", "step": "abc"},
        {"kind": "start", "step": 0, "time_left": "x"},
        {"kind": "gpus", "step": 0, "gpus": [{"index": "<img src=x onerror=alert(1)>"}]},
        {"kind": "gpus", "step": 0, "gpus": "all"},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in [*bad, good]))
    assert read(tmp_path) == [good]
