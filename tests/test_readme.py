"""The README's commands run, and the page for developers names files and functions that exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import test_floors

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_trains(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    code = found[1].replace('output_dir="sine"', f"output_dir={str(tmp_path / 'sine')!r}, nproc=2")
    code += (
        "\nwith torch.no_grad():\n    print('error', (model(torch.ones(1, 1)) - torch.ones(1, 1).sin()).abs().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rsplit("error", 1)[1]) < 0.05


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
    assert "TODO" not in README


def test_every_notebook_is_in_the_table() -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in README


# Troubleshooting: what is quoted as the kit's can be met, and what can be met is there
ROWS = re.findall(
    r"^\| (?!\*\*)(.+?) \| (.+) \|$", README.split("## Troubleshooting, by message")[1].split("\nBy default")[0], re.M
)
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


# kaggle_mgpu/README.md: the arrows, files and names are those of the code
PAGE = (ROOT / "kaggle_mgpu" / "README.md").read_text(encoding="utf-8")
TOKENS = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))


@cache
def names_in(path: Path) -> set[str]:
    """The functions, classes and constants of a file, and Class.name for the members of its classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        members = [(node, "")]
        if isinstance(node, ast.ClassDef):
            members += [(member, f"{node.name}.") for member in node.body]
        for member, prefix in members:
            if isinstance(member, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + member.name)
            elif isinstance(member, ast.Assign | ast.AnnAssign):
                targets = member.targets if isinstance(member, ast.Assign) else [member.target]
                found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def references() -> list[tuple[str, str]]:
    """(file, name) of each table row and of each "`name` in `file`" on the page."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (`.+?`) \|", PAGE, re.M)
    found = [(file, name) for file, names in rows for name in re.findall(r"`(.+?)`", names)]
    return found + [(file, name) for name, file in re.findall(r"`([\w.]+)` in\s`([\w/]+\.py)`", PAGE)]


@pytest.mark.parametrize(("file", "name"), references())
def test_a_name_on_the_page_is_in_its_file(file: str, name: str) -> None:
    assert name in names_in(ROOT / "kaggle_mgpu" / file)


@pytest.mark.parametrize("token", [t for t in TOKENS if re.fullmatch(r"[\w/.-]+(/|\.py)", t)])
def test_a_path_on_the_page_exists(token: str) -> None:
    assert (ROOT / "kaggle_mgpu" / token).exists() or (ROOT / token).exists()


@pytest.mark.parametrize("token", [t for t in TOKENS if re.fullmatch(r"\w+", t) and t != "parameters"])
def test_a_bare_name_on_the_page_is_defined_somewhere(token: str) -> None:
    defined = {name.rpartition(".")[2] for path in PACKAGE for name in names_in(path)}
    assert token in defined


def closure(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each node, all nodes that arrows lead to, over any number of steps."""
    reached = {node: set(targets) for node, targets in arrows.items()}
    for middle in reached:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return {node: targets for node, targets in reached.items() if targets}


def test_the_picture_shows_the_imports_of_the_code() -> None:
    drawn: dict[str, set[str]] = {}
    for left, right in re.findall(r"^    (\w+) --> (.+)$", PAGE, re.M):
        drawn.setdefault(left, set()).update(right.split(" & "))
    code: dict[str, set[str]] = {}
    for module, path in test_floors.MODULES.items():
        package = test_floors.room(module)
        code.setdefault(package, set()).update({test_floors.room(target) for target in test_floors.arrows(path)})
    for package in code:
        code[package] -= {"", package}
    nodes = {*drawn, *(target for targets in drawn.values() for target in targets)}
    assert nodes >= {*test_floors.PACKAGES}
    for targets in list(drawn.values()):
        drawn |= {target: set() for target in targets if target not in drawn}
    assert closure(drawn) == closure(code)
