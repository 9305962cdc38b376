"""Checks every jaxtyping annotation of the package while tests run, and keeps torch to one
thread."""

from __future__ import annotations

import os

import torch
from jaxtyping import install_import_hook

# Must come before anything imports curvprune: modules that are already loaded stay unchecked.
# An int where a float is asked for is fine, as type checkers have it (PEP 484).
install_import_hook(
    "curvprune", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

# The tests' matrices are so small that handing them to other threads costs more than it saves.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
