"""Run a command on the pretend pair, in its own process too: python tests/pretend_cuda python -m pytest -m gpu"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TESTS)  # in this folder's place, whose files have names that others have
sys.path.insert(1, str(TESTS.parent))

import pretend_cuda  # noqa: E402

with pretend_cuda.pair():
    sys.exit(subprocess.call(sys.argv[1:]))
