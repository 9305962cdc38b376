"""The ledger: every (layer, option) with its bytes on disk and its predicted loss increase in nats,
with standard errors.

The price of a change δ of one layer is ``½ δᵀ F δ`` per position, F the layer's Fisher matrix,
estimated along δ itself (see `curvprune.curvature.FisherPass`) and then shrunk towards what the
diagonal of F says about δ (`curvprune.pricing.shrinkage`). Prices that are too high for a quadratic
model are measured (`Ledger.with_measured`). A plan costs the sum of its layers' prices and a share
of what pairs of layers do to each other. Other matrices can take the Fisher's place (`CURVATURES`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BeforeValidator
from torch import Tensor

from curvprune.curvature import Estimate, FisherPass, ratio_estimate
from curvprune.options import Option
from curvprune.planning import Quadratic
from curvprune.pricing.operations import LayerWork
from curvprune.pricing.other_curvatures import Forms
from curvprune.pricing.plots import plot_prices
from curvprune.pricing.shrinkage import kept_share, shrunk
from curvprune.schema import Json, decode, encode

CURVATURES = {
    "fisher": "Fisher along the change, shrunk towards its diagonal",
    "diagonal": "diagonal of the Fisher",
    "kfac": "Kronecker-factored Fisher",
    "empirical": "empirical Fisher, on the data's own labels, along the change, shrunk likewise",
    "hessian": "Hessian along the change, on the data's own labels",
    "input": "squared error of the layer's outputs",
}
# Prices measured: at most, and at a time. Sixteen cost as many forward passes an item, three times
# the pricing pass.
MEASURED_ROWS, MEASURED_TOGETHER = 16, 4
AGREED = 0.15  # ResNet-20's 12 highest prices of 2 bits and 75 % are off by more than that
Prices = Literal["shares", "quadratic"]
SAVED = 0.9  # at most this share of the prices' sum is what pairs of layers save


def _infinite_if_none(value: object) -> object:
    return math.inf if value is None else value


# Infinite, and ``null`` in the file, where there are too few items to tell.
_StandardError = Annotated[float, BeforeValidator(_infinite_if_none)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One option of one layer.

    Attributes:
        price: in the ledger's unit, ± ``stderr``.
        model_stderr: the part of ``stderr`` that does not come from the items but from how well the
            diagonal stands for the whole block.
        measured: the price is the divergence that the change was seen to cause alone, and no
            quadratic form.
    """

    layer: str
    option: str
    bytes: int
    price: float
    stderr: _StandardError
    model_stderr: float = 0.0
    measured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What prices that are shares of the loss rest on, per position: the passes that they are from.

    Attributes:
        plan: what was applied.
        shares: half the sum of all layers' shares, ± ``shares_stderr``.
        answers: half the slope along what layers did to make up for others; near 0 where that was
            at its best.
        divergence: from the uncompressed model, as measured, ± ``divergence_stderr``.
    """

    plan: str
    shares: float
    shares_stderr: _StandardError
    answers: float
    divergence: float
    divergence_stderr: _StandardError


@dataclass(frozen=True, kw_only=True, slots=True)
class _LedgerFile:
    """What ``ledger.json`` holds."""

    measure: str
    curvature: str
    num_items: int
    labels_per_item: int
    rows: tuple[Row, ...]
    count: list[float]
    sums: list[list[float]]
    work: dict[str, LayerWork] = field(default_factory=dict)
    along: list[list[list[float]]] | None = None
    kept: float = 0.0
    prices: Prices = "quadratic"
    audits: tuple[Audit, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Rows in the order of layers and options, with the items' own contributions behind them.

    Attributes:
        sums: contribution of each item to each row, in nats times positions, ``(items, rows)``.
        count: positions of each item, ``(items,)``.
        work: weights and multiply-adds of each layer, for limits on size and speed.
        along: ``⟨g, δ⟩`` of every draw, ``(items, labels, rows)``; ``None`` if layers only add up.
        kept: the share of the sums over pairs of layers that is no noise
            (`curvprune.pricing.shrinkage.kept_share`).
        prices: ``"quadratic"`` forms of a curvature, or ``"shares"`` of the loss
            (`curvprune.pricing.shares`).
        audits: the passes that shares are from.
    """

    rows: tuple[Row, ...]
    sums: Float[np.ndarray, "items rows"]
    count: Float[np.ndarray, " items"]
    measure: str
    labels: int
    curvature: str = CURVATURES["fisher"]
    along: Float[np.ndarray, "items labels rows"] | None = None
    kept: float = 0.0
    work: Mapping[str, LayerWork] = field(default_factory=dict)
    prices: Prices = "quadratic"
    audits: tuple[Audit, ...] = ()

    @property
    def num_items(self) -> int:
        return len(self.count)

    def layer_rows(self, layer: str) -> dict[str, Row]:
        """Option key → row of one layer. Raises ``KeyError`` naming a layer that is not in the
        ledger."""
        rows = {r.option: r for r in self.rows if r.layer == layer}
        if not rows:
            known = sorted({r.layer for r in self.rows})[:5]
            raise KeyError(f"{layer!r} is not in the ledger; it has {known} …")
        return rows

    def predict(self, choices: Mapping[str, str | Option]) -> Estimate:
        """Predicted loss increase of a plan: layer → option (or its key). Layers left out count as
        kept.

        The sum of the prices and, for what layers do to each other, the share ``kept`` of ``Σ δᵢᵀ F
        δⱼ`` over pairs of layers. The standard error accounts for the items that all layers share.
        Raises ``KeyError`` for an unknown pair.
        """
        # 1. Every layer by itself.
        columns = self._columns(choices)
        total = self.sums[:, columns].sum(1)

        # 2. Pairs of layers: the square of the sum of all changes, less the squares of each. Prices
        #    were shrunk and pairs were not, so together they could fall below zero.
        if self.along is not None and self.kept and len(columns) > 1:
            along = self.along[:, :, columns]
            pairs = self.kept * 0.5 * (along.sum(2) ** 2 - (along**2).sum(2)).mean(1)
            least = -SAVED * total.sum()
            if pairs.sum() < least:
                pairs *= least / pairs.sum()
            total = total + pairs

        # 3. Errors: those of the items, and those of the prices' models, which are independent.
        estimate = ratio_estimate(torch.from_numpy(total), torch.from_numpy(self.count))
        model = math.hypot(*(self.rows[i].model_stderr for i in columns))
        return replace(estimate, stderr=math.hypot(estimate.stderr, model))

    def _columns(self, choices: Mapping[str, str | Option]) -> list[int]:
        """Where the rows of a plan stand; a layer that is kept and was not priced has none."""
        index = {(r.layer, r.option): i for i, r in enumerate(self.rows)}
        columns = []
        for layer, option in choices.items():
            key = option if isinstance(option, str) else option.key
            if (layer, key) in index:
                columns.append(index[layer, key])
            elif key != "keep":
                raise KeyError(
                    f"layer {layer}: option {key!r} was not priced; it has "
                    f"{list(self.layer_rows(layer))}"
                )
        return columns

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
        rows = list(self.rows)
        columns = self.sums.copy()
        along = None if self.along is None else self.along.copy()
        for pair, values in sums.items():
            i = index[pair]
            estimate = ratio_estimate(torch.from_numpy(values), torch.from_numpy(self.count))
            # The change counts as longer by the root of how much more it costs.
            if along is not None and rows[i].price > 0:
                along[:, :, i] *= math.sqrt(max(0.0, estimate.value) / rows[i].price)
            columns[:, i] = values
            rows[i] = replace(
                rows[i],
                price=estimate.value,
                stderr=estimate.stderr,
                model_stderr=0.0,
                measured=True,
            )
        return replace(self, rows=tuple(rows), sums=columns, along=along)

    def plot(self) -> Any:
        """The price of every option of every layer, as a matplotlib figure. Raises ``ValueError``
        where nothing has a price, or without matplotlib."""
        return plot_prices(self.rows, self.measure)

    def to_dict(self) -> dict[str, Json]:
        """What ``ledger.json`` holds, as plain JSON values."""
        return {
            "measure": self.measure,
            "curvature": self.curvature,
            "num_items": self.num_items,
            "labels_per_item": self.labels,
            "rows": encode(self.rows, tuple[Row, ...]),
            "work": encode(dict(self.work), dict[str, LayerWork]),
            # Many numbers, all of them finite.
            "count": self.count.tolist(),
            "sums": self.sums.tolist(),
            "along": None if self.along is None else self.along.tolist(),
            "kept": self.kept,
            "prices": self.prices,
            "audits": encode(self.audits, tuple[Audit, ...]),
        }

    @staticmethod
    def from_dict(record: Json) -> Ledger:
        """The inverse of `to_dict`. Raises ``ValueError`` naming what does not fit."""
        file = decode(_LedgerFile, record, source="this ledger")
        items, rows = len(file.count), len(file.rows)
        along = None if file.along is None else np.array(file.along).reshape(items, -1, rows)
        return Ledger(
            rows=file.rows,
            sums=np.array(file.sums, dtype=np.float64).reshape(items, rows),
            count=np.array(file.count, dtype=np.float64),
            measure=file.measure,
            labels=file.labels_per_item,
            curvature=file.curvature,
            work=file.work,
            along=along,
            kept=file.kept,
            prices=file.prices,
            audits=file.audits,
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
        measured: `Forms` for curvatures other than the Fisher's, else a `FisherPass`.
        options: layer → option key → bytes on disk.
        changed: layer → the option keys whose changes were priced, in the order of the pass; others
            (``keep``) cost 0.
        curvature: a key of `CURVATURES`. Prices of ``"input"`` have no unit of loss.

    Layers that `Forms` leave out keep the options that change nothing. Raises ``ValueError`` for
    one that has none.
    """
    # 1. What every item adds to every price, and the standard error that is not the items'.
    if isinstance(measured, Forms):
        options, changed = _with_forms(measured, options, changed)
        priced = _as_measured(measured.sums, changed)
    elif curvature == "diagonal":
        priced = _as_measured(measured.diagonals, changed)
    else:
        priced = shrunk(measured, changed)

    # 2. A row for every option, priced or not.
    rows, columns = [], []
    for layer, sizes in options.items():
        for key, size in sizes.items():
            sums, model_stderr = priced.get((layer, key), (torch.zeros_like(measured.count), 0.0))
            estimate = ratio_estimate(sums, measured.count)
            stderr = 0.0
            if (layer, key) in priced:
                stderr = math.hypot(estimate.stderr, model_stderr)
            row = Row(
                layer=layer,
                option=key,
                bytes=size,
                price=estimate.value,
                stderr=stderr,
                model_stderr=model_stderr,
            )
            rows.append(row)
            columns.append(sums.numpy())

    # 3. What pairs of layers do to each other. Four digits are far below the noise, and keep the
    #    record small.
    along, kept = None, 0.0
    if isinstance(measured, FisherPass) and curvature == "fisher":
        draws = _draws(measured, rows, changed)
        kept = kept_share(draws, [row.layer for row in rows])
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


def _with_forms(
    forms: Forms,
    options: Mapping[str, Mapping[str, int]],
    changed: Mapping[str, list[str]],
) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """The options that have a price, and those of them that change something."""
    left = {layer: dict(sizes) for layer, sizes in options.items()}
    for layer, reason in forms.left_out.items():
        left[layer] = {k: size for k, size in left[layer].items() if k not in changed[layer]}
        if not left[layer]:
            raise ValueError(
                f"layer {layer}: {reason}, so none of its options has a price by this curvature; "
                "offer it 'keep', leave it out, or take curvature='fisher'"
            )
    return left, {layer: keys for layer, keys in changed.items() if layer not in forms.left_out}


def _as_measured(
    sums: Mapping[str, Float[Tensor, "items options"]], changed: Mapping[str, list[str]]
) -> dict[tuple[str, str], tuple[Float[Tensor, " items"], float]]:
    """Prices as the pass has them, with no error but the items'."""
    priced: dict[tuple[str, str], tuple[Tensor, float]] = {}
    for layer, keys in changed.items():
        for column, key in enumerate(keys):
            priced[layer, key] = sums[layer][:, column], 0.0
    return priced


def _draws(
    measured: FisherPass, rows: Sequence[Row], changed: Mapping[str, list[str]]
) -> Float[Tensor, "items labels rows"]:
    """``⟨g, δ⟩`` of every row; 0 for options that change nothing."""
    zero = torch.zeros(len(measured.count), measured.labels, dtype=torch.float64)
    along = []
    for row in rows:
        keys = changed[row.layer]
        if row.option in keys:
            along.append(measured.along[row.layer][:, :, keys.index(row.option)])
        else:
            along.append(zero)
    return torch.stack(along, 2)


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
    # Highest first: the smaller a price, the better the quadratic model holds.
    high = sorted((row for row in ledger.rows if row.price > least), key=lambda row: -row.price)
    most = min(len(high), MEASURED_ROWS)
    ratio = 1.0
    for start in range(0, most, MEASURED_TOGETHER):
        rows = high[start : min(most, start + MEASURED_TOGETHER)]
        found = measure(rows, start)
        ledger = ledger.with_measured(found)
        seen = float(sum(sums.sum() for sums in found.values()) / ledger.count.sum())
        price = sum(row.price for row in rows)
        noise = math.hypot(*(row.stderr for row in rows if math.isfinite(row.stderr)))
        if abs(seen - price) <= AGREED * seen + noise:
            return ledger, ""
        ratio = seen / price
    if len(high) == most:
        return ledger, ""
    return ledger, (
        f"the {most} highest prices were measured, and the last of them are {ratio:.2g} times "
        "what the quadratic model says: prices below may be wrong as well"
    )
