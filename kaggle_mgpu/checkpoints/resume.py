"""Find the checkpoint for a run to go on from: its own newest, or its newest among the inputs, never another run's.

    path = starting_point(checkpoints, resume="auto", config=config.to_dict(), may_change=…, stamp=…)

A run is identified by its stamp and by its settings, apart from those that may change. Files among the inputs may be
anybody's and hold anything: a checkpoint that cannot be used is named and passed over, and never ends a run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..machine import session
from . import files
from .checkpoint import Checkpoints
from .format import damage, other_model, read_facts, whose


def starting_point(
    checkpoints: Checkpoints,
    *,
    resume: str,
    config: Mapping[str, Any],
    may_change: Collection[str],
    stamp: Mapping[str, Any],
    model: Mapping[str, Tensor] | None = None,
    state_names: Collection[str] | None = None,
) -> Path | None:
    """Return the checkpoint to go on from: this run's newest, else the same run's newest among Kaggle's inputs.

    Args:
        resume: auto; never (checkpoints in the folder are put aside); or the path of a checkpoint.
        config: the run's settings; those in `may_change` may differ from the checkpoint's.
        stamp: identifies the run beside the settings.
        model: the model's state; a checkpoint among the inputs with other names or shapes is another run's.
        state_names: the fields of a run's state; a checkpoint among the inputs with others is passed over.

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
            return _among_inputs(config, may_change, stamp, model, state_names)
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
    state_names: Collection[str] | None,
) -> Path | None:
    """Return this run's newest checkpoint; if there are only other runs', print how the newest differs."""
    found: list[tuple[int, Path, dict[str, Any]]] = []
    others: list[tuple[int, str]] = []
    for path in (file.parent for file in session.find("checkpoints/step-*/state.json")):
        try:
            facts = read_facts(path)
            if differ := _differences(facts, config, may_change, stamp):
                others.append((facts["step"], f"{path} is from a run with other settings: {_listed(differ)}"))
            else:
                found.append((facts["step"], path, facts))
        except Exception as error:  # whatever somebody else's file may hold, it must not end this run
            print(f"checkpoint {path} cannot be used: {error}.", flush=True)
    # newest first, and no further than the first that serves: a checksum reads the whole of it
    for step, path, facts in sorted(found, key=lambda one: one[:2], reverse=True):
        try:
            broken = damage(path)  # before any other file of it is opened
            weights = min((name for name in facts["files"] if whose(name) == "model"), default="")
            if broken is None and not weights:
                broken = "it holds no model.safetensors"
            if broken is None and not any(whose(name) == "optimizer" for name in facts["files"]):
                broken = "it holds no optimizer.safetensors"
            broken = broken or _unsound(facts["state"], state_names)
            if broken is not None:
                print(f"checkpoint {path} cannot be used: {broken}. Trying the one before it.", flush=True)
            elif model is not None and (problem := other_model(files.shapes(path / weights), model)):
                others.append((step, f"{path} is from another model: {problem}"))
            else:
                return path
        except Exception as error:
            print(f"checkpoint {path} cannot be used: {error}. Trying the one before it.", flush=True)
    if others:
        print(f"not resumed from the inputs: {max(others)[1]}", flush=True)
    return None


def _unsound(state: Mapping[str, Any], names: Collection[str] | None) -> str | None:
    """Return why this cannot be a run's position, or None."""
    if unknown := set(state) - set(state if names is None else names):
        return f"its state has {', '.join(map(repr, sorted(unknown)))}, which is not known"
    for name in ("step", "samples_seen"):
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return f"{name} in its state is {value!r}, expected a whole number of 0 or more"
    return None


def changes(
    facts: Mapping[str, Any], config: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the allowed changes of settings since a checkpoint: {name: (then, now)}."""
    then, now = facts.get("config", {}), json.loads(json.dumps(config))
    return {name: (then.get(name), now[name]) for name in now if name in may_change and then.get(name) != now[name]}


def _listed(differ: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in differ.items())


def _differences(
    facts: Mapping[str, Any], config: Mapping[str, Any], may_change: Collection[str], stamp: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the forbidden changes of settings since a checkpoint: {name: (then, now)}."""
    sides = []
    for settings, its_stamp in ((facts.get("config", {}), facts.get("stamp", {})), (config, stamp)):
        fixed = {name: value for name, value in settings.items() if name not in may_change}
        # through JSON, so that a tuple equals the list it was saved as
        sides.append(json.loads(json.dumps({**fixed, **its_stamp})))
    then, now = sides
    return {name: (then.get(name), now.get(name)) for name in {**now, **then} if then.get(name) != now.get(name)}
