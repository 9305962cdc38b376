"""curvprune: the smallest model that is provably inside an accuracy budget, priced by the curvature
of the loss.

Names are imported on first use, so that the command line can set up the process before torch is
loaded.
"""

from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from curvprune.api import analyze as analyze
    from curvprune.api import certify as certify
    from curvprune.api import claim as claim
    from curvprune.api import compare as compare
    from curvprune.api import compare_curvature as compare_curvature
    from curvprune.api import compress as compress
    from curvprune.api import empirical_fisher as empirical_fisher
    from curvprune.api import fisher as fisher
    from curvprune.api import frontier as frontier
    from curvprune.api import gauss_newton as gauss_newton
    from curvprune.api import hessian as hessian
    from curvprune.api import kfac as kfac
    from curvprune.api import load as load
    from curvprune.api import price as price
    from curvprune.api import prune as prune
    from curvprune.api import quantize as quantize
    from curvprune.api import recover as recover
    from curvprune.artifact import export_dense as export_dense
    from curvprune.artifact import export_gptq as export_gptq
    from curvprune.certificate import Claim as Claim
    from curvprune.certificate import JointVerdict as JointVerdict
    from curvprune.certificate import ModelComparison as ModelComparison
    from curvprune.certificate import Verdict as Verdict
    from curvprune.certificate import certify_all as certify_all
    from curvprune.certificate import certify_lm_eval as certify_lm_eval
    from curvprune.certificate import certify_values as certify_values
    from curvprune.certificate import claim_lm_eval as claim_lm_eval
    from curvprune.certificate import claim_values as claim_values
    from curvprune.compression import Recovery as Recovery
    from curvprune.curvature import Analysis as Analysis
    from curvprune.curvature import CurvatureComparison as CurvatureComparison
    from curvprune.curvature import CurvatureMonitor as CurvatureMonitor
    from curvprune.curvature import density as density
    from curvprune.curvature import diagonal as diagonal
    from curvprune.curvature import eigenpairs as eigenpairs
    from curvprune.curvature import trace as trace
    from curvprune.model import Bernoulli as Bernoulli
    from curvprune.model import CausalLM as CausalLM
    from curvprune.model import Classification as Classification
    from curvprune.model import Exponential as Exponential
    from curvprune.model import Gaussian as Gaussian
    from curvprune.model import Items as Items
    from curvprune.model import LabelFree as LabelFree
    from curvprune.model import Loss as Loss
    from curvprune.model import MaskedLM as MaskedLM
    from curvprune.model import Metric as Metric
    from curvprune.model import MultiLabel as MultiLabel
    from curvprune.model import NegativeBinomial as NegativeBinomial
    from curvprune.model import Objective as Objective
    from curvprune.model import OutputLoss as OutputLoss
    from curvprune.model import Poisson as Poisson
    from curvprune.model import QuestionAnswering as QuestionAnswering
    from curvprune.model import Regression as Regression
    from curvprune.model import Segmentation as Segmentation
    from curvprune.model import Seq2Seq as Seq2Seq
    from curvprune.model import Split as Split
    from curvprune.model import Splits as Splits
    from curvprune.options import Cast as Cast
    from curvprune.options import Keep as Keep
    from curvprune.options import Prune as Prune
    from curvprune.options import PruneCast as PruneCast
    from curvprune.options import PruneQuantize as PruneQuantize
    from curvprune.options import Quantize as Quantize
    from curvprune.planning import Budget as Budget
    from curvprune.planning import Limit as Limit
    from curvprune.planning import Plan as Plan
    from curvprune.pricing import Ledger as Ledger
    from curvprune.run import Result as Result
    from curvprune.run import Settings as Settings
    from curvprune.run import StructuredResult as StructuredResult
    from curvprune.structured import Structured as Structured
    from curvprune.targets import export_gguf as export_gguf
    from curvprune.targets import export_onnx as export_onnx
    from curvprune.targets import open_engine as open_engine

_HOME = {
    "api": (
        "Result",
        "StructuredResult",
        "analyze",
        "certify",
        "claim",
        "compare",
        "compare_curvature",
        "compress",
        "empirical_fisher",
        "fisher",
        "frontier",
        "gauss_newton",
        "hessian",
        "kfac",
        "load",
        "price",
        "prune",
        "quantize",
        "recover",
    ),
    "artifact": ("export_dense", "export_gptq"),
    "certificate": (
        "Claim",
        "JointVerdict",
        "ModelComparison",
        "Verdict",
        "certify_all",
        "certify_lm_eval",
        "certify_values",
        "claim_lm_eval",
        "claim_values",
    ),
    "compression": ("Recovery",),
    "curvature": (
        "Analysis",
        "CurvatureComparison",
        "CurvatureMonitor",
        "density",
        "diagonal",
        "eigenpairs",
        "trace",
    ),
    "model": (
        "Bernoulli",
        "CausalLM",
        "Classification",
        "Exponential",
        "Gaussian",
        "Items",
        "LabelFree",
        "Loss",
        "MaskedLM",
        "Metric",
        "MultiLabel",
        "NegativeBinomial",
        "Objective",
        "OutputLoss",
        "Poisson",
        "QuestionAnswering",
        "Regression",
        "Segmentation",
        "Seq2Seq",
        "Split",
        "Splits",
    ),
    "options": ("Cast", "Keep", "Prune", "PruneCast", "PruneQuantize", "Quantize"),
    "planning": ("Budget", "Limit", "Plan"),
    "pricing": ("Ledger",),
    "run": ("Settings",),
    "structured": ("Structured",),
    "targets": ("export_gguf", "export_onnx", "open_engine"),
}
__all__ = ["__version__", *sorted(chain.from_iterable(_HOME.values()))]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"curvprune.{module}"), name)
    raise AttributeError(f"module 'curvprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
