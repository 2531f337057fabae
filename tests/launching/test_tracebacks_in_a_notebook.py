"""A notebook shows a user's error without the frames of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from runs import executed

ROOT = Path(__file__).resolve().parents[2]
FIRST = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from kaggle_mgpu import TrainConfig, launch, train
from tasks import Regression

class Wrong(Regression):
    def loss(self, model, batch):
        return undefined_name(model, batch)

config = TrainConfig(global_batch_size=20, max_steps=3, output_dir="run")
"""
CELLS = [
    "launch(train, config, Wrong(samples=40))",
    "launch(train, config.replace(output_dir='two'), Wrong(samples=40, val_samples=0), nproc=2)",  # in DDP's forward
    "launch(train, config, Regression(samples=40), nproc=0)",
    "import traceback; print(''.join(traceback.format_exception(sys.last_value)))",
    "import torch\ndef own_loop():\n    torch.nn.Linear(2, 1)(torch.ones(1, 3))\n\nlaunch(own_loop, nproc=2)",
]
LEFT_OUT = re.compile(r"(\d+) frames? of kaggle_mgpu and of wrappers (?:is|are) left out: (\S+/rank\d.log) has all")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The outputs of FIRST and each of CELLS, and the working folder."""
    nbformat, _ = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(f"import os; os.chdir({str(folder)!r})\n{FIRST}")]
    cells += [nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"]}) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    executed(notebook)
    return [cell.outputs for cell in notebook.cells], folder


def error(outputs: list[Any]) -> Any:
    (found,) = [output for output in outputs if output.output_type == "error"]
    return found


def text(outputs: list[Any]) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error(outputs).traceback))


@pytest.mark.parametrize("cell", [1, 2], ids=["in this process", "in two workers"])
def test_an_error_of_the_task_shows_the_users_lines_alone(cell: int, outputs: tuple[list[Any], Path]) -> None:
    shown = text(outputs[0][cell])
    assert error(outputs[0][cell]).ename == "NameError"
    assert "name 'undefined_name' is not defined" in shown
    assert "return undefined_name(model, batch)" in shown
    assert CELLS[cell - 1] in shown
    assert "kaggle_mgpu/" not in shown and "torch/nn" not in shown
    assert len(shown.splitlines()) < 25


@pytest.mark.parametrize(("cell", "frames"), [(2, 4), (5, 2)], ids=["of a task", "of an own loop"])
def test_the_whole_traceback_of_a_worker_is_in_its_log(cell: int, frames: int, outputs: tuple[list[Any], Path]) -> None:
    shown = text(outputs[0][cell])
    found = LEFT_OUT.search(shown)
    assert found is not None, shown
    log = (outputs[1] / found[2]).read_text()
    assert log.count('  File "') > int(found[1]) >= frames


def test_an_error_of_the_package_shows_the_cell_and_the_message(outputs: tuple[list[Any], Path]) -> None:
    shown = text(outputs[0][3])
    assert "nproc: expected 1 or more, or 'auto', got 0" in shown
    assert CELLS[2] in shown
    assert len(shown.splitlines()) < 12


def test_the_exception_itself_keeps_every_frame(outputs: tuple[list[Any], Path]) -> None:
    (printed,) = outputs[0][4]
    assert "launching/launcher.py" in printed.text
