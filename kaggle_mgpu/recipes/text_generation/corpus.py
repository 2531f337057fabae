"""Prepare text for training: two memory-mapped files of tokens, written once, and blocks cut from the files.

    corpus = prepare(config)
    inputs, targets = corpus.blocks("train", 512).batch(torch.arange(8))

One process calls `prepare`; any number of processes may then read the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kaggle_mgpu.data import counted
from kaggle_mgpu.machine import session
from kaggle_mgpu.parallel import distributed

from .documents import NLTK, SUFFIXES, cut_at, digest_of, embedded_documents, plan_split, read_documents
from .settings import Config
from .tokenizer import MOST_CHARACTERS, BPETokenizer, ByteTokenizer, Tokenizer, tokenizers_package

IGNORED = -100
"""The target of a missing token, ignored by torch's cross_entropy."""
BATCH_CHARACTERS = 8_000_000
"""Characters that are tokenised at a time, on all cores."""
SAMPLE_CHARACTERS = 100_000
"""Characters in each piece of the text that a vocabulary is learnt from. `tokenizers` shares the pieces among cores."""
FIRST_SECONDS, PROGRESS_SECONDS = 2.0, 10.0
"""Seconds until the first line of progress, and between further lines."""

# Byte-level BPE first splits a text into words. A cut before a space or line end, after a character that is not white
# space, never splits a word.
BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n])")
PIECES = re.compile(r"(?s).{1,1000000}(?:\n|\Z)|.{1,1000000}")


@dataclass(frozen=True)
class Corpus:
    """A Corpus is a folder of prepared text: train.bin, val.bin, corpus.json and, for bpe, tokenizer.json."""

    folder: str
    source: str
    reason: str
    """Why `prepare` chose this source."""
    digest: str
    """A digest of the tokens and the split; a run continues only on data with the same digest."""
    kind: str
    """The tokenizer: byte or bpe."""
    n_vocab: int
    """Number of ids, the separator included."""
    documents: int
    train_bytes: int
    val_bytes: int
    train_tokens: int
    val_tokens: int
    """Ids in val.bin, separators included; likewise train_tokens."""

    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer() if self.kind == "byte" else BPETokenizer(Path(self.folder) / "tokenizer.json")

    def bits_per_byte(self, loss: float) -> float:
        """Convert nats per validation token to bits per byte of validation text."""
        return loss * (self.val_tokens - 1) / max(1, self.val_bytes) / math.log(2)

    def blocks(self, part: str, block_size: int, random_shift: bool = False) -> TokenBlocks:
        """Return the blocks of block_size tokens of a part, "train" or "val"."""
        return TokenBlocks(Path(self.folder) / f"{part}.bin", _dtype(self.n_vocab), block_size, random_shift)


class TokenBlocks(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of B tokens of a token file: inputs, and targets one token later.

    Block i predicts tokens i*B+1 ... (i+1)*B, so every token but the first (a separator) is predicted exactly once.
    Missing targets in the last block are -100, which is ignored. With `random_shift` a block begins up to B - 1 tokens
    later, drawn from torch's generator.
    """

    def __init__(self, path: Path, dtype: str, block_size: int, random_shift: bool = False) -> None:
        self.path, self.dtype, self.block_size = str(path), dtype, block_size
        self.random_shift = random_shift
        self.n_tokens = Path(path).stat().st_size // np.dtype(dtype).itemsize
        self._tokens: NDArray[Any] | None = None

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens (n_tokens,), memory-mapped at first use. A pickle of this object leaves the tokens out."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def __len__(self) -> int:
        return -(-(self.n_tokens - 1) // self.block_size)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (len(indices), block_size) int64."""
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
    """Return the type of the numbers in a token file."""
    return "uint16" if n_vocab <= 65536 else "uint32"


def choose_source(config: Config) -> tuple[Path | None, str]:
    """Return the source of the text (None: the embedded text), and the reason."""
    if config.data_path is not None:
        return Path(config.data_path).expanduser().resolve(), "data_path"
    sizes: dict[Path, int] = {}
    for suffix in SUFFIXES:
        for file in session.find(f"*{suffix}", limit=100_000, ignore_case=True):
            if file.is_file() and _has_text(file, config.text_field):
                sizes[file.parent] = sizes.get(file.parent, 0) + file.stat().st_size
    if sizes:
        folder = max(sorted(sizes), key=lambda folder: sizes[folder])
        return folder, f"of {len(sizes)} input folders with {'/'.join(SUFFIXES)} text, the one with the most bytes"
    for name in ("gutenberg", "brown"):
        if (folder := NLTK / name).is_dir():
            reason = f"no data_path, and no {'/'.join(SUFFIXES)} file among the inputs"
            return folder, f"{reason}; this corpus is on Kaggle's image"
    return None, f"no data_path, and no {'/'.join(SUFFIXES)} file among the inputs"


def _has_text(file: Path, text_field: str) -> bool:
    # the inputs may have an earlier run's metrics.jsonl, or tables without text
    try:
        return file.suffix.lower() == ".txt" or next(read_documents(file, text_field), None) is not None
    except (ValueError, ImportError):
        return False


def prepare(config: Config) -> Corpus:
    """Return the corpus; write its files under output_dir/data, unless complete files are there or in a Kaggle input.

    Only one process may call `prepare` at a time. The folder's name is a digest of the text and of all settings that
    matter, so a second run reuses the folder, and a changed text gets another folder. Each token file is `separator
    document separator document ... separator`. bpe takes 13 CPU-seconds for 20 MB of Python source, 5 to learn the
    vocabulary and 8 to encode, both on all cores. Progress is printed every ten seconds. Each document is in
    memory once, and twice while it is read.

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
            tokenizers_package()
            kind = "bpe"
        except ImportError:
            kind = "byte"
            reason += "; tokens are bytes, since the package `tokenizers` is not installed"
    listing = _listing(documents())
    n_vocab = config.vocab_size if kind == "bpe" else ByteTokenizer.n_vocab
    settings = json.dumps([1, kind, n_vocab, config.val_fraction, listing])  # 1: the version of the files
    folder = Path(config.output_dir).resolve() / "data" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = session.find_prepared(folder, "corpus.json")
    if not (folder / "corpus.json").exists():
        # a temporary folder, renamed when complete; a killed session may have left a partial temporary folder
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


def _listing(documents: Iterator[str]) -> list[tuple[str, int]]:
    """Return the digest and the size in bytes of each document."""
    progress, listing = Progress("reading"), []
    for text in documents:
        listing.append(digest_of(text))
        progress.add(listing[-1][1])
    return listing


def _write(
    folder: Path,
    documents: Callable[[], Iterator[str]],
    listing: list[tuple[str, int]],
    cuts: list[int],
    kind: str,
    n_vocab: int,
) -> None:
    """Write train.bin, val.bin, tokenizer.json (bpe) and, last, corpus.json.

    Args:
        documents: returns an iterator over all documents.
        listing: digest, and size in bytes, of each document.
        cuts: the number of leading bytes of each document that are for training.
    """

    def split() -> Iterator[tuple[str, int]]:
        for text, cut, (_, size) in zip(documents(), cuts, listing, strict=True):
            yield text, len(text) if cut == size else cut_at(text, cut)

    total = sum(size for _, size in listing)
    tokenizer: Tokenizer = ByteTokenizer()
    if kind == "bpe":
        BPETokenizer.train(_samples(split(), sum(cuts)), n_vocab, folder / "tokenizer.json")
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
        for batch in _batches(split(), total):
            encoded = tokenizer.encode_all([piece for _, piece, _ in batch])
            for (part, piece, ends), found in zip(batch, encoded, strict=True):
                ids = np.array(found, dtype)
                ids.tofile(files[names[part]])
                digest.update(ids.tobytes())
                n_tokens[names[part]] += len(ids) + ends
                n_bytes[names[part]] += len(piece.encode("utf-8"))
                if ends:
                    separator.tofile(files[names[part]])
                    digest.update(f"end of {names[part]}".encode())
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


def _samples(split: Iterator[tuple[str, int]], total: int) -> Iterator[str]:
    """Yield the training texts in pieces, cut between words so that no word is split.

    Args:
        split: gives each document, and how many of its characters are for training.
        total: bytes for training.
    """
    progress, characters = Progress("learning a vocabulary", total), 0
    for text, end in split:
        start = 0
        while start < end:
            found = BETWEEN_WORDS.search(text, start + SAMPLE_CHARACTERS, end)
            stop = found.start() if found else end
            yield (piece := text[start:stop])
            nbytes = len(piece.encode("utf-8"))
            characters += len(piece)
            # BPETokenizer.train stops after MOST_CHARACTERS; the bytes of so many are estimated from the text so far
            progress.total = min(total, round(MOST_CHARACTERS * (progress.done + nbytes) / characters))
            progress.add(nbytes)
            start = stop


def _batches(split: Iterator[tuple[str, int]], total: int) -> Iterator[list[tuple[int, str, bool]]]:
    """Yield batches of pieces: the part (0: training, 1: held out), the text, and whether the piece ends a document.

    A piece has at most a million characters and ends at a line end, unless the line is longer. A batch has about
    BATCH_CHARACTERS characters. Documents are cut because the ids of a whole book would take many times its size in
    memory.

    Args:
        split: gives each document, and how many of its characters are for training.
        total: bytes of all documents.
    """
    progress = Progress("tokenising", total)
    batch: list[tuple[int, str, bool]] = []
    size = 0
    for text, cut in split:
        for part, (start, end) in enumerate(((0, cut), (cut, len(text)))):
            for found in PIECES.finditer(text, start, end):
                batch.append((part, found[0], found.end() == end))
                size += len(found[0])
                if size >= BATCH_CHARACTERS:
                    yield batch
                    progress.add(sum(len(piece.encode("utf-8")) for _, piece, _ in batch))
                    batch, size = [], 0
    if batch:
        yield batch


class Progress:
    """Progress prints a line after two seconds and then every ten, and shows the launcher that work goes on.

    Args:
        doing: a word or two for the work.
        total: bytes in all; None where the number is not known.
    """

    def __init__(self, doing: str, total: int | None = None) -> None:
        self.doing, self.total = doing, total
        self.done, self.next = 0, time.monotonic() + FIRST_SECONDS

    def add(self, nbytes: int) -> None:
        """Count bytes that are done."""
        distributed.alive()
        self.done += nbytes
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + PROGRESS_SECONDS
            of = "" if self.total is None else f" of {self.total / 1e6:.0f}"
            print(f"{self.doing}: {self.done / 1e6:.0f}{of} MB", flush=True)
