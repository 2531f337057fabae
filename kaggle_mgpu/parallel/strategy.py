"""How one micro-batch becomes gradients, and gradients a step: what all strategies share, and which one a run takes.

All strategies give the same gradient: the sum of the loss over every term of the global batch, divided by how many
terms that is. They hold the plain model, which checkpoints and evaluation use; what wraps it is used to call it only.
`Strategy` itself is one process with one device; the others are data_parallel.py (dp, ddp), fsdp.py and zero.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed, shards
from .state import load_named_optimizer_state, load_saved_state, named_optimizer_state, saved_state

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NOTHING = contextlib.nullcontext()


class Call(nn.Module):
    """Calls a function of (model, batch) as a forward pass, which is what torch's DDP and DataParallel wrap.

    The function sees the plain model, with its own attributes and methods. Autocast is entered here, in the thread that
    computes: DataParallel hands its threads autocast's switch but not its dtype.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], metrics: Any, precision: str, device_type: str
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.metrics, self.precision, self.device_type = loss, metrics, precision, device_type

    def forward(self, batch: Any, what: str = "loss") -> Any:
        if self.precision in HALF:
            with torch.autocast(self.device_type, HALF[self.precision]):
                return self._call(batch, what)
        return self._call(batch, what)

    def _call(self, batch: Any, what: str) -> Any:
        if what in ("loss", "losses"):
            loss = self.loss(self.model, batch)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise ValueError(f"Task.loss must return a scalar tensor, the sum over the batch's terms; got {got}")
            # "losses", one row for each replica: gathering scalars makes DataParallel warn
            return loss if what == "loss" else loss.unsqueeze(0)
        rows = {}
        sums = self.metrics(self.model, batch)
        if not isinstance(sums, dict):
            raise TypeError(f"Task.metrics must return {{name: (sum, count)}}, got a {type(sums).__name__}")
        for name, pair in sums.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = f"{len(pair)} values" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
                raise TypeError(f"Task.metrics must return {{name: (sum, count)}}, got {got} for {name!r}")
            total, count = pair
            # float64 and one row per replica: what is added up later must not depend on how it was split
            # a plain number too must be on the replica's GPU, or it could not be gathered
            total = torch.as_tensor(total, device=self.device_type).detach().double()
            rows[name] = (total.unsqueeze(0), torch.as_tensor(count, device=total.device).unsqueeze(0))
        return rows


class Strategy:
    """One process, one device; the base of the others.

    A step is `micro_step` around `backward` for each micro-batch, then `step`.

    Args:
        loss: sum of the loss over a batch's terms, `(model, batch) -> scalar`.
        metrics: `(model, batch) -> {name: (sum, count)}`; sums may be tensors of any shape.
        precision: fp32, fp16 (autocast with loss scaling) or bf16 (autocast).
        num_replicas: copies of the model in this process.
        find_unused_parameters: under ddp, allow for parameters that a step does not use.
    """

    name = "single"
    alone = True
    """Whether a rank can compute with the model without the others."""

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
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row: Tensor | int = 0
        self.within: Literal["", "gradient", "update"] = ""
        """The part of a step that has begun. The weights are whole except during an update."""

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """Around the making of the model, for `prepare`."""
        return _NOTHING

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model on the device and wrap it for training; returns the plain one."""
        self.model = model.to(self.device)
        self.call: nn.Module = Call(self.model, self.loss, self.metrics, self.precision, self.device.type)
        self.parallel = self.wrap(self.call)
        self.note_buffers()
        return self.model

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Take the optimizer made for the prepared model; returns the one to go on with."""
        return optimizer

    def note_buffers(self) -> None:
        """Make room for a copy of the buffers that checkpoints hold, for `begin_step`."""
        saved = self.model.state_dict(keep_vars=True)
        self.buffers = [buffer for name, buffer in self.model.named_buffers() if name in saved]
        self.buffers_before = [buffer.detach().clone() for buffer in self.buffers]

    def wrap(self, call: nn.Module) -> nn.Module:
        """What a training step calls in place of `call`."""
        return call

    @property
    def input_device(self) -> torch.device:
        """Where the forward pass wants its batches."""
        return self.device

    def micro_step(self, *, sync: bool) -> contextlib.AbstractContextManager[Any]:
        """Around one forward and backward pass; gradients are exchanged in the one with `sync`, the step's last."""
        return _NOTHING

    def backward(self, batch: Any, weight: float, terms: Callable[[], int]) -> Tensor:
        """Add this micro-batch's part of the gradient. Returns the sum of its loss, detached.

        Gradients are divided by the world size when they are added up over the ranks, hence the factor.

        Args:
            weight: 0 for a micro-batch that only keeps this rank in step with the others, else 1.
            terms: gives the number of terms in the global batch.

        Raises:
            ValueError: there are none.
        """
        loss = self.forward(batch)
        distributed.alive()  # the ranks wait for each other in backward: the one behind has not come this far
        # the terms are asked for after the forward pass: on their way, they had that long to arrive
        if not (number := terms()):
            raise ValueError(
                "Task.count gave 0 for every batch of this step, so its loss has no mean. Leave samples without any "
                "term (all of it masked, say) out of the training data."
            )
        self.backward_from(loss, weight * self.world_size / number)
        return loss.detach() if weight == 1 else loss.detach() * weight

    def backward_from(self, loss: Tensor, start: float) -> None:
        """The backward pass, from `start` instead of 1: cheaper than to multiply the loss, and the same gradient."""
        # a new tensor each time: autograd may hand it on as a parameter's gradient, which is then written to
        loss.backward(self.scaler.scale(torch.full_like(loss, start)))

    def forward(self, batch: Any) -> Tensor:
        """Sum of the loss over the batch's terms, ready for backward."""
        if self.parallel is self.call:
            return self.call.forward(batch)  # what it wraps has the hooks, if there are any
        return self.parallel(batch)

    def begin_step(self) -> None:
        """Note the buffers as they are, for `undo_step`: running statistics move in each forward pass."""
        if self.buffers:
            torch._foreach_copy_(self.buffers_before, self.buffers)
        self.within = "gradient"

    def undo_step(self) -> None:
        """Forget the gradients and statistics of a step that broke off; its weights had not moved yet."""
        if self.buffers and self.within == "gradient":
            torch._foreach_copy_(self.buffers, self.buffers_before)
        self.within = ""
        for parameter in self.model.parameters():
            parameter.grad = None

    def try_step(self, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        """What a step needs in memory, without the other processes: forward, backward, the optimizer's own state."""
        self.forward_alone(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward_alone(self, batch: Any) -> Tensor:
        """`forward` without the other processes."""
        return self.call(batch)

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        """Clip and take one optimizer step, unless the gradient is not finite. Returns its norm before clipping.

        Skipping is the same decision on every rank, since every rank has the same gradient. On a GPU it is made there:
        nothing here waits for the device.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.whole_norm(nn.utils.get_total_norm([p.grad for p in parameters], foreach=True))
        # a fused Adam divides by grad_scale as it reads the gradient: clipping then needs no pass of its own
        by_itself = _clips_and_skips(optimizer) and not self.scaler.is_enabled()
        if max_norm is not None and not by_itself:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        infinite: Tensor | bool
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
            infinite = ~norm.isfinite()
        elif self.device.type == "cuda" and by_itself:
            infinite = ~norm.isfinite()
            optimizer.found_inf = infinite.float()  # type: ignore[attr-defined]
            if max_norm is not None:
                optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
            optimizer.step()
        else:
            value = norm.item()
            infinite = not math.isfinite(value)
            if max_norm is not None and by_itself:
                # norm + 1e-6 as clip_grad_norm_ has it; float32 whatever the weights are, as the kernel has it
                scale = (value + 1e-6) / max_norm
                clip = torch.tensor(scale, dtype=torch.float32, device=norm.device) if scale > 1 else None
                optimizer.grad_scale = clip  # type: ignore[attr-defined]
            if not infinite:
                optimizer.step()
        if infinite is not False:
            self.skipped += infinite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * infinite
        for parameter in parameters:  # what optimizer.zero_grad does, in a tenth of its time
            parameter.grad = None
        return norm

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Return the norm over all ranks from the norm of this rank's gradient. Here both are the same."""
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Any]) -> dict[str, tuple[Tensor, int]]:
        """Sums and counts of the task's metrics over this rank's batches, on the CPU in float64."""
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in self._in_step(batches):
            distributed.alive()
            for name, (total, count) in self.call_for_metrics(batch).items():
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + total.sum(0), before[1] + count.sum(0))
        return {name: (total.cpu(), int(count)) for name, (total, count) in totals.items()}

    def _in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; a rank that has had all of its own computes along while another has more to do.

        For where weights are spread over the ranks, all gather them together. Where there are fewer batches than ranks,
        rank 0's is lent.
        """
        if self.alone:
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
        """{name: (sums, counts)}, one row of each for every replica in this process."""
        return self.call(batch, "metrics")

    def sync_buffers(self) -> None:
        """Give every rank rank 0's buffers (running statistics), as checkpoints hold those."""
        if self.world_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)

    def communication(self) -> float | None:
        """Seconds of a step in which gradients were sent and nothing computed, waiting for a slower rank included.

        None where that is not known.
        """
        return None

    # Full state: the same names and tensors whatever the strategy, so that any can go on from any other's.
    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`model`: name -> tensor; `optimizer`: by parameter name; `scaler`: plain numbers; `skipped`: steps."""
        return self.whole(self.held_state(optimizer))

    def weights(self) -> dict[str, Tensor]:
        """What a file of weights holds, whole; all ranks must ask for it, and rank 0's answer counts."""
        return cast(dict[str, Tensor], self.whole(saved_state(self.model)))

    def described(self) -> dict[str, Tensor]:
        """The names and shapes of `weights`; what else these tensors are is no matter."""
        return saved_state(self.model)

    def whole(self, tree: Any) -> Any:
        """The same with each tensor that is spread over the ranks put together; all ranks must ask for it."""
        return tree

    def held_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`full_state`, with tensors that are spread over the ranks as they are."""
        return {
            "model": saved_state(self.model),
            "optimizer": named_optimizer_state(self.model, optimizer),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
        }

    def load_full_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `full_state` gave, under this strategy or another."""
        load_saved_state(self.model, state["model"])
        load_named_optimizer_state(self.model, optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])


def _clips_and_skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel divides gradients by `grad_scale`, and skips the step where `found_inf` is set."""
    # SGD's fused kernel too takes found_inf, but a skipped first step leaves its momentum uninitialised (torch 2.13)
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))
