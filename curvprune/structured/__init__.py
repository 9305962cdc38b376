"""Hidden units that can be removed: cuts, order, latency, surgery."""

from curvprune.structured.compensation import Reader, compensate, removal_order
from curvprune.structured.cuts import find_cuts, remove_, silence_
from curvprune.structured.latency import Run, seconds
from curvprune.structured.units import (
    Pruned,
    Structured,
    Work,
    choose_widths,
    offered_widths,
    prune_units,
)

__all__ = [
    "Pruned",
    "Reader",
    "Run",
    "Structured",
    "Work",
    "choose_widths",
    "compensate",
    "find_cuts",
    "offered_widths",
    "prune_units",
    "removal_order",
    "remove_",
    "seconds",
    "silence_",
]
