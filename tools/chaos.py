"""Kill a training run many times, and compare the outcome with an undisturbed run.

    python tools/chaos.py text_generation --kills 20 --flags "--strategy ddp --nproc 2 --save-every 20 --max-steps 2000"
    python tools/chaos.py tests/everything.py --kills 5 --output build/chaos --report build/chaos/report.md

RUN is a recipe, or a Python file that takes the same flags. The run trains first in OUTPUT/undisturbed, with every
checkpoint kept, and then in OUTPUT/killed-1, with SIGKILL and the same command again and again. Half of the kills come
at a random time. The other half are aimed at saves: they come when a temporary folder, a new checkpoint or a removal
appears in the checkpoint folder, or some milliseconds later. Most kills hit all processes at once, as the end of a
session does; some hit the first process, or a single worker or loader process.

After each kill the newest checkpoint must equal, byte for byte, the undisturbed run's of the same step. At the end,
weights, optimizer state, averages and records (without times) must be equal too. A run that ends before the last kill
is followed by another. The exit code is 0 if all are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

from kaggle_mgpu import checkpoint, progress
from kaggle_mgpu.progress.records import comparable

ROOT = Path(__file__).parents[1]


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences between two finished runs, apart from times and the number of sessions."""
    found = []
    for name in ("model.safetensors", "best/model.safetensors"):
        if (one / name).is_file() != (other / name).is_file():
            found.append(f"{name} is only in one of them")
        elif (one / name).is_file() and (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    ours, theirs = (comparable(progress.read(run)) for run in (one, other))
    if ours != theirs:
        first = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), "one ends sooner")
        found.append(f"{progress.METRICS}: {len(ours)} and {len(theirs)} records; first difference: {first}")
    newest = [checkpoint.all_in(run / "checkpoints")[:1] for run in (one, other)]
    if not all(newest):
        return [*found, "no checkpoint"]
    return found + checkpoint_differences(newest[0][0], newest[1][0])


def checkpoint_differences(one: Path, other: Path) -> list[str]:
    """Return the differences between two checkpoints of a step."""
    found = [f"{path}: {problem}" for path in (one, other) if (problem := checkpoint.damage(path))]
    if found:
        return found
    if one.name != other.name:
        return [f"{one.name} and {other.name}"]
    first, second = checkpoint.read_facts(one), checkpoint.read_facts(other)
    for facts in (first, second):
        facts["state"].pop("seconds")
        facts.pop("fingerprint", None)  # a task that is told to fail is another one
        facts["config"] = {
            name: value for name, value in facts["config"].items() if name not in ("output_dir", "keep_last")
        }
    found += [f"{one.name}: {name}" for name in {**first, **second} if first.get(name) != second.get(name)]
    for name in {**first["files"], **second["files"]}:
        if not (one / name).is_file() or (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{one.name}/{name}")
    return found


@dataclass
class Run:
    """A training run to start and kill."""

    target: str
    flags: list[str]
    folder: Path
    log: Path
    process: psutil.Popen | None = field(default=None, init=False)

    def start(self, *more: str) -> None:
        """Start the run with its flags, and with `more` flags."""
        script = [self.target] if self.target.endswith(".py") else ["-m", "kaggle_mgpu", "train", self.target]
        command = [sys.executable, *script, *self.flags, "--output-dir", str(self.folder), *more]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = psutil.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def kill(self, whom: str) -> str:
        """Send SIGKILL to everything, the first process, or one worker; return `whom`."""
        family = self.family()
        victims = family
        if whom == "the first process":
            victims = family[:1]
        elif whom == "one worker" and len(family) > 1:
            victims = [random.choice(family[1:])]
        for process in victims:
            send(process, signal.SIGSTOP)  # so that all end at the same instant
        for process in victims:
            send(process, signal.SIGKILL)
        if victims is not family:
            psutil.wait_procs(family, timeout=30)
        for process in family:  # a run that lost a worker may still be alive
            send(process, signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)
        return whom

    def family(self) -> list[psutil.Process]:
        """Return the run's processes, the first one first."""
        assert self.process is not None
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


class Watch:
    """Notice changes in a run's checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = self.names()

    def names(self) -> set[str]:
        try:
            return set(os.listdir(self.folder))
        except OSError:
            return set()

    def event(self) -> str | None:
        """Return "writing", "removing" or "renamed" if one of these has begun since the last call."""
        now = self.names()
        new, self.seen = now - self.seen, now
        kinds = {".writing-step": "writing", ".removing-step": "removing", "step-": "renamed"}
        return next((kind for name in new for start, kind in kinds.items() if name.startswith(start)), None)


@dataclass
class Kill:
    """A kill and the state of the checkpoint folder afterwards."""

    aim: str
    """random, writing, renamed or removing"""
    whom: str
    state: str
    """The operation that the kill interrupted."""
    step: int
    """The step of the newest checkpoint, -1 for none."""
    problems: list[str]


def one_kill(run: Run, reference: Path, aim: str, whom: str, after: float) -> Kill | None:
    """Start the run and kill it; return None if the run ended first."""
    checkpoints = run.folder / "checkpoints"
    before = {path.name for path in checkpoint.all_in(checkpoints)}
    records = run.folder / progress.METRICS
    began = records.stat().st_mtime_ns if records.exists() else 0
    watch = Watch(checkpoints)
    run.start()
    deadline = time.monotonic() + 300
    while run.running() and not (records.exists() and records.stat().st_mtime_ns != began):
        time.sleep(0.002)  # until it trains
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run does not train: see {run.log}")
    if aim == "random":
        until = time.monotonic() + after
        while run.running() and time.monotonic() < until:
            time.sleep(min(0.001, max(0.0, until - time.monotonic())))
    else:
        watch.seen = watch.names()
        while run.running() and watch.event() != aim:
            time.sleep(0.0003)
        time.sleep(random.choice([0, 0, 0.001, 0.003, 0.01]))
    if not run.running():
        return None
    whom = run.kill(whom)
    left = Watch(checkpoints).seen
    torn = [name for name in left if name.startswith(".writing-step")]
    removing = [name for name in left if name.startswith(".removing-step")]
    state = "in a save" if torn else "in a removal" if removing else "between saves"
    problems: list[str] = []
    path = checkpoint.Checkpoints(checkpoints).newest(warn=problems.append)
    valid = [p for p in checkpoint.all_in(checkpoints) if checkpoint.damage(p) is None]
    # a kill before the rotation leaves one checkpoint too many, which the next rotation removes
    kept = min(len(before), json.loads((run.folder / "config.json").read_text())["keep_last"])
    if len(valid) < kept:
        problems.append(f"{len(valid)} valid checkpoints, {len(before)} before")
    if path is not None:
        problems += checkpoint_differences(path, reference / "checkpoints" / path.name)
    return Kill(aim, whom, state, -1 if path is None else checkpoint.step_of(path), problems)


def chaos(
    target: str, flags: list[str], kills: int, output: Path, *, seed: int, span: float, say: Callable[[str], Any]
) -> tuple[list[Kill], list[list[str]], dict[str, float]]:
    """Run and kill; return the kills, the differences of each run that ended, and the seconds taken."""
    random.seed(seed)
    undisturbed = Run(target, flags, output / "undisturbed", output / "undisturbed.log")
    began = time.monotonic()
    undisturbed.start("--keep-last", "1000000")
    assert undisturbed.process is not None
    if undisturbed.process.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed: see {undisturbed.log}")
    seconds = json.loads((undisturbed.folder / "result.json").read_text())["seconds"]
    times = {"undisturbed": time.monotonic() - began, "of it training": seconds}
    say(f"undisturbed: {times['undisturbed']:.1f} s, {seconds:.1f} s of it training")
    done: list[Kill] = []
    ends: list[list[str]] = []
    run = Run(target, flags, output / "killed-1", output / "killed-1.log")
    while True:
        while len(done) < kills:
            aim = ["random", "writing", "random", "renamed", "random", "removing"][len(done) % 6]
            whom = random.choices(["everything", "the first process", "one worker"], [6, 1, 1])[0]
            kill = one_kill(run, undisturbed.folder, aim, whom, random.uniform(0, span))
            if kill is None:
                break
            done.append(kill)
            say(
                f"kill {len(done)}: {kill.aim}, {kill.whom}; {kill.state}; newest checkpoint of step {kill.step} "
                + ("identical" if not kill.problems else f"DIFFERS: {kill.problems}")
            )
        else:
            run.start()
        assert run.process is not None
        code = run.process.wait()
        ends.append([f"exit code {code}: see {run.log}"] if code else differences(undisturbed.folder, run.folder))
        say(f"{run.folder.name} ended: " + ("identical" if not ends[-1] else f"DIFFERS: {ends[-1]}"))
        if len(done) >= kills or ends[-1]:
            times["all"] = time.monotonic() - began
            return done, ends, times
        run = Run(target, flags, output / f"killed-{len(ends) + 1}", output / f"killed-{len(ends) + 1}.log")


def report(target: str, flags: list[str], kills: list[Kill], ends: list[list[str]], times: dict[str, float]) -> str:
    """Return the report as Markdown."""
    good = sum(not kill.problems for kill in kills)
    lines = [
        f"# {len(kills)} kills: {good} of {len(kills)} identical",
        "",
        f"`{target} {shlex.join(flags)}`",
        "",
        f"- runs that ended: {len(ends)}; identical to the undisturbed one, byte for byte: {sum(not e for e in ends)}",
        f"- undisturbed: {times['undisturbed']:.0f} s, {times['of it training']:.0f} s of it training; "
        f"all of this: {times['all']:.0f} s",
        "",
        "| aimed at | whom | left the folder | kills | identical |",
        "|---|---|---|---|---|",
    ]
    groups = Counter((kill.aim, kill.whom, kill.state) for kill in kills)
    for (aim, whom, state), count in sorted(groups.items()):
        same = sum((k.aim, k.whom, k.state) == (aim, whom, state) and not k.problems for k in kills)
        lines.append(f"| {aim} | {whom} | {state} | {count} | {same} |")
    lines += [""] + [f"- kill {i}: {problem}" for i, k in enumerate(kills, 1) for problem in k.problems]
    lines += [f"- end of run {i}: {problem}" for i, end in enumerate(ends, 1) for problem in end]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="a recipe, or a Python file that takes a recipe's flags")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--flags", default="", help="the run's own flags, in one string")
    parser.add_argument("--output", type=Path, default=Path("build/chaos"), help="emptied first")
    parser.add_argument("--span", type=float, default=3.0, help="random kills come 0 to so many seconds into training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="also write the report here")
    given = parser.parse_args()
    output = given.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    flags = shlex.split(given.flags)
    target = str(Path(given.run).resolve()) if given.run.endswith(".py") else given.run
    kills, ends, times = chaos(
        target, flags, given.kills, output, seed=given.seed, span=given.span, say=lambda text: print(text, flush=True)
    )
    text = report(given.run, flags, kills, ends, times)
    print(text)
    if given.report:
        given.report.parent.mkdir(parents=True, exist_ok=True)
        given.report.write_text(text)
    return int(any(kill.problems for kill in kills) or any(ends))


if __name__ == "__main__":
    sys.exit(main())
