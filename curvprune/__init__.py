"""curvprune: the smallest model that is provably inside an accuracy budget, priced by the curvature of the loss."""

__version__ = "0.1.0"

from curvprune.api import Result, analyze, certify, compress, load, price, prune, quantize
from curvprune.certificate import Verdict
from curvprune.data import Split, Splits
from curvprune.ledger import Ledger
from curvprune.objective import CausalLM, Classification, LabelFree, Objective
from curvprune.options import Cast, Keep, Prune, PruneQuantize, Quantize
from curvprune.plan import Budget, Plan
from curvprune.stages import Analysis, Settings

__all__ = [
    "Analysis",
    "Budget",
    "Cast",
    "CausalLM",
    "Classification",
    "Keep",
    "LabelFree",
    "Ledger",
    "Objective",
    "Plan",
    "Prune",
    "PruneQuantize",
    "Quantize",
    "Result",
    "Settings",
    "Split",
    "Splits",
    "Verdict",
    "analyze",
    "certify",
    "compress",
    "load",
    "price",
    "prune",
    "quantize",
]
