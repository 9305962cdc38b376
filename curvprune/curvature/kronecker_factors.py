"""K-FAC and EKFAC: the Fisher of every layer approximated by a Kronecker product.

Sources: Martens & Grosse 2015 (K-FAC); George et al. 2018 (EKFAC).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature.capture import Capture, backward, capture
from curvprune.curvature.closed_forms import BlockDiagonal, Ekfac, Kronecker
from curvprune.curvature.draws import Draws
from curvprune.curvature.operators import Operator, ParamSpace
from curvprune.curvature.structure import find_structure
from curvprune.distributed import all_sum, my_share
from curvprune.model import Batch, Layer, Loss


def kfac(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
) -> BlockDiagonal:
    """The Fisher approximated by ``G ⊗ A`` for each layer: ``A = E[x xᵀ]`` over rows, ``G = Σ g gᵀ
    / positions`` with one label drawn per position. Grouped convolutions, embeddings and stacked
    experts have none and raise ``ValueError``.

    Cost: one forward and one backward pass; memory: ``in² + out²`` for each layer.
    """
    factors = _factors(model, objective, batches, layers, seed)
    blocks: dict[str, Operator] = {}
    for name, layer in layers.items():
        blocks[name] = Kronecker(
            factors.g[name],
            factors.a[name],
            _space(layer),
            measure=objective.measure,
            transposed=layer.transposed,
        )
    return BlockDiagonal(blocks)


def ekfac(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
) -> BlockDiagonal:
    """K-FAC's eigenbasis with fitted eigenvalues ``S_ij = Σᵦ (Q_Gᵀ Gᵦᵀ Xᵦ Q_A)²_ij / positions``:
    the closest matrix to the Fisher with that eigenbasis, with the Fisher's trace for the labels
    drawn. Cost: as `kfac`, twice, plus the eigendecompositions."""
    # 1. The eigenbasis.
    factors = _factors(model, objective, batches, layers, seed)
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, Tensor] = {}
    for name, layer in layers.items():
        g = factors.g[name]
        bases[name] = torch.linalg.eigh(g)[1], torch.linalg.eigh(factors.a[name])[1]
        scales[name] = torch.zeros(layer.shape, dtype=g.dtype, device=g.device)

    # 2. The Fisher's diagonal in this basis, for the labels drawn.
    for taken, gradients, _ in _sampled(model, objective, batches, layers, seed):
        for name, gradient in zip(layers, gradients, strict=True):
            qg, qa = bases[name]
            for items in taken.chunks(name):
                matrices = taken.matrices(name, [gradient], items)[:, 0]
                scales[name] += (qg.t() @ matrices @ qa).square().sum(0)

    # 3. One operator for all layers.
    blocks: dict[str, Operator] = {}
    for name, layer in layers.items():
        blocks[name] = Ekfac(
            *bases[name],
            all_sum(scales[name]) / factors.positions,
            _space(layer),
            measure=objective.measure,
            transposed=layer.transposed,
        )
    return BlockDiagonal(blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Factors:
    """``G`` and ``A`` of every layer, and the number of positions behind them."""

    g: dict[str, Float[Tensor, "out out"]]
    a: dict[str, Float[Tensor, "in in"]]
    positions: float


def _factors(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    seed: int,
) -> _Factors:
    for name, layer in layers.items():
        if layer.groups != 1 or layer.kind in ("embedding", "experts"):
            raise ValueError(
                f"layer {name}: a grouped convolution, an embedding or experts have no Kronecker "
                "factors"
            )
    for name, why in find_structure(model, objective, batches[0], layers).reasons.items():
        raise ValueError(f"layer {name}: {why}; it has no Kronecker factors, leave it out")
    # 1. Sums of outer products on this process's share of the mini-batches.
    a: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    rows: dict[str, float] = dict.fromkeys(layers, 0.0)
    total = torch.zeros((), dtype=torch.float64)
    for taken, gradients, positions in _sampled(model, objective, batches, layers, seed):
        total += positions
        for name, gradient in zip(layers, gradients, strict=True):
            for items in taken.chunks(name):
                x = taken.rows(name, items).flatten(0, 2).to(gradient.dtype)
                d = taken.gradients(name, gradient, items).flatten(0, 2)
                a[name] = a.get(name, 0) + x.t() @ x
                g[name] = g.get(name, 0) + d.t() @ d
                rows[name] += len(x)

    # 2. Means over all: A over rows, G over positions.
    count = float(all_sum(total))
    for name in layers:
        places = float(all_sum(torch.tensor(rows[name], dtype=torch.float64)))
        g[name] = all_sum(g[name]) / count
        a[name] = all_sum(a[name]) / places
    return _Factors(g=g, a=a, positions=count)


def _sampled(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    seed: int,
) -> Iterator[tuple[Capture, list[Tensor], float]]:
    """Every mini-batch after its passes: the output gradients for one drawn label per position, and
    how many positions count."""
    draws = Draws(labels=1, seed=seed)
    for number, batch in my_share(list(enumerate(batches))):
        taken = capture(model, objective, batch, layers)
        with torch.enable_grad():
            loss = objective.scores(taken.outputs, batch, draws.generator(number)).sum()
            gradients = backward(taken, list(layers), loss)
            count = float(objective.counts(taken.outputs.detach(), batch).sum())
        yield taken, gradients, count


def _space(layer: Layer) -> ParamSpace:
    return ParamSpace(shapes={f"{layer.name}.weight": tuple(layer.weight.shape)})
