"""Train, predict whole volumes on all GPUs, measure the held-out volumes, and pack the submission.

result = run(config)            # trains and predicts; a second call continues
rows = baselines(task)          # scores of trivial predictions
figure(task).savefig("x.png")   # image, label, prediction
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kaggle_mgpu.checkpoints import atomically, read_tensors, write_text
from kaggle_mgpu.data import counted
from kaggle_mgpu.fields import parse_duration
from kaggle_mgpu.launching import launch
from kaggle_mgpu.machine import session
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.progress import plots
from kaggle_mgpu.training import Result, train

from . import stacks
from .data import Volume, read_label
from .ensemble import load
from .inference import Job, predict, validate_submission, write_submission
from .metrics import measures
from .postprocessing import FILE, Choice, choose_by_dice, known
from .training import Config, SurfaceSegmentation, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(config: Config, surface: SurfaceSegmentation | None = None) -> Result:
    """Train, then predict the held-out volumes and the test images on all GPUs. A second call continues the first.

    Until all predictions are there, result.json says `finished: false`.

    Args:
        surface: the task, already described to the user. None: made from config, and described.
    """
    if surface is None:
        surface = SurfaceSegmentation(config)
        if "RANK" not in os.environ:  # under torchrun no process group exists yet: every rank would search the data
            print(surface.describe(), flush=True)
    began = time.monotonic()
    result: Result = _untrained(config) if _weight_files(config) else launch(train, config, surface)
    if not result.finished:
        return result
    # from now on result.json says unfinished, since the session may be killed before the first prediction
    if distributed.is_main():
        _write(Path(config.output_dir), _unpredicted(result))
    limit = parse_duration(config.time_limit) - (time.monotonic() - began) if config.time_limit else math.inf
    # dp trains in one process, but prediction needs a process per GPU
    nproc = config.nproc if config.strategy == "dp" else None
    result = launch(infer, config, surface, limit, nproc=nproc)
    return result


@distributed.returns_rank0
def infer(config: Config, surface: SurfaceSegmentation, time_limit: float = math.inf) -> Result:
    """Make the missing predictions on all ranks, measure the held-out volumes, and write submission.zip.

    predictions/stamp.json identifies the weights, settings and volumes; if these differ, all predictions are made anew.
    Predictions of an earlier session among the inputs are copied if their stamp is the same.

    Args:
        time_limit: in seconds.

    Raises:
        FileNotFoundError: no run has been trained in output_dir.
    """
    out, main = Path(config.output_dir), distributed.is_main()
    began = time.monotonic()
    if (document := read_json(out / "result.json")) is None:
        raise FileNotFoundError(f"{out / 'result.json'}: no such file. Train first: run(config) trains and predicts")
    result = dataclasses.replace(Result(**document), output_dir=str(out))
    paths = weights_of(config, result)
    folder, held, test = out / "predictions", surface.split[1], surface.catalogue.test
    size = surface.patch_size
    checksums = [_checksum(file) for file in paths]
    mirrored = [list(config.tta_axes)] if config.tta_axes else []
    stamp = {
        "weights": checksums if len(checksums) > 1 else checksums[0],
        "settings": [size, config.overlap, config.threshold, config.min_component, *mirrored],
        "volumes": _digest([*held, *test]),
    }

    def begin() -> None:
        # result.json must not say finished while predictions are missing
        _write(out, _unpredicted(result))
        for torn in folder.rglob(".writing-*"):  # left by a killed session
            torn.unlink()
        if read_json(folder / "stamp.json") != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "test").mkdir(parents=True)
            write_text(folder / "stamp.json", json.dumps(stamp))
        _carry_over(folder, stamp, jobs)

    jobs = [_job(v, folder, part) for part, volumes in (("held_out", held), ("test", test)) for v in volumes]
    distributed.from_main(begin)
    forward = load(surface.model, paths, config.tta_axes, config.precision)

    def predicted(some: list[Job], choice: Choice | None) -> int:
        # the steps after prediction take about 60 s plus 3 s per volume
        rest = min(time_limit, session.time_left() - 60 - 3 * len(jobs)) - (time.monotonic() - began)
        count = folder / "count.json"
        return predict(forward, some, size=size, overlap=config.overlap, choice=choice, seconds_left=rest, count=count)

    made_for = {"weights": checksums, "settings": stamp["settings"]}
    beside = paths[0].with_name(FILE)
    given, files = (config.threshold, config.min_component), [folder / FILE, beside]
    left, choice = 0, distributed.from_main(lambda: known(*given, made_for, files, bool(held)))
    if choice is None:
        left = predicted(jobs[: len(held)], None)
    if choice is None and not left:
        choice = choose_by_dice(held, folder / "probabilities" / "held_out", *given, made_for)
        if main:
            # the folder of given weights may be a read-only input
            for file in files[:1] if config.weight_files else files:
                write_text(file, choice.to_json())
    if choice is not None:
        if main and choice.volumes:
            print(choice, flush=True)
        left = predicted(distributed.from_main(lambda: _with_probabilities(jobs, config.save_probabilities)), choice)
    if left:
        result = dataclasses.replace(result, finished=False, reason="time limit")
        if main:
            left = max(left, sum(not job.path.is_file() for job in jobs))
            print(
                f"{left} of {len(jobs)} volumes have no prediction yet: the time is up. Run the same cell or command "
                f"again."
            )
            _write(out, result)
        return result
    figures = _measure(held, folder / "held_out")
    if main and figures:
        many = f"{len(held)} held-out {'volume' if len(held) == 1 else 'volumes'}"
        print(f"{many}: {'  '.join(f'{name} {value:.4f}' for name, value in figures.items())}", flush=True)
    if main and test:
        write_submission(out / "submission.zip", {v.id: folder / "test" / f"{v.id}.tif" for v in test})
        count = validate_submission(out / "submission.zip", Path(test[0].image).parent)
        where = out / "submission.zip"
        if session.on_kaggle():  # the competition takes the file from this folder
            where = _copied(where, session.working() / "submission.zip")
        print(f"{where}: {counted(count, 'volume')}, checked", flush=True)
    metrics = {**result.metrics, **{f"volume_{name}": value for name, value in figures.items()}}
    result = dataclasses.replace(result, finished=True, reason="finished", metrics=metrics)
    if main:
        _write(out, result)
        if "auto" in given and not config.save_probabilities:
            shutil.rmtree(folder / "probabilities", ignore_errors=True)
        if held:
            _draw(surface, out / "slices.png")
    distributed.barrier()
    return result


def _job(volume: Volume, folder: Path, part: str) -> Job:
    name = f"{volume.id}.tif"
    return Job(volume.image, folder / part / name, folder / "probabilities" / part / name)


def _with_probabilities(jobs: list[Job], keep: bool) -> list[Job]:
    """Return the jobs; a job keeps its file of probabilities only if `keep` is set or the file exists already."""
    there = [keep or (job.probability is not None and job.probability.is_file()) for job in jobs]
    return [job if yes else dataclasses.replace(job, probability=None) for job, yes in zip(jobs, there, strict=True)]


def _write(out: Path, result: Result) -> None:
    write_text(out / "result.json", json.dumps(dataclasses.asdict(result), indent=1))


def _weight_files(config: Config) -> list[Path]:
    """Return the files of weights named by the config; [] for the run's own weights.

    Raises:
        FileNotFoundError: there is no such file.
    """
    paths = [Path(name) for name in config.weight_files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"weights: no such file: {path.resolve()}")
    return paths


def weights_of(config: Config, result: Result) -> list[Path]:
    """Return the weights files for prediction: those in the config, else the run's best, else its final weights."""
    out = Path(result.output_dir)
    weights = out / "best" / "model.safetensors"
    if config.weights == "final" or result.best is None or not weights.is_file():
        weights = out / "model.safetensors"
    return _weight_files(config) or [weights]


def _untrained(config: Config) -> Result:
    """Return the result of a run that trains nothing, since the config names files of weights."""
    _weight_files(config)
    if distributed.is_main():
        print(f"nothing is trained: the weights are {', '.join(config.weight_files)}", flush=True)
    return Result(
        output_dir=config.output_dir, finished=True, reason="weights were given", step=0, max_steps=0, samples_seen=0,
        metrics={}, best=None, seconds=0.0, world_size=distributed.world_size(), strategy=config.strategy,
        precision=config.precision, skipped_steps=0,
    )  # fmt: skip


def _checksum(weights: Path) -> int:
    """Return a checksum of the tensors in the order of their names, since their order in the file may vary."""
    value = 0
    for name, tensor in sorted(read_tensors(weights).items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _unpredicted(result: Result) -> Result:
    return dataclasses.replace(result, finished=False, reason="trained; the predictions are not complete")


def _copied(source: Path, target: Path) -> Path:
    """Copy a file atomically, unless both paths are the same file; return the copy's path."""
    if not (target.exists() and target.samefile(source)):
        with atomically(target) as temporary:
            shutil.copyfile(source, temporary)
    return target


def _carry_over(folder: Path, stamp: dict[str, Any], jobs: list[Job]) -> None:
    """Copy the predictions that an earlier session, among the inputs, made under the same stamp."""
    own = sum(job.begun() for job in jobs)
    wanted = [folder / FILE, *(path for job in jobs for path in (job.path, job.probability) if path is not None)]
    for path in session.find("predictions/stamp.json"):
        if path.parent.resolve() == folder.resolve() or read_json(path) != stamp:
            continue
        for target in wanted:
            source = path.parent / target.relative_to(folder)
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _copied(source, target)
    if copied := sum(job.begun() for job in jobs) - own:
        print(
            f"{copied} of {len(jobs)} volumes have predictions in an earlier session's output among the inputs",
            flush=True,
        )


def _draw(surface: SurfaceSegmentation, path: Path) -> None:
    """Draw `figure` into a file; an error only prints a warning, since a picture must not fail a run after hours."""
    try:
        figure(surface).savefig(path, dpi=110)
    except Exception as error:
        print(f"{path} was not drawn: {type(error).__name__}: {error}. The rest of the run is complete.", flush=True)


def _digest(volumes: list[Volume]) -> str:
    listing = [[volume.id, Path(volume.image).stat().st_size] for volume in volumes]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _measure(held: list[Volume], folder: Path) -> dict[str, float]:
    """Return the means of `measures` over the held-out volumes; write those of each volume to folder/figures.json."""
    mine: dict[str, dict[str, float]] = {}
    for volume in held[distributed.rank() :: distributed.world_size()]:
        mine[volume.id] = measures(stacks.read_stack(str(folder / f"{volume.id}.tif")), read_label(volume))
        distributed.alive()
    every = {name: row for part in distributed.gather(mine) for name, row in part.items()}
    rows = [every[volume.id] for volume in held]
    if distributed.is_main() and held:
        write_text(folder / "figures.json", json.dumps(every, indent=1))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def baselines(surface: SurfaceSegmentation, volumes: int = 8) -> dict[str, dict[str, float]]:
    """Return mean `measures` of two trivial predictions and, if there are any, of the model's: {name: {measure: mean}}.

    The trivial predictions: every voxel is sheet; every voxel brighter than a threshold is sheet, with the threshold of
    best Dice on the training volumes. The first `volumes` held-out volumes and training volumes are used, since a
    held-out volume of 320^3 takes about 12 s.
    """
    train_volumes, held, _ = surface.split
    counts = np.zeros((2, 65536))
    for volume in train_volumes[:volumes]:
        image, label = stacks.read_stack(volume.image), read_label(volume)
        for value in (0, 1):
            counts[value] += np.bincount(image[label == value], minlength=65536)
    from_here_up = counts[:, ::-1].cumsum(1)[:, ::-1]
    dices = 2 * from_here_up[1] / np.maximum(from_here_up.sum(0) + counts[1].sum(), 1)
    best = int(dices.argmax())
    rows: dict[str, list[dict[str, float]]] = {"all is sheet": [], f"brighter than {best - 1}": []}
    predicted = read_json(Path(surface.config.output_dir) / "predictions" / "held_out" / "figures.json")
    for volume in held[:volumes]:
        image, label = stacks.read_stack(volume.image), read_label(volume)
        for name, mask in zip(rows, (np.ones_like(image), image >= best), strict=False):
            rows[name].append(measures(mask, label))
        if predicted:
            rows.setdefault("this model", []).append(predicted[volume.id])
    return {
        name: {key: sum(row[key] for row in given) / len(given) for key in given[0]}
        for name, given in rows.items()
        if given
    }


def figure(surface: SurfaceSegmentation, most: int = 3) -> Figure:
    """Draw the middle slice of the first `most` held-out volumes: image, label, prediction."""
    held = surface.split[1][:most]
    drawn = plots.figure_of(9, 3.2 * len(held))
    axes = drawn.subplots(len(held), 3, squeeze=False)
    for row, volume in zip(axes, held, strict=True):
        middle = stacks.shape_of(volume.image)[0] // 2
        predicted = Path(surface.config.output_dir) / "predictions" / "held_out" / f"{volume.id}.tif"
        paths = {"image": volume.image, "label (grey: unlabelled)": str(volume.label), "prediction": str(predicted)}
        for axis, (title, path) in zip(row, paths.items(), strict=True):
            label = title.startswith("label")
            page = (read_label(volume, middle, middle + 1) if label else stacks.read_stack(path, middle, middle + 1))[0]
            shown = page if title == "image" else np.array([0.0, 1.0, 0.5])[page]
            axis.imshow(shown, cmap="gray", interpolation="nearest")
            axis.set_title(f"{volume.id}, slice {middle}: {title}", fontsize=8)
            plots.ink(axis)
            axis.set_axis_off()
    return drawn
