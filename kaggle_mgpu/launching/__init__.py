"""Run a function on every GPU from a notebook cell, a script or under torchrun.

The package knows nothing of training: it imports no torch until a worker runs, and sees a run's settings only as the
plain values in `ProcessSettings`. Start reading at `launch` in launcher.py; workers.py makes one call on one set of
workers, each.py gives every GPU a job of its own, server.py is the process from which workers are forked, advice.py
finds mistakes in loops other than `train`, lock.py keeps two runs out of one folder.
"""

from . import lock
from .each import launch_each
from .launcher import launch
from .settings import ProcessSettings

__all__ = ["ProcessSettings", "launch", "launch_each", "lock"]
