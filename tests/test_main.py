"""The command line, as a shell sees it: what it prints where, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kaggle_mgpu import __main__ as command_line
from kaggle_mgpu.recipes.text_generation import Config

TINY = [
    "--tokenizer", "byte", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "16",
    "--global-batch-size", "4", "--warmup-steps", "0", "--log-every", "1", "--eval-every", "end",
]  # fmt: skip


def kaggle_mgpu(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kaggle_mgpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def where(folder: Path) -> list[str]:
    """Flags for a text to train on, made here, and for the run's folder."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return ["--data-path", str(folder / "text.txt"), "--output-dir", str(folder / "run")]


def train(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return kaggle_mgpu("train", "text_generation", *TINY, *where(folder), *arguments)


def test_gpus(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase $1 in *utilization*) echo 0, 97, 14000, 15360, 71; exit ;; esac\n"
        "for i in 0 1; do echo $i, GPU-$i, Tesla T4, 15360, 7.5; done\n"
    )
    smi.chmod(0o755)
    run = kaggle_mgpu("gpus", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (run.returncode, run.stderr) == (0, "")
    assert "GPU 0: Tesla T4, 15.0 GiB; now 97 % busy, 13.7 GiB in use, 71 °C\n" in run.stdout
    assert "2 GPUs: one process each, DistributedDataParallel" in run.stdout


def test_gpus_takes_nothing_else() -> None:
    run = kaggle_mgpu("gpus", "--nonsense")
    assert run.returncode == 2
    assert "unrecognized arguments: --nonsense" in run.stderr


def test_no_command_shows_what_there_is() -> None:
    run = kaggle_mgpu()
    assert (run.returncode, run.stdout) == (2, "")
    assert "python -m kaggle_mgpu train text_generation --epochs 1 --strategy ddp" in run.stderr
    assert "the GPUs, how busy and full each is" in run.stderr


def test_a_recipe_that_is_not_there() -> None:
    run = kaggle_mgpu("train", "text_generatoin")
    assert run.returncode == 2
    assert "'text_generatoin'" in run.stderr
    assert "'text_generation'" in run.stderr


def test_help_lists_every_field_with_its_meaning_and_default() -> None:
    run = kaggle_mgpu("train", "text_generation", "--help", env={"COLUMNS": "500"})
    assert (run.returncode, run.stderr) == (0, "")
    # an entry a flag: its name, what values it takes, its docstring
    entries = {entry.split()[0].strip(","): entry for entry in run.stdout.split("options:\n")[1].split("\n  -")}
    for field in dataclasses.fields(Config):
        entry = entries["-" + field.name.replace("_", "-")]
        meaning, default = entry.strip().removesuffix(")").split(" (default: ")
        assert default == str(field.default)
        assert len(meaning.split()) > 2, f"{field.name}: no docstring"
    assert entries["-config"].split()[:4] == ["-config", "FILE", "YAML", "or"]


def test_the_recipes_are_found() -> None:
    there = Path(command_line.__file__).with_name("recipes").glob("[!_]*")
    names = [path.stem for path in there if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert command_line.recipes() == sorted(names)
    _, modules = command_line.parser()
    assert sorted(modules) == sorted(names)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("lr: 1e-2\nmax_steps: 3\nschedule: linear\n")
    flags = ["--max-steps", 5, "--nproc", 2, "--global-batch-size", "per_gpu:2"]
    run = train(tmp_path, "--config", tmp_path / "settings.yaml", *flags)
    assert run.stdout.splitlines()[-1] == f"pictures: {tmp_path}/run/run.png, run.svg"
    assert (tmp_path / "run/run.png").read_bytes().startswith(b"\x89PNG")
    assert run.returncode == 0, run.stderr
    assert "(per_gpu:2: the weights depend on the number of GPUs) = 2 per process x 2 processes x 1 acc" in run.stdout
    assert "finished: step 5/5" in run.stdout
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [settings[name] for name in ("lr", "max_steps", "schedule", "n_layer")] == [0.01, 5, "linear", 1]
    document = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (document["finished"], document["step"], document["world_size"]) == (True, 5, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        # what was asked for cannot be
        (["--lr", "fast"], 2, "ValueError: Config.lr: expected float|auto, got 'fast' (str)"),
        (["--output-dir", ""], 2, "ValueError: Config.output_dir: expected a name, got ''"),
        (["--config", "{}/none.yaml"], 2, "FileNotFoundError: config file not found: {}/none.yaml"),
        (["--config", ""], 2, "FileNotFoundError: config file not found: "),
        (
            ["--config", "{}/typo.json"],
            2,
            "TypeError: {}/typo.json: Config has no parameter 'max_step'. Did you mean 'max_steps'?",
        ),
        # what was tried did not work
        (["--data-path", "{}/none.txt"], 1, "FileNotFoundError: data_path: no such file or folder: {}/none.txt"),
        (
            ["--output-dir", "/proc/none/run"],
            1,
            "FileNotFoundError: output_dir: expected a folder that can be written to, got '/proc/none/run': [Errno 2]",
        ),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, arguments: list[str], code: int, message: str, capsys: Any) -> None:
    (tmp_path / "typo.json").write_text('{"max_step": 3}')
    given = [argument.format(tmp_path) for argument in arguments]
    assert command_line.main(["train", "text_generation", *TINY, *where(tmp_path), *given]) == code
    said = capsys.readouterr().err
    assert said.startswith(message.format(tmp_path))
    assert len(said.splitlines()) == 1


def test_bad_settings_that_the_workers_find_are_one_line_too(tmp_path: Path) -> None:
    run = train(tmp_path, "--micro-batch-size", "9", "--nproc", "2")
    assert run.returncode == 1
    assert run.stderr == (
        "ValueError: micro_batch_size 9 is larger than global_batch_size 4. Expected at most 2 for 2 replicas; "
        "lower it, or raise global_batch_size.\n"
    )


BROKEN = {
    "torch.zeros(2) @ torch.zeros(3)": "RuntimeError: inconsistent tensor size",
    "logits(model, batch).sum() * float('nan')": "DivergedError: the loss is nan at step 1",
}


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_error_that_is_not_ours_keeps_its_traceback(tmp_path: Path, nproc: int) -> None:
    """Each of two broken losses, one after the other in a process, as `python -m kaggle_mgpu` would have ended with."""
    (tmp_path / "broken.py").write_text(
        "import torch\ndef logits(model, batch):\n    return sum(p.sum() for p in model.parameters())\n"
        + "".join(f"def loss_{i}(self, model, batch):\n    return {body}\n" for i, body in enumerate(BROKEN))
    )
    program = (
        "import sys, traceback\n"
        "import broken\n"
        "from kaggle_mgpu.__main__ import main\n"
        "from kaggle_mgpu.recipes import text_generation\n"
        "for loss in (broken.loss_0, broken.loss_1):\n"
        "    class Broken(text_generation.TextGeneration):\n"
        "        pass\n"
        "    Broken.loss = loss\n"
        "    text_generation.task = Broken\n"
        "    try:\n"
        "        print('CODE', main(sys.argv[1:]))\n"
        "    except Exception:\n"
        "        traceback.print_exc()\n"
        "    print('--', file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program, "train", "text_generation", *TINY, *where(tmp_path)]
    run = subprocess.run([*command, "--nproc", str(nproc)], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    theirs, ours, rest = run.stderr.split("--\n")
    assert rest == ""
    (body, message), (_, said) = BROKEN.items()
    assert theirs.splitlines()[-1].startswith(message)
    assert "broken.py" in theirs and f"return {body}" in theirs
    assert ours.startswith(said) and len(ours.splitlines()) == 1
    assert [line for line in run.stdout.splitlines() if line.startswith("CODE")] == ["CODE 1"]


def test_an_unknown_flag(tmp_path: Path) -> None:
    run = train(tmp_path, "--epochz", "3")
    assert run.returncode == 2
    assert run.stderr.endswith("unrecognized arguments: --epochz 3. Did you mean --epochs?\n")
    assert not (tmp_path / "run").exists()


def test_a_flag_is_not_known_by_its_beginning(tmp_path: Path) -> None:
    run = train(tmp_path, "--max-step", "3")
    assert run.returncode == 2
    assert run.stderr.endswith("unrecognized arguments: --max-step 3. Did you mean --max-steps?\n")


def test_a_flag_by_another_librarys_name(tmp_path: Path) -> None:
    run = train(tmp_path, "--per-device-train-batch-size", "3")
    assert run.returncode == 2
    assert run.stderr.endswith("--per-device-train-batch-size 3. Did you mean --micro-batch-size?\n")


def test_each_flag_of_another_script_gets_its_hint() -> None:
    others = "--multi-gpu ddp --mode flatten --warmup-epochs 2 --grad-accum-steps=4"
    run = kaggle_mgpu("train", "activity_recognition", "--epochs", "20", *others.split(), "--lr", "4e-3")
    assert run.returncode == 2
    assert run.stderr.endswith(
        f"unrecognized arguments: {others}. For --multi-gpu, did you mean --strategy? "
        "For --warmup-epochs, did you mean --warmup-steps? Epochs are written '2 epochs'. "
        "For --grad-accum-steps, did you mean --gradient-accumulation-steps?\n"
    )


def test_check_of_no_folder() -> None:
    run = kaggle_mgpu("check", "--output-dir", "")
    assert run.returncode == 2
    assert "argument --output-dir: expected a folder's name, got ''" in run.stderr
