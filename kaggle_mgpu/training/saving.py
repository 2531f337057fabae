"""Write and restore checkpoints; write the best and the final weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import progress
from ..checkpoints import Expected, checkpoint, files, resume
from ..config import TrainConfig
from ..data import BatchPlan
from ..errors import CheckpointError, DiskFullError, DivergedError, RestartError
from ..parallel import Strategy, batch_norms, distributed
from . import fingerprint
from .optim import EMA
from .parts import Parts
from .task import Result, TrainState

RETRY_SECONDS = 60.0
"""Seconds from a failed save to the next attempt."""


def open_checkpoints(parts: Parts) -> checkpoint.Checkpoints:
    """Return the checkpoints in the run's folder."""
    folder, records = parts.output_dir / "checkpoints", parts.output_dir / progress.METRICS
    return checkpoint.Checkpoints(folder, keep_last=parts.config.keep_last, flush_first=[records])


def starting_point(parts: Parts, checkpoints: checkpoint.Checkpoints) -> Path | None:
    """Return the checkpoint to resume from, or None, and move later checkpoints aside. Only rank 0 calls this."""
    config = parts.config
    defaults = config.defaults()
    if parts.world_size > 1 and batch_norms(parts.strategy.model):
        defaults["sync_batchnorm"] = "off"  # older checkpoints lack this setting, and were made without it
    for abandoned in parts.output_dir.glob(".rescue-step-*"):  # left by a rank that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    start = resume.starting_point(
        checkpoints, resume=config.resume, config=config.to_dict(), may_change=config.MAY_CHANGE, stamp=parts.stamp,
        defaults=defaults, expected=expected_by(parts.strategy, parts.optimizer, parts.ema, parts.plan),
    )  # fmt: skip
    if start is not None and not _same_task(parts, start, checkpoints.folder):
        start = None
    aside = checkpoints.move_away(after=-1 if start is None else checkpoint.read_facts(start)["step"])
    if aside is not None:
        print(f"checkpoints that this run does not continue from are now in {aside}", flush=True)
    return start


def _same_task(parts: Parts, start: Path, own: Path) -> bool:
    """Return whether to resume from a checkpoint; print what was edited in the task since, if anything.

    Raises:
        CheckpointError: this folder holds the finished run of another task.
    """
    facts = checkpoint.read_facts(start)
    marks = facts.get("fingerprint"), parts.fingerprint
    differ = fingerprint.differences(*marks)
    if not differ:
        return True
    listed = f"{'; '.join(differ[:6])}{f'; and {len(differ) - 6} more' if differ[6:] else ''}"
    finished = _is_finished(start, facts["step"], parts.plan.max_steps)
    if parts.config.resume == "auto" and finished and fingerprint.differences(*marks, notes=False):
        text = f"{start.parent.parent} holds the finished run of another task: {listed}"
        if start.parent == own:
            raise CheckpointError(
                f"{text}. To train the current task, choose another output_dir, or resume='never' (the old "
                f"checkpoints are put aside). To continue from its weights anyway, set resume={str(start)!r}."
            )
        print(f"not resumed from the inputs: {text}", flush=True)
        return False
    print(
        f"NOTE: edited since {start}: {listed}. The run goes on; resume='never' trains anew.",
        flush=True,
    )
    return True


def _is_finished(start: Path, step: int, max_steps: int) -> bool:
    """Return whether a checkpoint's run is finished by its own result.json, or has taken `max_steps` steps."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        result = json.loads((start.parent.parent / "result.json").read_text(encoding="utf-8"))
        return bool(result.get("finished")) or step >= max_steps
    return step >= max_steps


def expected_by(strategy: Strategy, optimizer: torch.optim.Optimizer, ema: EMA | None, plan: BatchPlan) -> Expected:
    """Return the contents that a checkpoint must have for this run. Needs no other rank."""
    names = {parameter: name for name, parameter in strategy.model.named_parameters()}
    # deepspeed's strategy keeps the names of the parameters by group, since ZeRO replaces the optimizer's parameters
    groups: list[list[str]] | None = getattr(strategy, "groups", None)
    if groups is None:
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def samples_at(step: int) -> int:
        epochs, steps = divmod(step, plan.steps_per_epoch)
        return epochs * plan.dataset_size + steps * plan.global_batch_size

    return Expected(strategy.described(), None if ema is None else ema.state_dict(), groups, optimizer, samples_at)


def finished_result(parts: Parts) -> Result | None:
    """Return the result of a finished run, or None. Every rank must call this."""
    # under torchrun rank 0 may go on, and change result.json, before another rank looks
    result = distributed.from_main(lambda: read_result(parts.output_dir, parts.plan.max_steps, parts.config))
    if result is None:
        return None
    weights = checkpoint.read_tensors(parts.output_dir / "model.safetensors")
    checkpoint.check_model(weights, parts.strategy.described(), str(parts.output_dir))
    if parts.is_main:
        print(f"already finished after {result.step} steps: {parts.output_dir}. resume='never' trains anew.")
    return dataclasses.replace(result, output_dir=str(parts.output_dir))


def read_result(folder: Path, max_steps: int, config: TrainConfig) -> Result | None:
    """Return the result in a folder, if the run took all its steps and its weights are there.

    A run that stopped early counts as complete unless max_steps, patience or min_delta have changed since.

    If the weights file is damaged, this prints a line and returns None, so that the run resumes from the newest
    checkpoint and writes the weights again.
    """
    try:
        result = Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
        then = json.loads((folder / "config.json").read_text(encoding="utf-8")) if result.stopped_early else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    path = folder / "model.safetensors"
    early = (result.max_steps, then.get("patience"), then.get("min_delta")) == (
        max_steps, config.patience, config.min_delta
    )  # fmt: skip
    if not (result.finished is True and (result.step == max_steps or early) and path.is_file()):
        return None
    try:
        files.read_tensors(path)
        # results of older versions have no checksum
        damaged = result.weights and result.weights != {"bytes": path.stat().st_size, "crc32": files.crc32(path)}
        problem = "it does not have the checksum it was written with" if damaged else ""
    except Exception as error:
        problem = str(error)
    if problem:
        print(f"{path} is damaged: {problem}. The file is written again from the newest checkpoint.", flush=True)
    return None if problem else result


def _with_retries(write: Callable[[], tuple[Any, str]]) -> tuple[Any, str]:
    """Return the result of `write`, tried up to MOST_FAILURES times; a DiskFullError is not retried."""
    for attempts_left in reversed(range(checkpoint.MOST_FAILURES)):
        try:
            return write()
        except DiskFullError:
            raise
        except OSError:
            if not attempts_left:
                raise
    raise AssertionError("not reached")


def restore(parts: Parts, checkpoints: checkpoint.Checkpoints, start: Path) -> tuple[TrainState, list[str]]:
    """Load a checkpoint into the parts; return the run's position and lines about the resumption.

    Raises:
        CheckpointError: the checkpoint is damaged or holds another model.
    """
    strategy = parts.strategy
    saved = checkpoint.load(start, join=strategy.computes_alone)
    checkpoint.check_model(saved.tensors["model"], strategy.described(), f"{start}")
    strategy.load_full_state(parts.optimizer, {**saved.state, "model": saved.tensors["model"]})
    if parts.ema is not None:
        parts.ema.load_state_dict(saved.tensors["ema"])
    state, lines = TrainState(**saved.facts["state"]), []
    best = start.parent.parent / "best" / "model.safetensors"
    if not best.is_file():
        state.best = None  # the value is useless without its weights
    elif start.parent != checkpoints.folder:
        try:
            weights = checkpoint.read_tensors(best)
            checkpoint.check_model(weights, strategy.described(), str(best))
            if parts.is_main:
                checkpoint.replace_tensors(parts.output_dir / "best" / "model.safetensors", weights)
        except Exception as error:  # another person's file may hold anything
            lines.append(f"{best} cannot be used, so the best evaluation is searched for again: {error}")
            state.best = None
    lines.append(f"going on from {start}: step {state.step} of {parts.plan.max_steps}")
    if state.step > parts.plan.max_steps:
        lines.append(
            f"NOTE: the checkpoint has taken more steps than the settings ask for: its weights stay as they are, after "
            f"{state.step} steps. For a run of {parts.plan.max_steps} steps choose another output_dir."
        )
    if changes := resume.changes(saved.facts, parts.config.to_dict(), parts.config.MAY_CHANGE):
        listed = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in changes.items())
        lines.append(f"settings changed since the checkpoint, which is allowed: {listed}")
    return state, lines


class Saving:
    """Saves the state of one run, and knows when a save is due.

    Args:
        imported: the run was restored from another folder, so the state is saved here at once; this session's output
            alone is then enough to resume.
    """

    def __init__(
        self, parts: Parts, checkpoints: checkpoint.Checkpoints, state: TrainState, imported: bool = False
    ) -> None:
        self.checkpoints, self.every = checkpoints, parts.config.save_every
        self.interval_seconds = parts.config.save_interval_minutes * 60
        self.in_shards = parts.config.checkpoint_format == "sharded" and parts.strategy.name == "fsdp"
        self.newest_reported = False
        """Whether an error already says where the newest checkpoint is."""
        self.written: list[checkpoint.Saved] = []
        """Saves found to have ended while an error is handled; the log records these saves last."""
        self._schedule(state.step)
        if imported:
            self.saved_step, self.next_time = -1, -math.inf

    def _schedule(self, step: int) -> None:
        self.saved_step = step
        self.next_step = math.inf if self.every is None else (step // self.every + 1) * self.every
        self.next_time = time.monotonic() + self.interval_seconds

    def save(self, parts: Parts, state: TrainState) -> None:
        """Copy the state for a checkpoint. Rank 0 writes the copy during the next steps."""
        contents = self.checkpoint_contents(parts, state)
        if self.in_shards:
            self.checkpoints.begin_together(state.step, **contents)
        elif parts.is_main:
            self.checkpoints.begin(state.step, **contents)
        self._schedule(state.step)

    def ended(self, saves: list[checkpoint.Saved]) -> list[checkpoint.Saved]:
        """Return `saves`, which have ended; if one failed, the next save is due in RETRY_SECONDS at the latest."""
        if any(saved.error is not None for saved in saves):
            self.next_time = min(self.next_time, time.monotonic() + RETRY_SECONDS)
        return saves

    def checkpoint_contents(self, parts: Parts, state: TrainState) -> dict[str, Any]:
        """Return everything that a checkpoint holds: the tensors, the state and the facts (values for JSON)."""
        ungathered = parts.strategy.ungathered_state(parts.optimizer)
        tensors = {"model": ungathered.pop("model")} | ({"ema": parts.ema.state_dict()} if parts.ema else {})
        if not self.in_shards:
            tensors, ungathered = parts.strategy.whole(tensors), parts.strategy.whole(ungathered)
        facts = {"state": dataclasses.asdict(state), "stamp": parts.stamp, "world_size": parts.world_size}
        facts["fingerprint"] = parts.fingerprint
        return {"tensors": tensors, "state": ungathered, "facts": {**facts, "config": parts.config.to_dict()}}

    def rescue_checkpoint(self, parts: Parts, state: TrainState) -> Path:
        """Save the state from this rank, without other ranks, and return the path. Needs `strategy.computes_alone`."""
        return self.checkpoints.rescue(state.step, **self.checkpoint_contents(parts, state))

    def write_weights(self, parts: Parts, path: Path) -> str:
        """Write the weights, averaged if the run averages; return a note if that failed, or "".

        Every rank must call this; rank 0 alone knows the outcome. After a failure the file has its old content.
        """
        with parts.averaged_weights():
            weights = parts.strategy.weights()
            if parts.is_main:
                try:
                    checkpoint.replace_tensors(path, weights)
                except OSError as error:
                    return f"{path} could not be written: {error.strerror or error}"
        return ""

    def write_result(self, parts: Parts, result: Result) -> str:
        """Write the final weights, averaged if the run averages, and then result.json. Every rank must call this.

        Return a note about failures or deleted checkpoints, or "". On a full disk the oldest checkpoints are deleted.
        An unfinished run does not need the final weights, because it resumes from its checkpoint.

        Raises:
            DiskFullError: the run is finished, and there is no room.
            OSError: the run is finished, and three attempts to write its weights failed.
        """
        with parts.averaged_weights():
            weights = parts.strategy.weights()
            if not parts.is_main:
                return ""
            write, notes = self.checkpoints.write_with_room, []
            path, layout = parts.output_dir / "model.safetensors", files.Layout.of(weights)
            try:
                result.weights, note = _with_retries(lambda: write(path, layout.pieces, layout.nbytes))
                notes.append(note)
            except OSError as error:
                if result.finished:
                    kind, problem, advice = OSError, f"{path} could not be written: {error.strerror or error}", "Run"
                    if isinstance(error, DiskFullError):
                        kind, problem = DiskFullError, f"the disk has no room for {path}"
                        advice = "Free some space and run"
                    raise kind(
                        error.errno,
                        f"trained to the end, but {problem}. {advice} the same again: it goes on from the last "
                        f"checkpoint.",
                    ) from error
                notes.append(f"{path} could not be written: {error.strerror or error}")
        text = json.dumps(dataclasses.asdict(result), indent=1).encode()
        _, note = _with_retries(lambda: write(parts.output_dir / "result.json", lambda: [text], len(text)))
        return "; ".join(filter(None, [*notes, note]))

    def rescue(self, parts: Parts, state: TrainState) -> str:
        """Save the state, if this rank has the whole state; return a sentence about the newest checkpoint."""
        # rank 0 waits for its own save of this step. Any other rank saves again, because after an error on that rank
        # torchrun kills rank 0, and launch waits only for a limited time
        if not parts.strategy.computes_alone or (parts.is_main and state.step == self.saved_step):
            return self.newest_sentence(parts)
        try:
            path = self.rescue_checkpoint(parts, state)
        except OSError as error:
            return f"The state after step {state.step} could not be saved: {error}. {self.newest_sentence(parts)}"
        self.newest_reported = True
        return f"The state after step {state.step} is in {path}: the next run continues from there."

    def rescue_before(self, error: BaseException, parts: Parts, state: TrainState) -> None:
        """Save the state before an error ends the run, unless weights may be half changed; add a note to the error."""
        strategy, averages = parts.strategy, parts.ema
        if (
            self.newest_reported
            or state.step == 0
            or isinstance(error, DivergedError | RestartError)
            or distributed.lost_a_rank(error)
        ):
            return
        if strategy.within == "update" or (averages is not None and averages.swapped):
            text = (
                "Some weights may have been updated and others not, so the state in memory is not saved. "
                f"{self.newest_sentence(parts)}"
            )
        else:
            try:
                strategy.undo_step()
                text = self.rescue(parts, state)
            except Exception as failure:  # the run's own error matters more
                text = f"The state after step {state.step} could not be saved: {failure}. {self.newest_sentence(parts)}"
        error.add_note(text)
        print(text, flush=True)

    def rescue_for_restart(self, parts: Parts, state: TrainState) -> str:
        """Save the state before a failed step, if this rank has the whole state; return a sentence for the error."""
        if not parts.strategy.computes_alone:
            return "The newest checkpoint is from before that step"
        return f"The state before that step is in {self.rescue_checkpoint(parts, state)}"

    def wait(self, parts: Parts) -> str:
        """Wait for the last save before an error ends the run; return a sentence if the save failed."""
        try:
            if parts.is_main:
                self.written += (saves := self.checkpoints.wait())
                if saves and saves[-1].error:
                    return f" The last save failed: {saves[-1].error}."
        except OSError as error:  # the run's own error matters more
            return f" The last save failed: {error}."
        return ""

    def newest_sentence(self, parts: Parts) -> str:
        """Wait for the last save; return a sentence about the newest checkpoint."""
        self.newest_reported = True
        failed = self.wait(parts)
        newest = next(iter(self.checkpoints.all()), None)
        return (f"The newest checkpoint is {newest}." if newest else "There is no checkpoint yet.") + failed
