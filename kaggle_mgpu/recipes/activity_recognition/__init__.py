"""Recognise people's activities from windows of accelerometer and gyroscope signals.

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.activity_recognition import ActivityRecognition, Config, measure
    task = ActivityRecognition(Config(data_path="/kaggle/input/uci-har", epochs=40))
    print(task.describe())
    result = launch(train, task.config, task)
    print(measure(task, result))  # accuracy and macro F1 on people the model has never seen, beside two baselines

Or: `python -m kaggle_mgpu train activity_recognition --data-path "UCI HAR Dataset"`. sources.py lists the file formats.

The people are divided into three parts: training; validation, to choose the best weights; and a test set (the published
one, if there is one), which is not used before training has finished. (Papers on UCI HAR often choose the epoch by the
test set, so their scores are slightly too good and cannot be compared with these.)

Files: settings.py; sources.py, embedded.py, watch.py and windows.py (reading, split); model.py; training.py (the task);
metrics.py; evaluation.py (the test set); cross_validation.py; strategies.py (single, dp and ddp compared).
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
