"""The report on removed units: totals and shares worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from curvprune.record import CutRecord, RunRecord
from curvprune.report import summary

from .page import assert_harmless, parsed, plain
from .records import HOSTILE, REMOVED, language_model


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return replace(language_model(blocks=1), structured=REMOVED)


def test_totals_by_kind_and_every_cut(record: RunRecord) -> None:
    page = parsed(record)
    kinds = page.tables["kinds"]
    assert kinds.texts("kind") == ["mlp", "heads"] and kinds.sorts("cuts") == [2, 1]
    assert kinds.sorts("units before") == [80, 4] and kinds.sorts("left") == [40, 4]
    assert kinds.sorts("removed") == [40, 0] and kinds.sorts("share left") == [0.5, 1.0]
    cuts = page.tables["cuts"]
    assert cuts.texts("cut") == ["a.mlp", "b.mlp", "a.attn"]
    assert cuts.texts("kind") == ["mlp", "mlp", "heads"]
    assert cuts.sorts("removed") == [10, 30, 0] and cuts.sorts("share left") == [0.75, 0.25, 1]
    bars = [a["width"] for t, a in page.tags if t == "rect" and a.get("height") == "8"]
    assert {"90", "30"} <= set(bars)  # three quarters and a quarter of 120
    section = plain(page.section("Removed units", "Predicted against measured"))
    for text in (
        "multiply-adds after1,250-37.5 %",
        "parameters after700-12.5 %",
        "0.0123 \N{PLUS-MINUS SIGN} 0.0021nats/token",
    ):
        assert text in section, text
    assert "latency" not in section


def test_latency_is_shown_where_it_was_measured(record: RunRecord) -> None:
    timed = replace(record, structured=replace(REMOVED, latency_seconds=(0.2, 0.25)))
    facts = parsed(timed).facts
    assert plain(facts["latency before"]) == "0.20 s"
    assert plain(facts["latency after"]) == "0.25 s+25.0 %"


def test_one_line_in_the_summary(record: RunRecord) -> None:
    assert (
        "- units removed first: 40 of 80 of mlp, 0 of 4 of heads, multiply-adds -37.5 %, "
        "parameters -12.5 %, predicted cost 0.0123 \N{PLUS-MINUS SIGN} 0.0021 nats/token\n"
    ) in plain(summary(record))
    unpriced = replace(record, structured=replace(REMOVED, predicted=None, predicted_stderr=None))
    assert "predicted cost" not in summary(unpriced) and "not priced" in parsed(unpriced).words
    whole = replace(record, structured=None)
    assert "removed first" not in summary(whole) and "Removed units" not in parsed(whole).words


def test_cuts_are_escaped(record: RunRecord) -> None:
    cuts = {**REMOVED.cuts, HOSTILE: CutRecord(kind=HOSTILE, left=1, of=2)}
    hostile = replace(record, structured=replace(REMOVED, cuts=cuts))
    page = parsed(hostile)
    assert_harmless(page)
    assert "http://evil.example" in page.section("Removed units", "Predicted against measured")
    lines = [line for line in summary(hostile).splitlines() if "removed first" in line]
    assert len(lines) == 1 and "\x1b" not in lines[0]
