"""Conversations from JSON files: rows of four kinds, found, read, and split; or the standard library's docstrings.

kind, conversations = read_conversations(Path("train.jsonl"))
training, held = split(conversations, 0.1)
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kaggle_mgpu.machine import session

SUFFIXES = (".jsonl", ".json")
Conversation = list[dict[str, str]]
# The kinds of rows: which fields one must have, and may have. The first that fits is taken.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "instruction/input/output": (("instruction", "output"), ("input",)),
    "system/user/assistant": (("user", "assistant"), ("system",)),
    "input/target": (("input", "target"), ()),
}


# Rows of files
def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a .jsonl file, or of the list in a .json file, and its place: "train.json, line 7".

    Raises:
        ValueError: what is no JSON, with its place.
    """
    if file.suffix.lower() == ".jsonl":
        with file.open("rb") as lines:
            for number, content in enumerate(lines, 1):
                if content.strip():
                    try:
                        yield f"{file}, line {number}", json.loads(content.decode("utf-8-sig"))
                    except ValueError as error:
                        raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from None
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got byte {error.object[error.start]:#x}") from None
    decoder, position, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal position, line
        while position < len(text) and text[position] in characters:
            line += text[position] == "\n"
            position += 1

    # row by row, since json.load would not say on which line a row begins
    space = " \t\r\n"
    skip(space)
    if text[position : position + 1] != "[":
        raise ValueError(
            f"{file}, line {line}: expected a list of rows, beginning with '['. A file with a row on each line is "
            f"called .jsonl"
        )
    position += 1
    skip(space)
    while text[position : position + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from None
        yield f"{file}, line {line}", row
        line += text.count("\n", position, end)
        position = end
        skip(space)
        if text[position : position + 1] == ",":
            position += 1
            skip(space)
        elif position < len(text) and text[position] != "]":
            raise ValueError(f"{file}, line {line}: expected ',' or ']' after a row, got {short(text[position:])}")
        if position >= len(text):
            raise ValueError(f"{file}, line {line}: the list has no end: expected ']'")
    position += 1
    skip(space)
    if position < len(text):
        raise ValueError(f"{file}, line {line}: expected nothing after the list, got {short(text[position:])}")


def kind_of(row: Any) -> str | None:
    """Which of KINDS a row is; None: none."""
    if not isinstance(row, dict):
        return None
    return next((kind for kind, (needed, _) in KINDS.items() if all(name in row for name in needed)), None)


def _conversation(kind: str, row: dict[str, Any], place: str) -> Conversation:
    """The row as messages with a role and a content. Raises ValueError where it is none, or nothing is answered."""
    if kind == "messages":
        found = row["messages"]
        if not isinstance(found, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
        ):
            raise ValueError(f"{place}: expected messages with a role and a content, both text, got {short(found)}")
        conversation = [{"role": m["role"], "content": m["content"]} for m in found]
    else:
        needed, optional = KINDS[kind]
        for name in (*needed, *optional):
            if not isinstance(row.get(name, ""), str) and not (name in optional and row[name] is None):
                raise ValueError(f"{place}: expected text in {name!r}, got {short(row[name])}")
        if kind == "system/user/assistant":
            conversation = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            asked, answer = row["user"], row["assistant"]
        elif kind == "input/target":
            conversation, asked, answer = [], row["input"], row["target"]
        else:
            given = row.get("input") or ""
            conversation, answer = [], row["output"]
            asked = row["instruction"] + (f"\n\n{given}" if given.strip() else "")
        conversation += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in conversation):
        raise ValueError(f"{place}: nothing is answered: expected a message of the assistant that is not empty")
    for message in conversation:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            broken = error.object[error.start]
            raise ValueError(f"{place}: half of a surrogate pair, {broken!a}, which is no character") from None
    if conversation[0]["role"] == "assistant":
        raise ValueError(f"{place}: begins with the assistant: expected a question before its answer")
    return conversation


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_conversations(path: Path) -> tuple[str, list[Conversation]]:
    """The kind of rows and the conversations in a .json or .jsonl file, or in all those of a folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a row of no kind, or of another kind than the first, with its file and line.
    """
    if path.is_dir():
        listed = (session.find(f"*{end}", [path], limit=session.MOST_ENTRIES, ignore_case=True) for end in SUFFIXES)
        files = sorted(file for files in listed for file in files)
        if not files:
            raise FileNotFoundError(f"data_path: no {' or '.join(SUFFIXES)} file in {path}")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"data_path: no such file or folder: {path}")
    kind, first, conversations = "", "", []
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"data_path: expected {' or '.join(SUFFIXES)}, got {file}")
        for place, row in rows(file):
            found = kind_of(row)
            if found is None:
                got = f"the fields {', '.join(row) or '(none)'}" if isinstance(row, dict) else short(row)
                raise ValueError(f"{place}: expected a row with the fields of one of {', '.join(KINDS)}; got {got}")
            kind, first = kind or found, first or place
            if found != kind:
                raise ValueError(
                    f"{place}: a row of {found}, but {first} is one of {kind}. Mixed rows are refused: their "
                    f"answers may mean different things. Put each kind into a file of its own."
                )
            conversations.append(_conversation(kind, row, place))
    if not conversations:
        raise ValueError(f"{path}: no rows")
    return kind, conversations


def choose_source(data_path: str | None) -> tuple[Path | None, str]:
    """Where the conversations come from (None: the embedded pairs), and why."""
    if data_path is not None:
        return Path(data_path).expanduser().resolve(), "data_path"
    found = []
    for suffix in SUFFIXES:
        for file in session.find(f"*{suffix}", ignore_case=True):
            try:  # an earlier run's metrics and a model's configuration may be among the inputs
                _, row = next(rows(file))
                if kind_of(row):
                    found.append((file.stat().st_size, file))
            except (ValueError, OSError, StopIteration):
                continue
    if found:
        which = f"the largest of {len(found)} files" if len(found) > 1 else "the only file"
        return max(found)[1], f"{which} of conversations among the inputs"
    return None, "no data_path, and no file of conversations among the inputs"


def embedded() -> list[Conversation]:
    """Questions and answers without a download: what the functions and classes of the standard library do, in the
    first paragraph of their docstrings. Read from the source files, so nothing is imported. About 2 000 pairs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            text = " ".join(re.split(r"\n\s*\n", ast.get_docstring(child) or "")[0].split())
            # a signature, or a fragment, is no answer
            if 20 <= len(text) <= 200 and text[-1] == "." and text[0].isalpha() and f"{child.name}(" not in text:
                pairs.setdefault(text, f"What {'is' if isinstance(child, ast.ClassDef) else 'does'} {name}")
            if isinstance(child, ast.ClassDef):
                visit(child, name)

    for file in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name.split(".")[0] in sys.stdlib_module_names and "._" not in f".{name}":
            try:
                visit(ast.parse(file.read_text(encoding="utf-8")), name)
            except (SyntaxError, ValueError, OSError):  # somebody's edit; the rest will do
                continue
    return [
        [
            {"role": "user", "content": f"{question}{'?' if question.startswith('What is') else ' do?'}"},
            {"role": "assistant", "content": answer},
        ]
        for answer, question in pairs.items()
    ]


def split(conversations: Sequence[Conversation], val_fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, held out). Those that begin alike land on the same side; it depends on contents alone."""
    groups: dict[str, list[int]] = {}
    for index, conversation in enumerate(conversations):
        end = next(i for i, message in enumerate(conversation) if message["role"] == "assistant")
        digest = hashlib.sha256(json.dumps(conversation[:end]).encode()).hexdigest()
        groups.setdefault(digest, []).append(index)
    wanted, held = int(val_fraction * len(conversations)), set[int]()
    for digest in sorted(groups):
        if len(held) + len(groups[digest]) <= wanted:
            held.update(groups[digest])
    both: tuple[list[Conversation], list[Conversation]] = ([], [])
    for index, conversation in enumerate(conversations):
        both[index in held].append(conversation)
    return both
