"""What a test against a budget says: `Verdict`; and how several plans share one certify split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import ConfigDict

from curvprune.certificate.unseen import confidence_text, share_text
from curvprune.schema import Json, Number, decode, encode

CERTIFIED, VIOLATED, INCONCLUSIVE = "CERTIFIED", "VIOLATED", "INCONCLUSIVE"

# The probability with which the `needed` items of a verdict decide.
POWER = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one test against a budget.

    Attributes:
        status: CERTIFIED (drop <= max_drop at ``confidence``), VIOLATED (drop > max_drop at
            ``confidence``) or INCONCLUSIVE. Where clusters are too few for the confidence it is
            INCONCLUSIVE whatever the bound.
        metric: what was compared, such as ``"loss"`` or ``"accuracy"``.
        measure: what ``drop`` and the means are counted in, such as ``"nats/token"``.
        baseline, compressed: mean loss or accuracy of the two models.
        drop: how much worse the compressed model is; ``stderr`` is its standard error.
        bound: one-sided upper confidence bound of the drop. CERTIFIED needs bound <= max_drop.
            Infinite where too few clusters, all with the same difference, give none.
        items, clusters: how much evidence there is. ``clusters`` is None for independent items.
        needed: items that would decide an INCONCLUSIVE verdict with 80 % power, if drop and
            variance stay as observed; None otherwise. A drop below 0 is planned as 0.
        method: the name of the test.
        note: what makes the confidence doubtful, if anything was seen that does.
        unseen: share of the clusters (or items) that a loss may hit and be in none of those at
            hand, with probability 1 - confidence; None where ``bound`` covers such losses.
        earlier: what the items were used for before this verdict, one line for each use.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    status: str
    metric: str
    measure: str
    baseline: Number
    compressed: Number
    drop: Number
    stderr: Number
    bound: Number
    max_drop: Number
    confidence: Number
    items: int
    clusters: int | None
    needed: int | None
    method: str
    note: str = ""
    unseen: float | None = None
    earlier: tuple[str, ...] = ()

    def __str__(self) -> str:
        evidence = f"{self.items} items"
        if self.clusters is not None:
            evidence += f" in {self.clusters} clusters"
        lines = [
            f"{self.status} at {confidence_text(self.confidence)} confidence: {self.metric} drop "
            f"{self.drop:.4g} ± {self.stderr:.2g}, bound {self.bound:.4g} of {self.max_drop:g} "
            f"{self.measure} ({evidence})"
        ]
        if self.unseen is not None and "would not have been seen" not in self.note:
            what = "items" if self.clusters is None else "clusters"
            lines.append(
                f"a loss that hits fewer than {share_text(self.unseen)} of {what} would not have "
                "been seen"
            )
        if self.needed is not None:
            lines.append(f"needed: {self.needed} items")
        if self.note:
            lines.append(f"note: {self.note}")
        return "\n  ".join(lines)

    def noting(self, *texts: str | None) -> Verdict:
        """The same verdict with more in its ``note``."""
        return replace(self, note="; ".join(filter(None, (self.note, *texts))))

    def to_dict(self) -> Any:
        """Plain JSON values; numbers that are not finite become None."""
        return encode(self)

    @staticmethod
    def from_dict(record: Json) -> Verdict:
        """The inverse of `to_dict`; None becomes NaN where a number must stand.

        Raises:
            ValueError: naming what does not fit.
        """
        return decode(Verdict, record, source="the record")


def fixed_sequence(verdicts: Sequence[Verdict]) -> int | None:
    """Index of the last CERTIFIED verdict in the unbroken run of CERTIFIED ones from the start.

    None if the first is not. Several plans may be tested on one certify split, each at the full
    confidence, on two conditions: their order is fixed before the split is looked at, and testing
    stops at the first failure (fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995). A wrong
    certificate needs the first plan in the order that is over the budget to be accepted. That
    happens with probability at most 1 - confidence, however many plans follow.

    Order from cautious to bold: the plans most likely to pass come first, so a failure costs only
    the bolder ones. A certificate after a failure does not count, hence the unbroken run.
    """
    last = None
    for index, verdict in enumerate(verdicts):
        if verdict.status != CERTIFIED:
            break
        last = index
    return last
