"""What an item holds, however it is written: what tells that two items are the same.

The same sequence comes with a mask of ones or without any, padded or not, in int32 or in int64,
with labels that repeat its tokens or without. A model sees no difference, so none may count here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from curvprune.model.forward import Batch, padding_mask
from curvprune.model.losses.families import IGNORED

_LABELS = ("labels", "label", "targets", "target")
DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """Hashes of one item.

    Attributes:
        whole: of its inputs and labels: two items with this one in common are the same. Empty for
            an item without tensors, of which nothing is known.
        inputs: of its inputs alone, with and without what follows the last label that counts. A
            model that was made from one of them has seen the other.
    """

    whole: bytes
    inputs: frozenset[bytes]


def content_of(item: Batch) -> Content:
    """The hashes of an item. Cost: one pass over its tensors."""
    tensors = _named(item)
    # 1. Positions that a mask hides, and masks that hide nothing.
    for prefix in ("decoder_", ""):
        tensors = _unmasked(tensors, prefix)
    tensors = _with_lone_input(_without_defaults(tensors))
    seen = {_hash(_inputs(tensors))}
    # 2. Padding that only labels tell, and labels that say nothing new.
    tensors = _without_repeated_labels(_trimmed(tensors))
    seen.add(_hash(_inputs(tensors)))
    return Content(whole=_hash(tensors) if tensors else b"", inputs=frozenset(seen))


def same_items(contents: Sequence[Content]) -> list[Hashable]:
    """For every item a label that it shares with those that hold the same."""
    # The number of the item, where nothing is known of it.
    return [content.whole or number for number, content in enumerate(contents)]


def joined(*labels: Iterable[Hashable]) -> NDArray[np.int_]:
    """The number of every item's cluster, counted from 0 as they first appear: items that share a
    label, directly or through others, are one cluster.

    >>> joined("aabc", "xyyz").tolist()
    [0, 0, 0, 1]
    """
    # Items and labels are the points of a graph, an item's labels its edges.
    ends: list[int] = []
    items = 0
    known: dict[tuple[int, Hashable], int] = {}
    for kind, given in enumerate(labels):
        found = [known.setdefault((kind, label), len(known)) for label in given]
        ends += found
        items = len(found)
    starts = np.tile(np.arange(items), len(labels))
    points = items + len(known)
    edges = (np.ones(len(ends)), (starts, items + np.array(ends, dtype=int)))
    graph = coo_array(edges, shape=(points, points))
    part = connected_components(graph, directed=False)[1][:items]
    _, first, number = np.unique(part, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


# ------------------------------------------------------------------------------------ normal form


def _named(item: Batch) -> dict[str, Tensor]:
    """An item's tensors by name, in one type for whole numbers and one for others. A pair is a dict
    of its inputs and labels."""
    if isinstance(item, Mapping):
        named = {str(name): value for name, value in item.items() if value is not None}
    else:
        named = dict(zip(("inputs", "labels"), item, strict=False))
    tensors = {}
    for name, value in named.items():
        tensor = value.detach().cpu()
        kind = torch.double if tensor.is_floating_point() else torch.long
        if tensor.is_complex():
            tensor, kind = torch.view_as_real(tensor.resolve_conj()), torch.double
        tensors["labels" if name in _LABELS else name] = tensor.to(kind)
    return tensors


def _with_lone_input(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An input that is the only one has the name that a pair gives it."""
    inputs = [name for name in tensors if name != "labels"]
    if len(inputs) != 1:
        return tensors
    named = {name: tensor for name, tensor in tensors.items() if name == "labels"}
    return {**named, "inputs": tensors[inputs[0]]}


def _is_sequence(tensor: Tensor, length: int) -> bool:
    return tensor.ndim >= 2 and len(tensor) == 1 and tensor.shape[1] == length


def _unmasked(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The positions that the attention mask with this prefix lets through; without the mask."""
    name = f"{prefix}attention_mask"
    mask = tensors.get(name)
    if mask is None or mask.ndim != 2:
        return tensors
    seen = padding_mask(tensors, prefix)
    if seen is None or not bool(seen.any()):
        return tensors
    kept = seen[0]
    # A mask of the encoder says nothing of the decoder's sequence, nor the other way.
    found = {}
    for other, tensor in tensors.items():
        its_own = other.startswith("decoder_") == bool(prefix) or other == "labels"
        if its_own and other != name and _is_sequence(tensor, kept.numel()):
            tensor = tensor[:, kept]
        found[other] = tensor
    del found[name]
    return found


def _without_defaults(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a model assumes where it is not given: masks of ones, one segment, positions in
    order."""
    found = {}
    for name, tensor in tensors.items():
        masks_nothing = name.endswith("mask") and bool((tensor == 1).all())
        one_segment = name == "token_type_ids" and not bool(tensor.any())
        in_order = name == "position_ids" and bool((tensor == torch.arange(tensor.shape[-1])).all())
        if not (masks_nothing or one_segment or in_order):
            found[name] = tensor
    return found


def _trimmed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the positions after the last label that counts: so sequences are padded where there
    is no mask."""
    labels = tensors.get("labels")
    if labels is None or labels.ndim != 2 or not bool((labels != IGNORED).any()):
        return tensors
    length = labels.shape[1]
    end = int(torch.nonzero(labels[0] != IGNORED).max()) + 1
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor[:, :end] if _is_sequence(tensor, length) else tensor
    return found


def _without_repeated_labels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without labels that are the tokens: those a causal language model takes where none are given.
    The first one predicts nothing."""
    labels, tokens = tensors.get("labels"), tensors.get("inputs", tensors.get("input_ids"))
    if labels is None or tokens is None or labels.shape != tokens.shape or labels.ndim != 2:
        return tensors
    first = labels[0, 0] in (IGNORED, tokens[0, 0])
    if tokens.is_floating_point() or not (first and torch.equal(labels[:, 1:], tokens[:, 1:])):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "labels"}


def _inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the labels; these, where there is nothing else."""
    found = {name: tensor for name, tensor in tensors.items() if name != "labels"}
    return found or tensors


def _hash(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        # Adding 0 turns -0.0 into the 0.0 that it equals.
        digest.update((tensor.contiguous() + 0).numpy().tobytes())
    return digest.digest()[:DIGEST_BYTES]


def known_among(contents: Sequence[Content], seen: frozenset[bytes]) -> int:
    """How many of these items are among those seen."""
    return sum(not content.inputs.isdisjoint(seen) for content in contents)
