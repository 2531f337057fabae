"""Make kaggle_mgpu attachable on Kaggle: as the output of a public kernel, or as a dataset.

    python tools/kernels.py library --push      # the kernel NAME/kaggle-mgpu, whose page shows every file
    python tools/kernels.py library --dataset   # the private dataset NAME/kaggle-mgpu

Both hold the wheel and the unpacked package. A notebook that has one as an input imports it without internet:

    import glob, sys
    sys.path += glob.glob("/kaggle/input/*/*/kaggle-mgpu")
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kaggle_cli
import notebooks
from kernel import SOURCES, KernelError, top_metadata, validate, wait_for

TITLE, SLUG = "kaggle_mgpu", "kaggle-mgpu"
PROJECT = ("pyproject.toml", "README.md", "LICENSE")

ABOUT = """\
# kaggle_mgpu {version}

This kernel's output is the package kaggle_mgpu, as a wheel and as files. To use it in a notebook without internet:
*Add Input > Notebook > {user}/kaggle-mgpu* (`"kernel_sources": ["{user}/kaggle-mgpu"]`), and in the first cell

```python
import glob, sys
sys.path += glob.glob("/kaggle/input/*/*/kaggle-mgpu")
```"""
UNPACK = """\
# The next cell shows the files in this wheel. Its sha256: {sha256}
import base64, hashlib, pathlib, zipfile

wheel = pathlib.Path("{name}")
wheel.write_bytes(base64.b85decode("{data}"))
assert hashlib.sha256(wheel.read_bytes()).hexdigest() == "{sha256}"
zipfile.ZipFile(wheel).extractall(".")"""
SHOW = """\
from IPython.display import Markdown, display

for path in sorted(pathlib.Path("kaggle_mgpu").rglob("*.py")):
    display(Markdown(f"## {path}\\n````python\\n{path.read_text(encoding='utf-8')}\\n````"))"""


def build_wheel(root: Path) -> Path:
    """Build the wheel from a copy of the sources, which nothing of an earlier build can get into; return its path."""
    folder = root / "build" / "wheel"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        shutil.copytree(root / "kaggle_mgpu", source / "kaggle_mgpu", ignore=shutil.ignore_patterns("__pycache__"))
        for name in PROJECT:
            shutil.copy(root / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        done = subprocess.run(
            [*command, "--wheel-dir", temporary, str(source)],
            env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},  # 1980: the same files make the same wheel
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise KernelError(f"the wheel could not be built: {done.stderr.strip()}\nIt needs: pip install setuptools")
        (built,) = Path(temporary).glob("*.whl")
        return Path(shutil.copy(built, folder))


def push(root: Path, user: str, wheel: Path, interval: float, say: Callable[[str], object]) -> None:
    """Push the kernel, and wait until its output can be attached.

    Raises:
        KernelError: the session failed.
    """
    nbformat = notebooks._library("nbformat")
    content = wheel.read_bytes()
    data, sha256 = base64.b85encode(content).decode(), hashlib.sha256(content).hexdigest()
    new = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": notebooks.METADATA["kernelspec"]},
        cells=[
            nbformat.v4.new_markdown_cell(ABOUT.format(version=wheel.name.split("-")[1], user=user)),
            new(UNPACK.format(name=wheel.name, data=data, sha256=sha256), metadata=notebooks.PAYLOAD_METADATA),
            new(SHOW),
        ],
    )
    about: dict[str, Any] = {**top_metadata(root), "id": f"{user}/{SLUG}", "title": TITLE, "code_file": f"{SLUG}.ipynb"}
    about |= {"is_private": False, "enable_gpu": False, **{name: [] for name in SOURCES}}
    del about["machine_shape"]
    text = notebooks.dumps(notebook)
    with zipfile.ZipFile(wheel) as archive:
        validate(notebook, text, about, {name: archive.read(name) for name in archive.namelist()})
    folder = root / "build" / "kernels" / SLUG
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SLUG}.ipynb").write_text(text, encoding="utf-8")
    (folder / "kernel-metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    pushed = kaggle_cli.push(folder)
    say(f"{pushed.url}: version {pushed.version} pushed")
    status = wait_for(about["id"], interval, say, just_pushed=True)
    if status.state != "COMPLETE":
        raise KernelError(f"{about['id']}: {status.state} {status.message}: python tools/kernels.py logs {about['id']}")


def upload(root: Path, user: str, wheel: Path) -> None:
    """Upload the wheel and its files as the newest version of the dataset."""
    folder = root / "build" / "library"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    shutil.copy(wheel, folder)
    kaggle_cli.upload(f"{user}/{SLUG}", TITLE, folder, wheel.name)
