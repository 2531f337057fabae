"""Find the files of a `data_path`, for the recipes that read tables and texts."""

from __future__ import annotations

from pathlib import Path

from kaggle_mgpu.machine import session


def data_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return a file, or all files with these suffixes in a folder and below, sorted by path.

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
        raise ValueError(f"data_path: expected one of {', '.join(suffixes)}, got {path}")
    return [path]
