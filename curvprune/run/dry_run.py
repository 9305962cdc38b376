"""`check`: what a run would do, need and risk, by a look at recipe, model and data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from curvprune.compression import Moments, Training, solve_layer
from curvprune.curvature import Draws, fisher_pass
from curvprune.model import Batch, to_device
from curvprune.options import Keep, Option
from curvprune.pricing import MEASURED_ROWS
from curvprune.run.layer_table import LayerRow
from curvprune.run.power import Power, estimate_power, run_without_gradient, seconds_of
from curvprune.run.prepare import Widths, prepare
from curvprune.run.recipe import load_recipe
from curvprune.run.select import TRIALS_BESIDES
from curvprune.run.shares import by_shares
from curvprune.run.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitNeed:
    """A limit of the budget, and the least that any plan uses of it by itself."""

    name: str
    most: float
    least: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What `check` found.

    Attributes:
        layers: those with options; ``kept`` are the others.
        cuts: hidden units that could be removed first.
        minutes: of each stage.
        memory_bytes: at the peak.
        smallest_bytes, dense_bytes: of the weights, with the smallest options and now.
        warnings: what may go wrong.
    """

    layers: tuple[LayerRow, ...]
    kept: tuple[str, ...]
    cuts: Mapping[str, Widths]
    minutes: Mapping[str, float]
    memory_bytes: int
    smallest_bytes: int
    dense_bytes: int
    limits: tuple[LimitNeed, ...]
    power: Power | None
    warnings: tuple[str, ...]


def check(recipe_path: str | Path) -> Check:
    """Validate a recipe against its model and data, and estimate the run.

    Cost: one item and one layer are timed; the layers are rounded to nearest, at most three times,
    on a copy, to see whether the certify split can decide the budget. Raises `RecipeError`.
    """
    recipe = load_recipe(recipe_path)
    prepared = prepare(recipe, None, progress=False)
    task = prepared.task
    rows = []
    for name, layer in task.layers.items():
        keys = tuple(option.key for option in task.options[name])
        rows.append(LayerRow(name=name, kind=layer.kind, shape=layer.shape, options=keys))
    dense = sum(p.numel() * p.element_size() for p in task.model.parameters())
    timing = _Timing.of(task)
    power, warnings = estimate_power(task)
    if (leak := task.splits.leak()) is not None:
        warnings.append(leak)
    limits = [
        LimitNeed(name=name, most=most, least=task.least(name)) for name, most in task.most.items()
    ]
    return Check(
        layers=tuple(rows),
        kept=prepared.kept,
        cuts=prepared.offered,
        minutes=_minutes(task, timing, prepared.offered),
        memory_bytes=_memory(task, timing, dense, smaller_too=bool(prepared.offered)),
        smallest_bytes=task.smallest_bytes(),
        dense_bytes=dense,
        limits=tuple(limits),
        power=power,
        warnings=tuple(warnings),
    )


# ------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timing:
    """Seconds on this machine, now.

    Attributes:
        item: what was timed.
        forward, both: a forward pass of one item; with a backward one.
        solving: all options of a layer of middle size; ``option`` of one of them.
        share: the weights of all layers over those of that layer.
    """

    item: Batch
    forward: float
    both: float
    solving: float
    option: float
    share: float

    @staticmethod
    def of(task: Task) -> _Timing:
        device = next(task.model.parameters()).device
        item = to_device(task.splits.calibrate.items[0], device)
        forward = seconds_of(lambda: run_without_gradient(task, item))

        def backward() -> None:
            draws = Draws(labels=1)
            fisher_pass(task.model, task.objective, [item], task.layers, {}, draws=draws)

        both = seconds_of(backward)
        by_size = sorted(task.layers.values(), key=lambda layer: layer.numel)
        layer = by_size[len(by_size) // 2]
        offered = task.options[layer.name]
        changing: list[Option] = [option for option in offered if not isinstance(option, Keep)]
        unit_moments = torch.eye(layer.shape[1], device=device).repeat(layer.groups, 1, 1)
        solving = 0.0
        if changing:
            moments = Moments(unit_moments)
            solving = seconds_of(lambda: solve_layer(layer, changing, moments))
        weights = sum(each.numel for each in task.layers.values())
        return _Timing(
            item=item,
            forward=forward,
            both=both,
            solving=solving,
            option=solving / max(1, len(changing)),
            share=weights / layer.numel,
        )


def _minutes(task: Task, timing: _Timing, cuts: Mapping[str, Widths]) -> dict[str, float]:
    """Minutes of each stage."""
    settings, splits = task.settings, task.splits
    forward, both = timing.forward, timing.both
    calibrate, price = len(splits.calibrate.items), len(splits.price.items)
    select, certify = len(splits.select.items), len(splits.certify.items)
    attempts = settings.attempts if task.budget is not None else 1
    applying = 2.2 * calibrate * forward + timing.share * timing.option
    seconds = {
        "apply": attempts * applying,
        "certify": (1 + attempts) * certify * forward,
    }
    if task.budget is not None:
        seconds |= _pricing_seconds(task, timing, applying)
        # The controls, the plans of the search, and the uncompressed model.
        tried = settings.trials + TRIALS_BESIDES
        seconds["select"] = tried * select * forward + (tried - 1) * applying
    if cuts:
        # Two passes for moments, one for gradients and one for prices, and a few factors for each
        # width.
        widest = max(layer.shape[1] for layer in task.layers.values())
        device = next(task.model.parameters()).device
        factor = seconds_of(lambda: torch.linalg.cholesky(torch.eye(widest, device=device)))
        passes = calibrate * (2.2 * forward + both) + price * 2 * both
        widths = sum(len(cut.widths) for cut in cuts.values())
        seconds["remove units"] = passes + 4 * factor * widths
    if task.recover is not None:
        recovering = _recovery_seconds(task.recover, timing, select)
        seconds["recover"] = attempts * recovering
    return {stage: value / 60 for stage, value in seconds.items()}


def _pricing_seconds(task: Task, timing: _Timing, applying: float) -> dict[str, float]:
    settings, forward = task.settings, timing.forward
    calibrate, price = len(task.splits.calibrate.items), len(task.splits.price.items)
    backward = max(timing.both - forward, forward)
    if by_shares(task, chosen=True):
        # One pass with all options, others with one; twice forward and once back for each.
        first = applying + timing.share * timing.solving
        slopes = price * (2 * forward + backward)
        passes = first + (settings.rounds - 1) * applying
        return {"price": passes + settings.rounds * slopes}
    found = {
        "solve": 1.6 * calibrate * forward + timing.share * timing.solving,
        "price": price * (forward + settings.labels * backward),
    }
    if settings.measure_above is not None:
        # The most that it can take: prices that are right need a fourth of it.
        found["measure prices"] = price * (1 + MEASURED_ROWS) * forward
    return found


def _recovery_seconds(training: Training, timing: _Timing, select: int) -> float:
    if training.steps is None:
        assert training.seconds is not None
        return training.seconds
    measuring = math.ceil(training.steps / training.interval) * select * timing.forward
    step = training.batch_size * (timing.both + timing.forward)
    return float(min(training.seconds or np.inf, training.steps * step + measuring))


def _memory(task: Task, timing: _Timing, dense: int, *, smaller_too: bool) -> int:
    """Bytes at the peak."""
    weights = sum(layer.numel for layer in task.layers.values())
    options = max(len(offered) for offered in task.options.values())
    with torch.no_grad():
        logits = task.objective.outputs(task.model, timing.item).numel()
    # 1. Two models (four, where a smaller one is made first) and the libraries.
    memory = 2 * dense * (2 if smaller_too else 1) + 500_000_000
    # 2. Three copies of an evaluation batch's logits.
    memory += 12 * logits * task.settings.batch_size
    # 3. 16-bit changes and a float32 diagonal.
    if task.budget is not None:
        memory += weights * (2 * options + 4)
    # 4. Values, gradient, two moments and the best state; less, where weights are on a grid.
    if task.recover is not None:
        memory += 20 * sum(p.numel() for p in task.model.parameters())
    return memory
