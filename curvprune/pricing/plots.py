"""A ledger as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvprune.compat import import_pyplot

if TYPE_CHECKING:
    from curvprune.pricing.ledger import Row

FLOOR = 1e-12  # prices below it, as of what is kept, have no colour


def plot_prices(rows: Sequence[Row], measure: str) -> Any:
    """The price of every option of every layer, on a logarithmic scale of colours."""
    # 1. Layers down, options across; NaN where a layer is not offered an option.
    layers = list(dict.fromkeys(row.layer for row in rows))
    options = list(dict.fromkeys(row.option for row in rows))
    prices = np.full((len(layers), len(options)), np.nan)
    for row in rows:
        if row.price > FLOOR:
            prices[layers.index(row.layer), options.index(row.option)] = row.price
    if not np.isfinite(prices).any():
        raise ValueError("plot: no option in this ledger has a price above zero")

    # 2. The figure, as high as its layers ask for.
    pyplot = import_pyplot()
    size = 3 + 0.6 * len(options), min(2 + 0.25 * len(layers), 30)
    figure, ax = pyplot.subplots(figsize=size, layout="constrained")
    image = ax.imshow(prices, norm="log", aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(options)), options, rotation=45, ha="right")
    ax.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=ax, label=f"price ({measure})")
    return figure
