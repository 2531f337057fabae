"""Write the products of a finished run: an adapter in peft's format, a model card, one merged model.

folder = export(task, result)     # output_dir/adapter; for full, output_dir itself
merge("sft", "fp16", "merged")    # or: python -m kaggle_mgpu merge sft --dtype fp16 --to merged
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kaggle_mgpu.checkpoints import files
from kaggle_mgpu.fields import parse_per_gpu
from kaggle_mgpu.training import Result

from . import memory, models

if TYPE_CHECKING:
    from .finetune import Finetune

EXPORT = "export.json"


def weights_file(result: Result, which: str) -> Path:
    """Return the file of the "best" or the "final" weights; the final file if nothing was evaluated."""
    best = which == "best" and result.best is not None
    return Path(result.output_dir) / ("best/model.safetensors" if best else "model.safetensors")


def export(task: Finetune, result: Result, which: str = "best") -> Path:
    """Write the adapter as peft does, the tokenizer and the model card; for full tuning the card alone.

    Returns the folder: output_dir/adapter, or output_dir.
    """
    config, prepared, out = task.config, task.prepared, Path(result.output_dir)
    weights, folder = weights_file(result, which), out if config.mode == "full" else out / "adapter"
    if config.mode != "full":
        _, names = task.plan()
        models.export_adapter(weights, folder, models.lora_config(names, config, prepared.model))
        task.tokenizer.save_pretrained(str(folder))
    facts = {
        "tuning": config.mode,
        "model": prepared.model,
        "weights": str(weights.relative_to(out)),
        "compute_dtype": task.precision,
    }
    files.write_text(out / EXPORT, json.dumps(facts, indent=1))
    files.write_text(folder / "README.md", card(task, result, which))
    return folder


def measured(result: Result) -> dict[str, str]:
    """Return held-out figures, throughput and memory from the records of the run."""
    records = result.records()
    trained = [record for record in records if record["kind"] == "train"]
    speeds = sorted(record["tokens_per_s"] for record in trained[1:] if "tokens_per_s" in record)
    peak = max((record.get("peak_memory_mib", 0) for record in records), default=0)
    rows = {f"held-out {name}, last evaluation": f"{value:.4f}" for name, value in result.metrics.items()}
    if result.best is not None:
        rows["best held-out value"] = f"{result.best:.4f}"
    rows["steps"] = f"{result.step} of {result.max_steps} ({result.reason})"
    rows["training time"] = f"{result.seconds:.0f} s on {result.world_size} x {result.strategy}, {result.precision}"
    if speeds:
        rows["answer tokens per second, median"] = f"{speeds[len(speeds) // 2]:,.0f}"
    rows["peak memory, rank 0"] = memory.size(peak * 2**20)
    return rows


def card(task: Finetune, result: Result, which: str) -> str:
    """Return the model card: model, tuning, data, and the measured figures."""
    config, prepared = task.config, task.prepared
    library = "transformers" if config.mode == "full" else "peft"
    rows = "\n".join(f"| {name} | {value} |" for name, value in measured(result).items())
    adapters = (
        f"LoRA rank {config.lora_rank}, alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}"
        + (", on nf4 weights (double quantisation)" if config.mode == "qlora" else "")
        if config.mode != "full"
        else "every weight"
    )
    use = (
        f"from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{prepared.model}")\n'
        f'model = PeftModel.from_pretrained(base, "{Path(result.output_dir).resolve() / "adapter"}")'
        if config.mode != "full"
        else f"python -m kaggle_mgpu merge {result.output_dir} --dtype fp16 --to FOLDER"
    )
    size = f"{config.global_batch_size} samples"
    if isinstance(config.global_batch_size, str):
        size = f"{parse_per_gpu(config.global_batch_size)} samples on each GPU"
    return f"""---
base_model: {prepared.model}
library_name: {library}
pipeline_tag: text-generation
tags: [sft{", lora" if config.mode != "full" else ""}]
---

# {config.model or "A tiny Llama"}, fine-tuned

- base model: `{prepared.model}`
- tuned: {task.backend} ({adapters}); the {which} weights of the run
- data: {prepared.source}, {prepared.kind}: {prepared.train:,} examples, {prepared.train_learnt:,} tokens of answers \
learnt; {prepared.val:,} examples held out; {prepared.truncated:,} cut at {config.max_length} tokens, \
{prepared.dropped:,} dropped
- template: {prepared.template}
- optimizer: learning rate {config.lr:g} ({config.schedule}), {size} of at most \
{config.max_length} tokens a step, seed {config.seed}

| measured | |
|---|---|
{rows}

```
{use}
```
"""


def farewell(task: Finetune, result: Result, folder: Path) -> str:
    """Return lines with the measured and estimated peak memory, the written files, and the command to merge."""
    planned, _ = task.plan()
    found = measured(result)
    lines = [
        f"peak memory of rank 0: {found['peak memory, rank 0']} (estimated for the model: {memory.size(planned.total)}"
        + ("; on a CPU the process and its libraries add to this)" if not torch.cuda.is_available() else ")"),
        f"model card: {folder / 'README.md'}",
        f"one model without adapters: python -m kaggle_mgpu merge {result.output_dir} --dtype fp16 --to FOLDER",
    ]
    if task.config.mode != "full":
        lines.insert(1, f"adapter, for plain peft: {folder}")
    return "\n".join(lines)


# Merging
def merge(output_dir: str | Path, dtype: str, to: str | Path) -> float:
    """Write base and adapter (for full, the trained weights) as one model for plain transformers, in a new folder.

    For qlora the base weights are quantised to 4 bits as in training, then converted to `dtype`. Returns the largest
    difference between the logits of one prompt before and after the merge, as a share of the largest logit.

    Raises:
        FileNotFoundError: the folder holds no exported run.
        FileExistsError: `to` holds something.
    """
    out, folder = Path(output_dir), Path(to)
    if not (out / EXPORT).is_file():
        raise FileNotFoundError(
            f"{out.resolve()} holds no exported run: expected {EXPORT}, which training writes at its end"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"--to {folder.resolve()}: the folder is not empty; give another folder, or empty this one"
        )
    facts = json.loads((out / EXPORT).read_text(encoding="utf-8"))
    tokenizer, _ = models.tokenizer(str(out / "adapter") if facts["tuning"] != "full" else facts["model"])
    ids = torch.tensor([tokenizer("### Question: what does this do?", add_special_tokens=False)["input_ids"][:32]])
    with torch.no_grad():
        model, before = _with_adapters(out, facts, models.DTYPES[dtype], ids)
        after = _logits(model, ids)
    model.save_pretrained(str(folder))  # type: ignore[operator]
    tokenizer.save_pretrained(str(folder))
    card = (out / "adapter" / "README.md") if facts["tuning"] != "full" else out / "README.md"
    if card.is_file():
        files.write_text(folder / "README.md", card.read_text(encoding="utf-8"))
    return float((after - before).abs().max() / before.abs().max())


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.float()


def _with_adapters(
    out: Path, facts: dict[str, Any], dtype: torch.dtype, ids: torch.Tensor
) -> tuple[nn.Module, torch.Tensor]:
    """Return the merged model, and the logits of `ids` from before the merge (for full, in fp32)."""
    transformers = models.require("transformers")
    if facts["tuning"] == "full":
        with models.quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(facts["model"], dtype=torch.float32)
        model.load_state_dict(files.read_tensors(out / facts["weights"]))
        before = _logits(model, ids)
        return model.to(dtype), before
    model = models.load(
        facts["model"], tuning=facts["tuning"], backend="hf", base_dtype=dtype, max_length=0,
        device=torch.device("cpu"), compute_dtype=models.DTYPES[facts["compute_dtype"]],
    )  # fmt: skip
    if facts["tuning"] == "qlora":
        model = model.dequantize(dtype)  # type: ignore[operator]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    with models.quiet():
        adapted = models.require("peft").PeftModel.from_pretrained(model, str(out / "adapter"))
        before = _logits(adapted, ids)
        return adapted.merge_and_unload().to(dtype), before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m kaggle_mgpu merge`."""
    parser.description = parser.description or merge.__doc__
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="the folder of a run of the recipe sft")
    parser.add_argument(
        "--dtype", choices=sorted(models.DTYPES), default="fp16", help="type of the weights (default: fp16)"
    )
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a new folder for the model")


def merge_command(given: argparse.Namespace) -> int:
    """Merge a finished run of the recipe sft into one model without adapters."""
    difference = merge(given.output_dir, given.dtype, given.to)
    apart = f"the merge changed its logits by at most {difference:.1g} of the largest logit"
    print(f"{given.to}: one model in {given.dtype}; {apart}")
    return 0
