"""Build, check and push a notebook as a Kaggle kernel, and read the outcome from its output.

    kernel = kernel_from(ROOT, "text_generation", user="somebody")
    kernel.parameters = {"epochs": 5}
    kernel.push()

kernels.py is the command line; relay.py and sweep.py push several times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
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
MAX_BYTES = 700_000  # Kaggle refuses 2.8 MB with HTTP 400
SOURCES = ("dataset_sources", "competition_sources", "kernel_sources", "model_sources")
NEEDS = (*SOURCES, "enable_internet", "docker_image", "docker_image_pinning_type", "machine_shape")
FORMS = {
    "dataset_sources": (r"[\w-]+/[\w-]+(/\d+)?", "owner/slug"),
    "competition_sources": (r"[\w-]+", "slug"),
    "kernel_sources": (r"[\w-]+/[\w-]{5,}(/\d+)?", "owner/slug"),
    "model_sources": (r"[\w-]+/[\w.-]+/[\w.-]+/[\w.-]+/\d+", "owner/model/framework/variation/version"),
}
WORKING = Path("/kaggle/working")
SETTLING = 300.0
"""Seconds after a push in which Kaggle may still report the end of the previous session."""
LEAST = 1800.0
"""Seconds of quota that are worth a session whose length is not known."""
SLACK = 900.0
"""Seconds that a session may take after its time_limit, to save and to write its notebook."""
LONGEST = 12 * 3600.0
"""Seconds that Kaggle gives a session with GPUs."""
SPELLING = {"multigpu": "MultiGPU", "gpus": "GPUs", "sft": "SFT"}


class KernelError(Exception):
    """A kernel cannot be pushed, or failed; the message says why, and the next step."""


class QuotaError(KernelError):
    """The rest of the week's quota cannot pay for a session."""


# What is pushed
@dataclass
class Kernel:
    """A notebook to push to Kaggle, with its parameters and inputs."""

    notebook: str
    """The name of the source, such as text_generation_kaggle_multigpu, or the path of an .ipynb of the user's own."""
    user: str
    title: str
    root: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Inputs in addition to the notebook's own, by field of kernel-metadata.json."""
    limit: float | None = None
    """Seconds after which Kaggle ends a session."""
    pinned: bool = False
    """Whether each version keeps the image in which the kernel began."""
    prepares: bool = False
    """Whether only what the recipe does before training is run, on a session without GPUs."""
    internet: bool = False
    """Whether to switch the internet on, whatever the notebook says."""
    estimate: float | None = None
    """Seconds of training that a plan expects; None if unknown."""

    @property
    def source(self) -> Path:
        """The notebook's percent source, or its .ipynb."""
        own = self.notebook.endswith(".ipynb")
        return Path(self.notebook) if own else notebooks.sources(self.root, [self.notebook])[0]

    @property
    def seconds(self) -> float | None:
        """The quota that a session needs, in seconds: its limit, else time_limit or the estimate, else unknown."""
        if self.limit:
            return self.limit
        if (given := self.parameters.get("time_limit")) is not None:
            return duration(str(given)) + SLACK
        return None if self.estimate is None else min(LONGEST, self.estimate + SLACK)

    def short_of_quota(self, left: kaggle_cli.Quota | None = None, promised: float = 0.0) -> str:
        """Return why the week's GPU quota cannot pay for a session, or "".

        Args:
            left: default: Kaggle's answer.
            promised: seconds of `left` that sessions which run now will need.
        """
        if not top_metadata(self.root).get("enable_gpu", True):
            return ""
        left, needed = left or kaggle_cli.quota(), self.seconds or LEAST
        if left is None or left.seconds - promised >= needed:
            return ""
        until = f"; the quota is renewed at {left.renewed}" if left.renewed else ""
        of_others = f", {promised / 3600:.1f} of them for sessions that run" if promised else ""
        hours, of = left.seconds / 3600, needed / 3600
        return f"the week's GPU quota has {hours:.1f} h left{of_others}, and a session needs {of:.1f}{until}"

    def ask_quota(self, say: Callable[[str], object], promised: float = 0.0) -> None:
        """Say how the estimate of a plan compares with the week's GPU quota, if both can be had within a minute.

        Raises:
            QuotaError: the quota cannot pay for a session.
        """
        left = kaggle_cli.quota()
        if left is None or left.seconds - promised >= LONGEST:  # enough for any session: a plan costs ten seconds
            return
        with contextlib.suppress(KernelError):
            minutes = expected(self, timeout=60) / 60
            shown = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{max(1, minutes):.0f} min"
            say(f"the plan expects {shown} on two T4s; the week's GPU quota has {left.seconds / 3600:.1f} h left")
        if short := self.short_of_quota(left, promised):
            raise QuotaError(f"not pushed: {short}. A smaller -p time_limit makes a shorter session")

    def check_user(self) -> None:
        """Raise KernelError if no user is known."""
        if self.user in ("", PLACEHOLDER):
            raise KernelError(
                "whose kernel? Give --user NAME, or once and for all: python tools/kernels.py init --user NAME"
            )

    def load(self) -> Any:
        """Build the notebook, or read the user's own."""
        return notebooks.load(self.source, self.root / "kaggle_mgpu")

    @property
    def slug(self) -> str:
        return slugify(self.title)

    @property
    def id(self) -> str:
        return f"{self.user}/{self.slug}"

    @property
    def folder(self) -> Path:
        """The folder of the last build, with the record of the last push."""
        return self.root / "build" / "kernels" / self.slug

    @property
    def record(self) -> Path:
        return self.folder / "pushed.json"

    def build(self, comment: str = "Parameters") -> str:
        """Write the notebook with its parameters, and its metadata, to `folder`; return the sha256 of both.

        Args:
            comment: the first line of the parameters cell; must begin with "Parameters".

        Raises:
            NotebookError: a parameter that the notebook does not have, an invalid notebook.
            KernelError: the kernel would be refused, or fail, on Kaggle.
        """
        notebook = self.load()
        notebooks.check_names(notebook, self.parameters, self.source.name)
        if self.parameters or comment != "Parameters":
            notebook = inject(notebook, self.parameters, comment)
        if self.prepares:
            notebook.cells = [*filter(notebooks.tags, notebook.cells), preparing(notebook, self.source.name)]
        text = notebooks.dumps(notebook)
        about = metadata(self.root, self, notebook.metadata.get("kaggle_mgpu", {}))
        validate(notebook, text, about)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.slug}.ipynb").write_text(text, encoding="utf-8")
        about_text = json.dumps(about, indent=2) + "\n"
        (self.folder / "kernel-metadata.json").write_text(about_text, encoding="utf-8")
        return hashlib.sha256((text + about_text).encode()).hexdigest()

    def push(
        self,
        comment: str = "Parameters",
        *,
        again: bool = False,
        ask: Callable[[], object] = lambda: None,
    ) -> kaggle_cli.Pushed:
        """Build and push the kernel, and record the version.

        Args:
            ask: called between both, such as `ask_quota`.

        Raises:
            KernelError: a session is running already and `again` is False, since two sessions cost quota twice.
        """
        digest = self.build(comment)  # first, since what is wrong here needs no question to Kaggle
        ask()
        now = None if again else kaggle_cli.status_if_any(self.id)
        if now is not None and now.active:
            raise KernelError(
                f"{self.id} is {now.state}: another push would start a second session beside it. Wait for it "
                f"(python tools/kernels.py wait {self.id}), or push with --again."
            )
        note: dict[str, Any] = {"kernel": self.id, "notebook": self.notebook, "parameters": self.parameters}
        note |= {"sha256": digest, "time": time.time(), "comment": comment}
        try:
            pushed = kaggle_cli.push(self.folder, self.limit)  # time_limit is no brake: each run counts its own
        except kaggle_cli.SourcesError as error:
            write_json(self.record, {**note, **vars(error.pushed)})
            raise
        write_json(self.record, {**note, **vars(pushed)})
        return pushed

    def outcome(self, folder: Path) -> Outcome:
        """Read the outcome of a run from the output in `folder`."""
        given = {**read_json(self.record).get("parameters", {}), **self.parameters}.get("output_dir")
        if given is None or (Path(given).is_absolute() and not Path(given).is_relative_to(WORKING)):
            return Outcome.of(folder)
        return Outcome.of(folder, os.path.relpath(WORKING / given, WORKING))

    def named(self, version: int | None) -> str:
        """Return owner/kernel/N; owner/kernel, the newest version, if no version is known or the CLI heeds none."""
        return f"{self.id}/{version}" if version and kaggle_cli.versions_are_heeded() else self.id

    @property
    def version(self) -> int | None:
        """The version of the last push from here."""
        return read_json(self.record).get("version")

    @property
    def just_pushed(self) -> bool:
        """Whether Kaggle may still report the previous session, since the last push is recent."""
        return 0 <= time.time() - read_json(self.record).get("time", 0.0) < SETTLING

    def results(self, version: int | None = None) -> Path:
        """Return the folder for the output of a version; default: the last version pushed from here."""
        version = version or self.version
        return self.root / "runs" / self.slug / (f"v{version}" if version else "latest")


_TRY = """
import dataclasses, importlib, json, sys
try:
    Config = importlib.import_module(f"kaggle_mgpu.recipes.{sys.argv[1]}").Config
except ImportError:
    sys.exit()  # no torch here: the session will check
fields = {field.name for field in dataclasses.fields(Config)}
for given in json.load(sys.stdin):
    try:
        Config.from_dict({name: value for name, value in given.items() if name in fields})
    except (TypeError, ValueError) as error:
        print(error)
        break
"""


def check_parameters(kernel: Kernel, settings: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Check that the notebook knows the parameters and its Config accepts them, before a session is spent.

    Args:
        settings: the parameters of each run, if there are several runs.

    Raises:
        NotebookError: the notebook has no such parameter.
        KernelError: Config rejects a value; the message has Config's words.
    """
    if not kernel.parameters:
        return
    notebook = kernel.load()
    notebooks.check_names(notebook, kernel.parameters, kernel.source.name)
    code = "\n".join(cell.source for cell in notebook.cells if "payload" not in notebooks.tags(cell))
    recipe = re.search(r"^from kaggle_mgpu\.recipes\.(\w+) import .*\bConfig\b", code, re.M)
    if recipe is None:
        return
    given = [kernel.parameters] if settings is None else settings
    paths = [str(kernel.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", _TRY, recipe[1]], input=json.dumps([dict(each) for each in given]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if said := done.stdout.strip():
        raise KernelError(f"{kernel.source.name}: {said}")


_PLAN = """
import dataclasses, importlib, json, sys
from kaggle_mgpu.machine import session
from kaggle_mgpu.planning import plan_all
recipe = importlib.import_module(f"kaggle_mgpu.recipes.{sys.argv[1]}")
fields = {field.name for field in dataclasses.fields(recipe.Config)}
config = recipe.Config.from_dict({name: value for name, value in json.load(sys.stdin).items() if name in fields})
if sys.argv[2] and getattr(config, "data_path", None) is None and not session.inputs():
    sys.exit(f"{sys.argv[2]}: no such input on this machine, and other data take another time")
runs = recipe.runs(config) if hasattr(recipe, "runs") else [("", config, recipe.task(config))]
print("seconds", sum(each.seconds for each in plan_all([run[1:] for run in runs], on="T4x2")))
"""


def expected(kernel: Kernel, timeout: float | None = None) -> float:
    """Return a plan's estimate for two T4s in seconds, of the data that the parameters lead to on this machine.

    Args:
        timeout: seconds for the plan.

    Raises:
        KernelError: the notebook has no recipe, or no plan can be made here.
    """
    if kernel.estimate is not None:
        return kernel.estimate
    notebook, where = kernel.load(), kernel.source.name
    if (recipe := recipe_of(notebook)) is None:
        raise KernelError(f"{where}: -t plan: expected a notebook of a recipe; give seconds instead")
    about = metadata(kernel.root, kernel, notebook.metadata.get("kaggle_mgpu", {}))
    attached = [source for name in SOURCES for source in about[name] if not source.endswith("/kaggle-mgpu")]
    paths = [str(kernel.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {**notebooks.parameters(notebook), **kernel.parameters}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", _PLAN, recipe, ", ".join(attached)],
                input=json.dumps({**given, "output_dir": folder}),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                capture_output=True, text=True, check=False, timeout=timeout,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise KernelError(f"{where}: -t plan: no plan can be made here: {timeout:g} s were too few") from None
    found = re.search(r"^seconds ([\d.e+-]+)$", done.stdout, re.M)
    if found is None:
        said = done.stderr.strip().splitlines()[-1:]
        raise KernelError(f"{where}: -t plan: no plan can be made here: {' '.join(said)}. Give seconds instead")
    kernel.estimate = float(found[1])
    return kernel.estimate


def planned(kernel: Kernel) -> float:
    """Return a limit for a session: one and a half times the plan's estimate, and SLACK; raises as `expected` does."""
    return min(LONGEST, 1.5 * expected(kernel) + SLACK)


def kernel_from(root: Path, name: str, user: str | None, title: str | None = None) -> Kernel:
    """Return the kernel for a notebook's name, such as text_generation, for the path of an .ipynb, or for owner/slug.

    Args:
        user: default: the user in the top-level kernel-metadata.json, which may be nobody yet.
    """
    if "/" in name and not name.endswith(".ipynb"):
        owner, slug = name.split("/", 1)
        record = read_json(root / "build" / "kernels" / slug / "pushed.json")
        return Kernel(record.get("notebook", slug.replace("-", "_")), owner, titled(slug), root)
    own = name.endswith(".ipynb")
    source = Path(name).resolve() if own else notebooks.sources(root, [name])[0]
    owner = user or str(top_metadata(root).get("id", "")).split("/")[0]
    return Kernel(str(source) if own else source.stem, owner, title or titled(source.stem), root)


def top_metadata(root: Path) -> dict[str, Any]:
    """Read the top-level kernel-metadata.json.

    Raises:
        KernelError: the file is missing or cannot be read.
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
    """Turn text_generation_kaggle_multigpu into Text Generation Kaggle MultiGPU."""
    return " ".join(SPELLING.get(word, word.capitalize()) for word in re.split(r"[_-]+", name) if word)


def slugify(title: str) -> str:
    """Make the slug of a title as Kaggle does."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def inject(notebook: Any, parameters: Mapping[str, Any], comment: str) -> Any:
    """Add papermill's parameters cell after the cell tagged `parameters`."""
    notebooks._library("papermill")
    from papermill.parameterize import parameterize_notebook

    notebook.metadata["papermill"] = {}  # papermill expects this, and tags in every cell
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    made = parameterize_notebook(notebook, dict(parameters), comment=comment, kernel_name="python3", language="python")
    del made.metadata["papermill"]
    for cell in made.cells:
        if "injected-parameters" in notebooks.tags(cell):
            cell.id = "injected-parameters"  # papermill's id is random
        if not notebooks.tags(cell):
            del cell.metadata["tags"]
    return made


PREPARE = """\
from kaggle_mgpu import env, notebook_parameters

env.fix()
import dataclasses

from kaggle_mgpu.recipes import {recipe}

fields = {{field.name for field in dataclasses.fields({recipe}.Config)}}
given = {{name: value for name, value in notebook_parameters(globals()).items() if name in fields}}
print({recipe}.prepare({recipe}.Config.from_dict(given)))"""


def recipe_of(notebook: Any) -> str | None:
    """Return the name of the recipe that a notebook imports from, or None."""
    code = "\n".join(cell.source for cell in notebook.cells if "payload" not in notebooks.tags(cell))
    found = re.search(r"^from kaggle_mgpu\.recipes\.(\w+) import", code, re.M)
    return found[1] if found else None


def preparing(notebook: Any, where: str) -> Any:
    """Return the cell that prepares what the notebook's recipe trains on.

    Raises:
        KernelError: the notebook has no recipe, or its recipe no preparation.
    """
    if (recipe := recipe_of(notebook)) is None:
        raise KernelError(
            f"{where}: --prepare: expected a notebook of a recipe, got no import from kaggle_mgpu.recipes"
        )
    payloads = [notebooks.payload_files(c.source) for c in notebook.cells if "payload" in notebooks.tags(c)]
    if not payloads:
        raise KernelError(f"{where}: --prepare: the package is not in it: python tools/notebooks.py carry {where}")
    form = re.compile(r"kaggle_mgpu/recipes/(\w+)/__init__\.py")
    able = [made[1] for name, text in payloads[0].items() if (made := form.fullmatch(name)) and b'"prepare"' in text]
    if recipe not in able:
        raise KernelError(
            f"{where}: --prepare: {recipe} has no work before training: leave --prepare out. Expected a notebook of "
            + ", ".join(able)
        )
    cell = notebooks._library("nbformat").v4.new_code_cell(PREPARE.format(recipe=recipe))
    cell.id = "prepare"
    return cell


def metadata(root: Path, kernel: Kernel, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Return kernel-metadata.json for this kernel: the top-level file, the notebook's needs and the given inputs."""
    if unknown := set(needs) - set(NEEDS):
        raise KernelError(
            f"{kernel.source.name} asks for {', '.join(sorted(unknown))} in its header; expected some of: "
            + ", ".join(NEEDS)
        )
    top = top_metadata(root)
    same = (
        Path(str(top.get("code_file"))).stem == Path(kernel.notebook).stem
    )  # else the inputs there are another notebook's
    about = {**top, "id": kernel.id, "title": kernel.title, "code_file": f"{kernel.slug}.ipynb"}
    about |= {name: value for name, value in needs.items() if name not in SOURCES}
    if kernel.prepares:
        about["enable_gpu"] = False
        about.pop("machine_shape", None)
    if kernel.pinned:
        about.setdefault("docker_image_pinning_type", "original")
    if kernel.internet:
        about["enable_internet"] = True
    for name in SOURCES:
        wanted = [needs.get(name), top.get(name) if same else None, kernel.sources.get(name)]
        about[name] = list(dict.fromkeys(source for sources in wanted for source in sources or []))
    return about


def secrets_in(notebook: Any, files: Mapping[str, bytes]) -> list[str]:
    """Return the places of tokens and keys: cells, metadata, files of a payload, and the given files."""
    texts = {name: content.decode(errors="replace") for name, content in files.items()}
    texts["the notebook's metadata"] = json.dumps(notebook.metadata)
    for number, cell in enumerate(notebook.cells, 1):
        source = cell.source
        if "payload" in notebooks.tags(cell) and notebooks.DATA.search(source):
            packed = {} if files else notebooks.payload_files(source)
            texts |= {name: content.decode(errors="replace") for name, content in packed.items()}
            source = notebooks.DATA.sub("", source)
        texts[f"cell {number}"] = source
        texts[f"the metadata of cell {number}"] = json.dumps({**cell, "source": ""})
    return [
        f"{where} has what looks like a token or key ({found}), which every version would keep: use Kaggle's own "
        f"secrets (Add-ons > Secrets)"
        for where, text in texts.items()
        if (found := kaggle_cli.secret_in(text))
    ]


def validate(notebook: Any, text: str, about: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
    """Check a kernel for mistakes that `kaggle kernels push` does not report.

    Args:
        files: the files in the payload cell. Default: those of the package, read from the cell.

    Raises:
        KernelError: a list of all mistakes.
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
    if "p100" in str(about.get("machine_shape")).lower():
        wrong.append(f"machine_shape {about['machine_shape']!r}: Kaggle has no P100 any more: NvidiaTeslaT4 is two T4s")
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
    wrong += secrets_in(notebook, files or {})
    if wrong:
        raise KernelError("\n".join([f"{about['id']} would fail on Kaggle:", *wrong]))


# What came out
@dataclass(frozen=True)
class Outcome:
    """The outcome of a training, read from a kernel's output."""

    finished: bool
    """Whether the run's own result.json says finished; results of stages and of compared runs lie deeper."""
    step: int
    """The sum of the last steps of all runs: at the end if finished, else of the newest checkpoint."""
    text: str
    results: dict[str, dict[str, Any]]
    """The results by path, the run's own first."""
    predicted: int = 0
    """The number of predictions after training, from predictions/count.json."""

    @classmethod
    def of(cls, folder: Path, output_dir: str | None = None) -> Outcome:
        """Read the outcome from the files in `folder`.

        Args:
            output_dir: the place of the run's own result.json in the folder. Default: the folder itself, else each
                folder in it.
        """
        steps = {run: max(kept) for run, kept in checkpoints(folder).items()}
        paths = sorted(folder.rglob("result.json"), key=lambda path: (len(path.parts), path))
        for path in reversed(paths):  # deepest first: a finished run replaces the runs below
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


def checkpoints(folder: Path) -> dict[Path, dict[int, Path]]:
    """Return the folders of whole checkpoints by run and step: checkpoints/step-N, or a Trainer's checkpoint-N."""
    found: dict[Path, dict[int, Path]] = {}
    for pattern in ("checkpoints/step-*/state.json", "checkpoint-*/trainer_state.json"):  # each is written last
        for file in folder.rglob(pattern):
            run, number = file.parents[pattern.count("/")], file.parent.name.rpartition("-")[2]
            if number.isdecimal():
                found.setdefault(run, {})[int(number)] = file.parent
    return found


SMALL = (
    r"(^|/)(result\.json|predictions/count\.json|checkpoints/step-\d+/state\.json|checkpoint-\d+/trainer_state\.json)$"
)
"""The files that tell the outcome of a session, for `kaggle kernels output --file-pattern`."""


def wait_for(
    kernel: str, interval: float, say: Callable[[str], object], *, just_pushed: bool = False, patience: int = 10
) -> kaggle_cli.Status:
    """Ask for the kernel's status every `interval` seconds until the session has ended.

    Args:
        just_pushed: ignore an end in the first two intervals, since Kaggle may still report the previous session.
        patience: failures in a row that end the wait. A first failure that waiting cannot cure ends it at once.
    """
    failures, before, began = 0, "", time.monotonic()
    while True:
        try:
            status = kaggle_cli.status(kernel)
            failures = 0
        except KaggleError as error:
            # a version that was named has been pushed, and Kaggle may not know of its session yet
            absent = kaggle_cli.ABSENT.search(str(error)) and not just_pushed and kernel.count("/") == 1
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
    """Return the last lines of a session's log, for an error."""
    try:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(kaggle_cli.redacted(text).rstrip().splitlines()[-lines:])


# Small helpers
def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; return {} on failure."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: after a kill the file is the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def duration(text: str) -> float:
    """Return the seconds in a text such as 5400, 45m or 11h30m.

    Raises:
        KernelError: the text is no duration.
    """
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        total = sum(float(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    except ValueError:
        total = 0
    if total <= 0:
        raise KernelError(f"expected seconds, or a duration such as 45m or 11h30m, got {text!r}")
    return float(total)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Turn ["epochs=5"] into {"epochs": 5}; a value that is no Python literal stays text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise KernelError(f"-p: expected name=value, got {text!r}")
        if name in found:
            raise KernelError(f"-p {name}=… is given twice; a sweep takes a list: -p {name}=[{found[name]},{value}]")
        found[name] = notebooks.literal(value)
    return found
