#!/usr/bin/env bash
# Install the curvature engines that benchmarks/curvature.py compares with, without moving torch. BackPACK, and with it
# curvlinops, ask for torchvision, whose newest release would replace torch; neither needs it for what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }

before=$(.venv/bin/python -c "import torch; print(torch.__version__)")
pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch
pip install einops einconv linear_operator opt_einsum unfoldNd
pip install --editable ".[bench]"
after=$(.venv/bin/python -c "import torch; print(torch.__version__)")
[ "$before" = "$after" ] || { echo "torch was moved from $before to $after" >&2; exit 1; }
