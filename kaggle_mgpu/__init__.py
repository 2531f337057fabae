"""Train on every GPU of a Kaggle notebook, without losing a run.

    from kaggle_mgpu import env
    env.fix()  # before anything else is imported
    from kaggle_mgpu import Task, TrainConfig, launch, train
    result = launch(train, TrainConfig(global_batch_size=64), MyTask())

Importing the package imports nothing else: the names below load when they are first used (PEP 562), so that the
environment can be fixed before torch or protobuf are there.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "config",
    "notebook_parameters": "config",
    "Task": "task",
    "Result": "task",
    "train": "trainer",
}
_ROOMS = {
    "checkpoint",
    "config",
    "data",
    "devices",
    "distributed",
    "env",
    "optim",
    "progress",
    "recipes",
    "session",
    "task",
    "trainer",
}

__all__ = ["Result", "Task", "TrainConfig", "devices", "env", "launch", "notebook_parameters", "session", "train"]

if TYPE_CHECKING:
    from . import devices, env, session
    from .config import TrainConfig, notebook_parameters
    from .launch import launch
    from .task import Result, Task
    from .trainer import train


def __getattr__(name: str) -> Any:
    try:
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(f"{__name__}."):
            raise AttributeError(
                f"{error.name} is not in {__path__[0]}: a notebook carries only the modules that it uses. Where you "
                f"need all of them, install the package or run in a checkout."
            ) from None
        raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS, "launch"})


class _Package(ModuleType):
    """`launch` is a module and the function in it. Importing the module would bind it here: the function wins."""

    @property
    def launch(self) -> Any:
        return getattr(import_module(".launch", __name__), "launch")  # noqa: B009 (a module attribute mypy cannot see)

    @launch.setter
    def launch(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
