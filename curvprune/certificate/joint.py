"""Several tasks in one verdict: within every budget at once, or beyond some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar

from numpy.typing import ArrayLike
from pydantic import ConfigDict

from curvprune.certificate.lm_eval import Files, certify_lm_eval
from curvprune.certificate.values import certify_values
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, VIOLATED, Verdict
from curvprune.schema import Json, Number, decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """That a compressed model is within one budget on one task: a test that is still to be made.

    Attributes:
        judge: the test, at any confidence.
        confidence: the one that is asked for.
    """

    judge: Callable[[float], Verdict]
    confidence: float = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class JointVerdict:
    """One decision about several tasks.

    Attributes:
        status: CERTIFIED (within every budget), VIOLATED (beyond the budget of at least one) or
            INCONCLUSIVE; each with the stated confidence.
        confidence: of that decision.
        members: the verdict of every task by itself, by name.
        violated: tasks that are beyond their budgets, all of them together with that confidence.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    status: str
    confidence: Number
    members: dict[str, Verdict]
    violated: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.status}: {self._reason()}"]
        for name, verdict in self.members.items():
            measure = f" {verdict.measure}" if verdict.measure else ""
            needed = "" if verdict.needed is None else f", {verdict.needed:,} items would decide"
            lines.append(
                f"  {name}: {verdict.status}, {verdict.metric} drop {verdict.drop:.4g} ± "
                f"{verdict.stderr:.2g}, bound {verdict.bound:.4g}, budget {verdict.max_drop:g}"
                f"{measure}, {verdict.items:,} items{needed}"
            )
        return "\n".join(lines)

    def _reason(self) -> str:
        sure, number = f"with {100 * self.confidence:g} % confidence", len(self.members)
        if self.status == CERTIFIED:
            return f"{sure} the model is within the budget of every one of {number} task(s)"
        if self.status == VIOLATED:
            return f"{sure} the model is beyond the budget of {', '.join(self.violated)}"
        # A member may be violated by itself, where several together are held to more.
        return f"not shown for {', '.join(self.open)}, and none is shown to be violated"

    @property
    def open(self) -> tuple[str, ...]:
        """Tasks that are not certified by themselves."""
        return tuple(name for name, v in self.members.items() if v.status != CERTIFIED)

    def to_dict(self) -> Any:
        """Plain JSON values; numbers that are not finite become None."""
        return encode(self)

    @staticmethod
    def from_dict(record: Json) -> JointVerdict:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming what does not fit.
        """
        return decode(JointVerdict, record, source="the record")


def certify_all(claims: Mapping[str, Claim]) -> JointVerdict:
    """Whether a compressed model is within all of several budgets at once.

    CERTIFIED: every claim is certified by itself, each at the full confidence. A wrong certificate
    needs the one task that is beyond its budget to be certified, so no correction is needed
    (intersection-union test, Berger 1982, Technometrics 24), whether or not tasks depend on each
    other. The price is power: all must pass together.

    VIOLATED: some claim is shown to be violated. One of several true claims would be, by chance,
    more often than a single one: of k tasks each is tested at (1 - confidence)/k, those that are
    then left at the next larger level (Holm 1979, Scandinavian Journal of Statistics 6).

    Cost: up to k tests of each task; the models have been run by then.

    Args:
        claims: name of a task -> `curvprune.claim`, `curvprune.claim_lm_eval` or
            `curvprune.claim_values`.

    Raises:
        ValueError: no claims, something that is none, different confidences; or as the tests do.

    Example:
        >>> import curvprune as cp
        >>> right = [1] * 300
        >>> claims = {"first": cp.claim_values(right, right, max_drop=0.05, bounds=(0, 1)),
        ...           "second": cp.claim_values(right, right, max_drop=0.02, bounds=(0, 1))}
        >>> cp.certify_all(claims).status
        'CERTIFIED'
    """
    confidence = _confidence_of(claims)
    # 1. Every task by itself.
    members = {name: claim.judge(confidence) for name, claim in claims.items()}
    # 2. Those that are violated, all together.
    violated = _violated(claims, members, confidence)
    status = INCONCLUSIVE
    if violated:
        status = VIOLATED
    elif all(verdict.status == CERTIFIED for verdict in members.values()):
        status = CERTIFIED
    return JointVerdict(
        status=status, confidence=confidence, members=members, violated=tuple(violated)
    )


def _confidence_of(claims: Mapping[str, Claim]) -> float:
    if not isinstance(claims, Mapping) or not claims:
        raise ValueError(
            f"certify_all({claims!r:.60}): expected at least one task, a mapping of names to "
            "claims such as {'text': cp.claim(baseline, compressed, data, budget)}"
        )
    for name, claim in claims.items():
        if not isinstance(claim, Claim):
            raise ValueError(
                f"certify_all: {name!r} is a {type(claim).__name__}; expected cp.claim(...), "
                "cp.claim_lm_eval(...) or cp.claim_values(...), which can be judged at any "
                "confidence"
            )
    found = {claim.confidence for claim in claims.values()}
    if len(found) > 1:
        raise ValueError(
            f"certify_all: the claims ask for different confidences, {sorted(found)}; one decision "
            "has one"
        )
    return found.pop()


def _violated(
    claims: Mapping[str, Claim], members: Mapping[str, Verdict], confidence: float
) -> list[str]:
    """Holm's procedure: the level grows with every claim that is rejected."""
    left = [name for name in claims]
    # What is not violated at the largest level is not at any other.
    possible = {name for name in left if members[name].status == VIOLATED}
    found: list[str] = []
    while possible:
        level = 1 - (1 - confidence) / len(left)
        new = [name for name in possible if claims[name].judge(level).status == VIOLATED]
        if not new:
            break
        found += new
        possible -= set(new)
        left = [name for name in left if name not in new]
    return [name for name in claims if name in found]


def claim_values(
    baseline: ArrayLike,
    compressed: ArrayLike,
    *,
    max_drop: float,
    confidence: float = 0.95,
    **arguments: Any,
) -> Claim:
    """`curvprune.certify_values` as a member of `certify_all`, with its arguments."""
    test = _with_arguments(certify_values, baseline, compressed, max_drop=max_drop, **arguments)
    return Claim(judge=lambda level: test(confidence=level), confidence=confidence)


def claim_lm_eval(
    baseline: Files,
    compressed: Files,
    *,
    max_drop: float,
    confidence: float = 0.95,
    **arguments: Any,
) -> Claim:
    """`curvprune.certify_lm_eval` as a member of `certify_all`, with its arguments: one task of two
    runs of lm-eval. Files are read when it is judged."""
    test = _with_arguments(certify_lm_eval, baseline, compressed, max_drop=max_drop, **arguments)
    return Claim(judge=lambda level: test(confidence=level), confidence=confidence)


def _with_arguments(test: Callable[..., Verdict], *given: Any, **named: Any) -> Any:
    """A test that lacks its confidence. An argument that it does not have is refused here, as it
    would be there."""
    signature(test).bind(*given, **named)
    return partial(test, *given, **named)
