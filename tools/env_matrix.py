"""Test `env.fix()` in real environments: TensorFlow x protobuf x notebook stack, each in a real first cell.

    python tools/env_matrix.py                                        # all of it; `make test-env` does the same
    python tools/env_matrix.py --tensorflow 2.19.0 --protobuf 6.33.6 --stack kaggle

Environments are made once under build/envs (about 2 GB per TensorFlow, needs a package registry); every run uses a
fresh copy of hard links with another protobuf. Four notebooks run under papermill in each copy: without `env.fix()`
(must fail or write noise where `expected` says so), with `env.fix()`, with an unknown line from TensorFlow, and with a
real error. The Python is the one that runs this file. The table goes to build/envs/table.md. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "envs"
TENSORFLOWS = ("2.18.0", "2.19.0", "2.20.0")
PROTOBUFS = ("3.20.3", "4.25.8", "5.29.5", "6.33.6", "7.36.2")  # 2.20.0 with 5.29.5 is Kaggle's own pair
STACKS = {
    "kaggle": ("ipykernel==6.17.1", "ipython==7.34.0", "nbclient==0.5.13", "papermill==2.7.0", "setuptools<80"),
    "newest": ("ipykernel", "ipython", "nbclient", "papermill"),
}
BESIDE = ("wandb", "setuptools<80")  # wandb has generated code of its own, and brings googleapis and opentelemetry
REGISTRATION = re.compile(r"Unable to register cu\w+ factory|computation placer already|absl::InitializeLog")
GET_PROTOTYPE = "'MessageFactory' object has no attribute 'GetPrototype'"
MODULES = (
    "google.protobuf google.rpc.status_pb2 opentelemetry.proto.trace.v1.trace_pb2 wandb onnx tensorboard "
    "tensorboard.compat.proto.graph_pb2 tensorboard.plugins.hparams.summary_v2 tensorboard.main_lib "
    "tensorflow tensorflow.core.framework.graph_pb2 tensorflow.python.framework.ops keras"
).split()

PLAIN = "import tensorflow as tf"
FIX = """
import time
begin = time.perf_counter()
from kaggle_mgpu import env
imported = time.perf_counter()
env.fix()
print("fix() took", round(1000 * (time.perf_counter() - imported), 1), "ms, its import", round(imported - begin, 3))
"""
WORK = """
assert float(tf.reduce_sum(tf.matmul(tf.ones((3, 4)), tf.ones((4, 5))))) == 60.0
with tf.GradientTape() as tape:
    weight = tf.Variable(3.0)
    tape.watch(weight)
    loss = weight**2
assert float(tape.gradient(loss, weight)) == 6.0
from google.protobuf import json_format, struct_pb2
message = json_format.ParseDict({"a": [1, 2, {"b": "text"}]}, struct_pb2.Struct())
assert struct_pb2.Struct.FromString(message.SerializeToString()) == message
example = tf.train.Example(features=tf.train.Features(feature={"x": tf.train.Feature(int64_list={"value": [1, 2]})}))
parsed = tf.io.parse_single_example(example.SerializeToString(), {"x": tf.io.FixedLenFeature([2], tf.int64)})
assert parsed["x"].numpy().tolist() == [1, 2]
graph = tf.function(lambda x: x + 1).get_concrete_function(tf.TensorSpec([], tf.float32)).graph.as_graph_def()
assert type(graph).FromString(graph.SerializeToString()) == graph
print("computed with", tf.__version__)
"""
# makes TensorFlow write an unknown line: a warning about a value that it does not understand
UNKNOWN = "import os; os.environ |= {'TF_CPP_MIN_LOG_LEVEL': '1', 'TF_ENABLE_ONEDNN_OPTS': 'maybe'}\n"
UNKNOWN_LINE = "TF_ENABLE_ONEDNN_OPTS is not set to either"
REAL_ERROR = "import sys; sys.modules['h5py'] = sys.modules['astunparse'] = None  # TensorFlow's own import fails\n"
IMPORTER = """
import importlib, sys
if sys.argv[1] == "fixed":
    from kaggle_mgpu import env
    env.fix(verbose=False)
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except BaseException:
        continue
    print("\\nok", name, flush=True)
"""


# Environments
def _call(command: Sequence[Any], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False, **more)


def pip(environment: Path, *arguments: str, timeout: float | None = None) -> None:
    """Run pip in an environment.

    Raises:
        RuntimeError: pip failed; the text ends with the last lines of pip's output.
        TimeoutExpired: pip took longer than `timeout` seconds.
    """
    command = [environment / "bin/python", "-m", "pip", "--disable-pip-version-check", *arguments]
    done = _call(command, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"pip {' '.join(arguments)} failed in {environment}:\n{done.stderr[-2000:]}")


def cached(name: str, start: Path | None, *installs: Sequence[str], timeout: float | None = None) -> Path:
    """Return an environment under build/envs; if missing, make a venv or a copy of `start`, and install packages."""
    target = CACHE / name
    if not (target / "complete").is_file():
        shutil.rmtree(target, ignore_errors=True)
        if start is None:
            CACHE.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
        else:
            copy(start, target)
        for arguments in installs:
            pip(target, "install", "--quiet", *arguments, timeout=timeout)
        (target / "complete").touch()
    return target


def copy(source: Path, target: Path) -> Path:
    """Copy an environment as hard links, in a second; safe because pip replaces files instead of writing to them."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link, ignore=shutil.ignore_patterns("complete"))
    return target


def environment(tensorflow: str, stack: str) -> Path:
    name = f"py{sys.version_info.major}{sys.version_info.minor}-tf-{tensorflow}"
    base = cached(name, None, (f"tensorflow=={tensorflow}", *BESIDE), ("--no-deps", "onnx"))
    return cached(f"{name}-{stack}", base, STACKS[stack])


def with_protobuf(source: Path, protobuf: str, target: Path) -> Path:
    """Copy an environment and install another protobuf without checking dependencies, as `pip install onnx` does."""
    pip(copy(source, target), "install", "--quiet", "--no-deps", f"protobuf=={protobuf}")
    return target


# Notebooks
@dataclass
class Outcome:
    """The result of a notebook under papermill."""

    rc: int
    error: str  # name and value of the first output of type error, or ""
    text: str  # all output of the notebook, papermill and the kernel


def run_notebook(environment: Path, *cells: str, folder: Path | None = None, **variables: str) -> Outcome:
    """Run a notebook of these cells in an environment, with only the checkout on PYTHONPATH."""
    folder = folder or environment / "run"
    folder.mkdir(exist_ok=True)
    code: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {
        "cells": [{**code, "id": f"cell-{i}", "source": cell} for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (folder / "in.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (folder / "out.ipynb").unlink(missing_ok=True)
    # a busy machine may take longer than papermill's minute to start a kernel
    options = ["--no-progress-bar", "--start-timeout", "600"]
    command = [environment / "bin/python", "-m", "papermill", *options, "in.ipynb", "out.ipynb"]
    for _ in range(3):  # again if another process took the kernel's ports before its start
        done = _call(command, cwd=folder, env=clean(folder, **variables))
        if "Kernel died before replying to kernel_info" not in done.stderr:
            break
    executed = json.loads((folder / "out.ipynb").read_text(encoding="utf-8")) if done.returncode >= 0 else {"cells": []}
    outputs = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
    errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    return Outcome(done.returncode, (errors or [""])[0], done.stdout + done.stderr + json.dumps(outputs))


def clean(home: Path, **variables: str) -> dict[str, str]:
    """Return environment variables without the developer's own."""
    fixed = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    return {**given, **fixed, **variables}


def _python(environment: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _call([environment / "bin/python", "-c", code, *arguments], env=clean(environment))


def importable(environment: Path, mode: str) -> tuple[set[str], str]:
    """Return the importable MODULES, and stderr, of a process with `env.fix()` ("fixed") or without ("plain")."""
    done = _python(environment, IMPORTER, mode, *MODULES)
    return {line[3:] for line in done.stdout.splitlines() if line.startswith("ok ")}, done.stderr


# One cell of the matrix
def expected(tensorflow: str, protobuf: str) -> str:
    """Return the plain notebook's outcome: "fails: GetPrototype", "cannot import", "noise" or "information"."""
    old, version = tensorflow < "2.20", tuple(map(int, protobuf.split(".")))
    if not old:
        return "cannot import" if version < (5, 28, 3) else "information"
    return "fails: GetPrototype" if version >= (6, 30) else "noise"


@dataclass
class Row:
    """The findings for one environment."""

    tensorflow: str
    protobuf: str
    stack: str
    plain: str
    fixed: str = ""
    lost: str = ""
    milliseconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.problems.append(what)


def check_pair(tensorflow: str, protobuf: str, stack: str) -> Row:
    """Run all notebooks in one environment and return the findings."""
    here = with_protobuf(environment(tensorflow, stack), protobuf, CACHE / "work")
    kind = expected(tensorflow, protobuf)
    row = Row(tensorflow, protobuf, stack, kind)

    plain = run_notebook(here, PLAIN)
    noise = bool(REGISTRATION.search(plain.text))
    if kind == "fails: GetPrototype":
        row.check(plain.rc != 0 and GET_PROTOTYPE in plain.error, f"plain did not fail: {plain.rc} {plain.error}")
        row.check(noise, "plain made no noise")
        row.plain = "**fails**: `GetPrototype`; noise"
    elif kind == "noise":
        row.check(plain.rc == 0 and noise, f"plain made no noise: {plain.rc} {plain.error}")
        row.plain = "works; noise"
    elif kind == "information":
        row.check(plain.rc == 0 and not noise and "oneDNN" in plain.text, f"plain: {plain.rc} {plain.error}")
        row.plain = "works; lines of information"
    else:
        row.check(plain.rc != 0 and "ImportError" in plain.error, f"plain did not fail: {plain.rc} {plain.error}")
        row.plain = "**fails**: cannot import"

    if kind == "cannot import":
        told = run_notebook(here, FIX, PLAIN)
        row.check(told.rc != 0 and "ImportError" in told.error, f"the real error is not shown: {told.rc} {told.error}")
        named = r"tensorflow +needs protobuf [\d.]+, but [\d.]+ is installed: (pip install .+?), then restart"
        found = re.search(named, told.text)
        row.check(found is not None, f"no command is named: {told.text[-1500:]}")
        shell = _call([here / "bin/python", "-m", "kaggle_mgpu.env"], env=clean(here))
        row.check(shell.returncode == 1, f"python -m kaggle_mgpu.env ended with {shell.returncode}")
        row.fixed = "the first line names the command that mends it"
        if found:
            command = found[1].replace('\\"', '"')
            # bin/pip of a copied venv names the interpreter of the original: python -m pip is the same command
            _call(["bash", "-c", f'"{here}/bin/python" -m {command}'], env=clean(here))
    # on the newest stack a single notebook covers the unknown line too, to save time
    full = stack == "kaggle"
    fixed = run_notebook(here, FIX if full else UNKNOWN + FIX, PLAIN, WORK)
    row.check(fixed.rc == 0 and not fixed.error, f"fixed: {fixed.rc} {fixed.error or fixed.text[-3000:]}")
    row.check(f"computed with {tensorflow}" in fixed.text, "the last line of the work is missing")
    row.check(not REGISTRATION.search(fixed.text) and GET_PROTOTYPE not in fixed.text, f"noise is left: {fixed.text}")
    took = re.search(r"fix\(\) took ([\d.]+) ms", fixed.text)
    row.milliseconds = float(took[1]) if took else 0.0
    row.fixed = row.fixed or "works, silent"
    unknown = run_notebook(here, UNKNOWN + FIX, PLAIN) if full else fixed
    row.check(unknown.rc == 0 and not unknown.error, f"unknown line: {unknown.rc} {unknown.error}")
    row.check(UNKNOWN_LINE in unknown.text, "an unknown C++ line is not shown")
    row.check(not REGISTRATION.search(unknown.text), "noise beside the unknown line")
    if not full:
        return row

    error = run_notebook(here, FIX, REAL_ERROR + PLAIN)
    shown = error.rc != 0 and "Error: import of" in error.error
    row.check(shown, f"a real error is not shown: {error.rc} {error.error}")
    loud = _python(here, "from kaggle_mgpu import env; env.fix(quiet=False); import tensorflow")
    row.check(loud.returncode == 0 and bool(REGISTRATION.search(loud.stderr)) == (tensorflow < "2.20"), "quiet=False")
    (before, _), (after, stderr) = importable(here, "plain"), importable(here, "fixed")
    row.check(not REGISTRATION.search(stderr) and GET_PROTOTYPE not in stderr, f"noise in a worker: {stderr[-1500:]}")
    row.check(before <= after, f"no longer importable: {sorted(before - after)}")
    row.check("tensorflow" in before, "tensorflow is not among what can be imported")
    row.lost = ", ".join(sorted(before - after)) or f"none of {len(before)}"
    return row


def check_pin() -> list[str]:
    """Check `--protobuf pin`: refused with a list of packages where needed, else installed and working."""
    problems = []

    def pin(here: Path) -> tuple[str, str]:
        done = _call([here / "bin/python", "-m", "kaggle_mgpu.env", "--protobuf", "pin"], env=clean(here))
        version = _python(here, "import google.protobuf as p; print(p.__version__)").stdout.strip()
        return f"{done.returncode}\n{done.stdout}{done.stderr}", version

    here = with_protobuf(environment("2.19.0", "kaggle"), "6.33.6", CACHE / "work")
    said, version = pin(here)
    if not (said.startswith("1\n") and re.search("would break .*onnx.*wandb", said) and version == "6.33.6"):
        problems.append(f"not refused: {version} {said}")
    pip(here, "uninstall", "--quiet", "--yes", "onnx", "wandb")
    said, version = pin(here)
    if not (said.startswith("0\n") and "verified in a fresh interpreter" in said and version == "3.20.3"):
        problems.append(f"not pinned: {version} {said}")
    work = run_notebook(here, FIX, PLAIN, WORK)
    if work.rc != 0 or "computed with" not in work.text:
        problems.append(f"pinned, it does not compute: {work.error}")
    here = with_protobuf(environment("2.20.0", "kaggle"), "5.29.5", CACHE / "work")
    said, version = pin(here)
    if not (said.startswith("1\n") and "tensorflow (needs 5.28.3)" in said and version == "5.29.5"):
        problems.append(f"Kaggle's own pair: not refused: {version} {said}")
    return problems


def table(rows: Sequence[Row]) -> str:
    """Return the matrix as a Markdown table with a line per pair of versions."""
    text = "| TensorFlow | protobuf | without `env.fix()` | with it | imports lost |\n|---|---|---|---|---|\n"
    for tensorflow, protobuf in dict.fromkeys((row.tensorflow, row.protobuf) for row in rows):
        same = [row for row in rows if (row.tensorflow, row.protobuf) == (tensorflow, protobuf)]
        failed = "; ".join(f"{row.stack}: {problem}" for row in same for problem in row.problems)
        columns = [
            " / ".join(dict.fromkeys(values)) for values in zip(*((r.plain, r.fixed) for r in same), strict=True)
        ]
        lost = "".join(row.lost for row in same)
        text += f"| {tensorflow} | {protobuf} | {columns[0]} | {columns[1] if not failed else 'FAILED'} | {lost} |\n"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prove env.fix() on real environments.")
    parser.add_argument("--tensorflow", action="append", help=f"default: {' '.join(TENSORFLOWS)}")
    parser.add_argument("--protobuf", action="append", help=f"default: {' '.join(PROTOBUFS)}")
    parser.add_argument("--stack", action="append", choices=sorted(STACKS), help="default: both")
    parser.add_argument("--pin", action="store_true", help="check protobuf='pin' even for a part of the matrix")
    parser.add_argument("--resume", action="store_true", help="skip what an interrupted run found to be right")
    arguments = parser.parse_args(argv)
    record = CACHE / "rows.json"
    rows: list[Row] = []
    if arguments.resume and record.is_file():
        rows = [Row(**row) for row in json.loads(record.read_text(encoding="utf-8")) if not row["problems"]]
    done = {(row.tensorflow, row.protobuf, row.stack) for row in rows}
    for tensorflow in arguments.tensorflow or TENSORFLOWS:
        for protobuf in arguments.protobuf or PROTOBUFS:
            for stack in arguments.stack or STACKS:
                if (tensorflow, protobuf, stack) in done:
                    continue
                began = time.monotonic()
                row = check_pair(tensorflow, protobuf, stack)
                rows.append(row)
                record.write_text(json.dumps([vars(row) for row in rows], indent=1), encoding="utf-8")
                state = "ok" if not row.problems else "FAILED: " + "; ".join(row.problems)
                took = f"{time.monotonic() - began:.0f} s, fix() {row.milliseconds} ms"
                print(f"{tensorflow} x {protobuf} x {stack}: {row.plain} -> {row.fixed} ({took}) {state}", flush=True)
    problems = []
    if arguments.pin or not (arguments.tensorflow or arguments.protobuf):
        problems = check_pin()
        print("\n".join([f"pin FAILED: {problem}" for problem in problems] or ["pin: ok"]))
    rows.sort(key=lambda row: [*map(int, row.tensorflow.split(".")), *map(int, row.protobuf.split("."))])
    (CACHE / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))
    shutil.rmtree(CACHE / "work", ignore_errors=True)
    return 1 if problems or any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
