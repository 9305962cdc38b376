"""Curvature traces of each layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.report.charts.axes import Scale, axes
from curvprune.report.charts.svg import element, line, marker, svg, whisker

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 1120.0, 330.0, 70.0, 26.0, 10.0, 42.0
LABELS = 7  # of the layers below the axis
_SAID = {
    "log": ", logarithmic scale",
    "asinh": ", scale linear around zero, logarithmic beyond",
    "linear": "",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One mark of the chart; ``shift`` moves it sideways, in slots, so that two marks of a layer do
    not hide each other."""

    value: float
    stderr: float | None
    shape: str
    class_: str
    title: str
    shift: float = 0.0


def _scale(dots: Sequence[Dot], *, start: float, stop: float) -> Scale:
    """Logarithmic while all values are positive, else asinh with a knee at the noise (or, without
    errors, at the small values), so that a sign can be read where it means something; linear where
    that is no wider."""
    values = [dot.value for dot in dots]
    biggest = max(map(abs, values))
    # 1. No sign to be read.
    if min(values) > 0:
        return Scale(kind="log", low=min(values) / 2, high=biggest * 2, start=start, stop=stop)
    # 2. Signs, over a range much wider than the noise.
    reach = [0.0]
    for dot in dots:
        error = dot.stderr or 0.0
        reach += [dot.value - error, dot.value + error]
    lowest, highest = min(reach), max(reach)
    sizes = sorted(abs(v) for v in values if v)
    noise = sorted(dot.stderr for dot in dots if dot.stderr)
    if sizes:
        median_noise = noise[len(noise) // 2] if noise else 0.0
        knee = max(median_noise, sizes[len(sizes) // 10], 1e-6 * biggest)
        if biggest > 12 * knee:
            low, high = min(1.4 * lowest, -knee), max(1.4 * highest, knee)
            return Scale(kind="asinh", low=low, high=high, start=start, stop=stop, knee=knee)
    # 3. Else linear.
    margin = 0.08 * (highest - lowest) or 1.0
    return Scale(kind="linear", low=lowest - margin, high=highest + margin, start=start, stop=stop)


def traces(
    layers: Sequence[Sequence[Dot]],
    labels: Sequence[str],
    *,
    measure: str,
    apart: Collection[int],
) -> Markup | None:
    """Traces of each layer in model order (across) with error bars, the marks of one layer joined
    by a line. A layer without marks leaves its place empty; those in ``apart`` get a ring.
    ``None`` where no layer has a mark."""
    shown: list[Dot] = []
    for dots in layers:
        shown += dots
    if not shown:
        return None
    y = _scale(shown, start=HEIGHT - BOTTOM, stop=TOP)
    x = Scale(kind="linear", low=-1.0, high=float(len(layers)), start=LEFT, stop=WIDTH - RIGHT)
    # 1. The axes, with a few layers named.
    stride = max(1, math.ceil(len(layers) / LABELS))
    ticks = [(float(k), labels[k]) for k in range(stride // 2, len(layers), stride)]
    parts = axes(x, y, "layer, in model order", f"trace of the matrix ({measure})", x_ticks=ticks)
    # 2. Lines and error bars below the marks.
    for k, dots in enumerate(layers):
        parts += _bars(k, dots, x, y)
    # 3. Marks, and rings around those that disagree.
    radius = 3.4 if len(layers) > 80 else 4.2
    for k, dots in enumerate(layers):
        for dot in dots:
            place = x(k + dot.shift), y(dot.value)
            parts.append(marker(dot.shape, *place, dot.class_, dot.title, r=radius))
        if k in apart and dots:
            place = x(k + dots[0].shift), y(dots[0].value)
            parts.append(element("circle", cx=place[0], cy=place[1], r=9.0, class_="apart"))
    negative = sum(bool(dots) and dots[0].value < 0 for dots in layers)
    desc = (
        f"{len(layers)} layers, {negative} of them with a negative trace. The table below has the "
        "numbers."
    )
    label = f"Curvature trace of each layer{_SAID[y.kind]}"
    return svg(WIDTH, HEIGHT, label, parts, desc=desc)


def _bars(k: int, dots: Sequence[Dot], x: Scale, y: Scale) -> list[Markup]:
    """The line that joins the marks of layer ``k``, and their error bars."""
    parts = []
    if len(dots) > 1:
        low, high = min(dot.value for dot in dots), max(dot.value for dot in dots)
        parts.append(line(x(k), y(low), x(k), y(high), "joins"))
    for dot in dots:
        if dot.stderr:
            low, high = y(dot.value - dot.stderr), y(dot.value + dot.stderr)
            parts.append(whisker(x(k + dot.shift), low, high))
    return parts
