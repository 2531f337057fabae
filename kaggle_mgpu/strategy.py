"""How one micro-batch becomes gradients, and gradients a step: on one GPU, replicated, or in step with other processes.

All strategies give the same gradient: the sum of the loss over every term of the global batch, divided by how many
terms that is. They hold the plain model, which checkpoints and evaluation use; what wraps it is used to call it only.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NOTHING = contextlib.nullcontext()


class _Call(nn.Module):
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
        if self.precision in _DTYPES:
            with torch.autocast(self.device_type, _DTYPES[self.precision]):
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
        for name, (total, count) in self.metrics(self.model, batch).items():
            # float64 and one row per replica: what is added up later must not depend on how it was split
            # a plain number too must be on the replica's GPU, or it could not be gathered
            total = torch.as_tensor(total, device=self.device_type).detach().double()
            rows[name] = (total.unsqueeze(0), torch.as_tensor(count, device=total.device).unsqueeze(0))
        return rows


class Strategy:
    """One process, one device; the base of the others.

    Args:
        loss: sum of the loss over a batch's terms, `(model, batch) -> scalar`.
        metrics: `(model, batch) -> {name: (sum, count)}`.
        precision: fp32, fp16 (autocast with loss scaling) or bf16 (autocast).
        num_replicas: copies of the model in this process.
        find_unused_parameters: under ddp, allow for parameters that a step does not use.
    """

    name = "single"

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

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model on the device and wrap it for training; returns the plain one."""
        self.model = model.to(self.device)
        self.call: nn.Module = _Call(self.model, self.loss, self.metrics, self.precision, self.device.type)
        self.parallel = self.wrap(self.call)
        saved = self.model.state_dict(keep_vars=True)
        self.buffers = [buffer for name, buffer in self.model.named_buffers() if name in saved]
        self.buffers_before = [buffer.detach().clone() for buffer in self.buffers]
        return self.model

    def wrap(self, call: nn.Module) -> nn.Module:
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

        Backward starts from weight / terms instead of 1: cheaper than dividing the loss, and the same gradient.
        DistributedDataParallel divides by the world size when it adds gradients up, hence the factor.
        """
        loss = self.forward(batch)
        distributed.alive()  # the ranks wait for each other in backward: the one behind has not come this far
        # the terms are asked for after the forward pass: on their way, they had that long to arrive
        if not (number := terms()):
            raise ValueError(
                "Task.count gave 0 for every batch of this step, so its loss has no mean. Leave samples without any "
                "term (all of it masked, say) out of the training data."
            )
        # a new tensor each time: autograd may hand it on as a parameter's gradient, which is then written to
        start = torch.full_like(loss, weight * self.world_size / number)
        loss.backward(self.scaler.scale(start))
        return loss.detach() if weight == 1 else loss.detach() * weight

    def forward(self, batch: Any) -> Tensor:
        """Sum of the loss over the batch's terms, ready for backward."""
        if self.parallel is self.call:
            return self.call.forward(batch)  # what it wraps has the hooks, if there are any
        return self.parallel(batch)

    def begin_step(self) -> None:
        """Note the buffers as they are, for `undo_step`: running statistics move in each forward pass."""
        if self.buffers:
            torch._foreach_copy_(self.buffers_before, self.buffers)

    def undo_step(self) -> None:
        """Forget the gradients and statistics of a step that broke off; its weights had not moved yet."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.buffers_before)
        for parameter in self.model.parameters():
            parameter.grad = None

    def try_step(self, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        """What a step needs in memory, without the other processes: forward, backward, the optimizer's own state."""
        self.forward_alone(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward_alone(self, batch: Any) -> Tensor:
        return self.call(batch)

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        """Clip and take one optimizer step, unless the gradient is not finite. Returns its norm before clipping.

        Skipping is the same decision on every rank, since every rank has the same gradient. On a GPU it is made there:
        nothing here waits for the device.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
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

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Any]) -> dict[str, tuple[Tensor, int]]:
        """Sums and counts of the task's metrics over this rank's batches, on the CPU in float64."""
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            distributed.alive()
            for name, (total, count) in self.call_for_metrics(batch).items():
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + total.sum(0), before[1] + count.sum(0))
        return {name: (total.cpu(), int(count)) for name, (total, count) in totals.items()}

    def call_for_metrics(self, batch: Any) -> Any:
        return self.call(batch, "metrics")

    def sync_buffers(self) -> None:
        """Give every rank rank 0's buffers (running statistics), as checkpoints hold those."""

    # Full state: the same names and tensors whatever the strategy, so that any can go on from any other's.
    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`model`: name -> tensor; `optimizer`: by parameter name; `scaler`: plain numbers; `skipped`: steps."""
        return {
            "model": self.model.state_dict(),
            "optimizer": named_optimizer_state(self.model, optimizer),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
        }

    def load_full_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `full_state` gave, under this strategy or another."""
        self.model.load_state_dict(state["model"])
        load_named_optimizer_state(self.model, optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])


class Distributed(Strategy):
    """One process per GPU, gradients averaged by DistributedDataParallel while backward still runs."""

    name = "ddp"
    checked = False

    def wrap(self, call: nn.Module) -> nn.Module:
        on_gpu = self.device.type == "cuda"
        # a broadcast before every forward pass buys nothing: sync_buffers does it where buffers are read (the option
        # changed its name in torch 2.13)
        accepts = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        per_forward = "forward_sync_buffers" if "forward_sync_buffers" in accepts else "broadcast_buffers"
        wrapped = nn.parallel.DistributedDataParallel(
            call,
            device_ids=[self.device.index] if on_gpu else None,
            # gradients are views of the buckets that are sent: one gradient's worth of memory less
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
            **{per_forward: False},  # type: ignore[arg-type]
        )
        if not on_gpu and self.world_size > 2:
            # a lambda, since torch rejects annotations that are text, as this file's are
            wrapped.register_comm_hook(None, lambda state, bucket: _mean_in_rank_order(bucket))
        return wrapped

    def micro_step(self, *, sync: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        return _NOTHING if sync else self.parallel.no_sync()

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        if not (self.checked or self.find_unused_parameters):
            # torch would say so in the second step, by number, and advise an option of its own
            unused = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
                raise ValueError(
                    f"no gradient reached {', '.join(unused[:3])}{more}: the loss does not use them, and ddp waits for "
                    f"every parameter. Take them out of the model, freeze them with requires_grad_(False), or set "
                    f"find_unused_parameters=True, which costs time in each step."
                )
            self.checked = True
        return super().step(optimizer, max_norm=max_norm)

    def sync_buffers(self) -> None:
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)


def _mean_in_rank_order(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks so that no bit of the sum depends on how they lie in the bucket.

    DistributedDataParallel lays its buckets out anew after its first step, and gloo adds three or more numbers in an
    order that depends on where they lie: a resumed run, whose first step is another one, would differ in the last bit.
    With two ranks there is only one order, and GPUs promise no such thing.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]

    def added(_: torch.futures.Future[Any]) -> Tensor:
        total = own.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        return total.div_(len(parts))

    gathered = dist.all_gather(parts, own, async_op=True)
    return gathered.get_future().then(added)


class Replicated(Strategy):
    """One process, one replica of the model per GPU and thread. Each computes its own loss: scalars are gathered."""

    name = "dp"

    def wrap(self, call: nn.Module) -> nn.Module:
        if self.device.type == "cuda":
            return nn.DataParallel(call, device_ids=list(range(self.num_replicas)))
        return CPUReplicas(call, self.num_replicas)

    @property
    def input_device(self) -> torch.device:
        return torch.device("cpu")  # scattered from there straight to each GPU

    def forward(self, batch: Any) -> Tensor:
        return self.parallel(batch, "losses").sum()

    def forward_alone(self, batch: Any) -> Tensor:
        return self.forward(batch)

    def call_for_metrics(self, batch: Any) -> Any:
        return self.parallel(batch, "metrics")


class CPUReplicas(nn.Module):
    """What nn.DataParallel does, for replicas that share one CPU: there nn.DataParallel itself is a pass-through.

    Scatter, torch's own replica modules, a thread for each, gather: so that dp can be tried and tested without a GPU.
    """

    def __init__(self, module: nn.Module, num_replicas: int) -> None:
        super().__init__()
        self.module, self.num_replicas = module, num_replicas

    def forward(self, batch: Any, what: str = "loss") -> Any:
        parts = _scatter(batch, self.num_replicas)
        if len(parts) == 1:
            return _gather([self.module(parts[0], what)])
        replicas = [_replica(self.module, index) for index in range(len(parts))]
        outputs: list[Any] = [None] * len(parts)
        grad = torch.is_grad_enabled()

        def run(index: int) -> None:
            try:
                with torch.set_grad_enabled(grad):
                    outputs[index] = replicas[index](parts[index], what)
            except Exception as error:
                outputs[index] = error

        for index in range(len(parts)):
            thread = threading.Thread(target=run, args=(index,))
            thread.start()
            thread.join()  # one after the other: they share the CPU's random generator, and dropout must repeat
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return _gather(outputs)


def _scatter(value: Any, parts: int) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.chunk(parts))
    if isinstance(value, dict) and value:
        columns = {key: _scatter(item, parts) for key, item in value.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    if isinstance(value, list | tuple) and value:
        make = getattr(value, "_make", type(value))  # a namedtuple wants its fields one by one
        return [make(row) for row in zip(*(_scatter(item, parts) for item in value), strict=False)]
    return [value] * parts


def _replica(module: nn.Module, index: int) -> nn.Module:
    """A shallow copy whose parameters are views of the original's, through which gradients flow back to it.

    As on GPUs, what the first replica writes into its buffers stays, and what the others write is lost.
    """
    copies: dict[nn.Module, nn.Module] = {}
    views: dict[Tensor, Tensor] = {}
    for original in module.modules():
        copies[original] = original._replicate_for_data_parallel()
    for original, copy in copies.items():
        for name, child in original._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        if index > 0:
            copy._buffers = {name: None if b is None else b.clone() for name, b in copy._buffers.items()}
        for name, parameter in original._parameters.items():
            if parameter is None:  # a layer without bias still has the name
                copy._parameters[name] = None
            else:
                views.setdefault(parameter, parameter.view_as(parameter))
                setattr(copy, name, views[parameter])
    return copies[module]


def _gather(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return {
        name: tuple(torch.cat(pair) for pair in zip(*(o[name] for o in outputs), strict=True)) for name in outputs[0]
    }


def choose(
    wanted: Literal["auto", "single", "dp", "ddp"], *, num_gpus: int, num_replicas: int, world_size: int
) -> tuple[type[Strategy], str]:
    """The strategy and the reason for it.

    Raises:
        ValueError: the strategy cannot run with this many processes.
    """
    if wanted == "auto":
        if world_size > 1:
            return Distributed, f"{world_size} processes"
        return Strategy, "one process"
    if wanted in ("single", "dp") and world_size > 1:
        raise ValueError(
            f"strategy {wanted!r} runs in one process, but there are {world_size}. Use strategy='ddp', or start one "
            f"process."
        )
    if wanted == "dp" and num_gpus and num_replicas > num_gpus:
        raise ValueError(f"strategy 'dp' with nproc={num_replicas}: this machine has {num_gpus} GPUs")
    if wanted == "ddp" and world_size == 1:
        return Strategy, "ddp in one process is single"
    return {"single": Strategy, "dp": Replicated, "ddp": Distributed}[wanted], "asked for"


def _clips_and_skips(optimizer: torch.optim.Optimizer) -> bool:
    # SGD's fused kernel too takes found_inf, but a skipped first step leaves its momentum uninitialised (torch 2.13)
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name, which is what stays the same when wrapping and sharding change."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "state": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
        "param_groups": [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[p] for p in group["params"]],
            }
            for group in optimizer.param_groups
        ],
    }


def load_named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over a state that `named_optimizer_state` gave.

    Raises:
        ValueError: it is for other parameters than this optimizer's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    mine = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in state["param_groups"]]
    if differ := sorted({name for group in mine for name in group} ^ {name for group in theirs for name in group}):
        raise ValueError(f"the checkpoint's optimizer holds other parameters than this one: {', '.join(differ[:5])}")
    if mine != theirs:
        raise ValueError(
            f"the checkpoint's optimizer has the parameters in other groups, or another order, than this one: groups "
            f"of {[len(group) for group in theirs]} then, of {[len(group) for group in mine]} now"
        )
    number = {name: index for index, name in enumerate(name for group in mine for name in group)}
    groups = []
    for now, then in zip(optimizer.param_groups, state["param_groups"], strict=True):
        # which kernel computes the step is this machine's choice, not the checkpoint's
        kernel = {key: now[key] for key in ("fused", "foreach", "capturable") if key in now}
        groups.append({**then, **kernel, "params": [number[name] for name in then["params"]]})
    optimizer.load_state_dict(
        {"state": {number[name]: values for name, values in state["state"].items()}, "param_groups": groups}
    )
