"""curvprune: the smallest model that is provably inside an accuracy budget, priced by the curvature
of the loss.

Names are imported on first use, so that the command line can set up the process before torch is
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from curvprune.analysis import Analysis as Analysis
    from curvprune.api import Result as Result
    from curvprune.api import StructuredResult as StructuredResult
    from curvprune.api import analyze as analyze
    from curvprune.api import certify as certify
    from curvprune.api import compress as compress
    from curvprune.api import empirical_fisher as empirical_fisher
    from curvprune.api import fisher as fisher
    from curvprune.api import frontier as frontier
    from curvprune.api import gauss_newton as gauss_newton
    from curvprune.api import hessian as hessian
    from curvprune.api import load as load
    from curvprune.api import price as price
    from curvprune.api import prune as prune
    from curvprune.api import quantize as quantize
    from curvprune.api import recover as recover
    from curvprune.certificate import Verdict as Verdict
    from curvprune.certificate import certify_values as certify_values
    from curvprune.curvature.estimators import density as density
    from curvprune.curvature.estimators import diagonal as diagonal
    from curvprune.curvature.estimators import eigenpairs as eigenpairs
    from curvprune.curvature.estimators import trace as trace
    from curvprune.data import Split as Split
    from curvprune.data import Splits as Splits
    from curvprune.export import export_dense as export_dense
    from curvprune.export import export_gptq as export_gptq
    from curvprune.job import Settings as Settings
    from curvprune.knapsack import Limit as Limit
    from curvprune.ledger import Ledger as Ledger
    from curvprune.lmeval import certify_lm_eval as certify_lm_eval
    from curvprune.objective import CausalLM as CausalLM
    from curvprune.objective import Classification as Classification
    from curvprune.objective import LabelFree as LabelFree
    from curvprune.objective import Metric as Metric
    from curvprune.objective import Objective as Objective
    from curvprune.options import Cast as Cast
    from curvprune.options import Keep as Keep
    from curvprune.options import Prune as Prune
    from curvprune.options import PruneCast as PruneCast
    from curvprune.options import PruneQuantize as PruneQuantize
    from curvprune.options import Quantize as Quantize
    from curvprune.plan import Budget as Budget
    from curvprune.plan import Plan as Plan
    from curvprune.recovery import Recovery as Recovery
    from curvprune.structured import Structured as Structured

_HOME = {
    "analysis": ("Analysis",),
    "api": (
        *(
            "Result",
            "analyze",
            "certify",
            "compress",
            "empirical_fisher",
            "fisher",
            "gauss_newton",
            "hessian",
            "load",
        ),
        *("frontier", "price", "prune", "quantize", "recover", "StructuredResult"),
    ),
    "curvature.estimators": ("density", "diagonal", "eigenpairs", "trace"),
    "certificate": ("Verdict", "certify_values"),
    "data": ("Split", "Splits"),
    "export": ("export_dense", "export_gptq"),
    "job": ("Settings",),
    "knapsack": ("Limit",),
    "ledger": ("Ledger",),
    "lmeval": ("certify_lm_eval",),
    "objective": ("CausalLM", "Classification", "LabelFree", "Metric", "Objective"),
    "options": ("Cast", "Keep", "Prune", "PruneCast", "PruneQuantize", "Quantize"),
    "plan": ("Budget", "Plan"),
    "recovery": ("Recovery",),
    "structured": ("Structured",),
}
__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"curvprune.{module}"), name)
    raise AttributeError(f"module 'curvprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
