"""Settings from Python, papermill, files and the command line: one meaning, and errors that name the field."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.fields import parse_duration
from kaggle_mgpu.names import _OTHER_NAMES as OTHER_NAMES
from kaggle_mgpu.names import check_names
from kaggle_mgpu.notebook import notebook_parameters


@dataclass(frozen=True)
class Recipe(TrainConfig):
    """A recipe's own settings."""

    MAY_CHANGE = TrainConfig.MAY_CHANGE | {"labels"}

    labels: tuple[str, ...] = ("cat", "dog")
    """Names of the classes, 100% of them."""
    sizes: list[int] = field(default_factory=lambda: (3, 5))  # type: ignore[assignment,return-value]
    """Kernel sizes."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's."""
    crops: tuple[int, ...] | None = None
    """Crops, or none."""
    extra: dict[str, int] = field(default_factory=dict)
    """Anything."""
    lr: float = 0.5
    """The recipe's own rate."""


def refused(says: str, error: type[Exception] = ValueError, **values: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(says)}"):
        TrainConfig(**values)


class TestParsing:
    @pytest.mark.parametrize(
        ("name", "given", "expected"),
        [
            ("lr", "1e-4", 1e-4),
            ("lr", 1, 1.0),
            ("lr", "3", 3.0),
            ("epochs", 1e3, 1000),
            ("epochs", "1e3", 1000),
            ("epochs", "12", 12),
            ("epochs", " 12 ", 12),
            ("max_steps", 2**60 + 1, 2**60 + 1),
            ("max_steps", str(2**60 + 1), 2**60 + 1),
            ("max_steps", "none", None),
            ("max_steps", "None", None),
            ("max_steps", "null", None),
            ("max_steps", None, None),
            ("max_norm", "none", None),
            ("max_norm", "0.5", 0.5),
            ("gpu_ids", "none", None),
            ("gpu_ids", "0,1", "0,1"),
            ("gpu_ids", 0, "0"),
            ("time_limit", 3600, "3600"),
            ("time_limit", "11h30m", "11h30m"),
            ("output_dir", "none", "none"),
            ("output_dir", Path("a") / "b", "a/b"),
            ("warmup_steps", "0.1", 0.1),
            ("warmup_steps", 0.03, 0.03),
            ("warmup_steps", "100", 100),
            ("warmup_steps", "2 epochs", "2 epochs"),
            ("warmup_steps", 100.0, 100),
            ("nproc", "auto", "auto"),
            ("nproc", "2", 2),
            ("eval_every", "end", "end"),
            ("eval_every", "50", 50),
            ("compile", "true", True),
            ("compile", "False", False),
            ("compile", "1", True),
            ("compile", "no", False),
            ("strategy", "ddp", "ddp"),
        ],
    )
    def test_a_value_becomes_what_its_field_says(self, name: str, given: Any, expected: Any) -> None:
        got = getattr(TrainConfig(**{name: given}), name)
        assert got == expected
        assert type(got) is type(expected)

    @pytest.mark.parametrize(
        ("name", "wrong", "says"),
        [
            ("epochs", True, "expected int, got True (bool)"),
            ("epochs", 1.5, "expected int, got 1.5 (float)"),
            ("epochs", "1.5", "expected int, got '1.5' (str)"),
            ("epochs", float("nan"), "expected int, got nan (float)"),
            ("epochs", float("inf"), "expected int, got inf (float)"),
            ("epochs", None, "expected int, got None (NoneType)"),
            ("global_batch_size", True, "expected int|str|none, got True (bool)"),
            (
                "global_batch_size",
                "many",
                "expected a number of samples, or 'per_gpu:64' for 64 on each GPU, got 'many'",
            ),
            ("global_batch_size", "per_gpu:0", "expected a number of samples, or 'per_gpu:64'"),
            ("global_batch_size", "per_gpu", "expected a number of samples, or 'per_gpu:64'"),
            ("global_batch_size", 2.5, "expected a number of samples, or 'per_gpu:64' for 64 on each GPU, got '2.5'"),
            ("lr", False, "expected float, got False (bool)"),
            ("lr", "fast", "expected float, got 'fast' (str)"),
            ("lr", [1], "expected float, got [1] (list)"),
            ("compile", 1, "expected bool, got 1 (int)"),
            ("compile", "perhaps", "expected bool, got 'perhaps' (str)"),
            ("output_dir", None, "expected str, got None (NoneType)"),
            ("output_dir", True, "expected str, got True (bool)"),
            ("nproc", "two", "expected int|auto, got 'two' (str)"),
            ("nproc", True, "expected int|auto, got True (bool)"),
            ("strategy", "fdsp", "expected auto|single|dp|ddp|fsdp|deepspeed, got 'fdsp' (str)"),
            ("strategy", 1, "expected auto|single|dp|ddp|fsdp|deepspeed, got 1 (int)"),
            ("eval_every", "epochs", "expected int|epoch|end, got 'epochs' (str)"),
            ("warmup_steps", "some", "expected a number of steps, or epochs as '2 epochs', got 'some'"),
            ("schedule_first_cycle", "2 weeks", "expected a number of steps, or epochs"),
        ],
    )
    def test_or_is_refused(self, name: str, wrong: Any, says: str) -> None:
        refused(f"TrainConfig.{name}: {says}", **{name: wrong})

    @pytest.mark.parametrize(
        ("name", "wrong", "says"),
        [
            ("nproc", 0, "expected 1 or more, got 0"),
            ("global_batch_size", 0, "expected 1 or more, got 0"),
            ("micro_batch_size", -4, "expected 1 or more, got -4"),
            ("gradient_accumulation_steps", 0, "expected 1 or more, got 0"),
            ("data_workers", -1, "expected 0 or more, got -1"),
            ("epochs", "0", "expected 1 or more, got 0"),
            ("max_steps", 0, "expected 1 or more, got 0"),
            ("lr", -1e-3, "expected 0.0 or more, got -0.001"),
            ("lr", "nan", "expected 0.0 or more, got nan"),
            ("weight_decay", -0.1, "expected 0.0 or more, got -0.1"),
            ("warmup_steps", -1, "expected 0 or more, got -1"),
            ("eval_every", 0, "expected 1 or more, got 0"),
            ("save_every", 0, "expected 1 or more, got 0"),
            ("keep_last", 0, "expected 1 or more, got 0"),
            ("save_interval_minutes", -1, "expected 0.0 or more, got -1.0"),
            ("seed", -1, "expected 0 or more, got -1"),
            ("max_norm", 0, "expected above 0, got 0.0; None switches clipping off"),
            ("max_norm", "nan", "expected above 0, got nan"),
            ("schedule_power", 0, "expected above 0, got 0.0"),
            ("ema_decay", 1, "expected between 0 and 1, got 1.0"),
            ("ema_decay", 0, "expected between 0 and 1, got 0.0"),
        ],
    )
    def test_ranges(self, name: str, wrong: Any, says: str) -> None:
        refused(f"TrainConfig.{name}: {says}", **{name: wrong})

    def test_a_wrong_time_limit_is_found_when_the_config_is_made(self) -> None:
        refused("TrainConfig.time_limit: not a duration: 'soon'. Write it like '11h30m'", time_limit="soon")

    @pytest.mark.parametrize("name", ["output_dir", "resume", "best_metric", "deepspeed_config"])
    @pytest.mark.parametrize("empty", ["", "  "])
    def test_a_name_is_never_empty(self, name: str, empty: str) -> None:
        refused(f"TrainConfig.{name}: expected a name, got {empty!r}", **{name: empty})

    def test_nor_is_a_path_of_a_recipes_own(self) -> None:
        @dataclass(frozen=True)
        class Own(TrainConfig):
            data_path: str | None = None
            prefix: str = "Q: "

        with pytest.raises(ValueError, match=r"^Own\.data_path: expected a name, got ''$"):
            Own(data_path="")
        assert Own(prefix="").prefix == ""

    @pytest.mark.parametrize("below", ["", "/run", "/a/b"])
    def test_output_dir_is_no_file(self, tmp_path: Path, below: str) -> None:
        file = tmp_path / "file"
        file.touch()
        refused(
            f"TrainConfig.output_dir: expected a folder, got '{file}{below}': {file} is a file",
            output_dir=f"{file}{below}",
        )

    def test_it_is_frozen(self) -> None:
        config = TrainConfig()
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'lr'"):
            config.lr = 1.0  # type: ignore[misc]
        assert {config: 1}[TrainConfig()] == 1

    @given(st.integers(-(2**70), 2**70))
    def test_every_int_survives_as_text(self, number: int) -> None:
        if number < 0:
            refused(f"TrainConfig.seed: expected 0 or more, got {number}", seed=str(number))
        else:
            assert TrainConfig(seed=str(number)).seed == TrainConfig(seed=number).seed == number

    @given(st.floats(0, 1e300))
    def test_every_float_survives_as_text(self, number: float) -> None:
        assert TrainConfig(lr=str(number)).lr == number

    def test_workers_wanted(self) -> None:
        wanted = {
            (strategy, nproc): TrainConfig(strategy=strategy, nproc=nproc).workers_wanted
            for strategy in ("auto", "single", "dp", "ddp")
            for nproc in ("auto", 3)
        }
        assert wanted == {
            ("auto", "auto"): None,
            ("auto", 3): 3,
            ("single", "auto"): 1,
            ("single", 3): 1,
            ("dp", "auto"): 1,
            ("dp", 3): 1,
            ("ddp", "auto"): None,
            ("ddp", 3): 3,
        }


class TestNames:
    def test_a_misspelt_name_is_an_error_that_suggests_the_right_one(self) -> None:
        with pytest.raises(
            TypeError, match=r"^TrainConfig has no parameter 'globl_batch_size'. Did you mean 'global_batch_size'\?$"
        ):
            TrainConfig.from_dict({"lr": 1, "globl_batch_size": 3})
        with pytest.raises(TypeError, match=r"^Recipe has no parameter 'label'. Did you mean 'labels'\?$"):
            Recipe.from_dict({"label": "x"})
        with pytest.raises(TypeError, match="Did you mean 'warmup_steps'"):
            TrainConfig().replace(warmup_step=3)

    def test_and_so_it_is_where_the_config_is_made(self) -> None:
        three = "'global_batch_size', 'micro_batch_size' or 'base_batch_size'"
        with pytest.raises(TypeError, match=rf"^TrainConfig has no parameter 'batch_size'\. Did you mean {three}\? A "):
            TrainConfig(batch_size=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"^Recipe has no parameter 'label'\. Did you mean 'labels'\?$"):
            Recipe(lr=1e-3, label="x")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"Recipe has no parameter 'lrr'\. Did you mean 'lr'"):
            dataclasses.replace(Recipe(), lrr=3)  # type: ignore[call-arg]

    def test_another_librarys_name_gives_ours(self) -> None:
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        assert set(OTHER_NAMES.values()) <= names
        assert not set(OTHER_NAMES) & names
        for other, name in OTHER_NAMES.items():
            end = " Epochs" if other == "warmup_epochs" else "$"
            with pytest.raises(TypeError, match=rf"has no parameter '{other}'\. Did you mean '{name}'\?{end}"):
                TrainConfig.from_dict({other: 1})
        with pytest.raises(TypeError, match=r"Did you mean KAGGLE_MGPU_KEEP_LAST\?"):
            TrainConfig.environment({"KAGGLE_MGPU_SAVE_TOTAL_LIMIT": "3"})

    def test_where_the_value_is_another_too_the_message_says_how_it_is_written(self) -> None:
        with pytest.raises(TypeError, match=r"'warmup_steps'\? Epochs are written '2 epochs'\.$"):
            TrainConfig.from_dict({"warmup_epochs": 2})
        with pytest.raises(TypeError, match=r"\? A size for each GPU is written 'per_gpu:32', for global_"):
            TrainConfig.from_dict({"batch_size": 32})
        with pytest.raises(TypeError, match=r"mean KAGGLE_MGPU_WARMUP_STEPS\? Epochs are written '2 epochs'\.$"):
            TrainConfig.environment({"KAGGLE_MGPU_WARMUP_EPOCHS": "2"})
        with pytest.raises(TypeError, match=r"^run has no parameter 'batch_size'\. Did you mean 'my_batch_size'\?$"):
            check_names(["batch_size"], ["my_batch_size"], where="run")

    def test_capitals_do_not_matter_to_a_suggestion(self) -> None:
        for other, name in (("PREFETCH_FACTOR", "prefetch_factor"), ("BATCH_SIZE_PER_GPU", "micro_batch_size")):
            with pytest.raises(TypeError, match=rf"has no parameter '{other}'\. Did you mean '{name}'\?$"):
                TrainConfig.from_dict({other: 1})

    def test_a_recipe_knows_other_names_of_its_settings(self) -> None:
        class Other(Recipe):
            OTHER_NAMES: ClassVar[dict[str, str]] = {"class_names": "labels"}

        for made in (lambda: Other.from_dict({"class_names": 1}), lambda: Other(class_names=1)):
            with pytest.raises(TypeError, match=r"has no parameter 'class_names'\. Did you mean 'labels'\?$"):
                made()

    @pytest.mark.parametrize("name", ["stage2_batch_size", "mode", "dropout", "optimizer"])
    def test_a_name_that_is_far_from_all_gets_no_guess(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"has no parameter '{name}'\. It has: base_batch_size, "):
            TrainConfig.from_dict({name: 1})

    def test_a_config_is_copied_and_sent_like_any_dataclass(self) -> None:
        config = Recipe(sizes=[7], lr=0.25, max_steps=3)
        for copied in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)):
            assert copied == config
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(config, protocol)) == config
        assert TrainConfig("ddp", 2).nproc == 2  # by position, as ever

    def test_a_class_may_take_more_than_its_fields(self) -> None:
        @dataclass(frozen=True)
        class More(TrainConfig):
            factor: dataclasses.InitVar[float] = 1.0

            def __post_init__(self, factor: float) -> None:  # type: ignore[override]
                object.__setattr__(self, "lr", self.lr * factor)
                super().__post_init__()

        assert More(lr=0.5, factor=2.0).lr == 1.0

    def test_without_anything_near_all_names_are_listed(self) -> None:
        with pytest.raises(TypeError, match=r"^run has no parameter 'zzz'. It has: apple, pear\.$"):
            check_names(["apple", "zzz"], ["pear", "apple"], where="run")
        with pytest.raises(TypeError, match="has no parameter 7"):
            TrainConfig.from_dict({7: 1})  # type: ignore[dict-item]

    @pytest.mark.parametrize("kind", [TrainConfig, Recipe])
    def test_may_change_names_fields(self, kind: type[TrainConfig]) -> None:
        assert {f.name for f in dataclasses.fields(kind)} >= kind.MAY_CHANGE
        # what decides the weights must not be in it
        assert not kind.MAY_CHANGE & {"lr", "seed", "precision", "weight_decay", "schedule", "max_norm", "ema_decay"}


class TestFiles:
    @pytest.mark.parametrize("name", ["run.yaml", "run.yml"])
    def test_yaml(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("lr: 1e-4\nglobal_batch_size: 64\ngpu_ids: 0\nmax_norm:\ncompile: yes\n")
        expected = TrainConfig(lr=1e-4, global_batch_size=64, gpu_ids="0", max_norm=None, compile=True)
        assert TrainConfig.load(tmp_path / name) == TrainConfig.load(str(tmp_path / name)) == expected

    def test_json_holds_every_field(self, tmp_path: Path) -> None:
        config = Recipe(sizes=[1, 2], labels=("a",), crops=(4,), time_limit="1h", extra={"a": 1})
        (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
        assert Recipe.load(tmp_path / "run.json") == config

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=f"^config file not found: {re.escape(str(tmp_path / 'no.yaml'))}$"):
            TrainConfig.load(tmp_path / "no.yaml")

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.yaml", b"lr: [1\nepochs: 2", "not valid YAML: while parsing a flow sequence"),
            ("a.yaml", b"output_dir: 2026-13-45", "not valid YAML: month must be in 1..12"),
            ("a.yaml", b"output_dir: \xff", "not valid YAML: 'utf-8' codec can't decode"),
            ("a.json", b'{"lr": 1,}', "not valid JSON: "),
            ("a.yaml", b"lr: 1\nepochs: 2\nlr: 2", "not valid YAML: 'lr' is set 2 times"),
            ("a.json", b'{"lr": 1, "lr": 2, "lr": 1}', "not valid JSON: 'lr' is set 3 times"),
            ("a.json", b"\xff", "not valid JSON: 'utf-8' codec can't decode"),
            ("a.yaml", b"- lr\n- 3", "expected a mapping of names to values, got list"),
            ("a.yaml", b"", "expected a mapping of names to values, got NoneType"),
            ("a.json", b"3", "expected a mapping of names to values, got int"),
        ],
    )
    def test_broken(self, tmp_path: Path, name: str, content: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: {says}")):
            TrainConfig.load(tmp_path / name)

    def test_a_wrong_name_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("epoch: 3")
        with pytest.raises(TypeError, match=r"no parameter 'epoch'. Did you mean 'epochs'"):
            TrainConfig.load(tmp_path / "a.yaml")


# A value of each field that is not its default.
OTHER: dict[str, Any] = {
    "cpu_offload": True, "meta_init": True, "checkpoint_format": "sharded", "deepspeed_config": "zero.json",
    "strategy": "dp", "nproc": 3, "gpu_ids": "0,1", "precision": "bf16", "compile": True,
    "gradient_checkpointing": True, "global_batch_size": 64, "micro_batch_size": 8, "gradient_accumulation_steps": 2,
    "data_workers": 0, "epochs": 7, "max_steps": 11, "time_limit": "1h", "lr": 1e-5, "lr_scaling": "sqrt",
    "base_batch_size": 3, "weight_decay": 0.0, "warmup_steps": 0.25, "schedule": "linear", "schedule_cycles": 2,
    "schedule_power": 1.5, "min_lr": 1e-6, "max_norm": None, "ema_decay": 0.99, "eval_every": 5, "log_every": 3,
    "save_every": 4, "save_interval_minutes": 0.5, "keep_last": 2, "best_metric": "f1", "best_mode": "max",
    "resume": "never", "output_dir": "some where", "seed": 0, "tensorboard": True, "labels": ("a", "b c"),
    "sizes": (7,), "betas": (0.8, 0.9), "crops": (1, 2), "extra": {"a": 1},
    "max_restarts": 2, "hang_timeout_minutes": 2.5, "collective_timeout_minutes": 1.5, "nccl_p2p": "off",
    "gradient_compression": "fp16", "bucket_mb": 5,
    "find_unused_parameters": True, "sync_batchnorm": "off", "prefetch_factor": 3, "patience": 4, "min_delta": 0.5,
    "schedule_first_cycle": "2 epochs", "schedule_cycle_factor": 2,
}  # fmt: skip


def parsed(flags: list[str], kind: type[TrainConfig] = Recipe, base: TrainConfig | None = None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", action="store_true")
    kind.add_arguments(parser)
    return kind.from_arguments(parser.parse_args(flags), base)


def flags(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


class TestCommandLine:
    def test_other_covers_every_field(self) -> None:
        assert set(OTHER) == {f.name for f in dataclasses.fields(Recipe)}
        assert not [n for n, v in OTHER.items() if n in Recipe().to_dict() and getattr(Recipe(), n) == v]

    @pytest.mark.parametrize("name", [name for name in OTHER if name not in ("labels", "extra")])
    def test_every_field_from_its_flag(self, name: str) -> None:
        assert parsed(flags({name: OTHER[name]})) == Recipe(**{name: OTHER[name]})
        # and back to what it was, over a base that has it otherwise
        usual = getattr(Recipe(), name)
        assert parsed(flags({name: usual}), base=Recipe(**{name: OTHER[name]})) == Recipe()

    def test_nothing_given_is_the_default_or_the_base(self) -> None:
        assert parsed(["--verbose"]) == Recipe()
        assert parsed(["--epochs", "2"], base=Recipe(lr=3)) == Recipe(lr=3, epochs=2)
        assert parsed(["--epochs", "2"], TrainConfig) == TrainConfig(epochs=2)
        assert parsed([], Recipe, base=TrainConfig(lr=3)) == Recipe(lr=3)

    def test_a_wrong_value_names_the_field(self) -> None:
        with pytest.raises(ValueError, match=r"^Recipe.epochs: expected int, got 'many'"):
            parsed(["--epochs", "many"])

    def test_help_holds_each_fields_docstring_and_default(self) -> None:
        parser = argparse.ArgumentParser()
        Recipe.add_arguments(parser)
        text = re.sub(r"\s+", "", parser.format_help())
        source = Path(__file__).read_text() + (Path(__file__).parents[1] / "kaggle_mgpu" / "config.py").read_text()
        for name in OTHER:
            # the newest definition counts: Recipe's own lr
            docstring = re.search(rf'^    {name}: [^\n]*\n    """(.*?)"""', source, re.M | re.S)
            assert docstring is not None, f"{name} has no docstring"
            assert f"--{name.replace('_', '-')}" in text
            default = dataclasses.asdict(Recipe())[name]
            assert re.sub(r"\s+", "", f"{docstring[1]} (default: {default})") in text
        assert "--nprocint|auto" in text
        assert "--gpu-idsstr|none" in text


class TestCopies:
    def test_replace_checks_like_a_new_one_and_keeps_the_class(self) -> None:
        config = Recipe(lr=0.25, sizes=[1])
        changed = config.replace(epochs="3")
        assert type(changed) is Recipe
        assert (changed.epochs, changed.lr, changed.sizes) == (3, 0.25, (1,))
        assert config.epochs == 1
        with pytest.raises(ValueError, match=r"^Recipe.epochs: expected int, got 'x'"):
            config.replace(epochs="x")

    @pytest.mark.parametrize("name", list(OTHER))
    def test_diff_shows_what_changed_and_nothing_else(self, name: str) -> None:
        changed = Recipe(**{name: OTHER[name]})
        was, now = Recipe().to_dict()[name], changed.to_dict()[name]
        assert Recipe().diff(changed) == {name: (was, now)}
        assert changed.diff(Recipe()) == {name: (now, was)}
        # what a run's folder holds is JSON
        assert changed.diff(json.loads(json.dumps(changed.to_dict()))) == {}
        assert changed.diff(changed.to_dict()) == {}

    def test_diff_of_unlike_classes(self) -> None:
        assert TrainConfig(lr=0.5).diff({**TrainConfig(lr=0.5).to_dict(), "colour": "red"}) == {"colour": (None, "red")}
        assert TrainConfig(lr=0.5).diff({"labels": ("a",)})["labels"] == (None, ["a"])
        assert Recipe().diff(TrainConfig())["lr"] == (0.5, 1e-3)


class TestSequences:
    @pytest.mark.parametrize(
        ("name", "given", "expected"),
        [
            ("labels", "a,b", ("a", "b")),
            ("labels", "['a', b]", ("'a'", "b")),
            ("labels", ["x", 3], ("x", "3")),
            ("labels", (), ()),
            ("sizes", "1, 2 3", (1, 2, 3)),
            ("sizes", "[1,2]", (1, 2)),
            ("sizes", "", ()),
            ("sizes", ["1", 2.0], (1, 2)),
            ("betas", "0.5,1e-1", (0.5, 0.1)),
            ("crops", "none", None),
            ("crops", "5", (5,)),
        ],
    )
    def test_parsed(self, name: str, given: Any, expected: Any) -> None:
        assert getattr(Recipe(**{name: given}), name) == expected
        hash(expected)

    @pytest.mark.parametrize(
        ("name", "wrong", "says"),
        [
            ("sizes", [1, "x"], "Recipe.sizes[1]: expected int, got 'x' (str)"),
            ("sizes", 3, "Recipe.sizes: expected list, got 3 (int)"),
            ("betas", [1, 2, 3], "Recipe.betas: expected 2 values, got 3: [1, 2, 3]"),
            ("betas", "0.9", "Recipe.betas: expected 2 values, got 1: ['0.9']"),
            ("extra", "a=1", "Recipe.extra: expected dict, got 'a=1' (str)"),
        ],
    )
    def test_refused(self, name: str, wrong: Any, says: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
            Recipe(**{name: wrong})

    def test_a_recipes_own_fields_and_checks(self) -> None:
        @dataclass(frozen=True)
        class Own(TrainConfig):
            mode: Literal["a", 1] = "a"

            def __post_init__(self) -> None:
                super().__post_init__()
                if self.mode == 1 and self.epochs > 1:
                    raise ValueError("one epoch only")

        assert Own(mode=1).mode == 1
        for wrong in (3, True):
            with pytest.raises(ValueError, match=rf"^Own.mode: expected a\|1, got {wrong} "):
                Own(mode=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="one epoch only"):
            Own(mode=1).replace(epochs=2)


class TestDuration:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("11h30m", 41400), ("45m", 2700), ("90s", 90), ("1d", 86400), ("1d2h3m4s", 93784), ("1.5h", 5400),
            ("20", 20), (20, 20), (0.5, 0.5), ("0.5", 0.5), (" 1 H 30 M ", 5400),
        ],
    )  # fmt: skip
    def test_seconds(self, text: Any, seconds: float) -> None:
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize("wrong", ["", "h", "5x", "1h30", "-5", "1:30", "nan", "one hour", "1..5h"])
    def test_not_a_duration(self, wrong: str) -> None:
        with pytest.raises(ValueError, match=f"^not a duration: {re.escape(repr(wrong))}. Write it like '11h30m'"):
            parse_duration(wrong)

    @pytest.mark.parametrize("wrong", ["0", "0h0m", 0])
    def test_not_above_zero(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match=f"^a duration must be above zero, got {re.escape(repr(wrong))}$"):
            parse_duration(wrong)


def notebook(*cells: str) -> dict[str, Any]:
    """The namespace of a notebook in which these cells were run, one more being the one that asks."""
    namespace: dict[str, Any] = {"In": ["", *cells, "parameters = notebook_parameters(globals())"]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


class TestNotebookParameters:
    def test_the_cell_and_what_papermill_puts_after_it(self) -> None:
        namespace = notebook(
            "import os\nother = 1",
            "# Parameters of this notebook\nlr = 1e-3\nepochs: int = 2\na, b = 1, 2\nseed = 0\nseed += 3",
            "# Parameters\nlr = '1e-4'\nepoch = 3\n",
            "later = 4",
        )
        expected = {"lr": "1e-4", "epochs": 2, "a": 1, "b": 2, "seed": 3, "epoch": 3}
        assert notebook_parameters(namespace) == expected
        with pytest.raises(TypeError, match=r"no parameter 'epoch'. Did you mean 'epochs'"):
            TrainConfig.from_dict({name: expected[name] for name in ("lr", "epochs", "epoch")})

    def test_edited_and_run_again_the_newest_counts(self) -> None:
        namespace = notebook(
            "# Parameters of this notebook\nlr = 1\nold = 2",
            "# Parameters\nlr = 2",
            "# Parameters of this notebook\nlr = 3\nnew = 4",
        )
        assert notebook_parameters(namespace) == {"lr": 3, "new": 4}

    def test_a_value_changed_later_is_the_one_that_counts(self) -> None:
        assert notebook_parameters(notebook("# Parameters of this notebook\nlr = 1", "lr = 5")) == {"lr": 5}

    def test_only_what_the_cell_assigns(self) -> None:
        namespace = notebook(
            "i = 9",
            "# Parameters of this notebook\nimport math\nfrom os import path\nsizes = [i * 2 for i in range(3)]\n"
            "double = lambda x: x\ndef helper():\n    inner = 1\nclass Thing:\n    attribute = 1\n"
            "if len(sizes) > 2:\n    deep = math.pi\nundecided: int\ngone = 1\ndel gone",
        )
        found = notebook_parameters(namespace)
        assert found.pop("double")(3) == 3
        assert found == {"sizes": [0, 2, 4], "deep": pytest.approx(3.14159, abs=1e-4)}

    def test_nothing_run(self) -> None:
        with pytest.raises(RuntimeError, match=r"^no cell that begins with '# Parameters of this notebook' was run"):
            notebook_parameters(notebook("# Parameters\nlr = 1"))
        # the asking cell itself does not count
        with pytest.raises(RuntimeError, match="was run"):
            notebook_parameters({"In": ["", "# Parameters of this notebook\nlr = 1"], "lr": 1})


def test_more_loader_processes_than_any_machine_bears_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data_workers: expected at most 256 processes per rank, got 1000"):
        TrainConfig(data_workers=1000)
