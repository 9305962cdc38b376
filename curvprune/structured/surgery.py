"""How units leave a model: for good, or so that nothing reads them any more."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Layer, drop_, is_conv1d
from curvprune.structured.cuts import BLOCKS, Conv1DPruner, Cut, Piece, torch_pruning

# Numbers of torch's own modules that are the width of what goes through them.
_WIDTHS = ("num_features", "embedding_dim", "groups", "in_channels", "out_channels")


def duplicate(model: nn.Module) -> nn.Module:
    """A copy of the model. Tensors of an earlier graph that modules keep are copied without it,
    since `copy.deepcopy` refuses them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors_in(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (v for v in value if isinstance(v, Tensor))


def remove_(
    model: nn.Module, cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> None:
    """Take units out of the model, in place, with torch-pruning's surgery: cut → units to
    remove."""
    graph = torch_pruning().DependencyGraph()
    pieces = _pieces(cuts, removed)
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
        if indices and name not in pieces:
            _shrink(graph, model.get_submodule(name), side, indices)

    # 4. Parameters and buffers of other modules.
    for parts in pieces.values():
        for piece, indices in parts:
            _slice(model.get_submodule(piece.module), piece, indices)


def _pieces(
    cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[Piece, set[int]]]]:
    """Tensor → its pieces, with what goes of each."""
    found: dict[str, dict[int, tuple[Piece, set[int]]]] = {}
    for name, units in removed.items():
        for piece in cuts[name].pieces if units else ():
            key = f"{piece.module}.{piece.tensor}"
            gone = found.setdefault(key, {}).setdefault(piece.dim, (piece, set()))[1]
            gone.update(piece.index[list(units)].flatten().tolist())
    return {key: list(parts.values()) for key, parts in found.items()}


def _slice(module: nn.Module, piece: Piece, gone: set[int]) -> None:
    """A module's tensor without some of its entries along one dimension."""
    old: Tensor = getattr(module, piece.tensor)
    width = old.shape[piece.dim]
    left = torch.tensor([i for i in range(width) if i not in gone], device=old.device)
    new = old.detach().index_select(piece.dim, left)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, piece.tensor, new)
    for key in _WIDTHS:
        if getattr(module, key, None) == width:
            setattr(module, key, len(left))


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
