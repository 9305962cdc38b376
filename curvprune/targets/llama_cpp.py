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
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvprune.targets.child_process import Running, started

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


@contextmanager
def running(path: Path, *, length: int, threads: int) -> Iterator[Running]:
    """A llama.cpp that has read a file.

    Args:
        length: tokens that its context holds.
    """
    found = library()
    assert found is not None
    told = [str(length), str(threads)]
    # ``-I``: nothing but installed packages may be imported there.
    start = [sys.executable, "-I", str(CHILD), str(found), str(path)]
    version = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    with started(
        "llama.cpp",
        path,
        lambda shared: [*start, str(shared), *told],
        length=length,
        version=lambda first: version,
    ) as one:
        yield one
