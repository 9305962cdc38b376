"""The verbs, on any model and data.

``data`` is a re-iterable of batches (dicts of tensors as transformers models take them, or
``(inputs, targets)``), or `Splits` where a budget needs its parts under your control. The input
model is untouched unless ``inplace=True``.
"""

from curvprune.api.analysis import (
    analyze,
    compare_curvature,
    empirical_fisher,
    fisher,
    gauss_newton,
    hessian,
    kfac,
)
from curvprune.api.compression import compress, frontier, price, prune, quantize, recover
from curvprune.api.judgement import certify, claim, compare, load
from curvprune.run import Result, StructuredResult

__all__ = [
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
]
