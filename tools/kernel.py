"""A notebook as a Kaggle kernel: what is pushed, what is checked before, and what its output says.

    kernel = kernel_from(ROOT, "text_generation", user="somebody")
    kernel.parameters = {"epochs": 5}
    kernel.push()

The command line is kernels.py; relay.py and sweep.py push more than once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kaggle_cli
import notebooks
from kaggle_cli import KaggleError

PLACEHOLDER = "INSERT_KAGGLE_USERNAME"
MAX_BYTES = 700_000  # one of 2.8 MB is refused with HTTP 400
SOURCES = ("dataset_sources", "competition_sources", "kernel_sources", "model_sources")
NEEDS = (*SOURCES, "enable_internet", "docker_image", "machine_shape")
FORMS = {
    "dataset_sources": (r"[\w-]+/[\w-]+(/\d+)?", "owner/slug"),
    "competition_sources": (r"[\w-]+", "slug"),
    "kernel_sources": (r"[\w-]+/[\w-]{5,}(/\d+)?", "owner/slug"),
    "model_sources": (r"[\w-]+/[\w.-]+/[\w.-]+/[\w.-]+/\d+", "owner/model/framework/variation/version"),
}
WORKING = Path("/kaggle/working")
SETTLING = 300.0
"""Seconds after a push in which an end that Kaggle tells of may be that of the session before."""
SPELLING = {"multigpu": "MultiGPU", "gpus": "GPUs", "sft": "SFT"}


class KernelError(Exception):
    """A kernel that cannot be pushed or did not do what it should; the message says what and what to do."""


# What is pushed
@dataclass
class Kernel:
    """A notebook on its way to Kaggle."""

    notebook: str
    """The name of its source: text_generation_kaggle_multigpu."""
    user: str
    title: str
    root: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Inputs beside the notebook's own, by their field of kernel-metadata.json."""

    @property
    def slug(self) -> str:
        return slugify(self.title)

    @property
    def id(self) -> str:
        return f"{self.user}/{self.slug}"

    @property
    def folder(self) -> Path:
        """What was last built and pushed of it, and the record of that."""
        return self.root / "build" / "kernels" / self.slug

    @property
    def record(self) -> Path:
        return self.folder / "pushed.json"

    def build(self, comment: str = "Parameters") -> str:
        """Write the notebook with its parameters, and its metadata, to `folder`; returns their sha256.

        `comment` begins the cell with the parameters. It must begin with "Parameters", by which the cell is known.

        Raises:
            NotebookError: a parameter that the notebook does not have, an invalid notebook.
            KernelError: something that Kaggle would refuse, or take and stumble over.
        """
        (source,) = notebooks.sources(self.root, [self.notebook])
        notebook = notebooks.build(source, self.root / "kaggle_mgpu")
        notebooks.check_names(notebook, self.parameters, source.name)
        if self.parameters or comment != "Parameters":
            notebook = inject(notebook, self.parameters, comment)
        text = notebooks.dumps(notebook)
        about = metadata(self.root, self, notebook.metadata.get("kaggle_mgpu", {}))
        validate(notebook, text, about)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.slug}.ipynb").write_text(text, encoding="utf-8")
        about_text = json.dumps(about, indent=2) + "\n"
        (self.folder / "kernel-metadata.json").write_text(about_text, encoding="utf-8")
        return hashlib.sha256((text + about_text).encode()).hexdigest()

    def push(self, comment: str = "Parameters", *, again: bool = False) -> kaggle_cli.Pushed:
        """Build it, push it, and note which version that was.

        Raises:
            KernelError: it is running already, which would burn the quota twice; `again` pushes all the same.
        """
        digest = self.build(comment)
        now = None if again else kaggle_cli.status_if_any(self.id)
        if now is not None and now.active:
            raise KernelError(
                f"{self.id} is {now.state}: another push would start a second session beside it. Wait for it "
                f"(python tools/kernels.py wait {self.id}), or push with --again."
            )
        note: dict[str, Any] = {"kernel": self.id, "notebook": self.notebook, "parameters": self.parameters}
        note |= {"sha256": digest, "time": time.time()}
        try:
            pushed = kaggle_cli.push(self.folder)
        except kaggle_cli.SourcesError as error:
            write_json(self.record, {**note, **vars(error.pushed)})
            raise
        write_json(self.record, {**note, **vars(pushed)})
        return pushed

    def outcome(self, folder: Path) -> Outcome:
        """What the output in `folder` says about a run with this kernel's parameters, or with those pushed last."""
        given = {**read_json(self.record).get("parameters", {}), **self.parameters}.get("output_dir")
        if given is None or (Path(given).is_absolute() and not Path(given).is_relative_to(WORKING)):
            return Outcome.of(folder)
        return Outcome.of(folder, os.path.relpath(WORKING / given, WORKING))

    @property
    def just_pushed(self) -> bool:
        """Whether that was so short a time ago that Kaggle may still tell of the session before."""
        return 0 <= time.time() - read_json(self.record).get("time", 0.0) < SETTLING

    def results(self, version: int | None = None) -> Path:
        """Where the output of a version goes: the last one that was pushed from here, unless one is given."""
        version = version or read_json(self.record).get("version")
        return self.root / "runs" / self.slug / (f"v{version}" if version else "latest")


_TRY = """
import dataclasses, importlib, json, sys
try:
    Config = importlib.import_module(f"kaggle_mgpu.recipes.{sys.argv[1]}").Config
except ImportError:
    sys.exit()  # no torch here: then the session will tell
fields = {field.name for field in dataclasses.fields(Config)}
for given in json.load(sys.stdin):
    try:
        Config.from_dict({name: value for name, value in given.items() if name in fields})
    except (TypeError, ValueError) as error:
        print(error)
        break
"""


def check_values(kernel: Kernel, settings: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Whether the notebook's Config takes the parameters' values: found out now, and not in a session.

    `settings` are those of each run, where there are several.

    Raises:
        KernelError: it does not, with its own words.
    """
    (source,) = notebooks.sources(kernel.root, [kernel.notebook])
    recipe = re.search(
        r"^from kaggle_mgpu\.recipes\.(\w+) import .*\bConfig\b", source.read_text(encoding="utf-8"), re.M
    )
    given = [kernel.parameters] if settings is None else settings
    if recipe is None or not any(given):
        return
    paths = [str(kernel.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", _TRY, recipe[1]],
        input=json.dumps([dict(each) for each in given]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if said := done.stdout.strip():
        raise KernelError(f"{source.name}: {said}")


def kernel_from(root: Path, name: str, user: str | None, title: str | None = None, here: bool = False) -> Kernel:
    """The kernel meant by a notebook's name, such as text_generation, or by owner/slug.

    The user is the given one, else the one in the top-level kernel-metadata.json; what runs `here` needs none.
    """
    if "/" in name:
        owner, slug = name.split("/", 1)
        record = read_json(root / "build" / "kernels" / slug / "pushed.json")
        return Kernel(record.get("notebook", slug.replace("-", "_")), owner, titled(slug), root)
    (source,) = notebooks.sources(root, [name])
    owner = user or str(top_metadata(root).get("id", "")).split("/")[0]
    if owner in ("", PLACEHOLDER) and not here:
        raise KernelError(
            "whose kernel? Give --user NAME, or once and for all: python tools/kernels.py init --user NAME"
        )
    return Kernel(source.stem, owner, title or titled(source.stem), root)


def top_metadata(root: Path) -> dict[str, Any]:
    """The top-level kernel-metadata.json.

    Raises:
        KernelError: it is not there, or cannot be read.
    """
    path = root / "kernel-metadata.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelError(
            f"{path}: {error}. Expected the file that is in the repository: git checkout {path}"
        ) from None
    if not isinstance(found, dict):
        raise KernelError(f"{path}: expected an object, got {type(found).__name__}: git checkout {path}")
    return found


def titled(name: str) -> str:
    """text_generation_kaggle_multigpu -> Text Generation Kaggle MultiGPU, whose slug is the name again."""
    return " ".join(SPELLING.get(word, word.capitalize()) for word in re.split(r"[_-]+", name) if word)


def slugify(title: str) -> str:
    """As Kaggle makes it of an English title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def inject(notebook: Any, parameters: Mapping[str, Any], comment: str) -> Any:
    """The notebook with papermill's own cell of parameters after the one tagged so."""
    notebooks._library("papermill")
    from papermill.parameterize import parameterize_notebook

    notebook.metadata["papermill"] = {}  # where it notes the parameters, once more
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])  # papermill looks for them in every cell
    made = parameterize_notebook(notebook, dict(parameters), comment=comment, kernel_name="python3", language="python")
    del made.metadata["papermill"]
    for cell in made.cells:
        if "injected-parameters" in notebooks.tags(cell):
            cell.id = "injected-parameters"  # papermill's own is random
        if not notebooks.tags(cell):
            del cell.metadata["tags"]
    return made


def metadata(root: Path, kernel: Kernel, needs: Mapping[str, Any]) -> dict[str, Any]:
    """kernel-metadata.json: the top-level one, for this kernel, with the notebook's needs and the inputs given."""
    if unknown := set(needs) - set(NEEDS):
        raise KernelError(
            f"{kernel.notebook}.py asks for {', '.join(sorted(unknown))} in its header; expected some of: "
            + ", ".join(NEEDS)
        )
    top = top_metadata(root)
    for_it = Path(str(top.get("code_file"))).stem == kernel.notebook  # else its inputs are another notebook's
    about = {**top, "id": kernel.id, "title": kernel.title, "code_file": f"{kernel.slug}.ipynb"}
    about |= {name: value for name, value in needs.items() if name not in SOURCES}
    for name in SOURCES:
        wanted = [needs.get(name), top.get(name) if for_it else None, kernel.sources.get(name)]
        about[name] = list(dict.fromkeys(source for sources in wanted for source in sources or []))
    return about


def validate(notebook: Any, text: str, about: Mapping[str, Any]) -> None:
    """What `kaggle kernels push` does not check, or only hints at.

    Raises:
        KernelError: with all that is wrong.
    """
    wrong = []
    slug, title = str(about["id"]).partition("/")[2], str(about["title"])
    if not title.isascii() or slugify(title) != slug:
        wrong.append(f"the title {title!r} does not make the slug {slug!r}: Kaggle would choose another one")
    if not 5 <= len(slug) <= 50 or not 5 <= len(title) <= 50:
        wrong.append(f"title and slug must have 5 to 50 characters, got {title!r} and {slug!r}")
    if not re.fullmatch(r"[\w-]+", str(about["id"]).partition("/")[0]) or PLACEHOLDER in about["id"]:
        wrong.append(f"{about['id']!r} does not begin with a user name: give --user NAME")
    for name, (form, shown) in FORMS.items():
        if not isinstance(about.get(name), list):
            wrong.append(f"{name} must be a list, got {about.get(name)!r}")
            continue
        wrong += [
            f"{name}: expected {shown}, got {source!r}"
            for source in about[name]
            if not isinstance(source, str) or not re.fullmatch(form, source)
        ]
    for name in ("is_private", "enable_gpu", "enable_tpu", "enable_internet"):
        if not isinstance(about.get(name), bool):
            wrong.append(f"{name} must be true or false, got {about.get(name)!r}")
    if not notebook.metadata.get("kernelspec", {}).get("name"):
        wrong.append("the notebook names no kernel (metadata.kernelspec.name): it would end before its first cell")
    nbformat = notebooks._library("nbformat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            nbformat.validate(nbformat.reads(text, as_version=4))
        except Exception as error:
            wrong.append(f"the notebook is not valid: {error}")
    if (size := len(text.encode())) > MAX_BYTES:
        wrong.append(f"the notebook has {size:,} bytes; Kaggle takes {MAX_BYTES:,}")
    for number, cell in enumerate(notebook.cells, 1):
        if "payload" not in notebooks.tags(cell) and (found := kaggle_cli.secret_in(cell.source)):
            wrong.append(
                f"cell {number} has what looks like a token or key ({found}), which every version would keep: use "
                f"Kaggle's own secrets (Add-ons > Secrets)"
            )
    if wrong:
        raise KernelError("\n".join([f"{about['id']} would fail on Kaggle:", *wrong]))


# What came out
@dataclass(frozen=True)
class Outcome:
    """What a kernel's output says about its training."""

    finished: bool
    """Whether the run's own result.json says so: those of its stages, or of runs it compares, lie deeper."""
    step: int
    """Of the newest checkpoints of all its runs, or of their end where they are finished, added up."""
    text: str
    results: dict[str, dict[str, Any]]
    """By their path, the run's own first."""
    predicted: int = 0
    """What has been predicted after training, as predictions/count.json says."""

    @classmethod
    def of(cls, folder: Path, output_dir: str | None = None) -> Outcome:
        """Of the files in `folder`. The run's own result.json is in its `output_dir`; where that is not given, directly
        in the folder, else in each folder in it."""
        results: dict[str, dict[str, Any]] = {}
        steps: dict[Path, int] = {}
        for path in sorted(folder.rglob("checkpoints/step-*/state.json")):
            run, found = path.parents[2], re.fullmatch(r"step-(\d+)", path.parent.name)
            steps[run] = max(steps.get(run, 0), int(found[1]) if found else 0)
        paths = sorted(folder.rglob("result.json"), key=lambda path: (len(path.parts), path))
        for path in reversed(paths):  # deepest first: what is finished stands for all that is below it
            result = read_json(path)
            if result.get("finished"):
                steps = {run: step for run, step in steps.items() if not run.is_relative_to(path.parent)}
                # a file of somebody else's may say anything
                step = result.get("step")
                steps[path.parent] = step if isinstance(step, int) and not isinstance(step, bool) else 0
        results = {path.relative_to(folder).as_posix(): read_json(path) for path in paths}
        lines = [
            f"{name}: step {said.get('step')} of {said.get('max_steps')}, {said.get('reason')}, {said.get('metrics')}"
            for name, said in results.items()
        ]
        if output_dir is not None:
            own = [path for path in paths if path.parent == folder / output_dir]
        else:
            own = [path for path in paths if path.parent == folder] or [p for p in paths if p.parent.parent == folder]
        finished = bool(own) and all(results[p.relative_to(folder).as_posix()].get("finished") is True for p in own)
        if not own:
            lines.append("there is no result.json" + (" of the run itself: it was ended in a stage" if paths else ""))
        counts = [read_json(path).get("predicted") for path in folder.rglob("predictions/count.json")]
        predicted = sum(count for count in counts if isinstance(count, int))
        return cls(finished, sum(steps.values()), "\n".join(lines), results, predicted)


SMALL = r"(^|/)(result\.json|predictions/count\.json|checkpoints/step-\d+/state\.json)$"
"""The files by which a session is judged, for `kaggle kernels output --file-pattern`."""


def wait_for(
    kernel: str, interval: float, say: Callable[[str], object], *, just_pushed: bool = False, patience: int = 10
) -> kaggle_cli.Status:
    """Ask for the kernel's status every `interval` seconds until it has ended.

    A network that fails now and then must not end a watch of twelve hours: only `patience` failures in a row do, or
    a first one that waiting cannot mend. Of a kernel just pushed an end is not believed at first: it may be the session
    before that is told of.
    """
    failures, before, began = 0, "", time.monotonic()
    while True:
        try:
            status = kaggle_cli.status(kernel)
            failures = 0
        except KaggleError as error:
            absent = kaggle_cli.ABSENT.search(str(error)) and not just_pushed
            if not before and (absent or kaggle_cli.HOPELESS.search(str(error))):
                raise
            failures += 1
            say(f"{error} ({failures} of {patience})")
            if failures >= patience:
                raise
        else:
            if status.state != before:
                say(f"{kernel}: {status.state} after {time.monotonic() - began:.0f} s")
                before = status.state
            just_pushed = just_pushed and not status.active and time.monotonic() - began < 2 * interval
            if not status.active and not just_pushed:
                return status
        time.sleep(interval)


def log_end(folder: Path, lines: int = 15) -> str:
    """The last lines of a session's log, for an error."""
    try:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(kaggle_cli.redacted(text).rstrip().splitlines()[-lines:])


# Small helpers
def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """Atomically: a reader, or a start after a kill, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """{"epochs": 5} of ["epochs=5"]: values are Python's where they can be, and text where not."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise KernelError(f"-p: expected name=value, got {text!r}")
        if name in found:
            raise KernelError(f"-p {name}=… is given twice; a sweep takes a list: -p {name}=[{found[name]},{value}]")
        found[name] = notebooks.literal(value)
    return found
