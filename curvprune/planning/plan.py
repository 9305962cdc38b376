"""A plan: one option for every layer, with what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from curvprune.schema import Json, Number, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One option per layer.

    Attributes:
        choices: layer -> option.
        bytes: stored size of the whole model.
        predicted: its predicted loss increase in nats, ± `predicted_stderr`.
        uses: how much of each other limit it uses.
    """

    choices: dict[str, str]
    bytes: int
    predicted: Number
    predicted_stderr: Number
    notes: tuple[str, ...] = ()
    uses: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """JSON-ready record; numbers that are not finite become None."""
        record: dict[str, Json] = encode(self)
        return record
