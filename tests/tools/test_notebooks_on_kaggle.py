"""Every notebook, pushed with the real kaggle CLI and run as Kaggle runs it. One alone:
`pytest tests/tools/test_notebooks_on_kaggle.py -k text_generation`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

import env_matrix
import kaggle_cli
import kernel as kernels
import notebooks
from kaggle_server import KaggleServer
from kaggle_server.at_work import ROOT, TEXT, corpus, flags, tool


@dataclass
class Tiny:
    """How to run a notebook in seconds: its parameters, and what is mounted by path under /kaggle/input."""

    parameters: dict[str, Any]
    inputs: Callable[[Path], None] = lambda folder: None
    """Fills the folder of a dataset that the notebook then gets: for what it does not make up itself."""
    leaves: tuple[str, ...] = ()
    """Files, by their end, that must be in the output beside result.json."""


TINY = {
    "text_generation": Tiny({**TEXT, "max_steps": 6}, corpus, ("model.safetensors", "metrics.jsonl", "run.png")),
    "activity_recognition": Tiny(
        {"max_steps": 6, "global_batch_size": 16, "width": 8, "eval_every": 3, "log_every": 2, "compare_steps": 3},
        leaves=("model.safetensors", "test.json", "confusion.png"),
    ),
    "surface_segmentation": Tiny(
        {"patch_size": 16, "width": 4, "patches_per_volume": 2, "max_steps": 6, "global_batch_size": 4}
        | {"overlap": 0.25},
        leaves=("model.safetensors", "submission.zip"),
    ),
    "camouflage_segmentation": Tiny(
        {"scenes": 16, "val_scenes": 4, "image_size": 32, "width": 8, "decoder_width": 8, "num_experts": 2}
        | {"unfreeze_parts": 1, "max_steps": 2, "global_batch_size": 8, "pictures": 2},
        leaves=("model.safetensors",),
    ),
    "sft": Tiny(
        {"max_steps": 4, "max_length": 64, "eval_every": "end", "eval_generate_samples": 2, "max_new_tokens": 4}
        | {"global_batch_size": 4},
        leaves=("model.safetensors", "README.md"),
    ),
    "bring_your_own_loop": Tiny({"steps": 6, "width": 8, "samples": 64, "folds": 2}, leaves=("by_hand/metrics.jsonl",)),
    "check_gpus": Tiny(
        {"compare": False, "depth": 1, "width": 16, "heads": 2, "length": 16, "global_batch_size": 4},
    ),
}


@pytest.mark.parametrize("notebook", [source.stem for source in notebooks.sources(ROOT, [])])
def test_every_notebook_there_and_back(kaggle: KaggleServer, house: Path, tmp_path: Path, notebook: str) -> None:
    """Pushed with the CLI, run on two processes as Kaggle runs it, fetched with the CLI."""
    name = notebook.removesuffix("_kaggle_multigpu")
    assert name in TINY, f"{notebook} has no entry in TINY above: give it parameters with which it runs in seconds"
    tiny = TINY[name]
    (tmp_path / "input").mkdir()
    tiny.inputs(tmp_path / "input")
    kernel = kernels.kernel_from(house, notebook, "ann")
    kernel.build()
    needs = json.loads((kernel.folder / "kernel-metadata.json").read_text())
    for competition in needs["competition_sources"]:
        kaggle.account.competitions[competition] = tmp_path / "input"
    for dataset in needs["dataset_sources"] or ["bob/its-input"]:
        kaggle.account.add_dataset(dataset, tmp_path / "input")
    mounted = needs["competition_sources"] or needs["dataset_sources"]  # by itself; else as the user's own dataset
    built = nbformat.read(kernel.folder / f"{kernel.slug}.ipynb", as_version=4)
    known = {*notebooks.parameters(built), *notebooks.config_fields(built)}
    given = {**({"nproc": 2} if "nproc" in known else {}), **tiny.parameters}
    own = [] if mounted else ["--dataset", "bob/its-input"]
    tool(kaggle, house, "push", notebook, "--user", "ann", *own, *flags(given))
    session = kaggle.account.version(kernel.id).session
    session.wait()
    assert session.state == "COMPLETE", kaggle_cli.flattened(session.log_text())[-5000:]
    tool(kaggle, house, "output", kernel.id)
    folder = kernel.results()
    outcome = kernels.Outcome.of(folder)
    assert outcome.finished, outcome.text
    # the notebook's own, not those of stages or of runs that it compares
    own_results = [result for path, result in outcome.results.items() if path.count("/") <= 1]
    assert own_results and all(result.get("world_size", 2) == 2 for result in own_results), outcome.results
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) < 500
    for end in tiny.leaves:
        assert any(file.endswith(end) for file in files), files
    executed = nbformat.read(folder / "__notebook__.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]


def test_no_notebook_is_forgotten() -> None:
    assert not set(TINY) - {source.stem.removesuffix("_kaggle_multigpu") for source in notebooks.sources(ROOT, [])}


@pytest.fixture(scope="module")
def kaggles_stack() -> Path:
    """A folder that puts the papermill, nbclient, nbformat, ipykernel and IPython of Kaggle's image before newer ones.

    Made once (half a minute) under build/environments; everything else is this environment's.
    """
    wanted = [*env_matrix.STACKS["kaggle"], "nbformat==5.10.4"]
    digest = hashlib.sha256(f"{wanted} {sys.version}".encode()).hexdigest()[:12]
    folder = ROOT / "build" / "environments" / f"notebook-stack-{digest}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if re.search(r"No matching distribution|Connection|Name or service|Temporary failure|timed out", done.stderr):
            pytest.skip(f"no package registry answers: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    return folder


def test_on_kaggles_notebook_stack(kaggle: KaggleServer, house: Path, kaggles_stack: Path) -> None:
    """The other tests run on the newest stack, this one on what Kaggle's image has."""
    kaggle.account.session_variables = {"PYTHONPATH": str(kaggles_stack)}
    code = "import papermill, nbclient, nbformat, ipykernel, IPython as i; print(*(m.__version__ for m in (papermill, "
    code += "nbclient, nbformat, ipykernel, i)))"
    variables = {**os.environ, "PYTHONPATH": str(kaggles_stack)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["2.7.0", "0.5.13", "5.10.4", "6.17.1", "7.34.0"], done.stderr
    given = {**TEXT, "nproc": 2, "max_steps": 6}
    parameters = flags(given)
    tool(kaggle, house, "push", "text_generation", "--user", "ann", "--title", "Older Stack", *parameters)
    said = tool(kaggle, house, "wait", "ann/older-stack", "--interval", "3")
    assert "text_generation/result.json: step 6 of 6, finished" in said
