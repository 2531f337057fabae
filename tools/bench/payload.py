"""Measure the cost of a notebook's payload: the notebook's size, and the time to unpack the package.

    python tools/bench/payload.py

Each payload cell runs in an interpreter without site-packages and unpacks into a fresh temporary folder; figures are
medians. On a busy machine the CPU time is the steadiest. `again` is the time with an existing folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import json, statistics, time
def seconds():
    sys.path[:] = [p for p in sys.path if "kaggle_mgpu-" not in p]
    began = time.perf_counter()
    _use_payload(_payload, _sha256)
    return time.perf_counter() - began
first, again, cpu = [], [], []
for _ in range(ROUNDS):
    tempfile.tempdir = tempfile.mkdtemp(dir=FOLDER)
    before = time.process_time()
    first.append(seconds())
    cpu.append(time.process_time() - before)
    again.append(seconds())
print(json.dumps([1000 * statistics.median(times) for times in (first, again, cpu)]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print(f"{'notebook':44}  {'bytes':>7}  {'unpack, ms':>10}  {'of it CPU':>9}  {'again, ms':>9}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        (payload,) = ("".join(c["source"]) for c in cells if "payload" in c["metadata"].get("tags", []))
        with tempfile.TemporaryDirectory() as folder:
            measure = MEASURE.replace("ROUNDS", str(given.rounds)).replace("FOLDER", repr(folder))
            source = payload.rpartition("\n")[0] + measure
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(
                [sys.executable, "-S", "-"], input=source, cwd=folder, env=environment, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
        first, again, cpu = json.loads(done.stdout)
        print(f"{path.name:44}  {path.stat().st_size:7}  {first:10.1f}  {cpu:9.1f}  {again:9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
