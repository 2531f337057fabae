"""tools/relay.py with the real kaggle CLI: many sessions, one run. And no secret in anything that is left behind."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kaggle_cli
import kernel as kernels
import relay
from kaggle_mgpu import progress
from kaggle_mgpu.progress.records import comparable
from kaggle_mgpu.recipes.surface_segmentation import synthetic
from kaggle_server import KaggleServer
from kaggle_server.at_work import COUNTING, ROOT, SLUG, TEXT, TOOL, corpus, counting, flags, push, tool
from kernels import main as tools_main

pytestmark = pytest.mark.kaggle


def relayed(kaggle: KaggleServer, root: Path, *more: str, code: int = 0) -> str:
    return tool(kaggle, root, "relay", "counting", "--user", "ann", "--interval", "1.5", *more, code=code)


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
    assert [request.get("kernelDataSources") or [] for request in pushes] == [[], [f"ann/{SLUG}/1"], []]
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


def test_a_relay_that_is_killed_goes_on(kaggle: KaggleServer, root: Path, tmp_path: Path) -> None:
    """In the middle of a session, and between a push and the note of it."""
    command = [sys.executable, str(TOOL), "--root", str(root), "relay", "counting", "--user", "ann"]
    given = ["--interval", "0.1", "-p", "goal=4", "-p", "per_session=2", "-p", f"gate={tmp_path / 'gate'}"]
    first = subprocess.Popen([*command, *given], env=kaggle.environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "session 1: version 1" not in first.stdout.readline():
        assert first.poll() is None
    busy = relayed(kaggle, root, code=1)
    first.kill()
    first.communicate()
    (tmp_path / "gate").touch()
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
    kaggle.account.quota_hours = [0.2, 0.2, 30.0]  # used up, and then renewed
    said = relayed(kaggle, root, "-p", "goal=4", "-p", "fail_at=3", "-t", "20m", code=1)
    waiting = (
        "the week's GPU quota has 0.2 h left, and a session needs 0.3; the quota is renewed at 2026-12-05T00:00:00"
    )
    assert said.count(waiting) == 1
    assert "stopped: Kaggle refused the push: Maximum weekly GPU quota of 30.00 hours reached.\nThe same" in said
    assert kaggle.account.kernels == {}
    kaggle.account.quota_refusal = ""
    # by itself: an error in the notebook, even after progress
    said = relayed(kaggle, root, code=1)
    assert "it had stopped: Kaggle refused" in said
    assert "stopped: session 1 ended with ERROR, by an error of its own. The log ends:" in said
    assert "OSError: the sensor is gone" in re.sub(r"\x1b\[[\d;]*m", "", said)
    assert steps_of(kaggle, root) == [3]
    # what is mended goes on where it was: here the notebook that always fails at step 3 no longer does
    source = root / "notebooks" / "counting_kaggle_multigpu.py"
    source.write_text(COUNTING.replace("if step == fail_at", "if False"))
    assert "finished: step 4, after 2 sessions" in relayed(kaggle, root)
    pushes = [request for name, request in kaggle.requests if name == "SaveKernel"]
    assert {request["sessionTimeoutSeconds"] for request in pushes} == {1200}
    assert {request["dockerImagePinningType"] for request in pushes} == {"original"}
    assert pushes[-1]["kernelDataSources"] == [f"ann/{SLUG}/1"]
    asked = [request.get("versionLabel") for name, request in kaggle.requests if name == "ListKernelSessionOutput"]
    assert set(asked) == {"v1", "v2"}


def test_a_push_without_an_answer_is_no_earlier_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel with versions of its own: their output stays, and the newest session is the one waited for."""
    kernel = counting(root)
    kept = root / "runs" / SLUG / "v1" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("somebody's weights")
    kernels.write_json(kernel.record, {"version": 1, "comment": "Parameters"})
    at_work = relay._Relay(kernel, None, 0.1, True, lambda _: None)
    monkeypatch.setattr(kaggle_cli, "status_if_any", lambda _: kaggle_cli.Status("RUNNING"))
    monkeypatch.setattr(kaggle_cli, "pull", lambda *_: at_work.marker(1))
    monkeypatch.setattr(kaggle_cli, "output", lambda *_: [kept])
    asked: list[str] = []

    def completed(name: str, *_: Any, **__: Any) -> kaggle_cli.Status:
        asked.append(name)
        return kaggle_cli.Status("COMPLETE")

    monkeypatch.setattr(relay, "wait_for", completed)
    session = relay.Session(1)
    at_work.state.sessions = [session]
    assert at_work.arrived(session)
    at_work.end(session)
    assert (session.version, asked) == (None, [f"ann/{SLUG}"])
    assert session.folder == f"runs/{SLUG}/relay-{at_work.state.name}-1"
    # nor does an answer that names a version empty a folder that is there
    session = relay.Session(2, 1, state="PUSHED", step=3)
    monkeypatch.setattr(kaggle_cli, "versions_are_heeded", lambda: True)
    at_work.end(session)
    assert session.folder == f"runs/{SLUG}/relay-{at_work.state.name}-2"
    assert kept.read_text() == "somebody's weights"
    # and without a version only the newest session's output can be attached
    best = at_work.state.sessions[0]
    assert at_work.attach(best) == ("kernel_sources", f"ann/{SLUG}")
    at_work.state.sessions.append(session)
    with pytest.raises(relay.StopError, match="session 1 got furthest, but its checkpoints were not fetched"):
        at_work.attach(best)


@pytest.mark.parametrize("older", ["Kaggle CLI 2.2.4", "Kaggle API 1.7.4.5"])
def test_an_older_cli_is_asked_for_the_newest_version(root: Path, monkeypatch: pytest.MonkeyPatch, older: str) -> None:
    monkeypatch.setattr(kaggle_cli, "call", lambda *_, **__: older)
    kaggle_cli.versions_are_heeded.cache_clear()
    assert counting(root).named(3) == f"ann/{SLUG}"
    monkeypatch.setattr(kaggle_cli, "call", lambda *_, **__: "Kaggle CLI 2.2.5")
    kaggle_cli.versions_are_heeded.cache_clear()
    assert counting(root).named(3) == f"ann/{SLUG}/3"
    assert counting(root).named(None) == f"ann/{SLUG}"
    kaggle_cli.versions_are_heeded.cache_clear()


def test_how_long_a_session_may_take(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = counting(root)
    assert kernel.seconds is None
    kernel.parameters = {"time_limit": "1h30m"}
    assert kernel.seconds == 5400 + 900
    brakes: list[float | None] = []

    def push_noting_the_brake(_folder: Path, limit: float | None) -> kaggle_cli.Pushed:
        brakes.append(limit)
        return kaggle_cli.Pushed(1, "url")

    monkeypatch.setattr(kaggle_cli, "push", push_noting_the_brake)
    monkeypatch.setattr(kernels.Kernel, "build", lambda *_: "its sha256")
    kernel.push(again=True)
    kernel.limit = 1200.0
    assert kernel.seconds == 1200
    kernel.push(again=True)
    assert brakes == [None, 1200.0]  # each training in a notebook has its own time_limit: their sum is not known
    short = "the week's GPU quota has 0.3 h left, and a session needs 0.3"
    for left, said in {kaggle_cli.Quota(1199.0, ""): short, kaggle_cli.Quota(1200.0, ""): "", None: ""}.items():
        monkeypatch.setattr(kaggle_cli, "quota", lambda left=left: left)  # None: of an older CLI
        assert kernel.short_of_quota() == said


def test_a_plan_gives_the_limit_of_a_session(
    house: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kaggle_cli, "push", lambda *_: pytest.fail("pushed"))
    kernel = kernels.kernel_from(house, "text_generation", "ann")
    kernel.parameters = {**TEXT, "max_steps": 6}
    assert kernels.SLACK < kernels.planned(kernel) < 2 * kernels.SLACK
    kernel = kernels.kernel_from(house, "text_generation", "ann")
    sources = ["--dataset", "bob/text", "--kernel-source", "ann/kaggle-mgpu"]
    command = ["--root", str(house), "push", "text_generation", "--user", "ann", "-t", "plan"]
    assert tools_main([*command, *sources]) == 1
    assert "plan can be made here: bob/text: no such input on this machine, and other data" in capsys.readouterr().err
    kernel.parameters = {**TEXT, "data_path": "/kaggle/input/not/here"}
    with pytest.raises(kernels.KernelError, match=r"no plan can be made here: .*no such file or folder"):
        kernels.planned(kernel)


def test_a_push_compares_the_plan_with_the_quota(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, said = counting(root), list[str]()
    monkeypatch.setattr(kaggle_cli, "quota", lambda: kaggle_cli.Quota(3 * 3600.0, ""))
    kernel.ask_quota(said.append)
    assert said == []  # of this recipe no plan can be made
    kernel.estimate = 2 * 3600.0
    kernel.ask_quota(said.append)
    assert said == ["the plan expects 2.0 h on two T4s; the week's GPU quota has 3.0 h left"]
    kernel.estimate = 20.0
    kernel.ask_quota(said.append)
    assert said.pop() == "the plan expects 1 min on two T4s; the week's GPU quota has 3.0 h left"
    kernel.estimate = 20 * 3600.0
    with pytest.raises(
        kernels.QuotaError, match=r"^not pushed: .* 3\.0 h left, and a session needs 12\.0\. A smaller -p"
    ):
        kernel.ask_quota(said.append)
    kernel.parameters = {"time_limit": "2h"}
    kernel.ask_quota(said.append)
    with pytest.raises(kernels.QuotaError, match=r"3\.0 h left, 1\.0 of them for sessions that run, and a session"):
        kernel.ask_quota(said.append, 3600.0)
    assert said.count("the plan expects 20.0 h on two T4s; the week's GPU quota has 3.0 h left") == 3
    monkeypatch.setattr(kaggle_cli, "quota", lambda: kaggle_cli.Quota(12 * 3600.0, ""))  # whatever a plan says
    kernel.ask_quota(said.append)
    monkeypatch.setattr(kaggle_cli, "quota", lambda: None)  # of an older CLI
    kernel.ask_quota(said.append)
    assert len(said) == 4
    # a session without GPUs costs none
    top = root / "kernel-metadata.json"
    top.write_text(top.read_text().replace('"enable_gpu": true', '"enable_gpu": false'))
    monkeypatch.setattr(kaggle_cli, "quota", lambda: kaggle_cli.Quota(0.0, ""))
    kernel.ask_quota(said.append)
    assert kernel.short_of_quota() == ""


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', '{"sessions": [{"nr": 1}]}'])
def test_a_state_that_cannot_be_read_is_not_begun_anew_by_itself(root: Path, content: str) -> None:
    kernel = counting(root)
    kernel.folder.mkdir(parents=True)
    (kernel.folder / "relay.json").write_text(content)
    with pytest.raises(relay.KernelError, match=r"relay\.json cannot be read as a relay's state: mend it, or .*--anew"):
        relay.run(kernel, carry=None, interval=60)
    assert (kernel.folder / "relay.json").read_text() == content


def test_predictions_are_progress_and_are_carried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = relay._Relay(counting(root), "dataset", 0.1, True, lambda _: None)
    folder = root / "runs" / SLUG / "v2"
    for name in ("test/a.tif", "stamp.json", "count.json"):
        (folder / "run" / "predictions" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / "predictions" / name).touch()
    sessions = [relay.Session(1, 1, state="ERROR", step=9, predicted=2, folder="runs/x")]
    sessions += [relay.Session(2, 2, state="ERROR", step=9, predicted=3, folder=f"runs/{SLUG}/v2")]
    at_work.state.sessions = sessions
    at_work.judge(sessions[1])  # it got on, in predicting
    assert at_work.state.best is sessions[1]
    uploaded: list[str] = []

    def upload(_dataset: str, _title: str, carried: Path, _note: str) -> None:
        uploaded.extend(path.relative_to(carried).as_posix() for path in sorted(carried.rglob("*.*")))

    monkeypatch.setattr(kaggle_cli, "upload", upload)
    monkeypatch.setattr(kaggle_cli, "dataset_status", lambda _: "ready")
    at_work.upload("ann/state", folder, sessions[1])
    assert uploaded == [f"run/predictions/{name}" for name in ("count.json", "stamp.json", "test/a.tif")]
    sessions[1].predicted = 2
    with pytest.raises(relay.StopError, match="ended with ERROR at step 9, and made no progress"):
        at_work.judge(sessions[1])


def test_a_trainers_checkpoints_are_progress_and_are_carried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a session killed in the save of step 12, without a result."""
    at_work = relay._Relay(counting(root), "dataset", 0.1, True, lambda _: None)
    names = [f"out/checkpoint-{step}/{name}" for step in (4, 8, 10) for name in ("model.bin", "trainer_state.json")]
    names += ["out/checkpoint-12/model.bin", "out/metrics.jsonl"]
    there: list[str] = []

    def output(_name: str, folder: Path, pattern: str) -> list[Path]:
        found = [folder / name for name in names if re.search(pattern, name)]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return found

    monkeypatch.setattr(kaggle_cli, "output", output)
    monkeypatch.setattr(kaggle_cli, "upload", lambda _dataset, _title, folder, _note: there.extend(
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))
    ))  # fmt: skip
    monkeypatch.setattr(kaggle_cli, "dataset_status", lambda _: "ready")
    monkeypatch.setattr(relay, "wait_for", lambda *_, **__: kaggle_cli.Status("ERROR"))
    session = relay.Session(1, 1)
    at_work.state.sessions = [session]
    at_work.end(session)
    assert session.step == 10
    at_work.judge(session)
    at_work.attach(session)
    assert there == sorted(name for name in names if re.search(r"-(8|10)/|metrics", name))


def test_a_relay_leaves_somebody_elses_session_alone(kaggle: KaggleServer, root: Path) -> None:
    push(kaggle, root, "gate=never")
    said = relayed(kaggle, root, code=1)
    assert f"ann/{SLUG} is RUNNING, with a session that is not this relay's: wait for it" in said
    assert state(root)["sessions"] == []
    assert len(kaggle.account.running()) == 1


def test_a_session_begun_while_the_relay_waited_for_quota_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["COMPLETE", "RUNNING"])
    monkeypatch.setattr(kaggle_cli, "status_if_any", lambda _: kaggle_cli.Status(next(states)))
    monkeypatch.setattr(kaggle_cli, "quota", lambda: None)
    monkeypatch.setattr(kaggle_cli, "push", lambda *_: pytest.fail("a second session"))
    with pytest.raises(relay.StopError, match="is RUNNING, with a session that is not this relay's"):
        relay.run(counting(root), carry=None, interval=0.1)
    assert state(root)["sessions"] == []


# Training
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


STEPS = 60
LIMIT = 600.0
"""Seconds that each session trains, however slow the machine: those of the first pass all at once, in a save."""


def test_a_relay_is_one_run(kaggle: KaggleServer, house: Path, tmp_path: Path) -> None:
    """At least four sessions, two of them killed in the middle of a save: the weights of one unlimited run.

    And nowhere, in no notebook, log, record or message, is the API key or a secret of the session.
    """
    account = kaggle.account
    account.key, account.session_variables = KEY, SECRETS
    (tmp_path / "input").mkdir()
    corpus(tmp_path / "input")
    account.add_dataset("bob/its-input", tmp_path / "input")
    settings = {**TEXT, "nproc": 2, "max_steps": STEPS, "save_every": 2, "keep_last": 2, "log_every": 4}
    whole = tmp_path / "whole"
    config = {name: value for name, value in settings.items() if name not in ("prompts", "max_new_tokens")}
    config |= {"data_path": tmp_path / "input", "output_dir": whole}
    given = [text for name, value in config.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "kaggle_mgpu", "train", "text_generation", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    # The first gets no further than its third save before its time is up, and stops by itself
    account.slow_save = {1: LIMIT}
    account.kill_in_save = {2, 3}
    given = [*flags(settings), "--user", "ann", "--dataset", "bob/its-input"]
    relay_command = ["relay", "text_generation", "--title", "Relayed Run", "--interval", "3"]
    said = tool(kaggle, house, *relay_command, "--prepare", "-p", f"time_limit={LIMIT}", *given)
    sessions = [version.session for version in account.kernels["ann/relayed-run"]]
    assert len(sessions) >= 4
    assert [session.killed for session in sessions] == ["", "save", "save", *([""] * (len(sessions) - 3))]
    for killed in sessions[1:3]:
        assert any(name.startswith(".writing-step-") for name in killed.left_by_the_kill)
    (prepared,) = account.kernels["ann/relayed-run-prepare"]
    assert (prepared.request["enableGpu"], prepared.request.get("machineShape")) == (False, None)
    assert len(list(prepared.session.working.glob("text_generation/data/*/corpus.json"))) == 1
    pushes = [version.request["kernelDataSources"] for version in account.kernels["ann/relayed-run"]]
    assert all(sources[0] == "ann/relayed-run-prepare/1" for sources in pushes)
    assert not [session for session in sessions if (session.working / "text_generation" / "data").exists()]
    assert "session 2 ended: ERROR" in said
    assert f"finished: step {STEPS}, after {len(sessions)} sessions" in said
    fetched = house / "runs" / "relayed-run" / f"v{len(sessions)}" / "text_generation"
    assert (fetched / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert comparable(progress.read(fetched)) == comparable(progress.read(whole))
    assert planted_in(house / "build", house / "runs", *(session.folder for session in sessions)) == []


DECODING = """\
# %% tags=["payload"]
# here

# %% tags=["parameters"]
# Parameters of this notebook
output_dir = "run"

# %%
import json, pathlib
from kaggle_mgpu.recipes.surface_segmentation import Config, SurfaceSegmentation

SurfaceSegmentation(Config(output_dir=output_dir, patch_size=16)).train_data()[0]
pathlib.Path(output_dir).mkdir()
pathlib.Path(output_dir, "result.json").write_text(json.dumps({"finished": True, "step": 1}))
"""


def test_volumes_are_decoded_on_a_session_without_gpus(kaggle: KaggleServer, root: Path, tmp_path: Path) -> None:
    """The session with GPUs decodes none: nothing is kept in its temporary folder, where decoded volumes go."""
    shutil.rmtree(root / "kaggle_mgpu")
    (root / "kaggle_mgpu").symlink_to(ROOT / "kaggle_mgpu")
    (root / "notebooks" / "decoding_kaggle_multigpu.py").write_text(DECODING)
    synthetic.synthesise(tmp_path / "scrolls", size=16, train=3, test=1)
    kaggle.account.add_dataset("bob/scrolls", tmp_path / "scrolls")
    command = ["relay", "decoding", "--user", "ann", "--title", "Scrolls", "--interval", "6"]
    said = tool(kaggle, root, *command, "--prepare", "--dataset", "bob/scrolls")
    assert "finished: step 1, after one session" in said
    (prepared,), (trained,) = (kaggle.account.kernels[f"ann/{name}"] for name in ("scrolls-prepare", "scrolls"))
    assert prepared.request["enableGpu"] is False
    assert len(list(prepared.session.working.glob("run/data/*/*.image.npy"))) == 3
    assert trained.request["kernelDataSources"] == ["ann/scrolls-prepare/1"]
    log = "".join(str(entry["data"]) for entry in trained.session.log)
    assert re.search(r"3 volumes checked in .* s, 3 of them from .*scrolls-prepare/run/data", log)
    assert [list(folder.iterdir()) for folder in Path(trained.session.temporary.name).glob("kaggle_mgpu-v*")] == [[]]


def test_a_recipe_without_work_before_training_is_told_at_once(house: Path) -> None:
    wanted = r"camouflage_.*: --prepare: camouflage_segmentation has no work before training: leave --prepare out\. Exp"
    kernel = kernels.kernel_from(house, "camouflage_segmentation", "ann")
    with pytest.raises(kernels.KernelError, match=wanted):
        relay.run(kernel, carry=None, interval=60, prepare=True)
    assert not kernel.folder.exists()
    kernel = kernels.kernel_from(house, "check_gpus", "ann")
    with pytest.raises(kernels.KernelError, match=r"check_gpus.*: --prepare: expected a notebook of a recipe, got no"):
        relay.run(kernel, carry=None, interval=60, prepare=True)


def test_what_a_failing_run_says_holds_no_secret(kaggle: KaggleServer, house: Path) -> None:
    """An error in a worker process, with its traceback, told of by `wait`; and the CLI's own errors."""
    account = kaggle.account
    account.key, account.session_variables = KEY, SECRETS
    given = {**TEXT, "nproc": 2, "max_steps": 50, "log_every": 1, "lr": 1e30, "precision": "fp32"}
    parameters = flags(given)
    tool(kaggle, house, "push", "text_generation", "--user", "ann", "--title", "Failing Run", *parameters)
    said = tool(kaggle, house, "wait", "ann/failing-run", "--interval", "3", code=1)
    assert "DivergedError" in said
    tool(kaggle, house, "output", "ann/failing-run")
    account.key = "0" * 32  # so that Kaggle refuses the planted one
    environment = {**kaggle.environment(), "KAGGLE_KEY": KEY, "HTTPS_PROXY": f"http://ann:{KEY}@127.0.0.1:9"}
    for command in ("push", "status", "logs", "output"):
        done = subprocess.run(
            [sys.executable, str(TOOL), "--root", str(house), command, "text_generation", "--user", "ann"],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 1
        said += done.stdout + done.stderr
    assert not [value for value in (KEY, *SECRETS.values()) if value in said]
    session = account.version("ann/failing-run").session
    assert planted_in(house / "build", house / "runs", session.folder) == []
