"""One run beside another: figures, the same items, layers, recipes, provenance."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from curvprune.record import LayerRecord, OtherRun, RunRecord
from curvprune.report import items
from curvprune.report.figures import (
    MINUS,
    MISSING,
    PLUS_MINUS,
    THIN,
    clean,
    count,
    duration,
    finite,
    fixed,
    plus_minus,
    short,
    sig,
    size,
)
from curvprune.report.provenance import origins, total_seconds
from curvprune.report.sizes import stored_bits, times_smaller, times_text
from curvprune.report.tables import Cell, Column, Table, count_cell, number_cell
from curvprune.report.trials import chosen_point
from curvprune.report.verdict import Quantity, bound_text, drop_text, judged, status_of

HERE, THERE = "here", "there"
# As if the other run were what this one started from.
_HEADS = items.Heads(before=THERE, after=HERE, lost="right there only", won="right here only")


@dataclass(frozen=True, kw_only=True, slots=True)
class Differing:
    """Layers whose option differs or that only one run has. ``same``: how many have the same
    option, ``reshaped`` of them another shape; ``only_here``, ``only_there``: how many one run
    has alone."""

    table: Table
    same: int
    reshaped: int
    only_here: int
    only_there: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the section shows; ``None`` where the two runs cannot be compared so."""

    figures: Table
    paired: Table | None
    flips: items.Shortened | None
    layers: Differing | None
    recipes: str
    provenance: Table


def comparison(record: RunRecord, against: OtherRun) -> Comparison:
    """This run beside another."""
    return Comparison(
        figures=_figures_table(record, against.record),
        paired=_paired(against),
        flips=_flips(record, against),
        layers=_layers(record, against.record),
        recipes=_recipes(record, against),
        provenance=_provenance(record, against.record),
    )


def _sides(class_: str = "", what: str = "") -> list[Column]:
    start = f"{what} " if what else ""
    return [
        Column(f"{start}{HERE}", "this run", class_),
        Column(f"{start}{THERE}", "the other run", class_),
    ]


# Figures


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure of one run: its text, its number, and how a difference of two such numbers is
    written."""

    text: str
    value: float | None = None
    show: Callable[[float], str] = sig


def _figures(record: RunRecord) -> dict[str, _Figure]:
    """What both runs are measured by; a label holds the measure, so that only like is compared with
    like."""
    found = {"verdict": _Figure(status_of(record))}
    found |= _verdict_figures(record)
    found |= _size_figures(record)
    found |= _loss_figures(record)
    if record.stages:
        seconds = total_seconds(record)
        found["time"] = _Figure(duration(seconds), seconds, duration)
    peak = record.peak_memory_bytes
    found["peak memory"] = _Figure(size(peak), peak, size)
    return found


def _verdict_figures(record: RunRecord) -> dict[str, _Figure]:
    verdict = judged(record)
    if verdict is None:
        return {}
    quantity, metric = Quantity.of(verdict), verdict.metric
    drop, bound = quantity.scaled(verdict.drop), quantity.scaled(verdict.bound)
    budget = quantity.scaled(verdict.max_drop)
    before, after = quantity.scaled(verdict.baseline), quantity.scaled(verdict.compressed)
    measure = f"{metric}, {quantity.measure}"
    return {
        f"drop ({measure})": _Figure(drop_text(verdict), drop),
        f"bound ({measure})": _Figure(bound_text(verdict), bound),
        f"budget ({measure})": _Figure(short(budget), budget),
        f"{metric} before ({quantity.level_measure})": _Figure(sig(before, 5), before),
        f"{metric} after ({quantity.level_measure})": _Figure(sig(after, 5), after),
        "items": _Figure(count(verdict.items), verdict.items, count),
        "clusters": _Figure(count(verdict.clusters), verdict.clusters, count),
    }


def _size_figures(record: RunRecord) -> dict[str, _Figure]:
    after, folder = record.size.after_bytes, record.size.folder_bytes
    times, bits = times_smaller(record.size), stored_bits(record.size)
    found = {
        "weights": _Figure(size(after), after, size),
        "model folder": _Figure(size(folder), folder, size),
        "times smaller": _Figure(times_text(times), times, times_text),
        "stored bits per parameter": _Figure(fixed(bits, 2), bits, lambda b: fixed(b, 2)),
    }
    for limit in record.limits:
        found[f"{limit.name} used"] = _Figure(sig(limit.used, 4), finite(limit.used))
    return found


def _loss_figures(record: RunRecord) -> dict[str, _Figure]:
    """Predicted and measured loss of the plan that ships, predicted cost of removed units."""
    found, measure = {}, record.measure
    chosen = chosen_point(record)
    if chosen is not None:
        predicted = plus_minus(chosen.predicted, chosen.predicted_stderr)
        measured = plus_minus(chosen.measured, chosen.measured_stderr)
        found[f"predicted loss ({measure})"] = _Figure(predicted, chosen.predicted)
        found[f"measured on select ({measure})"] = _Figure(measured, chosen.measured)
    removed = record.structured
    if removed is not None and finite(removed.predicted) is not None:
        cost = plus_minus(removed.predicted, removed.predicted_stderr)
        label = f"predicted cost of the removed units ({measure})"
        found[label] = _Figure(cost, removed.predicted)
    return found


def _signed(value: float, show: Callable[[float], str]) -> str:
    if value == 0:
        return "0"
    return f"{'+' if value > 0 else MINUS}{show(abs(value))}"


def _difference_cell(ours: _Figure, theirs: _Figure) -> Cell:
    """Ours minus theirs; empty where neither is a number."""
    # Texts such as a status have no difference; a missing number leaves it open.
    if ours.value is None and theirs.value is None:
        return number_cell(None, "")
    if ours.value is None or theirs.value is None:
        return number_cell(None, MISSING)
    gap = ours.value - theirs.value
    return number_cell(gap, _signed(gap, ours.show))


def _figures_table(record: RunRecord, other: RunRecord) -> Table:
    """Both runs' verdicts, sizes, predictions and times, side by side."""
    here, there, nothing = _figures(record), _figures(other), _Figure(MISSING)
    columns = [Column("figure"), *_sides("n"), Column("difference", "here minus there", "n")]
    rows = []
    for label in dict.fromkeys([*here, *there]):
        ours, theirs = here.get(label, nothing), there.get(label, nothing)
        sides = [number_cell(side.value, side.text) for side in (ours, theirs)]
        rows.append([Cell(label), *sides, _difference_cell(ours, theirs)])
    return Table("against", columns, rows)


# The same items


def _paired(against: OtherRun) -> Table | None:
    """The two compressed models on the same items."""
    if not against.paired:
        return None
    columns = [
        Column("mean", "over all positions of the certify split"),
        *_sides("n"),
        Column(
            f"how much worse here {PLUS_MINUS} se",
            "paired by item; the error is over documents",
            "n",
        ),
        Column("z", "the difference divided by its standard error", "n"),
        Column("items", "of the certify split", "n"),
        Column("clusters", "documents, where they have several items", "n"),
    ]
    rows = []
    for result in against.paired:
        quantity = Quantity.of(result)
        levels = [quantity.scaled(result.compressed), quantity.scaled(result.baseline)]
        drop, stderr = finite(result.drop), finite(result.stderr)
        z = drop / stderr if drop is not None and stderr else None
        rows.append(
            [
                Cell(f"{result.metric} ({quantity.level_measure})"),
                *(number_cell(level, sig(level, 5)) for level in levels),
                number_cell(drop, f"{drop_text(result)}{THIN}{quantity.measure}"),
                number_cell(z, fixed(z, 1)),
                count_cell(result.items),
                count_cell(result.clusters),
            ]
        )
    return Table("paired", columns, rows)


def _flips(record: RunRecord, against: OtherRun) -> items.Shortened | None:
    """The items that are right in one run and wrong in the other; ``None`` where the items are not
    the same or have no one prediction each."""
    if not against.paired or record.items is None or against.record.items is None:
        return None
    # What the other run's model did takes the place of the uncompressed model.
    there = {item.index: item for item in items.read(against.record.items)}
    both = []
    for ours in items.read(record.items):
        theirs = there.get(ours.index)
        if theirs is None or ours.right is None or theirs.right is None:
            continue
        right = theirs.right[1], ours.right[1]
        both.append(replace(ours, before=theirs.after, after=ours.after, right=right))
    if not both:
        return None
    return items.flips(both, _HEADS, name="right-in-one", measure=record.measure)


# Layers, recipes, provenance


def _layers(record: RunRecord, other: RunRecord) -> Differing | None:
    """What differs in the layers; ``None`` where one run chose no plan."""
    if not record.layers or not other.layers:
        return None
    # 1. Layers in the order of this run, then those of the other alone.
    here = {layer.name: layer for layer in record.layers}
    there = {layer.name: layer for layer in other.layers}
    rows, same, reshaped = [], 0, 0
    for name in dict.fromkeys([*here, *there]):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours.option != theirs.option:
            sides = (ours, theirs)
            cells = [Cell(_option(layer), class_="mono nowrap") for layer in sides]
            cells += [_bytes_cell(layer) for layer in sides]
            cells += [_price_cell(layer) for layer in sides]
            rows.append([Cell(name, class_="mono"), *cells])
        else:
            same += 1
            reshaped += ours.shape != theirs.shape
    # 2. Prices are each by the run's own ledger, so their measures may differ.
    columns = [Column("layer"), *_sides("", "option"), *_sides("n", "bytes")]
    hint = "of this option alone, by the run's own ledger"
    for side, measure in ((HERE, record.measure), (THERE, other.measure)):
        columns.append(Column(f"price {side} {PLUS_MINUS} se ({measure})", hint, "n"))
    return Differing(
        table=Table("differing", columns, rows),
        same=same,
        reshaped=reshaped,
        only_here=len(here.keys() - there.keys()),
        only_there=len(there.keys() - here.keys()),
    )


def _option(layer: LayerRecord | None) -> str:
    return "no such layer" if layer is None else layer.option


def _bytes_cell(layer: LayerRecord | None) -> Cell:
    stored = None if layer is None else layer.bytes
    return number_cell(stored, size(stored))


def _price_cell(layer: LayerRecord | None) -> Cell:
    if layer is None:
        return number_cell(None, MISSING)
    return number_cell(layer.price, plus_minus(layer.price, layer.stderr))


def _recipes(record: RunRecord, against: OtherRun) -> str:
    """A unified diff from the other run's recipe to this one's; empty where they are the same."""
    # Cleaned before it is split: a stray control character must not look like a line.
    theirs = clean(against.record.recipe).splitlines()
    ours = clean(record.recipe).splitlines()
    names = f"{THERE}: {against.name}", HERE
    return "\n".join(difflib.unified_diff(theirs, ours, *names, lineterm=""))


def _provenance(record: RunRecord, other: RunRecord) -> Table:
    """What differs in where the two runs come from."""
    here, there = origins(record), origins(other)
    rows = []
    for what in dict.fromkeys([*here, *there]):
        values = [run.get(what, MISSING) for run in (here, there)]
        if values[0] != values[1]:
            rows.append([Cell(what), *(Cell(value, class_="mono") for value in values)])
    return Table("origins", [Column("what"), *_sides()], rows)
