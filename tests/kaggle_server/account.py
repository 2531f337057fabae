"""What Kaggle holds for one user, and what it accepts: kernels with their versions and sessions, datasets, uploads."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaggle_server.session import Session

MAX_SESSIONS = 2
MAX_TEXT = 1_000_000


class RequestError(Exception):
    """Answered with an HTTP error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Version:
    """A version of a kernel: what was pushed, and its session."""

    number: int
    request: dict[str, Any]
    session: Session


@dataclass
class Dataset:
    title: str
    private: bool
    versions: list[Path] = field(default_factory=list)


class Account:
    """The user `ann`, and Kaggle as she sees it. Attributes are settings that a test may change at any time."""

    def __init__(self, root: Path, user: str = "ann", key: str = "0123456789abcdef" * 2) -> None:
        self.root, self.user, self.key = root, user, key
        self.limit = 1200.0
        """Seconds a session may take before it is killed."""
        self.kill_in_save: set[int] = set()
        """Versions whose session is killed in the middle of a save."""
        self.slow_save: dict[int, float] = {}
        """Versions whose session takes so many seconds for its third checkpoint, by its own clock."""
        self.quota_refusal = ""
        """Kaggle's words where the week's quota is used up."""
        self.quota_hours: list[float] = []
        """What `kaggle quota` says is left, once each; the last is repeated, and 30 is said where there is none."""
        self.mounts_itself = "newest"
        """Which version's output a kernel gets of itself: newest, newest complete, or nothing."""
        self.session_variables: dict[str, str] = {}
        self.python = sys.executable
        self.kernels: dict[str, list[Version]] = {}
        self.datasets: dict[str, Dataset] = {}
        self.competitions: dict[str, Path] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self._lock = threading.RLock()
        self._tokens = itertools.count(1)

    def add_dataset(self, ref: str, folder: Path) -> None:
        self.datasets[ref] = Dataset(ref, private=False, versions=[folder])

    def running(self) -> list[Version]:
        return [v for versions in self.kernels.values() for v in versions if v.session.state == "RUNNING"]

    def version(self, ref: str) -> Version:
        """The newest; an HTTP error as Kaggle's where there is none."""
        owner, slug, *number = ref.split("/")
        versions = self.kernels.get(f"{owner}/{slug}")
        if owner != self.user or not versions:
            raise RequestError(403, "Permission 'kernels.get' was denied")
        return versions[int(number[0]) - 1] if number else versions[-1]

    # Kernels
    def save_kernel(self, request: dict[str, Any]) -> dict[str, Any]:
        """Check a push as Kaggle does, save it as a version and run it."""
        with self._lock:
            if len(request.get("text") or "") > MAX_TEXT:
                raise RequestError(400, "Bad Request")
            owner, _, slug = str(request.get("slug")).partition("/")
            ref = f"{owner}/{slug}"
            if owner != self.user:
                return {"error": "Notebook not found"}
            if ref not in self.kernels:  # a new one is called what its title makes, whatever was asked for
                slug = re.sub(r"[^a-z0-9]+", "-", str(request.get("newTitle")).lower()).strip("-")
                ref = f"{owner}/{slug}"
            if len(slug) < 5 or len(slug) > 50:
                return {"error": "The title must resolve to a slug of 5 to 50 characters."}
            if self.quota_refusal and request.get("enableGpu"):
                return {"error": self.quota_refusal}
            if len(self.running()) >= MAX_SESSIONS:
                return {"error": f"Maximum batch GPU session count of {MAX_SESSIONS} reached."}
            inputs, invalid = self._inputs(request, ref)
            versions = self.kernels.setdefault(ref, [])
            number = len(versions) + 1
            session = Session(
                self.root / "sessions" / f"{slug}-v{number}",
                request["text"],
                inputs,
                limit=min(self.limit, request.get("sessionTimeoutSeconds") or self.limit),
                kill_in_save=number in self.kill_in_save,
                slow_save=self.slow_save.get(number, 0.0),
                variables=self.session_variables,
                python=self.python,
            )
            versions.append(Version(number, request, session))
            return {"ref": ref, "url": f"https://www.kaggle.com/code/{ref}", "versionNumber": number, **invalid}

    def _inputs(self, request: dict[str, Any], ref: str) -> tuple[dict[str, Path], dict[str, list[str]]]:
        """What is mounted, by path under /kaggle/input, and what was asked for and is not there."""
        inputs: dict[str, Path] = {}
        invalid: dict[str, list[str]] = {}
        for source in request.get("datasetDataSources") or []:
            name, *number = re.split(r"(?<=\w)/(?=\d+$)", source)
            if name not in self.datasets:
                invalid.setdefault("invalidDatasetSources", []).append(source)
                continue
            inputs[f"datasets/{name}"] = self.datasets[name].versions[int(number[0]) - 1 if number else -1]
        for source in request.get("competitionDataSources") or []:
            if source not in self.competitions:
                invalid.setdefault("invalidCompetitionSources", []).append(source)
                continue
            inputs[f"competitions/{source}"] = self.competitions[source]
        for source in request.get("kernelDataSources") or []:
            name = "/".join(source.split("/")[:2])
            if not self.kernels.get(name):
                invalid.setdefault("invalidKernelSources", []).append(source)
                continue
            ended = [v for v in self.kernels[name] if v.session.state != "RUNNING"]
            if name == ref and self.mounts_itself != "newest":
                ended = [v for v in ended if v.session.state == "COMPLETE" and self.mounts_itself != "nothing"]
            if source != name:
                ended = [v for v in ended if v.number == int(source.split("/")[2])]
            if ended:
                inputs[f"notebooks/{name}"] = ended[-1].session.working
        return inputs, invalid

    # Datasets
    def start_upload(self, name: str) -> str:
        token = f"token-{next(self._tokens)}"
        self.uploads[token] = (name, b"")
        return token

    def finish_upload(self, token: str, content: bytes) -> None:
        if token not in self.uploads:
            raise RequestError(404, "no such upload")
        self.uploads[token] = (self.uploads[token][0], content)

    def save_dataset(self, ref: str, title: str, files: list[dict[str, Any]], *, new: bool) -> dict[str, Any]:
        """Make a dataset, or a version of one: archives are unpacked into folders of their name."""
        with self._lock:
            if ref.split("/")[0] != self.user or (not new and ref not in self.datasets):
                raise RequestError(403, "Permission 'datasets.update' was denied")
            if new and (ref in self.datasets or not 6 <= len(ref.split("/")[1]) <= 50 or not 6 <= len(title) <= 50):
                return {"status": "error", "error": "The requested title or slug is not available."}
            dataset = self.datasets.setdefault(ref, Dataset(title, private=True))
            folder = self.root / "datasets" / ref.replace("/", "-") / f"v{len(dataset.versions) + 1}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file in files:
                name, content = self.uploads.pop(file["token"])
                if name.endswith(".zip"):
                    with zipfile.ZipFile(io.BytesIO(content)) as archive:
                        archive.extractall(folder / name.removesuffix(".zip"))
                else:
                    (folder / name).write_bytes(content)
            dataset.versions.append(folder)
            return {"status": "ok", "ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}"}
