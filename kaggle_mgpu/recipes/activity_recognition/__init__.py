"""Recognise people's activities from windows of accelerometer and gyroscope signals.

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.activity_recognition import ActivityRecognition, Config, measure
    task = ActivityRecognition(Config(data_path="/kaggle/input/uci-har", epochs=40))
    print(task.describe())
    result = launch(train, task.config, task)
    print(measure(task, result))  # accuracy and macro F1 on people the model has never seen, beside two baselines

Or: `python -m kaggle_mgpu train activity_recognition --data-path "UCI HAR Dataset"`. What can be read: `sources.py`.

Three parts, and no person in two of them: training; validation, which chooses the weights that are kept as the best;
and a test set, the published one where there is one, which nothing looks at before training has finished. (Papers on
UCI HAR often choose their epoch by the test set: their figures are a little too good, and not comparable to these.)

The parts: settings.py; sources.py, embedded.py, watch.py and windows.py (reading, split); model.py; training.py (the
task); metrics.py; evaluation.py (the test); cross_validation.py; strategies.py (side by side).
"""

from .cross_validation import CrossValidation, cross_validate
from .evaluation import Report, baselines, measure, predict, run, write_predictions
from .metrics import confusion, macro_f1
from .model import Network, augment
from .settings import Config
from .strategies import comparison, side_by_side
from .training import ActivityRecognition, Augmented, Signals, task

__all__ = [
    "ActivityRecognition",
    "Augmented",
    "Config",
    "CrossValidation",
    "Network",
    "Report",
    "Signals",
    "augment",
    "baselines",
    "comparison",
    "confusion",
    "cross_validate",
    "macro_f1",
    "measure",
    "predict",
    "run",
    "side_by_side",
    "task",
    "write_predictions",
]
