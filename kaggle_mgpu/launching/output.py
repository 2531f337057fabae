"""Show rank 0's output in the notebook's cell, up to a limit."""

from __future__ import annotations

import codecs
import os
import re
import sys
from pathlib import Path
from typing import Any

_GLOO_LINE = re.compile(r"^\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. .*\n", re.MULTILINE)
"""A line that gloo of torch 2.10 prints for each new process group; only the log keeps it."""
CELL_CHARACTERS = 100_000
"""Limit of rank 0's output in the cell; after a longer output the cell also shows the log's last 20 lines."""


class Output:
    """Show rank 0's log in the cell as the log grows.

    The worker writes to its log file only, so a slow notebook never delays the worker. The log is shown up to byte
    `end`; the exception shows the traceback that follows there. With `quiet`, nothing at all is shown.
    """

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self.path, self.file = path, open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        self.file.seek(0, os.SEEK_END)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.quiet, self.shown, self.end = quiet, 0, sys.maxsize

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shown >= CELL_CHARACTERS:
            size = min(self.end, self.size())
            self.file.seek(max(self.file.tell(), size - 2000))
            lines = self.file.read(max(0, size - self.file.tell())).decode(errors="replace").splitlines()[1:]
            print("\n".join(["…", *lines[-20:]]), flush=True)
        self.file.close()

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def show(self, size: int) -> None:
        """Show what is new up to byte `size` of the log, until the cell has CELL_CHARACTERS."""
        if self.quiet or self.shown >= CELL_CHARACTERS:
            return
        room = min(CELL_CHARACTERS - self.shown, min(size, self.end) - self.file.tell())
        text = _GLOO_LINE.sub("", self.decoder.decode(self.file.read(max(0, room))))
        if not text:
            return
        self.shown += len(text)
        sys.stdout.write(text)
        if self.shown >= CELL_CHARACTERS:
            print(
                f"\n… more than {CELL_CHARACTERS} characters: {self.path} has all of them; the last lines follow at "
                f"the end"
            )
        sys.stdout.flush()
