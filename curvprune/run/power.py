"""Whether the certify split can decide a budget, judged before a run by a trial rounding."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from curvprune.certificate import (
    Verdict,
    design_effect,
    documents_needed,
    fewest_clusters,
    items_needed_for_accuracy,
    judge,
    power_for_accuracy,
    probability_of_certifying,
)
from curvprune.compression import solve_layer
from curvprune.model import Batch, ItemResults, Split, evaluate, find_layers, to_device
from curvprune.planning import Budget
from curvprune.run.evaluation import fewest_to_certify, finite_reach
from curvprune.run.task import Task

# Parameters above which rounding a copy of the model takes longer than a check should.
POWER_UP_TO = 2_000_000_000
# Items of the trial rounding: at least and at most, in between as many as `TRIAL_SECONDS` are
# enough for.
TRIAL_ITEMS = (16, 256)
TRIAL_SECONDS = 10.0  # of forward passes, for each of up to four models
ENOUGH_POWER = 0.8
POWER_QUANTILE = 0.8416  # of the normal distribution at `ENOUGH_POWER`


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """Whether the certify split can decide the budget, judged before the run.

    Attributes:
        chance: probability that a model without any true loss would be certified, if its results
            differ from the uncompressed model's as much as those of a trial rounding (to nearest,
            measured on the select split) do.
        needed: the items for 80 %.
        trial_drop: what the trial rounding lost.
        disagreement: the share of items on which the two models differ, for accuracy.
    """

    items: int
    documents: int
    chance: float
    needed: int
    trial_drop: float
    disagreement: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rounding:
    """A trial rounding: its verdict on select, and the results of both models."""

    verdict: Verdict
    baseline: ItemResults
    results: ItemResults
    split: Split


def estimate_power(task: Task) -> tuple[Power | None, list[str]]:
    """The power of the certify split, and what to warn of.

    Cost: at most four evaluations on a part of the select split, about `TRIAL_SECONDS` each, and
    three roundings of a copy of the model.
    """
    budget = task.budget
    if budget is None or budget.max_drop is None:
        return None, []
    parameters = sum(p.numel() for p in task.model.parameters())
    if parameters > POWER_UP_TO:
        return None, [
            f"whether the certify split can decide was not estimated: {parameters:,} parameters to "
            "round"
        ]
    try:
        rounding = _nearest_rounding(task, budget, budget.max_drop / 2)
        power = _power_of(task, budget, rounding)
    except ValueError as error:
        return None, [f"whether the certify split can decide could not be estimated: {error}"]
    if power.chance >= ENOUGH_POWER:
        return power, []
    return power, [
        f"the certify split ({power.items} items of {power.documents} documents) is unlikely to "
        f"decide max_drop: {budget.max_drop:g}: even a model without any true loss would be "
        f"certified with probability {power.chance:.0%} only; write certify: {power.needed} or "
        "more (in more documents), or a larger max_drop"
    ]


def _nearest_rounding(task: Task, budget: Budget, target: float) -> _Rounding:
    """Layers rounded to nearest, at the level of options whose drop on the select split comes
    nearest to ``target`` in three trials."""
    # 1. As many items as there is time for.
    select = task.splits.select
    item = to_device(select.items[0], next(task.model.parameters()).device)
    seconds = seconds_of(lambda: run_without_gradient(task, item))
    affordable = int(TRIAL_SECONDS / max(seconds, 1e-6))
    used = min(max(affordable, TRIAL_ITEMS[0]), TRIAL_ITEMS[1])
    split = select.some(range(min(used, len(select.items))))
    size = task.settings.batch_size
    baseline = evaluate(task.model, split.batches(size), task.objective)

    # 2. Every layer's options from the largest to the smallest; a level is a place in all of them.
    ordered = {}
    for name, offered in task.options.items():
        sizes = {option: task.layer_bytes(name, option) for option in offered}
        ordered[name] = sorted(offered, key=sizes.__getitem__, reverse=True)
    levels = max(len(options) for options in ordered.values())
    model = copy.deepcopy(task.model)
    own = find_layers(model)

    # 3. Bisection on the level.
    low, high, tried = 0, levels - 1, []
    for _ in range(3):
        level = (low + high) // 2
        for name, options in ordered.items():
            option = options[level * len(options) // levels]
            (solved,) = solve_layer(task.layers[name], [option], None)
            own[name].write_(solved.weight)
        results = evaluate(model, split.batches(size), task.objective)
        verdict = judge(baseline, results, split, budget, measure=task.objective.measure)
        found = _Rounding(verdict=verdict, baseline=baseline, results=results, split=split)
        tried.append((abs(verdict.drop - target), found))
        if verdict.drop > target:
            high = level - 1
        else:
            low = level + 1
        if low > high:
            break
    _, best = min(tried, key=lambda trial: trial[0])
    return best


def _power_of(task: Task, budget: Budget, rounding: _Rounding) -> Power:
    """How often the certify split would certify a model without loss whose results scatter like
    those of the trial rounding."""
    assert budget.max_drop is not None
    drop, target = rounding.verdict.drop, budget.max_drop / 2
    # The scatter of small differences grows with the change of the weights, their mean with its
    # square.
    milder = min(1.0, (target / drop) ** 0.5) if drop > 0 else 1.0
    if budget.quantile is not None:
        return _power_for_quantile(task, rounding, budget.quantile, budget.confidence)
    one_each = float(rounding.baseline.count.max()) <= 1
    if budget.metric == "accuracy" or (budget.metric == "top1" and one_each):
        return _power_for_accuracy(task, budget, rounding, milder)
    return _power_for_loss(task, budget, rounding, milder)


def _clusters(split: Split) -> int:
    """How many clusters a split has."""
    return int(split.clusters().max()) + 1


def _power_for_accuracy(task: Task, budget: Budget, rounding: _Rounding, milder: float) -> Power:
    assert budget.max_drop is not None
    certify = task.splits.certify
    before, after = rounding.baseline.correct > 0.5, rounding.results.correct > 0.5
    differ = int((before != after).sum())
    # One more than were seen: no disagreement among few items does not mean that there is none.
    share = milder * (differ + 1) / (len(before) + 1)
    cost = design_effect(certify.clusters(), certify.copies())
    asked = {"max_drop": budget.max_drop, "confidence": budget.confidence}
    items, documents = len(certify.items), _clusters(certify)
    chance = power_for_accuracy(items / cost, share, **asked)
    wanted = cost * items_needed_for_accuracy(share, **asked)
    # Items of documents take some of these, too.
    fewest = fewest_clusters(1 - budget.confidence)
    if documents < min(items, fewest):
        chance, wanted = 0.0, max(wanted, items * fewest / documents)
    return Power(
        items=items,
        documents=documents,
        trial_drop=rounding.verdict.drop,
        chance=chance,
        needed=int(np.ceil(wanted)),
        disagreement=share,
    )


def _power_for_quantile(
    task: Task, rounding: _Rounding, quantile: float, confidence: float
) -> Power:
    """A model without any loss exceeds no budget: what counts is the number of documents."""
    certify = task.splits.certify
    documents = _clusters(certify)
    least = documents_needed(quantile, confidence)
    return Power(
        items=len(certify.items),
        documents=documents,
        trial_drop=rounding.verdict.drop,
        chance=float(documents >= least),
        needed=-(-least * len(certify.items) // documents),
        disagreement=None,
    )


def _power_for_loss(task: Task, budget: Budget, rounding: _Rounding, milder: float) -> Power:
    assert budget.max_drop is not None
    certify, verdict = task.splits.certify, rounding.verdict
    items, documents = len(certify.items), _clusters(certify)
    fewer = _clusters(rounding.split) / documents
    shrink = milder * fewer**0.5
    stderr, reach = verdict.stderr * shrink, finite_reach(verdict) * shrink
    chance = probability_of_certifying(
        0.0, 0.0, stderr, max_drop=budget.max_drop, confidence=budget.confidence, reach=reach
    )
    # So few documents decide nothing, whatever they lose.
    fewest = fewest_to_certify(budget.confidence, verdict.stderr)
    if documents < fewest:
        chance = 0.0
    wanted = np.inf
    if budget.max_drop > 0:
        wanted = items * ((reach + POWER_QUANTILE * stderr) / budget.max_drop) ** 2
    if not np.isfinite(wanted):
        raise ValueError("max_drop: 0 can only be met by a model that is better")
    wanted = max(wanted, items * fewest / documents)
    return Power(
        items=items,
        documents=documents,
        trial_drop=verdict.drop,
        chance=chance,
        needed=max(2, int(np.ceil(wanted))),
        disagreement=None,
    )


def run_without_gradient(task: Task, item: Batch) -> None:
    """One forward pass of the model to compress."""
    with torch.no_grad():
        task.objective.loss(task.model, item)


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that a second call takes: the first warms caches up."""
    work()
    start = time.monotonic()
    work()
    return time.monotonic() - start
