"""A run's state on disk: there or not there, never half.

The package knows no task, config or strategy: it is given names and tensors. Start reading at `Checkpoints` in
checkpoint.py; format.py is what a checkpoint's folder holds, reader.py checks what is in one, files.py writes tensors
and text so that a crash at any moment leaves the old file or the new one.
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
