"""What the loop works on: a `Run` is made once from a config and a task, the same on every rank.

`trainer.train` is the loop itself and reads like a page of this; here is what its lines mean: how a run starts or goes
on, what is evaluated, saved and logged, and what is done when memory or the loss's finiteness runs out. What can be
said without a run has rooms of its own: build.py, resume.py, micro_batch.py, evaluation.py, divergence.py, sanity.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from . import (
    build,
    checkpoint,
    data,
    devices,
    distributed,
    divergence,
    evaluation,
    memory,
    optim,
    progress,
    randomness,
    resume,
    sanity,
    session,
    strategy,
)
from .clock import Clock
from .config import TrainConfig, parse_duration
from .micro_batch import MicroBatchSizes
from .task import Result, Task, TrainState

RETRY_SECONDS = 60.0
"""After a save that failed, the next one."""


class Run:
    """What the loop works on, made once from the config and the task, the same on every rank."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.out, self.main, self.world = Path(config.output_dir), distributed.is_main(), distributed.world_size()
        allowed = parse_duration(config.time_limit) if config.time_limit else float("inf")
        self.time_limit = min(allowed, session.time_left())
        self.deadline = session.Deadline(self.time_limit)
        self.poll = distributed.Poll()

        # How many replicas, in which precision
        self.device = distributed.device()
        self.gpus = devices.gpus() if self.device.type == "cuda" else []
        self.precision, precision_reason = devices.precision(config.precision, self.gpus)
        wanted = (len(self.gpus) or 1) if config.nproc == "auto" else int(config.nproc)
        kind, kind_reason = strategy.choose(
            config.strategy, num_gpus=len(self.gpus), num_replicas=wanted, world_size=self.world
        )
        replicas = wanted if kind.name == "dp" else self.world

        # The data, and how each batch of it is split
        randomness.seed_everything(config.seed)  # a random split is then the same one in each process and session
        train_set, val_set = task.train_data(), task.val_data()
        self.plan = build.batch_plan(config, data.size_of(train_set, "train_data()"), kind, replicas)
        when = {"epoch": self.plan.steps_per_epoch, "end": None}
        self.eval_every = when[config.eval_every] if isinstance(config.eval_every, str) else config.eval_every
        if val_set is not None and data.size_of(val_set, "val_data()") == 0:
            raise ValueError("the validation data is empty: val_data() has length 0. Return None to train without.")
        collate = default_collate if type(task).collate is Task.collate else task.collate
        self.fetch = data.Fetch(train_set, collate, seed=config.seed)
        self.val_fetch = (
            None if val_set is None else data.Fetch(val_set, collate, seed=config.seed, purpose="evaluation")
        )
        self.workers = self.loaders(self.fetch)

        # The model: the same seed on every rank gives the same weights
        randomness.seed_everything(config.seed)
        self.strategy = kind(
            task.loss,
            task.metrics,
            precision=self.precision,
            device=self.device,
            num_replicas=replicas,
            find_unused_parameters=config.find_unused_parameters,
            **build.strategy_options(kind.name, config, task),
        )
        self.lr = self.plan.scaled_lr(config.lr, config.lr_scaling, config.base_batch_size)
        self.warmup_steps = optim.resolve_warmup(config.warmup_steps, self.plan.max_steps)
        self.lr_at(0)  # a schedule that cannot be is found out now
        with self.strategy.building():
            model = build.model(task, config)
        self.strategy.prepare(model)
        self.optimizer = self.strategy.attach(task.optimizer(model, config.replace(lr=self.lr)))
        self.ema = optim.EMA(model, config.ema_decay) if config.ema_decay else None

        self.state = TrainState()
        self.stamp = {
            "task": task.name or type(task).__name__,
            "backend": task.backend,
            "global_batch_size": self.plan.global_batch_size,
            "dataset_size": self.plan.dataset_size,
        }
        self.checkpoints = checkpoint.Checkpoints(
            self.out / "checkpoints", keep_last=config.keep_last, flush_first=[self.out / progress.METRICS]
        )
        self.in_shards = config.checkpoint_format == "sharded" and kind.name == "fsdp"
        self.start: Path | None = None
        self.sizes = MicroBatchSizes(
            config, self.plan, self.strategy, self.optimizer, self.fetch, self.gpus, self.checkpoints.folder
        )
        self.attempt, self.because = memory.Attempt(self.undo_step), ""
        self.update, self.evaluation = memory.Attempt(self.give_up_update), memory.Attempt(self.give_up_evaluation)
        self.evaluation_size: int | None = None  # where it had to be halved
        self.unit = "GPU" if self.gpus else "process" if kind.name != "dp" else "replica"
        self.header = [
            f"strategy {self.strategy.name}: {kind_reason}; precision {self.precision}: {precision_reason}",
            f"learning rate {self.lr:g}"
            + (f" ({config.lr:g} scaled {config.lr_scaling})" if self.lr != config.lr else "")
            + f", {config.schedule}, {self.warmup_steps} warm-up steps; "
            + f"{sum(p.numel() for p in model.parameters()):,} parameters; {self.workers} loader processes per rank",
        ]

    def lr_at(self, step: int) -> float:
        """The learning rate of the step to be taken next."""
        config = self.config
        return optim.lr_at(
            step,
            schedule=config.schedule,
            lr=self.lr,
            max_steps=self.plan.max_steps,
            warmup_steps=self.warmup_steps,
            min_lr=config.min_lr,
            cycles=config.schedule_cycles,
            power=config.schedule_power,
        )

    def resume(self) -> Result | None:
        """Load the checkpoint to go on from, if there is one; the result, if this run has finished already."""
        self.start = distributed.from_main(self._starting_point)
        result = None
        if self.start is not None:  # under torchrun rank 0 may go on, and change result.json, before another rank looks
            result = distributed.from_main(lambda: resume.finished(self.out, self.plan.max_steps))
        if result is not None:
            weights = checkpoint.read_tensors(self.out / "model.safetensors")
            checkpoint.check_model(weights, self.strategy.described(), str(self.out))
            if self.main:
                edited = sanity.code_then(self.out) != sanity.code_of(self.task)
                changed = "; the task's code has CHANGED since" if edited else ""
                print(f"already finished after {result.step} steps: {self.out}{changed}. resume='never' trains anew.")
            return dataclasses.replace(result, output_dir=str(self.out))
        self.fit_micro_batch()
        if self.start is not None:
            saved = checkpoint.load(self.start, whole=self.strategy.alone)
            checkpoint.check_model(saved.tensors["model"], self.strategy.described(), f"{self.start}")
            self.strategy.load_full_state(self.optimizer, {**saved.state, "model": saved.tensors["model"]})
            if self.ema is not None:
                self.ema.load_state_dict(saved.tensors["ema"])
            self.state = TrainState(**saved.facts["state"])
            best = self.start.parent.parent / "best" / "model.safetensors"
            if not best.is_file():
                self.state.best = None  # without its weights it is worth nothing
            elif self.start.parent != self.checkpoints.folder:
                try:
                    weights = checkpoint.read_tensors(best)
                    checkpoint.check_model(weights, self.strategy.described(), str(best))
                    if self.main:
                        checkpoint.replace_tensors(self.out / "best" / "model.safetensors", weights)
                except Exception as error:  # somebody else's file may hold anything
                    self.header.append(f"{best} cannot be used, the best is found anew: {error}")
                    self.state.best = None
            self.header.append(f"going on from {self.start}: step {self.state.step} of {self.plan.max_steps}")
            may = resume.changes(saved.facts, self.config.to_dict(), self.config.MAY_CHANGE)
            if may:
                listed = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in may.items())
                self.header.append(f"changed since, which is allowed: {listed}")
        return None

    def _starting_point(self) -> Path | None:
        """On rank 0: which checkpoint to go on from, with the run's folder made ready for it."""
        config = self.config
        for left in self.out.glob(".rescue-step-*"):  # by a rank that was killed
            shutil.rmtree(left, ignore_errors=True)
        start = resume.starting_point(
            self.checkpoints,
            resume=config.resume,
            config=config.to_dict(),
            may_change=config.MAY_CHANGE,
            stamp=self.stamp,
            expected=resume.expected_by(self.strategy, self.optimizer, self.ema, self.plan),
        )
        aside = self.checkpoints.put_aside(after=-1 if start is None else checkpoint.read_facts(start)["step"])
        if aside is not None:
            print(f"checkpoints that this run does not go on from are now in {aside}", flush=True)
        return start

    def fit_micro_batch(self) -> None:
        """Settle on a micro-batch size where it is to be found, or where a larger one was too much before."""
        folders = [self.checkpoints.folder, *([self.start.parent] if self.start else [])]
        auto = self.config.micro_batch_size == "auto"
        self.plan, self.because = self.sizes.settle(self.plan, auto=auto, folders=folders)
        if self.because:
            self.header.append(f"micro_batch_size {self.plan.micro_batch_size}: {self.because}")

    def start_log(self) -> progress.Progress:
        """Print how the run will go and open its log."""
        first = self.main and self.state.step == 0 and self.strategy.alone
        largest = min(self.plan.dataset_size, self.plan.micro_batch_size)
        if first and sanity.looks_like_a_mean(self.task, self.strategy, self.fetch, largest):
            self.header.append(sanity.A_MEAN)
        if self.main:
            print("\n".join([self.header[0], self.plan.sentence(self.unit), *self.header[1:]]), flush=True)
            document = {**self.config.to_dict(), "stamp": self.stamp, "code": sanity.code_of(self.task)}
            checkpoint.write_text(self.out / "config.json", json.dumps(document, indent=1))
            (self.out / "result.json").unlink(missing_ok=True)  # until there is a new one, this run is not finished
        nbytes = sum(t.nbytes for t in self.strategy.described().values())
        val_size = 0 if self.val_fetch is None else data.size_of(self.val_fetch.dataset, "val_data()")
        # guesses, until they are measured: weights with two moments at 50 MB/s, a sample at a training sample's price
        self.clock = Clock(
            self.state.seconds, save=4 * nbytes / 50e6, evaluation=val_size / self.plan.global_batch_size
        )
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        if self.start is not None and self.start.parent != self.checkpoints.folder:
            # among the inputs: saved here at once, so that this session's output is enough to go on from, however the
            # session ends, and the next needs no other's
            self.saved_step, self.saved_at = -1, -math.inf
        device_line = ", ".join([*(gpu.name for gpu in self.gpus[: self.plan.num_replicas]), self.precision])
        self.log = progress.Progress(
            self.out,
            max_steps=self.plan.max_steps,
            main=self.main,
            resumed_step=self.state.step,
            unit=self.task.unit,
            on_record=self.task.on_record,
            tensorboard=self.config.tensorboard,
            world_size=self.world,
            device_line=device_line,
            settings=self.config.to_dict(),
            history=self.start.parent.parent if self.start else None,
            sample=devices.sample if self.gpus else list,
        )
        # what progress.attach and the pictures need to know of the run
        record = {"kind": "start", "step": self.state.step, "samples": self.state.samples_seen}
        record |= {"world_size": self.world, "strategy": self.strategy.name, "precision": self.precision}
        record |= {"micro_batch_size": self.plan.micro_batch_size, "micro_batch_size_because": self.because}
        whole, steps = divmod(self.plan.max_steps, self.plan.steps_per_epoch)
        epochs = whole + steps * self.plan.global_batch_size / self.plan.dataset_size
        record |= {"max_steps": self.plan.max_steps, "epochs": epochs}
        record |= {"unit": self.task.unit, "device_line": device_line}
        left = None if self.time_limit == math.inf else self.deadline.remaining()
        self.log.record({**record, "time": self.clock.seconds(), "time_left": left})
        return self.log

    def batches(self) -> Iterator[data.Step]:
        """This rank's share of each global batch, from the run's position on, on the device."""
        if self.attempt.failed:
            memory.release()
        steps = data.Batches(
            data.Sampler(self.plan, seed=self.config.seed, samples_seen=self.state.samples_seen),
            self.fetch,
            count=None if type(self.task).count is Task.count else self.task.count,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        return data.on_device(steps, self.strategy.input_device)

    def loaders(self, fetch: data.Fetch) -> int:
        """How many loader processes this rank takes for a dataset."""
        return data.workers_for(fetch, self.config.data_workers, devices.cpu_count(), distributed.local_world_size())

    # Questions of the clock: each rank answers for itself
    def out_of_time(self, evaluation_due: bool) -> bool:
        """Whether the steps until this is asked again, an evaluation if one is due, and a save might outlast it."""
        if self.time_limit == math.inf:
            return False
        return self.deadline.remaining() <= self.clock.margin(self.poll.interval, evaluation_due)

    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.save_interval

    @property
    def save_interval(self) -> float:
        """Seconds between two saves."""
        return self.config.save_interval_minutes * 60

    def evaluation_is_due(self, done: bool) -> bool:
        step = self.state.step
        if not done and (self.eval_every is None or step % self.eval_every):
            return False
        return self.val_fetch is not None and step > 0 and self.state.evaluated != step

    def evaluate(self) -> None:
        """Metrics over val_data, each sample once over all ranks; keeps the weights where they are the best so far."""
        state, fetch = self.state, self.val_fetch
        assert fetch is not None
        size = self.plan.micro_batch_size * (self.plan.num_replicas // self.world)
        size = min(size, self.evaluation_size or size)
        with self.clock.evaluating():
            with self.evaluation, self.averaged_weights():
                self.strategy.sync_buffers()
                workers, seed = self.loaders(fetch), self.config.seed
                state.metrics, fitted = evaluation.evaluate(
                    self.task, self.strategy, fetch, size, step=state.step, seed=seed, workers=workers
                )
            if fitted < size:
                self.evaluation_size = fitted
                self.log.note(
                    f"out of memory in the evaluation after step {state.step} with {size} samples at a time: {fitted} "
                    f"from here on, with the same result"
                )
            if evaluation.better(self.config, state):
                with self.averaged_weights():
                    written = self.write_weights(self.out / "best" / "model.safetensors")
                if not distributed.agree(not written):  # the best is what best/ holds, and no other number
                    state.best = state.metrics[self.config.best_metric]
            state.evaluated = state.step
        record = {"kind": "eval", "step": state.step, "samples": state.samples_seen}
        record |= {f"val_{name}": value for name, value in state.metrics.items()}
        self.log.record({**record, **self.times()})

    def save(self) -> None:
        """Copy the state for a checkpoint, which rank 0 then writes behind the next steps."""
        with self.clock.pause():
            self.state.seconds = self.clock.seconds()
            everything = self.everything()
            if self.in_shards:
                self.checkpoints.begin_together(self.state.step, **everything)
            elif self.main:
                self.checkpoints.begin(self.state.step, **everything)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def everything(self) -> dict[str, Any]:
        """All that a checkpoint holds, listed once."""
        full = self.strategy.held_state(self.optimizer)
        tensors = {"model": full.pop("model")} | ({"ema": self.ema.state_dict()} if self.ema else {})
        if not self.in_shards:
            tensors, full = self.strategy.whole(tensors), self.strategy.whole(full)
        facts = {"state": dataclasses.asdict(self.state), "stamp": self.stamp, "world_size": self.world}
        return {"tensors": tensors, "state": full, "facts": {**facts, "config": self.config.to_dict()}}

    def report_saves(self, saves: list[checkpoint.Saved]) -> None:
        """Record what became of checkpoints that were being written."""
        for saved in saves:
            self.clock.saved(saved.seconds)
            if saved.note:
                self.log.note(saved.note)
            if saved.error is not None:  # what failed may pass soon: the next save is not a whole interval away
                self.saved_at = min(self.saved_at, time.monotonic() + RETRY_SECONDS - self.save_interval)
            if saved.path is not None:
                times = {"seconds": saved.seconds, "time": self.clock.seconds()}
                self.log.record({"kind": "save", "step": saved.step, **times})

    def write_weights(self, path: Path) -> bool:
        """Put the weights together as they are now and write them; on a full disk say so, keep what is there, go on."""
        weights = self.strategy.weights()
        if not self.main:
            return True
        try:
            checkpoint.replace_tensors(path, weights)
        except OSError as error:
            self.log.note(f"{path} could not be written: {error.strerror or error}")
            return False
        return True

    def undo_step(self, error: BaseException) -> None:
        """Halve the micro-batch after it was too much. Nothing of the step counts yet, so it can begin again.

        With several ranks the others are in the middle of a collective by now, which only an end of the processes ends:
        what is known here, which is all there is, is saved for the next start.
        """
        self.strategy.undo_step()
        try:
            self.plan, text = self.sizes.halve(self.plan, f"in step {self.state.step + 1}")
        except torch.OutOfMemoryError as not_even_one:
            raise torch.OutOfMemoryError(f"{not_even_one} {self.kept()}") from error
        if self.world == 1:
            self.log.note(text)
            return
        self.state.seconds = self.clock.seconds()
        saved = "The newest checkpoint is from before that step"
        if self.strategy.alone:  # else no rank has all of it
            saved = f"The state before that step is in {self.checkpoints.rescue(self.state.step, **self.everything())}"
        raise distributed.RestartError(
            f"rank {distributed.rank()} ran {text}. {saved}: run the same again and it goes on from there."
        ) from error

    def give_up_update(self, error: BaseException) -> None:
        """End the run: the optimizer was at work, and nothing tells which of the weights and moments it had changed.

        So what is in memory is not saved. It rarely matters: an optimizer wants most in its first step, when it makes
        its moments, and as much in each of the others.
        """
        raise memory.none_for_the_optimizer(self.state.step + 1, self.newest()) from error

    def give_up_evaluation(self, error: BaseException) -> None:
        """End the run; the weights are whole. Ranks that compute together start again, with smaller micro-batches."""
        step = self.state.step
        if self.strategy.alone:
            raise memory.none_for_the_evaluation(step, str(error), self.kept()) from error
        try:
            self.plan, text = self.sizes.halve(self.plan, f"in the evaluation after step {step}")
        except torch.OutOfMemoryError as not_even_one:
            raise torch.OutOfMemoryError(f"{not_even_one} {self.kept()}") from error
        raise distributed.RestartError(
            f"rank {distributed.rank()} ran {text}. The newest checkpoint is from before that evaluation: run the same "
            f"again and it goes on from there."
        ) from error

    def kept(self) -> str:
        """Save what is whole in memory, where a rank can do so alone; where the run can go on from, in words."""
        step = self.state.step
        # what rank 0 has begun to save, another rank cannot count on: torchrun kills it, launch waits only so long
        if not self.strategy.alone or (self.main and step == self.saved_step):
            return self.newest()
        self.state.seconds = self.clock.seconds()
        try:
            path = self.checkpoints.rescue(step, **self.everything())
        except OSError as error:
            return f"The state after step {step} could not be saved: {error}. {self.newest()}"
        return f"The state after step {step} is in {path}: a run goes on from there."

    def newest(self) -> str:
        """Which checkpoint there is to go on from, in words."""
        failed = self.last_saves()
        newest = next(iter(self.checkpoints.all()), None)
        return (f"The newest checkpoint is {newest}." if newest else "There is no checkpoint yet.") + failed

    def last_saves(self) -> str:
        """Where the run ends with an error: wait for what rank 0 still writes; whether that failed, in words."""
        try:
            if self.main:
                self.report_saves(saves := self.checkpoints.wait())
                if saves and saves[-1].error:
                    return f" The last save failed: {saves[-1].error}."
        except OSError as error:  # of the writer; what the run ends with is what led to it all
            return f" The last save failed: {error}."
        return ""

    def log_step(self, losses: list[Tensor], step: data.Step, lr: float, norm: Tensor) -> None:
        """Record the step just taken, if it is one to record. Nothing else waits for the GPU."""
        state, logged = self.state, self.state.step
        if self.checkpoints.news:
            self.report_saves(self.checkpoints.collect())
        due = logged in (1, self.plan.max_steps) or logged % self.config.log_every == 0
        in_a_row = self.strategy.skipped_in_a_row
        if not due and (isinstance(in_a_row, Tensor) or in_a_row == 0):
            return
        total = torch.stack([loss.double() for loss in losses]).sum().cpu()
        loss = float(distributed.sum(total)) / step.terms()
        if divergence.beyond_hope(logged, loss, int(in_a_row), self.precision):
            self.diverged(int(in_a_row), loss, lr, norm)
        if due:
            record = {"kind": "train", "step": logged, "samples": state.samples_seen}
            record["epoch"] = round(state.samples_seen / self.plan.dataset_size, 4)
            record |= {"loss": loss, "lr": lr, "grad_norm": float(norm), "skipped": int(self.strategy.skipped)}
            self.log.record({**record, **self.clock.throughput(self.task.unit), **self.times()})

    def times(self) -> dict[str, Any]:
        """How long the run has taken, and what the time since the last record went into."""
        return {"time": self.clock.seconds(), "spent": self.clock.where(self.strategy.communication())}

    def diverged(self, in_a_row: int, loss: float, lr: float, norm: Tensor) -> None:
        """Stop a run whose gradient is not finite any more."""
        step, first = self.state.step, self.state.step - max(in_a_row, 1) + 1
        samples = divergence.samples_of(first, self.plan, self.config.seed)
        self.last_saves()
        self.log.record({"kind": "note", "step": step, "text": f"diverged from step {first} on", "indices": samples})
        distributed.barrier()  # a rank that raised sooner would take rank 0 along, and its checkpoint and record
        good = next((p for p in self.checkpoints.all() if checkpoint.step_of(p) < first), None)
        raise divergence.error(step, first, samples, left_out=in_a_row, loss=loss, lr=lr, norm=float(norm), good=good)

    def finish(self, reason: str) -> Result:
        """Write the weights and result.json: what the run came to, or how far it got and why no further."""
        state = self.state
        state.seconds = self.clock.seconds()
        remaining = self.plan.max_steps - state.step
        finished = remaining <= 0 and not self.evaluation_is_due(done=True)
        if finished:
            reason = "finished"
        if (note := self.last_save(finished)) and not finished:
            reason += f"; {note}"
        result = Result(
            output_dir=str(self.out),
            finished=finished,
            reason=reason,
            step=state.step,
            max_steps=self.plan.max_steps,
            samples_seen=state.samples_seen,
            metrics=state.metrics,
            best=state.best,
            seconds=state.seconds,
            world_size=self.world,
            strategy=self.strategy.name,
            precision=self.precision,
            skipped_steps=int(self.strategy.skipped),
            remaining_steps=remaining,
            remaining_seconds=self.clock.left(remaining),
        )
        with self.averaged_weights():
            weights = self.strategy.weights()
            if self.main:
                note = resume.write_result(self.checkpoints, self.out, result, weights)
                if note:
                    self.log.note(note)
        ended = {"finished": finished, "metrics": state.metrics, "seconds": state.seconds, **self.times()}
        self.log.record({"kind": "stop", "step": state.step, "reason": reason, **ended})
        self.log.close(dataclasses.asdict(result))
        distributed.barrier()  # nobody leaves, and nothing starts to read, before the files are there
        return result

    def last_save(self, finished: bool) -> str:
        """Wait for the last save; where it failed, save again. Why there is no checkpoint of this step, in words.

        Raises:
            OSError: it failed again and again, and the run has not come to its end, where the weights are what counts.
        """
        while True:
            note, error, again = "", None, False
            if self.main:
                try:
                    self.report_saves(saves := self.checkpoints.wait())
                    again = self.checkpoints.may_try_again
                    note = saves[-1].note if any(saved.path is None for saved in saves) else ""
                except OSError as failed:
                    note, error = str(failed), failed
            if not distributed.agree(again):
                break
            self.save()
        if error is not None and not finished:
            raise error
        if error is not None:
            self.log.note(note)
        return note

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has its averaged weights, where the run averages them."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swap(self.strategy.model)
