"""One micro-batch becomes a gradient, on any number of GPUs.

The package never sees a config, a task or a dataset, and writes no file. Start reading at `Strategy` in strategy.py,
which is one process with one device; `choose` names the class for a run: data_parallel.py (dp, ddp), fsdp.py or
zero.py. distributed.py is what the ranks say to each other, state.py what checkpoints hold, shards.py tensors that are
spread over the ranks.
"""

from . import distributed, shards
from .choose import choose
from .data_parallel import Distributed, Replicated
from .state import load_saved_state, saved_state
from .strategy import Strategy

__all__ = [
    "Distributed",
    "Replicated",
    "Strategy",
    "choose",
    "distributed",
    "load_saved_state",
    "saved_state",
    "shards",
]
