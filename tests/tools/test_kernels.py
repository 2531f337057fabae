"""tools/kernels.py with the real kaggle CLI against tests/kaggle_server: pushes, refusals, results, sweeps."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

import kaggle_cli
import kernel as kernels
import library
import notebooks
import sweep
from kaggle_cli import KaggleError
from kaggle_server import KaggleServer
from kaggle_server.at_work import COUNTING, ROOT, SLUG, TOOL, counting, push, tool, wait_until
from kernels import main as tools_main

pytestmark = pytest.mark.kaggle


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
        "gate, fail_at, words, output_dir. Its Config also takes: epochs, save_every.\n"
    )
    assert "-p: expected name=value, got 'goal'" in push(kaggle, root, "goal", code=1)
    twice = "-p goal=… is given twice; a sweep takes a list: -p goal=[1,2]\n"
    assert push(kaggle, root, "goal=1", "goal=2", code=1) == twice
    assert kaggle.requests == []


@pytest.mark.parametrize(
    ("parameter", "said"),
    [("epochs=many", "Config.epochs: expected int, got 'many'"), ("lr=-1", "Config.lr: expected 0.0 or more, got -1")],
)
def test_a_value_that_the_config_does_not_take(kaggle: KaggleServer, house: Path, parameter: str, said: str) -> None:
    refused = tool(kaggle, house, "push", "text_generation", "--user", "ann", "-p", parameter, code=1)
    assert refused.startswith(f"text_generation_kaggle_multigpu.py: {said}")
    assert kaggle.requests == []


def test_the_values_of_a_sweep_are_all_tried_before_the_first_run(kaggle: KaggleServer, house: Path) -> None:
    refused = tool(kaggle, house, "sweep", "text_generation", "-p", "lr=[1e-3,-1]", code=1)
    assert refused == "text_generation_kaggle_multigpu.py: Config.lr: expected 0.0 or more, got -1.0\n"


def test_a_name_that_is_a_part_of_several(root: Path) -> None:
    notebook = notebooks.build(root / "notebooks" / "counting_kaggle_multigpu.py", root / "kaggle_mgpu")
    with pytest.raises(notebooks.NotebookError, match=r"no parameter 'session'\. Did you mean 'per_session'"):
        notebooks.check_names(notebook, ["session"], "it")


def test_questions_that_cannot_be(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--interval", "-1"), ("--interval", "nan"), ("--version", "0")):
        with pytest.raises(SystemExit):
            tools_main(["--root", str(root), "wait", "counting", flag, value])
        assert f"argument {flag}: expected a number above 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), ("{x", "Expecting property"), ("[]", "got list")]
)
def test_the_metadata_at_the_top_is_not_written_over(root: Path, capsys: Any, content: str | None, says: str) -> None:
    path = root / "kernel-metadata.json"
    path.unlink() if content is None else path.write_text(content)
    for command in (["init", "--user", "ann"], ["push", "counting", "--user", "ann"]):
        assert tools_main(["--root", str(root), *command]) == 1
        said = capsys.readouterr().err
        assert str(path) in said and says in said
    assert (path.read_text() if path.exists() else None) == content


@pytest.mark.parametrize(
    ("text", "seconds"), [("5400", 5400), ("45m", 2700), ("11h30m", 41400), ("90s", 90), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert kernels.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "3d", "-1", "1..5h", "h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(kernels.KernelError, match="expected seconds, or a duration such as 45m"):
        kernels.duration(text)


def test_a_push_for_a_tpu_says_what_it_gets(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in {"quota": None, "status_if_any": None, "push": kaggle_cli.Pushed(1, "url")}.items():
        monkeypatch.setattr(kaggle_cli, name, lambda *_, answer=answer: answer)
    header("machine_shape: TpuV5E8")(root)
    assert tools_main(["--root", str(root), "push", "counting", "--user", "ann"]) == 0
    assert "TPU: Kaggle gives pushed notebooks an image without TPU libraries" in capsys.readouterr().out


def test_a_folder_that_is_a_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "build").touch()
    assert tools_main(["--root", str(root), "relay", "counting", "--user", "ann"]) == 1
    assert capsys.readouterr().err.startswith("NotADirectoryError: [Errno 20] Not a directory: ")


def test_whose_kernel(kaggle: KaggleServer, root: Path) -> None:
    said = tool(kaggle, root, "push", "counting", code=1)
    assert "whose kernel? Give --user NAME, or once and for all: python tools/kernels.py init --user NAME" in said


HEX = "0123456789abcdef" * 2


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
        ({}, top(machine_shape="NvidiaTeslaP100"), r"Kaggle has no P100 any more: NvidiaTeslaT4 is two T4s"),
        ({"parameters": {"words": "KGAT_0123456789abcdef"}}, None, r"cell 4 has what looks like a token or key \(KGAT"),
        ({"parameters": {"words": "api_key=" + HEX}}, None, r"cell 4 has what looks like a token or key \(0123"),
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


def test_no_secret_goes_with_the_files_or_the_metadata(root: Path) -> None:
    notebook = notebooks.build(root / "notebooks" / "counting_kaggle_multigpu.py", root / "kaggle_mgpu")
    assert kernels.secrets_in(notebook, {}) == []
    token = {"token": "KGAT_" + HEX}
    notebook.metadata["x"], notebook.cells[0].metadata["x"] = token, token
    (root / "kaggle_mgpu" / "scratch.py").write_text(f"given = {token}")  # an untracked file, say
    notebook.cells[1].source = notebooks.payload_source(notebooks.package_files(root / "kaggle_mgpu"))
    notebook.cells[1].source += f"\nkey = {token}"
    places = ["kaggle_mgpu/scratch.py", "cell 2", "the notebook's metadata", "the metadata of cell 1"]
    assert sorted(text.split(" has what looks")[0] for text in kernels.secrets_in(notebook, {})) == sorted(places)


def test_no_secret_goes_with_the_wheel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaggle_cli, "push", lambda *_: pytest.fail("pushed"))
    wheel = root / "kaggle_mgpu-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kaggle_mgpu/scratch.py", f"x = 'KGAT_{HEX}'")
    with pytest.raises(kernels.KernelError, match=r"kaggle_mgpu/scratch\.py has what looks like a token or key \(KGAT"):
        library.push(root, "ann", wheel, 1, print)


def test_papermills_notes_of_an_earlier_run_stay_here(tmp_path: Path) -> None:
    noted = {"papermill": {"parameters": {"token": "x"}, "input_path": str(tmp_path)}}
    cell = nbformat.v4.new_code_cell("1", metadata=noted)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=noted), tmp_path / "own.ipynb")
    assert "papermill" not in notebooks.dumps(notebooks.load(tmp_path / "own.ipynb", tmp_path))


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
    done = subprocess.run(command, cwd=root, env=kaggle.environment(), capture_output=True, text=True, timeout=600)
    assert "Kernel version 1 successfully pushed" in done.stdout, done.stdout + done.stderr
    (_, request), *_ = [each for each in kaggle.requests if each[0] == "SaveKernel"]
    assert request["machineShape"] == "NvidiaTeslaT4"
    assert (request["isPrivate"], request["enableGpu"]) == (True, True)
    assert request["competitionDataSources"] == ["counting-numbers"]
    kaggle.account.version(f"ann/{SLUG}").session.wait(600)
    # the user is known from now on
    assert f"ann/{SLUG}: COMPLETE" in tool(kaggle, root, "status", "counting")
    assert "INSERT_KAGGLE_USERNAME" in (ROOT / "kernel-metadata.json").read_text()


def test_init_keeps_the_rest(kaggle: KaggleServer, root: Path) -> None:
    before = json.loads((root / "kernel-metadata.json").read_text())
    tool(kaggle, root, "init", "--user", "ann")
    after = json.loads((root / "kernel-metadata.json").read_text())
    assert after == {**before, "id": "ann/text-generation-kaggle-multigpu"}
    for nobody in ("ann/x", "", "INSERT_KAGGLE_USERNAME"):
        assert "expected the name in the address" in tool(kaggle, root, "init", "--user", nobody, code=1)


# There and back
def test_push_status_logs_wait_output(kaggle: KaggleServer, root: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    kaggle.account.add_dataset("bob/some-text", tmp_path / "text")
    said = push(kaggle, root, f"gate={tmp_path / 'gate'}", "words=naïve", "--dataset=bob/some-text")
    assert said == f"ann/{SLUG}: version 1 pushed\nhttps://www.kaggle.com/code/ann/{SLUG}\n"
    assert f"ann/{SLUG}: RUNNING" in tool(kaggle, root, "status", f"ann/{SLUG}")
    assert "another push would start a second session beside it" in push(kaggle, root, code=1)
    command = [sys.executable, str(TOOL), "--root", str(root), "logs", "counting", "--user", "ann"]
    with subprocess.Popen(command, env=kaggle.environment(), stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout is not None
        lines = list(itertools.takewhile(lambda line: line != "starting at 0\n", live.stdout))
        (tmp_path / "gate").touch()  # the session is still at the beginning
        lines = [line.rstrip("\n") for line in [*lines, "starting at 0\n", *live.stdout]]  # to the end
    assert live.returncode == 0
    assert "inputs ['competitions/counting-numbers', 'datasets/bob']" in lines
    assert [line for line in lines if line.startswith("step")] == [f"step {i} naïve" for i in range(1, 7)]
    assert lines == tool(kaggle, root, "logs", f"ann/{SLUG}").splitlines()  # and after it
    assert "run/result.json: step 6 of 6, counted" in tool(
        kaggle, root, "wait", "counting", "--user", "ann", "--interval", "1.5"
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
    said = tool(kaggle, root, "wait", f"ann/{SLUG}", "--interval", "1.5", code=1)
    assert "ERROR: no message. The log ends:" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert f"ann/{SLUG}: ERROR" in tool(kaggle, root, "status", f"ann/{SLUG}", code=1)
    # COMPLETE alone is not enough
    push(kaggle, root, "per_session=2")
    said = tool(kaggle, root, "wait", f"ann/{SLUG}", "--interval", "1.5", code=1)
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
print("time left", 0 < float(os.environ["KAGGLE_MGPU_SESSION_END"]) - time.time() < 600, flush=True)
time.sleep(600)
"""


def test_the_stand_in_ends_a_session_as_a_container_ends(
    kaggle: KaggleServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "notebooks" / "escaping.py").write_text(ESCAPING)
    kaggle.account.limit = 600.0
    monkeypatch.setenv("PLANTED", "1")
    tool(kaggle, root, "push", "escaping", "--user", "ann")
    session = kaggle.account.version("ann/escaping").session
    wait_until(lambda: any(str(entry["data"]).startswith("time left") for entry in session.log))
    session.limit = 0.0
    session.wait(600)
    assert (session.state, session.killed) == ("ERROR", "limit")
    said = dict(str(entry["data"]).split(" ", 1) for entry in session.log)
    child = Path(f"/proc/{said['child'].strip()}/cmdline")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        assert child.read_bytes() == b""  # nobody may have asked yet how it ended
    assert session.processes() == []
    assert "'KAGGLE_KERNEL_RUN_TYPE'" in said["kaggle"]
    # what was on the pusher's machine is not there, and the kit came out of the notebook
    assert said["planted"].startswith(f"False path True {session.temporary.name}/")
    assert said["time"] == "left True\n"
    assert "__notebook__.ipynb" in session.outputs()
    assert "ERROR: Your notebook was stopped" in tool(kaggle, root, "status", "ann/escaping", code=1)


# Refusals, which the CLI hides behind exit code 0
def test_refusals_are_errors_with_kaggles_own_words(kaggle: KaggleServer, root: Path) -> None:
    kaggle.account.quota_hours = [0.1, 30.0]
    said = push(kaggle, root, code=1)
    assert said.startswith("not pushed: the week's GPU quota has 0.1 h left, and a session needs 0.5; ")
    kaggle.account.quota_refusal = "Maximum weekly GPU quota of 30.00 hours reached."
    said = push(kaggle, root, code=1)
    assert said == "Kaggle refused the push: Maximum weekly GPU quota of 30.00 hours reached.\n"
    kaggle.account.quota_refusal = ""
    assert push(kaggle, root, user="bob", code=1) == "Kaggle refused the push: Notebook not found\n"
    sources = ("--dataset=bob/no-such-text", "--kernel-source=ann/no-such-kernel")
    said = push(kaggle, root, "gate=never", *sources, code=1)
    assert "The following are not valid dataset sources and could not be added to the kernel: ['bob/no-such" in said
    assert "The following are not valid kernel sources and could not be added to the kernel: ['ann/no-such" in said
    assert "Version 1 runs without them: stop it at https://www.kaggle.com/code/ann/" in said
    push(kaggle, root, "gate=never", "--title=Another Count")
    said = push(kaggle, root, "--title=A Third Count", code=1)
    assert said == "Kaggle refused the push: Maximum batch GPU session count of 2 reached.\n"
    assert [v.number for v in kaggle.account.running()] == [1, 1]
    # and what it does not hide
    assert "Cannot access kernel 'ann/no-such-kernel'" in tool(kaggle, root, "status", "ann/no-such-kernel", code=1)
    command = [sys.executable, str(TOOL), "--root", str(root), "push", "counting", "--user", "ann"]
    wrong = {**kaggle.environment(), "KAGGLE_KEY": "0" * 32}
    done = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "no Kaggle credentials. Run `kaggle auth login`" in done.stderr
    assert "0" * 32 not in done.stdout + done.stderr
    # without any: at once, and without the page on how to sign up
    nobody = {name: value for name, value in wrong.items() if name not in ("KAGGLE_USERNAME", "KAGGLE_KEY")}
    for asking in ("logs", "wait"):
        command[4] = asking
        done = subprocess.run(command, env=nobody, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "no Kaggle credentials. Run `kaggle auth login`" in done.stderr


def test_wait_for_what_is_not_there_ends_at_once(
    kaggle: KaggleServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tool(kaggle, root, "wait", "ann/no-such-kernel", code=1)
    assert said.startswith("kaggle kernels status: Cannot access kernel 'ann/no-such-kernel'")
    assert said.count("\n") == 1
    # but a network that fails is waited for, and a kernel that was there, or was just pushed, too
    asked: list[Any] = [KaggleError("no answer"), kaggle_cli.Status("RUNNING"), KaggleError("Cannot access kernel")]
    asked += [kaggle_cli.Status("COMPLETE")]

    def status(_: str) -> kaggle_cli.Status:
        if isinstance(answer := asked.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(kaggle_cli, "status", status)
    monkeypatch.setattr(kernels.time, "sleep", lambda _: None)
    assert kernels.wait_for("ann/x", 60, print).state == "COMPLETE"
    asked += [KaggleError("Cannot access kernel"), kaggle_cli.Status("RUNNING"), kaggle_cli.Status("ERROR")]
    assert kernels.wait_for("ann/x", 60, print, just_pushed=True).state == "ERROR"


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


# What came out
def said(folder: Path, finished: bool, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"finished": finished, "step": step}))


def test_the_runs_own_result_decides(tmp_path: Path) -> None:
    assert kernels.Outcome.of(tmp_path).text == "there is no result.json"
    said(tmp_path / "run" / "stage1", True, 5)
    (tmp_path / "run" / "stage2" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "stage2" / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    outcome = kernels.Outcome.of(tmp_path)  # killed in the second stage
    assert (outcome.finished, outcome.step) == (False, 8)
    assert "there is no result.json of the run itself: it was ended in a stage" in outcome.text
    said(tmp_path / "run", True, 10)
    outcome = kernels.Outcome.of(tmp_path)
    assert (outcome.finished, outcome.step) == (True, 10)
    assert list(outcome.results) == ["run/result.json", "run/stage1/result.json"]
    for wrong in ("x", "NaN", [1], 1e400, None, True):  # a file of somebody else's may say anything
        said(tmp_path / "run" / "other" / "stage", True, wrong)  # type: ignore[arg-type]
        assert kernels.Outcome.of(tmp_path).step == 10
    said(tmp_path / "run" / "compare", False, 3)
    assert kernels.Outcome.of(tmp_path).finished
    said(tmp_path / "other", False, 1)
    assert not kernels.Outcome.of(tmp_path).finished
    said(tmp_path, True, 11)
    assert kernels.Outcome.of(tmp_path).finished and kernels.Outcome.of(tmp_path).step == 11


def test_the_result_is_looked_for_where_output_dir_is(root: Path, tmp_path: Path) -> None:
    said(tmp_path / "runs" / "a", True, 4)
    assert not kernels.Outcome.of(tmp_path).finished
    for given in ("runs/a", "./runs/a/", "/kaggle/working/runs/a"):
        assert counting(root, output_dir=given).outcome(tmp_path).finished
    kernel = counting(root)
    kernels.write_json(kernel.record, {"parameters": {"output_dir": "runs/a"}})
    assert kernel.outcome(tmp_path).finished
    kernels.write_json(kernel.record, {"parameters": {"output_dir": "runs"}})
    assert not kernel.outcome(tmp_path).finished


def test_predicted_volumes_are_progress(tmp_path: Path) -> None:
    said(tmp_path / "run", False, 9)
    kernels.write_json(tmp_path / "run" / "predictions" / "count.json", {"predicted": 3})
    assert kernels.Outcome.of(tmp_path).predicted == 3
    assert re.search(kernels.SMALL, "run/predictions/count.json")


def test_wait_right_after_a_push_does_not_believe_the_session_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = counting(root)
    assert not kernel.just_pushed
    monkeypatch.setattr(kaggle_cli, "status_if_any", lambda _: None)
    monkeypatch.setattr(kaggle_cli, "push", lambda *_: kaggle_cli.Pushed(2, "url"))
    kernel.push()
    assert kernel.just_pushed
    monkeypatch.setattr(kaggle_cli, "versions_are_heeded", lambda: False)  # by a newer CLI the version is named
    states = iter(["COMPLETE", "QUEUED", "RUNNING", "ERROR"])
    monkeypatch.setattr(kaggle_cli, "status", lambda _: kaggle_cli.Status(next(states)))
    monkeypatch.setattr(kaggle_cli, "output", lambda *_: [])
    monkeypatch.setattr(kernels.time, "sleep", lambda _: None)
    assert tools_main(["--root", str(root), "wait", kernel.id, "--interval", "60"]) == 1
    assert next(states, "") == ""
    kernels.write_json(kernel.record, {**kernels.read_json(kernel.record), "time": 0.0})
    assert not kernel.just_pushed


# Sweeps
def test_sweep(kaggle: KaggleServer, root: Path) -> None:
    given = ["sweep", "counting", "--user", "ann", "-p", "goal=[2,3,4]", "-p", "words=w", "--interval", "1.5"]
    kaggle.account.quota_hours = [0.9, 0.9, 0.4]
    said = tool(kaggle, root, *given, "--push", code=1)
    assert "0.9 h left, 0.5 of them for sessions that run, and a session needs 0.5" in said
    assert "trying again when a session has ended" in said
    assert "the week's GPU quota has 0.4 h left, and a session needs 0.5; " in said
    assert "left for later, when the same command goes on: goal=3; goal=4\n" in said
    assert list(kaggle.account.kernels) == [f"ann/{SLUG}-sweep-1"]
    kaggle.account.quota_hours = []
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
    assert "such as -p lr=[3e-4,1e-3], got goal=3\n" in tool(kaggle, root, *given[:4], "-p", "goal=3", code=1)


def test_a_sweep_takes_each_value_once_and_each_run_its_folder(root: Path) -> None:
    names, settings = sweep.points({"a": [1, 2, 1], "b": [[3], [3]], "c": "x"})
    assert (names, settings) == (["a", "b"], [{"a": a, "b": [3], "c": "x"} for a in (1, 2)])
    for outside in ("/runs", "../run"):
        kernel = counting(root, goal=[1, 2], output_dir=outside)
        with pytest.raises(kernels.KernelError, match=f"expected a relative output_dir, got '{outside}'"):
            sweep.run(kernel, push=False, interval=60)


def test_sweep_here(kaggle: KaggleServer, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = root / "notebooks" / "counting_kaggle_multigpu.py"
    source.write_text(COUNTING.replace('os.environ["KAGGLE_MGPU_KAGGLE_ROOT"]', repr(str(tmp_path))))
    said = tool(kaggle, root, "sweep", "counting", "--user", "ann", "-p", "goal=[2,3]", "-p", "fail_at=2", code=1)
    assert "| 2 | yes | 2 |  | 0.5 |  |\n| 3 | no | 2 |  |  |  |" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert (root / "runs" / SLUG / "sweep.md").read_text() in said


def test_a_sweep_does_not_take_a_session_that_failed_after_training_for_finished(
    kaggle: KaggleServer, root: Path, tmp_path: Path
) -> None:
    source = root / "notebooks" / "counting_kaggle_multigpu.py"
    content = COUNTING + '\n# %%\nraise OSError("no picture of it")\n'
    source.write_text(content)
    given = ["sweep", "counting", "--user", "ann", "-p", "goal=[2]", "--interval", "1.5"]
    assert "| 2 | no | 2 |  | 0.5 |  |" in tool(kaggle, root, *given, "--push", code=1)
    source.write_text(content.replace('os.environ["KAGGLE_MGPU_KAGGLE_ROOT"]', repr(str(tmp_path))))
    assert "| 2 | no | 2 |  | 0.5 |  |" in tool(kaggle, root, *given, code=1)


def test_the_table_of_a_sweep_has_the_runs_own_metrics() -> None:
    results = {"run/result.json": {"metrics": {"loss": 1}}, "run/stage1/result.json": {"metrics": {"loss": 2}}}
    shown = sweep.table(["lr"], [{"lr": 1}], [kernels.Outcome(True, 5, "", results)])
    assert shown.splitlines()[2] == "| 1 | yes | 5 |  | 1 |  |"
    shown = sweep.table(["words"], [{"words": "a|b"}], [kernels.Outcome(True, 5, "", results)])
    assert shown.splitlines()[2].startswith(r"| 'a\|b' | yes |")


def test_a_sweep_here_finds_files_by_the_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    given = {"data_path": "in/a.txt", "output_dir": "in/a.txt", "lr": 1e-3, "tokenizer": "in", "other": "in/none.txt"}
    assert sweep._from_here(given) == {**given, "data_path": str(tmp_path / "in" / "a.txt")}
