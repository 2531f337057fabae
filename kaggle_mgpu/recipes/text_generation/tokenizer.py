"""Tokenizers turn text into ids and back: UTF-8 bytes, or byte-level BPE trained on the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kaggle_mgpu import env

ALL_CORES = {"TOKENIZERS_PARALLELISM": "true"}
"""Environment variables with which `tokenizers` uses threads. `env.fix` turns the threads off, because a forked loader
process could deadlock."""
MOST_CHARACTERS = 100_000_000
"""Characters that a vocabulary is learnt from, at most."""


class Tokenizer(Protocol):
    """A Tokenizer turns text into ids and back.

    `n_vocab` is the number of ids. The last id is `separator`, between documents; no text is encoded to this id.
    """

    n_vocab: int
    separator: int

    def encode(self, text: str) -> list[int]: ...
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """ByteTokenizer takes UTF-8 bytes as ids, without training or installation."""

    n_vocab = 257
    separator = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class BPETokenizer:
    """BPETokenizer reads a tokenizer.json of the `tokenizers` package, and adds a separator after the last id."""

    def __init__(self, path: str | Path) -> None:
        self._bpe = tokenizers_package().Tokenizer.from_file(str(path))
        self.separator: int = self._bpe.get_vocab_size()
        self.n_vocab = self.separator + 1

    def encode(self, text: str) -> list[int]:
        return list(self._bpe.encode(text).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts on all cores; the ids are those of `encode`."""
        with env.variables(ALL_CORES):
            return [found.ids for found in self._bpe.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._bpe.decode([i for i in ids if i < self.separator]))

    @staticmethod
    def train(texts: Iterator[str], n_vocab: int, path: Path) -> None:
        """Train on the first 100 M characters of `texts`, and write tokenizer.json to `path`.

        Args:
            texts: many short texts are faster than a long one, since each core counts the words of one text at a time.
            n_vocab: ids in all, the separator included.
        """

        def some() -> Iterator[str]:
            left = MOST_CHARACTERS
            for text in texts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return

        t = tokenizers_package()
        bpe = t.Tokenizer(t.models.BPE())
        bpe.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = t.decoders.ByteLevel()
        # with all 256 bytes in the vocabulary no text is unknown
        alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
        trainer = t.trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
        with env.variables(ALL_CORES):
            bpe.train_from_iterator(some(), trainer)
        bpe.save(str(path))


def tokenizers_package() -> Any:
    """Import and return the package `tokenizers`.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer='bpe' needs the package `tokenizers`: pip install tokenizers, or use tokenizer='byte'"
        ) from None
    return tokenizers
