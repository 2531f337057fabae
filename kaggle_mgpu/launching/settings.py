"""What `launch` reads of a run's settings: plain values, whatever object they come from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, Self, TypeGuard


class RunSettings(Protocol):
    """A run's settings as `launch` sees them among its arguments: a TrainConfig, or any object with these attributes.

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
    """What the worker processes of one launch take from a run's settings; the defaults are those of a TrainConfig."""

    gpu_ids: str | None = None
    max_restarts: int = 0
    hang_timeout_minutes: float = 30.0
    collective_timeout_minutes: float = 60.0
    nccl_p2p: Literal["auto", "on", "off"] = "auto"

    @classmethod
    def of(cls, settings: RunSettings) -> Self:
        """The values in a run's settings."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


_NAMES = (
    "workers_wanted", "output_dir", "resume", "replace", *(field.name for field in fields(ProcessSettings)),
)  # fmt: skip


def is_run_settings(value: object) -> TypeGuard[RunSettings]:
    """Whether an argument of the launched function holds a run's settings."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in _NAMES)
