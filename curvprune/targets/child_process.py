"""An engine in a process of its own, and the logits that it writes into a file that both see.

The child says one line of JSON when its model is there (``vocabulary``), and one for each line that
it is asked: ``rows`` written, or an ``error``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Answer = dict[str, int | str]


@dataclass(kw_only=True, slots=True)
class Running:
    """A model file or folder in an engine; a `curvprune.targets.engine.Runner`."""

    engine: str
    path: Path
    process: subprocess.Popen[str]
    shared: Path
    length: int
    vocabulary: int = 0
    version: str = ""

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Those of every position, ``(tokens, vocabulary)``, each after all tokens up to it.

        Raises ``ValueError`` for more tokens than the context holds, ``RuntimeError`` where the
        engine fails.
        """
        if len(tokens) > self.length:
            raise ValueError(
                f"{len(tokens)} tokens, and {self.path} was opened for {self.length}; expected "
                "length= of the longest sequence"
            )
        rows = int(self.ask({"tokens": tokens})["rows"])
        if rows != len(tokens):
            raise RuntimeError(
                f"{self.engine} returns {rows} rows of logits for {len(tokens)} tokens"
            )
        shape = (self.length, self.vocabulary)
        found = np.array(np.memmap(self.shared, dtype=np.float32, mode="r", shape=shape)[:rows])
        if not bool(np.isfinite(found).all()):
            raise RuntimeError(f"{self.engine} computes no finite logits from {self.path}")
        return found

    def ask(self, request: dict[str, list[int]] | None = None) -> Answer:
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
            raise RuntimeError(f"{self.engine} ended (status {status}) while it read {self.path}")
        answer: Answer = json.loads(said)
        if "error" in answer:
            kind = RuntimeError if request is not None else ValueError
            raise kind(f"{self.path}: {self.engine}: {answer['error']}")
        return answer


@contextmanager
def started(
    engine: str,
    path: Path,
    command: Callable[[Path], list[str]],
    *,
    length: int,
    version: Callable[[Answer], str],
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """An engine that has read a file or folder.

    Args:
        command: what to start, given the file for logits.
        length: tokens of the longest sequence.
        version: the engine's, given its first answer.
        variables: of its environment, besides those of this process.

    Raises ``ValueError`` for what the engine does not load, with its reason.
    """
    with tempfile.TemporaryDirectory(prefix="curvprune-engine-") as scratch:
        shared = Path(scratch) / "logits"
        process = subprocess.Popen(
            command(shared),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | dict(variables or {}),
        )
        one = Running(engine=engine, path=path, process=process, shared=shared, length=length)
        try:
            try:
                first = one.ask()
            except RuntimeError as error:
                # It ended by itself: the file is to blame.
                raise ValueError(f"{error}: it is damaged, or no model for {engine}") from error
            one.vocabulary, one.version = int(first["vocabulary"]), version(first)
            yield one
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                # What it has not read any more is lost with it.
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
