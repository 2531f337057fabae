"""What a checkpoint says, whatever it says: it is refused with a reason, or a run goes on from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from kaggle_mgpu import TrainConfig, checkpoint, optim, progress, session, train
from kaggle_mgpu.checkpoints import files
from kaggle_mgpu.checkpoints.format import OtherRunError, load_checked
from kaggle_mgpu.checkpoints.reader import STATE, examine
from kaggle_mgpu.data import BatchPlan
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.parallel import Strategy
from kaggle_mgpu.progress import View, panel_html, records
from kaggle_mgpu.training import TrainState
from kaggle_mgpu.training.saving import expected_by
from tasks import Regression

MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Ten steps an epoch, a save after each of them, and averaged weights."""
    settings = TrainConfig(output_dir=str(folder), global_batch_size=50, data_workers=0, ema_decay=0.9, save_every=1)
    return settings.replace(**changes)


# A run in this process, without its loop
class Bench:
    """A model, its optimizer and their checkpoint's expectations, after `steps` steps."""

    def __init__(self, kind: str = "adamw", steps: int = 3) -> None:
        torch.manual_seed(0)
        task = Regression()
        self.strategy = Strategy(task.loss, task.metrics, precision="fp32", device=torch.device("cpu"))
        model = self.strategy.prepare(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        self.optimizer: torch.optim.Optimizer
        if kind == "adamw":
            self.optimizer = optim.adamw(model, 0.01, 0.1)
        else:
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.ema = optim.EMA(model, 0.9)
        self.plan = BatchPlan.make(
            dataset_size=500, num_replicas=1, global_batch_size=50, micro_batch_size=50, epochs=2
        )
        self.expected = expected_by(self.strategy, self.optimizer, self.ema, self.plan)
        for _ in range(steps):
            self.step()
        self.steps = steps

    def step(self) -> None:
        x = torch.randn(10, 8)
        self.strategy.backward((x, x.sum(1, keepdim=True)), 1.0, lambda: 10)
        self.strategy.step(self.optimizer, max_norm=1.0)
        self.ema.update(self.strategy.model)

    def contents(self) -> dict[str, Any]:
        full = copy.deepcopy(self.strategy.full_state(self.optimizer))
        state = dataclasses.asdict(TrainState(self.steps, 50 * self.steps, 2, {"loss": 0.5}, 0.5, 1.5))
        tensors = {"model": full.pop("model"), "ema": copy.deepcopy(self.ema.state_dict())}
        return {"tensors": tensors, "state": full, "facts": {"state": state, "config": {}, "stamp": {}}}

    def write(self, folder: Path, contents: dict[str, Any], step: int | None = None) -> Path:
        if folder.exists():
            shutil.rmtree(folder)
        return checkpoint.Checkpoints(folder).save(self.steps if step is None else step, **contents)

    def go_on(self, path: Path) -> None:
        """What a run does with a checkpoint it has chosen, and a step."""
        saved = checkpoint.load(path)
        self.strategy.load_full_state(self.optimizer, {**saved.state, "model": saved.tensors["model"]})
        self.ema.load_state_dict(saved.tensors["ema"])
        assert all(bool(p.isfinite().all()) for p in self.strategy.model.parameters())
        state = TrainState(**saved.facts["state"])
        assert (state.step, state.samples_seen) == (saved.facts["step"], 50 * saved.facts["step"])
        assert 0 <= state.evaluated <= state.step
        assert math.isfinite(float(state.seconds))
        assert all(f"{float(value):.4g}" for value in state.metrics.values())
        assert state.best is None or f"{float(state.best):.4g}"
        self.step()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_the_readers_fields_are_those_of_a_position() -> None:
    assert set(STATE) == {field.name for field in dataclasses.fields(TrainState)}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("steps", [0, 3])
def test_what_a_run_saves_is_taken(kind: str, steps: int, tmp_path: Path) -> None:
    bench = Bench(kind, steps)
    if steps == 0:
        contents = bench.contents()
        contents["facts"]["state"]["evaluated"] = 0
        bench.go_on(written := bench.write(tmp_path / "c", contents))
        assert examine(written, bench.expected)["step"] == 0
        return
    path = bench.write(tmp_path / "c", bench.contents())
    assert examine(path, bench.expected)["state"]["samples_seen"] == 150
    bench.go_on(path)


@pytest.mark.parametrize(("then", "now"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimizers_state_is_another_runs(then: str, now: str, tmp_path: Path) -> None:
    path = Bench(then).write(tmp_path / "c", Bench(then).contents())
    with pytest.raises(OtherRunError, match=r"the checkpoint's optimizer (has no|has the parameters in other groups)"):
        examine(path, Bench(now).expected)


# Whatever it says
def leaves(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a tree, the branches themselves included."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else []
    return [at, *(place for key, value in inner for place in leaves(value, (*at, key)))]


def put(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there; DROP removes it."""
    if not at:
        return value
    key, *rest = at
    if isinstance(tree, dict):
        changed = put(tree[key], tuple(rest), value)
        return {k: changed if k == key else v for k, v in tree.items() if not (k == key and changed is DROP)}
    changed = put(tree[key], tuple(rest), value)
    return type(tree)(changed if i == key else v for i, v in enumerate(tree) if not (i == key and changed is DROP))


DROP = object()
FACTS = st.one_of(
    st.just(DROP),
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, -1, 7, 150, 10**6, 10**30, 10**400, -(10**400), 2**63]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
TENSORS = st.one_of(
    st.builds(
        lambda shape, value, dtype: torch.full(shape, value).to(dtype),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.sampled_from([0.0, 1.0, -1.0, 3.0, 1e9, math.nan, math.inf]),
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.int32]),
    ),
    st.just(DROP),
)


def refused_or_gone_on_from(bench: Bench, path: Path) -> None:
    try:
        examine(path, bench.expected)
    except CheckpointError:
        return
    bench.go_on(path)


@given(st.data())
@examples(max_examples=60)
def test_any_state_is_refused_or_gone_on_from(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    bench = Bench()
    contents = bench.contents()
    facts = contents["facts"]["state"]
    for _ in range(data.draw(st.integers(1, 2))):
        if isinstance(facts, dict):
            facts = put(facts, data.draw(st.sampled_from(leaves(facts))), data.draw(FACTS))
    contents["facts"]["state"] = {} if facts is DROP else facts
    refused_or_gone_on_from(bench, bench.write(tmp_path_factory.getbasetemp() / "facts", contents))


@given(st.data())
@examples(max_examples=100)
def test_any_tensors_are_refused_or_gone_on_from(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    bench = Bench()
    contents = bench.contents()
    kind = data.draw(st.sampled_from(["model", "ema", "optimizer", "optimizer", "optimizer"]))
    place = ("tensors", kind) if kind != "optimizer" else ("state",)
    tree = contents["tensors"][kind] if kind != "optimizer" else contents["state"]
    at = data.draw(st.sampled_from(leaves(tree)[1:]))
    value = data.draw(TENSORS if kind != "optimizer" else st.one_of(TENSORS, FACTS))
    tree = put(tree, at, value)
    contents[place[0]] = {**contents["tensors"], kind: tree} if kind != "optimizer" else tree
    try:
        path = bench.write(tmp_path_factory.getbasetemp() / "tensors", contents)
    except TypeError:  # what no checkpoint can hold
        return
    refused_or_gone_on_from(bench, path)


@given(st.sampled_from([MODEL, OPTIMIZER, EMA]), st.data())
@examples(max_examples=60)
def test_any_file_is_refused_or_gone_on_from(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Bytes changed in a file's header, with a checksum that fits."""
    bench = Bench()
    path = bench.write(tmp_path_factory.getbasetemp() / "bytes", bench.contents())
    content = bytearray((path / name).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (path / name).write_bytes(content)
    signed(path)
    refused_or_gone_on_from(bench, path)


def signed(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda document: None) -> None:
    """Change state.json, and give it and the files in it the checksums that fit."""
    file = folder / "state.json"
    document = json.loads(file.read_text())
    document.pop("crc32")
    for name in document["files"]:
        path = folder / name
        document["files"][name] = {"bytes": path.stat().st_size, "crc32": files.crc32(path)}
    change(document)
    document["crc32"] = zlib.crc32(json.dumps(document).encode())
    file.write_text(json.dumps(document))


# End to end
def state(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: signed(folder, lambda document: document["state"].update(changes))


def tensors(name: str, change: Callable[[dict[str, Any]], Any], tree: Callable[[str], str | None] = str) -> Any:
    """Change the tensors of a file, and the text with them."""

    def changed(folder: Path) -> None:
        found, metadata = files.read_with_metadata(folder / name)
        found = {key: tensor.clone() for key, tensor in found.items()}
        change(found)
        text = tree(metadata["tree"]) if "tree" in metadata else None
        files.write(folder / name, files.Layout.of(found, {} if text is None else {"tree": text}).pieces())
        signed(folder)

    return changed


def without_ema(folder: Path) -> None:
    (folder / EMA).unlink()
    file = folder / "state.json"
    document = json.loads(file.read_text())
    document["files"].pop(EMA)
    file.write_text(json.dumps(document))
    signed(folder)


def junk(folder: Path) -> None:
    (folder / "junk.safetensors").write_bytes(os.urandom(100))
    signed(
        folder,
        lambda d: d["files"].update(
            {"junk.safetensors": {"bytes": 100, "crc32": files.crc32(folder / "junk.safetensors")}}
        ),
    )


def tuple_for_a_list(tree: str) -> str:
    """The names of a group's parameters as a tuple."""
    document = json.loads(tree)
    groups = dict(dict(document["dict"])["optimizer"]["dict"])["param_groups"]["list"]
    pair = next(pair for pair in groups[0]["dict"] if pair[0] == "params")
    pair[1] = {"tuple": pair[1]["list"]}
    return json.dumps(document)


def drop_moment(tree: str) -> str:
    """Without one parameter's second moment."""
    document = json.loads(tree)
    by_name = dict(dict(document["dict"])["optimizer"]["dict"])["state"]["dict"]
    moments = by_name[0][1]["dict"]
    moments[:] = [pair for pair in moments if pair[0] != "exp_avg_sq"]
    return json.dumps(document)


NOT_OURS = "was not written by kaggle_mgpu"
CRAFTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "best as text": (state(best="good"), "best in its state is 'good', expected a number"),
    "seconds as text": (state(seconds="long"), "seconds in its state is 'long', expected a number"),
    "samples_seen beyond all": (state(samples_seen=10**30), "samples_seen in its state is 1000000"),
    "samples_seen of another step": (state(samples_seen=7), "samples_seen in its state is 7, expected 200 after 4"),
    "a step far ahead": (state(step=10**6), "step in its state is 1000000, expected 4"),
    "a step that is not the folder's": (state(step=3, samples_seen=150), "step in its state is 3, expected 4"),
    "a metric of 400 digits": (state(metrics={"loss": 10**400}), "metrics['loss'] in its state is 1000000"),
    "no tree": (tensors(OPTIMIZER, lambda found: None, lambda tree: None), NOT_OURS),
    "a list for a tree": (tensors(OPTIMIZER, lambda found: None, lambda tree: '{"list": [1]}'), NOT_OURS),
    "a number in a list": (tensors(OPTIMIZER, lambda found: None, lambda tree: "[1]"), NOT_OURS),
    "a moment missing": (
        tensors(OPTIMIZER, lambda found: None, drop_moment), "has no exp_avg_sq, which AdamW needs to continue"
    ),
    "a tuple for a list": (tensors(OPTIMIZER, lambda found: None, tuple_for_a_list), NOT_OURS),
    "no average": (without_ema, "it holds no ema.safetensors"),
    "an average of another shape": (
        tensors(EMA, lambda found: found.update({"0.weight": torch.zeros(2, 2)})),
        "ema.safetensors does not fit the weights beside it: 0.weight: (2, 2) in the checkpoint",
    ),
    "a junk file beside": (junk, "it lists files that no checkpoint has: junk"),
    "weights of nan": (
        tensors(MODEL, lambda found: found["0.weight"].fill_(math.nan)), "0.weight in model.safetensors is nan or inf"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config(folder, max_steps=4), Regression())
    return folder


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_run_goes_on_from_the_one_before_it(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    newest = folder / "checkpoints" / "step-00000004"
    craft, problem = CRAFTED[kind]
    craft(newest)
    assert checkpoint.damage(newest) is None, "its checksums are right"
    capsys.readouterr()
    result = train(config(folder, max_steps=6), Regression())
    said = capsys.readouterr().out
    assert (result.finished, result.step, result.samples_seen) == (True, 6, 300)
    assert f"checkpoint {newest} cannot be used: " in said
    assert problem in said
    assert "step-00000003: step 3 of 6" in said


@pytest.mark.parametrize("kind", ["a moment missing", "samples_seen of another step", "weights of nan"])
def test_among_the_inputs_too(
    kind: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    before = session.input_root() / "notebooks" / "somebody" / "run"
    shutil.copytree(trained, before)
    CRAFTED[kind][0](before / "checkpoints" / "step-00000004")
    assert train(config(tmp_path / "run", max_steps=6), Regression()).step == 6
    said = capsys.readouterr().out
    assert CRAFTED[kind][1] in said
    assert f"going on from {before}/checkpoints/step-00000003: step 3 of 6" in said


def test_a_run_whose_optimizer_was_changed_is_not_begun_anew_unasked(trained: Path, tmp_path: Path) -> None:
    class Other(Regression):
        name = "Regression"

        def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
            return torch.optim.SGD(optim.parameter_groups(model, config.weight_decay), lr=config.lr, momentum=0.9)

    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"optimizer has no momentum_buffer, which this run's SGD needs to continue"
    ):
        train(config(tmp_path / "run", max_steps=6), Other())
    assert len(checkpoint.all_in(tmp_path / "run" / "checkpoints")) == 4


def test_rows_that_are_missing_or_twice_there_are_refused(tmp_path: Path) -> None:
    """Of tensors whose rows lie in several files."""
    bench = Bench()
    path = bench.write(tmp_path / "c", bench.contents())
    weights = files.read_tensors(path / MODEL)
    halves = {"0.weight": [[4, 8], 0]}, {"0.weight": [[4, 8], 2]}

    def cut(ranges: tuple[slice, slice]) -> None:
        (path / MODEL).unlink(missing_ok=True)
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, where, rows, rest in zip(names, halves, ranges, (weights, {}), strict=True):
            part = {**rest, "0.weight": weights["0.weight"][rows].clone()}
            files.write(path / name, files.Layout.of(part, {"shards": json.dumps(where)}).pieces())
        file = path / "state.json"
        document = json.loads(file.read_text())
        document["files"] = {name: {} for name in [*names, OPTIMIZER, EMA]}
        file.write_text(json.dumps(document))
        signed(path)

    cut((slice(0, 2), slice(2, 4)))
    facts = examine(path, bench.expected)
    assert torch.equal(load_checked(path, facts, join=True).tensors["model"]["0.weight"], weights["0.weight"])
    for ranges in ((slice(0, 1), slice(2, 4)), (slice(0, 3), slice(2, 4)), (slice(0, 2), slice(2, 3))):
        cut(ranges)
        with pytest.raises(CheckpointError, match=r"0\.weight in model\.safetensors is incomplete"):
            examine(path, bench.expected)


# Records
LINES = {
    "400 digits": '{"kind": "train", "step": 3, "loss": 1%s}' % ("0" * 400),
    "400 digits in what a task measures": '{"kind": "eval", "step": 3, "val_things": 1%s}' % ("0" * 400),
    "a step of nan": '{"kind": "train", "step": NaN, "loss": 0.5}',
    "an infinite step": '{"kind": "save", "step": Infinity}',
    "no step": '{"kind": "save"}',
    "null for a step": '{"kind": "eval", "step": null, "val_loss": 1.5}',
    "no unit": '{"kind": "start", "step": 0, "max_steps": null, "unit": null, "epochs": NaN, "time_left": NaN}',
    "a unit that is a number": '{"kind": "start", "step": 0, "unit": 3}',
    "metrics that are a list": '{"kind": "stop", "step": 4, "metrics": [1], "reason": "x"}',
}


@pytest.mark.parametrize("kind", LINES)
def test_a_record_that_cannot_be_ends_neither_a_run_nor_a_look_at_it(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], LINES[kind], *lines[4:], LINES[kind], ""]))
    progress.attach(folder, follow=False, display="lines")
    assert "step 4" in capsys.readouterr().out
    view = View()
    for record in progress.read(folder):
        view.take(record)
    assert "kaggle-mgpu" in panel_html(view, view.outcome(None))
    progress.plot(folder, save=False)
    assert train(config(folder, max_steps=6), Regression()).step == 6


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=2))),
)
NAMES = (
    "step samples epoch time seconds time_left max_steps world_size epochs pid loss lr grad_norm val_loss gpus spent "
    "unit device_line text reason finished metrics samples_per_s val_f1"
).split()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "train", "eval", "save", "gpus", "note", "stop"]),
            st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6),
        ),
        max_size=8,
    )
)
@examples(max_examples=150)
def test_any_records_are_left_out_or_shown(given: list[tuple[str, dict[str, Any]]]) -> None:
    text = "\n".join(json.dumps({"kind": kind, **values}) for kind, values in given)
    view = View()
    for record in records.parse(text):
        assert isinstance(record["step"], int)
        view.take(record)
        panel_html(view)
    view.outcome(view.latest.get("stop"))


def test_a_setting_beyond_a_floats_range_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TrainConfig\.save_interval_minutes: expected float, got 1000"):
        TrainConfig(output_dir=str(tmp_path), save_interval_minutes=10**400)
