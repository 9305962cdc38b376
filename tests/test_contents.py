"""Items that a model cannot tell apart are the same, however they are written; others are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvprune.model import Split, Splits, as_split, collate, content_of, itemize, joined

TOKENS = torch.tensor([[5, 9, 2, 7]])
PADDED = torch.tensor([[5, 9, 2, 7, 0, 0]])
PLAIN = {"input_ids": TOKENS}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0]])
IMAGE = torch.arange(12.0).reshape(1, 3, 2, 2)

SAME_TEXT: dict[str, dict[str, Any]] = {
    "mask of ones": {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},
    "mask of booleans": {"input_ids": TOKENS, "attention_mask": TOKENS > 0},
    "mask of floats": {"input_ids": TOKENS, "attention_mask": torch.ones(1, 4)},
    "int32": {"input_ids": TOKENS.int()},
    "None": {"input_ids": TOKENS, "labels": None, "attention_mask": None},
    "labels that are the tokens": {"input_ids": TOKENS, "labels": TOKENS.clone()},
    "labels without the first": {
        "input_ids": TOKENS,
        "labels": torch.tensor([[-100, 9, 2, 7]]),
    },
    "padded": {"input_ids": PADDED, "attention_mask": MASK},
    "padded with other tokens": {
        "input_ids": torch.tensor([[5, 9, 2, 7, 3, 3]]),
        "attention_mask": MASK,
    },
    "padded on the left": {
        "input_ids": torch.tensor([[0, 0, 5, 9, 2, 7]]),
        "attention_mask": MASK.flip(1),
    },
    "padded, with labels": {
        "input_ids": PADDED,
        "attention_mask": MASK,
        "labels": torch.where(MASK == 1, PADDED, -100),
    },
    "padded, said by the labels alone": {
        "input_ids": PADDED,
        "labels": torch.where(MASK == 1, PADDED, -100),
    },
    "one segment, positions in order": {
        "input_ids": TOKENS,
        "token_type_ids": torch.zeros_like(TOKENS),
        "position_ids": torch.arange(4)[None],
    },
}


@pytest.mark.parametrize("name", SAME_TEXT)
def test_the_same_text_however_written(name: str) -> None:
    assert content_of(SAME_TEXT[name]).whole == content_of(PLAIN).whole
    assert content_of(SAME_TEXT[name]).inputs & content_of(PLAIN).inputs


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": torch.tensor([[5, 9, 2, 8]])},
        {"input_ids": PADDED},
        {"input_ids": TOKENS, "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": TOKENS, "labels": torch.tensor([[5, 9, 2, 3]])},
        {"input_ids": TOKENS, "labels": torch.tensor([1])},
        {"input_ids": TOKENS, "token_type_ids": torch.ones_like(TOKENS)},
        {"input_ids": TOKENS[:, [1, 0, 2, 3]]},
    ],
)
def test_another_text(other: dict[str, torch.Tensor]) -> None:
    assert content_of(other).whole != content_of(PLAIN).whole


def test_images_and_pairs() -> None:
    label = torch.tensor([3])
    pair = content_of((IMAGE, label))
    same = (
        {"pixel_values": IMAGE, "labels": label.int()},
        {"pixel_values": IMAGE.double(), "label": label, "pixel_mask": torch.ones(1, 2, 2)},
    )
    for item in same:
        assert content_of(item).whole == pair.whole
    other_label = content_of((IMAGE, torch.tensor([4])))
    assert other_label.whole != pair.whole and other_label.inputs == pair.inputs
    assert content_of({"pixel_values": IMAGE}).inputs == pair.inputs
    assert content_of((IMAGE + 1, label)).inputs.isdisjoint(pair.inputs)
    assert content_of((-0.0 * IMAGE, label)).whole == content_of((0.0 * IMAGE, label)).whole


def test_items_without_any_label_that_counts_are_not_all_the_same() -> None:
    ignored = torch.full_like(TOKENS, -100)
    one = content_of({"input_ids": TOKENS, "labels": ignored})
    two = content_of({"input_ids": TOKENS + 1, "labels": ignored})
    assert one.whole != two.whole and one.inputs.isdisjoint(two.inputs)
    masked = torch.zeros_like(TOKENS)
    one = content_of({"input_ids": TOKENS, "attention_mask": masked})
    assert one.whole != content_of({"input_ids": TOKENS + 1, "attention_mask": masked}).whole


@pytest.mark.parametrize("way", ["mask in certify", "mask in calibrate", "batch in certify"])
def test_a_leak_is_found_in_either_direction_behind_a_mask(way: str) -> None:
    short, long = {"input_ids": TOKENS}, {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
    padded = itemize([collate([short, long])])
    masked = [{**item, "attention_mask": torch.ones_like(item["input_ids"])} for item in (short,)]
    plain, hidden = {
        "mask in certify": ([short], masked),
        "mask in calibrate": (masked, [short]),
        "batch in certify": ([short], padded[:1]),
    }[way]
    fresh = as_split([{"input_ids": torch.tensor([[8, 8, 8]])}])
    splits = Splits(
        calibrate=as_split(plain), price=fresh, select=fresh, certify=as_split([*hidden, long])
    )
    assert (splits.leak() or "").startswith("1 of the 2 items of the certify split")
    assert as_split([long]).leak(splits.calibrate.digests()) is None


def test_labels_that_ignore_the_end_do_not_hide_a_leak() -> None:
    labelled = {"input_ids": TOKENS, "labels": torch.tensor([[5, 9, 2, -100]])}
    for seen, certify in ((PLAIN, labelled), (labelled, PLAIN)):
        assert as_split([certify]).leak(as_split([seen]).digests()) is not None


def test_clusters_are_joined_documents_and_equal_items() -> None:
    items = [{"input_ids": torch.tensor([[n]])} for n in (1, 2, 2, 3, 4, 1)]
    split = Split(items=tuple(items), documents=("a", "a", "b", "c", "d", "e"))
    assert split.clusters().tolist() == [0, 0, 0, 1, 2, 0]
    assert split.copies().tolist() == [0, 1, 1, 2, 3, 0]
    assert joined([3, 1, 3, 2]).tolist() == [0, 1, 0, 2]
    assert joined(list("abcd"), [1, 1, 2, 2], [0, 9, 9, 7]).tolist() == [0, 0, 0, 0]


def test_one_item_many_times_is_told_before_anything_runs() -> None:
    many, fresh = as_split([PLAIN] * 30), as_split([{"input_ids": TOKENS + 1}, PLAIN])
    splits = Splits(calibrate=fresh, price=fresh, select=fresh, certify=many)
    assert "30 items of the certify split are one cluster" in (splits.too_few() or "")
