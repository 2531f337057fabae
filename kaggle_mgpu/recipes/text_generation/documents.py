"""Read text from .txt, .jsonl and .parquet files, or Python's help, and hold out a part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .._files import data_files, jsonl_rows, parquet_rows

SUFFIXES = (".txt", ".jsonl", ".parquet")
SLICE = 1_000_000
"""Characters of a long text that are encoded at a time, to hash or to cut the text."""

NLTK = Path("/usr/share/nltk_data/corpora")
"""Corpora on Kaggle's image: gutenberg is 18 books as text, brown 500 texts of 2,000 words with tags."""


def embedded_documents() -> list[str]:
    """Return the English text of `pydoc_data.topics` (Python's help(), PSF licence), about 0.37 MB.

    A fifth of the text repeats in several topics. A paragraph that a longer topic has too is left out, since held-out
    text must not occur in the training text.
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


def _brown(folder: Path) -> Iterator[str]:
    """Yield the documents of nltk's Brown corpus, ca01 to cr09, without the words' tags (The/at Fulton/np-tl)."""
    for file in sorted(folder.glob("c[a-r][0-9][0-9]")):
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in lines)
        yield "\n".join(text for text in texts if text) + "\n"


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of a .txt, .jsonl or .parquet file, or of all such files in a folder, by sorted path.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no such file.
        ValueError: a file, line or row is not text; the message gives its place.
        ImportError: a .parquet file, and no package pyarrow.
    """
    if path == NLTK / "brown":
        yield from _brown(path)
        return
    for file in data_files(path, SUFFIXES):
        rows = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix.lower()]
        for place, text in rows(file, text_field):
            if not isinstance(text, str):
                raise ValueError(f"{place}: expected a string in {text_field!r}, got {type(text).__name__}")
            if rows is _jsonl:  # JSON can hold half of a surrogate pair, which no UTF-8 file and no tokenizer can
                text = text.encode("utf-8", "replace").decode("utf-8")
            if text and not text.isspace():
                yield text


# Each of the three yields (place, text) for every row
def _txt(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        try:
            with file.open(encoding="utf-8-sig") as slices:  # read() would hold the text in memory three times
                text = "".join(iter(lambda: slices.read(SLICE), ""))
        except UnicodeDecodeError:
            text = file.read_text(encoding="utf-8-sig")  # raises the error with the place in the file, not in a slice
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected UTF-8 text, got byte {error.object[error.start]:#x} at position {error.start}"
        ) from None
    yield str(file), text


def _jsonl(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    for place, row in jsonl_rows(file):
        if not isinstance(row, dict) or text_field not in row:
            have = f"the fields {', '.join(map(repr, row))}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{place}: expected a JSON object with the field {text_field!r} (setting text_field), got {have}"
            )
        yield place, row[text_field]


def _parquet(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    for place, row in parquet_rows(file, text_field):
        yield place, row[text_field]


def digest_of(text: str) -> tuple[str, int]:
    """Return the hexadecimal SHA-256 and the number of a text's UTF-8 bytes, without a copy of all of them."""
    digest, size = hashlib.sha256(), 0
    for at in range(0, len(text), SLICE):
        data = text[at : at + SLICE].encode("utf-8")
        digest.update(data)
        size += len(data)
    return digest.hexdigest(), size


def plan_split(documents: Sequence[tuple[str, int]], val_fraction: float) -> list[int]:
    """Return the number of leading bytes of each document for training. The rest of the document is held out.

    Whole documents are held out, taken in the order of their digests. A document is held out if it fits into what is
    left of `val_fraction` of all bytes. Equal documents stay together. If the documents held out have less than half
    of `val_fraction` (one book, a few long files), the tail of the whole text is held out instead. The same
    documents in the same order give the same split.

    Args:
        documents: (hex digest, size in bytes) of each document.
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


def cut_at(text: str, cut: int) -> int:
    """Return the number of leading characters of a text that fit into `cut` UTF-8 bytes, reduced to whole lines.

    If no line ends in the last 1000 of these bytes, the last line is cut between characters. The text is encoded a
    million characters at a time, so that there is no second copy in memory.
    """
    index, before = 0, 0  # numbers of characters, and of their bytes, found to come before the cut
    while index < len(text):
        data = text[index : index + SLICE].encode("utf-8")
        if before + len(data) > cut:
            head = data[: cut - before].decode("utf-8", "ignore")  # drops a partial character
            index, before = index + len(head), before + len(head.encode("utf-8"))
            break
        index, before = min(index + SLICE, len(text)), before + len(data)
    if index in (0, len(text)):
        return index
    near = text[max(0, index - 1000) : index].encode("utf-8")
    line = near.rfind(b"\n", max(0, len(near) - 1000 + (cut - before)))
    return index if line < 0 else index - len(near[line + 1 :].decode("utf-8"))
