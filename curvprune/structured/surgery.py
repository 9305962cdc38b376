"""How units leave a model: for good, or so that nothing reads them any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from curvprune.model import Layer, drop_, is_conv1d
from curvprune.structured.cuts import BLOCKS, Conv1DPruner, Cut, torch_pruning


def remove_(
    model: nn.Module, cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> None:
    """Take units out of the model, in place, with torch-pruning's surgery: cut → units to
    remove."""
    graph = torch_pruning().DependencyGraph()
    # 1. Whole blocks.
    drop_(model, [cuts[n].name for n, units in removed.items() if cuts[n].kind == BLOCKS and units])
    # 2. The numbers that modules keep of their units, such as heads.
    narrowed = {n: units for n, units in removed.items() if cuts[n].kind != BLOCKS}
    for name, units in narrowed.items():
        for (owner, attribute), part in cuts[name].counts.items():
            module = model.get_submodule(owner)
            setattr(module, attribute, getattr(module, attribute) - part * len(units))
    # 3. Rows and columns; a module may belong to two cuts.
    for (name, side), indices in _indices(cuts, narrowed).items():
        if indices:
            _shrink(graph, model.get_submodule(name), side, indices)


def _indices(
    cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], set[int]]:
    """(module, side) → what goes there."""
    gone: dict[tuple[str, str], set[int]] = {}
    for name, units in removed.items():
        for slot in (*cuts[name].makes, *cuts[name].reads):
            where = gone.setdefault((slot.module, slot.side), set())
            where.update(slot.index[list(units)].flatten().tolist())
    return gone


def _shrink(graph: Any, module: nn.Module, side: str, indices: set[int]) -> None:
    frozen = {n: p.requires_grad for n, p in module.named_parameters(recurse=False)}
    pruner = Conv1DPruner() if is_conv1d(module) else graph.get_pruner_of_module(module)
    if side == "out":
        pruner.prune_out_channels(module, sorted(indices))
    else:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            # From columns of the matrix to input channels.
            area = module.weight[0, 0].numel()
            indices = {i // area for i in indices}
        pruner.prune_in_channels(module, sorted(indices))
    for n, p in module.named_parameters(recurse=False):
        p.requires_grad_(frozen[n])


@torch.no_grad()
def silence_(
    layers: Mapping[str, Layer], cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> None:
    """Let nothing read these units, in place: their columns become zero."""
    for name, units in removed.items():
        for slot in cuts[name].reads:
            layer = layers[slot.module]
            matrix = layer.as_matrix(layer.weight.detach()).clone()
            matrix[:, slot.index[list(units)].flatten().to(matrix.device)] = 0
            layer.write_(matrix)
            if cuts[name].kind == BLOCKS and units and layer.module.bias is not None:
                layer.module.bias.zero_()  # type: ignore[operator]
