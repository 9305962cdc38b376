"""What is fixed before a compression's first long computation, and what it costs and may use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from curvprune import artifact
from curvprune.certificate import Verdict
from curvprune.compression import Solved, Training
from curvprune.curvature import Analysis
from curvprune.files import StageLog, State
from curvprune.model import Layer, Objective, Splits
from curvprune.options import Form, Option, option_from_key
from curvprune.planning import (
    Budget,
    Choice,
    Infeasible,
    Limit,
    Plan,
    Within,
    cheapest,
    corrected,
)
from curvprune.pricing import (
    CURVATURES,
    LayerWork,
    Ledger,
    limits_of,
    macs_left,
    multiply_adds,
    work_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Knobs of a run that are not part of the model, the data or the budget."""

    seed: int = 0
    labels: int = 2
    curvature: str = (
        "fisher"  # a key of `curvprune.pricing.ledger.CURVATURES`: what prices are taken from
    )
    measure_above: float | None = 0.005  # nats below which no price is measured; None: none is
    trials: int = 6
    attempts: int = 2
    batch_size: int = 4
    portable: artifact.Portable = True  # see `curvprune.artifact.folder.reader_of`

    def __post_init__(self) -> None:
        for name in ("labels", "trials", "attempts", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Settings: {name}={value!r}: expected a whole number of at least 1"
                )
        if self.portable not in (True, False, "engines"):
            raise ValueError(
                f'Settings: portable={self.portable!r} is unknown; choose True, False or "engines"'
            )
        if self.curvature not in CURVATURES:
            raise ValueError(
                f"Settings: curvature={self.curvature!r} is unknown; expected {', '.join(CURVATURES)}"
            )
        if self.measure_above is not None and not self.measure_above >= 0:
            raise ValueError(
                f"Settings: measure_above={self.measure_above!r}: expected nats, a number of at "
                "least 0, or None"
            )


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything that is fixed before the first long computation."""

    model: nn.Module
    objective: Objective
    layers: dict[str, Layer]
    options: dict[str, list[Option]]
    splits: Splits
    budget: Budget | None
    settings: Settings
    state: State
    stages: StageLog
    reload: Callable[[Path], nn.Module]
    write_model: Callable[[Path, nn.Module, Mapping[str, Solved], Mapping[str, Any]], None]
    original: nn.Module | None = (
        None  # what is certified against, where units of it were removed to make the model
    )
    recover: Training | None = None
    same_option: tuple[
        tuple[str, ...], ...
    ] = ()  # groups of layers; each is offered the same options
    limits: tuple[
        Limit, ...
    ] = ()  # what the budget limits besides bytes and the drop: `limit_plans`
    work: dict[str, LayerWork] = field(
        default_factory=dict
    )  # of every layer, where it was counted: `count_work`
    notes: list[str] = field(default_factory=list)
    ledger: Ledger | None = None
    analysis: Analysis | None = None
    plan: Plan | None = None
    verdict: Verdict | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, float] = field(
        default_factory=dict
    )  # option -> correction of its prices by the trials

    @property
    def uncompressed(self) -> nn.Module:
        """The model whose loss may rise by the budget."""
        return self.model if self.original is None else self.original

    def __post_init__(self) -> None:
        if (
            self.settings.curvature == "input"
            and self.budget is not None
            and self.budget.max_drop is not None
        ):
            raise ValueError(
                'curvature="input" prices the error of layers, in no unit of loss: it cannot plan for max_drop; pass '
                "max_bytes, or another curvature"
            )

    @property
    def fixed_bytes(self) -> int:
        return artifact.other_bytes(self.model, self.layers)

    @property
    def within(self) -> Within:
        """What every plan must keep to."""
        return Within(
            max_bytes=None if self.budget is None else self.budget.max_bytes,
            fixed_bytes=self.fixed_bytes + artifact.header_bytes(self.model, self.layers),
            limits=self.limits,
            same_option=self.same_option,
        )

    def uses(self, choices: Mapping[str, str]) -> dict[str, float]:
        """How much a plan uses of each limit of the budget, by name; bytes are those of the file,
        with the most that its header can take."""
        used = {limit.name: limit.used(choices) for limit in self.limits}
        if self.budget is None or self.budget.max_bytes is None:
            return used
        return {
            "max_bytes": self.bytes_of(choices) + artifact.header_bytes(self.model, self.layers),
            **used,
        }

    @property
    def most(self) -> dict[str, float]:
        """The budget's limits on size and speed by name."""
        stored = (
            {}
            if self.budget is None or self.budget.max_bytes is None
            else {"max_bytes": self.budget.max_bytes}
        )
        return stored | {limit.name: limit.most for limit in self.limits}

    def least(self, name: str) -> float:
        """The least that any plan uses of a limit."""
        of = {limit.name: limit for limit in self.limits}.get(name)
        if of is None:
            return self.smallest_bytes()
        best = {
            n: min(
                (o.key for o in self.options[n]), key=lambda key: sum(of.use[m, key] for m in group)
            )
            for group in self.groups
            for n in group
        }
        return of.used(best)

    def keeps_within(self, choices: Mapping[str, str]) -> bool:
        """Whether a plan keeps to all limits of the budget but the drop."""
        return all(used <= self.most[name] for name, used in self.uses(choices).items())

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Layers that get one option together, and every other layer by itself."""
        grouped = {n for group in self.same_option for n in group}
        return [*self.same_option, *((n,) for n in self.layers if n not in grouped)]

    def expected(self, choices: Mapping[str, str]) -> float:
        """What a plan costs by the prices as the trials have corrected them."""
        assert self.ledger is not None
        rows = corrected(self.ledger.rows, self.factors)
        return math.fsum(row.price for row in rows if choices[row.layer] == row.option)

    def smallest_bytes(self) -> int:
        """Bytes of the smallest model file that the options allow, header included."""
        sizes = [
            min(sum(self.layer_bytes(n, o) for n in group) for o in self.options[group[0]])
            for group in self.groups
        ]
        return self.fixed_bytes + artifact.header_bytes(self.model, self.layers) + sum(sizes)

    def bytes_of(self, choices: Mapping[str, str]) -> int:
        """Tensor bytes of the whole model on disk under a plan (the file adds its header)."""
        return self.fixed_bytes + sum(
            self.layer_bytes(n, option_from_key(key)) for n, key in choices.items()
        )

    def form_of(self, name: str, option: Option) -> Form:
        """How a layer lies on disk under an option."""
        return artifact.form_of(
            self.model, self.layers[name], option, portable=self.settings.portable
        )

    def layer_bytes(self, name: str, option: Option) -> int:
        """Bytes on disk of a layer under an option."""
        return artifact.layer_bytes(
            self.model, self.layers[name], option, portable=self.settings.portable
        )


# ------------------------------------------------------------------------------------------- limits


def limit_plans(job: Job) -> None:
    """Turn the budget's limits on size and speed into ``job.limits``, and see that the options can
    meet them together.

    Cost: one forward pass over the calibration items if multiply-adds or bit operations are
    limited. Raises `Infeasible`, and ``ValueError`` where a limit of the user's own has no number
    for a layer and option.
    """
    budget = job.budget
    if budget is None or not budget.limited:
        return
    if budget.max_macs is not None or budget.max_bops is not None:
        count_work(job)
    options = {(n, o.key): o for n in job.layers for o in job.options[n]}
    rows = [
        Choice(layer=n, option=key, bytes=job.layer_bytes(n, o), price=0.0)
        for (n, key), o in options.items()
    ]
    job.limits = limits_of(budget, rows, job.work or work_of(job.layers))
    try:
        cheapest(rows, job.within)
    except Infeasible as error:
        names = {shortfall.name for shortfall in error.shortfalls}
        if "max_macs" in names and all(macs_left(o) == 1.0 for o in options.values()):
            raise Infeasible(
                f"{error}. No option here lowers max_macs: zeros are multiplied like any other "
                "weight, except those of "
                'pattern "2:4" on sparse tensor cores; prune(structured=...) removes whole units',
                *error.shortfalls,
            ) from None
        raise


def count_work(job: Job) -> None:
    """The multiply-adds of every layer: one forward pass over the calibration items."""
    batches = job.splits.calibrate.batches(job.settings.batch_size)
    job.work = work_of(job.layers, multiply_adds(job.model, job.objective, batches, job.layers))
