"""The parallel package computes gradients and optimizer steps on any number of GPUs.

The package is independent of configs, tasks and datasets, and writes no file. Start reading at `Strategy` in
strategy.py, the class for one process with one device. Its subclasses are in data_parallel.py (dp, ddp), fsdp.py and
zero.py; `choose_strategy` selects the class for a run. distributed.py has the communication between ranks, state.py the
state in checkpoints, shards.py the handling of sharded tensors.
"""

from . import distributed, shards
from .batch_norm import batch_norms, sync_batch_norms
from .choose import choose_strategy
from .data_parallel import Distributed, Replicated
from .state import load_saved_state, saved_state
from .strategy import Strategy

__all__ = [
    "Distributed",
    "Replicated",
    "Strategy",
    "batch_norms",
    "choose_strategy",
    "distributed",
    "load_saved_state",
    "saved_state",
    "shards",
    "sync_batch_norms",
]
