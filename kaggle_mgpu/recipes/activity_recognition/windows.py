"""Signals cut into windows, the common form of every source of data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """Signals cut into windows, all in memory."""

    x: NDArray[np.float32]
    """(windows, channels, time)."""
    y: NDArray[np.int64]
    """(windows,), an index into classes."""
    subject: NDArray[np.str_] | None
    """(windows,), the subject of each; None where the data names none."""
    test: NDArray[np.bool_] | None
    """(windows,), True in the published test set; None where none was published."""
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    source: str
    """The origin of the windows, in words."""
    note: str = ""
    """A remark about the source, for descriptions."""
