"""Which checkpoint a run goes on from: its own newest, or its newest among the inputs, and never another run's.

    path = starting_point(checkpoints, resume="auto", config=config.to_dict(), may_change=…, stamp=…)

A run is known by its settings, those aside that may change, and by its stamp. What is found among the inputs may be
anybody's and hold anything: it is named and passed over, and never ends a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files, session
from .checkpoint import MOST_FAILURES, Checkpoints
from .checkpoint_files import CheckpointError, OtherRunError, damage, read_facts
from .checkpoint_reader import Expected, examine
from .data import BatchPlan
from .files import DiskFullError
from .optim import EMA
from .task import Result


def expected_by(strategy: Any, optimizer: torch.optim.Optimizer, ema: EMA | None, plan: BatchPlan) -> Expected:
    """What a checkpoint has to hold for this run. Asks no other rank."""
    names = {parameter: name for name, parameter in strategy.model.named_parameters()}
    if (groups := getattr(strategy, "groups", None)) is None:  # ZeRO notes them, and then puts its own tensors there
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def samples_at(step: int) -> int:
        epochs, steps = divmod(step, plan.steps_per_epoch)
        return epochs * plan.dataset_size + steps * plan.global_batch_size

    return Expected(strategy.described(), None if ema is None else ema.state_dict(), groups, optimizer, samples_at)


def starting_point(
    checkpoints: Checkpoints,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    expected: Expected | None = None,
) -> Path | None:
    """The checkpoint to go on from: this run's newest, else the same run's newest among Kaggle's inputs.

    What is damaged or says what cannot be is named and passed over for the one before it.

    Args:
        resume: auto; never (what is there is put aside); or the path of a checkpoint.
        config: the run's settings; those in `may_change` may differ from the checkpoint's.
        stamp: what else makes it this run and no other.
        expected: what a checkpoint has to hold; None: only its checksums, settings and stamp are looked at.

    Raises:
        CheckpointError: all that could be used in this run's own folder is another run's (the message lists each
            setting then and now), or the checkpoint that `resume` names cannot be used.
    """

    def examined(path: Path) -> Path:
        if problem := damage(path):
            raise CheckpointError(problem)
        if differ := _differences(read_facts(path), config, may_change, stamp):
            raise OtherRunError(
                f"{path} is from a run with other settings: {_listed(differ)}",
                "Set them back to go on with that run; choose another output_dir, or resume='never', to start a new "
                "one.",
            )
        if expected is not None:
            examine(path, expected)
        return path

    if resume == "never":
        if aside := checkpoints.put_aside():
            print(f"resume='never': the checkpoints that were here are now in {aside}", flush=True)
        return None
    if resume != "auto":
        named = Path(resume)
        try:
            return examined(named)
        except OtherRunError as error:
            raise CheckpointError(str(error)) from None
        except CheckpointError as error:
            raise CheckpointError(f"resume: {named.resolve()} is not a whole checkpoint: {error}") from None
    for line in checkpoints.put_right():
        print(line, flush=True)
    path, others = _first(checkpoints.all(), examined)
    if path is None and others:  # a new run in this folder has to be asked for
        raise CheckpointError(str(others[0]))
    return path or _among_inputs(config, may_change, stamp, examined)


def _first(paths: Iterable[Path], examined: Callable[[Path], Path]) -> tuple[Path | None, list[OtherRunError]]:
    """The first that serves, and those of another run before it. Each that is passed over is named."""
    others: list[OtherRunError] = []
    for path in paths:
        try:
            path = examined(path)
        except OtherRunError as error:
            others.append(error)
        except Exception as error:  # whatever is in it, or a disk that cannot read it
            print(f"checkpoint {path} cannot be used: {error}. Trying the one before it.", flush=True)
        else:
            for other in others:
                print(f"passed over: {other.problem}", flush=True)
            return path, others
    return None, others


def _among_inputs(
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    examined: Callable[[Path], Path],
) -> Path | None:
    """The newest of this run's; where there are only others', the newest of those is named with what is different."""
    found: list[tuple[int, Path]] = []
    others: list[tuple[int, str]] = []
    for path in (file.parent for file in session.find("checkpoints/step-*/state.json")):
        try:
            facts = read_facts(path)
            if differ := _differences(facts, config, may_change, stamp):
                others.append((facts["step"], f"{path} is from a run with other settings: {_listed(differ)}"))
            else:
                found.append((facts["step"], path))
        except Exception as error:  # whatever somebody else's file may hold, it must not end this run
            print(f"checkpoint {path} cannot be used: {error}.", flush=True)
    # newest first, and no further than the first that serves: a checksum reads the whole of it
    newest, different = _first((path for _, path in sorted(found, reverse=True)), examined)
    told = [other.problem for other in different] + [text for _, text in sorted(others, reverse=True)]
    if newest is None and told:
        print(f"not resumed from the inputs: {told[0]}", flush=True)
    return newest


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


def finished(out: Path, max_steps: int) -> Result | None:
    """The result of a run that took all its steps, with the weights it left; None otherwise.

    Where the weights are not the ones that were written, a line says so: they are then made again from the newest
    checkpoint.
    """
    try:
        document = json.loads((out / "result.json").read_text(encoding="utf-8"))
        result = Result(**document)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    path = out / "model.safetensors"
    if not (result.finished is True and result.step == max_steps and path.is_file()):
        return None
    try:
        files.read_tensors(path)
        # an older version's says nothing of the weights
        damaged = result.weights and result.weights != {"bytes": path.stat().st_size, "crc32": files.crc32(path)}
        problem = "it does not have the checksum it was written with" if damaged else ""
    except Exception as error:
        problem = str(error)
    if problem:
        print(f"{path} is damaged: {problem}. It is made again from the newest checkpoint.", flush=True)
    return None if problem else result


def write_result(checkpoints: Checkpoints, out: Path, result: Result, weights: Mapping[str, Tensor]) -> str:
    """Write the weights and then result.json. Returns what was done to make room for them, or why there are none.

    On a full disk the oldest checkpoints make room. Without the weights a run that has not come to its end is no worse
    off: it goes on from its checkpoint.

    Raises:
        DiskFullError: trained to the end, and there is no room.
        OSError: trained to the end, and they could not be written three times.
    """
    path, notes = out / "model.safetensors", []
    layout = files.Layout.of(weights)
    try:
        result.weights, note = _with_patience(lambda: checkpoints.write_with_room(path, layout.pieces, layout.nbytes))
        notes.append(note)
    except DiskFullError as error:
        if result.finished:
            raise DiskFullError(
                error.errno,
                f"trained to the end, but the disk has no room for {path}. Free some space and run the same again: it "
                f"goes on from the last checkpoint.",
            ) from error
        notes.append(f"{path} could not be written: {error.strerror}")
    except OSError as error:
        if result.finished:
            raise OSError(
                error.errno,
                f"trained to the end, but {path} could not be written: {error.strerror or error}. Run the same again: "
                f"it goes on from the last checkpoint.",
            ) from error
        notes.append(f"{path} could not be written: {error.strerror or error}")
    text = json.dumps(dataclasses.asdict(result), indent=1).encode()
    _, note = _with_patience(lambda: checkpoints.write_with_room(out / "result.json", lambda: [text], len(text)))
    return "; ".join(filter(None, [*notes, note]))


def _with_patience(write: Callable[[], tuple[Any, str]]) -> tuple[Any, str]:
    """Write, and once more and again where the disk fails for another reason than want of room."""
    for left in reversed(range(MOST_FAILURES)):
        try:
            return write()
        except DiskFullError:
            raise
        except OSError:
            if not left:
                raise
    raise AssertionError("not reached")
