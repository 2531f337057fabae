"""Fine-tuning for real: LoRA, QLoRA and full of a tiny model, in one process and two, killed, merged, in plain peft."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import TrainConfig, distributed, launch, train
from kaggle_mgpu import __main__ as command_line
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.data import Batches, BatchPlan, Fetch, Sampler
from kaggle_mgpu.errors import CheckpointError, WorkerDiedError
from kaggle_mgpu.parallel import shards
from kaggle_mgpu.recipes.sft import Config, Finetune, data, generation, models, output
from kaggle_mgpu.training import Result, build_parts

MODES = ("lora", "qlora", "full")
KINDS = ("ddp", "fsdp")
Job = tuple[Config, bool]


class Plain(Finetune):
    """With SGD, which shows a gradient of the wrong scale: Adam hides it. May be killed in mid-run."""

    kill_at = 0

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr, momentum=0.9)


class Killed(Finetune):
    """Killed as its fourth step begins. Rank 0, which writes: it began the third checkpoint, so the second is whole."""

    calls = 0

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.calls += model.training
        if self.calls == 4 and distributed.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


@pytest.fixture(scope="module", autouse=True)
def _no_inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path_factory.mktemp("kaggle")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two small layers, and a file of conversations."""
    folder = tmp_path_factory.mktemp("home")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(40):
        a, b, length = torch.randint(0, 50, (3,), generator=draw).tolist()
        rows.append(
            f'{{"user": "What is {a} plus {b}? Count to {length % 9}.", '
            f'"assistant": "{a + b}: {" ".join(map(str, range(length % 9)))} and so on, {number}"}}'
        )
    (folder / "rows.jsonl").write_text("\n".join(rows))
    tiny = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny.items():
            patch.setitem(models.TINY, name, value)
        models.make_tiny(folder / "base", rows, seed=1)
    return folder


def config(home: Path, name: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": str(home / "base"), "data_path": str(home / "rows.jsonl"), "output_dir": str(home / name),
        "val_fraction": 0.2, "max_length": 96, "global_batch_size": 4, "max_steps": 4, "lr": 0.05, "lora_rank": 4,
        "warmup_steps": 0, "schedule": "constant", "max_norm": None, "log_every": 1, "eval_every": 2, "save_every": 1,
        "eval_generate_samples": 5, "eval_generate_batch_size": 2, "max_new_tokens": 6,
    }  # fmt: skip
    return Config(**{**values, **changes})


def several(jobs: list[tuple[Config, type[Finetune]]]) -> list[Any]:
    """Train one after the other in the same processes: the libraries are imported once."""
    return [train(settings, kind(settings)) for settings, kind in jobs]


@pytest.fixture(scope="module")
def single(home: Path) -> dict[str, tuple[Finetune, Result]]:
    """Each mode in one process, with SGD; and LoRA with AdamW, undisturbed."""
    found: dict[str, tuple[Finetune, Result]] = {}
    for mode in MODES:
        task = Plain(config(home, f"one-{mode}", tuning=mode))
        found[mode] = task, train(task.config, task)
    return found


@pytest.fixture(scope="module")
def double(home: Path) -> dict[str, Result]:
    """The same in two processes, and what a killed run is compared with."""
    jobs: list[tuple[Config, type[Finetune]]] = [
        (config(home, f"{kind}-{mode}", tuning=mode, strategy=kind, nproc=2), Plain) for kind in KINDS for mode in MODES
    ]
    undisturbed = config(home, "undisturbed", lr=1e-3, lora_dropout=0.1, strategy="ddp", nproc=2)
    results = launch(several, [*jobs, (undisturbed, Finetune)], nproc=2)[0]
    names = [f"{kind}-{mode}" for kind in KINDS for mode in MODES]
    return dict(zip([*names, "undisturbed"], results, strict=True))


def weights(result: Result, name: str = "model.safetensors") -> dict[str, Tensor]:
    return read_tensors(Path(result.output_dir) / name)


# Training
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_weights_of_one(
    single: dict[str, tuple[Finetune, Result]], double: dict[str, Result], mode: str, kind: str
) -> None:
    task, one = single[mode]
    two = double[f"{kind}-{mode}"]
    assert two.world_size == 2
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    torch.manual_seed(task.config.seed)
    before = task.model().state_dict()
    moved = {name: float((a[name] - before[name]).abs().max()) for name in a}
    assert max(moved.values()) > 1e-3, "SGD moved the weights"
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert one.metrics == pytest.approx(two.metrics, rel=1e-5)
    assert 0 <= one.metrics["rouge_l"] <= 1


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_only_adapters_are_trained_and_saved(single: dict[str, tuple[Finetune, Result]], mode: str) -> None:
    task, result = single[mode]
    model = task.model()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert len(trainable) == 2 * 2 * len(layers), "two layers, A and B for each linear layer in them"
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    checkpoint = next((Path(result.output_dir) / "checkpoints").glob("step-00000004"))
    for file in ("checkpoints/step-00000004/model.safetensors", "model.safetensors", "best/model.safetensors"):
        assert weights(result, file).keys() == trainable.keys()
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 8 * 4 * sum(
        p.numel() for p in trainable.values()
    )
    frozen = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert (frozen.dtype == torch.uint8) == (mode == "qlora"), "4-bit weights by bitsandbytes, two in a byte"
    number = task.plan()[0].parameters + sum(p.numel() for p in trainable.values())
    assert f"; {number:,} parameters;" in build_parts(task.config, task).header[1], "unpacked"
    after = task.load(result)
    for name, parameter in after.named_parameters():
        if name not in trainable:
            assert torch.equal(parameter, model.get_parameter(name))


def test_killed_by_a_signal_it_is_the_same_run_bit_for_bit(home: Path, double: dict[str, Result]) -> None:
    killed = config(home, "killed", lr=1e-3, lora_dropout=0.1, strategy="ddp", nproc=2)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        launch(train, killed, Killed(killed))
    assert (home / "killed" / "checkpoints" / "step-00000002").is_dir()
    assert not (home / "killed" / "model.safetensors").exists()
    resumed = launch(train, killed, Finetune(killed))
    assert resumed.finished
    for name in ("model.safetensors", "best/model.safetensors", "checkpoints/step-00000004/optimizer.safetensors"):
        then, now = weights(double["undisturbed"], name), weights(resumed, name)
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then), name
    assert double["undisturbed"].metrics == resumed.metrics


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tuning": "full"}, "backend was 'hf lora', is 'hf full'"),
        ({"tuning": "qlora"}, "backend was 'hf lora', is 'bnb qlora'"),
        ({"lora_rank": 2}, "lora_rank was 4, is 2"),
        ({"packing": False}, "packing was True, is False"),
    ],
)
def test_another_mode_is_another_run(
    home: Path, single: dict[str, tuple[Finetune, Result]], changes: dict[str, Any], says: str
) -> None:
    settings = config(home, "one-lora", **{"tuning": "lora", **changes})
    with pytest.raises(CheckpointError, match=says):
        train(settings, Plain(settings))


def test_fp16_with_fp32_adapters_and_the_largest_micro_batch_that_fits(home: Path) -> None:
    changes = {"precision": "fp16", "micro_batch_size": "auto", "max_steps": 3, "lr": 1e-2, "eval_generate_samples": 0}
    settings = config(home, "fp16", **changes)
    task = Finetune(settings)
    result = train(settings, task)
    model = task.model()
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    moved = [tensor.abs().max() > 0 for name, tensor in weights(result).items() if "lora_B" in name]
    assert all(moved)
    assert result.metrics["loss"] < 6


def test_replicas_in_one_process_give_the_weights_of_one(
    home: Path, single: dict[str, tuple[Finetune, Result]]
) -> None:
    settings = config(home, "replicas", tuning="lora", strategy="dp", nproc=2, eval_every="end")
    replicated = train(settings, Plain(settings))
    assert replicated.strategy == "dp"
    assert replicated.metrics.keys() == {"loss", "perplexity"}
    ours, theirs = weights(replicated), weights(single["lora"][1])
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_command_trains_and_leaves_an_adapter(home: Path, capsys: Any) -> None:
    settings = config(home, "command", max_steps=1, max_length=36, eval_every="end")
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.diff(Config()).items() for value in value[:1]
    ]
    assert command_line.main(["train", "sft", *flags]) == 0
    said = capsys.readouterr().out
    assert "parameters, 8,192 of them trained (hf lora: LoRA rank 4 on q_proj, k_proj, v_proj, o_proj" in said
    assert "user/assistant: 32 examples of" in said
    assert "cut at 36 tokens" in said
    assert "ROUGE-L on 5 of them" in said
    assert "GiB" in said or "MiB = weights" in said
    assert "peak memory of rank 0:" in said
    names = sorted(path.name for path in (home / "command" / "adapter").iterdir())
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)


# The loss
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_loss_of_a_pack_is_the_sum_of_its_examples_losses(home: Path, mode: str) -> None:
    task = Finetune(config(home, "loss", tuning=mode))
    torch.manual_seed(0)
    model = task.model().eval()
    packs, examples = task.train_data(), task.examples("train")
    assert max(map(len, packs.packs)) > 1
    with torch.no_grad():
        for index in range(3):
            by_hand = 0.0
            for number in packs.packs[index]:
                ids, learnt = (torch.from_numpy(array.copy()) for array in examples[number])
                logits = model(input_ids=ids[None].long()).logits[0, :-1]
                losses = nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
                by_hand += float(losses[learnt[1:]].sum())
            assert float(task.loss(model, packs[index])) == pytest.approx(by_hand, rel=1e-5)


def test_logits_of_packed_examples_are_those_of_each_by_itself(home: Path) -> None:
    task = Finetune(config(home, "loss", tuning="full"))
    model = task.model().eval()
    examples = [task.examples("train")[i] for i in (0, 1, 2)]
    row = {name: torch.from_numpy(values)[None].long() for name, values in data.row_of(examples).items()}
    row.pop("at")
    with torch.no_grad():
        packed = task.logits(model, row)[0]
        alone = torch.cat([model(input_ids=torch.from_numpy(ids.copy())[None].long()).logits[0] for ids, _ in examples])
        blind = model(input_ids=row["ids"]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, blind, atol=1e-3), "without the mask it is another thing"


def test_a_model_that_cannot_keep_packs_apart_is_found_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = models.require("transformers")
    task = Finetune(config(home, "loss", tuning="full"))
    settings = transformers.MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4)
    recurrent = transformers.MambaForCausalLM(settings)
    recurrent.selects_positions = models.select_positions(recurrent)
    batch = task.train_data()[0]
    with pytest.raises(ValueError, match=r"MambaForCausalLM does not keep packed .* apart: the model accepts no block"):
        task.loss(recurrent, batch)
    with monkeypatch.context() as patch:  # a mask that is ignored
        patch.setattr(data, "block_mask", lambda s: torch.ones(1, 1, s.shape[1], s.shape[1], dtype=torch.bool).tril())
        task = Finetune(config(home, "loss", tuning="full"))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .* logits differ by .* Set packing=False\.$"):
            task.loss(task.model(), batch)
    apart = Finetune(config(home, "loss", tuning="full", packing=False))
    assert torch.isfinite(apart.loss(recurrent, apart.train_data().batch(torch.arange(2))))


def test_packs_are_checked_in_an_evaluation_whatever_the_batch_holds(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # under fsdp the check is something that all ranks do together
    task = Finetune(config(home, "prompts", tuning="full"))
    held, checked = task.val_data(), []
    assert held is not None
    monkeypatch.setattr(task, "check_packing", lambda *_: checked.append(1))
    monkeypatch.setattr(task, "_answers", lambda *_: [])
    prompts = held.batch(torch.tensor([next(iter(held.prompt_batch_at))]))
    assert not len(prompts["ids"])
    for _ in range(2):
        task.metrics(task.model(), prompts)
    assert checked == [1]


def test_without_packing_samples_of_about_a_length_share_a_micro_batch(home: Path) -> None:
    settings = config(home, "loss", packing=False, global_batch_size=16, micro_batch_size=4)
    packs = Finetune(settings).train_data()
    assert (
        packs.sample_lengths == packs.examples.lengths
        and Finetune(config(home, "loss")).train_data().sample_lengths is None
    )
    plan = BatchPlan.make(dataset_size=len(packs), global_batch_size=16, micro_batch_size=4)
    padded = {}
    for grouped in (True, False):
        packs.sample_lengths = packs.examples.lengths if grouped else None
        steps = Batches(Sampler(plan, seed=1), Fetch(packs))
        batches = [batch for _ in range(plan.steps_per_epoch) for batch in next(steps).micro_batches]
        assert sum(int((batch["segments"] > 0).sum()) for batch in batches) == sum(packs.examples.lengths)
        padded[grouped] = sum(int((batch["segments"] == 0).sum()) for batch in batches)
    assert padded[True] < 0.7 * padded[False], padded


def test_padding_does_not_matter_without_packing(home: Path) -> None:
    task = Finetune(config(home, "padded", tuning="full", packing=False))
    model, samples = task.model().eval(), task.train_data()
    with torch.no_grad():
        together = task.loss(model, samples.batch(torch.arange(6)))
        apart = sum(task.loss(model, samples[i]) for i in range(6))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_checkpointed_activations_give_the_same_gradient(home: Path, mode: str) -> None:
    task = Finetune(config(home, "loss", tuning=mode))
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = task.model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            loss = task.loss(model, task.train_data()[0])
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name])


def test_an_evaluation_does_not_change_the_gradient_of_4_bit_weights(home: Path) -> None:
    # on CPUs with a bf16 kernel for it, bitsandbytes would pack the weights for good, and pass no gradient on
    task = Finetune(config(home, "loss", tuning="qlora"))
    torch.manual_seed(0)
    model, batch = task.model().train(), task.train_data()[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    task._cache["checked"] = True  # the check of packs is an evaluation itself
    gradients = []
    for _ in range(2):
        task.loss(model, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            task.loss(model.eval(), batch)
        model.train()
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


# What a run leaves
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_plain_peft_loads_the_adapter_with_equal_logits(single: dict[str, tuple[Finetune, Result]], mode: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    task, result = single[mode]
    folder = task.export(result, "final")
    options: dict[str, Any] = {"dtype": torch.float32}
    if mode == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(task.prepared.model, **options)
    for module in base.modules():  # else bitsandbytes answers by a bf16 kernel on CPUs that have one
        module.support_avx512bf16_for_cpu = False
    ids = torch.tensor([AutoTokenizer.from_pretrained(str(folder))("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        untuned = base.eval()(input_ids=ids).logits
        plain = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
        ours = task.load(result, "final")(input_ids=ids).logits
    assert torch.equal(plain, ours)
    assert float((plain - untuned).abs().max()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_merged_into_one_model_it_gives_the_adapters_logits(
    single: dict[str, tuple[Finetune, Result]], tmp_path: Path, mode: str, dtype: str, tolerance: float, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task, result = single[mode]
    task.export(result, "final")
    arguments = ["merge", result.output_dir, "--dtype", dtype, "--to", str(tmp_path / "merged")]
    assert command_line.main(arguments) == 0
    assert f"one model in {dtype}; the merge changed its logits by at most" in capsys.readouterr().out
    ids = torch.tensor([AutoTokenizer.from_pretrained(str(tmp_path / "merged"))("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
        assert {p.dtype for p in merged.parameters()} == {models.DTYPES[dtype]}
        ours = task.load(result, "final")(input_ids=ids).logits
        logits = merged.eval()(input_ids=ids).logits.float()
    assert float((logits - ours).abs().max() / ours.abs().max()) < tolerance
    assert (tmp_path / "merged" / "README.md").is_file()


def test_merge_says_what_is_wrong(single: dict[str, tuple[Finetune, Result]], tmp_path: Path, capsys: Any) -> None:
    assert command_line.main(["merge", str(tmp_path), "--to", str(tmp_path / "x")]) == 1
    assert "holds no exported run: expected export.json, which training writes at its end" in capsys.readouterr().err
    task, result = single["lora"]
    task.export(result)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert command_line.main(["merge", result.output_dir, "--to", str(tmp_path / "full")]) == 1
    assert "the folder is not empty; give another folder, or empty this one" in capsys.readouterr().err


def test_the_card_holds_what_was_measured(single: dict[str, tuple[Finetune, Result]]) -> None:
    task, result = single["lora"]
    card = (task.export(result) / "README.md").read_text()
    assert f"base_model: {task.prepared.model}" in card
    assert f"| held-out loss, last evaluation | {result.metrics['loss']:.4f} |" in card
    assert f"| held-out rouge_l, last evaluation | {result.metrics['rouge_l']:.4f} |" in card
    assert "| steps | 4 of 4 (finished) |" in card
    assert "PeftModel.from_pretrained" in card
    assert output.measured(result)["peak memory, rank 0"].endswith("iB")
    assert all("peak_memory_mib" in record for record in result.records() if record["kind"] == "train")


# Generation
def test_a_batch_padded_on_the_left_is_answered_as_each_question_by_itself(home: Path) -> None:
    task = Finetune(config(home, "loss", tuning="full"))
    torch.manual_seed(3)
    model, val = task.model().eval(), task.examples("val")
    for parameter in model.parameters():  # far from uniform, so that the likeliest token is one by a margin
        parameter.data.mul_(4)
    prompts = [val.prompt(i) for i in range(4)]
    assert len({len(prompt) for prompt in prompts}) > 1
    stop = generation.stops(task.tokenizer, model, [val[i][0].tolist() for i in range(4)])
    assert task.tokenizer.convert_tokens_to_ids("<|im_end|>") in stop
    texts = generation.answer(model, task.tokenizer, prompts, max_new_tokens=8, stop=stop)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):  # without any cache
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in stop:
                    ids.pop()
                    break
        assert text == task.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert len(set(texts)) > 1
    beams = generation.answer(model, task.tokenizer, prompts, max_new_tokens=8, stop=stop, num_beams=4)
    assert beams != texts, "four beams find likelier answers than the likeliest token each time"


def test_answers_are_remembered_while_nothing_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Finetune(config(home, "remembered"))
    model, calls = task.model(), []
    real = generation.answer

    def counted(*arguments: Any, **options: Any) -> list[str]:
        calls.append(len(arguments[2]))
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "answer", counted)
    first = task.evaluate(model)
    assert calls == [2, 2, 1], "five questions, two at a time"
    assert task.evaluate(model) == first
    assert [text for _, _, text in task.answers(model)] == [text for _, _, text in task.answers(model)]
    assert len(calls) == 3
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[3] += 1e-6
    task.evaluate(model)
    assert len(calls) == 6, "other weights, other answers"


def test_where_nothing_can_be_generated_the_loss_remains(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    task = Finetune(config(home, "silent"))
    model = task.model()
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
    found = task.evaluate(model)
    assert found.keys() == {"loss", "perplexity"}
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item())
    said = "no answers can be generated (ZeroDivisionError: division by zero): evaluating by loss and perplexity"
    assert capsys.readouterr().out.count(said) == 1
    replicated = Finetune(config(home, "silent", strategy="dp"))
    assert "no answers can be generated (under strategy 'dp'" in replicated.describe()
    held = replicated.val_data()
    assert held is not None
    assert "generate" not in held[0]


# Choices
def test_layers_by_architecture() -> None:
    transformers = models.require("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2))
        experts = transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(**small, num_experts=2, moe_intermediate_size=8, decoder_sparse_step=1)
        )
    assert models.targets(gpt2, "auto") == ["c_attn", "c_proj", "c_fc"]
    found = models.targets(experts, "auto")
    assert {"q_proj", "v_proj", "down_proj"} <= set(found)
    assert not {"gate", "shared_expert_gate", "lm_head"} & set(found)
    assert models.targets(gpt2, "c_fc, c_attn") == ["c_fc", "c_attn"]
    with pytest.raises(ValueError, match=r"no linear layer named q_proj. It has c_attn, c_proj, c_fc\.$"):
        models.targets(gpt2, "q_proj")
    with pytest.raises(ValueError, match=r"lora_targets=' , ' names no layer\. Give auto, or some of c_attn, c_proj"):
        models.targets(gpt2, " , ")


@pytest.mark.parametrize(("mode", "checkpointing"), [("lora", False), ("lora", True), ("full", False)])
def test_the_estimate_is_what_is_kept(home: Path, mode: str, checkpointing: bool) -> None:
    task = Finetune(config(home, "loss", tuning=mode, gradient_checkpointing=checkpointing, global_batch_size=2))
    memory, _ = task.plan()
    model = task.model().train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.trainable == sum(p.numel() for p in trainable)
    assert (memory.gradients, memory.optimizer) == (4 * memory.trainable, 8 * memory.trainable)
    if checkpointing:
        model.gradient_checkpointing_enable()
    packs = task.train_data()
    batch = packs.batch(torch.arange(2))
    task.loss(model, batch)  # the check of packs comes with the first
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
        task.loss(model, batch)
    counted = sum(kept.values())
    if not checkpointing:  # with it, a layer's own come when it is computed again
        assert memory.activations == pytest.approx(counted, rel=0.35)
    else:
        assert counted < memory.activations


def test_packages_that_are_not_there_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"the recipe sft needs the package `unsloth`, which is not installed: pip install unsloth\. On Kaggle: with"
    with pytest.raises(ImportError, match=said):
        assert Finetune(config(home, "un", tuning="lora", backend="unsloth")).prepared
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"`bitsandbytes`.* pip install bitsandbytes \(or kaggle_mgpu\[qlora\]\)"):
        assert Finetune(config(home, "un", tuning="qlora")).prepared


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tuning": "qlora", "backend": "hf"}, "backend='hf' cannot do tuning='qlora': hf does full and lora, bnb"),
        ({"tuning": "lora", "backend": "bnb"}, "backend='bnb' cannot do tuning='lora'"),
        ({"lora_rank": 0}, "Config.lora_rank: expected 1 or more, got 0"),
        ({"val_fraction": 0.9}, "expected 0 <= val_fraction <= 0.5"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config(**values)


def test_modes_follow_from_what_is_given() -> None:
    assert [(c.mode, c.library) for c in (Config(), Config(model="x"), Config(model="x", tuning="qlora"))] == [
        ("full", "hf"), ("lora", "hf"), ("bnb", "qlora")[::-1]
    ]  # fmt: skip


def test_models_are_found(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path))
    folder = tmp_path / "input" / "models" / "qwen" / "qwen2" / "transformers" / "0.5b" / "1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert models.find(str(home / "base")) == str((home / "base").resolve())
    assert models.find(str(tmp_path)) == str(folder.resolve()), "the one folder below"
    assert models.find("0.5b") == str(folder)
    assert models.find("qwen/some-model") == "qwen/some-model"
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected one folder with a config\.json, got none"):
        models.find(str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="no such folder: /nowhere"):
        models.find("/nowhere")


def test_where_nobody_answers_the_hub_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def refuse(*_: Any, **options: Any) -> Any:
        calls.append(options)
        raise OSError("no such repository")

    monkeypatch.setattr(models.require("transformers").AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    monkeypatch.setattr(models.hub_is_reachable, "__defaults__", (60.0,))  # on a busy machine too
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(FileNotFoundError, match=r"'a/b' is not a folder here .* \(OSError: no such repository\)"):
            models.tokenizer("a/b")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen; nobody else can on its port
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            FileNotFoundError, match=r"no connection to http://127.*, and the model is not in the local cache\)"
        ):
            models.tokenizer("a/b")
    monkeypatch.setattr(models.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    with pytest.raises(FileNotFoundError, match="no such repository"):
        models.tokenizer("a/b")
    assert [options["local_files_only"] for options in calls] == [False, True, False]


def test_a_folder_that_is_no_model_that_can_be_tuned_is_named(home: Path, tmp_path: Path) -> None:
    def spoilt(name: str, file: str, content: bytes | None) -> str:
        folder = shutil.copytree(home / "base", tmp_path / name)
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        return str(folder)

    whole = (home / "base" / "model.safetensors").read_bytes()
    for name, file, content, says in (
        ("half", "model.safetensors", whole[: len(whole) // 2], "half cannot be loaded by transformers: Safetensor"),
        ("without", "model.safetensors", None, "without cannot be loaded by transformers: OSError: Error no file"),
        ("words", "tokenizer.json", None, "words cannot be loaded by transformers: "),
        ("torn", "config.json", b"{", "torn cannot be loaded by transformers: .* not a valid JSON"),
        ("t5", "config.json", b'{"model_type": "t5"}', "t5 is not a causal language model: Unrecognized configuration"),
    ):
        task = Finetune(config(home, name, model=spoilt(name, file, content)))
        with pytest.raises(ValueError, match=f"model: .*{says}"):
            print(task.describe(), task.model())


def test_what_is_longer_than_the_model_bears_is_refused_and_answers_end_there(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "base", tmp_path / "short")
    about = json.loads((folder / "config.json").read_text())
    longest = max(Finetune(config(home, "loss")).examples("train").lengths)
    limit = longest - 1
    (folder / "config.json").write_text(json.dumps({**about, "max_position_embeddings": limit}))
    says = rf"max_length=96: the longest conversation has {longest} tokens, but .*short has {limit} positions: give"
    with pytest.raises(ValueError, match=says):
        Finetune(config(home, "short", model=str(folder))).describe()
    task = Finetune(config(home, "short", model=str(folder), max_length=limit))
    model: Any = task.model()
    lengths: list[int] = []
    real = model.generate
    model.generate = lambda **options: lengths.append((found := real(**options)).shape[1]) or found
    for length in (limit - 5, limit - 1):
        generation.answer(model, task.tokenizer, [[5] * length], max_new_tokens=50, stop=[])
    assert lengths == [limit, limit]
    with pytest.raises(
        ValueError, match=f"a prompt of {limit} tokens leaves no room .* the model has {limit} positions"
    ):
        generation.answer(model, task.tokenizer, [[5] * limit], max_new_tokens=50, stop=[])


def test_without_answers_to_write_nothing_is_gathered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO stage 3 nothing can be: there all ranks compute in step, as they do here."""
    entered: list[nn.Module] = []
    real = shards.gathered
    monkeypatch.setattr(shards, "gathered", lambda model: (entered.append(model), real(model))[1])
    for asked in (0, 2):
        task = Finetune(config(home, "loss", eval_generate_samples=asked))
        assert task.evaluate(task.model()).keys() >= {"loss", "perplexity"}
        assert bool(entered) == bool(asked)
