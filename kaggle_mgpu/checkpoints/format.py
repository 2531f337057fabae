"""Lay out the files of a checkpoint, and detect damage by checksums.

    checkpoints/step-00000100/{model.safetensors, optimizer.safetensors, state.json}

    problem = damage(path)      # None if every file has the length and checksum that state.json says
    checkpoint = load(path)     # also joins the rows of a tensor that several ranks have written

state.json is written last; checkpoint.py then gives the folder its name. If all ranks write, each rank but 0 reports
its part to rank 0 by a small file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, DiskFullError
from ..parallel import shards
from . import files

FORMAT = 2
_NAME = re.compile(r"step-(\d+)")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}")
PART_SECONDS = 900.0
"""How long rank 0 waits for the other ranks' parts of a checkpoint after it has written its own."""


class OtherRunError(CheckpointError):
    """An undamaged checkpoint belongs to another run: `problem` names the difference, `advice` says what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}. {advice}")
        self.problem, self.advice = problem, advice


@dataclass(frozen=True)
class Checkpoint:
    """Hold the content of a checkpoint: weights by name, the rest of the state, and plain values about the run."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file and name, without the optimizer's: `model`, and `ema` if the run averages weights."""
    state: Any
    """The content of optimizer.safetensors: `optimizer`, `scaler` (gradient scaler), `skipped` (number of steps)."""
    facts: dict[str, Any]
    """The content of state.json: step, state (the fields of TrainState), stamp (see `starting_point`), config, …"""


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def all_in(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, highest step first (by number, not as text)."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def damage(path: Path) -> str | None:
    """Return a description of the damage to a checkpoint's files, or None for undamaged files."""
    try:
        facts = read_facts(path)
    except CheckpointError as error:
        return str(error)
    for name, expected in facts["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if files.crc32(file) != expected["crc32"]:
            return f"{name} does not have the checksum it was written with"
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or its format is not this version's.
    """
    file = path / "state.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("state.json is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"state.json cannot be read: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        raise CheckpointError("state.json does not list a checkpoint's files")
    step, listed = facts.get("step"), facts["files"]
    plain = all(
        isinstance(about, dict)
        and {"bytes", "crc32"} <= about.keys()
        and name == Path(name).name
        and not name.startswith((".", "state.json"))
        and name
        for name, about in listed.items()
    )
    blocks = all(isinstance(facts.get(key, {}), dict) for key in ("config", "stamp", "state"))
    if not (isinstance(step, int) and not isinstance(step, bool) and step >= 0 and plain and blocks):
        raise CheckpointError("state.json has missing or impossible values")
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"it has format {facts.get('format')!r}; this version of kaggle_mgpu reads format {FORMAT}"
        )
    if facts.pop("crc32", None) != _crc32_of(facts):
        raise CheckpointError("state.json does not have the checksum it was written with")
    return facts


def _crc32_of(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document).encode())


def load(path: Path, *, join: bool = True) -> Checkpoint:
    """Read a checkpoint; its tensors are memory maps of the files, read on use.

    Args:
        join: join tensors whose rows are in several files; otherwise return them as `shards.Pieces`, for callers that
            need only some rows.

    Raises:
        CheckpointError: a file is damaged or not in the package's format; the message names the problem.
    """
    problem = damage(path)
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    return load_checked(path, read_facts(path), join=join)


def load_checked(path: Path, facts: dict[str, Any], *, join: bool) -> Checkpoint:
    """Load a checkpoint as `load` does, from facts that `read_facts` returned and without comparing checksums.

    Raises:
        CheckpointError: the content is not in the package's format.
    """
    try:
        return _load(path, facts, join)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be used: its content was not written by kaggle_mgpu: {type(error).__name__}: "
            f"{error}"
        ) from error


def _load(path: Path, facts: dict[str, Any], join: bool) -> Checkpoint:
    tensors: dict[str, dict[str, Any]] = {}
    tree = ""
    for name in facts["files"]:
        found, metadata = files.read_with_metadata(path / name)
        into = tensors.setdefault(kind_of(name), {})
        cut = json.loads(metadata.get("shards", "{}"))
        for key, tensor in found.items():
            if key in cut:
                shape, start = cut[key]
                into.setdefault(key, shards.Pieces(shape)).add(start, tensor)
            else:
                into[key] = tensor
        tree = metadata.get("tree", tree)
    if join:
        for found in tensors.values():
            found |= {name: value[:] for name, value in found.items() if isinstance(value, shards.Pieces)}
    return Checkpoint(path, tensors, files.unpack(tensors.pop("optimizer"), tree), facts)


def kind_of(name: str) -> str:
    """Return a file's kind: model for model.safetensors and for model-00001-of-00002.safetensors."""
    stem = Path(name).stem
    part = _PART.fullmatch(stem)
    return part[1] if part else stem


def check_model(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of saved weights with a model's; `where` names the saved file in the message.

    Raises:
        CheckpointError: they differ; the message names the first differences.
    """
    if problem := other_model({name: tuple(tensor.shape) for name, tensor in saved.items()}, model):
        raise CheckpointError(
            f"{where} is from another model: {problem}. Give this run another output_dir, or "
            f"restore the settings the checkpoint was made with."
        )


def other_model(saved: Mapping[str, tuple[int, ...]], model: Mapping[str, Tensor]) -> str:
    """Return a description of the first differences of names and shapes; "" for equal names and shapes."""
    problems = [f"{name}: not in the checkpoint" for name in model if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in model]
    problems += [
        f"{name}: {saved[name]} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in model.items()
        if name in saved and saved[name] != tensor.shape
    ]
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


# Writing
def layouts(tensors: Mapping[str, Mapping[str, Tensor]], state: Any, *, main: bool = True) -> dict[str, files.Layout]:
    """Return a Layout for each file of a rank: its rows of sharded tensors and, if `main`, all other values too."""

    def layout(named: Mapping[str, Tensor], notes: Mapping[str, str]) -> files.Layout:
        cut = {name: shards.shard_of(tensor) for name, tensor in named.items() if shards.is_sharded(tensor)}
        here = {name: cut[name].rows if name in cut else named[name] for name in named if main or name in cut}
        where = {"shards": json.dumps({name: [piece.shape, piece.start] for name, piece in cut.items()})} if cut else {}
        return files.Layout.of(here, {**notes, **where})

    named, tree = files.pack(state)
    layouts = {name: layout(content, {}) for name, content in tensors.items()}
    return {**layouts, "optimizer": layout(named, {"tree": tree} if main else {})}


def write_files(folder: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Write {file name: pieces} into the folder; return the files' lengths and checksums for `write_facts`."""
    return {name: files.write(folder / name, pieces) for name, pieces in contents.items()}


def write_facts(folder: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write state.json, the last of a checkpoint's files."""
    document = {"format": FORMAT, **facts, "files": written}
    document["crc32"] = _crc32_of(document)
    files.write(folder / "state.json", [json.dumps(document, indent=1).encode()])
    files.flush(folder)


def write_part(temporary: Path, contents: dict[str, Any], rank: int) -> None:
    """Write this rank's files, then a note for rank 0 with the names and checksums, or the error."""
    note: dict[str, Any]
    try:
        note = {"files": write_files(temporary, contents)}
    except OSError as error:
        note = {"error": f"rank {rank}: {error.strerror or error}", "errno": error.errno}
    part = temporary / f".part-{rank}.json"
    with contextlib.suppress(OSError):  # if rank 0 has given up, the folder is gone and must not come back
        files.write(part.with_suffix(".new"), [json.dumps(note).encode()])
        part.with_suffix(".new").rename(part)


def part_of(temporary: Path, rank: int) -> dict[str, Any]:
    """Wait for another rank's note, perhaps from another machine, and return the rank's lengths and checksums by file.

    Raises:
        OSError: the rank failed to write (DiskFullError on a full disk), or no note came within PART_SECONDS.
    """
    path = temporary / f".part-{rank}.json"
    deadline = time.monotonic() + PART_SECONDS
    while True:
        with contextlib.suppress(FileNotFoundError):
            note = json.loads(path.read_text(encoding="utf-8"))
            break
        if time.monotonic() > deadline:
            raise OSError(
                f"rank {rank} has not written its part of {temporary} within {PART_SECONDS:g} s. Is output_dir on a "
                f"disk that all machines see?"
            )
        time.sleep(0.01)
    path.unlink()
    if "error" in note:
        kind = DiskFullError if note["errno"] in (errno.ENOSPC, errno.EDQUOT) else OSError
        raise kind(note["errno"], note["error"])
    written: dict[str, Any] = note["files"]
    return written
