"""See what a function on the pretend GPUs does: the host's waits, the order on streams; and take its memory away.

    with watch.waits() as found:
        step()
    assert not found, found[0].stack

For functions that run where the pair is switched on.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

library: Any = None
warns = False
"""Whether each wait of the host is a warning (torch.cuda.set_sync_debug_mode)."""
_waits: list[Wait] | None = None
_operations: list[tuple[Any, ...]] | None = None

MEMORY_ERRORS = {
    # torch's allocator raises torch.OutOfMemoryError
    "allocator": "",
    # c10/cuda/driver_api.h, and CUDA's own text through c10/cuda/CUDAException.cpp
    "driver": "CUDA driver error: out of memory",
    "runtime": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    # aten/src/ATen/cuda/Exceptions.h
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuBLAS, no handle": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    # aten/src/ATen/native/cudnn/Conv_v8.cpp: no engine's workspace fits
    "cuDNN, no engine": "GET was unable to find an engine to execute this computation",
    # torch/csrc/distributed/c10d/NCCLUtils.hpp
    "NCCL": "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "Triton": "Triton Error [CUDA]: out of memory",
}
"""The texts of the errors that CUDA and its libraries raise where memory is short."""


@dataclass(frozen=True)
class Wait:
    """A wait of the host for a GPU."""

    operation: str
    stack: str
    """The Python lines that led to it, the innermost last; "" within a backward pass, which has a thread of its own."""

    @property
    def place(self) -> str:
        """The innermost line outside torch and this folder."""
        return self.stack.splitlines()[-1] if self.stack else "backward"


def start(found: Any) -> None:
    """Listen to the library."""
    global library
    library = found
    library.on_wait(_hear_of_wait)


def _hear_of_wait(operation: str, device: int, stream: int) -> None:
    if _waits is None and not warns:
        return
    folders = (os.path.dirname(os.path.abspath(__file__)), f"{os.sep}torch{os.sep}")
    frames = [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in folders)]
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
    if _waits is not None:
        _waits.append(Wait(operation, "\n".join(lines)))
    if warns:
        warnings.warn(f"called a synchronizing CUDA operation: {operation} {lines[-1:]}", stacklevel=2)


@contextlib.contextmanager
def waits() -> Iterator[list[Wait]]:
    """Collect the waits of the host for a GPU inside the `with` block, of all threads."""
    global _waits
    _waits = found = []
    try:
        yield found
    finally:
        _waits = None


def note(*event: Any) -> None:
    """Add an event of a stream to the record."""
    if _operations is not None:
        _operations.append(event)


@contextlib.contextmanager
def operations() -> Iterator[list[tuple[Any, ...]]]:
    """Collect in order: (operator, device, stream), and ("wait_stream", device, stream, the stream waited for)."""
    global _operations
    _operations = found = []
    library.on_operation(note)
    try:
        yield found
    finally:
        library.on_operation(None)
        _operations = None


def limit_memory(device: int, nbytes: int, error: str = "allocator") -> None:
    """Give a GPU so many bytes in all, and the error beyond the limit (see MEMORY_ERRORS)."""
    library.limit_memory(device, nbytes, MEMORY_ERRORS[error])


def used_memory(device: int) -> int:
    """Return the bytes that tensors take on a GPU."""
    return int(library.memory(device)[0])
