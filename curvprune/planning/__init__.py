"""Budget, integer program, pairs of layers, search. No torch, no files."""

from curvprune.planning.integer_program import Choice, Infeasible, Limit, Row, cheapest, frontier
from curvprune.planning.pairs import Quadratic, scaled
from curvprune.planning.search import (
    SIZES,
    Budget,
    Measurement,
    Plan,
    Search,
    Trial,
    corrected,
    corrections,
    search_plans,
)

__all__ = [
    "SIZES",
    "Budget",
    "Choice",
    "Infeasible",
    "Limit",
    "Measurement",
    "Plan",
    "Quadratic",
    "Row",
    "Search",
    "Trial",
    "cheapest",
    "corrected",
    "corrections",
    "frontier",
    "scaled",
    "search_plans",
]
