"""How many items a certificate takes, and how probable it is with those at hand."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from curvprune.certificate.arguments import check_limits
from curvprune.certificate.clusters import growth
from curvprune.certificate.exact_score import restricted_gains
from curvprune.certificate.unseen import fewest_clusters, fewest_without_spread
from curvprune.certificate.verdict import POWER

# The sample skewness of N normal items is N(0, 6/N); its positive part widens a 95 % bound by this
# over N, in standard deviations of an item.
_SKEWNESS_NOISE = 1.05


def probability_of_certifying(
    drop: float,
    stderr_select: float,
    stderr_certify: float,
    *,
    max_drop: float,
    confidence: float = 0.95,
    reach: float | None = None,
) -> float:
    """Predictive probability that a plan measured on the select split will be CERTIFIED on the
    certify split.

    Phi((max_drop - drop - z se_c) / sqrt(se_s^2 + se_c^2)), a normal approximation with a flat
    prior: a guide for choosing among plans, not a certificate.

    Args:
        drop, stderr_select: the drop and its standard error se_s on the select split.
        stderr_certify: the standard error se_c expected on the certify split, which is
            se_s sqrt(items_select / items_certify).
        reach: stands for z se_c where the bound is expected further from the drop than that.

    Raises:
        ValueError: negative or NaN input.
    """
    max_drop, confidence = check_limits(max_drop, confidence)
    if not (
        math.isfinite(drop) and 0 <= stderr_select < math.inf and 0 <= stderr_certify < math.inf
    ):
        raise ValueError(
            f"probability_of_certifying({drop!r}, {stderr_select!r}, {stderr_certify!r}): "
            "expected a finite drop and finite standard errors >= 0"
        )
    if reach is not None and not reach >= 0:
        raise ValueError(
            f"probability_of_certifying(reach={reach!r}): expected a distance >= 0 from drop to "
            "bound"
        )
    if reach is None:
        reach = stats.norm.ppf(confidence) * stderr_certify
    margin = max_drop - drop - reach
    spread = math.hypot(stderr_select, stderr_certify)
    if spread == 0:
        return 1.0 if margin >= 0 else 0.0
    return float(stats.norm.cdf(margin / spread))


def items_needed(
    sd: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
    power: float = POWER,
) -> int:
    """Items for which a model with true ``drop`` < ``max_drop`` is CERTIFIED with probability
    ``power``.

    The N at which (z_confidence + z_power) sd / sqrt(N) + 1.05 sd / N = max_drop - drop, rounded
    up: the textbook's formula and what the correction for skewness costs where there is none. At
    least as many as `certify_loss` decides with: 5 at 95 %, 59 where sd is 0. For accuracy see
    `items_needed_for_accuracy`.

    Args:
        sd: standard deviation of the paired difference of one independent item (document), without
            skew.

    Raises:
        ValueError: no number of items suffices.
    """
    max_drop, confidence = check_limits(max_drop, confidence)
    if not (math.isfinite(sd) and sd >= 0 and math.isfinite(drop)):
        raise ValueError(
            f"items_needed(sd={sd!r}, drop={drop!r}): expected finite numbers, sd >= 0"
        )
    if not 0.5 <= power < 1:
        raise ValueError(
            f"items_needed(power={power!r}): expected a number in [0.5, 1), such as 0.8"
        )
    if drop >= max_drop:
        raise ValueError(
            f"items_needed(drop={drop:g}, max_drop={max_drop:g}): a model at or over the budget "
            "cannot be certified with any number of items; raise max_drop or assume a smaller drop"
        )
    z = float(stats.norm.ppf(confidence) + stats.norm.ppf(power))
    # Items that all differ by the same are no scale for others, and take more.
    alpha = 1 - confidence
    fewest = fewest_clusters(alpha) if sd > 0 else fewest_without_spread(alpha)
    return max(fewest, math.ceil(growth(z * sd, _SKEWNESS_NOISE * sd, max_drop - drop)))


def items_needed_for_accuracy(
    disagreement: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
    power: float = POWER,
) -> int:
    """Independent items for which `certify_accuracy` certifies a true fall ``drop`` with
    probability ``power``.

    (z_confidence s_0 + z_power s_1)^2 / m^2 + 1/(2 m), m = max_drop - drop, rounded up, and at
    least what certifies without any disagreement. s_1^2 = disagreement - drop^2 is the variance of
    an item's difference. s_0^2 is the one that the score test expects at the budget (Tango's
    restricted estimate at the true shares). The second term is what the exact test's discreteness
    costs.

    Args:
        disagreement: the share of items on which one model is right and the other wrong.

    Raises:
        ValueError: no number of items suffices.
    """
    max_drop, confidence = check_limits(max_drop, confidence)
    if not abs(drop) <= disagreement <= 1:
        raise ValueError(
            f"items_needed_for_accuracy(disagreement={disagreement!r}, drop={drop!r}): expected "
            "a share of the items, at least the drop"
        )
    if not 0.5 <= power < 1:
        raise ValueError(
            f"items_needed_for_accuracy(power={power!r}): expected a number in [0.5, 1), such as "
            "0.8"
        )
    if drop >= max_drop:
        raise ValueError(
            f"items_needed_for_accuracy(drop={drop:g}, max_drop={max_drop:g}): a model at or "
            "over the budget cannot be certified with any number of items; raise max_drop or "
            "assume a smaller drop"
        )
    return math.ceil(score_items(disagreement, drop, max_drop, 1 - confidence, power))


def power_for_accuracy(
    items: float,
    disagreement: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Probability that `certify_accuracy` certifies a true fall ``drop`` with so many independent
    items: the inverse of `items_needed_for_accuracy`, with its formula and its errors."""
    # For its checks alone.
    items_needed_for_accuracy(disagreement, max_drop=max_drop, drop=drop, confidence=confidence)
    alpha, margin = 1 - confidence, max_drop - drop
    # With fewer items not even full agreement certifies.
    if max_drop > 0 and items < math.log(alpha) / math.log1p(-max_drop):
        return 0.0
    at_budget, spread = _score_spreads(disagreement, drop, max_drop)
    # The formula of the items, solved for z_power.
    expected = margin * math.sqrt(max(items - 0.5 / margin, 0.0))
    reach = expected - float(stats.norm.isf(alpha)) * at_budget
    return float(stats.norm.cdf(reach / spread)) if spread > 0 else float(reach >= 0)


def score_items(
    disagreement: float, drop: float, max_drop: float, alpha: float, power: float = POWER
) -> float:
    """The formula of `items_needed_for_accuracy`.

    With the signs of both drops turned: the items to show a violation.
    """
    at_budget, spread = _score_spreads(disagreement, drop, max_drop)
    margin = max_drop - drop
    z = stats.norm.isf(alpha) * at_budget, stats.norm.ppf(power) * spread
    unanimous = math.log(alpha) / math.log1p(-max_drop) if max_drop > 0 else 0.0
    return float(max((sum(z) / margin) ** 2 + 0.5 / margin, unanimous))


def _score_spreads(disagreement: float, drop: float, max_drop: float) -> tuple[float, float]:
    """Standard deviation of an item's difference as the score test expects it at ``max_drop``, and
    the true one."""
    losses, gains = (disagreement + drop) / 2, (disagreement - drop) / 2
    expected = float(restricted_gains(np.array([losses]), np.array([gains]), 1, max_drop)[0])
    # What Tango's estimate makes of the variance, then the true one.
    at_budget = 2 * expected + max_drop * (1 - max_drop)
    return math.sqrt(max(at_budget, 0.0)), math.sqrt(max(disagreement - drop**2, 0.0))
