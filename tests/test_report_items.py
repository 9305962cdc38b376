"""The report's items that changed: counts and shares worked out by hand, caps that say what they
leave out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from curvprune.report import build, items, sections

from .test_report import (
    HOSTILE,
    WRONG,
    Page,
    hostile,
    parsed,
    paths,
    replaced,
    synthetic_record,
    visible,
)

NOT_A_NUMBER = re.compile(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])")


def languages() -> dict[str, Any]:
    """Five items of two documents; rises 0.5, -0.25, 0, 1, 0.125 over 4, 8, 2, 1 and 8
    positions."""
    return {
        "documents": ["first", "second"],
        "document": [0, 0, 1, 1, 1],
        "index": [0, 1, 2, 4, 5],
        "count": [4, 8, 2, 1, 8],
        "before": [2.0, 3.0, 1.0, 1.5, 2.0],
        "after": [2.5, 2.75, 1.0, 2.5, 2.125],
    }


def images(n: int = 6) -> dict[str, Any]:
    """Right before: 1 1 0 1 0 0; right after: 1 0 1 0 0 1; then items that stay right."""
    more = n - 6
    return {
        "documents": [f"image {k}" for k in range(n)],
        "document": list(range(n)),
        "index": list(range(n)),
        "count": [1] * n,
        "before": [0.1, 0.2, 0.9, 0.3, 2.0, 1.0, *[0.1] * more],
        "after": [0.1, 1.2, 0.4, 2.3, 2.5, 0.2, *[0.1] * more],
        "right_before": [1, 1, 0, 1, 0, 0, *[1] * more],
        "right_after": [1, 0, 1, 0, 0, 1, *[1] * more],
    }


def column(table: sections.Table, label: str) -> list[Any]:
    at = [c.label for c in table.columns].index(label)
    return [row[at].text for row in table.rows]


def section(record: dict[str, Any]) -> str:
    words = parsed(record).words
    return words[words.index("Items that changed") : words.index("weights before")]


@pytest.fixture
def record() -> dict[str, Any]:
    return synthetic_record(blocks=1)


def test_losses_are_ranked_per_position_and_weighed_by_positions(record: dict[str, Any]) -> None:
    shown = items.changed(record | {"items": languages()})
    assert column(shown["rises"], "item") == ["4", "0", "5"] and column(shown["falls"], "item") == [
        "1"
    ]
    assert column(shown["rises"], "rise") == ["1.00", "0.500", "0.125"]
    assert column(shown["rises"], "positions") == ["1", "4", "8"] and shown["flips"] is None
    facts = {fact.label: fact.value for fact in shown["facts"]}
    # In nats the rises are 2, 1 and 1; five per cent of five items are one item, rounded up.
    assert list(facts.values()) == [3, 1, 0.5]
    table, left_out = shown["documents"]
    # (4 x 0.5 - 8 x 0.25) / 12 = 0 and (1 + 1) / 11.
    assert left_out == 0 and column(table, "document") == ["second", "first"]
    assert [row[5].sort for row in table.rows] == pytest.approx([2 / 11, 0.0])
    assert [row[3].sort for row in table.rows] == pytest.approx([(2 + 1.5 + 16) / 11, 32 / 12])
    assert column(table, "positions") == ["11", "12"] and column(table, "items") == ["3", "2"]
    words = section(record | {"items": languages()})
    assert (
        "got worse3of 5" in words
        and "got better1items" in words
        and "worst 5 %50 %of the total rise" in words
    )


def test_flipped_items_are_counted_and_listed(record: dict[str, Any]) -> None:
    shown = items.changed(record | {"items": images()})
    facts = [fact.value for fact in shown["facts"]]
    assert facts[:4] == [2, 2, 3, 2] and shown["documents"] is None
    table, left_out = shown["flips"]
    assert left_out == 0 and column(table, "item") == ["3", "1", "5", "2"]
    assert column(table, "change") == ["right → wrong"] * 2 + ["wrong → right"] * 2
    assert "positions" not in [c.label for c in table.columns]
    assert "own answer" not in section(record | {"items": images()})
    assert "own answer" in section(record | {"items": images(), "objective": "label-free"})


def test_a_cap_says_what_it_leaves_out(record: dict[str, Any]) -> None:
    found = images(80)
    found["right_after"][6:56] = [0] * 50  # 52 right to wrong in all
    found["after"][6:56] = [0.5 + 0.01 * k for k in range(50)]
    table, left_out = items.changed(record | {"items": found})["flips"]
    assert len(table.rows) == 22 and left_out == 32
    assert column(table, "change").count("right → wrong") == 20 and column(table, "item")[:3] == [
        "3",
        "1",
        "55",
    ]
    words = section(record | {"items": found})
    assert "right → wrong52items" in words and "32 more are left out here" in words
    many = languages()
    many |= {key: many[key] * 60 for key in ("count", "before", "after")}
    many |= {
        "documents": [f"d{k}" for k in range(150)],
        "document": [k // 2 for k in range(300)],
        "index": list(range(300)),
    }
    assert "50 documents with smaller rises are left out here" in section(record | {"items": many})


def test_nothing_changed_is_said(record: dict[str, Any]) -> None:
    same = images() | {"after": images()["before"], "right_after": images()["right_before"]}
    words = section(record | {"items": same})
    assert (
        "No item got worse." in words and "No item got better." in words and "worst 5 %n/a" in words
    )
    assert items.changed(record | {"items": same})["flips"][0].rows == []


@pytest.mark.parametrize("found", [languages(), images()], ids=["losses", "flips"])
def test_wrong_values_render_anywhere(record: dict[str, Any], found: dict[str, Any]) -> None:
    bare = {"items": found, "objective": "classification"}
    for k, path in enumerate(paths(bare)):
        for value in WRONG if len(path) < 3 else [WRONG[k % len(WRONG)]]:
            text = visible(build(replaced(bare, path, value)))
            assert not NOT_A_NUMBER.search(text.replace("None on record", "")), (path, value)
        if isinstance(path[-1], str) and path[0] == "items":
            build(replaced(bare, path, None, delete=True))
    shorter = found | {"after": found["after"][:-1]}
    assert "the columns of 'items' differ in length" in parsed({"items": shorter}).words


def test_items_without_numbers_do_not_count(record: dict[str, Any]) -> None:
    found = images()
    found["count"][3], found["after"][4], found["document"][5] = 0, None, 77
    read = items.read({"items": found})
    assert [item.index for item in read] == [0, 1, 2, 5] and read[-1].document == "n/a"


def test_documents_are_escaped(record: dict[str, Any]) -> None:
    page: Page = parsed(hostile(record | {"items": images()}))
    assert [t for t, _ in page.tags].count("script") == 1 and "http://evil.example" in page.words
    page = parsed(record | {"items": languages() | {"documents": [HOSTILE, "<b>x</b>"]}})
    assert "<b>x</b>" in page.words and [t for t, _ in page.tags].count("img") == 0
