"""Folders and files in the engines that run them: one section for each engine.

CURVPRUNE_VLLM_PYTHON=/path/to/python python benchmarks/engines.py vllm
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import engine_vllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["vllm"])
    parser.add_argument("--families", nargs="*", default=[])
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = told.out or Path(scratch)
        print("\n".join(engine_vllm.run(told.families, out, told.options)))


if __name__ == "__main__":
    main()
