"""The ``budget:`` section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from curvprune.planning import SHARES, SIZES, Budget, Limit
from curvprune.run.recipe_errors import Complaint, any_of
from curvprune.run.recipe_sections import section_from

_LimitKeys: Any = section_from(Limit, only=("name", "most"))
_BudgetKeys: Any = section_from(Budget)


class LimitSection(_LimitKeys):
    """A limit of the user's own; see `curvprune.planning.Limit`.

    What every layer takes under every option is in a table, and must add up to less.
    """

    table: str = Field(min_length=1, description="a JSON file: layer, then option, then a number")


class BudgetSection(_BudgetKeys):
    """How much accuracy may be lost (``max_drop``), and how large or slow the model may be (the
    rest); see `curvprune.Budget`."""

    # Tables are files here, which a run reads.
    limits: tuple[LimitSection, ...] = Field(
        (),
        strict=False,
        description="a list of {name: milliseconds, most: 12, table: milliseconds.json}",
    )

    @model_validator(mode="after")
    def _at_least_one_limit(self) -> BudgetSection:
        known = ("max_drop", *SIZES)
        if not self.limits and all(getattr(self, key) is None for key in known):
            raise Complaint(
                (),
                f"no limit given; expected some of {any_of((*known, 'limits'))}, for example "
                "max_drop: 0.05",
            )
        taken = {*known}
        for index, limit in enumerate(self.limits):
            if limit.name in taken:
                raise Complaint(
                    ("limits", index, "name"), f"{limit.name} is taken; expected a name of its own"
                )
            taken.add(limit.name)
        return self

    @model_serializer(mode="wrap")
    def _without_no_quantile(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Locks of runs without one are as they were before there were any.
        found: dict[str, object] = handler(self)
        if self.quantile is None:
            found.pop("quantile", None)
        return found

    @model_validator(mode="after")
    def _quantile_is_of_kl(self) -> BudgetSection:
        if self.quantile is not None and (self.metric != "kl" or self.max_drop is None):
            raise Complaint(
                ("quantile",),
                f"{self.quantile:g} is a quantile of the KL divergence; expected metric: kl and a "
                "max_drop beside it",
            )
        return self

    @model_validator(mode="after")
    def _accuracy_is_a_fraction(self) -> BudgetSection:
        if self.metric in SHARES and self.max_drop is not None and self.max_drop >= 1:
            nearest = f"{self.max_drop / 100:g}" if self.max_drop < 100 else "0.01"
            raise Complaint(
                ("max_drop",),
                f"{self.max_drop:g} is not a fall of {self.metric}; expected a fraction below 1 "
                f"(0.01 is 1 pp); nearest: {nearest}",
            )
        return self
