"""Build, check and run the notebooks.

    python tools/notebooks.py build                # notebooks/*.py (jupytext percent format) -> notebooks/*.ipynb
    python tools/notebooks.py check                # exit 1, with names, where an .ipynb is not what its source makes
    python tools/notebooks.py run text_generation -p epochs 1 --output build/x.ipynb

A built notebook is one file that works by itself: its cell tagged `payload` carries the package. `check` compares what
the files say, not their bytes, since another bzip2 packs the same files differently. `run` is papermill with the
misspelt parameter made an error; a run is judged by papermill's verdict and by the result.json it leaves.
"""

from __future__ import annotations

import argparse
import ast
import base64
import bz2
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 700_000
BUILD = "python tools/notebooks.py build"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    # What Kaggle itself writes: an uploaded notebook then starts with both T4s chosen and the internet off
    "kaggle": {
        "accelerator": "nvidiaTeslaT4",
        "dataSources": [],
        "isGpuEnabled": True,
        "isInternetEnabled": False,
        "language": "python",
        "sourceType": "notebook",
    },
}
PAYLOAD_METADATA = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}, "tags": ["payload"]}


class NotebookError(Exception):
    """Something is wrong with a notebook; the message says what, where and what to do."""


# The package inside the notebook. The functions whose names begin with an underscore are copied into the payload cell
# as they stand here: they may use the standard library and one another, and nothing else of this file.
def _content_sha256(files: dict[str, bytes]) -> str:
    """sha256 over the files' names, sizes and contents: it does not depend on how they were packed."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()


def _unpack(payload: str, expected: str) -> dict[str, bytes]:
    """The files in a zip, packed by bzip2 and written in base85, if their content is the expected one."""
    try:
        packed = bz2.decompress(base64.b85decode("".join(payload.split())))
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        got = _content_sha256(files)
    except Exception as error:  # bz2, zipfile and base64 each have their own
        got = f"no readable zip ({error})"
    if got != expected:
        raise RuntimeError(
            "The copy of kaggle_mgpu inside this notebook is damaged: expected content with sha256 "
            f"{expected}, got {got}. Download the notebook again (or, in a checkout: python tools/notebooks.py build)."
        )
    return files


def _intact(folder: str, files: dict[str, bytes]) -> bool:
    """Whether the folder is this user's alone and has these very files (and Python's caches of them)."""
    try:
        state = os.lstat(folder)
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
            return False
        found = {}
        for where, _, names in os.walk(os.path.join(folder, "site-packages")):
            for name in names if os.path.basename(where) != "__pycache__" else ():
                path = os.path.join(where, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, os.path.join(folder, "site-packages"))] = file.read()
        return found == files
    except OSError:
        return False


def _use_payload(payload: str, expected: str) -> str:
    """Make kaggle_mgpu importable, here and in subprocesses, and say where it is.

    A checkout or an install wins over the payload. The payload goes to a folder of this user's alone; several kernels
    may do that at once. The folder is called site-packages, since dill pickles modules from elsewhere by value.
    """

    def append(folder: str) -> None:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [path for path in paths if path and not path.startswith(ours)]
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, folder])
        sys.path.append(folder)
        importlib.invalidate_caches()

    if "kaggle_mgpu" in sys.modules:
        return os.path.dirname(os.path.dirname(os.path.abspath(str(sys.modules["kaggle_mgpu"].__file__))))
    ours = os.path.join(tempfile.gettempdir(), "kaggle_mgpu-")
    # Another notebook's payload, inherited through PYTHONPATH, is neither a checkout nor an install
    sys.path[:] = [path for path in sys.path if not path.startswith(ours)]
    importlib.invalidate_caches()
    found = importlib.util.find_spec("kaggle_mgpu")
    if found is not None and found.origin is not None:
        return os.path.dirname(os.path.dirname(os.path.abspath(found.origin)))
    if os.path.isfile("../kaggle_mgpu/__init__.py") and os.path.isfile("../tools/notebooks.py"):
        append(os.path.abspath(".."))  # a checkout, seen from its notebooks folder
        return os.path.abspath("..")
    files = _unpack(payload, expected)
    home = f"{ours}{expected[:16]}-{os.getuid()}"
    if not _intact(home, files):
        fresh = tempfile.mkdtemp(prefix=f"{os.path.basename(home)}.", dir=os.path.dirname(home))
        for name, content in files.items():
            path = os.path.join(fresh, "site-packages", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        try:
            os.rename(fresh, home)
        except OSError:  # something has that name: another kernel was first, or it is not to be trusted
            if _intact(home, files):
                shutil.rmtree(fresh)
            else:
                home = fresh
    append(os.path.join(home, "site-packages"))
    return os.path.join(home, "site-packages")


def package_files(package: Path) -> dict[str, bytes]:
    """The package's Python files, by their path in a site-packages folder."""
    paths = sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)
    if not paths:
        raise NotebookError(f"no Python files in {package}: expected the package kaggle_mgpu there")
    return {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}


def payload_source(files: dict[str, bytes]) -> str:
    """The source of the payload cell. The same files make the same bytes: sorted, with one time and one mode.

    The zip only holds the files; compressed as a whole they take a sixth less than each by itself.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, files[name])
    # of 350 kB: bzip2 85, xz 92; with base64 in place of base85 6 % more. The notebook must stay small enough to push
    text = base64.b85encode(bz2.compress(packed.getvalue(), 9)).decode()
    wrapped = "\n".join(text[i : i + 200] for i in range(0, len(text), 200))
    init = files.get("kaggle_mgpu/__init__.py", b"").decode()
    version = re.search(r"^__version__ = [\"'](.+?)[\"']", init, re.MULTILINE)
    names = " ".join(name.removeprefix("kaggle_mgpu/") for name in sorted(files))
    digest = _content_sha256(files)
    functions = [inspect.getsource(f).rstrip() for f in (_content_sha256, _unpack, _intact, _use_payload)]
    used = ("base64", "bz2", "hashlib", "importlib.util", "io", "os", "shutil", "stat", "sys", "tempfile", "zipfile")
    return "\n\n\n".join(
        [
            f"# kaggle_mgpu {version[1] if version else 'unknown'}, {len(files)} files, sha256 {digest}: {names}\n"
            + "# This cell makes the package importable; there is nothing to edit in it. Comments are left out.\n"
            + "\n".join(f"import {module}" for module in used),
            *functions,
            f'_payload = """\n{wrapped}\n"""\n_sha256 = "{digest}"\n'
            + 'print("kaggle_mgpu from", _use_payload(_payload, _sha256))',
        ]
    )


def payload_files(source: str) -> dict[str, bytes]:
    """The files that a payload cell carries.

    Raises:
        RuntimeError: they are not the ones whose sha256 the cell names, or there are none.
    """
    payload = re.search(r'_payload = """\n(.*?)\n"""', source, re.DOTALL)
    expected = re.search(r'_sha256 = "(.*?)"', source)
    return _unpack(payload[1] if payload else "", expected[1] if expected else "(none named)")


# Building and checking
def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise NotebookError(f"this needs the package {name!r}: pip install {name}") from None


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def build(source: Path, package: Path) -> Any:
    """The notebook that a percent source and the package make; equal inputs make equal notebooks.

    Raises:
        NotebookError: the source lacks a payload or parameters cell, or the notebook is invalid or too large.
    """
    jupytext, nbformat = _library("jupytext"), _library("nbformat")
    text = source.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    # What the notebook needs on Kaggle stands in its source's header, and goes with the notebook: see tools/kernels.py
    needs = notebook.metadata.get("kaggle_mgpu")
    notebook.metadata = nbformat.from_dict(METADATA | ({"kaggle_mgpu": needs} if needs else {}))
    for tag in ("payload", "parameters"):
        found = sum(tag in tags(cell) for cell in notebook.cells)
        if found != 1:
            raise NotebookError(f'{source}: expected one cell `# %% tags=["{tag}"]`, got {found}')
    used: set[str] = set()
    for cell in notebook.cells:
        if "payload" in tags(cell):
            cell.source, cell.metadata = (
                payload_source(package_files(package)),
                nbformat.from_dict(PAYLOAD_METADATA),
            )
        # From the text, so that an edit elsewhere leaves a cell's id alone; jupytext's own are random
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:8] if not tags(cell) else tags(cell)[0]
        cell.id = next(i for i in (name, *(f"{name}-{n}" for n in range(2, 1000))) if i not in used)
        used.add(cell.id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            nbformat.validate(notebook)
        except Exception as error:
            raise NotebookError(f"{source}: it does not make a valid notebook: {error}") from None
    size = len(dumps(notebook).encode())
    if size > MAX_BYTES:
        raise NotebookError(f"{source}: the notebook would have {size} bytes; expected {MAX_BYTES} at most")
    return notebook


def dumps(notebook: Any) -> str:
    return str(_library("nbformat").writes(notebook)) + "\n"


def differences(path: Path, expected: Any) -> list[str]:
    """How the notebook file differs from the one its source makes: one line for each difference."""
    if not path.is_file():
        return [f"{path.name}: not built"]
    try:
        notebook = _library("nbformat").reads(path.read_text(encoding="utf-8"), as_version=4)
    except Exception as error:
        return [f"{path.name}: not readable as a notebook: {error}"]
    lines = []
    if notebook.metadata != expected.metadata:
        lines.append("the notebook's metadata differ")
    if len(notebook.cells) != len(expected.cells):
        lines.append(f"expected {len(expected.cells)} cells, got {len(notebook.cells)}")
    for number, (cell, wanted) in enumerate(zip(notebook.cells, expected.cells, strict=False), 1):
        payload = "payload" in tags(wanted)
        where = f"cell {number} ({'payload' if payload else wanted.source.partition(chr(10))[0][:40]})"
        if cell.get("outputs") or cell.get("execution_count") is not None:
            lines.append(f"{where}: has outputs or an execution count; expected none")
        if payload:
            lines += [f"{where}: {line}" for line in _payload_differences(cell, wanted)]
        elif cell.source != wanted.source:
            lines.append(f"{where}: the text differs")
        if any(cell.get(key) != wanted.get(key) for key in ("id", "cell_type", "metadata")):
            lines.append(f"{where}: the id, type or metadata differ")
    return [f"{path.name}: {line}" for line in lines]


def _payload_differences(cell: Any, wanted: Any) -> list[str]:
    try:
        got = payload_files(cell.source)
    except RuntimeError as error:
        return [str(error)]
    files = payload_files(wanted.source)
    lines = [f"{name} is missing" for name in sorted(files.keys() - got.keys())]
    lines += [f"{name} is not in the package" for name in sorted(got.keys() - files.keys())]
    lines += [
        f"{name} differs from the package" for name in sorted(files.keys() & got.keys()) if files[name] != got[name]
    ]
    base64_text = r'(?s)(?<=_payload = """\n).*?(?=\n""")'
    if re.sub(base64_text, "", cell.source) != re.sub(base64_text, "", payload_source(got)):
        lines.append("the code around the payload differs")
    return lines


# Running
def parameters(notebook: Any) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`; a default that is no literal is given as its text."""
    cells = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    found: dict[str, Any] = {}
    for node in ast.parse(cells[0].source).body if cells else []:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                found[target.id] = literal(ast.unparse(node.value))
    return found


def config_fields(notebook: Any) -> list[str]:
    """What the notebook's Config takes: the fields of TrainConfig, and of each Config in the recipes it imports."""
    found: list[str] = []
    code = "\n".join(cell.source for cell in notebook.cells if "payload" not in tags(cell))
    files = {"kaggle_mgpu/config.py"}
    folders = tuple(f"kaggle_mgpu/recipes/{name}" for name in re.findall(r"kaggle_mgpu\.recipes\.(\w+)", code))
    for cell in notebook.cells:
        for name, content in payload_files(cell.source).items() if "payload" in tags(cell) else ():
            if name not in files and not name.removesuffix(".py").startswith(folders):
                continue
            for node in ast.parse(content).body:
                if isinstance(node, ast.ClassDef) and node.name in ("Config", "TrainConfig"):
                    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                    found += [
                        field.target.id
                        for field in fields
                        if isinstance(field.target, ast.Name) and "ClassVar" not in ast.unparse(field.annotation)
                    ]
    return list(dict.fromkeys(found))


def check_names(notebook: Any, given: Iterable[str], where: str) -> None:
    """Whether the notebook knows these parameters: papermill only warns of one that it does not.

    Raises:
        NotebookError: it does not; the message lists those it has.
    """
    known, fields = list(parameters(notebook)), config_fields(notebook)
    for name in given:
        if name not in known and name not in fields:
            both = list(dict.fromkeys([*known, *fields]))
            slip = difflib.get_close_matches(name, both, n=1, cutoff=0.85)
            around = [other for other in both if len(name) > 3 and name in other][:3]  # batch_size
            near = slip or around or difflib.get_close_matches(name, both, n=1)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            more = [field for field in fields if field not in known]
            more_text = f" Its Config also takes: {', '.join(more)}." if more else ""
            raise NotebookError(f"{where} has no parameter {name!r}.{hint} It has: {', '.join(known)}.{more_text}")


def literal(text: str) -> Any:
    """The Python value that a command line's text stands for: 1e-4 is a float, None is None, what is neither a str."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run(path: Path, given: dict[str, Any], output: Path, folder: Path) -> dict[str, Any]:
    """Execute a notebook with papermill in `folder`, and return what its result.json says.

    Raises:
        NotebookError: a parameter the notebook does not have, a cell that failed, a run that left no result.
    """
    nbformat, papermill = _library("nbformat"), _library("papermill")
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:  # ValueError: nbformat's own are some
        raise NotebookError(f"{path}: not a notebook: {str(error).splitlines()[0]}") from None
    check_names(notebook, given, path.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / str({**parameters(notebook), **given}.get("output_dir", "")) / "result.json"
    os.environ.setdefault("KAGGLE_MGPU_DISPLAY", "lines")  # nobody watches the cell: lines, as in a Kaggle batch run
    before = time.time()
    for last in (False, False, True):
        try:
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters=given,
                kernel_name="python3",
                cwd=str(folder),
                progress_bar=False,
                start_timeout=600,  # seconds; papermill's own, 60, are too few on a busy machine
                iopub_timeout=60,  # nor are nbclient's 4, after which what a cell has shown last is given up
                autosave_cell_every=5,  # what is left of the notebook when the kernel or the machine dies
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
            break
        except Exception as error:
            # its ports are chosen before it has them, and another process may have taken one: it has run nothing yet
            if not last and "Kernel died before replying to kernel_info" in str(error):
                continue
            raise NotebookError(f"{path.name} failed: {error}\nThe notebook as far as it came: {output}") from error
    if not result.is_file():
        raise NotebookError(
            f"{path.name}: expected {result} after the run, found none. The executed notebook: {output}"
        )
    said: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if not said.get("finished") and result.stat().st_mtime < before - 2:
        raise NotebookError(f"{path.name}: {result} is from an earlier run. The executed notebook: {output}")
    return said


# The command line
def sources(root: Path, names: list[str]) -> list[Path]:
    """The percent sources meant by names such as `text_generation`; all of them where no name is given."""
    found = sorted((root / "notebooks").glob("*.py"))
    if not found:
        raise NotebookError(f"{root / 'notebooks'}: expected the notebooks' sources, *.py, found none")
    chosen = []
    for name in names:
        stem = Path(name).stem
        hits = [path for path in found if path.stem == stem] or [path for path in found if path.stem.startswith(stem)]
        if len(hits) != 1:
            known = ", ".join(path.stem for path in found)
            raise NotebookError(f"{name!r}: expected the name of one notebook, got {len(hits)}. There are: {known}")
        chosen += hits
    return chosen or found


def _build_command(root: Path, names: list[str]) -> None:
    for source in sources(root, names):
        path, notebook = source.with_suffix(".ipynb"), build(source, root / "kaggle_mgpu")
        if not differences(path, notebook):
            print(f"{path}: up to date")  # rewriting it with another bzip2 would change bytes and nothing else
            continue
        text = dumps(notebook)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: built, {len(text.encode())} bytes of {MAX_BYTES} allowed")


def _check_command(root: Path, names: list[str]) -> None:
    chosen = sources(root, names)
    lines = [
        line for path in chosen for line in differences(path.with_suffix(".ipynb"), build(path, root / "kaggle_mgpu"))
    ]
    if not names:
        made = {path.with_suffix(".ipynb") for path in chosen}
        orphans = sorted(set((root / "notebooks").glob("*.ipynb")) - made)
        lines += [f"{path.name}: there is no {path.with_suffix('.py').name} that makes it" for path in orphans]
    if lines:
        raise NotebookError("\n".join([*lines, f"The notebooks are not what their sources make. Mend it: {BUILD}"]))
    print(f"up to date: {', '.join(path.stem for path in chosen)}")


def _run_command(root: Path, arguments: argparse.Namespace) -> None:
    if arguments.notebook.endswith(".ipynb"):
        path = Path(arguments.notebook).resolve()
    else:
        (source,) = sources(root, [arguments.notebook])
        path = source.with_suffix(".ipynb")
        # Without jupytext nothing can be rebuilt, and then nobody has edited the sources either
        if importlib.util.find_spec("jupytext") and (lines := differences(path, build(source, root / "kaggle_mgpu"))):
            raise NotebookError("\n".join([*lines, f"It would not run what the sources say. First: {BUILD}"]))
    if not path.is_file():
        raise NotebookError(f"no such notebook: {path}")
    given: dict[str, Any] = {}
    for words in arguments.parameter:  # NAME VALUE, as papermill has it, or NAME=VALUE, as tools/kernels.py has it
        name, value = words if len(words) == 2 else words[0].partition("=")[::2]
        if len(words) > 2 or (len(words) == 1 and "=" not in words[0]):
            raise NotebookError(f"-p {' '.join(words)}: expected NAME VALUE or NAME=VALUE")
        given[name] = literal(value)
    for text in arguments.yaml:
        values = _library("yaml").safe_load(text)
        if not isinstance(values, dict):
            raise NotebookError(f"-y: expected 'name: value', got {text!r}")
        given |= values
    output = (arguments.output or root / "build" / path.name).resolve()
    if output == path:
        raise NotebookError(f"--output: {output} is the notebook itself; expected another file")
    said = run(path, given, output, (arguments.cwd or output.parent).resolve())
    steps = f", step {said['step']} of {said.get('max_steps')}, {said.get('metrics')}" if "step" in said else ""
    print(f"finished: {said.get('finished')}{steps}")
    print(f"executed notebook: {output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, check and run the notebooks.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: the one this file is in)")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in {
        "build": "make the .ipynb files",
        "check": "compare them with their sources",
    }.items():
        commands.add_parser(command, help=text).add_argument("names", nargs="*", help="default: all notebooks")
    runner = commands.add_parser("run", help="execute a notebook with papermill")
    runner.add_argument("notebook", help="a name such as text_generation, or the path of an .ipynb")
    runner.add_argument("-p", "--parameter", nargs="+", action="append", default=[], metavar=("NAME=VALUE", "VALUE"))
    runner.add_argument("-y", "--yaml", action="append", default=[], metavar="'NAME: VALUE'")
    runner.add_argument("--output", type=Path, help="the executed notebook (default: build/NAME.ipynb)")
    runner.add_argument("--cwd", type=Path, help="where it runs (default: the folder of the output)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "run":
            _run_command(arguments.root, arguments)
        else:
            (_build_command if arguments.command == "build" else _check_command)(arguments.root, arguments.names)
    except (NotebookError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
