"""Models whose activations exceed fp16's range, as Gemma 3's do: trained on a CPU under fp16 autocast."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu import launch, train
from kaggle_mgpu.errors import DivergedError
from kaggle_mgpu.recipes.sft import Config, Finetune, models, overflow

SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and two models: a Gemma 3 with sums of 2e5 between its layers, a Llama with one such layer."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("home")
    rows = [f'{{"user": "What is {a} plus {b}?", "assistant": "{a + b}"}}' for a in range(9) for b in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.TINY, "vocab_size", 320)
        models.make_tiny(folder / "tokenizer", rows, seed=1)
    torch.manual_seed(0)
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, sliding_window=64))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with torch.no_grad():
        for layer in gemma.model.layers:
            layer.post_feedforward_layernorm.weight.fill_(3e4)
        for layer in (*gemma.model.layers, llama.model.layers[1]):
            layer.mlp.gate_proj.weight.mul_(1e4)
            layer.mlp.up_proj.weight.mul_(1e4)
        llama.model.layers[1].mlp.down_proj.weight.mul_(1e-6)
    for name, model in (("gemma", gemma), ("llama", llama)):
        shutil.copytree(folder / "tokenizer", folder / name)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def task(home: Path, tmp_path: Path) -> Callable[..., Finetune]:
    def make(name: str, **changes: Any) -> Finetune:
        values: dict[str, Any] = {
            "model": str(home / name), "data_path": str(home / "rows.jsonl"), "output_dir": str(tmp_path / name),
            "tuning": "lora", "precision": "fp16", "max_length": 64, "global_batch_size": 4, "max_steps": 40,
            "lr": 1e-3, "eval_every": "end", "save_every": None,
        }  # fmt: skip
        return Finetune(Config(**{**values, **changes}))

    return make


def loss_of(task: Finetune) -> float:
    """The loss of the first pack as it is in training, before the first step."""
    batch = task.train_data().batch(torch.tensor([0]))
    model = task.model().eval()
    task._cache["checked"] = True
    with torch.no_grad(), task._as_in_training(torch.device("cpu")):
        return float(task.loss(model, batch)) / task.count(batch)


def test_gemma_3_trains_in_fp16_and_computes_what_fp32_does(
    task: Callable[..., Finetune], capsys: pytest.CaptureFixture[str]
) -> None:
    exact = loss_of(task("gemma", precision="fp32"))
    assert "computed in fp32" not in capsys.readouterr().out
    assert loss_of(task("gemma")) == pytest.approx(exact, rel=1e-2)
    assert "exceed fp16's range: model.embed_tokens, model.layers.0.mlp.down_proj, " in capsys.readouterr().out
    for tuning in ("lora", "full"):
        made = task("gemma", tuning=tuning, max_steps=12, output_dir=f"{task('gemma').config.output_dir}-{tuning}")
        result = train(made.config, made)
        assert result.finished and result.skipped_steps < 8, "while the loss scale falls from 2^16"


def test_under_fsdp_gemma_3_trains_in_fp16_too(task: Callable[..., Finetune]) -> None:
    made = task("gemma", max_steps=12, strategy="fsdp", nproc=2)
    result = launch(train, made.config, made)
    assert result.strategy == "fsdp" and result.skipped_steps < 8


def test_without_it_the_run_ends_with_an_error_that_names_the_cause(
    task: Callable[..., Finetune], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "mend", lambda model, forward: [])
    made = task("gemma", packing=False)
    with pytest.raises(DivergedError, match=r"In fp16 values above 65504 are infinite: precision='fp32' shows"):
        train(made.config, made)


def test_a_trial_names_the_modules_of_a_model_that_is_not_known_to_overflow(
    task: Callable[..., Finetune], capsys: pytest.CaptureFixture[str]
) -> None:
    exact = loss_of(task("llama", precision="fp32"))
    assert loss_of(task("llama")) == pytest.approx(exact, rel=1e-2)
    said = [line for line in capsys.readouterr().out.splitlines() if "computed in fp32" in line]
    assert said == ["computed in fp32, because their numbers exceed fp16's range: model.layers.1.mlp"]


def test_4_bit_weights_that_overflow_compute_in_fp32_too(task: Callable[..., Finetune]) -> None:
    pytest.importorskip("bitsandbytes")
    assert loss_of(task("gemma", tuning="qlora")) == pytest.approx(
        loss_of(task("gemma", tuning="qlora", precision="fp32")), rel=1e-2
    )
