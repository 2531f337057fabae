"""What must be true before anything else is imported: quiet logs, the allocator, a protobuf that works.

`fix()` is called in a notebook's first cell. The package uses the standard library and errors.py alone, and imports no
other package of the kit, no torch and no protobuf. Start reading at `fix` in environment.py; protobuf_fix.py says
which protobuf can work, import_hooks.py mends what is imported later, worker_server.py starts
the server that `launch` has its workers from.
"""

from . import import_hooks, worker_server
from .environment import Item, Report, fix, main, nvidia_present, variables

__all__ = ["Item", "Report", "fix", "import_hooks", "main", "nvidia_present", "variables", "worker_server"]
