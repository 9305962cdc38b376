"""Paired tests on held-out items, verdicts, power."""

from curvprune.certificate.comparison import compare, item_columns
from curvprune.certificate.lm_eval import certify_lm_eval
from curvprune.certificate.paired_tests import (
    CERTIFIED,
    INCONCLUSIVE,
    Verdict,
    certify_accuracy,
    certify_loss,
    certify_values,
    design_effect,
    fixed_sequence,
    items_needed,
    items_needed_for_accuracy,
    power_for_accuracy,
    probability_of_certifying,
)

__all__ = [
    "CERTIFIED",
    "INCONCLUSIVE",
    "Verdict",
    "certify_accuracy",
    "certify_lm_eval",
    "certify_loss",
    "certify_values",
    "compare",
    "design_effect",
    "fixed_sequence",
    "item_columns",
    "items_needed",
    "items_needed_for_accuracy",
    "power_for_accuracy",
    "probability_of_certifying",
]
