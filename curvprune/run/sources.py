"""The data that recipes name: sources of text and images, dealt out to splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvprune.compat import quiet_libraries
from curvprune.failures import is_machine, one_line
from curvprune.model import EXTRA, PURPOSES, Batch, Split, Splits, deal_documents
from curvprune.places import check_regular


def text_splits(
    documents: Mapping[str, Sequence[int]],
    *,
    length: int,
    counts: Mapping[str, int],
    seed: int,
    first: int | None = None,
) -> Splits:
    """Cut tokenised documents into sequences and deal whole documents to the splits that ``counts``
    asks for.

    Documents are dealt in a seeded random order, each to the split that is furthest from its count,
    so no document lies in two splits; of several with the same tokens only the first counts.
    Sequences are then taken from a split's documents in turn, so that as many documents as possible
    take part; a recovery gets all of its own, which serve nothing else. They are ``length`` tokens,
    with the token ``first`` at the start of each, where there is one; a document's shorter rest is
    kept if it has at least 32 tokens.

    Raises ``ValueError`` if the documents hold too few sequences, saying how many each split could
    get.
    """
    # 1. Sequences of every document that no earlier one repeats.
    windows: dict[str, list[Batch]] = {}
    seen: set[tuple[int, ...]] = set()
    for name, tokens in documents.items():
        text = tuple(tokens)
        if text in seen:
            continue
        seen.add(text)
        pieces = _windows(text, length, first)
        if pieces:
            windows[name] = pieces
    # 2. Whole documents, dealt to the splits.
    counts = _asked(counts)
    sizes = {name: len(pieces) for name, pieces in windows.items()}
    dealt = deal_documents(sizes, counts, seed=seed)
    filled: dict[str, int] = {}
    for purpose, names in dealt.items():
        filled[purpose] = sum(sizes[name] for name in names)
    short = [f"{p} {filled[p]} of {counts[p]}" for p in counts if filled[p] < counts[p]]
    if short:
        raise ValueError(
            f"the text has only {sum(sizes.values())} sequences of {length} tokens in "
            f"{len(windows)} documents: {', '.join(short)}; ask for fewer, or shorten "
            "sequence_length"
        )
    # 3. As many of their sequences as were asked for; a recovery gets all of its own.
    parts = {}
    for purpose, count in counts.items():
        own = {name: windows[name] for name in dealt[purpose]}
        parts[purpose] = _in_turn(own, filled[purpose] if purpose == EXTRA else count)
    return _splits(parts)


# A rest of fewer tokens is not worth an item.
SHORTEST = 32


def first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text, as the model saw it in training; ``None``
    if it puts none there."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        return None
    tokens = tokenizer("a")["input_ids"]
    return begin if tokens and tokens[0] == begin else None


def _windows(tokens: Sequence[int], length: int, first: int | None) -> list[Batch]:
    """A document cut into sequences ``(1, length)``; its rest may be a shorter one."""
    found: list[Batch] = []
    before = torch.tensor([] if first is None else [first], dtype=torch.long)
    for part in torch.tensor(tokens, dtype=torch.long).split(max(1, length - len(before))):
        piece = torch.cat([before, part])
        if len(piece) >= min(SHORTEST, length):
            mask = torch.ones_like(piece)
            found.append({"input_ids": piece[None], "attention_mask": mask[None]})
    return found


def _asked(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts in the order of the purposes, without a recovery that gets nothing."""
    asked = {purpose: counts[purpose] for purpose in PURPOSES}
    if counts.get(EXTRA):
        asked[EXTRA] = counts[EXTRA]
    return asked


def _splits(parts: Mapping[str, Split]) -> Splits:
    return Splits(
        calibrate=parts["calibrate"],
        price=parts["price"],
        select=parts["select"],
        certify=parts["certify"],
        recover=parts.get(EXTRA),
    )


def _in_turn(windows: Mapping[str, Sequence[Batch]], count: int) -> Split:
    """The first sequence of each document, then the second of each, until there are ``count``."""
    items: list[Batch] = []
    documents: list[str] = []
    for turn in range(max(map(len, windows.values()))):
        for name, pieces in windows.items():
            if turn < len(pieces):
                items.append(pieces[turn])
                documents.append(name)
    return Split(items=tuple(items[:count]), documents=tuple(documents[:count]))


def python_docs() -> dict[str, str]:
    """The language reference that ships with Python (`pydoc_data.topics`), one document per topic.

    Topics quote each other, so a paragraph that occurs in several is kept in the shortest one only:
    documents then share no paragraph of 80 characters or more.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents: dict[str, str] = {}
    # From the shortest topic to the longest; a short paragraph may occur in several.
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
            check_regular(path)
            documents[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data file {path}: {error}; expected a readable UTF-8 text file"
            ) from error
    return documents


# The first so many of `digits` train the example model.
DIGITS_TRAINING = 900


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
    if sum(counts.values()) > len(fresh):
        asked = " + ".join(map(str, counts.values()))
        raise ValueError(f"digits has {len(fresh)} images that trained nothing, asked for {asked}")
    # Each purpose takes the next so many; every image is a document of its own.
    parts = {}
    start = 0
    for purpose, count in counts.items():
        chosen = fresh[start : start + count]
        items = [{"pixel_values": images[i][None], "labels": labels[i][None]} for i in chosen]
        names = [f"digit {i}" for i in chosen]
        parts[purpose] = Split(items=tuple(items), documents=tuple(names))
        start += count
    return _splits(parts)


def hub_documents(name: str, *, split: str, column: str, limit: int = 20_000) -> dict[str, str]:
    """Rows of a text column of a hub dataset, one document each (needs the extra ``hub``)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "data from the hub needs the extra: pip install 'curvprune[hub]'"
        ) from error
    try:
        with quiet_libraries():
            rows = load_dataset(name, split=split, streaming=True)
            return documents_of(rows, column=column, limit=limit)
    except Exception as error:  # of any type: no network, no such data set, a file that is damaged
        if is_machine(error):
            raise
        raise ValueError(
            f"data set {name}, split {split}: {one_line(str(error)) or type(error).__name__}"
        ) from error


def documents_of(rows: Iterable[Mapping[str, Any]], *, column: str, limit: int) -> dict[str, str]:
    """The texts of the first ``limit`` rows. Raises ``ValueError`` naming a column that is missing
    or holds no text."""
    documents = {}
    for i, row in zip(range(limit), rows, strict=False):
        if column not in row:
            raise ValueError(
                f"has no column {column!r}; expected one of {', '.join(map(str, row))} as column:"
            )
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise ValueError(f"column {column!r} of row {i} holds {kind}, expected text")
        documents[f"row {i}"] = row[column]
    return documents
