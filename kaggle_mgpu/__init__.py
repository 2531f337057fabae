"""kaggle_mgpu trains PyTorch models on every GPU of a Kaggle notebook, and resumes interrupted runs.

    from kaggle_mgpu import env
    env.fix()  # before anything else is imported
    from kaggle_mgpu import Task, TrainConfig, launch, train
    result = launch(train, TrainConfig(global_batch_size=64), MyTask())

The names below are loaded at their first use (PEP 562), so `env.fix()` can run before torch or protobuf are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# _HOMES: the module of each public name. _MODULES: the path of each module with a short name
_HOMES = {
    "TrainConfig": "config",
    "notebook_parameters": "notebook",
    "launch": "launching",
    "launch_each": "launching",
    "watch": "integrations",
    "Result": "training",
    "Task": "training",
    "train": "training",
    "compare_strategies": "planning",
    "plan": "planning",
}
_MODULES = {
    "check": "planning.check",
    "checkpoint": "checkpoints.checkpoint",
    "devices": "machine.devices",
    "distributed": "parallel.distributed",
    "optim": "training.optim",
    "plots": "progress.plots",
    "session": "machine.session",
}
_PACKAGES = (
    "checkpoints config data env errors integrations launching machine parallel planning progress recipes training"
).split()

__all__ = [
    "Result", "Task", "TrainConfig", "check", "compare_strategies", "devices", "env", "launch", "launch_each",
    "notebook_parameters", "plan", "session", "train", "watch",
]  # fmt: skip

if TYPE_CHECKING:
    from . import env
    from .checkpoints import checkpoint as checkpoint
    from .config import TrainConfig
    from .integrations import watch
    from .launching import launch, launch_each
    from .machine import devices, session
    from .notebook import notebook_parameters
    from .parallel import distributed as distributed
    from .planning import check, compare_strategies, plan
    from .progress import plots as plots
    from .training import Result, Task, train
    from .training import optim as optim


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES or name in _PACKAGES:
        return import_module(f".{_MODULES.get(name, name)}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES, *_PACKAGES})
