"""How much work a model is whatever the cuts' widths: multiply-adds of one item, and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Loss, evaluating, find_layers, key_of
from curvprune.structured.cuts import BLOCKS, Cut
from curvprune.structured.gradients import first_tensor

# (module, side) → cut → the share of that side's width that one unit of the cut is.
_Shares = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Term:
    """A part of the work that shrinks with the removed share of its outputs and of its inputs: cut
    → share per unit."""

    macs: float
    parameters: float
    outputs: Mapping[str, float]
    inputs: Mapping[str, float]


class CutWork:
    """Multiply-adds of one item, and parameters, of the whole model, whatever the cuts' widths.

    Cost: one forward pass of one item to build it; microseconds for each question.
    """

    def __init__(
        self, model: nn.Module, objective: Loss, item: Batch, cuts: Mapping[str, Cut]
    ) -> None:
        self.units = {n: c.units for n, c in cuts.items()}
        layers = find_layers(model)
        self.positions = _positions(model, objective, item, layers)
        shares = _shares(model, layers, cuts)
        self.terms = [
            *_weights(model, layers, self.positions, shares),
            *_attention_scores(cuts, self.positions),
        ]

    def __call__(self, of: str, left: Mapping[str, int]) -> int:
        """Of ``"macs"`` or ``"parameters"`` with ``left[cut]`` units of each cut (all, where it is
        not named)."""
        gone = {n: units - left.get(n, units) for n, units in self.units.items()}
        # Every term shrinks with what is gone of both of its sides.
        parts = []
        for term in self.terms:
            whole = term.macs if of == "macs" else term.parameters
            outputs, inputs = _remains(term.outputs, gone), _remains(term.inputs, gone)
            parts.append(whole * outputs * inputs)
        return round(math.fsum(parts))

    def bytes_of(self, cut: str, left: int, itemsize: int) -> int:
        """Bytes of what belongs to a cut, the other cuts at full width."""
        return (self("parameters", {cut: left}) - self("parameters", {cut: 0})) * itemsize


def _remains(shares: Mapping[str, float], gone: Mapping[str, int]) -> float:
    return 1.0 - math.fsum(share * gone[n] for n, share in shares.items())


def _shares(model: nn.Module, layers: Mapping[str, Layer], cuts: Mapping[str, Cut]) -> _Shares:
    sides: _Shares = {}
    for name, cut in cuts.items():
        # A block that goes takes all of its modules with it.
        if cut.kind == BLOCKS:
            inside = model.get_submodule(cut.name).named_modules(prefix=cut.name)
            sides.update({(module, "out"): {name: 1.0} for module, _ in inside})
            continue
        for slot in (*cut.makes, *cut.reads):
            shares = sides.setdefault((slot.module, slot.side), {})
            share = slot.index.shape[1] / _width(model, layers, slot.module, slot.side)
            shares[name] = shares.get(name, 0.0) + share
        for piece in cut.pieces:
            shares = sides.setdefault((key_of(piece.module, piece.tensor), "out"), {})
            tensor = getattr(model.get_submodule(piece.module), piece.tensor)
            shares[name] = piece.index.shape[1] / tensor.shape[piece.dim]
    return sides


def _width(model: nn.Module, layers: Mapping[str, Layer], module: str, side: str) -> int:
    layer = layers.get(module)
    if layer is not None:
        return layer.shape[("out", "in").index(side)]
    norm = model.get_submodule(module)
    return len(norm.weight)  # type: ignore[arg-type]


def _weights(
    model: nn.Module,
    layers: Mapping[str, Layer],
    positions: Mapping[str, float],
    shares: _Shares,
) -> list[_Term]:
    """Every parameter once, with the multiply-adds of those that are a layer's matrix."""
    terms = []
    seen: set[int] = set()
    matrices = {id(layer.weight): name for name, layer in layers.items()}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # Only a layer's matrix is multiplied; biases and norms are parameters alone.
            matrix = matrices.get(id(parameter), "")
            inputs = shares.get((matrix, "in"), {})
            outputs = shares.get((name, "out"), {})
            if not inputs and not outputs:
                outputs = shares.get((key_of(name, key), "out"), {})
            terms.append(
                _Term(
                    macs=parameter.numel() * positions.get(matrix, 0),
                    parameters=parameter.numel(),
                    outputs=outputs,
                    inputs=inputs,
                )
            )
    return terms


def _attention_scores(cuts: Mapping[str, Cut], positions: Mapping[str, float]) -> list[_Term]:
    """Attention's scores and their use, of every position with every other."""
    terms = []
    for name, cut in cuts.items():
        if cut.kind == "heads":
            macs = 0.0
            for read in cut.reads:
                macs += 2.0 * positions.get(read.module, 0) ** 2 * read.index.numel()
            terms.append(_Term(macs=macs, parameters=0.0, outputs={name: 1 / cut.units}, inputs={}))
    return terms


@torch.no_grad()
def _positions(
    model: nn.Module, objective: Loss, item: Batch, layers: Mapping[str, Layer]
) -> dict[str, float]:
    """How often each layer's matrix is multiplied for one item."""
    found: dict[str, float] = {}
    # Not the first dimension of an output, which may be time, or items and tokens in one.
    entry = next(iter(item.values())) if isinstance(item, Mapping) else item
    while not isinstance(entry, Tensor):
        entry = next(iter(entry))
    items = max(1, len(entry))

    def watch(name: str, layer: Layer) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            output = first_tensor(output)
            if layer.kind == "experts":
                # Every token comes to some of the experts.
                chosen = args[1].numel() if len(args) > 1 else len(output)
                found[name] = found.get(name, 0) + chosen / layer.groups / items
                return
            found[name] = found.get(name, 0) + output.numel() / (layer.shape[0] * items)

        return count

    handles = []
    for name, layer in layers.items():
        for reader in layer.readers:
            handles.append(reader.register_forward_hook(watch(name, layer)))
    try:
        with evaluating(model):
            objective.outputs(model, item)
    finally:
        for handle in handles:
            handle.remove()
    return found
