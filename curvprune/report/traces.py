"""The trace of each layer's block of the curvature, beside the Gauss-Newton one where there is
one."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from curvprune.record import (
    AnalysisRecord,
    EstimateRecord,
    LayerCurvatureRecord,
    TraceRecord,
)
from curvprune.report import charts
from curvprune.report.curvature import GAUSS_NEWTON, curvature_measure, short_matrix
from curvprune.report.diagnosis import disagreeing
from curvprune.report.figures import MISSING, PLUS_MINUS, finite, plus_minus, sig
from curvprune.report.spectrum import EXACT_HINT, converged_cell
from curvprune.report.tables import (
    Cell,
    Column,
    Table,
    count_cell,
    error_cell,
    labels_of,
    number_cell,
    yes_no,
)

APART = 0.16  # slots between the two marks of a layer: half to either side


@dataclass(frozen=True, kw_only=True, slots=True)
class Traces:
    """The chart of the traces, its legend, the numbers; ``hidden``: layers without a mark."""

    chart: Markup | None
    legend: Markup
    table: Table
    hidden: str


def traces(analysis: AnalysisRecord) -> Traces:
    """Traces of all layers in model order."""
    matrix, layers = short_matrix(analysis), analysis.layers
    compared = any(layer.gauss_newton_trace is not None for layer in layers.values())
    # 1. Marks: two a layer stand side by side.
    shift = APART if compared else 0.0
    dots = []
    for name, layer in layers.items():
        both = _own_dot(name, layer, matrix, shift=shift), _other_dot(name, layer, shift=shift)
        dots.append([dot for dot in both if dot is not None])
    # 2. The chart, with a ring around the layers whose traces differ.
    differing = disagreeing(analysis)
    chart = charts.traces(
        dots,
        labels_of(list(layers), longest=24)[1],
        measure=curvature_measure(analysis),
        apart=[k for k, name in enumerate(layers) if name in differing],
    )
    hidden = [name for name, drawn in zip(layers, dots, strict=True) if not drawn]
    return Traces(
        chart=chart,
        legend=_legend(analysis, matrix, compared=compared),
        table=_table(analysis, matrix, compared=compared),
        hidden=", ".join(hidden),
    )


def _own_dot(
    name: str, layer: LayerCurvatureRecord, matrix: str, *, shift: float
) -> charts.Dot | None:
    """The mark of the matrix itself: a square where the block is exact, hollow where the trace has
    not converged."""
    trace = layer.trace
    if trace is None or finite(trace.value) is None:
        return None
    said = [f"{name}: {matrix} trace {plus_minus(trace.value, trace.stderr)}", trace.method]
    if layer.exact:
        said.append("exact block")
    if not trace.converged:
        said.append("not converged")
    return charts.Dot(
        value=trace.value,
        stderr=finite(trace.stderr),
        shape="square" if layer.exact else "circle",
        class_="point own" if trace.converged else "point own hollow",
        title=", ".join(said),
        shift=-shift,
    )


def _other_dot(name: str, layer: LayerCurvatureRecord, *, shift: float) -> charts.Dot | None:
    trace = layer.gauss_newton_trace
    if trace is None or finite(trace.value) is None:
        return None
    return charts.Dot(
        value=trace.value,
        stderr=finite(trace.stderr),
        shape="triangle",
        class_="point gauss-newton",
        title=f"{name}: {GAUSS_NEWTON} trace {plus_minus(trace.value, trace.stderr)}",
        shift=shift,
    )


def _legend(analysis: AnalysisRecord, matrix: str, *, compared: bool) -> Markup:
    """The marks that occur, explained."""
    layers = analysis.layers.values()
    entries = [("circle", "point own", f"{matrix}, estimated")]
    if any(layer.exact for layer in layers):
        entries.append(("square", "point own", f"{matrix}, exact block"))
    if any(layer.trace is not None and not layer.trace.converged for layer in layers):
        entries.append(("circle", "point own hollow", "not converged"))
    if compared:
        entries.append(("triangle", "point gauss-newton", GAUSS_NEWTON))
    if disagreeing(analysis):
        entries.append(("circle", "apart", f"{matrix} and {GAUSS_NEWTON} disagree"))
    return charts.legend(entries)


def _table(analysis: AnalysisRecord, matrix: str, *, compared: bool) -> Table:
    # A column for the Gauss-Newton matrix only where it was looked at.
    rows = []
    for name, layer in analysis.layers.items():
        row = [Cell(name, class_="mono"), _estimate_cell(layer.trace)]
        if compared:
            row.append(_estimate_cell(layer.gauss_newton_trace))
        row.append(count_cell(layer.parameters))
        rows.append([*row, *_diagonal_cells(layer), *_method_cells(layer)])
    return Table("curvature", _columns(analysis, matrix, compared=compared), rows)


def _columns(analysis: AnalysisRecord, matrix: str, *, compared: bool) -> list[Column]:
    measure = curvature_measure(analysis)
    hint = f"sum of the diagonal, {measure}"
    columns = [Column("layer"), Column(f"{matrix} trace {PLUS_MINUS} se", hint, "n")]
    if compared:
        columns.append(Column(f"{GAUSS_NEWTON} trace {PLUS_MINUS} se", hint, "n"))
    columns.append(Column("weights", "", "n"))
    for what in ("mean", "median", "q99", "max"):
        hint = f"{what} over the layer's weights, {measure}"
        columns.append(Column(f"{matrix} diagonal, {what}", hint, "n"))
    return [
        *columns,
        Column("method", f"how the {matrix} trace was found"),
        Column("products", f"products of the {matrix} with a vector", "n"),
        Column("converged", "no: the standard error asked for was not reached"),
        Column("exact block", EXACT_HINT),
    ]


def _estimate_cell(found: EstimateRecord | TraceRecord | None) -> Cell:
    if found is None:
        return error_cell(None, None)
    return error_cell(found.value, found.stderr)


def _diagonal_cells(layer: LayerCurvatureRecord) -> list[Cell]:
    found = layer.diagonal
    if found is None:
        return [number_cell(None, sig(None))] * 4
    return [number_cell(v, sig(v)) for v in (found.mean, found.q50, found.q99, found.max)]


def _method_cells(layer: LayerCurvatureRecord) -> list[Cell]:
    """How the trace was found, and whether the block is exact."""
    trace, exact = layer.trace, Cell(yes_no(layer.exact))
    if trace is None:
        return [Cell(MISSING), count_cell(None), Cell(MISSING), exact]
    products = count_cell(trace.num_products)
    return [Cell(trace.method), products, converged_cell(trace.converged), exact]
