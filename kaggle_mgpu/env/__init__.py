"""The env package prepares a process for later imports: quiet logs, GPU memory allocator, a working protobuf.

`fix()` is called in a notebook's first cell. The package uses the standard library and errors.py alone, and imports no
other package of kaggle_mgpu, no torch and no protobuf. Start reading at `fix` in environment.py; protobuf_fix.py finds
protobuf versions that conflict, import_hooks.py changes later imports, worker_server.py starts the server from which
`launch` forks its workers.
"""

from . import import_hooks, worker_server
from .environment import Item, Report, fix, main, nvidia_present, variables

__all__ = ["Item", "Report", "fix", "import_hooks", "main", "nvidia_present", "variables", "worker_server"]
