"""The house: a room imports only from the floors below it, and nothing that should wait is imported at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kaggle_mgpu"

# room -> the rooms it may import
FLOORS: dict[str, set[str]] = {
    # below the first floor: parts of env, each one sitting to read
    "import_hooks": set(),
    "protobuf_fix": set(),
    "worker_server": set(),
    "env": {"import_hooks", "protobuf_fix", "worker_server"},
    "session": set(),
    "fields": set(),
    "config": {"fields"},
    "lock": set(),
    "files": set(),
    "shards": set(),
    "randomness": set(),
    "clock": set(),
    "devices": {"env", "session"},
    "distributed": {"session"},
    "optim": {"shards"},
    "pickling": set(),
    "server": {"worker_server", "env", "session", "pickling", "distributed"},
    "workers": {"server", "worker_server", "pickling", "devices", "session", "config", "env"},
    "launch": {"workers", "worker_server", "devices", "distributed", "config", "env", "lock"},
    "data": {"distributed", "randomness"},
    # the others are above it, and imported by `choose` alone: fsdp when asked for, and so is zero, by its name
    "strategy": {"distributed", "shards", "data_parallel", "fsdp"},
    "data_parallel": {"strategy"},
    "fsdp": {"strategy", "distributed", "shards"},
    "zero": {"strategy", "distributed"},
    "checkpoint_files": {"files", "shards"},
    "checkpoint": {"checkpoint_files", "distributed", "files"},
    "memory": {"files", "randomness"},
    "records": set(),
    "panel": {"records"},
    "display": {"session", "panel", "records"},
    "plots": {"records"},
    "progress": {"records", "panel", "display", "plots", "import_hooks"},
    "task": {"config", "data", "optim", "checkpoint", "progress", "strategy"},
    "evaluation": {"task", "config", "data", "distributed", "memory", "randomness", "strategy"},
    "micro_batch": {"config", "data", "devices", "distributed", "memory", "strategy"},
    "divergence": {"task", "data"},
    "sanity": {"task", "data", "randomness", "strategy"},
    "checkpoint_reader": {"checkpoint_files", "shards"},
    "resume": {"task", "checkpoint", "checkpoint_files", "checkpoint_reader", "data", "files", "optim", "session"},
    "build": {"task", "config", "data", "strategy"},
    "run": {
        "build",
        "evaluation",
        "micro_batch",
        "divergence",
        "sanity",
        "resume",
        "task",
        "session",
        "config",
        "devices",
        "distributed",
        "data",
        "strategy",
        "optim",
        "checkpoint",
        "progress",
        "clock",
        "memory",
        "randomness",
    },
    # its workers do what a run does, one thing at a time
    "probes": {"devices", "distributed", "strategy", "data_parallel", "checkpoint"},
    "check": {"worker_server", "env", "session", "devices", "launch", "distributed", "probes"},
    "compare": {"run", "task", "config", "data", "distributed", "optim", "memory", "devices", "launch"},
    "facts": {"run", "task", "config", "data", "distributed", "memory", "devices", "launch"},
    "estimate": {"facts", "data", "devices"},
    "plan": {"estimate", "facts", "compare", "probes", "task", "config", "data", "devices", "launch", "session"},
    "trainer": {"run", "task", "config", "distributed", "lock", "optim", "randomness"},
    "recipes": {
        "session",
        "lock",
        "config",
        "devices",
        "distributed",
        "data",
        "files",
        "checkpoint",
        "optim",
        "plots",
        "progress",
        "randomness",
        "shards",
        "strategy",
        "task",
        "trainer",
        "launch",
    },
}
# rooms that run before anything is installed or imported
STDLIB_ONLY = {
    *("import_hooks", "protobuf_fix", "worker_server", "env", "fields", "session", "lock", "devices", "pickling"),
    *("server", "workers", "launch", "check"),
}
FREE = {"__init__", "__main__"}


def rooms() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path: Path, top_level: bool = False) -> set[str]:
    """Full names of the modules a file imports, anywhere in it or at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["kaggle_mgpu", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "kaggle_mgpu" else {module}
    return names


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_the_floors_below(path: Path) -> None:
    room = room_of(path)
    if room in FREE:
        return
    assert room in FLOORS, f"{room} is a new room: give it a floor in this table"
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("kaggle_mgpu.")}
    assert inside - {room} <= FLOORS[room]


@pytest.mark.parametrize("room", sorted(STDLIB_ONLY))
def test_the_ground_floor_needs_nothing_installed(room: str) -> None:
    outside = {name.split(".")[0] for name in imported(PACKAGE / f"{room}.py", top_level=True)}
    assert outside - {"kaggle_mgpu"} <= set(sys.stdlib_module_names) | {"__future__"}


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, kaggle_mgpu\n"
        "from kaggle_mgpu import env, session, devices, TrainConfig, notebook_parameters\n"
        "env.fix(); devices.gpus(); TrainConfig(lr=1e-3)\n"
        "print([name for name in ('torch', 'numpy', 'tensorflow', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_name_the_package_hands_on_is_there() -> None:
    import kaggle_mgpu
    from kaggle_mgpu.launch import launch  # importing the room must not hide the function of the same name

    assert {name: getattr(kaggle_mgpu, name) for name in kaggle_mgpu.__all__}
    from kaggle_mgpu.plan import plan

    assert kaggle_mgpu.launch is launch
    assert kaggle_mgpu.plan is plan
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        _ = kaggle_mgpu.lunch
