"""What goes and what the rest becomes: the order of removal of every cut, the change that each
width means, and the pass that applies the chosen widths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvprune.compression import Moments, visit_layers
from curvprune.curvature import Change
from curvprune.model import Layer, Loss, Split, find_layers, to_device
from curvprune.structured.asked import Structured
from curvprune.structured.compensation import Consumer, compensate, removal_order, steadied
from curvprune.structured.cuts import BLOCKS, Cut, Found
from curvprune.structured.surgery import duplicate

# The moments of a layer's inputs, computed when they are asked for.
MomentsOf = Callable[[], Moments | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSolution:
    """Of one cut: the order of removal, and what each width means.

    Attributes:
        cut: the cut.
        widths: the widths on offer, from all units downwards.
        order: units in the order in which they go.
        changes: reader → its change at each of ``widths[1:]``.
    """

    cut: Cut
    widths: list[int]
    order: list[int]
    changes: dict[str, list[Change]]


def reading_layers(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, Layer]:
    """The layers that read units of any cut, in the model's order."""
    reading: set[str] = set()
    for cut in cuts.values():
        reading |= cut.readers
    return {name: layer for name, layer in find_layers(model).items() if name in reading}


# ------------------------------------------------------------------------------- order and changes


def solve_widths(
    model: nn.Module,
    objective: Loss,
    split: Split,
    found: Found,
    widths: Mapping[str, list[int]],
    rows: Mapping[str, Tensor],
    asked: Structured,
) -> dict[str, CutSolution]:
    """Order and compensated changes of every cut, from the uncompressed model's inputs.

    Args:
        widths: cut → widths on offer.
        rows: what an error of each output of the readers costs, see `row_costs`.
    """
    layers = find_layers(model)
    readers = reading_layers(model, found.cuts)
    device = next(model.parameters()).device
    waiting = {n: cut.readers for n, cut in found.cuts.items()}
    seconds: dict[str, Tensor] = {}
    solved: dict[str, CutSolution] = {}

    def visit(layer: Layer, moments_of: MomentsOf) -> None:
        # 1. The second moment of this reader's inputs.
        moments = moments_of()
        assert moments is not None
        found.notes.extend(moments.notes)
        if layer.kind == "experts":
            seconds[layer.name] = moments.second
        else:
            A = _augmented(moments, _holds_constant(layer, found.sinks))[0]
            A, note = steadied(A, layer.shape[1], asked.damping, name=layer.name)
            seconds[layer.name] = A
            found.notes.extend([note] if note else [])
        # 2. Cuts all of whose readers have been seen are solved.
        for name, missing in waiting.items():
            if layer.name in missing:
                missing.discard(layer.name)
                if not missing:
                    cut = found.cuts[name]
                    solved[name] = _solve_cut(cut, layers, seconds, rows, widths[name], asked)
        # 3. Moments that no cut waits for any more are let go.
        needed: set[str] = set()
        for name, cut in found.cuts.items():
            if name not in solved:
                needed |= cut.readers
        for name in [n for n in seconds if n not in needed]:
            del seconds[name]

    visit_layers(model, objective, to_device(split.calibration()[0], device), readers, visit)
    return {name: solved[name] for name in found.cuts}


def _solve_cut(
    cut: Cut,
    layers: Mapping[str, Layer],
    seconds: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    widths: list[int],
    asked: Structured,
) -> CutSolution:
    matrices = {}
    for slot in cut.reads:
        layer = layers[slot.module]
        matrices[slot.module] = layer.as_matrix(layer.weight.detach())
    # A block that goes adds nothing any more.
    if cut.kind == BLOCKS:
        gone = {name: [Change.of(-_with_bias(layers[name]))] for name in matrices}
        return CutSolution(cut=cut, widths=widths, order=[0], changes=gone)

    # 1. The order of removal.
    consumers = []
    for slot in cut.reads:
        name = slot.module
        # Experts are matrices one below the other, each with inputs of its own.
        stacked = layers[name].kind == "experts"
        parts = matrices[name].chunk(layers[name].groups) if stacked else [matrices[name]]
        for part, second in zip(parts, seconds[name] if stacked else [seconds[name]], strict=True):
            if stacked:
                second, _ = steadied(second, part.shape[1], asked.damping, name=name)
            consumers.append(
                Consumer(
                    weight=part,
                    second=second,
                    columns=slot.index.to(rows[name].device),
                    rows=rows[name],
                    name=name,
                )
            )
    at_once = max(1, cut.units // 192)
    order = removal_order(consumers, until=widths[-1], damping=asked.damping, at_once=at_once)

    # 2. The compensated change of every reader at every width.
    changes: dict[str, list[Change]] = {name: [] for name in matrices}
    for width in widths[1:] if asked.chooses else ():
        removed = {cut.name: order[: cut.units - width]}
        for slot in cut.reads:
            keep = _kept(layers[slot.module], {cut.name: cut}, removed)
            W, A = matrices[slot.module], seconds[slot.module]
            if layers[slot.module].kind == "experts":
                smaller = _of_experts(layers[slot.module], W, A, keep, asked)
                changes[slot.module].append(Change.of(smaller - W))
                continue
            smaller, constant = compensate(W, A, keep, name=slot.module, damping=asked.damping)
            delta = smaller - W
            if len(A) > W.shape[1]:
                delta = torch.cat([delta, constant[:, None]], 1)
            changes[slot.module].append(Change.of(delta))
    return CutSolution(cut=cut, widths=widths, order=order, changes=changes)


def _of_experts(
    layer: Layer, W: Tensor, seconds: Tensor, keep: Tensor, asked: Structured
) -> Tensor:
    """Every expert's matrix with the columns ``keep`` alone, compensated by its own inputs."""
    found = []
    for part, second in zip(W.chunk(layer.groups), seconds, strict=True):
        A, _ = steadied(second, part.shape[1], asked.damping, name=layer.name)
        found.append(compensate(part, A, keep, name=layer.name, damping=asked.damping)[0])
    return torch.cat(found)


def _with_bias(layer: Layer) -> Tensor:
    """The matrix of a layer, with its bias as a last column if it has one."""
    W, bias = layer.as_matrix(layer.weight.detach()), layer.module.bias
    if bias is None:
        return W
    return torch.cat([W, bias.detach()[:, None]], 1)  # type: ignore[operator]


def _augmented(moments: Moments, constant: bool) -> tuple[Tensor, Tensor | None]:
    """Second moment and drift of the inputs with a constant 1 behind them, or without."""
    second, drift = moments.second[0], None if moments.drift is None else moments.drift[0]
    if not constant:
        return second, drift
    assert moments.mean is not None
    mean, n = moments.mean[0], len(second)
    A = second.new_ones(n + 1, n + 1)
    A[:n, :n], A[n, :n], A[:n, n] = second, mean, mean
    if drift is None or moments.moved is None:
        return A, None
    D = drift.new_zeros(n + 1, n + 1)
    D[:n, :n], D[:n, n] = drift, moments.moved[0]
    return A, D


def _holds_constant(layer: Layer, sinks: Mapping[str, str]) -> bool:
    return getattr(layer.module, "bias", None) is not None or layer.name in sinks


def _kept(layer: Layer, cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]) -> Tensor:
    """Columns of a layer that are left."""
    alive = torch.ones(layer.shape[1], dtype=torch.bool)
    for name, units in removed.items():
        for slot in cuts[name].reads:
            if slot.module == layer.name:
                alive[slot.index[list(units)].flatten()] = False
    return alive.nonzero()[:, 0].to(layer.weight.device)


# ----------------------------------------------------------------------------------------- applying


def apply_removal(
    model: nn.Module,
    objective: Loss,
    split: Split,
    found: Found,
    removed: Mapping[str, Sequence[int]],
    asked: Structured,
    *,
    reached: Collection[str],
) -> nn.Module:
    """A copy in which nothing reads the removed units and every layer makes up for what it lost and
    for the drift of what it still gets.

    Args:
        removed: cut → units to remove.
        reached: layers that the forward pass comes to.
    """
    changed = duplicate(model)
    layers = _to_adjust(changed, found, asked, reached)

    def visit(layer: Layer, moments_of: MomentsOf) -> None:
        keep = _kept(layer, found.cuts, removed)
        if not len(keep):  # of a block that is gone
            layer.weight.zero_()
            if layer.module.bias is not None:
                layer.module.bias.zero_()  # type: ignore[operator]
            return
        moments = moments_of()
        assert moments is not None
        if len(keep) == layer.shape[1] and moments.drift is None:
            return
        if layer.kind == "experts":
            W = layer.as_matrix(layer.weight.detach())
            layer.write_(_of_experts(layer, W, moments.second, keep, asked))
            return
        A, D = _augmented(moments, _holds_constant(layer, found.sinks))
        A, _ = steadied(A, layer.shape[1], asked.damping, name=layer.name)
        W = layer.as_matrix(layer.weight.detach())
        smaller, constant = compensate(
            W, A, keep, name=layer.name, drift=D, share=asked.drift, damping=asked.damping
        )
        layer.write_(smaller)
        # The mean of what was removed goes into the bias, or into the BatchNorm behind.
        if getattr(layer.module, "bias", None) is not None:
            layer.module.bias.data += constant  # type: ignore[operator]
        elif layer.name in found.sinks:
            norm = changed.get_submodule(found.sinks[layer.name])
            norm.running_mean -= constant  # type: ignore[operator]

    reference = None
    if asked.drift:
        reference = model, {n: layer for n, layer in find_layers(model).items() if n in layers}
    batch = to_device(split.calibration()[0], next(model.parameters()).device)
    visit_layers(changed, objective, batch, layers, visit, reference=reference)
    return changed


def _to_adjust(
    model: nn.Module, found: Found, asked: Structured, reached: Collection[str]
) -> dict[str, Layer]:
    """The layers that read units; for the drift also all others that the forward pass comes to."""
    wanted = set(reached) if asked.drift else set()
    for cut in found.cuts.values():
        wanted |= cut.readers
    layers = {}
    for name, layer in find_layers(model).items():
        has_cut = any(name in c.readers for c in found.cuts.values())
        if name not in wanted or not layer.readers or (layer.groups != 1 and not has_cut):
            continue
        # A weight that is also an embedding's must not move: what is looked up would change.
        if layer.kind != "embedding" and not layer.aliases:
            layers[name] = layer
    return layers
