"""What to remove: the arguments of structured pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from curvprune.schema import check_fields
from curvprune.structured.cuts import BLOCKS, KINDS

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """What to remove.

    Args:
        share: share of the model's multiply-adds (or of another kind of work, see ``of``) to
            remove; or, for some kinds, the share of their units: ``{"mlp": 0.25}``.
        of: ``"macs"``, ``"parameters"`` or ``"latency"``, where ``share`` is a number. Latency is
            the time of a forward pass, measured here on the model's device with torch's present
            number of threads (with one on a CPU, that thread's time).
        batch: how many items that pass is over: the first ones of the calibration split.
        kinds: some of ``"mlp"``, ``"heads"``, ``"channels"``; others stay as they are. Or
            ``("blocks",)`` alone: whole blocks of a pre-norm transformer; prune the result again
            for widths.
        uniform: one width for all cuts of a kind (the same share of units, where they differ in
            size), so that a plain transformers config describes the result.
        round_to: widths are multiples of this, where units are that many; by default 8 from 256
            units on, else 1.
        widths: how many widths of a cut are priced.
        most: largest share of a cut's units that may be removed.
        drift: how far readers make up for what earlier ones changed, 0 to 1.
        damping: λ over the mean of diag(A).
        labels: draws per position for the prices.
    """

    share: Annotated[
        Share | Mapping[str, Share],
        Field(
            description="the share of the work to remove, strictly between 0 and 1, for example "
            "0.3, or of the units of a kind, {mlp: 0.25}"
        ),
    ]
    of: Annotated[
        Literal["macs", "parameters", "latency"],
        Field(description="macs, parameters or latency"),
    ] = "macs"
    batch: Annotated[
        int,
        Field(
            ge=1,
            description="items in the batch whose latency is meant, a whole number of at least 1",
        ),
    ] = 1
    kinds: Annotated[
        tuple[str, ...],
        Field(description="some of mlp, heads and channels, or blocks alone"),
    ] = KINDS
    uniform: Annotated[
        bool,
        Field(description="true or false: one width per kind, which a plain config describes"),
    ] = False
    round_to: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="widths are multiples of this, a whole number of at least 1"),
    ] = None
    widths: Annotated[
        int,
        Field(ge=1, description="widths of a cut that are priced, a whole number of at least 1"),
    ] = 12
    most: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="the largest share of a cut that may go, strictly between 0 and 1",
        ),
    ] = 0.9
    drift: Annotated[
        float,
        Field(
            ge=0, le=1, description="how far readers make up for earlier ones, a number from 0 to 1"
        ),
    ] = 0.5
    damping: Annotated[
        float,
        Field(ge=0, description="a number of at least 0, of the mean of diag(A)"),
    ] = 0.01
    labels: Annotated[
        int,
        Field(ge=1, description="draws per position, a whole number of at least 1"),
    ] = 2

    def __post_init__(self) -> None:
        # Any mapping and any list of kinds is meant as what the fields hold.
        if isinstance(self.share, Mapping):
            object.__setattr__(self, "share", dict(self.share))
        if isinstance(self.kinds, list):
            object.__setattr__(self, "kinds", tuple(self.kinds))
        # Every field by itself, then what they mean together.
        check_fields(self)
        asked = self.asked_kinds
        if asked != (BLOCKS,) and (not asked or set(asked) - set(KINDS)):
            raise ValueError(
                f"structured: kinds {asked}: expected some of {KINDS}, or {BLOCKS!r} alone"
            )
        if self.of == "latency" and isinstance(self.share, Mapping):
            raise ValueError(
                f"structured={self.share!r}: shares by kind are of units; of='latency' needs one, "
                "such as 0.2"
            )

    @property
    def asked_kinds(self) -> tuple[str, ...]:
        """The kinds of cuts that may lose units."""
        return tuple(self.share) if isinstance(self.share, Mapping) else self.kinds

    @property
    def chooses(self) -> bool:
        """Whether there are widths to choose among; else every cut of a kind gets the one that was
        asked for."""
        if not self.uniform or not isinstance(self.share, Mapping):
            return True
        return tuple(self.share) == (BLOCKS,)
