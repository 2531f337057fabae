"""Build the library of the pretend GPUs, once for each torch, Python and source, into build/pretend_cuda/.

    python tests/pretend_cuda/build.py    # prints the library's path

g++ takes half a minute. The name of the folder says what the library was built from and for, so a change of the source
or of torch builds anew; a lock keeps two test processes from building at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

SOURCE = Path(__file__).with_name("pretend_cuda.cpp")
NAME = "pretend_cuda_library"
ROOT = Path(__file__).resolve().parents[2]


def torch_folder() -> Path:
    """Return torch's folder without importing torch."""
    found = util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def why_not() -> str:
    """Return why the library cannot be built here, or ""."""
    if shutil.which("g++") is None:
        return "no g++, which builds the pretend GPUs (Debian: apt-get install g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h, which the pretend GPUs are built with"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is a CUDA build: its own CUDA is in the pretend GPUs' place"
    return ""


def library() -> Path:
    """Return the path of the library for this torch, this Python and this source, whether it exists or not."""
    version = f"{metadata.version('torch')}-{sys.implementation.cache_tag}"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return ROOT / "build" / "pretend_cuda" / f"{version}-{digest}" / f"{NAME}.so"


def build() -> Path:
    """Build the library unless it is there, and return its path.

    Raises:
        RuntimeError: g++ fails; the message has the end of its output.
    """
    target = library()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            torch = torch_folder()
            include = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
            unfinished = target.with_suffix(f".{os.getpid()}")
            command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", "-w", f"-DTORCH_EXTENSION_NAME={NAME}"]
            command += [f"-I{folder}" for folder in include]
            command += [str(SOURCE), "-o", str(unfinished), f"-L{torch / 'lib'}"]
            command += [f"-l{name}" for name in ("c10", "torch_cpu", "torch", "torch_python")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
            unfinished.rename(target)
    return target


if __name__ == "__main__":
    print(build())
