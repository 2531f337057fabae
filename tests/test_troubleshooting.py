"""notebooks/TROUBLESHOOTING.md has every message that the package can raise, and none that is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "notebooks" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")

# What is quoted as the kit's can be met, and what can be met is there
ROWS = re.findall(r"^\| (?!\*\*)(.+?) \| (.+) \|$", PAGE.split("\n## ")[0], re.M)
QUOTES = [quote for message, _ in ROWS for quote in re.findall(r"`([^`]+)`", message) if message != "message"]
PACKAGE = sorted((ROOT / "kaggle_mgpu").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def pieces(text: str) -> list[str]:
    """What is left of a message without values, longest first: values differ from one time to the next."""
    words = re.split(r"[…\d\"'`():;,=]+", text)
    return sorted((" ".join(word.split()) for word in words), key=len, reverse=True)


def constants(node: ast.AST) -> str:
    """The fixed text in an expression, a gap between the parts."""
    found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return " ".join("\0".join(found).split())


def raised() -> list[str]:
    """The fixed text of every error that the package raises with words of its own, a template's own apart."""
    texts = []
    for path in PACKAGE:
        if "recipes" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind, text = ast.unparse(node.exc.func), constants(ast.Tuple(elts=node.exc.args, ctx=ast.Load()))
                # those that are caught within the package, and those of a class that a user has not finished
                if len(pieces(text)[0]) > 5 and kind not in ("_SmiError", "NotImplementedError", "AssertionError"):
                    texts.append(f"{path.name}:{node.lineno}: {text}")
    return texts


SOURCE = "\n".join(constants(ast.parse(path.read_text(encoding="utf-8"))) for path in [*PACKAGE, *TOOLS])


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_in_the_table_is_one_of_the_kits(quote: str) -> None:
    assert pieces(quote)[0] in SOURCE, "shorten it with …, or set it in *italics* if it is torch's"


def test_every_message_is_in_the_table() -> None:
    wanted = [pieces(quote)[0] for quote in QUOTES]
    missing = [text for text in raised() if not any(piece in text for piece in wanted)]
    assert not missing, "add a row to Troubleshooting, or words of one that is there:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    "folk",
    ["only one GPU", "CUDA out of memory", "NCCL timeout", "address already in use", "process group has not been init",
     "uneven utilisation", "slow loading", "different accuracy with more GPUs"],
)  # fmt: skip
def test_folk_errors_are_in_the_table(folk: str) -> None:
    assert any(folk in message for message, _ in ROWS)
