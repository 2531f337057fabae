"""The comparison of recipes: its arguments, and the kit's side on a text of a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/recipes.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_row_for_the_kit(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {i} of the only book, said {i % 7} times\n" for i in range(400)), encoding="utf-8")
    done = bench(
        "text_generation", "--small", "--steps", "2", "--seeds", "0,1", "--contenders", "kit", "--data", str(text)
    )
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    assert head == "| text_generation, 2 steps | nats a token | bits a byte | M | CPU s |"
    name, nats, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "kit"
    mean, low, high = (float(part) for part in nats.replace("..", " ").replace("(", "").replace(")", "").split())
    assert 4 < low < mean < high < 7


def test_a_contender_that_is_not_there_is_named() -> None:
    done = bench("text_generation", "--contenders", "nanogpt")
    assert done.returncode == 2
    assert "--contenders: no 'nanogpt'; there are kit; nanoGPT's form" in done.stderr
