"""Find the checkpoint that a run goes on from, in its own folder or among Kaggle's inputs, never another run's.

    path = starting_point(checkpoints, resume="auto", config=config.to_dict(), may_change=…, stamp=…)

Checkpoints belong to the same run if their stamps (facts such as the task's name and the size of the dataset) and all
settings but those in `may_change` are equal. Files among the inputs may come from anybody and hold anything: a message
names each unusable checkpoint, and the run continues without this checkpoint.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..machine import session
from .checkpoint import Checkpoints
from .format import OtherRunError, damage, read_facts
from .reader import Expected, examine


def starting_point(
    checkpoints: Checkpoints,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    expected: Expected | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Path | None:
    """Return the run's newest usable checkpoint, first from its folder, else from Kaggle's inputs; None for a new run.

    A message names each checkpoint that is damaged or holds impossible values; the checkpoint before it is tried next.

    Args:
        resume: "auto"; "never", which moves the folder's checkpoints away; or the path of a checkpoint.
        config: the run's settings; settings named in `may_change` may differ from the checkpoint's.
        stamp: further facts that identify the run, such as the task's name.
        defaults: values for settings that an older checkpoint lacks, since the package did not have them yet.
        expected: the required content of a checkpoint; None checks only checksums, settings and stamp.

    Raises:
        CheckpointError: the folder's usable checkpoints are of another run (the message lists each setting then and
            now), or the checkpoint given as `resume` cannot be used.
    """

    def examined(path: Path) -> Path:
        if problem := damage(path):
            raise CheckpointError(problem)
        if differ := _differences(read_facts(path), config, may_change, stamp, defaults):
            raise OtherRunError(
                f"{path} is from a run with other settings: {_listed(differ)}",
                "Set them back to continue that run; to start a new run, choose another output_dir, or resume='never'.",
            )
        if expected is not None:
            examine(path, expected)
        return path

    if resume == "never":
        if aside := checkpoints.move_away():
            print(f"resume='never': the checkpoints that were here are now in {aside}", flush=True)
        return None
    if resume != "auto":
        named = Path(resume)
        try:
            return examined(named)
        except OtherRunError as error:
            raise CheckpointError(str(error)) from None
        except CheckpointError as error:
            raise CheckpointError(f"resume: {named.resolve()} is not a usable checkpoint: {error}") from None
    for line in checkpoints.fix_names():
        print(line, flush=True)
    path, others = _first_usable(checkpoints.all(), examined)
    if path is None and others:  # only resume='never' starts a new run in another run's folder
        raise CheckpointError(str(others[0]))
    return path or _among_inputs(config, may_change, stamp, defaults, examined)


def _first_usable(paths: Iterable[Path], examined: Callable[[Path], Path]) -> tuple[Path | None, list[OtherRunError]]:
    """Return the first usable checkpoint or None, and an error for each of another run; print skipped paths."""
    others: list[OtherRunError] = []
    for path in paths:
        try:
            path = examined(path)
        except OtherRunError as error:
            others.append(error)
        except Exception as error:  # the content may be anything, and the disk may fail
            print(f"checkpoint {path} cannot be used: {error}. Trying the one before it.", flush=True)
        else:
            for other in others:
                print(f"not used: {other.problem}", flush=True)
            return path, others
    return None, others


def _among_inputs(
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    defaults: Mapping[str, Any] | None,
    examined: Callable[[Path], Path],
) -> Path | None:
    """Return this run's newest usable checkpoint among the inputs, else None (and print how another run's differs)."""
    found: list[tuple[int, Path]] = []
    others: list[tuple[int, str]] = []
    for path in (file.parent for file in session.find("checkpoints/step-*/state.json")):
        try:
            facts = read_facts(path)
            if differ := _differences(facts, config, may_change, stamp, defaults):
                others.append((facts["step"], f"{path} is from a run with other settings: {_listed(differ)}"))
            else:
                found.append((facts["step"], path))
        except Exception as error:  # no content of somebody else's file may end this run
            print(f"checkpoint {path} cannot be used: {error}.", flush=True)
    # The search stops at the first usable checkpoint, since computing checksums reads a whole checkpoint.
    newest, different = _first_usable((path for _, path in sorted(found, reverse=True)), examined)
    reasons = [other.problem for other in different] + [text for _, text in sorted(others, reverse=True)]
    if newest is None and reasons:
        print(f"not resumed from the inputs: {reasons[0]}", flush=True)
    return newest


def batch_begun_with(
    folder: Path,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> int | None:
    """Return the global batch size (samples) with which a run with the setting "per_gpu:N" began; None for a new run.

    Args:
        folder: the folder of the run's own checkpoints.
        stamp: as for `starting_point`, but without the global batch size. The rest is as for `starting_point`.
    """
    if resume == "never":
        return None
    own = folder.glob("step-*/state.json") if resume == "auto" else [Path(resume, "state.json")]
    for among_inputs in (False, True)[: 2 if resume == "auto" else 1]:
        files = session.find("checkpoints/step-*/state.json") if among_inputs else own
        found: list[tuple[int, int]] = []
        for path in (file.parent for file in files):
            with contextlib.suppress(Exception):  # starting_point names unusable checkpoints
                facts = read_facts(path)
                differ = _differences(facts, config, may_change, stamp, defaults).keys() - {"global_batch_size"}
                if facts["config"]["global_batch_size"] == config["global_batch_size"] and not differ:
                    found.append((facts["step"], int(facts["stamp"]["global_batch_size"])))
        if found:
            return max(found)[1]
    return None


def changes(
    facts: Mapping[str, Any], config: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the allowed changes of settings since a checkpoint: {name: (then, now)}."""
    then, now = facts.get("config", {}), json.loads(json.dumps(config))
    return {
        name: (then.get(name), now[name])
        for name in now
        if name in may_change and name in then and then[name] != now[name]
    }


def _listed(differ: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in differ.items())


def _differences(
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    defaults: Mapping[str, Any] | None,
) -> dict[str, tuple[Any, Any]]:
    """Return the forbidden changes of settings and stamp since a checkpoint: {name: (then, now)}."""
    sides = []
    saved = {**(defaults or {}), **facts.get("config", {})}
    for settings, its_stamp in ((saved, facts.get("stamp", {})), (config, stamp)):
        fixed = {name: value for name, value in settings.items() if name not in may_change}
        # JSON turns tuples into lists on both sides, so that a saved tuple equals the current tuple.
        sides.append(json.loads(json.dumps({**fixed, **its_stamp})))
    then, now = sides
    return {name: (then.get(name), now.get(name)) for name in {**now, **then} if then.get(name) != now.get(name)}
