"""The settings of text generation: text, tokenizer and size of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kaggle_mgpu.config import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train a GPT on text. A sample is a block of block_size tokens."""

    data_path: str | None = None
    """A .txt (one document), .jsonl or .parquet (one document per row) file, or a folder of files. None: the largest
    folder of such files among the Kaggle inputs, else nltk's Gutenberg or Brown corpus where Kaggle's image has one,
    else the text of Python's own help topics (no download)."""
    text_field: str = "text"
    """The field of .jsonl rows, or the column of .parquet files, with the text."""
    val_fraction: float = 0.1
    """Share of the bytes held out: whole documents, or the text's tail where documents are too few. 0: none."""
    tokenizer: Literal["auto", "byte", "bpe"] = "auto"
    """byte: UTF-8 bytes; bpe: trained on the training split; auto: bpe where `tokenizers` is installed.
    Measured on the embedded text (4 layers of width 128, 150 s of one CPU core each, best of three evaluations), in
    bits per byte of held-out text: byte 2.12; bpe with 512 ids 2.00, with 1024 1.98, with 2048 2.00. After 50 s: byte
    2.82, bpe 2.12 to 2.13."""
    vocab_size: int = 1024
    """Size of the bpe vocabulary, separator included. A larger one makes fewer tokens of a text, and each step slower.
    Measured with 4 layers of width 128, in bits per byte of held-out text. King James Bible (4.3 MB), three seeds:
    2.172 with 1024 after 400 steps (89 s of one CPU core), 2.177 with 4096 after 272 steps (97 s), 2.123 with 4096
    after 400 (130 s). Python source (20 MB), one seed, 110 s each: 3.10 with 1024, 3.25 with 4096. In the default model
    the output layer is a smaller share of the work: by operation count, about 340 steps with 4096 take as long as 367
    with 1024."""
    n_layer: int = 8
    """Transformer blocks."""
    n_head: int = 8
    """Attention heads."""
    n_embd: int = 256
    """Width of the model: numbers per token."""
    block_size: int = 512
    """Tokens of context."""
    dropout: float = 0.0
    """Dropout after attention and MLP. Above 0 the weights depend on the number of GPUs."""
    random_shift: bool = False
    """Shift the start of each training block at random, differently in each epoch, for more contexts from the same
    text. The shifts depend on how the batch is split."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks; AdamW for the embedding, with 3 times the learning rate, and for
    vectors. Not with strategy deepspeed. Measured on the King James Bible at lr=3e-3, in nats per held-out token, mean
    of three seeds. 0.26 M parameters, 120 steps: adamw 5.19, muon 4.79; 600 steps: adamw 4.26, muon 4.21; adamw with
    684 steps, which take as long as muon's 600: 4.23. 1.2 M parameters, 600 steps: adamw 3.79, muon 3.77; adamw with
    708 steps, which take as long as muon's 600: 3.71. The time of muon's steps on a GPU has not been measured."""
    global_batch_size: int | str | None = 64
    """Blocks per optimizer step over all GPUs: 64 x 512 = 32768 tokens."""
    epochs: int = 20
    """Passes over the training data. Ignored when max_steps is given."""
    warmup_steps: int | float | str = 0.03
    """Steps of linear warm-up; below 1, a fraction of the run."""
    lr: float | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Peak learning rate. auto: 1e-3 x 256 / n_embd, at least min_lr, because Adam's best rate for a matrix is about
    proportional to 1 / width (muP: Yang et al. 2022, arXiv 2203.03466, table 3). A run begun by an earlier version
    continues with that version's default, 1e-3 for every width. Measured on the King James Bible with adamw, 2 layers,
    250 steps of 512 tokens, in nats per held-out token. Width 64: 5.20 with 1e-3, 4.87 with 4e-3 (another seed: 5.18,
    4.77). Width 128: 4.72 with 1e-3, 4.58 with 2e-3, 4.65 with 4e-3. Width 256: 4.33 with 1e-3, 4.48 with 2e-3. Width
    512: 4.39 with 5e-4, 4.70 with 1e-3."""
    min_lr: float = 1e-4
    """Learning rate at the end of the schedule."""
    sample_tokens: int = 40
    """Tokens that the model writes at each evaluation, kept in metrics.jsonl as `sample`. 0: none."""
    sample_prompt: str = "The "
    """The beginning of these samples."""
    output_dir: str = "text_generation"
    """The run's folder: config, data, metrics, logs, checkpoints, weights, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 2, "vocab_size": 258, "sample_tokens": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {getattr(self, name)!r}")
        if self.lr == "auto":
            object.__setattr__(self, "lr", max(1e-3 * 256 / self.n_embd, self.min_lr))
            object.__setattr__(self, "_derived", ("lr",))
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"Config.n_embd: expected a multiple of 2 x n_head = {2 * self.n_head} (rotary positions "
                f"turn pairs of numbers in each head), got {self.n_embd}"
            )
        if not 0 <= self.val_fraction <= 0.5 or not 0 <= self.dropout < 1:
            raise ValueError(
                "Config: expected 0 <= val_fraction <= 0.5 and 0 <= dropout < 1, "
                f"got {self.val_fraction} and {self.dropout}"
            )
        if self.optimizer == "muon" and self.strategy == "deepspeed":
            raise ValueError(
                "Config: optimizer='muon' needs whole matrices, but strategy='deepspeed' (ZeRO) splits matrices over "
                "the GPUs: use strategy='ddp' or 'fsdp', or optimizer='adamw'"
            )
