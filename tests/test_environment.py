"""The lock says what `make demo` and `make test` install, and the other lists of versions go with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import at_the_end


def test_every_distribution_in_the_environment_is_locked(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    if Path(sys.prefix).resolve() != (root / ".venv").resolve():
        pytest.skip("the lock is .venv's: another environment says at the end how it differs")
    found = at_the_end.differences(at_the_end.installed(), at_the_end.locked(root / at_the_end.LOCK))
    assert not found, (
        f"not as {at_the_end.LOCK} has it: {', '.join(found)}. Where a requirement changed, `make lock`; "
        "where .venv did, `rm -r .venv` and `make test`"
    )


def test_what_differs_from_the_lock() -> None:
    lock = {"torch": "2.13.0", "numpy": "2.4.6", "setuptools": "81.0.0"}
    allowed = {"torch": "2.13.0", "pip": "23.2.1", "nvidia-nccl-cu13": "2.29.7", "triton": "3.7.1"}
    assert at_the_end.differences(allowed, lock) == []
    wrong = {"numpy": "2.4.5", "setuptools": "65.5.0", "piper": "1.0"}
    assert at_the_end.differences(wrong, lock) == [
        "numpy 2.4.5 (locked 2.4.6)", "piper 1.0 (not locked)", "setuptools 65.5.0 (locked 81.0.0)",
    ]  # fmt: skip
    have = at_the_end.installed()
    assert have["pytest"] == pytest.__version__
    assert not [name for name, version in have.items() if "+" in version or name != name.lower() or "_" in name]


def names(path: Path) -> set[str]:
    """The distributions that a file of requirements names."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [re.match(r"[\w.-]+", line) for line in lines if line]
    return {at_the_end.normalized(each[0]) for each in found if each is not None}


def test_the_lock_is_exact_and_names_what_is_required(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    lines = [line for line in (root / at_the_end.LOCK).read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [^/@]+)?", line)]
    locked = at_the_end.locked(root / at_the_end.LOCK)
    assert len(locked) == len(lines), "one version of each"
    assert names(root / "requirements.txt") | names(root / "tests" / "requirements.txt") <= set(locked)


def test_the_list_of_kaggles_image_holds_all_that_is_required(pytestconfig: pytest.Config) -> None:
    """requirements.txt cannot be installed beside it: its protobuf is another one."""
    root = pytestconfig.rootpath
    assert names(root / "requirements.txt") <= names(root / ".ci" / "kaggle-image.txt")


TESTS = """
import multiprocessing, os, subprocess, sys
import pytest, torch

def nothing(): pass

def test_plain(): pass
@pytest.mark.quick
def test_marked(): subprocess.run([sys.executable, "-c", ""], check=True)
def test_popen():
    with open("begun.txt", "a") as file:
        file.write("begun ")
    subprocess.run([sys.executable, "-c", ""], check=True)
def test_fork():
    if os.fork() == 0:
        os._exit(0)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method): multiprocessing.get_context(method).Process(target=nothing).start()
def test_optimizer():
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
def test_swallowed():
    try:
        subprocess.run([sys.executable, "-c", ""])
    except BaseException:
        pass
def test_in_the_way():
    try:
        subprocess.run([sys.executable, "-c", ""])
    finally:
        raise ValueError
@pytest.fixture(scope="module")
def started():
    subprocess.run([sys.executable, "-c", ""])
def test_fixture(started): pass
def test_fixture_again(started): pass
def test_plain_afterwards(): assert True
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_quick_leaves_out_what_starts_a_process_or_trains(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_each.py").write_text(TESTS)
    (tmp_path / ".ci").mkdir()
    (tmp_path / at_the_end.LOCK).write_text("pytest==0\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = quick\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "quick", "-p", "at_the_end", "--quick", *workers]
    variables = {"PYTHONPATH": str(Path(at_the_end.__file__).parent), "OMP_NUM_THREADS": "1"}
    begun = []
    for edit in ("", "", "\n"):
        with (tmp_path / "test_each.py").open("a") as file:
            file.write(edit)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        passed = set(re.findall(r"(test_\w+) PASSED|PASSED .*::(test_\w+)", done.stdout))
        assert {one or other for one, other in passed} == {"test_plain", "test_marked", "test_plain_afterwards"}
        assert "skipped: starts a process (9); trains (1)\n" in done.stdout
        begun.append((tmp_path / "begun.txt").read_text().count("begun"))
    assert begun == [1, 1, 2], "the second run remembers what the first left out, until the file is edited"
    assert f"pytest {pytest.__version__} (locked 0)" in done.stdout, "how the environment differs from the lock"
