"""The machine package describes the Kaggle session, its folders and limits, and the GPUs, CPUs and memory.

The package never imports torch and creates no CUDA context, so a notebook may call it at any time. Start reading at
`gpus` and `report` in devices.py; session.py knows Kaggle's folders, clock and display, cpu.py the container's limits.
"""

from . import cpu, devices, session
from .devices import GPU

__all__ = ["GPU", "cpu", "devices", "session"]
