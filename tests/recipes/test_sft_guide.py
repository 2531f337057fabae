"""The fine-tuning guide's own names for settings: nested YAML and make variables, translated, said, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kaggle_mgpu import train
from kaggle_mgpu.__main__ import main
from kaggle_mgpu.recipes.sft import Config, Finetune, models

GUIDE = """
model:
  name: "google/gemma-3-27b-it"
  max_seq_len: 2048
tuning:
  mode: "qlora"
  backend: "bnb"
  lora:
    r: 32
    alpha: 64
    dropout: 0.1
train:
  batch_size: "auto"
  grad_accum: "auto"
  bf16: true
  gradient_checkpointing: true
  ddp_find_unused_parameters: false
  ddp_broadcast_buffers: false
  ddp_bucket_cap_mb: 200
  dataloader_num_workers: 4
  dataloader_pin_memory: true
  predict_with_generate: true
  generation_num_beams: 1
  generation_max_new_tokens: 64
  eval_strategy: "steps"
  eval_steps: 200
  eval_do_concat_batches: false
"""


def test_the_guides_yaml_is_read_and_each_mapping_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(GUIDE)
    config = Config.load(tmp_path / "a.yaml")
    assert config == Config(
        model="google/gemma-3-27b-it", max_length=2048, tuning="qlora", backend="bnb", lora_rank=32, lora_alpha=64,
        lora_dropout=0.1, micro_batch_size="auto", gradient_checkpointing=True, bucket_mb=200, data_workers=4,
        eval_generate_samples=16, eval_every=200,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "tuning.lora.r=32: lora_rank=32" in said
    assert "train.grad_accum='auto': nothing to set" in said
    assert "train.dataloader_pin_memory: no effect here, batches for a GPU are pinned" in said


def test_an_unknown_name_in_the_guides_yaml_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  batchsize: 3\n")
    with pytest.raises(TypeError, match=r"train.batchsize.*train.batch_size"):
        Config.load(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("train:\n  eval_strategy: sometimes\n")
    with pytest.raises(ValueError, match=r"train.eval_strategy: expected .*, got 'sometimes'"):
        Config.load(tmp_path / "a.yaml")


@pytest.mark.parametrize("steps_first", [False, True])
@pytest.mark.parametrize(("strategy", "every"), [("steps", 200), ("epoch", "epoch"), ("no", "end"), ('"no"', "end")])
def test_eval_steps_count_where_the_strategy_is_steps(
    tmp_path: Path, strategy: str, every: int | str, steps_first: bool
) -> None:
    lines = [f"  eval_strategy: {strategy}", "  eval_steps: 200"]
    (tmp_path / "a.yaml").write_text("\n".join(["train:", *(reversed(lines) if steps_first else lines)]))
    assert Config.load(tmp_path / "a.yaml").eval_every == every
    given = {"TRAIN_EVAL_STRATEGY": strategy, "TRAIN_EVAL_STEPS": "200"}
    assert Config.variables(given, {}).get("eval_every") == every


def test_make_variables_set_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"TRAIN_BATCH_SIZE": "1", "TRAIN_GRAD_ACCUM": "32", "NUM_GPUS": "1", "MODEL_MAX_SEQ_LEN": "64"}
    given["TRAIN_LEARNING_RATE"] = "1e-4"
    config = Config.from_dict(Config.variables(given, Config().to_dict()))
    assert (config.micro_batch_size, config.gradient_accumulation_steps, config.global_batch_size) == (1, 32, None)
    assert (config.nproc, config.max_length, config.lr) == (1, 64, 1e-4)
    assert "train.batch_size=1: micro_batch_size=1" in capsys.readouterr().out


def test_a_make_variable_that_the_guide_does_not_have_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft", "--variable", "TRAIN_BATCHSIZE=1"]) == 2
    assert "TRAIN_BATCH_SIZE" in capsys.readouterr().err
    assert main(["train", "text_generation", "--variable", "TRAIN_BATCH_SIZE=1"]) == 2
    assert "RECIPE=text_generation does not have" in capsys.readouterr().err


def test_of_a_model_that_also_sees_only_the_language_model_gets_adapters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rows = [f'{{"user": "Say {word}.", "assistant": "{word}, and {word} again."}}' for word in ("one", "two", "three")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    models.make_tiny(tmp_path / "gemma", rows, seed=1)  # for its tokenizer
    vocab_size = json.loads((tmp_path / "gemma" / "config.json").read_text())["vocab_size"]
    text = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    about = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(about).save_pretrained(tmp_path / "gemma")
    settings = Config(
        model=str(tmp_path / "gemma"), data_path=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"),
        tuning="lora", packing=False, val_fraction=0, max_length=64, global_batch_size=2, max_steps=2, warmup_steps=0,
    )  # fmt: skip
    trained = train(settings, Finetune(settings)).load(Finetune(settings).model())
    moved = [name for name, p in trained.named_parameters() if "lora_B" in name and p.any()]
    assert len(moved) == 2 * 7, "seven layers in each of two blocks"
    assert all("language_model" in name for name in moved)
