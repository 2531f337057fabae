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
SHIPPING = [
    ROOT / "tools" / f"{name}.py"
    for name in ("kernels", "kernel", "kaggle_cli", "library", "relay", "sweep", "notebooks")
]
SHORTEST = 5
"""Fewest characters of a fixed text that tell a message from others."""
UNSEEN = {"_SmiError", "AssertionError", "AttributeError", "NotImplementedError", "argparse.ArgumentTypeError"}
"""Errors that no user meets: caught within the package, or raised in a class that is not finished."""


def pieces(text: str) -> list[str]:
    """What is left of a message without values, longest first: values differ from one time to the next."""
    words = re.split(r"[…\0\d\"'`():;,=]+", text)
    return sorted((" ".join(word.split()) for word in words), key=len, reverse=True)


def constants(node: ast.AST) -> str:
    """The fixed text in an expression, a gap between the parts."""
    found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return " ".join("\0".join(found).split())


def assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """The values that a function, or a module, assigns to each name."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def raised() -> dict[str, str]:
    """The fixed text of every error that a function makes, with that of the variables in it, by file and line."""
    texts = {}
    for path in [*PACKAGE, *SHIPPING]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        shared = assigned(ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], []))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names = shared | assigned(function)
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not re.search(r"(Error|Exit)$", kind := ast.unparse(node.func)):
                    continue
                used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                values = [value for name in used for value in names.get(name, [])]
                text = constants(ast.Tuple(elts=[*node.args, *values], ctx=ast.Load()))
                if len(pieces(text)[0]) >= SHORTEST and kind not in UNSEEN:
                    texts[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return texts


SOURCE = "\n".join(constants(ast.parse(path.read_text(encoding="utf-8"))) for path in [*PACKAGE, *SHIPPING])


def test_a_quote_has_words_to_look_for() -> None:
    assert [quote for quote in QUOTES if len(pieces(quote)[0]) < SHORTEST] == []


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_in_the_table_is_one_of_the_kits(quote: str) -> None:
    assert pieces(quote)[0] in SOURCE, "shorten it with …, or set it in *italics* if it is torch's"


def test_every_message_is_in_the_table() -> None:
    wanted = [pieces(quote)[0].lower() for quote in QUOTES]
    missing = [f"{at}: {text}" for at, text in raised().items() if not any(piece in text.lower() for piece in wanted)]
    assert not missing, "add a row to Troubleshooting, or words of one that is there:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    "folk",
    ["only one GPU", "CUDA out of memory", "NCCL timeout", "address already in use", "process group has not been init",
     "uneven utilisation", "slow loading", "different accuracy with more GPUs"],
)  # fmt: skip
def test_folk_errors_are_in_the_table(folk: str) -> None:
    assert any(folk in message for message, _ in ROWS)
