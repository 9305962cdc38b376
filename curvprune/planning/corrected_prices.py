"""What measured plans say about the prices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from curvprune.planning.priced import Choice, Priced

_SCATTER = 0.5  # of the options' factors about their mean, as a share of it
_AT_LEAST, _AT_MOST = 0.25, 4.0  # factors, in units of the common ratio


class MeasuredPlan(NamedTuple):
    """A plan, what it was measured to lose, and the standard error of that."""

    choices: Mapping[str, str]
    loss: float
    stderr: float


def corrections(
    rows: Iterable[Priced], measured: Iterable[tuple[Mapping[str, str], float, float]]
) -> dict[str, float]:
    """What the price of each option must be multiplied by, from plans with their measured losses
    and standard errors (`MeasuredPlan`).

    A price is good to second order, so it errs with the size of the change, which the option
    decides. The loss of a plan is modelled as a sum over options: a factor times what the plan's
    layers with that option cost. The factors share a mean that is left free, and scatter about it
    by half of it (ridge regression). A loss is known to its standard error, a tenth of it and a
    hundredth of the largest. One plan corrects all prices alike; options that no plan has used get
    the mean. Factors stay between a fourth and four times the common ratio of measured and
    predicted.

    Empty where that ratio is not positive (losses lost in noise) or there is no finite loss. Cost:
    none to speak of.
    """
    rows = list(rows)
    usable = [plan for plan in measured if math.isfinite(plan[1])]
    if not usable:
        return {}

    # 1. What every plan spends on every option, and how well its loss is known.
    options = sorted({row.option for row in rows})
    column_of = {option: column for column, option in enumerate(options)}
    spent = np.zeros((len(usable), len(options)))
    for of_plan, (choices, _, _) in zip(spent, usable, strict=True):
        for row in rows:
            if choices[row.layer] == row.option:
                of_plan[column_of[row.option]] += row.price
    losses = np.array([loss for _, loss, _ in usable])
    stderrs = np.array([stderr for _, _, stderr in usable])
    stderrs = np.where(np.isfinite(stderrs), stderrs, 0.0)
    largest = float(np.abs(losses).max())
    if largest == 0:
        return {}
    precision = 1 / (stderrs**2 + (0.1 * losses) ** 2 + (0.01 * largest) ** 2)

    # 2. One ratio of measured and predicted for all of them.
    predicted = spent.sum(1)
    squares = float(precision @ predicted**2)
    common = float(precision @ (predicted * losses)) / squares if squares > 0 else 0.0
    if common <= 0:
        return {}

    # 3. Ridge regression in units of that ratio: one column for the mean, which is free, and one
    #    for each option's distance from it.
    design = np.column_stack([predicted, spent]) * common
    penalty = np.diag([0.0] + [1 / _SCATTER**2] * len(options))
    solution = np.linalg.lstsq(
        design.T @ (design * precision[:, None]) + penalty,
        design.T @ (precision * losses),
        rcond=None,
    )[0]
    factors = np.clip(solution[0] + solution[1:], _AT_LEAST, _AT_MOST) * common
    return dict(zip(options, factors.tolist(), strict=True))


def corrected(rows: Iterable[Priced], factors: Mapping[str, float]) -> list[Priced]:
    """Rows whose prices are multiplied by the factors of their options; those without one are left
    alone."""
    found: list[Priced] = []
    for row in rows:
        price = row.price * factors.get(row.option, 1.0)
        found.append(Choice(layer=row.layer, option=row.option, bytes=row.bytes, price=price))
    return found
