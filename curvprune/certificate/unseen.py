"""What a sample cannot show: losses too rare to be in it, and how few clusters say nothing at all.

A loss that hits a share s of all clusters is in none of N sampled ones with probability (1 - s)^N.
So at confidence 1 - alpha nothing is known of shares below 1 - alpha^(1/N), which is about 3/N at
95 %: the rule of three (Hanley and Lippman-Hand 1983, JAMA 249, 1743). A bound of a mean without
bounds on its items must assume something of the losses in such shares; see `Ratio.upper`.
"""

from __future__ import annotations

import math

# The share that a verdict keeps quiet about: rarer losses are always hidden from a test.
RARE = 0.05
# Fewer clusters than would show a loss in half of them decide nothing: a sign test needs as many,
# and the level of a t bound rests on normal differences alone.
_HALF = 0.5


def unseen_share(clusters: int, alpha: float) -> float:
    """The share of clusters that a loss may hit and be in no sampled one with probability
    ``alpha``: 1 - alpha^(1/clusters).

    >>> round(unseen_share(60, 0.05), 3)
    0.049
    """
    return -math.expm1(math.log(alpha) / clusters)


def clusters_that_show(share: float, alpha: float) -> int:
    """The fewest clusters of which one is hit by a loss in ``share`` of all, with probability
    1 - alpha.

    >>> clusters_that_show(0.05, 0.05)
    59
    """
    # The tolerance keeps 1 - 0.75 = 2^-2 from asking for a third cluster.
    return math.ceil(math.log(alpha) / math.log1p(-share) - 1e-9)


def fewest_clusters(alpha: float) -> int:
    """The fewest clusters with which a verdict may be anything but INCONCLUSIVE: as many as show a
    loss in half of all clusters."""
    return max(2, clusters_that_show(_HALF, alpha))


def fewest_without_spread(alpha: float) -> int:
    """The fewest clusters with which a verdict may be CERTIFIED where most of them differ by the
    same, so that nothing says how large a loss may be that none of them has: as many as show a loss
    in `RARE` of all."""
    return clusters_that_show(RARE, alpha)


def confidence_text(confidence: float) -> str:
    """In per cent, never 100.

    >>> confidence_text(0.95), confidence_text(0.999999), confidence_text(1 - 1e-12)
    ('95 %', '99.9999 %', '99.9999999999 %')
    """
    for digits in range(8, 18):
        text = f"{100 * confidence:.{digits}g}"
        if float(text) < 100:
            return f"{text} %"
    return f"{100 * confidence!r} %"


def share_text(share: float) -> str:
    """A share in per cent, rounded up to two digits: what is said to be hidden is not less.

    >>> share_text(0.12731), share_text(0.0487)
    ('13 %', '4.9 %')
    """
    percent = 100 * share
    places = 1 - math.floor(math.log10(percent))
    rounded = math.ceil(percent * 10**places - 1e-9) / 10**places
    return f"{rounded:.{max(0, places)}f} %"


def too_few_text(clusters: int, what: str, alpha: float) -> str:
    """Why so many clusters decide nothing; empty where they are enough."""
    fewest = fewest_clusters(alpha)
    if clusters >= fewest:
        return ""
    return (
        f"{clusters} {what} cannot carry {confidence_text(1 - alpha)} confidence: a loss in half "
        f"of all {what} would go unseen too often; it takes {fewest} or more"
    )


def no_spread_text(clusters: int, what: str, alpha: float) -> str:
    """Why so many clusters, most of which differ by the same, certify nothing; empty where they are
    enough."""
    fewest = fewest_without_spread(alpha)
    if clusters >= fewest:
        return ""
    return (
        f"most of the {clusters} {what} differ by the very same, so nothing shows how large a loss "
        f"may be that none of them has; it takes {fewest} {what} to see one that hits "
        f"{share_text(RARE)} of them at {confidence_text(1 - alpha)} confidence"
    )


def unseen_text(clusters: int, what: str, alpha: float) -> str:
    """How rare a loss is that would not have been seen, where it is not very rare; else empty."""
    share = unseen_share(clusters, alpha)
    if share <= RARE:
        return ""
    return f"a loss that hits fewer than {share_text(share)} of {what} would not have been seen"
