"""What can be removed: cuts, their units and where those lie; what torch-pruning must be told.

A *cut* is a dimension inside the model whose units can be taken out one by one: the width of an
MLP, key-value heads with the query heads that read them, the channels of convolutions, tied by
residual connections and BatchNorm. This is the only file that imports torch-pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

KINDS = ("mlp", "heads", "channels")
BLOCKS = "blocks"  # a kind of its own: whole blocks of a residual stream, each a cut of one unit


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slot:
    """What each unit is in one module: rows of a tensor's output side (``"out"``) or of its input
    side (``"in"``)."""

    module: str
    side: str
    index: Int[Tensor, "units k"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """What each unit is in a parameter or buffer that is no layer's: entries along ``dim``."""

    module: str
    tensor: str
    dim: int
    index: Int[Tensor, "units k"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """A dimension whose units can be removed.

    Attributes:
        name: of the module that holds all of it, or of its first producer.
        kind: ``"mlp"``, ``"heads"`` (a unit is one key-value head with its query heads),
            ``"channels"``, or ``"blocks"``: the one unit is the block called ``name``.
        units: how many there are.
        makes: where its units come out of or pass through: producers, BatchNorm, depthwise
            convolutions.
        reads: where its units go in; the columns are those of `Layer`'s matrix.
        counts: (module, attribute) → how much of it one unit is, such as heads.
        pieces: what its units are in tensors that are no layer's matrix; of stacked experts, in
            both of them.
        multiple: widths are multiples of this (grouped products of experts read 16 bytes at once).
    """

    name: str
    kind: str
    units: int
    makes: tuple[Slot, ...]
    reads: tuple[Slot, ...]
    counts: Mapping[tuple[str, str], int]
    pieces: tuple[Piece, ...] = ()
    multiple: int = 1

    @property
    def first(self) -> str:
        """The module that stands for it where none holds all of it."""
        return (*self.makes, *self.reads)[0].module

    @property
    def readers(self) -> set[str]:
        """The modules that read its units."""
        return {slot.module for slot in self.reads}

    @property
    def modules(self) -> set[str]:
        """All modules that hold a part of it."""
        tensors = {f"{piece.module}.{piece.tensor}" for piece in self.pieces}
        holders = {slot.module for slot in (*self.makes, *self.reads)} - tensors
        return holders | {piece.module for piece in self.pieces}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The cuts of a model.

    Attributes:
        cuts: by name.
        sinks: layer → BatchNorm that can hold a constant for a layer without a bias.
        notes: why other dimensions are no cuts.
    """

    cuts: dict[str, Cut]
    sinks: dict[str, str]
    notes: list[str]


def torch_pruning() -> Any:
    """The library, which comes with an extra."""
    try:
        import torch_pruning as library
    except ImportError as error:
        raise ValueError(
            "structured pruning needs the extra: pip install 'curvprune[structured]'"
        ) from error
    return library


class Conv1DPruner:
    """What torch-pruning must know of transformers' ``Conv1D``, whose weight is stored as ``[in,
    out]``."""

    pruning_dim = 1  # torch-pruning writes it, nothing here reads it

    def get_out_channels(self, layer: Any) -> int:
        return layer.nf

    def get_in_channels(self, layer: Any) -> int:
        return layer.nx

    def prune_out_channels(self, layer: Any, units: Sequence[int]) -> None:
        left = sorted(set(range(layer.nf)) - set(units))
        layer.weight = nn.Parameter(layer.weight.data[:, left])
        layer.bias = nn.Parameter(layer.bias.data[left])
        layer.nf = len(left)

    def prune_in_channels(self, layer: Any, units: Sequence[int]) -> None:
        left = sorted(set(range(layer.nx)) - set(units))
        layer.weight = nn.Parameter(layer.weight.data[left])
        layer.nx = len(left)
