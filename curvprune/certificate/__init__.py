"""Paired tests on held-out items, verdicts, power.

Every test is paired (both models, same items) and one-sided against the budget (non-inferiority):
the null hypothesis is "the drop exceeds the budget". A small sample therefore yields INCONCLUSIVE,
never a certificate. Drop > 0 means that the compressed model is worse. The functions take results
of items as arrays and know nothing about models; only `compare` does. `docs/certificate.md` has the
statistics and the simulated error rates.

    a budget and two models' results → a verdict     comparison.compare
    losses, scores, answers → a verdict              loss, values, accuracy
    logs of lm-eval → a verdict                      lm_eval
    items of one document: what clusters cost        clusters
    bounds that hold exactly                         exact_score, gaffke
    how many items it takes                          power
"""

from curvprune.certificate.accuracy import certify_accuracy
from curvprune.certificate.budget_to_verdict import ItemColumns, compare, item_columns
from curvprune.certificate.clusters import design_effect
from curvprune.certificate.exact_score import exact_p_value
from curvprune.certificate.lm_eval import certify_lm_eval
from curvprune.certificate.loss import certify_loss
from curvprune.certificate.power import (
    items_needed,
    items_needed_for_accuracy,
    power_for_accuracy,
    probability_of_certifying,
)
from curvprune.certificate.values import certify_values
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, Verdict, fixed_sequence

__all__ = [
    "CERTIFIED",
    "INCONCLUSIVE",
    "ItemColumns",
    "Verdict",
    "certify_accuracy",
    "certify_lm_eval",
    "certify_loss",
    "certify_values",
    "compare",
    "design_effect",
    "exact_p_value",
    "fixed_sequence",
    "item_columns",
    "items_needed",
    "items_needed_for_accuracy",
    "power_for_accuracy",
    "probability_of_certifying",
]
