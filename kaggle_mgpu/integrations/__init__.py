"""Run the loops of other libraries safely: stop before the session's end, save, show progress, and resume exactly.

`watch` serves a loop written by hand. transformers.py, accelerate.py and lightning.py serve the library of their name,
are imported only when asked for, and never import each other. Settings are plain arguments, not a TrainConfig. Start
reading at `Session` in session.py, which all loops share.
"""

from .by_hand import Run, watch
from .session import Session

__all__ = ["Run", "Session", "watch"]
