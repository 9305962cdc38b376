"""Structured pruning: which units of which cut to remove for an asked share of the model's work,
with what stays compensated; prices in nats from the same Fisher matrix as everything else.

    cuts      which units can be removed                              cuts.find_cuts
    order     in which order, from one pass for the inputs' moments   solve.structured.removal_order
              and one for what an error of each output costs
    price     ½ δᵀFδ of each width, δ the compensated change          _prices
    choose    widths: a knapsack, or one width per kind; for latency  knapsack.cheapest, latency.Latency
              again, until what is measured is low enough
    apply     one pass through the model beside the uncompressed      apply.visit_layers,
              one: later readers make up for earlier ones             solve.structured.compensate
    surgery   the units leave the model                               cuts.remove_
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compression import Moments, visit_layers
from curvprune.curvature import Change, Estimate, ratio_estimate
from curvprune.model import (
    Batch,
    Layer,
    Objective,
    Split,
    Splits,
    collate,
    evaluating,
    find_layers,
    signed_loss,
    to_device,
)
from curvprune.planning import Choice, Within, cheapest
from curvprune.pricing import Ledger, Row
from curvprune.structured.compensation import Reader, compensate, removal_order
from curvprune.structured.cuts import BLOCKS, KINDS, Cut, Found, find_cuts, remove_
from curvprune.structured.latency import Latency

MEASURES = ("macs", "parameters", "latency")
Cost = Callable[[Mapping[str, int]], float]  # units left of each cut → what is left of the work
PRICED_BY = "Fisher along the compensated change"


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """What to remove.

    Args:
        share: share of the model's multiply-adds (or of another measure, see ``of``) to remove; or,
            for some kinds, the share of their units: ``{"mlp": 0.25}``.
        of: ``"macs"``, ``"parameters"`` or ``"latency"``, where ``share`` is a number. Latency is
            the time of a forward pass, measured here on the model's device with torch's present
            number of threads (with one on a CPU, that thread's time).
        batch: how many items that pass is over: the first ones of the calibration split.
        kinds: some of ``"mlp"``, ``"heads"``, ``"channels"``; others stay as they are. Or
            ``("blocks",)`` alone: whole blocks of a pre-norm transformer; prune the result again
            for widths.
        uniform: one width for all cuts of a kind (the same share of units, where they differ in
            size), so that a plain transformers config describes the result.
        round_to: widths are multiples of this, where units are that many; by default 8 from 256
            units on, else 1.
        widths: how many widths of a cut are priced.
        most: largest share of a cut's units that may be removed.
        drift: how far readers make up for what earlier ones changed, 0 to 1.
        damping: λ over the mean of diag(A).
        labels: draws per position for the prices.
    """

    share: float | Mapping[str, float]
    of: str = "macs"
    batch: int = 1
    kinds: tuple[str, ...] = KINDS
    uniform: bool = False
    round_to: int | None = None
    widths: int = 12
    most: float = 0.9
    drift: float = 0.5
    damping: float = 0.01
    labels: int = 2

    def __post_init__(self) -> None:
        shares = list(self.share.values()) if isinstance(self.share, Mapping) else [self.share]
        for value in shares or [0.0]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(
                    f"structured={self.share!r}: shares to remove lie strictly between 0 and 1, "
                    "for example 0.3"
                )
        asked = tuple(self.share) if isinstance(self.share, Mapping) else self.kinds
        if asked != (BLOCKS,) and (not asked or set(asked) - set(KINDS)):
            raise ValueError(
                f"structured: kinds {asked}: expected some of {KINDS}, or {BLOCKS!r} alone"
            )
        if self.of not in MEASURES:
            raise ValueError(f"structured: of={self.of!r}; expected one of {MEASURES}")
        if self.of == "latency" and isinstance(self.share, Mapping):
            raise ValueError(
                f"structured={self.share!r}: shares by kind are of units; of='latency' needs one, "
                "such as 0.2"
            )
        if self.batch < 1:
            raise ValueError(f"structured: batch={self.batch!r} must be at least 1")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"structured: round_to={self.round_to!r} must be at least 1")
        if min(self.widths, self.labels) < 1:
            raise ValueError(
                f"structured: widths={self.widths!r} and labels={self.labels!r} must be at least 1"
            )
        if not 0 <= self.drift <= 1 or not self.damping >= 0:
            raise ValueError(
                f"structured: drift={self.drift!r} must be in [0, 1], damping={self.damping!r} at "
                "least 0"
            )
        if not 0 < self.most < 1:
            raise ValueError(f"structured: most={self.most!r} must lie strictly between 0 and 1")

    @property
    def chooses(self) -> bool:
        """Whether there are widths to choose among; else every cut of a kind gets the one that was
        asked for."""
        return not (self.uniform and isinstance(self.share, Mapping)) or tuple(self.share) == (
            BLOCKS,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Term:
    """A part of the work that shrinks with the removed share of its outputs and of its inputs: cut
    → share per unit."""

    macs: float
    parameters: float
    outputs: Mapping[str, float]
    inputs: Mapping[str, float]


class Work:
    """Multiply-adds of one item, and parameters, of the whole model, whatever the cuts' widths.
    Cost: one forward pass of one item to build it; microseconds for each question."""

    def __init__(
        self, model: nn.Module, objective: Objective, item: Batch, cuts: Mapping[str, Cut]
    ) -> None:
        self.units = {n: c.units for n, c in cuts.items()}
        layers = find_layers(model)
        positions = self.positions = _positions(model, objective, item, layers)
        sides: dict[tuple[str, str], dict[str, float]] = {}
        for name, cut in cuts.items():
            if cut.kind == BLOCKS:
                inside = model.get_submodule(cut.name).named_modules(prefix=cut.name)
                sides.update({(module, "out"): {name: 1.0} for module, _ in inside})
                continue
            for slot in (*cut.makes, *cut.reads):
                layer, norm = layers.get(slot.module), model.get_submodule(slot.module)
                shape = (len(norm.weight),) if layer is None else layer.shape  # type: ignore[arg-type]
                width = shape[("out", "in").index(slot.side)]
                shares = sides.setdefault((slot.module, slot.side), {})
                shares[name] = shares.get(name, 0.0) + slot.index.shape[1] / width
        self.terms = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                layer = layers.get(name)
                weight = layer is not None and parameter is layer.weight
                macs = parameter.numel() * positions.get(name, 0) if weight else 0
                inputs = sides.get((name, "in"), {}) if weight else {}
                outputs = sides.get((name, "out"), {})
                self.terms.append(
                    _Term(macs=macs, parameters=parameter.numel(), outputs=outputs, inputs=inputs)
                )
        for name, cut in cuts.items():
            if cut.kind == "heads":  # scores and their use, of every position with every other
                (read,) = cut.reads
                macs = 2.0 * positions[read.module] ** 2 * read.index.numel()
                self.terms.append(
                    _Term(macs=macs, parameters=0.0, outputs={name: 1 / cut.units}, inputs={})
                )

    def __call__(self, of: str, left: Mapping[str, int]) -> int:
        """Of ``"macs"`` or ``"parameters"`` with ``left[cut]`` units of each cut (all, where it is
        not named)."""
        gone = {n: units - left.get(n, units) for n, units in self.units.items()}

        def remains(shares: Mapping[str, float]) -> float:
            return 1.0 - math.fsum(share * gone[n] for n, share in shares.items())

        return round(
            math.fsum(getattr(t, of) * remains(t.outputs) * remains(t.inputs) for t in self.terms)
        )


@torch.no_grad()
def _positions(
    model: nn.Module, objective: Objective, item: Batch, layers: Mapping[str, Layer]
) -> dict[str, int]:
    """How often each layer's matrix is multiplied for one item."""
    found: dict[str, int] = {}

    def count(name: str, layer: Layer, output: Tensor) -> None:
        found[name] = found.get(name, 0) + output.numel() // (layer.shape[0] * len(output))

    handles = [
        reader.register_forward_hook(lambda m, a, y, name=name, layer=layer: count(name, layer, y))
        for name, layer in layers.items()
        for reader in layer.readers
    ]
    try:
        with evaluating(model):
            objective.logits(model, item)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What `prune_units` returns.

    Attributes:
        model: the smaller model; the input model is untouched.
        left: cut → units left.
        units: cut → units before.
        removed: cut → the units that are gone.
        macs, parameters: (before, after), multiply-adds of one item.
        latency: (before, after) in seconds, measured in turn at the end, where a share of it was
            asked for.
        predicted: rise of the loss in nats, from the prices; ``None`` where nothing had to be
            chosen.
        ledger: the prices of all widths, where there was a choice.
        notes: dimensions that are no cuts, and why.
        kinds: cut → kind.
        dropped: blocks that are gone.
    """

    model: nn.Module
    left: dict[str, int]
    units: dict[str, int]
    removed: dict[str, list[int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    latency: tuple[float, float] | None
    predicted: Estimate | None
    ledger: Ledger | None
    notes: tuple[str, ...]
    kinds: dict[str, str]
    dropped: tuple[str, ...]

    def uniform_widths(self) -> dict[str, tuple[int, int]] | None:
        """Kind → (units before, after), if cuts of one kind have one width and had one."""
        if BLOCKS in self.kinds.values():
            return {}  # the config follows when blocks are dropped
        widths: dict[str, set[tuple[int, int]]] = {}
        for name, kind in self.kinds.items():
            widths.setdefault(kind, set()).add((self.units[name], self.left[name]))
        return (
            {k: w.pop() for k, w in widths.items()}
            if all(len(w) == 1 for w in widths.values())
            else None
        )


def prune_units(
    model: nn.Module,
    objective: Objective,
    splits: Splits,
    asked: Structured,
    *,
    seed: int = 0,
    batch_size: int = 8,
) -> Pruned:
    """Remove units until ``asked`` is met, and compensate.

    Cost: three forward passes over the calibration items and one backward; over the price items one
    forward and ``labels`` backward passes, where there are widths to choose among; ``in³`` per
    reader and width. For latency what `Latency` costs, and in addition up to `AIMS` models are made
    and timed. Results are then not reproducible: another run measures other times.

    Raises ``ValueError`` for a share that cannot be reached (saying what can), or a model without
    cuts.
    """
    found, work, widths, cost = offered_widths(model, objective, splits, asked)
    cuts, layers = found.cuts, find_layers(model)
    plans = _solve_widths(
        model, objective, splits.calibrate, found, widths, asked, seed=seed, batch_size=batch_size
    )
    ledger = predicted = None
    if not asked.chooses:
        left = {n: w[-1] for n, w in widths.items()}
    else:
        ledger = _prices(
            model,
            objective,
            splits.price,
            cuts,
            layers,
            plans,
            work,
            labels=asked.labels,
            seed=seed,
        )
        prices = {n: [ledger.layer_rows(n)[str(w)].price for w in widths[n]] for n in cuts}
        if isinstance(cost, Latency):
            left = _reaching(cuts, widths, prices, cost, asked)
        else:
            left = choose_widths(cuts, widths, prices, cost, asked)
        predicted = ledger.predict({n: str(w) for n, w in left.items()})
    removed = {n: sorted(plans[n].order[: cuts[n].units - w]) for n, w in left.items()}
    smaller = _applied(
        model, objective, splits.calibrate, found, removed, asked, reached=work.positions
    )
    remove_(smaller, cuts, removed)
    notes, latency = list(found.notes), None
    if isinstance(cost, Latency):
        latency = cost.beside(smaller)
        notes.append(_measured(asked, 1 - cost(left) / cost({}), *latency))
    full: dict[str, int] = {}
    return Pruned(
        model=smaller,
        left=left,
        units=dict(work.units),
        removed=removed,
        macs=(work("macs", full), work("macs", left)),
        parameters=(work("parameters", full), work("parameters", left)),
        latency=latency,
        predicted=predicted,
        ledger=ledger,
        notes=tuple(notes),
        kinds={n: c.kind for n, c in cuts.items()},
        dropped=tuple(c.name for n, c in cuts.items() if c.kind == BLOCKS and removed[n]),
    )


def _measured(asked: Structured, predicted: float, before: float, after: float) -> str:
    assert not isinstance(asked.share, Mapping)
    missed = (
        "" if after <= (1 - asked.share) * before else "; this measurement misses what was asked"
    )
    return (
        f"latency of a batch of {asked.batch}: {asked.share:.1%} less was asked, {predicted:.1%} "
        f"less predicted, {1 - after / before:.1%} less measured ({1e3 * before:.4g} ms before, "
        f"{1e3 * after:.4g} ms after){missed}"
    )


def offered_widths(
    model: nn.Module, objective: Objective, splits: Splits, asked: Structured
) -> tuple[Found, Work, dict[str, list[int]], Cost]:
    """The cuts that ``asked`` is about, the model's work, cut → widths on offer, from all units
    downwards, and what of ``asked.of`` is left with given widths.

    Cost: some forward passes of one item, some dozens where latency is asked for. Raises
    ``ValueError`` as `prune_units` does.
    """
    first = to_device(splits.calibrate.items[0], next(model.parameters()).device)
    kinds = tuple(asked.share) if isinstance(asked.share, Mapping) else asked.kinds
    found = find_cuts(model, objective, first, kinds=kinds)
    if asked.uniform:
        found = _alike(found)
    present = {c.kind for c in found.cuts.values()}
    if isinstance(asked.share, Mapping) and (lacking := set(asked.share) - present):
        raise ValueError(
            f"structured: the model has no prunable {sorted(lacking)[0]}; " + "; ".join(found.notes)
        )
    work = Work(model, objective, first, found.cuts)
    widths = {n: _widths(cut, asked) for n, cut in found.cuts.items()}
    cost: Cost = partial(work, asked.of)
    if asked.of == "latency":
        items = splits.calibrate.items
        if asked.batch > len(items):
            raise ValueError(
                f"structured: batch={asked.batch} of the {len(items)} calibration items; ask for "
                "fewer"
            )
        batch = to_device(collate(items[: asked.batch]), next(model.parameters()).device)
        cost = Latency(model, objective, batch, found.cuts, {n: w[-1] for n, w in widths.items()})
    _check_reach(cost, widths, asked)
    return found, work, widths, cost


def _alike(found: Found) -> Found:
    """Of MLPs and heads only those of the most common size: a config has one number for them."""
    cuts, notes = dict(found.cuts), list(found.notes)
    for kind in ("mlp", "heads"):
        sizes = [c.units for c in found.cuts.values() if c.kind == kind]
        for name, cut in found.cuts.items():
            if cut.kind == kind and cut.units != max(set(sizes), key=sizes.count):
                del cuts[name]
                notes.append(
                    f"{name}: stays as it is, its {cut.units} units are not the width that its "
                    "kind has"
                )
    return Found(cuts=cuts, sinks=found.sinks, notes=notes)


def _widths(cut: Cut, asked: Structured) -> list[int]:
    """Widths on offer, from all units downwards."""
    if cut.kind == BLOCKS:
        return [1, 0]
    step = asked.round_to or (8 if cut.units >= 256 else 1)
    step = step if cut.units >= 2 * step else 1

    def rounded(share: float) -> int:
        return max(min(step, cut.units), min(cut.units, round(share * cut.units / step) * step))

    if isinstance(asked.share, Mapping) and not asked.chooses:
        return [cut.units, rounded(1 - asked.share[cut.kind])]
    shares = np.linspace(1, 1 - asked.most, asked.widths + 1)
    offered = [cut.units, *(rounded(s) for s in shares[1:])]
    return offered if asked.uniform else sorted(set(offered), reverse=True)


def _check_reach(cost: Cost, widths: Mapping[str, list[int]], asked: Structured) -> None:
    if isinstance(asked.share, Mapping):
        return
    best = 1 - cost({n: w[-1] for n, w in widths.items()}) / cost({})
    if best < asked.share:
        raise ValueError(
            f"structured={asked.share:g}: at most {best:.3f} of the {asked.of} can be removed by "
            f"these kinds ({', '.join(sorted(asked.kinds))}) with at most {asked.most:g} of a "
            "cut; ask for less or raise most"
        )


# ---------------------------------------------------------------------------------- order and width


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Of one cut: the order of removal, and for each width below the full one the change of each
    reader."""

    widths: list[int]
    order: list[int]
    changes: dict[str, list[Change]]  # reader → widths[1:]


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


def _solve_widths(
    model: nn.Module,
    objective: Objective,
    split: Split,
    found: Found,
    widths: Mapping[str, list[int]],
    asked: Structured,
    *,
    seed: int,
    batch_size: int,
) -> dict[str, _Plan]:
    """Order and compensated changes of every cut, from the uncompressed model's inputs."""
    device = next(model.parameters()).device
    layers = find_layers(model)
    reading: dict[str, list[str]] = {}
    for name, cut in found.cuts.items():
        for slot in cut.reads:
            reading.setdefault(slot.module, []).append(name)
    readers = {n: layers[n] for n in layers if n in reading}
    rows = _row_costs(model, objective, split.batches(batch_size), readers, seed=seed)
    waiting = {n: {s.module for s in c.reads} for n, c in found.cuts.items()}
    moments: dict[str, Tensor] = {}
    plans: dict[str, _Plan] = {}

    def visit(layer: Layer, measure: Any) -> None:
        moments[layer.name] = _augmented(measure(), _holds_constant(layer, found.sinks))[0]
        for name in reading[layer.name]:
            waiting[name].discard(layer.name)
            if not waiting[name]:
                plans[name] = _solve_cut(
                    found.cuts[name], layers, moments, rows, widths[name], asked
                )
        for name in [n for n in moments if all(c in plans for c in reading[n])]:
            del moments[name]

    visit_layers(model, objective, to_device(collate(split.items), device), readers, visit)
    return plans


def _solve_cut(
    cut: Cut,
    layers: Mapping[str, Layer],
    moments: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    widths: list[int],
    asked: Structured,
) -> _Plan:
    matrices = {
        s.module: layers[s.module].as_matrix(layers[s.module].weight.detach()) for s in cut.reads
    }
    if cut.kind == BLOCKS:
        return _Plan(
            widths=widths,
            order=[0],
            changes={n: [Change.of(-_with_bias(layers[n]))] for n in matrices},
        )
    readers = [
        Reader(
            weight=matrices[s.module],
            second=moments[s.module],
            columns=s.index.to(rows[s.module].device),
            rows=rows[s.module],
            name=s.module,
        )
        for s in cut.reads
    ]
    at_once = max(1, cut.units // 192)
    order = removal_order(readers, until=widths[-1], damping=asked.damping, at_once=at_once)
    changes: dict[str, list[Change]] = {s.module: [] for s in cut.reads}
    for width in widths[1:] if asked.chooses else ():
        for slot in cut.reads:
            keep = _kept(
                layers[slot.module], {cut.name: cut}, {cut.name: order[: cut.units - width]}
            )
            W, A = matrices[slot.module], moments[slot.module]
            smaller, constant = compensate(W, A, keep, name=slot.module, damping=asked.damping)
            delta = smaller - W
            if len(A) > W.shape[1]:
                delta = torch.cat([delta, constant[:, None]], 1)
            changes[slot.module].append(Change.of(delta))
    return _Plan(widths=widths, order=order, changes=changes)


def _with_bias(layer: Layer) -> Tensor:
    """The matrix of a layer, with its bias as a last column if it has one."""
    W, bias = layer.as_matrix(layer.weight.detach()), layer.module.bias
    return W if bias is None else torch.cat([W, bias.detach()[:, None]], 1)  # type: ignore[operator]


@contextmanager
def _output_gradients(
    model: nn.Module, layers: Mapping[str, Layer], take: Any, *, inputs: bool
) -> Iterator[None]:
    """``take(name, layer, x rows or None, gradient rows)`` at every layer's output during a
    backward pass. No parameter requires gradients: graphs begin at the first of the layers."""
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def after(name: str, layer: Layer, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        kept = x.detach() if inputs else None

        def arrived(gradient: Tensor) -> None:
            by_row = gradient.flatten(2).transpose(1, 2) if layer.kind == "conv" else gradient
            take(
                name,
                layer,
                None if kept is None else layer.rows(module, kept)[0],
                by_row.reshape(-1, layer.shape[0]),
            )

        y.register_hook(arrived)
        return y.clone()  # what follows may work in place

    handles = [
        reader.register_forward_hook(
            lambda m, args, named, y, name=name, layer=layer: after(
                name, layer, m, args[0] if args else next(iter(named.values())), y
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
        for reader in layer.readers
    ]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)


def _row_costs(
    model: nn.Module, objective: Objective, batches: Any, layers: Mapping[str, Layer], *, seed: int
) -> dict[str, Float[Tensor, " out"]]:
    """Sum over places of the squared gradient of each output, for scores drawn from the model, per
    position of the objective: what an error of variance 1 in that output costs, twice, in nats."""
    device = next(model.parameters()).device
    sums = {
        n: torch.zeros(layer.shape[0], dtype=torch.float64, device=device)
        for n, layer in layers.items()
    }

    def take(name: str, layer: Layer, x: Tensor | None, gradient: Tensor) -> None:
        sums[name] += gradient.double().square().sum(0)

    count = 0
    with _output_gradients(model, layers, take, inputs=False):
        for i, batch in enumerate(batches):
            batch = to_device(batch, device)
            positions = objective.positions(objective.logits(model, batch), batch)
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
            signed_loss(positions, generator).backward()
            count += len(positions.item)
    if silent := [n for n, s in sums.items() if not bool(s.any())]:
        raise ValueError(
            f"layer {silent[0]} received no gradient: it is not on the way to the loss; leave it "
            "out"
        )
    return {n: s / count for n, s in sums.items()}


def _prices(
    model: nn.Module,
    objective: Objective,
    split: Split,
    cuts: Mapping[str, Cut],
    layers: Mapping[str, Layer],
    plans: Mapping[str, _Plan],
    work: Work,
    *,
    labels: int,
    seed: int,
) -> Ledger:
    """½ δᵀFδ of every width of every cut. A cut that several layers read has one δ, over all of
    them: their products with the gradient are summed before they are squared."""
    device = next(model.parameters()).device
    readers = {s.module: layers[s.module] for c in cuts.values() for s in c.reads}
    items = split.items
    counts = torch.zeros(len(items), dtype=torch.float64)
    width = {n: len(next(iter(plan.changes.values()))) for n, plan in plans.items()}
    sums = {n: torch.zeros(len(items), w, dtype=torch.float64) for n, w in width.items()}
    along = {n: torch.zeros(w, dtype=torch.float64) for n, w in width.items()}

    def take(name: str, layer: Layer, x: Tensor | None, gradient: Tensor) -> None:
        assert x is not None
        G = gradient.T @ x
        G1 = torch.cat([G, gradient.sum(0)[:, None]], 1)
        for cut, plan in plans.items():
            for k, change in enumerate(plan.changes.get(name, ())):
                full = G1 if len(change.values) == G1.numel() else G
                along[cut][k] += change.dot(full.reshape(-1)).double().cpu()

    with _output_gradients(model, readers, take, inputs=True):
        for i, item in enumerate(items):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
            batch = to_device(item, device)
            positions = objective.positions(objective.logits(model, batch), batch)
            counts[i] = len(positions.item)
            for s in range(labels):
                for value in along.values():
                    value.zero_()
                signed_loss(positions, generator).backward(retain_graph=s + 1 < labels)
                for n in cuts:
                    sums[n][i] += 0.5 * along[n].square() / labels
    itemsize = next(model.parameters()).element_size()
    rows, columns = [], []
    for n, cut in cuts.items():
        own = cut_bytes(work, n, cut.units, itemsize)
        rows.append(Row(layer=n, option=str(cut.units), bytes=own, price=0.0, stderr=0.0))
        columns.append(np.zeros(len(items)))
        for k, left in enumerate(plans[n].widths[1:]):
            estimate = ratio_estimate(sums[n][:, k], counts)
            size = cut_bytes(work, n, left, itemsize)
            rows.append(
                Row(
                    layer=n,
                    option=str(left),
                    bytes=size,
                    price=estimate.value,
                    stderr=estimate.stderr,
                )
            )
            columns.append(sums[n][:, k].numpy())
    return Ledger(
        rows=tuple(rows), sums=np.stack(columns, axis=1), count=counts.numpy(), measure=objective.measure, labels=labels,
        curvature=PRICED_BY,
    )  # fmt: skip


def cut_bytes(work: Work, cut: str, left: int, itemsize: int) -> int:
    """Bytes of what belongs to a cut, the other cuts at full width."""
    return (work("parameters", {cut: left}) - work("parameters", {cut: 0})) * itemsize


def choose_widths(
    cuts: Mapping[str, Cut],
    widths: Mapping[str, list[int]],
    prices: Mapping[str, Sequence[float]],
    cost: Cost,
    asked: Structured,
) -> dict[str, int]:
    """The widths with the least summed price within the asked share of the work: cut → units left.

    The work of a layer between two cuts is a product of their widths, so `knapsack.cheapest` is
    solved on the work as it changes with one cut at a time around the last solution, until that
    repeats itself; of the solutions that are within the true limit the cheapest is taken, and cuts
    are widened again where there is room. Where no layer lies between two cuts (MLPs and heads in a
    residual stream) this is exact at once.
    """
    left = {n: c.units for n, c in cuts.items()}
    if isinstance(asked.share, Mapping):
        for kind, share in asked.share.items():
            members = {n: c for n, c in cuts.items() if c.kind == kind}
            total = sum(c.units for c in members.values())
            left.update(
                _knapsack(
                    members, widths, prices, lambda w: sum(w.values()), total * (1 - share), asked
                )
            )
        return left
    return _knapsack(cuts, widths, prices, cost, cost({}) * (1 - asked.share), asked)


AIMS = 6  # choices that are measured


def _reaching(
    cuts: Mapping[str, Cut],
    widths: Mapping[str, list[int]],
    prices: Mapping[str, Sequence[float]],
    cost: Latency,
    asked: Structured,
) -> dict[str, int]:
    """The cheapest widths whose measured latency is low enough: chosen by the predicted one, whose
    limit moves by how far the measured one is off, then halves what lies between one that was too
    high and one that was low enough. Where none is low enough, the fastest."""
    assert not isinstance(asked.share, Mapping)

    def gone_by_time(left: Mapping[str, int]) -> float:
        before, after = cost.measured(left)
        return 1 - after / before

    most = 1 - cost({n: w[-1] for n, w in widths.items()}) / cost({})
    tried: dict[tuple[int, ...], float] = {}
    aim, missed, met = asked.share, 0.0, most
    for _ in range(AIMS):
        left = choose_widths(cuts, widths, prices, cost, replace(asked, share=aim))
        key = tuple(left[n] for n in cuts)
        if key not in tried:
            tried[key] = gone_by_time(left)
            if tried[key] >= asked.share:  # not by luck
                tried[key] = min(tried[key], gone_by_time(left))
        gone = tried[key]
        if gone < asked.share:
            missed = max(missed, aim)
        else:
            met = min(met, aim)
        if aim == most or asked.share <= gone < 1.05 * asked.share:
            break
        off = asked.share / gone if gone > 0 else 2.0
        aim = min(most, aim * min(off, 2.0))
        if not missed < aim < met:
            aim = most if missed >= met else (missed + met) / 2

    def price(key: tuple[int, ...]) -> float:
        return math.fsum(prices[n][widths[n].index(w)] for n, w in zip(cuts, key, strict=True))

    enough = [key for key, gone in tried.items() if gone >= asked.share]
    best = min(enough, key=price) if enough else max(tried, key=lambda key: tried[key])
    return dict(zip(cuts, best, strict=True))


_RESOLUTION = 1_000_000  # steps that the whole work is divided into for the knapsack


def _knapsack(
    cuts: Mapping[str, Cut],
    widths: Mapping[str, list[int]],
    prices: Mapping[str, Sequence[float]],
    cost: Cost,
    limit: float,
    asked: Structured,
) -> dict[str, int]:
    movers: dict[str, list[str]] = {}
    for n, cut in cuts.items():
        movers.setdefault(cut.kind if asked.uniform and cut.kind != BLOCKS else n, []).append(n)
    offered = {m: len(widths[names[0]]) for m, names in movers.items()}
    price = {
        m: [math.fsum(prices[n][k] for n in names) for k in range(offered[m])]
        for m, names in movers.items()
    }

    def of(picks: Mapping[str, int]) -> dict[str, int]:
        return {n: widths[n][picks[m]] for m, names in movers.items() for n in names}

    def paid(picks: Mapping[str, int]) -> float:
        return math.fsum(price[m][k] for m, k in picks.items())

    whole = cost(of(dict.fromkeys(movers, 0)))
    scale = _RESOLUTION / whole
    picks, best = dict.fromkeys(movers, 0), None
    smallest = {m: offered[m] - 1 for m in movers}
    aim, seen = limit, set()
    for _ in range(60):
        here = cost(of(picks))
        tables = {m: [cost(of({**picks, m: k})) - here for k in range(offered[m])] for m in movers}
        rows = [
            Choice(
                layer=m,
                option=str(k),
                bytes=math.ceil((change - min(table)) * scale),
                price=price[m][k],
            )
            for m, table in tables.items()
            for k, change in enumerate(table)
        ]
        room = math.floor((aim - here - sum(min(t) for t in tables.values())) * scale)
        picks = (
            {m: int(k) for m, k in cheapest(rows, Within(max_bytes=room)).items()}
            if room > 0
            else dict(smallest)
        )
        if cost(of(picks)) <= limit and (best is None or paid(picks) < paid(best)):
            best = picks
        key = tuple(picks.values())
        if key in seen:
            if best is not None:
                break
            aim -= 0.02 * whole
        seen.add(key)
    best = best or smallest
    while True:  # widen where there is room, the most valuable first
        gains = {
            m: price[m][k] - price[m][k - 1]
            for m, k in best.items()
            if k and cost(of({**best, m: k - 1})) <= limit and price[m][k - 1] <= price[m][k]
        }
        if not gains:
            return of(best)
        m = max(gains, key=lambda n: gains[n])
        best = {**best, m: best[m] - 1}


# ----------------------------------------------------------------------------------------- applying


def _applied(
    model: nn.Module,
    objective: Objective,
    split: Split,
    found: Found,
    removed: Mapping[str, Sequence[int]],
    asked: Structured,
    *,
    reached: Collection[str],
) -> nn.Module:
    """A copy in which nothing reads the removed units and every layer makes up for what it lost and
    for the drift of what it still gets."""
    device = next(model.parameters()).device
    changed = copy.deepcopy(model)
    layers = {
        n: layer for n, layer in find_layers(changed).items() if layer.readers and layer.groups == 1
    }
    # A weight that is also an embedding's must not move: what is looked up would change.
    layers = {
        n: layer for n, layer in layers.items() if layer.kind != "embedding" and not layer.aliases
    }
    reads = {s.module for c in found.cuts.values() for s in c.reads}
    wanted = reads | set(reached) if asked.drift else reads
    layers = {n: layer for n, layer in layers.items() if n in wanted}
    originals = {n: layer for n, layer in find_layers(model).items() if n in layers}

    def visit(layer: Layer, measure: Any) -> None:
        keep = _kept(layer, found.cuts, removed)
        if not len(keep):  # of a block that is gone
            layer.weight.zero_()
            if layer.module.bias is not None:
                layer.module.bias.zero_()  # type: ignore[operator]
            return
        moments = measure()
        if len(keep) == layer.shape[1] and moments.drift is None:
            return
        A, D = _augmented(moments, _holds_constant(layer, found.sinks))
        W = layer.as_matrix(layer.weight.detach())
        smaller, constant = compensate(
            W, A, keep, name=layer.name, drift=D, share=asked.drift, damping=asked.damping
        )
        layer.write_(smaller)
        if getattr(layer.module, "bias", None) is not None:
            layer.module.bias.data += constant  # type: ignore[operator]
        elif layer.name in found.sinks:
            norm = changed.get_submodule(found.sinks[layer.name])
            norm.running_mean -= constant  # type: ignore[operator]

    reference = (model, originals) if asked.drift else None
    batch = to_device(collate(split.items), device)
    visit_layers(changed, objective, batch, layers, visit, reference=reference)
    return changed
