"""Compare fine-tuning with transformers' Trainer: answer tokens per second and peak memory for lora, qlora and full.

    python tools/bench/sft.py --size 0.5b                  # on a GPU: 494 M random parameters, shaped like Qwen2.5-0.5B
    python tools/bench/sft.py --size tiny --steps 12       # on a CPU, to see it run; memory is the whole process's

Both train the same model on the same conversations (docstrings of the standard library) with fused AdamW and clipping.
The Trainer pads its batches; they have about as many tokens as our packed ones. Each runs in its own process. Figures
are medians over the steps after the first three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    },
}  # fmt: skip


def settings(arguments: argparse.Namespace, mode: str) -> Any:
    from kaggle_mgpu.recipes.sft import Config

    folder, chosen = Path(arguments.folder), cast(Any, mode)
    return Config(
        model=str(folder / "model"), tuning=chosen, output_dir=str(folder / f"run-{mode}"),
        max_length=arguments.max_length, global_batch_size=arguments.batch, max_steps=arguments.steps, val_fraction=0,
        log_every=1, eval_every="end", lr=1e-4, resume="never", strategy="single", nproc=1,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )  # fmt: skip


def make_model(arguments: argparse.Namespace) -> None:
    """Write a random model of the chosen size, and a tokenizer for the docstrings' words."""
    from kaggle_mgpu.recipes.sft import models, reading

    models.TINY.update(SIZES[arguments.size])
    texts = [message["content"] for conversation in reading.embedded() for message in conversation]
    models.make_tiny(Path(arguments.folder) / "model", texts, seed=0)


def ours(arguments: argparse.Namespace, mode: str) -> dict[str, float]:
    from kaggle_mgpu import train
    from kaggle_mgpu.recipes.sft import Finetune, memory

    task = Finetune(settings(arguments, mode))
    estimated = task.plan()[0].total
    records = [record for record in train(task.config, task).records() if record["kind"] == "train"]
    speed = statistics.median(record["tokens_per_s"] for record in records[3:])
    return {"tokens_per_s": speed, "peak_bytes": memory.peak_memory(), "estimated_bytes": estimated}


def theirs(arguments: argparse.Namespace, mode: str) -> dict[str, float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kaggle_mgpu.recipes.sft import Finetune, memory, models

    task = Finetune(settings(arguments, mode))
    model, examples = task.base(), task.examples("train")
    if mode != "full":
        model = models.adapt(model, models.targets(model, "auto"), task.config, "hf", task.prepared.model)
    rows = [
        {"ids": ids.tolist(), "learnt": learnt.tolist()} for ids, learnt in (examples[i] for i in range(len(examples)))
    ]
    mean = sum(len(row["ids"]) for row in rows) / len(rows)
    per_batch = max(1, round(arguments.batch * arguments.max_length / mean))
    moments: list[float] = []
    counted: list[int] = []

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["ids"]) for row in chosen)
        ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in chosen])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in chosen])
        learnt = torch.tensor([row["learnt"] + [False] * (width - len(row["ids"])) for row in chosen])
        counted.append(int(learnt.sum()))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learnt, -100)}

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    options = TrainingArguments(
        output_dir=str(Path(arguments.folder) / "theirs"), max_steps=arguments.steps, learning_rate=1e-4,
        per_device_train_batch_size=per_batch, optim="adamw_torch_fused", max_grad_norm=1.0, report_to="none",
        save_strategy="no", logging_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        bf16=task.precision == "bf16", fp16=task.precision == "fp16", dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=arguments.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if arguments.gradient_checkpointing else None,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(model=model, args=options, train_dataset=rows, data_collator=collate, callbacks=[Watch()]).train()
    times = [b - a for a, b in itertools.pairwise(moments[2:])]
    speeds = [count / seconds for count, seconds in zip(counted[3:], times, strict=False)]
    return {"tokens_per_s": statistics.median(speeds), "peak_bytes": memory.peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--modes", default="lora,qlora,full")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="packs a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--folder", help="where model and runs go (default: a temporary folder)")
    parser.add_argument("--one", nargs=2, metavar=("WHO", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.one:
        who, mode = arguments.one
        found = {"ours": ours, "theirs": theirs}[who](arguments, mode)
        print(f"FOUND {json.dumps(found)}", flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or temporary
        make_model(arguments)
        print("| mode | tokens/s, ours | Trainer | ratio | peak GiB, ours | Trainer | ratio | estimated |")
        print("|---|---|---|---|---|---|---|---|")
        for mode in arguments.modes.split(","):
            rows = {}
            for who in ("ours", "theirs"):
                command = [sys.executable, __file__, *sys.argv[1:], "--folder", arguments.folder, "--one", who, mode]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
                if not lines:
                    raise SystemExit(f"{who}, {mode}: no result\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                rows[who] = json.loads(lines[-1].removeprefix("FOUND "))
            a, b = rows["ours"], rows["theirs"]
            gib = [found["peak_bytes"] / 2**30 for found in (a, b)]
            print(
                f"| {mode} | {a['tokens_per_s']:,.0f} | {b['tokens_per_s']:,.0f} | "
                f"{a['tokens_per_s'] / b['tokens_per_s']:.2f} | {gib[0]:.2f} | {gib[1]:.2f} | {gib[0] / gib[1]:.2f} | "
                f"{a['estimated_bytes'] / 2**30:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
