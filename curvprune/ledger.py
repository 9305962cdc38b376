"""The ledger: every (layer, option) with its bytes on disk and its predicted loss increase in nats, with standard
errors.

The price of a change δ of one layer is ``½ δᵀ F δ`` per position, F the layer's Fisher matrix with labels sampled
from the model, estimated along δ itself (see `curvprune.curvature.fisher`). A plan costs the sum of its layers'
prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from curvprune.curvature.estimators import Estimate
from curvprune.curvature.fisher import FisherPass, ratio_estimate
from curvprune.work import Work

CURVATURE = "Fisher along the change, labels sampled from the model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One option of one layer. ``price`` ± ``stderr`` in the ledger's unit."""

    layer: str
    option: str
    bytes: int
    price: float
    stderr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Rows in the order of layers and options, with the items' own contributions behind them.

    Attributes:
        sums: contribution of each item to each row, in nats times positions, ``(items, rows)``.
        count: positions of each item, ``(items,)``.
        work: weights and multiply-adds of each layer, for limits on size and speed.
    """

    rows: tuple[Row, ...]
    sums: Float[np.ndarray, "items rows"]
    count: Float[np.ndarray, " items"]
    unit: str
    labels: int
    curvature: str = CURVATURE
    work: Mapping[str, Work] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return len(self.count)

    def layer_rows(self, layer: str) -> dict[str, Row]:
        """Option key → row of one layer. Raises ``KeyError`` naming a layer that is not in the ledger."""
        rows = {r.option: r for r in self.rows if r.layer == layer}
        if not rows:
            raise KeyError(f"{layer!r} is not in the ledger; it has {sorted({r.layer for r in self.rows})[:5]} …")
        return rows

    def predict(self, choices: Mapping[str, Any]) -> Estimate:
        """Predicted loss increase of a plan: layer → option (or its key). Layers left out count as kept.

        The standard error accounts for the items that all layers share. Raises ``KeyError`` for an unknown pair.
        """
        index = {(r.layer, r.option): i for i, r in enumerate(self.rows)}
        columns = []
        for layer, option in choices.items():
            key = option if isinstance(option, str) else option.key
            if (layer, key) not in index:
                if key == "keep":
                    continue
                raise KeyError(f"layer {layer}: option {key!r} was not priced; it has {list(self.layer_rows(layer))}")
            columns.append(index[layer, key])
        total = torch.from_numpy(self.sums[:, columns].sum(1))
        return ratio_estimate(total, torch.from_numpy(self.count))

    def to_dict(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "curvature": self.curvature,
            "num_items": self.num_items,
            "labels_per_item": self.labels,
            "rows": [
                {"layer": r.layer, "option": r.option, "bytes": r.bytes, "price": r.price, "stderr": _finite(r.stderr)}
                for r in self.rows
            ],
            "work": {layer: work.to_dict() for layer, work in self.work.items()},
            "count": self.count.tolist(),
            "sums": self.sums.tolist(),
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Ledger:
        rows = tuple(
            Row(**{**r, "stderr": float("inf") if r["stderr"] is None else r["stderr"]}) for r in record["rows"]
        )
        count = np.array(record["count"], dtype=np.float64)
        return Ledger(
            rows=rows,
            sums=np.array(record["sums"], dtype=np.float64).reshape(len(count), len(rows)),
            count=count,
            unit=record["unit"],
            labels=record["labels_per_item"],
            curvature=record["curvature"],
            work={layer: Work(**work) for layer, work in record.get("work", {}).items()},
        )


def build_ledger(
    measured: FisherPass, options: Mapping[str, Mapping[str, int]], *, changed: Mapping[str, list[str]], unit: str
) -> Ledger:
    """Rows from a Fisher pass.

    Args:
        options: layer → option key → bytes on disk.
        changed: layer → the option keys whose changes were priced, in the order of the pass; others (``keep``) cost 0.
    """
    rows, columns = [], []
    for layer, keys in options.items():
        for key, size in keys.items():
            if key in changed[layer]:
                sums = measured.squares[layer][:, changed[layer].index(key)]
                estimate = ratio_estimate(sums, measured.count)
                rows.append(Row(layer=layer, option=key, bytes=size, price=estimate.value, stderr=estimate.stderr))
                columns.append(sums.numpy())
            else:
                rows.append(Row(layer=layer, option=key, bytes=size, price=0.0, stderr=0.0))
                columns.append(np.zeros(len(measured.count)))
    return Ledger(
        rows=tuple(rows),
        sums=np.stack(columns, axis=1),
        count=measured.count.numpy(),
        unit=unit,
        labels=measured.labels,
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
