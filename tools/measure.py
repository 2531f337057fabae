"""Measure again what takes minutes, and write the figures into the table of tools/bench/README.md.

    python tools/measure.py                     # all of MEASURED; `make measure` does the same
    python tools/measure.py resume saving       # commands that contain one of these words

The table's rows are found by their commands; rows of other commands (hours, GPUs, other packages) stay as they are.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tools" / "bench" / "README.md"

MEASURED = {
    "python tools/bench/saving.py": (
        r"stall / torch\.save +([\d.]+).*step meanwhile / alone +([\d.]+)",
        "{0} of it; {1} x as long",
    ),
    "python tools/bench/resume.py": (r"ratio, median of \d+ pairs: ([\d.]+)", "{0} x"),
    "python tools/bench/panel.py": (
        r"with the panel ([-+][\d.]+) % in the median.*twice a second: ([\d.]+) % of one core",
        "{1} % of one core to draw; switched on and off every half second of a run, {0} % in the median",
    ),
    "python tools/bench/loop.py --nproc 2 --peers hand --rounds 31": (
        2 * r".*?kit +([\d.]+) +([\d.]+) +\(([\d.]+) to ([\d.]+)\)",
        "{0} ms MLP {1} x ({2} to {3}), {4} ms GPT {5} x ({6} to {7})",
    ),
    "python tools/bench/start.py": (
        r"together +([\d.]+) +([\d.]+)\s+without trial and first step +([\d.]+)",
        "{1} s; {2} s without the trial of an evaluation and the step. The first launch, with its data: {0} s",
    ),
    "python -m kaggle_mgpu check": (r"\(([\d.]+) s\)\s*$", "{0} s"),
}
"""Command: the pattern of its figures in what it prints, and the text of the table's cell."""


def filled(page: str, command: str, printed: str) -> str:
    """Return the page with the figures that a command printed in the row of the command.

    Raises:
        ValueError: the page has no row of this command, or the figures are not in what was printed.
    """
    pattern, cell = MEASURED[command]
    found = re.search(pattern, printed, re.DOTALL)
    if found is None:
        raise ValueError(f"{command}: expected {pattern!r} in what it prints, got:\n{printed[-2000:]}")
    row = re.compile(rf"^(\| [^|]+ \| )[^|]+( \| `{re.escape(command)}` \|)$", re.MULTILINE)
    page, count = row.subn(lambda row: row[1] + cell.format(*found.groups()) + row[2], page)
    if count != 1:
        raise ValueError(f"{command}: expected one row of the table with this command, got {count}")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("words", nargs="*", help=f"of some commands; default: {'; '.join(MEASURED)}")
    words = parser.parse_args().words
    for word in words:
        if not any(word in command for command in MEASURED):
            parser.error(f"no command has {word!r} in it: expected words of {'; '.join(MEASURED)}")
    for command in MEASURED:
        if words and not any(word in command for word in words):
            continue
        print(f"{command} …", flush=True)
        _, *arguments = shlex.split(command)
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            return 1
        page = filled(PAGE.read_text(encoding="utf-8"), command, done.stdout)
        PAGE.write_text(page, encoding="utf-8")
        print("  " + next(line for line in page.splitlines() if f"`{command}`" in line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
