"""tools/kernels.py with the real kaggle CLI against tests/kaggle_server. One notebook alone:
`pytest tests/test_kernels.py -k "every_notebook and text_generation"`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

import env_matrix
import kaggle_cli
import kernel as kernels
import notebooks
from kaggle_mgpu import progress
from kaggle_server import KaggleServer

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "kernels.py"
SLUG = "counting-kaggle-multigpu"

# Counts instead of training: a checkpoint a step, at most so many steps a session, and the kit's own files
COUNTING = """\
# ---
# jupyter:
#   kaggle_mgpu:
#     competition_sources: [counting-numbers]
# ---

# %% [markdown]
# # Counting

# %% tags=["payload"]
# here

# %% tags=["parameters"]
# Parameters of this notebook
goal = 6
per_session = 100
seconds = 0.0  # a step takes
fail_at = None
words = "x"
output_dir = "run"

# %%
import json, os, pathlib, sys, time

root = pathlib.Path(os.environ["KAGGLE_MGPU_KAGGLE_ROOT"])
found = sorted(root.glob("input/**/checkpoints/step-*/model.safetensors"))
step = max((int(path.parent.name[5:]) for path in found), default=0)
print("inputs", sorted(path.relative_to(root / "input").as_posix() for path in root.glob("input/*/*")))
print("going on from" if found else "starting at", step, flush=True)
import kaggle_mgpu.config

def save():
    folder = pathlib.Path(output_dir, "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(str(step))
    (folder / "state.json").write_text("{}")

if found:
    save()
for _ in range(per_session):
    if step >= goal:
        break
    time.sleep(seconds)
    if step == fail_at:
        raise OSError("the sensor is gone")
    step += 1
    print("step", step, words, flush=True)
    save()
result = {"finished": step >= goal, "reason": "counted", "step": step, "max_steps": goal, "metrics": {"loss": 1 / step}}
pathlib.Path(output_dir, "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a notebook that needs no torch, so that a session takes two seconds."""
    folder = tmp_path / "repo"
    (folder / "kaggle_mgpu" / "recipes").mkdir(parents=True)
    (folder / "kaggle_mgpu" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    (folder / "kaggle_mgpu" / "config.py").write_text("class TrainConfig:\n    epochs: int = 1\n")
    (folder / "kaggle_mgpu" / "recipes" / "__init__.py").write_text(
        "class Config:\n    save_every: int | None = None\n"
    )
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "counting_kaggle_multigpu.py").write_text(COUNTING)
    shutil.copy(ROOT / "kernel-metadata.json", folder)
    return folder


@pytest.fixture
def kaggle(tmp_path: Path) -> Iterator[KaggleServer]:
    with KaggleServer(tmp_path / "kaggle") as server:
        (tmp_path / "numbers").mkdir()
        server.account.competitions["counting-numbers"] = tmp_path / "numbers"
        yield server


def tool(kaggle: KaggleServer, root: Path, *arguments: Any, code: int = 0, timeout: float = 300) -> str:
    """Run the tool; what it wrote, standard output first."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--root", str(root), *map(str, arguments)],
        env=kaggle.environment(),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert kaggle.account.key not in done.stdout + done.stderr
    return done.stdout + done.stderr


def push(kaggle: KaggleServer, root: Path, *parameters: str, user: str = "ann", **options: Any) -> str:
    given = [text for each in parameters for text in ([each] if each.startswith("-") else ["-p", each])]
    return tool(kaggle, root, "push", "counting", "--user", user, *given, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counting(root: Path, **parameters: Any) -> kernels.Kernel:
    kernel = kernels.kernel_from(root, "counting", "ann")
    kernel.parameters = parameters
    return kernel


# What is pushed
def test_what_is_built(root: Path) -> None:
    kernel = counting(root, goal=9, save_every=3, words='a "b"\n')
    kernel.sources = {"dataset_sources": ["bob/some-text"]}
    digest = kernel.build()
    about = json.loads((kernel.folder / "kernel-metadata.json").read_text())
    given = json.loads((ROOT / "kernel-metadata.json").read_text())
    changed = {name: value for name, value in about.items() if value != given[name]}
    assert changed == {
        "id": f"ann/{SLUG}",
        "title": "Counting Kaggle MultiGPU",
        "code_file": f"{SLUG}.ipynb",
        "dataset_sources": ["bob/some-text"],
        "competition_sources": ["counting-numbers"],
    }
    notebook = nbformat.read(kernel.folder / f"{SLUG}.ipynb", as_version=4)
    nbformat.validate(notebook)
    tags = [notebooks.tags(cell) for cell in notebook.cells]
    assert tags == [[], ["payload"], ["parameters"], ["injected-parameters"], []]
    namespace: dict[str, Any] = {}
    exec(notebook.cells[3].source, namespace)
    assert {name: namespace[name] for name in kernel.parameters} == kernel.parameters
    assert notebook.cells[3].source.startswith("# Parameters\n")
    assert kernel.build() == digest  # the same again


def test_titles_and_slugs_of_all_notebooks() -> None:
    given = json.loads((ROOT / "kernel-metadata.json").read_text())
    for source in notebooks.sources(ROOT, []):
        kernel = kernels.kernel_from(ROOT, source.stem, "ann")
        assert kernel.slug == source.stem.replace("_", "-")
        assert 5 <= len(kernel.title) <= 50
        if Path(given["code_file"]).stem == source.stem:
            assert (kernel.title, kernel.slug) == (given["title"], given["id"].split("/")[1])


def test_a_parameter_that_the_notebook_does_not_have(kaggle: KaggleServer, root: Path) -> None:
    assert push(kaggle, root, "gaol=3", code=1) == (
        "counting_kaggle_multigpu.py has no parameter 'gaol'. Did you mean 'goal'? It has: goal, per_session, seconds, "
        "fail_at, words, output_dir. Its Config also takes: epochs, save_every.\n"
    )
    assert "-p: expected name=value, got 'goal'" in push(kaggle, root, "goal", code=1)
    assert kaggle.requests == []


def test_whose_kernel(kaggle: KaggleServer, root: Path) -> None:
    said = tool(kaggle, root, "push", "counting", code=1)
    assert "whose kernel? Give --user NAME, or once and for all: python tools/kernels.py init --user NAME" in said


def header(text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        source = root / "notebooks" / "counting_kaggle_multigpu.py"
        source.write_text(COUNTING.replace("competition_sources: [counting-numbers]", text))

    return change


def top(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "kernel-metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"title": "Café au lait"}, None, r"the title 'Café au lait' does not make the slug 'caf-au-lait'"),
        ({"title": "Four"}, None, r"title and slug must have 5 to 50 characters, got 'Four' and 'four'"),
        ({"title": "x" * 51}, None, r"title and slug must have 5 to 50 characters"),
        ({"user": "INSERT_KAGGLE_USERNAME"}, None, r"does not begin with a user name: give --user NAME"),
        ({"sources": {"dataset_sources": ["text"]}}, None, r"dataset_sources: expected owner/slug, got 'text'"),
        ({"sources": {"kernel_sources": ["ann/x"]}}, None, r"kernel_sources: expected owner/slug, got 'ann/x'"),
        ({"sources": {"model_sources": ["a/b"]}}, None, r"model_sources: expected owner/model/framework/variation/v"),
        ({}, header("competition_sources: [a/b]"), r"competition_sources: expected slug, got 'a/b'"),
        ({}, header("compettion_sources: [a]"), r"asks for compettion_sources in its header; expected some of: "),
        ({}, top(enable_gpu="true"), r"enable_gpu must be true or false, got 'true'"),
        ({"parameters": {"words": "KGAT_0123456789abcdef"}}, None, r"cell 4 has what looks like a token or key \(KGAT"),
        ({"parameters": {"words": "0123456789abcdef" * 2}}, None, r"cell 4 has what looks like a token or key \(0123"),
        ({"parameters": {"words": "long " * 150_000}}, None, r"the notebook has 7\d\d,\d+ bytes; Kaggle takes 700,000"),
    ],
)  # fmt: skip
def test_what_would_fail_on_kaggle_is_told_before(
    root: Path, options: dict[str, Any], change: Callable[[Path], None] | None, message: str
) -> None:
    kernel = counting(root)
    for name, value in options.items():
        setattr(kernel, name, value)
    if change:
        change(root)
    with pytest.raises(kernels.KernelError, match=message):
        kernel.build()
    assert not (kernel.folder / "kernel-metadata.json").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda made: made.metadata.pop("kernelspec"), r"the notebook names no kernel \(metadata.kernelspec.name\)"),
        (lambda made: made.cells[0].pop("id"), r"the notebook is not valid: .*id"),
        (lambda made: made.cells[0].update(cell_type="poem"), r"the notebook is not valid"),
    ],
)
def test_an_invalid_notebook(root: Path, break_it: Callable[[Any], None], message: str) -> None:
    notebook = notebooks.build(root / "notebooks" / "counting_kaggle_multigpu.py", root / "kaggle_mgpu")
    about = kernels.metadata(root, counting(root), {})
    break_it(notebook)
    with pytest.raises(kernels.KernelError, match=message):
        kernels.validate(notebook, json.dumps(notebook), about)


def test_init_and_a_push_by_hand(kaggle: KaggleServer, root: Path) -> None:
    said = tool(kaggle, root, "init", "--user", "ann", "counting")
    assert f"ann/{SLUG}, notebooks/counting_kaggle_multigpu.ipynb" in said
    assert notebooks.main(["--root", str(root), "build"]) == 0
    command = [sys.executable, "-m", "kaggle", "kernels", "push"]
    done = subprocess.run(command, cwd=root, env=kaggle.environment(), capture_output=True, text=True, timeout=60)
    assert "Kernel version 1 successfully pushed" in done.stdout, done.stdout + done.stderr
    (_, request), *_ = [each for each in kaggle.requests if each[0] == "SaveKernel"]
    assert request["machineShape"] == "NvidiaTeslaT4"
    assert (request["isPrivate"], request["enableGpu"]) == (True, True)
    assert request["competitionDataSources"] == ["counting-numbers"]
    kaggle.account.version(f"ann/{SLUG}").session.wait(60)
    # the user is known from now on
    assert f"ann/{SLUG}: COMPLETE" in tool(kaggle, root, "status", "counting")
    assert "INSERT_KAGGLE_USERNAME" in (ROOT / "kernel-metadata.json").read_text()


def test_init_keeps_the_rest(kaggle: KaggleServer, root: Path) -> None:
    before = json.loads((root / "kernel-metadata.json").read_text())
    tool(kaggle, root, "init", "--user", "ann")
    after = json.loads((root / "kernel-metadata.json").read_text())
    assert after == {**before, "id": "ann/text-generation-kaggle-multigpu"}
    assert "expected the name in the address" in tool(kaggle, root, "init", "--user", "ann/x", code=1)


# There and back
def test_push_status_logs_wait_output(kaggle: KaggleServer, root: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    kaggle.account.add_dataset("bob/some-text", tmp_path / "text")
    said = push(kaggle, root, "seconds=0.4", "words=naïve", "--dataset=bob/some-text")
    assert said == f"ann/{SLUG}: version 1 pushed\nhttps://www.kaggle.com/code/ann/{SLUG}\n"
    assert f"ann/{SLUG}: RUNNING" in tool(kaggle, root, "status", f"ann/{SLUG}")
    assert "another push would start a second session beside it" in push(kaggle, root, code=1)
    lines = tool(kaggle, root, "logs", "counting", "--user", "ann").splitlines()  # live, to the end
    assert "inputs ['competitions/counting-numbers', 'datasets/bob']" in lines
    assert [line for line in lines if line.startswith("step")] == [f"step {i} naïve" for i in range(1, 7)]
    assert lines == tool(kaggle, root, "logs", f"ann/{SLUG}").splitlines()  # and after it
    assert "run/result.json: step 6 of 6, counted" in tool(
        kaggle, root, "wait", "counting", "--user", "ann", "--interval", "0.1"
    )
    folder = root / "runs" / SLUG / "v1"
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"result.json", "state.json", "log.txt"}
    tool(kaggle, root, "output", "counting", "--user", "ann")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    steps = {
        f"run/checkpoints/step-{i:08d}/{name}" for i in range(1, 7) for name in ("model.safetensors", "state.json")
    }
    assert names == {*steps, "run/result.json", "log.txt", "__notebook__.ipynb"}
    assert "step 6 naïve\n" in (folder / "log.txt").read_text(encoding="utf-8")


def test_a_run_that_fails(kaggle: KaggleServer, root: Path) -> None:
    push(kaggle, root, "fail_at=2")
    said = tool(kaggle, root, "wait", f"ann/{SLUG}", "--interval", "0.1", code=1)
    assert "ERROR: no message. The log ends:" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert f"ann/{SLUG}: ERROR" in tool(kaggle, root, "status", f"ann/{SLUG}", code=1)
    # COMPLETE alone is not enough
    push(kaggle, root, "per_session=2")
    said = tool(kaggle, root, "wait", f"ann/{SLUG}", "--interval", "0.1", code=1)
    assert "not finished: push it again" in said
    assert f"ann/{SLUG}: COMPLETE" in tool(kaggle, root, "status", f"ann/{SLUG}")


ESCAPING = """\
# %% tags=["payload"]
# here

# %% tags=["parameters"]
# Parameters of this notebook
# %%
import importlib.util, os, subprocess, sys, time

sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print("child", subprocess.Popen(sleep, start_new_session=True).pid)
print("kaggle", sorted(name for name in os.environ if name.startswith("KAGGLE_") and "MGPU" not in name))
print("planted", "PLANTED" in os.environ, "path", sys.path[-1].endswith("site-packages"), os.environ["PYTHONPATH"])
print("time left", 0 < float(os.environ["KAGGLE_MGPU_SESSION_END"]) - time.time() < 60, flush=True)
time.sleep(600)
"""


def test_the_stand_in_ends_a_session_as_a_container_ends(
    kaggle: KaggleServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "notebooks" / "escaping.py").write_text(ESCAPING)
    kaggle.account.limit = 60.0
    monkeypatch.setenv("PLANTED", "1")
    tool(kaggle, root, "push", "escaping", "--user", "ann")
    session = kaggle.account.version("ann/escaping").session
    wait_until(lambda: any(str(entry["data"]).startswith("time left") for entry in session.log))
    session.limit = 0.0
    session.wait(60)
    assert (session.state, session.killed) == ("ERROR", "limit")
    said = dict(str(entry["data"]).split(" ", 1) for entry in session.log)
    child = Path(f"/proc/{said['child'].strip()}/cmdline")
    assert not child.exists() or child.read_bytes() == b""  # nobody may have asked yet how it ended
    assert session.processes() == []
    assert "'KAGGLE_KERNEL_RUN_TYPE'" in said["kaggle"]
    # what was on the pusher's machine is not there, and the kit came out of the notebook
    assert said["planted"].startswith(f"False path True {session.folder}/tmp/kaggle_mgpu-")
    assert said["time"] == "left True\n"
    assert "__notebook__.ipynb" in session.outputs()
    assert "ERROR: Your notebook was stopped" in tool(kaggle, root, "status", "ann/escaping", code=1)


# Refusals, which the CLI hides behind exit code 0
def test_refusals_are_errors_with_kaggles_own_words(kaggle: KaggleServer, root: Path) -> None:
    kaggle.account.quota_refusal = "Maximum weekly GPU quota of 30.00 hours reached."
    said = push(kaggle, root, code=1)
    assert said == "Kaggle refused the push: Maximum weekly GPU quota of 30.00 hours reached.\n"
    kaggle.account.quota_refusal = ""
    assert push(kaggle, root, user="bob", code=1) == "Kaggle refused the push: Notebook not found\n"
    sources = ("--dataset=bob/no-such-text", "--kernel-source=ann/no-such-kernel")
    said = push(kaggle, root, "seconds=60", *sources, code=1)
    assert "The following are not valid dataset sources and could not be added to the kernel: ['bob/no-such" in said
    assert "The following are not valid kernel sources and could not be added to the kernel: ['ann/no-such" in said
    assert "Version 1 runs without them: stop it at https://www.kaggle.com/code/ann/" in said
    push(kaggle, root, "seconds=60", "--title=Another Count")
    said = push(kaggle, root, "--title=A Third Count", code=1)
    assert said == "Kaggle refused the push: Maximum batch GPU session count of 2 reached.\n"
    assert [v.number for v in kaggle.account.running()] == [1, 1]
    # and what it does not hide
    assert "Cannot access kernel 'ann/no-such-kernel'" in tool(kaggle, root, "status", "ann/no-such-kernel", code=1)
    command = [sys.executable, str(TOOL), "--root", str(root), "push", "counting", "--user", "ann"]
    wrong = {**kaggle.environment(), "KAGGLE_KEY": "0" * 32}
    done = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Authentication required" in done.stderr
    assert "0" * 32 not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("key 0123456789abcdef0123456789abcdef.", "key [secret]."),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer [secret]"),
        ("http://ann:hunter2@proxy:3128/", "http://[secret]@proxy:3128/"),
        ("KGAT_abcdef hf_abcdefghijkl ghp_abcdefghijkl", "[secret] [secret] [secret]"),
        ("step-00000400 of 1000, sha256 " + "a" * 64, "step-00000400 of 1000, sha256 " + "a" * 64),
    ],
)
def test_what_looks_like_a_secret_is_struck_out(text: str, wanted: str) -> None:
    assert kaggle_cli.redacted(text) == wanted


def test_flattened() -> None:
    pieces = [{"stream_name": "stdout", "time": 1.0, "data": text} for text in ("a\n", "b ", 'c "d" é\n')]
    log = json.dumps(pieces)
    assert kaggle_cli.flattened(log) == 'a\nb c "d" é\n'
    assert kaggle_cli.flattened(log[:-30]) == "a\nb "  # a log that was cut off
    assert kaggle_cli.flattened("plain\n") == "plain\n"


# Relays
def relayed(kaggle: KaggleServer, root: Path, *more: str, code: int = 0) -> str:
    return tool(kaggle, root, "relay", "counting", "--user", "ann", "--interval", "0.1", *more, code=code)


def state(root: Path) -> dict[str, Any]:
    return json.loads((root / "build" / "kernels" / SLUG / "relay.json").read_text())


def steps_of(kaggle: KaggleServer, root: Path) -> list[int]:
    """Of the relay's sessions, whose versions must be those that Kaggle has."""
    sessions = state(root)["sessions"]
    assert [session["version"] for session in sessions] == [v.number for v in kaggle.account.kernels[f"ann/{SLUG}"]]
    return [session["step"] for session in sessions]


def test_relay_over_a_dataset(kaggle: KaggleServer, root: Path) -> None:
    """The route that needs nothing of how Kaggle mounts a kernel's own output."""
    kaggle.account.mounts_itself = "nothing"
    said = relayed(kaggle, root, "-p", "goal=4", "-p", "per_session=2", code=1)
    assert "session 2 ended with COMPLETE at step 2, and made no progress: it was 2 before." in said
    assert "It did not go on from what was attached: Kaggle gave it another version's. Try --carry dataset." in said
    assert steps_of(kaggle, root) == [2, 2]
    assert "finished: step 4, after 3 sessions" in relayed(kaggle, root, "--carry", "dataset")
    assert steps_of(kaggle, root) == [2, 2, 4]
    pushes = [request for name, request in kaggle.requests if name == "SaveKernel"]
    assert [request.get("kernelDataSources") or [] for request in pushes] == [[], [f"ann/{SLUG}"], []]
    assert [request.get("datasetDataSources") or [] for request in pushes] == [[], [], [f"ann/{SLUG}-state"]]
    dataset = kaggle.account.datasets[f"ann/{SLUG}-state"]
    assert dataset.private
    (folder,) = dataset.versions
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert names == {f"run/checkpoints/step-0000000{i}/model.safetensors" for i in (1, 2)}
    # once more: it knows that it is finished, and of what
    assert "finished" in relayed(kaggle, root)
    assert len(kaggle.account.kernels[f"ann/{SLUG}"]) == 3
    assert "--anew, or another --title" in relayed(kaggle, root, "-p", "goal=9", code=1)


def test_a_relay_that_is_killed_goes_on(kaggle: KaggleServer, root: Path) -> None:
    """In the middle of a session, and between a push and the note of it."""
    command = [
        sys.executable,
        str(TOOL),
        "--root",
        str(root),
        "relay",
        "counting",
        "--user",
        "ann",
        "--interval",
        "0.1",
    ]
    given = ["-p", "goal=4", "-p", "per_session=2", "-p", "seconds=1"]
    first = subprocess.Popen([*command, *given], env=kaggle.environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "session 1: version 1" not in first.stdout.readline():
        assert first.poll() is None
    busy = relayed(kaggle, root, code=1)
    first.kill()
    first.communicate()
    assert busy == f"another relay of ann/{SLUG} is at work on this machine\n"
    path = root / "build" / "kernels" / SLUG / "relay.json"
    unsure = state(root)
    unsure["sessions"][0] |= {"version": None, "state": "PUSHING"}
    path.write_text(json.dumps(unsure))
    said = relayed(kaggle, root)
    assert "session 1 had been pushed" in said
    assert "finished: step 4, after 2 sessions" in said
    assert steps_of(kaggle, root) == [2, 4]
    # a push that never arrived
    unsure = state(root)
    unsure["parameters"]["goal"] = 5
    unsure["sessions"][1]["finished"] = False
    unsure["sessions"].append({"number": 3, "state": "PUSHING"})
    path.write_text(json.dumps(unsure))
    assert "finished: step 5, after 3 sessions" in relayed(kaggle, root)
    assert steps_of(kaggle, root) == [2, 4, 5]


def test_what_a_relay_stops_for_and_how_it_goes_on(kaggle: KaggleServer, root: Path) -> None:
    kaggle.account.quota_refusal = "Maximum weekly GPU quota of 30.00 hours reached."
    said = relayed(kaggle, root, "-p", "goal=4", "-p", "per_session=2", "-p", "fail_at=3", code=1)
    assert "stopped: Kaggle refused the push: Maximum weekly GPU quota of 30.00 hours reached.\nThe same" in said
    assert kaggle.account.kernels == {}
    kaggle.account.quota_refusal = ""
    # by itself: an error in the notebook, even after progress
    said = relayed(kaggle, root, code=1)
    assert "it had stopped: Kaggle refused" in said
    assert "stopped: session 2 ended with ERROR, by an error of its own. The log ends:" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert steps_of(kaggle, root) == [2, 3]
    # what is mended goes on where it was: here the notebook that always fails at step 3 no longer does
    source = root / "notebooks" / "counting_kaggle_multigpu.py"
    source.write_text(COUNTING.replace("if step == fail_at", "if False"))
    assert "finished: step 4, after 3 sessions" in relayed(kaggle, root)


def test_a_relay_leaves_somebody_elses_session_alone(kaggle: KaggleServer, root: Path) -> None:
    push(kaggle, root, "seconds=60")
    said = relayed(kaggle, root, code=1)
    assert f"ann/{SLUG} is RUNNING, with a session that is not this relay's: wait for it" in said
    assert state(root)["sessions"] == []
    assert len(kaggle.account.running()) == 1


def test_sweep(kaggle: KaggleServer, root: Path) -> None:
    given = ["sweep", "counting", "--user", "ann", "-p", "goal=[2,3,4]", "-p", "words=w", "--interval", "0.1"]
    said = tool(kaggle, root, *given, "--push")
    rows = ["| goal | finished | step | best | loss | seconds |", "|---|---|---|---|---|---|"]
    rows += [f"| {goal} | yes | {goal} |  | {1 / goal:.4g} |  |" for goal in (2, 3, 4)]
    assert "\n".join(rows) in said
    assert sorted(kaggle.account.kernels) == [f"ann/{SLUG}-sweep-{i}" for i in (1, 2, 3)]
    began = [v.session for versions in kaggle.account.kernels.values() for v in versions]
    assert len(began) == 3
    # again: nothing is pushed twice
    said = tool(kaggle, root, *given, "--push")
    assert said.count("pushed before with the same content") == 3
    assert "\n".join(rows) in said
    assert "expected a list of values to sweep over" in tool(kaggle, root, *given[:4], "-p", "goal=3", code=1)


def test_sweep_here(kaggle: KaggleServer, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = root / "notebooks" / "counting_kaggle_multigpu.py"
    source.write_text(COUNTING.replace('os.environ["KAGGLE_MGPU_KAGGLE_ROOT"]', repr(str(tmp_path))))
    said = tool(kaggle, root, "sweep", "counting", "--user", "ann", "-p", "goal=[2,3]", "-p", "fail_at=2", code=1)
    assert "| 2 | yes | 2 |  | 0.5 |  |\n| 3 | no | 2 |  |  |  |" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert (root / "runs" / SLUG / "sweep.md").read_text() in said


# The real notebooks
@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository, with a build and a runs folder of its own."""
    root = tmp_path_factory.mktemp("house")
    for name in ("kaggle_mgpu", "notebooks"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "kernel-metadata.json", root)
    return root


@dataclass
class Tiny:
    """How to run a notebook in seconds: its parameters, and what is mounted by path under /kaggle/input."""

    parameters: dict[str, Any]
    inputs: Callable[[Path], None] = lambda folder: None
    """Fills the folder of a dataset that the notebook then gets: for what it does not make up itself."""
    leaves: tuple[str, ...] = ()
    """Files, by their end, that must be in the output beside result.json."""


def corpus(folder: Path) -> None:
    (folder / "corpus.txt").write_text(
        "\n".join(f"Line {i} of a text: {i * i} is the square of {i}." for i in range(600))
    )


TEXT = {
    "tokenizer": "byte", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "global_batch_size": 8,
    "eval_every": "end", "max_new_tokens": 20, "prompts": ["Line"], "lr": 1e-2,
}  # fmt: skip
TINY = {
    "text_generation": Tiny({**TEXT, "max_steps": 6}, corpus, ("model.safetensors", "metrics.jsonl")),
}


@pytest.mark.parametrize("notebook", [source.stem for source in notebooks.sources(ROOT, [])])
def test_every_notebook_there_and_back(kaggle: KaggleServer, house: Path, tmp_path: Path, notebook: str) -> None:
    """Pushed with the CLI, run on two processes as Kaggle runs it, fetched with the CLI."""
    name = notebook.removesuffix("_kaggle_multigpu")
    assert name in TINY, f"{notebook} has no entry in TINY above: give it parameters with which it runs in seconds"
    tiny = TINY[name]
    (tmp_path / "input").mkdir()
    tiny.inputs(tmp_path / "input")
    kaggle.account.add_dataset("bob/its-input", tmp_path / "input")
    kernel = kernels.kernel_from(house, notebook, "ann")
    kernel.build()
    needs = json.loads((kernel.folder / "kernel-metadata.json").read_text())
    for competition in needs["competition_sources"]:
        kaggle.account.competitions[competition] = tmp_path / "input"
    for dataset in needs["dataset_sources"]:
        kaggle.account.add_dataset(dataset, tmp_path / "input")
    given = {"nproc": 2, **tiny.parameters}
    parameters = [text for each, value in given.items() for text in ("-p", f"{each}={value!r}")]
    tool(kaggle, house, "push", notebook, "--user", "ann", "--dataset", "bob/its-input", *parameters)
    session = kaggle.account.version(kernel.id).session
    session.wait(300)
    assert f"{kernel.id}: COMPLETE" in tool(kaggle, house, "status", kernel.id), kaggle_cli.flattened(
        session.log_text()
    )
    tool(kaggle, house, "output", kernel.id)
    folder = kernel.results()
    outcome = kernels.Outcome.of(folder)
    assert outcome.finished, outcome.text
    assert all(result.get("world_size", 2) == 2 for result in outcome.results.values()), outcome.results
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) < 500
    for end in tiny.leaves:
        assert any(file.endswith(end) for file in files), files
    executed = nbformat.read(folder / "__notebook__.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]


def test_no_notebook_is_forgotten() -> None:
    assert not set(TINY) - {source.stem.removesuffix("_kaggle_multigpu") for source in notebooks.sources(ROOT, [])}


@pytest.fixture(scope="module")
def kaggles_stack() -> Path:
    """A folder that puts the papermill, nbclient, nbformat, ipykernel and IPython of Kaggle's image before newer ones.

    Made once (half a minute) under build/environments; everything else is this environment's.
    """
    wanted = [*env_matrix.STACKS["kaggle"], "nbformat==5.10.4"]
    digest = hashlib.sha256(f"{wanted} {sys.version}".encode()).hexdigest()[:12]
    folder = ROOT / "build" / "environments" / f"notebook-stack-{digest}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if re.search(r"No matching distribution|Connection|Name or service|Temporary failure|timed out", done.stderr):
            pytest.skip(f"no package registry answers: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    return folder


def test_on_kaggles_notebook_stack(kaggle: KaggleServer, house: Path, kaggles_stack: Path) -> None:
    """The other tests run on the newest stack, this one on what Kaggle's image has."""
    kaggle.account.session_variables = {"PYTHONPATH": str(kaggles_stack)}
    code = "import papermill, nbclient, nbformat, ipykernel, IPython as i; print(*(m.__version__ for m in (papermill, "
    code += "nbclient, nbformat, ipykernel, i)))"
    variables = {**os.environ, "PYTHONPATH": str(kaggles_stack)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2.7.0", "0.5.13", "5.10.4", "6.17.1", "7.34.0"], done.stderr
    given = {**TEXT, "nproc": 2, "max_steps": 6}
    parameters = [text for name, value in given.items() for text in ("-p", f"{name}={value!r}")]
    tool(kaggle, house, "push", "text_generation", "--user", "ann", "--title", "Older Stack", *parameters)
    said = tool(kaggle, house, "wait", "ann/older-stack", "--interval", "0.3")
    assert "text_generation/result.json: step 6 of 6, finished" in said


KEY = "fedcba9876543210" * 2
SECRETS = {"KAGGLE_USER_SECRETS_TOKEN": "eyJhbGciOiJ.user-secret.signature", "WANDB_API_KEY": "planted-wandb-0123"}


def planted_in(*folders: Path) -> list[str]:
    """Files under the folders that hold one of the planted secrets, in clear or base64 (of notebooks' payloads)."""
    secrets = [value.encode() for value in (KEY, *SECRETS.values())]
    secrets += [base64.b64encode(f"ann:{KEY}".encode())]
    return [
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    ]


STEPS = 1200


def test_a_relay_is_one_run(kaggle: KaggleServer, house: Path, tmp_path: Path) -> None:
    """At least four sessions, two of them killed in the middle of a save: the weights of one unlimited session.

    And nowhere, in no notebook, log, record or message, is the API key or a secret of the session.
    """
    account = kaggle.account
    account.key, account.session_variables = KEY, SECRETS
    (tmp_path / "input").mkdir()
    corpus(tmp_path / "input")
    account.add_dataset("bob/its-input", tmp_path / "input")
    settings = {**TEXT, "nproc": 2, "max_steps": STEPS, "save_every": 10, "keep_last": 2, "log_every": 100}
    given = [text for name, value in settings.items() for text in ("-p", f"{name}={value!r}")]
    given += ["--user", "ann", "--dataset", "bob/its-input"]
    tool(kaggle, house, "push", "text_generation", "--title", "Unlimited Run", *given)
    unlimited = account.version("ann/unlimited-run").session
    unlimited.wait(300)
    assert unlimited.state == "COMPLETE", unlimited.log_text()

    # The kit stops by itself after half of the time that all of it took here and now; the second and third are killed
    account.kill_in_save = {2, 3}
    seconds = json.loads((unlimited.working / "text_generation" / "result.json").read_text())["seconds"] / 2
    relay_command = ["relay", "text_generation", "--title", "Relayed Run", "--interval", "0.3"]
    said = tool(kaggle, house, *relay_command, "-p", f"time_limit={seconds:.2f}", *given, timeout=600)
    sessions = [version.session for version in account.kernels["ann/relayed-run"]]
    assert len(sessions) >= 4
    assert [session.killed for session in sessions] == ["", "save", "save", *([""] * (len(sessions) - 3))]
    for killed in sessions[1:3]:
        assert any(name.startswith(".writing-step-") for name in killed.left_by_the_kill)
    assert "session 2 ended: ERROR" in said
    assert f"finished: step {STEPS}, after {len(sessions)} sessions" in said
    fetched = house / "runs" / "relayed-run" / f"v{len(sessions)}" / "text_generation"
    whole = unlimited.working / "text_generation"
    assert (fetched / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert progress.comparable(progress.read(fetched)) == progress.comparable(progress.read(whole))
    folders = [session.folder for session in (unlimited, *sessions)]
    assert planted_in(house / "build", house / "runs", *folders) == []


def test_what_a_failing_run_says_holds_no_secret(kaggle: KaggleServer, house: Path) -> None:
    """An error in a worker process, with its traceback, told of by `wait`; and the CLI's own errors."""
    account = kaggle.account
    account.key, account.session_variables = KEY, SECRETS
    given = {**TEXT, "nproc": 2, "max_steps": 50, "log_every": 1, "lr": 1e30, "precision": "fp32"}
    parameters = [text for name, value in given.items() for text in ("-p", f"{name}={value!r}")]
    tool(kaggle, house, "push", "text_generation", "--user", "ann", "--title", "Failing Run", *parameters)
    said = tool(kaggle, house, "wait", "ann/failing-run", "--interval", "0.3", code=1)
    assert "DivergedError" in said
    tool(kaggle, house, "output", "ann/failing-run")
    account.key = "0" * 32  # so that Kaggle refuses the planted one
    environment = {**kaggle.environment(), "KAGGLE_KEY": KEY, "HTTPS_PROXY": f"http://ann:{KEY}@127.0.0.1:9"}
    for command in ("push", "status", "logs", "output"):
        done = subprocess.run(
            [sys.executable, str(TOOL), "--root", str(house), command, "text_generation", "--user", "ann"],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        said += done.stdout + done.stderr
    assert not [value for value in (KEY, *SECRETS.values()) if value in said]
    session = account.version("ann/failing-run").session
    assert planted_in(house / "build", house / "runs", session.folder) == []
