"""Read conversations from files (.jsonl, .json, .csv, .parquet) with one of several kinds of rows, and split them.

    kind, conversations = read_conversations(Path("train.jsonl"))
    training, held = split(conversations, 0.1)

Without a file `embedded` makes questions and answers from the standard library's docstrings.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kaggle_mgpu.machine import session

from .._files import data_files, jsonl_rows, parquet_rows

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Conversation = list[dict[str, Any]]
"""Messages with role and content, perhaps tool_calls. The first message holds the row's `tools`, if there are any."""
LISTS = ("messages", "conversations")
"""Kinds of rows with a list of messages: role and content, or ShareGPT's from and value."""
PAIRS = {
    "instruction/input/output": ("instruction", "output"),
    "instruction/context/response": ("instruction", "response"),
    "system/user/assistant": ("user", "assistant"),
    "input/target": ("input", "target"),
    "prompt/completion": ("prompt", "completion"),
    "prompt/response": ("prompt", "response"),
    "question/answer": ("question", "answer"),
}
"""Kinds of rows with a question and its answer -> the fields of question and answer. The first kind is Alpaca's, the
second Dolly's. The two fields may also hold lists of messages, as TRL's prompt and completion do."""
ADDITIONS = ("input", "context")
"""Optional fields with text that belongs to the question."""
SYSTEM = ("system", "system_prompt")
"""Optional fields with the system's message, in rows of every kind."""
KINDS = (*LISTS, *PAIRS)
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
"""ShareGPT's names of roles -> those of chat templates."""


# Rows of files
def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file with its place: "train.json, line 7". A .json file holds a list of rows.

    Raises:
        ImportError: a .parquet file without the package pyarrow.
        ValueError: the content does not fit the file's suffix; the message names the place.
    """
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file)
        return
    if file.suffix.lower() == ".parquet":
        yield from parquet_rows(file)
        return
    if file.suffix.lower() == ".jsonl":
        yield from jsonl_rows(file)
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
            f"{file}, line {line}: expected a list of rows, beginning with '['. A file with one row "
            f"per line needs the suffix .jsonl"
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


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)  # Python's own limit, 131 072 characters, is less than a long conversation
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines, strict=True)
            for row in table:
                place = f"{file}, line {table.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: expected a value for each column: {', '.join(table.fieldnames or ())}")
                yield place, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a readable .csv in UTF-8: {error}") from None


def kind_of(row: Any) -> str | None:
    """Return the first of KINDS to fit the fields of a row; None if no kind fits."""
    if not isinstance(row, dict):
        return None
    lists = [kind for kind in LISTS if kind in row]
    return next(iter([*lists, *(kind for kind, (a, b) in PAIRS.items() if a in row and b in row)]), None)


def is_answer(message: dict[str, Any]) -> bool:
    """Return whether a message is an answer to learn: of the assistant, with text or with calls of tools."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _message(message: Any) -> dict[str, Any] | None:
    """Return a message with role and content as text, or None if role, content or a tool call is malformed.

    A content of several text parts is joined. Arguments of tool calls are decoded from JSON, since chat templates
    encode them again.
    """
    if not isinstance(message, dict):
        return None
    kept = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    if calls := message.get("tool_calls"):
        message = {**message, "content": message.get("content") or ""}
        try:
            functions = [call.get("function", call) for call in calls]
            given = [(str(f["name"]), f.get("arguments") or {}) for f in functions]
            given = [(name, json.loads(found) if isinstance(found, str) else found) for name, found in given]
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        kept["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": found}} for name, found in given
        ]
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content, **kept}


def _conversation(kind: str, row: dict[str, Any], place: str) -> Conversation:
    """Return the row as messages with a role and a content.

    Raises:
        ValueError: fields of another type, no answer, an answer before any question, or half of a surrogate pair.
    """
    conversation: Conversation = []
    system = _text(row, SYSTEM, place)
    fields = (kind,) if kind in LISTS else PAIRS[kind]
    if kind in LISTS or all(isinstance(row[name], list) for name in fields):
        listed = [m for name in fields for m in (row[name] if isinstance(row[name], list) else [None])]
        for message in listed:
            if (made := _message(message)) is None:
                got = short(message or row[fields[0]])
                raise ValueError(f"{place}: expected messages with a role and a content, both text, got {got}")
            conversation.append(made)
    else:
        asked, answer = PAIRS[kind]
        for name in fields:
            if not isinstance(row[name], str):
                raise ValueError(f"{place}: expected text in {name!r}, got {short(row[name])}")
        given = _text(row, [name for name in ADDITIONS if name != asked], place)
        content = row[asked] + (f"\n\n{given}" if given else "")
        conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": row[answer]}]
    if system and not any(message["role"] == "system" for message in conversation):
        conversation.insert(0, {"role": "system", "content": system})
    if not any(is_answer(message) for message in conversation):
        raise ValueError(f"{place}: no answer: expected a message of the assistant that is not empty")
    for message in conversation:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            broken = error.object[error.start]
            raise ValueError(f"{place}: {broken!a} is half of a surrogate pair, not a character") from None
    if conversation[0]["role"] == "assistant":
        raise ValueError(f"{place}: the first message is the assistant's: expected a question before its answer")
    if tools := row.get("tools"):
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools
        except ValueError:
            tools = None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"{place}: expected a list of tool descriptions in 'tools', got {short(row['tools'])}")
        conversation[0]["tools"] = tools
    return conversation


def _text(row: dict[str, Any], names: Sequence[str], place: str) -> str:
    """Return the texts in the optional fields `names` of a row, joined by blank lines; "" if there are none.

    Raises:
        ValueError: a field holds something else.
    """
    for name in names:
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{place}: expected text in {name!r}, got {short(row[name])}")
    return "\n\n".join(row[name] for name in names if (row.get(name) or "").strip())


def short(value: Any) -> str:
    """Return a value as JSON, at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_conversations(path: Path) -> tuple[str, list[Conversation]]:
    """Return the kind of rows and the conversations in a file, or in all files of a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row of no kind, or of another kind than the first, with its file and line.
    """
    kind, first, conversations = "", "", []
    for file in data_files(path, SUFFIXES):
        for place, row in rows(file):
            found = kind_of(row)
            if found is None:
                got = f"the fields {', '.join(row) or '(none)'}" if isinstance(row, dict) else short(row)
                raise ValueError(f"{place}: expected a row with the fields of one of {', '.join(KINDS)}; got {got}")
            kind, first = kind or found, first or place
            if found != kind:
                raise ValueError(
                    f"{place}: a row of kind {found}, but {first} is of kind {kind}. Mixed kinds are refused, since "
                    f"their answers may mean different things. Put each kind into a file of its own."
                )
            conversations.append(_conversation(kind, row, place))
    if not conversations:
        raise ValueError(f"{path}: no rows")
    return kind, conversations


def choose_source(data_path: str | None) -> tuple[Path | None, str]:
    """Return the file or folder of conversations (None: those of `embedded`), and the reason for the choice."""
    if data_path is not None:
        return Path(data_path).expanduser().resolve(), "data_path"
    found = []
    for suffix in SUFFIXES:
        for file in session.find(f"*{suffix}", ignore_case=True):
            try:  # an earlier run's metrics and a model's configuration may be among the inputs
                _, row = next(rows(file))
                if kind_of(row):
                    found.append((file.stat().st_size, file))
            except Exception:  # the libraries that read files raise many kinds of errors
                continue
    if found:
        which = f"the largest of {len(found)} files" if len(found) > 1 else "the only file"
        return max(found)[1], f"{which} of conversations among the inputs"
    return None, "no data_path, and no file of conversations among the inputs"


def embedded() -> list[Conversation]:
    """Return about 2 000 questions and answers about the standard library's functions and classes.

    The answers are the first paragraphs of docstrings, read from the source files without importing them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            text = " ".join(re.split(r"\n\s*\n", ast.get_docstring(child) or "")[0].split())
            # leave out signatures and fragments
            if 20 <= len(text) <= 200 and text[-1] == "." and text[0].isalpha() and f"{child.name}(" not in text:
                pairs.setdefault(text, f"What {'is' if isinstance(child, ast.ClassDef) else 'does'} {name}")
            if isinstance(child, ast.ClassDef):
                visit(child, name)

    for file in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name.split(".")[0] in sys.stdlib_module_names and "._" not in f".{name}":
            try:
                visit(ast.parse(file.read_text(encoding="utf-8")), name)
            except (SyntaxError, ValueError, OSError):  # skip a file that somebody has damaged
                continue
    return [
        [
            {"role": "user", "content": f"{question}{'?' if question.startswith('What is') else ' do?'}"},
            {"role": "assistant", "content": answer},
        ]
        for answer, question in pairs.items()
    ]


def split(conversations: Sequence[Conversation], val_fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to train on, and the held-out ones, chosen by a digest of their contents.

    Conversations with the same messages before the first answer are on the same side.
    """
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
