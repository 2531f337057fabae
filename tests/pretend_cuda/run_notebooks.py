"""Run notebooks' sources one after the other in this process, as a kernel does; print a JSON line of each one's errors.

    python tests/pretend_cuda/run_notebooks.py '{"text_generation": {"max_steps": 6}}'

Each runs in a folder of its own below the working directory. One process for all, since a kernel's start, torch's and
transformers' imports and the worker server take ten times what the training of a small model takes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jupytext
from IPython.core.interactiveshell import InteractiveShell

SOURCES = Path(__file__).parents[2] / "notebooks"


class Shell(InteractiveShell):
    """Draws into files, so there is no window to enable."""

    def enable_gui(self, gui: str | None = None) -> None:
        pass


def run(shell: InteractiveShell, name: str, given: dict[str, Any]) -> str:
    """Run the code cells of a notebook with these parameters; return the first error, or ""."""
    shell.reset()
    for cell in jupytext.read(SOURCES / f"{name}_kaggle_multigpu.py").cells:
        if cell.cell_type != "code":
            continue
        sources = [cell.source]
        if "parameters" in cell.metadata.get("tags", []):  # papermill's cell comes after the notebook's own
            sources.append("\n".join(["# Parameters", *(f"{key} = {value!r}" for key, value in given.items())]))
        for source in sources:
            done = shell.run_cell(source, store_history=True)
            error = done.error_before_exec or done.error_in_exec
            if error is not None:
                return f"{source[:200]}\n{type(error).__name__}: {error}"
    return ""


def main() -> None:
    shell, here = Shell.instance(), Path.cwd()
    for name, given in json.loads(sys.argv[1]).items():
        folder = here / name
        folder.mkdir()
        os.chdir(folder)
        print(json.dumps({"notebook": name, "error": run(shell, name, given)}), flush=True)


if __name__ == "__main__":
    main()
