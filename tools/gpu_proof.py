"""Prove on this machine's GPUs that training there is right and quick; see kaggle_mgpu/planning/gpu_proof.py.

make gpu-proof                                            # build/gpu_proof.jsonl, and a table; rc 1 if a line is wrong
python tools/gpu_proof.py out.jsonl --only facts worker   # some sections
"""

from __future__ import annotations

import argparse
import sys

from kaggle_mgpu.planning import gpu_proof


def main() -> int:
    parser = argparse.ArgumentParser(description="Prove that training on this machine's GPUs is right and quick.")
    parser.add_argument("path", nargs="?", default="build/gpu_proof.jsonl", help="where the JSON lines go")
    parser.add_argument("--only", nargs="*", choices=[section.__name__ for section in gpu_proof.SECTIONS])
    given = parser.parse_args()
    return 0 if all(line["right"] for line in gpu_proof.run(given.path, given.only)) else 1


if __name__ == "__main__":
    sys.exit(main())
