"""Run a command and stop random processes of the command for random times, to reveal race conditions.

    python tools/stops.py --longest 2.5 --mean 0.3 --stoppers 2 -- make test

A busy machine delays all processes alike; races show when one process stands still and another runs on. So random
processes get SIGSTOP, and SIGCONT a while later. An environment variable marks the command's processes; processes that
somebody else stopped are left alone. The same seed draws the same times, but not the same run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MARK = "KIT_STOPS"
"""The environment variable that marks the command's processes; the value is this process's id."""
PAUSE_SECONDS = 0.05
"""The mean time between two stops."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--longest", type=float, default=1.0, help="longest stop in seconds")
    options.add_argument("--mean", type=float, default=0.15, help="mean stop in seconds")
    options.add_argument("--stoppers", type=int, default=1, help="most processes that stand still at a time")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("command", nargs="+", help="after --")
    given = options.parse_args(arguments)
    ended = threading.Event()
    mark = f"{MARK}={os.getpid()}".encode()
    with subprocess.Popen(given.command, env={**os.environ, MARK: str(os.getpid())}) as command:
        stoppers = [
            threading.Thread(
                target=_stop_some,
                args=(mark, random.Random(f"{given.seed} {number}"), given.longest, given.mean, ended),
            )
            for number in range(given.stoppers)
        ]
        for stopper in stoppers:
            stopper.start()
        try:
            return command.wait()
        finally:
            ended.set()
            for stopper in stoppers:
                stopper.join()


def _stop_some(mark: bytes, choice: random.Random, longest: float, mean: float, ended: threading.Event) -> None:
    """Stop a process, continue it and pause, until the command has ended."""
    while not ended.is_set():
        if processes := _running(mark):
            chosen = choice.choice(processes)
            try:
                os.kill(chosen, signal.SIGSTOP)
                ended.wait(min(longest, choice.expovariate(1 / mean)))
                os.kill(chosen, signal.SIGCONT)
            except ProcessLookupError:
                pass
        time.sleep(choice.expovariate(1 / PAUSE_SECONDS))


def _running(mark: bytes) -> list[int]:
    """Return the ids of the command's active processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the process has just ended, or belongs to another user
            continue
        if mark in variables and state not in "TtZX":
            found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
