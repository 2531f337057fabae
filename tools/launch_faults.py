"""Launch many times with a fault at a random point, and look for leftovers.

    python tools/launch_faults.py --count 200 --seed 0

Each launch runs two workers that train a little, some with a loader process. The fault is an exception, SIGKILL,
SIGSEGV, os._exit or a hang at a random step of a random rank, or comes from outside at a random moment, possibly before
the workers exist: SIGKILL for any process of the launch, one interrupt, or two. After each launch the error must be the
expected one, and there must be no more processes, file descriptors, listening ports or entries of /dev/shm than before;
otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from kaggle_mgpu import launch
from kaggle_mgpu.env import worker_server
from kaggle_mgpu.errors import HangError, WorkerDiedError

INSIDE = ["exception", "kill", "segfault", "exit", "hang"]
OUTSIDE = ["kill from outside", "interrupt", "two interrupts"]
STEPS = 20
EXPECTED: dict[str, tuple[type, ...]] = {
    "none": (),
    "exception": (ZeroDivisionError,),
    "kill": (WorkerDiedError,),
    "segfault": (WorkerDiedError,),
    "exit": (WorkerDiedError,),
    "hang": (HangError,),
    # these may come after the end, or before a worker has begun
    "kill from outside": (WorkerDiedError, type(None)),
    "interrupt": (KeyboardInterrupt, type(None)),
    "two interrupts": (KeyboardInterrupt, type(None)),
}


def work(fault: str, victim: int, at: int) -> int:
    """Train a few steps in a worker, with a loader process and a semaphore that a killed rank leaves behind."""
    import multiprocessing

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from kaggle_mgpu import distributed

    _note()
    multiprocessing.get_context("spawn").Semaphore()  # named, and registered with a resource tracker
    distributed.init()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(STEPS, 8)), num_workers=at % 2, worker_init_fn=_note)
    for step, (batch,) in enumerate(data):
        distributed.alive(step)
        if step == at and distributed.rank() == victim:
            if fault == "exception":
                raise ZeroDivisionError(f"at step {step}")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "segfault":
                ctypes.string_at(0)
            if fault == "exit":
                os._exit(3)
            if fault == "hang":
                time.sleep(1000)
        print("step", step)
        model(batch).sum().backward()
        optimizer.step()
    return distributed.rank()


def _note(*_: object) -> None:
    """Write the prefixes of this process's names in /dev/shm to a file, since other programs have entries there too."""
    import multiprocessing

    prefix = multiprocessing.current_process()._config["semprefix"]  # type: ignore[attr-defined]
    with open("names", "a") as file:
        file.write(f"torch_{os.getpid()}_\nsem.{prefix.lstrip('/')}-\n")


def _shared() -> int:
    names = tuple(Path("names").read_text().splitlines())
    return sum(entry.startswith(names) for entry in os.listdir("/dev/shm"))


def left_behind() -> dict[str, int]:
    """Count the things that a launch must not leave behind."""
    me = psutil.Process()
    with contextlib.suppress(ChildProcessError):
        for orphan in me.children():
            if orphan.status() == psutil.STATUS_ZOMBIE and orphan.ppid() == me.pid and not _is_server(orphan):
                os.waitpid(orphan.pid, os.WNOHANG)
    return {
        "processes": len(me.children(recursive=True)),
        "file descriptors": me.num_fds(),
        "listening ports": sum(c.status == "LISTEN" for p in [me, *me.children(recursive=True)] for c in _sockets(p)),
        "entries of /dev/shm": _shared(),
        "threads": threading.active_count(),
    }


def _is_server(process: psutil.Process) -> bool:
    return worker_server.current is not None and process.pid == worker_server.current.process.pid


def _sockets(process: psutil.Process) -> list[Any]:
    try:
        # psutil 6 has renamed it; Kaggle's image has 5.9
        return list((getattr(process, "net_connections", None) or process.connections)())
    except psutil.Error:
        return []


def _from_outside(fault: str, delay: float, choice: random.Random, killed: list[int]) -> None:
    """Cause a fault from outside; append the depth of a killed process: server 1, supervisor 2, worker 3, child 4."""
    time.sleep(delay)
    if fault == "kill from outside":
        me = psutil.Process()
        if others := me.children(recursive=True):  # the server among them
            victim = choice.choice(others)
            with contextlib.suppress(psutil.Error):  # the process has just ended
                depth = len(victim.parents()) - len(me.parents())
                victim.kill()
                killed.append(depth)
        return
    for _ in range(1 + (fault == "two interrupts")):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)


def main(arguments: list[str] | None = None) -> int:
    """Run the launches; print the report."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--count", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    # ignore an interrupt that comes after the end of its launch
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return _launches(given.count, random.Random(given.seed))
    finally:
        signal.signal(signal.SIGINT, before)


def _launches(count: int, choice: random.Random) -> int:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: this process adopts orphans, and counts them
    here = os.getcwd()
    os.chdir(tempfile.mkdtemp(prefix="launch-faults-"))
    handler = signal.getsignal(signal.SIGINT)
    silent = open(os.devnull, "w")  # noqa: SIM115 (as long as this process)
    with contextlib.redirect_stdout(silent):
        launch(work, "none", 0, 0, nproc=2)
    while len(psutil.Process().children(recursive=True)) > 1:  # until only the server is left
        time.sleep(0.05)
    before, memory = left_behind(), psutil.Process().memory_info().rss
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest: dict[str, float] = {}
    wrong: list[str] = []
    for number in range(count):
        fault, at = choice.choice(INSIDE + OUTSIDE), choice.randrange(STEPS)
        victim, delay = choice.randrange(2), choice.uniform(0, 0.25)
        label = f"{number}: {fault}, rank {victim}, step {at}, after {delay:.3f} s"
        killed: list[int] = []
        thread = threading.Thread(target=_from_outside, args=(fault, delay, choice, killed))
        error: BaseException | None = None
        start, shown = time.monotonic(), sys.stdout
        sys.stdout = silent
        try:
            if fault in OUTSIDE:
                thread.start()  # inside try, since its interrupt may come at once
            # on a busy machine a worker's first sign of life may take seconds
            launch(work, fault, victim, at, nproc=2, timeout=3.0 if fault == "hang" else 600.0)
        except BaseException as raised:
            error = raised
        finally:
            sys.stdout = shown
        took = time.monotonic() - start
        if thread.ident is not None:
            thread.join()
        outcomes[fault, type(error).__name__] += 1
        slowest[fault] = max(slowest.get(fault, 0.0), took)
        # torch or Python reports the death of a loader process or resource tracker in its own words
        of_a_rank = any(depth > 3 for depth in killed) and isinstance(error, RuntimeError | OSError)
        if isinstance(error, KeyboardInterrupt) and fault not in ("interrupt", "two interrupts"):
            raise error  # from the person who started this tool
        if not isinstance(error, EXPECTED[fault]) and not of_a_rank:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
        del error
        gc.collect()
        if signal.getsignal(signal.SIGINT) is not handler:
            wrong.append(f"{label}: another SIGINT handler")
        deadline = time.monotonic() + 60.0  # an ended process disappears with a delay
        while any((now := left_behind())[kind] > before[kind] for kind in before) and time.monotonic() < deadline:
            time.sleep(0.05)
        if any(now[kind] > before[kind] for kind in before):
            wrong.append(f"{label}: left behind: {now} (before: {before})")
            before = now
    for (fault, name), times in sorted(outcomes.items()):
        print(f"{times:4}  {fault:18} -> {name:18} slowest {slowest[fault]:.2f} s")
    grown = (psutil.Process().memory_info().rss - memory) / 2**20
    print(f"{count} launches; this process grew by {grown:.1f} MB; now {left_behind()}; wrong: {len(wrong)}")
    print("\n".join(wrong))
    os.chdir(here)
    silent.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
