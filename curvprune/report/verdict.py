"""The verdict: its status, what it means in a sentence, its numbers, the attempts before it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from markupsafe import Markup

from curvprune.record import EngineRecord, PairedLoss, RunRecord, Verdict
from curvprune.report import charts
from curvprune.report.figures import (
    MINUS,
    PLUS_MINUS,
    THIN,
    at_most,
    count,
    decimals_of,
    finite,
    fixed,
    percent,
    plus_minus,
    short,
)
from curvprune.report.tables import Cell, Column, Fact, Table, count_cell, number_cell

SHARES = ("accuracy", "top1")  # metrics that are fractions
STATUSES = ("CERTIFIED", "VIOLATED", "INCONCLUSIVE")
NOT_ASKED = "NO ACCURACY BUDGET ASKED"
NOT_FINISHED = "NOT FINISHED"
WHERE = "on data like the certify split"
UNTOUCHED = ", which no earlier step touched"
LEAKED = "have also made or chosen the model"  # so a note says that it was touched


@dataclass(frozen=True, slots=True)
class Quantity:
    """How a verdict's numbers are written: losses as they are, accuracies in per cent."""

    scale: float
    measure: str
    level_measure: str
    worse: str

    @classmethod
    def of(cls, result: Verdict | PairedLoss) -> Quantity:
        if result.metric in SHARES:
            return cls(100.0, "percentage points", "%", "below")
        return cls(1.0, result.measure, result.measure, "above")

    def scaled(self, value: float) -> float | None:
        number = finite(value)
        # Twelve digits: the shift to per cent must not turn a budget of 0.007 into
        # 0.7000000000000001.
        return None if number is None else float(f"{number * self.scale:.12g}")


def status_of(record: RunRecord) -> str:
    """The verdict's status, or why there is none."""
    if record.verdict is not None:
        return record.verdict.status
    asked = record.budget is not None and record.budget.max_drop is not None
    written = record.size.after_bytes is not None
    return NOT_ASKED if written and not asked else NOT_FINISHED


def judged(record: RunRecord) -> Verdict | None:
    """The verdict, or without a budget what was measured on the certify split (then with no budget
    to compare with)."""
    # NaN is written as "n/a": what was not asked is not judged.
    if record.verdict is not None or record.measured is None:
        return record.verdict
    return replace(record.measured, max_drop=math.nan, needed=None)


# Texts


def _decimals(verdict: Verdict) -> int:
    """As many decimals as the standard error allows; without one, three digits of the smallest
    number."""
    quantity = Quantity.of(verdict)
    decimals = decimals_of(quantity.scaled(verdict.stderr))
    if decimals is None:
        values = [quantity.scaled(v) for v in (verdict.drop, verdict.bound, verdict.max_drop)]
        sizes = [abs(v) for v in values if v]
        decimals = 2 - math.floor(math.log10(min(sizes))) if sizes else 4
    return min(10, max(0, decimals))


def bound_text(verdict: Verdict) -> str:
    """The one-sided bound, rounded away from the claim it supports."""
    quantity = Quantity.of(verdict)
    bound, budget = quantity.scaled(verdict.bound), quantity.scaled(verdict.max_drop)
    return at_most(bound, budget, _decimals(verdict))


def drop_text(verdict: Verdict | PairedLoss) -> str:
    """The drop with its standard error, in the verdict's own measure."""
    quantity = Quantity.of(verdict)
    return plus_minus(quantity.scaled(verdict.drop), quantity.scaled(verdict.stderr))


def statement(record: RunRecord) -> str:
    """What the verdict means, in one sentence (two where the data cannot decide)."""
    if record.verdict is not None:
        return claim(record.verdict)
    if status_of(record) == NOT_FINISHED:
        return "The run has not reached certification; nothing below is a promise about accuracy."
    measured = judged(record)
    if measured is None or finite(measured.drop) is None:
        return (
            "No accuracy budget was asked, so nothing was tested; the losses below are estimates."
        )
    return (
        "No accuracy budget was asked, so nothing was tested. Measured on the certify "
        f"split, which no earlier step touched: a drop of {drop_text(measured)} "
        f"{Quantity.of(measured).measure}; the {percent(measured.confidence)} one-sided bound is "
        f"{bound_text(measured)}."
    )


def claim(verdict: Verdict) -> str:
    """What a test has shown, no more."""
    # 1. Nothing is claimed that the record does not say itself.
    if verdict.status not in STATUSES:
        return f"The record's status is none of {', '.join(STATUSES)}, so nothing is claimed."
    quantity = Quantity.of(verdict)
    bound = quantity.scaled(verdict.bound)
    asked = (finite(verdict.max_drop), finite(verdict.confidence))
    if bound is None and (verdict.status == "CERTIFIED" or None in asked):
        return (
            f"The record says {verdict.status} without its bound, budget and confidence, so the "
            "statement cannot be made here."
        )
    if verdict.status == "INCONCLUSIVE" and (bound is None or verdict.bound <= verdict.max_drop):
        return (
            f"The certify split cannot decide at {percent(verdict.confidence)} confidence, "
            f"whatever the measured drop of {drop_text(verdict)} {quantity.measure}: "
            f"{verdict.note or 'too few documents differ'}."
        )
    # 2. Not certified: the budget is not met, or the data cannot tell.
    sure = f"With {percent(verdict.confidence)} confidence"
    budget = f"{short(quantity.scaled(verdict.max_drop))} {quantity.measure}"
    limit = bound_text(verdict)
    touched = verdict.earlier or LEAKED in verdict.note
    where = WHERE if touched else f"{WHERE}{UNTOUCHED}"
    if verdict.status == "VIOLATED":
        return (
            f"{sure} {_said_of(verdict, f'more than {budget}', quantity.worse)} {where}: the "
            "budget is not met."
        )
    if verdict.status == "INCONCLUSIVE":
        return (
            f"The certify split cannot decide: the measured drop is {drop_text(verdict)} "
            f"{quantity.measure} and its one-sided {percent(verdict.confidence)} bound is "
            f"{limit}, so the data neither hold the drop below the budget of {budget} nor show "
            "that it is larger."
        )
    # 3. Certified: the bound, rounded up. Where it says that the model is better for certain, the
    #    claim turns round, and so does the rounding.
    amount, side = f"at most {limit} {quantity.measure}", quantity.worse
    if bound is not None and bound <= 0 and not _of_divergence(verdict):
        better = at_most(bound, 0.0, _decimals(verdict)).lstrip(f"-{MINUS}")
        side = "above" if quantity.worse == "below" else "below"
        amount = f"at least {better} {quantity.measure}"
    return f"{sure} {_said_of(verdict, amount, side)} {where}."


def _of_divergence(verdict: Verdict) -> bool:
    return verdict.metric.endswith("kl")


def _said_of(verdict: Verdict, amount: str, side: str) -> str:
    """What is claimed of the compressed model; a divergence is a comparison by itself."""
    if _of_divergence(verdict):
        which = f"{verdict.metric.removesuffix('kl')}the "
        if verdict.metric == "kl":
            which = "mean "
        return (
            f"the {which}KL divergence of the compressed model from the uncompressed one is "
            f"{amount}"
        )
    name = "top-1 agreement" if verdict.metric == "top1" else verdict.metric
    return f"the compressed model's {name} is {amount} {side} the uncompressed one's"


def advice(record: RunRecord) -> list[str]:
    """What to do about a verdict that is not CERTIFIED."""
    status = status_of(record)
    if record.verdict is not None and status == "INCONCLUSIVE":
        return [
            _items_that_decide(record.verdict),
            "Enlarge the certify split (more independent documents, not longer ones) and run "
            "again, or ask for a more cautious plan: a smaller max_drop while planning, or "
            "options with more bits.",
            "Do not test again and again on the same items until it passes: each look spends "
            "confidence.",
        ]
    if status == "VIOLATED":
        return [
            "Offer milder options (more bits, smaller groups, keep), add calibration data, or "
            "ask for a larger budget; then certify on items that were not used for this "
            "verdict."
        ]
    return []


def _items_that_decide(verdict: Verdict) -> str:
    if verdict.needed is None:
        if verdict.drop >= verdict.max_drop:
            return (
                "No number of items is expected to certify this plan: the measured drop is at or "
                "above the budget."
            )
        return "The number of items that would decide it is not on record."
    # Needed are items for 80 % power, which may be fewer than were used.
    needed, used = verdict.needed, verdict.items
    more = f", {count(needed - used)} more than the {count(used)} used" if needed > used else ""
    return f"About {count(needed)} items{more}, should decide it if the drop stays as measured."


# Numbers


def verdict_facts(record: RunRecord) -> list[Fact]:
    """Every number of the verdict, labelled."""
    verdict = judged(record)
    if verdict is None:
        return []
    evidence = [
        Fact(
            "items",
            count(verdict.items),
            finite(verdict.items),
            "",
            "paired items of the certify split",
        ),
        Fact(
            "clusters",
            count(verdict.clusters),
            finite(verdict.clusters),
            "",
            "independent groups of items (documents); the standard error is over these",
        ),
    ]
    if verdict.needed is not None:
        needed = count(verdict.needed)
        evidence.append(
            Fact("needed", needed, float(verdict.needed), "items", "items that would decide it")
        )
    if verdict.unseen is not None:
        evidence.append(
            Fact(
                "unseen losses",
                f"below {at_most(100 * verdict.unseen, None, 1)}{THIN}%",
                finite(verdict.unseen),
                "",
                "a loss that hits a smaller share of documents may be in none of those at hand",
            )
        )
    if verdict.earlier:
        evidence.append(
            Fact(
                "earlier uses",
                count(len(verdict.earlier)),
                float(len(verdict.earlier)),
                "",
                f"verdicts on these items before this one: {'; '.join(verdict.earlier)}",
            )
        )
    facts = [*_drop_facts(verdict), *_level_facts(verdict), *evidence]
    if record.engine is not None:
        facts += _engine_facts(record.engine, Quantity.of(verdict))
    return facts


def _engine_facts(engine: EngineRecord, quantity: Quantity) -> list[Fact]:
    """What the verdict's engine was, and its own part of the drop."""
    weights = _scaled(quantity, engine.weights, engine.weights_stderr)
    share = _scaled(quantity, engine.share, engine.share_stderr)
    return [
        Fact("engine", engine.name, None, engine.version, "what ran the model for this verdict"),
        Fact(
            "of the weights",
            weights,
            finite(engine.weights),
            quantity.measure,
            "the drop of the same weights in torch",
        ),
        Fact(
            "of the engine",
            share,
            finite(engine.share),
            quantity.measure,
            "what its own arithmetic loses beyond that, as by rounding activations; paired by item",
        ),
    ]


def engine_text(record: RunRecord) -> str:
    """The engine and its share, in one line; empty where torch was judged."""
    engine, verdict = record.engine, judged(record)
    if engine is None or verdict is None:
        return ""
    quantity = Quantity.of(verdict)
    weights = _scaled(quantity, engine.weights, engine.weights_stderr)
    share = _scaled(quantity, engine.share, engine.share_stderr)
    return (
        f"as {engine.name} ({engine.version}) runs it: {weights} {quantity.measure} by the "
        f"weights, {share} by the engine"
    )


def _scaled(quantity: Quantity, value: float, stderr: float) -> str:
    return plus_minus(quantity.scaled(value), quantity.scaled(stderr))


def _drop_facts(verdict: Verdict) -> list[Fact]:
    """The drop, its bound and the budget."""
    quantity = Quantity.of(verdict)
    hint = (
        f"{verdict.metric} of the compressed model minus the uncompressed one's, paired by item; "
        "positive is worse"
    )
    if quantity.worse == "below":
        hint = (
            f"{verdict.metric} of the uncompressed model minus the compressed one's, paired by "
            "item; positive is worse"
        )
    # A bound below the drop bounds it from below.
    side = "lower" if (finite(verdict.bound) or 0.0) < (finite(verdict.drop) or 0.0) else "upper"
    return [
        Fact("drop", drop_text(verdict), finite(verdict.drop), quantity.measure, hint),
        Fact(
            f"{side} bound, {percent(verdict.confidence)}",
            bound_text(verdict),
            finite(verdict.bound),
            quantity.measure,
            "one-sided confidence bound on the drop, rounded up",
        ),
        Fact(
            "budget",
            short(quantity.scaled(verdict.max_drop)),
            finite(verdict.max_drop),
            quantity.measure,
            "max_drop",
        ),
    ]


def _level_facts(verdict: Verdict) -> list[Fact]:
    """Loss or accuracy of both models."""
    # No error of their own: they are shown with the decimals of the drop between them.
    quantity, decimals = Quantity.of(verdict), _decimals(verdict)
    levels = (
        ("before", verdict.baseline, "uncompressed model"),
        ("after", verdict.compressed, "compressed model"),
    )
    facts = []
    for when, level, whose in levels:
        text = fixed(quantity.scaled(level), decimals)
        label = f"{verdict.metric} {when}"
        facts.append(Fact(label, text, finite(level), quantity.level_measure, whose))
    return facts


def verdict_chart(record: RunRecord) -> Markup | None:
    """Drop, bound and budget on one axis; ``None`` where no drop was measured."""
    verdict = judged(record)
    if verdict is None:
        return None
    drop = finite(verdict.drop)
    if drop is None:
        return None
    quantity = Quantity.of(verdict)
    what = f"change of the {verdict.metric}"
    if quantity.worse == "below":
        what = f"fall of the {verdict.metric}"
    return charts.interval(
        drop=drop,
        stderr=finite(verdict.stderr) or 0.0,
        bound=finite(verdict.bound),
        budget=finite(verdict.max_drop),
        label=f"{what} ({quantity.measure}), right is worse",
        scale=quantity.scale,
    )


def attempts_table(record: RunRecord) -> Table | None:
    """The plans that were tested, in order; ``None`` if none was."""
    if not record.attempts:
        return None
    columns = [
        Column("#", "order of the fixed sequence", "n"),
        Column("plan"),
        Column("status"),
        Column(f"drop {PLUS_MINUS} se", "positive is worse", "n"),
        Column("bound", "one-sided, rounded up", "n"),
        Column("budget", "max_drop", "n"),
        Column("measure"),
        Column("confidence", "of each one-sided test", "n"),
        Column("items", "paired items", "n"),
        Column("clusters", "independent groups of items", "n"),
        Column("needed", "items that would decide it; empty where none were asked for", "n"),
    ]
    rows = []
    for k, attempt in enumerate(record.attempts, 1):
        verdict = attempt.verdict
        quantity = Quantity.of(verdict)
        needed = "" if verdict.needed is None else count(verdict.needed)
        rows.append(
            [
                number_cell(k, str(k)),
                Cell(attempt.plan),
                Cell(verdict.status, class_=f"status {verdict.status.lower()}"),
                number_cell(verdict.drop, drop_text(verdict)),
                number_cell(verdict.bound, bound_text(verdict)),
                number_cell(verdict.max_drop, short(quantity.scaled(verdict.max_drop))),
                Cell(quantity.measure),
                number_cell(verdict.confidence, percent(verdict.confidence)),
                count_cell(verdict.items),
                count_cell(verdict.clusters),
                number_cell(verdict.needed, needed),
            ]
        )
    return Table("attempts", columns, rows)
