"""Budget, integer program, pairs of layers, search. No torch, no files.

Start at `integer_program.cheapest` for how a plan is chosen, at `search.search_plans` for how plans
are measured until the smallest one that passes is found.
"""

from curvprune.planning.budget import OF_OUTPUTS, SHARES, SIZES, Budget, Limit, Within
from curvprune.planning.closed_loop import Measurement, Search, SearchStep, search_plans
from curvprune.planning.corrected_prices import MeasuredPlan, corrected, corrections
from curvprune.planning.frontier_plans import FrontierPlan, frontier
from curvprune.planning.highs import Effort
from curvprune.planning.infeasible import Infeasible, Shortfall
from curvprune.planning.integer_program import cheapest
from curvprune.planning.pairs import Quadratic, scaled
from curvprune.planning.plan import Plan
from curvprune.planning.priced import Choice, Priced

__all__ = [
    "OF_OUTPUTS",
    "SHARES",
    "SIZES",
    "Budget",
    "Choice",
    "Effort",
    "FrontierPlan",
    "Infeasible",
    "Limit",
    "MeasuredPlan",
    "Measurement",
    "Plan",
    "Priced",
    "Quadratic",
    "Search",
    "SearchStep",
    "Shortfall",
    "Within",
    "cheapest",
    "corrected",
    "corrections",
    "frontier",
    "scaled",
    "search_plans",
]
