"""A pretend pair of Tesla T4s for a CPU build of torch, so that the code for CUDA and NCCL runs in every test run.

    with pretend_cuda.pair():                      # in the test's process, which itself stays without GPUs
        result = launch(train, config, task)       # two workers, on cuda:0 and cuda:1, in fp16

How it works:

- `pair` builds the library (build.py) and sets PRETEND_CUDA=1, a PATH with a false nvidia-smi (bin/), and a PYTHONPATH
  with a `sitecustomize` (site/) that brings the pair into every Python process below: a new worker server, and all
  workers that it forks.
- The library (pretend_cuda.cpp) makes tensors on cuda:0 and cuda:1, in host memory. The CPU's kernels compute.
- load.py replaces the Python layer of `torch.cuda`: streams and events that keep a record, memory figures, generators.
- nccl.py stands in for NCCL with gloo on the same memory, and refuses what NCCL refuses.
- watch.py is for functions in workers: it lists the waits of the host with their stacks, and the order of operations on
  streams, sets a limit of memory, and has the texts of the errors that CUDA's libraries raise beyond a limit.

What it shows: mixed devices, waits of the host, reads of memory that is not filled yet or has not arrived yet, what is
asked of streams, out of memory in any form, what the kit does with two GPUs in one process or two.

What it cannot show:

- Speed, and the size of what fits: a T4's kernels need other workspaces than a CPU's.
- Kernels: results are the CPU's, rounding and the order of additions too. Random numbers for a GPU come from the CPU's
  generator. `torch.compile` traces, and runs the graph without a compiler.
- Asynchrony, but for copies from a device to page-locked memory: all else is done when the call returns. An operation
  on the wrong stream still computes the right result (`watch.operations` shows the stream).
- NCCL itself, its hangs and its watchdog, peer access, and CUDA's behaviour after a crash. Operators of libraries with
  CUDA code of their own (bitsandbytes, DeepSpeed), CUDA graphs, sparse tensors.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from . import build

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def pair() -> Iterator[None]:
    """Give this process's worker server and its workers two GPUs inside the `with` block."""
    from kaggle_mgpu.env import worker_server

    build.build()
    site = str(HERE / "site")
    python_path = os.pathsep.join(filter(None, [site, str(HERE.parent), os.environ.get("PYTHONPATH")]))
    changed = {"PRETEND_CUDA": "1", "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": python_path}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    sys.path.insert(0, site)
    stop_server(worker_server)
    try:
        yield
    finally:
        stop_server(worker_server)
        sys.path.remove(site)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop_server(worker_server) -> None:  # type: ignore[no-untyped-def]
    """Stop the worker server, so that the next launch starts one with today's variables."""
    if worker_server.running():
        worker_server.current.stop()
    worker_server.current = None
