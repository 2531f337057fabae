"""deepspeed: ZeRO's stages are the same run as every other strategy's.

make test-deepspeed    # makes an environment of its own under build/, and keeps what DeepSpeed compiles there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everything import Config, Everything
from kaggle_mgpu import TrainConfig, checkpoint, distributed, launch, progress, train
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.parallel import choose_strategy
from kaggle_mgpu.parallel.zero import ZeRO, require, settings
from tasks import Language, TiedLanguage
from test_invariance import by_hand
from test_invariance import config as sgd
from test_resume import SPLITTABLE, chaos, config, several

STAGES: dict[str, Any] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "offload2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offload3": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
real = pytest.mark.deepspeed


def weights(folder: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_tensors(folder / "model.safetensors").items())])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Without DeepSpeed
def write(folder: Path, content: Any) -> str:
    path = folder / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_file_is_deepspeeds_and_the_rest_is_the_kits(tmp_path: Path) -> None:
    file = write(tmp_path, {"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": "auto"})
    found = settings(file, precision="bf16", max_norm=None)
    assert found["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert (found["gradient_clipping"], found["bf16"]["enabled"], found["fp16"]["enabled"]) == (0.0, True, False)
    assert settings(None, precision="fp32", max_norm=0.5)["gradient_clipping"] == 0.5
    assert settings(None, precision="fp32", max_norm=0.5)["zero_optimization"] == {"stage": 2}


def test_auto_is_the_runs_setting_at_every_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers' integration takes it: the file is the zero3 example of its documentation, with a comment."""
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    content: dict[str, Any] = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "cpu_offload": True, "reduce_bucket_size": "auto"},
        **dict.fromkeys(["gradient_accumulation_steps", "gradient_clipping", "train_batch_size"], "auto"),
    }
    text = json.dumps(content, indent=1).replace('"stage": 3,', '"stage": 3,   // more aggressive')
    found = settings(write(tmp_path, text), precision="fp16", max_norm=0.5)
    assert found["zero_optimization"] == {"stage": 3, "cpu_offload": True}
    assert (found["fp16"]["enabled"], found["bf16"], found["gradient_clipping"]) == (True, {"enabled": False}, 0.5)
    assert not {"optimizer", "scheduler", "train_batch_size"} & found.keys()
    said = capsys.readouterr().out
    assert "replace optimizer.type, scheduler.type, fp16.loss_scale, fp16.initial_scale_power, fp16.hysteresis" in said
    same = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    assert settings(write(tmp_path, same), precision="bf16", max_norm=1.0)["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a mapping, got list"),
        (
            {"optimizer": {"type": "Adam"}, "fp16": {"enabled": True}},
            r"sets fp16.enabled=True \(the run: False\), which the run's own settings",
        ),
        (
            {"optimizer": {"params": {"lr": 0.1}}, "train_batch_size": 8},
            "sets train_batch_size=8, optimizer.params.lr=0.1",
        ),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0: expected 1, 2 or 3"),
        ({}, "zero_optimization.stage is 0: expected 1, 2 or 3"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(write(tmp_path, content), precision="fp32", max_norm=1.0)


def test_a_missing_file_package_or_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"^deepspeed_config: no such file: .*/none.json$"):
        settings(str(tmp_path / "none.json"), precision="fp32", max_norm=1.0)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    with pytest.raises(
        ImportError, match=r"needs the package `deepspeed`, which is not installed: pip install deepspee"
    ):
        require(torch.device("cpu"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"on CPUs needs a C\+\+ compiler"):
        require(torch.device("cpu"))


def test_it_can_be_chosen_where_deepspeed_is_not_installed() -> None:
    assert choose_strategy("deepspeed", num_gpus=0, num_replicas=2, world_size=2) == (ZeRO, "asked for")


# With it
def all_of(jobs: list[tuple[TrainConfig, Any]]) -> None:
    for each, task in jobs:
        train(each, task)


@real
@pytest.mark.parametrize("stage", STAGES)
def test_weights_equal_one_process_with_the_whole_batch(tmp_path: Path, stage: str) -> None:
    file = write(tmp_path, {"zero_optimization": STAGES[stage]})
    jobs = [
        (sgd(tmp_path / str(a), strategy="deepspeed", gradient_accumulation_steps=a, deepspeed_config=file), Language())
        for a in (1, 2, 3)
    ]
    launch(all_of, jobs, nproc=2)
    for accumulation in (1, 2, 3):
        error = relative(weights(tmp_path / str(accumulation)), by_hand())
        print(f"{stage:<9} accumulation {accumulation}  {error:.1e}")
        assert error < 1e-6


@real
@pytest.mark.parametrize("stage", STAGES)
def test_clipped_adamw_is_singles_and_a_resume_is_exact(tmp_path: Path, stage: str) -> None:
    file = write(tmp_path, {"zero_optimization": STAGES[stage]})

    def language(name: str, **changes: Any) -> TrainConfig:
        return TrainConfig(
            output_dir=str(tmp_path / name), global_batch_size=12, gradient_accumulation_steps=2, max_steps=12, lr=0.01,
            schedule="constant", eval_every=5, save_every=4, log_every=1, data_workers=0, max_norm=0.1,
        ).replace(**changes)  # fmt: skip

    ours = {"strategy": "deepspeed", "deepspeed_config": file}
    train(language("single"), TiedLanguage())
    launch(
        all_of,
        [
            (language("whole", **ours), TiedLanguage()),
            (language("parts", max_steps=8, **ours), TiedLanguage(val_samples=1)),
        ],
        nproc=2,
    )
    launch(train, language("parts", **ours), TiedLanguage(), nproc=2)
    error = relative(weights(tmp_path / "whole"), weights(tmp_path / "single"))
    print(f"{stage:<9} AdamW, clipped  {error:.1e}")
    assert error < 1e-4
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    found = [checkpoint.load(tmp_path / name / "checkpoints" / "step-00000012") for name in ("whole", "single")]
    assert list(found[0].tensors["model"]) == list(found[1].tensors["model"])
    for name, values in found[1].state["optimizer"]["state"].items():
        for key, value in values.items():
            assert relative(found[0].state["optimizer"]["state"][name][key], value) < 1e-3, (name, key)


class Bad(Language):
    """An infinite loss in the second step, on the last rank alone."""

    name = "Language"
    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += model.training
        last = distributed.rank() == distributed.world_size() - 1
        return super().loss(model, batch) * (float("inf") if model.training and self.calls == 2 and last else 1)


@real
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_infinities_are_left_out_and_bf16_is_near(tmp_path: Path, stage: str) -> None:
    file = write(tmp_path, {"zero_optimization": STAGES[stage]})
    ours = {"strategy": "deepspeed", "deepspeed_config": file}
    train(sgd(tmp_path / "single"), Bad())
    half = sgd(tmp_path / "half", precision="bf16", max_steps=4, lr=0.1)
    train(half, Language())
    jobs = [
        (sgd(tmp_path / "skips", **ours), Bad()),
        (half.replace(output_dir=str(tmp_path / "bf16"), **ours), Language()),
    ]
    launch(all_of, jobs, nproc=2)
    assert json.loads((tmp_path / "skips" / "result.json").read_text())["skipped_steps"] == 1
    assert relative(weights(tmp_path / "skips"), weights(tmp_path / "single")) < 1e-6
    found, expected = (read_tensors(tmp_path / name / "model.safetensors") for name in ("bf16", "half"))
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32, "as the optimizer has them"
        assert relative(found[name], tensor) < 5e-2, name


@real
def test_a_checkpoint_moves_in_every_direction(tmp_path: Path) -> None:
    steady = {"schedule": "constant", "warmup_steps": 0, **SPLITTABLE}
    file = write(tmp_path, {"zero_optimization": {"stage": 3}})

    def settings(name: str, kind: str, steps: int) -> Config:
        nproc = 1 if kind == "single" else 2
        return config(tmp_path / name, strategy=kind, nproc=nproc, max_steps=steps, deepspeed_config=file, **steady)

    several([(settings("whole", "single", 18), False)])
    way = ["single", "deepspeed", "single", "deepspeed", "fsdp", "deepspeed"]
    for step, kind in enumerate(way, 1):
        jobs = [(settings("moved", kind, 3 * step), False)]
        several(jobs) if kind == "single" else launch(several, jobs, nproc=2)
    starts = [(r["strategy"], r["step"]) for r in progress.read(tmp_path / "moved") if r["kind"] == "start"]
    assert starts == [(kind, 3 * index) for index, kind in enumerate(way)]
    assert relative(weights(tmp_path / "moved"), weights(tmp_path / "whole")) < 1e-4


@real
def test_broken_off_it_is_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    def settings(name: str, **changes: Any) -> Config:
        return config(tmp_path / name, strategy="deepspeed", nproc=2, width=64, **changes)

    launch(train, settings("whole"), Everything(settings("whole")))
    launch(several, [(settings("broken", fails_at=21), True)], nproc=2)
    launch(train, settings("broken"), Everything(settings("broken")))
    assert chaos.differences(tmp_path / "whole", tmp_path / "broken") == []
