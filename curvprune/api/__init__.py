"""The verbs, on any model and data.

``data`` is a re-iterable of batches (dicts of tensors as transformers models take them, or
``(inputs, targets)``), or `Splits` where a budget needs its parts under your control. The input
model is untouched unless ``inplace=True``.
"""

from curvprune.api.analysis import analyze, empirical_fisher, fisher, gauss_newton, hessian
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
    "compress",
    "empirical_fisher",
    "fisher",
    "frontier",
    "gauss_newton",
    "hessian",
    "load",
    "price",
    "prune",
    "quantize",
    "recover",
]
