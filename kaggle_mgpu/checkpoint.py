"""Checkpoints that are there or not there, never half there.

    checkpoints/step-00000100/{model.safetensors, optimizer.pt, state.json}

A checkpoint is written into a temporary folder, flushed to disk, and then renamed: it exists once its name does.
state.json, written last, holds every file's length and checksum and its own, so that one which a disk or a download
damaged is recognised, named, and passed over for the one before it. Nothing in it can run code when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import session

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: weights by name, the rest of the state, and plain facts about the run."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """One dictionary of tensors for each .safetensors file: `model`, and `ema` where the run averages its weights."""
    state: dict[str, Any]
    """optimizer.pt: optimizer, gradient scaler, random states."""
    facts: dict[str, Any]
    """state.json: step, samples_seen, stamp, config."""


class Checkpoints:
    """The checkpoints of one run, in `folder`. Only one process may write there."""

    def __init__(self, folder: Path, *, keep_last: int = 4) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint for `step`, then remove all but the newest `keep_last`. Returns its path."""
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}-{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*-step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            for name, named in tensors.items():
                write_tensors(temporary / f"{name}.safetensors", named)
            torch.save(state, temporary / "optimizer.pt")
            files = {}
            for path in sorted(temporary.iterdir()):
                _flush(path)
                files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
            document = {"format": FORMAT, "step": step, **facts, "files": files}
            document["crc32"] = _crc32_of(document)
            write_text(temporary / "state.json", json.dumps(document, indent=1))
            _flush(temporary)
            if final.exists():  # the same step again, after a resume that did not trust it
                shutil.rmtree(final)
            os.replace(temporary, final)
            _flush(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._rotate()
        return final

    def all(self) -> list[Path]:
        """Checkpoint folders, newest (highest step) first, whether valid or not."""
        return all_in(self.folder)

    def newest(self, warn: Callable[[str], None] = print) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named through `warn` and passed over."""
        for path in self.all():
            problem = damage(path)
            if problem is None:
                return path
            warn(f"checkpoint {path} cannot be used: {problem}. Trying the one before it.")
        return None

    def _rotate(self) -> None:
        for path in self.all()[self.keep_last :]:
            # renamed first: a half-removed folder must not look like a checkpoint
            doomed = path.with_name(f".removing-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def all_in(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, highest step first (by number: as text, step-999… would come after step-1000)."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as they were written."""
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
        if _crc32(file) != expected["crc32"]:
            return f"{name} does not have the checksum it was written with"
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is not there or is not what this version writes.
    """
    file = path / "state.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("state.json is missing") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"state.json cannot be read: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        raise CheckpointError("state.json is not a checkpoint's")
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"it has format {facts.get('format')!r}; this version reads format {FORMAT}")
    if facts.pop("crc32", None) != _crc32_of(facts):
        raise CheckpointError("state.json does not have the checksum it was written with")
    return facts


def load(path: Path) -> Checkpoint:
    """Read a checkpoint into host memory.

    Raises:
        CheckpointError: it is damaged, or holds what could run code; the message says where.
    """
    problem = damage(path)
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    facts = read_facts(path)
    tensors = {Path(name).stem: read_tensors(path / name) for name in facts["files"] if name.endswith(".safetensors")}
    try:
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise CheckpointError(
            f"checkpoint {path} cannot be used: optimizer.pt holds something else than tensors and plain values, which "
            f"is not loaded, as it could run code. {what}"
        ) from None  # torch's message advises to load it all the same
    return Checkpoint(path, tensors, state, facts)


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """Write tensors as one .safetensors file; names that share one tensor (tied weights) are written once.

    The names left out are noted in the file's metadata, and `read_tensors` puts them back.
    """
    from safetensors.torch import save_file

    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    unique: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        unique[name] = tensor.cpu().contiguous()
        storage = unique[name].untyped_storage()
        if storage.nbytes() != unique[name].nbytes or storage.data_ptr() in storages:
            unique[name] = unique[name].clone()  # a view of something larger, or of another's in another shape
        storages.add(storage.data_ptr())
    save_file(unique, str(path), metadata={"aliases": json.dumps(aliases)} if aliases else None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file that `write_tensors` wrote, on the CPU."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return {**tensors, **{name: tensors[first] for name, first in aliases.items()}}


def replace_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """`write_tensors`, atomically: the old file stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    write_tensors(temporary, named)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def check_model(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of saved weights with a model's.

    Raises:
        CheckpointError: they differ; the message names the first differences.
    """
    problems = [f"{name}: not in the checkpoint" for name in model if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in model]
    problems += [
        f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in model.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{where} is from another model: {'; '.join(problems[:5])}{more}. Give this run another output_dir, or "
            f"restore the settings the checkpoint was made with."
        )


def starting_point(
    checkpoints: Checkpoints,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
) -> Path | None:
    """The checkpoint to go on from: this run's newest, else the same run's newest among Kaggle's inputs.

    Args:
        resume: auto; never (what is there is put aside); or the path of a checkpoint.
        config: the run's settings; those in `may_change` may differ from the checkpoint's.
        stamp: what else makes it this run and no other.

    Raises:
        CheckpointError: the checkpoint is another run's (the message lists each setting then and now), or damaged.
    """
    if resume == "never":
        if checkpoints.all():
            aside = next(p for i in range(1, 10**6) if not (p := Path(f"{checkpoints.folder}-before-{i}")).exists())
            checkpoints.folder.rename(aside)
            print(f"resume='never': the checkpoints that were here are now in {aside}", flush=True)
        return None
    if resume == "auto":
        path = checkpoints.newest()
        if path is None:
            return _among_inputs(config, may_change, stamp)
    else:
        path = Path(resume)
        if problem := damage(path):
            raise CheckpointError(f"resume: {path.resolve()} is not a whole checkpoint: {problem}")
    if differ := _differences(read_facts(path), config, may_change, stamp):
        listed = "; ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in differ.items())
        raise CheckpointError(
            f"{path} is from a run with other settings: {listed}. Set them back to go on with that run; choose another "
            f"output_dir, or resume='never', to start a new one."
        )
    return path


def _among_inputs(config: Mapping[str, Any], may_change: Collection[str], stamp: Mapping[str, Any]) -> Path | None:
    found = []
    for path in session.find("checkpoints/step-*/state.json"):
        with contextlib.suppress(CheckpointError):
            facts = read_facts(path.parent)
            if not _differences(facts, config, may_change, stamp):
                found.append((facts["step"], path.parent))
    for _, path in sorted(found, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        print(f"checkpoint {path} cannot be used: {problem}. Trying the one before it.", flush=True)
    return None


def _differences(
    facts: Mapping[str, Any], config: Mapping[str, Any], may_change: Collection[str], stamp: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What makes a checkpoint another run's: {name: (then, now)}."""
    sides = []
    for settings, its_stamp in ((facts.get("config", {}), facts.get("stamp", {})), (config, stamp)):
        fixed = {name: value for name, value in settings.items() if name not in may_change}
        # through JSON, so that a tuple equals the list it was saved as
        sides.append(json.loads(json.dumps({**fixed, **its_stamp})))
    then, now = sides
    return {name: (then.get(name), now.get(name)) for name in {**now, **then} if then.get(name) != now.get(name)}


# Random states, as tensors and numbers: torch.load(weights_only=True) reads nothing else
def seed_everything(seed: int) -> None:
    """Seed torch's (CPU and GPU), NumPy's and Python's global random generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of this process's random generators."""
    version, internal, gauss = random.getstate()
    _, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put this process's random generators into a state that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _crc32_of(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document).encode())


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    """fsync a file or a folder: the name alone survives a crash sooner than the content does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
