"""Train over several Kaggle sessions: push, wait, and push again with the last output attached.

    python tools/kernels.py relay text_generation -p epochs=200 --prepare

build/kernels/SLUG/relay.json has the state, written before and after every push, so the relay can be stopped and
started again at any time. A session has made progress if its newest checkpoints are of later steps, or if it predicted
more after training, even if Kaggle killed it at the time limit. The relay waits while the week's quota cannot pay for a
session; it keeps the image that the kernel began with. It stops, with the reason, when a session made
no progress, was cancelled or failed by itself, when Kaggle refuses a push, and when the kernel runs a foreign session.
The same command continues it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kaggle_cli
from kaggle_cli import KaggleError
from kernel import SMALL, Kernel, KernelError, checkpoints, log_end, preparing, read_json, wait_for, write_json
from notebooks import NotebookError

FAILED_ITSELF = re.compile(r"PapermillExecutionError|CellExecutionError|DeadKernelError", re.IGNORECASE)
"""Errors that papermill writes after a failed cell. A session killed by Kaggle writes none."""


class StopError(KernelError):
    """The relay stops and needs a person; the message says why."""


@dataclass
class Session:
    """A session of the relay."""

    number: int
    version: int | None = None
    """Kaggle's version; None if unknown: before the push, and if Kaggle's answer to the push did not arrive."""
    url: str = ""
    state: str = "PUSHING"
    step: int = -1
    """Outcome.step at the end."""
    predicted: int = 0
    """Outcome.predicted at the end."""
    finished: bool = False
    folder: str = ""
    """The folder of the output, under runs/."""

    @property
    def progress(self) -> tuple[int, int]:
        """The last step, then the number of predictions, for comparisons."""
        return self.step, self.predicted


@dataclass
class State:
    """The content of relay.json."""

    name: str
    """Distinguishes the relays of a kernel."""
    notebook: str
    parameters: dict[str, Any]
    sources: dict[str, list[str]]
    carry: str
    sessions: list[Session] = field(default_factory=list)
    stopped: str = ""
    """The reason why the relay stopped."""
    limit: float | None = None
    """Seconds after which Kaggle ends a session."""
    prepare: bool = False
    """Whether a CPU session prepares the data first."""
    prepared: str = ""
    """The kernel and version whose output has the prepared data."""

    @classmethod
    def read(cls, path: Path) -> State | None:
        """Read the state; return None if there is no file.

        Raises:
            KernelError: the file is not a relay's state; starting over could lose work.
        """
        if not path.exists():
            return None
        content = read_json(path)
        try:
            content["sessions"] = [Session(**session) for session in content["sessions"]]
            return cls(**content)
        except (KeyError, TypeError):
            raise KernelError(
                f"{path} cannot be read as a relay's state: mend it, or begin another with --anew"
            ) from None

    @property
    def best(self) -> Session | None:
        """The session with the most progress; the newest of equals."""
        return max(self.sessions, key=lambda s: (*s.progress, s.number), default=None)


def run(
    kernel: Kernel,
    *,
    carry: str | None,
    interval: float,
    anew: bool = False,
    prepare: bool = False,
    say: Callable[[str], object] = print,
) -> int:
    """Relay until the training is finished; return the exit code.

    Raises:
        KernelError: another relay of this kernel runs, or an earlier one had other parameters.
    """
    if prepare:
        preparing(kernel.load(), kernel.source.name)  # fails now, before the relay takes note of it
    kernel.folder.mkdir(parents=True, exist_ok=True)
    with _alone(kernel):
        relay = _Relay(kernel, carry, interval, anew, say)
        relay.state.prepare |= prepare
        try:
            relay.go()
        except (KernelError, NotebookError, KaggleError) as error:
            relay.state.stopped = kaggle_cli.redacted(str(error))
            relay.save()
            raise StopError(
                f"the relay of {kernel.id} stopped: {relay.state.stopped}\nThe same command goes on with it."
            ) from None
        return 0


@contextlib.contextmanager
def _alone(kernel: Kernel) -> Iterator[None]:
    with open(kernel.folder / "relay.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KernelError(f"another relay of {kernel.id} is at work on this machine") from None
        yield


class _Relay:
    def __init__(
        self, kernel: Kernel, carry: str | None, interval: float, anew: bool, say: Callable[[str], object]
    ) -> None:
        self.kernel, self.interval, self.say = kernel, interval, say
        self.path = kernel.folder / "relay.json"
        state = None if anew else State.read(self.path)
        if state is None:
            name = secrets.token_hex(4)
            state = State(name, kernel.notebook, kernel.parameters, kernel.sources, carry or "kernel")
        elif kernel.parameters or kernel.sources:
            given = json.loads(json.dumps([kernel.parameters, kernel.sources]))
            if given != [state.parameters, state.sources]:
                raise KernelError(
                    f"{self.path} is a relay with {state.parameters} {state.sources}. Give the same (or nothing) to "
                    f"go on with it; --anew, or another --title, to begin another."
                )
        state.carry, state.limit = carry or state.carry, kernel.limit or state.limit
        kernel.notebook, kernel.parameters, kernel.sources = state.notebook, state.parameters, state.sources
        kernel.limit, kernel.pinned = state.limit, True
        if state.stopped:
            say(f"it had stopped: {state.stopped}\ngoing on")
            state.stopped = ""
        self.state = state

    def save(self) -> None:
        write_json(self.path, dataclasses.asdict(self.state))

    def go(self) -> None:
        """Run sessions until one has finished, from the saved state on."""
        sessions = self.state.sessions
        while True:
            if sessions and sessions[-1].state in ("PUSHING", "PUSHED"):
                if sessions[-1].state == "PUSHING" and not self.arrived(sessions[-1]):
                    sessions.pop()
                    continue
                self.end(sessions[-1])
                self.judge(sessions[-1])
            if sessions and sessions[-1].finished:
                return self.finish(sessions[-1])
            self.push()

    # One session
    def marker(self, number: int) -> str:
        """Return the comment above the pushed parameters, which identifies a session of this relay."""
        return f"Parameters, session {number} of relay {self.state.name}"

    def push(self) -> None:
        """Start the next session with the checkpoints of the best session as an input."""
        self.check_idle()
        if self.state.prepare and not self.state.prepared:
            self.prepare()
        self.await_quota()
        best, number = self.state.best, len(self.state.sessions) + 1
        self.kernel.sources = {name: list(listed) for name, listed in self.state.sources.items()}
        if self.state.prepared:
            others = self.kernel.sources.get("kernel_sources", [])
            self.kernel.sources["kernel_sources"] = [*others, self.state.prepared]
        if best is not None and best.step > 0:
            name, source = self.attach(best)
            self.kernel.sources[name] = [*self.kernel.sources.get(name, []), source]
        self.check_idle()  # again: to prepare, to wait for quota and to upload may have taken days
        session = Session(number)
        self.state.sessions.append(session)
        self.save()  # before the push: if this process ends meanwhile, the next start finds out
        try:
            pushed = self.kernel.push(self.marker(number), again=True)
        except kaggle_cli.SourcesError as error:  # a useless session runs now, and must end first
            session.version, session.url, session.state = error.pushed.version, error.pushed.url, "PUSHED"
            raise StopError(f"{error}\nIf it is the kernel's own output that is refused: --carry dataset") from None
        except (KernelError, NotebookError, kaggle_cli.RefusedError):
            self.state.sessions.pop()  # after other errors the push may have arrived
            raise
        session.version, session.url, session.state = pushed.version, pushed.url, "PUSHED"
        self.save()
        self.say(f"session {number}: version {pushed.version}, {pushed.url}")

    def check_idle(self) -> None:
        """Raise StopError if the kernel runs a session, since two sessions cost quota twice."""
        now = kaggle_cli.status_if_any(self.kernel.id)
        if now is not None and now.active:
            raise StopError(f"{self.kernel.id} is {now.state}, with a session that is not this relay's: wait for it")

    def prepare(self) -> None:
        """Run what comes before training on a session without GPUs, which costs no quota.

        Raises:
            StopError: the session failed.
        """
        kernel = dataclasses.replace(self.kernel, title=f"{self.kernel.title[:42]} Prepare", prepares=True, limit=None)
        now = kaggle_cli.status_if_any(kernel.id)
        if now is None or not now.active:  # else this relay was killed as it waited
            self.say(f"preparing on a CPU: {kernel.push(again=True).url}")
        name = kernel.named(kernel.version)
        status = wait_for(name, self.interval, self.say, just_pushed=name == kernel.id)
        if status.state != "COMPLETE":
            raise StopError(f"{kernel.id} ended with {status.state}: python tools/kernels.py logs {kernel.id}")
        self.state.prepared = name
        self.save()

    def await_quota(self) -> None:
        """Wait until the week's quota can pay for a session."""
        told = ""
        while short := self.kernel.short_of_quota():
            if short != told:
                self.say(f"{short}. Waiting")
            told = short
            time.sleep(self.interval)

    def attach(self, best: Session) -> tuple[str, str]:
        """Return the kind and name of the input with the checkpoints of `best`."""
        newest = self.state.sessions[-1]
        if self.state.carry == "kernel":
            # an older version is named in any case, as far as Kaggle heeds it
            if best is newest:
                return "kernel_sources", self.kernel.named(best.version)
            if best.version:
                return "kernel_sources", f"{self.kernel.id}/{best.version}"
        dataset = f"{self.kernel.user}/{self.kernel.slug[:44].rstrip('-')}-state"
        folder = self.kernel.root / best.folder
        kept = [path for run in checkpoints(folder).values() for path in run.values()]
        if not any(len([*path.iterdir()]) > 1 for path in kept):  # else one file tells that the checkpoint is whole
            if best is not newest and self.kernel.named(best.version) == self.kernel.id:
                raise StopError(
                    f"session {best.number} got furthest, but its checkpoints were not fetched, and the CLI gives only "
                    f"the newest version's output. Fetch them in the browser ({best.url}) into {folder}"
                )
            self.fetch(best)
        self.upload(dataset, folder, best)
        return "dataset_sources", dataset

    def fetch(self, session: Session) -> None:
        """Fetch the files that a later session needs: the two newest checkpoints of each run, and the best weights."""
        folder = self.kernel.root / session.folder
        runs = checkpoints(folder).values()
        newest = [kept[step] for kept in runs for step in sorted(kept)[-2:]]
        wanted = [re.escape(f"{path.relative_to(folder).as_posix()}/") for path in newest]
        pattern = "|".join([*wanted, r"(^|/)(best|predictions)/", r"(^|/)(metrics\.jsonl|config\.json)$"])
        self.say(f"fetching the checkpoints of session {session.number}")
        kaggle_cli.output(self.kernel.named(session.version), folder, pattern)
        for path in (path for kept in runs for path in kept.values() if path not in newest):
            shutil.rmtree(path)  # of which only the small file was fetched

    def upload(self, dataset: str, folder: Path, session: Session) -> None:
        """Upload the fetched files as the newest version of a private dataset, and wait until Kaggle is ready."""
        carried = self.kernel.folder / "carry"
        shutil.rmtree(carried, ignore_errors=True)
        wanted = ("checkpoints/", "checkpoint-", "best/", "predictions/", "metrics.jsonl", "config.json", "result.json")
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and any(part in f"/{name}" for part in (f"/{each}" for each in wanted)):
                (carried / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, carried / name)
        self.say(f"uploading step {session.step} to {dataset}")
        note = f"step {session.step}, session {session.number} of relay {self.state.name}"
        kaggle_cli.upload(dataset, dataset.split("/")[1].replace("-", " "), carried, note)
        for _ in range(120):
            if (status := kaggle_cli.dataset_status(dataset)) == "ready":
                return
            time.sleep(min(self.interval, 30))
        raise StopError(f"{dataset} is {status}, and does not get ready")

    def arrived(self, session: Session) -> bool:
        """Find out from Kaggle's newest version whether a push without an answer has arrived."""
        if kaggle_cli.status_if_any(self.kernel.id) is None:
            return False
        source = kaggle_cli.pull(self.kernel.id, self.kernel.folder)
        if self.marker(session.number) not in source:
            return False
        record = read_json(self.kernel.record)
        if record.get("comment") == self.marker(session.number):  # this process ended before it noted the answer
            session.version, session.url = record.get("version"), record.get("url", "")
        session.state = "PUSHED"
        self.save()
        self.say(f"session {session.number} had been pushed")
        return True

    def end(self, session: Session) -> None:
        """Wait until the session has ended, and record its progress."""
        name = self.kernel.named(session.version)
        status = wait_for(name, self.interval, self.say, just_pushed=name == self.kernel.id)
        if not session.folder:
            folder = self.kernel.results(session.version)
            if session.version is None or folder.exists():  # another session's
                folder = folder.with_name(f"relay-{self.state.name}-{session.number}")
            session.folder = folder.relative_to(self.kernel.root).as_posix()
            self.save()
        folder = self.kernel.root / session.folder
        shutil.rmtree(folder, ignore_errors=True)  # of this session, fetched before this process was stopped
        for _ in range(5):
            if kaggle_cli.output(name, folder, SMALL):  # at least the log, once Kaggle has stored it
                break
            time.sleep(self.interval)
        outcome = self.kernel.outcome(folder)
        session.step, session.predicted, session.state = outcome.step, outcome.predicted, status.state
        session.finished = outcome.finished and status.state == "COMPLETE"
        self.save()
        message = f" ({status.message})" if status.message else ""
        self.say(f"session {session.number} ended: {status.state}{message}, step {session.step}\n{outcome.text}")

    def judge(self, session: Session) -> None:
        """Decide whether another session makes sense.

        Raises:
            StopError: it makes none.
        """
        if session.finished:
            return
        folder = self.kernel.root / session.folder
        before, predicted = max((other.progress for other in self.state.sessions[:-1]), default=(0, 0))
        ended = f"session {session.number} ended with {session.state}"
        if session.state.startswith("CANCEL"):
            raise StopError(f"{ended}: somebody cancelled it ({session.url})")
        log = (folder / "log.txt").read_text(encoding="utf-8") if (folder / "log.txt").is_file() else ""
        if session.state == "ERROR" and FAILED_ITSELF.search(log):
            raise StopError(f"{ended}, by an error of its own. The log ends:\n{log_end(folder)}")
        if session.progress <= (before, predicted):
            hint = ""
            if self.state.carry == "kernel" and before > 0 and "going on from" not in log:
                hint = (
                    " It did not go on from what was attached: Kaggle gave it another version's. Try --carry dataset."
                )
            raise StopError(
                f"{ended} at step {session.step}, and made no progress: it was {before} before.{hint} "
                f"The log ends:\n{log_end(folder)}"
            )

    def finish(self, session: Session) -> None:
        """Fetch all output of the last session."""
        folder = self.kernel.root / session.folder
        kaggle_cli.output(self.kernel.named(session.version), folder)
        many = f"{len(self.state.sessions)} sessions" if len(self.state.sessions) > 1 else "one session"
        self.say(f"finished: step {session.step}, after {many}. All of it is in {folder}")
