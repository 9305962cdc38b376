"""First-order curvature of every layer from the per-item factors of its gradient: inputs X and
output gradients G.

A layer computes ``s = x Wᵀ``, so the gradient of item b is ``Gᵦᵀ Xᵦ`` and no pass over single items
is needed:

    Fisher                  labels drawn from the model, one backward pass per label for all layers at once
    exact Gauss–Newton      one backward pass per column of a square root of the softmax's Hessian (classes − 1 of them)
    K-FAC, EKFAC            E[x xᵀ] and E[g gᵀ] from one such pass; scales in their eigenbasis from a second one

Where the path from a layer's output to the logits is piecewise linear (ReLU, pooling, BatchNorm in
evaluation mode) the layer's block of the **Hessian** equals its Gauss–Newton block wherever it
exists, so the block's diagonal, trace and spectrum are exact from first-order passes. Whether it
is, is read off the autograd graph.

Sources: Dangel, Kunstner & Hennig 2020 (BackPACK), §2; Martens & Grosse 2015 (K-FAC); George et al.
2018 (EKFAC); Botev et al. 2017, "Practical Gauss-Newton optimisation for deep learning", §2
(piecewise linear transfer functions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvprune.curvature.closed_forms import BlockDiagonal, Ekfac, Kronecker
from curvprune.curvature.estimates import EigenPairs
from curvprune.curvature.operators import Operator, ParamSpace
from curvprune.curvature.products import check_deterministic, first_items
from curvprune.distributed import all_sum, gather, my_share
from curvprune.model import Batch, Layer, Objective, Positions, evaluating, sampled_losses

ELEMENTS = 1 << 23  # numbers of one chunk of per-item matrices: bounds them at 32 MB
VECTORS = 1 << 25  # numbers of the gradient columns that a spectrum keeps at once: 128 MB
MAX_COLUMNS = 128  # classes − 1 above which exact columns are not attempted
ITEMS = 16  # items of one forward pass whose columns are propagated together


# --------------------------------------------------------------------------------- one forward pass


@dataclass(slots=True)
class Call:
    """One call of a layer: its module and input, its output's shape, and the edge that carries the
    gradient there."""

    module: nn.Module
    x: Tensor
    shape: torch.Size
    edge: GradientEdge


@dataclass(slots=True)
class Capture:
    """A batch after its forward pass: logits on the graph, and for every layer its calls and the
    uses of its weight."""

    layers: Mapping[str, Layer]
    items: int
    logits: Tensor
    calls: dict[str, list[Call]]
    uses: dict[str, int]

    def rows(
        self, name: str, items: slice = slice(None)
    ) -> Float[Tensor, "groups items places in"]:
        """The rows that multiply the layer's matrix, per item."""
        layer, call = self.layers[name], self.calls[name][0]
        x = call.x.unflatten(0, (self.items, -1))[items]
        rows = layer.rows(call.module, x.flatten(0, 1))
        return rows.unflatten(1, (len(x), -1))

    def gradients(
        self, name: str, g: Tensor, items: slice = slice(None)
    ) -> Float[Tensor, "groups items places out"]:
        """A gradient laid out like the layer's output, as rows per item."""
        layer = self.layers[name]
        g = g.unflatten(0, (self.items, -1))[items]
        if layer.kind != "conv":
            return g.reshape(1, len(g), -1, layer.shape[0])
        g = g.flatten(3).transpose(2, 3)  # (items, per item, places, out)
        return g.reshape(len(g), -1, layer.groups, layer.shape[0] // layer.groups).permute(
            2, 0, 1, 3
        )

    def chunks(self, name: str, columns: int = 1) -> Iterator[slice]:
        """Slices of items whose per-item matrices (``columns`` of each) and rows fit into
        `ELEMENTS`."""
        layer, call = self.layers[name], self.calls[name][0]
        places = call.shape.numel() // (self.items * layer.shape[0])
        size = max(
            1, ELEMENTS // max(columns * layer.numel, places * layer.shape[1] * layer.groups)
        )
        for start in range(0, self.items, size):
            yield slice(start, min(start + size, self.items))

    def matrices(
        self, name: str, g: Sequence[Tensor], items: slice
    ) -> Float[Tensor, "items columns out in"]:
        """``Gᵀ X`` of each item for each of several backward passes."""
        layer = self.layers[name]
        if layer.kind == "embedding":
            return self._embedding(name, g, items)
        x = self.rows(name, items)
        rows = torch.stack(
            [self.gradients(name, c, items) for c in g], 2
        )  # (groups, items, columns, places, out)
        groups, count, columns, places, width = rows.shape
        # All columns share the rows: one product with columns·out on a side is faster than one for
        # each column.
        left = rows.permute(0, 1, 2, 4, 3).reshape(groups, count, columns * width, places)
        products = (left @ x.to(left.dtype)).reshape(groups, count, columns, width, -1)
        return products.permute(1, 2, 0, 3, 4).reshape(
            count, columns, layer.shape[0], layer.shape[1]
        )

    def _embedding(self, name: str, g: Sequence[Tensor], items: slice) -> Tensor:
        layer, call = self.layers[name], self.calls[name][0]
        tokens = call.x.unflatten(0, (self.items, -1))[items].flatten(1)
        matrices = call.x.new_zeros(len(tokens), len(g), *layer.shape, dtype=_wide(g[0]))
        padding = getattr(call.module, "padding_idx", None)
        for k, c in enumerate(g):
            rows = c.reshape(self.items, -1, layer.shape[1])[items].to(matrices.dtype)
            if padding is not None:
                rows = rows * (tokens != padding).unsqueeze(-1)
            for i in range(len(tokens)):
                matrices[i, k].index_add_(0, tokens[i], rows[i])
        return matrices


class _WeightUses(TorchFunctionMode):
    """Counts the torch functions that receive a weight: a use outside the layer's own module must
    not go unseen."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.count = dict.fromkeys(weights.values(), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in (
            "__get__",
            "__set__",
            "detach",
        ):  # reading .dtype is no use
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, Tensor) and (name := self.weights.get(id(value))) is not None:
                    self.count[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; the flags come back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def capture(
    model: nn.Module, objective: Objective, batch: Batch, layers: Mapping[str, Layer]
) -> Capture:
    """Run one forward pass in evaluation mode. The model comes back as it was, also after an
    error."""
    calls: dict[str, list[Call]] = {n: [] for n in layers}

    def take(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            bare = output
            if not output.requires_grad:
                bare = output.detach().requires_grad_()
                output = bare.clone()  # a leaf may not be changed in place by what follows
            calls[name].append(
                Call(module, inputs[0].detach(), bare.shape, get_gradient_edge(bare))
            )
            return output

        return hook

    handles = [
        module.register_forward_hook(take(name))
        for name, layer in layers.items()
        if layer.kind != "experts"
        for module in {id(m): m for m in (layer.module, *layer.readers)}.values()
    ]
    uses = _WeightUses({id(layer.weight): n for n, layer in layers.items()})
    try:
        with evaluating(model), _frozen(model), torch.enable_grad(), uses:
            logits = objective.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    items = len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
    return Capture(layers=layers, items=items, logits=logits, calls=calls, uses=uses.count)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _backward(
    taken: Capture, names: Sequence[str], outputs: Tensor, seed: Tensor | None, retain: bool
) -> list[Tensor]:
    """Gradients at the outputs of the layers, in at least float32."""
    if experts := [n for n in names if taken.layers[n].kind == "experts"]:
        raise ValueError(
            f"layer {experts[0]}: stacked experts have no factors per item; leave it out"
        )
    edges = [taken.calls[n][0].edge for n in names]
    gradients = torch.autograd.grad(outputs, edges, seed, retain_graph=retain, allow_unused=True)
    for name, g in zip(names, gradients, strict=True):
        if g is None:
            raise ValueError(
                f"layer {name} received no gradient: it is not on the way to the loss; leave it out"
            )
    return [g.to(_wide(g)) for g in gradients]


# ------------------------------------------------------------------------ what the factors hold for


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Which layers the factors describe.

    Attributes:
        factored: layers called once, whose weight is used nowhere else and whose rows belong to one
            item each.
        piecewise_linear: factored layers whose path to the logits is piecewise linear.
        heads: piecewise linear layers whose output is the logits, for any number of positions and
            classes.
        reasons: layer → why it is not factored.
        exact: every item has at most one prediction (logits ``(items, classes)``) and few enough
            classes for exact Gauss–Newton columns.
    """

    factored: tuple[str, ...]
    piecewise_linear: tuple[str, ...]
    heads: tuple[str, ...]
    reasons: dict[str, str]
    exact: bool


def structure(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    layers: Mapping[str, Layer],
    taken: Capture | None = None,
) -> Structure:
    """Read the structure off a forward pass of several items (``taken``, or one of the first two)
    and one of the first.

    Raises ``ValueError`` for a model that is not deterministic, naming the module.
    """
    if taken is None:
        batch = first_items(batch, 2)
        taken = capture(model, objective, batch, layers)
    pair = taken
    single = capture(model, objective, first_items(batch, 1), layers)
    if not _rows_belong(single.logits.detach(), pair.logits.detach()):
        check_deterministic(model, objective, batch)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        calls, uses = pair.calls[name], pair.uses[name]
        if layer.kind == "experts":
            reasons[name] = "a router decides which items' rows an expert sees"
        elif len(calls) != 1 or uses != 1:
            reasons[name] = (
                f"its weight is used {max(uses, len(calls))} times, {len(calls)} of them by "
                "calling it"
            )
        elif len(calls[0].x) % pair.items or not _rows_belong(single.calls[name][0].x, calls[0].x):
            reasons[name] = "the first dimension of its input does not count items"
        elif getattr(layer.module, "max_norm", None) is not None or getattr(
            layer.module, "scale_grad_by_freq", False
        ):
            reasons[name] = "an embedding with max_norm or scale_grad_by_freq is not linear"
    factored = tuple(n for n in layers if n not in reasons)
    nonlinear = _nonlinear(pair, factored)
    piecewise_linear = tuple(n for n in factored if n not in nonlinear)
    return Structure(
        factored=factored,
        piecewise_linear=piecewise_linear,
        heads=tuple(n for n in piecewise_linear if _is_head(pair, n)),
        reasons=reasons,
        # By shape, not by the labels of these few items: others may have more positions that count.
        exact=pair.logits.ndim == 2 and pair.logits.shape[-1] - 1 <= MAX_COLUMNS,
    )


def _is_head(taken: Capture, name: str) -> bool:
    """The layer's output is the logits, seen through nothing but views, copies and casts."""
    call, logits = taken.calls[name][0], taken.logits
    if taken.layers[name].kind != "linear" or call.shape != logits.shape:
        return False
    node: Any = logits.grad_fn
    while node is not None and node is not call.edge.node:
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        if kind not in ("View", "UnsafeView", "Alias", "Clone", "ToCopy"):
            return False
        node = node.next_functions[0][0]
    return node is not None


def _rows_belong(single: Tensor, pair: Tensor) -> bool:
    first = pair[: len(single)]
    if first.shape != single.shape:
        return False
    if not single.is_floating_point():
        return bool((first == single).all())
    return torch.allclose(
        first.float(), single.float(), rtol=1e-2, atol=1e-3 * float(single.abs().max()) + 1e-8
    )


# Backward nodes of functions that are piecewise linear in their inputs together ...
_LINEAR = {
    *(
        "Relu",
        "LeakyRelu",
        "Threshold",
        "Hardtanh",
        "Abs",
        "Clamp",
        "ClampMin",
        "ClampMax",
        "Maximum",
        "Minimum",
    ),
    *(
        "MaxPool2DWithIndices",
        "MaxPool3DWithIndices",
        "AdaptiveMaxPool2D",
        "Max",
        "Amax",
        "Min",
        "Amin",
        "Max1",
        "Min1",
    ),
    *(
        "AvgPool2D",
        "AvgPool3D",
        "AdaptiveAvgPool2D",
        "MkldnnAdaptiveAvgPool2D",
        "Mean",
        "Sum",
        "Add",
        "Sub",
        "Neg",
    ),
    *(
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "T",
        "Transpose",
        "Permute",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Clone",
    ),
    *(
        "ToCopy",
        "Cat",
        "Stack",
        "Slice",
        "Select",
        "Index",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Alias",
        "AsStrided",
    ),
    *(
        "ConstantPadNd",
        "ReflectionPad2D",
        "ReplicationPad2D",
        "UpsampleNearest2D",
        "UpsampleBilinear2D",
        "Flip",
        "Roll",
    ),
    *(
        "Where",
        "MaskedFill",
        "Gather",
        "Repeat",
        "AccumulateGrad",
        "IndexSelect",
        "Unfold",
        "PixelShuffle",
    ),
}
# ... and of products, linear in each factor: quadratic where two factors depend on one layer.
_PRODUCTS = {"Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "Mul", "PreluKernel"}
_BATCH_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}


def _nonlinear(taken: Capture, names: Sequence[str]) -> set[str]:
    """Layers on whose way to the logits the autograd graph has a node that is not piecewise linear
    in them."""
    bits = {taken.calls[n][0].edge.node: 1 << i for i, n in enumerate(names)}
    masks: dict[Any, int] = {}
    crooked = 0
    stack: list[tuple[Any, bool]] = [(taken.logits.grad_fn, False)]
    while stack:
        node, seen = stack.pop()
        if node is None or (node in masks and not seen):
            continue
        inputs = [n for n, _ in node.next_functions if n is not None]
        if not seen:
            stack.append((node, True))
            stack.extend((n, False) for n in inputs if n not in masks)
            continue
        below = [masks[n] | bits.get(n, 0) for n in inputs]
        mask = 0
        for m in below:
            mask |= m
        masks[node] = mask
        kind = node.name().split("::")[-1].rstrip("0123456789").removesuffix("Backward")
        if kind in _PRODUCTS:
            for i, m in enumerate(below):
                for other in below[:i]:
                    crooked |= m & other
        elif kind == "Div":
            numerator, denominator = (
                masks.get(n, 0) | bits.get(n, 0) for n, _ in node.next_functions[:2]
            )
            crooked |= denominator | (numerator & denominator)
        elif kind in _BATCH_NORMS:
            crooked |= mask if node._saved_training else 0
        elif kind not in _LINEAR:
            crooked |= mask
    return {n for i, n in enumerate(names) if crooked >> i & 1}


# ------------------------------------------------------------------------------------------- Fisher


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """First-order curvature of the layers: sums over items, to be divided by the number of
    positions.

    Attributes:
        count: positions of each item, ``(items,)``.
        traces: layer → ``‖g‖²`` of each item, mean over labels (or sum over exact columns).
        diagonal: layer → diagonal per position, ``(out, in)``; empty if it was not asked for.
    """

    count: Float[Tensor, " items"]
    traces: dict[str, Float[Tensor, " items"]]
    diagonal: dict[str, Float[Tensor, "out in"]]


class _Sums:
    def __init__(self, layers: Mapping[str, Layer], diagonal: bool) -> None:
        self.layers, self.counts = layers, list[Tensor]()
        self.traces: dict[str, list[Tensor]] = {n: [] for n in layers}
        self.diagonal = {
            n: torch.zeros(layer.shape, dtype=_wide(layer.weight), device=layer.weight.device)
            for n, layer in layers.items()
            if diagonal
        }

    def add(self, taken: Capture, name: str, g: Sequence[Tensor], scale: float) -> None:
        """Take in the per-item gradients of one or several backward passes."""
        layer = self.layers[name]
        per_item = []
        one_place = (
            layer.kind != "embedding"
            and taken.calls[name][0].shape.numel() == taken.items * layer.shape[0]
        )
        for items in taken.chunks(name, len(g)):
            if one_place and layer.groups == 1:
                x = taken.rows(name, items)[0, :, 0].to(_wide(g[0])).square()
                outer = torch.stack(
                    [taken.gradients(name, c, items)[0, :, 0].square() for c in g]
                ).sum(0)
                per_item.append(outer.sum(1).double() * x.sum(1).double())
                if self.diagonal:
                    self.diagonal[name].addmm_(outer.t(), x, alpha=scale)
                continue
            matrices = taken.matrices(name, g, items)
            squares = matrices.square_()
            # sum() adds in a tree, which float32 needs here; norm() runs along and is off by 1e-4.
            per_item.append(squares.flatten(1).sum(1).double())
            if self.diagonal:
                self.diagonal[name].add_(squares.sum((0, 1)), alpha=scale)
        self.traces[name].append(scale * torch.cat(per_item))

    def result(self) -> Moments:
        # A process without a mini-batch of its own has nothing to add.
        none = [torch.zeros(0, dtype=torch.float64)]
        count = gather(torch.cat(self.counts or none))
        total = float(count.sum())
        traces = {n: gather(torch.cat(t or none)) for n, t in self.traces.items()}
        for name, trace in traces.items():
            if not bool(torch.isfinite(trace).all()):
                item = int((~torch.isfinite(trace)).nonzero()[0])
                raise FloatingPointError(
                    f"layer {name}: the gradient of item {item} is not finite; run the model in "
                    "float32 or bfloat16"
                )
        return Moments(
            count=count,
            traces=traces,
            diagonal={n: all_sum(d) / total for n, d in self.diagonal.items()},
        )


def _count(positions: Positions) -> Tensor:
    device = positions.item.device
    return torch.zeros(positions.items, dtype=torch.float64, device=device).index_add(
        0, positions.item, torch.ones(len(positions.item), dtype=torch.float64, device=device)
    )


def fisher_moments(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    labels: int = 1,
    seed: int = 0,
    diagonal: bool = True,
    empirical: bool = False,
    first: Capture | None = None,
) -> Moments:
    """Trace and diagonal of the true Fisher for factored layers, labels drawn from the model; with
    ``empirical``, of the empirical Fisher (per item) from the data's own labels.

    Cost: one forward and ``labels`` backward passes over the data for all layers at once, about one
    gradient together; ``first`` is the first batch's forward pass, if it has been made.
    """
    sums = _Sums(layers, diagonal)
    for number, batch in my_share(list(enumerate(batches))):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        taken = (
            first if first is not None and number == 0 else capture(model, objective, batch, layers)
        )
        first = None
        with torch.enable_grad():
            positions = objective.positions(taken.logits, batch)
            sums.counts.append(_count(positions))
            partial = {
                n: torch.zeros(taken.items, dtype=torch.float64, device=taken.logits.device)
                for n in layers
            }
            passes = 1 if empirical else labels
            for s in range(passes):
                if empirical:
                    loss = objective.loss_of(taken.logits, batch)[0]
                else:
                    loss = sampled_losses(positions, generator).sum()
                gradients = _backward(taken, list(layers), loss, None, s + 1 < passes)
                for name, g in zip(layers, gradients, strict=True):
                    sums.add(taken, name, [g], 1 / passes)
                    partial[name] += sums.traces[name].pop()
        for name, trace in partial.items():
            sums.traces[name].append(trace)
    return sums.result()


def head_moments(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    diagonal: bool = True,
) -> Moments:
    """Exact block of a layer whose output is the logits, ``Σ (diag p − p pᵀ) ⊗ x xᵀ``: trace ``Σ (1
    − Σp²)‖x‖²`` and diagonal ``Σ p(1 − p) x²``, whatever the number of positions and classes. Cost:
    one forward pass, and one product of the size of the layer's own."""
    sums = _Sums(layers, diagonal)
    for batch in my_share(batches):
        taken = capture(model, objective, batch, layers)
        with torch.no_grad():
            positions = objective.positions(taken.logits.detach(), batch)
            sums.counts.append(_count(positions))
            for name in layers:
                x = taken.calls[name][0].x
                # The rows of the input are those of the logits, so the objective picks the ones
                # that count.
                rows = objective.positions(
                    x.view(*taken.logits.shape[:-1], x.shape[-1]), batch
                ).logits
                per_item = torch.zeros(taken.items, dtype=torch.float64, device=rows.device)
                for start in range(0, len(rows), ITEMS * MAX_COLUMNS):
                    part = slice(start, start + ITEMS * MAX_COLUMNS)
                    p = positions.logits[part].to(_wide(rows)).softmax(-1)
                    squares = rows[part].to(p.dtype).square()
                    curved = p - p.square()
                    per_item.index_add_(
                        0,
                        positions.item[part],
                        curved.sum(1, dtype=torch.float64) * squares.sum(1, dtype=torch.float64),
                    )
                    if diagonal:
                        sums.diagonal[name].addmm_(curved.t(), squares)
                sums.traces[name].append(per_item)
    return sums.result()


# ------------------------------------------------------------------------------- exact Gauss–Newton


def softmax_columns(
    logits: Float[Tensor, "items classes"],
) -> tuple[Float[Tensor, "columns items classes"], Tensor]:
    """Columns ``c`` with ``Σ c cᵀ = diag(p) − p pᵀ`` for each item, the largest first, and how many
    of them matter.

    The rank is at most classes − 1; columns shorter than the rounding error of the longest are
    counted out.
    """
    p = logits.double().softmax(-1)
    matrix = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    floor = torch.finfo(logits.dtype).eps * values[:, :1]
    ranks = ((values > floor) & (values > 0)).sum(-1)
    columns = (vectors * values.sqrt().unsqueeze(-2)).permute(2, 0, 1)
    return columns.to(logits.dtype), ranks


def _ordered(
    model: nn.Module, objective: Objective, batches: Sequence[Batch]
) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
    """Small batches with their columns; items of similar rank go together, so that few columns are
    propagated for items whose prediction is certain."""
    for batch in batches:
        with torch.no_grad(), evaluating(model):
            logits = objective.logits(model, batch)
        if logits.ndim != 2 or logits.shape[-1] - 1 > MAX_COLUMNS:
            raise ValueError(
                f"exact Gauss–Newton columns need logits (items, up to {MAX_COLUMNS + 1} "
                f"classes), got {tuple(logits.shape)}; use the Fisher from sampled labels"
            )
        positions = objective.positions(logits, batch)
        columns, ranks = softmax_columns(positions.logits.to(_wide(logits)))
        item_rank = torch.zeros(positions.items, dtype=ranks.dtype, device=ranks.device)
        item_rank[positions.item] = ranks
        order = torch.argsort(item_rank, descending=True)
        for start in range(0, len(order), ITEMS):
            chosen = order[start : start + ITEMS]
            rank = int(item_rank[chosen].max())
            seeds = torch.zeros(rank, *logits.shape, dtype=logits.dtype, device=logits.device)
            where = _place(positions, logits, batch, objective)
            seeds.view(rank, -1, logits.shape[-1])[:, where] = columns[:rank].to(logits.dtype)
            yield _pick(batch, chosen), seeds[:, chosen], chosen, _count(positions)[chosen]


def _place(positions: Positions, logits: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Flat indices of the counting positions among all rows of the logits."""
    rows = torch.arange(logits[..., 0].numel(), device=logits.device).view(logits.shape[:-1])
    marked = rows.unsqueeze(-1).expand(logits.shape).to(torch.float64)
    return objective.positions(marked, batch).logits[:, 0].long()


def _pick(batch: Batch, items: Tensor) -> Batch:
    if isinstance(batch, Mapping):
        return {k: v[items] if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[0][items], batch[1][items]


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussNewton:
    """Exact Gauss–Newton blocks: `Moments`, and for each layer its extreme eigenpairs where they
    were asked for."""

    moments: Moments
    eigenpairs: dict[str, EigenPairs]
    spectra: dict[str, Float[Tensor, " rank"]]


def exact_gauss_newton(
    model: nn.Module,
    objective: Objective,
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
    sums = _Sums(layers, diagonal)
    pairs: dict[str, EigenPairs] = {}
    spectra: dict[str, Tensor] = {}
    if moments:
        for batch, seeds, _, count in _ordered(model, objective, mine):
            taken = capture(model, objective, batch, layers)
            columns = [_backward(taken, list(layers), taken.logits, s, True) for s in seeds]
            sums.counts.append(count)
            for i, name in enumerate(layers):
                if columns:
                    sums.add(taken, name, [c[i] for c in columns], 1.0)
                else:
                    sums.traces[name].append(
                        torch.zeros(taken.items, dtype=torch.float64, device=seeds.device)
                    )
    result = sums.result() if moments else Moments(count=torch.zeros(0), traces={}, diagonal={})
    if eigenvalues:
        total = 0
        for batch in batches:
            total += len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
        for group in _groups(layers, total):
            _spectra(model, objective, mine, group, eigenvalues, pairs, spectra)
    return GaussNewton(moments=result, eigenpairs=pairs, spectra=spectra)


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


def _spectra(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    k: int,
    pairs: dict[str, EigenPairs],
    spectra: dict[str, Tensor],
) -> None:
    vectors: dict[str, list[Tensor]] = {n: [] for n in layers}
    total = 0.0
    for batch, seeds, _, count in _ordered(model, objective, batches):
        taken = capture(model, objective, batch, layers)
        total += float(count.sum())
        columns = [_backward(taken, list(layers), taken.logits, s, True) for s in seeds]
        for i, name in enumerate(layers):
            for items in taken.chunks(name, max(1, len(columns))):
                if columns:
                    found = (
                        taken.matrices(name, [c[i] for c in columns], items)
                        .flatten(2)
                        .flatten(0, 1)
                    )
                    # Columns beyond an item's own rank are zero.
                    vectors[name].append(found[found.abs().amax(1) > 0])
    positions = float(all_sum(torch.tensor(total, dtype=torch.float64)))
    for name, layer in layers.items():
        mine = (
            torch.cat(vectors[name])
            if vectors[name]
            else torch.zeros(0, layer.numel, dtype=_wide(layer.weight))
        )
        del vectors[name]
        spectra[name], pairs[name] = _from_columns(gather(mine), positions, k)


def _from_columns(v: Float[Tensor, "m n"], total: float, k: int) -> tuple[Tensor, EigenPairs]:
    """Eigenvalues of ``VᵀV / total`` by the smaller of the two Gram matrices."""
    m, n = v.shape
    if m >= n:
        values, basis = torch.linalg.eigh((v.t() @ v).double() / total)
        vectors = basis.to(v.dtype)
    elif m == 0:
        values, vectors = torch.zeros(0, dtype=torch.float64), torch.zeros(n, 0, dtype=v.dtype)
    else:
        values, basis = torch.linalg.eigh((v @ v.t()).double() / total)
        top = basis[:, -k:].to(v.dtype)
        vectors = v.t() @ top
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(
            torch.finfo(v.dtype).tiny
        )
    values = values.clamp_min(0)
    largest = values[-k:].flip(0)
    if m >= n:
        smallest = values[:k]
        ends = torch.cat([vectors[:, -k:].flip(1), vectors[:, :k]], 1)
    else:  # the null space: any vector orthogonal to the columns; none is computed
        smallest = torch.zeros(min(k, n - m), dtype=torch.float64)
        ends = torch.cat(
            [vectors.flip(1), torch.full((n, len(smallest)), torch.nan, dtype=v.dtype)], 1
        )
    found = torch.cat([largest, smallest])
    rounding = torch.finfo(v.dtype).eps * float(values[-1]) * 10 if len(values) else 0.0
    bound = torch.full((len(found),), rounding, dtype=torch.float64)
    pairs = EigenPairs(
        values=found, vectors=ends, residuals=bound, errors=bound, num_products=0, converged=True
    )
    return values.flip(0), pairs


# -------------------------------------------------------------------------------------------- K-FAC


def kfac(
    model: nn.Module,
    objective: Objective,
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
    factors, _ = _factors(model, objective, batches, layers, seed)
    return BlockDiagonal(
        {
            n: Kronecker(
                g, a, _space(layers[n]), measure=objective.measure, transposed=layers[n].transposed
            )
            for n, (g, a) in factors.items()
        }
    )


def ekfac(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
) -> BlockDiagonal:
    """K-FAC's eigenbasis with fitted eigenvalues ``S_ij = Σᵦ (Q_Gᵀ Gᵦᵀ Xᵦ Q_A)²_ij / positions``:
    the closest matrix to the Fisher with that eigenbasis, with the Fisher's trace for the labels
    drawn. Cost: as `kfac`, twice, plus the eigendecompositions."""
    factors, total = _factors(model, objective, batches, layers, seed)
    bases = {n: (torch.linalg.eigh(g)[1], torch.linalg.eigh(a)[1]) for n, (g, a) in factors.items()}
    scales = {
        n: torch.zeros(layers[n].shape, dtype=g.dtype, device=g.device)
        for n, (g, _) in factors.items()
    }
    for taken, gradients in _sampled(model, objective, batches, layers, seed):
        for name, g in zip(layers, gradients, strict=True):
            qg, qa = bases[name]
            for items in taken.chunks(name):
                matrices = taken.matrices(name, [g], items)[:, 0]
                scales[name] += (qg.t() @ matrices @ qa).square().sum(0)
    blocks: dict[str, Operator] = {
        n: Ekfac(
            *bases[n],
            all_sum(scales[n]) / total,
            _space(layers[n]),
            measure=objective.measure,
            transposed=layers[n].transposed,
        )
        for n in layers
    }
    return BlockDiagonal(blocks)


def _space(layer: Layer) -> ParamSpace:
    return ParamSpace(shapes={f"{layer.name}.weight": tuple(layer.weight.shape)})


def _sampled(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    seed: int,
) -> Iterator[tuple[Capture, list[Tensor]]]:
    for number, batch in my_share(list(enumerate(batches))):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        taken = capture(model, objective, batch, layers)
        with torch.enable_grad():
            loss = sampled_losses(objective.positions(taken.logits, batch), generator).sum()
            yield taken, _backward(taken, list(layers), loss, None, False)


def _factors(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    seed: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    for name, layer in layers.items():
        if layer.groups != 1 or layer.kind in ("embedding", "experts"):
            raise ValueError(
                f"layer {name}: a grouped convolution, an embedding or experts have no Kronecker "
                "factors"
            )
    a: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    rows: dict[str, float] = dict.fromkeys(layers, 0.0)
    total = torch.zeros((), dtype=torch.float64)
    for number, batch in my_share(list(enumerate(batches))):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        taken = capture(model, objective, batch, layers)
        with torch.enable_grad():
            positions = objective.positions(taken.logits, batch)
            total += len(positions.item)
            loss = sampled_losses(positions, generator).sum()
            gradients = _backward(taken, list(layers), loss, None, False)
        for name, gradient in zip(layers, gradients, strict=True):
            for items in taken.chunks(name):
                x = taken.rows(name, items).flatten(0, 2).to(gradient.dtype)
                d = taken.gradients(name, gradient, items).flatten(0, 2)
                a[name] = a.get(name, 0) + x.t() @ x
                g[name] = g.get(name, 0) + d.t() @ d
                rows[name] += len(x)
    positions_all = float(all_sum(total))
    factors = {}
    for name in layers:
        places = float(all_sum(torch.tensor(rows[name], dtype=torch.float64)))
        factors[name] = all_sum(g[name]) / positions_all, all_sum(a[name]) / places
    return factors, positions_all


__all__ = [
    "GaussNewton",
    "Moments",
    "Structure",
    "capture",
    "ekfac",
    "exact_gauss_newton",
    "fisher_moments",
    "kfac",
    "structure",
]
