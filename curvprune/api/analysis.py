"""Curvature of a model's loss: `analyze`, and the matrices as operators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from curvprune import curvature
from curvprune.curvature import QUANTITIES, Analysis, AnalysisSettings, analyze_curvature
from curvprune.files import StageLog
from curvprune.model import (
    Batch,
    LossLike,
    Split,
    Splits,
    as_batch,
    find_layers,
    make_loss,
    named_loss,
    to_device,
)
from curvprune.run import (
    Data,
)


@named_loss
def analyze(
    model: nn.Module,
    data: Data,
    *,
    matrix: str = "hessian",
    quantities: Sequence[str] = QUANTITIES,
    loss: LossLike = "auto",
    layers: str | Sequence[str] = "*",
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
        rtol: relative standard error asked of every probed trace.
        max_products: most products for one layer's trace, and for one eigenvalue problem; results
            that needed more say so in ``converged``.
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

    Cost: exact blocks about 0.8 gradients per class; a joint probe two gradients for all layers, a
    restricted one about 0.7 for one layer; Fisher about 1.2 gradients per label. Memory: the graph
    of one mini-batch, twice; eight vectors of a group of layers; for ``"density"`` up to 40 vectors
    of the model.

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
    found = find_layers(model, layers)
    if not found:
        raise ValueError("layers is empty: expected names or globs, such as 'model.layers.*'")
    with StageLog(show=progress).steps() as advance:
        return analyze_curvature(model, meant, batches, found, asked, advance=advance)


def _batches(data: Data) -> list[Batch]:
    """The batches to analyse: of splits the calibration items."""
    if isinstance(data, Splits):
        return list(data.calibrate.items)
    if isinstance(data, Split):
        return list(data.items)
    return [as_batch(batch) for batch in data]


@named_loss
def hessian(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The Hessian of the mean loss as an operator; see `curvprune.curvature.products.hessian` for
    the arguments."""
    return _operator(curvature.hessian, model, data, loss, arguments)


@named_loss
def gauss_newton(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The generalised Gauss–Newton matrix as an operator; see
    `curvprune.curvature.products.gauss_newton`."""
    return _operator(curvature.gauss_newton, model, data, loss, arguments)


@named_loss
def fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The sampled true Fisher as an operator; see `curvprune.curvature.products.fisher`."""
    return _operator(curvature.fisher, model, data, loss, arguments)


@named_loss
def empirical_fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: LossLike = "auto",
    **arguments: Any,
) -> Any:
    """The empirical Fisher as an operator; see `curvprune.curvature.products.empirical_fisher`."""
    return _operator(curvature.empirical_fisher, model, data, loss, arguments)


def _operator(
    build: Any, model: nn.Module, data: Iterable[Batch], loss: LossLike, arguments: Any
) -> Any:
    home = next(model.parameters()).device
    batches = [to_device(batch, home) for batch in _batches(data)]
    if not batches:
        raise ValueError("the data is empty; pass at least one batch")
    return build(model, batches, make_loss(loss, model, batches[0]), **arguments)
