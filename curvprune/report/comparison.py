"""One run beside another: the record with an "against" (``name``, ``record``, and ``paired``
results on the same items or ``unpaired``, why there are none) to what the section shows. No HTML
here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import items
from .figures import (
    MINUS,
    MISSING,
    PLUS_MINUS,
    THIN,
    TIMES,
    clean,
    count,
    duration,
    fixed,
    num,
    plus_minus,
    short,
    sig,
    size,
)
from .sections import (
    Cell,
    Column,
    Missing,
    Quantity,
    Record,
    Table,
    bound_text,
    drop_text,
    items_or_none,
    judged,
    mapping,
    mapping_or_empty,
    measure_of,
    number_cell,
    smaller_by,
    status_of,
    trial_points,
    word,
)
from .sections import items as rows_of
from .sections import provenance_table as provenance_of

HERE, THERE = "here", "there"
# As if the other run were what this one started from.
_HEADS = items.Heads(before=THERE, after=HERE, lost="right there only", won="right here only")


def name_of(record: Record) -> str:
    """What the other run is called; empty where there is none to compare with."""
    against = mapping_or_empty(record, "against")
    return word(against.get("name") or "another run") if against else ""


def _other(record: Record) -> Record:
    return mapping_or_empty(mapping(record, "against"), "record")


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure of one run: its text, its number, and how a difference of two such numbers is
    written."""

    text: str
    value: float | None = None
    show: Callable[[float], str] = sig


def _figures(record: Record) -> dict[str, _Figure]:
    """What both runs are measured by; a label holds the unit, so that only like is compared with
    like."""
    found = {"verdict": _Figure(status_of(record))}
    verdict = judged(record)
    if verdict:
        quantity, metric = Quantity.of(verdict), word(verdict.get("metric") or "loss")
        scaled = {
            k: quantity.scaled(verdict.get(k))
            for k in ("drop", "bound", "max_drop", "baseline", "compressed")
        }
        measure = f"{metric}, {quantity.measure}"
        found[f"drop ({measure})"] = _Figure(drop_text(verdict), scaled["drop"])
        found[f"bound ({measure})"] = _Figure(bound_text(verdict), scaled["bound"])
        found[f"budget ({measure})"] = _Figure(short(scaled["max_drop"]), scaled["max_drop"])
        found[f"{metric} before ({quantity.level_unit})"] = _Figure(
            sig(scaled["baseline"], 5), scaled["baseline"]
        )
        found[f"{metric} after ({quantity.level_unit})"] = _Figure(
            sig(scaled["compressed"], 5), scaled["compressed"]
        )
        for key in ("items", "clusters"):
            found[key] = _Figure(count(verdict.get(key)), num(verdict.get(key)), count)
    sizes = mapping_or_empty(record, "size")
    after, parameters, times = (
        num(sizes.get("after_bytes")),
        num(sizes.get("parameters")),
        smaller_by(sizes),
    )
    bits = 8 * after / parameters if after is not None and parameters else None
    folder = num(sizes.get("folder_bytes"))
    found |= {
        "weights": _Figure(size(after), after, size),
        "model folder": _Figure(size(folder), folder, size),
        "times smaller": _Figure(
            f"{fixed(times, 2)}{THIN}{TIMES}", times, lambda v: f"{fixed(v, 2)}{THIN}{TIMES}"
        ),
        "stored bits per parameter": _Figure(fixed(bits, 2), bits, lambda v: fixed(v, 2)),
    }
    for limit in items_or_none(record, "limits"):
        used = num(limit.get("used"))
        found[f"{word(limit.get('name'))} used"] = _Figure(sig(used, 4), used)
    chosen = next((p for p in trial_points(record) if p.chosen), None)
    if chosen is not None:
        measure = measure_of(record)
        predicted = plus_minus(chosen.predicted, chosen.predicted_stderr)
        measured = plus_minus(chosen.measured, chosen.measured_stderr)
        found[f"predicted loss ({measure})"] = _Figure(predicted, chosen.predicted)
        found[f"measured on select ({measure})"] = _Figure(measured, chosen.measured)
    removed = mapping_or_empty(record, "structured")
    if num(removed.get("predicted")) is not None:
        cost = plus_minus(removed["predicted"], removed.get("predicted_stderr"))
        found[f"predicted cost of the removed units ({measure_of(record)})"] = _Figure(
            cost, num(removed["predicted"])
        )
    seconds = [
        s
        for s in (num(stage.get("seconds")) for stage in items_or_none(record, "stages"))
        if s is not None
    ]
    if seconds:
        found["time"] = _Figure(duration(sum(seconds)), sum(seconds), duration)
    peak = num(record.get("peak_memory_bytes"))
    return found | {"peak memory": _Figure(size(peak), peak, size)}


def _signed(value: float, show: Callable[[float], str]) -> str:
    return "0" if value == 0 else f"{'+' if value > 0 else MINUS}{show(abs(value))}"


def figures(record: Record) -> Table:
    """Both runs' verdicts, sizes, predictions and times, side by side."""
    here, there = _figures(record), _figures(_other(record))
    rows = []
    for label in dict.fromkeys([*here, *there]):
        ours, theirs = here.get(label, _Figure(MISSING)), there.get(label, _Figure(MISSING))
        gap = None if ours.value is None or theirs.value is None else ours.value - theirs.value
        show = ours.show if label in here else theirs.show
        numeric = ours.value is not None or theirs.value is not None
        rows.append(
            [
                Cell(label),
                Cell(ours.text, ours.value, "n"),
                Cell(theirs.text, theirs.value, "n"),
                Cell((MISSING if gap is None else _signed(gap, show)) if numeric else "", gap, "n"),
            ]
        )
    return Table(
        "against",
        [Column("figure"), *_sides("n"), Column("difference", "here minus there", "n")],
        rows,
    )


def _sides(class_: str = "", what: str = "") -> list[Column]:
    start = f"{what} " if what else ""
    return [
        Column(f"{start}{HERE}", "this run", class_),
        Column(f"{start}{THERE}", "the other run", class_),
    ]


def paired(record: Record) -> Table:
    """The two compressed models on the same items, or `Missing` with the reason why that cannot be
    said."""
    against = mapping(record, "against")
    found = mapping_or_empty(against, "paired")
    rows = []
    for metric, result in found.items():
        if not isinstance(result, Mapping):
            continue
        quantity = Quantity.of(result)
        drop, stderr = num(result.get("drop")), num(result.get("stderr"))
        z = drop / stderr if drop is not None and stderr else None
        rows.append(
            [
                Cell(f"{clean(metric)} ({quantity.level_unit})"),
                *(
                    number_cell(
                        quantity.scaled(result.get(k)), sig(quantity.scaled(result.get(k)), 5)
                    )
                    for k in ("compressed", "baseline")
                ),
                number_cell(drop, f"{drop_text(result)}{THIN}{quantity.measure}"),
                number_cell(z, fixed(z, 1)),
                number_cell(result.get("items"), count(result.get("items"))),
                number_cell(result.get("clusters"), count(result.get("clusters"))),
            ]
        )
    if not rows:
        raise Missing(word(against.get("unpaired") or "there are no paired results"))
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
    return Table("paired", columns, rows)


def flips(record: Record) -> tuple[Table, int] | None:
    """The items that are right in one run and wrong in the other, and how many were left out;
    ``None`` where the items are not the same or have no one prediction each."""
    if not mapping_or_empty(mapping(record, "against"), "paired"):
        return None
    there = {item.index: item for item in items.read(_other(record))}
    both = []
    for ours in items.read(record):
        theirs = there.get(ours.index)
        if theirs is not None and ours.right is not None and theirs.right is not None:
            right = theirs.right[1], ours.right[1]
            both.append(replace(ours, before=theirs.after, after=ours.after, right=right))
    return (
        items.flips(both, _HEADS, name="right-in-one", measure=measure_of(record)) if both else None
    )


def layers(record: Record) -> dict[str, Any]:
    """The layers whose option differs or that only one run has, and how many have the same
    option."""
    other = _other(record)
    if not items_or_none(other, "layers"):
        raise Missing(f"{name_of(record)} has no layers on record")
    here, there = (
        {word(x.get("name")): x for x in rows_of(run, "layers")} for run in (record, other)
    )
    options = {n: (_option(here, n), _option(there, n)) for n in dict.fromkeys([*here, *there])}
    rows = []
    for name, (ours, theirs) in options.items():
        if ours == theirs:
            continue
        both = here.get(name, {}), there.get(name, {})
        rows.append(
            [
                Cell(name, class_="mono"),
                *(Cell(option, class_="mono nowrap") for option in (ours, theirs)),
                *(number_cell(layer.get("bytes"), size(layer.get("bytes"))) for layer in both),
                *(_price(layer) for layer in both),
            ]
        )
    units = measure_of(record), measure_of(other)
    columns = [
        Column("layer"),
        *_sides("", "option"),
        *_sides("n", "bytes"),
        *(
            Column(
                f"{column.label} {PLUS_MINUS} se ({measure})",
                "of this option alone, by the run's own ledger",
                "n",
            )
            for column, measure in zip(_sides("n", "price"), units, strict=True)
        ),
    ]
    same = [n for n, (ours, theirs) in options.items() if ours == theirs]
    return {
        "table": Table("differing", columns, rows),
        "same": len(same),
        "reshaped": sum(here[n].get("shape") != there[n].get("shape") for n in same),
        "only": tuple(sum(n not in b for n in a) for a, b in ((here, there), (there, here))),
    }


def _option(run: Mapping[str, Record], name: str) -> str:
    return word(run[name].get("option")) if name in run else "no such layer"


def _price(layer: Record) -> Cell:
    price = layer.get("price")
    return number_cell(
        price, MISSING if num(price) is None else plus_minus(price, layer.get("stderr"))
    )


def recipes(record: Record) -> str:
    """A unified diff from the other run's recipe to this one's; empty where they are the same."""
    texts = {}
    for which, run in ((THERE, _other(record)), (HERE, record)):
        if not isinstance(run.get("recipe"), str):
            raise Missing(f"the record {which} has no 'recipe'")
        texts[which] = clean(run["recipe"]).splitlines()
    names = f"{THERE}: {name_of(record)}", HERE
    return "\n".join(difflib.unified_diff(texts[THERE], texts[HERE], *names, lineterm=""))


def provenance(record: Record) -> Table:
    """What differs in where the two runs come from."""
    here, there = (
        {str(what.text): value.text for what, value in provenance_of(run).rows}
        for run in (record, _other(record))
    )
    rows = [
        [Cell(what), *(Cell(run.get(what, MISSING), class_="mono") for run in (here, there))]
        for what in dict.fromkeys([*here, *there])
        if here.get(what) != there.get(what)
    ]
    return Table("origins", [Column("what"), *_sides()], rows)
