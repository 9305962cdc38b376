"""Splits share nothing, padding is described by masks, and sources are what they say."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from curvprune.model import (
    PURPOSES,
    Batch,
    Split,
    Splits,
    as_split,
    collate,
    itemize,
    split_items,
)
from curvprune.run import DIGITS_TRAINING, digits, digits_splits, python_docs, text_splits


def test_collate_pads_on_the_right_and_says_so():
    items = [
        {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])},
        {"input_ids": torch.tensor([[4]]), "labels": torch.tensor([[4]])},
    ]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert items[1]["input_ids"].shape == (1, 1), "items must not change"


def test_itemize_undoes_batches_of_both_kinds():
    pairs = [
        (torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 2])),
        (torch.ones(1, 2), torch.tensor([3])),
    ]
    items = itemize(pairs)
    assert len(items) == 4 and items[2][0].tolist() == [[4, 5]] and items[3][1].tolist() == [3]
    dicts = itemize([{"x": torch.arange(4).reshape(2, 2), "labels": torch.tensor([5, 6])}])
    assert [d["labels"].tolist() for d in dicts] == [[5], [6]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [(torch.ones(1, 2), torch.ones(1)), (torch.ones(1, 3), torch.ones(1))],
            "inputs of one shape",
        ),
        ([{"x": torch.ones(1, 2)}, {"y": torch.ones(1, 2)}], "same keys"),
        ([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}], "'x' has different shapes"),
    ],
)
def test_items_that_cannot_be_batched(items, message):
    with pytest.raises(ValueError, match=message):
        collate(items)


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match="data is empty"):
        itemize([])
    with pytest.raises(ValueError, match="a batch without tensors"):
        itemize([{}])
    with pytest.raises(ValueError, match="at least 16"):
        split_items([(torch.ones(5, 2), torch.zeros(5))], seed=0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": torch.zeros(2, 3), "use_cache": False},
            "'use_cache' is a bool; expected a tensor",
        ),
        (
            {"input_ids": torch.zeros(2, 3), "text": ["a", "b"]},
            "'text' is a list of str; expected a tensor",
        ),
        (
            {"input_ids": torch.zeros(2, 3), "step": torch.tensor(4)},
            "'step' is a number; expected a tensor",
        ),
        (
            {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(3)},
            r"numbers of items, \{'input_ids': 2, 'labels': 3\}",
        ),
        ((torch.zeros(2, 3), torch.zeros(3)), r"2 inputs with targets of shape \(3,\)"),
        ((torch.zeros(2, 3), torch.tensor(1)), r"2 inputs with targets of shape \(\)"),
    ],
)
def test_nothing_in_a_batch_is_silently_dropped(batch, message):
    with pytest.raises(ValueError, match=message):
        itemize([batch])


def test_entries_that_are_none_are_as_good_as_absent():
    (item,) = itemize([{"input_ids": torch.zeros(1, 3), "labels": None}])
    assert item.keys() == {"input_ids"}


def parts_of(splits: Splits) -> list[Split]:
    """The splits of the four purposes, in order."""
    return [getattr(splits, purpose) for purpose in PURPOSES]


def items_of(splits: Splits) -> list[Batch]:
    """The items of all four purposes."""
    return list(chain.from_iterable(part.items for part in parts_of(splits)))


def documents_of(splits: Splits) -> list[str]:
    """The documents of all four purposes, each split's once."""
    return list(chain.from_iterable(set(part.documents) for part in parts_of(splits)))


def random_documents(count: int = 30) -> dict[str, list[int]]:
    """Documents of 40 to 900 random tokens."""
    rng, documents = np.random.default_rng(0), {}
    for i in range(count):
        documents[f"d{i}"] = rng.integers(0, 100, size=rng.integers(40, 900)).tolist()
    return documents


def test_split_items_deals_every_item_once():
    data = [(torch.arange(30.0)[:, None], torch.zeros(30, dtype=torch.long))]
    splits = split_items(data, seed=1)
    assert [len(part.items) for part in parts_of(splits)] == [7, 4, 4, 15]
    assert sorted(float(item[0]) for item in items_of(splits)) == list(range(30))
    assert splits.calibrate.sha256() == split_items(data, seed=1).calibrate.sha256()
    assert splits.calibrate.sha256() != split_items(data, seed=2).calibrate.sha256()


def test_split_items_deals_whole_documents_where_they_are_known():
    rng = np.random.default_rng(0)
    names: list[str] = []
    for i in range(40):
        names += [f"d{i}"] * int(rng.integers(1, 6))
    items = tuple((torch.tensor([[float(i)]]), torch.zeros(1)) for i in range(len(names)))
    splits = split_items(Split(items=items, documents=tuple(names)), seed=0)
    parts = parts_of(splits)
    assert sorted(documents_of(splits)) == sorted(set(names)), "every document in exactly one split"
    for part in parts:
        for item, name in zip(part.items, part.documents, strict=True):
            assert names[int(item[0])] == name
    shares = [len(part.items) / len(names) for part in parts]
    assert shares == pytest.approx([0.25, 0.125, 0.125, 0.5], abs=0.06)
    with pytest.raises(ValueError, match="20 items in 2 documents"):
        split_items(Split(items=items[:20], documents=("a",) * 10 + ("b",) * 10), seed=0)


def test_a_certify_split_that_repeats_items_is_told():
    item = [(torch.full((1, 2), float(i)), torch.tensor([i])) for i in range(8)]

    def splits(certify: list) -> Splits:
        parts = {"calibrate": item[:2], "price": item[2:3], "select": item[3:5]}
        return Splits(**{p: as_split(v) for p, v in parts.items()}, certify=as_split(certify))

    assert splits(item[5:]).leak() is None
    leak = splits([item[4], *item[5:], item[0]]).leak()
    assert leak is not None and leak.startswith(
        "2 of the 5 items of the certify split have also made"
    )


def test_text_splits_keep_one_of_equal_documents():
    documents = {f"d{i}": [i % 10] * 64 for i in range(40)}
    counts = dict.fromkeys(PURPOSES, 2)
    splits = text_splits(documents, length=64, counts=counts, seed=0)
    assert splits.leak() is None
    assert len({int(item["input_ids"][0, 0]) for item in items_of(splits)}) == 8


def test_text_splits_share_no_document_and_spread_over_documents():
    documents = random_documents()
    counts = {"calibrate": 12, "price": 6, "select": 10, "certify": 25}
    splits = text_splits(documents, length=64, counts=counts, seed=0)
    parts = parts_of(splits)
    assert [len(p.items) for p in parts] == list(counts.values())
    names = documents_of(splits)
    assert len(names) == len(set(names)) > 25, "no document in two splits, and nearly all take part"
    for part in parts:
        for item, name in zip(part.items, part.documents, strict=True):
            window = item["input_ids"][0].tolist()
            assert 32 <= len(window) <= 64
            text = documents[name]
            assert any(text[i : i + len(window)] == window for i in range(0, len(text), 64))


def test_items_to_recover_on_are_a_split_of_their_own():
    documents = random_documents()
    counts = {"calibrate": 8, "price": 6, "select": 6, "certify": 20}
    without = text_splits(documents, length=64, counts={**counts, "recover": 0}, seed=0)
    assert without.recover is None and without.training is without.calibrate
    assert without.sha256() == text_splits(documents, length=64, counts=counts, seed=0).sha256()
    with pytest.raises(ValueError, match=r"recover [0-9]+ of 900"):
        text_splits(documents, length=64, counts={**counts, "recover": 900}, seed=0)


def test_items_to_recover_on_are_all_of_their_documents():
    documents = random_documents()
    counts = {"calibrate": 8, "price": 6, "select": 6, "certify": 20, "recover": 30}
    splits = text_splits(documents, length=64, counts=counts, seed=0)
    recover = splits.recover
    assert recover is not None and splits.training is recover
    # Every window of theirs that is long enough, cut by hand.
    every: list[list[int]] = []
    for name in set(recover.documents):
        windows = torch.tensor(documents[name]).split(64)
        every += [window.tolist() for window in windows if len(window) >= 32]
    assert sorted(item["input_ids"][0].tolist() for item in recover.items) == sorted(every)
    assert len(every) > 30 and len(set(recover.documents[:5])) == 5, "in turn"
    assert not set(documents_of(splits)) & set(recover.documents)
    assert splits.sha256().keys() == {*PURPOSES, "recover"}
    assert splits.leak() is None
    repeated = replace(splits, recover=Split(items=splits.certify.items[:3], documents=("a",) * 3))
    leak = repeated.leak()
    assert leak is not None and leak.startswith("3 of the 20 items")


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(
        ValueError, match=r"only 2 sequences of 64 tokens in 2 documents: .*select 0 of 4"
    ):
        counts = {"calibrate": 1, "price": 1, "select": 4, "certify": 1}
        text_splits(
            {"a": list(range(64)), "b": list(range(1, 65)), "c": list(range(64))},
            length=64,
            counts=counts,
            seed=0,
        )


def test_python_docs_share_no_paragraph():
    documents = python_docs()
    assert len(documents) > 50
    seen: dict[str, str] = {}
    for name, text in documents.items():
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= 80:
                assert key not in seen, f"{name} and {seen.get(key)} share: {key[:60]}"
                seen[key] = name


def test_digits_splits_are_fresh_and_disjoint():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8) and float(images.min()) >= 0 and float(images.max()) == 1
    counts = {"calibrate": 50, "price": 20, "select": 60, "certify": 70}
    splits = digits_splits(counts=counts, seed=3)
    indices = [int(name.split()[1]) for name in documents_of(splits)]
    assert len(set(indices)) == 200 and min(indices) >= DIGITS_TRAINING
    item = splits.certify.items[0]
    index = int(splits.certify.documents[0].split()[1])
    assert torch.equal(item["pixel_values"][0], images[index])
    assert int(item["labels"]) == int(labels[index])
    more = digits_splits(counts={**counts, "recover": 30}, seed=3)
    assert more.sha256() == {**splits.sha256(), "recover": more.recover.sha256()}
    assert not set(documents_of(more)) & set(more.recover.documents)
    with pytest.raises(ValueError, match="897 images"):
        digits_splits(counts={**counts, "certify": 800}, seed=0)
