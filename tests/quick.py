"""`pytest --quick`: only the tests that start no process and train nothing, for the minute after an edit.

No list says which tests these are. Each test begins, and is left out at the moment it starts a process or takes an
optimizer's step, whatever becomes of it then. A test marked `quick` runs to its end all the same: ruff and mypy, say.
The cache of pytest remembers which were left out, so that the next run does not begin them; `--cache-clear` forgets.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

PROCESS = "starts a process"
TRAINING = "trains"
CACHE = "quick/left_out"
# no audit event tells of the processes that multiprocessing spawns: `start_watching` sees to them
STARTS = frozenset("os.fork os.forkpty os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen".split())


class Watch:
    """Leaves a test out at the moment it does what takes long."""

    def __init__(self) -> None:
        self.watching = False
        self.reason: str | None = None

    def leave_out(self, reason: str) -> NoReturn:
        self.reason = reason
        pytest.skip(reason)

    def audit(self, event: str, _: tuple[Any, ...]) -> None:
        if self.watching and event in STARTS:
            self.leave_out(PROCESS)

    def optimizer_step(self, *_: Any) -> None:
        if self.watching:
            self.leave_out(TRAINING)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.watching = item.get_closest_marker("quick") is None
        try:
            return (yield)
        finally:
            self.watching = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """A test that goes on in spite of the skip, or fails by it, is left out too."""
        report = yield
        if report.when == "teardown":
            if self.reason is not None:  # what a test that was broken off leaves behind is no failure
                report.outcome, report.longrepr = "passed", None
            self.reason = None
        elif self.reason is not None:
            report.outcome, report.longrepr = "skipped", (str(item.path), None, f"Skipped: {self.reason}")
        return report


def start_watching() -> Watch:
    """Hear of every process that this one starts from now on, and of every step of an optimizer."""
    import _posixsubprocess

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    watch = Watch()
    sys.addaudithook(watch.audit)
    register_optimizer_step_pre_hook(watch.optimizer_step)
    spawn = _posixsubprocess.fork_exec

    def fork_exec(*arguments: Any) -> int:
        if watch.watching:
            watch.leave_out(PROCESS)
        return spawn(*arguments)

    _posixsubprocess.fork_exec = fork_exec
    return watch


def left_out(config: pytest.Config) -> dict[str, str]:
    """Return the reason for each test that earlier runs left out, of files that have not been edited since."""
    known = config.cache.get(CACHE, {}) if config.cache is not None else {}
    current = {name: tests for name, (content, tests) in known.items() if content == content_of(config.rootpath / name)}
    return {test: reason for tests in current.values() for test, reason in tests.items()}


def content_of(file: Path) -> int:
    """Return a number that changes with a file's content."""
    return zlib.crc32(file.read_bytes()) if file.exists() else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        known = left_out(config)
        for item in items:
            if item.nodeid in known:
                item.add_marker(pytest.mark.skip(reason=known[item.nodeid]))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("quick") or config.cache is None:
        return
    known = left_out(config)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason in (PROCESS, TRAINING):
            known[report.nodeid] = reason
    files: dict[str, dict[str, str]] = {}
    for test, reason in known.items():
        files.setdefault(test.partition("::")[0], {})[test] = reason
    config.cache.set(CACHE, {name: (content_of(config.rootpath / name), tests) for name, tests in files.items()})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that start no process and train nothing")


def pytest_configure(config: pytest.Config) -> None:
    # under xdist the tests run in its workers
    if config.getoption("quick") and not config.getoption("numprocesses", None):
        config.pluginmanager.register(start_watching())
