"""Find the files of a `data_path` and read their rows, for the recipes that read tables and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kaggle_mgpu.machine import session


def data_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return [path] for a file; for a folder, all files with these suffixes in it and below, sorted by path.

    Args:
        suffixes: in lower case, with the dot; a file's suffix may be in either case.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no such file.
        ValueError: the file has another suffix.
    """
    if path.is_dir():
        found = (session.find(f"*{end}", [path], limit=session.MOST_ENTRIES, ignore_case=True) for end in suffixes)
        files = sorted(file for files in found for file in files if file.is_file())
        if not files:
            raise FileNotFoundError(f"data_path: no {', '.join(suffixes)} file in {path}")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"data_path: no such file or folder: {path}")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"data_path: expected a file ending in {' or '.join(suffixes)}, got {path}")
    return [path]


def jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the row in each line of a .jsonl file with its place, "train.jsonl, line 7"; skip empty lines.

    Raises:
        ValueError: a line is not valid JSON.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: not valid JSON: {error}") from None
            yield place, row


def parquet_rows(file: Path, text_field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a .parquet file with its place, "train.parquet, row 7".

    Args:
        text_field: the only column to read. None: all columns.

    Raises:
        ImportError: the package pyarrow is missing.
        ValueError: the file is not readable, or has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{file}: reading parquet needs the package `pyarrow`: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if text_field is not None and text_field not in names:
            raise ValueError(f"{file}: expected a column {text_field!r} (setting text_field), got the columns {names}")
        batches = table.iter_batches(columns=None if text_field is None else [text_field])
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{file}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable .parquet file: {error}") from None
