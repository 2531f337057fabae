"""Segment hidden animals (COD10K) in two stages: with the backbone frozen, then unfrozen.

    from kaggle_mgpu.recipes.camouflage_segmentation import CamouflageSegmentation, Config, run
    config = Config(preset="high_resolution", backbone="edgenext_base", epochs=40)
    print(CamouflageSegmentation(config).describe())
    result = run(config)

Or: `python -m kaggle_mgpu train camouflage_segmentation`. The recipe searches the inputs for COD10K in its usual
layouts (data.py); without COD10K it draws synthetic scenes, and says so. Each stage is a run in its own folder under
output_dir, and starts from the weights of the stage before. When `run` is called again, finished stages return at once
and an interrupted stage continues.
"""

from __future__ import annotations

from kaggle_mgpu.training import Task

from .segmentation import CamouflageSegmentation, baselines, by_test_set, runs
from .settings import PRESETS, Config, Stage, stages
from .staged import run

__all__ = [
    "PRESETS",
    "CamouflageSegmentation",
    "Config",
    "Stage",
    "baselines",
    "by_test_set",
    "run",
    "runs",
    "stages",
    "task",
]


def task(config: Config) -> Task:
    """Return the task of a single run that trains the whole model; `run` trains in stages instead."""
    return CamouflageSegmentation(config)
