"""What a compressed model may cost, and the closed loop that measures plans until the smallest one
that passes is found. The plans themselves come from `curvprune.planning.integer_program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from curvprune.planning.integer_program import Choice, Limit, Row, cheapest

METRICS = ("loss", "accuracy")


SIZES = ("max_bytes", "max_bits", "max_macs", "max_bops")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a compressed model may lose, and how large or slow it may be: any of these at once, at
    least one. With `max_drop` the smallest model within all of them is wanted and certified,
    without it the best one.

    Args:
        metric: what `max_drop` is a drop of, "loss" or "accuracy".
        max_drop: a rise of the loss in nats per token (or example), or a fall of accuracy as a
            fraction (0.01 is one percentage point).
        max_bytes: of the file of weights, header included.
        max_bits: stored bits (codes, scales, zero points and shapes) per weight of the layers that
            have options; a weight that several modules share counts once.
        max_macs: multiply-adds of those layers per token of a language model, else per item. Only
            zeros that hardware can skip lower them: see `curvprune.pricing.operations`.
        max_bops: bit operations: multiply-adds x bits of the weight x bits of the activations
            (those of the model's type), on the same terms.
        limits: anything else that adds up over the layers, such as milliseconds that you have
            measured of every layer and option: `curvprune.planning.integer_program.Limit`.
        confidence: of the certificate, one-sided.

    Raises ValueError.
    """

    metric: str = "loss"
    _: KW_ONLY
    max_drop: float | None = None
    max_bytes: int | None = None
    max_bits: float | None = None
    max_macs: float | None = None
    max_bops: float | None = None
    limits: Sequence[Limit] = ()
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"Budget(metric={self.metric!r}): the metric is one of {METRICS}; write "
                "Budget('loss', max_drop=0.02)"
            )
        object.__setattr__(self, "limits", tuple(self.limits))
        if self.max_drop is None and not self.limited:
            raise ValueError(
                f"Budget takes at least one of max_drop, {', '.join(SIZES)} and limits, none "
                "given; write Budget('loss', max_drop=0.02) or Budget(max_bytes=60_000_000)"
            )
        if self.max_drop is not None:
            drop = float(self.max_drop)
            if not (math.isfinite(drop) and drop >= 0):
                raise ValueError(
                    f"Budget(max_drop={self.max_drop!r}): expected a finite number >= 0, such as "
                    "0.02"
                )
            if self.metric == "accuracy" and drop >= 1:
                raise ValueError(
                    f"Budget('accuracy', max_drop={drop:g}): accuracy drops are fractions below 1; "
                    f"for {drop:g} percentage points write max_drop={drop / 100:g}"
                )
            object.__setattr__(self, "max_drop", drop)
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not (math.isfinite(value) and value > 0)
            ):
                raise ValueError(f"Budget({name}={value!r}): expected a finite number > 0")
        if self.max_bytes is not None:
            if self.max_bytes != int(self.max_bytes):
                raise ValueError(
                    f"Budget(max_bytes={self.max_bytes!r}): expected a whole number of bytes > 0"
                )
            object.__setattr__(self, "max_bytes", int(self.max_bytes))
        names = [limit.name for limit in self.limits]
        if taken := [
            n for n in names if names.count(n) > 1 or n in (*SIZES, "max_drop", "max_loss")
        ]:
            raise ValueError(
                f"Budget(limits=...): the name {taken[0]!r} is taken; give each limit one of its "
                "own"
            )
        if not 0.5 < self.confidence < 1:
            raise ValueError(
                f"Budget(confidence={self.confidence!r}): expected a number in (0.5, 1), such as "
                "0.95"
            )

    @property
    def limited(self) -> bool:
        """Whether anything but the drop is limited."""
        return bool(self.limits) or any(getattr(self, name) is not None for name in SIZES)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "limits": [x.to_dict() for x in self.limits]
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`. Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        return cls(
            **known | {"limits": tuple(Limit.from_dict(limit) for limit in known.get("limits", ()))}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One option per layer. `bytes` is the stored size of the whole model, `predicted` its loss
    increase in nats, `uses` how much of each other limit it uses."""

    choices: dict[str, str]
    bytes: int
    predicted: float
    predicted_stderr: float
    notes: tuple[str, ...] = ()
    uses: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record; numbers that are not finite become None."""
        return {
            "choices": dict(self.choices),
            "bytes": int(self.bytes),
            "predicted": _finite_or_none(self.predicted),
            "predicted_stderr": _finite_or_none(self.predicted_stderr),
            "notes": list(self.notes),
            "uses": dict(self.uses),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict` (None becomes NaN). Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        for name in ("predicted", "predicted_stderr"):
            known[name] = math.nan if known[name] is None else float(known[name])
        return cls(
            **known | {"choices": dict(known["choices"]), "notes": tuple(known.get("notes", ()))}
        )


class Measurement(NamedTuple):
    """What measuring a plan gave: whether it passes, its drop in the unit of the budget, the rise
    of its loss in the unit of the prices with its standard error, and the drop that would just have
    passed (as far as that is known)."""

    accepted: bool
    drop: float
    loss: float
    stderr: float = 0.0
    allowed: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One measured plan.

    Attributes:
        limit: the most that the plan was allowed to cost, by the prices as the trials before had
            corrected them.
        predicted: what it costs by the ledger.
        expected: what it costs by the corrected prices.
        measured: its drop, in the unit of the budget.
        loss, stderr: the rise of its loss, in the unit of the prices.
        allowed: the drop that would just have passed.
    """

    choices: dict[str, str]
    limit: float
    bytes: int
    predicted: float
    expected: float
    measured: float
    loss: float
    stderr: float
    allowed: float
    accepted: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record; a measurement that is not finite becomes None."""
        return asdict(self) | {name: _finite_or_none(getattr(self, name)) for name in _MEASURED}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trial:
        """The inverse of `to_dict` (None becomes NaN). Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        return cls(
            **known | {n: math.nan if known[n] is None else float(known[n]) for n in _MEASURED}
        )


_MEASURED = ("measured", "loss", "stderr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """`trials` in the order they were measured; `best` is the smallest accepted plan, None when
    none was accepted; `factors` is what all of them say the prices of each option must be
    multiplied by (`corrections`)."""

    trials: tuple[Trial, ...]
    best: dict[str, str] | None
    factors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        best = None if self.best is None else dict(self.best)
        return {
            "trials": [trial.to_dict() for trial in self.trials],
            "best": best,
            "factors": dict(self.factors),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Search:
        """The inverse of `to_dict`. Raises ValueError on unknown keys."""
        known = _known_keys(cls, record)
        trials = tuple(Trial.from_dict(trial) for trial in known["trials"])
        return cls(trials=trials, best=known["best"], factors=dict(known["factors"]))


def search_plans(
    rows: Iterable[Row],
    evaluate: Callable[[dict[str, str]], Measurement],
    *,
    start: float,
    max_trials: int = 6,
    tolerance: float = 0.03,
    max_bytes: int | None = None,
    fixed_bytes: int = 0,
    limits: Sequence[Limit] = (),
    same_option: Iterable[Collection[str]] = (),
) -> Search:
    """Closed loop: plan, measure, correct the prices with what was measured, plan again, until the
    smallest plan that passes is found. Every plan keeps within the other limits, which mean what
    they mean to `cheapest`.

    `evaluate(choices)` is called at most once per plan and `max_trials` times. `start` is the
    budget, and what the first plan may cost. Each plan is the smallest whose corrected price is
    within the next limit: where the measurement of the plan next to it says that the drop becomes
    `allowed`, if drops grow like prices, but

    * while every plan passed, at least 1.25 times what the last one costs (2 times from the third
      plan on), and while every one failed, at most 0.8 (0.5) times as much; never beyond a factor
      of 64. With one trial left and nothing accepted, the plan with the lowest price is measured;
    * once one plan was accepted and another that costs more was rejected, the limit lies in the
      middle half between the two, on a logarithmic scale.

    Stops when no plan cheaper than the rejected one is smaller than the accepted one by `tolerance`
    of its bytes, when the smallest model is accepted, when nothing is and a plan was rejected whose
    price is the lowest but for `tolerance`, when the limits in between give no new plan, or when
    the trials are spent. Should `start` be a fall of accuracy, the measurements turn it into nats
    from the second limit on.

    A pure function of what `evaluate` returns: a caller who caches evaluations by plan can stop and
    resume. Raises Infeasible when no plan keeps within the other limits; ValueError on malformed
    rows or groups, a start that is negative or not finite, or an accepted plan without a finite
    drop.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(
            f"search_plans(start={start!r}): expected a finite number of nats >= 0, usually the "
            "budget's max_drop"
        )
    if max_trials < 1:
        raise ValueError(f"search_plans(max_trials={max_trials!r}): expected at least 1")
    rows, same_option = list(rows), [tuple(group) for group in same_option]

    def plan(prices: Sequence[Row], *, max_loss: float | None) -> dict[str, str]:
        stored = (
            sum(row.bytes for row in rows) + fixed_bytes
            if max_loss is None and max_bytes is None
            else max_bytes
        )
        return cheapest(
            prices,
            max_loss=max_loss,
            max_bytes=stored,
            fixed_bytes=fixed_bytes,
            limits=limits,
            same_option=same_option,
        )

    trials: dict[_Key, Trial] = {}
    factors: dict[str, float] = {}
    while True:
        prices = corrected(rows, factors)
        found = _next(prices, trials, plan, start=start, max_trials=max_trials, tolerance=tolerance)
        if found is None:
            break
        limit, choices = found
        measured = evaluate(dict(choices))
        if measured.accepted and not math.isfinite(measured.drop):
            raise ValueError(
                f"evaluate() accepted a plan whose measured drop is {measured.drop!r}; do not "
                "accept such plans"
            )
        trials[_key(choices)] = Trial(
            choices=choices,
            limit=limit,
            bytes=_sums(rows, choices)[0],
            predicted=_sums(rows, choices)[1],
            expected=_sums(prices, choices)[1],
            measured=float(measured.drop),
            loss=float(measured.loss),
            stderr=float(measured.stderr),
            allowed=start if measured.allowed is None else float(measured.allowed),
            accepted=bool(measured.accepted),
        )
        factors = corrections(rows, [(t.choices, t.loss, t.stderr) for t in trials.values()])

    passing = [trial for trial in trials.values() if trial.accepted]
    best = min(passing, key=lambda trial: trial.bytes).choices if passing else None
    return Search(trials=tuple(trials.values()), best=best, factors=factors)


def corrections(
    rows: Iterable[Row], measured: Iterable[tuple[Mapping[str, str], float, float]]
) -> dict[str, float]:
    """What the price of each option must be multiplied by, from plans with their measured losses
    and standard errors.

    A price is good to second order, so it errs with the size of the change, which the option
    decides: the loss of a plan is modelled as the sum over options of a factor times what the
    plan's layers with that option cost. The factors share a mean that is left free and scatter
    about it by half of it (ridge regression); a loss is known to its standard error, a tenth of it
    and a hundredth of the largest. One plan corrects all prices alike; options that no plan has
    used get the mean. Factors stay between a fourth and four times the common ratio of measured and
    predicted.

    Empty where that ratio is not positive (losses lost in noise) or there is no finite loss. Cost:
    none to speak of.
    """
    rows = list(rows)
    usable = [(choices, loss, stderr) for choices, loss, stderr in measured if math.isfinite(loss)]
    options = sorted({row.option for row in rows})
    if not usable:
        return {}
    spent = np.zeros((len(usable), len(options)))
    for plan, (choices, _, _) in zip(spent, usable, strict=True):
        for row in rows:
            if choices[row.layer] == row.option:
                plan[options.index(row.option)] += row.price
    losses = np.array([loss for _, loss, _ in usable])
    stderrs = np.array([stderr if math.isfinite(stderr) else 0.0 for _, _, stderr in usable])
    largest = float(np.abs(losses).max())
    if largest == 0:
        return {}
    precision = 1 / (stderrs**2 + (0.1 * losses) ** 2 + (0.01 * largest) ** 2)
    predicted = spent.sum(1)
    squares = float(precision @ predicted**2)
    common = float(precision @ (predicted * losses)) / squares if squares > 0 else 0.0
    if common <= 0:
        return {}
    # In units of the common ratio: one column for the mean, one for each option's distance from it.
    design = np.column_stack([predicted, spent]) * common
    penalty = np.diag([0.0] + [1 / _SCATTER**2] * len(options))
    solution = np.linalg.lstsq(
        design.T @ (design * precision[:, None]) + penalty,
        design.T @ (precision * losses),
        rcond=None,
    )[0]
    factors = np.clip(solution[0] + solution[1:], 0.25, 4.0) * common
    return dict(zip(options, factors.tolist(), strict=True))


_SCATTER = 0.5


def corrected(rows: Iterable[Row], factors: Mapping[str, float]) -> list[Row]:
    """Rows whose prices are multiplied by the factors of their options; those without one are left
    alone."""
    return [
        Choice(
            layer=row.layer,
            option=row.option,
            bytes=row.bytes,
            price=row.price * factors.get(row.option, 1.0),
        )
        for row in rows
    ]


_Key = tuple[tuple[str, str], ...]


def _key(choices: Mapping[str, str]) -> _Key:
    return tuple(sorted(choices.items()))


def _sums(rows: Iterable[Row], choices: Mapping[str, str]) -> tuple[int, float]:
    """Bytes and price of a plan."""
    chosen = [row for row in rows if choices[row.layer] == row.option]
    return sum(row.bytes for row in chosen), math.fsum(row.price for row in chosen)


def _next(
    prices: Sequence[Row],
    trials: Mapping[_Key, Trial],
    plan: Callable[..., dict[str, str]],
    *,
    start: float,
    max_trials: int,
    tolerance: float,
) -> tuple[float, dict[str, str]] | None:
    """The next limit and its plan, which no trial has measured; None when the search is over."""
    most_careful, smallest = plan(prices, max_loss=None), plan(prices, max_loss=math.inf)
    floor, ceiling = _sums(prices, most_careful)[1], _sums(prices, smallest)[1]
    cost = {key: _sums(prices, trial.choices)[1] for key, trial in trials.items()}
    passing = min(
        (k for k, t in trials.items() if t.accepted),
        key=lambda k: (trials[k].bytes, cost[k]),
        default=None,
    )
    last = len(trials) == max_trials - 1
    if len(trials) >= max_trials:
        return None
    if passing is not None and trials[passing].bytes <= _sums(prices, smallest)[0]:
        return None
    if passing is None and any(price <= floor + tolerance * abs(floor) for price in cost.values()):
        return None
    low = None if passing is None else cost[passing]
    # A rejected plan that costs no more than the accepted one says that the prices still err, and
    # no more than that.
    failing = min(
        (k for k, t in trials.items() if not t.accepted and (low is None or cost[k] > low)),
        key=cost.__getitem__,
        default=None,
    )
    high = None if failing is None else cost[failing]
    if low is not None and high is not None and passing is not None:
        within_reach = plan(prices, max_loss=max(math.nextafter(high, -math.inf), floor))
        if (
            trials[passing].bytes - _sums(prices, within_reach)[0]
            < tolerance * trials[passing].bytes
        ):
            return None
    # Planning is cheap next to measuring, so a limit that gives no new plan only narrows the
    # bracket.
    for attempt in range(64):
        first = len(trials) == 1 and attempt == 0
        if low is not None and high is not None:
            limit = _between(
                low, high, _aim(trials[passing], cost[passing]) if passing is not None else None
            )
        elif low is not None and passing is not None:
            limit = _bolder(low, _aim(trials[passing], cost[passing]), ceiling, first=first)
        elif high is not None and failing is not None:
            limit = (
                floor
                if last
                else _more_cautious(high, _aim(trials[failing], cost[failing]), floor, first=first)
            )
        else:
            limit = start
        limit = min(max(limit, floor), ceiling)
        choices = plan(prices, max_loss=limit)
        known = trials.get(_key(choices))
        if known is not None and not known.accepted:
            if limit <= floor:
                return None
            # Every limit down to what the plan costs gives this same plan.
            high = min(limit, cost[_key(choices)])
        elif known is not None or (
            passing is not None and _sums(prices, choices)[0] >= trials[passing].bytes
        ):
            if limit >= ceiling:
                return None
            low = limit
        else:
            return limit, choices
        if low is not None and high is not None and high - low <= 1e-3 * abs(high):
            return None
    return None


def _aim(trial: Trial, cost: float) -> float | None:
    """What a plan costs whose drop is just allowed, if drops grow like prices from this trial
    on."""
    usable = math.isfinite(trial.measured) and trial.measured > 0 and cost > 0 and trial.allowed > 0
    return trial.allowed * cost / trial.measured if usable else None


def _bolder(low: float, aim: float | None, ceiling: float, *, first: bool) -> float:
    if low <= 0:
        return ceiling / 64 if ceiling > 0 else ceiling
    return min(max(4 * low if aim is None else aim, low * (1.25 if first else 2.0)), 64 * low)


def _more_cautious(high: float, aim: float | None, floor: float, *, first: bool) -> float:
    if high <= 0:
        return (high + floor) / 2
    return max(min(high / 4 if aim is None else aim, high * (0.8 if first else 0.5)), high / 64)


def _between(low: float, high: float, aim: float | None) -> float:
    if high <= 0:
        return (low + high) / 2
    # A plan that changes nothing costs 0 nats: without a floor the logarithmic scale would never
    # leave it.
    least = max(low, 0.0, high / 256)
    ratio = high / least
    wanted = (
        least * ratio**0.5
        if aim is None
        else min(max(aim, least * ratio**0.25), least * ratio**0.75)
    )
    return max(wanted, low + (high - low) / 16)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known_keys(cls: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if unknown := sorted(set(record) - names):
        raise ValueError(
            f"{cls.__name__}.from_dict: unknown keys {unknown}; expected {sorted(names)}"
        )
    return dict(record)
