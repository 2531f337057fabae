"""Run a command while random processes of it stand still for random times: what rests on who is quicker shows.

    python tools/stops.py --longest 2.5 --mean 0.3 --stoppers 2 -- make test

A busy machine delays all processes alike; the order of two of them goes wrong when one stands still and the other runs
on. So here one after another is stopped (SIGSTOP) and goes on a while later (SIGCONT). Whose they are shows in their
environment variables; one that stands still already was stopped by somebody else, and is left alone. The same seed
draws the same times, but not the same run.
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
"""The environment variable by which the command's processes are known; its value is this process's id."""
PAUSE_SECONDS = 0.05
"""Mean of the time between two stops."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--longest", type=float, default=1.0, help="seconds that a stop lasts at most")
    options.add_argument("--mean", type=float, default=0.15, help="seconds that a stop lasts on average")
    options.add_argument("--stoppers", type=int, default=1, help="how many processes may stand still at a time")
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
    """Until the command has ended: stop one process, let it go on, wait a little."""
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
    """The command's processes, but those that stand still or have ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended, or is another user's
            continue
        if mark in variables and state not in "TtZX":
            found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
