"""Hidden units that can be removed: cuts, order, prices, widths, latency, surgery."""

from curvprune.structured.asked import Structured
from curvprune.structured.compensation import Consumer, compensate, removal_order, steadied
from curvprune.structured.finding import find_cuts
from curvprune.structured.latency import Latency, Run, seconds
from curvprune.structured.removal import Pruned, prune_units
from curvprune.structured.surgery import remove_, silence_
from curvprune.structured.widths import choose_widths, offered_widths
from curvprune.structured.work import CutWork

__all__ = [
    "Consumer",
    "CutWork",
    "Latency",
    "Pruned",
    "Run",
    "Structured",
    "choose_widths",
    "compensate",
    "find_cuts",
    "offered_widths",
    "prune_units",
    "removal_order",
    "remove_",
    "seconds",
    "silence_",
    "steadied",
]
