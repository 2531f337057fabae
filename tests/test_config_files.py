"""Settings from files that include files, and from the environment; the examples that come with the notebooks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kaggle_mgpu import TrainConfig, config
from kaggle_mgpu import __main__ as command_line
from kaggle_mgpu.recipes import sft

ROOT = Path(__file__).parents[1]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_files_own_values_override_what_it_includes(tmp_path: Path) -> None:
    write(
        tmp_path,
        mine="include: [base.yaml, more/gpu.yaml]\nlr: 3\n",
        base="lr: 1\nepochs: 1\nseed: 1\nmin_lr: 1\n",
        more__gpu="include: ../deep.yaml\nlr: 2\nepochs: 2\n",
        deep="epochs: 9\nseed: 9\nlog_every: 9\n",
    )
    loaded = TrainConfig.load(tmp_path / "mine.yaml")
    assert (loaded.lr, loaded.epochs, loaded.seed, loaded.log_every, loaded.min_lr) == (3, 2, 9, 9, 1)
    (tmp_path / "mine.json").write_text('{"include": "base.yaml", "seed": 5}')
    assert TrainConfig.load(tmp_path / "mine.json").seed == 5


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"a": "include: b.yaml", "b": "include: a.yaml"}, ValueError, "in a circle: a.yaml -> b.yaml -> a.yaml"),
        ({"a": "include: a.yaml"}, ValueError, "files include each other in a circle: a.yaml -> a.yaml"),
        ({"a": "include: b.yaml"}, FileNotFoundError, "b.yaml, included by "),
        ({"a": "include: {x: 1}"}, ValueError, "include: expected a file's name or a list of them, got {'x': 1}"),
        ({"a": "include: b.yaml", "b": "lrr: 1"}, TypeError, "TrainConfig has no parameter 'lrr'. Did you mean 'lr'?"),
        ({"a": "include: b.yaml", "b": "- 1"}, ValueError, "b.yaml: expected a mapping of names to values, got list"),
    ],
)
def test_includes_that_cannot_be(tmp_path: Path, files: dict[str, str], error: type[Exception], says: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(error, match=re.escape(says)):
        TrainConfig.load(tmp_path / "a.yaml")


def test_a_file_included_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, a="include: [b.yaml, c.yaml]", b="include: c.yaml", c="lr: 0.5")
    assert TrainConfig.load(tmp_path / "a.yaml").lr == 0.5


# The environment
def test_variables_name_fields() -> None:
    environ = {"KAGGLE_MGPU_MAX_STEPS": "7", "KAGGLE_MGPU_GPU_IDS": "0,1", "HOME": "/", "KAGGLE_MGPU_QUIET": "1"}
    found = TrainConfig.environment(environ)
    assert found == {"max_steps": "7", "gpu_ids": "0,1"}
    assert TrainConfig.from_dict(found).max_steps == 7


def test_a_misspelt_variable_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"KAGGLE_MGPU_MAX_STEP: TrainConfig has .* mean KAGGLE_MGPU_MAX_STEPS\?"):
        TrainConfig.environment({"KAGGLE_MGPU_MAX_STEP": "7"})
    with pytest.raises(
        TypeError, match=r"KAGGLE_MGPU_GLOBAL_BATCH_SIZE, KAGGLE_MGPU_MICRO_BATCH_SIZE or KAGGLE_MGPU_BASE"
    ):
        TrainConfig.environment({"KAGGLE_MGPU_BATCH_SIZE": "7"})


def test_the_kits_own_variables_are_known_and_are_no_fields() -> None:
    used = set()
    for file in (ROOT / "kaggle_mgpu").rglob("*.py"):
        used |= set(re.findall(r"KAGGLE_MGPU_[A-Z_]*[A-Z]", file.read_text(encoding="utf-8")))
    examples = {"KAGGLE_MGPU_MAX_STEPS"}
    assert used - examples - {"KAGGLE_MGPU_"} <= config.NOT_FIELDS
    fields = {f"KAGGLE_MGPU_{name.upper()}" for name in sft.Config().to_dict()}
    assert not fields & config.NOT_FIELDS


def test_flags_override_the_environment_which_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, a="include: b.yaml\nlr: 0.1\nmax_steps: 1\n", b="lr: 0.2\nmax_steps: 2\nseed: 2\nlog_every: 2\n")
    for name, value in {"MAX_STEPS": "3", "SEED": "3", "RESUME": "never"}.items():
        monkeypatch.setenv(f"KAGGLE_MGPU_{name}", value)
    seen = []
    monkeypatch.setattr(sft, "run", lambda settings: seen.append(settings) or type("R", (), {"finished": True})())
    assert command_line.main(["train", "sft", "--config", str(tmp_path / "a.yaml"), "--seed", "4"]) == 0
    settings = seen[0]
    assert (settings.lr, settings.max_steps, settings.seed, settings.log_every) == (0.1, 3, 4, 2)
    assert settings.resume == "never"
    assert "settings from KAGGLE_MGPU_… in the environment: max_steps=3" in capsys.readouterr().out
    monkeypatch.setenv("KAGGLE_MGPU_WINGSPAN", "3")
    assert command_line.main(["train", "sft"]) == 2
    assert (
        "environment variable KAGGLE_MGPU_WINGSPAN: Config has no such field. Unset it, or" in capsys.readouterr().err
    )


# Examples
def test_the_examples_load() -> None:
    loaded = {path.stem: sft.Config.load(path) for path in (ROOT / "notebooks" / "configs").glob("*.yaml")}
    modes = {name: (settings.mode, settings.nproc, settings.precision) for name, settings in loaded.items()}
    assert modes == {
        "base": ("lora", "auto", "auto"),
        "t4x2": ("qlora", 2, "fp16"),
        "24gb_pair": ("lora", 2, "bf16"),
        "a100_pair": ("full", 2, "bf16"),
        "h200_quad": ("lora", 4, "bf16"),
    }
    for settings in loaded.values():
        assert settings.model is not None
        assert settings.micro_batch_size == "auto"
        assert settings.global_batch_size is not None
        assert settings.global_batch_size % (2 if settings.nproc == "auto" else int(settings.nproc)) == 0
