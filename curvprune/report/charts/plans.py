"""Plans: predicted against measured loss, and loss against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.report.charts.axes import Scale, axes, choose_scale
from curvprune.report.charts.svg import (
    element,
    flat_whisker,
    line,
    marker,
    path_of,
    svg,
    whisker,
    words,
)
from curvprune.report.figures import plus_minus, short, size

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560.0, 470.0, 64.0, 30.0, 16.0, 46.0
# Where the number of a mark may stand, best place first.
_CORNERS = ((8, -6), (8, 13), (-16, -6), (-16, 13), (14, 4), (-24, 4), (0, -14), (0, 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A plan in a chart: what it should cost, what it did cost, how it is drawn and called."""

    number: int
    name: str
    shape: str
    class_: str
    bytes: float
    predicted: float | None
    predicted_stderr: float | None
    measured: float | None
    measured_stderr: float | None
    chosen: bool = False

    def title(self) -> str:
        predicted = plus_minus(self.predicted, self.predicted_stderr)
        measured = plus_minus(self.measured, self.measured_stderr)
        return (
            f"#{self.number} {self.name}: predicted {predicted}, measured {measured}, "
            f"{size(self.bytes)}"
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    """A point and where its loss stands: ``across`` and ``up``, with their standard errors."""

    point: Point
    across: float
    up: float
    across_error: float
    up_error: float


def _draw(marks: Sequence[_Mark], x: Scale, y: Scale) -> list[Markup]:
    """The points with a ring around the chosen one, each with its number in the first free
    corner."""
    parts = []
    # All marks are taken before the first number is placed.
    taken = [(x(mark.across), y(mark.up)) for mark in marks]
    for mark in marks:
        here = x(mark.across), y(mark.up)
        point = mark.point
        if point.chosen:
            parts.append(element("circle", cx=here[0], cy=here[1], r=10.0, class_="ring"))
        parts.append(marker(point.shape, *here, point.class_, point.title()))
        corner = _free_corner(*here, taken)
        taken.append(corner)
        parts.append(words(*corner, str(point.number), "number"))
    return parts


def _free_corner(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """The first place beside a mark that is far enough from every other; the last if none is."""
    for dx, dy in _CORNERS:
        corner = x + dx, y + dy
        if all(abs(corner[0] - a) > 13 or abs(corner[1] - b) > 10 for a, b in taken):
            break
    return corner


def scatter(points: Sequence[Point], *, measure: str) -> Markup | None:
    """Predicted (across) against measured (up) with error bars and the identity line; ``None`` with
    nothing to show."""
    marks = []
    for point in points:
        if point.predicted is not None and point.measured is not None:
            errors = point.predicted_stderr or 0.0, point.measured_stderr or 0.0
            marks.append(_Mark(point, point.predicted, point.measured, *errors))
    if not marks:
        return None
    # 1. One scale for both axes keeps the identity line at 45 degrees.
    values, errors_shown = [], []
    for mark in marks:
        values += [mark.across, mark.up]
        errors_shown += [mark.across_error, mark.up_error]
    x = choose_scale(values, errors_shown, start=LEFT, stop=WIDTH - RIGHT)
    y = Scale(kind=x.kind, low=x.low, high=x.high, start=HEIGHT - BOTTOM, stop=TOP, knee=x.knee)
    parts = axes(x, y, f"predicted ({measure})", f"measured on the select split ({measure})")
    parts.append(line(x(x.low), y(y.low), x(x.high), y(y.high), "identity"))
    parts.append(words(x.start + 26, y.start - 8, "measured = predicted", "label faint"))
    # 2. Error bars below, marks on top.
    for mark in marks:
        up, across, error = mark.up, mark.across, mark.up_error
        parts.append(whisker(x(across), y(up - error), y(up + error)))
        error = mark.across_error
        parts.append(flat_whisker(y(up), x(across - error), x(across + error)))
    parts += _draw(marks, x, y)
    says = "Predicted against measured loss increase of every plan tried"
    return svg(WIDTH, HEIGHT, says, parts)


@dataclass(frozen=True, order=True, slots=True)
class FrontierMark:
    """The best plan of a size."""

    bytes: float
    predicted: float
    stderr: float


def frontier(
    curve: Sequence[FrontierMark],
    points: Sequence[Point],
    *,
    measure: str,
    max_drop: float | None,
    max_bytes: float | None,
) -> Markup | None:
    """Bytes (across) against predicted loss (line, band of one standard error), measured plans on
    top, the budget; ``None`` without a ``curve``, which is sorted by bytes."""
    if not curve:
        return None
    # 1. Axes that hold curve, marks and budget; bytes in the largest prefix that fits.
    sizes = [mark.bytes for mark in curve] + [p.bytes for p in points if p.measured is not None]
    if max_bytes is not None:
        sizes.append(max_bytes)
    divisor, prefix = _prefix(max(sizes))
    marks = []
    for point in points:
        if point.measured is not None:
            error = point.measured_stderr or 0.0
            marks.append(_Mark(point, point.bytes / divisor, point.measured, 0.0, error))
    x = _bytes_axis([s / divisor for s in sizes])
    y = _loss_axis(curve, marks, max_drop)
    y_label = f"loss increase ({measure}): line predicted, marks measured"
    parts = axes(x, y, f"weights on disk ({prefix})", y_label)
    # 2. The frontier.
    parts += _curve(curve, divisor, x, y, measure)
    # 3. The budget's lines.
    if max_drop is not None:
        level = y(max_drop)
        text = f"budget {short(max_drop)} {measure}"
        parts.append(line(x.start, level, x.stop, level, "budget"))
        parts.append(words(x.stop - 4, level - 6, text, "label budget-text", "end"))
    if max_bytes is not None:
        most = x(max_bytes / divisor)
        text = f"budget {size(max_bytes)}"
        parts.append(line(most, y.start, most, y.stop, "budget"))
        parts.append(words(most + 5, y.stop + 10, text, "label budget-text"))
    # 4. Measured plans.
    for mark in marks:
        low, high = y(mark.up - mark.up_error), y(mark.up + mark.up_error)
        parts.append(whisker(x(mark.across), low, high))
    parts += _draw(marks, x, y)
    says = "Frontier: bytes against predicted loss increase, measured plans on top"
    return svg(WIDTH, HEIGHT, says, parts)


def _prefix(largest: float) -> tuple[float, str]:
    for divisor, prefix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= 2 * divisor:
            return divisor, prefix
    return 1.0, "B"


def _bytes_axis(sizes: Sequence[float]) -> Scale:
    """Linear, also where the sizes span a decade: a byte is a byte."""
    x = choose_scale(sizes, [0.0] * len(sizes), start=LEFT, stop=WIDTH - RIGHT)
    if x.kind == "linear":
        return x
    low, high = min(sizes), max(sizes)
    margin = 0.06 * (high - low)
    return Scale(
        kind="linear", low=max(0.0, low - margin), high=high + margin, start=x.start, stop=x.stop
    )


def _loss_axis(
    curve: Sequence[FrontierMark], marks: Sequence[_Mark], max_drop: float | None
) -> Scale:
    heights = [mark.predicted for mark in curve] + [mark.up for mark in marks]
    errors = [mark.stderr for mark in curve] + [mark.up_error for mark in marks]
    if max_drop is not None:
        heights.append(max_drop)
        errors.append(0.0)
    return choose_scale(heights, errors, start=HEIGHT - BOTTOM, stop=TOP)


def _curve(
    curve: Sequence[FrontierMark], divisor: float, x: Scale, y: Scale, measure: str
) -> list[Markup]:
    """A band of one standard error, the line, a dot for every plan."""
    # The band goes along the upper edge and back along the lower one.
    upper = [(x(m.bytes / divisor), y(m.predicted + m.stderr)) for m in curve]
    lower = [(x(m.bytes / divisor), y(m.predicted - m.stderr)) for m in curve]
    middle = [(x(m.bytes / divisor), y(m.predicted)) for m in curve]
    parts = [
        element("polygon", points=path_of([*upper, *reversed(lower)]), class_="band"),
        element("polyline", points=path_of(middle), class_="curve"),
    ]
    for mark, place in zip(curve, middle, strict=True):
        predicted = plus_minus(mark.predicted, mark.stderr)
        title = f"{size(mark.bytes)}: predicted {predicted} {measure}"
        parts.append(marker("circle", *place, "dot", title, r=1.8))
    return parts
