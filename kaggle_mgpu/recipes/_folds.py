"""Train one model per fold, one fold per GPU at a time: shared by the cross-validations of the recipes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.launching import launch_each

C = TypeVar("C", bound=TrainConfig)


def configs_of(config: C, changes: Sequence[Mapping[str, Any]]) -> list[C]:
    """Return one config per fold: `config` with the fold's `changes`, on one GPU, in output_dir/N-fold for N folds."""
    folder = f"{config.output_dir}/{len(changes)}-fold"
    return [config.replace(nproc=1, strategy="single", output_dir=folder, **change) for change in changes]


def launch_folds(function: Callable[[C], Any], config: C, configs: Sequence[C]) -> list[Any] | None:
    """Call function(config) for each fold; return the values, or print a line and return None if a fold is unfinished.

    Args:
        function: returns None for a fold whose run has not finished.
        config: nproc is the number of folds to train at the same time; "auto": one per GPU.
    """
    at_once = None if config.nproc == "auto" else int(config.nproc)
    values = launch_each(function, configs, at_once=at_once, gpu_ids=config.gpu_ids)
    if missing := sum(value is None for value in values):
        done = len(configs) - missing
        print(f"{done} of {len(configs)} folds have finished: run this again to continue the others", flush=True)
        return None
    return values


def table(counts: Mapping[str, Sequence[int]], scores: Mapping[str, Sequence[float]]) -> str:
    """Return a text table: a row per fold, then the mean and the sample standard deviation of each score.

    Args:
        counts, scores: the columns by name, each with a value per fold.
    """
    width = {name: max(10, len(name) + 2) for name in (*counts, *scores)}
    lines = [" " * 20 + "".join(f"{name:>{n}}" for name, n in width.items())]
    for number in range(len(next(iter(scores.values())))):
        cells = [f"{column[number]:{width[name]}}" for name, column in counts.items()]
        cells += [f"{column[number]:{width[name]}.4f}" for name, column in scores.items()]
        lines.append(f"fold {number:<15}" + "".join(cells))
    left = 20 + sum(width[name] for name in counts)
    for title, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        lines.append(f"{title:{left}}" + "".join(f"{of(scores[name]):{width[name]}.4f}" for name in scores))
    return "\n".join(lines)
