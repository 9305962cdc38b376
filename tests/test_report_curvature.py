"""The report's section on curvature: signs and order kept by the charts, every part optional,
nothing unescaped."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest

from curvprune.report import build, charts, curvature, sections, summary

from .test_report import HOSTILE, WRONG, Page, parsed, paths, replaced, visible

NOT_A_NUMBER = re.compile(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])")


def bump(x: float, at: float, width: float) -> float:
    return math.exp(-0.5 * ((x - at) / width) ** 2) / (width * math.sqrt(2 * math.pi))


def density(points: int = 400) -> dict[str, Any]:
    """A bulk at zero, a negative shoulder and an outlier three decades away with a millionth of the
    mass."""
    grid = [1e-3 * math.sinh(-7 + 19 * k / (points - 1)) for k in range(points)]
    heights = [
        0.9 * bump(x, 0, 0.004) + 0.1 * bump(x, -0.05, 0.03) + 1e-6 * bump(x, 40.0, 1.0)
        for x in grid
    ]
    return {"grid": grid, "density": heights, "num_products": 80}


def estimate(value: float, stderr: float | None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr}


def pairs(*values: float) -> dict[str, Any]:
    n = len(values)
    return {
        "values": list(values),
        "residuals": [1e-4] * n,
        "errors": [1e-6] * n,
        "converged": True,
        "num_products": 40,
    }


def layer(
    trace: float, *, exact: bool = False, converged: bool = True, other: float | None = None
) -> dict[str, Any]:
    return {
        "parameters": 600,
        "shape": [20, 30],
        "trace": estimate(trace, 0.1)
        | {"num_products": 32, "converged": converged, "method": "joint probes"},
        "diagonal": {"mean": trace / 600, "max": 1.0, "q50": -0.01, "q99": 0.5},
        "gauss_newton_trace": None if other is None else estimate(other, 0.2),
        "exact": exact,
        "eigenvalues": pairs(3.0, -0.5),
        "density": density(60),
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "title": "t",
        "measure": "nats/token",
        "analysis": {
            "matrix": "Hessian",
            "measure": "nats/token",
            "num_items": 16,
            "notes": ["fused attention was switched off"],
            "layers": {
                "a.first": layer(-40.0, other=60.0),
                "a.second": layer(0.3, exact=True, other=0.3),
                "a.third": layer(900.0, converged=False),
                "a.fourth": layer(12.0),
            },
            "model": {
                "parameters": 2400,
                "loss": 2.5,
                "gradient_norm": 0.3,
                "trace": estimate(872.3, 4.0),
                "eigenvalues": pairs(40.0, 7.0, -0.2),
                "density": density()
                | {"nodes": [[-0.2, 0.0, 40.0], [-0.1, 0.01, 39.9]], "weights": [[0.1, 0.8, 0.1]]},
            },
            "diagnosis": {
                "lambda_max": 40.0,
                "lambda_min": -0.2,
                "max_learning_rate": 0.05,
                "negative_share": estimate(0.031, 0.004),
                "near_zero_share": estimate(0.912, 0.011),
                "near_zero_below": 0.004,
                "effective_rank": 11.2,
                "sharpness": 41.0,
                "gradient_norm": 0.3,
                "relative_gradient": 0.02,
                "kind": "saddle",
                "text": ["This point is a saddle.", "Steps above 0.05 diverge."],
                "disagreements": [
                    {"layer": "a.first", "hessian": -40.0, "gauss_newton": 60.0, "ratio": -1.5}
                ],
            },
        },
    }


def section(page: Page) -> str:
    """The words of the section; its head, unlike the entry in the contents, has no space after the
    number."""
    return page.words[page.words.index("7Curvature") : page.words.index("8Time and memory")]


def marks(chart: object, class_: str) -> list[tuple[float, float]]:
    """Centres of the marks of a class, in drawing order."""
    found = []
    for tag, a in Page(str(chart)).tags:
        if class_ not in (a.get("class") or "").split():
            continue
        if tag == "circle":
            found.append((float(a["cx"] or 0), float(a["cy"] or 0)))
        elif tag == "polygon":
            corners = [[float(c) for c in p.split(",")] for p in (a["points"] or "").split()]
            xs, ys = zip(*corners, strict=True)
            found.append(((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2))
    return found


def line(chart: object, class_: str, *, across: bool) -> float:
    same, other = ("y1", "y2") if across else ("x1", "x2")
    lines = [
        a
        for t, a in Page(str(chart)).tags
        if t == "line" and a.get("class") == class_ and a[same] == a[other]
    ]
    return float(lines[0][same] or 0)


def test_nothing_is_missing_and_every_svg_is_named(record: dict[str, Any]) -> None:
    page = parsed(record)
    assert "Diagnosis" in section(page) and "not available" not in section(page)
    for chart in (curvature.spectrum(record)["chart"], curvature.traces(record)["chart"]):
        assert [t for t, _ in Page(str(chart)).tags][:3] == ["svg", "title", "desc"]


def test_diagnosis_panel_explains_its_figures(record: dict[str, Any]) -> None:
    page = parsed(record)
    shown, words = dict(page.data), section(page)
    for value in (40.0, 0.05, -0.2, 0.031, 0.912, 11.2):
        assert value in shown
    assert "3.10 \N{PLUS-MINUS SIGN} 0.40" in words and "|λ| below 0.00400" in words
    assert "2/λmax" in words and "This point is a saddle. Steps above 0.05 diverge." in words
    record["analysis"]["diagnosis"] |= {"lambda_max": -1.0, "max_learning_rate": None}
    assert "no limit" in section(parsed(record))


def test_learning_rate_that_is_not_two_over_lambda_max_is_reported(record: dict[str, Any]) -> None:
    assert sections.inconsistencies(record) == []
    record["analysis"]["diagnosis"]["max_learning_rate"] = 0.5
    assert any("not 2/λmax" in text for text in sections.inconsistencies(record))


def test_spectral_axis_keeps_order_and_sign_and_shows_bulk_and_outlier() -> None:
    found = density()
    curve = list(zip(found["grid"], found["density"], strict=True))
    x = charts.spectral_axis(curve, [40.0, -0.2], start=0.0, stop=1000.0)
    assert x.kind == "asinh" and 1e-4 < x.knee < 0.02
    places = [x(v) for v in (-0.2, -0.05, -0.004, 0.0, 0.004, 0.05, 1.0, 40.0)]
    assert places == sorted(set(places)) and x(-0.05) < x(0.0) - 50
    assert x(0.004) - x(0.0) > 30 and x(40.0) - x(0.05) > 100
    assert all(abs(t) >= x.knee or t == 0 for t in x.ticks(about=7))
    narrow = [(v / 10, 1.0) for v in range(-10, 11)]
    assert charts.spectral_axis(narrow, [], start=0.0, stop=1.0).kind == "linear"


def test_negative_density_is_left_of_zero_and_in_its_own_colour(record: dict[str, Any]) -> None:
    chart = curvature.spectrum(record)["chart"]
    zero = line(chart, "zero", across=False)
    halves = {
        a["class"]: a["points"] or ""
        for t, a in Page(str(chart)).tags
        if t == "polygon" and a.get("points")
    }
    xs = {
        c: [float(p.split(",")[0]) for p in halves[c].split()]
        for c in ("density", "density negative")
    }
    assert max(xs["density negative"]) <= zero + 0.1 and min(xs["density"]) >= zero - 0.1
    assert len([t for t, a in Page(str(chart)).tags if a.get("class") == "rug"]) == 2
    eigenvalues = [x for x, _ in marks(chart, "eigenvalue")]
    assert (
        eigenvalues == sorted(eigenvalues, reverse=True) and eigenvalues[-1] < zero < eigenvalues[0]
    )
    # The outlier's bump rises above the axis although it is a millionth of the mass.
    curve = next(
        a["points"] or ""
        for t, a in Page(str(chart)).tags
        if t == "polyline" and a["class"] == "spectrum"
    )
    heights = [
        float(p.split(",")[1])
        for p in curve.split()
        if abs(float(p.split(",")[0]) - eigenvalues[0]) < 15
    ]
    assert max(heights) - min(heights) > 10


def test_traces_keep_order_and_sign(record: dict[str, Any]) -> None:
    chart = curvature.traces(record)["chart"]
    zero = line(chart, "zero", across=True)
    drawn = sorted(marks(chart, "own"))
    ys = dict(zip((-40.0, 0.3, 900.0, 12.0), (y for _, y in drawn), strict=True))
    assert ys[-40.0] > zero > ys[0.3] > ys[12.0] > ys[900.0]
    assert len(marks(chart, "gauss-newton")) == 2 and len(marks(chart, "hollow")) == 1
    assert len(marks(chart, "apart")) == 1
    exact = [
        a for t, a in Page(str(chart)).tags if t == "polygon" and a.get("class") == "point own"
    ]
    assert len(exact) == 1
    whiskers = str(chart).count('class="whisker"')
    record["analysis"]["layers"]["a.first"]["trace"]["stderr"] = None
    assert str(curvature.traces(record)["chart"]).count('class="whisker"') == whiskers - 1


def test_eigenvalue_table_names_matrix_place_and_state(record: dict[str, Any]) -> None:
    record["analysis"]["layers"]["a.third"]["eigenvalues"]["converged"] = False
    record["analysis"]["layers"]["a.fourth"]["eigenvalues"] = None
    shown = curvature.eigenvalues(record)
    rows = [[str(c.text) for c in row] for row in shown["table"].rows]
    assert [r[0] for r in rows] == ["whole model", "a.first", "a.second", "a.third"]
    assert {r[1] for r in rows} == {"Hessian"} and shown["without"] == "a.fourth"
    assert (shown["table"].rows[0][2].sort, shown["table"].rows[0][4].sort) == (40.0, -0.2)
    assert [r[7] for r in rows] == ["yes", "yes", "yes", "no"] and [r[8] for r in rows] == [
        "",
        "no",
        "yes",
        "no",
    ]
    assert len(shown["every"].rows) == 9
    heads = [c.label for c in curvature.traces(record)["table"].columns]
    assert any(h.startswith("Hessian trace") for h in heads) and any(
        h.startswith("Gauss-Newton trace") for h in heads
    )


def test_disagreements_and_notes_are_listed(record: dict[str, Any]) -> None:
    words = parsed(record).words
    assert words.count("fused attention was switched off") == 2
    assert [c.sort for c in curvature.disagreements(record).rows[0]][1:] == [-40.0, 60.0, -1.5]
    record["analysis"]["diagnosis"]["disagreements"] = []
    assert "The record lists no layer." in section(parsed(record))


def test_old_form_is_not_called_incomplete(record: dict[str, Any]) -> None:
    plain = {
        "trace": estimate(2.0, 0.1),
        "parameters": 6,
        "shape": [2, 3],
        "diagonal": {"mean": 0.3},
    }
    record["analysis"] = {"matrix": "Fisher", "layers": {"a.x": plain, "b.x": plain, "c.x": plain}}
    words = section(parsed(record))
    assert "one of traces" in words and "not available" not in words
    assert "logarithmic scale" in str(curvature.traces(record)["chart"])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("diagnosis",), "no 'diagnosis'"),
        (("model",), "no 'model'"),
        (("model", "density"), "no 'density'"),
        (("layers",), "no 'layers'"),
        (("diagnosis", "disagreements"), "no 'disagreements'"),
        (("diagnosis", "text"), "no 'text'"),
    ],
)
@pytest.mark.parametrize("delete", [True, False])
def test_absent_part_is_named(
    record: dict[str, Any], path: tuple[str, ...], says: str, delete: bool
) -> None:
    words = section(parsed(replaced(record, ("analysis", *path), None, delete=delete)))
    assert re.search(rf"not available: [^.]*{says}", words)


def test_no_wrong_value_crashes_or_is_printed_as_a_number(record: dict[str, Any]) -> None:
    analysis = record["analysis"]
    analysis["layers"] = {k: analysis["layers"][k] for k in ("a.first", "a.second")}
    for holder in (analysis["model"], *analysis["layers"].values()):
        for key in ("grid", "density"):
            holder["density"][key] = holder["density"][key][:60:20]
    for k, path in enumerate(paths(analysis)):
        for value in (WRONG[k % len(WRONG)], WRONG[(5 * k + 3) % len(WRONG)]):
            changed = replaced(record, ("analysis", *path), value)
            assert not NOT_A_NUMBER.search(visible(build(changed))), (path, value)
            summary(changed)
        if isinstance(path[-1], str):
            build(replaced(record, ("analysis", *path), None, delete=True))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 0.0, 5e-324]
)
def test_every_number_the_same(record: dict[str, Any], value: float) -> None:
    changed = copy.deepcopy(record)
    for path in paths(record):
        parent: Any = changed
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent[path[-1]], float):
            parent[path[-1]] = value
    assert not NOT_A_NUMBER.search(visible(build(changed)))
    summary(changed)


def test_hostile_names_are_escaped(record: dict[str, Any]) -> None:
    analysis = record["analysis"]
    analysis["layers"][HOSTILE] = analysis["layers"].pop("a.first")
    analysis["diagnosis"]["disagreements"][0]["layer"] = HOSTILE
    analysis["diagnosis"] |= {"kind": HOSTILE, "text": [HOSTILE]}
    analysis |= {"matrix": HOSTILE, "notes": [HOSTILE], "measure": HOSTILE}
    page = parsed(record)
    assert [t for t, _ in page.tags].count("script") == 1
    assert {t for t, _ in page.tags}.isdisjoint(
        {"img", "iframe", "object", "embed", "form", "link"}
    )
    text = build(record)
    assert "\x1b" not in text and "\x00" not in text and "\x1b" not in summary(record)
    text.encode("utf-8")


def test_summary_has_the_diagnosis(record: dict[str, Any]) -> None:
    text = summary(record).replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        "λmax 40.00",
        "SGD step 0.0500",
        "kind of point: saddle",
        "3.10 \N{PLUS-MINUS SIGN} 0.40 % negative",
    ):
        assert part in text
    assert "This point is a saddle." in text and "traces disagree in a.first" in text
    record["analysis"]["diagnosis"] = None
    assert "λmax" not in summary(record)
