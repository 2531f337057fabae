"""The baselines: tables of the frequencies of single tokens and of pairs of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .training import TextGeneration


class Ngrams:
    """Unigram and bigram counts of a token stream (N + 1,), smoothed: p(b) = (count(b) + k) / (N + k V) and
    p(b | a) = (count(a b) + m p(b)) / (count(a) + m) (MacKay and Peto 1995).

    V is n_vocab, the number of ids. The first token only serves as context, so N tokens are counted. k and m are
    arguments of `losses`.
    """

    def __init__(self, stream: NDArray[Any], n_vocab: int) -> None:
        stream = stream.astype(np.int64)
        self.n_vocab = n_vocab
        self.counts = np.bincount(stream[1:], minlength=n_vocab)
        self.contexts = np.bincount(stream[:-1], minlength=n_vocab)
        self.pairs, self.pair_counts = np.unique(stream[:-1] * n_vocab + stream[1:], return_counts=True)

    def losses(self, stream: NDArray[Any], k: float, m: float) -> tuple[float, float]:
        """Return (unigram, bigram): the means of -ln p over all tokens of `stream` but the first."""
        stream = stream.astype(np.int64)
        a, b = stream[:-1], stream[1:]
        unigram = ((self.counts + k) / (self.counts.sum() + k * self.n_vocab))[b]
        at = np.minimum(np.searchsorted(self.pairs, a * self.n_vocab + b), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == a * self.n_vocab + b, self.pair_counts[at], 0)
        bigram = (count + m * unigram) / (self.contexts[a] + m)
        return float(-np.log(unigram).mean()), float(-np.log(bigram).mean())


def ngram_losses(train: NDArray[Any], val: NDArray[Any], n_vocab: int) -> tuple[float, float]:
    """Return the validation losses, nats per token, of a unigram and a bigram table of the training stream.

    Only the last 20 M tokens of the training stream are used. The smoothing weights k and m are chosen to minimise
    the loss on the last tenth of these tokens, with tables made from the other nine tenths. The final
    tables use all 20 M tokens.
    """
    train = np.asarray(train[-20_000_000:])
    cut = len(train) - max(2, len(train) // 10)
    tables, held = Ngrams(train[: cut + 1], n_vocab), train[cut:]
    k = min((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), key=lambda k: tables.losses(held, k, 1.0)[0])
    m = min((2.0**i for i in range(-2, 13)), key=lambda m: tables.losses(held, k, m)[1])
    return Ngrams(train, n_vocab).losses(val, k, m)


def baselines(task: TextGeneration) -> dict[str, float]:
    """Return the validation losses of frequency tables, to compare with the model's.

    The keys are unigram and bigram (nats per token), unigram_bits_per_byte and bigram_bits_per_byte. `ngram_losses`
    describes the smoothing.

    Raises:
        ValueError: nothing is held out.
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
