"""`Task`, and the training loop.

The package starts no processes. Start reading at `train` in loop.py, then `Task` in task.py.
"""

from . import optim
from .clock import Clock, StepTaken, disk_speed, floor
from .loop import take_step, train
from .micro_batch import settle_micro_batch
from .muon import Muon
from .out_of_memory import is_out_of_memory, release
from .parts import Parts, StepParts, build_parts, count_parameters, keep_4bit_layout
from .stop_requests import stop_requests
from .task import Result, Task, TrainState, expect

__all__ = [
    "Clock",
    "Muon",
    "Parts",
    "Result",
    "StepTaken",
    "StepParts",
    "Task",
    "TrainState",
    "build_parts",
    "count_parameters",
    "disk_speed",
    "expect",
    "floor",
    "is_out_of_memory",
    "keep_4bit_layout",
    "optim",
    "release",
    "settle_micro_batch",
    "stop_requests",
    "take_step",
    "train",
]
