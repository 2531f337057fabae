"""What pytest says at the end: what was skipped, in one line, and how this environment differs from the lock."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import pytest

LOCK = Path(".ci") / "constraints.txt"
# of the environment itself, and what a CUDA build of torch brings
NOT_LOCKED = re.compile(r"pip|setuptools|wheel|triton|(nvidia|cuda)-.*")


def normalized(name: str) -> str:
    """Return a distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> dict[str, str]:
    """Return the version of each distribution that a lock names."""
    lines = (line.partition(";")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalized(name): version for name, version in pairs}


def installed() -> dict[str, str]:
    """Return the version of each distribution in this environment, without a build's label such as `+cpu`."""
    here = list({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    return {normalized(each.name): each.version.partition("+")[0] for each in distributions(path=here)}


def differences(have: dict[str, str], lock: dict[str, str]) -> list[str]:
    """Return a phrase for each distribution that is there in another version than locked, or that is not locked."""
    found = []
    for name, version in sorted(have.items()):
        if lock.get(name) != version and not (name not in lock and NOT_LOCKED.fullmatch(name)):
            found.append(f"{name} {version} ({f'locked {lock[name]}' if name in lock else 'not locked'})")
    return found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.write_line("skipped: " + "; ".join(f"{why} ({count})" for why, count in reasons.most_common()))
    found = differences(installed(), locked(terminalreporter.config.rootpath / LOCK))
    if found:
        terminalreporter.write_line(f"{len(found)} not as in {LOCK}: {', '.join(found)}")
