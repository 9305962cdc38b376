"""Charts and the tables behind them: every mark stands where the record's number says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from curvprune.record import PriceRow, RunRecord, Trial

from .page import Page, contrast, corners, number, parsed, plain
from .records import BITS, as_accuracy, everything, language_model, trial, without_verdict


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return language_model()


@pytest.fixture(scope="module")
def page(record: RunRecord) -> Page:
    return parsed(record)


@pytest.fixture(scope="module")
def small() -> RunRecord:
    return language_model(blocks=1)


# Charts


def test_stacked_bar_adds_up_to_the_weights(page: Page, record: RunRecord) -> None:
    chart = page.chart("Bytes before and after")
    widths: dict[float, float] = {}
    for bar in chart.elements("rect"):
        y = number(bar, "y")
        widths[y] = widths.get(y, 0.0) + number(bar, "width")
    before, after = (widths[y] for y in sorted(widths))
    assert record.size.after_bytes is not None
    ratio = record.size.before_bytes / record.size.after_bytes
    assert before / after == pytest.approx(ratio, rel=2e-3)
    assert page.facts["ratio"].startswith(f"{ratio:.2f}")
    rest = [title for title in chart.titles("rect") if "everything else" in title]
    assert rest == ["everything else: 250.0\N{NO-BREAK SPACE}kB"]


@pytest.mark.parametrize(
    "values", [(0.5, 2.0), (1e-6, 0.3), (-0.002, 5.0)], ids=["linear", "log", "asinh"]
)
def test_scatter_puts_equal_numbers_on_the_identity_line(
    small: RunRecord, values: tuple[float, float]
) -> None:
    exact = {"predicted_stderr": 1e-7, "loss_stderr": 1e-7}
    trials = tuple(replace(trial("p", "plan", 1, v, v), accepted=False, **exact) for v in values)
    chart = parsed(replace(small, trials=trials)).chart("Predicted against measured")
    line = chart.elements("line", "identity")[0]
    x1, y1, x2, y2 = (number(line, key) for key in ("x1", "y1", "x2", "y2"))
    dots = chart.marks("plan")
    assert len(dots) == 2
    for cx, cy in dots:
        assert (cx - x1) / (x2 - x1) == pytest.approx((cy - y1) / (y2 - y1), abs=1e-3)
        assert x1 < cx < x2 and y2 < cy < y1


def test_a_logarithmic_axis_and_its_ticks(page: Page, record: RunRecord) -> None:
    # The frontier's losses fall by the same factor from plan to plan, its bytes by the same step.
    chart = page.chart("Frontier")
    dots = chart.marks("dot")
    assert len(dots) == len(record.frontier)
    for axis in (0, 1):
        steps = [b[axis] - a[axis] for a, b in pairwise(dots)]
        assert max(steps) - min(steps) < 0.25
    per_decade = (dots[-1][1] - dots[0][1]) / (17 * 0.31 / math.log(10))
    ticks = chart.ticks("end")
    assert ticks["0.001"] - ticks["0.01"] == pytest.approx(per_decade, abs=0.3)
    assert ticks["0.01"] - ticks["0.1"] == pytest.approx(per_decade, abs=0.3)
    assert ticks["0.1"] - 3.5 == pytest.approx(dots[0][1] + per_decade * math.log10(1.1), abs=0.3)


def test_a_linear_axis_and_its_ticks(small: RunRecord) -> None:
    trials = []
    for k, loss in enumerate((-0.012, 0.004, 0.031)):
        measured = replace(trial(f"p{k}", "plan", 1, loss, loss), loss_stderr=0.004)
        trials.append(replace(measured, predicted_stderr=0.004, accepted=False))
    chart = parsed(replace(small, trials=tuple(trials))).chart("Predicted against measured")
    ticks = {float(plain(text)): x for text, x in chart.ticks("middle").items()}
    assert {-0.01, 0.0, 0.01, 0.02, 0.03} <= set(ticks)
    scale = (ticks[0.03] - ticks[-0.01]) / 0.04
    for loss, (x, _) in zip((-0.012, 0.004, 0.031), chart.marks("plan"), strict=True):
        assert x == pytest.approx(ticks[0.0] + scale * loss, abs=0.2)


def test_trials_are_told_apart_by_shape_and_colour(page: Page, record: RunRecord) -> None:
    chart = page.chart("Predicted against measured")
    counts = {c: chart.elements("*", c) for c in ("plan", "uniform", "reversed", "applied")}
    assert [len(found) for found in counts.values()] == [3, 2, 1, 1]
    shapes = set()
    for found in counts.values():
        tag = found[0].tag
        shapes.add((tag, len(corners(found[0])) if tag == "polygon" else 0))
    assert len(shapes) == 3  # circle, star; square and diamond have four corners each
    square, diamond = corners(counts["uniform"][0]), corners(counts["reversed"][0])
    assert square[0][1] == square[1][1] and diamond[0][1] != diamond[1][1]
    assert len(chart.elements("circle", "ring")) == 1


def chosen(record: RunRecord) -> list[str]:
    names = parsed(record).tables["trials"].texts("plan")
    return [name.removesuffix(" (chosen)") for name in names if name.endswith(" (chosen)")]


def test_chosen_is_what_was_applied_else_what_select_accepted(small: RunRecord) -> None:
    for trials in (small.trials, small.trials[::-1]):
        assert chosen(replace(small, trials=trials, attempts=())) == ["applied plan-3"]
    assert chosen(replace(small, trials=small.trials[:-1], attempts=())) == ["plan-3"]


def test_chosen_is_the_last_certified_attempt(small: RunRecord) -> None:
    applied = tuple(replace(small.trials[-1], name=f"plan-{k}, applied") for k in (2, 3))
    first, second = small.attempts
    undecided = replace(second, verdict=replace(second.verdict, status="INCONCLUSIVE"))
    violated = replace(first, verdict=replace(first.verdict, status="VIOLATED"))
    trials = (*small.trials[:-1], *applied)
    for attempts, expected in (
        ((first, second), "plan-3, applied"),
        ((first, undecided), "plan-2, applied"),
        ((violated, second), "plan-2, applied"),
    ):
        assert chosen(replace(small, trials=trials, attempts=attempts)) == [expected]
    # One attempt, and a bolder applied model that select rejected: the attempt says which of the
    # two it was.
    only = (replace(first, plan="plan-2, applied"),)
    for both in (applied, applied[::-1]):
        assert chosen(replace(small, trials=both, attempts=only)) == ["plan-2, applied"]


def test_trial_chance_and_accuracy_are_shown_where_they_mean_something(small: RunRecord) -> None:
    assert "chance" not in parsed(small).tables["trials"].columns
    first = replace(small.trials[0], chance=0.914, drop=0.0123)
    record = replace(small, trials=(first, *small.trials[1:]))
    columns = parsed(record).tables["trials"].columns
    assert "chance" in columns and "accuracy drop" not in columns
    table = parsed(as_accuracy(record)).tables["trials"]
    assert table.texts("chance")[0] == "0.91"
    assert plain(table.texts("accuracy drop")[0]) == "1.23 pp"


def measured(predicted: float, loss: float, *, errors: tuple[float, float]) -> Trial:
    found = trial("p", "plan", 10, predicted, loss)
    return replace(found, predicted_stderr=errors[0], loss_stderr=errors[1])


def test_trial_arithmetic(small: RunRecord) -> None:
    page = parsed(replace(small, trials=(measured(0.010, 0.025, errors=(0.003, 0.004)),)))
    table = page.tables["trials"]
    assert table.sorts("difference \N{PLUS-MINUS SIGN} se") == [pytest.approx(0.015)]
    assert table.sorts("z") == [pytest.approx(3.0)]
    assert table.sorts("ratio") == [pytest.approx(2.5)]
    text = plain(table.texts("difference \N{PLUS-MINUS SIGN} se")[0])
    assert text == "0.0150 \N{PLUS-MINUS SIGN} 0.0050"
    assert "0 of 1 trials were measured within two standard errors" in page.words
    near = measured(0.010, 0.019, errors=(0.003, 0.004))
    assert "1 of 1 trials" in parsed(replace(small, trials=(near,))).words
    unknown = measured(0.010, 0.019, errors=(math.nan, 0.004))
    assert "No trial has both" in parsed(replace(small, trials=(unknown,))).words


def test_recoveries_are_listed(small: RunRecord) -> None:
    table = parsed(everything(small)).tables["recoveries"]
    row = {column: cell.sort for column, cell in zip(table.columns, table.rows[0], strict=True)}
    assert row["gain"] == pytest.approx(0.1) and (row["steps"], row["kept"]) == (100, 80)
    assert (row["numbers"], row["codes moved"]) == (12345, 678)


def test_frontier_marks_budget_and_chosen_plan(page: Page, small: RunRecord) -> None:
    chart = page.chart("Frontier")
    assert len(chart.elements("circle", "ring")) == 1
    (budget,) = chart.elements("line", "budget")
    assert budget.get("y1") == budget.get("y2")
    (budget,) = parsed(without_verdict(small)).chart("Frontier").elements("line", "budget")
    assert budget.get("x1") == budget.get("x2")


def test_heat_map_has_every_price_once(page: Page, record: RunRecord) -> None:
    assert record.ledger is not None
    chart = page.chart("Price of every option")
    titles = chart.titles("rect", "cell")[: len(record.ledger.rows)]
    assert len(set(titles)) == len(record.ledger.rows)
    assert sum(title.endswith(", chosen") for title in titles) == 211
    assert "Labels leave out the prefix model.layers.." in page.words
    row = record.ledger.rows[4]
    at = page.tables["ledger"].columns.index(row.option)
    price = page.tables["ledger"].rows[0][at].text.removesuffix(" *")
    assert any(t.startswith(f"{row.layer}, {row.option}: {price} nats/token") for t in titles)
    assert len(chart.elements("text", "row")) == 211


def test_heat_map_colours_are_logarithmic_and_ordered(small: RunRecord) -> None:
    assert small.ledger is not None
    prices = [10.0 ** (-k / 8) for k in range(33)] + [0.0, -1e-3, math.nan]
    rows = []
    for k, price in enumerate(prices):
        rows.append(PriceRow(layer=f"l{k}", option="o", bytes=1, price=price, stderr=1e-9))
    record = replace(small, layers=(), ledger=replace(small.ledger, rows=tuple(rows)))
    chart = parsed(record).chart("Price of every option")
    cells = chart.elements("rect", "cell")[: len(rows)]
    fills = [cell.get("fill") for cell in cells]
    assert fills[33:] == [None] * 3 and cells[35].get("class") == "cell none"
    # The scale below the map goes from the smallest to the largest in equal steps.
    scale = [bar.attrib["fill"] for bar in chart.elements("rect") if bar.get("class") is None]
    assert len(scale) == 60 and (fills[32], fills[0]) == (scale[0], scale[-1])
    darkness = [contrast(fill or "", "#000000") for fill in fills[:33]]
    assert darkness == sorted(darkness, reverse=True) and darkness[0] > 5 * darkness[-1]
    lightness = [contrast(fill, "#000000") for fill in scale]
    assert lightness == sorted(lightness)
    # Logarithmic: half-way between 1e-4 and 1 is 1e-2, whose colour lies in the scale's middle.
    assert lightness[29] < contrast(fills[16] or "", "#000000") < lightness[30]


def test_every_price_is_also_plain_text(page: Page, record: RunRecord) -> None:
    assert record.ledger is not None
    table = page.tables["ledger"]
    shown = {}
    for row in table.rows:
        for option, cell in zip(table.columns[1:], row[1:], strict=True):
            shown[row[0].text, option] = cell
    for price in record.ledger.rows:
        assert shown[price.layer, price.option].sort == pytest.approx(price.price, rel=1e-12)
    chosen = {key for key, cell in shown.items() if cell.text.endswith(" *")}
    assert chosen == {(layer.name, layer.option) for layer in record.layers}


def test_measured_prices_are_marked(small: RunRecord) -> None:
    assert small.ledger is not None
    first, *others = small.ledger.rows
    rows = (replace(first, measured=True), *others[:-1])
    page = parsed(replace(small, ledger=replace(small.ledger, rows=rows)))
    assert "1 price(s) marked m, the highest, were measured" in page.words
    texts = [cell.text for row in page.tables["ledger"].rows for cell in row]
    assert sum(text.endswith((" m", " m *")) for text in texts) == 1
    assert texts.count("not offered") == 1


def test_options_are_ordered_from_least_to_most_compressed(page: Page) -> None:
    order = sorted(BITS, key=lambda option: -BITS[option])
    assert page.tables["ledger"].columns[1:] == order
    used = page.tables["options"].texts("option")
    assert used == [option for option in order if option in used] and len(used) == 4
    fills = [bar.get("fill") for bar in page.chart("Bytes before").elements("rect", "segment")]
    assert len(set(fills)) == len(fills) == 4


def test_options_table_sums(page: Page, record: RunRecord) -> None:
    foot = page.tables["options"].foot
    assert foot[1].sort == 211
    assert foot[3].sort == sum(layer.bytes for layer in record.layers)
    prices = [layer.price for layer in record.layers if layer.price is not None]
    assert foot[6].sort == pytest.approx(sum(prices))


def test_layers_table_says_what_each_got_and_why(page: Page, record: RunRecord) -> None:
    table = page.tables["layers"]
    assert table.texts("layer") == [layer.name for layer in record.layers]
    assert table.texts("option") == [layer.option for layer in record.layers]
    assert table.sorts("bytes") == [layer.bytes for layer in record.layers]
    assert table.texts("reason") == [layer.reason for layer in record.layers]
    assert table.texts("out \N{MULTIPLICATION SIGN} in")[0] == "576 \N{MULTIPLICATION SIGN} 576"
