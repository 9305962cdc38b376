"""Exact Gauss–Newton blocks of layers, and the spectra of these blocks.

Where an item has one prediction, its Gauss–Newton matrix is ``Jᵀ M J`` with M the Hessian of the
loss at the outputs, ``diag p − p pᵀ`` of a softmax. One backward pass per column of a square root
of M (classes − 1 of a softmax) gives a square root of the layer's block, column by column. For
layers whose path to the outputs is piecewise linear (`curvprune.curvature.structure`) this is their
Hessian block.

Source: Dangel, Kunstner & Hennig 2020 (BackPACK), §2 ("DiagGGN").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compat import full_float32
from curvprune.curvature.batched_fisher import FisherMoments, MomentSums
from curvprune.curvature.capture import backward, capture, wide
from curvprune.curvature.estimates import EigenPairs
from curvprune.curvature.gradient_check import check_even
from curvprune.curvature.structure import MAX_COLUMNS
from curvprune.distributed import all_sum, gather, my_share
from curvprune.model import Batch, Layer, Loss, PositionLoss, evaluating, items_in

VECTORS = 1 << 25  # numbers of the gradient columns that a spectrum keeps at once: 128 MB
NEGATIVE = 1e-4  # how far from convex a loss may look, relative to its largest curvature
ITEMS = 16  # items of one forward pass whose columns are propagated together


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussNewton:
    """Exact Gauss–Newton blocks.

    Attributes:
        moments: traces and diagonals.
        eigenpairs: layer → extreme eigenpairs, where they were asked for.
        spectra: layer → all eigenvalues but the null space's zeros, descending.
    """

    moments: FisherMoments
    eigenpairs: dict[str, EigenPairs]
    spectra: dict[str, Float[Tensor, " rank"]]


@full_float32()
def exact_gauss_newton(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    moments: bool = True,
    diagonal: bool = True,
    eigenvalues: int = 0,
) -> GaussNewton:
    """Exact trace, diagonal and, with ``eigenvalues = k``, the k largest and k smallest eigenvalues
    and the whole non-zero spectrum of the Gauss–Newton block of every factored layer; of the
    Hessian block where the layer's path is piecewise linear.

    Cost: a forward and up to ``classes − 1`` backward passes to the layers' outputs, plus one
    per-item contraction for each; about 0.6 gradients a column. The spectrum comes from a Gram
    matrix of items·columns (or of the weights, if they are fewer) and takes the passes again for
    every `VECTORS` numbers.

    Raises ``ValueError`` if an item has several positions or there are more than `MAX_COLUMNS`
    classes.
    """
    mine = my_share(batches)
    found = FisherMoments(count=torch.zeros(0), traces={}, diagonal={})
    if moments:
        found = _block_moments(model, objective, mine, layers, diagonal)
    pairs: dict[str, EigenPairs] = {}
    spectra: dict[str, Tensor] = {}
    if eigenvalues:
        items = sum(items_in(batch) for batch in batches)
        # As many layers at a time as memory allows, because each group takes the passes again.
        for group in _groups(layers, items):
            vectors, positions = _block_columns(model, objective, mine, group)
            for name in group:
                columns = gather(vectors.pop(name))
                spectra[name], pairs[name] = _from_columns(columns, positions, eigenvalues)
    return GaussNewton(moments=found, eigenpairs=pairs, spectra=spectra)


@full_float32()
def head_moments(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    diagonal: bool = True,
) -> FisherMoments:
    """Exact block ``Σ M ⊗ x xᵀ`` of a layer whose outputs are the loss's, with M the Hessian of a
    position: trace ``Σ tr(M)‖x‖²`` and diagonal ``Σ diag(M) x²``, whatever the number of positions
    and outputs. Of a softmax ``diag(M) = p(1 − p)``. Cost: one forward pass, and one product of the
    size of the layer's own."""
    assert isinstance(objective, PositionLoss)
    sums = MomentSums(layers, diagonal)
    for batch in my_share(batches):
        taken = capture(model, objective, batch, layers)
        check_even(taken, list(layers))
        with torch.no_grad():
            outputs = taken.outputs.detach()
            positions = objective.positions(outputs, batch)
            sums.counts.append(objective.counts(outputs, batch))
            # The rows of the input are those of the outputs; those that count are picked.
            width = positions.logits.shape[-1]
            places = objective.where(outputs, batch)[:, 0] // width
            for name in layers:
                x = taken.calls[name][0].x
                rows = x.reshape(-1, x.shape[-1])[places]
                per_item = torch.zeros(taken.items, dtype=torch.float64, device=rows.device)
                for start in range(0, len(rows), ITEMS * MAX_COLUMNS):
                    part = slice(start, start + ITEMS * MAX_COLUMNS)
                    curved = objective.diagonals(positions, part)
                    squares = rows[part].to(curved.dtype).square()
                    traces = curved.sum(1, dtype=torch.float64)
                    traces = traces * squares.sum(1, dtype=torch.float64)
                    per_item.index_add_(0, positions.item[part], traces)
                    if diagonal:
                        sums.diagonal[name].addmm_(curved.t(), squares)
                sums.traces[name].append(per_item)
    return sums.result()


# ------------------------------------------------------------------ columns at the model's outputs


def output_columns(
    outputs: Float[Tensor, "items k"], objective: Loss, batch: Batch
) -> tuple[Float[Tensor, "columns items k"], Tensor]:
    """Columns ``c`` with ``Σ c cᵀ`` the Hessian of each item's loss at its outputs, the largest
    first, and how many of them matter.

    Columns shorter than the rounding error of the longest are counted out. Raises ``ValueError``
    where the loss is not convex in its outputs.
    """
    values, vectors = torch.linalg.eigh(objective.item_hessians(outputs, batch))
    values, vectors = values.flip(-1), vectors.flip(-1)
    if bool((values[:, -1] < -NEGATIVE * values[:, 0].clamp_min(0)).any()):
        raise ValueError(
            f"loss {objective.name} is not convex in the model's outputs, so its Gauss–Newton "
            "matrix has no root; use matrix='hessian'"
        )
    values = values.clamp_min(0)
    floor = torch.finfo(outputs.dtype).eps * values[:, :1]
    ranks = ((values > floor) & (values > 0)).sum(-1)
    columns = (vectors * values.sqrt().unsqueeze(-2)).permute(2, 0, 1)
    return columns.to(outputs.dtype), ranks


def has_columns(model: nn.Module, objective: Loss, batches: Sequence[Batch]) -> bool:
    """Whether the loss is convex in the model's outputs on all these data; where its curvature is
    known in closed form, it is. Cost otherwise: a forward pass, and a product with the second
    derivative of the loss for each output."""
    if objective.curvature != "differentiation":
        return objective.curvature == "closed form"
    with evaluating(model):
        for batch in batches:
            with torch.no_grad():
                outputs = objective.outputs(model, batch)
            values = torch.linalg.eigvalsh(objective.item_hessians(outputs, batch))
            if bool((values[:, 0] < -NEGATIVE * values[:, -1].clamp_min(0)).any()):
                return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Portion:
    """A few items of similar rank.

    Attributes:
        batch: the items.
        seeds: columns at their outputs.
        count: positions of each item.
    """

    batch: Batch
    seeds: Float[Tensor, "columns items k"]
    count: Float[Tensor, " items"]


def _portions(model: nn.Module, objective: Loss, batches: Sequence[Batch]) -> Iterator[_Portion]:
    """Small batches with their columns; items of similar rank go together, so that few columns are
    propagated for items whose prediction is certain."""
    for batch in batches:
        # 1. Columns of every item, from a forward pass without a graph.
        with torch.no_grad(), evaluating(model):
            outputs = objective.outputs(model, batch)
        if outputs.ndim != 2 or outputs.shape[-1] - 1 > MAX_COLUMNS:
            raise ValueError(
                f"exact Gauss–Newton columns need outputs (items, up to {MAX_COLUMNS + 1}), got "
                f"{tuple(outputs.shape)}; use the Fisher from sampled labels"
            )
        columns, ranks = output_columns(outputs.to(wide(outputs)), objective, batch)
        count = objective.counts(outputs, batch)

        # 2. Items in the order of their rank.
        order = torch.argsort(ranks, descending=True)

        # 3. A few at a time, with as many columns as the first of them needs.
        for start in range(0, len(order), ITEMS):
            chosen = order[start : start + ITEMS]
            rank = int(ranks[chosen].max())
            seeds = columns[:rank, chosen].to(outputs.dtype)
            yield _Portion(batch=_pick(batch, chosen), seeds=seeds, count=count[chosen])


def _pick(batch: Batch, items: Tensor) -> Batch:
    if not isinstance(batch, Mapping):
        return batch[0][items], batch[1][items]
    picked = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            picked[key] = value[items]
    return picked


# ------------------------------------------------------------------------------ moments and spectra


def _block_moments(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    diagonal: bool,
) -> FisherMoments:
    """Traces and diagonals: squares of the columns, added up."""
    sums = MomentSums(layers, diagonal)
    for portion in _portions(model, objective, batches):
        taken = capture(model, objective, portion.batch, layers)
        check_even(taken, list(layers))
        columns = [
            backward(taken, list(layers), taken.outputs, s, retain=True) for s in portion.seeds
        ]
        sums.counts.append(portion.count)
        for i, name in enumerate(layers):
            if columns:
                squares = sums.squares(taken, name, [c[i] for c in columns], 1.0)
            else:  # all predictions are certain
                device = portion.seeds.device
                squares = torch.zeros(taken.items, dtype=torch.float64, device=device)
            sums.traces[name].append(squares)
    return sums.result()


def _groups(layers: Mapping[str, Layer], items: int) -> Iterator[dict[str, Layer]]:
    """Neighbouring layers whose gradient columns (a handful for each item) fit into `VECTORS`."""
    group: dict[str, Layer] = {}
    size = 0
    for name, layer in reversed(list(layers.items())):
        need = layer.numel * min(8 * items, layer.numel)
        if group and size + need > VECTORS:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += need
    if group:
        yield group


def _block_columns(
    model: nn.Module, objective: Loss, batches: Sequence[Batch], layers: Mapping[str, Layer]
) -> tuple[dict[str, Float[Tensor, "columns n"]], float]:
    """Gradient columns of every layer on this process's share, and the number of positions on
    all."""
    vectors: dict[str, list[Tensor]] = {n: [] for n in layers}
    total = 0.0
    for portion in _portions(model, objective, batches):
        taken = capture(model, objective, portion.batch, layers)
        check_even(taken, list(layers))
        total += float(portion.count.sum())
        columns = [
            backward(taken, list(layers), taken.outputs, s, retain=True) for s in portion.seeds
        ]
        if not columns:
            continue
        for i, name in enumerate(layers):
            own = [c[i] for c in columns]
            for items in taken.chunks(name, len(columns)):
                found = taken.matrices(name, own, items).flatten(2).flatten(0, 1)
                # Columns beyond an item's own rank are zero.
                vectors[name].append(found[found.abs().amax(1) > 0])
    joined: dict[str, Tensor] = {}
    for name, layer in layers.items():
        parts = vectors.pop(name) or [torch.zeros(0, layer.numel, dtype=wide(layer.weight))]
        joined[name] = torch.cat(parts)
    return joined, float(all_sum(torch.tensor(total, dtype=torch.float64)))


def _from_columns(
    v: Float[Tensor, "m n"], total: float, k: int
) -> tuple[Float[Tensor, " rank"], EigenPairs]:
    """Eigenvalues of ``VᵀV / total``, descending, and extreme eigenpairs, by the smaller of the two
    Gram matrices."""
    m, n = v.shape
    # 1. Eigenvalues, ascending, and eigenvectors: all of them, or the k last.
    if m >= n:
        values, basis = torch.linalg.eigh((v.t() @ v).double() / total)
        vectors = basis.to(v.dtype)
    elif m == 0:
        values, vectors = torch.zeros(0, dtype=torch.float64), torch.zeros(n, 0, dtype=v.dtype)
    else:
        values, basis = torch.linalg.eigh((v @ v.t()).double() / total)
        vectors = v.t() @ basis[:, -k:].to(v.dtype)
        tiny = torch.finfo(v.dtype).tiny
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(tiny)
    values = values.clamp_min(0)

    # 2. Both ends.
    largest = values[-k:].flip(0)
    if m >= n:
        smallest = values[:k]
        ends = torch.cat([vectors[:, -k:].flip(1), vectors[:, :k]], 1)
    else:  # the null space: any vector orthogonal to the columns; none is computed
        smallest = torch.zeros(min(k, n - m), dtype=torch.float64)
        unknown = torch.full((n, len(smallest)), torch.nan, dtype=v.dtype)
        ends = torch.cat([vectors.flip(1), unknown], 1)

    # 3. Errors: rounding.
    found = torch.cat([largest, smallest])
    rounding = torch.finfo(v.dtype).eps * float(values[-1]) * 10 if len(values) else 0.0
    bound = torch.full((len(found),), rounding, dtype=torch.float64)
    pairs = EigenPairs(
        values=found, vectors=ends, residuals=bound, errors=bound, num_products=0, converged=True
    )
    return values.flip(0), pairs
