"""A process group in NCCL's place: gloo, on the same memory, with NCCL's refusals.

`init_process_group("cpu:gloo,cuda:nccl")` makes a group of this class, which passes tensors of the CPU to gloo as they
are. A tensor of a GPU is checked, then given to gloo as a CPU tensor over the same memory. Every collective is done
when the call returns: NCCL's own, which run on a stream of theirs, may hide an error of order that does not show here.
"""

from __future__ import annotations

from typing import Any

library: Any = None
kept: list[Any] = []
"""Registrations that end with their object."""
# torch/csrc/distributed/c10d/NCCLUtils.hpp, getNcclDataType
TYPES = ("float32", "float16", "bfloat16", "float64", "int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn",
         "float8_e5m2")  # fmt: skip


def install(found: Any) -> None:
    """Make `init_process_group` give this group for the backend "nccl"."""
    global library
    library = found
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import (
        AllgatherOptions,
        AllreduceOptions,
        BarrierOptions,
        BroadcastOptions,
        ReduceOp,
        ReduceScatterOptions,
        _create_work_from_future,
    )
    from torch.futures import Future

    supported = {getattr(torch, name) for name in TYPES}

    def done(result: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(result)
        return _create_work_from_future(future)

    def check(*tensors: Any) -> list[Any]:
        """Return CPU tensors over the same memory, after NCCL's checks."""
        for tensor in tensors:
            if tensor.dtype not in supported:
                raise TypeError(f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}")
            if tensor.device.index != library.current_device():
                raise RuntimeError(
                    f"NCCL: a tensor on {tensor.device}, while the current device is cuda:{library.current_device()}"
                )
            if not tensor.is_contiguous():
                raise ValueError("Tensors must be contiguous")
        return [library.as_cpu(tensor) for tensor in tensors]

    class Group(dist.ProcessGroup):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            super().__init__(rank, size)
            self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
            self.number, self.count = rank, size
            self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self.gloo)

        def size(self) -> int:
            return self.count

        def getBackendName(self) -> str:  # noqa: N802 (torch's name)
            return "nccl"

        @property
        def pg_name(self) -> str:
            return dist.distributed_c10d._world.pg_names[self]

        group_name = pg_name

        def allreduce(self, tensors: Any, options: Any = None) -> Any:
            options = options or AllreduceOptions()
            if not tensors[0].is_cuda:
                return self.gloo.allreduce(tensors, options)
            self.reduce(check(*tensors), options.reduceOp)
            return done(tensors)

        def reduce(self, tensors: Any, operation: Any) -> None:
            mean, options = operation == ReduceOp.AVG, AllreduceOptions()
            options.reduceOp = ReduceOp.SUM if mean else operation
            self.gloo.allreduce(tensors, options).wait()
            if mean:
                for tensor in tensors:
                    tensor.div_(self.count)

        def broadcast(self, tensors: Any, options: Any = None) -> Any:
            options = options or BroadcastOptions()
            if not tensors[0].is_cuda:
                return self.gloo.broadcast(tensors, options)
            self.gloo.broadcast(check(*tensors), options).wait()
            return done(tensors)

        def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
            options = options or AllgatherOptions()
            if not inputs[0].is_cuda:
                return self.gloo.allgather(outputs, inputs, options)
            self.gloo.allgather([check(*each) for each in outputs], check(*inputs), options).wait()
            return done(outputs)

        def _allgather_base(self, output: Any, source: Any, options: Any = None) -> Any:
            whole, part = check(output, source) if output.is_cuda else (output, source)
            self.gloo.allgather([list(whole.view(-1).chunk(self.count))], [part.reshape(-1)]).wait()
            return done(output)

        all_gather_single = _allgather_base  # its name from torch 2.13 on

        def _reduce_scatter_base(self, output: Any, source: Any, options: Any = None) -> Any:
            options = options or ReduceScatterOptions()
            part, whole = check(output, source) if output.is_cuda else (output, source)
            total = whole.clone()
            self.reduce([total], options.reduceOp)
            part.view(-1).copy_(total.view(-1).chunk(self.count)[self.number])
            return done(output)

        reduce_scatter_single = _reduce_scatter_base

        def barrier(self, options: Any = None) -> Any:
            return self.gloo.barrier(options or BarrierOptions())

    def create(store: Any, rank: int, size: int, timeout: Any) -> Group:
        return Group(store, rank, size, timeout)

    def all_gather_into_tensor(source: Any, group_size: int, group_name: str) -> Any:
        named = {name: group for group, name in dist.distributed_c10d._world.pg_names.items()}
        output = source.new_empty([group_size * source.shape[0], *source.shape[1:]])
        named[group_name]._allgather_base(output, source)
        return output

    # DTensor calls this one, which looks for a group's C++ part
    functional = torch.library.Library("_c10d_functional", "IMPL")
    functional.impl("all_gather_into_tensor", all_gather_into_tensor, "CUDA")
    kept.append(functional)
    dist.Backend.register_backend("pretend_nccl", create, devices=["cpu", "cuda"])
    original = dist.init_process_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        ours = torch.cuda.is_available() if backend is None else "cuda" in backend or backend == "nccl"
        original("pretend_nccl" if ours else backend, **options)

    dist.init_process_group = init_process_group
