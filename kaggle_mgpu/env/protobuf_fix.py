"""This module compares the installed protobuf with the versions that other packages need, and can downgrade protobuf.

    installed()           # (6, 33, 6): the version that `import google.protobuf` would load
    floors(installed())   # {"tensorflow": (5, 28, 3), ...}: the oldest version for each package
    pin()                 # install protobuf==3.20.3, or raise RefusedError

From 5.27 on, the protobuf compiler writes its version into a package's `_pb2` files. The files refuse to load with an
older protobuf, so the compiler's version is the package's floor. (The requirements that packages declare to pip are
sometimes stricter and sometimes laxer.) Reading versions imports nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only pin() needs subprocess, whose import takes 8 ms
    from subprocess import CompletedProcess

Version = tuple[int, int, int]

PINNED: Version = (3, 20, 3)
"""The last release of 3.20; protobuf's error message about old generated code advises a downgrade to 3.20."""
TIMEOUT = 900.0
"""Seconds that pip, or importing every package with generated code, may take."""
# One generated file of each package that is common on Kaggle; all files of a package have the same floor.
PROBES = {
    "tensorflow": "tensorflow/core/framework/types_pb2.py",
    "tensorboard": "tensorboard/compat/proto/graph_pb2.py",
    "onnx": "onnx/onnx_ml_pb2.py",
    "sentencepiece": "sentencepiece/sentencepiece_model_pb2.py",
    "google.rpc": "google/rpc/status_pb2.py",
}
_CHECK = re.compile(rb"ValidateProtobufRuntimeVersion\(\s*[\w.]+,\s*(\d+),\s*(\d+),\s*(\d+)")
_COMMENT = re.compile(rb"^# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", re.MULTILINE)


def text(version: Version) -> str:
    return ".".join(map(str, version))


def command(floor: Version) -> str:
    """Return the pip command after which a package with this floor can load."""
    return f'pip install "protobuf>={text(floor)},<{floor[0] + 1}"'


def locate(name: str) -> Path | None:
    """Return the first file or folder of this name on sys.path."""
    for folder in sys.path:
        path = os.path.join(folder or ".", name)
        if os.path.exists(path):
            return Path(path)
    return None


def installed() -> Version | None:
    """Return the installed protobuf's version, read from its file; None if protobuf is missing or unreadable."""
    return _read(locate("google/protobuf/__init__.py"), re.compile(rb"__version__ = ['\"](\d+)\.(\d+)\.(\d+)"))


def floors(protobuf: Version) -> dict[str, Version]:
    """Return the oldest usable protobuf (floor) of each package in PROBES and of wandb; omit packages without a floor.

    Args:
        protobuf: the installed version, by which wandb chooses among its generated files.
    """
    found = {name: _read(locate(path), _CHECK) for name, path in PROBES.items()}
    found["wandb"] = _wandb(locate("wandb/proto"), protobuf)
    return {name: floor for name, floor in found.items() if floor is not None}


def _read(path: Path | None, pattern: re.Pattern[bytes]) -> Version | None:
    try:
        with open(path or os.devnull, "rb") as file:
            match = pattern.search(file.read(4096))  # the version comes before the generated descriptors
    except OSError:
        return None
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _wandb(folder: Path | None, protobuf: Version) -> Version | None:
    """Return wandb's floor, read in its folder vN (v5, v6 …) with the smallest N not below protobuf's major version."""
    names = [path.name[1:] for path in folder.glob("v*")] if folder else []
    for generation in sorted(int(name) for name in names if name.isdecimal()):
        if folder and generation >= protobuf[0]:
            path = folder / f"v{generation}" / "wandb_base_pb2.py"
            return _read(path, _CHECK) or _read(path, _COMMENT)
    return None


# --- the downgrade ----------------------------------------------------------------------------------


class RefusedError(Exception):
    """protobuf was not pinned; the message gives the reason."""


def pin() -> str:
    """Install protobuf==3.20.3 if no installed package needs a newer version; return a sentence about the result.

    The version is first installed into a temporary folder, and every package with generated code is imported with and
    without this folder in a fresh interpreter, which takes seconds to a minute. The environment is changed only if
    protobuf 3.20.3 works and every package that could be imported still can be.

    Raises:
        RefusedError: protobuf is imported here, a package needs a newer protobuf, pip failed, a package could no longer
            be imported, or another protobuf comes first on sys.path.
    """
    import tempfile

    before = installed()
    if before == PINNED:
        return "installed already"
    if "google.protobuf" in sys.modules:
        raise RefusedError("protobuf is already imported in this process: restart the process and call env.fix first")
    needs, modules = _generated_code()
    if needs:
        raise RefusedError(
            "it would break " + ", ".join(f"{name} (needs {text(floor)})" for name, floor in needs.items())
        )
    with tempfile.TemporaryDirectory(prefix="kaggle_mgpu-protobuf-") as trial:
        _pip_install("--target", trial)
        works = _importable(trial, modules)
        if f"protobuf {text(PINNED)}" not in works:
            raise RefusedError("a fresh interpreter could not use it; nothing was changed")
        if lost := sorted(name for name in _importable("", modules) - works if not name.startswith("protobuf ")):
            raise RefusedError(f"a fresh interpreter could no longer import {', '.join(lost)}; nothing was changed")
    _pip_install()
    if (now := installed()) != PINNED:
        raise RefusedError(
            f"pip installed it, but protobuf {text(now) if now else '(unknown)'} comes first on sys.path"
        )
    return f"installed instead of {text(before) if before else 'none'}, verified in a fresh interpreter"


def _site_folders() -> list[Path]:
    named = [Path(folder) for folder in sys.path if os.path.basename(folder) in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(folder for folder in named if folder.is_dir()))


def _generated_code() -> tuple[dict[str, Version], list[str]]:
    """Return the floors above PINNED by package, and the name of one generated module per package."""
    needs: dict[str, Version] = {}
    modules: dict[str, str] = {}
    for folder in _site_folders():
        for path in _pb2_files(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            depth = 1 if parts[0] != "google" else 3 if parts[1] == "cloud" else 2  # many packages share these folders
            package = ".".join(parts[:depth])
            if parts[:2] == ("wandb", "proto") and len(parts) > 3:
                continue  # wandb loads only one of the folders v5, v6, …
            modules.setdefault(package, ".".join(parts))
            floor = _wandb(folder / "wandb/proto", PINNED) if package == "wandb" else _read(path, _CHECK)
            if floor is not None and floor > max(PINNED, needs.get(package, PINNED)):
                needs[package] = floor
    return dict(sorted(needs.items())), sorted(modules.values())


def _pb2_files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        if where == str(folder / "google" / "protobuf"):
            folders.clear()  # protobuf's own generated files
            continue
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.endswith(".dist-info"))
        yield from (Path(where, name) for name in sorted(names) if name.endswith("_pb2.py"))


_IMPORTER = """
import importlib, os, sys
trial, *names = sys.argv[1:]
if trial:
    sys.path.insert(0, trial)
    import google  # a .pth file may have limited its path to site-packages
    google.__path__ = [os.path.join(trial, "google"), *google.__path__]
import google.protobuf
from google.protobuf import struct_pb2
message = struct_pb2.Struct()
message["a"] = 1
assert struct_pb2.Struct.FromString(message.SerializeToString()) == message
print("\\nok protobuf", google.protobuf.__version__, flush=True)
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        continue
    print("\\nok", name, flush=True)
"""


def _importable(trial: str, modules: Iterable[str]) -> set[str]:
    """Return the modules that a fresh interpreter can import, and "protobuf VERSION" if protobuf works there.

    The interpreter serializes and parses a message. The folder `trial`, unless "", comes before the installed packages.
    """
    output = _run([sys.executable, "-c", _IMPORTER, trial, *modules]).stdout
    return {line[3:] for line in output.splitlines() if line.startswith("ok ")}


def _pip_install(*options: str) -> None:
    requirement = f"protobuf=={text(PINNED)}"
    done = _run(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *options, requirement]
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        error = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        left = "nothing was changed" if options else f"protobuf now: {text(now) if (now := installed()) else 'none'}"
        raise RefusedError(f"pip could not install it: {error}; {left}")


def _run(command: list[str]) -> CompletedProcess[str]:
    import subprocess

    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"ERROR: no answer in {TIMEOUT:g} s")
