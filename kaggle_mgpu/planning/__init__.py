"""Test a machine and estimate a run before a GPU hour is spent.

Training imports nothing from this package. The names below load on first use, because `check` must work without torch.
Start reading at `plan` in planner.py and `run` in check.py. selftest.py runs in a check's workers, counts.py counts a
step's operations and memory, estimate.py turns the counts into times, and compare.py measures strategies. gpu_proof.py
tests training on real GPUs: the correctness of results (with gpu_task.py) and the speed (with gpu_speed.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import check, gpu_proof
    from .compare import compare_strategies
    from .estimate import Target
    from .planner import plan, plan_all, summary_line

_HOMES = {
    "plan": "planner", "plan_all": "planner", "summary_line": "planner", "Target": "estimate",
    "compare_strategies": "compare",
}  # fmt: skip
_MODULES = {"check", "gpu_proof"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Target", "check", "compare_strategies", "gpu_proof", "plan", "plan_all", "summary_line"]
