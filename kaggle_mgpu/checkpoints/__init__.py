"""The checkpoints package saves a run's state to disk; a checkpoint is complete or absent, never half written.

The package uses no task, config or strategy, only tensors by name and plain values. Start reading at `Checkpoints` in
checkpoint.py. format.py defines the contents of a checkpoint's folder, reader.py checks them, resume.py chooses the
checkpoint to go on from, and files.py writes a file so that a crash at any moment leaves the old or the new content.
"""

from . import checkpoint, files, resume
from .checkpoint import Checkpoints
from .files import atomically, read_tensors, write_text
from .format import check_model
from .reader import Expected

__all__ = [
    "Checkpoints",
    "Expected",
    "atomically",
    "check_model",
    "checkpoint",
    "files",
    "read_tensors",
    "resume",
    "write_text",
]
