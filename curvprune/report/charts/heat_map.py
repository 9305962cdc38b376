"""The ledger as a heat map: layers by options, colour for the price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.report.charts.axes import Scale
from curvprune.report.charts.colours import dark, heat_colour
from curvprune.report.charts.svg import Box, element, line, rect, svg, words
from curvprune.report.figures import clean, plus_minus, short, sig

WIDTH, ROW, FOOT = 1120.0, 13.0, 44.0
STEPS = 60  # of the colour scale below the map


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """Prices of layers (rows) x options (columns): ``prices[layer, option] = (price, stderr)``;
    ``labels`` of the layers, ``chosen``: layer → the option that it got."""

    layers: Sequence[str]
    labels: Sequence[str]
    options: Sequence[str]
    prices: Mapping[tuple[str, str], tuple[float | None, float | None]]
    chosen: Mapping[str, str]
    measure: str

    def span(self) -> tuple[float, float] | None:
        """Smallest and largest positive price."""
        positive = [p for p, _ in self.prices.values() if p is not None and p > 0]
        return (min(positive), max(positive)) if positive else None

    def title(self, layer: str, option: str) -> Markup:
        """The tooltip of a cell."""
        text = f"{layer}, {option}: {plus_minus(*self.prices[layer, option])} {self.measure}"
        if self.chosen.get(layer) == option:
            text += ", chosen"
        return element("title", text)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Panels side by side, in pixels: how many, layers in each, width and gap of a panel; in a
    panel the width of the labels, the height of the head, the width of a cell."""

    panels: int
    per_panel: int
    width: float
    gap: float
    label: float
    head: float
    cell: float

    @classmethod
    def of(cls, table: HeatMap) -> _Layout:
        # 1. As many panels as leave cells wide enough to be told apart.
        columns, rows = len(table.options), len(table.layers)
        panels = 1
        if rows > 60 and columns <= 12:
            panels = 3
        elif rows > 24 and columns <= 22:
            panels = 2
        # 2. The slanted head of the last column reaches past it.
        overhang = 4.0 * len(clean(table.options[-1]))
        gap = min(80.0, max(26.0, overhang))
        width = (WIDTH - gap * panels) / panels
        # 3. Labels as wide as the longest, up to about half the panel.
        label = min(7 + 5.8 * max(len(text) for text in table.labels), 0.55 * width)
        return cls(
            panels=panels,
            per_panel=math.ceil(rows / panels),
            width=width,
            gap=gap,
            label=label,
            head=14 + 4.2 * max(len(clean(option)) for option in table.options),
            cell=min(44.0, (width - label) / columns),
        )

    def left(self, panel: int) -> float:
        return panel * (self.width + self.gap)

    def box(self, panel: int, row: int, column: int) -> Box:
        """The place of a cell."""
        x = self.left(panel) + self.label + column * self.cell
        return Box(x, self.head + row * ROW, self.cell, ROW)

    @property
    def bottom(self) -> float:
        return self.head + self.per_panel * ROW


def heat_map(table: HeatMap) -> Markup:
    """Prices as colours on a log scale, in as many panels side by side as stay readable. A dot
    marks a price below two standard errors, an outline the chosen option, grey a price of zero or
    less, a blank an option not offered."""
    layout, span = _Layout.of(table), table.span()
    parts = []
    for panel in range(layout.panels):
        parts += _heads(table, layout, panel)
        first = panel * layout.per_panel
        for row, layer in enumerate(table.layers[first : first + layout.per_panel]):
            parts.append(_label(layer, table.labels[first + row], layout, panel, row))
            for column, option in enumerate(table.options):
                if (layer, option) in table.prices:
                    box = layout.box(panel, row, column)
                    parts += _cell(table, layer, option, box, span)
    if span is not None:
        parts += _key(span, layout.bottom + 12, table.measure)
    says = "Price of every option in every layer, logarithmic colour scale"
    return svg(WIDTH, layout.bottom + FOOT, says, parts, class_="chart heat")


def _heads(table: HeatMap, layout: _Layout, panel: int) -> list[Markup]:
    """The options, slanted above their columns."""
    parts = []
    for column, option in enumerate(table.options):
        x = layout.left(panel) + layout.label + (column + 0.6) * layout.cell
        y = layout.head - 5
        turned = f"rotate(-45 {x:.1f} {y:.1f})"
        parts.append(element("text", option, x=x, y=y, class_="tick", transform=turned))
    return parts


def _label(layer: str, label: str, layout: _Layout, panel: int, row: int) -> Markup:
    """A layer's label beside its row, its whole name in the tooltip."""
    return element(
        "text",
        element("title", layer),
        label,
        x=layout.left(panel) + layout.label - 6,
        y=layout.head + row * ROW + 10,
        class_="row",
        text_anchor="end",
    )


def _cell(
    table: HeatMap, layer: str, option: str, box: Box, span: tuple[float, float] | None
) -> list[Markup]:
    """One price."""
    price, stderr = table.prices[layer, option]
    title, inner = table.title(layer, option), box.inside(0.5)
    parts = []
    # 1. Its colour; none for what cannot stand on a logarithmic scale.
    if price is None:
        parts.append(rect(inner, "cell none", title))
    elif price <= 0 or span is None:
        parts.append(rect(inner, "cell zero-price", title))
    else:
        fill = heat_colour(_share(price, span))
        parts.append(rect(inner, "cell", title, fill=fill))
        # 2. A dot where it could be noise.
        if stderr is not None and price < 2 * stderr:
            x, y = box.middle
            ink = "weak" if dark(fill) else "weak ink"
            parts.append(element("circle", cx=x, cy=y, r=1.6, class_=ink))
    # 3. An outline where it was chosen, light on dark, so that it shows on every colour.
    if table.chosen.get(layer) == option:
        parts.append(rect(box.inside(1.2), "chosen"))
        parts.append(rect(box, "chosen-rim"))
    return parts


def _share(price: float, span: tuple[float, float]) -> float:
    """Where a price lies between the smallest and the largest, in logarithms."""
    low, high = span
    return math.log(price / low) / math.log(high / low) if high > low else 0.5


def _key(span: tuple[float, float], y: float, measure: str) -> list[Markup]:
    """The colour scale with decade ticks, and the marks explained."""
    low, high = span
    left, length = 8.0, 300.0
    scale = Scale(
        kind="log", low=low, high=max(high, low * 1.000001), start=left, stop=left + length
    )
    parts = []
    # 1. The ramp, in steps that overlap a little so that no seam shows.
    step = length / STEPS
    for k in range(STEPS):
        box = Box(left + k * length / STEPS, y, step + 0.6, 9.0)
        parts.append(rect(box, None, fill=heat_colour(k / (STEPS - 1))))
    for tick in scale.ticks(about=4):
        parts.append(line(scale(tick), y + 9, scale(tick), y + 13, "axis"))
        parts.append(words(scale(tick), y + 24, short(tick), "tick", "middle"))
    x = left + length + 14
    text = f"price ({measure}), log scale from {sig(low)} to {sig(high)}"
    parts.append(words(x, y + 9, text, "label"))
    # 2. Samples of the marks.
    x += 385
    sample = Box(x, y - 2, 16.0, 12.0)
    parts.append(rect(sample, "cell zero-price"))
    parts.append(words(x + 21, y + 9, "zero or less", "label"))
    x += 105
    sample = Box(x, y - 2, 16.0, 12.0)
    parts.append(rect(sample, "sample"))
    parts.append(element("circle", cx=x + 8, cy=y + 4, r=1.6, class_="weak ink"))
    parts.append(words(x + 21, y + 9, "below 2 se", "label"))
    x += 100
    sample = Box(x, y - 2, 16.0, 12.0)
    parts.append(rect(sample, "sample"))
    parts.append(rect(sample.inside(1.0), "chosen"))
    parts.append(rect(sample, "chosen-rim"))
    parts.append(words(x + 21, y + 9, "chosen", "label"))
    return parts
