"""Priced options, and the table of them that the planners work on.

Arithmetic is exact where it decides anything: bytes are integers, and prices are scaled to integers
by a power of two.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Priced(Protocol):
    """What the planners read of a row: bytes stored, and price in nats, of one option of one
    layer. Options are opaque strings."""

    @property
    def layer(self) -> str: ...
    @property
    def option(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def price(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The smallest `Priced`: `option` for `layer` stores `bytes` bytes and is predicted to cost
    `price` nats."""

    layer: str
    option: str
    bytes: int
    price: float


class Offer(NamedTuple):
    """An option of a group, bytes and prices of its layers added without rounding."""

    bytes: int
    price: Fraction
    option: str


class Rung(NamedTuple):
    """An option on a group's ladder, its price in whole numbers (`Table.scale`)."""

    bytes: int
    price: int
    option: str


def prices_by_bytes(ladder: Sequence[Rung]) -> list[tuple[int, int]]:
    """A ladder as bytes rising, prices falling."""
    return [(rung.bytes, rung.price) for rung in ladder]


def bytes_by_price(ladder: Sequence[Rung]) -> list[tuple[int, int]]:
    """A ladder as prices rising, bytes falling."""
    return [(rung.price, rung.bytes) for rung in reversed(ladder)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What every group of layers is offered.

    Attributes:
        offers: of every group, in the order of all lists of ladders and picks. A group has the
            first name of its layers; a layer that shares its option with none is one by itself.
        group_of: the group of every layer, in the order in which layers first appear.
    """

    offers: dict[str, list[Offer]]
    group_of: dict[str, str]

    @property
    def scale(self) -> int:
        """What a price is multiplied by to be a whole number."""
        # Every float is an integer over a power of two, so the largest denominator is a common one.
        largest = 1
        for offers in self.offers.values():
            largest = max(largest, *(offer.price.denominator for offer in offers))
        return largest

    def members(self) -> list[list[str]]:
        """The layers of every group."""
        members: dict[str, list[str]] = {group: [] for group in self.offers}
        for layer, group in self.group_of.items():
            members[group].append(layer)
        return list(members.values())

    def ladders(self) -> list[list[Rung]]:
        """The options of every group that no other one of it beats."""
        scale = self.scale
        return [_undominated(offers, scale) for offers in self.offers.values()]

    def plan(self, options: Sequence[str]) -> dict[str, str]:
        """Layer -> option, from one option for every group."""
        chosen = dict(zip(self.offers, options, strict=True))
        return {layer: chosen[group] for layer, group in self.group_of.items()}


def table_of(rows: Iterable[Priced], same_option: Iterable[Collection[str]]) -> Table:
    """The table of some rows. Raises ValueError on malformed rows or groups."""
    # 1. Every layer by itself.
    offers: dict[str, list[Offer]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        offer = _offer(row)
        if (row.layer, row.option) in seen:
            raise ValueError(
                f"layer {row.layer!r} lists option {row.option!r} twice; keep one row per layer "
                "and option"
            )
        seen.add((row.layer, row.option))
        offers.setdefault(row.layer, []).append(offer)
    if not offers:
        raise ValueError("no rows: a plan needs at least one layer with at least one option")

    # 2. Layers that share an option as one.
    group_of = {layer: layer for layer in offers}
    groups = [sorted(group) for group in same_option if group]
    _check_groups(groups, offers)
    for group in groups:
        merged = _merged(group, offers)
        for layer in group:
            del offers[layer]
            group_of[layer] = group[0]
        offers[group[0]] = merged
    return Table(offers=dict(sorted(offers.items())), group_of=group_of)


def _offer(row: Priced) -> Offer:
    price = float(row.price)
    if not math.isfinite(price):
        raise ValueError(
            f"layer {row.layer!r}, option {row.option!r}: price is {price!r}, expected a "
            "finite number of nats; drop this option or price it again"
        )
    # Whole numbers of other libraries will do; a float that happens to be whole is a mistake.
    try:
        size = operator.index(row.bytes)
    except TypeError:
        size = -1
    if size < 0:
        raise ValueError(
            f"layer {row.layer!r}, option {row.option!r}: bytes is {row.bytes!r}, expected a "
            "whole number >= 0"
        )
    return Offer(size, Fraction(price), row.option)


def _check_groups(groups: Sequence[Sequence[str]], offers: Mapping[str, Sequence[Offer]]) -> None:
    named: Counter[str] = Counter()
    for group in groups:
        named.update(group)
    for layer, count in named.items():
        if layer not in offers:
            raise ValueError(
                f"same_option: layer {layer!r} has no rows; leave it out or price its options"
            )
        if count > 1:
            raise ValueError(
                f"same_option: layer {layer!r} is named {count} times; expected each layer in one "
                "group"
            )


def _merged(group: Sequence[str], offers: Mapping[str, Sequence[Offer]]) -> list[Offer]:
    """What a group is offered: bytes and prices of each option added over its layers."""
    # Fractions, so that the order of the layers cannot matter.
    totals = {offer.option: offer for offer in offers[group[0]]}
    for layer in group[1:]:
        own = {offer.option: offer for offer in offers[layer]}
        if strange := sorted(set(own) ^ set(totals)):
            raise ValueError(
                f"same_option: layers {group[0]!r} and {layer!r} are in one group, but only one of "
                f"them is offered {', '.join(strange)}; offer both the same options"
            )
        for option, total in totals.items():
            size, price = total.bytes + own[option].bytes, total.price + own[option].price
            totals[option] = Offer(size, price, option)
    return list(totals.values())


def _undominated(offers: Sequence[Offer], scale: int) -> list[Rung]:
    """Bytes rising and prices falling; of equal options the first by name."""
    ladder: list[Rung] = []
    # From the smallest upwards, an option is worth its bytes only if it lowers the price.
    for offer in sorted(offers):
        price = offer.price.numerator * (scale // offer.price.denominator)
        if not ladder or price < ladder[-1].price:
            ladder.append(Rung(offer.bytes, price, offer.option))
    return ladder
