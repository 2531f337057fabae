"""Measure the cost of a notebook's payload: its size, its place on a rendered page, and the time to unpack the package.

    python tools/bench/payload.py                                       # with build/demo/text_generation.ipynb, if made
    python tools/bench/payload.py --page runs/SLUG/v1/__notebook__.ipynb

The page is an executed notebook with the payload of this checkout, converted by nbconvert and laid out by Chromium.
Each payload cell runs in an interpreter without site-packages and unpacks into a fresh temporary folder; figures are
medians. On a busy machine the CPU time is the steadiest.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import browser
import notebooks

ROOT = notebooks.ROOT
DEMO = ROOT / "build" / "demo" / "text_generation.ipynb"
TIME = "import time; _began = time.perf_counter(), time.process_time()\n"
TELL = "\nprint(1000 * (time.perf_counter() - _began[0]), 1000 * (time.process_time() - _began[1]))\n"
HEIGHTS = """<script>addEventListener("load", () => {
  const found = document.createElement("pre"), cells = [...document.querySelectorAll(".jp-Cell")];
  const heights = cells.map(cell => cell.getBoundingClientRect().height);
  found.id = "measured";
  found.textContent = JSON.stringify([heights, document.documentElement.scrollHeight]);
  document.body.append(found);
})</script>"""


def pixels(path: Path, payload: str, width: int = 1000) -> tuple[float, float]:
    """Return the heights of the payload cell and of the whole page of an executed notebook."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    numbers = [number for number, cell in enumerate(notebook.cells) if "payload" in notebooks.tags(cell)]
    notebook.cells[numbers[0]].source = payload
    page, _ = HTMLExporter().from_notebook_node(notebook)
    page = re.sub("(<head[^>]*>)", lambda head: head[1] + HEIGHTS, page, count=1)
    laid_out = browser._run(page, "--dump-dom", width=width, height=900, dark=False)
    found = re.search('<pre id="measured">(.*?)</pre>', laid_out, re.DOTALL)
    assert found is not None, "the page's script did not run"
    heights, whole = json.loads(html.unescape(found[1]))
    return heights[numbers[0]], whole


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--page", type=Path, help=f"an executed notebook (default: {DEMO.relative_to(ROOT)})")
    given = parser.parse_args()
    print(f"{'notebook':44}  {'bytes':>7}  {'lines':>5}  {'unpack, ms':>10}  {'of it CPU':>9}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        (payload,) = ("".join(c["source"]) for c in cells if "payload" in c["metadata"].get("tags", []))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        times = []
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, "-S", "-"], input=TIME + payload + TELL, cwd=folder, capture_output=True,
                    env={**environment, "TMPDIR": folder}, text=True, check=True,
                )  # fmt: skip
            times.append([float(word) for word in done.stdout.splitlines()[-1].split()])
        wall, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        lines = len(payload.splitlines())
        print(f"{path.name:44}  {path.stat().st_size:7}  {lines:5}  {wall:10.1f}  {cpu:9.1f}")
    page = given.page or DEMO
    if browser.PROGRAM is None or not page.is_file():
        why = f"no {page}: make demo, or --page" if browser.PROGRAM else "no Chromium here"
        print(f"the cell's place on a rendered page is not measured: {why}")
        return 0
    cell, whole = pixels(page, notebooks.payload_source(notebooks.package_files(ROOT / "kaggle_mgpu")))
    print(f"{page.name}, rendered: {cell:.0f} of {whole:.0f} px, {100 * cell / whole:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
