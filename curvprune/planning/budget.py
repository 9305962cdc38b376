"""What a compressed model may lose, and how large or slow it may be.

`Budget` is what a user asks for, `Within` what every plan has to keep to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SkipValidation

from curvprune.schema import Json, check_fields

# Metrics that compare the two models' outputs with each other, without labels.
OF_OUTPUTS = ("kl", "top1")
# Metrics of which a drop is a fraction.
SHARES = ("accuracy", "top1")
# The limits of a budget that are counted here; `Limit` is for what a user has measured.
SIZES = ("max_bytes", "max_bits", "max_macs", "max_bops")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Anything else that adds up over the layers and must stay within `most`: bit operations, a
    measured latency.

    Args:
        name: of what is limited, one word.
        most: the most that the layers may take together.
        use: a finite number for every layer and option of the rows.
        per: what the sum of `use` is divided by before it is compared. For bits per weight, `use`
            is in bits and `per` is the number of weights.

    Raises ValueError.
    """

    name: Annotated[
        str, Field(min_length=1, description="what is limited, one word such as milliseconds")
    ]
    most: Annotated[
        float,
        Field(
            allow_inf_nan=False, description="the most that the layers may take together, a number"
        ),
    ]
    use: Annotated[
        Mapping[tuple[str, str], float],
        SkipValidation,  # `__post_init__` names the entry that is wrong
        Field(description="a number for every layer and option"),
    ]
    per: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a finite number > 0")] = 1.0

    def __post_init__(self) -> None:
        # Numbers of other libraries as Python's own, which is what is written.
        for name in ("most", "per"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        check_fields(self)
        for pair, value in self.use.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"Limit({self.name!r}): {pair} uses {value!r}, expected a finite number"
                )

    def used(self, choices: Mapping[str, str]) -> float:
        """How much a plan uses, in the unit of `most`: the correctly rounded quotient."""
        total = sum((Fraction(self.use[pair]) for pair in choices.items()), Fraction(0))
        return float(total / Fraction(self.per))

    def to_dict(self) -> dict[str, Json]:
        """JSON-ready record: the uses as layer -> option -> number."""
        use: dict[str, Json] = {}
        for (layer, option), value in self.use.items():
            of_layer = use.setdefault(layer, {})
            assert isinstance(of_layer, dict)
            of_layer[option] = value
        return {"name": self.name, "most": self.most, "use": use, "per": self.per}


@dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """What every plan must keep to.

    Attributes:
        max_bytes: the most bytes of the whole model.
        fixed_bytes: the bytes of it that no plan changes.
        limits: on whatever else adds up over the layers.
        same_option: groups of layers that get one option together; each group is offered the same
            options.
    """

    max_bytes: int | None = None
    fixed_bytes: int = 0
    limits: tuple[Limit, ...] = ()
    same_option: tuple[tuple[str, ...], ...] = ()


UNLIMITED = Within()


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a compressed model may lose, and how large or slow it may be: any of these at once, at
    least one. With `max_drop` the smallest model within all of them is wanted and certified,
    without it the best one.

    Args:
        metric: what `max_drop` is a drop of: "loss", "accuracy", "kl" (the mean KL divergence from
            the uncompressed model, per position) or "top1" (the share of positions at which both
            models have the same best guess).
        max_drop: a rise of the loss in nats per token (or example), a KL divergence in nats, or a
            fall of accuracy or agreement as a fraction (0.01 is one percentage point).
        quantile: with metric "kl": `max_drop` is for this quantile over documents of a document's
            mean KL divergence, such as 0.99, instead of the mean.
        max_bytes: of the file of weights, header included.
        max_bits: stored bits (codes, scales, zero points and shapes) per weight of the layers that
            have options; a weight that several modules share counts once.
        max_macs: multiply-adds of those layers per token of a language model, else per item. Only
            zeros that hardware can skip lower them: see `curvprune.pricing`.
        max_bops: bit operations: multiply-adds x bits of the weight x bits of the activations
            (those of the model's type), on the same terms.
        limits: anything else that adds up over the layers, such as milliseconds that you have
            measured of every layer and option: see `Limit`.
        confidence: of the certificate, one-sided.

    Raises ValueError.
    """

    metric: Annotated[
        Literal["loss", "accuracy", "kl", "top1"],
        Field(description="loss, accuracy, kl or top1"),
    ] = field(default="loss", kw_only=False)
    max_drop: Annotated[
        float | None,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="a number of at least 0: nats of loss, or a fraction of accuracy (0.01 is "
            "1 pp)",
        ),
    ] = None
    quantile: Annotated[
        float | None,
        Field(gt=0, lt=1, description="a number strictly between 0 and 1, for example 0.99"),
    ] = None
    max_bytes: Annotated[
        int | None, Field(ge=1, description="a positive whole number of bytes")
    ] = None
    max_bits: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="stored bits per weight of the layers, a number above 0",
        ),
    ] = None
    max_macs: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="multiply-adds per token of a language model, else per item, a number "
            "above 0",
        ),
    ] = None
    max_bops: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="bit operations per token or item, a number above 0",
        ),
    ] = None
    limits: Annotated[
        Sequence[Limit],
        Field(description="a list of {name: milliseconds, most: 12, table: milliseconds.json}"),
    ] = ()
    confidence: Annotated[
        float,
        Field(
            gt=0.5,
            lt=1,
            examples=[0.95],
            description="a number strictly between 0.5 and 1, for example 0.95",
        ),
    ] = 0.95

    def __post_init__(self) -> None:
        # 1. Numbers of other libraries, and whole numbers of bytes such as 6e7, as Python's own.
        for name in ("max_drop", "quantile", *SIZES, "confidence"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if isinstance(self.max_bytes, float) and self.max_bytes.is_integer():
            object.__setattr__(self, "max_bytes", int(self.max_bytes))
        object.__setattr__(self, "limits", tuple(self.limits))

        # 2. Every field by itself, then what they say together.
        check_fields(self)
        if self.max_drop is None and not self.limited:
            raise ValueError(
                f"Budget takes at least one of max_drop, {', '.join(SIZES)} and limits, none "
                "given; write Budget('loss', max_drop=0.02) or Budget(max_bytes=60_000_000)"
            )
        if self.max_drop is not None:
            object.__setattr__(self, "max_drop", float(self.max_drop))
        if self.quantile is not None and (self.metric != "kl" or self.max_drop is None):
            raise ValueError(
                f"Budget({self.metric!r}, quantile={self.quantile:g}): a quantile is of the KL "
                f"divergence; write Budget('kl', quantile={self.quantile:g}, max_drop=0.1)"
            )
        if self.metric in SHARES and self.max_drop is not None and self.max_drop >= 1:
            raise ValueError(
                f"Budget({self.metric!r}, max_drop={self.max_drop:g}): {self.metric} drops are "
                f"fractions below 1; for {self.max_drop:g} percentage points write "
                f"max_drop={self.max_drop / 100:g}"
            )
        # A message names a limit by one word, so no two may share it.
        taken = {*SIZES, "max_drop", "max_loss"}
        for limit in self.limits:
            if limit.name in taken:
                raise ValueError(
                    f"Budget(limits=...): the name {limit.name!r} is taken; give each limit one "
                    "of its own"
                )
            taken.add(limit.name)

    @property
    def limited(self) -> bool:
        """Whether anything but the drop is limited."""
        return bool(self.limits) or any(getattr(self, name) is not None for name in SIZES)

    def to_dict(self) -> dict[str, Json]:
        """JSON-ready record."""
        record: dict[str, Json] = {f.name: getattr(self, f.name) for f in fields(self)}
        record["limits"] = [limit.to_dict() for limit in self.limits]
        if self.quantile is None:
            del record["quantile"]
        return record


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as one of Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") else value
