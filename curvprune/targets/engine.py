"""Engines as judges: a file that an engine runs, behind the face of a torch module.

An `EngineModel` returns the logits that the engine computes for the tokens of a batch. So whatever
evaluates a module evaluates an engine: losses, divergences, `curvprune.certify`.
The engine runs in a process of its own, because a library that meets a damaged file may end the
process that it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curvprune.model import Batch
from curvprune.targets import llama_cpp, vllm_engine
from curvprune.targets.gguf import check_architecture
from curvprune.targets.target import TargetName

EngineName = Literal["llama.cpp", "vllm"]
INPUTS = {"input_ids", "attention_mask", "labels"}


class Runner(Protocol):
    """A file in an engine."""

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""

    @property
    def version(self) -> str:
        """Of the engine."""

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Those of every position, ``(tokens, vocabulary)``, each after all tokens up to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What an `EngineModel` returns: ``(items, positions, vocabulary)`` in float32."""

    logits: Tensor


class EngineModel(nn.Module):
    """A causal language model as an engine runs it; only forward passes over whole sequences."""

    def __init__(self, runner: Runner, *, engine: EngineName, file: Path) -> None:
        super().__init__()
        self.runner, self.engine, self.file = runner, engine, file
        # Outputs are made where parameters lie.
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Outputs:
        """Logits of every token that the mask keeps; those of padding are zeros.

        Args:
            input_ids: ``(items, positions)``.
            attention_mask: ones and zeros of that shape; what is masked is not passed on, so it
                must lie at one end.
            use_cache: engines have caches of their own.

        Raises ``ValueError`` for a mask with holes or a token beyond the vocabulary, and
        ``RuntimeError`` where the engine fails.
        """
        items, length = input_ids.shape
        logits = torch.zeros(items, length, self.runner.vocabulary)
        for i in range(items):
            start, end = self._kept(attention_mask, i, length)
            tokens = input_ids[i, start:end].tolist()
            if tokens and max(tokens) >= self.runner.vocabulary:
                raise ValueError(
                    f"item {i}: token {max(tokens)}, and {self.file} has "
                    f"{self.runner.vocabulary}; expected the model that the tokens are of"
                )
            if tokens:
                logits[i, start:end] = torch.from_numpy(self.runner.logits(tokens))
        return Outputs(logits=logits.to(self.place.device))

    @staticmethod
    def _kept(mask: Tensor | None, item: int, length: int) -> tuple[int, int]:
        if mask is None:
            return 0, length
        places = mask[item].nonzero().flatten().tolist()
        if not places:
            return 0, 0
        start, end = places[0], places[-1] + 1
        if end - start != len(places):
            raise ValueError(
                f"item {item}: its attention mask has holes, and {EngineModel.__name__} passes "
                "tokens on one after the other; expected padding at one end"
            )
        return start, end


@contextmanager
def open_engine(
    file: str | Path,
    *,
    engine: EngineName = "llama.cpp",
    length: int = 512,
    threads: int | None = None,
) -> Iterator[EngineModel]:
    """A model file in an engine, for as long as the ``with`` block lasts.

    Args:
        file: for llama.cpp a GGUF file, for vllm a folder of ``target: vllm``.
        length: most tokens of a sequence.
        threads: of the engine; by default those of torch.

    Memory: the engine's own, and the logits of one sequence, four bytes each.

    Raises:
        ValueError: no such file, one that the engine cannot read (with its reason), or an engine
            that is not installed, with what to install.

    Example:
        >>> with cp.open_engine("model.gguf") as served:            # doctest: +SKIP
        ...     verdict = cp.certify(model, served, items, cp.Budget("loss", max_drop=0.05))
    """
    check_installed(engine)
    path, wanted = Path(file), threads or torch.get_num_threads()
    if engine == "llama.cpp" and not path.is_file():
        raise ValueError(f"{path} is not a file; expected a GGUF file, see curvprune export")
    if engine == "vllm" and not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected what target: vllm writes")
    running = llama_cpp.running if engine == "llama.cpp" else vllm_engine.running
    with running(path, length=length, threads=wanted) as runner:
        yield EngineModel(runner, engine=engine, file=path).eval()


def check_engine(
    engine: EngineName, target: TargetName, model: nn.Module, items: Sequence[Batch]
) -> None:
    """Whether an engine is there and can run a model of this architecture on these items.

    Raises ``ValueError`` with what to do.
    """
    check_installed(engine)
    if engine == "vllm" and target != "vllm":
        raise ValueError("engine vllm runs what target: vllm writes; ask for both")
    for item in items:
        if not isinstance(item, Mapping) or not INPUTS.issuperset(item):
            told = ", ".join(sorted(item)) if isinstance(item, Mapping) else "tensors alone"
            raise ValueError(
                f"engine {engine} runs tokens alone (input_ids, with attention_mask and labels), "
                f"and the items have {told}; leave the engine out"
            )
    try:
        if engine == "llama.cpp":
            check_architecture(model)
    except ValueError as error:
        raise ValueError(f"engine {engine}: {error}") from error


def check_installed(engine: EngineName) -> None:
    """Raises ``ValueError`` with what to install, where an engine is not there."""
    if engine == "llama.cpp":
        llama_cpp.check_installed()
    elif engine == "vllm":
        vllm_engine.check_installed()
    else:
        raise ValueError(f"engine {engine!r} is not offered; expected llama.cpp or vllm")
