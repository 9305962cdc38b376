#!/usr/bin/env bash
# What transformers must read, with the oldest and the newest versions that pyproject.toml allows.
# Usage: scripts/versions.sh [pytest arguments]; takes some minutes and 200 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# 1. Each pair in a folder of its own, before the installed packages; torch stays.
try() {
    local name=$1
    shift
    "$python" -m pip install -q --no-deps --target "$folder/$name" "$@"
    echo "== $*"
    PYTHONPATH="$folder/$name" "$python" -m pytest -q \
        tests/test_saved.py tests/test_artifact.py tests/test_packed.py tests/test_families.py \
        tests/test_compat.py "${extra[@]}"
}
extra=("$@")

# 2. The floor of pyproject.toml, and what the registry has today.
try oldest "transformers==5.18.*" "compressed-tensors==0.18.*"
try newest --upgrade transformers compressed-tensors
