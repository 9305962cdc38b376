"""The ledger: every (layer, option) with its bytes on disk and its predicted loss increase in nats,
with standard errors.

The price of a change δ of one layer is ``½ δᵀ F δ`` per position, F the layer's Fisher matrix,
estimated along δ itself (see `curvprune.curvature.sampled_fisher`) and then shrunk towards what the
diagonal of F says about δ (`_shrunk`). Prices that are too high for a quadratic model are measured
(`Ledger.with_measured`). A plan costs the sum of its layers' prices and a share of what pairs of
layers do to each other (`_kept`). Other matrices can take the Fisher's place (`CURVATURES`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature import Estimate, FisherPass, ratio_estimate
from curvprune.planning import Quadratic
from curvprune.pricing.operations import Work
from curvprune.pricing.other_curvatures import Forms

CURVATURES = {
    "fisher": "Fisher along the change, shrunk towards its diagonal",
    "diagonal": "diagonal of the Fisher",
    "kfac": "Kronecker-factored Fisher",
    "hessian": "Hessian along the change, on the data's own labels",
    "input": "squared error of the layer's outputs",
}
ENOUGH = 8  # layers whose ratios of the two prices say how much ratios vary
MEASURED_ROWS, MEASURED_TOGETHER = 64, 4  # prices measured: at most, and at a time
AGREED = 0.15  # ResNet-20's 12 highest prices of 2 bits and 75 % are off by more than that
QUARTILES = 1.349  # between the quartiles of a normal distribution, in standard deviations


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One option of one layer. ``price`` ± ``stderr`` in the ledger's unit; ``model_stderr`` is the
    part of the latter that does not come from the items but from how well the diagonal stands for
    the whole block. ``measured``: the price is the divergence that the change was seen to cause
    alone, and no quadratic form."""

    layer: str
    option: str
    bytes: int
    price: float
    stderr: float
    model_stderr: float = 0.0
    measured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Rows in the order of layers and options, with the items' own contributions behind them.

    Attributes:
        sums: contribution of each item to each row, in nats times positions, ``(items, rows)``.
        count: positions of each item, ``(items,)``.
        work: weights and multiply-adds of each layer, for limits on size and speed.
        along: ``⟨g, δ⟩`` of every draw, ``(items, labels, rows)``; ``None`` if layers only add up.
        kept: the share of the sums over pairs of layers that is no noise (`_kept`).
    """

    rows: tuple[Row, ...]
    sums: Float[np.ndarray, "items rows"]
    count: Float[np.ndarray, " items"]
    measure: str
    labels: int
    curvature: str = CURVATURES["fisher"]
    along: Float[np.ndarray, "items labels rows"] | None = None
    kept: float = 0.0
    work: Mapping[str, Work] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return len(self.count)

    def layer_rows(self, layer: str) -> dict[str, Row]:
        """Option key → row of one layer. Raises ``KeyError`` naming a layer that is not in the
        ledger."""
        rows = {r.option: r for r in self.rows if r.layer == layer}
        if not rows:
            raise KeyError(
                f"{layer!r} is not in the ledger; it has {sorted({r.layer for r in self.rows})[:5]} "
                "…"
            )
        return rows

    def predict(self, choices: Mapping[str, Any]) -> Estimate:
        """Predicted loss increase of a plan: layer → option (or its key). Layers left out count as
        kept.

        The sum of the prices and, for what layers do to each other, the share ``kept`` of ``Σ δᵢᵀ F
        δⱼ`` over pairs of layers. The standard error accounts for the items that all layers share.
        Raises ``KeyError`` for an unknown pair.
        """
        index = {(r.layer, r.option): i for i, r in enumerate(self.rows)}
        columns = []
        for layer, option in choices.items():
            key = option if isinstance(option, str) else option.key
            if (layer, key) not in index:
                if key == "keep":
                    continue
                raise KeyError(
                    f"layer {layer}: option {key!r} was not priced; it has "
                    f"{list(self.layer_rows(layer))}"
                )
            columns.append(index[layer, key])
        total = self.sums[:, columns].sum(1)
        if self.along is not None and self.kept and len(columns) > 1:
            along = self.along[:, :, columns]
            pairs = self.kept * 0.5 * (along.sum(2) ** 2 - (along**2).sum(2)).mean(1)
            # Prices were shrunk and pairs were not, so together they could fall below zero: pairs
            # save 90 % at most.
            if pairs.sum() < (least := -0.9 * total.sum()):
                pairs *= least / pairs.sum()
            total = total + pairs
        estimate = ratio_estimate(torch.from_numpy(total), torch.from_numpy(self.count))
        model = math.hypot(*(self.rows[i].model_stderr for i in columns))
        return replace(estimate, stderr=math.hypot(estimate.stderr, model))

    def quadratic(self) -> Quadratic | None:
        """Prices with the pairs of layers, to plan by: a plan's value is what `predict` says;
        ``None`` where no pairs are kept."""
        if self.along is None or not self.kept:
            return None
        draws = self.along.reshape(-1, len(self.rows))
        # Means over an item's labels, sums over items, per position: as in `predict`.
        share = self.kept / (self.along.shape[1] * self.count.sum())
        return Quadratic(rows=self.rows, draws=draws * math.sqrt(share))

    def with_measured(self, sums: Mapping[tuple[str, str], Float[np.ndarray, " items"]]) -> Ledger:
        """The ledger with measured prices for some (layer, option): nats of each item, summed over
        its positions. What such a row does together with other layers' grows with the root of its
        price. Raises ``KeyError`` for an unknown pair."""
        index = {(r.layer, r.option): i for i, r in enumerate(self.rows)}
        rows, columns, along = (
            list(self.rows),
            self.sums.copy(),
            None if self.along is None else self.along.copy(),
        )
        for pair, values in sums.items():
            i = index[pair]
            estimate = ratio_estimate(torch.from_numpy(values), torch.from_numpy(self.count))
            if along is not None and rows[i].price > 0:
                along[:, :, i] *= math.sqrt(max(0.0, estimate.value) / rows[i].price)
            columns[:, i] = values
            price, stderr = estimate.value, estimate.stderr
            rows[i] = replace(rows[i], price=price, stderr=stderr, model_stderr=0.0, measured=True)
        return replace(self, rows=tuple(rows), sums=columns, along=along)

    def to_dict(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "curvature": self.curvature,
            "num_items": self.num_items,
            "labels_per_item": self.labels,
            "rows": [
                {
                    "layer": r.layer,
                    "option": r.option,
                    "bytes": r.bytes,
                    "price": r.price,
                    "stderr": _finite(r.stderr),
                    "model_stderr": r.model_stderr,
                    "measured": r.measured,
                }
                for r in self.rows
            ],
            "work": {layer: work.to_dict() for layer, work in self.work.items()},
            "count": self.count.tolist(),
            "sums": self.sums.tolist(),
            "along": None if self.along is None else self.along.tolist(),
            "kept": self.kept,
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Ledger:
        rows = tuple(
            Row(**{**r, "stderr": float("inf") if r["stderr"] is None else r["stderr"]})
            for r in record["rows"]
        )
        count = np.array(record["count"], dtype=np.float64)
        return Ledger(
            rows=rows,
            sums=np.array(record["sums"], dtype=np.float64).reshape(len(count), len(rows)),
            count=count,
            measure=record["measure"],
            labels=record["labels_per_item"],
            curvature=record["curvature"],
            work={layer: Work(**work) for layer, work in record.get("work", {}).items()},
            along=None
            if record.get("along") is None
            else np.array(record["along"]).reshape(len(count), -1, len(rows)),
            kept=record.get("kept", 0.0),
        )


def build_ledger(
    measured: FisherPass | Forms,
    options: Mapping[str, Mapping[str, int]],
    *,
    changed: Mapping[str, list[str]],
    measure: str,
    curvature: str = "fisher",
) -> Ledger:
    """Rows from a pricing pass.

    Args:
        measured: `Forms` for the curvatures of `curvprune.pricing.other_curvatures`, else a `FisherPass`.
        options: layer → option key → bytes on disk.
        changed: layer → the option keys whose changes were priced, in the order of the pass; others
            (``keep``) cost 0.
        curvature: a key of `CURVATURES`. Prices of ``"input"`` have no unit of loss.
    """
    if isinstance(measured, Forms) or curvature == "diagonal":
        of = measured.sums if isinstance(measured, Forms) else measured.diagonals
        priced = {
            (n, key): (of[n][:, k], 0.0)
            for n, keys in changed.items()
            for k, key in enumerate(keys)
        }
    else:
        priced = _shrunk(measured, changed)
    rows, columns = [], []
    for layer, keys in options.items():
        for key, size in keys.items():
            sums, model = priced.get((layer, key), (torch.zeros_like(measured.count), 0.0))
            estimate = ratio_estimate(sums, measured.count)
            stderr = math.hypot(estimate.stderr, model) if (layer, key) in priced else 0.0
            rows.append(
                Row(
                    layer=layer,
                    option=key,
                    bytes=size,
                    price=estimate.value,
                    stderr=stderr,
                    model_stderr=model,
                )
            )
            columns.append(sums.numpy())
    along, kept = None, 0.0
    if isinstance(measured, FisherPass) and curvature == "fisher":
        draws, kept = _pairs(measured, rows, changed)
        # Four digits are far below the noise, and keep the record small.
        along = np.vectorize(lambda v: float(f"{v:.4g}"), otypes=[float])(draws.numpy())
    return Ledger(
        rows=tuple(rows),
        sums=np.stack(columns, axis=1),
        count=measured.count.numpy(),
        measure="output error per row, no unit of loss" if curvature == "input" else measure,
        labels=measured.labels if isinstance(measured, FisherPass) else 1,
        curvature=CURVATURES[curvature],
        along=along,
        kept=kept,
    )


def measure_highest(
    ledger: Ledger,
    measure: Callable[[Sequence[Row], int], Mapping[tuple[str, str], Float[np.ndarray, " items"]]],
    *,
    least: float,
) -> tuple[Ledger, str]:
    """The ledger with measured prices in place of the highest, and a note if there are too many of
    those.

    From the highest downwards, `MEASURED_TOGETHER` at a time, until the quadratic prices of those
    agree with what was measured to `AGREED` and their standard errors: the smaller a change, the
    better the quadratic model holds. No price below ``least`` is measured, and no more than
    `MEASURED_ROWS` are.

    Args:
        measure: given rows, and how many were measured before, the divergence that each causes
            alone, summed over each item's positions.
    """
    high = sorted((row for row in ledger.rows if row.price > least), key=lambda row: -row.price)
    most = min(len(high), MEASURED_ROWS)
    ratio = 1.0
    for start in range(0, most, MEASURED_TOGETHER):
        block = high[start : min(most, start + MEASURED_TOGETHER)]
        found = measure(block, start)
        ledger = ledger.with_measured(found)
        seen = float(sum(sums.sum() for sums in found.values()) / ledger.count.sum())
        price = sum(row.price for row in block)
        noise = math.hypot(*(row.stderr for row in block if math.isfinite(row.stderr)))
        if abs(seen - price) <= AGREED * seen + noise:
            return ledger, ""
        ratio = seen / price
    if len(high) == most:
        return ledger, ""
    return ledger, (
        f"the {most} highest prices were measured, and the last of them are {ratio:.2g} times "
        "what the quadratic model says: prices below may be wrong as well"
    )


def _pairs(
    measured: FisherPass, rows: list[Row], changed: Mapping[str, list[str]]
) -> tuple[Float[Tensor, "items labels rows"], float]:
    zero = torch.zeros(len(measured.count), measured.labels, dtype=torch.float64)
    along = [
        measured.along[r.layer][:, :, changed[r.layer].index(r.option)]
        if r.option in changed[r.layer]
        else zero
        for r in rows
    ]
    draws = torch.stack(along, 2)
    return draws, _kept(draws, [r.layer for r in rows])


def _shrunk(
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
    pairs: dict[str, list[str]] = {}
    for layer, keys in changed.items():
        for key in keys:
            pairs.setdefault(key, []).append(layer)
    priced: dict[tuple[str, str], tuple[Tensor, float]] = {}
    n = len(measured.count)
    for key, layers in pairs.items():
        along = torch.stack(
            [measured.squares(layer)[:, changed[layer].index(key)] for layer in layers]
        )
        diagonal = torch.stack(
            [measured.diagonals[layer][:, changed[layer].index(key)] for layer in layers]
        )
        x, d = along.sum(1), diagonal.sum(1)
        sums, model = along, torch.zeros_like(x)
        some = (d > 0) & (x > 0)
        if n > 1 and int(some.sum()) >= ENOUGH:
            sums, model = along.clone(), model.clone()
            sums[some], model[some] = _towards(along[some], diagonal[some])
        model = model / float(measured.count.sum())
        for i, layer in enumerate(layers):
            priced[layer, key] = sums[i], float(model[i])
    return priced


def _kept(along: Float[Tensor, "items labels rows"], layers: list[str]) -> float:
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


def _towards(
    along: Float[Tensor, "layers items"], diagonal: Float[Tensor, "layers items"]
) -> tuple[Float[Tensor, "layers items"], Float[Tensor, " layers"]]:
    """The items' sums of one option shrunk, and u τ d."""
    x, d, n = along.sum(1), diagonal.sum(1), along.shape[1]
    ratio = x / d
    residual = along - ratio[:, None] * diagonal
    noise = (
        n / (n - 1) * float((residual.square().sum(1) / x.square()).mean())
    )  # squared, relative to m
    noise = max(noise, 1e-12)  # exact prices have none
    low, m, high = ratio.quantile(ratio.new_tensor([0.25, 0.5, 0.75])).tolist()
    for _ in range(5):  # m and the limits depend on each other; five rounds settle them
        spread = max(0.0, ((high - low) / QUARTILES / m) ** 2 - noise) ** 0.5
        limit = noise**0.5 * m * d / (m * d - x).abs()
        u = limit.clamp(max=noise / (spread**2 + noise))
        m = float((u * x).sum() / (u * d).sum())
    # What an item says about m, which is a ratio of sums itself.
    slope = (u[:, None] * (along - m * diagonal)).sum(0) / (u * d).sum()
    sums = along + u[:, None] * (m * diagonal - along + d[:, None] * slope)
    return sums, u * spread * m * d


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
