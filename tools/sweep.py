"""Run each combination of parameter values, here or on Kaggle, and print a table of the results.

    python tools/kernels.py sweep text_generation -p lr=[3e-4,1e-3] -p n_layer=[4,8] -p epochs=2

A list gives the values to sweep over; other values are the same in all runs (a parameter that is a list itself takes a
list of lists). Each run has a folder in runs/SLUG/sweep-…. After a restart, finished runs are kept and others go on.
With --push each combination is a kernel, two sessions at a time as Kaggle allows, and as many as the week's quota can
pay for; the same command goes on with the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kaggle_cli
import notebooks
from kaggle_cli import KaggleError
from kernel import LEAST, SMALL, Kernel, KernelError, Outcome, QuotaError, check_parameters, planned, read_json

SESSIONS = 2
"""The number of batch sessions with GPUs that Kaggle runs at once for an account."""


def points(parameters: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the swept names, and the parameters of every combination of their values.

    Raises:
        KernelError: nothing is swept over, or a list is empty.
    """
    swept = [name for name, value in parameters.items() if isinstance(value, list)]
    if not swept or not all(parameters[name] for name in swept):
        given = ", ".join(f"{name}={value!r}" for name, value in parameters.items()) or "no parameters"
        raise KernelError(f"sweep: expected a list of values to sweep over, such as -p lr=[3e-4,1e-3], got {given}")
    once = [[v for i, v in enumerate(parameters[name]) if v not in parameters[name][:i]] for name in swept]
    combinations = itertools.product(*once)
    return swept, [{**parameters, **dict(zip(swept, values, strict=True))} for values in combinations]


def run(
    kernel: Kernel, *, push: bool, interval: float, plan: bool = False, say: Callable[[str], object] = print
) -> int:
    """Run all combinations; return 0 if every run finished, else 1.

    Args:
        plan: Kaggle ends each session by its own plan.
    """
    swept, settings = points(kernel.parameters)
    check_parameters(kernel, settings)
    if push:
        kernel.check_user()
    outside = [Path(str(each.get("output_dir", ""))) for each in settings]
    if not push and (path := next((path for path in outside if path.is_absolute() or ".." in path.parts), None)):
        raise KernelError(f"sweep: each run has a folder of its own; expected a relative output_dir, got {str(path)!r}")
    outcomes = _on_kaggle(kernel, swept, settings, interval, plan, say) if push else _here(kernel, swept, settings, say)
    text = table(swept, settings, outcomes)
    path = kernel.root / "runs" / kernel.slug / "sweep.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path}")
    return 0 if all(outcome.finished for outcome in outcomes) else 1


def _here(
    kernel: Kernel, swept: list[str], settings: list[dict[str, Any]], say: Callable[[str], object]
) -> list[Outcome]:
    built = kernel.root / "build" / "kernels" / kernel.slug / "sweep.ipynb"
    built.parent.mkdir(parents=True, exist_ok=True)
    built.write_text(notebooks.dumps(kernel.load()), encoding="utf-8")
    outcomes = []
    for number, given in enumerate(settings, 1):
        # named by the parameters, so that a sweep with one more value finds its finished runs
        name = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]
        folder = kernel.root / "runs" / kernel.slug / f"sweep-{name}"
        say(f"run {number} of {len(settings)}: {_shown(swept, given)}, in {folder}")
        failed = False
        try:
            notebooks.run(built, _from_here(given), folder / "notebook.ipynb", folder)
        except notebooks.NotebookError as error:
            say(str(error))
            failed = True
        outcome = dataclasses.replace(kernel, parameters=given).outcome(folder)
        outcomes.append(dataclasses.replace(outcome, finished=outcome.finished and not failed))
    return outcomes


def _from_here(given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with absolute paths, since each run works in its own folder."""
    return {
        name: str(Path(value).resolve())
        if isinstance(value, str) and name != "output_dir" and os.sep in value and Path(value).exists()
        else value
        for name, value in given.items()
    }


def _on_kaggle(
    kernel: Kernel,
    swept: list[str],
    settings: list[dict[str, Any]],
    interval: float,
    plan: bool,
    say: Callable[[str], object],
) -> list[Outcome]:
    kernels = [
        dataclasses.replace(kernel, title=f"{kernel.title[:38]} Sweep {number}", parameters=given)
        for number, given in enumerate(settings, 1)
    ]
    outcomes: dict[int, Outcome] = {}
    running: list[int] = []
    waiting = list(range(len(kernels)))
    begun = dict.fromkeys(waiting, float("-inf"))
    short, told = False, set[str]()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            say(text)

    while (waiting and not short) or running:
        while waiting and not short and len(running) < SESSIONS:
            number = waiting[0]
            each = kernels[number]
            if _pushed_before(each):
                say(f"{each.id}: pushed before with the same content")
            else:
                if plan and each.limit is None:
                    each.limit = planned(each)
                try:
                    promised = sum(_left(kernels[other], begun[other]) for other in running)
                    pushed = each.push(ask=functools.partial(each.ask_quota, once, promised))
                    begun[number] = time.monotonic()
                    say(f"{_shown(swept, each.parameters)}: {pushed.url}")
                except QuotaError as error:
                    short = not running
                    once(f"{error}: trying again when a session has ended" if running else str(error))
                    break
                except kaggle_cli.RefusedError as error:
                    if not running:
                        raise
                    say(f"{error}: trying again when a session has ended")
                    break
            running.append(waiting.pop(0))
        for number in list(running):
            each = kernels[number]
            try:
                status = kaggle_cli.status(each.id)
            except KaggleError as error:
                say(str(error))
                continue
            # just after a push Kaggle may still report the previous session
            if not status.active and time.monotonic() - begun[number] >= 2 * interval:
                kaggle_cli.output(each.id, each.results(), SMALL)
                outcome = each.outcome(each.results())
                # a cell after training may have failed
                done = outcome.finished and status.state == "COMPLETE"
                outcomes[number] = dataclasses.replace(outcome, finished=done)
                running.remove(number)
                say(f"{each.id} ({_shown(swept, each.parameters)}): {status.state}\n{outcomes[number].text}")
        if running:
            time.sleep(interval)
    if short:
        left = "; ".join(_shown(swept, kernels[number].parameters) for number in waiting)
        say(f"left for later, when the same command goes on: {left}")
    return [outcomes.get(number, Outcome(False, 0, "", {})) for number in range(len(kernels))]


def _left(kernel: Kernel, begun: float) -> float:
    """Return the seconds of quota that a session begun here will still need, as far as known."""
    return max(0.0, (kernel.seconds or LEAST) - (time.monotonic() - begun))


def _pushed_before(kernel: Kernel) -> bool:
    """Return whether the kernel's newest version has the same content."""
    if read_json(kernel.record).get("sha256") != kernel.build():
        return False
    status = kaggle_cli.status_if_any(kernel.id)
    return status is not None and (status.active or status.state == "COMPLETE")


def _shown(swept: list[str], given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={given[name]!r}" for name in swept)


def table(swept: list[str], settings: list[dict[str, Any]], outcomes: list[Outcome]) -> str:
    """Return a Markdown table with a row per combination and the metrics of the run's own result."""
    rows = []
    for outcome in outcomes:
        said = next(iter(outcome.results.values())) if outcome.results else {}
        rows.append({"finished": "yes" if outcome.finished else "no", "step": outcome.step, "best": said.get("best")})
        rows[-1] |= {**(said.get("metrics") or {}), "seconds": said.get("seconds")}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join([*swept, *columns])} |", "|" + "---|" * (len(swept) + len(columns))]
    for given, row in zip(settings, rows, strict=True):
        cells = [repr(given[name]).replace("|", r"\|") for name in swept] + [_cell(row.get(name)) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
