"""The pages' commands run, their links lead somewhere, and what they name exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import test_floors
from kaggle_mgpu import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = [ROOT / folder for folder in (".", "notebooks", "tools", "tools/bench", "kaggle_mgpu", "tests")]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for f in FOLDERS for path in f.glob("*.md")}
PACKAGE = sorted((ROOT / "kaggle_mgpu").rglob("*.py"))


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def commands(text: str) -> list[str]:
    """The lines of a page's shell blocks, without comments, joined where a backslash ends them."""
    blocks = [code for language, code in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
              if language in ("", "bash", "sh")]  # fmt: skip
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def of_the_package() -> list[str]:
    """The distinct `kaggle_mgpu` commands in the shell blocks of all pages, from the subcommand on."""
    found = [re.search(r"-m kaggle_mgpu (.+)", line) for text in PAGES.values() for line in commands(text)]
    return sorted({each[1] for each in found if each is not None})


@pytest.mark.parametrize("command", of_the_package())
def test_a_command_has_the_flags_it_is_shown_with(command: str) -> None:
    parser, _ = command_line.parser()
    parser.parse_args(shlex.split(command))


def test_the_commands_of_the_readme_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [re.search(r"^python -m kaggle_mgpu (.+)", line) for line in commands(README)]
    shown = [each[1] for each in found if each is not None]
    assert len(shown) >= 2, "check and plan"
    monkeypatch.chdir(tmp_path)
    for command in shown:
        assert command_line.main(shlex.split(command)) == 0, command


def test_the_recipes_of_ten_lines_train(tmp_path: Path) -> None:
    page = PAGES["notebooks/README.md"].split("## Recipes of ten lines")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    names = set(re.findall(r'output_dir="(\w+)"', code))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in names}
    assert len(names) == 10
    assert results["measured"]["metrics"]["accuracy"] > 0.5
    assert all(result["finished"] for result in results.values())
    assert {name for name, result in results.items() if result["stopped_early"]} == {"early", "enough"}
    assert "NOTE" not in done.stdout


@pytest.mark.parametrize(
    "target", sorted({m for text in PAGES.values() for m in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)})
)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "script",
    sorted({s for text in PAGES.values() for s in re.findall(r"(?:python|pytest) ((?:tools|tests)/[\w/]+\.py)", text)}),
)
def test_a_script_on_a_page_exists(script: str) -> None:
    assert (ROOT / script).is_file()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    """(page, target) of every link and picture on the pages that leads into this repository."""
    prose = {page: re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL) for page, text in PAGES.items()}
    found = [(page, target) for page, text in prose.items() for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    found += [
        (page, target) for page, text in PAGES.items() for target in re.findall(r'(?:src|srcset)="([^"]+)"', text)
    ]
    return sorted({(page, target) for page, target in found if "://" not in target})


@pytest.mark.parametrize(("page", "link"), links())
def test_links_lead_somewhere(page: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def test_pictures_are_small_are_shown_and_have_an_alt_text() -> None:
    pictures = {path.name: path.stat().st_size for path in (ROOT / "notebooks" / "images").iterdir()}
    assert max(pictures.values()) <= 120_000
    assert sum(pictures.values()) <= 1_000_000
    assert set(pictures) == {Path(link).name for _, link in links() if link.endswith((".png", ".svg"))}
    tags = [tag for text in PAGES.values() for tag in re.findall("<img[^>]*>", text)]
    assert all(re.search('alt="[^"]+"', tag) for tag in tags)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_nothing_is_left_to_fill_in(page: str) -> None:
    assert "@@" not in PAGES[page]
    assert "TODO" not in PAGES[page]


def test_every_notebook_is_in_the_tables() -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in README
        assert f"({notebook.name})" in PAGES["notebooks/README.md"]


# kaggle_mgpu/README.md: the arrows, files and names are those of the code
PAGE = PAGES["kaggle_mgpu/README.md"]
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
