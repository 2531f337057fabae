"""The ddp and dp strategies replicate the model on each GPU: ddp with a process per GPU, dp with a thread per GPU.

Without a GPU, ddp's processes and dp's replicas share the CPU, so both can be tested anywhere.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .strategy import Strategy

LIMB = 4096
"""Under ddp on CPUs, gradients carry a count (see `Distributed`) as two digits in base 2^12. float32 adds whole numbers
exactly up to 2^24, so the sum over the ranks is exact up to about 2^24 x 2^12 = 2^36."""


class Distributed(Strategy):
    """Distributed runs one process per GPU; DistributedDataParallel exchanges gradients during backward.

    Args:
        gradient_compression: fp16 halves the bytes sent; none sends gradients unchanged.
        bucket_mb: MiB of gradients sent at a time; default: torch's.
        counts_terms: whether each step needs its number of loss terms, summed over all ranks. On CPUs two elements of
            the gradient of an added parameter, the carrier, hold this rank's number for the next step. So the exchange
            of gradients sums the numbers one step ahead; a separate collective would take 5 % of a step of 11 ms.
    """

    name = "ddp"
    checked = False
    """Whether a step has shown that gradients reach every parameter."""

    def __init__(
        self,
        *args: Any,
        gradient_compression: str = "none",
        bucket_mb: int = 25,
        counts_terms: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_compression, self.bucket_mb = gradient_compression, bucket_mb
        # Gradients carry no count on GPUs, where reading the sum would make the CPU wait, nor as fp16, which rounds
        # counts. With find_unused_parameters they carry none either: DDP's forward pass does not use the carrier, so
        # DDP would take the carrier for unused.
        exact = gradient_compression == "none" and not self.find_unused_parameters
        self.carries_count = counts_terms and exact and self.device.type == "cpu"
        self.carrier: nn.Parameter | None = None
        self.next_terms: distributed.Count | None = None
        self.while_waiting: Callable[[], None] | None = None
        self.exchanging = True
        """Whether the next backward pass exchanges gradients."""

    def wrap(self, call: nn.Module) -> nn.Module:
        on_gpu = self.device.type == "cuda"
        if self.carries_count:
            # 64 bytes, so that the next gradients in a bucket stay aligned
            self.carrier = call.carrier = nn.Parameter(torch.zeros(16))
            self.limbs = torch.zeros(16)
            self.own_limbs = self.limbs.numpy()  # the same memory, written without torch's overhead
        for parameter in call.parameters():
            # torch warns if a gradient's strides differ from its bucket's, even where they have no effect (size 1)
            if parameter.requires_grad and parameter.ndim > 2 and 1 in parameter.shape:
                parameter.register_hook(partial(_with_strides_of, parameter))
        # forward passes need not broadcast buffers, since sync_buffers does; torch 2.13 renamed the option
        accepts = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        per_forward = "forward_sync_buffers" if "forward_sync_buffers" in accepts else "broadcast_buffers"
        wrapped = nn.parallel.DistributedDataParallel(
            call,
            device_ids=[self.device.index] if on_gpu else None,
            # gradients are views of the buckets, which saves the memory of a second copy of all gradients
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
            bucket_cap_mb=self.bucket_mb,
            **{per_forward: False},  # type: ignore[arg-type]
        )
        if self.gradient_compression == "fp16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            wrapped.register_comm_hook(None, fp16_compress_hook)
        elif self.precision == "fp16" or (not on_gpu and self.world_size > 2):
            self.loss_multiplier = 1
            # a lambda, since torch rejects this file's string annotations
            add = _sum if on_gpu or self.world_size == 2 else _sum_in_rank_order
            wrapped.register_comm_hook(None, lambda state, bucket: add(bucket))
        return wrapped

    def micro_step(self, *, sync: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        self.exchanging = sync
        return super().micro_step(sync=sync) if sync else self.parallel.no_sync()

    def begin_step(
        self, next_terms: distributed.Count | None = None, while_waiting: Callable[[], None] | None = None
    ) -> None:
        super().begin_step()
        self.next_terms, self.while_waiting, self.seconds_while_waiting = next_terms, while_waiting, 0.0

    def backward_from(self, loss: Tensor, start: float) -> None:
        if not self.exchanging:
            return super().backward_from(loss, start)
        # on GPUs this process does not wait in backward: the exchange is queued on the GPU
        if self.while_waiting is not None and self.device.type == "cpu" and loss.requires_grad:
            loss.register_hook(self._queue_while_waiting)
        if self.carrier is None:
            return super().backward_from(loss, start)
        self.own_limbs[:2] = divmod(self.next_terms.own if self.next_terms else 0, LIMB)
        # the carrier gets its gradient as if it were a second loss
        torch.autograd.backward((loss, self.carrier), (self.start_gradient(loss, start), self.limbs))

    def _queue_while_waiting(self, gradient: Tensor) -> None:
        """Make backward call `while_waiting` after the start of the exchange, before DDP waits for its end."""
        # Callbacks run at the end of backward, in the order in which they were queued. DDP queues its own, which waits,
        # when it has the last gradient; this hook runs when backward begins.
        torch.autograd.Variable._execution_engine.queue_callback(self._work_while_waiting)

    def _work_while_waiting(self) -> None:
        work, self.while_waiting = self.while_waiting, None
        if work is not None:
            start = time.monotonic()
            with torch.enable_grad(), distributed.computing("alone"):  # callbacks run without gradients
                work()
            self.seconds_while_waiting = time.monotonic() - start

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        if self.carrier is not None and self.carrier.grad is not None:
            # if DDP averages over the ranks, loss_multiplier is the world size, and mean x world size is the sum
            high, low = (round(limb * self.loss_multiplier) for limb in self.carrier.grad.tolist()[:2])
            self.carrier.grad = None
            if self.next_terms is not None:
                self.next_terms.total = lambda: high * LIMB + low
        if not (self.checked or self.find_unused_parameters):
            # torch raises an error only in the second step, and gives numbers of parameters in place of names
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

    def communication(self) -> float | None:
        """Return the mean seconds per step of exchanging gradients without overlap with backward; None if unknown.

        torch times the first ten steps, then every hundredth.
        """
        with contextlib.suppress(Exception):  # torch may change this private interface
            assert isinstance(self.parallel, nn.parallel.DistributedDataParallel)
            found = self.parallel._get_ddp_logging_data()
            exposed = found["avg_backward_comm_time"] - found["avg_backward_compute_comm_overlap_time"]
            return max(0, exposed) / 1e9 if found["avg_backward_comm_time"] > 0 else None
        return None


def _with_strides_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with its parameter's strides if the strides differ only in dimensions of size 1."""
    if any(a != b for a, b, n in zip(gradient.stride(), parameter.stride(), gradient.shape, strict=True) if n > 1):
        return gradient  # torch copies the gradient into the bucket
    return gradient.as_strided(parameter.shape, parameter.stride())


def _sum(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add gradients over the ranks.

    If DDP averaged instead, the loss would be multiplied by the world size before backward, and fp16 would overflow in
    other steps than on one GPU.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sum_in_rank_order(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add gradients over the ranks in a fixed order, independent of the layout of the bucket.

    DistributedDataParallel changes its buckets after its first step, and gloo's order of adding three or more numbers
    depends on their position, so a resumed run would differ in the last bit. The sum over two ranks does not depend on
    the order. On GPUs NCCL guarantees no order in any case.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]

    def added(_: torch.futures.Future[Any]) -> Tensor:
        total = own.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        return total

    gathered = dist.all_gather(parts, own, async_op=True)
    return gathered.get_future().then(added)


class Replicated(Strategy):
    """Replicated runs one process, with a thread and a model replica for each GPU, and gathers the replicas' losses."""

    name = "dp"

    def wrap(self, call: nn.Module) -> nn.Module:
        if self.device.type == "cuda":
            return nn.DataParallel(call, device_ids=list(range(self.num_replicas)))
        return CPUReplicas(call, self.num_replicas)

    @property
    def input_device(self) -> torch.device:
        return torch.device("cpu")  # DataParallel scatters batches from the CPU to each GPU

    def forward(self, batch: Any) -> Tensor:
        return self.parallel(batch, "losses").sum(0)

    def forward_alone(self, batch: Any) -> Tensor:
        return self.forward(batch)

    def call_for_metrics(self, batch: Any) -> Any:
        return self.parallel(batch, "metrics")


class CPUReplicas(nn.Module):
    """CPUReplicas imitates nn.DataParallel on one CPU, where nn.DataParallel itself would not split the batch."""

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
            except BaseException as error:
                outputs[index] = error

        for index in range(len(parts)):
            thread = threading.Thread(target=run, args=(index,))
            thread.start()
            # one after the other: the threads share one random generator, and a resumed run must draw the same dropout
            thread.join()
        for output in outputs:
            if isinstance(output, BaseException):
                raise output
        return _gather(outputs)


def _scatter(value: Any, parts: int) -> list[Any]:
    """Cut a batch into at most `parts` parts along the first dimension of its tensors, as torch.chunk does."""
    if isinstance(value, Tensor):
        return list(value.chunk(parts))
    if isinstance(value, dict) and value:
        columns = {key: _scatter(item, parts) for key, item in value.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    if isinstance(value, list | tuple) and value:
        make = getattr(value, "_make", type(value))  # a namedtuple takes separate fields
        return [make(row) for row in zip(*(_scatter(item, parts) for item in value), strict=False)]
    return [value] * parts


def _replica(module: nn.Module, index: int) -> nn.Module:
    """Return a shallow copy of a module with views of its parameters, so gradients flow to the original.

    As on GPUs, only the first replica's writes into buffers are kept.
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
            if parameter is None:  # such as the bias of a layer without bias
                copy._parameters[name] = None
            else:
                views.setdefault(parameter, parameter.view_as(parameter))
                setattr(copy, name, views[parameter])
    return copies[module]


def _gather(outputs: list[Any]) -> Any:
    """Concatenate the replicas' losses, or their sums and counts by metric: one row per replica."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return {
        name: tuple(torch.cat(pair) for pair in zip(*(o[name] for o in outputs), strict=True)) for name in outputs[0]
    }
