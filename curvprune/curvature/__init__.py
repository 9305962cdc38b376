"""Operators × estimators, products with the loss's curvature, factors, analysis of a model."""

from curvprune.curvature.analysis import (
    MATRICES,
    QUANTITIES,
    Analysis,
    LayerCurvature,
    analyze_curvature,
)
from curvprune.curvature.closed_forms import BlockDiagonal, Dense, Diagonal, Ekfac, Kronecker
from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.estimators import density, diagonal, eigenpairs, trace
from curvprune.curvature.factors import kfac
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.lobpcg import Lobpcg
from curvprune.curvature.operators import Function, NoClosedForm, Operator, ParamSpace, Sum
from curvprune.curvature.probes import probe_layers
from curvprune.curvature.products import empirical_fisher, fisher, gauss_newton, hessian
from curvprune.curvature.records import (
    AnalysisRecord,
    DensityRecord,
    DiagnosisRecord,
    DiagonalRecord,
    Disagreement,
    EigenvaluesRecord,
    EstimateRecord,
    LayerCurvatureRecord,
    ModelCurvatureRecord,
    TraceRecord,
)
from curvprune.curvature.sampled_fisher import Change, FisherPass, fisher_pass, ratio_estimate

__all__ = [
    "MATRICES",
    "QUANTITIES",
    "Analysis",
    "AnalysisRecord",
    "BlockDiagonal",
    "Change",
    "Dense",
    "DensityRecord",
    "DiagnosisRecord",
    "Diagonal",
    "DiagonalRecord",
    "Disagreement",
    "EigenPairs",
    "EigenvaluesRecord",
    "Ekfac",
    "Estimate",
    "EstimateRecord",
    "FisherPass",
    "Function",
    "Kronecker",
    "Lanczos",
    "LayerCurvature",
    "LayerCurvatureRecord",
    "Lobpcg",
    "ModelCurvatureRecord",
    "NoClosedForm",
    "Operator",
    "ParamSpace",
    "Sum",
    "TraceRecord",
    "analyze_curvature",
    "density",
    "diagonal",
    "eigenpairs",
    "empirical_fisher",
    "fisher",
    "fisher_pass",
    "gauss_newton",
    "hessian",
    "kfac",
    "probe_layers",
    "ratio_estimate",
    "trace",
]
