"""This recipe fine-tunes language models on conversations: all weights, LoRA, or LoRA on 4-bit weights (QLoRA).

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.sft import Config, Finetune
    task = Finetune(Config(model="/kaggle/input/my-model", data_path="conversations.jsonl", tuning="lora"))
    print(task.describe())
    result = launch(train, task.config, task)
    task.export(result)   # output_dir/adapter, which plain peft loads

Or: `python -m kaggle_mgpu train sft --model FOLDER --data-path conversations.jsonl`, then `python -m kaggle_mgpu merge
OUTPUT_DIR --dtype fp16 --to FOLDER` for one model without adapters. Without a model and data the recipe makes a tiny
model and teaches it what the functions of Python's standard library do. Files: config.py and guide.py (settings);
reading.py (rows of files), data.py (tokens, packs) and prepare.py; models.py (loading, adapters); overflow.py (fp16);
memory.py (estimate); finetune.py (loss, evaluation); generation.py and rouge.py; output.py (adapter, card, merge).
"""

from __future__ import annotations

import datetime

from kaggle_mgpu.launching import launch
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.training import Result, Task, train

from . import data, generation, models, output, rouge
from .config import Config
from .finetune import Finetune
from .prepare import prepare

__all__ = ["Config", "Finetune", "data", "generation", "models", "output", "prepare", "rouge", "run"]


def task(config: Config) -> Task:
    """Return the fine-tuning task of a config, for the command line."""
    return Finetune(config)


def run(config: Config) -> Result:
    """Train, then write the adapter and the model card, as the command line does."""
    distributed.init(timeout=datetime.timedelta(minutes=config.collective_timeout_minutes))  # under torchrun
    made = Finetune(config)
    assert made.prepared  # reading it prepares the data, on all ranks together; rank 0 alone describes
    distributed.from_main(lambda: print(made.describe(), flush=True))
    result = launch(train, config, made)
    distributed.from_main(lambda: print(output.farewell(made, result, made.export(result)), flush=True))
    return result


COMMANDS = {"merge": (output.add_arguments, output.merge_command)}
"""Further commands of this recipe: name -> (function that adds arguments to a parser, function that runs the command
and returns the exit code)."""
