"""The ledger: what every option of every layer costs, in bytes, nats and operations."""

from curvprune.pricing.ledger import (
    CURVATURES,
    MEASURED_ROWS,
    MEASURED_TOGETHER,
    Audit,
    Ledger,
    Row,
    build_ledger,
    measure_highest,
)
from curvprune.pricing.operations import (
    LayerWork,
    limits_of,
    macs_left,
    multiply_adds,
    work_of,
)
from curvprune.pricing.other_curvatures import FORMS, Forms, Parts, in_parts, quadratic_forms
from curvprune.pricing.shares import Round, measured_loss, share_ledger
from curvprune.pricing.single_changes import divergences

__all__ = [
    "CURVATURES",
    "FORMS",
    "MEASURED_ROWS",
    "MEASURED_TOGETHER",
    "Audit",
    "Forms",
    "LayerWork",
    "Ledger",
    "Parts",
    "Round",
    "Row",
    "build_ledger",
    "divergences",
    "in_parts",
    "limits_of",
    "macs_left",
    "measure_highest",
    "measured_loss",
    "multiply_adds",
    "quadratic_forms",
    "share_ledger",
    "work_of",
]
