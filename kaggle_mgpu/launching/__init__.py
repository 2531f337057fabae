"""Run a function on every GPU from a notebook cell, a script or under torchrun.

The package knows nothing of training: it imports no torch until a worker runs, and sees a run's settings only as the
plain values in `ProcessSettings`. Start reading at `launch` in launcher.py; workers.py sees one set of workers through,
server.py is the process that they are forked from, lock.py keeps two runs out of one folder.
"""

from . import lock
from .launcher import launch
from .settings import ProcessSettings

__all__ = ["ProcessSettings", "launch", "lock"]
