"""The record's "analysis" to the section on curvature: diagnosis, spectrum, traces, eigenvalues. No
HTML here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from . import charts
from .figures import MISSING, PLUS_MINUS, THIN, clean, count, num, plus_minus, sig
from .sections import (
    Cell,
    Column,
    Fact,
    Missing,
    Record,
    Table,
    error_cell,
    error_of,
    labels_of,
    mapping,
    mapping_or_empty,
    measure_of,
    number_cell,
    texts,
    word,
)

GAUSS_NEWTON = "Gauss-Newton"
# Keys of an analysis that did more than traces; without any of them, what is missing was never
# asked for.
_BEYOND_TRACES = ("model", "diagnosis", "measure", "num_items", "notes")
_NAMED = 12  # more names than this say less than their number
_ROWS = 120


def _part(holder: Record, *keys: str) -> Record:
    """A non-empty mapping below ``holder``, or `Missing` with the path to it."""
    path = "'analysis'"
    for key in keys:
        value = holder.get(key)
        if not isinstance(value, Mapping) or not value:
            raise Missing(f"{path} has no {key!r}")
        holder, path = value, f"{path}, {key!r}"
    return holder


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _estimate(value: Any) -> tuple[float | None, float | None]:
    """Value and standard error of ``{"value", "stderr"}`` or of a bare number."""
    if isinstance(value, Mapping):
        return num(value.get("value")), error_of(value.get("stderr"))
    return num(value), None


def _yes_no(value: Any) -> str:
    return "yes" if value is True else "no" if value is False else MISSING


def _converged_cell(value: Any) -> Cell:
    return Cell(_yes_no(value), class_="alert" if value is False else "")


def matrix_of(analysis: Record) -> str:
    """The matrix that the analysis is of, as the record has it."""
    return word(analysis.get("matrix") or "a curvature matrix the record does not name")


def _short_matrix(analysis: Record) -> str:
    """The matrix without what the record says about it in brackets, for heads of columns."""
    return matrix_of(analysis).split(" (")[0] if analysis.get("matrix") else "matrix"


def _loss_measure(record: Record) -> str:
    return word(mapping_or_empty(record, "analysis").get("measure") or measure_of(record))


def _measure_of(record: Record) -> str:
    return f"{_loss_measure(record)} per unit weight change squared"


def _layers(analysis: Record) -> list[tuple[str, Record]]:
    layers = _part(analysis, "layers")
    return [
        (clean(name), entry if isinstance(entry, Mapping) else {}) for name, entry in layers.items()
    ]


def _layers_or_none(analysis: Record) -> list[tuple[str, Record]]:
    try:
        return _layers(analysis)
    except Missing:
        return []


def overview(record: Record) -> dict[str, Any]:
    """What was analysed: the matrix, the items, the whole model's figures, the notes."""
    analysis = mapping(record, "analysis")
    if not any(
        isinstance(analysis.get(k), Mapping) and analysis[k]
        for k in ("layers", "model", "diagnosis")
    ):
        raise Missing("'analysis' has no layers, no model and no diagnosis")
    model = mapping_or_empty(analysis, "model")
    trace, stderr = _estimate(model.get("trace"))
    facts = [
        Fact(
            "parameters",
            count(model.get("parameters")),
            num(model.get("parameters")),
            "",
            "of the whole model",
        ),
        Fact(
            "loss",
            sig(model.get("loss"), 5),
            num(model.get("loss")),
            _loss_measure(record),
            "mean over the items",
        ),
        Fact(
            "gradient norm",
            sig(model.get("gradient_norm")),
            num(model.get("gradient_norm")),
            "",
            "length of the loss gradient over all weights; zero where training has converged on "
            "these items",
        ),
        Fact(
            f"{_short_matrix(analysis)} trace {PLUS_MINUS} se",
            plus_minus(trace, stderr),
            trace,
            "",
            f"sum of all eigenvalues of the whole model, {_measure_of(record)}",
        ),
    ]
    return {
        "matrix": matrix_of(analysis),
        "over": "" if num(analysis.get("num_items")) is None else count(analysis.get("num_items")),
        "measure": _measure_of(record),
        "facts": facts if model else [],
        "notes": texts(analysis.get("notes")),
        "traces_only": not any(analysis.get(k) for k in _BEYOND_TRACES),
    }


# --- diagnosis
# -------------------------------------------------------------------------------------------------------

_KINDS = {
    "minimum": "the gradient is small and no direction was found along which the loss curves down",
    "saddle": "the gradient is small and along some directions the loss curves down",
    "maximum": "the gradient is small and the loss curves down in every direction",
    "not stationary": "the gradient is not small, so the loss still falls to first order: curvature is only half the "
    "picture here",
}


def _share(value: Any) -> tuple[str, float | None]:
    """A share in per cent with its standard error."""
    share, stderr = _estimate(value)
    if share is None:
        return MISSING, None
    if stderr is None:
        return f"{sig(100 * share)}{THIN}{PLUS_MINUS}{THIN}{MISSING}", share
    return plus_minus(100 * share, 100 * stderr), share


def diagnosis_facts(record: Record, found: Record) -> list[Fact]:
    """The key figures; the hint of each says in one line what it means."""
    measure = _measure_of(record)
    largest, smallest, step = (
        num(found.get(k)) for k in ("lambda_max", "lambda_min", "max_learning_rate")
    )
    flat = num(found.get("near_zero_below"))
    negative, near_zero = _share(found.get("negative_share")), _share(found.get("near_zero_share"))
    if largest is not None and largest <= 0 and step is None:
        step_text, step_hint = (
            "no limit",
            "λmax is not positive, so curvature sets no limit to the step",
        )
    else:
        step_text = sig(step)
        step_hint = (
            "2/λmax: plain SGD with a larger learning rate diverges along the steepest direction"
        )
    if smallest is not None and smallest < 0:
        smallest_hint = "below zero: along this direction the loss curves down"
    else:
        smallest_hint = (
            "the smallest curvature; below zero the loss curves down along that direction"
        )
    kind = found.get("kind")
    return [
        Fact(
            "λmax",
            sig(largest, 4),
            largest,
            "",
            f"curvature along the steepest direction ({measure})",
        ),
        Fact("largest stable SGD step", step_text, step, "", step_hint),
        Fact("λmin", sig(smallest, 4), smallest, "", smallest_hint),
        Fact(
            "negative share",
            negative[0],
            negative[1],
            "" if negative[1] is None else "%",
            "share of all directions along which the loss curves down",
        ),
        Fact(
            "near-zero share",
            near_zero[0],
            near_zero[1],
            "" if near_zero[1] is None else "%",
            "share of all directions in which the loss is flat"
            + (
                f": |λ| below {sig(flat)}"
                if flat is not None
                else "; the record has no threshold for it"
            ),
        ),
        Fact(
            "effective rank",
            sig(found.get("effective_rank")),
            num(found.get("effective_rank")),
            "",
            "about how many directions hold the curvature; few against the parameters means most "
            "can move freely",
        ),
        Fact(
            "kind of point",
            word(kind),
            None,
            "",
            _KINDS.get(word(kind).lower(), "what the run calls this point"),
        ),
    ]


def diagnosis(record: Record) -> dict[str, Any]:
    """The figures with their meaning, lesser ones without, and the sentences."""
    found = _part(mapping(record, "analysis"), "diagnosis")
    lesser = [
        Fact(label, sig(found.get(key)), num(found.get(key)))
        for key, label in (
            ("gradient_norm", "gradient norm"),
            ("relative_gradient", "relative gradient"),
            ("sharpness", "sharpness"),
        )
        if found.get(key) is not None
    ]
    return {
        "facts": diagnosis_facts(record, found),
        "lesser": lesser,
        "text": texts(found.get("text")),
    }


def disagreements(record: Record) -> Table:
    """Layers whose Hessian and Gauss-Newton traces disagree; no rows where the record lists
    none."""
    analysis = mapping(record, "analysis")
    listed = _part(analysis, "diagnosis").get("disagreements")
    if not isinstance(listed, list | tuple):
        raise Missing("'analysis', 'diagnosis' has no 'disagreements'")
    rows = []
    for entry in listed:
        entry = entry if isinstance(entry, Mapping) else {}
        own, other = _estimate(entry.get("hessian")), _estimate(entry.get("gauss_newton"))
        rows.append(
            [
                Cell(word(entry.get("layer")), class_="mono"),
                number_cell(own[0], sig(own[0], 4) if own[1] is None else plus_minus(*own)),
                number_cell(other[0], sig(other[0], 4) if other[1] is None else plus_minus(*other)),
                number_cell(entry.get("ratio"), sig(entry.get("ratio"))),
            ]
        )
    columns = [
        Column("layer"),
        Column("Hessian trace", _measure_of(record), "n"),
        Column(f"{GAUSS_NEWTON} trace", _measure_of(record), "n"),
        Column("ratio", "of the two traces as recorded; 1 is agreement", "n"),
    ]
    return Table("disagreements", columns, rows)


# --- eigenvalues
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    value: float
    error: float | None
    residual: float | None

    def title(self) -> str:
        return f"λ = {sig(self.value, 5)}, error {sig(self.error, 2)}"


def _eigenvalues(holder: Record) -> list[Eigenvalue]:
    """The eigenvalues found, largest first."""
    found = mapping_or_empty(holder, "eigenvalues")
    errors, residuals = _list(found.get("errors")), _list(found.get("residuals"))
    values = []
    for k, value in enumerate(map(num, _list(found.get("values")))):
        if value is not None:
            error = error_of(errors[k]) if k < len(errors) else None
            values.append(
                Eigenvalue(value, error, error_of(residuals[k]) if k < len(residuals) else None)
            )
    return sorted(values, key=lambda e: -e.value)


def _places(analysis: Record) -> list[tuple[str, Record, str]]:
    """``(where, entry, exact)`` of the whole model and of every layer."""
    places: list[tuple[str, Record, str]] = []
    if model := mapping_or_empty(analysis, "model"):
        places.append(("whole model", model, ""))
    return [
        *places,
        *((name, entry, _yes_no(entry.get("exact"))) for name, entry in _layers_or_none(analysis)),
    ]


def eigenvalues(record: Record) -> dict[str, Any]:
    """The extreme eigenvalues of the model and its layers, one row each, and every eigenvalue
    found, one row each."""
    analysis = mapping(record, "analysis")
    short_matrix, measure = _short_matrix(analysis), _measure_of(record)
    rows, every, without = [], [], []
    for where, entry, exact in _places(analysis):
        found, values = mapping_or_empty(entry, "eigenvalues"), _eigenvalues(entry)
        if not values:
            without.append(where)
            continue
        # Set in another type, so that a layer called "whole model" cannot pass for it.
        name = Cell(where, class_="strong" if entry is analysis.get("model") else "mono")
        matrix = Cell(short_matrix, title=matrix_of(analysis))
        top, low = values[0], values[-1]
        rows.append(
            [
                name,
                matrix,
                number_cell(top.value, sig(top.value, 5)),
                number_cell(top.error, sig(top.error, 2)),
                number_cell(low.value, sig(low.value, 5)),
                number_cell(low.error, sig(low.error, 2)),
                number_cell(found.get("num_products"), count(found.get("num_products"))),
                _converged_cell(found.get("converged")),
                Cell(exact),
            ]
        )
        for e in values:
            numbers = (
                (e.value, sig(e.value, 5)),
                (e.error, sig(e.error, 2)),
                (e.residual, sig(e.residual, 2)),
            )
            every.append([name, matrix, *(number_cell(*n) for n in numbers)])
    if not rows:
        raise Missing("'analysis' has no 'eigenvalues' for the model or any layer")
    error = "numerical error of the eigenvalue on these items; says nothing about other items"
    columns = [
        Column("where", "the whole model, or the block of one layer"),
        Column("matrix", "the matrix that these eigenvalues are of"),
        Column(f"λmax, {short_matrix}", f"largest eigenvalue found, {measure}", "n"),
        Column("error of λmax", error, "n"),
        Column(f"λmin, {short_matrix}", f"smallest eigenvalue found, {measure}", "n"),
        Column("error of λmin", error, "n"),
        Column("products", f"products of the {short_matrix} with a vector", "n"),
        Column("converged", "no: take the values as inner bounds of the extremes"),
        Column(
            "exact block",
            "the layer's path to the loss is piecewise linear, so its block is exact from "
            "first-order passes",
        ),
    ]
    found_columns = [
        *columns[:2],
        Column(f"λ, {short_matrix}", measure, "n"),
        Column("error", error, "n"),
        Column("residual", "length of the product minus λ times the vector", "n"),
    ]
    return {
        "table": Table("eigenvalues", columns, rows),
        "every": Table("eigenvalues-every", found_columns, every),
        "without": _names(without),
    }


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"{count(len(names))} layers"


# --- spectral density
# ------------------------------------------------------------------------------------------------


def _curve(holder: Record) -> list[tuple[float, float]]:
    """``(eigenvalue, density)`` in rising order, each eigenvalue once; empty without two of them
    and a positive one."""
    density = mapping_or_empty(holder, "density")
    points: dict[float, float] = {}
    for a, b in zip(_list(density.get("grid")), _list(density.get("density")), strict=False):
        value, height = num(a), num(b)
        if value is not None and height is not None:
            points[value] = max(0.0, height)
    curve = sorted(points.items())
    return curve if len(curve) > 1 and any(d > 0 for _, d in curve) else []


def _runs(density: Record) -> list[list[tuple[float, float | None]]]:
    """Nodes and weights of every run with at least one node."""
    weights = _list(density.get("weights"))
    runs = []
    for k, nodes in enumerate(_list(density.get("nodes"))):
        beside = _list(weights[k]) if k < len(weights) else []
        run = [
            (value, num(beside[i]) if i < len(beside) else None)
            for i, value in enumerate(map(num, _list(nodes)))
            if value is not None
        ]
        if run:
            runs.append(run)
    return runs


def spectrum(record: Record) -> dict[str, Any]:
    """The whole model's spectral density: chart, how to read its axis, and the numbers behind
    it."""
    analysis = mapping(record, "analysis")
    density = _part(analysis, "model", "density")
    model = mapping_or_empty(analysis, "model")
    curve, runs, found = _curve(model), _runs(density), _eigenvalues(model)
    if not curve:
        raise Missing(
            "'analysis', 'model', 'density' has no two points and no positive density to draw"
        )
    matrix, measure = _short_matrix(analysis), _measure_of(record)
    marks = [*(v for run in runs for v, _ in run), *(e.value for e in found)]
    x = charts.spectral_axis(curve, marks, start=70.0, stop=1110.0)
    chart = charts.spectrum(
        curve,
        x=x,
        runs=[[v for v, _ in run] for run in runs],
        eigenvalues=[(e.value, e.title()) for e in found],
        matrix=matrix,
        measure=measure,
    )
    step = math.ceil(len(curve) / _ROWS)
    grid = [[number_cell(v, sig(v, 4)), number_cell(d, sig(d))] for v, d in curve[::step]]
    quadrature = [
        [number_cell(k, str(k)), number_cell(v, sig(v, 5)), number_cell(w, sig(w))]
        for k, run in enumerate(runs, 1)
        for v, w in run
    ]
    eigenvalue = Column(f"λ, {matrix}", measure, "n")
    return {
        "chart": chart,
        "legend": charts.legend(
            [
                ("square", "density-key negative", "below zero (dashed)"),
                ("square", "density-key", "above zero"),
                *([("diamond", "eigenvalue", "extreme eigenvalues found")] if found else []),
            ]
        ),
        "axis": f"linear within about {sig(x.knee, 2)} of zero, logarithmic beyond"
        if x.kind == "asinh"
        else "linear",
        "runs": len(runs),
        "products": count(density.get("num_products")),
        "table": Table(
            "density", [eigenvalue, Column("density", "per unit of the eigenvalue", "n")], grid
        ),
        "every": step,
        "points": len(curve),
        "quadrature": Table(
            "quadrature",
            [
                Column("run", "", "n"),
                Column(f"node, {matrix}", measure, "n"),
                Column("weight", "share of the spectrum that the node stands for", "n"),
            ],
            quadrature,
        ),
    }


def layer_spectra(record: Record) -> Markup | None:
    """Densities of the layers' blocks side by side; ``None`` where no layer has one."""
    analysis = mapping_or_empty(record, "analysis")
    curves = [
        (name, curve) for name, entry in _layers_or_none(analysis) if (curve := _curve(entry))
    ]
    _, labels = labels_of([name for name, _ in curves], longest=36)
    panels = [(name, label, curve) for (name, curve), label in zip(curves, labels, strict=True)]
    return charts.spectra(panels, matrix=_short_matrix(analysis), measure=_measure_of(record))


# --- traces
# ----------------------------------------------------------------------------------------------------------


def _families(names: Sequence[str]) -> tuple[list[int], list[tuple[str, str, str]]]:
    """The series of every layer by the last part of its name, and the legend."""
    last = [n.rsplit(".", 1)[-1] for n in names]
    found = Counter(last)
    common = [f for f, n in found.most_common(7) if n > 1]
    entries = [(charts.SHAPES[k % 4], f"point k{k}", f) for k, f in enumerate(common)]
    if len(common) < len(found):
        entries.append((charts.SHAPES[7 % 4], "point k7", "other"))
    return [common.index(f) if f in common else 7 for f in last], entries


def _two_matrices(entries: Sequence[Record]) -> bool:
    """Whether marks should tell matrices and exactness apart instead of families of layers."""
    return any(
        isinstance(e.get("exact"), bool)
        or _estimate(e.get("gauss_newton_trace"))[0] is not None
        or mapping_or_empty(e, "trace").get("converged") is False
        for e in entries
    )


def _own_dot(name: str, entry: Record, matrix: str, *, shift: float) -> charts.Dot | None:
    trace = mapping_or_empty(entry, "trace")
    value, stderr = num(trace.get("value")), error_of(trace.get("stderr"))
    if value is None:
        return None
    hollow, exact = trace.get("converged") is False, entry.get("exact") is True
    said = [f"{name}: {matrix} trace {plus_minus(value, stderr)}"]
    said += [word(trace["method"])] if trace.get("method") is not None else []
    said += ["exact block"] if exact else []
    said += ["not converged"] if hollow else []
    return charts.Dot(
        value=value,
        stderr=stderr,
        shape="square" if exact else "circle",
        class_="point own hollow" if hollow else "point own",
        title=", ".join(said),
        shift=-shift,
    )


def _other_dot(name: str, entry: Record, *, shift: float) -> charts.Dot | None:
    value, stderr = _estimate(entry.get("gauss_newton_trace"))
    if value is None:
        return None
    title = f"{name}: {GAUSS_NEWTON} trace {plus_minus(value, stderr)}"
    return charts.Dot(
        value=value,
        stderr=stderr,
        shape="triangle",
        class_="point gauss-newton",
        title=title,
        shift=shift,
    )


def _disagreeing(analysis: Record) -> set[str]:
    listed = _list(mapping_or_empty(analysis, "diagnosis").get("disagreements"))
    return {word(e.get("layer")) for e in listed if isinstance(e, Mapping)}


def traces(record: Record) -> dict[str, Any]:
    """The trace chart, its legend and table."""
    analysis = mapping(record, "analysis")
    layers = _layers(analysis)
    names, entries, matrix, measure = (
        [n for n, _ in layers],
        [e for _, e in layers],
        _short_matrix(analysis),
        _measure_of(record),
    )
    both = _two_matrices(entries)
    compared = any(_estimate(e.get("gauss_newton_trace"))[0] is not None for e in entries)
    dots: list[list[charts.Dot]] = []
    if both:
        shift = 0.16 if compared else 0.0
        for name, entry in layers:
            pair = _own_dot(name, entry, matrix, shift=shift), _other_dot(name, entry, shift=shift)
            dots.append([d for d in pair if d is not None])
        states = [(mapping_or_empty(e, "trace"), e) for e in entries]
        legend = [("circle", "point own", f"{matrix}, estimated")]
        legend += [("square", "point own", f"{matrix}, exact block")] * any(
            e.get("exact") is True for e in entries
        )
        legend += [("circle", "point own hollow", "not converged")] * any(
            t.get("converged") is False for t, _ in states
        )
        legend += [("triangle", "point gauss-newton", GAUSS_NEWTON)] * compared
    else:
        series, legend = _families(names)
        for (name, entry), k in zip(layers, series, strict=True):
            value, stderr = _estimate(entry.get("trace"))
            title = f"{name}: {plus_minus(value, stderr)}"
            shape = charts.SHAPES[k % len(charts.SHAPES)]
            dots.append(
                []
                if value is None
                else [
                    charts.Dot(
                        value=value, stderr=stderr, shape=shape, class_=f"point k{k}", title=title
                    )
                ]
            )
    _, labels = labels_of(names, longest=24)
    apart = [k for k, name in enumerate(names) if name in _disagreeing(analysis)]
    if apart:
        legend = [*legend, ("circle", "apart", f"{matrix} and {GAUSS_NEWTON} disagree")]
    return {
        "chart": charts.traces(dots, labels, matrix="the matrix", measure=measure, apart=apart),
        "legend": charts.legend(legend),
        "table": _traces_table(layers, matrix, measure, compared=compared, detailed=both),
        "hidden": [name for name, drawn in zip(names, dots, strict=True) if not drawn],
    }


def _traces_table(
    layers: Sequence[tuple[str, Record]],
    matrix: str,
    measure: str,
    *,
    compared: bool,
    detailed: bool,
) -> Table:
    rows = []
    for name, entry in layers:
        trace, diagonal = mapping_or_empty(entry, "trace"), mapping_or_empty(entry, "diagonal")
        row = [Cell(name, class_="mono"), error_cell(trace.get("value"), trace.get("stderr"))]
        if compared:
            row.append(error_cell(*_estimate(entry.get("gauss_newton_trace"))))
        row.append(number_cell(entry.get("parameters"), count(entry.get("parameters"))))
        row += [
            number_cell(diagonal.get(k), sig(diagonal.get(k)))
            for k in ("mean", "q50", "q99", "max")
        ]
        if detailed:
            row += [
                Cell(word(trace.get("method"))),
                number_cell(trace.get("num_products"), count(trace.get("num_products"))),
                _converged_cell(trace.get("converged")),
                Cell(_yes_no(entry.get("exact"))),
            ]
        rows.append(row)
    columns = [
        Column("layer"),
        Column(f"{matrix} trace {PLUS_MINUS} se", f"sum of the diagonal, {measure}", "n"),
    ]
    if compared:
        columns.append(
            Column(f"{GAUSS_NEWTON} trace {PLUS_MINUS} se", f"sum of the diagonal, {measure}", "n")
        )
    columns.append(Column("weights", "", "n"))
    columns += [
        Column(f"{matrix} diagonal, {k}", f"{k} over the layer's weights, {measure}", "n")
        for k in ("mean", "median", "q99", "max")
    ]
    if detailed:
        columns += [
            Column("method", f"how the {matrix} trace was found"),
            Column("products", f"products of the {matrix} with a vector", "n"),
            Column("converged", "no: the standard error asked for was not reached"),
            Column(
                "exact block",
                "the layer's path to the loss is piecewise linear, so its block is exact from "
                "first-order passes",
            ),
        ]
    return Table("curvature", columns, rows)


# --- in a few lines
# --------------------------------------------------------------------------------------------------


def diagnosis_lines(record: Record) -> list[str]:
    """The diagnosis for a terminal: figures, sentences, disagreements. Empty where the record has
    none."""
    analysis = mapping_or_empty(record, "analysis")
    found = mapping_or_empty(analysis, "diagnosis")
    if not found:
        return []
    facts = {
        f.label: f.text + (f"{THIN}{f.measure}" if f.measure else "")
        for f in diagnosis_facts(record, found)
    }
    flat = num(found.get("near_zero_below"))
    lines = [
        f"{_short_matrix(analysis)}: λmax {facts['λmax']}, largest stable plain-SGD step "
        f"{facts['largest stable SGD step']}, λmin {facts['λmin']}; kind of point: {facts['kind of point']}",
        f"directions: {facts['negative share']} negative, {facts['near-zero share']} near zero"
        f"{'' if flat is None else f' (|λ| below {sig(flat)})'}, "
        f"effective rank {facts['effective rank']}",
    ]
    lines += texts(found.get("text"))
    if apart := sorted(_disagreeing(analysis)):
        lines.append(
            f"{_short_matrix(analysis)} and {GAUSS_NEWTON} traces disagree in {_names(apart)}"
        )
    return lines
