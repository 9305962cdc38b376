"""llama.cpp as a judge: the logits of given tokens, from the C functions of its library.

Of what llama.cpp offers, this alone is exact: its server returns the likeliest tokens of those that
it draws, and the file of ``llama-perplexity --kl-divergence-base`` holds 16-bit values of the
second half of each window. The wheel ``xllamacpp`` carries the library with all its C functions,
for the CPU and without a compiler.

Records that the library passes by value are kept as it fills them, in buffers larger than they are:
only the first three numbers of the context's are set here, and read back from the context that
comes of them. So a later version that adds fields is no danger, and one that moves these three is
noticed. Source: ``include/llama.h`` of ggml-org/llama.cpp.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

PACKAGE = "xllamacpp"
CHILD = Path(__file__).with_name("llama_cpp_child.py")


def library() -> Path | None:
    """The shared library with llama.cpp's C functions, if it is installed."""
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(place).glob(f"{PACKAGE}*")):
            if file.suffix in (".so", ".dll", ".dylib", ".pyd"):
                return file
    return None


def check_installed() -> None:
    """Raises ``ValueError`` with what to install."""
    if library() is None:
        raise ValueError(
            f"engine llama.cpp is not installed: pip install {PACKAGE} (or curvprune[llama-cpp])"
        )


@dataclass(kw_only=True, slots=True)
class Running:
    """A file in a llama.cpp of its own process."""

    path: Path
    process: subprocess.Popen[str]
    shared: Path
    length: int
    vocabulary: int = 0
    version: str = ""
    _logits: npt.NDArray[np.float32] | None = field(default=None)

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Those of every position, ``(tokens, vocabulary)``.

        Raises ``ValueError`` for more tokens than the context holds, ``RuntimeError`` where
        llama.cpp fails.
        """
        if len(tokens) > self.length:
            raise ValueError(
                f"{len(tokens)} tokens, and {self.path} was opened for {self.length}; expected "
                "length= of the longest sequence"
            )
        # The process writes a position's row after the other into a file that both see.
        self.ask({"tokens": tokens})
        shape = (self.length, self.vocabulary)
        rows = np.memmap(self.shared, dtype=np.float32, mode="r", shape=shape)[: len(tokens)]
        found: npt.NDArray[np.float32] = np.array(rows)
        if not bool(np.isfinite(found).all()):
            raise RuntimeError(f"llama.cpp computes no finite logits from {self.path}")
        return found

    def ask(self, request: dict[str, list[int]] | None = None) -> dict[str, int | str]:
        """The answer to a request, or the first line that the process says by itself."""
        said = ""
        try:
            if request is not None:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            said = _line(self.process.stdout)
        except BrokenPipeError:
            pass
        if not said:
            status = self.process.wait()
            raise RuntimeError(f"llama.cpp ended (status {status}) while it read {self.path}")
        answer: dict[str, int | str] = json.loads(said)
        if "error" in answer:
            kind = RuntimeError if request is not None else ValueError
            raise kind(f"{self.path}: llama.cpp: {answer['error']}")
        return answer


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@contextmanager
def running(path: Path, *, length: int, threads: int) -> Iterator[Running]:
    """A llama.cpp that has read a file.

    Args:
        length: tokens that its context holds.
    """
    found = library()
    assert found is not None
    with tempfile.TemporaryDirectory(prefix="curvprune-llama-cpp-") as folder:
        shared = Path(folder) / "logits"
        # ``-I``: nothing but installed packages may be imported there.
        command = [sys.executable, "-I", str(CHILD), str(found), str(path), str(shared)]
        process = subprocess.Popen(
            [*command, str(length), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        one = Running(path=path, process=process, shared=shared, length=length)
        try:
            try:
                first = one.ask()
            except RuntimeError as error:
                # It ended by itself: the file is to blame.
                raise ValueError(f"{error}: it is damaged, or no model for llama.cpp") from error
            one.vocabulary = int(first["vocabulary"])
            one.version = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
            yield one
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                # What it has not read any more is lost with it.
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
