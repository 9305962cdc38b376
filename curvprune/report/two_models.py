"""Two models on the same items: the figures that are quoted, as a table and as a page."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from curvprune.record import Estimate, ModelComparison
from curvprune.report.figures import PLUS_MINUS, clean, count, plus_minus
from curvprune.report.html import asset, template_of
from curvprune.report.tables import Cell, Column, Table, number_cell


@dataclass(frozen=True, slots=True)
class _Figure:
    """A field of the record: how it is called, what it is counted in, what it means."""

    field: str
    label: str
    measure: str
    hint: str
    scale: float = 1.0


def _shown(record: ModelComparison) -> tuple[_Figure, ...]:
    loss = record.measure
    per = "nats/position"
    flip = "% of positions"
    return (
        _Figure("kl", "KL divergence, mean", per, "of the second model from the first"),
        _Figure("kl_median", "KL divergence, median", per, "over positions"),
        _Figure("kl_99", "KL divergence, 99 %", per, "quantile over positions"),
        _Figure("kl_999", "KL divergence, 99.9 %", per, "quantile over positions"),
        _Figure("top1_agreement", "top-1 agreement", flip, "the same best guess", 100),
        _Figure("loss_before", "loss before", loss, "of the first model"),
        _Figure("loss_after", "loss after", loss, "of the second model"),
        _Figure("loss_change", "change of the loss", loss, "after minus before"),
        _Figure("perplexity_before", "perplexity before", "", "exp of the loss"),
        _Figure("perplexity_after", "perplexity after", "", "exp of the loss"),
        _Figure("perplexity_change", "change of the perplexity", "", "after minus before"),
        _Figure("perplexity_ratio", "perplexity ratio", "", "after over before"),
        _Figure("right_before", "right before", flip, "of the first model", 100),
        _Figure("right_after", "right after", flip, "of the second model", 100),
        _Figure("right_to_wrong", "right to wrong", flip, "right before only", 100),
        _Figure("wrong_to_right", "wrong to right", flip, "right after only", 100),
    )


def comparison_table(record: ModelComparison) -> Table:
    """Every figure that there is, with its standard error over documents."""
    columns = [Column("figure"), Column(f"value {PLUS_MINUS} se", "", "n"), Column("measure")]
    found, rows = record.figures(), []
    for figure in _shown(record):
        if figure.field not in found:
            continue
        value, text = _written(found[figure.field], figure.scale)
        rows.append(
            [
                Cell(figure.label, title=figure.hint),
                number_cell(value, text),
                Cell(figure.measure),
            ]
        )
    return Table("two-models", columns, rows)


def _written(estimate: Estimate, scale: float) -> tuple[float, str]:
    value, stderr = scale * estimate.value, scale * estimate.stderr
    return value, plus_minus(value, stderr)


def comparison_title(record: ModelComparison) -> str:
    """What is compared with what, on one line."""
    return clean(f"{record.after} against {record.before}")


def comparison_evidence(record: ModelComparison) -> str:
    """How much the figures rest on, on one line."""
    return clean(
        f"{count(record.items)} items of {count(record.documents)} documents, "
        f"{count(record.positions)} positions; loss: {record.loss}, {record.measure}"
    )


def comparison_page(record: ModelComparison) -> str:
    """The figures as one HTML page without scripts. All text in it is escaped."""
    return template_of("two_models.html.j2").render(
        title=comparison_title(record),
        subtitle=comparison_evidence(record),
        css=Markup(asset("report.css")),
        table=comparison_table(record),
        notes=record.notes,
        PLUS_MINUS=PLUS_MINUS,
    )
