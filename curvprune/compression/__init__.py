"""Ŵ = solve(W, option, moments): grids, the GPTQ sweep, pruning, recovery."""

from curvprune.compression.calibration_pass import coarse_copy, visit_layers
from curvprune.compression.gptq import column_order, factor
from curvprune.compression.grids import (
    COARSE,
    FINE,
    HALF_WAY,
    MIN_SCALE,
    ZERO_SHIFT_BITS,
    code_range,
    dequantize,
    quantize_to_grid,
    search_grid,
    spread,
)
from curvprune.compression.moments import Moments
from curvprune.compression.recovery import (
    Diverged,
    Recovery,
    Training,
    recover_,
    restore_,
    trained_tensors,
)
from curvprune.compression.solver import DRIFT, RIDGE, Solved, solve, solve_layer

__all__ = [
    "COARSE",
    "DRIFT",
    "FINE",
    "HALF_WAY",
    "MIN_SCALE",
    "RIDGE",
    "ZERO_SHIFT_BITS",
    "Diverged",
    "Moments",
    "Recovery",
    "Solved",
    "Training",
    "coarse_copy",
    "code_range",
    "column_order",
    "dequantize",
    "factor",
    "quantize_to_grid",
    "recover_",
    "restore_",
    "search_grid",
    "solve",
    "solve_layer",
    "spread",
    "trained_tensors",
    "visit_layers",
]
