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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvprune.curvature.capture import Capture, capture, wide
from curvprune.curvature.draws import Draws
from curvprune.curvature.kronecker_operators import KroneckerFactored
from curvprune.curvature.kronecker_parts import DEFAULT, KfacSettings, check_calls, parts_of
from curvprune.curvature.kronecker_sums import Arrived, BlockSums, sums_of
from curvprune.distributed import all_sum, my_share
from curvprune.model import Batch, Layer, Loss

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
    _check_single_pairs(layers)
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
    _check_single_pairs(layers)
    settings = KfacSettings(bias=False, eigenvalues=True, seed=seed)
    return kronecker_factored(model, objective, batches, layers, settings)


def _check_single_pairs(layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        if layer.groups != 1 or layer.kind in ("embedding", "experts"):
            raise ValueError(
                f"layer {name}: a grouped convolution, an embedding or experts have no Kronecker "
                "factors"
            )


def kronecker_factored(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    settings: KfacSettings = DEFAULT,
) -> KroneckerFactored:
    """K-FAC or EKFAC of layers and of norms' scales, one block for each.

    Args:
        layers: of `find_layers` or `layers_with_norms`.

    Cost: a forward pass, and as many backward passes as the settings back-propagate: one for
    ``"mc"`` (times ``labels``) and ``"empirical"``, one for each output of a position for
    ``"type-2"``; all twice for EKFAC, and the eigendecompositions. Memory: ``in² + out²`` for each
    layer, its weight's size for EKFAC.

    Raises:
        ValueError: no batch; experts; a layer that is never called, used elsewhere, looked up and
            multiplied, or not on the way to the loss; a loss without curvature at outputs, or too
            many outputs for ``"type-2"``.
    """
    if not batches:
        raise ValueError("no data: pass at least one batch")
    task = _Task(
        model=model, objective=objective, batches=batches, layers=layers, settings=settings
    )
    # 1. The factors.
    parts = parts_of(model, layers, settings)
    measure = "squared outputs of the layer" if settings.fisher == "forward-only" else ""
    measure = measure or objective.measure
    sums = [sums_of(model, part, settings, measure=measure) for part in parts]
    positions = _pass(task, sums, fitting=False)
    if not positions:
        raise ValueError("the data has no position that counts (all labels ignored or padding)")
    for block in sums:
        block.take_means(positions)
    # 2. EKFAC's eigenvalues in their basis.
    if settings.eigenvalues:
        _pass(task, sums, fitting=True)
        for block in sums:
            block.fit(block.divisor(positions))
    # 3. One operator for each part.
    kind = "EKFAC" if settings.eigenvalues else "K-FAC"
    what = WORDS[settings.fisher].format(labels=settings.labels)
    return KroneckerFactored(
        {block.part.name: block.operator() for block in sums},
        matrix=f"{kind} ({settings.kfac_approx}) of the {what}",
        stochastic=settings.stochastic,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What both passes share."""

    model: nn.Module
    objective: Loss
    batches: Sequence[Batch]
    layers: Mapping[str, Layer]
    settings: KfacSettings


def _pass(task: _Task, sums: Sequence[BlockSums], *, fitting: bool) -> float:
    """One pass over this process's mini-batches, whose rows go into the factors or, when these are
    known, into the eigenvalues. Returns the positions of all processes."""
    draws = Draws(labels=1, seed=task.settings.seed)
    total = torch.zeros((), dtype=torch.float64)
    for number, batch in my_share(list(enumerate(task.batches))):
        # 1. Forward: the inputs of every call of every layer.
        taken = capture(task.model, task.objective, batch, task.layers)
        for name in task.layers:
            check_calls(taken, name)
        total += float(task.objective.counts(taken.outputs.detach(), batch).sum())
        if not fitting:
            for block in sums:
                block.add_inputs(taken)
        # 2. Backward, as often as there are vectors: the gradients at their outputs.
        with torch.enable_grad():
            for reached in _backward(task, taken, batch, draws.generator(number)):
                for block in sums:
                    arrived = block.own(reached[block.part.layer.name])
                    if arrived and fitting:
                        block.add_squares(taken, arrived)
                    elif arrived:
                        block.add_gradients(taken, arrived)
    return float(all_sum(total))


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
