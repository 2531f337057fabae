"""Every template notebook once on two pretend T4s, with the parameters that it has in test_notebooks_on_kaggle.py.

pytest tests/pretend_cuda/test_template_notebooks.py    # one process runs all: see run_notebooks.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kaggle_server.at_work import corpus
from test_notebooks_on_kaggle import TINY

CHANGED: dict[str, dict[str, Any]] = {  # the strategies side by side: in one of the three notebooks that show them
    "text_generation": {"compare_steps": 1}, "activity_recognition": {"compare": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(gpus: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of all notebooks' runs, and the error of each notebook."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "kaggle" / "input" / "text").mkdir(parents=True)
    corpus(folder / "kaggle" / "input" / "text")
    given = {name: tiny.parameters | CHANGED.get(name, {}) for name, tiny in TINY.items()}
    command = [sys.executable, str(Path(__file__).with_name("run_notebooks.py")), json.dumps(given)]
    variables = {"KAGGLE_MGPU_KAGGLE_ROOT": str(folder / "kaggle"), "KAGGLE_MGPU_DISPLAY": "lines", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"notebook"')]
    errors = {line["notebook"]: line["error"] for line in lines}
    return folder, errors | {name: done.stdout[-3000:] + done.stderr[-3000:] for name in TINY if name not in errors}


@pytest.mark.parametrize("name", TINY)
def test_a_template_notebook_trains_on_two_gpus(runs: tuple[Path, dict[str, str]], name: str) -> None:
    folder, errors = runs
    assert errors[name] == ""
    results = [json.loads(path.read_text()) for path in folder.glob(f"{name}/{name}/**/result.json")]
    assert results and all(result["finished"] for result in results)
    assert all(result.get("world_size", 2) == 2 and result.get("precision", "fp16") == "fp16" for result in results)
