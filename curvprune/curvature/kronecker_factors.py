"""K-FAC and EKFAC: curvature approximated by a Kronecker product for every layer.

With rows x of a layer's inputs, 1 appended where there is a bias, and gradients g at its outputs,

    K-FAC   G ⊗ A     A = mean of x xᵀ over rows, G = Σ g gᵀ / positions
    EKFAC   Q S Qᵀ    Q the eigenvectors of G ⊗ A, S_ij = Σᵦ (Q_Gᵀ Gᵦᵀ Xᵦ Q_A)²_ij / positions

What is back-propagated to g says what is approximated: columns of the Hessian at the outputs the
generalised Gauss–Newton matrix, labels drawn from the model the Fisher, the data's own labels the
empirical Fisher. Norms' scales have no factors and need none: their block is exact, or its diagonal
where it would be large.

Sources: Martens & Grosse 2015 (K-FAC); Grosse & Martens 2016 (convolutions); George et al. 2018
(EKFAC); Eschenhagen et al. 2023 (expand, reduce); Benzing 2022 (forward-only).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvprune.curvature.capture import Capture, capture, wide
from curvprune.curvature.determinism import first_items
from curvprune.curvature.draws import Draws
from curvprune.curvature.kronecker_operators import KroneckerFactored
from curvprune.curvature.kronecker_parts import (
    DEFAULT,
    SCALE,
    KfacSettings,
    parts_of,
    why_no_factors,
)
from curvprune.curvature.kronecker_sums import Arrived, BlockSums, sums_of
from curvprune.curvature.structure import WHY_NONE, find_structure
from curvprune.distributed import all_sum, my_share
from curvprune.model import Batch, Layer, Loss, deviations

WORDS = {
    "type-2": "generalised Gauss-Newton matrix",
    "mc": "Fisher ({labels} sampled label(s) per position)",
    "empirical": "empirical Fisher",
    "forward-only": "second moment of the inputs",
}


def kfac(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
) -> KroneckerFactored:
    """The Fisher of every layer's weight approximated by ``G ⊗ A``, with one label drawn per
    position. Grouped convolutions, embeddings and stacked experts have no single pair of factors
    and raise ``ValueError``.

    Cost: one forward and one backward pass; memory: ``in² + out²`` for each layer.
    """
    _check_single_pairs(model, objective, batches, layers)
    settings = KfacSettings(bias=False, seed=seed)
    return kronecker_factored(model, objective, batches, layers, settings)


def ekfac(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
) -> KroneckerFactored:
    """K-FAC's eigenbasis with fitted eigenvalues: the closest matrix to the Fisher with that
    eigenbasis, with the Fisher's trace for the labels drawn. Cost: as `kfac`, twice, plus the
    eigendecompositions."""
    _check_single_pairs(model, objective, batches, layers)
    settings = KfacSettings(bias=False, eigenvalues=True, seed=seed)
    return kronecker_factored(model, objective, batches, layers, settings)


def _check_single_pairs(
    model: nn.Module, objective: Loss, batches: Sequence[Batch], layers: Mapping[str, Layer]
) -> None:
    for name, layer in layers.items():
        if layer.groups != 1 or layer.kind in ("embedding", *WHY_NONE):
            raise ValueError(
                f"layer {name}: a grouped convolution, an embedding, experts or recurrent weights "
                "have no Kronecker factors"
            )
    for name, why in find_structure(model, objective, batches[0], layers).reasons.items():
        raise ValueError(f"layer {name}: {why}; it has no Kronecker factors, leave it out")


def kronecker_factored(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    settings: KfacSettings = DEFAULT,
    *,
    optional: Collection[str] = (),
) -> KroneckerFactored:
    """K-FAC or EKFAC of layers and of norms' scales, one block for each.

    Args:
        layers: of `find_layers` or `layers_with_norms`.
        optional: layers that are left out where they have no factors, with the reason in
            `KroneckerFactored.left_out`; of others it is raised.

    A layer has no factors where it is a stack of experts, is never called, is not on the way to the
    loss, has a weight that is used elsewhere or by layers of another kind, or does not see a row
    for each item.

    Cost: a forward pass, and as many backward passes as the settings back-propagate: one for
    ``"mc"`` (times ``labels``) and ``"empirical"``, one for each output of a position for
    ``"type-2"``; all twice for EKFAC, and the eigendecompositions. Memory: ``in² + out²`` for each
    layer, its weight's size for EKFAC.

    Raises:
        ValueError: no batch; a layer without factors; a loss without curvature at outputs, or too
            many outputs for ``"type-2"``.
    """
    if not batches:
        raise ValueError("no data: pass at least one batch")
    # 1. The factors.
    reasons = {n: WHY_NONE[v.kind] for n, v in layers.items() if v.kind in WHY_NONE}
    products = {n: layer for n, layer in layers.items() if layer.kind != SCALE}
    first = first_items(batches[0], 1)
    for name, found in deviations(model, objective, first, products).items():
        reasons[name] = found.what
    _refuse(reasons, layers, optional)
    task = _Task(
        model=model,
        objective=objective,
        batches=batches,
        layers={n: layer for n, layer in layers.items() if n not in reasons},
        settings=settings,
    )
    measure = "squared outputs of the layer" if settings.fisher == "forward-only" else ""
    measure = measure or objective.measure
    parts = parts_of(model, task.layers, settings)
    sums = [sums_of(model, part, settings, measure=measure) for part in parts]
    seen = _pass(task, sums, fitting=False)
    if not seen.positions:
        raise ValueError("the data has no position that counts (all labels ignored or padding)")
    for block in sums:
        name = block.part.layer.name
        if reason := block.take_means(seen.positions, seen.reasons.get(name, "")):
            reasons.setdefault(name, reason)
    _refuse(reasons, layers, optional)
    sums = [block for block in sums if block.part.layer.name not in reasons]
    # 2. EKFAC's eigenvalues in their basis.
    if settings.eigenvalues:
        _pass(task, sums, fitting=True)
        for block in sums:
            block.fit(block.divisor(seen.positions))
    # 3. One operator for each part.
    kind = "EKFAC" if settings.eigenvalues else "K-FAC"
    what = WORDS[settings.fisher].format(labels=settings.labels)
    return KroneckerFactored(
        {block.part.name: block.operator() for block in sums},
        matrix=f"{kind} ({settings.kfac_approx}) of the {what}",
        stochastic=seen.drawn,
        left_out=reasons,
    )


def _refuse(
    reasons: Mapping[str, str], layers: Mapping[str, Layer], optional: Collection[str]
) -> None:
    """Raises ``ValueError`` for a layer that has no factors and must have some, or if none has."""
    for name, reason in reasons.items():
        if name not in optional or len(reasons) == len(layers):
            raise ValueError(
                f"layer {name}: {reason}, so it has no Kronecker factors; leave it out, with "
                "layers=..."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What both passes share."""

    model: nn.Module
    objective: Loss
    batches: Sequence[Batch]
    layers: Mapping[str, Layer]
    settings: KfacSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What a pass has found: the positions of all processes, layers without factors with the
    reasons of this process, and whether anything was drawn."""

    positions: float
    reasons: dict[str, str]
    drawn: bool


def _pass(task: _Task, sums: Sequence[BlockSums], *, fitting: bool) -> _Seen:
    """One pass over this process's mini-batches, whose rows go into the factors or, when these are
    known, into the eigenvalues."""
    draws = Draws(labels=1, seed=task.settings.seed)
    total, drawn = torch.zeros(2, dtype=torch.float64)
    reasons: dict[str, str] = {}
    for number, batch in my_share(list(enumerate(task.batches))):
        # 1. Forward: the inputs of every call of every layer.
        taken = capture(task.model, task.objective, batch, task.layers)
        total += float(task.objective.counts(taken.outputs.detach(), batch).sum())
        if not fitting:
            reasons |= _without_factors(task, taken, batch)
            for block in sums:
                if block.part.layer.name not in reasons:
                    block.add_inputs(taken)
        # 2. Backward, as often as there are vectors: the gradients at their outputs.
        generator = draws.generator(number)
        before = generator.get_state()
        with torch.enable_grad():
            for reached in _backward(task, taken, batch, generator):
                for block in sums:
                    arrived = block.own(reached[block.part.layer.name])
                    if not arrived or block.part.layer.name in reasons:
                        continue
                    if fitting:
                        block.add_squares(taken, arrived)
                    else:
                        block.add_gradients(taken, arrived)
        drawn += float(not torch.equal(before, generator.get_state()))
    found = float(all_sum(drawn)) > 0
    return _Seen(positions=float(all_sum(total)), reasons=reasons, drawn=found)


def _without_factors(task: _Task, taken: Capture, batch: Batch) -> dict[str, str]:
    """Layers whose calls in a mini-batch have no factors, with the reason."""
    single = None
    if taken.items > 1:
        single = capture(task.model, task.objective, first_items(batch, 1), task.layers)
    found = {name: why_no_factors(name, taken, single) for name in task.layers}
    return {name: reason for name, reason in found.items() if reason}


def _backward(
    task: _Task, taken: Capture, batch: Batch, generator: torch.Generator
) -> Iterator[dict[str, list[Arrived]]]:
    """The backward passes of a mini-batch: what arrives at each layer's calls."""
    objective, outputs, settings = task.objective, taken.outputs, task.settings
    if settings.fisher == "type-2":
        for column in objective.root_columns(outputs, batch, generator):
            yield _arrived(task, taken, outputs, column)
    elif settings.fisher == "mc":
        for _ in range(settings.labels):
            score = objective.scores(outputs, batch, generator).sum()
            yield _arrived(task, taken, score, None)
    elif settings.fisher == "empirical":
        yield _arrived(task, taken, objective.loss_of(outputs, batch)[0], None)


def _arrived(
    task: _Task, taken: Capture, start: Tensor, seed: Tensor | None
) -> dict[str, list[Arrived]]:
    calls = [(name, call) for name in task.layers for call in taken.calls[name]]
    reached: dict[str, list[Arrived]] = {name: [] for name in task.layers}
    if not calls or not start.requires_grad:
        return reached
    edges = [call.edge for _, call in calls]
    found = torch.autograd.grad(start, edges, seed, retain_graph=True, allow_unused=True)
    for (name, call), g in zip(calls, found, strict=True):
        if g is not None:
            reached[name].append((call, g.to(wide(g))))
    return reached
