"""Ŵ = solve(W, option, moments): grids, the GPTQ sweep, pruning, recovery."""

from curvprune.compression.calibration_pass import Visited, Visitor, coarse_copy, visit_layers
from curvprune.compression.distillation import Distillation
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
from curvprune.compression.pruning import prune_weight
from curvprune.compression.recovery import (
    Diverged,
    Recovery,
    RecoveryItems,
    RecoveryStep,
    RecoverySummary,
    recover_,
    restore_,
    trained_tensors,
)
from curvprune.compression.solver import (
    DRIFT,
    RIDGE,
    Rounding,
    Solved,
    round_layer,
    solve,
    solve_layer,
)
from curvprune.compression.trainable import (
    CODE_STEP,
    CODES_UP_TO,
    FreeGrid,
    free_parts,
)
from curvprune.compression.training import Training

__all__ = [
    "COARSE",
    "CODES_UP_TO",
    "CODE_STEP",
    "DRIFT",
    "FINE",
    "HALF_WAY",
    "MIN_SCALE",
    "RIDGE",
    "ZERO_SHIFT_BITS",
    "Distillation",
    "Diverged",
    "FreeGrid",
    "Moments",
    "Recovery",
    "RecoveryItems",
    "RecoveryStep",
    "RecoverySummary",
    "Rounding",
    "Solved",
    "Training",
    "Visited",
    "Visitor",
    "coarse_copy",
    "code_range",
    "column_order",
    "dequantize",
    "factor",
    "free_parts",
    "prune_weight",
    "quantize_to_grid",
    "recover_",
    "restore_",
    "round_layer",
    "search_grid",
    "solve",
    "solve_layer",
    "spread",
    "trained_tensors",
    "visit_layers",
]
