"""The record of a run as JSON and back, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from curvprune.record import RunRecord

from .records import analysed, everything, judged, language_model, without_verdict


@pytest.fixture(scope="module")
def small() -> RunRecord:
    return language_model(blocks=1)


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
