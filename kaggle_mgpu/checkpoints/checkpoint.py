"""Write checkpoints while training continues, and find them; each checkpoint is complete or absent.

    checkpoints/step-00000100/{model.safetensors, optimizer.safetensors, state.json}

Training waits only while the state is copied to host memory. A thread then writes the copy into a temporary folder,
flushes the files to disk, and renames the folder; a checkpoint exists once the folder has its final name. state.json is
written last, with the length and checksum of every file, so that a run recognises a damaged checkpoint and uses the
checkpoint before it. Loading a checkpoint runs no code: all files are tensors and JSON.

Under fsdp each rank can write its rows of the sharded tensors to its own files (model-00001-of-00002.safetensors);
loading joins the rows. (torch.distributed.checkpoint is not used, since its format has a pickled list of contents.)

format.py defines the files' contents; resume.py chooses the checkpoint that a run goes on from.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..errors import CheckpointError, DiskFullError
from ..parallel import distributed
from . import files, format
from .files import read_tensors, replace_tensors, write_text
from .format import Checkpoint, all_in, check_model, damage, load, read_facts, step_of

__all__ = [
    "Checkpoint", "CheckpointError", "Checkpoints", "DiskFullError", "Saved", "all_in", "check_model", "damage", "load",
    "read_facts", "read_tensors", "replace_tensors", "step_of", "write_text",
]  # fmt: skip

# Estimated bytes for state.json, for the folder itself, and for the rounding of file sizes to disk blocks.
_SLACK = 1 << 20
MOST_FAILURES = 3
"""Failed saves in a row that end a run; full disks do not count. One error of a network disk is often temporary."""


@dataclass(frozen=True)
class Saved:
    """The outcome of a save."""

    step: int
    path: Path | None
    """The checkpoint's folder; None if the save failed."""
    seconds: float
    """Duration from the beginning to the last byte on the disk."""
    note: str = ""
    """A sentence for the log if the disk was full or the save failed, else ""."""
    error: OSError | None = None
    """The error if the save failed for another reason than a full disk."""


class Checkpoints:
    """Manage the checkpoints of one run in `folder`; only one process may write there.

    The end of a `with` block waits for the last save, even if an error ends the run.

    Args:
        keep_last: the number of newest checkpoints to keep.
        flush_first: files to flush to disk before a checkpoint gets its final name, such as the run's log of metrics.
    """

    def __init__(self, folder: Path, *, keep_last: int = 4, flush_first: Sequence[Path] = ()) -> None:
        self.folder, self.keep_last, self.flush_first = folder, keep_last, flush_first
        self._buffer = files.Buffer()
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self._failures_in_a_row = 0  # failures since the last successful save, without those due to a full disk
        self.save_ended = False
        """Whether a save has ended since the last `collect`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint for `step`, then remove all but the newest `keep_last`. Returns the new folder's path.

        Args:
            tensors: for each .safetensors file, such as "model", its tensors by name.
            state: the content of optimizer.safetensors: tensors and plain values in lists, tuples and dictionaries.
            facts: further values for state.json, all convertible to JSON.

        Raises:
            DiskFullError: the disk would be full even after the removal of older checkpoints.
            OSError: writing failed for another reason.
            TypeError: the state holds something other than tensors and plain values.
        """
        self.begin(step, tensors=tensors, state=state, facts=facts)
        saved = self.wait()[-1]
        if saved.path is None:
            raise saved.error or DiskFullError(saved.note)
        return saved.path

    def begin(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> None:
        """Save in the background: copy everything to host memory, hand the copy to a thread and return.

        A second call waits for the first save. `collect` returns the outcomes. Arguments and TypeError: as for `save`.
        """
        self._join()
        began = time.monotonic()
        copies = self._buffer.hold(format.layouts(tensors, state))
        contents = {f"{name}.safetensors": content for name, content in copies.items()}
        distributed.saving(True)
        self._start(self._run, step, contents, dict(facts), began)

    def begin_together(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> None:
        """Save on all ranks in the background; each rank writes its rows of sharded tensors.

        All ranks must call this (arguments and errors: as for `begin`) and see the same disk. Rank 0 renames the folder
        once every rank has written its part.
        """
        self._join()
        began = time.monotonic()
        rank, ranks = distributed.rank(), distributed.world_size()
        mine = {
            f"{name}-{rank + 1:05d}-of-{ranks:05d}.safetensors": layout
            for name, layout in format.layouts(tensors, state, main=rank == 0).items()
        }
        needed = distributed.sum(sum(layout.nbytes for layout in mine.values())) + _SLACK

        def opened() -> tuple[Path | None, str, OSError | None]:
            try:
                return *self._open(step, needed), None
            except DiskFullError as error:
                return None, f"the checkpoint of step {step} was not saved: {error.strerror}", None
            except OSError as error:
                return None, "", error

        temporary, note, failed = distributed.from_main(opened)
        if temporary is None:
            if failed is not None:
                self._failure(step, began, failed)
            else:
                self._saved.append(Saved(step, None, time.monotonic() - began, note))
            self.save_ended = True
            return
        contents = self._buffer.hold(mine)
        if rank == 0:
            self._start(self._run_main, step, temporary, contents, dict(facts), began, note, ranks)
        else:
            self._start(format.write_part, temporary, contents, rank)

    def _open(self, step: int, needed: int) -> tuple[Path, str]:
        """Make a temporary folder with room for all ranks' files; return the folder and a note about removals."""
        self._clear()
        free = files.free_bytes(self.folder)
        note = self._drop_oldest(needed, free) if free < needed else ""
        temporary = self.folder / f".writing-{self._path(step).name}-{os.getpid()}"
        temporary.mkdir()
        return temporary, note

    def collect(self) -> list[Saved]:
        """Return the saves that ended since the last call.

        Raises:
            OSError: MOST_FAILURES consecutive saves failed for another reason than a full disk.
            Exception: any other error in the writer's thread.
        """
        self.save_ended = False
        if self._error is not None:
            self._saved.clear()
            error, self._error = self._error, None
            raise error
        # one by one, since the thread may add to the list at the same time
        return [self._saved.pop(0) for _ in range(len(self._saved))]

    @property
    def may_try_again(self) -> bool:
        """Whether 1 or 2 saves failed since the last success (full disks do not count), so another save may succeed."""
        return 0 < self._failures_in_a_row < MOST_FAILURES

    def wait(self) -> list[Saved]:
        """Wait for the save in progress, then return (or raise) the same as `collect`."""
        self._join()
        return self.collect()

    def rescue(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, facts: Mapping[str, Any]
    ) -> Path:
        """Save the state from this rank alone and return the path; other ranks may save at the same time.

        An existing checkpoint of `step` and all older checkpoints are kept. Arguments and errors are as for `save`.
        """
        final = self._path(step)
        contents = {f"{name}.safetensors": layout.pieces() for name, layout in format.layouts(tensors, state).items()}
        temporary = self.folder.parent / f".rescue-{final.name}-{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not final.exists():
            try:
                temporary.mkdir(parents=True)
                written = {name: files.write(temporary / name, pieces) for name, pieces in contents.items()}
                format.write_facts(temporary, written, {"step": step, **facts})
                os.replace(temporary, final)
                files.flush(self.folder)
            except OSError:
                if not final.exists():  # else another rank was quicker, with the same state
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return final

    def all(self) -> list[Path]:
        """Return all checkpoint folders, newest (highest step) first, whether valid or not."""
        return all_in(self.folder)

    def newest(self, warn: Callable[[str], None] = print) -> Path | None:
        """Return the newest undamaged checkpoint; skip damaged ones and name them through `warn`."""
        for path in self.all():
            problem = damage(path)
            if problem is None:
                return path
            warn(f"checkpoint {path} cannot be used: {problem}. Trying the one before it.")
        return None

    def fix_names(self) -> list[str]:
        """Rename each checkpoint whose name and state.json give different steps, such as a renamed copy.

        If the correct name is taken, the checkpoint is moved to a new folder. Returns a line of text for each change.
        """
        done = []
        for path in self.all():
            try:
                step = read_facts(path)["step"]
            except CheckpointError:
                continue  # `newest` warns about this damage
            if step == step_of(path):
                continue
            if not (correct := self._path(step)).exists():
                os.replace(path, correct)
                done.append(f"checkpoint {path} is of step {step}: renamed to {correct}")
            elif aside := self._move([path]):
                done.append(f"checkpoint {path} is of step {step}, like {correct}: moved to {aside}")
        return done

    def move_away(self, after: int = -1) -> Path | None:
        """Move the checkpoints of steps later than `after` (by default all) to a new folder; return the folder or None.

        A run calls this with the step that the run goes on from. If later checkpoints stayed, `keep_last` would count
        them as the newest, and the run's own new checkpoints would be removed.
        """
        later = [path for path in self.all() if step_of(path) > after]
        return self._move(later) if later else None

    def _move(self, paths: Sequence[Path]) -> Path:
        aside = next(p for i in range(1, 10**6) if not (p := Path(f"{self.folder}-before-{i}")).exists())
        if len(paths) == len(self.all()):
            self.folder.rename(aside)
            return aside
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        return aside

    def write_with_room(self, path: Path, pieces: Callable[[], Iterable[Any]], nbytes: int) -> tuple[Any, str]:
        """Replace a file; on a full disk drop the oldest checkpoints and try again, if this makes room.

        Returns {"bytes": length, "crc32": checksum}, and a sentence about dropped checkpoints ("" for none).

        Args:
            pieces: returns the content, `nbytes` long, as bytes-like objects; called for each attempt.

        Raises:
            DiskFullError: there is no room even without all checkpoints except the newest undamaged checkpoint.
            OSError: writing failed for another reason.
        """
        try:
            return files.replace(path, pieces(), nbytes), ""
        except DiskFullError:
            needed = nbytes + _SLACK
            # If the disk reports enough free bytes, the user's quota is exhausted, and this user has no free bytes.
            free = 0 if (reported := files.free_bytes(path.parent)) >= needed else reported
            if not (dropped := self._make_room(needed, free)):
                raise
        note = f"the disk is full. Deleted to make room for {path}: {', '.join(folder.name for folder in dropped)}"
        return files.replace(path, pieces(), nbytes), note

    # The writer's thread
    def _start(self, function: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            with contextlib.suppress(OSError, AttributeError):
                # low priority for this thread alone (possible on Linux), so that training goes first if CPUs are few
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            function(*args)

        self._thread = threading.Thread(target=run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, contents: dict[str, Any], facts: dict[str, Any], began: float) -> None:
        self._finish(step, began, lambda: self._write_with_room(step, contents, {"step": step, **facts}))
        distributed.saving(False)

    def _run_main(
        self, step: int, temporary: Path, contents: dict[str, Any], facts: dict[str, Any], began: float, note: str,
        ranks: int,
    ) -> None:  # fmt: skip
        def write() -> tuple[Path, str]:
            try:
                written = format.write_files(temporary, contents)
                for rank in range(1, ranks):
                    written.update(format.part_of(temporary, rank))
                self._complete(temporary, self._path(step), written, {"step": step, **facts})
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return self._path(step), note

        self._finish(step, began, write)

    def _finish(self, step: int, began: float, write: Callable[[], tuple[Path, str]]) -> None:
        try:
            path, note = write()
        except DiskFullError as error:
            note = f"the checkpoint of step {step} was not saved: {error.strerror or error}"
            self._saved.append(Saved(step, None, time.monotonic() - began, note))
        except OSError as error:
            self._failure(step, began, error)
        except BaseException as error:
            self._error = error
        else:
            self._failures_in_a_row = 0
            try:
                self._rotate()
            except OSError as error:  # the next save tries again
                note = "; ".join([note] * bool(note) + [f"older checkpoints could not be removed: {error}"])
            self._saved.append(Saved(step, path, time.monotonic() - began, note))
        self.save_ended = True

    def _failure(self, step: int, began: float, error: OSError) -> None:
        """Record a failed save; at the third failure in a row, store the error for `collect` to raise."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MOST_FAILURES:
            newest = next(iter(self.all()), None)
            there = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
            text = (
                f"{MOST_FAILURES} saves in a row failed, the last after step {step}: {error.strerror or error}; {there}"
            )
            self._error = OSError(error.errno, text, *([error.filename] if error.filename else []))
            return
        note = f"the checkpoint of step {step} was not saved: {error}; the save will be repeated"
        self._saved.append(Saved(step, None, time.monotonic() - began, note, error))

    def _write_with_room(self, step: int, contents: Mapping[str, Any], facts: dict[str, Any]) -> tuple[Path, str]:
        """Write the checkpoint; on a full disk drop the oldest checkpoints and try again, if this makes room."""
        final = self._path(step)
        self._clear()
        needed = sum(len(part) for parts in contents.values() for part in parts) + _SLACK
        try:
            self._write_and_rename(final, contents, facts, needed)
            return final, ""
        except DiskFullError:
            # as in write_with_room: enough free bytes mean an exhausted quota
            free = 0 if (reported := files.free_bytes(self.folder)) >= needed else reported
        note = self._drop_oldest(needed, free)
        try:
            self._write_and_rename(final, contents, facts, needed)
        except DiskFullError as error:
            raise DiskFullError(error.errno, f"{note}; this did not free enough space") from None
        return final, note

    def _clear(self) -> None:
        """Make the folder if necessary, and remove temporary folders that a killed process left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*-step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _drop_oldest(self, needed: int, free: int) -> str:
        """Remove the oldest checkpoints to make room, and return a note of the removed ones.

        Raises:
            DiskFullError: removing them would not make room.
        """
        full = f"the disk is full: {needed:,} bytes needed, {free:,} free"
        if not (dropped := self._make_room(needed, free)):
            raise DiskFullError(28, f"{full}, and deleting older checkpoints would not make room. Free some space.")
        return f"{full}. Deleted to make room: {', '.join(path.name for path in dropped)}"

    def _write_and_rename(self, final: Path, contents: Mapping[str, Any], facts: dict[str, Any], needed: int) -> None:
        temporary = self.folder / f".writing-{final.name}-{os.getpid()}"
        # Free space is checked before writing: on a disk filled to the last byte, the run could not write its log.
        if files.free_bytes(self.folder) < needed:
            raise DiskFullError(28, "the disk is full")
        try:
            temporary.mkdir(parents=True)
            self._complete(temporary, final, format.write_files(temporary, contents), facts)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _complete(self, temporary: Path, final: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
        format.write_facts(temporary, written, facts)
        for path in self.flush_first:
            if path.exists():
                files.flush(path)
        if final.exists():  # the same step again, after a resume from an earlier checkpoint
            self._remove(final)
        os.replace(temporary, final)
        files.flush(self.folder)

    def _rotate(self) -> None:
        for path in self.all()[self.keep_last :]:
            self._remove(path)

    def _make_room(self, needed: int, free: int) -> list[Path]:
        """Remove and return the oldest checkpoints (not the newest undamaged); none if `needed` bytes would not fit."""
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
        # The folder is renamed first, since a half-removed folder must not look like a checkpoint.
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
