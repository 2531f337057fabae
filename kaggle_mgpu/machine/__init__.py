"""Where this process runs and what there is: the session's limits and folders, GPUs, CPUs, memory.

The package never imports torch and creates no CUDA context: a notebook may look as often as it likes. Start reading at
`gpus` and `report` in devices.py; session.py knows Kaggle's folders, clock and display, cpu.py the container's limits.
"""

from . import cpu, devices, session
from .devices import GPU

__all__ = ["GPU", "cpu", "devices", "session"]
