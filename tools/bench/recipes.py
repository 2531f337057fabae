"""Compare a recipe with what people use instead, on real data that comes inside packages; camouflage's two decoders.

    make bench-recipes RECIPE=text_generation                   # in an environment of its own, build/peers
    python tools/bench/recipes.py text_generation --small       # two to three minutes of one core
    python tools/bench/recipes.py text_generation --seeds 0 --contenders "kit; kit, lr 3e-3"

The same samples in the same order, as many steps, one core; for each contender a row of a Markdown table: the mean over
the seeds, and the least and the largest value. tools/bench/peers/ says for each recipe what is equal and what is not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODULES = {
    "text_generation": "text", "activity_recognition": "activity", "sft": "sft", "surface_segmentation": "surface",
    "camouflage_segmentation": "camouflage",
}  # fmt: skip


def cell(values: list[float]) -> str:
    """Return the mean and the range of one figure over the seeds.

    >>> cell([1.0, 2.0]), cell([3.0, 3.0])
    ('1.5 (1..2)', '3')
    """
    mean, low, high = (f"{value:.4g}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}..{high})"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("recipe", choices=MODULES)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--small", action="store_true", help="smaller models and fewer steps")
    options.add_argument("--steps", type=int, help="in place of the size's number of steps")
    options.add_argument("--contenders", help="separated by semicolons (default: all)")
    options.add_argument("--data", type=Path, help="in place of the data from packages")
    options.add_argument("--material", type=Path, default=ROOT / "build" / "material", help="where that is kept")
    given = options.parse_args()

    import torch

    torch.set_num_threads(1)
    from peers import common, material

    peer = importlib.import_module(f"peers.{MODULES[given.recipe]}")
    names = [name.strip() for name in given.contenders.split(";")] if given.contenders else [*peer.CONTENDERS]
    if unknown := [name for name in names if name not in peer.CONTENDERS]:
        options.error(f"--contenders: no {unknown[0]!r}; there are {'; '.join(peer.CONTENDERS)}")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    data = given.data or material.MATERIAL[given.recipe](given.material)
    headed = False
    for name in names:
        rows: list[dict[str, float]] = []
        for seed in seeds:
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                steps = given.steps or peer.STEPS[given.small]
                run = common.Run(seed, steps, given.small, data, Path(folder) / "run")
                rows.append(peer.CONTENDERS[name](run) | {"CPU s": time.process_time() - began})
                print(f"{name}, seed {seed}: {rows[-1]}", flush=True)  # a long run shows how far it is
        if not headed:
            print(f"| {given.recipe}, {steps} steps | {' | '.join(rows[0])} |\n|{'---|' * (len(rows[0]) + 1)}")
            headed = True
        print(f"| {name} | {' | '.join(cell([row[key] for row in rows]) for key in rows[0])} |", flush=True)


if __name__ == "__main__":
    main()
