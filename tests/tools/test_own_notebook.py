"""A notebook of one's own on Kaggle: the README's section, executed as written, in each of its four ways."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kaggle_server import KaggleServer
from kaggle_server.at_work import ROOT

pytestmark = pytest.mark.kaggle
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## In a notebook of your own\n")[1].split("\n## ")[0]
EXAMPLE, ATTACH = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[:2]
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| ?(.*?) ?\| (.+?) \| (.+?) \|$", SECTION, re.MULTILINE)}
JUDGE = """
import subprocess
print("from", sys.modules["kaggle_mgpu"].__file__)
subprocess.run(["python", "-m", "kaggle_mgpu", "--version"], check=True)
with torch.no_grad():
    print("error", (model(torch.ones(1, 1)) - torch.ones(1, 1).sin()).abs().item())
"""


@dataclass
class Desk:
    """A user's folder, and Kaggle."""

    kaggle: KaggleServer
    folder: Path

    def run(self, command: str, code: int = 0) -> str:
        """Run a command of the README in the user's folder; return what it wrote."""
        program, *words = shlex.split(command.replace("NAME", "ann").replace("tools/", f"{ROOT}/tools/"))
        assert program == "python"
        root = ["--root", str(self.folder)]
        done = subprocess.run(
            [sys.executable, words[0], *root, *words[1:]],
            cwd=self.folder, env=self.kaggle.environment(), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def write(self, *cells: str, parameters: str = "") -> Path:
        """Write my_notebook.ipynb with these cells."""
        made = [nbformat.v4.new_code_cell(cell) for cell in cells]
        if parameters:
            made.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        path = self.folder / "my_notebook.ipynb"
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernelspec}), path)
        return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    for name in ("kaggle_mgpu", "pyproject.toml", "README.md", "LICENSE", "kernel-metadata.json"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    with KaggleServer(tmp_path_factory.mktemp("kaggle")) as kaggle:
        yield Desk(kaggle, folder)


@pytest.fixture(scope="module")
def library(desk: Desk) -> str:
    """What `library` said as it made the kernel and the dataset."""
    prepared = [ROWS[way][0].strip("`") for way in ("public kernel", "dataset")]
    assert prepared == [f"python tools/kernels.py library --{way}" for way in ("push", "dataset")]
    return desk.run("python tools/kernels.py library --push --dataset --user ann --interval 1")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with what Kaggle's image has, into which pip may install."""
    folder = tmp_path_factory.mktemp("image")
    venv.create(folder, with_pip=False, symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(site, "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin" / "python"


def ran(desk: Desk, push: str) -> tuple[dict[str, Any], str]:
    """Push my_notebook.ipynb as the README says; return the request and the session's output."""
    desk.run(f"python tools/kernels.py {push} --user ann")
    version = desk.kaggle.account.version("ann/my-notebook")
    version.session.wait(900)
    said = "".join(str(entry["data"]) for entry in version.session.log)
    assert version.session.state == "COMPLETE", re.sub(r"\x1b\[[\d;]*m", "", said)[-4000:]
    assert float(said.rpartition("error ")[2].split()[0]) < 0.05
    return version.request, said


def test_in_the_notebook(desk: Desk) -> None:
    desk.write(EXAMPLE, "import sys" + JUDGE)
    carry, push = (re.findall("`(.*?)`", text)[0] for text in ROWS["in the file itself"][1:])
    assert "my_notebook.ipynb: carries kaggle_mgpu " in desk.run(carry)
    request, said = ran(desk, push)
    assert request["enableInternet"] is False
    folders = re.findall(r"from (\S+/kaggle_mgpu-copy/site-packages)", said)
    assert len(folders) >= 3 and len(set(folders)) == 1, "the cell, the import and the command agree"


@pytest.mark.parametrize(("way", "mounted"), [("public kernel", "notebooks"), ("dataset", "datasets")])
def test_attached(desk: Desk, library: str, way: str, mounted: str) -> None:
    assert f"push a notebook with {ROWS[way][2].strip('`').split('ipynb ')[1].replace('NAME', 'ann')}\n" in library
    # the stand-in mounts beside the working folder instead of at the root
    desk.write(ATTACH.replace('"/kaggle/input', '"../input'), EXAMPLE, JUDGE)
    request, said = ran(desk, ROWS[way][2].strip("`"))
    assert request["enableInternet"] is False
    assert len(re.findall(rf"from \S*/input/{mounted}/ann/kaggle-mgpu/kaggle_mgpu", said)) >= 2, said


def test_the_librarys_page_shows_every_file(desk: Desk, library: str) -> None:
    version = desk.kaggle.account.version("ann/kaggle-mgpu")
    assert (version.request["isPrivate"], version.request["enableGpu"]) == (False, False)
    assert version.request.get("machineShape") is None
    outputs = version.session.outputs()
    (wheel,) = [name for name in outputs if name.endswith(".whl")]
    assert outputs[wheel].read_bytes() == (desk.folder / "build" / "wheel" / wheel).read_bytes()
    shown = outputs["__notebook__.ipynb"].read_text()
    for path in (ROOT / "kaggle_mgpu").rglob("*.py"):
        assert f"## {path.relative_to(ROOT)}" in shown
    (dataset,) = desk.kaggle.account.datasets["ann/kaggle-mgpu"].versions
    assert (dataset / wheel).read_bytes() == outputs[wheel].read_bytes()
    assert (dataset / "kaggle_mgpu" / "env" / "__init__.py").is_file()


def test_with_pip(desk: Desk, library: str, image: Path) -> None:
    account = desk.kaggle.account
    account.python = str(image)
    account.session_variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(desk.folder / "build" / "wheel")}
    desk.write(ROWS["pip"][1].strip("`"), EXAMPLE, "import sys" + JUDGE)
    request, said = ran(desk, ROWS["pip"][2].strip("`"))
    assert request["enableInternet"] is True
    assert len(re.findall(rf"from {re.escape(str(image.parents[1]))}/lib/\S+/kaggle_mgpu", said)) >= 2, said


def test_parameters_of_an_own_notebook(desk: Desk) -> None:
    desk.write("print('epochs', epochs)", parameters="epochs = 1")
    said = desk.run("python tools/kernels.py push my_notebook.ipynb -p epoch=3", code=1)
    assert said == "my_notebook.ipynb has no parameter 'epoch'. Did you mean 'epochs'? It has: epochs.\n"
    desk.write("print(1)")
    said = desk.run("python tools/kernels.py push my_notebook.ipynb -p epoch=3", code=1)
    assert said == "my_notebook.ipynb has no cell tagged 'parameters', which -p sets: tag the cell with your settings\n"
    assert "whose kernel?" in desk.run("python tools/kernels.py push my_notebook.ipynb", code=1)
    assert "no such notebook: " in desk.run("python tools/kernels.py push other.ipynb --user ann", code=1)
