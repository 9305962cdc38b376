"""Scales from data to pixels, and the grid that they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.report.charts.svg import line, words
from curvprune.report.figures import short


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Data to pixels: ``linear``, ``log``, or ``asinh`` (linear within ``knee`` of zero,
    logarithmic beyond)."""

    kind: str
    low: float
    high: float
    start: float
    stop: float
    knee: float = 1.0

    def _warp(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(max(value, self.low))
        return math.asinh(value / self.knee) if self.kind == "asinh" else value

    def __call__(self, value: float) -> float:
        """The pixel of ``value``; values outside the axis land on its end."""
        low, high = self._warp(self.low), self._warp(self.high)
        share = (self._warp(value) - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self, *, about: int = 5) -> list[float]:
        """Round values inside the axis."""
        if self.kind == "linear":
            step = _round_step((self.high - self.low) / max(1, about))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
        positive = self._powers(about)
        if self.kind == "log":
            return [t for t in positive if self.low <= t <= self.high + self._tolerance]
        negative = [-t for t in reversed(positive)]
        low, high = self.low - self._tolerance, self.high + self._tolerance
        return [t for t in (*negative, 0.0, *positive) if low <= t <= high]

    @property
    def _largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def _tolerance(self) -> float:
        return 1e-9 * self._largest

    def _powers(self, about: int) -> list[float]:
        """Powers of ten up to the end of the axis, on a short one with their two- and fivefold."""
        # Ticks inside the linear part of asinh would crowd around zero, which has its own.
        if self.kind == "asinh":
            bottom = math.ceil(math.log10(self.knee))
        else:
            bottom = math.floor(math.log10(self.low))
        exponents = range(bottom, math.ceil(math.log10(self._largest)) + 1)
        stride = max(1, round(len(exponents) / (2 * about)))
        few = self.kind == "log" and self.high < 200 * self.low
        multiples = (1, 2, 5) if few else (1,)
        powers = []
        for exponent in exponents[::stride]:
            powers += [multiple * 10.0**exponent for multiple in multiples]
        return powers


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def choose_scale(
    values: Sequence[float], errors: Sequence[float], *, start: float, stop: float
) -> Scale:
    """Logarithmic where all values are positive over more than a decade, asinh where they straddle
    zero that widely, linear otherwise. ``errors`` widen the range and set the knee of asinh (median
    error)."""
    low = min(v - e for v, e in zip(values, errors, strict=True))
    high = max(v + e for v, e in zip(values, errors, strict=True))
    smallest, biggest = min(values), max(map(abs, values))
    # 1. A wide range of positive values.
    if smallest > 0 and max(values) > 8 * smallest:
        # An error bar that crosses zero must not stretch the axis without end.
        floor = max(low, smallest / 4)
        return Scale(kind="log", low=floor / 1.25, high=high * 1.25, start=start, stop=stop)
    # 2. A wide range on both sides of zero.
    knee = sorted(errors)[len(errors) // 2] or biggest / 100
    if biggest > 0 and smallest <= 0 and biggest > 30 * knee:
        return Scale(
            kind="asinh",
            low=min(1.3 * low, -knee / 2),
            high=1.3 * high + knee,
            start=start,
            stop=stop,
            knee=knee,
        )
    # 3. Else linear, from zero where that is not far away.
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.4 * high else low - margin
    return Scale(kind="linear", low=bottom, high=high + margin, start=start, stop=stop)


def axes(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    below: float = 0.0,
) -> list[Markup]:
    """Grid, tick labels and axis titles; the plot area is ``x.start..x.stop`` by
    ``y.stop..y.start``, with ``below`` pixels kept free between it and the labels."""
    parts = []
    # 1. Lines across, labels on the left.
    for tick in y.ticks():
        parts.append(line(x.start, y(tick), x.stop, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(words(x.start - 7, y(tick) + 3.5, short(tick), "tick", "end"))
    # 2. Lines up, labels at the foot.
    foot = y.start + below
    if x_ticks is None:
        x_ticks = [(tick, short(tick)) for tick in x.ticks(about=7)]
    for tick, label in x_ticks:
        parts.append(line(x(tick), foot, x(tick), y.stop, "grid"))
        parts.append(words(x(tick), foot + 16, label, "tick", "middle"))
    # 3. The axes and what they mean.
    parts.append(line(x.start, y.start, x.stop, y.start, "axis"))
    parts.append(line(x.start, y.start, x.start, y.stop, "axis"))
    parts.append(words(x.stop, foot + 33, x_label, "label", "end"))
    parts.append(words(x.start - 48, y.stop - 10, y_label, "label"))
    return parts
