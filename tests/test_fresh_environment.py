"""The built notebook where the kit is not installed and nothing but requirements.txt is.

The environment is made once, in build/environments (a minute), and made anew when the requirements change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from runs import papermill

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment that holds requirements.txt and no more."""
    constraints = ROOT / ".ci" / "constraints.txt"
    content = (ROOT / "requirements.txt").read_bytes() + constraints.read_bytes() + sys.version.encode()
    folder = ROOT / "build" / "environments" / f"requirements-{hashlib.sha256(content).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=600)
        install = ["install", "--quiet", "--no-compile", "-c", constraints, "-r", ROOT / "requirements.txt"]
        subprocess.run([folder / "bin" / "python", "-m", "pip", *install], check=True, timeout=900)
        (folder / "complete").touch()
    return folder / "bin" / "python"


def test_the_notebook_brings_all_it_needs(python: Path, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    variables |= {"KAGGLE_MGPU_DISPLAY": "lines", "JUPYTER_PATH": "", "IPYTHONDIR": str(tmp_path / "ipython")}
    code = "import importlib.util as u; print([n for n in ('kaggle_mgpu', 'tokenizers') if u.find_spec(n)])"
    found = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"

    settings = {
        "nproc": 2, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "max_steps": 6, "global_batch_size": 8,
        "eval_every": "end", "max_new_tokens": 20,
    }  # fmt: skip
    given = [text for name, value in settings.items() for text in ("-p", name, str(value))]
    notebook = ROOT / "notebooks" / "text_generation_kaggle_multigpu.ipynb"
    command = [python, "-m", "papermill", "--start-timeout", "600", notebook, "out.ipynb", *given]
    started = {"cwd": tmp_path, "env": variables, "capture_output": True, "text": True, "timeout": 600}
    done = papermill(lambda: subprocess.run(command, **started))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "text_generation" / "result.json").read_text())
    assert (result["finished"], result["step"], result["world_size"]) == (True, 6, 2)
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(output.get("text", "") for output in outputs)
    assert "tokenizer: byte" in text
    assert f"kaggle_mgpu from {tmp_path}" in text
