"""Turn conversations into packs of tokens. Only answers are learnt, and packed conversations do not see each other.

    examples, left_out = encode(tokenizer, conversations, max_length=1024)
    batch = Packs(store, pack(lengths, 1024)).batch(torch.tensor([0, 1]))

A sample is a pack: several examples one after the other, up to max_length tokens. Positions restart at 0 in each
example. `segments` numbers the examples, for a block-diagonal mask, so no token sees another example. Packs depend on
the examples' lengths alone, so a run is the same on any number of GPUs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kaggle_mgpu.parallel import distributed

from .reading import Conversation, is_answer, short

IGNORED = -100


# Tokens
@dataclass(frozen=True)
class Example:
    """Example holds the tokens of a conversation; `learnt` is True for tokens of an answer."""

    ids: list[int]
    learnt: list[bool]
    prompt: int
    """Number of tokens before the last answer: the prompt of generation."""
    answer: str
    """The text of the last answer."""
    earlier: tuple[tuple[int, str], ...] = ()
    """(number of tokens before the answer, text of the answer) for each earlier answer."""

    def cut(self, length: int) -> Example:
        """Return an example of the first `length` tokens, without the answers that begin after these tokens."""
        turns = [turn for turn in (*self.earlier, (self.prompt, self.answer)) if turn[0] < length]
        (prompt, answer), earlier = turns[-1], tuple(turns[:-1])
        return replace(
            self, ids=self.ids[:length], learnt=self.learnt[:length], prompt=prompt, answer=answer, earlier=earlier
        )


@dataclass
class LeftOut:
    """LeftOut counts the examples and tokens beyond max_length."""

    truncated: int = 0
    """Number of examples cut at the end."""
    tokens: int = 0
    """Number of answer tokens cut off."""
    dropped: int = 0
    """Number of examples left out, because their question alone is too long."""


def encode(tokenizer: Any, conversations: Sequence[Conversation], max_length: int) -> tuple[list[Example], LeftOut]:
    """Encode conversations by the tokenizer's chat template, mark answers, and cut at max_length tokens.

    For each answer the template renders the messages before it with the generation prompt, then the messages with the
    answer. The added tokens are learnt: the answer and its end mark. Some templates change an answer once another
    message follows (for example, leave out the reasoning). Then each answer becomes the end of a separate example.

    Raises:
        ValueError: the template refuses a conversation, leaves out a tool call, or changes the messages before an
            answer once the answer follows, even where the answer ends the example.
    """
    examples, left_out = [], LeftOut()
    for number, conversation in enumerate(conversations):
        if number % 1000 == 0:
            distributed.alive()
        for example in _examples(tokenizer, conversation):
            if len(example.ids) > max_length:
                left_out.tokens += sum(example.learnt[max_length:])
                if not any(example.learnt[1:max_length]):
                    left_out.dropped += 1
                    continue
                left_out.truncated += 1
                example = example.cut(max_length)
            examples.append(example)
    return examples, left_out


def _examples(tokenizer: Any, conversation: Conversation) -> list[Example]:
    learnt = [i for i, message in enumerate(conversation) if is_answer(message)]
    for groups in ([learnt], [[answer] for answer in learnt]):
        made = [_marked(tokenizer, conversation[: group[-1] + 1], group) for group in groups]
        if None not in made:
            return [example for example in made if example is not None]
    last = conversation[: learnt[-1] + 1]
    raise ValueError(
        "the tokenizer's chat template renders a question differently when its answer follows, so the beginning of the "
        f"answer cannot be found. Question alone: {short(_render(tokenizer, last[:-1], True))}; question with "
        f"answer: {short(_render(tokenizer, last))}. Give the tokenizer another chat_template."
    )


def _marked(tokenizer: Any, conversation: Conversation, learnt: list[int]) -> Example | None:
    """Return an example with the messages at the indices `learnt` as answers; None if their places are unknown.

    A place is unknown if the text up to an answer is not the beginning of the whole text.

    Raises:
        ValueError: the template leaves out the tool call of an answer.
    """
    whole, spans, texts = _render(tokenizer, conversation), [], []
    for i in learnt:
        before = _render(tokenizer, conversation[:i], prompt=True)
        after = _render(tokenizer, conversation[: i + 1])
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            return None
        answer = conversation[i]
        spans.append((len(before), _end(before, after, answer["content"])))
        texts.append(answer["content"])
        if "tool_calls" in answer:  # the text that a model would generate for these calls
            texts[-1] = tokenizer.decode(_ids(tokenizer, whole[slice(*spans[-1])]), skip_special_tokens=True).strip()
            missing = [n for call in answer["tool_calls"] if (n := call["function"]["name"]) not in texts[-1]]
            if missing:
                raise ValueError(
                    f"the tokenizer's chat template leaves out the call of the tool {missing[0]!r}: it renders the "
                    f"answer as {short(texts[-1])}. Take a model whose template has tool calls, or remove such rows."
                )
    return _example(tokenizer, whole, spans, texts)


def _render(tokenizer: Any, messages: Conversation, prompt: bool = False) -> str:
    from jinja2 import TemplateError  # installed, since transformers needs jinja2 for templates

    tools = messages[0].get("tools")
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation ({type(error).__name__}: {error}): "
            f"{short(messages)}. Change such rows, or give the tokenizer another chat_template."
        ) from None
    return text


def _end(before: str, after: str, content: str) -> int:
    """Return the index in `after` of the answer's end: after its end mark, without the white space that follows.

    If the template adds no end mark, the answer ends with the text.
    """
    added = after[len(before) :]
    marked = added.rstrip()
    return len(before) + (len(marked) if marked != content.rstrip() else len(added))


def _example(tokenizer: Any, text: str, spans: list[tuple[int, int]], answers: list[str]) -> Example:
    """Return the example of a text with `answers` in the spans: tokens within the spans are learnt.

    If a token would cross the border of a span, the pieces of text between the borders are tokenized separately.
    """
    cuts = sorted({0, len(text), *(end for span in spans for end in span)})
    ids = _ids(tokenizer, text)
    counts = [len(_ids(tokenizer, text[:cut])) for cut in cuts[:-1]] + [len(ids)]
    starts = {start for start, _ in spans}
    if any(_ids(tokenizer, text[:cut]) != ids[:count] for cut, count in zip(cuts[1:-1], counts[1:-1], strict=True)):
        pieces = [_ids(tokenizer, text[a:b]) for a, b in itertools.pairwise(cuts)]
        ids = [token for piece in pieces for token in piece]
        counts = [0, *np.cumsum([len(piece) for piece in pieces]).tolist()]
    learnt = [False] * len(ids)
    for cut, a, b in zip(cuts[:-1], counts[:-1], counts[1:], strict=True):
        if cut in starts:
            learnt[a:b] = [True] * (b - a)
    prompts = [counts[cuts.index(start)] for start, _ in spans]
    *earlier, (prompt, answer) = zip(prompts, answers, strict=True)
    return Example(ids, learnt, prompt, answer, tuple(earlier))


def _ids(tokenizer: Any, text: str) -> list[int]:
    # the template has already written the special tokens
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


# On disk
def write_examples(folder: Path, part: str, examples: Sequence[Example]) -> str:
    """Write the examples as PART.*.npy and their last answers as PART.json, and return a digest of the arrays."""
    ids = [np.asarray(example.ids, np.int32) for example in examples]
    arrays = {
        "tokens": np.concatenate(ids) if ids else np.zeros(0, np.int32),
        "learnt": np.concatenate([np.asarray(e.learnt, bool) for e in examples]) if ids else np.zeros(0, bool),
        "starts": np.cumsum([0, *map(len, ids)]).astype(np.int64),
        "prompts": np.array([example.prompt for example in examples], np.int32),
    }
    digest = hashlib.sha256(part.encode())
    for name, array in arrays.items():
        digest.update(array.tobytes())
        np.save(folder / f"{part}.{name}.npy", array)
    (folder / f"{part}.json").write_text(json.dumps([example.answer for example in examples]), encoding="utf-8")
    return digest.hexdigest()


class Examples:
    """Examples reads the files of `write_examples`, memory-mapped at first use, and is pickled as a path."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{self.part}.{name}.npy", mmap_mode="r")
        return self._arrays[name]

    def __len__(self) -> int:
        return len(self.array("prompts"))

    @property
    def lengths(self) -> list[int]:
        return list(np.diff(self.array("starts")).tolist())

    def __getitem__(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return token ids int32[length], and bool[length], True for learnt tokens."""
        a, b = self.array("starts")[index : index + 2]
        return self.array("tokens")[a:b], self.array("learnt")[a:b]

    def prompt(self, index: int) -> list[int]:
        """Return the tokens before the last answer."""
        return list(self[index][0][: self.array("prompts")[index]].tolist())

    def answers(self) -> list[str]:
        """Return the text of each example's last answer."""
        return list(json.loads((self.folder / f"{self.part}.json").read_text(encoding="utf-8")))


# Packs
def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over packs of at most `capacity` tokens: best fit, longest first.

    The number of packs is at most 11/9 of the smallest possible, plus 4 (best fit decreasing: Johnson et al. 1974).

    >>> pack([5, 3, 3, 2, 2], 8)
    [[0, 1], [2, 3, 4]]
    """
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # packs by the room left in them
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            number, left = len(packs), capacity
            packs.append([])
        else:
            left = rooms[at]
            number = room[left].pop()
            if not room[left]:
                del rooms[at]
        packs[number].append(index)
        left -= lengths[index]
        if not room.setdefault(left, []):
            insort(rooms, left)
        room[left].append(number)
    return packs


class Packs(Dataset[dict[str, Tensor]]):
    """Packs is a dataset of packs and, for evaluation, of batches of prompts to answer.

    Args:
        packs: the indices of the examples in each pack.
        prompt_batches: batches of indices of examples to answer. Each batch is one sample of the dataset. These samples
            are spread evenly among the packs, so that each rank gets a share of them.
    """

    def __init__(
        self, examples: Examples, packs: list[list[int]], prompt_batches: Sequence[Sequence[int]] = ()
    ) -> None:
        self.examples, self.packs, self.prompt_batches = examples, packs, list(prompt_batches)
        self.sample_lengths: list[int] | None = None
        count = len(self.prompt_batches)
        total = len(packs) + count
        self.prompt_batch_at = {(2 * number + 1) * total // (2 * count): number for number in range(count)}
        self.pack_at = [at for at in range(total) if at not in self.prompt_batch_at]

    def __len__(self) -> int:
        return len(self.packs) + len(self.prompt_batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a batch of one pack."""
        return self.batch(torch.tensor([index]))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return a batch of the samples at `indices`: B packs, padded to T tokens (a multiple of 8 for tensor cores).

        ids, positions, segments: int64[B, T]; segments count from 1, 0 is padding. targets: int64[B, A], the ids of the
        learnt tokens; at: int64[B, A], the position before each. A is the largest number of learnt tokens in a pack;
        shorter rows are filled with -100 in targets and 0 in at. generate: int64[G], only if the dataset has prompts:
        indices into `self.prompt_batches`.
        """
        chosen = indices.tolist()
        generate = [self.prompt_batch_at[i] for i in chosen if i in self.prompt_batch_at]
        if self.prompt_batches:
            number = {at: n for n, at in enumerate(self.pack_at)}
            chosen = [number[i] for i in chosen if i in number]
        rows = [row_of([self.examples[i] for i in self.packs[n]]) for n in chosen]
        width = -(-max((len(row["ids"]) for row in rows), default=0) // 8) * 8
        learnt = max((len(row["at"]) for row in rows), default=0)
        batch = {}
        for name, fill, size in (
            ("ids", 0, width), ("positions", 0, width), ("segments", 0, width), ("at", 0, learnt),
            ("targets", IGNORED, learnt),
        ):  # fmt: skip
            array = np.full((len(rows), size), fill, np.int64)
            for row, values in zip(array, rows, strict=True):
                row[: len(values[name])] = values[name]
            batch[name] = torch.from_numpy(array)
        if self.prompt_batches:
            batch["generate"] = torch.tensor(generate, dtype=torch.int64)
        return batch


def row_of(examples: list[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of one pack, as in `Packs.batch` but without padding: shapes [T], of at and targets [A]."""
    lengths = [len(ids) for ids, _ in examples]
    ids = np.concatenate([ids for ids, _ in examples])
    learnt = np.concatenate([learnt for _, learnt in examples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    # a segment's first token has nothing before it to be predicted from
    targets_at = np.flatnonzero(learnt & (positions > 0))
    return {
        "ids": ids,
        "positions": positions,
        "segments": np.repeat(np.arange(1, len(lengths) + 1), lengths),
        "at": targets_at - 1,
        "targets": ids[targets_at],
    }


def block_mask(segments: Tensor) -> Tensor:
    """Return bool[B, 1, T, T]: a token sees itself and earlier tokens of its own segment."""
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal
