"""What a compressed model may cost, and the closed loop that measures plans until the smallest one that passes is
found. The plans themselves come from `curvprune.knapsack`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any

from curvprune.knapsack import Row, cheapest

METRICS = ("loss", "accuracy")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a compressed model may lose, or how large it may be. Exactly one of `max_drop` and `max_bytes`.

    `max_drop` is a rise of the loss in nats per token (or example) for metric "loss", a fall of accuracy as a fraction
    for metric "accuracy" (0.01 is one percentage point). `confidence` is one-sided. Raises ValueError.
    """

    metric: str = "loss"
    _: KW_ONLY
    max_drop: float | None = None
    max_bytes: int | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"Budget(metric={self.metric!r}): the metric is one of {METRICS}; write Budget('loss', max_drop=0.02)"
            )
        if (self.max_drop is None) == (self.max_bytes is None):
            given = "both" if self.max_drop is not None else "neither"
            raise ValueError(
                f"Budget takes exactly one of max_drop and max_bytes, {given} given; "
                "write Budget('loss', max_drop=0.02) or Budget(max_bytes=60_000_000)"
            )
        if self.max_drop is not None:
            drop = float(self.max_drop)
            if not (math.isfinite(drop) and drop >= 0):
                raise ValueError(f"Budget(max_drop={self.max_drop!r}): expected a finite number >= 0, such as 0.02")
            if self.metric == "accuracy" and drop >= 1:
                raise ValueError(
                    f"Budget('accuracy', max_drop={drop:g}): accuracy drops are fractions below 1; "
                    f"for {drop:g} percentage points write max_drop={drop / 100:g}"
                )
            object.__setattr__(self, "max_drop", drop)
        if self.max_bytes is not None:
            if isinstance(self.max_bytes, bool) or self.max_bytes != int(self.max_bytes) or self.max_bytes <= 0:
                raise ValueError(f"Budget(max_bytes={self.max_bytes!r}): expected a whole number of bytes > 0")
            object.__setattr__(self, "max_bytes", int(self.max_bytes))
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"Budget(confidence={self.confidence!r}): expected a number in (0.5, 1), such as 0.95")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`. Raises ValueError on unknown keys."""
        return cls(**_known_keys(cls, record))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One option per layer. `bytes` is the stored size of the whole model, `predicted` its loss increase in nats."""

    choices: dict[str, str]
    bytes: int
    predicted: float
    predicted_stderr: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record; numbers that are not finite become None."""
        return {
            "choices": dict(self.choices),
            "bytes": int(self.bytes),
            "predicted": _finite_or_none(self.predicted),
            "predicted_stderr": _finite_or_none(self.predicted_stderr),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict` (None becomes NaN). Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        for name in ("predicted", "predicted_stderr"):
            known[name] = math.nan if known[name] is None else float(known[name])
        return cls(**known | {"choices": dict(known["choices"]), "notes": tuple(known.get("notes", ()))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One measured plan: planned for a predicted loss of at most `limit`; `measured` is what it really cost."""

    choices: dict[str, str]
    limit: float
    bytes: int
    predicted: float
    measured: float
    accepted: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record; a measurement that is not finite becomes None."""
        return asdict(self) | {"measured": _finite_or_none(self.measured)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trial:
        """The inverse of `to_dict` (None becomes NaN). Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        return cls(**known | {"measured": math.nan if known["measured"] is None else float(known["measured"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """`trials` in the order they were measured; `best` is the smallest accepted plan, None when none was accepted."""

    trials: tuple[Trial, ...]
    best: dict[str, str] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        best = None if self.best is None else dict(self.best)
        return {"trials": [trial.to_dict() for trial in self.trials], "best": best}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Search:
        """The inverse of `to_dict`. Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        return cls(trials=tuple(Trial.from_dict(trial) for trial in known["trials"]), best=known["best"])


def search(
    rows: Iterable[Row],
    evaluate: Callable[[dict[str, str]], tuple[bool, float]],
    *,
    start: float,
    max_trials: int = 6,
    tolerance: float = 0.03,
    same_option: Iterable[Collection[str]] = (),
) -> Search:
    """Closed loop over the predicted-loss limit of `cheapest`: measure a plan, correct the limit, measure again.

    `evaluate(choices)` returns (accepted, measured drop in the unit of `start`) and is called at most once per plan
    and `max_trials` times. `start` is the budget, and the first limit; should it be a fall of accuracy, the ratio
    below turns it into nats from the second limit on. While every trial had the same outcome, the next limit is start
    * predicted / measured, moved by at least a factor 0.8 or 1.25 (2 from the second time on) and at most 64; once one
    plan was accepted and another rejected, the geometric mean of the two limits. With one trial left and nothing
    accepted, the plan with the lowest predicted loss is measured. Stops when the accepted and the rejected plan differ
    by less than `tolerance` of the bytes, when the smallest model is accepted or the most cautious one rejected, when
    the limits between them give no new plan, or when the trials are spent.

    A pure function of what `evaluate` returns: a caller who caches evaluations by plan can stop and resume. Raises
    ValueError on malformed rows or groups, a start that is negative or not finite, or an accepted plan without a finite
    loss.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(
            f"search(start={start!r}): expected a finite number of nats >= 0, usually the budget's max_drop"
        )
    if max_trials < 1:
        raise ValueError(f"search(max_trials={max_trials!r}): expected at least 1")
    rows, same_option = list(rows), [tuple(group) for group in same_option]
    largest = sum(row.bytes for row in rows)
    floor = _sums(rows, cheapest(rows, max_bytes=largest, same_option=same_option))[1]
    ceiling = _sums(rows, cheapest(rows, max_loss=math.inf, same_option=same_option))[1]

    measured_plans: dict[tuple[tuple[str, str], ...], Trial] = {}
    accepted: tuple[float, Trial] | None = None
    rejected: tuple[float, Trial] | None = None
    limit = float(start)
    # Planning is cheap next to measuring, so a limit that gives a plan already measured only narrows the bracket.
    for outcomes in range(1, 4 * max_trials + 33):
        limit = min(max(limit, floor), ceiling)
        choices = cheapest(rows, max_loss=limit, same_option=same_option)
        key = tuple(sorted(choices.items()))
        if key not in measured_plans:
            if len(measured_plans) == max_trials:
                break
            measured_plans[key] = _measure(choices, rows, limit, evaluate)
        trial = measured_plans[key]
        if trial.accepted:
            accepted = (limit, trial)
        else:
            # Every limit down to what the plan is predicted to cost gives this same plan.
            limit = min(limit, trial.predicted)
            rejected = (limit, trial)

        if (trial.accepted and limit >= ceiling) or (not trial.accepted and limit <= floor):
            break
        if accepted and rejected:
            (low, larger), (high, smaller) = accepted, rejected
            if larger.bytes - smaller.bytes < tolerance * larger.bytes or high - low <= 1e-3 * abs(high):
                break
            limit = _between(low, high)
        elif accepted:
            limit = _bolder(limit, trial, start, outcomes, ceiling)
        elif len(measured_plans) == max_trials - 1:
            limit = floor
        else:
            limit = _more_cautious(limit, trial, start, outcomes, floor)

    trials = tuple(measured_plans.values())
    passing = [trial for trial in trials if trial.accepted]
    best = min(passing, key=lambda trial: trial.bytes).choices if passing else None
    return Search(trials=trials, best=best)


def _sums(rows: Iterable[Row], choices: Mapping[str, str]) -> tuple[int, float]:
    """Bytes and price of a plan."""
    chosen = [row for row in rows if choices[row.layer] == row.option]
    return sum(row.bytes for row in chosen), math.fsum(row.price for row in chosen)


def _measure(
    choices: dict[str, str],
    rows: Iterable[Row],
    limit: float,
    evaluate: Callable[[dict[str, str]], tuple[bool, float]],
) -> Trial:
    ok, measured = evaluate(dict(choices))
    if ok and not math.isfinite(measured):
        raise ValueError(f"evaluate() accepted a plan whose measured loss is {measured!r}; return False for such plans")
    size, predicted = _sums(rows, choices)
    return Trial(
        choices=choices,
        limit=limit,
        bytes=size,
        predicted=predicted,
        measured=float(measured),
        accepted=bool(ok),
    )


def _corrected(trial: Trial, start: float) -> float | None:
    usable = math.isfinite(trial.measured) and trial.measured > 0 and trial.predicted > 0 and start > 0
    return start * trial.predicted / trial.measured if usable else None


def _bolder(limit: float, trial: Trial, start: float, outcomes: int, ceiling: float) -> float:
    if limit <= 0:
        return ceiling / 64 if ceiling > 0 else ceiling
    corrected = _corrected(trial, start)
    wanted = 4 * limit if corrected is None else corrected
    return min(max(wanted, limit * (1.25 if outcomes == 1 else 2.0)), 64 * limit)


def _more_cautious(limit: float, trial: Trial, start: float, outcomes: int, floor: float) -> float:
    if limit <= 0:
        return (limit + floor) / 2
    corrected = _corrected(trial, start)
    wanted = limit / 4 if corrected is None else corrected
    return max(min(wanted, limit * (0.8 if outcomes == 1 else 0.5)), limit / 64)


def _between(low: float, high: float) -> float:
    if high <= 0:
        return (low + high) / 2
    # A plan that changes nothing costs 0 nats: without a floor the logarithmic bisection would never leave it.
    return max(math.sqrt(max(low, 0.0) * high), low + (high - low) / 16)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known_keys(cls: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if unknown := sorted(set(record) - names):
        raise ValueError(f"{cls.__name__}.from_dict: unknown keys {unknown}; expected {sorted(names)}")
    return dict(record)
