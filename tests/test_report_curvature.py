"""The report's section on curvature: signs and order kept by the charts, what was not asked for in
one line, nothing unescaped."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from curvprune.record import AnalysisRecord, DensityRecord, RunRecord
from curvprune.report import summary

from .page import (
    NOT_A_NUMBER,
    Chart,
    Page,
    assert_harmless,
    corners,
    number,
    parsed,
    plain,
    visible,
)
from .records import (
    ANALYSIS,
    HOSTILE,
    analysed,
    density,
    eigenvalues,
    language_model,
    layer_curvature,
)

TRACES, SPECTRUM = "Curvature trace of each layer", "Spectral density of Hessian"


@pytest.fixture(scope="module")
def page() -> Page:
    return parsed(analysed())


def with_layers(**changes: Any) -> RunRecord:
    """The analysed run with other fields in the curvature of some layers, by the layer's last
    name."""
    layers = dict(ANALYSIS.layers)
    for name, fields in changes.items():
        layers[f"a.{name}"] = replace(layers[f"a.{name}"], **fields)
    return analysed(replace(ANALYSIS, layers=layers))


def with_diagnosis(**changes: Any) -> RunRecord:
    assert ANALYSIS.diagnosis is not None
    return analysed(replace(ANALYSIS, diagnosis=replace(ANALYSIS.diagnosis, **changes)))


def with_density(found: DensityRecord) -> Page:
    assert ANALYSIS.model is not None
    return parsed(analysed(replace(ANALYSIS, model=replace(ANALYSIS.model, density=found))))


def section(page: Page) -> str:
    """The words of the section; its head, unlike the entry in the contents, has no space after the
    number."""
    return page.section("7Curvature", "8Time and memory")


def upright(chart: Chart, class_: str) -> float:
    """Where the first line of a class that goes up stands."""
    lines = [e for e in chart.elements("line", class_) if e.get("x1") == e.get("x2")]
    return number(lines[0], "x1")


def level(chart: Chart, class_: str) -> float:
    """The height of the first line of a class that goes across."""
    lines = [e for e in chart.elements("line", class_) if e.get("y1") == e.get("y2")]
    return number(lines[0], "y1")


def exactly(chart: Chart, tag: str, class_: str) -> list[ElementTree.Element]:
    """Elements with this class and no other."""
    return [e for e in chart.elements(tag) if e.get("class") == class_]


def test_nothing_is_missing_and_every_chart_is_named(page: Page) -> None:
    words = section(page)
    assert "Diagnosis" in words and "not available" not in words and "Not asked" not in words
    for label in (TRACES, SPECTRUM, "Spectral densities of Hessian by layer"):
        assert [e.tag for e in page.chart(label).root][:2] == ["title", "desc"]


def test_diagnosis_panel_explains_its_figures(page: Page) -> None:
    shown, words = dict(page.data), section(page)
    for value in (40.0, 0.05, -0.2, 0.031, 0.912, 11.2):
        assert value in shown
    assert "3.10 \N{PLUS-MINUS SIGN} 0.40" in words and "|λ| below 0.00400" in words
    assert "2/λmax" in words and "This point is a saddle. Steps above 0.05 diverge." in words
    flat = with_diagnosis(lambda_max=-1.0, max_learning_rate=None)
    assert "no limit" in section(parsed(flat))


def test_errors_over_items_are_told_from_those_of_probes() -> None:
    changes = {
        "lambda_max_over_items": 3.0,
        "lambda_min_over_items": 0.4,
        "effective_rank_stderr": 1.5,
        "gradient_noise": 0.21,
        "kind": "flat",
    }
    record = with_diagnosis(**changes)
    assert record.analysis is not None and record.analysis.model is not None
    trace = replace(record.analysis.model.trace, over_items=55.0, converged=False)
    model = replace(record.analysis.model, trace=trace)
    page = parsed(replace(record, analysis=replace(record.analysis, model=model)))
    words = section(page)
    assert "40.0\xa0±\xa03.0" in words or "40.0 ± 3.0" in words
    assert "standard error over items" in words and "11.2 ± 1.5" in words.replace("\xa0", " ")
    assert "a minimum and a saddle are both possible" in words
    assert "gradient noise over items" in words
    assert "its se over items" in words and 55.0 in dict(page.data)
    assert "standard error over probes, on these items" in page.html
    assert "the tolerance asked for was not reached" in page.html
    assert "λmax 40.0 ± 3.0" in summary(record).replace("\xa0", " ")


def test_spectral_axis_keeps_order_and_sign_and_shows_bulk_and_outlier(page: Page) -> None:
    chart = page.chart(SPECTRUM)
    assert "linear within about" in section(page) and "logarithmic beyond" in section(page)
    zero = upright(chart, "zero")
    # The nodes of the first run: -0.2, 0 and 40.
    path = chart.elements("path", "rug")[0].attrib["d"]
    places = [float(part.split()[0]) for part in path.split("M")[1:]]
    assert places[0] < places[1] == zero < places[2]
    # The density's shoulder at -0.05 is set apart from zero, the bulk at zero is wide, and the
    # outlier has room.
    ticks = chart.ticks("middle")
    numbers = {float(plain(text)): x for text, x in ticks.items() if "10" not in text}
    assert [numbers[v] for v in sorted(numbers)] == sorted(numbers.values())
    assert numbers[0.01] - zero > 30 and places[2] - numbers[0.01] > 100
    assert zero - numbers[-0.1] > 50


def test_a_narrow_spectrum_has_a_linear_axis() -> None:
    grid = tuple(k / 10 for k in range(-10, 11))
    runs = ((-1.0, 0.0, 1.0),)
    found = DensityRecord(
        grid=grid,
        density=(1.0,) * 21,
        nodes=runs,
        weights=((0.3, 0.4, 0.3),),
        num_products=3,
        dim=600,
    )
    assert ANALYSIS.model is not None
    model = replace(ANALYSIS.model, density=found, eigenvalues=eigenvalues(1.0, -1.0))
    page = parsed(analysed(replace(ANALYSIS, model=model)))
    assert "The eigenvalue axis is linear; equal areas" in section(page)
    chart = page.chart(SPECTRUM)
    ends = [x for x, _ in chart.marks("eigenvalue")]
    assert ends[0] - upright(chart, "zero") == pytest.approx(
        upright(chart, "zero") - ends[1], abs=0.2
    )


def test_negative_density_is_left_of_zero_and_in_its_own_colour(page: Page) -> None:
    chart = page.chart(SPECTRUM)
    zero = upright(chart, "zero")
    (below,), (above,) = (exactly(chart, "polygon", f"density{s}") for s in (" negative", ""))
    assert max(x for x, _ in corners(below)) <= zero + 0.1
    assert min(x for x, _ in corners(above)) >= zero - 0.1
    assert len(chart.elements("path", "rug")) == 2
    places = [x for x, _ in chart.marks("eigenvalue")]
    assert places == sorted(places, reverse=True) and places[-1] < zero < places[0]
    # The outlier's bump rises above the axis although it is a millionth of the mass.
    (curve,) = exactly(chart, "polyline", "spectrum")
    heights = [y for x, y in corners(curve) if abs(x - places[0]) < 15]
    assert max(heights) - min(heights) > 10


def test_quadrature_and_density_stand_in_tables(page: Page) -> None:
    nodes = page.tables["quadrature"]
    assert nodes.sorts("run") == [1, 1, 1, 2, 2, 2]
    assert nodes.sorts("node, Hessian") == [-0.2, 0.0, 40.0, -0.1, 0.01, 39.9]
    assert nodes.sorts("weight") == [0.1, 0.8, 0.1, 0.2, 0.7, 0.1]
    # 400 points are thinned to at most 120.
    grid = page.tables["density"].sorts("λ, Hessian")
    assert grid == pytest.approx(density().grid[::4]) and "one in 4 of 400" in section(page)


def test_points_that_are_no_numbers_are_left_out() -> None:
    found = density(20)
    holes = replace(found, density=(math.nan, *found.density[1:-1], math.inf))
    page = with_density(holes)
    assert len(page.tables["density"].rows) == 18
    assert not NOT_A_NUMBER.search(visible(page.html))


def test_traces_keep_order_and_sign(page: Page) -> None:
    chart = page.chart(TRACES)
    zero = level(chart, "zero")
    heights = [y for _, y in sorted(chart.marks("own"))]
    first, second, third, fourth = heights  # -40, 0.3, 900, 12
    assert first > zero > second > fourth > third
    assert len(chart.marks("gauss-newton")) == 2 and len(chart.marks("hollow")) == 1
    assert len(chart.marks("apart")) == 1
    assert len(exactly(chart, "polygon", "point own")) == 1  # the exact block is a square
    whiskers = len(chart.elements("line", "whisker"))
    trace = ANALYSIS.layers["a.first"].trace
    assert trace is not None
    unknown = with_layers(first={"trace": replace(trace, stderr=math.nan)})
    assert len(parsed(unknown).chart(TRACES).elements("line", "whisker")) == whiskers - 1


def test_traces_of_both_signs_stand_on_an_inverse_hyperbolic_sine() -> None:
    values = (-100.0, -1.0, -0.1, 0.1, 1.0, 100.0)
    layers = {f"a.{k}": layer_curvature(value) for k, value in enumerate(values)}
    chart = parsed(analysed(replace(ANALYSIS, layers=layers, diagnosis=None))).chart(TRACES)
    assert chart.label.endswith("scale linear around zero, logarithmic beyond")
    zero = level(chart, "zero")
    heights = [zero - y for _, y in sorted(chart.marks("own"))]
    # The knee is the errors' median, 0.1.
    scale = heights[-1] / math.asinh(1000)
    assert heights == pytest.approx([scale * math.asinh(v / 0.1) for v in values], abs=0.2)


def test_positive_traces_stand_on_a_logarithm() -> None:
    layers = {f"a.{k}": layer_curvature(10.0**k) for k in range(5)}
    chart = parsed(analysed(replace(ANALYSIS, layers=layers, diagnosis=None))).chart(TRACES)
    assert chart.label == "Curvature trace of each layer, logarithmic scale"
    heights = [y for _, y in sorted(chart.marks("own"))]
    steps = [a - b for a, b in pairwise(heights)]
    assert min(steps) > 10 and max(steps) - min(steps) < 0.25


def test_layers_without_a_trace_are_named() -> None:
    record = with_layers(fourth={"trace": None})
    page = parsed(record)
    assert "Not drawn (no trace on record): a.fourth." in section(page)
    assert len(page.chart(TRACES).marks("own")) == 3
    assert page.tables["curvature"].texts("method")[3] == "n/a"


def test_eigenvalue_table_names_matrix_place_and_state() -> None:
    loose = eigenvalues(3.0, -0.5, converged=False)
    page = parsed(with_layers(third={"eigenvalues": loose}, fourth={"eigenvalues": None}))
    table = page.tables["eigenvalues"]
    assert table.texts("where") == ["whole model", "a.first", "a.second", "a.third"]
    assert set(table.texts("matrix")) == {"Hessian"}
    assert "No eigenvalues on record: a.fourth." in section(page)
    assert table.sorts("λmax, Hessian")[0] == 40.0 and table.sorts("λmin, Hessian")[0] == -0.2
    assert table.texts("converged") == ["yes", "yes", "yes", "no"]
    assert table.texts("exact block") == ["", "no", "yes", "no"]
    assert len(page.tables["eigenvalues-every"].rows) == 9
    heads = page.tables["curvature"].columns
    assert any(head.startswith("Hessian trace") for head in heads)
    assert any(head.startswith("Gauss-Newton trace") for head in heads)


def test_a_layer_called_whole_model_does_not_pass_for_it() -> None:
    layers = {"whole model": layer_curvature(1.0), **ANALYSIS.layers}
    table = parsed(analysed(replace(ANALYSIS, layers=layers))).tables["eigenvalues"]
    model, layer, *_ = table.column("where")
    assert model.text == layer.text == "whole model" and model.classes != layer.classes


def test_disagreements_and_notes_are_listed(page: Page) -> None:
    assert page.words.count("fused attention was switched off") == 2
    table = page.tables["disagreements"]
    assert [cell.sort for cell in table.rows[0]] == [None, -40.0, 60.0, -1.5]
    assert "The record lists no layer." in section(parsed(with_diagnosis(disagreements=())))


def test_what_was_not_asked_for_is_said_in_one_line() -> None:
    # A run knows the Fisher's traces and diagonals and has looked for nothing else.
    page = parsed(language_model(blocks=1))
    words = section(page)
    assert "Matrix: Fisher (labels sampled from the model)." in words
    assert (
        "Not asked for: the diagnosis of the whole model, its spectral density, extreme "
        "eigenvalues." in words
    )
    assert words.count("Not asked for") == 1 and "not available" not in words
    for head in ("Diagnosis", "Spectral density", "Extreme eigenvalues", "disagree"):
        assert head not in words
    chart = page.chart(TRACES)
    assert chart.label.endswith("logarithmic scale") and len(chart.marks("point")) == 8


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"diagnosis": None}, "the diagnosis of the whole model"),
        ({"model": None}, "its spectral density"),
        ({"layers": {}, "model": None}, "its spectral density, traces of the layers, extreme"),
    ],
)
def test_each_part_that_was_left_out_is_named(changes: dict[str, Any], left_out: str) -> None:
    words = section(parsed(analysed(replace(ANALYSIS, **changes))))
    assert f"Not asked for: {left_out}" in words and "not available" not in words


def test_a_density_alone_can_be_left_out() -> None:
    assert ANALYSIS.model is not None
    model = replace(ANALYSIS.model, density=None)
    words = section(parsed(analysed(replace(ANALYSIS, model=model))))
    assert "Not asked for: its spectral density." in words and "Extreme eigenvalues" in words


def test_hostile_names_are_escaped() -> None:
    layers = {HOSTILE: ANALYSIS.layers["a.first"], **ANALYSIS.layers}
    assert ANALYSIS.diagnosis is not None
    apart = (replace(ANALYSIS.diagnosis.disagreements[0], layer=HOSTILE),)
    diagnosis = replace(ANALYSIS.diagnosis, kind=HOSTILE, text=(HOSTILE,), disagreements=apart)
    hostile = AnalysisRecord(
        matrix=HOSTILE,
        measure=HOSTILE,
        num_items=16,
        layers=layers,
        model=ANALYSIS.model,
        diagnosis=diagnosis,
        notes=(HOSTILE,),
    )
    page = parsed(analysed(hostile))
    assert_harmless(page)
    assert "http://evil.example" in section(page)
    assert "\x1b" not in summary(analysed(hostile))


def test_summary_has_the_diagnosis() -> None:
    text = plain(summary(analysed()))
    for part in (
        "λmax 40.00",
        "SGD step 0.0500",
        "kind of point: saddle",
        "3.10 \N{PLUS-MINUS SIGN} 0.40 % negative",
        "near zero (|λ| below 0.00400), effective rank 11.2",
    ):
        assert part in text
    assert "This point is a saddle." in text and "traces disagree in a.first" in text
    assert "λmax" not in summary(analysed(replace(ANALYSIS, diagnosis=None)))
