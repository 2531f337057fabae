"""What can be known before a GPU hour is spent: whether the machine trains right, what a run will take.

Nothing here is imported by a run. The names below load when they are first used, since `check` must work, and say what
is wrong, where torch cannot be imported. Start reading at `plan` in planner.py and `run` in check.py; selftest.py is
what a check's workers do, counts.py counts a step's operations and memory, estimate.py makes times of them, compare.py
measures strategies beside each other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import check
    from .compare import compare_strategies
    from .estimate import Target
    from .planner import plan, together

_HOMES = {"plan": "planner", "together": "planner", "Target": "estimate", "compare_strategies": "compare"}
_MODULES = {"check"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Target", "check", "compare_strategies", "plan", "together"]
