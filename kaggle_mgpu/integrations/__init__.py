"""Keep the runs of other libraries' loops: stop before the session's end, save, show, and resume exactly.

A loop by hand takes `watch`. transformers.py, accelerate.py and lightning.py serve the library of their name, are
imported only when asked for, and never import each other. No config object is known here. Start reading at `Session` in
session.py, which all of them share.
"""

from .by_hand import Run, watch
from .session import Session

__all__ = ["Run", "Session", "watch"]
