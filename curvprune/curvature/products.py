"""Matrix-free curvature of a model's mean loss: products with the Hessian, the generalised
Gauss–Newton matrix, the true Fisher and the empirical Fisher, for all parameters or any of them.

The graph of a first backward pass is kept and differentiated again for every product. So a Hessian
product costs two gradients (Pearlmutter 1994), a Gauss–Newton product about one and a half
(Schraudolph 2002). The graphs of ``retain`` mini-batches stay in memory; those of further ones are
built anew for each product (one gradient more). Under ``torchrun`` every process takes its share of
the mini-batches, and the sums are added up.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from curvprune.compat import full_float32
from curvprune.curvature.determinism import (
    MODES,
    buffers_of,
    check_deterministic,
    is_random,
    training,
)
from curvprune.curvature.differentiation import double_backward, why_not_twice
from curvprune.curvature.operators import Operator, ParamSpace
from curvprune.curvature.parameter_names import parameter_names
from curvprune.distributed import all_sum, my_share, rank, world
from curvprune.model import Batch, Loss, evaluating, items_in, one_item


class _Forward(nn.Module):
    """The model as a function of its parameters, for ``torch.func.functional_call``: to its outputs
    or to the whole ``(sum, count)`` of the loss."""

    def __init__(self, model: nn.Module, objective: Loss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, whole: bool) -> Any:
        if whole:
            return self.objective.loss(self.model, batch)
        return self.objective.outputs(self.model, batch)


@dataclass(slots=True)
class _Graph:
    """One mini-batch: the parameters as leaves of their own, and the retained graph on top of
    them.

    Attributes:
        count: positions of the mini-batch.
        outputs: what was differentiated: the loss, or the outputs z of a Gauss–Newton matrix.
        gradients: of ``outputs`` by each leaf; those of z are ``Jᵀ seed``, linear in ``seed``.
        middle: the outputs' own curvature M, by its product.
    """

    leaves: list[Tensor]
    count: float
    outputs: Tensor
    gradients: list[Tensor | None]
    seed: Tensor | None = None
    middle: Callable[[Tensor], Tensor] | None = None


class Over(TypedDict, total=False):
    """What the operators' data and parameters are, and how the model is run on them; see
    `hessian`."""

    parameters: str | Sequence[str]
    retain: int
    mode: str


class _Source:
    """Model, data and parameters that an operator and its restrictions share, and the graphs kept
    of them.

    Attributes:
        mode: ``"eval"`` or ``"train"``.
        seed: of what is random in training mode.
        stochastic: in training mode, the outputs depend on the seed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Loss,
        batches: Sequence[Batch],
        names: Sequence[str],
        *,
        retain: int,
        mode: str,
        seed: int,
    ) -> None:
        self.model, self.objective, self.names, self.retain = model, objective, list(names), retain
        self.mode, self.seed = mode, seed
        self.batches = my_share(batches)
        self.kept: dict[int, _Graph] = {}
        self.stochastic = False
        if mode == "train":
            self.stochastic = is_random(model, objective, batches[0])
        else:
            check_deterministic(model, objective, batches[0])

    def leaves(self) -> dict[str, Tensor]:
        """Aliases of the parameters: they share memory and version counter, and leave the model's
        own flags alone."""
        own = dict(self.model.named_parameters())
        return {n: own[n].detach().requires_grad_() for n in self.names}

    def outputs(self, leaves: Mapping[str, Tensor], number: int) -> Tensor:
        return self._call(leaves, number, whole=False)

    def loss(self, leaves: Mapping[str, Tensor], number: int) -> tuple[Tensor, float]:
        return self._call(leaves, number, whole=True)

    def _call(self, leaves: Mapping[str, Tensor], number: int, *, whole: bool) -> Any:
        """A forward pass over mini-batch ``number`` of this process."""
        function = _Forward(self.model, self.objective)
        # Everything else is passed detached: its own requires_grad must not grow the graph.
        rest = {n: p.detach() for n, p in self.model.named_parameters() if n not in leaves}
        inputs = {f"model.{n}": p for n, p in (*leaves.items(), *rest.items())}
        batch = self.batches[number]
        if self.mode == "train":
            inputs |= {f"model.{n}": b for n, b in buffers_of(self.model).items()}
        with self._running(number), torch.enable_grad(), double_backward(self.model):
            return torch.func.functional_call(function, inputs, (batch, whole))

    def _running(self, number: int) -> AbstractContextManager[Any]:
        """The model's mode. In training, a graph that is built again has the same masks."""
        if self.mode == "eval":
            return evaluating(self.model)
        return training(self.model, stream(self.seed, number))

    def graphs(self, build: Callable[[int, Batch], _Graph]) -> Iterator[_Graph]:
        for i, batch in enumerate(self.batches):
            # The first ``retain`` graphs are kept, the others freed once they have been used.
            if i in self.kept:
                yield self.kept[i]
                continue
            graph = build(i, batch)
            if len(self.kept) < self.retain:
                self.kept[i] = graph
            yield graph


class MatrixFree(Operator):
    """A curvature matrix of the mean loss, known by its products; see `hessian` and its siblings.

    Attributes:
        matrix: what it is the matrix of, for labels.
        mode: ``"eval"`` or ``"train"``, in which the model was run.
        stochastic: another seed gives another matrix: labels are drawn, or dropout is on. Products
            with one operator are all with the same matrix.
    """

    stochastic: bool = False

    def __init__(self, source: _Source, space: ParamSpace, *, matrix: str, psd: bool) -> None:
        own = dict(source.model.named_parameters())
        # Half-precision models are multiplied in their own type and added up in float32.
        double = any(own[n].dtype == torch.float64 for n in source.names)
        super().__init__(
            space,
            measure=source.objective.measure,
            psd=psd,
            dtype=torch.float64 if double else torch.float32,
            device=own[source.names[0]].device,
        )
        self.source, self.matrix, self.mode = source, matrix, source.mode
        self.stochastic = source.stochastic
        if self.mode == "train":
            # Whether a pass can be repeated is not checked here, so it is said.
            self.matrix += " in training mode"
        self._index = [source.names.index(n) for n in space.shapes]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, mode={self.mode!r}, stochastic={self.stochastic})"

    @abstractmethod
    def _build(self, number: int, batch: Batch) -> _Graph:
        """The graph of mini-batch ``number`` of this process."""

    @abstractmethod
    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        """The mini-batch's sum times v, a tensor for each parameter (None for zeros)."""

    def _restrict(self, space: ParamSpace) -> Operator:
        """Backward passes are pruned to the parameters asked for, on the graph that is already
        there."""
        part = copy.copy(self)
        part.space = space
        part._index = [self.source.names.index(n) for n in space.shapes]
        return part

    def _matmat(self, v: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        columns: list[Tensor | None] = [None] * v.shape[1]
        # 1. The sums over this process's mini-batches, a vector at a time.
        for graph in self.source.graphs(self._build):
            count += graph.count
            for j in range(v.shape[1]):
                product = self._flat_product(graph, v[:, j])
                known = columns[j]
                columns[j] = product if known is None else known.add_(product)

        # 2. Those of all processes, over all positions.
        positions = _positions(count)
        means = []
        for j, column in enumerate(columns):
            total = torch.zeros_like(v[:, j]) if column is None else column
            means.append(all_sum(total).div_(positions))
        # Vectors as long as the model are moved as seldom as possible: one is not stacked.
        return means[0].unsqueeze(1) if len(means) == 1 else torch.stack(means, 1)

    def _flat_product(self, graph: _Graph, v: Tensor) -> Tensor:
        # Each parameter is multiplied in its own type, and the result is widened once.
        own = dict(self.source.model.named_parameters())
        parts = [x.to(own[name].dtype) for name, x in self.space.split(v).items()]
        try:
            products = self._product(graph, parts)
        except RuntimeError as error:
            raise _explained(error, self.source) from error
        flat = []
        for part, product in zip(parts, products, strict=True):
            if product is None:
                flat.append(torch.zeros_like(part).reshape(-1))
            else:
                flat.append(product.reshape(-1).to(self.dtype))
        return torch.cat(flat).to(self.dtype)


def _positions(count: Tensor) -> float:
    """Positions of all processes together."""
    total = float(all_sum(count))
    if not total:
        raise ValueError("the data has no position that counts (all labels ignored or padding)")
    return total


def _explained(error: RuntimeError, source: _Source) -> Exception:
    if "modified by an inplace operation" in str(error):
        # The graphs kept share memory with the model, which autograd watches.
        return RuntimeError(
            "the model's parameters were changed after this operator was built: build a new one "
            "for the new parameters"
        )
    why = why_not_twice(error, source.model, source.objective, source.batches[0])
    return error if why is None else ValueError(why)


class _Hessian(MatrixFree):
    """``∂(gᵀv)/∂θ`` with the gradient g of the loss."""

    def _build(self, number: int, batch: Batch) -> _Graph:
        leaves = self.source.leaves()
        loss, count = self.source.loss(leaves, number)
        inputs = list(leaves.values())
        if not loss.requires_grad:  # none of them is on the way to the loss
            return _Graph(leaves=inputs, count=count, outputs=loss, gradients=[None] * len(inputs))
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        return _Graph(leaves=inputs, count=count, outputs=loss, gradients=list(gradients))

    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        gradients, vectors = _active(graph, self._index, v)
        if not gradients:
            return [None] * len(v)
        # Pearlmutter: the gradient of gᵀv.
        inputs = [graph.leaves[i] for i in self._index]
        return list(
            torch.autograd.grad(gradients, inputs, vectors, retain_graph=True, allow_unused=True)
        )


# (outputs z, the product with their curvature M, positions) of a mini-batch's model outputs; its
# number is the second argument.
_Curved = tuple[Tensor, Callable[[Tensor], Tensor], float]
_Outputs = Callable[[Loss, int, Tensor, Batch], _Curved]


class _GaussNewton(MatrixFree):
    """``Σ Jᵀ M J`` with J the Jacobian of some outputs of the model and M their curvature."""

    def __init__(
        self,
        source: _Source,
        space: ParamSpace,
        *,
        matrix: str,
        outputs: _Outputs,
        convex: bool = True,
    ) -> None:
        super().__init__(source, space, matrix=matrix, psd=convex)
        self._outputs = outputs

    def _build(self, number: int, batch: Batch) -> _Graph:
        leaves = self.source.leaves()
        inputs = list(leaves.values())
        outputs = self.source.outputs(leaves, number)
        z, middle, count = self._outputs(self.source.objective, number, outputs, batch)
        if not z.requires_grad:  # none of them is on the way to the loss
            return _Graph(leaves=inputs, count=count, outputs=z, gradients=[None] * len(inputs))
        # Jᵀ u as a function of u: differentiated by u once more, it gives J v.
        seed = torch.zeros_like(z).requires_grad_()
        gradients = torch.autograd.grad(z, inputs, seed, create_graph=True, allow_unused=True)
        return _Graph(
            leaves=inputs,
            count=count,
            outputs=z,
            gradients=list(gradients),
            seed=seed,
            middle=middle,
        )

    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        gradients, vectors = _active(graph, self._index, v)
        if not gradients:
            return [None] * len(v)
        assert graph.seed is not None and graph.middle is not None
        # 1. J v
        outer = torch.autograd.grad(
            gradients, graph.seed, vectors, retain_graph=True, allow_unused=True
        )[0]
        if outer is None:
            return [None] * len(v)
        # 2. M J v
        middle = graph.middle(outer)
        # 3. Jᵀ M J v
        inputs = [graph.leaves[i] for i in self._index]
        return list(
            torch.autograd.grad(graph.outputs, inputs, middle, retain_graph=True, allow_unused=True)
        )


def _active(
    graph: _Graph, index: Sequence[int], v: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients that depend on something, and their part of v.

    A gradient without a graph is constant: linear parameters of a linear loss have no curvature.
    """
    gradients, vectors = [], []
    for i, x in zip(index, v, strict=True):
        gradient = graph.gradients[i]
        if gradient is not None and gradient.requires_grad:
            gradients.append(gradient)
            vectors.append(x)
    return gradients, vectors


def _own(objective: Loss, number: int, outputs: Tensor, batch: Batch) -> _Curved:
    """z are the model's outputs, M the Hessian of the loss at them."""
    curvature = objective.hessian_at(outputs, batch)
    count = float(objective.counts(outputs.detach(), batch).sum())
    return outputs, curvature.product, count


def _losses(objective: Loss, number: int, outputs: Tensor, batch: Batch) -> _Curved:
    """z are the items' losses on the data's own labels, M the identity."""
    with torch.enable_grad():
        losses = objective.item_losses(outputs, batch)
    return losses, lambda u: u, float(objective.counts(outputs.detach(), batch).sum())


def _place_losses(objective: Loss, number: int, outputs: Tensor, batch: Batch) -> _Curved:
    """z are the losses of single places on the data's own labels, M the identity."""
    with torch.enable_grad():
        losses = objective.place_losses(outputs, batch)
    return losses, lambda u: u, float(objective.counts(outputs.detach(), batch).sum())


def stream(seed: int, number: int) -> int:
    """The seed of mini-batch ``number`` of this process, among those of the whole data."""
    place = number * world() + rank()
    return (seed * 1_000_003 + place) % 2**63


def _drawn_losses(labels: int, seed: int) -> _Outputs:
    """z are the items' losses on ``labels`` targets drawn from the model for each position, M the
    mean over the draws."""

    def outputs(objective: Loss, number: int, found: Tensor, batch: Batch) -> _Curved:
        # One stream per mini-batch of the whole data: a graph that is built again draws the same
        # labels.
        generator = torch.Generator().manual_seed(stream(seed, number))
        with torch.enable_grad():
            sums = [objective.scores(found, batch, generator) for _ in range(labels)]
        count = float(objective.counts(found.detach(), batch).sum())
        return torch.stack(sums), lambda u: u / labels, count

    return outputs


def _source(
    model: nn.Module, batches: Iterable[Batch], objective: Loss, *, seed: int, over: Over
) -> tuple[_Source, ParamSpace]:
    batches = list(batches)
    if not batches:
        raise ValueError("no data: pass at least one batch")
    own = dict(model.named_parameters())
    if not own:
        raise ValueError(f"{type(model).__name__} has no parameters")
    if unknown := over.keys() - Over.__annotations__.keys():
        raise TypeError(
            f"unknown argument {min(unknown)!r}; expected some of {', '.join(Over.__annotations__)}"
        )
    mode = over.get("mode", "eval")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected 'eval' or 'train'")
    names = parameter_names(model, over.get("parameters", "*"))
    source = _Source(
        model, objective, batches, names, retain=over.get("retain", 1), mode=mode, seed=seed
    )
    return source, ParamSpace(shapes={n: tuple(own[n].shape) for n in names})


def hessian(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Loss,
    *,
    seed: int = 0,
    **over: Unpack[Over],
) -> MatrixFree:
    """The Hessian of the mean loss over the data.

    Shared parameters count once, unused ones have zero rows. Half-precision models are multiplied
    in their own type and added up in float32.

    Args:
        batches: mini-batches; the mean is over all positions that count, whatever the batches'
            sizes.
        parameters: globs over ``model.named_parameters()``; ``"*"`` unless given.
        retain: mini-batches whose graph stays in memory between products; 1 unless given.
        mode: ``"eval"``, unless given, or ``"train"``: dropout is on, with one mask for each
            mini-batch that follows from ``seed``, and BatchNorm normalises by the mini-batch, so
            that the matrix depends on how items are batched. Running statistics, modes and the
            global generator come back as they were. The operator says whether it is
            ``stochastic``; whether the model is deterministic is not checked then.
        seed: of dropout.

    Cost of a product: two gradients (three for a mini-batch beyond ``retain``); memory: about twice
    a gradient's activations per retained mini-batch.

    Raises:
        ValueError: no data, a glob without a match, another mode, a model that is not deterministic
            in evaluation mode (naming the module); from a product, a function without a second
            derivative, by its name and its module's.
        RuntimeError: parameters changed since, from a product.
    """
    source, space = _source(model, batches, objective, seed=seed, over=over)
    return _Hessian(source, space, matrix="Hessian", psd=False)


def gauss_newton(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Loss,
    *,
    seed: int = 0,
    **over: Unpack[Over],
) -> MatrixFree:
    """The generalised Gauss–Newton matrix ``mean Jᵀ (∂²loss/∂outputs²) J``.

    It is the Hessian without the curvature of the network itself. For a likelihood in canonical
    form (softmax, independent sigmoids, normal errors, Poisson counts) it equals the true Fisher
    matrix. Arguments as for `hessian`.
    """
    source, space = _source(model, batches, objective, seed=seed, over=over)
    convex = objective.curvature == "closed form"
    return _GaussNewton(
        source, space, matrix="generalised Gauss-Newton", outputs=_own, convex=convex
    )


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Loss,
    *,
    labels: int = 1,
    seed: int = 0,
    **over: Unpack[Over],
) -> MatrixFree:
    """The true Fisher matrix, estimated from labels drawn from the model.

    ``Σₙ mean_s gₙₛ gₙₛᵀ / Σₙ Tₙ``, with ``gₙₛ`` the gradient of item n's summed ``−log p(ŷ)`` and
    Tₙ its positions. Unbiased; its exact value is `gauss_newton`. Arguments as for `hessian`;
    ``seed`` is also that of the labels.
    """
    source, space = _source(model, batches, objective, seed=seed, over=over)
    matrix = f"Fisher ({labels} sampled label(s) per position)"
    drawn = _GaussNewton(source, space, matrix=matrix, outputs=_drawn_losses(labels, seed))
    drawn.stochastic = True
    return drawn


def empirical_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Loss,
    *,
    per: str = "item",
    seed: int = 0,
    **over: Unpack[Over],
) -> MatrixFree:
    """The empirical Fisher matrix ``Σ g gᵀ / Σₙ Tₙ`` over the data's own labels.

    It is not the Fisher matrix (Kunstner et al. 2019). Other arguments as for `hessian`.

    Args:
        per: what has a gradient g of its own: each ``"item"``, with its summed loss over its Tₙ
            positions, or each ``"place"`` of it: a token or a pixel, with all its outputs.

    Raises ``ValueError`` for ``per="place"`` with a loss that is only known for whole items.
    """
    if per not in ("item", "place"):
        raise ValueError(f"empirical_fisher: per={per!r}; expected 'item' or 'place'")
    if objective.curvature == "none":
        # Of a batch such a loss may tell no more than the sum.
        batches = [one_item(b, i) for b in batches for i in range(items_in(b))]
    source, space = _source(model, batches, objective, seed=seed, over=over)
    matrix = "empirical Fisher" if per == "item" else "empirical Fisher of places"
    outputs = _losses if per == "item" else _place_losses
    return _GaussNewton(source, space, matrix=matrix, outputs=outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossAndGradient:
    """The mean loss over the data, its gradient over the parameters of an operator with its norm,
    and the positions that the mean is over."""

    loss: float
    gradient_norm: float
    gradient: Tensor
    positions: float


@full_float32()
def loss_and_gradient(operator: MatrixFree) -> LossAndGradient:
    """Cost: one gradient over the data."""
    source = operator.source
    total = torch.zeros(operator.space.dim, dtype=operator.dtype, device=operator.device)
    loss = torch.zeros((), dtype=torch.float64, device=operator.device)
    count = torch.zeros_like(loss)
    for number in range(len(source.batches)):
        leaves = source.leaves()
        value, seen = source.loss(leaves, number)
        wanted = [leaves[n] for n in operator.space.shapes]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        loss += value.detach()
        count += seen
        for name, g in zip(operator.space.shapes, gradients, strict=True):
            # An unused parameter has no gradient.
            if g is not None:
                total[operator.space.slices[name]] += g.reshape(-1).to(operator.dtype)
    positions = _positions(count)
    gradient = all_sum(total).div_(positions)
    return LossAndGradient(
        loss=float(all_sum(loss)) / positions,
        gradient_norm=float(torch.linalg.vector_norm(gradient)),
        gradient=gradient,
        positions=positions,
    )
