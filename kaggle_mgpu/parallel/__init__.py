"""The parallel package computes gradients and optimizer steps on any number of GPUs.

The package knows no config, task or dataset, and writes no file. Start reading at `Strategy` in strategy.py,
the class for one process with one device; `choose` selects the class for a run: data_parallel.py (dp, ddp), fsdp.py or
zero.py. distributed.py has the communication between ranks, state.py the state in checkpoints, shards.py the handling
of sharded tensors.
"""

from . import distributed, shards
from .batch_norm import batch_norms, sync_batch_norms
from .choose import choose
from .data_parallel import Distributed, Replicated
from .state import load_saved_state, saved_state
from .strategy import Strategy

__all__ = [
    "Distributed",
    "Replicated",
    "Strategy",
    "batch_norms",
    "choose",
    "distributed",
    "load_saved_state",
    "saved_state",
    "shards",
    "sync_batch_norms",
]
