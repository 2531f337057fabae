"""Prepare once, on rank 0: find the model and write the conversations as tokens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaggle_mgpu.machine import session

from . import data, models, reading
from .config import Config


@dataclass(frozen=True)
class Prepared:
    """Prepared describes the model, and the folder of conversations as tokens.

    kind: the kind of the rows, from `reading.KINDS` or "embedded". template: a note about the chat template. train,
    val: numbers of examples. train_tokens: tokens of the training examples. *_learnt: tokens of answers. truncated,
    truncated_tokens, dropped: truncated, tokens and dropped of `data.LeftOut`, over both parts.
    """

    folder: str
    model: str
    """The model's folder, or its name on the hub."""
    source: str
    """The file or folder of the data, and the reason for this choice."""
    digest: str
    """A digest of tokens and model; a run continues only on data and model with the same digest."""
    kind: str
    template: str
    train: int
    val: int
    train_tokens: int
    train_learnt: int
    val_learnt: int
    truncated: int
    truncated_tokens: int
    dropped: int


def prepare(config: Config) -> Prepared:
    """Find or make the model; read, encode and write the conversations under output_dir/data, unless they exist.

    Raises:
        ValueError: a row or the model cannot be read, the chat template fails, no answer begins within max_length
            tokens, or a conversation is longer than the model's positions.
        FileNotFoundError: no such model or data.
    """
    path, reason = reading.choose_source(config.data_path)
    if path is None:
        kind, source, conversations = "embedded", "docstrings of the standard library", reading.embedded()
    else:
        kind, conversations = reading.read_conversations(path)
        source = str(path)
    if config.val_path is not None:
        training, held = conversations, reading.read_conversations(Path(config.val_path).expanduser())[1]
    else:
        training, held = reading.split(conversations, config.val_fraction)
    texts = hashlib.sha256(json.dumps([training, held]).encode()).hexdigest()
    out = Path(config.output_dir).resolve()
    if config.model is None:
        folder = out / "base" / hashlib.sha256(f"{texts} {config.seed} {models.TINY}".encode()).hexdigest()[:16]
        if not (folder / "config.json").exists():
            with complete_or_absent(folder) as temporary:
                words = [message["content"] for conversation in training for message in conversation]
                models.make_tiny(temporary, words, config.seed)
        model = str(folder)
    else:
        model = models.find(config.model)
    tokenizer, template = models.tokenizer(model)
    of_model = models.digest(model)
    settings = json.dumps([3, texts, of_model, tokenizer.chat_template, config.max_length])
    folder = out / "data" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = session.find_prepared(folder, "facts.json")
    if not (folder / "facts.json").exists():
        with complete_or_absent(folder) as temporary:
            (temporary / "facts.json").write_text(json.dumps(_encode(temporary, tokenizer, training, held, config)))
    facts = json.loads((folder / "facts.json").read_text())
    digest = hashlib.sha256(f"{facts.pop('digest')} {of_model} {config.packing}".encode()).hexdigest()[:16]
    if not facts["train"] or (held and not facts["val"]):
        raise ValueError(
            f"{source}: nothing to learn: of {len(training)} conversations to train on and {len(held)} held out, "
            f"{facts['train']} and {facts['val']} have an answer within max_length={config.max_length} tokens: raise "
            f"max_length"
        )
    limit = models.positions(model)
    longest = max(max(data.Examples(folder, part).lengths, default=0) for part in ("train", "val"))
    if limit is not None and longest > limit:  # on a GPU an index beyond the position embeddings aborts the process
        raise ValueError(
            f"max_length={config.max_length}: the longest conversation has {longest} tokens, but {model} has "
            f"{limit} positions: give max_length={limit}"
        )
    return Prepared(
        folder=str(folder), model=model, source=f"{source} ({reason})", kind=kind, template=template, digest=digest,
        **facts,
    )  # fmt: skip


class complete_or_absent:  # noqa: N801 (used like a function)
    """Give a temporary folder to fill in a `with` block; rename it to `folder` at the end, unless the block raises."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder.with_suffix(".tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.temporary, self.folder)


def _encode(
    folder: Path, tokenizer: Any, training: list[reading.Conversation], held: list[reading.Conversation], config: Config
) -> dict[str, Any]:
    facts: dict[str, Any] = {"truncated": 0, "truncated_tokens": 0, "dropped": 0}
    digests = []
    for part, conversations in (("train", training), ("val", held)):
        examples, left_out = data.encode(tokenizer, conversations, config.max_length)
        digests.append(data.write_examples(folder, part, examples))
        facts[part] = len(examples)
        facts[f"{part}_learnt"] = sum(sum(example.learnt[1:]) for example in examples)
        facts["truncated"] += left_out.truncated
        facts["truncated_tokens"] += left_out.tokens
        facts["dropped"] += left_out.dropped
        if part == "train":
            facts["train_tokens"] = sum(len(example.ids) for example in examples)
    return {**facts, "digest": " ".join(digests)}
