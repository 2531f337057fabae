"""A stand-in for Kaggle's servers that the real, unmodified kaggle CLI talks to, and that runs what is pushed.

    with KaggleServer(folder) as kaggle:
        subprocess.run([sys.executable, "-m", "kaggle", "kernels", "push", "-p", made], env=kaggle.environment())

server.py speaks the CLI's protocol, account.py holds and checks what Kaggle holds and checks, session.py runs a
notebook as a batch session does. What Kaggle does that nobody outside knows (which version of a kernel's own output is
mounted, how it words a time limit) is an attribute of the account, so that a test can have it either way.
"""

from __future__ import annotations

from kaggle_server.account import Account, Version
from kaggle_server.server import KaggleServer
from kaggle_server.session import Session

__all__ = ["Account", "KaggleServer", "Session", "Version"]
