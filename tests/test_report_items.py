"""The report's items that changed: counts and shares worked out by hand, caps that say what they
leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from curvprune.record import ItemColumns, RunRecord

from .page import Page, assert_harmless, parsed, plain
from .records import HOSTILE, language_model

RIGHT_TO_WRONG = "right \N{RIGHTWARDS ARROW} wrong"
WRONG_TO_RIGHT = "wrong \N{RIGHTWARDS ARROW} right"

# Rises 0.5, -0.25, 0, 1, 0.125 over 4, 8, 2, 1 and 8 positions.
TEXTS = ItemColumns(
    documents=("first", "second"),
    document=(0, 0, 1, 1, 1),
    index=(0, 1, 2, 4, 5),
    count=(4, 8, 2, 1, 8),
    before=(2.0, 3.0, 1.0, 1.5, 2.0),
    after=(2.5, 2.75, 1.0, 2.5, 2.125),
)


def images(n: int = 6) -> ItemColumns:
    """Right before: 1 1 0 1 0 0; right after: 1 0 1 0 0 1; then items that stay right."""
    more = n - 6
    return ItemColumns(
        documents=tuple(f"image {k}" for k in range(n)),
        document=tuple(range(n)),
        index=tuple(range(n)),
        count=(1,) * n,
        before=(0.1, 0.2, 0.9, 0.3, 2.0, 1.0, *[0.1] * more),
        after=(0.1, 1.2, 0.4, 2.3, 2.5, 0.2, *[0.1] * more),
        right_before=(1, 1, 0, 1, 0, 0, *[1] * more),
        right_after=(1, 0, 1, 0, 0, 1, *[1] * more),
    )


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return language_model(blocks=1)


def shown(record: RunRecord, items: ItemColumns, *, objective: str = "classification") -> Page:
    return parsed(replace(record, items=items, objective=objective))


def section(page: Page) -> str:
    return plain(page.section("Items that changed", "weights before"))


def test_losses_are_ranked_per_position_and_weighed_by_positions(record: RunRecord) -> None:
    page = shown(record, TEXTS)
    rises, documents = page.tables["rises"], page.tables["documents"]
    assert rises.texts("item") == ["4", "0", "5"]
    assert page.tables["falls"].texts("item") == ["1"]
    assert rises.texts("rise") == ["1.00", "0.500", "0.125"]
    assert rises.texts("positions") == ["1", "4", "8"] and "flips" not in page.tables
    # (4 x 0.5 - 8 x 0.25) / 12 = 0 and (1 + 1) / 11.
    assert documents.texts("document") == ["second", "first"]
    assert documents.sorts("rise") == pytest.approx([2 / 11, 0.0])
    assert documents.sorts("before") == pytest.approx([(2 + 1.5 + 16) / 11, 32 / 12])
    assert documents.texts("positions") == ["11", "12"]
    assert documents.texts("items") == ["3", "2"]
    # In nats the rises are 2, 1 and 1; five per cent of five items are one item, rounded up.
    words = section(page)
    assert "got worse3of 5" in words and "got better1items" in words
    assert "worst 5 %50 %of the total rise" in words


def test_flipped_items_are_counted_and_listed(record: RunRecord) -> None:
    page = shown(record, images())
    assert page.facts[RIGHT_TO_WRONG] == page.facts[WRONG_TO_RIGHT] == "2items"
    assert page.facts["got worse"] == "3of 6" and page.facts["got better"] == "2items"
    assert "documents" not in page.tables
    flips = page.tables["flips"]
    assert flips.texts("item") == ["3", "1", "5", "2"]
    assert flips.texts("change") == [RIGHT_TO_WRONG] * 2 + [WRONG_TO_RIGHT] * 2
    assert "positions" not in flips.columns
    assert "own answer" not in section(page)
    assert "own answer" in section(shown(record, images(), objective="label-free"))


def test_a_cap_says_what_it_leaves_out(record: RunRecord) -> None:
    many = images(80)
    assert many.right_after is not None
    # 52 right to wrong in all.
    right = (*many.right_after[:6], *[0] * 50, *many.right_after[56:])
    after = (*many.after[:6], *(0.5 + 0.01 * k for k in range(50)), *many.after[56:])
    page = shown(record, replace(many, right_after=right, after=after))
    flips = page.tables["flips"]
    assert len(flips.rows) == 22 and flips.texts("change").count(RIGHT_TO_WRONG) == 20
    assert flips.texts("item")[:3] == ["3", "1", "55"]
    assert page.facts[RIGHT_TO_WRONG] == "52items"
    assert "32 more are left out here" in section(page)


def test_many_documents_are_cut_to_the_largest_rises(record: RunRecord) -> None:
    many = ItemColumns(
        documents=tuple(f"d{k}" for k in range(150)),
        document=tuple(k // 2 for k in range(300)),
        index=tuple(range(300)),
        count=TEXTS.count * 60,
        before=TEXTS.before * 60,
        after=TEXTS.after * 60,
    )
    page = shown(record, many)
    assert "50 documents with smaller rises are left out here" in section(page)
    rises = [rise or 0.0 for rise in page.tables["documents"].sorts("rise")]
    assert len(rises) == 100 and rises == sorted(rises, reverse=True)


def test_nothing_changed_is_said(record: RunRecord) -> None:
    same = replace(images(), after=images().before, right_after=images().right_before)
    page = shown(record, same)
    words = section(page)
    assert "No item got worse." in words and "No item got better." in words
    assert "worst 5 %n/a" in words and "flips" not in page.tables
    assert page.facts[RIGHT_TO_WRONG] == page.facts[WRONG_TO_RIGHT] == "0items"


def test_documents_are_escaped(record: RunRecord) -> None:
    page = shown(record, replace(TEXTS, documents=(HOSTILE, "<b>x</b>")))
    assert_harmless(page)
    assert "<b>x</b>" in page.words and "http://evil.example" in page.words
