"""Matrix-free curvature of a model's mean loss: products with the Hessian, the generalised
Gauss–Newton matrix, the true Fisher and the empirical Fisher, for all parameters or any of them.

The graph of a first backward pass is kept and differentiated again for every product, so that a
Hessian product costs two gradients (Pearlmutter 1994) and a Gauss–Newton product about one and a
half (Schraudolph 2002). Of ``retain`` mini-batches the graph stays in memory; those of further ones
are built anew for each product (one gradient more). Under ``torchrun`` every process takes its
share of the mini-batches and the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvprune.curvature.operators import Operator, ParamSpace
from curvprune.distributed import all_sum, my_share, rank, world
from curvprune.model import Batch, Objective, evaluating, sampled_losses


def first_items(batch: Batch, count: int) -> Batch:
    """The first items of a batch."""
    if isinstance(batch, Mapping):
        return {k: v[:count] if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[0][:count], batch[1][:count]


@contextmanager
def double_backward(model: nn.Module) -> Iterator[None]:
    """Fused attention has no double backward, nor have transformers' grouped products of experts
    one for several vectors or in float64: takes the math path and the loop over experts, and gives
    the user's settings back."""
    experts = [
        m.config for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "config")
    ]
    name = "_experts_implementation_internal"  # the public name would set nested configs as well
    before = [(config, getattr(config, name)) for config in experts if hasattr(config, name)]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, implementation in reversed(before):
            setattr(config, name, implementation)


def check_deterministic(model: nn.Module, objective: Objective, batch: Batch) -> None:
    """Two forward passes of one item must agree. Raises ``ValueError`` naming the module that makes
    them differ."""
    item = first_items(batch, 1)

    def outputs() -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and name:
                    seen.setdefault(name, output.detach().clone())

            return hook

        leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
        handles = [m.register_forward_hook(see(n)) for n, m in leaves]
        try:
            with torch.no_grad(), evaluating(model):
                return objective.logits(model, item), seen
        finally:
            for handle in handles:
                handle.remove()

    (first, ours), (second, theirs) = outputs(), outputs()
    if _close(first, second):
        return
    names = [n for n in ours if n in theirs and not _close(ours[n], theirs[n])]
    where = (
        f"module {names[0]!r} is the first that differs"
        if names
        else "no module by itself, so a function between"
    )
    raise ValueError(
        f"{type(model).__name__} gives two different outputs for the same item in evaluation "
        f"mode ({where}): curvature of a random function means nothing; switch it off "
        "(functional dropout needs training=self.training)"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True
    )


class _Forward(nn.Module):
    """The model as a function of its parameters, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.logits(self.model, batch)


@dataclass(slots=True)
class _Graph:
    """One mini-batch: the parameters as leaves of their own, and the retained graph on top of
    them."""

    leaves: list[Tensor]
    count: int
    outputs: Tensor
    gradients: list[Tensor | None]
    seed: Tensor | None
    middle: Callable[[Tensor], Tensor] | None


class _Source:
    """Model, data and parameters that an operator and its restrictions share, and the graphs kept
    of them."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Sequence[Batch],
        names: Sequence[str],
        retain: int,
    ) -> None:
        self.model, self.objective, self.names, self.retain = model, objective, list(names), retain
        self.batches = my_share(batches)
        self.kept: dict[int, _Graph] = {}
        check_deterministic(model, objective, batches[0])

    def leaves(self) -> dict[str, Tensor]:
        """Aliases of the parameters: they share memory and version counter, and leave the model's
        own flags alone."""
        own = dict(self.model.named_parameters())
        return {n: own[n].detach().requires_grad_() for n in self.names}

    def logits(self, leaves: Mapping[str, Tensor], batch: Batch) -> Tensor:
        function = _Forward(self.model, self.objective)
        # Everything else is passed detached: its own requires_grad must not grow the graph.
        rest = {n: p.detach() for n, p in self.model.named_parameters() if n not in leaves}
        inputs = {f"model.{n}": p for n, p in (*leaves.items(), *rest.items())}
        with evaluating(self.model), torch.enable_grad(), double_backward(self.model):
            return torch.func.functional_call(function, inputs, (batch,))

    def graphs(self, build: Callable[[int, Batch], _Graph]) -> Iterator[_Graph]:
        for i, batch in enumerate(self.batches):
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
    """

    def __init__(self, source: _Source, space: ParamSpace, *, matrix: str, psd: bool) -> None:
        own = dict(source.model.named_parameters())
        wide = (
            torch.float64
            if any(own[n].dtype == torch.float64 for n in source.names)
            else torch.float32
        )
        device = own[source.names[0]].device
        super().__init__(
            space, measure=source.objective.measure, psd=psd, dtype=wide, device=device
        )
        self.source, self.matrix = source, matrix
        self._index = [source.names.index(n) for n in space.shapes]

    def _build(self, number: int, batch: Batch) -> _Graph:
        raise NotImplementedError

    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        raise NotImplementedError

    def _restrict(self, space: ParamSpace) -> Operator:
        """Backward passes are pruned to the parameters asked for, on the graph that is already
        there."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        MatrixFree.__init__(part, self.source, space, matrix=self.matrix, psd=self.psd)
        return part

    def _matmat(self, v: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        own = dict(self.source.model.named_parameters())
        columns: list[Tensor | None] = [None] * v.shape[1]
        for graph in self.source.graphs(self._build):
            count += graph.count
            for j in range(v.shape[1]):
                parts = [p.to(own[n].dtype) for n, p in self.space.split(v[:, j]).items()]
                try:
                    products = self._product(graph, parts)
                except RuntimeError as error:
                    raise _explained(error) from error
                # Vectors as long as the model are moved as seldom as possible: with one mini-batch,
                # once.
                flat = torch.cat(
                    [
                        torch.zeros_like(x).reshape(-1)
                        if y is None
                        else y.reshape(-1).to(self.dtype)
                        for x, y in zip(parts, products, strict=True)
                    ]
                ).to(self.dtype)
                known = columns[j]
                columns[j] = flat if known is None else known.add_(flat)
        positions = _some(count)
        sums = [
            all_sum(torch.zeros_like(v[:, j]) if c is None else c) for j, c in enumerate(columns)
        ]
        means = [total.div_(positions) for total in sums]
        return means[0].unsqueeze(1) if len(means) == 1 else torch.stack(means, 1)


def _some(count: Tensor) -> float:
    """Positions of all processes together."""
    if not (total := float(all_sum(count))):
        raise ValueError("the data has no position that counts (all labels ignored or padding)")
    return total


def _explained(error: RuntimeError) -> RuntimeError:
    text = str(error)
    if "derivative for" in text and "not implemented" in text:
        return RuntimeError(
            f"an operation of the model cannot be differentiated twice ({text.splitlines()[0]}); "
            "second-order products need another implementation of it, e.g. "
            "attn_implementation='eager'"
        )
    if "modified by an inplace operation" in text:
        return RuntimeError(
            "the model's parameters were changed after this operator was built: build a new one "
            "for the new parameters"
        )
    return error


class _Hessian(MatrixFree):
    def _build(self, number: int, batch: Batch) -> _Graph:
        leaves = self.source.leaves()
        loss, count = self.source.objective.loss_of(self.source.logits(leaves, batch), batch)
        inputs = list(leaves.values())
        if not loss.requires_grad:
            raise ValueError(
                f"{', '.join(leaves)}: not on the way to the loss; leave these parameters out"
            )
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        return _Graph(
            leaves=inputs,
            count=count,
            outputs=loss,
            gradients=list(gradients),
            seed=None,
            middle=None,
        )

    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        chosen = [(graph.gradients[i], x) for i, x in zip(self._index, v, strict=True)]
        # A gradient without a graph is constant: linear parameters of a linear loss have no
        # curvature.
        active = [(g, x) for g, x in chosen if g is not None and g.requires_grad]
        if not active:
            return [None] * len(v)
        return list(
            torch.autograd.grad(
                [g for g, _ in active],
                [graph.leaves[i] for i in self._index],
                [x for _, x in active],
                retain_graph=True,
                allow_unused=True,
            )
        )


class _GaussNewton(MatrixFree):
    """``Σ Jᵀ M J`` with J the Jacobian of the outputs that ``outputs`` names and M their
    curvature."""

    outputs: str
    labels: int
    seed: int

    def _build(self, number: int, batch: Batch) -> _Graph:
        leaves = self.source.leaves()
        inputs = list(leaves.values())
        logits = self.source.logits(leaves, batch)
        z, middle, count = self._outputs(logits, number, batch)
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

    def _outputs(
        self, logits: Tensor, number: int, batch: Batch
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], int]:
        objective = self.source.objective
        if self.outputs == "logits":
            z = logits.detach().requires_grad_()
            with torch.enable_grad():
                loss, count = objective.loss_of(z, batch)
                slope = torch.autograd.grad(loss, z, create_graph=True)[0]
            return logits, lambda u: torch.autograd.grad(slope, z, u, retain_graph=True)[0], count
        with torch.enable_grad():
            if self.outputs == "losses":
                losses, count = objective.item_losses(logits, batch)
                return losses, lambda u: u, count
            positions = objective.positions(logits, batch)
            # One stream per mini-batch of the whole data: a graph that is built again draws the
            # same labels.
            place = number * world() + rank()
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
            drawn = [sampled_losses(positions, generator) for _ in range(self.labels)]
            sums = [x.new_zeros(positions.items).index_add(0, positions.item, x) for x in drawn]
        return torch.stack(sums), lambda u: u / self.labels, len(positions.item)

    def _product(self, graph: _Graph, v: list[Tensor]) -> list[Tensor | None]:
        chosen = [(graph.gradients[i], x) for i, x in zip(self._index, v, strict=True)]
        active = [(g, x) for g, x in chosen if g is not None and g.requires_grad]
        if not active:
            return [None] * len(v)
        assert graph.seed is not None and graph.middle is not None
        outer = torch.autograd.grad(
            [g for g, _ in active],
            graph.seed,
            [x for _, x in active],
            retain_graph=True,
            allow_unused=True,
        )[0]
        if outer is None:
            return [None] * len(v)
        inputs = [graph.leaves[i] for i in self._index]
        middle = graph.middle(outer)
        return list(
            torch.autograd.grad(graph.outputs, inputs, middle, retain_graph=True, allow_unused=True)
        )


def _source(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    parameters: str | Sequence[str],
    retain: int,
) -> tuple[_Source, ParamSpace]:
    batches = list(batches)
    if not batches:
        raise ValueError("no data: pass at least one batch")
    globs = [parameters] if isinstance(parameters, str) else list(parameters)
    own = dict(model.named_parameters())
    if not own:
        raise ValueError(f"{type(model).__name__} has no parameters")
    tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in tied):
            raise ValueError(
                f"parameters={glob!r} matches none of the {len(own)} parameters, e.g. "
                f"{next(iter(own))!r}"
            )
    wanted = {key for n, key in tied.items() if any(fnmatchcase(n, g) for g in globs)}
    names = [n for n, p in own.items() if id(p) in wanted]
    if wrong := [n for n in names if not own[n].is_floating_point()]:
        raise ValueError(
            f"parameter {wrong[0]} has type {own[wrong[0]].dtype}: only floating-point ones have "
            "curvature"
        )
    source = _Source(model, objective, batches, names, retain)
    return source, ParamSpace(shapes={n: tuple(own[n].shape) for n in names})


def hessian(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    parameters: str | Sequence[str] = "*",
    retain: int = 1,
) -> MatrixFree:
    """The Hessian of the mean loss over the data, in evaluation mode.

    Shared parameters count once, unused ones have zero rows. Half-precision models are multiplied
    in their own type and added up in float32.

    Args:
        batches: mini-batches; the mean is over all positions that count, whatever the batches'
            sizes.
        parameters: globs over ``model.named_parameters()``.
        retain: mini-batches whose graph stays in memory between products.

    Cost of a product: two gradients (three for a mini-batch beyond ``retain``); memory: about twice
    a gradient's activations per retained mini-batch.

    Raises:
        ValueError: no data, a glob without a match, a model that is not deterministic (naming the
            module).
        RuntimeError: an operation without a second derivative, or parameters changed since, from a
            product.
    """
    source, space = _source(model, batches, objective, parameters, retain)
    return _Hessian(source, space, matrix="Hessian", psd=False)


def gauss_newton(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    parameters: str | Sequence[str] = "*",
    retain: int = 1,
) -> MatrixFree:
    """The generalised Gauss–Newton matrix ``mean Jᵀ (∂²loss/∂logits²) J``: the Hessian without the
    curvature of the network itself. For the softmax losses here it equals the true Fisher matrix.
    Arguments as for `hessian`."""
    source, space = _source(model, batches, objective, parameters, retain)
    operator = _GaussNewton(source, space, matrix="generalised Gauss-Newton", psd=True)
    operator.outputs = "logits"
    return operator


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    labels: int = 1,
    seed: int = 0,
    parameters: str | Sequence[str] = "*",
    retain: int = 1,
) -> MatrixFree:
    """The true Fisher matrix estimated from labels drawn from the model: ``Σₙ mean_s gₙₛ gₙₛᵀ / Σₙ
    Tₙ`` with ``gₙₛ`` the gradient of item n's summed ``−log p(ŷ)``. Unbiased; its exact value is
    `gauss_newton`. Arguments as there."""
    source, space = _source(model, batches, objective, parameters, retain)
    operator = _GaussNewton(
        source, space, matrix=f"Fisher ({labels} sampled label(s) per position)", psd=True
    )
    operator.outputs, operator.labels, operator.seed = "samples", labels, seed
    return operator


def empirical_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    parameters: str | Sequence[str] = "*",
    retain: int = 1,
) -> MatrixFree:
    """``Σₙ gₙ gₙᵀ / Σₙ Tₙ`` with ``gₙ`` the gradient of item n's summed loss on the data's own
    labels: not the Fisher matrix (Kunstner et al. 2019), and for sequences not the per-token one.
    Arguments as for `hessian`."""
    source, space = _source(model, batches, objective, parameters, retain)
    operator = _GaussNewton(source, space, matrix="empirical Fisher", psd=True)
    operator.outputs = "losses"
    return operator


@dataclass(frozen=True, kw_only=True, slots=True)
class LossAndGradient:
    """The mean loss over the data, and the norm of its gradient over the parameters of an
    operator."""

    loss: float
    gradient_norm: float


def loss_and_gradient(operator: MatrixFree) -> LossAndGradient:
    """Cost: one gradient over the data."""
    source = operator.source
    total = torch.zeros(operator.space.dim, dtype=operator.dtype, device=operator.device)
    loss = torch.zeros((), dtype=torch.float64, device=operator.device)
    count = torch.zeros_like(loss)
    for batch in source.batches:
        leaves = source.leaves()
        value, seen = source.objective.loss_of(source.logits(leaves, batch), batch)
        wanted = [leaves[n] for n in operator.space.shapes]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        loss += value.detach()
        count += seen
        for name, g in zip(operator.space.shapes, gradients, strict=True):
            if g is not None:
                total[operator.space.slices[name]] += g.reshape(-1).to(operator.dtype)
    positions = _some(count)
    norm = float(torch.linalg.vector_norm(all_sum(total))) / positions
    return LossAndGradient(loss=float(all_sum(loss)) / positions, gradient_norm=norm)
