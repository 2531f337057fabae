"""Text generation: a GPT of about 9 M parameters trained from scratch on text files, or on Python's help.

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.text_generation import Config, TextGeneration
    task = TextGeneration(Config(data_path="/kaggle/input/my-text", global_batch_size=64, max_steps=2000))
    print(task.describe())
    result = launch(train, task.config, task)
    print(task.sample(result.load(task.model()), "Once upon a time"))

Or: `python -m kaggle_mgpu train text_generation --data-path my.txt`. Rank 0 turns the text into two
memory-mapped token files under output_dir/data, once; a batch is one NumPy gather from them. Perplexities of
different tokenizers do not compare, so every evaluation also reports bits per byte of the held-out text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from kaggle_mgpu import distributed, session
from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.data import counted
from kaggle_mgpu.trainer import Task

IGNORED = -100
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to train a GPT on text. A sample is a block of block_size tokens."""

    data_path: str | None = None
    """A .txt (one document), .jsonl or .parquet (one per row) file, or a folder of them. None: the largest
    folder of such files among the Kaggle inputs, else the text of Python's own help topics (no download)."""
    text_field: str = "text"
    """The field of .jsonl rows, or column of .parquet files, that holds the text."""
    val_fraction: float = 0.1
    """Share of the bytes held out: whole documents, or the text's tail where they are too few. 0: none."""
    tokenizer: Literal["auto", "byte", "bpe"] = "auto"
    """byte: UTF-8 bytes; bpe: trained on the training split; auto: bpe where `tokenizers` is installed.
    Measured on the embedded text, 4 layers x 128, 150 s of one CPU core each, best of three evaluations, bits
    per byte held out: bytes 2.12; bpe of 512 ids 2.00, of 1024 1.98, of 2048 2.00. After 50 s: bytes 2.82,
    each bpe 2.12 to 2.13."""
    vocab_size: int = 1024
    """Size of the bpe vocabulary, separator included. 1024 suits 0.4 MB of text; more text bears more."""
    n_layer: int = 8
    """Transformer blocks."""
    n_head: int = 8
    """Attention heads."""
    n_embd: int = 256
    """Width."""
    block_size: int = 512
    """Tokens of context."""
    dropout: float = 0.0
    """Dropout after attention and MLP. Above 0 the weights depend on the number of GPUs."""
    random_shift: bool = False
    """Cut each training block at a random place of its stretch, another one in each epoch: more different contexts
    from the same text. The cuts depend on how the batch is split."""
    global_batch_size: int | None = 64
    """Blocks per optimizer step over all GPUs: 64 x 512 = 32768 tokens."""
    epochs: int = 20
    """Passes over the training data. Ignored when max_steps is given."""
    warmup_steps: int | float = 0.03
    """Steps of linear warm-up; below 1 it is a fraction of the run."""
    min_lr: float = 1e-4
    """Where the schedule ends."""
    output_dir: str = "text_generation"
    """The run's folder: config, data, metrics, logs, checkpoints, weights, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 2, "vocab_size": 258}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {getattr(self, name)!r}")
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


# Tokens
class Tokenizer(Protocol):
    """Text to ids and back. `n_vocab` counts `separator`, the last id, which no text encodes to."""

    n_vocab: int
    separator: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes; nothing to train, nothing to install."""

    n_vocab = 257
    separator = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level BPE from a tokenizer.json of the `tokenizers` package, and a separator after its last id."""

    def __init__(self, path: str | Path) -> None:
        self._bpe = _tokenizers().Tokenizer.from_file(str(path))
        self.separator: int = self._bpe.get_vocab_size()
        self.n_vocab = self.separator + 1

    def encode(self, text: str) -> list[int]:
        return list(self._bpe.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._bpe.decode([i for i in ids if i < self.separator]))

    @staticmethod
    def train(texts: Iterator[str], n_vocab: int, path: Path) -> None:
        """Train on `texts` (the first 100 M characters are enough) and write tokenizer.json."""

        def some() -> Iterator[str]:
            left = 100_000_000
            for text in texts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return

        t = _tokenizers()
        bpe = t.Tokenizer(t.models.BPE())
        bpe.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = t.decoders.ByteLevel()
        # All 256 bytes are in the vocabulary, so that nothing is ever unknown
        alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
        trainer = t.trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(some(), trainer)
        bpe.save(str(path))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer='bpe' needs the package `tokenizers`: pip install tokenizers, or use tokenizer='byte'"
        ) from None
    return tokenizers


# Documents
def embedded_documents() -> list[str]:
    """The English text of `pydoc_data.topics` (Python's help(), PSF licence), about 0.37 MB.

    Topics quote one another (a fifth of the text): a paragraph that an earlier, longer topic has is left out,
    since held-out text that was trained on would be a lie.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = re.split(r"\n(?:[ \t]*\n)+", topics[name].strip("\n"))
        keys = [" ".join(paragraph.split()) for paragraph in paragraphs]
        text = "\n\n".join(p for p, key in zip(paragraphs, keys, strict=True) if key not in seen)
        seen.update(keys)
        if len(text) >= 500:
            kept[name] = text + "\n"
    return [kept[name] for name in sorted(kept)]


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file, or of all such files in a folder, by sorted path.

    Raises:
        FileNotFoundError: nothing there. ValueError: a file, line or row that is not text, with its place.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"data_path: no {', '.join(SUFFIXES)} file in {path}")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"data_path: no such file or folder: {path}")
    for file in files:
        rows = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}.get(file.suffix.lower())
        if rows is None:
            raise ValueError(f"data_path: expected one of {', '.join(SUFFIXES)}, got {file}")
        for place, text in rows(file, text_field):
            if not isinstance(text, str):
                raise ValueError(f"{place}: expected a string in {text_field!r}, got {type(text).__name__}")
            # JSON can hold half of a surrogate pair, which no UTF-8 file and no tokenizer can
            text = text.encode("utf-8", "replace").decode("utf-8")
            if text.strip():
                yield text


def _txt(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        yield str(file), file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}"
        ) from None


def _jsonl(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: not valid JSON: {error}") from None
            if not isinstance(row, dict) or text_field not in row:
                have = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{place}: expected an object with the field {text_field!r} (text_field), got {have}")
            yield place, row[text_field]


def _parquet(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{file}: reading parquet needs the package `pyarrow`: pip install pyarrow") from None
    table = parquet.ParquetFile(file)
    if text_field not in table.schema_arrow.names:
        raise ValueError(f"{file}: expected a column {text_field!r} (text_field), got {table.schema_arrow.names}")
    row = 0
    for batch in table.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield f"{file}, row {row}", text


def plan_split(documents: Sequence[tuple[str, int]], val_fraction: float) -> list[int]:
    """How many leading bytes of each document are for training; the rest is held out. Depends on contents
    alone.

    Whole documents are held out, picked by their digest so that equal ones land on the same side, as many as
    fit into `val_fraction` of the bytes. Where that is less than half of what was asked for (one book, a few
    long files), the tail of the whole text is held out instead.

    Args:
        documents: (hex digest, size in bytes) of each.
    """
    cuts = [size for _, size in documents]
    wanted = int(val_fraction * sum(cuts))
    same: dict[str, list[int]] = {}
    for i, (digest, _) in enumerate(documents):
        same.setdefault(digest, []).append(i)
    taken = 0
    for digest in sorted(same):
        size = sum(documents[i][1] for i in same[digest])
        if taken + size <= wanted:
            taken += size
            for i in same[digest]:
                cuts[i] = 0
    if 2 * taken < wanted:
        cuts = [size for _, size in documents]
        for i in reversed(range(len(cuts))):
            part = min(wanted, cuts[i])
            cuts[i] -= part
            wanted -= part
    return cuts


def cut_text(text: str, cut: int) -> tuple[str, str]:
    """The text in two at byte `cut` or a little before: at a line if one ends near, in no character."""
    data = text.encode("utf-8")
    if 0 < cut < len(data):
        line = data.rfind(b"\n", max(0, cut - 1000), cut) + 1
        cut = line or cut
        while data[cut] & 0xC0 == 0x80:
            cut -= 1
    return data[:cut].decode("utf-8"), data[cut:].decode("utf-8")


# Token files
@dataclass(frozen=True)
class Corpus:
    """Prepared text: a folder with train.bin, val.bin, corpus.json and, for bpe, tokenizer.json."""

    folder: str
    source: str
    reason: str
    digest: str
    """Of the tokens and the split: what a checkpoint must have been trained on to be gone on with."""
    kind: str
    n_vocab: int
    documents: int
    train_bytes: int
    val_bytes: int
    train_tokens: int
    val_tokens: int

    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer() if self.kind == "byte" else BPETokenizer(Path(self.folder) / "tokenizer.json")

    def bits_per_byte(self, loss: float) -> float:
        """Nats per validation token as bits per byte of validation text."""
        return loss * (self.val_tokens - 1) / max(1, self.val_bytes) / math.log(2)

    def blocks(self, part: str, block_size: int, random_shift: bool = False) -> TokenBlocks:
        """`part`: "train" or "val"."""
        return TokenBlocks(Path(self.folder) / f"{part}.bin", _dtype(self.n_vocab), block_size, random_shift)


class TokenBlocks(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of a token file: block i predicts tokens i*B+1 ... (i+1)*B from the ones before, so every token
    but the first (a separator) is predicted exactly once. In the last block what is missing is a target of
    -100: ignored. With `random_shift` each begins up to B - 1 tokens later, drawn from torch's generator.
    """

    def __init__(self, path: Path, dtype: str, block_size: int, random_shift: bool = False) -> None:
        self.path, self.dtype, self.block_size = str(path), dtype, block_size
        self.random_shift = random_shift
        self.n_tokens = Path(path).stat().st_size // np.dtype(dtype).itemsize
        self._tokens: NDArray[Any] | None = None

    @property
    def tokens(self) -> NDArray[Any]:
        """The whole stream, memory-mapped at first use: a pickled memmap would carry all its bytes."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def __len__(self) -> int:
        return -(-(self.n_tokens - 1) // self.block_size)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (len(indices), block_size) int64."""
        first = indices.numpy() * self.block_size
        if self.random_shift:
            first = first + torch.randint(self.block_size, (len(first),)).numpy()
            first = np.minimum(first, max(0, self.n_tokens - 1 - self.block_size))
        at = first[:, None] + np.arange(self.block_size + 1)
        tokens = torch.from_numpy(self.tokens[np.minimum(at, self.n_tokens - 1)].astype(np.int64))
        targets = tokens[:, 1:].masked_fill(torch.from_numpy(at[:, 1:] >= self.n_tokens), IGNORED)
        return tokens[:, :-1].contiguous(), targets

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], targets[0]


def _dtype(n_vocab: int) -> str:
    return "uint16" if n_vocab <= 65536 else "uint32"


def choose_source(config: Config) -> tuple[Path | None, str]:
    """Where the text comes from (None: the embedded text), and why."""
    if config.data_path is not None:
        return Path(config.data_path).expanduser().resolve(), "data_path"
    sizes: dict[Path, int] = {}
    for suffix in SUFFIXES:
        for file in session.find(f"*{suffix}", limit=100_000):
            if file.is_file() and _has_text(file, config.text_field):
                sizes[file.parent] = sizes.get(file.parent, 0) + file.stat().st_size
    if sizes:
        folder = max(sorted(sizes), key=lambda folder: sizes[folder])
        return folder, f"the input folder with most {'/'.join(SUFFIXES)} bytes, of {len(sizes)}"
    return None, f"no data_path, and no {'/'.join(SUFFIXES)} file among the inputs"


def _has_text(file: Path, text_field: str) -> bool:
    # an earlier run's metrics.jsonl may be among the inputs, and tables of numbers
    try:
        return file.suffix == ".txt" or next(read_documents(file, text_field), None) is not None
    except (ValueError, ImportError):
        return False


def prepare(config: Config) -> Corpus:
    """Write the token files under output_dir/data, or find them there. One process at a time.

    The folder's name is a digest of the text and of all settings that matter, so a second run reuses it and a
    changed text is not mistaken for the old one. Each split is `separator document separator document ...
    separator`.

    Raises:
        ValueError: too little text for one block.
    """
    path, reason = choose_source(config)
    source = "Python's help topics (pydoc_data.topics, PSF licence)" if path is None else str(path)

    def documents() -> Iterator[str]:
        yield from embedded_documents() if path is None else read_documents(path, config.text_field)

    kind = config.tokenizer
    if kind == "auto":
        try:
            _tokenizers()
            kind = "bpe"
        except ImportError:
            kind = "byte"
            reason += "; bytes, since the package `tokenizers` is not installed"
    listing = [(hashlib.sha256(data).hexdigest(), len(data)) for data in (text.encode() for text in documents())]
    n_vocab = config.vocab_size if kind == "bpe" else ByteTokenizer.n_vocab
    settings = json.dumps([1, kind, n_vocab, config.val_fraction, listing])
    folder = Path(config.output_dir).resolve() / "data" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not (folder / "corpus.json").exists():
        # It appears under its name only when complete; a killed session may have left half of one
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, documents, listing, plan_split(listing, config.val_fraction), kind, n_vocab)
        os.replace(temporary, folder)
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    corpus = Corpus(folder=str(folder), source=source, reason=reason, **facts)
    if corpus.train_tokens <= config.block_size or (config.val_fraction and corpus.val_bytes == 0):
        raise ValueError(
            f"{source}: too little text: {counted(corpus.documents, 'document')} with {corpus.train_tokens - 1} tokens "
            f"to train on and {corpus.val_bytes} bytes to hold out; expected at least block_size = "
            f"{config.block_size} tokens and 1 byte. Give more text, a smaller block_size, or val_fraction=0."
        )
    return corpus


def _write(
    folder: Path,
    documents: Callable[[], Iterator[str]],
    listing: list[tuple[str, int]],
    cuts: list[int],
    kind: str,
    n_vocab: int,
) -> None:
    def split() -> Iterator[tuple[str, str]]:
        for text, cut, (_, size) in zip(documents(), cuts, listing, strict=True):
            yield (text, "") if cut == size else cut_text(text, cut)

    tokenizer: Tokenizer = ByteTokenizer()
    if kind == "bpe":
        BPETokenizer.train((train for train, _ in split()), n_vocab, folder / "tokenizer.json")
        tokenizer = BPETokenizer(folder / "tokenizer.json")
    facts: dict[str, Any] = {"kind": kind, "n_vocab": tokenizer.n_vocab, "documents": len(listing)}
    dtype = _dtype(tokenizer.n_vocab)
    names = ("train", "val")
    separator = np.array([tokenizer.separator], dtype)
    n_bytes, n_tokens = dict.fromkeys(names, 0), dict.fromkeys(names, 1)
    digest = hashlib.sha256(kind.encode())
    files = {name: (folder / f"{name}.bin").open("wb") for name in names}
    try:
        for file in files.values():
            separator.tofile(file)
        for texts in split():
            for name, text in zip(names, texts, strict=True):
                if not text:
                    continue
                # A piece of whole lines at a time: a list of a whole book's ids would be many times its size
                for piece in re.findall(r"(?s).{1,1000000}(?:\n|\Z)|.{1,1000000}", text):
                    ids = np.array(tokenizer.encode(piece), dtype)
                    ids.tofile(files[name])
                    digest.update(ids.tobytes())
                    n_tokens[name] += len(ids)
                separator.tofile(files[name])
                digest.update(f"end of {name}".encode())
                n_tokens[name] += 1
                n_bytes[name] += len(text.encode("utf-8"))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    facts["digest"] = digest.hexdigest()[:16]
    for name in names:
        facts |= {f"{name}_bytes": n_bytes[name], f"{name}_tokens": n_tokens[name]}
    with (folder / "corpus.json").open("w", encoding="utf-8") as record:
        json.dump(facts, record)
        record.flush()
        os.fsync(record.fileno())


# The model
class KVCache:
    """Keys and values of `length` tokens so far; room for block_size of them, allocated once."""

    def __init__(self, model: GPT, batch_size: int = 1) -> None:
        weight, head = model.embedding.weight, model.n_embd // model.n_head
        shape = (model.n_layer, 2, batch_size, model.n_head, model.block_size, head)
        self.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0


class Block(nn.Module):
    """Causal self-attention with rotary positions, then a SwiGLU MLP; RMSNorm before each."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.norm1, self.norm2 = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.up = nn.Linear(n_embd, 8 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, int] | None = None) -> Tensor:
        # x (B, T, C); q, k, v (B, heads, T, head size); past: this layer's cache (2, B, heads, block_size,
        # head size)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mask = None
        if past is not None:
            cache, length = past
            cache[0, :, :, length : length + t] = k
            cache[1, :, :, length : length + t] = v
            k, v = cache[:, :, :, : length + t].to(q.dtype)
            if length and t > 1:
                mask = torch.ones(t, length + t, dtype=torch.bool, device=x.device).tril(length)
        causal = mask is None and k.shape[2] == t
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(b, t, c)), dropout)
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), dropout)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), halves paired. x (..., T, D), cos (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """A decoder-only transformer: no biases, and the embedding's matrix is also the head.

    The head has no parameter of its own, so each tensor is in state_dict() once, as safetensors demands.
    """

    def __init__(
        self, n_vocab: int, n_layer: int, n_head: int, n_embd: int, block_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_layer, self.n_head, self.n_embd, self.block_size = n_layer, n_head, n_embd, block_size
        self.checkpointing = False
        self.embedding = nn.Embedding(n_vocab, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        head = n_embd // n_head
        angles = torch.outer(torch.arange(block_size), 10000.0 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # GPT-2's: what adds to the residual stream is smaller the more layers there are
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, n_vocab) for tokens (B, T); with a cache the tokens follow those already in it.

        Raises:
            ValueError: more than block_size tokens.
        """
        start = cache.length if cache else 0
        stop = start + tokens.shape[1]
        if stop > self.block_size:
            raise ValueError(f"GPT: expected at most block_size = {self.block_size} tokens, got {stop}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]  # type: ignore[index]
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, (cache.data[i], start) if cache else None)
        if cache:
            cache.length = stop
        return F.linear(self.norm(x), self.embedding.weight)


# Generation
def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """What to sample from: softmax(logits / temperature) over the top_k likeliest tokens, then over the
    smallest set of likeliest tokens that holds top_p of it (Holtzman et al. 2020, arXiv 1904.09751).
    Temperature 0: the likeliest.

    Args:
        logits: (n_vocab,).
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            "probabilities: expected temperature >= 0, top_k >= 1 and 0 < top_p <= 1, "
            f"got {temperature}, {top_k} and {top_p}"
        )
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    order = logits.float().argsort(descending=True, stable=True)
    p = (logits.float()[order] / temperature).softmax(0)
    if top_k is not None:
        p[top_k:] = 0
        p /= p.sum()
    if top_p is not None:
        p[p.cumsum(0) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes follow it, up to the end of the document or max_new_tokens.

    Keys and values are cached. When block_size tokens are full, the older half is forgotten and the rest is
    read anew from position 0, so what the model sees is always between half a block and a block of the latest
    text, at positions it was trained on. Random numbers come from a CPU generator: one seed, one text, on any
    device.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"generate: expected a GPT (not a wrapper of one), got {type(model).__name__}")
    tokens = [tokenizer.separator, *tokenizer.encode(prompt)]
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    cache, start = KVCache(model), 0
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if len(tokens) - start > model.block_size:
                start, cache.length = len(tokens) - model.block_size // 2, 0
            new = torch.tensor([tokens[start + cache.length :]], device=device)
            p = probabilities(model(new, cache)[0, -1].cpu(), temperature, top_k, top_p)
            token = int(torch.multinomial(p, 1, generator=generator))
            if token == tokenizer.separator:
                break
            tokens.append(token)
    finally:
        model.train(training)
    return tokenizer.decode(tokens)


# What the model has to beat
class Ngrams:
    """Unigram and bigram counts of a token stream, smoothed:
    p(b) = (count(b) + k) / (N + k V) and p(b | a) = (count(a b) + m p(b)) / (count(a) + m) (MacKay and Peto
    1995).
    """

    def __init__(self, stream: NDArray[Any], n_vocab: int) -> None:
        stream = stream.astype(np.int64)
        self.n_vocab = n_vocab
        self.counts = np.bincount(stream[1:], minlength=n_vocab)
        self.contexts = np.bincount(stream[:-1], minlength=n_vocab)
        self.pairs, self.pair_counts = np.unique(stream[:-1] * n_vocab + stream[1:], return_counts=True)

    def losses(self, stream: NDArray[Any], k: float, m: float) -> tuple[float, float]:
        """Mean -ln p of every token of `stream` but the first: (unigram, bigram)."""
        stream = stream.astype(np.int64)
        a, b = stream[:-1], stream[1:]
        unigram = ((self.counts + k) / (self.counts.sum() + k * self.n_vocab))[b]
        at = np.minimum(np.searchsorted(self.pairs, a * self.n_vocab + b), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == a * self.n_vocab + b, self.pair_counts[at], 0)
        bigram = (count + m * unigram) / (self.contexts[a] + m)
        return float(-np.log(unigram).mean()), float(-np.log(bigram).mean())


def ngram_losses(train: NDArray[Any], val: NDArray[Any], n_vocab: int) -> tuple[float, float]:
    """Validation loss, nats per token, of a unigram and a bigram table made from the training stream.

    The smoothing weights k and m are those that predict the last tenth of the training stream best from the
    rest of it (at most 20 M tokens in all); the tables are then made from the whole.
    """
    train = np.asarray(train[-20_000_000:])
    cut = len(train) - max(2, len(train) // 10)
    tables, held = Ngrams(train[: cut + 1], n_vocab), train[cut:]
    k = min((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), key=lambda k: tables.losses(held, k, 1.0)[0])
    m = min((2.0**i for i in range(-2, 13)), key=lambda m: tables.losses(held, k, m)[1])
    return Ngrams(train, n_vocab).losses(val, k, m)


def baselines(task: TextGeneration) -> dict[str, float]:
    """Losses of table models on the task's own validation tokens: unigram and bigram (nats per token, to
    compare with loss) and unigram_bits_per_byte and bigram_bits_per_byte. How they are smoothed:
    `ngram_losses`.
    """
    corpus = task.corpus
    if not task.config.val_fraction:
        raise ValueError("baselines: expected held-out text, got val_fraction=0")
    train, val = (corpus.blocks(part, task.config.block_size).tokens for part in ("train", "val"))
    unigram, bigram = ngram_losses(train, val, corpus.n_vocab)
    return {
        "unigram": unigram,
        "bigram": bigram,
        "unigram_bits_per_byte": corpus.bits_per_byte(unigram),
        "bigram_bits_per_byte": corpus.bits_per_byte(bigram),
    }


# The task
class TextGeneration(Task):
    """Next-token prediction. A batch: (inputs, targets), both (blocks, block_size) int64; -100 is ignored."""

    unit = "tokens"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """The prepared text. At first all ranks ask for it together: rank 0 prepares it, the others wait."""
        if self._corpus is None:
            self._corpus = distributed.from_main(lambda: prepare(self.config))
            # Stamps the checkpoints: another text or tokenizer gives the same ids another meaning
            self.name = f"TextGeneration {self._corpus.digest}"
        return self._corpus

    def describe(self) -> str:
        """Source, why it was chosen, documents, bytes, tokens, split and tokenizer, in three lines."""
        c = self.corpus
        ratio = c.train_bytes / (c.train_tokens - 1)
        return (
            f"text: {c.source} ({c.reason}): {counted(c.documents, 'document')}, "
            f"{c.train_bytes + c.val_bytes:,} bytes\n"
            f"tokenizer: {c.kind}, {c.n_vocab:,} ids, {ratio:.2f} bytes a token\n"
            f"train {c.train_tokens - 1:,} tokens, validation {c.val_tokens - 1:,} tokens "
            f"({c.val_bytes:,} bytes held out), in {c.folder}"
        )

    def model(self) -> nn.Module:
        c = self.config
        return GPT(self.corpus.n_vocab, c.n_layer, c.n_head, c.n_embd, c.block_size, c.dropout)

    def train_data(self) -> TokenBlocks:
        return self.corpus.blocks("train", self.config.block_size, self.config.random_shift)

    def val_data(self) -> TokenBlocks | None:
        return self.corpus.blocks("val", self.config.block_size) if self.config.val_fraction else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy in nats, summed over the targets in fp32: an fp16 sum would overflow at 65504."""
        inputs, targets = batch
        logits = model(inputs).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Targets that are not ignored."""
        return int((batch[1] != IGNORED).sum())

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """loss (nats per token), perplexity = exp(loss), and bits_per_byte, fit to compare tokenizers."""
        loss = float(metrics["loss"])
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": self.corpus.bits_per_byte(loss)}

    def sample(self, model: nn.Module, prompt: str = "", **options: Any) -> str:
        """`generate` with this task's tokenizer."""
        return generate(model, self.corpus.tokenizer(), prompt, **options)


def task(config: Config) -> Task:
    """What the command line trains."""
    return TextGeneration(config)
