"""SVG elements: everything that a chart is drawn with. All text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from curvprune.report.figures import clean

# Shapes tell marks apart for those who do not see the colours.
# Corners around the middle, in radii.
_OUTLINES = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    "triangle": ((0.0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
}


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    def inside(self, margin: float) -> Box:
        """The same without ``margin`` on every side."""
        return Box(
            self.x + margin,
            self.y + margin,
            self.width - 2 * margin,
            self.height - 2 * margin,
        )


def element(name: str, *children: object, **attributes: object) -> Markup:
    """One SVG element; text and attribute values are escaped, ``class_`` means class,
    ``stroke_width`` stroke-width."""
    # 1. Attributes: one decimal of a pixel is enough.
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else clean(value)
        written.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    # 2. Children: elements as they are, everything else as text.
    inner = []
    for child in children:
        inner.append(child if isinstance(child, Markup) else escape(clean(child)))
    return Markup(f"<{name}{''.join(written)}>{''.join(inner)}</{name}>")


def svg(
    width: float,
    height: float,
    label: str,
    parts: Sequence[Markup],
    *,
    class_: str = "chart",
    desc: str = "",
) -> Markup:
    """A whole chart; ``label`` and ``desc`` say in words what it shows."""
    # What a screen reader reads out.
    head = [element("title", label)]
    if desc:
        head.append(element("desc", desc))
    return element(
        "svg",
        *head,
        *parts,
        class_=class_,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


def words(x: float, y: float, text: str, class_: str = "tick", anchor: str | None = None) -> Markup:
    """Text at a point."""
    return element("text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def rect(box: Box, class_: str | None, *children: Markup, fill: str | None = None) -> Markup:
    """A rectangle; its colour is its class's, or ``fill``."""
    return element(
        "rect",
        *children,
        x=float(box.x),
        y=float(box.y),
        width=float(box.width),
        height=float(box.height),
        fill=fill,
        class_=class_,
    )


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """Points as the ``points`` attribute wants them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def whisker(x: float, low: float, high: float) -> Markup:
    """An upright error bar."""
    return line(x, low, x, high, "whisker")


def flat_whisker(y: float, low: float, high: float) -> Markup:
    """An error bar that lies down."""
    return line(low, y, high, y, "whisker")


def marker(
    shape: str, x: float, y: float, class_: str, title: str | None = None, *, r: float = 4.5
) -> Markup:
    """A point: circle, square, diamond, triangle or star, with an optional tooltip."""
    inner = () if title is None else (element("title", title),)
    if shape == "circle":
        return element("circle", *inner, cx=float(x), cy=float(y), r=float(r), class_=class_)
    outline = _star() if shape == "star" else _OUTLINES[shape]
    corners = [(x + r * dx, y + r * dy) for dx, dy in outline]
    return element("polygon", *inner, points=path_of(corners), class_=class_)


def _star() -> list[tuple[float, float]]:
    """Ten corners, every other one further out."""
    corners = []
    for k in range(10):
        radius = 1.6 if k % 2 == 0 else 0.7
        angle = k * math.pi / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """A row of ``(shape, class, text)``."""
    parts = []
    for shape, class_, text in entries:
        mark = element(
            "svg",
            marker(shape, 8, 8, class_),
            viewBox="0 0 16 16",
            width=14,
            height=14,
            aria_hidden="true",
        )
        parts.append(element("span", mark, f" {text}"))
    return element("p", *parts, class_="legend")


def progress(share: float) -> Markup:
    """A small bar for a table cell."""
    width = max(0.5, 120 * min(1.0, max(0.0, share)))
    bar = element("rect", x=0, y=0, width=width, height=8, class_="time")
    return element("svg", bar, viewBox="0 0 120 8", width=120, height=8, aria_hidden="true")
