"""Operators × estimators, products with the loss's curvature, factors, analysis of a model."""

from curvprune.curvature.analysis import Analysis, analyze_curvature
from curvprune.curvature.batched_fisher import fisher_moments
from curvprune.curvature.closed_forms import BlockDiagonal, Dense, Diagonal, Ekfac, Kronecker
from curvprune.curvature.comparison import Compared, CurvatureComparison, compare
from curvprune.curvature.diagnosis import Diagnosis
from curvprune.curvature.divergence import DivergencePass, divergence_pass
from curvprune.curvature.draws import Draws
from curvprune.curvature.estimates import EigenPairs, End, Estimate
from curvprune.curvature.estimators import density, diagonal, eigenpairs, trace
from curvprune.curvature.gauss_newton_blocks import exact_gauss_newton
from curvprune.curvature.kronecker_factors import ekfac, kfac, kronecker_factored
from curvprune.curvature.kronecker_operators import KroneckerFactored, Lookup, Scattered
from curvprune.curvature.kronecker_parts import KfacSettings, layers_with_norms
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.layer_curvature import LayerCurvature
from curvprune.curvature.lobpcg import Lobpcg
from curvprune.curvature.model_curvature import ModelCurvature
from curvprune.curvature.moment_bounds import Moments
from curvprune.curvature.monitor import CurvatureMonitor, Sharpness
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
from curvprune.curvature.request import MATRICES, QUANTITIES, AnalysisSettings, Remember
from curvprune.curvature.sampled_fisher import (
    Change,
    Checkpoint,
    FisherPass,
    fisher_pass,
    ratio_estimate,
)
from curvprune.curvature.structure import find_structure
from curvprune.curvature.unused import unused_layers

__all__ = [
    "MATRICES",
    "QUANTITIES",
    "Analysis",
    "AnalysisRecord",
    "AnalysisSettings",
    "BlockDiagonal",
    "Change",
    "Checkpoint",
    "Compared",
    "CurvatureComparison",
    "CurvatureMonitor",
    "Dense",
    "DensityRecord",
    "Diagnosis",
    "DiagnosisRecord",
    "Diagonal",
    "DiagonalRecord",
    "Disagreement",
    "DivergencePass",
    "Draws",
    "EigenPairs",
    "EigenvaluesRecord",
    "Ekfac",
    "End",
    "Estimate",
    "EstimateRecord",
    "FisherPass",
    "Function",
    "KfacSettings",
    "Kronecker",
    "KroneckerFactored",
    "Lanczos",
    "LayerCurvature",
    "LayerCurvatureRecord",
    "Lobpcg",
    "Lookup",
    "ModelCurvature",
    "ModelCurvatureRecord",
    "Moments",
    "NoClosedForm",
    "Operator",
    "ParamSpace",
    "Remember",
    "Scattered",
    "Sharpness",
    "Sum",
    "TraceRecord",
    "analyze_curvature",
    "compare",
    "density",
    "diagonal",
    "divergence_pass",
    "eigenpairs",
    "ekfac",
    "empirical_fisher",
    "exact_gauss_newton",
    "find_structure",
    "fisher",
    "fisher_moments",
    "fisher_pass",
    "gauss_newton",
    "hessian",
    "kfac",
    "kronecker_factored",
    "layers_with_norms",
    "probe_layers",
    "ratio_estimate",
    "trace",
    "unused_layers",
]
