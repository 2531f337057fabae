"""What all tests share: one thread a process, and no GPU tests unless asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kaggle_server.at_work import house, kaggle, root  # noqa: F401 - fixtures of several files

pytest_plugins = ["quick", "at_the_end", "pretend_cuda.fixtures"]
# the same examples each time, however long a busy machine takes for one
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")
# two workers with two threads each on two cores crawl
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the scripts that tests run find the package, which is not installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
# a developer's own settings must not decide what the tests see
KAGGLE = ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_IS_COMPETITION_RERUN")
OURS = tuple(f"KAGGLE_MGPU_{name}" for name in ("DISPLAY", "KAGGLE_ROOT", "PROTOBUF", "QUIET", "SESSION_END"))
for name in (*KAGGLE, *OURS, "MAKEFLAGS"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _kaggles_variables_stay() -> Iterator[None]:
    """A variable that a test leaves behind would decide what a later one sees, where that one runs in its process."""

    def variables() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("KAGGLE")}

    before = variables()
    yield
    assert variables() == before, "left in os.environ"


# The files that take longest, longest first: begun last, one of them would run on beside an idle core
SLOWEST = (
    "notebooks_on_kaggle two_gpus relay own_notebook gpu_proof launch kernels import_hooks fresh_environment resume "
    "style main camouflage_segmentation surface_segmentation trainer sft fsdp notebooks nodes activity_recognition "
    "protobuf_fix panel oom"
).split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from kaggle_mgpu import devices

    order = {f"test_{name}": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable: the rest stays as it is
    if config.getoption("quick"):  # what runs to its end takes longest, mypy above all
        items.sort(key=lambda item: item.get_closest_marker("quick") is None)
    if not devices.gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    for name, label in {"deepspeed": "DeepSpeed", "trl": "TRL"}.items():
        if importlib.util.find_spec(name) is None:
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"needs {label}: make test-{name}"))
