"""The report on removed units: totals and shares worked out by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from curvprune.report import build, removed, summary

from .test_report import HOSTILE, WRONG, parsed, paths, replaced, synthetic_record, visible


@pytest.fixture
def record() -> dict[str, Any]:
    structured = {
        "cuts": {
            "a.mlp": {"kind": "mlp", "left": 30, "of": 40},
            "b.mlp": {"kind": "mlp", "left": 10, "of": 40},
            "a.attn": {"kind": "heads", "left": 4, "of": 4},
        },
        "multiply-adds": [2000, 1250],
        "parameters": [800, 700],
        "predicted": 0.0123,
        "predicted_stderr": 0.0021,
        "notes": ["40 units of 3 cuts were removed first"],
    }
    return synthetic_record(blocks=1) | {"structured": structured}


def test_totals_by_kind_and_every_cut(record: dict[str, Any]) -> None:
    shown = removed.removed(record)
    kinds = [
        [c.sort if c.sort is not None else str(c.text) for c in row[:6]]
        for row in shown["kinds"].rows
    ]
    assert kinds == [["mlp", 2, 80, 40, 40, 0.5], ["heads", 1, 4, 4, 0, 1.0]]
    cuts = [
        [c.sort if c.sort is not None else str(c.text) for c in row[:6]]
        for row in shown["cuts"].rows
    ]
    assert cuts == [
        ["a.mlp", "mlp", 40, 30, 10, 0.75],
        ["b.mlp", "mlp", 40, 10, 30, 0.25],
        ["a.attn", "heads", 4, 4, 0, 1],
    ]
    assert 'width="30"' in str(shown["cuts"].rows[1][6].text)  # a quarter of 120
    words = parsed(record).words
    section = words[words.index("Removed units") : words.index("Predicted against measured")]
    for text in (
        "1,250\N{MINUS SIGN}37.5 %",
        "700\N{MINUS SIGN}12.5 %",
        "0.0123 \N{PLUS-MINUS SIGN} 0.0021nats/token",
    ):
        assert text in section, text


def test_one_line_in_the_summary(record: dict[str, Any]) -> None:
    line = next(line for line in summary(record).splitlines() if "removed first" in line)
    assert line.replace("\N{NO-BREAK SPACE}", " ") == (
        "- units removed first: 40 of 80 of mlp, 0 of 4 of heads, multiply-adds \N{MINUS SIGN}37.5 %, "
        "parameters \N{MINUS SIGN}12.5 %, predicted cost 0.0123 \N{PLUS-MINUS SIGN} 0.0021 nats/token"
    )
    del record["structured"]["predicted"]
    assert "predicted cost" not in removed.line(record) and "not priced" in parsed(record).words
    del record["structured"]
    assert "removed first" not in summary(record) and "Removed units" not in parsed(record).words


def test_wrong_values_render_anywhere(record: dict[str, Any]) -> None:
    bare = {"structured": record["structured"]}
    for k, path in enumerate(paths(bare)):
        for value in WRONG if len(path) < 3 else [WRONG[k % len(WRONG)]]:
            changed = replaced(bare, path, value)
            text = visible(build(changed)).replace("None on record", "")
            assert not re.search(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])", text), (
                path,
                value,
            )
            summary(changed)
        if isinstance(path[-1], str):
            summary(replaced(bare, path, None, delete=True))
            build(replaced(bare, path, None, delete=True))
    assert (
        "not available: 'structured' has no cut with units"
        in parsed({"structured": {"cuts": {}}}).words
    )


def test_cuts_are_escaped(record: dict[str, Any]) -> None:
    record["structured"]["cuts"][HOSTILE] = {"kind": HOSTILE, "left": 1, "of": 2}
    page = parsed(record)
    assert [t for t, _ in page.tags].count("script") == 1 and [t for t, _ in page.tags].count(
        "img"
    ) == 0
    assert "\n" not in removed.line(record).strip() and "\x1b" not in summary(record)
