"""Curvature of a model's loss: `analyze`, and the matrices as operators."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import nn

from curvprune import curvature
from curvprune.curvature import (
    QUANTITIES,
    Analysis,
    AnalysisSettings,
    CurvatureComparison,
    Draws,
    KfacSettings,
    KroneckerFactored,
    analyze_curvature,
    compare,
    kronecker_factored,
    layers_with_norms,
)
from curvprune.files import StageLog
from curvprune.model import (
    Batch,
    Layer,
    Loss,
    LossLike,
    Split,
    Splits,
    as_batch,
    find_layers,
    make_loss,
    named_loss,
    takes_models,
    to_device,
)
from curvprune.run import (
    Data,
)


@named_loss
@takes_models("model")
def analyze(
    model: nn.Module,
    data: Data,
    *,
    matrix: str = "hessian",
    quantities: Sequence[str] = QUANTITIES,
    loss: LossLike = "auto",
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    rtol: float = 0.05,
    max_products: int = 32,
    labels: int = 1,
    which: Literal["BE", "LM", "LA", "SA"] = "BE",
    vector_bytes: int = 4 << 30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """Curvature of the loss, per layer and for the whole model, labelled with the matrix it is of.

    Args:
        data: batches are kept as they are; each is one mini-batch of every pass.
        matrix: ``"hessian"``, ``"ggn"`` (generalised Gauss–Newton; for likelihoods in canonical
            form the true Fisher), ``"fisher"`` (from labels drawn from the model) or
            ``"empirical-fisher"``; the last two give trace and diagonal.
        loss: a name, a `Loss` or a loss module of torch. ``"auto"``: told from the model's class,
            its config and the labels.
        quantities: some of ``"trace"``, ``"diagonal"``, ``"eigenvalues"`` (of each layer) and
            ``"density"`` (spectrum of the whole model, with the diagnosis), ``"layer-densities"``
            (spectrum of each layer; 90 products each).
        layers, exclude: names or globs of layers; what ``exclude`` matches is left out.
        rtol: relative standard error asked of every probed trace.
        max_products: most products for one layer's trace, and for one eigenvalue problem or trace
            of the whole model; results that needed more say so in ``converged``.
        labels: draws per position for the Fisher.
        vector_bytes: memory for vectors: layers are probed together in groups whose vectors fit,
            and the whole model's spectrum is left out, with a note, if eight Lanczos vectors do
            not.
        which: ends of each layer's spectrum: ``"BE"`` both, ``"LM"`` the largest in magnitude,
            ``"LA"`` the largest, ``"SA"`` the smallest. Exact blocks give both all the same.

    Exact without probes: Gauss–Newton blocks where an item has one prediction of up to 129 classes,
    and Hessian blocks of layers whose path to the loss is piecewise linear (ReLU, pooling,
    BatchNorm in evaluation mode); of an output layer (lm_head, not tied) trace and diagonal for any
    number of positions and classes.

    Errors of probes are about these items. The whole model's λ_max, λ_min, trace and gradient also
    have errors over items, from at least 32 parts of the data where there are as many items (see
    `Diagnosis` for what is concluded from them).

    Cost: exact blocks about 0.8 gradients per class; a joint probe two gradients for all layers, a
    restricted one about 0.7 for one layer; Fisher about 1.2 gradients per label. The whole
    model's spectrum takes 200 products, its ends and trace up to ``3 · max_products``; up to 1,024
    parameters one product a parameter gives all eigenvalues. Memory: the graph of one mini-batch,
    twice; eight vectors of a group of layers; for ``"density"`` up to 100 vectors of the model.

    Raises ``ValueError`` for a glob that matches no layer, a loss that cannot be told, an
    unknown matrix or quantity, a model that is not deterministic (naming the module). Layers that
    are not on the way to the loss have zeros, and a note names them.
    """
    batches = _batches(data)
    if not batches:
        raise ValueError("analyze: the data is empty; pass at least one batch")
    if device is not None:
        model = copy.deepcopy(model).to(device)
    home = next(model.parameters()).device
    batches = [to_device(batch, home) for batch in batches]
    meant = make_loss(loss, model, batches[0])
    asked = AnalysisSettings(
        matrix=matrix,
        quantities=tuple(quantities),
        rtol=rtol,
        max_products=max_products,
        labels=labels,
        seed=seed,
        which=which,
        vector_bytes=vector_bytes,
    )
    found = _layers_of(model, layers, exclude)
    with StageLog(show=progress).steps() as advance:
        return analyze_curvature(model, meant, batches, found, asked, advance=advance)


def _layers_of(
    model: nn.Module, layers: str | Sequence[str], exclude: str | Sequence[str]
) -> dict[str, Layer]:
    """The layers asked for; none where all are, and the model has none of a known kind."""
    if not layers:
        raise ValueError("layers is empty: expected names or globs, such as 'model.layers.*'")
    try:
        return find_layers(model, layers, exclude=exclude)
    except ValueError:
        if exclude or layers not in ("*", ["*"], ("*",)):
            raise
        return {}


def _batches(data: Data) -> list[Batch]:
    """The batches to analyse: of splits the calibration items."""
    if isinstance(data, Splits):
        return list(data.calibrate.items)
    if isinstance(data, Split):
        return list(data.items)
    return [as_batch(batch) for batch in data]


@takes_models("a", "b")
def compare_curvature(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    matrix: Literal["hessian", "ggn"] = "hessian",
    max_products: int = 64,
    seed: int = 0,
) -> CurvatureComparison:
    """Curvature of two models on the same items: λ_max, λ_min, trace, and shares of the spectrum
    below, within and above a threshold that both have in common.

    Every quantity has an error about these items and one over items; a difference has the error of
    the items' own differences, so that what both models share cancels. For the ends that is the
    spread of ``vᵀH_i v`` along each model's eigenvector, and what the fit of v adds; for the trace
    that of Hutchinson's probes, the same for both; for shares a jackknife over five folds.

    >>> import torch, curvprune as cp
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    >>> a, b = make(), make()
    >>> data = [(torch.randn(64, 4), torch.randint(0, 3, (64,)))]
    >>> found = cp.compare_curvature(a, b, data)
    >>> found["trace"].difference.value == found["trace"].b.value - found["trace"].a.value
    True

    Args:
        a, b: two checkpoints of one architecture, or two models of any.
        data: batches are kept as they are; of splits the calibration items.
        matrix: ``"hessian"`` or ``"ggn"`` (generalised Gauss–Newton).
        max_products: for each eigenvalue problem, and probes of the trace.

    Returns:
        A record with ``text``, ``to_dict()`` and ``plot()``.

    Cost: for each model about ``3 · max_products + 200`` products for the ends, the trace and the
    density, and 600 for the errors of shares; up to 1,024 parameters all eigenvalues are computed,
    at two products each. Memory: up to 100 vectors of the model.

    Raises:
        ValueError: empty data, a loss that cannot be told or differs between the models, weights
            that are not finite, a model that is not deterministic, vectors that do not fit.
    """
    if matrix not in ("hessian", "ggn"):
        raise ValueError(f"compare_curvature: matrix={matrix!r}; expected 'hessian' or 'ggn'")
    if max_products < 8:
        raise ValueError(
            f"compare_curvature: max_products={max_products}; expected at least 8, better 64"
        )
    batches = _batches(data)
    if not batches:
        raise ValueError("compare_curvature: the data is empty; pass at least one batch")
    home = next(a.parameters()).device
    batches = [to_device(batch, home) for batch in batches]
    losses = []
    for name, model in (("a", a), ("b", b)):
        for parameter, value in model.named_parameters():
            if value.device != home:
                raise ValueError(
                    f"compare_curvature: {parameter} of model {name} is on {value.device}, the "
                    f"first of model a on {home}; move both to one device"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"compare_curvature: {parameter} of model {name} holds NaN or infinite values; "
                    "compare a checkpoint from before it diverged"
                )
        losses.append(make_loss(loss, model, batches[0]))
    first, second = losses
    if first.measure != second.measure:
        raise ValueError(
            f"compare_curvature: the loss of a is in {first.measure}, that of b in "
            f"{second.measure}; pass loss=... for both"
        )
    return compare(
        (a, b),
        (first, second),
        batches,
        matrix=matrix,
        max_products=max_products,
        generator=Draws(seed=seed).generator,
    )


@named_loss
@takes_models("model", lasting=True)
def hessian(
    model: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The Hessian of the mean loss as an operator; see `curvprune.curvature.products.hessian` for
    the arguments."""
    return _operator(curvature.hessian, model, data, loss, arguments)


@named_loss
@takes_models("model", lasting=True)
def gauss_newton(
    model: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The generalised Gauss–Newton matrix as an operator; see
    `curvprune.curvature.products.gauss_newton`."""
    return _operator(curvature.gauss_newton, model, data, loss, arguments)


@named_loss
@takes_models("model", lasting=True)
def fisher(
    model: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The sampled true Fisher as an operator; see `curvprune.curvature.products.fisher`."""
    return _operator(curvature.fisher, model, data, loss, arguments)


@named_loss
@takes_models("model", lasting=True)
def empirical_fisher(
    model: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The empirical Fisher as an operator; see `curvprune.curvature.products.empirical_fisher`."""
    return _operator(curvature.empirical_fisher, model, data, loss, arguments)


def _operator(build: Any, model: nn.Module, data: Data, loss: LossLike, arguments: Any) -> Any:
    home = next(model.parameters()).device
    batches = [to_device(batch, home) for batch in _batches(data)]
    if not batches:
        raise ValueError("the data is empty; pass at least one batch")
    return build(model, batches, make_loss(loss, model, batches[0]), **arguments)


@named_loss
@takes_models("model", lasting=True)
def kfac(
    model: nn.Module,
    data: Data,
    *,
    loss: LossLike = "auto",
    layers: str | Sequence[str] = "*",
    **settings: Any,
) -> KroneckerFactored:
    """K-FAC or EKFAC: an approximation of the curvature of every layer that can be stored, solved
    and inverted in closed form.

    Of a layer's weight with its bias, ``G ⊗ A`` with A the second moment of its inputs (and 1) and
    G that of the gradients at its outputs. Norms' scales have their whole block (its diagonal
    beyond 1,024 parameters), embeddings a diagonal A, each group of a convolution factors of its
    own.

    Args:
        data: batches are kept as they are; each is one mini-batch.
        loss: a name, a `Loss` or a loss module of torch.
        layers: names or globs of layers and norms. A layer without factors is left out, with the
            reason in ``left_out``, unless it is named without a wildcard.
        fisher: what is approximated. ``"mc"``, unless given: the Fisher, from ``labels`` draws per
            position. ``"type-2"``: the generalised Gauss–Newton matrix, from the columns of a root
            of the loss's Hessian at the outputs. ``"empirical"``: the empirical Fisher.
            ``"forward-only"``: G = I, no backward pass.
        kfac_approx: rows of one item (tokens, patches) as items of their own (``"expand"``, unless
            given), or by their mean input and summed gradient (``"reduce"``).
        eigenvalues: EKFAC: eigenvalues fitted to the items' gradients, in the factors' eigenbasis.
            ``"forward-only"`` keeps those of the factors, which are these already.
        bias: ``True``, unless given, together with the weight; ``"separate"`` a block of its own;
            ``False`` left out.
        labels, seed: of the draws; 1 and 0 unless given.

    Returns:
        A `KroneckerFactored` operator: products, ``diagonal()``, ``trace()``, ``restrict(names)``,
        ``damped(λ).solve(v)`` and ``inverse(λ)``.

    Exact, equal to the block of the matrix itself, for deep linear networks with squared error,
    where rows of an item do not mix (``"expand"``) or are averaged (``"reduce"``); for one item
    with one row also with other losses.

    Cost: a forward pass and, for each mini-batch, ``labels`` backward passes; one for
    ``"empirical"``, one for each output of a position for ``"type-2"``; twice that for EKFAC.
    Memory: ``in² + out²`` for each layer.

    No factors have: stacked experts, an embedding that is tied to the output layer, a layer that is
    never called or not on the way to the loss, whose weight is used outside of its own call, or
    that does not see a row for each item (a table of positions).

    Raises ``ValueError`` for empty data, a glob without a match, an unknown setting, a layer
    without factors that was named, and if no layer has any.

    Source: Martens & Grosse 2015; George et al. 2018 (EKFAC); Eschenhagen et al. 2023 (expand,
    reduce); Benzing 2022 (forward-only).

    Example:
        >>> import torch, curvprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).double()
        >>> x, y = torch.randn(16, 4).double(), torch.randn(16, 3).double()
        >>> K = cp.kfac(model, [(x, y)], loss="regression", fisher="type-2")
        >>> names = ["1.weight", "1.bias"]
        >>> G = cp.gauss_newton(model, [(x, y)], loss="regression", parameters=names)
        >>> bool(torch.allclose(K.restrict(names).to_dense(), G.to_dense()))
        True
    """
    known = [field.name for field in fields(KfacSettings)]
    if unknown := sorted(settings.keys() - set(known)):
        raise TypeError(f"kfac: unknown argument {unknown[0]!r}; expected {', '.join(known)}")
    asked = KfacSettings(**settings)
    found = layers_with_norms(model, layers)
    optional = found.keys() - ({layers} if isinstance(layers, str) else set(layers))

    def build(model: nn.Module, batches: list[Batch], meant: Loss) -> KroneckerFactored:
        return kronecker_factored(model, meant, batches, found, asked, optional=optional)

    return _operator(build, model, data, loss, {})
