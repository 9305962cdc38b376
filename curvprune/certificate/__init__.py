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
    what no sample shows, and items counted twice    unseen, repeated
    how many items it takes                          power
    what a split was used for before                 uses
"""

from curvprune.certificate.accuracy import certify_accuracy
from curvprune.certificate.budget_to_verdict import (
    ItemColumns,
    clusters_of,
    compare,
    item_columns,
)
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
from curvprune.certificate.unseen import confidence_text, fewest_clusters, fewest_without_spread
from curvprune.certificate.uses import (
    IN_THIS_PROCESS,
    Entry,
    Use,
    Uses,
    UsesInMemory,
    counted,
    known_entry,
)
from curvprune.certificate.values import certify_values
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, Verdict, fixed_sequence

__all__ = [
    "CERTIFIED",
    "INCONCLUSIVE",
    "IN_THIS_PROCESS",
    "Entry",
    "ItemColumns",
    "Use",
    "Uses",
    "UsesInMemory",
    "Verdict",
    "certify_accuracy",
    "certify_lm_eval",
    "certify_loss",
    "certify_values",
    "clusters_of",
    "compare",
    "confidence_text",
    "counted",
    "design_effect",
    "exact_p_value",
    "fewest_clusters",
    "fewest_without_spread",
    "fixed_sequence",
    "item_columns",
    "items_needed",
    "items_needed_for_accuracy",
    "known_entry",
    "power_for_accuracy",
    "probability_of_certifying",
]
