"""A run's state on disk, complete or absent.

The package knows no task, config or strategy, only names and tensors. Start reading at `Checkpoints` in checkpoint.py.
format.py defines the contents of a checkpoint's folder, reader.py checks them, resume.py chooses the checkpoint to go
on from, and files.py writes tensors and text so that a crash at any moment leaves the old file or the new one.
"""

from . import checkpoint, files, resume
from .checkpoint import Checkpoints
from .files import read_tensors, whole, write_text
from .format import check_model
from .reader import Expected

__all__ = [
    "Checkpoints",
    "Expected",
    "check_model",
    "checkpoint",
    "files",
    "read_tensors",
    "resume",
    "whole",
    "write_text",
]
