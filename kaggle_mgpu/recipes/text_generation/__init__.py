"""Text generation: a GPT of about 9 M parameters trained from scratch on text files, or on Python's help.

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.text_generation import Config, TextGeneration
    task = TextGeneration(Config(data_path="/kaggle/input/my-text", global_batch_size=64, max_steps=2000))
    print(task.describe())
    result = launch(train, task.config, task)
    print(task.sample(result.load(task.model()), "Once upon a time"))

Or: `python -m kaggle_mgpu train text_generation --data-path my.txt`. Rank 0 turns the text into two
memory-mapped token files under output_dir/data, once. One indexing operation reads a batch. Perplexities of different
tokenizers cannot be compared, so every evaluation also reports bits per byte of the held-out text. Files: settings.py;
documents.py (reading, split), tokenizer.py and corpus.py (token files, blocks); model.py; training.py (the task);
generation.py; ngrams.py (baselines).
"""

from .corpus import prepare
from .generation import generate
from .model import GPT
from .ngrams import baselines
from .settings import Config
from .training import TextGeneration, task

__all__ = ["GPT", "Config", "TextGeneration", "baselines", "generate", "prepare", "task"]
