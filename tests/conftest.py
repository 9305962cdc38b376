"""Checks the shapes that annotations say while tests run, and keeps torch to one thread."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jaxtyping import install_import_hook

# The modules whose annotations say shapes: to check the others too doubles the suite's time.
PACKAGE = Path(__file__).parent.parent / "curvprune"
WITH_SHAPES = [
    ".".join(("curvprune", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
# Must come before anything imports them: modules that are already loaded stay unchecked.
# An int where a float is asked for is fine, as type checkers have it (PEP 484).
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(WITH_SHAPES, CHECKER)

# The tests' matrices are so small that handing them to other threads costs more than it saves.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
