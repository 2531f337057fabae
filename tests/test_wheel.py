"""The wheel that `make wheel` makes, where nothing else of the checkout can be reached."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def root(pytestconfig: pytest.Config) -> Path:
    """The checkout."""
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def version(root: Path) -> str:
    """The version as the package's source has it."""
    found = re.search(r'^__version__ = "(.+)"$', (root / "kaggle_mgpu" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def checkout(root: Path, source: Path) -> Path:
    """Copy what an installation reads into the folder `source`."""
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("kaggle_mgpu", "tools"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def install(environment: Path, *arguments: str | Path) -> Path:
    """Make an environment that borrows what the package requires from this one; install into it; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=600)
    python = environment / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed))
    options = ["install", "--quiet", "--no-deps", "--no-index", *arguments]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *options], check=True, timeout=600)
    return python


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by make from a copy of the checkout, where an earlier build has left a module behind."""
    source = checkout(root, tmp_path_factory.mktemp("source"))
    left = source / "build" / "lib" / "kaggle_mgpu" / "moved_since.py"
    left.parent.mkdir(parents=True)
    left.touch()
    command = ["make", "--no-print-directory", "-o", ".venv/installed", f"BIN={Path(sys.executable).parent}", "wheel"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(source.glob("*.egg-info")), "which would make the checkout look installed"
    (built,) = (source / "build" / "wheel").iterdir()
    return built


def test_it_holds_the_package_and_no_more(root: Path, wheel: Path, version: str) -> None:
    assert wheel.name == f"kaggle_mgpu-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if not name.startswith(f"kaggle_mgpu-{version}.dist-info/")}
    package = root / "kaggle_mgpu"
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".md")}
    assert held == {str(path.relative_to(root)) for path in there}


def test_a_training_with_two_processes_runs_from_it(
    wheel: Path, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh environment that borrows what the package requires from this one."""
    environment = tmp_path / "environment"
    python = install(environment, wheel)
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    kit = [python, "-m", "kaggle_mgpu"]
    says = subprocess.run([*kit, "--version"], capture_output=True, text=True, timeout=600, check=True).stdout
    assert says == f"kaggle_mgpu {version} from {Path(site) / 'kaggle_mgpu'}\n"
    settings = (
        "--nproc 2 --tokenizer byte --n-layer 1 --n-head 2 --n-embd 16 --block-size 64 --max-steps 6 "
        "--global-batch-size 8 --eval-every end --output-dir run"
    )
    done = subprocess.run(
        [*kit, "train", "text_generation", *settings.split()], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["finished"], result["step"], result["world_size"]) == (True, 6, 2)


def test_the_install_of_the_readme_uses_the_checkout(
    root: Path, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = re.findall(r"^pip install (.+)$", (root / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(checkout(root, tmp_path / "source"))
    python = install(tmp_path / "environment", "--no-build-isolation", *command.split())  # setuptools is here already
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    says = [python, "-m", "kaggle_mgpu", "--version"]
    done = subprocess.run(says, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == f"kaggle_mgpu {version} from {tmp_path / 'source' / 'kaggle_mgpu'}\n"


def test_the_version_needs_nothing_installed(root: Path, version: str) -> None:
    """pyproject.toml reads the version from the package, also where torch is not there yet."""
    code = "import kaggle_mgpu; print(kaggle_mgpu.__version__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=root, env={"PYTHONPATH": ""}, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert done.stdout == f"{version}\n"
