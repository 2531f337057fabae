"""Segment the papyrus sheets in 3-D scans of rolled scrolls, with a residual U-Net trained on patches.

    from kaggle_mgpu.recipes.surface_segmentation import Config, run
    result = run(Config(data_path="/kaggle/input/vesuvius-challenge-surface-detection"))

Or: `python -m kaggle_mgpu train surface_segmentation --epochs 20`. `run` trains, then predicts whole volumes: the
held-out volumes, to report their scores, and the test images, for output_dir/submission.zip. After an interrupt the
same call continues; with a finished model it predicts only the volumes without a prediction. Without data `run` uses
small synthetic volumes, and says so. `found = cross_validate(config)` trains a model for each fold of the volumes, and
`run(found.ensemble(config))` predicts with the mean of these models' probabilities.
"""

from .cross_validation import CrossValidation, cross_validate
from .inference import sliding_window, validate_submission
from .stages import baselines, figure, infer, run
from .training import Config, SurfaceSegmentation, prepare, task

__all__ = [
    "Config",
    "CrossValidation",
    "SurfaceSegmentation",
    "baselines",
    "cross_validate",
    "figure",
    "infer",
    "prepare",
    "run",
    "sliding_window",
    "task",
    "validate_submission",
]
