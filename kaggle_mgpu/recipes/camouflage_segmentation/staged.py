"""Train stages one after the other, each from the weights of the stage before, and join their results."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import shutil
import time
from pathlib import Path

from kaggle_mgpu import progress
from kaggle_mgpu.checkpoints import files
from kaggle_mgpu.fields import parse_duration
from kaggle_mgpu.launching import launch, lock
from kaggle_mgpu.parallel import distributed
from kaggle_mgpu.training import Result, train

from . import data
from .segmentation import CamouflageSegmentation, find, weights_from
from .settings import Config, Stage, stages


def run(config: Config, found: data.Found | None = None) -> Result:
    """Train stage after stage, and write one result for all stages into output_dir.

    If a stage stops early (time limit, or a request), the run ends; the same call continues this stage. `time_limit`
    covers all stages together.

    Args:
        found: the data, already described to the user. None: searched, checked and described.
    """
    # under torchrun every rank calls this function, and from_main below needs the process group
    distributed.init(timeout=datetime.timedelta(minutes=config.collective_timeout_minutes))
    with contextlib.ExitStack() as stack:  # each stage locks its own folder; this locks the whole run's
        distributed.from_main(lambda: stack.enter_context(lock.held(config.output_dir)))
        return _run(config, found)


def _run(config: Config, found: data.Found | None) -> Result:
    limit = parse_duration(config.time_limit) if config.time_limit else math.inf
    began = time.monotonic()
    planned: list[Stage] = []
    results: list[Result] = []
    _write_unfinished(config, planned, results)
    if found is None:
        found = distributed.from_main(lambda: find(config))
        if distributed.is_main():  # a caller that gives `found` has printed this
            print(CamouflageSegmentation(config, found=found).describe(), flush=True)
    source = distributed.from_main(lambda: weights_from(config))
    planned = stages(config, found)
    start: Path | None = None
    for number, stage in enumerate(planned, 1):
        left = limit - (time.monotonic() - began)
        if distributed.agree(left < 1) and results:
            break
        _write_unfinished(config, planned, results)
        if distributed.is_main():
            print(f"{stage.name} ({number} of {len(planned)}): {stage.share:.0%} of the backbone trained", flush=True)
        timed = stage.config if left == math.inf else stage.config.replace(time_limit=f"{max(left, 1):.1f}s")
        task = CamouflageSegmentation(timed, found=found, stage=stage.name, share=stage.share, start=start)
        results.append(launch(train, timed, task))
        if not results[-1].finished:
            break
        start = Path(timed.output_dir) / "model.safetensors"
    return distributed.from_main(lambda: combine(config, planned, results, source))


def _write_unfinished(config: Config, planned: list[Stage], results: list[Result]) -> None:
    """Write an unfinished result.json, so that a finished stage is not mistaken for a finished run."""
    if not distributed.is_main():
        return
    of_last = dataclasses.asdict(results[-1]) if results else {}
    step, max_steps = sum(result.step for result in results), sum(stage.max_steps for stage in planned)
    result = Result(
        output_dir=config.output_dir,
        finished=False,
        reason="under way, or killed",
        step=step,
        max_steps=max_steps,
        samples_seen=sum(result.samples_seen for result in results),
        metrics=of_last.get("metrics", {}),
        best=of_last.get("best"),
        seconds=sum(result.seconds for result in results),
        world_size=of_last.get("world_size", distributed.world_size()),
        strategy=of_last.get("strategy", config.strategy),
        precision=of_last.get("precision", config.precision),
        skipped_steps=sum(result.skipped_steps for result in results),
        remaining_steps=max_steps - step,
    )
    files.write_text(Path(config.output_dir) / "result.json", json.dumps(dataclasses.asdict(result), indent=1))


def combine(config: Config, planned: list[Stage], results: list[Result], weights_source: str = "") -> Result:
    """Write the stages' results into output_dir as the result of one run, and return the result.

    metrics.jsonl gets all stages' records, with step numbers that continue from stage to stage; model.safetensors comes
    from the last stage that ran, and best/ from the stage with the best `best_metric`.

    Args:
        weights_source: the source of the backbone's initial weights, for `backbone_weights` in result.json.
    """
    out, last = Path(config.output_dir), results[-1]
    records, offset = [], 0
    for stage, result in zip(planned, results, strict=False):
        its = progress.read(stage.config.output_dir)
        records += [{**r, "stage": stage.name, "step": r.get("step", 0) + offset} for r in its]
        offset += result.step
    files.write_text(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    sign = 1 if config.best_mode == "max" else -1
    best = max((r for r in results if r.best is not None), key=lambda r: sign * (r.best or 0), default=None)
    copies = {"model.safetensors": last, "best/model.safetensors": best}
    for name, of in copies.items():
        if of is not None and (source := Path(of.output_dir) / name).is_file():
            with files.atomically(out / name) as temporary:
                shutil.copyfile(source, temporary)
    later = sum(stage.max_steps for stage in planned[len(results) :])
    remaining = last.remaining_steps + later
    finished = last.finished and len(results) == len(planned)
    seconds = None
    if last.remaining_seconds is not None and last.remaining_steps:
        seconds = last.remaining_seconds * remaining / last.remaining_steps
    whole = dataclasses.replace(
        last,
        output_dir=str(out),
        finished=finished,
        reason=last.reason if finished or not last.finished else "time limit",
        step=sum(result.step for result in results),
        max_steps=sum(result.max_steps for result in results) + later,
        samples_seen=sum(result.samples_seen for result in results),
        best=None if best is None else best.best,
        seconds=sum(result.seconds for result in results),
        skipped_steps=sum(result.skipped_steps for result in results),
        remaining_steps=remaining,
        remaining_seconds=seconds,
    )
    document = {**dataclasses.asdict(whole), "backbone_weights": weights_source}
    files.write_text(out / "result.json", json.dumps(document, indent=1))
    if not finished:
        stopped = planned[len(results) - 1].name
        print(f"stopped in {stopped} ({whole.reason}): run the same cell or command again to continue there")
    return whole
