"""The data that recipes name: sources of text and images, dealt out to splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curvprune.model import EXTRA, PURPOSES, Batch, Split, Splits, deal_documents


def text_splits(
    documents: Mapping[str, Sequence[int]], *, length: int, counts: Mapping[str, int], seed: int
) -> Splits:
    """Cut tokenised documents into sequences and deal whole documents to the splits that ``counts``
    asks for.

    Documents are dealt in a seeded random order, each to the split that is furthest from its count,
    so no document lies in two splits; of several with the same tokens only the first counts.
    Sequences are then taken from a split's documents in turn, so that as many documents as possible
    take part; a recovery gets all of its own, which serve nothing else. They are ``length`` tokens;
    a document's shorter rest is kept if it has at least 32 tokens.

    Raises ``ValueError`` if the documents hold too few sequences, saying how many each split could
    get.
    """
    windows: dict[str, list[Batch]] = {}
    seen: set[tuple[int, ...]] = set()
    for name, tokens in documents.items():
        if (text := tuple(tokens)) in seen:
            continue
        seen.add(text)
        ids = torch.tensor(list(tokens), dtype=torch.long)
        pieces = [piece for piece in ids.split(length) if len(piece) >= min(32, length)]
        if pieces:
            windows[name] = [
                {"input_ids": p[None], "attention_mask": torch.ones_like(p)[None]} for p in pieces
            ]
    counts = _asked(counts)
    dealt = deal_documents({name: len(w) for name, w in windows.items()}, counts, seed=seed)
    filled = {
        purpose: sum(len(windows[name]) for name in names) for purpose, names in dealt.items()
    }
    if short := [f"{p} {filled[p]} of {counts[p]}" for p in counts if filled[p] < counts[p]]:
        total = sum(len(w) for w in windows.values())
        raise ValueError(
            f"the text has only {total} sequences of {length} tokens in {len(windows)} documents: "
            f"{', '.join(short)}; ask for fewer, or shorten sequence_length"
        )
    taken = {p: filled[p] if p == EXTRA else counts[p] for p in counts}
    return Splits(**{p: _in_turn({n: windows[n] for n in dealt[p]}, taken[p]) for p in counts})


def _asked(counts: Mapping[str, int]) -> dict[str, int]:
    return {p: counts[p] for p in (*PURPOSES, EXTRA) if p != EXTRA or counts.get(p)}


def _in_turn(windows: Mapping[str, Sequence[Batch]], count: int) -> Split:
    """The first sequence of each document, then the second of each, until there are ``count``."""
    rounds = range(max(len(items) for items in windows.values()))
    picked = [
        (name, items[i]) for i in rounds for name, items in windows.items() if i < len(items)
    ][:count]
    return Split(
        items=tuple(item for _, item in picked), documents=tuple(name for name, _ in picked)
    )


def python_docs() -> dict[str, str]:
    """The language reference that ships with Python (`pydoc_data.topics`), one document per topic.

    Topics quote each other, so a paragraph that occurs in several is kept in the shortest one only:
    documents then share no paragraph of 80 characters or more.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(topics, key=lambda n: (len(topics[n]), n)):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= 80:
                if text in seen:
                    continue
                seen.add(text)
            kept.append(paragraph)
        documents[name] = "\n\n".join(kept)
    return documents


def text_files(paths: Sequence[Path]) -> dict[str, str]:
    """Local UTF-8 text files, one document each. Raises ``ValueError`` naming the file that cannot
    be read."""
    documents = {}
    for path in paths:
        try:
            documents[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data file {path}: {error}; expected a readable UTF-8 text file"
            ) from error
    return documents


DIGITS_TRAINING = 900  # the first so many of `digits` train the example model


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8×8 digits in a fixed random order: images ``(1797, 1, 8, 8)`` in [0, 1],
    labels ``(1797,)``."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    images = torch.tensor(loaded.images[order], dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(loaded.target[order], dtype=torch.long)


def digits_splits(*, counts: Mapping[str, int], seed: int) -> Splits:
    """Items with ``pixel_values`` and ``labels`` from `digits`, without the first
    `DIGITS_TRAINING`, which train the example model: on images that a model has memorised its
    Fisher is far too small.

    Raises ``ValueError`` if more are asked for than there are.
    """
    images, labels = digits()
    fresh = DIGITS_TRAINING + np.random.default_rng(seed).permutation(len(images) - DIGITS_TRAINING)
    counts = _asked(counts)
    sizes = list(counts.values())
    if sum(sizes) > len(fresh):
        asked = " + ".join(map(str, sizes))
        raise ValueError(f"digits has {len(fresh)} images that trained nothing, asked for {asked}")

    def part(indices: np.ndarray) -> Split:
        items = tuple({"pixel_values": images[i][None], "labels": labels[i][None]} for i in indices)
        return Split(items=items, documents=tuple(f"digit {i}" for i in indices))

    parts = [part(indices) for indices in np.split(fresh[: sum(sizes)], np.cumsum(sizes)[:-1])]
    return Splits(**dict(zip(counts, parts, strict=True)))


def hub_documents(name: str, *, split: str, column: str, limit: int = 20_000) -> dict[str, str]:
    """Rows of a text column of a hub dataset, one document each (needs the extra ``hub``)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "data from the hub needs the extra: pip install 'curvprune[hub]'"
        ) from error
    rows = load_dataset(name, split=split, streaming=True)
    return {f"row {i}": row[column] for i, row in zip(range(limit), rows, strict=False)}
