"""Stacked bars of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.report.charts.colours import dark
from curvprune.report.charts.svg import Box, element, rect, svg, words
from curvprune.report.figures import size

WIDTH, LEFT, RIGHT, ROW = 1120.0, 70.0, 90.0, 44.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar; without ``fill`` it has the colour of the rest."""

    name: str
    bytes: float
    fill: str = ""


def bars(rows: Sequence[tuple[str, Sequence[Segment]]]) -> Markup:
    """One bar for each ``(label, segments)``, all on one axis of bytes."""
    totals = [_total(segments) for _, segments in rows]
    scale = (WIDTH - LEFT - RIGHT) / (max(totals) or 1.0)
    parts = []
    for k, (label, segments) in enumerate(rows):
        y, x = k * ROW + 6, LEFT
        parts.append(words(LEFT - 8, y + 19, label, "label", "end"))
        for segment in segments:
            width = segment.bytes * scale
            parts += _segment(segment, Box(x, y, width, 28.0))
            x += width
        parts.append(words(x + 8, y + 19, size(totals[k]), "label strong"))
    return svg(WIDTH, ROW * len(rows) + 6, "Bytes before and after, by option", parts)


def _total(segments: Sequence[Segment]) -> float:
    return sum(segment.bytes for segment in segments)


def _segment(segment: Segment, box: Box) -> list[Markup]:
    """The coloured part, with its name where that fits."""
    title = element("title", f"{segment.name}: {size(segment.bytes)}")
    class_ = "segment" if segment.fill else "rest"
    parts = [rect(box, class_, title, fill=segment.fill or None)]
    # 7.5 pixels a letter: a name that is cut off would be worse than none.
    if box.width > 7.5 * len(segment.name) + 10:
        ink = "label"
        if segment.fill:
            ink = "on-dark" if dark(segment.fill) else "on-light"
        parts.append(words(box.middle[0], box.y + 18, segment.name, ink, "middle"))
    return parts
