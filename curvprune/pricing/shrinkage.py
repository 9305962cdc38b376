"""Prices and pairs of layers, less the noise of few items and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature import FisherPass

ENOUGH = 8  # layers whose ratios of the two prices say how much ratios vary
QUARTILES = 1.349  # between the quartiles of a normal distribution, in standard deviations
ROUNDS = 5  # m and the limits depend on each other; five rounds settle them


def shrunk(
    measured: FisherPass, changed: Mapping[str, list[str]]
) -> dict[tuple[str, str], tuple[Float[Tensor, " items"], float]]:
    """Items' contributions to the price of every (layer, option), and the standard error that is
    not theirs.

    The price along δ, x, is unbiased but has few degrees of freedom: one for each item and draw.
    The price of the diagonal, d, is biased, but a mean over many entries. Over the layers of an
    option the ratios x/d scatter around a common m by their own noise (known from the items) and by
    a spread τ that is left; so, like James and Stein,

        price  =  x + u (m d − x),        u = noise² / (τ² + noise²),

    with a standard error of the items' part together with u τ d. No price moves by more than the
    noise: a layer unlike all others keeps what was measured (Efron and Morris 1972, "limited
    translation"). m is such that the sum over the layers stays that of x, and it counts in the
    errors. Options of fewer than `ENOUGH` layers keep x.
    """
    layers_of: dict[str, list[str]] = {}
    for layer, keys in changed.items():
        for key in keys:
            layers_of.setdefault(key, []).append(layer)

    priced: dict[tuple[str, str], tuple[Tensor, float]] = {}
    for key, layers in layers_of.items():
        column = {layer: changed[layer].index(key) for layer in layers}
        along = torch.stack([measured.squares(layer)[:, column[layer]] for layer in layers])
        diagonal = torch.stack([measured.diagonals[layer][:, column[layer]] for layer in layers])
        x, d = along.sum(1), diagonal.sum(1)
        sums, model = along, torch.zeros_like(x)
        some = (d > 0) & (x > 0)
        if len(measured.count) > 1 and int(some.sum()) >= ENOUGH:
            sums = along.clone()
            sums[some], model[some] = _towards(along[some], diagonal[some])
        model = model / float(measured.count.sum())
        for i, layer in enumerate(layers):
            priced[layer, key] = sums[i], float(model[i])
    return priced


def _towards(
    along: Float[Tensor, "layers items"], diagonal: Float[Tensor, "layers items"]
) -> tuple[Float[Tensor, "layers items"], Float[Tensor, " layers"]]:
    """The items' sums of one option shrunk, and u τ d."""
    # 1. How far the ratios x/d are off by the items alone: noise², relative to m.
    x, d, n = along.sum(1), diagonal.sum(1), along.shape[1]
    ratio = x / d
    residual = along - ratio[:, None] * diagonal
    noise = n / (n - 1) * float((residual.square().sum(1) / x.square()).mean())
    noise = max(noise, 1e-12)  # exact prices have none

    # 2. The spread τ that is left, from the quartiles, and how far each layer moves towards m: no
    #    further than its noise.
    low, m, high = ratio.quantile(ratio.new_tensor([0.25, 0.5, 0.75])).tolist()
    for _ in range(ROUNDS):
        spread = max(0.0, ((high - low) / QUARTILES / m) ** 2 - noise) ** 0.5
        limit = noise**0.5 * m * d / (m * d - x).abs()
        u = limit.clamp(max=noise / (spread**2 + noise))
        m = float((u * x).sum() / (u * d).sum())

    # 3. Move, with what an item says about m, which is a ratio of sums itself.
    slope = (u[:, None] * (along - m * diagonal)).sum(0) / (u * d).sum()
    sums = along + u[:, None] * (m * diagonal - along + d[:, None] * slope)
    return sums, u * spread * m * d


def kept_share(along: Float[Tensor, "items labels rows"], layers: Sequence[str]) -> float:
    """The share of the pairs' correlations r that is not the noise of few draws: ``1 − Σ noise² / Σ
    r²`` over all pairs of different layers, 0 if that is negative. All pairs are shrunk by it
    alike."""
    scale = along.square().mean((0, 1)).sqrt()
    some = scale > 0
    draws = (along / scale)[:, :, some].double()
    names = [n for n, ok in zip(layers, some.tolist(), strict=True) if ok]
    items, labels = draws.shape[:2]
    if items < 2 or len(set(names)) < 2:
        return 0.0
    index = torch.tensor([names.index(n) for n in names])
    apart = index[:, None] != index[None]
    # Draws are independent given the item; items that differ in scale make some pairs' squares
    # larger.
    products = torch.einsum("nsi,nsj->ij", draws, draws) / (items * labels)
    squares = torch.einsum("nsi,nsj->ij", draws.square(), draws.square()) / (items * labels)
    noise = (squares - products.square()) / (items * labels - 1)
    return max(0.0, 1 - float(noise[apart].sum() / products.square()[apart].sum()))
