"""Run a function on every GPU from a notebook cell, a script or under torchrun.

The package is independent of training: it recognises a config by the attributes of `RunSettings` in settings.py. The
notebook's process does not import torch for a launch. Start reading at `launch` in launcher.py; workers.py makes one
call on one set of workers, each.py gives every GPU a job of its own, server.py is the process from which workers are
forked, advice.py finds mistakes in functions other than `train`, lock.py keeps a second run from using a run's folder.
"""

from . import lock
from .each import launch_each
from .launcher import launch
from .settings import ProcessSettings

__all__ = ["ProcessSettings", "launch", "launch_each", "lock"]
