"""What the pages show works as it stands: scripts take the arguments, make has the targets, the README's code runs.

Other tests run the rest of the README: the notebooks of its table (pretend_cuda/test_template_notebooks.py), a notebook
of one's own in each of its four ways (tools/test_own_notebook.py), the Trainer's lines
(integrations/test_in_one_process.py), `check` and `plan` (test_readme.py), `pip install` (test_wheel.py).
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest

from test_readme import PAGES, README, ROOT, commands

SPANS = {page: [*commands(text), *re.findall(r"`([^`\n]+)`", text)] for page, text in PAGES.items()}
SHOWN = [span.partition("  #")[0].strip() for spans in SPANS.values() for span in spans]
SCRIPTS = sorted({span for span in SHOWN if re.match(r"python tools/\S+\.py", span) and "…" not in span.split()})
PYTEST = sorted({span for span in SHOWN if span.startswith("pytest tests/")})
TARGETS = sorted({target for text in README.splitlines() for target in re.findall(r"(?:`|^)make ([a-z-]+)", text)})


class Parsed(BaseException):
    """The script has taken its arguments; what it does with them is the matter of other tests."""


def parse_and_stop(
    parser: argparse.ArgumentParser, *arguments: Any, parse: Any = argparse.ArgumentParser.parse_args
) -> NoReturn:
    parse(parser, *arguments)
    raise Parsed


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_takes_the_arguments_it_is_shown_with(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, script, *arguments = shlex.split(command)
    if script == "tools/kernels.py" and not arguments:
        arguments = ["status", "text_generation"]  # the head of a table's column: the cells below have the arguments
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("command", PYTEST)
def test_a_shown_selection_of_tests_is_not_empty(command: str) -> None:
    path, *options = shlex.split(command)[1:]
    files = sorted((ROOT / path).glob("test_*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    word = options[options.index("-k") + 1] if "-k" in options else "test_"
    assert any(word in name for name in names if name.startswith("test_"))


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_what_to_do(target: str) -> None:
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/installed", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        for path in re.findall(r" ((?:tools|tests)/[\w/]+\.py)", line):
            assert (ROOT / path).is_file()
    if target == "demo":
        source = (ROOT / "notebooks" / "text_generation_kaggle_multigpu.py").read_text(encoding="utf-8")
        given = re.findall(r" -p (\w+) ", done.stdout)
        assert len(given) > 5
        assert [name for name in given if not re.search(rf"^{name}(: .+)? = ", source, re.MULTILINE)] == []


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"`\.\[(\w+)\]`", README)) == set(project["optional-dependencies"])


def block(beginning: str) -> str:
    """The README's block of code with this beginning, without the signs of a diff."""
    (code,) = [code for _, code in re.findall(r"```(py|python|diff)\n(.*?)```", README, re.DOTALL) if beginning in code]
    if re.search("^[-+]", code, re.MULTILINE):
        code = "".join(line[1:] for line in code.splitlines(keepends=True) if not line.startswith("-"))
    return code


SPANS_THAT_RUN = """
from kaggle_mgpu import launch_each
task = Sine()
{plan}
def train_fold(fold):
    return fold
print("folds", {each})
import shutil
for copy in ("one", "other"):
    shutil.copytree("sine", copy)
{progress}
with torch.no_grad():
    print("error", (model(torch.ones(1, 1)) - torch.ones(1, 1).sin()).abs().item())
"""


def test_the_code_of_a_task_is_a_script_too(tmp_path: Path) -> None:
    (plan,) = re.findall(r"`(print\(plan\(.*?\)\))`", README)
    (each,) = re.findall(r"`(launch_each\(.*?\)\))`", README)
    (progress,) = re.findall(
        r"```python\n(from kaggle_mgpu import progress\n.*?)```", PAGES["notebooks/README.md"], re.DOTALL
    )
    progress = re.sub(r"^progress\.stop\(.*\n", "", progress, flags=re.MULTILINE)  # refuses a run that has ended
    spans = SPANS_THAT_RUN.format(plan=plan, each=each, progress=progress)
    code = f"{block('class Sine')}from kaggle_mgpu import plan\n{spans}"
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folds [0, 1, 2, 3, 4]" in done.stdout
    assert "T4" in done.stdout
    assert float(done.stdout.rpartition("error ")[2]) < 0.05
    assert (tmp_path / "compare.png").is_file()
    assert {"run.png", "result.json", "model.safetensors"} <= {path.name for path in (tmp_path / "sine").iterdir()}


def test_the_code_of_a_function_to_launch_runs() -> None:
    names: dict[str, Any] = {}
    exec(block("launch(main)"), names)
    assert callable(names["main"])


def test_the_lines_around_a_loop_by_hand_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    _, _, code = block("run.batches").partition("# plain PyTorch")
    code = code.partition("\n")[2]
    assert code.count(" ...;") == 1, "the place of the user's own lines"
    own = "loss = model(batch[0]).square().mean(); loss.backward()"
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 1)
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": DataLoader(TensorDataset(torch.ones(64, 2)), 4),
    }
    exec(code.replace(" ...;", f" {own};"), names)
    assert (names["run"].finished, names["run"].steps_taken) == (True, 1000)
    assert (tmp_path / "run" / "result.json").is_file()
