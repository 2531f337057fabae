"""The tool and the real CLI at work on the stand-in: what the tests of both share."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kernel as kernels
from kaggle_server.server import KaggleServer

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "kernels.py"
SLUG = "counting-kaggle-multigpu"

# Counts instead of training: a checkpoint a step, at most so many steps a session, and the kit's own files
COUNTING = """\
# ---
# jupyter:
#   kaggle_mgpu:
#     competition_sources: [counting-numbers]
# ---

# %% [markdown]
# # Counting

# %% tags=["payload"]
# here

# %% tags=["parameters"]
# Parameters of this notebook
goal = 6
per_session = 100
seconds = 0.0  # a step takes
gate = ""  # a file that it waits for
fail_at = None
words = "x"
output_dir = "run"

# %%
import json, os, pathlib, sys, time

root = pathlib.Path(os.environ["KAGGLE_MGPU_KAGGLE_ROOT"])
found = sorted(root.glob("input/**/checkpoints/step-*/model.safetensors"))
step = max((int(path.parent.name[5:]) for path in found), default=0)
print("inputs", sorted(path.relative_to(root / "input").as_posix() for path in root.glob("input/*/*")))
print("going on from" if found else "starting at", step, flush=True)
import kaggle_mgpu.config

def config():  # never called: in a run on this machine the checkout's package, without this recipe, comes first
    from kaggle_mgpu.recipes.counting import Config
    return Config()

while gate and not os.path.exists(gate):
    time.sleep(0.02)

def save():
    folder = pathlib.Path(output_dir, "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(str(step))
    (folder / "state.json").write_text("{}")

if found:
    save()
for _ in range(per_session):
    if step >= goal:
        break
    time.sleep(seconds)
    if step == fail_at:
        raise OSError("the sensor is gone")
    step += 1
    print("step", step, words, flush=True)
    save()
result = {"finished": step >= goal, "reason": "counted", "step": step, "max_steps": goal, "metrics": {"loss": 1 / step}}
pathlib.Path(output_dir, "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a notebook that needs no torch, so that a session takes two seconds."""
    folder = tmp_path / "repo"
    (folder / "kaggle_mgpu" / "recipes").mkdir(parents=True)
    (folder / "kaggle_mgpu" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    (folder / "kaggle_mgpu" / "config.py").write_text("class TrainConfig:\n    epochs: int = 1\n")
    (folder / "kaggle_mgpu" / "recipes" / "__init__.py").touch()
    recipe = "class Config:\n    save_every: int | None = None\n"
    (folder / "kaggle_mgpu" / "recipes" / "counting.py").write_text(recipe)
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "counting_kaggle_multigpu.py").write_text(COUNTING)
    shutil.copy(ROOT / "kernel-metadata.json", folder)
    return folder


@pytest.fixture
def kaggle(tmp_path: Path) -> Iterator[KaggleServer]:
    with KaggleServer(tmp_path / "kaggle") as server:
        (tmp_path / "numbers").mkdir()
        server.account.competitions["counting-numbers"] = tmp_path / "numbers"
        yield server


def tool(kaggle: KaggleServer, root: Path, *arguments: Any, code: int = 0, timeout: float = 1500) -> str:
    """Run the tool; what it wrote, standard output first."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--root", str(root), *map(str, arguments)],
        env=kaggle.environment(),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert kaggle.account.key not in done.stdout + done.stderr
    return done.stdout + done.stderr


def push(kaggle: KaggleServer, root: Path, *parameters: str, user: str = "ann", **options: Any) -> str:
    given = [text for each in parameters for text in ([each] if each.startswith("-") else ["-p", each])]
    return tool(kaggle, root, "push", "counting", "--user", user, *given, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counting(root: Path, **parameters: Any) -> kernels.Kernel:
    kernel = kernels.kernel_from(root, "counting", "ann")
    kernel.parameters = parameters
    return kernel


# The real notebooks
@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository, with a build and a runs folder of its own."""
    root = tmp_path_factory.mktemp("house")
    for name in ("kaggle_mgpu", "notebooks"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "kernel-metadata.json", root)
    return root


def corpus(folder: Path) -> None:
    (folder / "corpus.txt").write_text(
        "\n".join(f"Line {i} of a text: {i * i} is the square of {i}." for i in range(600))
    )


TEXT = {
    "tokenizer": "byte", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "global_batch_size": 8,
    "eval_every": "end", "max_new_tokens": 20, "prompts": ["Line"], "lr": 1e-2,
}  # fmt: skip


def flags(settings: dict[str, Any]) -> list[str]:
    """As the tool takes them: -p name=value."""
    return [text for name, value in settings.items() for text in ("-p", f"{name}={value!r}")]
