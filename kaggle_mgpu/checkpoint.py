"""Checkpoints that are there or not there, never half there, and written while training goes on.

    checkpoints/step-00000100/{model.safetensors, optimizer.safetensors, state.json}

A checkpoint is copied to host memory, which is all that training waits for; a thread then writes it into a temporary
folder, flushes it to disk and renames the folder: it exists once its name does. state.json, written last, holds every
file's length and checksum and its own, so that one which a disk or a download damaged is recognised, named, and passed
over for the one before it. Nothing in it can run code when it is loaded: the optimizer's state too is tensors and JSON.

Tensors that are spread over the ranks can be written as they are, each rank its own rows into files of its own:
model-00001-of-00002.safetensors and so on. What is loaded from these are whole tensors again. (The format of
torch.distributed.checkpoint is another one, whose list of contents is a pickle.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from . import distributed, files, session, shards
from .files import DiskFullError, read_tensors, replace_tensors, write_tensors, write_text

__all__ = [
    "Checkpoint", "CheckpointError", "Checkpoints", "DiskFullError", "Saved", "all_in", "changes", "check_model",
    "damage", "load", "read_facts", "read_tensors", "replace_tensors", "starting_point", "step_of",
    "write_tensors", "write_text",
]  # fmt: skip

FORMAT = 2
_NAME = re.compile(r"step-(\d+)")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}")
PART_SECONDS = 900.0
"""How long rank 0 waits for the other ranks' parts of a checkpoint after it has written its own."""
# state.json, the folder itself, and what rounding to the disk's blocks adds
_SLACK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: weights by name, the rest of the state, and plain facts about the run."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """One dictionary of tensors for each other .safetensors file: `model`, and `ema` where the run averages weights."""
    state: Any
    """optimizer.safetensors: optimizer, gradient scaler."""
    facts: dict[str, Any]
    """state.json: step, samples_seen, stamp, config."""


@dataclass(frozen=True)
class Saved:
    """What became of a save."""

    step: int
    path: Path | None
    """None where the disk had no room for it."""
    seconds: float
    """From its beginning to the last byte on the disk."""
    note: str = ""
    """What there is to say about it: that the disk is full, and what was done."""


class Checkpoints:
    """The checkpoints of one run, in `folder`. Only one process may write there.

    Used as a context, it waits for the last save on the way out, also when an error ends the run.

    Args:
        keep_last: how many stay when a new one is written.
        flush_first: files that a checkpoint relies on (the records up to its step), flushed before it exists.
    """

    def __init__(self, folder: Path, *, keep_last: int = 4, flush_first: Sequence[Path] = ()) -> None:
        self.folder, self.keep_last, self.flush_first = folder, keep_last, flush_first
        self._buffer = files.Buffer()
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self.news = False
        """Whether a save has ended that `collect` has not told of yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint for `step`, then remove all but the newest `keep_last`. Returns its path.

        Raises:
            DiskFullError: there is no room, and removing the oldest would not make any. All that was there still is.
            TypeError: the state holds what is neither a tensor nor plain.
        """
        self.begin(step, tensors=tensors, state=state, facts=facts)
        saved = self.wait()[-1]
        if saved.path is None:
            raise DiskFullError(saved.note)
        return saved.path

    def begin(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> None:
        """The same, behind the training: copy everything to host memory, hand it to a thread and return.

        One is written at a time, so a second call waits for the first. What came of it is told by `collect`.
        """
        self._join()
        began = time.monotonic()
        held = self._buffer.hold(_layouts(tensors, state))
        contents = {f"{name}.safetensors": content for name, content in held.items()}
        self._start(self._run, step, contents, dict(facts), began)

    def begin_together(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> None:
        """The same by all ranks, each of which writes its rows of the tensors that are spread over them.

        Rank 0 gives the checkpoint its name, and so its being, when it has heard from every rank that its part is on
        the disk, which all of them must see.
        """
        self._join()
        began = time.monotonic()
        rank, ranks = distributed.rank(), distributed.world_size()
        layouts = {
            f"{name}-{rank + 1:05d}-of-{ranks:05d}.safetensors": layout
            for name, layout in _layouts(tensors, state, main=rank == 0).items()
        }
        needed = distributed.sum(sum(layout.nbytes for layout in layouts.values())) + _SLACK
        temporary, note = distributed.from_main(lambda: self._open(step, needed))
        if temporary is None:
            self._saved.append(Saved(step, None, time.monotonic() - began, note))
            self.news = True
            return
        contents = self._buffer.hold(layouts)
        if rank == 0:
            self._start(self._run_main, step, temporary, contents, dict(facts), began, note, ranks)
        else:
            self._start(_write_part, temporary, contents, rank)

    def _open(self, step: int, needed: int) -> tuple[Path | None, str]:
        """A temporary folder for all ranks, with room for what they will write, and what was done to make it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*-step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        note = ""
        if (free := files.free_bytes(self.folder)) < needed:
            note = f"the disk is full: {needed:,} bytes needed, {free:,} free"
            if not (dropped := self._make_room(needed, free)):
                return None, (
                    f"no checkpoint of step {step}: {note}, and dropping older checkpoints would not make room. Free "
                    f"some space."
                )
            note += f". Dropped to make room: {', '.join(path.name for path in dropped)}"
        temporary = self.folder / f".writing-{self._path(step).name}-{os.getpid()}"
        temporary.mkdir()
        return temporary, note

    def collect(self) -> list[Saved]:
        """The saves that have ended since this was last asked.

        Raises:
            OSError: writing failed, and not for want of room.
        """
        self.news = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        # taken out one by one: the thread may be about to add one to this very list
        return [self._saved.pop(0) for _ in range(len(self._saved))]

    def wait(self) -> list[Saved]:
        """`collect`, once nothing is being written any more."""
        self._join()
        return self.collect()

    def rescue(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> Path:
        """`save` by a process that is not the one that writes here, which may be writing at this moment."""
        final = self._path(step)
        contents = {f"{name}.safetensors": layout.pieces() for name, layout in _layouts(tensors, state).items()}
        temporary = self.folder.parent / f".rescue-{final.name}-{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not final.exists():
            try:
                temporary.mkdir(parents=True)
                written = {name: files.write(temporary / name, pieces) for name, pieces in contents.items()}
                _write_facts(temporary, written, {"step": step, **facts})
                os.replace(temporary, final)
                files.flush(self.folder)
            except OSError:
                if not final.exists():  # else another rank was quicker: all have the same state
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
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

    def put_aside(self, after: int = -1) -> Path | None:
        """Move the checkpoints of later steps than `after` out of the way; the folder they are in now.

        They are damaged, or a future that the run has been taken back from: counted as the newest, they would push
        what is saved from now on out of the folder.
        """
        later = [path for path in self.all() if step_of(path) > after]
        if not later:
            return None
        aside = next(p for i in range(1, 10**6) if not (p := Path(f"{self.folder}-before-{i}")).exists())
        if len(later) == len(self.all()):
            self.folder.rename(aside)
            return aside
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        return aside

    # The writer's thread
    def _start(self, function: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=function, args=args, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, contents: dict[str, Any], facts: dict[str, Any], began: float) -> None:
        _give_way()
        self._finish(step, began, lambda: self._write_with_room(step, contents, {"step": step, **facts}))

    def _run_main(
        self, step: int, temporary: Path, contents: dict[str, Any], facts: dict[str, Any], began: float, note: str,
        ranks: int,
    ) -> None:  # fmt: skip
        def write() -> tuple[Path, str]:
            try:
                written = _write_files(temporary, contents)
                for rank in range(1, ranks):
                    written.update(_part_of(temporary, rank))
                self._complete(temporary, self._path(step), written, {"step": step, **facts})
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return self._path(step), note

        _give_way()
        self._finish(step, began, write)

    def _finish(self, step: int, began: float, write: Callable[[], tuple[Path, str]]) -> None:
        try:
            path, note = write()
            self._rotate()
            self._saved.append(Saved(step, path, time.monotonic() - began, note))
        except DiskFullError as error:
            note = f"no checkpoint of step {step}: {error.strerror or error}"
            self._saved.append(Saved(step, None, time.monotonic() - began, note))
        except BaseException as error:
            self._error = error
        self.news = True

    def _write_with_room(self, step: int, contents: Mapping[str, Any], facts: dict[str, Any]) -> tuple[Path, str]:
        """Write the checkpoint; on a full disk drop the oldest ones first, where that makes room."""
        final = self._path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*-step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        needed = sum(len(content) for content in contents.values()) + _SLACK
        try:
            self._write_and_rename(final, contents, facts, needed)
            return final, ""
        except DiskFullError as error:
            # a quota does not show in what the disk says is free
            free = 0 if (said := files.free_bytes(self.folder)) >= needed else said
            full = f"the disk is full: {needed:,} bytes needed, {free:,} free"
            dropped = self._make_room(needed, free)
            if not dropped:
                raise DiskFullError(
                    error.errno, f"{full}, and dropping older checkpoints would not make room. Free some space."
                ) from None
        note = f"{full}. Dropped to make room: {', '.join(path.name for path in dropped)}"
        try:
            self._write_and_rename(final, contents, facts, needed)
        except DiskFullError as error:
            raise DiskFullError(error.errno, f"{note}; it was not enough") from None
        return final, note

    def _write_and_rename(self, final: Path, contents: Mapping[str, Any], facts: dict[str, Any], needed: int) -> None:
        temporary = self.folder / f".writing-{final.name}-{os.getpid()}"
        # asked first, so that the records of the run find room to the end
        if (free := files.free_bytes(self.folder)) < needed:
            raise DiskFullError(28, f"the disk is full: {needed:,} bytes needed, {free:,} free")
        try:
            temporary.mkdir(parents=True)
            self._complete(temporary, final, _write_files(temporary, contents), facts)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _complete(self, temporary: Path, final: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
        _write_facts(temporary, written, facts)
        for path in self.flush_first:
            if path.exists():
                files.flush(path)
        if final.exists():  # the same step again, after a resume that did not trust it
            self._remove(final)
        os.replace(temporary, final)
        files.flush(self.folder)

    def _rotate(self) -> None:
        for path in self.all()[self.keep_last :]:
            self._remove(path)

    def _make_room(self, needed: int, free: int) -> list[Path]:
        """Remove as many of the oldest checkpoints as make room, but none if all would not, and never the newest."""
        checkpoints = self.all()
        newest = next((path for path in checkpoints if damage(path) is None), None)
        dropped: list[Path] = []
        for path in reversed(checkpoints):
            if free >= needed:
                break
            if path != newest:
                free += sum(file.stat().st_size for file in path.iterdir())
                dropped.append(path)
        if free < needed:
            return []
        for path in dropped:
            self._remove(path)
        return dropped

    def _remove(self, path: Path) -> None:
        # renamed first: a half-removed folder must not look like a checkpoint
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _layouts(tensors: Mapping[str, Mapping[str, Tensor]], state: Any, *, main: bool = True) -> dict[str, files.Layout]:
    """What goes into each file: of spread tensors this rank's rows; of all else, everything on `main`, else nothing."""

    def layout(named: Mapping[str, Tensor], notes: Mapping[str, str]) -> files.Layout:
        cut = {name: shards.shard_of(tensor) for name, tensor in named.items() if shards.is_sharded(tensor)}
        here = {name: cut[name].rows if name in cut else named[name] for name in named if main or name in cut}
        where = {"shards": json.dumps({name: [piece.shape, piece.start] for name, piece in cut.items()})} if cut else {}
        return files.Layout.of(here, {**notes, **where})

    named, tree = files.pack(state)
    layouts = {name: layout(content, {}) for name, content in tensors.items()}
    return {**layouts, "optimizer": layout(named, {"tree": tree} if main else {})}


def _give_way() -> None:
    with contextlib.suppress(OSError, AttributeError):
        # on Linux a thread has a priority of its own: where CPUs are few, training comes first
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _write_files(folder: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    return {name: files.write(folder / name, [content]) for name, content in contents.items()}


def _write_facts(folder: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
    document = {"format": FORMAT, **facts, "files": written}
    document["crc32"] = _crc32_of(document)
    files.write(folder / "state.json", [json.dumps(document, indent=1).encode()])
    files.flush(folder)


def _write_part(temporary: Path, contents: dict[str, Any], rank: int) -> None:
    """Write this rank's files, and then, for rank 0 to see, what they are, or why they are not there."""
    _give_way()
    note: dict[str, Any]
    try:
        note = {"files": _write_files(temporary, contents)}
    except OSError as error:
        note = {"error": f"rank {rank}: {error.strerror or error}", "errno": error.errno}
    with contextlib.suppress(OSError):  # rank 0 has given up
        files.write_text(temporary / f".part-{rank}.json", json.dumps(note))


def _part_of(temporary: Path, rank: int) -> dict[str, Any]:
    """The files that another rank has written, once it has. They may be on another machine's way to the disk."""
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


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def all_in(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, highest step first (by number: as text, step-999… would come after step-1000)."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


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
        if files.crc32(file) != expected["crc32"]:
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
    step, listed = facts.get("step"), facts["files"]
    plain = all(
        isinstance(about, dict) and {"bytes", "crc32"} <= about.keys() and name == Path(name).name and name[0] != "."
        for name, about in listed.items()
    )
    blocks = all(isinstance(facts.get(key, {}), dict) for key in ("config", "stamp", "state"))
    if not (isinstance(step, int) and step >= 0 and plain and blocks):
        raise CheckpointError("state.json does not say what a checkpoint's does")
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"it has format {facts.get('format')!r}; this version reads format {FORMAT}")
    if facts.pop("crc32", None) != _crc32_of(facts):
        raise CheckpointError("state.json does not have the checksum it was written with")
    return facts


def _crc32_of(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document).encode())


def load(path: Path, *, whole: bool = True) -> Checkpoint:
    """Read a checkpoint: its tensors are maps of the files, which are read as they are used.

    Args:
        whole: put tensors together whose rows lie in several files; else they are `shards.Pieces`, for callers that
            want a few rows of each.

    Raises:
        CheckpointError: it is damaged, or holds what could run code; the message says where.
    """
    problem = damage(path)
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    facts = read_facts(path)
    tensors: dict[str, dict[str, Any]] = {}
    tree = ""
    for name in facts["files"]:
        found, metadata = files.read_with_metadata(path / name)
        into = tensors.setdefault(_whose(name), {})
        cut = json.loads(metadata.get("shards", "{}"))
        for key, tensor in found.items():
            if key in cut:
                shape, start = cut[key]
                into.setdefault(key, shards.Pieces(shape)).add(start, tensor)
            else:
                into[key] = tensor
        tree = metadata.get("tree", tree)
    if whole:
        for found in tensors.values():
            found |= {name: value[:] for name, value in found.items() if isinstance(value, shards.Pieces)}
    return Checkpoint(path, tensors, files.unpack(tensors.pop("optimizer"), tree), facts)


def _whose(name: str) -> str:
    """model for model.safetensors and for model-00001-of-00002.safetensors."""
    stem = Path(name).stem
    part = _PART.fullmatch(stem)
    return part[1] if part else stem


def check_model(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of saved weights with a model's.

    Raises:
        CheckpointError: they differ; the message names the first differences.
    """
    if problem := _other_model({name: tuple(tensor.shape) for name, tensor in saved.items()}, model):
        raise CheckpointError(
            f"{where} is from another model: {problem}. Give this run another output_dir, or "
            f"restore the settings the checkpoint was made with."
        )


def _other_model(saved: Mapping[str, tuple[int, ...]], model: Mapping[str, Tensor]) -> str:
    """The first differences of names and shapes; "" where there are none."""
    problems = [f"{name}: not in the checkpoint" for name in model if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in model]
    problems += [
        f"{name}: {saved[name]} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in model.items()
        if name in saved and saved[name] != tensor.shape
    ]
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def starting_point(
    checkpoints: Checkpoints,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    model: Mapping[str, Tensor] | None = None,
) -> Path | None:
    """The checkpoint to go on from: this run's newest, else the same run's newest among Kaggle's inputs.

    Args:
        resume: auto; never (what is there is put aside); or the path of a checkpoint.
        config: the run's settings; those in `may_change` may differ from the checkpoint's.
        stamp: what else makes it this run and no other.
        model: the model's state; a checkpoint among the inputs with other names or shapes is another run's.

    Raises:
        CheckpointError: the checkpoint is another run's (the message lists each setting then and now), or damaged.
    """
    if resume == "never":
        if aside := checkpoints.put_aside():
            print(f"resume='never': the checkpoints that were here are now in {aside}", flush=True)
        return None
    if resume == "auto":
        path = checkpoints.newest()
        if path is None:
            return _among_inputs(config, may_change, stamp, model)
    else:
        path = Path(resume)
        if problem := damage(path):
            raise CheckpointError(f"resume: {path.resolve()} is not a whole checkpoint: {problem}")
    if differ := _differences(read_facts(path), config, may_change, stamp):
        raise CheckpointError(
            f"{path} is from a run with other settings: {_listed(differ)}. Set them back to go on with that run; "
            f"choose another output_dir, or resume='never', to start a new one."
        )
    return path


def _among_inputs(
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    model: Mapping[str, Tensor] | None,
) -> Path | None:
    """The newest of this run's; where there are only others', the newest of those is named with what is different."""
    found: list[tuple[int, Path, dict[str, Any]]] = []
    others: list[tuple[int, str]] = []
    for path in (file.parent for file in session.find("checkpoints/step-*/state.json")):
        try:
            facts = read_facts(path)
            if differ := _differences(facts, config, may_change, stamp):
                others.append((facts["step"], f"{path} is from a run with other settings: {_listed(differ)}"))
            else:
                found.append((facts["step"], path, facts["files"]))
        except Exception as error:  # whatever somebody else's file may hold, it must not end this run
            print(f"checkpoint {path} cannot be used: {error}.", flush=True)
    # newest first, and no further than the first that serves: a checksum reads the whole of it
    for step, path, listed in sorted(found, key=lambda one: one[:2], reverse=True):
        try:
            broken = damage(path)  # before any other file of it is opened
            weights = min((name for name in listed if _whose(name) == "model"), default="")
            if broken is None and not weights:
                broken = "it holds no model.safetensors"
            if broken is not None:
                print(f"checkpoint {path} cannot be used: {broken}. Trying the one before it.", flush=True)
            elif model is not None and (problem := _other_model(files.shapes(path / weights), model)):
                others.append((step, f"{path} is from another model: {problem}"))
            else:
                return path
        except Exception as error:
            print(f"checkpoint {path} cannot be used: {error}. Trying the one before it.", flush=True)
    if others:
        print(f"not resumed from the inputs: {max(others)[1]}", flush=True)
    return None


def changes(
    facts: Mapping[str, Any], config: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Settings that have changed since a checkpoint and may: {name: (then, now)}."""
    then, now = facts.get("config", {}), json.loads(json.dumps(config))
    return {name: (then.get(name), now[name]) for name in now if name in may_change and then.get(name) != now[name]}


def _listed(differ: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in differ.items())


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
