"""Inline SVG charts. Colours are CSS classes, so one drawing serves light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

from .figures import clean, plus_minus, short, sig, size

SHAPES = ("circle", "square", "diamond", "triangle")


def element(name: str, *children: object, **attributes: object) -> Markup:
    """One SVG element; text and attribute values are escaped, ``class_`` means class,
    ``stroke_width`` stroke-width."""
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else clean(value)
        written.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = "".join(c if isinstance(c, Markup) else escape(clean(c)) for c in children)
    return Markup(f"<{name}{''.join(written)}>{inner}</{name}>")


def _svg(
    width: float,
    height: float,
    label: str,
    parts: Sequence[object],
    *,
    class_: str = "chart",
    desc: str = "",
) -> Markup:
    body = element("title", label), *([element("desc", desc)] if desc else []), *parts
    return element(
        "svg",
        *body,
        class_=class_,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


def _text(
    x: float, y: float, text: object, class_: str = "tick", anchor: str | None = None
) -> Markup:
    return element("text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


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
        magnitudes = [abs(v) for v in (self.low, self.high) if v]
        # Ticks inside the linear part of asinh would crowd around zero, which has its own.
        bottom = (
            math.ceil(math.log10(self.knee))
            if self.kind == "asinh"
            else math.floor(math.log10(self.low))
        )
        exponents = range(bottom, math.ceil(math.log10(max(magnitudes))) + 1)
        few = self.kind == "log" and self.high < 200 * self.low
        stride = max(1, round(len(exponents) / (2 * about)))
        positive = [m * 10.0**e for e in exponents[::stride] for m in ((1, 2, 5) if few else (1,))]
        both = (
            positive if self.kind == "log" else [*(-p for p in reversed(positive)), 0.0, *positive]
        )
        tolerance = 1e-9 * max(magnitudes)
        return [
            t
            for t in both
            if self.low - tolerance * (self.kind != "log") <= t <= self.high + tolerance
        ]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def choose_scale(
    values: Sequence[float], errors: Sequence[float], *, start: float, stop: float
) -> Scale:
    """Logarithmic where all values are positive over more than a decade, asinh where they straddle
    zero that widely, linear otherwise. ``errors`` widen the range and set the knee of asinh (median
    error)."""
    if not values:
        raise ValueError("choose_scale: no values to show")
    reach = [
        *(v + e for v, e in zip(values, errors, strict=True)),
        *(v - e for v, e in zip(values, errors, strict=True)),
    ]
    low, high, biggest = min(reach), max(reach), max(map(abs, values))
    if min(values) > 0 and max(values) > 8 * min(values):
        floor = max(
            low, min(values) / 4
        )  # an error bar that crosses zero must not stretch the axis without end
        return Scale(kind="log", low=floor / 1.25, high=high * 1.25, start=start, stop=stop)
    knee = sorted(errors)[len(errors) // 2] or biggest / 100
    if biggest > 0 and min(values) <= 0 and biggest > 30 * knee:
        return Scale(
            kind="asinh",
            low=min(1.3 * low, -knee / 2),
            high=1.3 * high + knee,
            start=start,
            stop=stop,
            knee=knee,
        )
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.4 * high else low - margin
    return Scale(kind="linear", low=bottom, high=high + margin, start=start, stop=stop)


def marker(
    shape: str, x: float, y: float, class_: str, title: str | None = None, *, r: float = 4.5
) -> Markup:
    """A point: circle, square, diamond, triangle or star, with an optional tooltip."""
    inner = () if title is None else (element("title", title),)
    if shape == "circle":
        return element("circle", *inner, cx=float(x), cy=float(y), r=float(r), class_=class_)
    outline = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "triangle": [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        "star": [
            (
                (1.6 if k % 2 == 0 else 0.7) * math.sin(k * math.pi / 5),
                (-1.6 if k % 2 == 0 else -0.7) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ],
    }[shape]
    path = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in outline)
    return element("polygon", *inner, points=path, class_=class_)


def _error_bar(x: float, y1: float, y2: float, *, upright: bool = True) -> Markup:
    """A whisker from ``y1`` to ``y2`` at ``x`` (or the same lying down)."""
    return _line(x, y1, x, y2, "whisker") if upright else _line(y1, x, y2, x, "whisker")


def interval(
    *,
    drop: float,
    stderr: float,
    bound: float | None,
    budget: float | None,
    label: str,
    scale: float,
) -> Markup:
    """The verdict on one axis: drop with its standard error, the one-sided bound, the budget and
    the side it allows.

    ``scale`` multiplies what is shown (100 for accuracy in percentage points).
    """
    width, height, left, right, axis = 640.0, 112.0, 12.0, 628.0, 78.0
    drop, stderr = drop * scale, stderr * scale
    bound = None if bound is None else bound * scale
    budget = None if budget is None else budget * scale
    shown = [
        0.0,
        drop - 1.5 * stderr,
        drop + stderr,
        *(v for v in (bound, budget) if v is not None),
    ]
    spread = max(shown) - min(shown) or 1.0
    x = Scale(
        kind="linear",
        low=min(shown) - 0.05 * spread,
        high=max(shown) + 0.14 * spread,
        start=left,
        stop=right,
    )
    parts: list[object] = []
    if budget is not None:
        parts.append(
            element(
                "rect",
                x=left,
                y=26.0,
                width=max(0.0, x(budget) - left),
                height=axis - 26,
                class_="allowed",
            )
        )
    parts.append(_line(left, axis, right, axis, "axis"))
    for tick in x.ticks(about=7):
        parts += [
            _line(x(tick), axis, x(tick), axis + 4, "axis"),
            _text(x(tick), axis + 15, short(tick), "tick", "middle"),
        ]
    parts.append(_text(right, axis + 30, label, "label", "end"))
    parts.append(_line(x(0.0), 26, x(0.0), axis, "zero"))
    middle = 52.0
    if bound is not None:
        parts += [
            _line(x(drop), middle, x(bound), middle, "reach"),
            _line(x(bound), middle - 8, x(bound), middle + 8, "reach"),
        ]
    parts.append(_line(x(drop - stderr), middle, x(drop + stderr), middle, "deviation"))
    parts.append(
        marker("circle", x(drop), middle, "drop", f"drop {plus_minus(drop, stderr)}", r=5.5)
    )
    parts.append(_text(x(drop), middle - 11, "drop \N{PLUS-MINUS SIGN} se", "label", "middle"))
    if bound is not None:
        parts.append(_text(x(bound), middle + 20, "bound", "label", "middle"))
    if budget is not None:
        parts.append(_line(x(budget), 18, x(budget), axis, "budget"))
        parts.append(
            _text(
                x(budget),
                13,
                f"budget {short(float(f'{budget:.10g}'))}",
                "label budget-text",
                "middle",
            )
        )
    return _svg(
        width,
        height,
        "Measured drop, its one-sided bound and the budget on one axis",
        parts,
        class_="chart interval",
    )


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Markup:
    """Stacked bars on one byte axis: ``(row label, [(segment label, bytes, fill)])``; fill is a
    colour or ''."""
    width, left, row = 1120.0, 70.0, 44.0
    height = row * len(groups) + 6
    longest = max((sum(v for _, v, _ in segments) for _, segments in groups), default=0.0) or 1.0
    scale = (width - left - 90) / longest
    parts: list[object] = []
    for k, (label, segments) in enumerate(groups):
        y, x = k * row + 6, left
        parts.append(_text(left - 8, y + 19, label, "label", "end"))
        for name, value, fill in segments:
            w = max(0.0, value * scale)
            title = element("title", f"{name}: {size(value)}")
            parts.append(
                element(
                    "rect",
                    title,
                    x=x,
                    y=y,
                    width=w,
                    height=28.0,
                    fill=fill or None,
                    class_="segment" if fill else "rest",
                )
            )
            if w > 7.5 * len(name) + 10:
                ink = "on-dark" if fill and _dark(fill) else "on-light" if fill else "label"
                parts.append(_text(x + w / 2, y + 18, name, ink, "middle"))
            x += w
        parts.append(_text(x + 8, y + 19, size(sum(v for _, v, _ in segments)), "label strong"))
    return _svg(width, height, "Bytes before and after, by option", parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A plan in a scatter: what it should cost, what it did cost, how it is drawn and called."""

    number: int
    name: str
    shape: str
    class_: str
    bytes: float | None
    predicted: float | None
    predicted_stderr: float | None
    measured: float | None
    measured_stderr: float | None
    chosen: bool = False

    def title(self) -> str:
        return (
            f"#{self.number} {self.name}: predicted {plus_minus(self.predicted, self.predicted_stderr)}, "
            f"measured {plus_minus(self.measured, self.measured_stderr)}, {size(self.bytes)}"
        )


def _axes(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    below: float = 0.0,
) -> list[object]:
    """Grid, tick labels and axis titles; the plot area is ``x.start..x.stop`` by
    ``y.stop..y.start``, with ``below`` pixels kept free between it and the labels."""
    parts: list[object] = []
    foot = y.start + below
    for tick in y.ticks():
        parts += [_line(x.start, y(tick), x.stop, y(tick), "zero" if tick == 0 else "grid")]
        parts += [_text(x.start - 7, y(tick) + 3.5, short(tick), "tick", "end")]
    for tick, label in (
        x_ticks if x_ticks is not None else [(t, short(t)) for t in x.ticks(about=7)]
    ):
        parts += [
            _line(x(tick), foot, x(tick), y.stop, "grid"),
            _text(x(tick), foot + 16, label, "tick", "middle"),
        ]
    parts += [
        _line(x.start, y.start, x.stop, y.start, "axis"),
        _line(x.start, y.start, x.start, y.stop, "axis"),
    ]
    parts.append(_text(x.stop, foot + 33, x_label, "label", "end"))
    parts.append(_text(x.start - 48, y.stop - 10, y_label, "label"))
    return parts


def _number(point: Point, x: float, y: float, taken: list[tuple[float, float]]) -> Markup:
    """The point's number beside it, moved to the first free corner."""
    for dx, dy in ((8, -6), (8, 13), (-16, -6), (-16, 13), (14, 4), (-24, 4), (0, -14), (0, 20)):
        if all(abs(x + dx - a) > 13 or abs(y + dy - b) > 10 for a, b in taken):
            break
    taken.append((x + dx, y + dy))
    return _text(x + dx, y + dy, str(point.number), "number")


def scatter(points: Sequence[Point], *, measure: str) -> Markup | None:
    """Predicted (across) against measured (up) with error bars and the identity line; ``None`` with
    nothing to show."""
    drawn = [
        (p, p.predicted, p.measured)
        for p in points
        if p.predicted is not None and p.measured is not None
    ]
    if not drawn:
        return None
    width, height, left, top, right, bottom = 560.0, 470.0, 64.0, 30.0, 16.0, 46.0
    values = [v for _, a, b in drawn for v in (a, b)]
    errors = [v for p, _, _ in drawn for v in (p.predicted_stderr or 0.0, p.measured_stderr or 0.0)]
    # One scale for both axes keeps the identity line at 45 degrees.
    x = choose_scale(values, errors, start=left, stop=width - right)
    y = Scale(kind=x.kind, low=x.low, high=x.high, start=height - bottom, stop=top, knee=x.knee)
    parts = _axes(x, y, f"predicted ({measure})", f"measured on the select split ({measure})")
    parts.append(_line(x(x.low), y(y.low), x(x.high), y(y.high), "identity"))
    parts.append(_text(x.start + 26, y.start - 8, "measured = predicted", "label faint"))
    taken = [(x(a), y(b)) for _, a, b in drawn]
    for p, a, b in drawn:
        ea, eb = p.predicted_stderr or 0.0, p.measured_stderr or 0.0
        parts += [
            _error_bar(x(a), y(b - eb), y(b + eb)),
            _error_bar(y(b), x(a - ea), x(a + ea), upright=False),
        ]
    for p, a, b in drawn:
        if p.chosen:
            parts.append(element("circle", cx=x(a), cy=y(b), r=10.0, class_="ring"))
        parts += [marker(p.shape, x(a), y(b), p.class_, p.title()), _number(p, x(a), y(b), taken)]
    return _svg(
        width, height, "Predicted against measured loss increase of every plan tried", parts
    )


def frontier(
    curve: Sequence[tuple[float, float, float]],
    points: Sequence[Point],
    *,
    measure: str,
    max_drop: float | None,
    max_bytes: float | None,
) -> Markup | None:
    """Bytes (across) against predicted loss (line, band of one standard error), measured plans on
    top, the budget.

    ``curve`` holds ``(bytes, predicted, stderr)`` sorted by bytes.
    """
    if not curve:
        return None
    width, height, left, top, right, bottom = 560.0, 470.0, 64.0, 30.0, 16.0, 46.0
    measured = [
        (p, p.bytes, p.measured) for p in points if p.bytes is not None and p.measured is not None
    ]
    heights = (
        [v for _, v, _ in curve]
        + [m for _, _, m in measured]
        + ([] if max_drop is None else [max_drop])
    )
    errors = [e for _, _, e in curve] + [p.measured_stderr or 0.0 for p, _, _ in measured]
    errors += [] if max_drop is None else [0.0]
    spans = (
        [b for b, _, _ in curve]
        + [b for _, b, _ in measured]
        + ([] if max_bytes is None else [max_bytes])
    )
    divisor, suffix = next(
        ((d, s) for d, s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if max(spans) >= 2 * d),
        (1.0, "B"),
    )
    x = choose_scale(
        [s / divisor for s in spans], [0.0] * len(spans), start=left, stop=width - right
    )
    if x.kind != "linear":
        low, high = min(spans) / divisor, max(spans) / divisor
        x = Scale(
            kind="linear",
            low=max(0.0, low - 0.06 * (high - low)),
            high=high + 0.06 * (high - low),
            start=x.start,
            stop=x.stop,
        )
    y = choose_scale(heights, errors, start=height - bottom, stop=top)
    parts = _axes(
        x,
        y,
        f"weights on disk ({suffix})",
        f"loss increase ({measure}): line predicted, marks measured",
    )
    upper = [(x(b / divisor), y(v + e)) for b, v, e in curve]
    lower = [(x(b / divisor), y(v - e)) for b, v, e in curve]
    parts.append(
        element(
            "polygon",
            points=" ".join(f"{a:.1f},{b:.1f}" for a, b in [*upper, *reversed(lower)]),
            class_="band",
        )
    )
    line = " ".join(f"{x(b / divisor):.1f},{y(v):.1f}" for b, v, _ in curve)
    parts.append(element("polyline", points=line, class_="curve"))
    for b, v, e in curve:
        parts.append(
            marker(
                "circle",
                x(b / divisor),
                y(v),
                "dot",
                f"{size(b)}: predicted {plus_minus(v, e)} {measure}",
                r=1.8,
            )
        )
    if max_drop is not None:
        parts.append(_line(x.start, y(max_drop), x.stop, y(max_drop), "budget"))
        parts.append(
            _text(
                x.stop - 4,
                y(max_drop) - 6,
                f"budget {short(max_drop)} {measure}",
                "label budget-text",
                "end",
            )
        )
    if max_bytes is not None:
        parts.append(
            _line(x(max_bytes / divisor), y.start, x(max_bytes / divisor), y.stop, "budget")
        )
        parts.append(
            _text(
                x(max_bytes / divisor) + 5,
                y.stop + 10,
                f"budget {size(max_bytes)}",
                "label budget-text",
            )
        )
    taken = [(x(b / divisor), y(m)) for _, b, m in measured]
    for p, b, m in measured:
        e = p.measured_stderr or 0.0
        parts.append(_error_bar(x(b / divisor), y(m - e), y(m + e)))
    for p, b, m in measured:
        if p.chosen:
            parts.append(element("circle", cx=x(b / divisor), cy=y(m), r=10.0, class_="ring"))
        parts += [
            marker(p.shape, x(b / divisor), y(m), p.class_, p.title()),
            _number(p, x(b / divisor), y(m), taken),
        ]
    return _svg(
        width,
        height,
        "Frontier: bytes against predicted loss increase, measured plans on top",
        parts,
    )


# Lightness rises steadily along the ramp (a test holds it), so it reads the same in grey and for
# any colour vision.
_HEAT = (
    (38, 16, 74),
    (47, 48, 120),
    (42, 84, 146),
    (34, 118, 152),
    (38, 150, 142),
    (86, 180, 116),
    (152, 206, 84),
    (222, 224, 72),
    (252, 244, 150),
)
# Ordered by depth of compression, far enough apart to tell neighbours in a stacked bar.
_DEPTH = (
    (74, 85, 104),
    (49, 104, 160),
    (52, 148, 175),
    (84, 178, 140),
    (190, 196, 84),
    (240, 170, 60),
    (222, 108, 58),
    (170, 50, 80),
)


def _interpolate(anchors: Sequence[tuple[int, int, int]], share: float) -> str:
    position = min(1.0, max(0.0, share)) * (len(anchors) - 1)
    k = min(int(position), len(anchors) - 2)
    mixed = (
        round(a + (b - a) * (position - k)) for a, b in zip(anchors[k], anchors[k + 1], strict=True)
    )
    return "#" + "".join(f"{c:02x}" for c in mixed)


def heat_colour(share: float) -> str:
    """Colour of a cell at ``share`` (0 ... 1) of the logarithmic scale."""
    return _interpolate(_HEAT, share)


def depth_colour(rank: int, of: int) -> str:
    """Colour of an option by its rank from least (0) to most compressed."""
    return _interpolate(_DEPTH, rank / max(1, of - 1))


def _dark(colour: str) -> bool:
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """Prices of layers (rows) x options (columns): ``cells[layer, option] = (price, stderr)``."""

    layers: Sequence[str]
    labels: Sequence[str]
    options: Sequence[str]
    cells: Mapping[tuple[str, str], tuple[float | None, float | None]]
    chosen: Mapping[str, str] = field(default_factory=dict)

    def span(self) -> tuple[float, float] | None:
        """Smallest and largest positive price."""
        positive = [p for p, _ in self.cells.values() if p is not None and p > 0]
        return (min(positive), max(positive)) if positive else None


def heat_map(table: HeatMap, *, measure: str) -> Markup | None:
    """Prices as colours on a log scale, in as many panels side by side as stay readable. A dot
    marks a price below two standard errors, an outline the chosen option, grey a price of zero or
    less, a blank an option not offered."""
    if not table.layers or not table.options:
        return None
    columns, rows = len(table.options), len(table.layers)
    panels = 3 if rows > 60 and columns <= 12 else 2 if rows > 24 and columns <= 22 else 1
    per_panel, width, row = math.ceil(rows / panels), 1120.0, 13.0
    overhang = 4.0 * len(
        clean(table.options[-1])
    )  # the slanted head of the last column reaches past it
    gap = min(80.0, max(26.0, overhang))
    panel = (width - gap * panels) / panels
    label = min(7 + 5.8 * max(len(text) for text in table.labels), 0.55 * panel)
    cell = min(44.0, (panel - label) / columns)
    head = 14 + 4.2 * max(len(clean(o)) for o in table.options)
    height = head + per_panel * row + 44
    span = table.span()
    parts: list[object] = []
    for index in range(panels):
        left = index * (panel + gap)
        first = index * per_panel
        for c, option in enumerate(table.options):
            x, y = left + label + (c + 0.6) * cell, head - 5
            parts.append(
                element(
                    "text",
                    option,
                    x=x,
                    y=y,
                    class_="tick",
                    transform=f"rotate(-45 {x:.1f} {y:.1f})",
                )
            )
        for r, layer in enumerate(table.layers[first : first + per_panel]):
            y = head + r * row
            text = element("title", layer), table.labels[first + r]
            parts.append(
                element(
                    "text", *text, x=left + label - 6, y=y + 10, class_="row", text_anchor="end"
                )
            )
            for c, option in enumerate(table.options):
                if (layer, option) not in table.cells:
                    continue
                parts += _cell(
                    table, layer, option, left + label + c * cell, y, cell, row, span, measure
                )
    if span is not None:
        parts += _key(span, head + per_panel * row + 12, measure)
    return _svg(
        width,
        height,
        "Price of every option in every layer, logarithmic colour scale",
        parts,
        class_="chart heat",
    )


def _cell(
    table: HeatMap,
    layer: str,
    option: str,
    x: float,
    y: float,
    width: float,
    height: float,
    span: tuple[float, float] | None,
    measure: str,
) -> list[object]:
    price, stderr = table.cells[layer, option]
    chosen = table.chosen.get(layer) == option
    title = element(
        "title",
        f"{layer}, {option}: {plus_minus(price, stderr)} {measure}{', chosen' if chosen else ''}",
    )
    positive = price is not None and price > 0 and span is not None
    fill = None
    if positive:
        assert price is not None and span is not None
        fill = heat_colour(
            math.log(price / span[0]) / math.log(span[1] / span[0]) if span[1] > span[0] else 0.5
        )
    box = element(
        "rect",
        title,
        x=x + 0.5,
        y=y + 0.5,
        width=width - 1,
        height=height - 1,
        fill=fill,
        class_="cell" if positive else "cell none" if price is None else "cell zero-price",
    )
    parts: list[object] = [box]
    if positive and price is not None and stderr is not None and price < 2 * stderr:
        assert fill is not None
        ink = "weak" if _dark(fill) else "weak ink"
        parts.append(element("circle", cx=x + width / 2, cy=y + height / 2, r=1.6, class_=ink))
    if chosen:
        parts.append(
            element(
                "rect",
                x=x + 1.2,
                y=y + 1.2,
                width=width - 2.4,
                height=height - 2.4,
                class_="chosen",
            )
        )
        parts.append(element("rect", x=x, y=y, width=width, height=height, class_="chosen-rim"))
    return parts


def _key(span: tuple[float, float], y: float, measure: str) -> list[object]:
    """The colour scale with decade ticks, and the marks explained."""
    left, length, steps = 8.0, 300.0, 60
    scale = Scale(
        kind="log",
        low=span[0],
        high=max(span[1], span[0] * 1.000001),
        start=left,
        stop=left + length,
    )
    parts: list[object] = [
        element(
            "rect",
            x=left + k * length / steps,
            y=y,
            width=length / steps + 0.6,
            height=9.0,
            fill=heat_colour(k / (steps - 1)),
        )
        for k in range(steps)
    ]
    for tick in scale.ticks(about=4):
        parts += [
            _line(scale(tick), y + 9, scale(tick), y + 13, "axis"),
            _text(scale(tick), y + 24, short(tick), "tick", "middle"),
        ]
    x = left + length + 14
    parts.append(
        _text(
            x, y + 9, f"price ({measure}), log scale from {sig(span[0])} to {sig(span[1])}", "label"
        )
    )
    x += 385
    parts += [
        element("rect", x=x, y=y - 2, width=16.0, height=12.0, class_="cell zero-price"),
        _text(x + 21, y + 9, "zero or less", "label"),
    ]
    x += 105
    parts += [
        element("rect", x=x, y=y - 2, width=16.0, height=12.0, class_="sample"),
        element("circle", cx=x + 8, cy=y + 4, r=1.6, class_="weak ink"),
    ]
    parts.append(_text(x + 21, y + 9, "below 2 se", "label"))
    x += 100
    parts += [
        element("rect", x=x, y=y - 2, width=16.0, height=12.0, class_="sample"),
        element("rect", x=x + 1, y=y - 1, width=14.0, height=10.0, class_="chosen"),
    ]
    parts += [
        element("rect", x=x, y=y - 2, width=16.0, height=12.0, class_="chosen-rim"),
        _text(x + 21, y + 9, "chosen", "label"),
    ]
    return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One mark of the trace chart; ``shift`` moves it sideways, in slots, so that two marks of a
    layer do not hide each other."""

    value: float
    stderr: float | None
    shape: str
    class_: str
    title: str
    shift: float = 0.0


def trace_scale(
    values: Sequence[float], errors: Sequence[float], *, start: float, stop: float
) -> Scale:
    """Logarithmic while all values are positive, else asinh with a knee at the noise (or, without
    errors, at the small values), so that a sign can be read where it means something; linear where
    that is no wider."""
    biggest = max(map(abs, values))
    if min(values) > 0:
        return Scale(kind="log", low=min(values) / 2, high=biggest * 2, start=start, stop=stop)
    sizes, noise = sorted(abs(v) for v in values if v), sorted(e for e in errors if e > 0)
    reach = [v + s * e for v, e in zip(values, errors, strict=True) for s in (-1, 1)] + [0.0]
    if sizes:
        knee = max(
            noise[len(noise) // 2] if noise else 0.0, sizes[len(sizes) // 10], 1e-6 * biggest
        )
        if biggest > 12 * knee:
            low, high = min(1.4 * min(reach), -knee), max(1.4 * max(reach), knee)
            return Scale(kind="asinh", low=low, high=high, start=start, stop=stop, knee=knee)
    margin = 0.08 * (max(reach) - min(reach)) or 1.0
    return Scale(
        kind="linear", low=min(reach) - margin, high=max(reach) + margin, start=start, stop=stop
    )


def traces(
    layers: Sequence[Sequence[Dot]],
    labels: Sequence[str],
    *,
    matrix: str,
    measure: str,
    apart: Sequence[int] = (),
) -> Markup | None:
    """Curvature traces of each layer in model order (across) with error bars, the marks of one
    layer joined by a line. A layer without marks leaves its place empty; those in ``apart`` get a
    ring."""
    shown = [d for dots in layers for d in dots]
    if not shown:
        return None
    width, height, left, top, right, bottom = 1120.0, 330.0, 70.0, 26.0, 10.0, 42.0
    y = trace_scale(
        [d.value for d in shown], [d.stderr or 0.0 for d in shown], start=height - bottom, stop=top
    )
    x = Scale(kind="linear", low=-1.0, high=float(len(layers)), start=left, stop=width - right)
    stride = max(1, math.ceil(len(layers) / 7))
    ticks = [(float(k), labels[k]) for k in range(stride // 2, len(layers), stride)]
    parts = _axes(x, y, "layer, in model order", f"trace of {matrix} ({measure})", x_ticks=ticks)
    radius = 3.4 if len(layers) > 80 else 4.2
    for k, dots in enumerate(layers):
        if len(dots) > 1:
            low, high = min(d.value for d in dots), max(d.value for d in dots)
            parts.append(_line(x(k), y(low), x(k), y(high), "joins"))
        for dot in dots:
            if dot.stderr:
                parts.append(
                    _error_bar(
                        x(k + dot.shift), y(dot.value - dot.stderr), y(dot.value + dot.stderr)
                    )
                )
    for k, dots in enumerate(layers):
        for dot in dots:
            parts.append(
                marker(dot.shape, x(k + dot.shift), y(dot.value), dot.class_, dot.title, r=radius)
            )
        if k in apart and dots:
            parts.append(
                element(
                    "circle", cx=x(k + dots[0].shift), cy=y(dots[0].value), r=9.0, class_="apart"
                )
            )
    kind = {
        "log": "logarithmic scale",
        "asinh": "scale linear around zero, logarithmic beyond",
    }.get(y.kind, "")
    label = ", ".join(["Curvature trace of each layer", *([kind] if kind else [])])
    negative = sum(bool(dots) and dots[0].value < 0 for dots in layers)
    desc = f"{len(layers)} layers, {negative} of them with a negative trace. The table below has the numbers."
    return _svg(width, height, label, parts, desc=desc)


Curve = Sequence[tuple[float, float]]


def spectral_knee(curve: Curve) -> float:
    """Half the density lies within this distance of zero; never finer than the grid resolves
    there."""
    reach, peak = max(abs(v) for v, _ in curve), max(d for _, d in curve)
    if not reach > 0 or not peak > 0:
        return 1.0
    pieces = sorted(
        (abs(a / 2 + b / 2), (b / reach - a / reach) * (p / peak + q / peak) / 2)
        for (a, p), (b, q) in pairwise(curve)
    )
    half, mass, knee = math.fsum(m for _, m in pieces) / 2, 0.0, reach
    for distance, piece in pieces:
        mass += piece
        if mass >= half:
            knee = distance
            break
    gaps = [b - a for (a, _), (b, _) in pairwise(curve) if a <= 0 <= b]
    return max(knee, 1e-6 * reach, *gaps)


def _floor(curve: Curve) -> float:
    """Where the logarithmic density axis ends: a decade below the lowest bump, twelve below the
    peak at most. Smoothed densities fall off without end between bumps, and drawing that would
    flatten the rest."""
    peak = max(d for _, d in curve)
    inner = zip(curve, curve[1:], curve[2:], strict=False)
    bumps = [
        d for (_, before), (_, d), (_, after) in inner if before < d >= after and d > 1e-11 * peak
    ]
    return max(1e-12 * peak, min([*bumps, 0.1 * peak]) / 10)


def spectral_axis(curve: Curve, marks: Sequence[float], *, start: float, stop: float) -> Scale:
    """Eigenvalues across: linear around zero with the bulk, logarithmic beyond so that outliers
    fit. Reaches over what is drawn of the density and over ``marks``."""
    floor = _floor(curve)
    shown = [*(v for v, d in curve if d >= floor), *marks, 0.0]
    low, high = min(shown), max(shown)
    reach = max(-low, high)
    if not reach > 0:
        return Scale(kind="linear", low=-1.0, high=1.0, start=start, stop=stop)
    knee = spectral_knee(curve)
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
    negative, positive = [p for p in curve if p[0] < 0], [p for p in curve if p[0] >= 0]
    if negative and positive and positive[0][0] > 0:
        (a, p), (b, q) = negative[-1], positive[0]
        middle = (0.0, p + (q - p) * (-a / (b - a)))
        return [*negative, middle], [middle, *positive]
    return ([*negative, positive[0]] if negative and positive else negative), positive


def _outline(curve: Curve, x: Scale, y: Scale, *, apart: float) -> list[tuple[float, float]]:
    """Pixels of the part of a curve that lies on the axis, without the points that cannot be told
    from their neighbours."""
    inside = [k for k, (v, _) in enumerate(curve) if x.low <= v <= x.high]
    if not inside:
        return []
    kept: list[tuple[float, float]] = []
    for value, density in curve[max(0, inside[0] - 1) : inside[-1] + 2]:
        point = x(value), y(max(density, y.low))
        if not kept or abs(point[0] - kept[-1][0]) >= apart or abs(point[1] - kept[-1][1]) >= apart:
            kept.append(point)
    return kept


def _area(
    curve: Curve, x: Scale, y: Scale, *, apart: float = 0.6, line: bool = True
) -> list[object]:
    """A density as an area down to the axis: what is below zero in its own colour and, drawn as a
    line, dashed."""
    parts: list[object] = []
    for half, sign in zip(_halves(curve), (" negative", ""), strict=True):
        points = _outline(half, x, y, apart=apart)
        if len(points) < 2:
            continue
        closed = [(points[0][0], y.start), *points, (points[-1][0], y.start)]
        parts.append(
            element(
                "polygon",
                points=" ".join(f"{a:.1f},{b:.1f}" for a, b in closed),
                class_=f"density{sign}",
            )
        )
        if line:
            drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(element("polyline", points=drawn, class_=f"spectrum{sign}"))
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
    width, height, top, bottom = 1120.0, 380.0, 26.0, 42.0
    row = 0.0 if not runs else min(7.0, 42.0 / len(runs))
    below = row * len(runs) + (9.0 if runs else 0.0)
    floor, peak = _floor(curve), max(d for _, d in curve)
    y = Scale(kind="log", low=floor, high=2 * peak, start=height - bottom - below, stop=top)
    parts = _axes(x, y, f"eigenvalue of {matrix} ({measure})", "density, log scale", below=below)
    zero = x(0.0)
    parts.append(_line(zero, y.start + below, zero, y.stop, "zero"))
    if zero - x.start > 110:
        parts.append(_text(zero - 7, top - 6, "curves down", "label negative-text", "end"))
    if x.stop - zero > 110:
        parts.append(_text(zero + 7, top - 6, "curves up", "label"))
    parts += _area(curve, x, y)
    for k, nodes in enumerate(runs):
        at = y.start + 6 + k * row
        path = "".join(f"M{x(v):.1f} {at:.1f}v{0.75 * row:.1f}" for v in nodes)
        title = element(
            "title", f"run {k + 1}: {len(nodes)} nodes from {sig(min(nodes))} to {sig(max(nodes))}"
        )
        parts.append(element("path", title, d=path, class_="rug"))
    parts += [
        marker("diamond", x(v), y.start, "eigenvalue", title, r=3.6) for v, title in eigenvalues
    ]
    at_peak = max(curve, key=lambda point: point[1])
    ends = [v for v, _ in eigenvalues]
    desc = (
        f"The density peaks at {sig(at_peak[0])} with {sig(peak)} per unit of the eigenvalue"
        + (f"; the extreme eigenvalues are {sig(min(ends))} and {sig(max(ends))}" if ends else "")
        + ". The tables below have the numbers."
    )
    return _svg(width, height, f"Spectral density of {matrix}, logarithmic scale", parts, desc=desc)


def spectra(
    panels: Sequence[tuple[str, str, Curve]], *, matrix: str, measure: str
) -> Markup | None:
    """Small densities ``(name, label, curve)`` side by side on one eigenvalue axis, each relative
    to its own peak."""
    if not panels:
        return None
    columns = min(4, len(panels))
    width, gap, head, row, foot = 1120.0, 22.0, 22.0, 96.0, 30.0
    panel = (width - gap * (columns + 1)) / columns
    height = head + row * math.ceil(len(panels) / columns) + foot
    axes = [spectral_axis(curve, (), start=0.0, stop=panel) for _, _, curve in panels]
    knees = sorted(spectral_knee(curve) for _, _, curve in panels)
    low, high, knee = min(a.low for a in axes), max(a.high for a in axes), knees[len(knees) // 2]
    knee = max(knee, 1e-6 * max(-low, high))
    kind = "asinh" if max(-low, high) > 12 * knee else "linear"
    depth = min(_floor(c) / max(d for _, d in c) for _, _, c in panels)
    parts: list[object] = []
    for k, (name, label, curve) in enumerate(panels):
        left, top = gap + (k % columns) * (panel + gap), head + (k // columns) * row
        x = Scale(kind=kind, low=low, high=high, start=left, stop=left + panel, knee=knee)
        y = Scale(kind="log", low=depth, high=1.0, start=top + row - 30, stop=top)
        peak = max(d for _, d in curve)
        parts.append(
            element("text", element("title", name), label, x=left, y=top - 4, class_="row")
        )
        parts += _area([(v, d / peak) for v, d in curve], x, y, apart=2.0, line=False)
        parts += [
            _line(left, y.start, left + panel, y.start, "axis"),
            _line(x(0.0), y.start, x(0.0), top, "zero"),
        ]
        if k >= len(panels) - columns:
            ticks = x.ticks(about=3)
            for tick in (t for t in ticks if t in (0.0, ticks[0], ticks[-1])):
                parts.append(_text(x(tick), y.start + 13, short(tick), "tick", "middle"))
    parts.append(
        _text(width - gap, height - 4, f"eigenvalue of {matrix} ({measure})", "label", "end")
    )
    desc = "One panel a layer, one eigenvalue axis for all, densities relative to the layer's peak on a log scale."
    return _svg(width, height, f"Spectral densities of {matrix} by layer", parts, desc=desc)


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """A row of ``(shape, class, text)``."""
    parts = [
        element(
            "span",
            element(
                "svg",
                marker(s, 8, 8, c),
                viewBox="0 0 16 16",
                width=14,
                height=14,
                aria_hidden="true",
            ),
            f" {t}",
        )
        for s, c, t in entries
    ]
    return element("p", *parts, class_="legend")


def progress(share: float) -> Markup:
    """A small bar for a table cell."""
    bar = element(
        "rect", x=0, y=0, width=max(0.5, 120 * min(1.0, max(0.0, share))), height=8, class_="time"
    )
    return element("svg", bar, viewBox="0 0 120 8", width=120, height=8, aria_hidden="true")
