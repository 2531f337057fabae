"""Call the kaggle CLI (`pip install kaggle-mgpu[ship]`) as a subprocess, and read its answers.

The CLI exits with 0 even if Kaggle refused a push, dropped an input or ended a kernel with ERROR, so its text is read.
Errors carry Kaggle's own words. Only the CLI reads credentials; text that looks like a credential is removed from every
message.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TOKENS = (
    r"KGAT_\w{6,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_\w{8,}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}|\bxox[abeoprs]-[\w-]{10,}"
    r"|\bsk-[\w-]{16,}|\bAIza[\w-]{35}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]+\.[\w-]+\.[\w-]+"
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}|(?<=://)[^/\s:@{}]+:[^/\s@{}]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\bwandb_v1_\w{20,}|\b[0-9a-f]{40}\b[\"']?\s*\|\s*wandb login"
    r"|(?i:secret_access_key)[\"']?\]?\s*[:=,]?\s*[\"']?[A-Za-z0-9/+]{40}(?![\w/+])"
)
"""Tokens of Kaggle, Hugging Face, GitHub, GitLab, Slack, OpenAI, Google, wandb and AWS, JWTs, Authorization headers,
user:password in a URL, private keys."""
_NAMED = (
    r"(?i:(?:api_?key|[\W_](?:key|token|secret|secret_access_key|password|passwd)|^(?:key|token|secret|password))"
    r"[\"']?\]?(?:\s*:\s*[\w.\[\]| ]{1,40}=|\s*[:=,(]|[ \t])\s*[\"']?|wandb\.login\(\s*[\"']|wandb login[^\n]{1,80}?)"
    r"(?P<value>\b(?:[0-9a-f]{32}|[0-9a-f]{40})\b|(?<=[\"'])[A-Za-z0-9/+]{40}(?=[\"']))"
)
"""Keys of Kaggle (32 hex digits), wandb (40) and AWS (40 letters) after a name such as api_key; without it, hashes."""
_SECRETS = re.compile(f"{_TOKENS}|{_NAMED}", re.MULTILINE)
_IN_MESSAGES = re.compile(rf"{_TOKENS}|\bhf_\w{{8,}}|\b[0-9a-f]{{32}}\b|\b[0-9a-f]{{40}}\b")
NO_CREDENTIALS = "no Kaggle credentials. Run `kaggle auth login`, or put a token into ~/.kaggle"
HOPELESS = re.compile(r"no Kaggle credentials|CLI is not installed|must be specified in the form")
"""Errors that stay when the call is repeated."""
ABSENT = re.compile(r"Cannot access kernel|\b404\b|not found", re.IGNORECASE)
"""Errors for a kernel that does not exist or belongs to another user; Kaggle gives the same answer for both."""
ACTIVE = ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")


class KaggleError(Exception):
    """The CLI failed, or Kaggle refused; the message has the original words."""


class RefusedError(KaggleError):
    """Kaggle refused a push (sessions, quota, slug): nothing was started."""


class SourcesError(KaggleError):
    """Kaggle accepted a push without all of its inputs: the kernel runs without some data."""

    def __init__(self, text: str, pushed: Pushed) -> None:
        super().__init__(text)
        self.pushed = pushed


@dataclass(frozen=True)
class Pushed:
    """A version of a kernel that Kaggle accepted."""

    version: int | None
    url: str


@dataclass(frozen=True)
class Quota:
    """What is left of the week's GPU time."""

    seconds: float
    renewed: str
    """When the next week begins, as Kaggle writes it, or ""."""


@dataclass(frozen=True)
class Status:
    """The state of a kernel's newest session: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, ..._ACKNOWLEDGED."""

    state: str
    message: str = ""
    """Kaggle's failure message."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def secret_in(text: str) -> str | None:
    """Return the first characters of a token or key in the text, or None."""
    found = _SECRETS.search(text)
    return None if found is None else f"{(found['value'] or found[0])[:4]}…"


def redacted(text: str) -> str:
    """Replace tokens, and whatever has the form of a key, in a message by [secret]."""
    return _IN_MESSAGES.sub("[secret]", text)


def _command(*arguments: str | Path) -> list[str]:
    # -W: no message about newer versions of the CLI
    rest = ["-W", *map(str, arguments)]
    if importlib.util.find_spec("kaggle"):
        return [sys.executable, "-m", "kaggle", *rest]
    if program := shutil.which("kaggle"):
        return [program, *rest]
    raise KaggleError("the kaggle CLI is not installed: pip install kaggle-mgpu[ship]")


def call(*arguments: str | Path, timeout: float | None = None) -> str:
    """Run `kaggle ARGUMENTS` and return its output.

    Raises:
        KaggleError: the command failed; the message has the CLI's words.
    """
    command = f"kaggle {' '.join(map(str, arguments[:2]))}"
    try:
        done = subprocess.run(
            _command(*arguments), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise KaggleError(f"{command}: no answer within {timeout:g} s") from None
    if done.returncode != 0:
        said = redacted((done.stderr.strip() + "\n" + done.stdout.strip()).strip())
        if "Authentication required" in said:  # followed by a page on how to sign up
            raise KaggleError(f"{command}: {NO_CREDENTIALS}")
        raise KaggleError(f"{command}: {_shortened(said) or f'it failed without a word (exit code {done.returncode})'}")
    return done.stdout


def _shortened(text: str) -> str:
    """Return the last line of a traceback, or the first 3000 characters of another text."""
    if "Traceback (most recent call last)" in text:
        return text.splitlines()[-1]
    return text if len(text) < 3000 else text[:3000] + " …"


def quota() -> Quota | None:
    """Return the rest of the week's GPU quota (`kaggle quota`); None if the CLI (before 2.2) or Kaggle does not say."""
    try:
        said = call("quota", "--csv", timeout=300)
    except KaggleError as error:
        if HOPELESS.search(str(error)):
            raise
        return None
    rows = [dict(row) for row in csv.DictReader(said.splitlines())]
    gpu = next((row for row in rows if row.get("resource") == "GPU"), {})
    found = re.fullmatch(r"([\d.]+)h", str(gpu.get("remaining")))
    return None if found is None else Quota(3600 * float(found[1]), gpu.get("refreshAt") or "")


@cache
def versions_are_heeded() -> bool:
    """Return whether the CLI heeds owner/kernel/N: before 2.2.5 it answers for the newest version without a word."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", call("--version", timeout=300))
    return found is not None and tuple(map(int, found.groups())) >= (2, 2, 5)


def push(folder: Path, limit: float | None = None) -> Pushed:
    """Save a folder as the kernel's next version, and start a session (`kaggle kernels push`).

    Args:
        limit: seconds after which Kaggle ends the session: the only brake, since no API call cancels a session.

    Raises:
        RefusedError: Kaggle refused the push; nothing runs.
        SourcesError: Kaggle accepted the push, and starts the session without some inputs.
        KaggleError: any other failure; a session may or may not run.
    """
    brake = [] if limit is None else ["-t", str(math.ceil(limit))]
    said = call("kernels", "push", "-p", folder, *brake, timeout=600)
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
    """Return the status of the session of owner/kernel/N, or of the newest (`kaggle kernels status`)."""
    said = call("kernels", "status", kernel, timeout=300)
    found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', said)
    if found is None:
        raise KaggleError(f"kaggle kernels status: expected 'has status …', got: {redacted(said.strip())}")
    message = re.search(r'Failure message: "(.*)"', said, re.DOTALL)
    return Status(found[1].upper(), redacted(message[1]) if message else "")


def status_if_any(kernel: str) -> Status | None:
    """Return the status, or None for a kernel that does not exist or belongs to another user."""
    try:
        return status(kernel)
    except KaggleError as error:
        if ABSENT.search(str(error)):
            return None
        raise


def output(kernel: str, folder: Path, pattern: str | None = None) -> list[Path]:
    """Fetch the files of owner/kernel/N, or of the newest version, and its log as `log.txt` (`kaggle kernels output`).

    Existing files are overwritten.

    Args:
        pattern: fetch only the files whose path it matches.
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
    """Convert Kaggle's log, JSON with the time and stream of each piece, to plain text."""
    try:
        pieces = json.loads(log)
        return "".join(piece["data"] for piece in pieces)
    except (ValueError, KeyError, TypeError):  # plain text already, or cut off
        found = re.findall(r'"data": ?("(?:[^"\\]|\\.)*")', log)
        return "".join(json.loads(piece) for piece in found) if found else log


def follow(kernel: str, say: Callable[[str], object]) -> None:
    """Pass on each line of a session's log until the session ends (`kaggle kernels logs --follow`)."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            _command("kernels", "logs", kernel, "--follow"), stdout=subprocess.PIPE, stderr=errors, text=True,
            errors="replace",
        ) as process:  # fmt: skip
            assert process.stdout is not None
            anonymous = False
            try:
                for line in process.stdout:
                    anonymous = anonymous or line.startswith(
                        "Authentication required"
                    )  # a page on how to sign up follows
                    if not anonymous:
                        say(redacted(line.rstrip("\n")))
            except BaseException:
                process.terminate()
                raise
        errors.seek(0)
        said = redacted(errors.read().strip())
    if process.returncode != 0:
        anonymous = anonymous or "Authentication required" in said
        why = NO_CREDENTIALS if anonymous else _shortened(said) or f"exit code {process.returncode}"
        raise KaggleError(f"kaggle kernels logs: {why}")


def pull(kernel: str, folder: Path) -> str:
    """Return the source of the kernel's newest version (`kaggle kernels pull`)."""
    path = folder / "pulled.ipynb"
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    path.touch()  # the CLI writes to an existing file; in a folder it chooses a name
    call("kernels", "pull", kernel, "-p", path, timeout=300)
    return path.read_text(encoding="utf-8")


def dataset_status(dataset: str) -> str | None:
    """Return a dataset's status, "ready" at the end; None if there is no such dataset (`kaggle datasets status`)."""
    try:
        return call("datasets", "status", dataset, timeout=300).strip().lower()
    except KaggleError as error:
        if re.search(r"\b40[34]\b|not found|denied", str(error), re.IGNORECASE):
            return None
        raise


def upload(dataset: str, title: str, folder: Path, note: str) -> None:
    """Upload a folder as the newest version of a private dataset; create the dataset if necessary."""
    exists = dataset_status(dataset) is not None
    about = {"id": dataset, "title": title, "licenses": [{"name": "other"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(about, indent=1))
    given: list[str | Path] = ["-p", folder, "--quiet", "--dir-mode", "zip"]
    said = call("datasets", "version", *given, "-m", note) if exists else call("datasets", "create", *given)
    if "is being created" not in said:
        raise KaggleError(f"kaggle datasets {'version' if exists else 'create'}: {redacted(said.strip())}")
