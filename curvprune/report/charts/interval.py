"""The verdict on one axis."""

from __future__ import annotations

from markupsafe import Markup

from curvprune.report.charts.axes import Scale
from curvprune.report.charts.svg import Box, line, marker, rect, svg, words
from curvprune.report.figures import PLUS_MINUS, plus_minus, short

WIDTH, HEIGHT, LEFT, RIGHT = 640.0, 112.0, 12.0, 628.0
AXIS, MIDDLE, TOP = 78.0, 52.0, 26.0  # heights of the axis, of the marks, of the allowed side


def interval(
    *,
    drop: float,
    stderr: float,
    bound: float | None,
    budget: float | None,
    label: str,
    scale: float,
) -> Markup:
    """Drop with its standard error, the one-sided bound, the budget and the side it allows.

    ``scale`` multiplies what is shown (100 for accuracy in percentage points).
    """
    drop, stderr = drop * scale, stderr * scale
    bound = None if bound is None else bound * scale
    budget = None if budget is None else budget * scale
    ends = [end for end in (bound, budget) if end is not None]
    x = _axis([0.0, drop - 1.5 * stderr, drop + stderr, *ends])
    parts = []
    # 1. The side that the budget allows, behind everything.
    if budget is not None:
        allowed = Box(LEFT, TOP, max(0.0, x(budget) - LEFT), AXIS - TOP)
        parts.append(rect(allowed, "allowed"))
    # 2. The axis, and where no drop is.
    parts += _ruler(x, label)
    parts.append(line(x(0.0), TOP, x(0.0), AXIS, "zero"))
    # 3. From the drop to its bound, one standard error around the drop, the drop.
    if bound is not None:
        parts.append(line(x(drop), MIDDLE, x(bound), MIDDLE, "reach"))
        parts.append(line(x(bound), MIDDLE - 8, x(bound), MIDDLE + 8, "reach"))
    parts.append(line(x(drop - stderr), MIDDLE, x(drop + stderr), MIDDLE, "deviation"))
    told = f"drop {plus_minus(drop, stderr)}"
    parts.append(marker("circle", x(drop), MIDDLE, "drop", told, r=5.5))
    # 4. What is what.
    parts.append(words(x(drop), MIDDLE - 11, f"drop {PLUS_MINUS} se", "label", "middle"))
    if bound is not None:
        parts.append(words(x(bound), MIDDLE + 20, "bound", "label", "middle"))
    if budget is not None:
        text = f"budget {short(float(f'{budget:.10g}'))}"
        parts.append(line(x(budget), 18, x(budget), AXIS, "budget"))
        parts.append(words(x(budget), 13, text, "label budget-text", "middle"))
    says = "Measured drop, its one-sided bound and the budget on one axis"
    return svg(WIDTH, HEIGHT, says, parts, class_="chart interval")


def _axis(shown: list[float]) -> Scale:
    """An axis that holds what is shown, with room for labels on the right."""
    low, high = min(shown), max(shown)
    spread = high - low or 1.0
    return Scale(
        kind="linear",
        low=low - 0.05 * spread,
        high=high + 0.14 * spread,
        start=LEFT,
        stop=RIGHT,
    )


def _ruler(x: Scale, label: str) -> list[Markup]:
    parts = [line(LEFT, AXIS, RIGHT, AXIS, "axis")]
    for tick in x.ticks(about=7):
        parts.append(line(x(tick), AXIS, x(tick), AXIS + 4, "axis"))
        parts.append(words(x(tick), AXIS + 15, short(tick), "tick", "middle"))
    parts.append(words(RIGHT, AXIS + 30, label, "label", "end"))
    return parts
