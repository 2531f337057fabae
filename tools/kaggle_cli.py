"""The kaggle CLI (`pip install kaggle six`) as a subprocess, and what its text means.

It exits with 0 where Kaggle refused a push, dropped an input or ended a kernel with ERROR: what happened is in its
text, which is read here. Every error carries Kaggle's own words. Credentials are the CLI's business: nothing here reads
them, nor the environment, and what looks like one is struck out of every text that is passed on.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SECRETS = re.compile(
    r"KGAT_\w+|\bhf_\w{8,}|\bgh[pousr]_\w{8,}|\bsk-[\w-]{16,}|\bAKIA\w{16}|\beyJ[\w-]+\.[\w-]+\.[\w-]+"
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|\b[0-9a-f]{32}\b"
)
"""Tokens of Kaggle, Hugging Face, GitHub, OpenAI and AWS, JWTs, Authorization headers, user:password in a URL, and 32
hex digits, which is what a Kaggle API key is."""
NO_CREDENTIALS = "no Kaggle credentials. Run `kaggle auth login`, or put a token into ~/.kaggle"
HOPELESS = re.compile(r"no Kaggle credentials|CLI is not installed|must be specified in the form")
"""Errors that asking again does not mend."""
ABSENT = re.compile(r"Cannot access kernel|\b404\b|not found", re.IGNORECASE)
"""Of a kernel that does not exist, or is not this user's: Kaggle does not tell them apart."""
ACTIVE = ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")


class KaggleError(Exception):
    """The CLI failed, or Kaggle would not; the message has its own words."""


class RefusedError(KaggleError):
    """Kaggle did not take a push (sessions, quota, slug): nothing was started."""


class SourcesError(KaggleError):
    """Kaggle took a push but not all of its inputs: the kernel runs without them."""

    def __init__(self, text: str, pushed: Pushed) -> None:
        super().__init__(text)
        self.pushed = pushed


@dataclass(frozen=True)
class Pushed:
    """A version of a kernel that Kaggle took."""

    version: int | None
    url: str


@dataclass(frozen=True)
class Status:
    """Of a kernel's newest session: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED or CANCEL_ACKNOWLEDGED."""

    state: str
    message: str = ""
    """Kaggle's failure message."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def secret_in(text: str) -> str | None:
    """The beginning of something in the text that looks like a token or key, or None."""
    found = _SECRETS.search(text)
    return None if found is None else f"{found[0][:4]}…"


def redacted(text: str) -> str:
    """The text with whatever looks like a token or key struck out."""
    return _SECRETS.sub("[secret]", text)


def _command(*arguments: str | Path) -> list[str]:
    # -W: no word about newer versions of the CLI among the answers
    rest = ["-W", *map(str, arguments)]
    if importlib.util.find_spec("kaggle"):
        return [sys.executable, "-m", "kaggle", *rest]
    if program := shutil.which("kaggle"):
        return [program, *rest]
    raise KaggleError("the kaggle CLI is not installed: pip install kaggle six")


def call(*arguments: str | Path, timeout: float | None = None) -> str:
    """Run `kaggle ARGUMENTS` and return what it wrote.

    Raises:
        KaggleError: it failed; the message has what it said.
    """
    what = f"kaggle {' '.join(map(str, arguments[:2]))}"
    try:
        done = subprocess.run(
            _command(*arguments), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise KaggleError(f"{what}: no answer within {timeout:g} s") from None
    if done.returncode != 0:
        said = redacted((done.stderr.strip() + "\n" + done.stdout.strip()).strip())
        if "Authentication required" in said:  # and a page on how to sign up
            raise KaggleError(f"{what}: {NO_CREDENTIALS}")
        raise KaggleError(f"{what}: {_ending(said) or f'it failed without a word (exit code {done.returncode})'}")
    return done.stdout


def _ending(text: str) -> str:
    """What an error says: of a traceback its last line, of a page of help its first lines."""
    if "Traceback (most recent call last)" in text:
        return text.splitlines()[-1]
    return text if len(text) < 3000 else text[:3000] + " …"


def push(folder: Path) -> Pushed:
    """`kaggle kernels push`: save what is in the folder as the kernel's next version, and start it.

    Raises:
        RefusedError: Kaggle did not take it; nothing runs.
        SourcesError: it took it, and starts it without some of its inputs.
        KaggleError: anything else, after which it is not known whether it runs.
    """
    said = call("kernels", "push", "-p", folder, timeout=600)
    if refusal := re.search(r"Kernel push error: (.*)", said, re.DOTALL):
        raise RefusedError(f"Kaggle refused the push: {redacted(refusal[1].strip())}")
    found = re.search(r"Kernel version (?:(\d+) )?successfully pushed\.\s+Please check progress at (\S+)", said)
    if found is None:
        raise KaggleError(f"kaggle kernels push: expected '… successfully pushed', got: {redacted(said.strip())}")
    pushed = Pushed(int(found[1]) if found[1] else None, found[2])
    lines = [line for line in said.splitlines() if "are not valid" in line and "not valid tags" not in line]
    if lines:
        raise SourcesError(
            f"Kaggle took the push without all of its inputs: {' '.join(lines)}\nVersion {pushed.version} runs without "
            f"them: stop it at {pushed.url}, mend the sources, and push again.",
            pushed,
        )
    return pushed


def status(kernel: str) -> Status:
    """`kaggle kernels status`, of the newest session."""
    said = call("kernels", "status", kernel, timeout=300)
    found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', said)
    if found is None:
        raise KaggleError(f"kaggle kernels status: expected 'has status …', got: {redacted(said.strip())}")
    message = re.search(r'Failure message: "(.*)"', said, re.DOTALL)
    return Status(found[1].upper(), redacted(message[1]) if message else "")


def status_if_any(kernel: str) -> Status | None:
    """`status`; None for a kernel that does not exist (or is not this user's: Kaggle does not tell them apart)."""
    try:
        return status(kernel)
    except KaggleError as error:
        if ABSENT.search(str(error)):
            return None
        raise


def output(kernel: str, folder: Path, pattern: str | None = None) -> list[Path]:
    """`kaggle kernels output`: the newest version's files whose path matches the pattern, and its log, as lines.

    The log comes as `log.txt`, whatever the pattern is. Files that are there already are written anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = ["--file-pattern", pattern] if pattern else []
    call("kernels", "output", kernel, "-p", folder, "--force", "--quiet", "--page-size", "100", *chosen)
    raw = folder / f"{kernel.split('/')[1]}.log"
    if raw.is_file():
        (folder / "log.txt").write_text(flattened(raw.read_text(encoding="utf-8")), encoding="utf-8")
        raw.unlink()
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flattened(log: str) -> str:
    """Kaggle's log, which is JSON with the time and stream of each piece, as the text that was written."""
    try:
        pieces = json.loads(log)
        return "".join(piece["data"] for piece in pieces)
    except (ValueError, KeyError, TypeError):  # plain already, or cut off with its session
        found = re.findall(r'"data": ?("(?:[^"\\]|\\.)*")', log)
        return "".join(json.loads(piece) for piece in found) if found else log


def follow(kernel: str, say: Callable[[str], object]) -> None:
    """`kaggle kernels logs --follow`: each line as it is written, to the session's end."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            _command("kernels", "logs", kernel, "--follow"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            anonymous = False
            try:
                for line in process.stdout:
                    anonymous = anonymous or line.startswith("Authentication required")  # a page on how to sign up
                    if not anonymous:
                        say(redacted(line.rstrip("\n")))
            except BaseException:
                process.terminate()
                raise
        errors.seek(0)
        said = redacted(errors.read().strip())
    if process.returncode != 0:
        anonymous = anonymous or "Authentication required" in said
        why = NO_CREDENTIALS if anonymous else _ending(said) or f"exit code {process.returncode}"
        raise KaggleError(f"kaggle kernels logs: {why}")


def pull(kernel: str, folder: Path) -> str:
    """`kaggle kernels pull`: the source of the kernel's newest version."""
    path = folder / "pulled.ipynb"
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    path.touch()  # given a file the CLI writes there, given a folder under a name of its own
    call("kernels", "pull", kernel, "-p", path, timeout=300)
    return path.read_text(encoding="utf-8")


def dataset_status(dataset: str) -> str | None:
    """`kaggle datasets status`: "ready", something else while Kaggle is at it, None where there is none."""
    try:
        return call("datasets", "status", dataset, timeout=300).strip().lower()
    except KaggleError as error:
        if re.search(r"\b40[34]\b|not found|denied", str(error), re.IGNORECASE):
            return None
        raise


def upload(dataset: str, title: str, folder: Path, note: str) -> None:
    """Make the folder's content the newest version of a private dataset, which is made where there is none."""
    exists = dataset_status(dataset) is not None
    about = {"id": dataset, "title": title, "licenses": [{"name": "other"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(about, indent=1))
    given: list[str | Path] = ["-p", folder, "--quiet", "--dir-mode", "zip"]
    said = call("datasets", "version", *given, "-m", note) if exists else call("datasets", "create", *given)
    if "is being created" not in said:
        raise KaggleError(f"kaggle datasets {'version' if exists else 'create'}: {redacted(said.strip())}")
