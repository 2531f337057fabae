"""Exception classes shared by several packages. This module imports nothing."""

from __future__ import annotations


class RestartError(RuntimeError):
    """The run must be started again in fresh processes, and will continue from its newest checkpoint."""


class DivergedError(FloatingPointError):
    """The loss or the gradient is no longer finite, so the run cannot continue."""
