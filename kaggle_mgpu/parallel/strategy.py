"""`Strategy` computes gradients and optimizer steps in one process, and is the base class of all strategies.

All strategies give the same gradient: the sum of the loss over every term of the global batch, divided by the number
of terms. Training steps call the model through a wrapper; checkpoints and evaluation use the plain model. Subclasses
are in data_parallel.py (dp, ddp), fsdp.py and zero.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed, shards, undo
from .state import load_named_optimizer_state, load_saved_state, named_optimizer_state, saved_state

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NOTHING = contextlib.nullcontext()


class Call(nn.Module):
    """Call is a module with Task.loss or Task.metrics as its forward pass, for torch's DDP and DataParallel to wrap.

    The task's functions get the plain model with its own attributes and methods. Autocast is entered here, in the
    computing thread, since DataParallel passes to its threads whether autocast is on, but not the dtype.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], metrics: Any, precision: str, device_type: str
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.metrics, self.precision, self.device_type = loss, metrics, precision, device_type
        self.part_names: list[str] = []  # one list object, shared by all replicas
        """The names of the parts of the loss that the task hands out to be logged."""

    def forward(self, batch: Any, what: str = "loss") -> Any:
        if self.precision in HALF:
            with torch.autocast(self.device_type, HALF[self.precision]):
                return self._call(batch, what)
        return self._call(batch, what)

    def _call(self, batch: Any, what: str) -> Any:
        if what in ("loss", "losses"):
            loss = self._with_parts(self.loss(self.model, batch))
            # "losses" has one row per replica, since DataParallel warns when gathering scalars
            return loss if what == "loss" else loss.unsqueeze(0)
        rows: dict[str, tuple[Tensor, ...]] = {}
        sums = self.metrics(self.model, batch)
        if not isinstance(sums, dict):
            raise TypeError(f"Task.metrics must return {{name: (sum, count)}}, got a {type(sums).__name__}")
        for name, pair in sums.items():
            if isinstance(pair, distributed.Gather):  # one row per sample, and no count
                rows[name] = (pair.tensor.detach().to(self.device_type),)
                continue
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = f"{len(pair)} values" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
                raise TypeError(f"Task.metrics must return {{name: (sum, count)}}, got {got} for {name!r}")
            total, count = pair
            # float64, so that rounding hardly depends on the number of replicas; a row per replica, since gathering
            # concatenates and `evaluate` adds the rows; on the replica's GPU, since only tensors there can be gathered
            total = self._placed(total).detach().double()
            rows[name] = (total.unsqueeze(0), self._placed(count).unsqueeze(0))
        return rows

    def _placed(self, value: Any) -> Tensor:
        """Return a number or tensor as a tensor on the device, without a copy that the CPU would wait for."""
        if isinstance(value, int | float):
            kind = torch.int64 if isinstance(value, int) else torch.float64
            return torch.full((), value, dtype=kind, device=self.device_type)
        return torch.as_tensor(value).to(self.device_type, non_blocking=True)

    def _with_parts(self, found: Any) -> Tensor:
        """Return the loss, or for (loss, {name: sum}) a vector of the loss and its parts, which carry no gradient."""
        loss, parts = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not isinstance(parts, dict):
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            got = got if isinstance(parts, dict) else f"(loss, {type(parts).__name__})"
            raise ValueError(
                f"Task.loss must return a scalar tensor, the sum over the batch's terms, or (loss, {{name: sum}}); "
                f"got {got}"
            )
        if not parts and not self.part_names:
            return loss
        self.part_names += [] if self.part_names else parts
        if self.part_names != [*parts]:
            raise ValueError(
                f"Task.loss gave the parts {[*parts]}, but {self.part_names} before: expected the same for every batch"
            )
        return torch.stack([loss, *(torch.as_tensor(part).detach().to(loss) for part in parts.values())])


class Strategy:
    """A Strategy trains in one process on one device; subclasses use several devices.

    A step is `begin_step`, then for each micro-batch `backward` within `micro_step`, then `step`.

    Args:
        loss: `(model, batch) -> scalar`, the sum of the loss over a batch's terms (tokens, pixels or samples).
        metrics: `(model, batch) -> {name: (sum, count)}`, with sums of any shape, or a `distributed.Gather` as value.
        precision: fp32, fp16 (autocast with loss scaling) or bf16 (autocast).
        device: for the model, or under dp for the first replica.
        num_replicas: copies of the model in this process.
        find_unused_parameters: under ddp, allow parameters without a gradient.
    """

    name = "single"
    computes_alone = True
    """Whether a rank can compute with the model without other ranks."""
    seconds_while_waiting = 0.0
    """Seconds that `while_waiting`, given to `begin_step`, took in this step; 0 if it was not called."""
    carries_count = False
    """Whether a step's gradients also carry a count over all ranks: the number of terms of the next step."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        metrics: Any,
        *,
        precision: str,
        device: torch.device,
        num_replicas: int = 1,
        find_unused_parameters: bool = False,
    ) -> None:
        self.find_unused_parameters = find_unused_parameters
        self.loss, self.metrics, self.precision, self.device = loss, metrics, precision, device
        self.num_replicas = num_replicas
        self.world_size = distributed.world_size()
        self.loss_multiplier = self.world_size
        """Factor of the loss: the world size if gradients are averaged over the ranks, 1 if gradients are summed."""
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skipped = torch.zeros((), device=device)
        """Number of steps skipped because the gradient was not finite; on the device, so that counting never waits."""
        self.skipped_in_a_row: Tensor | int = 0
        self.stepped: set[int] = set()
        """Ids of the parameters for which a step has made optimizer state."""
        self.changes_groups = False
        """Whether a step of the optimizer changes numbers in its groups, which the device cannot undo."""
        self.within: Literal["", "gradient", "update"] = ""
        """The phase of the current step. An error during "update" may leave the weights half changed."""

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context manager in which to build the model."""
        return _NOTHING

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device, wrap the model for training, and return the plain model."""
        self.model = model.to(self.device)
        self.call: nn.Module = Call(self.model, self.loss, self.metrics, self.precision, self.device.type)
        self.parallel = self.wrap(self.call)
        self.note_buffers()
        return self.model

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Register the prepared model's optimizer and return the optimizer to use."""
        return optimizer

    def note_buffers(self) -> None:
        """Allocate copies of the buffers that checkpoints hold, for `begin_step`."""
        saved = self.model.state_dict(keep_vars=True)
        buffers = [buffer for name, buffer in self.model.named_buffers() if name in saved]
        # torch copies tensors of one dtype together, and a mixed list one by one (159 kernels for a ResNet-50)
        same_type = [[b for b in buffers if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in buffers)]
        self.buffers = [(same, [buffer.detach().clone() for buffer in same]) for same in same_type]
        """(buffers, copies) for each dtype."""

    def wrap(self, call: nn.Module) -> nn.Module:
        """Return the module that training steps call in place of `call`."""
        return call

    @property
    def part_names(self) -> list[str]:
        """The names of the parts of the loss, known after the first forward pass."""
        return cast(Call, self.call).part_names

    @property
    def input_device(self) -> torch.device:
        """The device on which `forward` expects its batches."""
        return self.device

    def micro_step(self, *, sync: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager for a forward and backward pass; with `sync`, ranks exchange gradients."""
        return _NOTHING

    def backward(self, batch: Any, weight: float, terms: Callable[[], int]) -> Tensor:
        """Add a micro-batch's part to the gradient; return the loss summed over the micro-batch's terms, detached.

        The result is a scalar, or a vector of the loss and its parts (`part_names`).

        Args:
            weight: 0 for a stand-in micro-batch, computed only because other ranks wait, else 1.
            terms: returns the number of loss terms in the global batch.

        Raises:
            ValueError: the global batch has no terms.
        """
        with distributed.computing("step" if weight else "stand-in") if self.world_size > 1 else _NOTHING:
            loss = self.forward(batch)
            distributed.alive()  # backward waits for other ranks, so this sign of life shows which rank is late
            # `terms` may wait for a sum over the ranks; the sum runs during the forward pass
            if not (number := terms()):
                raise ValueError(
                    "Task.count gave 0 for every batch of this step, so its loss has no mean. Leave samples without "
                    "any term (for example, all masked) out of the training data."
                )
            self.backward_from(loss[0] if loss.ndim else loss, weight * self.loss_multiplier / number)
        return loss.detach() if weight == 1 else loss.detach() * weight

    def backward_from(self, loss: Tensor, start: float) -> None:
        """Run backward from the gradient `start` instead of 1, which is cheaper than multiplying the loss."""
        loss.backward(self.start_gradient(loss, start))

    def start_gradient(self, loss: Tensor, start: float) -> Tensor:
        """Return the gradient of the loss from which to run backward: `start`, times the loss scale under fp16."""
        # a new tensor each time, since autograd may reuse the tensor as a parameter's gradient
        return self.scaler.scale(torch.full_like(loss, start))

    def forward(self, batch: Any) -> Tensor:
        """Return the loss summed over the batch's terms, or a vector of the loss and its parts, with the graph."""
        if self.parallel is self.call:
            return self.call.forward(batch)  # not Module.__call__: hooks are on the model inside
        return self.parallel(batch)

    def begin_step(
        self, next_terms: distributed.Count | None = None, while_waiting: Callable[[], None] | None = None
    ) -> None:
        """Copy the buffers for `undo_step`, since each forward pass changes running statistics.

        Args:
            next_terms: the number of terms of the next step, if gradients carry counts (`carries_count`).
            while_waiting: work for a time when this process would only wait for other ranks; may never be called.
        """
        for buffers, before in self.buffers:
            torch._foreach_copy_(before, buffers)
        self.within = "gradient"

    def undo_step(self) -> None:
        """Discard the gradients and buffer changes of a step that was aborted before a change of weights."""
        if self.within == "gradient":
            for buffers, before in self.buffers:
                torch._foreach_copy_(buffers, before)
        self.within = ""
        for parameter in self.model.parameters():
            parameter.grad = None

    def try_step(self, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        """Take a training step without other processes, as a test of memory; the caller restores weights and state."""
        self.forward_alone(batch).flatten()[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward_alone(self, batch: Any) -> Tensor:
        """Return the same as `forward`, without other processes."""
        with distributed.computing("alone"):
            return self.call(batch)

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        """Clip the gradient, take an optimizer step if the gradient is finite, and return the norm before clipping.

        Every rank computes the same norm, a scalar tensor, so all ranks skip the same steps. The CPU does not wait for
        a GPU's norm if the optimizer is a fused Adam, whose kernel can skip a step. From the second step on, the CPU
        does not wait either if the GPU can undo a step (undo.py).

        Args:
            max_norm: the largest norm of all gradients together; None: no clipping.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.total_norm([cast(Tensor, p.grad) for p in parameters])
        # a fused Adam divides gradients by grad_scale, so clipping needs no separate pass
        kernel_clips = _clips_and_skips(optimizer) and not self.scaler.is_enabled()
        if max_norm is not None and not kernel_clips:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        not_finite: Tensor | bool
        unfused = self.device.type == "cuda" and not getattr(optimizer, "_step_supports_amp_scaling", False)
        # an optimizer makes a parameter's state in the parameter's first step, and this first step cannot be undone
        undoable = unfused and not self.changes_groups and self.stepped.issuperset(map(id, parameters))
        undoable = undoable and undo.can_undo(optimizer, parameters, self.device)
        groups = undo.group_values(optimizer) if unfused and not undoable else []
        if undoable:
            not_finite = ~norm.isfinite()
            undo.step_unless(not_finite, optimizer, parameters)
            if self.scaler.is_enabled():
                self.scaler.update()
        elif self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
            not_finite = ~norm.isfinite()
        elif self.device.type == "cuda" and kernel_clips:
            not_finite = ~norm.isfinite()
            optimizer.found_inf = not_finite.float()  # type: ignore[attr-defined]
            if max_norm is not None:
                optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
            optimizer.step()
        else:
            value = norm.item()
            not_finite = not math.isfinite(value)
            if max_norm is not None and kernel_clips:
                # norm + 1e-6 as in clip_grad_norm_; float32 for weights of any type, as in the kernel
                scale = (value + 1e-6) / max_norm
                clip = torch.tensor(scale, dtype=torch.float32, device=norm.device) if scale > 1 else None
                optimizer.grad_scale = clip  # type: ignore[attr-defined]
            if not not_finite:
                optimizer.step()
        if unfused and not undoable and not not_finite:
            self.stepped.update(map(id, parameters))
            self.changes_groups |= groups != undo.group_values(optimizer)
        if not_finite is not False:
            self.skipped += not_finite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * not_finite
        for parameter in parameters:  # the same as optimizer.zero_grad in a tenth of the time
            parameter.grad = None
        return norm

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all gradients together, over all ranks."""
        if len({(gradient.device, gradient.dtype) for gradient in gradients}) != 1:
            return nn.utils.get_total_norm(gradients, foreach=True)
        # the same bits as get_total_norm in a third of the time: get_total_norm first groups by device and dtype
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Any]) -> dict[str, Any]:
        """Return {metric: (sum, count)} over this rank's batches, with float64 sums on the CPU.

        The value of a `distributed.Gather` metric is the list of the batches' rows, on the CPU.
        """
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        rows: dict[str, Any] = {}
        with distributed.computing("alone"):
            for batch in self._in_lockstep(batches):
                distributed.alive()
                for name, (total, *counts) in self.call_for_metrics(batch).items():
                    if not counts:
                        rows.setdefault(name, []).append(total.cpu())
                        continue
                    (count,) = counts
                    before = totals.get(name, (0.0, 0))
                    totals[name] = (before[0] + total.sum(0), before[1] + count.sum(0))
        return {name: (total.cpu(), int(count)) for name, (total, count) in totals.items()} | rows

    def _in_lockstep(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches; a rank without further batches recomputes its last batch while other ranks continue.

        All ranks must compute together to gather sharded weights. A rank without any batch uses rank 0's first batch.
        """
        if self.computes_alone:
            yield from batches
            return
        batch: Any = None
        coming = next(batches, None)
        if distributed.agree(coming is None):
            lent = distributed.broadcast(shards.each(coming, lambda tensor: tensor.cpu()))
            batch = shards.each(lent, lambda tensor: tensor.to(self.device))
        while distributed.agree(coming is not None):
            if coming is not None:
                batch = coming
                yield batch
            else:
                self.call_for_metrics(batch)
            coming = next(batches, None)

    def call_for_metrics(self, batch: Any) -> Any:
        """Return {metric: (sums, counts)} with one row per replica, or {metric: (rows,)} for a `distributed.Gather`."""
        return self.call(batch, "metrics")

    def sync_buffers(self) -> None:
        """Copy rank 0's buffers (running statistics), which checkpoints hold, to every rank."""
        if self.world_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)

    def communication(self) -> float | None:
        """Return the seconds per step spent only on exchanging gradients, waiting included; None if unknown."""
        return None

    # Full state: names and tensors are the same under all strategies, so a run can continue under any strategy.
    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return {"model": tensors by name, "optimizer": state by parameter name, "scaler": numbers, "skipped": steps}.

        All ranks must call `full_state`.
        """
        return self.whole(self.ungathered_state(optimizer))

    def weights(self) -> dict[str, Tensor]:
        """Return {name: full tensor} for a weights file, valid on rank 0 only; all ranks must call `weights`."""
        return cast(dict[str, Tensor], self.whole(saved_state(self.model)))

    def described(self) -> dict[str, Tensor]:
        """Return tensors with the names and shapes of `weights`; their values have no meaning."""
        return saved_state(self.model)

    def whole(self, tree: Any) -> Any:
        """Return a tree with each sharded tensor gathered; all ranks must call `whole`."""
        return tree

    def ungathered_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return `full_state` without gathering sharded tensors."""
        return {
            "model": saved_state(self.model),
            "optimizer": named_optimizer_state(self.model, optimizer),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
        }

    def load_full_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state from `full_state` of this or another strategy.

        Raises:
            ValueError: the state has other parameters, or other groups of parameters, than this optimizer.
        """
        load_saved_state(self.model, state["model"])
        load_named_optimizer_state(self.model, optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])


def _clips_and_skips(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's kernel applies `grad_scale` to gradients and skips a step if `found_inf`."""
    # SGD's fused kernel too takes found_inf, but a skipped first step leaves its momentum uninitialised (torch 2.13)
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))
