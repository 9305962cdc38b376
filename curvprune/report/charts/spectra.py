"""Spectral densities: of the whole model, and of layers side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from markupsafe import Markup

from curvprune.report.charts.axes import Scale, axes
from curvprune.report.charts.svg import element, line, marker, path_of, svg, words
from curvprune.report.figures import short, sig

WIDTH, HEIGHT, TOP, BOTTOM = 1120.0, 380.0, 26.0, 42.0
# Of the small panels: gap between them, space above, height of a row of them, space below, room in
# a panel for its ticks.
GAP, HEAD, ROW, FOOT, TICKS = 22.0, 22.0, 96.0, 30.0, 30.0

Curve: TypeAlias = Sequence[tuple[float, float]]  # (eigenvalue, density), ascending


@dataclass(frozen=True, slots=True)
class Panel:
    """A small density with its full name and its label."""

    name: str
    label: str
    curve: Curve


def _peak(curve: Curve) -> float:
    return max(density for _, density in curve)


def _knee(curve: Curve) -> float:
    """Half the density lies within this distance of zero; never finer than the grid resolves
    there."""
    reach, peak = max(abs(value) for value, _ in curve), _peak(curve)
    if not reach > 0 or not peak > 0:
        return 1.0
    # 1. The mass of every step of the grid (trapezoids), nearest to zero first. Everything is
    #    divided by the largest, so that no product overflows.
    pieces = []
    for (a, p), (b, q) in pairwise(curve):
        mass = (b / reach - a / reach) * (p / peak + q / peak) / 2
        pieces.append((abs(a / 2 + b / 2), mass))
    pieces.sort()
    # 2. Add them up until half is reached.
    half, within, knee = math.fsum(mass for _, mass in pieces) / 2, 0.0, reach
    for distance, mass in pieces:
        within += mass
        if within >= half:
            knee = distance
            break
    # 3. The grid's own step around zero.
    gaps = [b - a for (a, _), (b, _) in pairwise(curve) if a <= 0 <= b]
    return max(knee, 1e-6 * reach, *gaps)


def _floor(curve: Curve) -> float:
    """Where the logarithmic density axis ends: a decade below the lowest bump, twelve below the
    peak at most. Smoothed densities fall off without end between bumps, and drawing that would
    flatten the rest."""
    peak = _peak(curve)
    heights = [density for _, density in curve]
    bumps = [0.1 * peak]
    for before, height, after in zip(heights, heights[1:], heights[2:], strict=False):
        if before < height >= after and height > 1e-11 * peak:
            bumps.append(height)
    return max(1e-12 * peak, min(bumps) / 10)


def spectral_axis(curve: Curve, marks: Sequence[float], *, start: float, stop: float) -> Scale:
    """Eigenvalues across: linear around zero with the bulk, logarithmic beyond so that outliers
    fit. Reaches over what is drawn of the density and over ``marks``."""
    floor = _floor(curve)
    shown = [0.0, *marks]
    shown += [value for value, density in curve if density >= floor]
    low, high = min(shown), max(shown)
    reach = max(-low, high)
    if not reach > 0:
        return Scale(kind="linear", low=-1.0, high=1.0, start=start, stop=stop)
    knee = _knee(curve)
    if reach > 12 * knee:
        return Scale(
            kind="asinh",
            low=min(1.25 * low, -knee / 2),
            high=max(1.25 * high, knee / 2),
            start=start,
            stop=stop,
            knee=knee,
        )
    margin = 0.05 * (high - low)
    return Scale(kind="linear", low=low - margin, high=high + margin, start=start, stop=stop)


def _halves(curve: Curve) -> tuple[Curve, Curve]:
    """The curve at and below zero, and from zero on; they meet in a point in between."""
    negative = [point for point in curve if point[0] < 0]
    positive = [point for point in curve if point[0] >= 0]
    if not negative or not positive:
        return negative, positive
    (a, p), (b, q) = negative[-1], positive[0]
    if b == 0:
        return [*negative, positive[0]], positive
    middle = (0.0, p + (q - p) * (-a / (b - a)))
    return [*negative, middle], [middle, *positive]


def _outline(curve: Curve, x: Scale, y: Scale, *, apart: float) -> list[tuple[float, float]]:
    """Pixels of the part of a curve that lies on the axis, without the points that cannot be told
    from their neighbours."""
    inside = [k for k, (value, _) in enumerate(curve) if x.low <= value <= x.high]
    if not inside:
        return []
    kept: list[tuple[float, float]] = []
    for value, density in curve[max(0, inside[0] - 1) : inside[-1] + 2]:
        point = x(value), y(max(density, y.low))
        if not kept or max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= apart:
            kept.append(point)
    return kept


def _area(
    curve: Curve, x: Scale, y: Scale, *, apart: float = 0.6, outlined: bool = True
) -> list[Markup]:
    """A density as an area down to the axis: what is below zero in its own colour and, where it is
    outlined, dashed."""
    parts = []
    for half, sign in zip(_halves(curve), (" negative", ""), strict=True):
        points = _outline(half, x, y, apart=apart)
        if len(points) < 2:
            continue
        closed = [(points[0][0], y.start), *points, (points[-1][0], y.start)]
        parts.append(element("polygon", points=path_of(closed), class_=f"density{sign}"))
        if outlined:
            parts.append(element("polyline", points=path_of(points), class_=f"spectrum{sign}"))
    return parts


def spectrum(
    curve: Curve,
    *,
    x: Scale,
    runs: Sequence[Sequence[float]],
    eigenvalues: Sequence[tuple[float, str]],
    matrix: str,
    measure: str,
) -> Markup:
    """Density of the eigenvalues on a logarithmic axis; below it a row of ticks for the nodes of
    every run, on the axis the extreme eigenvalues ``(value, tooltip)``."""
    row, below = 0.0, 0.0
    if runs:
        row = min(7.0, 42.0 / len(runs))
        below = row * len(runs) + 9.0
    y = Scale(
        kind="log",
        low=_floor(curve),
        high=2 * _peak(curve),
        start=HEIGHT - BOTTOM - below,
        stop=TOP,
    )
    x_label = f"eigenvalue of {matrix} ({measure})"
    parts = axes(x, y, x_label, "density, log scale", below=below)
    # 1. Zero, and what its two sides mean where there is room to say it.
    zero = x(0.0)
    parts.append(line(zero, y.start + below, zero, y.stop, "zero"))
    if zero - x.start > 110:
        parts.append(words(zero - 7, TOP - 6, "curves down", "label negative-text", "end"))
    if x.stop - zero > 110:
        parts.append(words(zero + 7, TOP - 6, "curves up", "label"))
    # 2. The density.
    parts += _area(curve, x, y)
    # 3. Nodes of every run below it, eigenvalues on the axis.
    for k, nodes in enumerate(runs):
        parts.append(_rug(k, nodes, x, y.start + 6 + k * row, row))
    for value, title in eigenvalues:
        parts.append(marker("diamond", x(value), y.start, "eigenvalue", title, r=3.6))
    label = f"Spectral density of {matrix}, logarithmic scale"
    return svg(WIDTH, HEIGHT, label, parts, desc=_in_words(curve, eigenvalues))


def _rug(k: int, nodes: Sequence[float], x: Scale, at: float, row: float) -> Markup:
    """A tick for each node of run ``k``."""
    path = "".join(f"M{x(node):.1f} {at:.1f}v{0.75 * row:.1f}" for node in nodes)
    ends = f"{sig(min(nodes))} to {sig(max(nodes))}"
    title = element("title", f"run {k + 1}: {len(nodes)} nodes from {ends}")
    return element("path", title, d=path, class_="rug")


def _in_words(curve: Curve, eigenvalues: Sequence[tuple[float, str]]) -> str:
    at, peak = max(curve, key=lambda point: point[1])
    text = f"The density peaks at {sig(at)} with {sig(peak)} per unit of the eigenvalue"
    if eigenvalues:
        ends = [value for value, _ in eigenvalues]
        text += f"; the extreme eigenvalues are {sig(min(ends))} and {sig(max(ends))}"
    return f"{text}. The tables below have the numbers."


def spectra(panels: Sequence[Panel], *, matrix: str, measure: str) -> Markup | None:
    """Small densities side by side on one eigenvalue axis, each relative to its own peak; ``None``
    without any."""
    if not panels:
        return None
    columns = min(4, len(panels))
    width = (WIDTH - GAP * (columns + 1)) / columns
    # 1. One axis of eigenvalues and one depth for all, so that layers can be compared.
    common = _common_axis(panels, width)
    depth = min(_floor(panel.curve) / _peak(panel.curve) for panel in panels)
    # 2. The panels, row by row; the lowest of each column carries the ticks.
    parts = []
    for k, panel in enumerate(panels):
        left, top = GAP + (k % columns) * (width + GAP), HEAD + (k // columns) * ROW
        x = Scale(
            kind=common.kind,
            low=common.low,
            high=common.high,
            start=left,
            stop=left + width,
            knee=common.knee,
        )
        y = Scale(kind="log", low=depth, high=1.0, start=top + ROW - TICKS, stop=top)
        parts += _small(panel, x, y)
        if k >= len(panels) - columns:
            parts += _few_ticks(x, y)
    height = HEAD + ROW * math.ceil(len(panels) / columns) + FOOT
    foot = f"eigenvalue of {matrix} ({measure})"
    parts.append(words(WIDTH - GAP, height - 4, foot, "label", "end"))
    desc = (
        "One panel a layer, one eigenvalue axis for all, densities relative to the layer's peak on "
        "a log scale."
    )
    return svg(WIDTH, height, f"Spectral densities of {matrix} by layer", parts, desc=desc)


def _common_axis(panels: Sequence[Panel], width: float) -> Scale:
    """An axis that reaches over all, with the median of the knees."""
    own = [spectral_axis(panel.curve, (), start=0.0, stop=width) for panel in panels]
    low, high = min(axis.low for axis in own), max(axis.high for axis in own)
    reach = max(-low, high)
    knees = sorted(_knee(panel.curve) for panel in panels)
    knee = max(knees[len(knees) // 2], 1e-6 * reach)
    kind = "asinh" if reach > 12 * knee else "linear"
    return Scale(kind=kind, low=low, high=high, start=0.0, stop=width, knee=knee)


def _small(panel: Panel, x: Scale, y: Scale) -> list[Markup]:
    """One panel without ticks."""
    peak = _peak(panel.curve)
    relative = [(value, density / peak) for value, density in panel.curve]
    title = element("title", panel.name)
    return [
        element("text", title, panel.label, x=x.start, y=y.stop - 4, class_="row"),
        *_area(relative, x, y, apart=2.0, outlined=False),
        line(x.start, y.start, x.stop, y.start, "axis"),
        line(x(0.0), y.start, x(0.0), y.stop, "zero"),
    ]


def _few_ticks(x: Scale, y: Scale) -> list[Markup]:
    """The outermost ticks and zero."""
    ticks = x.ticks(about=3)
    shown = [tick for tick in ticks if tick in (0.0, ticks[0], ticks[-1])]
    return [words(x(tick), y.start + 13, short(tick), "tick", "middle") for tick in shown]
