"""What each layer got, and what every option of every layer would have cost."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from curvprune.record import LayerRecord, PriceRow, RunRecord
from curvprune.report import charts
from curvprune.report.figures import PLUS_MINUS, TIMES, count, finite, fixed, plus_minus
from curvprune.report.sizes import option_colours, option_order
from curvprune.report.tables import (
    Cell,
    Column,
    Table,
    bytes_cell,
    error_cell,
    labels_of,
    number_cell,
)


def shape_text(layer: LayerRecord) -> str:
    out, width = layer.shape
    return f"{out} {TIMES} {width}"


def layers_table(record: RunRecord) -> Table | None:
    """What each layer got, and why; ``None`` where no plan was chosen."""
    if not record.layers:
        return None
    columns = [
        Column("#", "place in the model", "n"),
        Column("layer"),
        Column("kind"),
        Column(f"out {TIMES} in", "shape of the weight as a matrix", "n"),
        Column("option"),
        Column("bits/weight", "average stored bits, scales and zero points included", "n"),
        Column("bytes", "on disk", "n"),
        Column(
            f"price {PLUS_MINUS} se ({record.measure})",
            "predicted loss increase of this choice alone",
            "n",
        ),
        Column("reason"),
        Column("notes"),
    ]
    colours = option_colours(record)
    rows = []
    for k, layer in enumerate(record.layers):
        weights = f"{count(layer.parameters)} weights"
        rows.append(
            [
                number_cell(k, str(k)),
                Cell(layer.name, class_="mono"),
                Cell(layer.kind),
                number_cell(layer.parameters, shape_text(layer), title=weights),
                Cell(layer.option, class_="mono nowrap", swatch=colours[layer.option]),
                number_cell(layer.bits, fixed(layer.bits, 2)),
                bytes_cell(layer.bytes),
                error_cell(layer.price, layer.stderr),
                Cell(layer.reason),
                Cell("; ".join(layer.notes)),
            ]
        )
    return Table("layers", columns, rows)


@dataclass(frozen=True, slots=True)
class Prices:
    """The ledger as colours and as numbers; ``prefix`` is what the chart's labels leave out."""

    facts: str
    chart: Markup
    prefix: str
    table: Table


def prices(record: RunRecord) -> Prices | None:
    """The whole ledger; ``None`` where nothing was priced."""
    if record.ledger is None or not record.ledger.rows:
        return None
    # 1. Rows by layer, in model order; options from least to most compressed.
    by_layer: dict[str, dict[str, PriceRow]] = {}
    for row in record.ledger.rows:
        by_layer.setdefault(row.layer, {})[row.option] = row
    offered = {row.option for row in record.ledger.rows}
    order = [option for option in option_order(record) if option in offered]
    chosen = {layer.name: layer.option for layer in record.layers}
    # 2. Colours, with short labels.
    prefix, labels = labels_of(list(by_layer), longest=26)
    colours = charts.HeatMap(
        layers=list(by_layer),
        labels=labels,
        options=order,
        prices={
            (r.layer, r.option): (finite(r.price), finite(r.stderr)) for r in record.ledger.rows
        },
        chosen=chosen,
        measure=record.measure,
    )
    # 3. Numbers.
    body = []
    for layer, options in by_layer.items():
        cells = [_price_cell(options.get(o), chosen=chosen.get(layer) == o) for o in order]
        body.append([Cell(layer, class_="mono"), *cells])
    columns = [Column("layer"), *(Column(option, "", "n") for option in order)]
    return Prices(
        facts=_facts(record),
        chart=charts.heat_map(colours),
        prefix=prefix,
        table=Table("ledger", columns, body),
    )


def _price_cell(row: PriceRow | None, *, chosen: bool) -> Cell:
    """A price, marked if it was measured (m) or chosen (*)."""
    if row is None:
        return Cell("not offered", class_="n faint")
    text = plus_minus(row.price, row.stderr)
    if row.measured:
        text += " m"
    if chosen:
        return number_cell(row.price, f"{text} *", "n strong")
    return number_cell(row.price, text)


def _facts(record: RunRecord) -> str:
    # Prices above the reach of a quadratic form are measured and marked.
    ledger = record.ledger
    assert ledger is not None
    if ledger.prices == "shares":
        return _audit_facts(record)
    text = (
        f"Curvature: {ledger.curvature}; {count(ledger.num_items)} items, "
        f"{count(ledger.labels_per_item)} draw(s) per item; prices in {record.measure}."
    )
    measured = sum(row.measured for row in ledger.rows)
    if measured:
        text += (
            f" {measured} price(s) marked m, the highest, were measured: the loss of that change "
            "alone."
        )
    return text


def _audit_facts(record: RunRecord) -> str:
    """What shares of the loss rest on: half their sum beside what was measured."""
    ledger = record.ledger
    assert ledger is not None
    text = (
        "A price is the layer's share of what a plan costs as it ships, solved in one pass in "
        f"which later layers make up for earlier ones; {count(ledger.num_items)} items; prices in "
        f"{record.measure}."
    )
    for audit in ledger.audits:
        shares = plus_minus(audit.shares, audit.shares_stderr)
        measured = plus_minus(audit.divergence, audit.divergence_stderr)
        text += f" Plan {audit.plan}: half the sum of shares {shares}, measured {measured}."
    return text
