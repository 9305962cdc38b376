"""Paired tests on held-out items, verdicts, power.

Every test is paired (both models, same items) and one-sided against the budget (non-inferiority):
the null hypothesis is "the drop exceeds the budget". A small sample therefore yields INCONCLUSIVE,
never a certificate. Drop > 0 means that the compressed model is worse. The functions take results
of items as arrays and know nothing about models; only `judge` and `compare_models` do.
`docs/certificate.md` has the statistics and the simulated error rates.

    a budget and two models' results → a verdict     budget_to_verdict.judge
    what is quoted of two models                     two_models, document_errors
    losses, scores, answers → a verdict              loss, values, accuracy
    a quantile over documents → a verdict            quantile
    logs of lm-eval → a verdict                      lm_eval
    several tasks → one verdict                      joint
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
    foreseen,
    item_columns,
    judge,
    loss_for,
)
from curvprune.certificate.clusters import design_effect
from curvprune.certificate.document_errors import Estimate, quantiles_of, ratio_of
from curvprune.certificate.exact_score import exact_p_value
from curvprune.certificate.joint import (
    Claim,
    JointVerdict,
    certify_all,
    claim_lm_eval,
    claim_values,
)
from curvprune.certificate.lm_eval import certify_lm_eval
from curvprune.certificate.loss import certify_loss
from curvprune.certificate.power import (
    items_needed,
    items_needed_for_accuracy,
    power_for_accuracy,
    probability_of_certifying,
)
from curvprune.certificate.quantile import (
    Foreseen,
    certify_quantile,
    documents_needed,
    foreseen_quantile,
)
from curvprune.certificate.two_models import ModelComparison, compare_models
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
    "Claim",
    "Entry",
    "Estimate",
    "Foreseen",
    "ItemColumns",
    "JointVerdict",
    "ModelComparison",
    "Use",
    "Uses",
    "UsesInMemory",
    "Verdict",
    "certify_accuracy",
    "certify_all",
    "certify_lm_eval",
    "certify_loss",
    "certify_quantile",
    "certify_values",
    "claim_lm_eval",
    "claim_values",
    "clusters_of",
    "compare_models",
    "confidence_text",
    "counted",
    "design_effect",
    "documents_needed",
    "exact_p_value",
    "fewest_clusters",
    "fewest_without_spread",
    "fixed_sequence",
    "foreseen",
    "foreseen_quantile",
    "item_columns",
    "items_needed",
    "items_needed_for_accuracy",
    "judge",
    "known_entry",
    "loss_for",
    "power_for_accuracy",
    "probability_of_certifying",
    "quantiles_of",
    "ratio_of",
]
