"""The report: true to the record, safe against what the record contains, one file that loads
nothing."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace

import pytest

from curvprune.record import Alternative, Attempt, LimitUse, OtherRun, RunRecord, StageTime
from curvprune.report import build, summary

from .page import (
    NOT_A_NUMBER,
    Page,
    assert_harmless,
    contrast,
    number,
    parsed,
    plain,
    visible,
)
from .records import (
    HOSTILE,
    as_accuracy,
    everything,
    judged,
    language_model,
    numbers_as,
    poisoned,
    two_classifiers,
    without_verdict,
)


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return language_model()


@pytest.fixture(scope="module")
def page(record: RunRecord) -> Page:
    return parsed(record)


@pytest.fixture(scope="module")
def small() -> RunRecord:
    return language_model(blocks=1)


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


# Safety


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


# Where it comes from, and in a few lines


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
