"""Colours that stand for numbers."""

from __future__ import annotations

from collections.abc import Sequence

Colour = tuple[int, int, int]  # red, green, blue

# Lightness rises steadily along the ramp (a test holds it), so it reads the same in grey and for
# any colour vision.
_HEAT: tuple[Colour, ...] = (
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
_DEPTH: tuple[Colour, ...] = (
    (74, 85, 104),
    (49, 104, 160),
    (52, 148, 175),
    (84, 178, 140),
    (190, 196, 84),
    (240, 170, 60),
    (222, 108, 58),
    (170, 50, 80),
)


def _interpolate(anchors: Sequence[Colour], share: float) -> str:
    """The colour at ``share`` of the ramp, as ``#rrggbb``."""
    position = min(1.0, max(0.0, share)) * (len(anchors) - 1)
    k = min(int(position), len(anchors) - 2)
    code = "#"
    for a, b in zip(anchors[k], anchors[k + 1], strict=True):
        code += f"{round(a + (b - a) * (position - k)):02x}"
    return code


def heat_colour(share: float) -> str:
    """Colour of a cell at ``share`` (0 ... 1) of the logarithmic scale."""
    return _interpolate(_HEAT, share)


def depth_colour(rank: int, of: int) -> str:
    """Colour of an option by its rank from least (0) to most compressed."""
    return _interpolate(_DEPTH, rank / max(1, of - 1))


def dark(colour: str) -> bool:
    """Whether light text reads better on it (luma of BT.601)."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140
