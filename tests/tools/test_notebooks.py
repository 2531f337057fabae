"""tools/notebooks.py and what it builds. The slow one, the whole notebook on two processes, is
`pytest tests/tools/test_notebooks.py -k end_to_end`."""

from __future__ import annotations

import base64
import bz2
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

import runs

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "notebooks.py"
SOURCE = ROOT / "notebooks" / "text_generation_kaggle_multigpu.py"

spec = importlib.util.spec_from_file_location("tools_notebooks", TOOL)
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

TINY = """\
# %% [markdown]
# # Tiny

# %% tags=["payload"]
# here

# %% tags=["parameters"]
# Parameters of this notebook
epochs = 1  # passes
lr: float = 1e-3
data_path = None
output_dir = "out"
fail = False

# %%
import json, pathlib, sys
import kaggle_mgpu
from kaggle_mgpu.recipes.text import TEXT

print("kernel", sys.executable, "epochs", repr(epochs), "lr", repr(lr), "data", repr(data_path), kaggle_mgpu.MARK)
if fail:
    raise OSError("the disk is full")
if output_dir:
    pathlib.Path(output_dir).mkdir(exist_ok=True)
    result = {"finished": True, "step": epochs, "max_steps": 7, "metrics": {"loss": lr}}
    pathlib.Path(output_dir, "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with a small package and a small notebook."""
    root = tmp_path / "repo"
    (root / "kaggle_mgpu" / "recipes").mkdir(parents=True)
    (root / "kaggle_mgpu" / "__init__.py").write_text('__version__ = "9.8.7"\nMARK = "genuine"\n')
    (root / "kaggle_mgpu" / "recipes" / "__init__.py").write_text("")
    (root / "kaggle_mgpu" / "recipes" / "text.py").write_text('TEXT = "\u00e9"\n', encoding="utf-8")
    (root / "kaggle_mgpu" / "recipes" / "other.py").write_text("")  # not imported, carried all the same
    (root / "notebooks").mkdir()
    (root / "notebooks" / "tiny.py").write_text(TINY)
    return root


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """No kaggle_mgpu to import, and nothing written outside the test's folder."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("KAGGLE_", "JUPYTER_", "IPYTHON")) and k != "PYTHONPATH"
    }
    return {**kept, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1", **extra}


def call(tmp_path: Path, *arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or tmp_path,
        env=environment(tmp_path, **extra),
        capture_output=True,
        text=True,
        timeout=600,
    )


def built(root: Path, name: str = "tiny") -> Any:
    assert tool.main(["--root", str(root), "build"]) == 0
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)


def tagged(notebook: Any, tag: str) -> Any:
    (cell,) = [cell for cell in notebook.cells if tag in tool.tags(cell)]
    return cell


# Building
def test_same_sources_make_the_same_bytes(repo: Path, tmp_path: Path) -> None:
    built(repo)
    path = repo / "notebooks" / "tiny.ipynb"
    first = path.read_bytes()
    path.unlink()
    for file in repo.rglob("*.py"):
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)
    (repo / "kaggle_mgpu" / "__pycache__").mkdir()
    (repo / "kaggle_mgpu" / "__pycache__" / "x.py").write_text("no part of the package")
    done = call(tmp_path, str(TOOL), "--root", str(repo), "build", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == first


def test_the_order_of_the_files_does_not_matter() -> None:
    files = {"kaggle_mgpu/b.py": b"2", "kaggle_mgpu/a.py": b"1"}
    assert tool.payload_source(files) == tool.payload_source(dict(reversed(files.items())))


def test_built_notebook(repo: Path) -> None:
    notebook = built(repo)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert [tagged(notebook, tag).id for tag in ("payload", "parameters")] == ["payload", "parameters"]
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    payload = tagged(notebook, "payload")
    assert payload.metadata["_kg_hide-input"] is True
    assert payload.metadata.jupyter.source_hidden is True
    files = {
        f"kaggle_mgpu/{name}": (repo / "kaggle_mgpu" / name).read_bytes()
        for name in ("__init__.py", "recipes/__init__.py", "recipes/other.py", "recipes/text.py")
    }
    assert tool.payload_files(payload.source) == files
    *code, data = payload.source.splitlines()
    assert re.fullmatch(r"# kaggle_mgpu 9\.8\.7: all 4 files of its wheel, sha256 [0-9a-f]{64}", code[0]), code[0]
    assert tool.content_sha256(files) in code[0]
    assert "An installed or attached kaggle_mgpu is used instead." in code[1]
    assert len(code) <= 12 and max(map(len, code)) <= 120, "of what a saved page shows"
    assert data.startswith("exec(bz2.decompress(")


def test_every_notebook_carries_the_whole_package() -> None:
    files = tool.package_files(ROOT / "kaggle_mgpu")
    everything = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "kaggle_mgpu").rglob("*.py")}
    assert files == everything
    cells = [tagged(nbformat.read(path, as_version=4), "payload") for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert len(cells) > 1
    assert {cell.source for cell in cells} == {tool.payload_source(files)}


def test_an_edit_leaves_the_other_cells_ids_alone(repo: Path) -> None:
    before = [cell.id for cell in built(repo).cells]
    source = repo / "notebooks" / "tiny.py"
    source.write_text("# %% [markdown]\n# # New\n\n" + source.read_text())
    after = [cell.id for cell in built(repo).cells]
    assert [i for i in after if i in before] == before
    assert len(after) == len(before) + 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('tags=["parameters"]', "", r'expected one cell `# %% tags=\["parameters"\]`, got 0'),
        ('tags=["parameters"]', 'tags=["payload"]', r'expected one cell `# %% tags=\["payload"\]`, got 2'),
        ("# # Tiny", "# " + "long " * 150_000, r"the notebook would have \d+ bytes; expected 700000 at most"),
    ],
)
def test_build_refuses(repo: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str) -> None:
    source = repo / "notebooks" / "tiny.py"
    source.write_text(source.read_text().replace(old, new))
    assert tool.main(["--root", str(repo), "build"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (repo / "notebooks" / "tiny.ipynb").exists()


# Checking
def change_cell(index: int, **changes: Any) -> Callable[[Path], None]:
    def change(repo: Path) -> None:
        path = repo / "notebooks" / "tiny.ipynb"
        notebook = nbformat.read(path, as_version=4)
        for key, value in changes.items():
            notebook.cells[index][key] = value(notebook.cells[index][key]) if callable(value) else value
        nbformat.write(notebook, path)

    return change


def and_then(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda repo: [change(repo) for change in changes] and None


def append(name: str, text: str) -> Callable[[Path], None]:
    def change(repo: Path) -> None:
        (repo / name).write_text((repo / name).read_text() + text if (repo / name).exists() else text)

    return change


OUTPUT = [nbformat.v4.new_output("stream", text="hello")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            append("notebooks/tiny.py", "\nprint(1)\n"),
            "tiny.ipynb: cell 4 (import json, pathlib, sys): the text differs",
        ),
        (append("notebooks/tiny.py", "\n# %%\nprint(1)\n"), "tiny.ipynb: expected 5 cells, got 4"),
        (
            append("kaggle_mgpu/__init__.py", "#\n"),
            "cell 2 (payload): kaggle_mgpu/__init__.py differs from the package",
        ),
        (
            and_then(
                append("kaggle_mgpu/new.py", "#\n"), append("kaggle_mgpu/recipes/text.py", "from .. import new\n")
            ),
            "cell 2 (payload): kaggle_mgpu/new.py is missing",
        ),
        (
            lambda repo: (repo / "kaggle_mgpu/recipes/text.py").unlink(),
            "kaggle_mgpu/recipes/text.py is not in the package",
        ),
        (lambda repo: (repo / "notebooks/tiny.ipynb").unlink(), "tiny.ipynb: not built"),
        (lambda repo: (repo / "notebooks/tiny.ipynb").write_text("{"), "tiny.ipynb: not readable as a notebook"),
        (append("notebooks/stray.ipynb", "{}"), "stray.ipynb: there is no stray.py that makes it"),
        (change_cell(3, outputs=OUTPUT), "cell 4 (import json, pathlib, sys): has outputs"),
        (change_cell(3, execution_count=3), "cell 4 (import json, pathlib, sys): has outputs or an execution count"),
        (change_cell(3, id="other"), "cell 4 (import json, pathlib, sys): the id, type or metadata differ"),
        (change_cell(2, metadata={}), "cell 3 (# Parameters of this notebook): the id, type or metadata differ"),
        (
            change_cell(1, source=lambda s: s.replace("import base64", "import os, base64")),
            "cell 2 (payload): the code around the payload differs",
        ),
        (
            change_cell(1, source=lambda s: s.replace("9.8.7", "9.8.8")),
            "cell 2 (payload): the code around the payload differs",
        ),
        (
            change_cell(1, source=lambda s: s[:700] + s[710:]),
            "cell 2 (payload): the copy of kaggle_mgpu in the notebook is damaged",
        ),
    ],
)
def test_check_names_what_differs(
    repo: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], message: str
) -> None:
    built(repo)
    assert tool.main(["--root", str(repo), "check"]) == 0
    capsys.readouterr()
    change(repo)
    assert tool.main(["--root", str(repo), "check"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Mend it: python tools/notebooks.py build" in said


def test_check_compares_contents_not_blobs(repo: Path) -> None:
    notebook = built(repo)
    path = repo / "notebooks" / "tiny.ipynb"
    before = path.read_bytes()
    payload = tagged(notebook, "payload")
    (data,) = re.findall(r'b85decode\("(.*?)"\)', payload.source)
    other = base64.b85encode(bz2.compress(bz2.decompress(base64.b85decode(data)), 1))  # as another bzip2 might
    payload.source = payload.source.replace(data, other.decode())
    path.write_text(tool.dumps(notebook))
    assert path.read_bytes() != before
    before = path.read_bytes()
    assert tool.main(["--root", str(repo), "check"]) == 0
    assert tool.main(["--root", str(repo), "build"]) == 0
    assert path.read_bytes() == before  # nor does build rewrite it


def test_the_committed_notebooks_are_what_their_sources_make() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "check"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# The payload
IMPORT = """
import subprocess, sys
import kaggle_mgpu, kaggle_mgpu.recipes
print("MARK", kaggle_mgpu.MARK)
print("FILE", kaggle_mgpu.__file__)
print("LAST", sys.path[-1])
child = [sys.executable, "-S", "-c", "import kaggle_mgpu; print('CHILD', kaggle_mgpu.__file__)"]
subprocess.run(child, check=True, cwd="/")
"""


@pytest.fixture
def cell(repo: Path, tmp_path: Path) -> Path:
    """The payload cell as a script that goes on to import the package."""
    path = tmp_path / "cells" / "cell.py"
    path.parent.mkdir()
    path.write_text(tagged(built(repo), "payload").source + "\n" + IMPORT)
    return path


def open_payload(cell: Path, tmp_path: Path, **options: Any) -> dict[str, str]:
    # -S: no site-packages, so an installed kaggle_mgpu does not win
    done = call(tmp_path, "-S", str(cell), **options)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_payload_makes_the_package_importable(cell: Path, tmp_path: Path) -> None:
    said = open_payload(cell, tmp_path)
    (folder,) = (tmp_path / "tmp").iterdir()
    assert said["MARK"] == "genuine"
    assert said["LAST"] == f"{folder}/kaggle_mgpu-copy/site-packages"
    assert said["kaggle_mgpu"] == f"from {said['LAST']}"
    assert said["FILE"] == said["CHILD"] == f"{said['LAST']}/kaggle_mgpu/__init__.py"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert open_payload(cell, tmp_path)["LAST"] != said["LAST"], "each kernel trusts no copy but its own"


def test_the_cell_may_be_run_again(cell: Path, tmp_path: Path) -> None:
    twice = cell.read_text().split("\nimport subprocess")[0]
    cell.write_text(f"{twice}\n{twice}\nimport kaggle_mgpu\n{twice}\nimport kaggle_mgpu.recipes.text\n{IMPORT}")
    done = call(tmp_path, "-S", str(cell))
    assert done.returncode == 0, done.stderr
    _, second, third = re.findall("kaggle_mgpu from (.*)", done.stdout)
    assert second == third
    assert f"FILE {third}/kaggle_mgpu" in done.stdout and f"CHILD {third}/kaggle_mgpu" in done.stdout


@pytest.mark.parametrize("place", ["datasets/ann/kaggle-mgpu", "notebooks/ann/kaggle-mgpu", "kaggle-mgpu"])
def test_an_attached_package_wins(cell: Path, repo: Path, tmp_path: Path, place: str) -> None:
    attached = tmp_path / "kaggle" / "input" / place
    shutil.copytree(repo / "kaggle_mgpu", attached / "kaggle_mgpu")
    (attached / "kaggle_mgpu" / "__init__.py").write_text('MARK = "attached"\n')
    said = open_payload(cell, tmp_path, KAGGLE_MGPU_KAGGLE_ROOT=str(tmp_path / "kaggle"))
    assert (said["MARK"], said["kaggle_mgpu"]) == ("attached", f"from {attached}")
    assert said["CHILD"] == f"{attached}/kaggle_mgpu/__init__.py"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_importable_package_wins(cell: Path, repo: Path, tmp_path: Path) -> None:
    (repo / "kaggle_mgpu" / "__init__.py").write_text('MARK = "checkout"\n')
    for options in ({"PYTHONPATH": str(repo)}, {"cwd": repo / "notebooks"}):
        said = open_payload(cell, tmp_path, **options)
        assert (said["MARK"], said["kaggle_mgpu"]) == ("checkout", f"from {repo}")
        assert said["CHILD"] == said["FILE"] == f"{repo}/kaggle_mgpu/__init__.py"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_bare_folder_of_that_name_does_not_win(cell: Path, tmp_path: Path) -> None:
    (cell.parent / "kaggle_mgpu").mkdir()
    assert open_payload(cell, tmp_path)["MARK"] == "genuine"


def test_another_notebooks_payload_does_not_win(cell: Path, repo: Path, tmp_path: Path) -> None:
    first = open_payload(cell, tmp_path)["LAST"]
    (repo / "kaggle_mgpu" / "__init__.py").write_text('MARK = "newer"\n')
    cell.write_text(tagged(built(repo), "payload").source + "\n" + IMPORT)
    said = open_payload(cell, tmp_path, PYTHONPATH=first)
    assert said["MARK"] == "newer"
    assert said["FILE"] == said["CHILD"] != f"{first}/kaggle_mgpu/__init__.py"


def test_a_damaged_payload_says_so(cell: Path, tmp_path: Path) -> None:
    source = cell.read_text()
    middle = source.index('b85decode("') + 300
    for broken in (source[:middle] + source[middle + 5 :], source[:middle] + "," + source[middle + 1 :]):
        cell.write_text(broken)
        done = call(tmp_path, "-S", str(cell))
        assert done.returncode == 1
        assert re.search("^(OSError: Invalid data stream|ValueError: bad base85)", done.stderr, re.MULTILINE), (
            done.stderr
        )
    assert "an error in the next line: the copy is damaged, download the notebook again" in source
    assert list((tmp_path / "tmp").iterdir()) == []


# Running
def test_a_parameter_the_notebook_does_not_have(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(repo)
    capsys.readouterr()
    assert tool.main(["--root", str(repo), "run", "tiny", "-p", "epoch", "3"]) == 1
    assert capsys.readouterr().err == (
        "tiny.ipynb has no parameter 'epoch'. Did you mean 'epochs'? It has: epochs, lr, data_path, output_dir, fail.\n"
    )
    assert not (repo / "build").exists()


def test_run_refuses_a_notebook_that_is_not_built(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(repo)
    append("kaggle_mgpu/__init__.py", "#\n")(repo)
    assert tool.main(["--root", str(repo), "run", "tiny"]) == 1
    assert "First: python tools/notebooks.py build" in capsys.readouterr().err
    assert tool.main(["--root", str(repo), "run", "nothing"]) == 1
    assert "no notebook nothing. There are: tiny\n" in capsys.readouterr().err
    assert tool.main(["--root", str(repo), "run", "tinny"]) == 1
    assert "no notebook tinny. Did you mean tiny? There are: tiny\n" in capsys.readouterr().err


def test_what_is_no_notebook_or_no_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.ipynb").write_text("{")
    assert tool.main(["run", str(tmp_path / "damaged.ipynb")]) == 1
    assert f"{tmp_path / 'damaged.ipynb'}: not a notebook: " in capsys.readouterr().err
    assert tool.main(["--root", str(tmp_path), "build"]) == 1
    assert "expected the notebooks' sources, *.py, found none" in capsys.readouterr().err


def test_run_executes_and_judges(repo: Path, tmp_path: Path) -> None:
    built(repo)
    command = [str(TOOL), "--root", str(repo), "run", "tiny", "--output", str(tmp_path / "made" / "x.ipynb")]
    given = ["-p", "epochs", "5", "-p", "lr=2e-4", "-p", "data_path", "a/b.txt"]
    done = call(tmp_path, *command, *given)
    assert done.returncode == 0, done.stderr
    assert f"kernel {sys.executable} epochs 5 lr 0.0002 data 'a/b.txt' genuine" in done.stdout
    assert "finished: True, step 5 of 7, {'loss': 0.0002}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"executed notebook: {tmp_path / 'made' / 'x.ipynb'}"
    assert (tmp_path / "made" / "out" / "result.json").is_file()

    failed = call(tmp_path, *command, "-y", "fail: true")
    assert failed.returncode == 1
    assert "OSError: the disk is full" in failed.stderr
    assert str(tmp_path / "made" / "x.ipynb") in failed.stderr

    nothing = call(tmp_path, *command, "-p", "output_dir", "", "--cwd", str(tmp_path / "empty"))
    assert nothing.returncode == 1
    assert f"expected {tmp_path / 'empty' / 'result.json'} after the run, found none" in nothing.stderr


def test_a_kernel_that_did_not_get_its_port_is_started_again(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jupyter chooses ports for a kernel, and lets them go until the kernel has started."""
    import papermill

    calls: list[str] = []

    def execute(path: str, output: str, *, cwd: str, **_: Any) -> None:
        calls.append(path)
        if len(calls) < fails + 1:
            raise RuntimeError(runs.NO_KERNEL)
        (Path(cwd) / "out").mkdir()
        (Path(cwd) / "out" / "result.json").write_text('{"finished": true}')

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    built(repo)
    command = ["--root", str(repo), "run", "tiny", "--output", str(tmp_path / "made" / "x.ipynb")]
    fails = 3
    assert tool.main(command) == 1
    assert len(calls) == 3
    assert f"tiny.ipynb failed: {runs.NO_KERNEL}" in capsys.readouterr().err
    fails = 4
    assert tool.main(command) == 0
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("None", None),
        ("True", True),
        ("auto", "auto"),
        ("['a']", ["a"]),
        ("a/b.txt", "a/b.txt"),
    ],
)
def test_values_on_the_command_line(text: str, value: Any) -> None:
    assert tool.literal(text) == value
    assert type(tool.literal(text)) is type(value)


# The text generation notebook
@pytest.fixture
def notebook(tmp_path: Path) -> Any:
    """The real notebook up to the cell that makes the config."""
    made = tool.build(SOURCE, ROOT / "kaggle_mgpu")
    last = next(i for i, cell in enumerate(made.cells) if "Config.from_dict" in cell.source)
    del made.cells[last + 1 :]
    return made


def papermill(notebook: Any, tmp_path: Path, **given: Any) -> tuple[subprocess.CompletedProcess[str], Any]:
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = ["-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", "--start-timeout", "600"]
    command += ["-y", json.dumps(given)]
    done = runs.papermill(lambda: call(tmp_path, *command))
    return done, nbformat.read(tmp_path / "out.ipynb", as_version=4)


def test_papermill_with_a_misspelt_parameter_fails(notebook: Any, tmp_path: Path) -> None:
    done, _ = papermill(notebook, tmp_path, epoch=3)
    assert done.returncode == 1
    assert "TypeError: Config has no parameter 'epoch'. Did you mean 'epochs'?" in re.sub(
        r"\x1b\[[\d;]*m", "", done.stderr
    )


def test_parameters_reach_the_config_in_any_order_of_work(notebook: Any, tmp_path: Path) -> None:
    """A notebook at work: papermill's values, fields that the cell does not list, cells run again after others."""
    new = nbformat.v4.new_code_cell
    show = new("print('SEEN', config.max_steps, config.lr, config.warmup_steps, prompts)")
    scratch = new("x = 3\nlearning_rate = 0.1\nresult = object()")
    again = new(tagged(notebook, "parameters").source.replace('lr = "auto"', "lr = 5e-3"))
    notebook.cells += [show, scratch, again, new(notebook.cells[-1].source), new(show.source)]
    (tmp_path / "text.txt").write_text("A text that is long enough to be split. " * 400)
    tagged(notebook, "parameters").source += "\nwarmup_steps = 3"
    done, out = papermill(
        notebook, tmp_path, data_path="text.txt", tokenizer="byte", max_steps=6, lr="2e-4", prompts=["Hm"]
    )
    assert done.returncode == 0, done.stderr
    text = "".join(output.get("text", "") for cell in out.cells for output in cell.get("outputs", []))
    first, second = re.findall("SEEN (.*)", text)
    assert first == "6 0.0002 3 ['Hm']"
    assert second.startswith("None 0.005 0.03 ['The ")


def test_end_to_end_on_two_processes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(ROOT / "kaggle_mgpu", root / "kaggle_mgpu", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    shutil.copy(SOURCE, root / "notebooks")
    built(root, SOURCE.stem)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"Line {i} of a short text: {i * i} is the square of {i}." for i in range(600)))
    tiny = {
        "data_path": str(corpus), "tokenizer": "byte", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32,
        "max_steps": 6, "global_batch_size": 8, "nproc": 2, "log_every": 1, "eval_every": 3, "output_dir": "a run",
        "max_new_tokens": 20, "prompts": ["Line"],
    }  # fmt: skip
    given = [text for name, value in tiny.items() for text in ("-p", name, str(value))]
    command = [str(TOOL), "--root", str(root), "run", "text_generation", "--output", str(tmp_path / "work" / "x.ipynb")]
    begun = time.perf_counter()
    done = call(tmp_path, *command, *given)
    print(f"the notebook took {time.perf_counter() - begun:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "work" / "a run"
    result = json.loads((run / "result.json").read_text())
    assert (result["finished"], result["step"], result["world_size"]) == (True, 6, 2)
    assert {"model.safetensors", "best", "metrics.jsonl", "config.json"} <= {path.name for path in run.iterdir()}
    executed = nbformat.read(tmp_path / "work" / "x.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"kaggle_mgpu from \S+/kaggle_mgpu-copy/site-packages\n", text)
    for row in ("unigram", "bigram", "this model"):
        assert re.search(rf"^{row} +\d+\.\d{{3}} +\d+\.\d +\d+\.\d{{3}}$", text, re.MULTILINE), text
    assert re.search(r"^Line.*\n-{80}$", text, re.MULTILINE | re.DOTALL)
    assert any("image/png" in output.get("data", {}) for output in outputs)


# kernel-metadata.json
def test_kernel_metadata() -> None:
    """What `kaggle kernels push` (kaggle 2.2) asks for, and what it does not ask for and should."""
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    owner, slug = metadata["id"].split("/")
    assert owner == "INSERT_KAGGLE_USERNAME"
    assert len(slug) >= 5
    assert 5 <= len(metadata["title"]) <= 50
    assert re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower()).strip("-") == slug
    assert (ROOT / metadata["code_file"]).is_file()
    assert metadata["code_file"].endswith(".ipynb")
    assert (ROOT / metadata["code_file"]).stat().st_size < 700_000
    assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    wanted = {"is_private": True, "enable_gpu": True, "enable_tpu": False, "enable_internet": False}
    assert {name: metadata[name] for name in wanted} == wanted
    assert all(type(metadata[name]) is bool for name in wanted)
    for name in ("dataset_sources", "competition_sources", "kernel_sources", "model_sources", "keywords"):
        assert metadata[name] == []
    known = {"id", "title", "code_file", "language", "kernel_type", "machine_shape", "keywords", *wanted}
    assert {name for name in metadata if not name.endswith("_sources")} == known
