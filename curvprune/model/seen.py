"""Which items a model was made from and chosen by, carried by the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# No buffer: it is no part of what the model computes, nor of its state_dict. Copies keep it.
_ATTRIBUTE = "curvprune_seen"


def seen_by(model: nn.Module) -> frozenset[bytes]:
    """Hashes (`curvprune.model.Split.digests`) of the items that a model was made from or chosen
    by, as far as it carries them."""
    return getattr(model, _ATTRIBUTE, frozenset())


def remember_seen_(model: nn.Module, seen: frozenset[bytes]) -> None:
    """Let a model carry these hashes too: what has made it once stays with it."""
    setattr(model, _ATTRIBUTE, seen_by(model) | seen)


@contextmanager
def carrying(model: nn.Module, seen: frozenset[bytes]) -> Iterator[None]:
    """A model that carries these hashes for a while: while it is written."""
    before = seen_by(model)
    setattr(model, _ATTRIBUTE, before | seen)
    try:
        yield
    finally:
        setattr(model, _ATTRIBUTE, before)
