"""The report: true to the record, safe against what the record contains, one file that loads
nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from curvprune.record import (
    Alternative,
    Attempt,
    LimitUse,
    Measurement,
    OtherRun,
    PriceRow,
    RecoveryRecord,
    RunRecord,
    StageTime,
    Trial,
)
from curvprune.report import build, summary

from .page import HOSTILE, Page, assert_harmless, corners, number, parsed
from .records import (
    ANALYSIS,
    BITS,
    REMOVED,
    analysed,
    language_model,
    trial,
    two_classifiers,
    without_verdict,
)

NOT_A_NUMBER = re.compile(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])")


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return language_model()


@pytest.fixture(scope="module")
def page(record: RunRecord) -> Page:
    return parsed(record)


@pytest.fixture(scope="module")
def small() -> RunRecord:
    return language_model(blocks=1)


def judged(record: RunRecord, **changes: Any) -> RunRecord:
    """The record with another verdict."""
    assert record.verdict is not None
    return replace(record, verdict=replace(record.verdict, **changes))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def visible(text: str) -> str:
    """What a reader or a tooltip shows: no style, no script."""
    shown = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)
    return shown.replace("None on record", "")


# The record as a file


def everything(small: RunRecord) -> RunRecord:
    """A record with something in every field."""
    assert small.verdict is not None
    history = (
        Measurement(step=0, training=None, select=3.2),
        Measurement(step=80, training=3.0, select=3.1),
    )
    recovery = RecoveryRecord(
        plan="plan-3",
        loss_before=3.2,
        loss_after=3.1,
        measure="nats/token",
        steps=100,
        best_step=80,
        trained=12345,
        flipped=678,
        seconds=77.7,
        history=history,
    )
    together = (
        Alternative(name="pruning and rounding", trial="plan-3", bytes=123_456, loss=0.01),
        Alternative(name="rounding", trial="r", bytes=123_000, more=0.01, more_stderr=0.001),
        Alternative(name="pruning", trial=None, missed=("max_bytes",), smallest_bytes=200_000),
    )
    return replace(
        small,
        measured=small.verdict,
        limits=(LimitUse(name="max_bits", most=4.25, used=4.2),),
        corrections={"int4-g64-asym": 1.1},
        together=together,
        recoveries=(recovery,),
        structured=REMOVED,
        analysis=ANALYSIS,
        state_bytes=5_000_000,
    )


def test_a_record_comes_back_from_json_as_it_was(small: RunRecord) -> None:
    for record in (small, everything(small), analysed(), without_verdict(small)):
        text = json.dumps(record.to_json(), allow_nan=False)
        assert RunRecord.from_json(json.loads(text), source="report.json") == record


def test_numbers_that_are_not_finite_come_back_as_nan(small: RunRecord) -> None:
    written = judged(small, bound=math.inf, stderr=math.nan).to_json()
    read = RunRecord.from_json(written, source="report.json").verdict
    assert read is not None and math.isnan(read.bound) and math.isnan(read.stderr)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 1}, r"report\.json was written by another version .*format 1.*new --out"),
        ({"format": None}, r"report\.json was written by another version .*format None"),
        ({"size": {"before_bytes": 1}}, r"report\.json does not hold a RunRecord .*size\.param"),
        ({"title": 3}, r"report\.json does not hold a RunRecord .*title"),
    ],
)
def test_another_format_is_refused(small: RunRecord, change: dict[str, Any], says: str) -> None:
    written = small.to_json()
    assert isinstance(written, dict)
    with pytest.raises(ValueError, match=says):
        RunRecord.from_json({**written, **change}, source="report.json")


def test_what_is_no_record_is_refused() -> None:
    for value in ([], "text", None, {}):
        with pytest.raises(ValueError, match="another version of curvprune"):
            RunRecord.from_json(value, source="x")


# The page as a file


def test_parses_with_every_section(page: Page) -> None:
    anchors = {a["href"] for t, a in page.tags if t == "a" and "href" in a}
    assert len(anchors) == 10
    places = {a["id"] for _, a in page.tags if "id" in a}
    assert {(anchor or "").removeprefix("#") for anchor in anchors} <= places
    assert "not available" not in page.words


def test_one_small_file_that_loads_nothing(record: RunRecord, page: Page) -> None:
    text = page.html
    assert len(text.encode()) < 2_000_000
    assert record.ledger is not None and len(record.ledger.rows) == 211 * 6
    assert not re.search(r"(src|href|action|poster|data|srcset)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"@import|url\(|<link|<img|<iframe|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_script_matches_the_hash_that_the_policy_allows(page: Page) -> None:
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    script = "".join(page.script)
    assert len(script) > 100
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in (policy or "")


def test_same_record_same_bytes(small: RunRecord) -> None:
    read = RunRecord.from_json(small.to_json(), source="report.json")
    assert build(read) == build(small) and summary(read) == summary(small)


def test_readable_in_dark_and_on_paper(page: Page) -> None:
    css = re.search(r"<style>(.*?)</style>", page.html, re.S)
    assert css is not None
    used = set(re.findall(r"var\((--[\w-]+)\)", css[1]))
    light, dark = css[1].split("@media (prefers-color-scheme: dark)", 1)
    dark = dark[: dark.index("* { box-sizing")]
    paper = css[1][css[1].index("@media print") :]
    for variable in used:
        assert all(f"{variable}:" in theme for theme in (light, dark, paper)), variable
    assert contrast(colour_of(dark, "--ink"), colour_of(dark, "--page")) > 7
    for name in ("--soft", "--good", "--bad", "--open", "--blue"):
        for theme in (light, dark):
            assert contrast(colour_of(theme, name), colour_of(theme, "--panel")) >= 4.5, name


def colour_of(theme: str, variable: str) -> str:
    found = re.search(rf"{variable}: (#\w+)", theme)
    assert found is not None
    return found[1]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    channels = []
    for k in (1, 3, 5):
        c = int(colour[k : k + 2], 16) / 255
        channels.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    red, green, blue = channels
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Safety


def poisoned(value: Any) -> Any:
    """Every text of a record made hostile, keys included."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, tuple):
        return tuple(poisoned(v) for v in value)
    if isinstance(value, dict):
        return {k + HOSTILE: poisoned(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return replace(value, **{name: poisoned(getattr(value, name)) for name in names})
    return value


def test_everything_is_escaped(small: RunRecord) -> None:
    name = "<script>alert(1)</script>"
    layers = (replace(small.layers[0], name=name), *small.layers[1:])
    plain = parsed(replace(small, layers=layers, recipe="a: </pre><script>alert(2)</script>"))
    assert name in plain.words and "</pre><script>alert(2)</script>" in plain.words
    assert_harmless(plain)
    bad = poisoned(everything(small))
    page = parsed(bad)
    assert_harmless(page)
    assert "nothing is claimed" in page.words and "at most" not in page.words
    assert page.words.count("{{ 7*7 }}") > 100 and "http://evil.example" in page.words
    assert_harmless(parsed(replace(bad, verdict=small.verdict)))
    here, there = two_classifiers([0, 1, 2, 3])
    other = OtherRun(name=HOSTILE, record=poisoned(there), unpaired=HOSTILE)
    page = parsed(here, other)
    assert_harmless(page)
    assert page.section("Compared with").count("http://evil.example") > 5


def test_line_ends_of_a_recipe_are_no_control_characters(small: RunRecord) -> None:
    assert "\ufffd" not in build(replace(small, recipe="a: 1\r\nb: 2\r\n"))
    assert "\ufffd" in build(replace(small, recipe="a: \x1b[31m"))


def test_summary_cannot_be_forged(small: RunRecord) -> None:
    title = "x\n\x1b[2JCERTIFIED: all is well\r\u202e"
    text = summary(replace(judged(small, status="VIOLATED"), title=title))
    assert text.splitlines()[0].startswith("VIOLATED: x ")
    assert not any(line.startswith("CERTIFIED") for line in text.splitlines())
    assert not set(text) & {"\x1b", "\r", "\u202e"}
    assert not set(summary(poisoned(everything(small)))) & {"\x1b", "\x00", "\ud800"}


# What is not there, and what is no number


def test_sections_without_content_say_so(small: RunRecord) -> None:
    bare = RunRecord(
        title="t",
        objective="causal-lm",
        measure="nats/token",
        size=small.size,
        provenance=small.provenance,
        recipe="",
    )
    page = parsed(replace(bare, size=replace(small.size, after_bytes=None)))
    assert "NOT FINISHED" in page.words and page.words.count("not available") == 10
    for text in (
        "no plan was tested",
        "no model was measured on the certify split",
        "no plan was chosen",
        "no plan was measured",
        "no layer was priced",
        "the curvature was not analysed",
        "no stage was timed",
    ):
        assert f"not available: {text}" in page.words, text
    assert "Removed units" not in page.words and "Recovery" not in page.words


def numbers_as(value: Any, number: float) -> Any:
    """Every float of a record replaced."""
    if isinstance(value, float):
        return number
    if isinstance(value, tuple):
        return tuple(numbers_as(v, number) for v in value)
    if isinstance(value, dict):
        return {k: numbers_as(v, number) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return replace(value, **{name: numbers_as(getattr(value, name), number) for name in names})
    return value


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_available(small: RunRecord, number: float) -> None:
    assert small.verdict is not None and small.ledger is not None
    verdict = numbers_as(small.verdict, number)
    ledger = replace(small.ledger, rows=numbers_as(small.ledger.rows, number))
    bare = replace(
        small,
        verdict=verdict,
        attempts=(Attempt(plan="p", verdict=verdict),),
        layers=numbers_as(small.layers, number),
        ledger=ledger,
        trials=numbers_as(small.trials, number),
        frontier=numbers_as(small.frontier, number),
    )
    page = parsed(bare)
    assert not NOT_A_NUMBER.search(visible(page.html)) and "n/a" in page.words
    assert not NOT_A_NUMBER.search(summary(bare))
    assert "without its bound, budget and confidence" in page.words


def test_no_budget_and_not_finished_are_told_apart(small: RunRecord) -> None:
    asked = replace(small, verdict=None, attempts=())
    assert "NOT FINISHED" in parsed(asked).words
    assert "NO ACCURACY BUDGET ASKED" in parsed(without_verdict(small)).words
    assert "NO ACCURACY BUDGET ASKED" in parsed(replace(asked, budget=None)).words
    unwritten = replace(without_verdict(small), size=replace(small.size, after_bytes=None))
    assert "NOT FINISHED" in parsed(unwritten).words
    assert "the losses below are estimates" in parsed(without_verdict(small)).words


def test_a_status_that_is_none_claims_nothing(small: RunRecord) -> None:
    page = parsed(judged(small, status="MAYBE"))
    assert "nothing is claimed" in page.words and "at most" not in page.words


# The verdict


def test_banner_shows_the_records_own_numbers(page: Page, record: RunRecord) -> None:
    assert record.verdict is not None
    shown = dict(page.data)
    for key in ("drop", "bound", "max_drop", "baseline", "compressed", "items", "clusters"):
        value = float(getattr(record.verdict, key))
        text = shown[value].split("\N{NO-BREAK SPACE}")[0].replace(",", "")
        decimals = len(text.partition(".")[2])
        # A bound is rounded up, so it may be off by a whole last digit.
        most = 1.0 if key == "bound" else 0.5
        assert abs(float(text) - value) <= most * 10.0**-decimals * 1.0001, key
    assert "0.0147 \N{PLUS-MINUS SIGN} 0.0019" in page.words
    assert "upper bound, 95 %" in page.words
    assert (
        "With 95 % confidence the compressed model's loss is at most 0.0178 nats/token above "
        "the uncompressed one's on data like the certify split, which no earlier step touched."
    ) in page.words


def as_accuracy(record: RunRecord) -> RunRecord:
    return judged(
        record,
        metric="accuracy",
        measure="fraction",
        baseline=0.8123,
        compressed=0.8101,
        drop=0.0022,
        stderr=0.00171,
        bound=0.00501,
        max_drop=0.007,
    )


def test_accuracy_is_in_percentage_points(small: RunRecord) -> None:
    record = as_accuracy(small)
    assert small.budget is not None
    page = parsed(replace(record, budget=replace(small.budget, metric="accuracy")))
    shown = dict(page.data)
    assert plain(shown[0.0022]) == "0.22 \N{PLUS-MINUS SIGN} 0.17"
    assert (shown[0.00501], shown[0.007], shown[0.8123]) == ("0.51", "0.7", "81.23")
    assert "accuracy is at most 0.51 percentage points below the uncompressed one's" in page.words
    assert "the budget is one of accuracy" in page.words


def test_violated_and_inconclusive_say_what_to_do(small: RunRecord) -> None:
    bad = parsed(judged(small, status="VIOLATED", drop=0.041, bound=0.0441))
    assert "loss is more than 0.02 nats/token above" in bad.words
    assert "Offer milder options" in bad.words
    unsure = {"status": "INCONCLUSIVE", "stderr": 0.0052, "bound": 0.023266}
    undecided = judged(small, **unsure, needed=203_456)
    page = parsed(undecided)
    assert "About 203,456 items, 138,048 more than the 65,408 used" in page.words
    assert dict(page.data)[203456.0] == "203,456"
    assert "INCONCLUSIVE" in summary(undecided) and "203,456" in summary(undecided)
    assert "is not on record" in summary(judged(small, **unsure))
    above = judged(small, **unsure, drop=0.021)
    assert "No number of items is expected to certify this plan" in summary(above)


def test_without_a_budget_the_measurement_is_shown_and_not_judged(small: RunRecord) -> None:
    assert small.verdict is not None
    measured = replace(small.verdict, status="VIOLATED", max_drop=0.0, needed=77)
    page = parsed(replace(without_verdict(small), measured=measured))
    banner = page.words[: page.words.index("Attempts on the certify split")]
    assert "NO ACCURACY BUDGET ASKED" in banner and "VIOLATED" not in banner
    assert (
        "a drop of 0.0147 \N{PLUS-MINUS SIGN} 0.0019 nats/token; "
        "the 95 % one-sided bound is 0.0178."
    ) in banner
    assert dict(page.data)[measured.drop].startswith("0.0147") and 77.0 not in dict(page.data)
    assert not page.chart("Measured drop").elements("line", "budget")


def test_the_axis_of_the_verdict_holds_drop_bound_and_budget(page: Page, record: RunRecord) -> None:
    chart, verdict = page.chart("Measured drop"), record.verdict
    assert verdict is not None
    zero, budget = (number(chart.elements("line", c)[0], "x1") for c in ("zero", "budget"))
    # One linear axis: pixels per nat from the budget's line.
    scale = (budget - zero) / verdict.max_drop
    drop = chart.marks("drop")[0][0]
    assert (drop - zero) / scale == pytest.approx(verdict.drop, rel=0.01)
    reach = chart.elements("line", "reach")[0]
    assert (number(reach, "x2") - zero) / scale == pytest.approx(verdict.bound, rel=0.01)
    deviation = chart.elements("line", "deviation")[0]
    width = number(deviation, "x2") - number(deviation, "x1")
    assert width / scale == pytest.approx(2 * verdict.stderr, rel=0.01)
    allowed = chart.elements("rect", "allowed")[0]
    assert number(allowed, "x") + number(allowed, "width") == pytest.approx(budget, abs=0.11)


def test_a_gain_is_not_called_a_loss(small: RunRecord) -> None:
    page = parsed(judged(small, drop=-0.0123, stderr=0.0011, bound=-0.01049))
    assert "loss is at least 0.0104 nats/token below the uncompressed one's" in page.words


@pytest.mark.parametrize(
    ("bound", "budget", "stderr", "expected"),
    [
        (0.01781, 9.0, 0.0011, "0.0179"),
        (0.0178, 9.0, 0.0011, "0.0178"),
        (0.1 + 0.2, 9.0, 1.1, "0.3"),
        (-0.01049, 9.0, 0.0011, "-0.0104"),
        (0.01996, 0.01997, 0.0011, "0.01996"),
        (0.019996, 0.02, 0.0011, "0.0200"),
        (0.020001, 0.02, 0.0011, "0.0201"),
    ],
)
def test_bounds_round_away_from_the_claim(
    small: RunRecord, bound: float, budget: float, stderr: float, expected: str
) -> None:
    text = plain(summary(judged(small, bound=bound, max_drop=budget, stderr=stderr)))
    assert f", bound {expected}, budget" in text


def test_attempts_are_listed_in_order(page: Page) -> None:
    table = page.tables["attempts"]
    assert table.texts("plan") == ["plan-2", "plan-3"]
    drop = plain(table.texts("drop \N{PLUS-MINUS SIGN} se")[0])
    assert drop == "0.0081 \N{PLUS-MINUS SIGN} 0.0014"
    assert table.sorts("bound") == pytest.approx(
        [0.008112 + 1.6449 * 0.00143, 0.014713 + 1.6449 * 0.001876]
    )


def test_limits_corrected_prices_and_a_control_that_won_are_shown(small: RunRecord) -> None:
    limits = (
        LimitUse(name="max_bits", most=4.25, used=4.2),
        LimitUse(name="ms", most=1e6, used=987654.0),
    )
    assert "expected" not in parsed(small).tables["trials"].columns
    first, *others, last = small.trials
    trials = (replace(first, expected=0.0301), *others, replace(last, beats_plan=True))
    record = replace(small, limits=limits, trials=trials, corrections={"int4-g64-sym": 1.1})
    page = parsed(record)
    assert page.facts["max_bits"] == "4.200 of 4.250"
    assert page.facts["ms"] == "987,654 of 1,000,000"
    assert page.tables["trials"].texts("expected")[0] == "0.0301"
    assert f"A control, {last.name}, beats the plan and was used." in page.words
    assert "- within: max_bits 4.200 of 4.250; ms 987,654 of 1,000,000" in plain(summary(record))
    assert "within:" not in summary(small) and "beats the plan" not in parsed(small).words


def test_what_kinds_of_options_are_worth_together(small: RunRecord) -> None:
    together = (
        Alternative(name="both", trial="plan-3", bytes=100_000, loss=0.01),
        Alternative(name="a", trial="t", bytes=90_000, more=0.01, more_stderr=0.001),
        Alternative(name="b", trial="t", bytes=90_000, more=-0.01, more_stderr=0.001),
        Alternative(name="c", trial="t", bytes=90_000, more=0.0016, more_stderr=0.001),
        Alternative(name="d", trial=None, missed=("max_bytes",), smallest_bytes=200_000),
        Alternative(name="e", trial=None, missed=("ms", "max_bits"), smallest_bytes=200_000),
        Alternative(name="f", trial="t", bytes=90_000, more=0.1, more_stderr=math.nan),
    )
    text = plain(summary(replace(small, together=together)))
    assert (
        "- At 100.0 kB, beside both in one plan: "
        "a (90.00 kB) loses 0.0100 \N{PLUS-MINUS SIGN} 0.0010 nats/token more; "
        "b (90.00 kB) loses 0.0100 \N{PLUS-MINUS SIGN} 0.0010 nats/token less: it won; "
        "c (90.00 kB) differs by 0.0016 \N{PLUS-MINUS SIGN} 0.0010 nats/token, no more than chance "
        "may; d does not get below 200.0 kB; e cannot keep within ms, max_bits; "
        "f was not measured with an error."
    ) in text
    table = parsed(replace(small, together=together)).tables["together"]
    assert table.sorts("beyond the plan \N{PLUS-MINUS SIGN} se")[:3] == [None, 0.01, -0.01]
    assert table.sorts("bytes")[4] == 200_000


# Notes, and what lies in the run folder


def test_no_note_is_hidden(page: Page, record: RunRecord) -> None:
    notes = page.section("Notes and warnings")
    assert all(text in notes for text in record.notes)
    noted = [layer for layer in record.layers if layer.notes]
    assert len(noted) == 4
    for layer in noted:
        assert layer.name in notes and layer.notes[0] in notes
    assert "over budget on select" in notes
    assert "4 notes and warnings below." in page.words


def test_the_state_of_a_run_and_how_to_remove_it_are_told(small: RunRecord) -> None:
    record = replace(small, state_bytes=1_234_567_890)
    says = "The run folder's state/ takes 1.235 GB; `curvprune clean RUN` removes it."
    assert says in parsed(record).section("Time and memory", "Provenance")
    assert f"- {says}" in plain(summary(record)).splitlines()
    assert "curvprune clean" not in build(small) + summary(small)


# Numbers


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (0.0123456, 0.0021, "0.0123 ~ 0.0021"),
        (12345.678, 321.0, "12,350 ~ 320"),
        (3.14159, 0.0996, "3.14 ~ 0.10"),
        (1.2344e-6, 4.4e-8, "(1.234 ~ 0.044)x10^-6"),
        (-0.5, 0.25, "-0.50 ~ 0.25"),
        (-0.0001, 0.05, "0.000 ~ 0.050"),
        (0.0, 0.0, "0"),
        (0.5, math.nan, "0.500 ~ n/a"),
        (math.nan, 0.1, "n/a"),
        (9.9996, 0.0099, "9.9996 ~ 0.0099"),
    ],
)
def test_value_and_error_share_their_last_digit(
    small: RunRecord, value: float, stderr: float, expected: str
) -> None:
    text = plain(summary(judged(small, drop=value, stderr=stderr)))
    power = "\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT SIX}"
    text = text.replace("\N{PLUS-MINUS SIGN}", "~").replace(power, "x10^-6")
    assert f"- drop {expected} nats/token, bound" in text


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (999, "999 B"),
        (999_999, "1.000 MB"),
        (98_234_567, "98.23 MB"),
        (1_234_567_890, "1.235 GB"),
        (2_345_678_901_234_567, "2,346 TB"),
        (None, "n/a"),
    ],
)
def test_bytes(small: RunRecord, stored: int | None, expected: str) -> None:
    text = plain(summary(replace(small, size=replace(small.size, folder_bytes=stored))))
    assert f"; model folder {expected}\n" in text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0634, "0.063 s"),
        (59.96, "1 min 00 s"),
        (611.4, "10 min 11 s"),
        (3599.9, "1 h 00 min"),
    ],
)
def test_times(small: RunRecord, seconds: float, expected: str) -> None:
    stages = (StageTime(name="load", seconds=seconds, resumed=False),)
    assert f"- time {expected}, peak" in plain(summary(replace(small, stages=stages)))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.02, "0.02"),
        (1e-5, "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (2.5e-5, "2.5\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (40000.0, "40,000"),
    ],
)
def test_chosen_numbers_keep_their_digits(small: RunRecord, budget: float, expected: str) -> None:
    assert f", budget {expected}; 65,408 items, 511" in summary(judged(small, max_drop=budget))


@pytest.mark.parametrize(("confidence", "expected"), [(0.95, "95 %"), (0.999, "99.9 %")])
def test_levels_keep_their_digits(small: RunRecord, confidence: float, expected: str) -> None:
    assert f"With {expected} confidence" in plain(summary(judged(small, confidence=confidence)))


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (0.00099996, "0.00100"),
        (1234567.0, "1.23\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT SIX}"),
    ],
)
def test_significant_digits(small: RunRecord, price: float, expected: str) -> None:
    first = replace(small.trials[0], expected=price)
    record = replace(small, trials=(first,), corrections={"keep": 1.0})
    assert parsed(record).tables["trials"].texts("expected") == [expected]


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


def test_provenance_shows_every_hash(page: Page, record: RunRecord) -> None:
    table = page.tables["provenance"]
    shown = dict(zip(table.texts("what"), table.texts("value"), strict=True))
    assert shown["data_sha256, certify"] == "7e" * 32 and shown["model_sha256"] == "c4" * 32
    assert shown["torch"] == "2.13.0" and shown["transformers"] == "5.22.2"
    assert "https://huggingface.co/HuggingFaceTB/SmolLM2-135M" in page.words


def test_summary_has_the_numbers(record: RunRecord) -> None:
    text = plain(summary(record))
    assert text.startswith("CERTIFIED: SmolLM2-135M")
    for part in (
        "0.0147 \N{PLUS-MINUS SIGN} 0.0019 nats/token",
        "bound 0.0178",
        "budget 0.02",
        "511 clusters",
        "2.95 times smaller",
        "23 min 27 s",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 20


def test_many_notes_are_counted_in_the_summary(small: RunRecord) -> None:
    notes = tuple(f"note {k}" for k in range(9))
    text = summary(replace(small, notes=notes, trials=()))
    assert "- note (run): note 4\n" in text and "note 5" not in text
    assert "- 4 more notes in report.html" in text or "- 5 more notes in report.html" in text
