"""What the loop works on: a `Run` is made once from a config and a task, the same on every rank.

`trainer.train` is the loop itself and reads like a page of this; here is what its lines mean: how a run starts or goes
on, what is evaluated, saved and logged, and what is done when memory or the loss's finiteness runs out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from . import checkpoint, data, devices, distributed, memory, optim, progress, randomness, resume, session, strategy
from .checkpoint import DiskFullError
from .clock import Clock
from .config import TrainConfig, parse_duration
from .task import DivergedError, Result, Task, TrainState

# Steps left out one after the other before the run is given up. fp16 starts with a loss scale of 2^16, and halves it
# with each overflow: twenty in a row are nothing unusual.
GIVE_UP_AFTER = {"fp16": 30, "fp32": 5, "bf16": 5}


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
        if config.micro_batch_size == "auto" and config.gradient_accumulation_steps:
            raise ValueError(
                f"micro_batch_size='auto' with gradient_accumulation_steps={config.gradient_accumulation_steps}: the "
                f"one follows from the other. Give global_batch_size instead."
            )
        if config.micro_batch_size == "auto" and not kind.alone:
            raise ValueError(
                f"micro_batch_size='auto' tries steps on each GPU by itself, which strategy {kind.name!r} cannot: give "
                f"a number. One that is too large is halved, and the run starts again from its newest checkpoint."
            )
        self.plan = data.BatchPlan.make(
            dataset_size=data.size_of(train_set, "train_data()"),
            num_replicas=replicas,
            global_batch_size=config.global_batch_size,
            micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            epochs=config.epochs,
            max_steps=config.max_steps,
        )
        when = {"epoch": self.plan.steps_per_epoch, "end": None}
        self.eval_every = when[config.eval_every] if isinstance(config.eval_every, str) else config.eval_every
        if val_set is not None and data.size_of(val_set, "val_data()") == 0:
            raise ValueError("the validation data is empty: val_data() has length 0. Return None to train without.")
        collate = default_collate if type(task).collate is Task.collate else task.collate
        self.fetch = data.Fetch(train_set, collate, seed=config.seed)
        self.val_fetch = (
            None if val_set is None else data.Fetch(val_set, collate, seed=config.seed, purpose="evaluation")
        )
        self.workers = data.workers_for(
            self.fetch, config.data_workers, devices.cpu_count(), distributed.local_world_size()
        )

        # The model: the same seed on every rank gives the same weights
        randomness.seed_everything(config.seed)
        self.strategy = kind(
            task.loss,
            task.metrics,
            precision=self.precision,
            device=self.device,
            num_replicas=replicas,
            find_unused_parameters=config.find_unused_parameters,
            **_options(kind.name, config, task),
        )
        self.lr = self.plan.scaled_lr(config.lr, config.lr_scaling, config.base_batch_size)
        self.warmup_steps = optim.resolve_warmup(config.warmup_steps, self.plan.max_steps)
        self.lr_at(0)  # a schedule that cannot be is found out now
        with self.strategy.building():
            model = _build(task, config)
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
        self.attempt, self.because = Attempt(self), ""
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
        if self.start is not None and (result := _finished(self.out, self.plan.max_steps)) is not None:
            weights = checkpoint.read_tensors(self.out / "model.safetensors")
            checkpoint.check_model(weights, self.strategy.described(), str(self.out))
            if self.main:
                changed = "; the task's code has CHANGED since" if _code_then(self.out) != _code(self.task) else ""
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
            model=self.strategy.described(),
        )
        aside = self.checkpoints.put_aside(after=-1 if start is None else checkpoint.read_facts(start)["step"])
        if aside is not None:
            print(f"checkpoints that this run does not go on from are now in {aside}", flush=True)
        return start

    def fit_micro_batch(self) -> None:
        """Settle on a micro-batch size where it is to be found, or where a larger one was too much before."""
        auto, folders = self.config.micro_batch_size == "auto", [self.checkpoints.folder]
        folders += [self.start.parent] if self.start else []
        known = distributed.from_main(lambda: memory.remembered(folders, self.conditions()))
        if known is not None and (auto or known[0] < self.plan.micro_batch_size):
            self.plan = self.plan.with_micro_batch_size(known[0])
            self.because = known[1]
            self.header.append(f"micro_batch_size {self.plan.micro_batch_size}: {known[1]}")
        elif auto:
            with memory.as_it_was(self.strategy.model, self.optimizer):
                size = memory.largest_that_fits(self.plan.micro_batch_sizes, self.fits)
            if size is None:
                raise torch.OutOfMemoryError(_NOT_EVEN_ONE)
            self.plan = self.plan.with_micro_batch_size(size)
            self.remember_micro_batch("the largest that fits, with a tenth to spare")
            self.header.append(f"micro_batch_size {size}: the largest that fits, with a tenth to spare")

    def fits(self, micro_batch_size: int) -> bool:
        """Whether every rank can take a real step with a micro-batch a tenth larger."""
        size = micro_batch_size + math.ceil(micro_batch_size / 10) if micro_batch_size > 1 else 1
        size *= self.plan.num_replicas // self.world
        failed = False
        try:
            batch = self.fetch[data.Order(self.plan.dataset_size, self.config.seed, 0)[:size]]
            self.strategy.try_step(data.move(batch, self.strategy.input_device), self.optimizer)
        except RuntimeError as error:
            if not memory.out_of_memory(error):
                raise
            failed = True
        if failed:  # here, where the error no longer holds on to what it was about
            self.strategy.model.zero_grad(set_to_none=True)
            memory.release()
        return not distributed.agree(failed)

    def conditions(self) -> dict[str, Any]:
        """What a micro-batch size that fits depends on."""
        config, model = self.config, self.strategy.model
        return {
            "devices": [[gpu.name, gpu.memory_bytes] for gpu in self.gpus[: self.plan.num_replicas]] or "cpu",
            "model": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
            "global_batch_size": self.plan.global_batch_size,
            "num_replicas": self.plan.num_replicas,
            "strategy": self.strategy.name,
            "precision": self.precision,
            "compile": config.compile,
            "gradient_checkpointing": config.gradient_checkpointing,
        }

    def remember_micro_batch(self, why: str) -> None:
        if self.main or self.attempt.failed:
            # two ranks that write the same at the same time: one finds its file gone, renamed by the other
            with contextlib.suppress(FileNotFoundError):
                memory.remember(self.checkpoints.folder, self.plan.micro_batch_size, why, self.conditions())

    def looks_like_a_mean(self) -> bool:
        """Whether the loss of two samples is the mean of theirs and not the sum: the usual slip, which Adam hides."""
        how = self.strategy
        if min(self.plan.dataset_size, self.plan.micro_batch_size) < 2 or type(self.task).count is not Task.count:
            return False
        how.model.eval()
        try:
            with torch.no_grad(), randomness.undisturbed():
                batches = (self.fetch[np.array(rows)] for rows in ([0, 1], [0], [1]))
                both, one, other = (float(how.call(data.move(batch, self.device))) for batch in batches)
        except Exception:  # a model that cannot take a single sample, say: then it is not told
            return False
        finally:
            how.model.train()
        total = one + other
        return math.isclose(both, total / 2, rel_tol=1e-3) and not math.isclose(both, total, rel_tol=1e-2)

    def start_log(self) -> progress.Progress:
        """Print how the run will go and open its log."""
        if self.main and self.state.step == 0 and self.strategy.alone and self.looks_like_a_mean():
            self.header.append(
                "WARNING: Task.loss looks like a mean over the batch. It should be the SUM over its samples (reduction="
                "'sum'): as it is, the gradient is too small and depends on how the batch is split."
            )
        if self.main:
            print("\n".join([self.header[0], self.plan.sentence(self.unit), *self.header[1:]]), flush=True)
            document = {**self.config.to_dict(), "stamp": self.stamp, "code": _code(self.task)}
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

    # Questions of the clock: each rank answers for itself
    def out_of_time(self, evaluation_due: bool) -> bool:
        """Whether the steps until this is asked again, an evaluation if one is due, and a save might outlast it."""
        if self.time_limit == math.inf:
            return False
        return self.deadline.remaining() <= self.clock.margin(self.poll.interval, evaluation_due)

    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.config.save_interval_minutes * 60

    def evaluation_is_due(self, done: bool) -> bool:
        step = self.state.step
        if not done and (self.eval_every is None or step % self.eval_every):
            return False
        return self.val_fetch is not None and step > 0 and self.state.evaluated != step

    def evaluate(self) -> None:
        """Metrics over val_data, each sample once over all ranks; keeps the weights where they are the best so far."""
        state, model, fetch = self.state, self.strategy.model, self.val_fetch
        assert fetch is not None
        with self.clock.evaluating(), self.averaged_weights():
            self.strategy.sync_buffers()
            randomness.seed_for(randomness.key(self.config.seed, "metrics"), state.step, distributed.rank())
            batches = data.evaluation_batches(
                fetch,
                data.size_of(fetch.dataset, "val_data()"),
                self.plan.micro_batch_size * (self.plan.num_replicas // self.world),
                workers=data.workers_for(
                    fetch, self.config.data_workers, devices.cpu_count(), distributed.local_world_size()
                ),
                pin_memory=self.device.type == "cuda",
                device=self.strategy.input_device,
            )
            model.eval()
            parts = distributed.gather(self.strategy.evaluate(batches))
            model.train()
            state.metrics, state.evaluated = _merge(self.task, parts), state.step
            if _better(self.config, state):
                state.best = state.metrics[self.config.best_metric]
                self.write_weights(self.out / "best" / "model.safetensors")
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
        except DiskFullError as error:
            self.log.note(f"{path} could not be written: {error.strerror}")
            return False
        return True

    def undo_step(self, error: BaseException) -> None:
        """Halve the micro-batch after it was too much. Nothing of the step counts yet, so it can begin again.

        With several ranks the others are in the middle of a collective by now, which only an end of the processes ends:
        what is known here, which is all there is, is saved for the next start.
        """
        before, step = self.plan.micro_batch_size, self.state.step
        if before == 1:
            raise torch.OutOfMemoryError(_NOT_EVEN_ONE) from error
        self.strategy.undo_step()
        self.plan = self.plan.with_micro_batch_size(before // 2)
        after = self.plan.micro_batch_size
        why = f"{before} was too much in step {step + 1}: out of memory"
        self.remember_micro_batch(why)
        text = (
            f"out of memory with micro_batch_size {before} in step {step + 1}: {after} from here on, with "
            f"{self.plan.gradient_accumulation_steps} accumulation steps, so that the batch stays the same"
        )
        if self.world == 1:
            self.log.note(text)
            return
        self.state.seconds = self.clock.seconds()
        saved = "The newest checkpoint is from before that step"
        if self.strategy.alone:  # else no rank has all of it
            saved = f"The state before that step is in {self.checkpoints.rescue(step, **self.everything())}"
        raise distributed.RestartError(
            f"rank {distributed.rank()} ran {text}. {saved}: run the same again and it goes on from there."
        ) from error

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
        # in full precision the first step has no excuse: what is not finite then will not be later
        patience = 1 if logged == 1 and self.precision != "fp16" else GIVE_UP_AFTER[self.precision]
        gradient_alone_is_finite = not math.isfinite(loss) and int(in_a_row) == 0 and self.precision != "fp16"
        if int(in_a_row) >= patience or gradient_alone_is_finite:
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
        size, batch = self.plan.dataset_size, self.plan.global_batch_size
        per_epoch = self.plan.steps_per_epoch
        epoch, start = divmod(first - 1, per_epoch)
        indices = data.Order(size, self.config.seed, epoch)[start * batch : (start + 1) * batch].tolist()
        if self.main:
            self.report_saves(self.checkpoints.wait())
        good = next((p for p in self.checkpoints.all() if checkpoint.step_of(p) < first), None)
        record = {"kind": "note", "step": step, "text": f"diverged from step {first} on", "indices": indices}
        self.log.record(record)
        shown = ", ".join(map(str, indices[:16])) + (
            f", … ({len(indices)} in all: see metrics.jsonl)" if len(indices) > 16 else ""
        )
        which = f"step {step} was" if first == step else f"steps {first} to {step} were"
        left_out = f"; {which} left out, for want of a finite gradient" if in_a_row else ""
        raise DivergedError(
            f"the loss is {loss} at step {step} (learning rate {lr:g}, gradient norm {float(norm):g}){left_out}. "
            f"Step {first} had the samples {shown}. "
            + (f"The last checkpoint from before is {good}. " if good else "There is no checkpoint from before. ")
            + "Look for nan in the data or a division by zero in Task.loss; else lower lr or raise warmup_steps."
        )

    def finish(self, reason: str) -> Result:
        """Write the weights and result.json: what the run came to, or how far it got and why no further."""
        state = self.state
        state.seconds = self.clock.seconds()
        remaining = self.plan.max_steps - state.step
        finished = remaining <= 0 and not self.evaluation_is_due(done=True)
        if finished:
            reason = "finished"
        if self.main:
            self.report_saves(saves := self.checkpoints.wait())
            if not finished and any(saved.path is None for saved in saves):
                reason += f"; {saves[-1].note}"
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
            written = self.write_weights(self.out / "model.safetensors")
        if self.main:
            if finished and not written:
                raise DiskFullError(
                    f"trained to the end, but the disk has no room for {self.out / 'model.safetensors'}. Free some "
                    f"space and run the same again: it goes on from the last checkpoint."
                )
            checkpoint.write_text(self.out / "result.json", json.dumps(dataclasses.asdict(result), indent=1))
        ended = {"finished": finished, "metrics": state.metrics, "seconds": state.seconds, **self.times()}
        self.log.record({"kind": "stop", "step": state.step, "reason": reason, **ended})
        self.log.close(dataclasses.asdict(result))
        distributed.barrier()  # nobody leaves, and nothing starts to read, before the files are there
        return result

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has its averaged weights, where the run averages them."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swap(self.strategy.model)


class Attempt:
    """Around the micro-steps of a step: when one runs out of memory, the step has `failed` and can begin again."""

    def __init__(self, run: Run) -> None:
        self.run, self.failed = run, False

    def __enter__(self) -> None:
        self.failed = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not memory.out_of_memory(error):
            return False
        self.failed = True
        self.run.undo_step(error)
        return True


_NOT_EVEN_ONE = (
    "out of memory with micro_batch_size 1: not even one sample fits. Try gradient_checkpointing=True, "
    "precision='fp16', shorter or smaller samples, or a smaller model."
)


def _options(name: str, config: TrainConfig, task: Task) -> dict[str, Any]:
    """What only one strategy asks for."""
    if name == "ddp":
        return {"gradient_compression": config.gradient_compression, "bucket_mb": config.bucket_mb}
    if name == "fsdp":
        return {"units": task.fsdp_units, "cpu_offload": config.cpu_offload, "meta_init": config.meta_init}
    if name == "deepspeed":
        return {"file": config.deepspeed_config, "max_norm": config.max_norm, "averaged": config.ema_decay is not None}
    return {}


def _build(task: Task, config: TrainConfig) -> nn.Module:
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(task).__name__}.model must return an nn.Module, got {type(model).__name__}")
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                f"gradient_checkpointing=True, but {type(model).__name__} has no method gradient_checkpointing_enable. "
                f"Give it one, or leave the setting off."
            )
        enable()
    model.train()
    if config.compile:
        model.compile()
    return model


def _merge(task: Task, parts: list[dict[str, tuple[Tensor, int]]]) -> dict[str, float]:
    """One figure a metric from every rank's sums and counts, added up in the order of ranks."""
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        total, count = torch.stack([total for total, _ in found]).sum(0), sum(count for _, count in found)
        means[name] = total / count if count else torch.full_like(total, float("nan"))
    return task.summary(means)


def _better(config: TrainConfig, state: TrainState) -> bool:
    if config.best_metric not in state.metrics:
        raise ValueError(
            f"best_metric is {config.best_metric!r}, but the evaluation gave {', '.join(state.metrics) or 'nothing'}. "
            f"Set best_metric to one of them, or add it to Task.metrics."
        )
    value = state.metrics[config.best_metric]
    if state.best is None or math.isnan(state.best):  # anything is better than nan, and nothing is worse
        return True
    return value < state.best if config.best_mode == "min" else value > state.best


def _finished(out: Path, max_steps: int) -> Result | None:
    """The result of a run that took all its steps, with the weights it left; None otherwise."""
    try:
        document = json.loads((out / "result.json").read_text(encoding="utf-8"))
        result = Result(**document)
    except (OSError, ValueError, TypeError):
        return None
    return result if result.finished and result.step == max_steps and (out / "model.safetensors").is_file() else None


def _code(task: Task) -> int:
    """A checksum of the task's methods, by which a run notices that they were edited: no more than a hint."""
    parts: list[Any] = []

    def add(code: types.CodeType) -> None:
        parts.append((code.co_code, code.co_names, code.co_varnames))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):  # a function within the function
                add(constant)
            else:  # a set's order changes from process to process
                parts.append(sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))

    for kind in type(task).__mro__[: type(task).__mro__.index(Task)]:
        for name, member in sorted(vars(kind).items()):
            if isinstance(member, types.FunctionType):
                parts.append(name)
                add(member.__code__)
    return zlib.crc32(repr(parts).encode())


def _code_then(out: Path) -> int | None:
    try:
        code: int | None = json.loads((out / "config.json").read_text(encoding="utf-8")).get("code")
        return code
    except (OSError, ValueError, AttributeError):
        return None
