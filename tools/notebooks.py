"""Build, check and run the notebooks.

    python tools/notebooks.py build                # notebooks/*.py (jupytext percent format) -> notebooks/*.ipynb
    python tools/notebooks.py check                # exit 1, with names, where an .ipynb is not what its source makes
    python tools/notebooks.py run text_generation -p epochs 1 --output build/x.ipynb
    python tools/notebooks.py carry my_notebook.ipynb   # put the package into a notebook of your own

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
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import time
import unittest.mock
import warnings
from collections.abc import Collection
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


# The package inside the notebook: one line of text that holds its files and this function, which may use the standard
# library only. A saved page shows the cell even where Kaggle hides it, so all of it is in that line.
def _carry(files: dict[str, str]) -> str:
    """Make kaggle_mgpu importable, here and in subprocesses, and return its folder.

    An install, a checkout above the notebook and a package among the inputs win, in this order.
    """
    # A copy that another notebook has left in PYTHONPATH may be older
    sys.path[:] = [path for path in sys.path if "kaggle_mgpu" in sys.modules or "/kaggle_mgpu-copy/" not in path]
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("kaggle_mgpu")
    if spec is not None and spec.origin is not None:
        return os.path.dirname(os.path.dirname(os.path.abspath(spec.origin)))
    inputs = os.environ.get("KAGGLE_MGPU_KAGGLE_ROOT", "/kaggle") + "/input"
    folders = ["..", *sorted(glob.glob(f"{inputs}/*s/*/*")), *sorted(glob.glob(f"{inputs}/*"))]
    near = [folder for folder in folders if os.path.isfile(f"{folder}/kaggle_mgpu/__init__.py")]
    # dill pickles modules by value unless their folder is called site-packages
    folder = os.path.abspath(near[0]) if near else f"{tempfile.mkdtemp()}/kaggle_mgpu-copy/site-packages"
    for name, text in () if near else files.items():
        os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
        with open(f"{folder}/{name}", "w", encoding="utf-8", newline="") as file:
            file.write(text)
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    return folder


DATA = re.compile(r'b85decode\("([^"\n]*)"\)')


def content_sha256(files: dict[str, bytes]) -> str:
    """sha256 over the files' names, sizes and contents: it does not depend on how they were packed."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()


def package_files(package: Path) -> dict[str, bytes]:
    """The package's Python files, by their path in a site-packages folder."""
    paths = sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)
    if not paths:
        raise NotebookError(f"no Python files in {package}: expected the package kaggle_mgpu there")
    return {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}


def version_of(files: dict[str, bytes]) -> str:
    """The package's version, as its __init__.py has it."""
    init = files.get("kaggle_mgpu/__init__.py", b"").decode()
    version = re.search(r"^__version__ = [\"'](.+?)[\"']", init, re.MULTILINE)
    return version[1] if version else "unknown"


def payload_source(files: dict[str, bytes]) -> str:
    """The source of the payload cell; the same files make the same text."""
    texts = {name: files[name].decode() for name in sorted(files)}
    modules = "glob", "importlib.util", "os", "sys", "tempfile"
    program = [f"files = {texts!a}", *(f"import {name}" for name in modules), inspect.getsource(_carry)]
    program += ['print("kaggle_mgpu from", _carry(files))']
    # of 350 kB: bzip2 85, xz 92; with base64 in place of base85 6 % more. The notebook must stay small enough to push
    data = base64.b85encode(bz2.compress("\n".join(program).encode(), 9)).decode()
    return (
        f"# kaggle_mgpu {version_of(files)}: all {len(files)} files of its wheel, sha256 {content_sha256(files)}\n"
        "# An installed or attached kaggle_mgpu is used instead. Its source: in the folder that this cell prints.\n"
        "import base64, bz2  # an error in the next line: the copy is damaged, download the notebook again\n"
        f'exec(bz2.decompress(base64.b85decode("{data}")), {{}})'
    )


def payload_files(source: str) -> dict[str, bytes]:
    """The files that a payload cell carries.

    Raises:
        NotebookError: the cell carries none, or is damaged.
    """
    try:
        data = DATA.search(source)
        program = bz2.decompress(base64.b85decode(data[1] if data else ""))
        texts: dict[str, str] = ast.literal_eval(program.decode().partition("\n")[0].removeprefix("files = "))
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise NotebookError(f"the copy of kaggle_mgpu in the notebook is damaged ({error})") from None
    return {name: text.encode() for name, text in texts.items()}


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


def read(path: Path) -> Any:
    """The notebook in a file, in the newest format, whose cells have ids.

    Raises:
        NotebookError: there is no such file, or it is no notebook.
    """
    try:
        notebook = _library("nbformat").read(path, as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"no such notebook: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: nbformat's own are some
        raise NotebookError(f"{path}: not a notebook: {str(error).splitlines()[0]}") from None
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    for number, cell in enumerate(notebook.cells, 1):
        cell.setdefault("id", f"cell-{number}")
    return notebook


def load(source: Path, package: Path) -> Any:
    """The notebook that a percent source makes, or one of the user's own without outputs and papermill's notes."""
    if source.suffix != ".ipynb":
        return build(source, package)
    notebook = read(source)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)  # of an earlier run: its parameters, and paths of this machine
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def carry(path: Path, package: Path) -> str:
    """Put the payload cell into a notebook, above its first code cell, or renew it; return what was done."""
    notebook, nbformat = read(path), _library("nbformat")
    files = package_files(package)
    payload = nbformat.v4.new_code_cell(payload_source(files), metadata=PAYLOAD_METADATA)
    payload.id = "payload"
    number = next((i for i, cell in enumerate(notebook.cells) if "payload" in tags(cell)), None)
    if number is None:
        code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        notebook.cells.insert(code[0] if code else len(notebook.cells), payload)
    else:
        notebook.cells[number] = payload
    notebook.metadata.setdefault("kernelspec", nbformat.from_dict(METADATA["kernelspec"]))
    path.write_text(dumps(notebook), encoding="utf-8")
    return f"{path}: carries kaggle_mgpu {version_of(files)}, {path.stat().st_size:,} bytes"


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
    except NotebookError as error:
        return [str(error)]
    files = payload_files(wanted.source)
    lines = [f"{name} is missing" for name in sorted(files.keys() - got.keys())]
    lines += [f"{name} is not in the package" for name in sorted(got.keys() - files.keys())]
    lines += [
        f"{name} differs from the package" for name in sorted(files.keys() & got.keys()) if files[name] != got[name]
    ]
    if DATA.sub("", cell.source) != DATA.sub("", payload_source(got)):
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


def check_names(notebook: Any, given: Collection[str], where: str) -> None:
    """Whether the notebook knows these parameters: papermill only warns of one that it does not.

    Raises:
        NotebookError: it does not; the message lists those it has.
    """
    known, fields = list(parameters(notebook)), config_fields(notebook)
    if given and not any("parameters" in tags(cell) for cell in notebook.cells):
        raise NotebookError(f"{where} has no cell tagged 'parameters', which -p sets: tag the cell with your settings")
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


def _execute(path: Path, given: dict[str, Any], output: Path, folder: Path) -> None:
    """Run a notebook's cells with papermill."""
    papermill = _library("papermill")
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


def run(path: Path, given: dict[str, Any], output: Path, folder: Path) -> dict[str, Any]:
    """Execute a notebook with papermill in `folder`, and return what its result.json says.

    Raises:
        NotebookError: a parameter the notebook does not have, a cell that failed, a run that left no result.
    """
    notebook = read(path)
    check_names(notebook, given, path.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / str({**parameters(notebook), **given}.get("output_dir", "")) / "result.json"
    before = time.time()
    # nobody watches the cell: lines, as in a Kaggle batch run
    with unittest.mock.patch.dict(os.environ, {"KAGGLE_MGPU_DISPLAY": os.environ.get("KAGGLE_MGPU_DISPLAY", "lines")}):
        _execute(path, given, output, folder)
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
            known = [path.stem.removesuffix("_kaggle_multigpu") for path in found]
            near = [known[found.index(path)] for path in hits] or difflib.get_close_matches(stem, known, n=1)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            what = "no notebook" if not hits else "several notebooks begin with"
            raise NotebookError(f"{what} {name}.{hint} There are: {', '.join(known)}")
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
    carrier = commands.add_parser("carry", help="put the package into a notebook of your own, or renew it there")
    carrier.add_argument("notebook", type=Path, help="the path of an .ipynb")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "carry":
            print(carry(arguments.notebook, arguments.root / "kaggle_mgpu"))
        elif arguments.command == "run":
            _run_command(arguments.root, arguments)
        else:
            (_build_command if arguments.command == "build" else _check_command)(arguments.root, arguments.names)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
