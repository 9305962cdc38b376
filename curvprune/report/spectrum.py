"""Eigenvalues and spectral densities of the whole model and of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.record import AnalysisRecord, DensityRecord, EigenvaluesRecord
from curvprune.report import charts
from curvprune.report.curvature import curvature_measure, names_text, short_matrix
from curvprune.report.figures import count, sig
from curvprune.report.tables import (
    Cell,
    Column,
    Table,
    count_cell,
    labels_of,
    number_cell,
    yes_no,
)

ROWS = 120  # of the density in its table
EXACT_HINT = (
    "the layer's path to the loss is piecewise linear, so its block is exact from "
    "first-order passes"
)


def converged_cell(converged: bool) -> Cell:
    return Cell(yes_no(converged), class_="" if converged else "alert")


# Eigenvalues


@dataclass(frozen=True, slots=True)
class _Eigenvalue:
    value: float
    error: float
    residual: float

    def title(self) -> str:
        return f"λ = {sig(self.value, 5)}, error {sig(self.error, 2)}"

    def value_cell(self) -> Cell:
        return number_cell(self.value, sig(self.value, 5))

    def error_cell(self) -> Cell:
        return number_cell(self.error, sig(self.error, 2))


def _largest_first(found: EigenvaluesRecord | None) -> list[_Eigenvalue]:
    """The eigenvalues found, those that are no numbers left out."""
    if found is None:
        return []
    values = []
    for value, error, residual in zip(found.values, found.errors, found.residuals, strict=True):
        if math.isfinite(value):
            values.append(_Eigenvalue(value, error, residual))
    return sorted(values, key=lambda eigenvalue: -eigenvalue.value)


@dataclass(frozen=True, slots=True)
class _Place:
    """The whole model or the block of one layer, with the eigenvalues found there."""

    name: Cell
    exact: str
    found: EigenvaluesRecord | None


def _places(analysis: AnalysisRecord) -> list[_Place]:
    places = []
    if analysis.model is not None:
        # Set in another type, so that a layer called "whole model" cannot pass for it.
        name = Cell("whole model", class_="strong")
        places.append(_Place(name, "", analysis.model.eigenvalues))
    for layer, found in analysis.layers.items():
        name = Cell(layer, class_="mono")
        places.append(_Place(name, yes_no(found.exact), found.eigenvalues))
    return places


@dataclass(frozen=True, slots=True)
class Eigenvalues:
    """The extremes of the model and its layers, one row each; every eigenvalue found, one row
    each; places without any."""

    table: Table
    every: Table
    without: str


def eigenvalues(analysis: AnalysisRecord) -> Eigenvalues | None:
    """The extreme eigenvalues; ``None`` where none were looked for."""
    # One row a place in the first table, one row an eigenvalue in the second.
    matrix = Cell(short_matrix(analysis), title=analysis.matrix)
    extremes, every, without = [], [], []
    for place in _places(analysis):
        values = _largest_first(place.found)
        if place.found is None or not values:
            without.append(str(place.name.text))
            continue
        top, low = values[0], values[-1]
        extremes.append(
            [
                place.name,
                matrix,
                top.value_cell(),
                top.error_cell(),
                low.value_cell(),
                low.error_cell(),
                count_cell(place.found.num_products),
                converged_cell(place.found.converged),
                Cell(place.exact),
            ]
        )
        for one in values:
            residual = number_cell(one.residual, sig(one.residual, 2))
            every.append([place.name, matrix, one.value_cell(), one.error_cell(), residual])
    if not extremes:
        return None
    return Eigenvalues(
        table=Table("eigenvalues", _extreme_columns(analysis), extremes),
        every=Table("eigenvalues-every", _every_columns(analysis), every),
        without=names_text(without),
    )


_PLACE_COLUMNS = (
    Column("where", "the whole model, or the block of one layer"),
    Column("matrix", "the matrix that these eigenvalues are of"),
)
_ERROR_HINT = "numerical error of the eigenvalue on these items; says nothing about other items"


def _extreme_columns(analysis: AnalysisRecord) -> list[Column]:
    matrix, measure = short_matrix(analysis), curvature_measure(analysis)
    return [
        *_PLACE_COLUMNS,
        Column(f"λmax, {matrix}", f"largest eigenvalue found, {measure}", "n"),
        Column("error of λmax", _ERROR_HINT, "n"),
        Column(f"λmin, {matrix}", f"smallest eigenvalue found, {measure}", "n"),
        Column("error of λmin", _ERROR_HINT, "n"),
        Column("products", f"products of the {matrix} with a vector", "n"),
        Column("converged", "no: take the values as inner bounds of the extremes"),
        Column("exact block", EXACT_HINT),
    ]


def _every_columns(analysis: AnalysisRecord) -> list[Column]:
    return [
        *_PLACE_COLUMNS,
        Column(f"λ, {short_matrix(analysis)}", curvature_measure(analysis), "n"),
        Column("error", _ERROR_HINT, "n"),
        Column("residual", "length of the product minus λ times the vector", "n"),
    ]


# Spectral density


def _curve(density: DensityRecord | None) -> list[tuple[float, float]]:
    """``(eigenvalue, density)`` in rising order, each eigenvalue once; empty without two of them
    and a positive one."""
    if density is None:
        return []
    # A logarithmic axis has no place for heights below zero.
    points: dict[float, float] = {}
    for value, height in zip(density.grid, density.density, strict=True):
        if math.isfinite(value) and math.isfinite(height):
            points[value] = max(0.0, height)
    curve = sorted(points.items())
    return curve if len(curve) > 1 and any(height > 0 for _, height in curve) else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The density's chart, how to read its axis, and the numbers behind it: one in ``every`` of
    the grid's ``points``, and the quadrature of ``runs`` runs."""

    chart: Markup
    legend: Markup
    axis: str
    runs: int
    products: str
    table: Table
    every: int
    points: int
    quadrature: Table


def spectrum(analysis: AnalysisRecord) -> Spectrum | None:
    """The whole model's spectral density; ``None`` where there is none."""
    model = analysis.model
    if model is None or model.density is None:
        return None
    density, curve = model.density, _curve(model.density)
    if not curve:
        return None
    # 1. What is drawn, beside the density itself.
    matrix, measure = short_matrix(analysis), curvature_measure(analysis)
    found = _largest_first(model.eigenvalues)
    # 2. The axis must reach over the nodes and the eigenvalues, not over the density alone.
    marks = [eigenvalue.value for eigenvalue in found]
    for nodes in density.nodes:
        marks += nodes
    x = charts.spectral_axis(curve, marks, start=70.0, stop=1110.0)
    chart = charts.spectrum(
        curve,
        x=x,
        runs=density.nodes,
        eigenvalues=[(eigenvalue.value, eigenvalue.title()) for eigenvalue in found],
        matrix=matrix,
        measure=measure,
    )
    axis = "linear"
    if x.kind == "asinh":
        axis = f"linear within about {sig(x.knee, 2)} of zero, logarithmic beyond"
    # 3. The table is thinned out: the chart has all points.
    every = math.ceil(len(curve) / ROWS)
    heads = [
        Column(f"λ, {matrix}", measure, "n"),
        Column("density", "per unit of the eigenvalue", "n"),
    ]
    rows = [[number_cell(v, sig(v, 4)), number_cell(d, sig(d))] for v, d in curve[::every]]
    return Spectrum(
        chart=chart,
        legend=_legend(eigenvalues=bool(found)),
        axis=axis,
        runs=len(density.nodes),
        products=count(density.num_products),
        table=Table("density", heads, rows),
        every=every,
        points=len(curve),
        quadrature=_quadrature(density, matrix, measure),
    )


def _legend(*, eigenvalues: bool) -> Markup:
    entries = [
        ("square", "density-key negative", "below zero (dashed)"),
        ("square", "density-key", "above zero"),
    ]
    if eigenvalues:
        entries.append(("diamond", "eigenvalue", "extreme eigenvalues found"))
    return charts.legend(entries)


def _quadrature(density: DensityRecord, matrix: str, measure: str) -> Table:
    """Nodes and weights of every run."""
    columns = [
        Column("run", "", "n"),
        Column(f"node, {matrix}", measure, "n"),
        Column("weight", "share of the spectrum that the node stands for", "n"),
    ]
    rows = []
    for k, (nodes, weights) in enumerate(zip(density.nodes, density.weights, strict=True), 1):
        for node, weight in zip(nodes, weights, strict=True):
            node_cell = number_cell(node, sig(node, 5))
            rows.append([number_cell(k, str(k)), node_cell, number_cell(weight, sig(weight))])
    return Table("quadrature", columns, rows)


def layer_spectra(analysis: AnalysisRecord) -> Markup | None:
    """Densities of the layers' blocks side by side; ``None`` where no layer has one."""
    curves = {}
    for name, layer in analysis.layers.items():
        curve = _curve(layer.density)
        if curve:
            curves[name] = curve
    _, labels = labels_of(list(curves), longest=36)
    panels = []
    for (name, curve), label in zip(curves.items(), labels, strict=True):
        panels.append(charts.Panel(name, label, curve))
    return charts.spectra(
        panels, matrix=short_matrix(analysis), measure=curvature_measure(analysis)
    )
