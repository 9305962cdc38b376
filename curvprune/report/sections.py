"""From the record (plain dicts, any key may be missing) to what each section shows. No HTML
here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from . import charts
from .figures import (
    MISSING,
    PLUS_MINUS,
    THIN,
    TIMES,
    at_most,
    clean,
    count,
    decimals_of,
    duration,
    fixed,
    num,
    percent,
    plus_minus,
    short,
    sig,
    size,
)

Record = Mapping[str, Any]
STATUSES = ("CERTIFIED", "VIOLATED", "INCONCLUSIVE")


class Missing(Exception):
    """A section cannot be shown; the message says why."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell: ``sort`` is the raw number behind a rounded text, ``swatch`` a colour shown
    before it."""

    text: object
    sort: float | None = None
    class_: str = ""
    title: str = ""
    swatch: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A table head: ``hint`` explains the quantity, ``class_`` is ``n`` for numbers."""

    label: str
    hint: str = ""
    class_: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the template; ``foot`` is a last row that sorting leaves in place."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()


def _why(record: Record, key: str) -> str:
    stages = record.get("stages")
    done = (
        [word(s.get("name")) for s in stages if isinstance(s, Mapping)]
        if isinstance(stages, list | tuple)
        else []
    )
    last = f"; the last stage on record is {done[-1]!r}" if done else ""
    return f"the record has no {key!r}: the run did not ask for it or has not reached it{last}"


def mapping(record: Record, key: str) -> Record:
    """``record[key]`` as a mapping, or `Missing`."""
    value = record.get(key)
    if value is None:
        raise Missing(_why(record, key))
    if not isinstance(value, Mapping):
        raise Missing(f"{key!r} should be a mapping, the record has {type(value).__name__}")
    return value


def items(record: Record, key: str) -> list[Record]:
    """``record[key]`` as a non-empty list of mappings, or `Missing`."""
    value = record.get(key)
    if value is None:
        raise Missing(_why(record, key))
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise Missing(f"{key!r} should be a list of mappings")
    if not value:
        raise Missing(f"{key!r} is empty")
    return list(value)


def items_or_none(record: Record, key: str) -> list[Record]:
    """As `items`, with an empty list where there is nothing."""
    try:
        return items(record, key)
    except Missing:
        return []


def mapping_or_empty(record: Record, key: str) -> Record:
    """As `mapping`, with an empty mapping where there is nothing."""
    try:
        return mapping(record, key)
    except Missing:
        return {}


def texts(value: Any) -> list[str]:
    """A text or a list of texts as a list, without the missing ones."""
    values = value if isinstance(value, list | tuple) else [value]
    return [word(v) for v in values if v is not None]


def word(value: Any) -> str:
    """Text of a field, "n/a" where it is missing."""
    return (
        MISSING
        if value is None or (isinstance(value, float) and not math.isfinite(value))
        else clean(value)
    )


def number_cell(value: Any, text: str, class_: str = "n", title: str = "") -> Cell:
    """A right-aligned cell that sorts by the raw number."""
    return Cell(text, num(value), class_, title)


def error_cell(value: Any, stderr: Any) -> Cell:
    """A number with its standard error."""
    return number_cell(value, plus_minus(value, stderr))


def measure_of(record: Record) -> str:
    """The unit of prices and losses."""
    return word(
        record.get("measure") or mapping_or_empty(record, "ledger").get("measure") or "nats"
    )


# --- 1. verdict
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """A labelled number in the verdict banner; ``value`` is the record's own number."""

    label: str
    text: str
    value: float | None
    measure: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Quantity:
    """How a verdict's numbers are written: losses as they are, accuracies in per cent."""

    scale: float
    measure: str
    level_unit: str
    worse: str

    @classmethod
    def of(cls, verdict: Record) -> Quantity:
        if verdict.get("metric") == "accuracy":
            return cls(100.0, "percentage points", "%", "below")
        measure = word(verdict.get("measure") or "nats")
        return cls(1.0, measure, measure, "above")

    def scaled(self, value: Any) -> float | None:
        number = num(value)
        # Twelve digits: the shift to per cent must not turn a budget of 0.007 into
        # 0.7000000000000001.
        return None if number is None else float(f"{number * self.scale:.12g}")


def status_of(record: Record) -> str:
    """The verdict's status, or why there is none."""
    verdict = record.get("verdict")
    if isinstance(verdict, Mapping) and verdict:
        status = verdict.get("status")
        return clean(status) if isinstance(status, str) else "STATUS MISSING"
    asked = num(mapping_or_empty(record, "budget").get("max_drop")) is not None
    applied = num(mapping_or_empty(record, "size").get("after_bytes")) is not None
    finished = "verdict" in record and applied and not asked
    return "NO ACCURACY BUDGET ASKED" if finished else "NOT FINISHED"


def _decimals(verdict: Record, quantity: Quantity) -> int:
    decimals = decimals_of(quantity.scaled(verdict.get("stderr")))
    if decimals is None:
        values = [quantity.scaled(verdict.get(k)) for k in ("drop", "bound", "max_drop")]
        positive = [abs(v) for v in values if v]
        decimals = 2 - math.floor(math.log10(min(positive))) if positive else 4
    return min(10, max(0, decimals))


def bound_text(verdict: Record) -> str:
    """The one-sided bound, rounded away from the claim it supports."""
    quantity = Quantity.of(verdict)
    bound, budget = quantity.scaled(verdict.get("bound")), quantity.scaled(verdict.get("max_drop"))
    return at_most(bound, budget, _decimals(verdict, quantity))


def statement(record: Record) -> str:
    """What the verdict means, in one sentence (two where the data cannot decide)."""
    status = status_of(record)
    if status == "NO ACCURACY BUDGET ASKED":
        measured = mapping_or_empty(record, "measured")
        if num(measured.get("drop")) is None:
            return "No accuracy budget was asked, so nothing was tested; the losses below are estimates."
        measure = Quantity.of(measured).measure
        return (
            "No accuracy budget was asked, so nothing was tested. Measured on the certify "
            f"split, which no earlier step touched: a drop of {drop_text(measured)} {measure}; the "
            f"{percent(measured.get('confidence'))} one-sided bound is {bound_text({**measured, 'max_drop': None})}."
        )
    if status == "NOT FINISHED":
        return "The run has not reached certification; nothing below is a promise about accuracy."
    if status not in STATUSES:
        return f"The record's status is none of {', '.join(STATUSES)}, so nothing is claimed."
    verdict = mapping(record, "verdict")
    quantity = Quantity.of(verdict)
    what = word(verdict.get("metric") or "loss")
    sure = f"With {percent(verdict.get('confidence'))} confidence"
    where = "on data like the certify split, which no earlier step touched"
    budget = f"{short(quantity.scaled(verdict.get('max_drop')))} {quantity.measure}"
    bound = quantity.scaled(verdict.get("bound"))
    limit = bound_text(verdict)
    if (
        bound is None
        or num(verdict.get("max_drop")) is None
        or num(verdict.get("confidence")) is None
    ):
        return f"The record says {status} without its bound, budget and confidence, so the statement cannot be made here."
    if status == "VIOLATED":
        return (
            f"{sure} the compressed model's {what} is more than {budget} {quantity.worse} the "
            f"uncompressed one's {where}: the budget is not met."
        )
    if status == "INCONCLUSIVE":
        return (
            f"The certify split cannot decide: the measured drop is {drop_text(verdict)} "
            f"{quantity.measure} and its one-sided {percent(verdict.get('confidence'))} bound is "
            f"{limit}, so the data neither hold the drop below the budget of {budget} nor show "
            "that it is larger."
        )
    if bound <= 0:
        better = at_most(bound, 0.0, _decimals(verdict, quantity)).lstrip("-\N{MINUS SIGN}")
        other = "above" if quantity.worse == "below" else "below"
        relation = f"at least {better} {quantity.measure} {other}"
    else:
        relation = f"at most {limit} {quantity.measure} {quantity.worse}"
    return f"{sure} the compressed model's {what} is {relation} the uncompressed one's {where}."


def drop_text(verdict: Record) -> str:
    """The drop with its standard error, in the verdict's own unit."""
    quantity = Quantity.of(verdict)
    return plus_minus(quantity.scaled(verdict.get("drop")), quantity.scaled(verdict.get("stderr")))


def advice(record: Record) -> list[str]:
    """What to do about a verdict that is not CERTIFIED."""
    status = status_of(record)
    if status == "INCONCLUSIVE":
        verdict = mapping(record, "verdict")
        needed, used = num(verdict.get("needed")), num(verdict.get("items"))
        drop, budget = num(verdict.get("drop")), num(verdict.get("max_drop"))
        if needed is not None:
            more = (
                f", {count(needed - used)} more than the {count(used)} used"
                if used is not None and needed > used
                else ""
            )
            first = f"About {count(needed)} items{more}, should decide it if the drop stays as measured."
        elif drop is not None and budget is not None and drop >= budget:
            first = "No number of items is expected to certify this plan: the measured drop is at or above the budget."
        else:
            first = "The number of items that would decide it is not on record."
        return [
            first,
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


def judged(record: Record) -> dict[str, Any]:
    """The verdict, or without a budget what was measured on the certify split (then with no budget
    to compare with)."""
    verdict = mapping_or_empty(record, "verdict")
    return (
        dict(verdict)
        if verdict
        else {**mapping_or_empty(record, "measured"), "max_drop": None, "needed": None}
    )


def verdict_facts(record: Record) -> list[Fact]:
    """Every number of the verdict, labelled."""
    verdict = judged(record)
    if not verdict:
        return []
    quantity = Quantity.of(verdict)
    metric = word(verdict.get("metric") or "loss")
    decimals = _decimals(verdict, quantity)

    def level(key: str) -> str:
        return fixed(quantity.scaled(verdict.get(key)), decimals)

    lower = (num(verdict.get("bound")) or 0.0) < (num(verdict.get("drop")) or 0.0)
    bound_hint = "one-sided confidence bound on the drop, rounded up"
    drop_hint = f"{metric} of the compressed model minus the uncompressed one's, paired by item; positive is worse"
    if quantity.worse == "below":
        drop_hint = "accuracy of the uncompressed model minus the compressed one's, paired by item; positive is worse"
    return [
        Fact("drop", drop_text(verdict), num(verdict.get("drop")), quantity.measure, drop_hint),
        Fact(
            f"{'lower' if lower else 'upper'} bound, {percent(verdict.get('confidence'))}",
            bound_text(verdict),
            num(verdict.get("bound")),
            quantity.measure,
            bound_hint,
        ),
        Fact(
            "budget",
            short(quantity.scaled(verdict.get("max_drop"))),
            num(verdict.get("max_drop")),
            quantity.measure,
            "max_drop",
        ),
        Fact(
            f"{metric} before",
            level("baseline"),
            num(verdict.get("baseline")),
            quantity.level_unit,
            "uncompressed model",
        ),
        Fact(
            f"{metric} after",
            level("compressed"),
            num(verdict.get("compressed")),
            quantity.level_unit,
            "compressed model",
        ),
        Fact(
            "items",
            count(verdict.get("items")),
            num(verdict.get("items")),
            "",
            "paired items of the certify split",
        ),
        Fact(
            "clusters",
            count(verdict.get("clusters")),
            num(verdict.get("clusters")),
            "",
            "independent groups of items (documents); the standard error is over these",
        ),
        *(
            [
                Fact(
                    "needed",
                    count(verdict["needed"]),
                    num(verdict["needed"]),
                    "items",
                    "items that would decide it",
                )
            ]
            if num(verdict.get("needed")) is not None
            else []
        ),
    ]


def verdict_chart(record: Record) -> Markup | None:
    verdict = judged(record)
    drop = num(verdict.get("drop"))
    if drop is None:
        return None
    quantity = Quantity.of(verdict)
    what = (
        "fall of the accuracy"
        if quantity.worse == "below"
        else f"change of the {word(verdict.get('metric') or 'loss')}"
    )
    return charts.interval(
        drop=drop,
        stderr=max(0.0, num(verdict.get("stderr")) or 0.0),
        bound=num(verdict.get("bound")),
        budget=num(verdict.get("max_drop")),
        label=f"{what} ({quantity.measure}), right is worse",
        scale=quantity.scale,
    )


def attempts_table(record: Record) -> Table:
    rows = []
    for k, attempt in enumerate(items(record, "attempts"), 1):
        quantity = Quantity.of(attempt)
        status = word(attempt.get("status"))
        rows.append(
            [
                number_cell(k, str(k)),
                Cell(word(attempt.get("plan"))),
                Cell(status, class_=f"status {status.lower() if status in STATUSES else ''}"),
                number_cell(attempt.get("drop"), drop_text(attempt)),
                number_cell(attempt.get("bound"), bound_text(attempt)),
                number_cell(
                    attempt.get("max_drop"), short(quantity.scaled(attempt.get("max_drop")))
                ),
                Cell(quantity.measure),
                Cell(percent(attempt.get("confidence")), num(attempt.get("confidence")), "n"),
                number_cell(attempt.get("items"), count(attempt.get("items"))),
                number_cell(attempt.get("clusters"), count(attempt.get("clusters"))),
                number_cell(
                    attempt.get("needed"),
                    count(attempt["needed"]) if attempt.get("needed") is not None else "",
                ),
            ]
        )
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
    return Table("attempts", columns, rows)


# --- 2. size
# ---------------------------------------------------------------------------------------------------------


def option_order(record: Record) -> list[str]:
    """Every option on record, least compressed first: by mean bytes relative to the layer's largest
    option."""
    by_layer: dict[str, list[tuple[str, float]]] = {}
    seen: dict[str, None] = {}
    for row in [
        *items_or_none(mapping_or_empty(record, "ledger"), "rows"),
        *items_or_none(record, "layers"),
    ]:
        option, layer = word(row.get("option")), word(row.get("layer", row.get("name")))
        seen.setdefault(option)
        stored = num(row.get("bytes"))
        if stored is not None:
            by_layer.setdefault(layer, []).append((option, stored))
    shares: dict[str, list[float]] = {}
    for pairs in by_layer.values():
        largest = max(b for _, b in pairs)
        for option, stored in pairs:
            shares.setdefault(option, []).append(stored / largest if largest > 0 else 1.0)
    order = {option: k for k, option in enumerate(seen)}
    return sorted(
        seen, key=lambda o: (-sum(shares[o]) / len(shares[o]) if o in shares else 0.0, order[o])
    )


def option_colours(record: Record) -> dict[str, str]:
    order = option_order(record)
    return {option: charts.depth_colour(k, len(order)) for k, option in enumerate(order)}


def smaller_by(sizes: Record) -> float | None:
    """Bytes before divided by bytes after."""
    before, after = num(sizes.get("before_bytes")), num(sizes.get("after_bytes"))
    return before / after if before and after else None


def size_facts(record: Record) -> list[Fact]:
    sizes = mapping(record, "size")
    before, after, parameters = (
        num(sizes.get(k)) for k in ("before_bytes", "after_bytes", "parameters")
    )
    bits = None if after is None or not parameters else 8 * after / parameters
    exact = f"{count(before)} B", f"{count(after)} B"
    times = smaller_by(sizes)
    return [
        Fact("weights before", size(before), before, "", exact[0]),
        Fact("weights after", size(after), after, "", exact[1]),
        Fact(
            "ratio",
            MISSING if times is None else f"{fixed(times, 2)}{THIN}{TIMES}",
            times,
            "smaller",
            "weights before divided by weights after",
        ),
        Fact(
            "stored bits",
            fixed(bits, 2),
            bits,
            "per parameter",
            "8 x weights after / parameters, scales included",
        ),
        Fact(
            "model folder",
            size(sizes.get("folder_bytes")),
            num(sizes.get("folder_bytes")),
            "",
            "all files of model/",
        ),
        Fact("parameters", count(parameters), parameters, "", "of the uncompressed model"),
        *(
            Fact(name, text, used, "", LIMITS.get(name, "a limit with a table of its own"))
            for name, used, text in limits(record)
        ),
    ]


LIMITS = {  # what the budget may limit besides the drop
    "max_bytes": "bytes of the file of weights, with the most that its header can take",
    "max_bits": "stored bits per weight of the layers that had options",
    "max_macs": "multiply-adds of the layers that had options: per token of a language model, else per item",
    "max_bops": "bit operations (multiply-adds x weight bits x activation bits), likewise",
}


def limits(record: Record) -> list[tuple[str, float | None, str]]:
    """Name, what the shipped plan uses of it, and both used and most in words, of every limit on
    size and speed."""
    found = []
    for limit in items_or_none(record, "limits"):
        used, most = num(limit.get("used")), num(limit.get("most"))
        words = (count(v) if v is not None and v >= 1e5 else sig(v, 4) for v in (used, most))
        found.append((word(limit.get("name")), used, " of ".join(words)))
    return found


def _by_option(record: Record) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {o: [] for o in option_order(record)}
    for layer in items_or_none(record, "layers"):
        groups[word(layer.get("option"))].append(layer)
    return {option: layers for option, layers in groups.items() if layers}


def _total(rows: Sequence[Record], key: str) -> float:
    return math.fsum(v for v in (num(r.get(key)) for r in rows) if v is not None)


def size_chart(record: Record) -> Markup | None:
    sizes = mapping_or_empty(record, "size")
    before, after = num(sizes.get("before_bytes")), num(sizes.get("after_bytes"))
    colours = option_colours(record)
    segments = [(o, _total(rows, "bytes"), colours[o]) for o, rows in _by_option(record).items()]
    if after is not None:
        rest = after - math.fsum(b for _, b, _ in segments)
        if rest > 0:
            segments.append(("everything else" if segments else "weights", rest, ""))
    groups: list[tuple[str, list[tuple[str, float, str]]]] = []
    if before is not None:
        groups.append(("before", [("weights", max(0.0, before), "")]))
    if segments:
        groups.append(("after", segments))
    return charts.bars(groups) if groups else None


def options_table(record: Record) -> Table:
    layers = items(record, "layers")
    colours = option_colours(record)
    after = num(mapping_or_empty(record, "size").get("after_bytes"))

    def cells(label: Cell, rows: Sequence[Record]) -> list[Cell]:
        stored, weights = _total(rows, "bytes"), _total(rows, "parameters")
        price = _total(rows, "price")
        return [
            label,
            number_cell(len(rows), count(len(rows))),
            number_cell(weights, count(weights)),
            number_cell(stored, size(stored), title=f"{count(stored)} B"),
            number_cell(stored, percent(float(f"{stored / after:.3g}")) if after else MISSING),
            number_cell(
                8 * stored / weights if weights else None,
                fixed(8 * stored / weights, 2) if weights else MISSING,
            ),
            number_cell(price, sig(price)),
        ]

    columns = [
        Column("option"),
        Column("layers", "how many layers got it", "n"),
        Column("weights", "parameters of those layers", "n"),
        Column("bytes", "on disk, scales and zero points included", "n"),
        Column("share", "of the compressed weights' bytes", "n"),
        Column("bits/weight", "8 x bytes / weights", "n"),
        Column(
            f"sum of prices ({measure_of(record)})",
            "the standard error of the whole plan is in section 3: layers share items, so errors "
            "do not add up",
            "n",
        ),
    ]
    rows = [cells(Cell(o, swatch=colours[o]), rows) for o, rows in _by_option(record).items()]
    return Table("options", columns, rows, cells(Cell("all priced layers"), layers))


# --- 3 and 4. trials and frontier
# ------------------------------------------------------------------------------------


def recoveries_table(record: Record) -> Table:
    rows = []
    for found in items(record, "recoveries"):
        before, after = num(found.get("loss_before")), num(found.get("loss_after"))
        gain = None if before is None or after is None else before - after
        rows.append(
            [
                Cell(word(found.get("plan"))),
                number_cell(before, sig(before, 4)),
                number_cell(after, sig(after, 4)),
                number_cell(gain, sig(gain)),
                number_cell(found.get("steps"), count(found.get("steps"))),
                number_cell(found.get("best_step"), count(found.get("best_step"))),
                number_cell(found.get("trained"), count(found.get("trained"))),
                number_cell(found.get("flipped"), count(found.get("flipped"))),
                number_cell(found.get("seconds"), duration(found.get("seconds"))),
            ]
        )
    columns = [
        Column("plan"),
        Column("before", "mean loss on the select split as compressed", "n"),
        Column("after", "mean loss on the select split of the state that was kept", "n"),
        Column("gain", "before minus after", "n"),
        Column("steps", "steps done", "n"),
        Column("kept", "the step whose state was kept; 0: as compressed", "n"),
        Column("numbers", "how many numbers were free", "n"),
        Column("codes moved", "how many rounded weights have another code than before", "n"),
        Column("time", "", "n"),
    ]
    return Table("recoveries", columns, rows)


_DRAWN = {
    "plan": ("circle", "plan", "plan"),
    "applied": ("star", "applied", "applied model"),
    "uniform": ("square", "uniform", "control: uniform"),
    "reversed": ("diamond", "reversed", "control: reversed order"),
    "control": ("triangle", "control", "control: static rule, or one kind alone"),
}


def _family(trial: Record) -> str:
    kind, name = word(trial.get("kind")), word(trial.get("name")).lower()
    if kind != "control":
        return kind if kind in _DRAWN else "control"
    return "uniform" if "uniform" in name else "reversed" if "revers" in name else "control"


def _shipped(record: Record) -> int | None:
    """Index of the attempt whose model ships: the last certified one of the sequence, else the
    first."""
    attempts = items_or_none(record, "attempts")
    certified = 0
    while certified < len(attempts) and attempts[certified].get("status") == "CERTIFIED":
        certified += 1
    return max(0, certified - 1) if attempts else None


def _chosen_trial(record: Record) -> int | None:
    """Index of the trial of the model that ships: the applied one that the shipped attempt names.
    Applied models that were not worth an attempt come after the others."""
    trials, attempts = items_or_none(record, "trials"), items_or_none(record, "attempts")
    applied = [k for k, t in enumerate(trials) if t.get("kind") == "applied"]
    shipped = _shipped(record)
    if shipped is not None:
        named = [k for k in applied if trials[k].get("name") == attempts[shipped].get("plan")]
        if named or shipped < len(applied):
            return named[0] if named else applied[shipped]
    accepted = [
        k for k, t in enumerate(trials) if t.get("accepted") is True and t.get("kind") != "control"
    ]
    return applied[-1] if applied else accepted[-1] if accepted else None


def trial_points(record: Record) -> list[charts.Point]:
    trials = items_or_none(record, "trials")
    chosen = _chosen_trial(record)
    points = []
    for k, trial in enumerate(trials):
        shape, class_, _ = _DRAWN[_family(trial)]
        points.append(
            charts.Point(
                number=k + 1,
                name=word(trial.get("name")),
                shape=shape,
                class_=class_,
                bytes=num(trial.get("bytes")),
                predicted=num(trial.get("predicted")),
                predicted_stderr=error_of(trial.get("predicted_stderr")),
                measured=num(trial.get("measured")),
                measured_stderr=error_of(trial.get("measured_stderr")),
                chosen=k == chosen,
            )
        )
    return points


def error_of(value: Any) -> float | None:
    """A standard error, or ``None`` where the record has none or a negative one."""
    number = num(value)
    return number if number is not None and number >= 0 else None


def trials_legend(record: Record) -> Markup:
    families = Counter(_family(t) for t in items_or_none(record, "trials"))
    return charts.legend([_DRAWN[f] for f in _DRAWN if families[f]])


_EXTRA: tuple[tuple[str, Column, Callable[[Any], str]], ...] = (
    (
        "metric_drop",
        Column("accuracy drop", "fall of the accuracy on the select split", "n"),
        lambda v: _points(v),
    ),
    (
        "chance",
        Column("chance", "estimated probability that certification succeeds", "n"),
        lambda v: fixed(v, 2),
    ),
)


def _points(value: Any) -> str:
    number = num(value)
    return MISSING if number is None else f"{fixed(100 * number, 2)}{THIN}pp"


def trials_table(record: Record) -> Table:
    trials = items(record, "trials")
    chosen = _chosen_trial(record)
    corrected = bool(mapping_or_empty(record, "corrections"))
    extra = [c for c in _EXTRA if any(num(t.get(c[0])) is not None for t in trials)]
    if judged(record).get("metric") != "accuracy":
        extra = [c for c in extra if c[0] != "metric_drop"]
    rows = []
    for k, trial in enumerate(trials):
        p, m = num(trial.get("predicted")), num(trial.get("measured"))
        ep, em = error_of(trial.get("predicted_stderr")), error_of(trial.get("measured_stderr"))
        gap = None if p is None or m is None else m - p
        spread = None if ep is None or em is None else math.hypot(ep, em)
        z = gap / spread if gap is not None and spread else None
        ratio = m / p if m is not None and p is not None and p > 0 else None
        accepted = trial.get("accepted")
        rows.append(
            [
                number_cell(k + 1, str(k + 1)),
                Cell(
                    word(trial.get("name")) + (" (chosen)" if k == chosen else ""),
                    class_="nowrap strong" if k == chosen else "nowrap",
                ),
                Cell(word(trial.get("kind"))),
                number_cell(
                    trial.get("bytes"),
                    size(trial.get("bytes")),
                    title=f"{count(trial.get('bytes'))} B",
                ),
                error_cell(p, ep),
                *(
                    [number_cell(trial.get("expected"), sig(trial.get("expected")))]
                    if corrected
                    else []
                ),
                error_cell(m, em),
                number_cell(gap, plus_minus(gap, spread)),
                number_cell(z, fixed(z, 1), "n alert" if z is not None and abs(z) > 3 else "n"),
                number_cell(ratio, sig(ratio)),
                number_cell(trial.get("items"), count(trial.get("items"))),
                *(number_cell(trial.get(key), show(trial.get(key))) for key, _, show in extra),
                Cell("yes" if accepted is True else "no" if accepted is False else MISSING),
                Cell(word(trial.get("note") or "")),
            ]
        )
    columns = [
        Column("#", "number in the charts", "n"),
        Column("plan"),
        Column(
            "kind",
            "plan: from the integer program; control: for comparison; applied: the packed model "
            "itself",
        ),
        Column("bytes", "weights on disk", "n"),
        Column(f"predicted {PLUS_MINUS} se", "loss increase from the ledger", "n"),
        *(
            [
                Column(
                    "expected",
                    "sum of the prices, corrected by earlier trials; without pairs",
                    "n",
                )
            ]
            if corrected
            else []
        ),
        Column(f"measured {PLUS_MINUS} se", "loss increase on the select split, paired", "n"),
        Column(
            f"difference {PLUS_MINUS} se",
            "measured minus predicted; errors in quadrature (different splits)",
            "n",
        ),
        Column("z", "difference divided by its standard error", "n"),
        Column("ratio", "measured divided by predicted", "n"),
        Column("items", "paired items of the select split", "n"),
        *(column for _, column, _ in extra),
        Column(
            "accepted",
            "whether the measurement on the select split lets the plan go on to certification",
        ),
        Column("note"),
    ]
    return Table("trials", columns, rows)


def trials_reading(record: Record) -> str:
    """How well the prediction held, in one sentence."""
    good = total = 0
    for trial in items_or_none(record, "trials"):
        p, m = num(trial.get("predicted")), num(trial.get("measured"))
        ep, em = error_of(trial.get("predicted_stderr")), error_of(trial.get("measured_stderr"))
        if (
            p is not None
            and m is not None
            and ep is not None
            and em is not None
            and math.hypot(ep, em) > 0
        ):
            total += 1
            good += abs(m - p) <= 2 * math.hypot(ep, em)
    if not total:
        return "No trial has both a prediction and a measurement with standard errors."
    beaten = [
        word(t.get("name")) for t in items_or_none(record, "trials") if t.get("beats_plan") is True
    ]
    end = f" A control, {beaten[0]}, beats the plan and was used." if beaten else ""
    return (
        f"{good} of {total} trials were measured within two standard errors of the prediction.{end}"
    )


def max_bytes_of(record: Record) -> float | None:
    return num(mapping_or_empty(record, "budget").get("max_bytes"))


def loss_budget_of(record: Record) -> float | None:
    """The budget when it is one in the unit of the predicted loss."""
    verdict, budget = mapping_or_empty(record, "verdict"), mapping_or_empty(record, "budget")
    for source in (verdict, budget):
        limit = num(source.get("max_drop"))
        if limit is not None and source.get("metric", "loss") == "loss":
            return limit
    return None


def frontier_chart(record: Record) -> Markup:
    curve = []
    for row in items(record, "frontier"):
        stored, predicted = num(row.get("bytes")), num(row.get("predicted"))
        if stored is not None and predicted is not None:
            curve.append((stored, predicted, error_of(row.get("predicted_stderr")) or 0.0))
    chart = charts.frontier(
        sorted(curve),
        trial_points(record),
        measure=measure_of(record),
        max_drop=loss_budget_of(record),
        max_bytes=max_bytes_of(record),
    )
    if chart is None:
        raise Missing("no row of 'frontier' has both bytes and a predicted loss")
    return chart


def frontier_table(record: Record) -> Table:
    columns = [
        Column("bytes", "weights on disk", "n"),
        Column(
            f"predicted {PLUS_MINUS} se ({measure_of(record)})",
            "loss increase from the ledger",
            "n",
        ),
    ]
    rows = [
        [
            number_cell(
                row.get("bytes"), size(row.get("bytes")), title=f"{count(row.get('bytes'))} B"
            ),
            error_cell(row.get("predicted"), row.get("predicted_stderr")),
        ]
        for row in items(record, "frontier")
    ]
    return Table("frontier", columns, rows)


# --- 5 and 6. layers and ledger
# --------------------------------------------------------------------------------------


def _shape(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value:
        return MISSING
    return f" {TIMES} ".join(count(v).replace(",", "") for v in value)


def layers_table(record: Record) -> Table:
    colours = option_colours(record)
    rows = []
    for k, layer in enumerate(items(record, "layers")):
        option = word(layer.get("option"))
        rows.append(
            [
                number_cell(k, str(k)),
                Cell(word(layer.get("name")), class_="mono"),
                Cell(word(layer.get("kind"))),
                Cell(
                    _shape(layer.get("shape")),
                    num(layer.get("parameters")),
                    "n",
                    f"{count(layer.get('parameters'))} weights",
                ),
                Cell(option, class_="mono nowrap", swatch=colours[option]),
                number_cell(layer.get("bits"), fixed(layer.get("bits"), 2)),
                number_cell(
                    layer.get("bytes"),
                    size(layer.get("bytes")),
                    title=f"{count(layer.get('bytes'))} B",
                ),
                error_cell(layer.get("price"), layer.get("stderr")),
                Cell(word(layer.get("reason") or "")),
                Cell("; ".join(texts(layer.get("notes")))),
            ]
        )
    columns = [
        Column("#", "place in the model", "n"),
        Column("layer"),
        Column("kind"),
        Column(f"out {TIMES} in", "shape of the weight as a matrix", "n"),
        Column("option"),
        Column("bits/weight", "average stored bits, scales and zero points included", "n"),
        Column("bytes", "on disk", "n"),
        Column(
            f"price {PLUS_MINUS} se ({measure_of(record)})",
            "predicted loss increase of this choice alone",
            "n",
        ),
        Column("reason"),
        Column("notes"),
    ]
    return Table("layers", columns, rows)


def _stem(names: Sequence[str]) -> str:
    """The longest dotted prefix that four in five names share: leaving it out makes labels
    short."""
    prefixes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        prefixes.update(".".join(parts[:k]) + "." for k in range(1, len(parts)))
    common = [p for p, n in prefixes.items() if n >= 0.8 * len(names) and n > 1]
    return max(common, key=len, default="")


def labels_of(names: Sequence[str], *, longest: int = 30) -> tuple[str, list[str]]:
    """The prefix left out, and a label for each name, cut in the middle where it is still too
    long."""
    stem = _stem(names)
    labels = []
    for name in names:
        label = name.removeprefix(stem) or name
        if len(label) > longest:
            label = f"{label[: longest // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{label[-(longest // 2) :]}"
        labels.append(label)
    return stem, labels


def heat(record: Record) -> tuple[Markup, str]:
    """The heat map and the prefix its labels leave out."""
    rows = items(mapping(record, "ledger"), "rows")
    cells = {
        (word(r.get("layer")), word(r.get("option"))): (
            num(r.get("price")),
            error_of(r.get("stderr")),
        )
        for r in rows
    }
    names = list(dict.fromkeys(layer for layer, _ in cells))
    stem, labels = labels_of(names, longest=26)
    priced = {option for _, option in cells}
    table = charts.HeatMap(
        layers=names,
        labels=labels,
        options=[o for o in option_order(record) if o in priced],
        cells=cells,
        chosen={
            word(x.get("name")): word(x.get("option")) for x in items_or_none(record, "layers")
        },
    )
    chart = charts.heat_map(table, measure=measure_of(record))
    if chart is None:
        raise Missing("the ledger prices no layer")
    return chart, stem


def ledger_table(record: Record) -> Table:
    rows = items(mapping(record, "ledger"), "rows")
    priced: dict[str, dict[str, Record]] = {}
    for row in rows:
        priced.setdefault(word(row.get("layer")), {})[word(row.get("option"))] = row
    offered = {o for options in priced.values() for o in options}
    order = [o for o in option_order(record) if o in offered]
    chosen = {word(x.get("name")): word(x.get("option")) for x in items_or_none(record, "layers")}
    body = []
    for layer, options in priced.items():
        line = [Cell(layer, class_="mono")]
        for option in order:
            found = options.get(option)
            if found is None:
                line.append(Cell("not offered", class_="n faint"))
                continue
            text = plus_minus(found.get("price"), found.get("stderr")) + (
                " m" if found.get("measured") else ""
            )
            picked = chosen.get(layer) == option
            line.append(
                number_cell(
                    found.get("price"),
                    f"{text} *" if picked else text,
                    "n strong" if picked else "n",
                )
            )
        body.append(line)
    return Table("ledger", [Column("layer"), *(Column(o, "", "n") for o in order)], body)


def ledger_facts(record: Record) -> str:
    ledger = mapping(record, "ledger")
    measured = sum(bool(row.get("measured")) for row in items(ledger, "rows"))
    return (
        f"Curvature: {word(ledger.get('curvature'))}; {count(ledger.get('num_items'))} items, "
        f"{count(ledger.get('labels_per_item'))} draw(s) per item; prices in {measure_of(record)}."
        + (
            f" {measured} price(s) marked m, the highest, were measured: the loss of that change "
            "alone."
            if measured
            else ""
        )
    )


# --- 8 and 9. cost and provenance
# ------------------------------------------------------------------------------------


def stages_table(record: Record) -> Table:
    stages = items(record, "stages")
    total = math.fsum(max(0.0, num(s.get("seconds")) or 0.0) for s in stages)
    rows = []
    for stage in stages:
        seconds = num(stage.get("seconds"))
        share = max(0.0, seconds) / total if seconds is not None and total > 0 else None
        rows.append(
            [
                Cell(word(stage.get("name"))),
                number_cell(seconds, duration(seconds)),
                number_cell(share, MISSING if share is None else f"{100 * share:.0f}{THIN}%"),
                Cell("" if share is None else charts.progress(share)),
                Cell("resumed from the run folder" if stage.get("resumed") is True else ""),
            ]
        )
    columns = [
        Column("stage"),
        Column("time", "wall clock", "n"),
        Column("share", "", "n"),
        Column(""),
        Column(""),
    ]
    foot = [Cell("total"), number_cell(total, duration(total)), Cell(""), Cell(""), Cell("")]
    return Table("stages", columns, rows, foot)


def provenance_table(record: Record) -> Table:
    rows: list[list[Cell]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}, {clean(key)}" if name else clean(key), inner)
        elif isinstance(value, list | tuple):
            rows.append([Cell(name), Cell(", ".join(word(v) for v in value), class_="mono")])
        else:
            rows.append([Cell(name), Cell(word(value), class_="mono")])

    provenance = mapping(record, "provenance")
    add("", provenance)
    if not rows:
        raise Missing("'provenance' is empty")
    return Table("provenance", [Column("what"), Column("value")], rows)


# --- 10. notes
# -------------------------------------------------------------------------------------------------------


def notes(record: Record) -> list[tuple[str, str]]:
    """``(where, text)`` of every note: the run's, the layers' (equal texts together), the
    curvature's, the trials', and what this report itself finds inconsistent in the record."""
    found = [("check of this report", text) for text in inconsistencies(record)]
    found += [("run", text) for text in texts(record.get("notes"))]
    by_text: dict[str, list[str]] = {}
    for layer in items_or_none(record, "layers"):
        for text in texts(layer.get("notes")):
            by_text.setdefault(text, []).append(word(layer.get("name")))
    found += [(", ".join(names), text) for text, names in by_text.items()]
    found += [
        ("curvature", text) for text in texts(mapping_or_empty(record, "analysis").get("notes"))
    ]
    for trial in items_or_none(record, "trials"):
        if trial.get("note"):
            found.append((f"trial {word(trial.get('name'))}", word(trial["note"])))
    return found


def inconsistencies(record: Record) -> list[str]:
    """What cannot be right, or weakens the guarantee, in the record as it stands."""
    found = []
    verdict = mapping_or_empty(record, "verdict")
    bound, drop, budget = (num(verdict.get(k)) for k in ("bound", "drop", "max_drop"))
    status = verdict.get("status")
    for limit in items_or_none(record, "limits"):
        used, most = num(limit.get("used")), num(limit.get("most"))
        if used is not None and most is not None and used > most:
            found.append(f"The plan uses more of {word(limit.get('name'))} than the budget allows.")
    if status == "CERTIFIED" and (bound is None or budget is None or bound > budget):
        found.append(
            "The status is CERTIFIED, but the record's bound is missing or not within its budget."
        )
    if status == "VIOLATED" and drop is not None and budget is not None and drop <= budget:
        found.append("The status is VIOLATED, but the record's measured drop is within its budget.")
    if (
        status in ("VIOLATED", "INCONCLUSIVE")
        and None not in (bound, drop, budget)
        and drop <= bound <= budget  # type: ignore[operator]
    ):
        found.append(f"The status is {status}, but the record's upper bound is within its budget.")
    attempts = items_or_none(record, "attempts")
    failed = next((k for k, a in enumerate(attempts) if a.get("status") != "CERTIFIED"), None)
    if failed is not None and failed + 1 < len(attempts):
        level = num(attempts[0].get("confidence"))
        later = [num(a.get("confidence")) for a in attempts[failed + 1 :]]
        if level is None or any(c is None or c <= level for c in later):
            found.append(
                f"Attempt {failed + 1} did not certify and {len(attempts) - failed - 1} more "
                "followed on the same split at the same confidence: a fixed sequence stops at "
                "the first failure, so the stated confidence does not cover them."
            )
    sizes = mapping_or_empty(record, "size")
    after = num(sizes.get("after_bytes"))
    stored = _total(items_or_none(record, "layers"), "bytes")
    if after is not None and stored > after:
        found.append(
            f"The layers add up to {count(stored)} B, more than the {count(after)} B of all "
            "weights after compression."
        )
    times, ratio = smaller_by(sizes), num(sizes.get("ratio"))
    # A ratio may be written either way round: the factor saved or the share left.
    if (
        times is not None
        and ratio is not None
        and min(abs(ratio / times - 1), abs(ratio * times - 1)) > 0.01
    ):
        found.append(
            f"The recorded ratio {sig(ratio, 4)} fits neither before/after = {sig(times, 4)} nor "
            "its inverse."
        )
    diagnosis = mapping_or_empty(mapping_or_empty(record, "analysis"), "diagnosis")
    largest, step = num(diagnosis.get("lambda_max")), num(diagnosis.get("max_learning_rate"))
    if (
        largest is not None
        and step is not None
        and (largest <= 0 or abs(step * largest / 2 - 1) > 0.01)
    ):
        found.append(
            f"The recorded learning rate bound {sig(step, 4)} is not 2/λmax for λmax = "
            f"{sig(largest, 4)}."
        )
    return found
