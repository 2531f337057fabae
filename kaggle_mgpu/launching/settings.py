"""Read a run's process settings as plain values from a TrainConfig or a similar object."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, Self, TypeGuard


class RunSettings(Protocol):
    """Describe the attributes by which `launch` recognises a config among its arguments, such as a TrainConfig.

    `replace` returns a copy with some values changed; `workers_wanted` is a number of processes, or None for one on
    each GPU.
    """

    @property
    def output_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...
    @property
    def workers_wanted(self) -> int | str | None: ...
    @property
    def gpu_ids(self) -> str | None: ...
    @property
    def max_restarts(self) -> int: ...
    @property
    def hang_timeout_minutes(self) -> float: ...
    @property
    def collective_timeout_minutes(self) -> float: ...
    @property
    def nccl_p2p(self) -> Literal["auto", "on", "off"]: ...
    def replace(self, **changes: Any) -> Self: ...


@dataclass(frozen=True)
class ProcessSettings:
    """Hold the settings of one launch's worker processes; the defaults equal TrainConfig's."""

    gpu_ids: str | None = None
    max_restarts: int = 0
    hang_timeout_minutes: float = 30.0
    collective_timeout_minutes: float = 60.0
    nccl_p2p: Literal["auto", "on", "off"] = "auto"

    @classmethod
    def of(cls, settings: RunSettings) -> Self:
        """Return the values in a run's settings."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


_NAMES = (
    "workers_wanted", "output_dir", "resume", "replace", *(field.name for field in fields(ProcessSettings)),
)  # fmt: skip


def is_run_settings(value: object) -> TypeGuard[RunSettings]:
    """Return whether an argument of the launched function has all attributes of `RunSettings`."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in _NAMES)
