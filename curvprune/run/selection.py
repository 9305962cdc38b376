"""Stage *select*: plans along the frontier and their controls, measured on the select split.

A `Bench` is a copy of the model that takes on any plan's candidates, so that a trial costs one
evaluation. The trials are records (dicts, as reports have them): what a plan is, what it was
predicted to lose and what it lost.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from curvprune.certificate import Verdict, compare, probability_of_certifying
from curvprune.compression import Solved
from curvprune.model import BROKEN, ItemResults, Split, evaluate, find_layers
from curvprune.options import Option, pruner_of, quantizer_of
from curvprune.planning import (
    Budget,
    Infeasible,
    Measurement,
    Within,
    cheapest,
    corrected,
    corrections,
    scaled,
    search_plans,
)
from curvprune.pricing import Row
from curvprune.run.baselines import Control, controls
from curvprune.run.task import Job

ACCEPTABLE = 0.80  # predicted probability of being certified that a plan must have on select
TRIALS_BESIDES = 8  # the uncompressed model, at most six controls, and a plan after the first four
CLEAR = 1.645  # standard errors: one-sided 95 %
SAME_SIZE = (
    1.002  # two plans whose bytes differ by less are one size: what they lost on select decides
)
# What is held against a plan of both kinds: the part that its options have, and the one that they
# lack.
ALONE: dict[str, tuple[Callable[[Option], Any], Callable[[Option], Any]]] = {
    "rounding alone": (quantizer_of, pruner_of),
    "pruning alone": (pruner_of, quantizer_of),
}


def results_on(job: Job, name: str, model: nn.Module, split: Split) -> ItemResults:
    """Evaluate a model on a split, or read what an earlier process measured. Items for which a
    compressed model returns no finite numbers count as `BROKEN`, and are noted; of the uncompressed
    model they are a ``ValueError``."""
    if not job.state.has(name):
        results = evaluate(model, split.batches(job.settings.batch_size), job.objective)
        if model is job.uncompressed and not bool(results.loss.isfinite().all()):
            bad = int((~results.loss.isfinite()).sum())
            raise ValueError(
                f"the uncompressed model's loss is no finite number for {bad} of "
                f"{len(results.loss)} items: nothing can be compared with it; look at the "
                "model's weights and at the data"
            )
        keep_results(job, name, results.finite())
    record = job.state.read_json(name)
    results = ItemResults(**{k: torch.tensor(v, dtype=torch.float64) for k, v in record.items()})
    if broken := int((results.loss >= BROKEN * results.count.clamp_min(1)).sum()):
        what = f"for {broken} of {len(results.loss)} items a plan's outputs are no finite numbers"
        if (note := f"{what}: they count as {BROKEN:g} nats for each position") not in job.notes:
            job.notes.append(note)
    return results


def keep_results(job: Job, name: str, results: ItemResults) -> None:
    """Write what was measured where `results_on` reads it."""
    job.state.write_json(
        name,
        {
            "loss": results.loss.tolist(),
            "count": results.count.tolist(),
            "correct": results.correct.tolist(),
        },
    )


def _chance(job: Job, verdict: Verdict) -> float:
    """Predicted probability that a plan with this verdict on select is certified on the certify
    split."""
    return chance_at(job, verdict.drop, verdict.stderr, verdict.bound)


def chance_at(job: Job, drop: float, stderr: float, bound: float) -> float:
    """The same for any drop and error on select; ``bound`` is that of a test with this ``drop``.
    Beyond what normal losses of so many documents make of ``stderr``, it lies further out where
    losses are skewed. On certify there are usually more documents: the first part falls with their
    root and has a smaller quantile, the second in proportion (as in the certificate's
    ``needed``)."""
    assert job.budget is not None and job.budget.max_drop is not None
    here, there = (len(set(split.documents)) for split in (job.splits.select, job.splits.certify))
    fewer, confidence = here / there, job.budget.confidence
    t_here, t_there = (float(stats.t.ppf(confidence, max(1, n - 1))) for n in (here, there))
    straight = min(bound - drop, t_here * stderr)
    return probability_of_certifying(
        drop,
        stderr,
        stderr * fewer**0.5,
        max_drop=job.budget.max_drop,
        confidence=confidence,
        reach=straight * fewer**0.5 * t_there / t_here + (bound - drop - straight) * fewer,
    )


def plan_key(choices: Mapping[str, str]) -> str:
    """A short name for a plan, for its files."""
    return hashlib.sha256(json.dumps(sorted(choices.items())).encode()).hexdigest()[:16]


@dataclass(slots=True)
class Bench:
    """A copy of the model whose layers are set to any plan's candidates, for measuring on the
    select split."""

    job: Job
    candidates: Callable[[str], list[Solved]]
    baseline: ItemResults  # of the uncompressed model
    start: ItemResults  # of the model that the prices are of: the same, unless units were removed
    model: nn.Module | None = None
    now: dict[str, str] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, name: str, kind: str, choices: Mapping[str, str]) -> dict[str, Any]:
        """Measure a plan; returns its trial record (also appended to ``trials``)."""
        path = self.path(choices)
        if not self.job.state.has(path):
            self._set(choices)
        results = results_on(self.job, path, self.model or self.job.model, self.job.splits.select)
        same = next(
            (f"the same as {t['name']}" for t in self.trials if t["choices"] == choices), ""
        )
        self.trials.append(self.record(name, kind, choices, results, same))
        return self.trials[-1]

    def beyond(self, trial: Mapping[str, Any], other: Mapping[str, Any]) -> Verdict:
        """What a measured plan loses beyond another one, paired by item."""
        split = self.job.splits.select
        first, second = (
            results_on(
                self.job, self.path(t["choices"]), self.job.model, split
            )  # read, both have been measured
            for t in (other, trial)
        )
        return compare(
            first, second, split, Budget("loss", max_drop=0.0), measure=self.job.objective.measure
        )

    def path(self, choices: Mapping[str, str]) -> str:
        """Where the results of a plan's candidates lie."""
        return f"select/{plan_key(choices)}.json"

    def record(
        self, name: str, kind: str, choices: Mapping[str, str], results: ItemResults, note: str = ""
    ) -> dict[str, Any]:
        job = self.job
        budget = job.budget if job.budget is not None and job.budget.max_drop is not None else None
        compare_as = budget or Budget("loss", max_drop=0.0)
        verdict = compare(
            self.baseline, results, job.splits.select, compare_as, measure=job.objective.measure
        )
        predicted = job.ledger.predict(choices) if job.ledger is not None else None
        chance = _chance(job, verdict) if budget is not None else None
        of_loss = verdict
        if compare_as.metric != "loss" or self.start is not self.baseline:
            as_loss = Budget("loss", max_drop=0.0)
            of_loss = compare(
                self.start, results, job.splits.select, as_loss, measure=job.objective.measure
            )
        return {
            "name": name,
            "kind": kind,
            "choices": dict(choices),
            "bytes": job.bytes_of(choices),
            "predicted": None if predicted is None else predicted.value,
            "predicted_stderr": None if predicted is None else _finite(predicted.stderr),
            "expected": None if job.ledger is None else job.expected(choices),
            "measured": float(
                (results.loss.sum() - self.start.loss.sum()) / self.start.count.sum()
            ),
            "measured_stderr": _finite(of_loss.stderr),
            "metric_drop": verdict.drop,
            "metric_stderr": verdict.stderr,
            "metric_bound": _finite(verdict.bound),
            "chance": chance,
            "accepted": None if chance is None else chance >= ACCEPTABLE,
            "uses": job.uses(choices),
            "items": len(self.baseline.loss),
            "note": note,
        }

    def _set(self, choices: Mapping[str, str]) -> None:
        job = self.job
        if self.model is None:
            self.model = copy.deepcopy(job.model)
        own = find_layers(self.model)
        for name, key in choices.items():
            if self.now.get(name, "keep") == key:
                continue
            layer = job.layers[name]
            if key == "keep":
                matrix = layer.as_matrix(layer.weight.detach())
            else:
                matrix = next(s.weight for s in self.candidates(name) if s.option.key == key)
            own[name].write_(matrix)
            self.now[name] = key


def select_plans(
    job: Job, candidates: Callable[[str], list[Solved]]
) -> tuple[Bench, dict[str, Any]]:
    """Stage *select*: trials along the frontier and controls. Returns them and the one to apply and
    certify."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        chosen = _select_plans(job, candidates)
    for w in caught:  # recorded to be noted, not to be hidden
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    job.notes += sorted({str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)})
    return chosen


def _select_plans(
    job: Job, candidates: Callable[[str], list[Solved]]
) -> tuple[Bench, dict[str, Any]]:
    assert job.budget is not None and job.ledger is not None
    budget, rows = job.budget, job.ledger.rows
    with job.stages.stage("measure on select", job.settings.trials + TRIALS_BESIDES) as advance:
        baseline = start = results_on(
            job, "select/baseline.json", job.uncompressed, job.splits.select
        )
        spent = 0.0
        if job.original is not None:
            start = results_on(job, "select/start.json", job.model, job.splits.select)
            spent = _spent(job, baseline, start)
        bench = Bench(job, candidates, baseline, start)
        advance(1)
        if budget.max_drop is None:
            best = bench.measure("plan 1", "plan", cheapest(rows, job.within))
        else:

            def measured(choices: dict[str, str]) -> Measurement:
                trial = bench.measure(f"plan {len(bench.trials) + 1}", "plan", choices)
                advance(1 + len(bench.trials))
                reach = reach_of(trial)
                return Measurement(
                    accepted=trial["accepted"],
                    drop=trial["metric_drop"] - spent,
                    loss=trial["measured"],
                    stderr=trial["measured_stderr"] or 0.0,
                    allowed=allowed_drop(job, min(0.0, spent), trial["metric_stderr"], reach)
                    - spent,
                )

            start_at = max(0.0, budget.max_drop - spent)
            found = search_plans(
                rows, measured, start=start_at, within=job.within, max_trials=job.settings.trials
            )
            job.factors = found.factors
            for record, trial in zip(bench.trials, found.steps, strict=True):
                record["expected"] = trial.expected
            # Where none was accepted, the most cautious plan that was measured goes to the
            # certificate all the same.
            best = max(
                bench.trials, key=lambda t: (t["choices"] == found.best, t["chance"], t["bytes"])
            )
        for control in _controls(job, best):
            bench.measure(control.name, "control", control.choices)
            advance(1 + len(bench.trials))
        best = _planned_again(
            job, bench, best, 1 if budget.max_drop is not None else job.settings.trials - 1
        )
        job.record["together"] = _together(job, bench, best)
        advance(1 + len(bench.trials))
        best = _best_measured(job, bench, best)
        advance(job.settings.trials + TRIALS_BESIDES)
    return bench, best


def _spent(job: Job, baseline: ItemResults, start: ItemResults) -> float:
    """What the removed units alone cost on the select split, in the budget's metric; it is
    noted."""
    assert job.budget is not None
    budget = job.budget if job.budget.max_drop is not None else Budget("loss", max_drop=0.0)
    verdict = compare(baseline, start, job.splits.select, budget, measure=job.objective.measure)
    measure = "of accuracy" if budget.metric == "accuracy" else job.objective.measure
    text = f"the removed units alone cost {verdict.drop:.4g} ± {verdict.stderr:.2g} {measure} on the select split"
    job.notes.append(
        f"{text}; prices, predictions and trials come on top of that, the verdict holds for both "
        "together"
    )
    if job.budget.max_drop is not None and verdict.drop >= job.budget.max_drop:
        job.notes.append("that is more than the budget: remove fewer units")
    return verdict.drop


def _leftover(job: Job) -> str:
    """What the limits on size and speed leave possible, for a budget whose drop was missed."""
    assert job.ledger is not None
    if not job.most:
        return ""
    lowest = job.expected(cheapest(corrected(job.ledger.rows, job.factors), job.within))
    return f"; the lowest loss expected within {', '.join(job.most)} is {lowest:.3g} {job.objective.measure}"


def _controls(job: Job, best: Mapping[str, Any]) -> list[Control]:
    """Controls near the size of the best plan."""
    assert job.ledger is not None

    def plan(rows: list[Row], size: int) -> dict[str, str]:
        return cheapest(rows, Within(max_bytes=size, same_option=job.same_option))

    size = best["bytes"] - job.fixed_bytes
    return controls(job.ledger.rows, job.layers, job.groups, size=size, plan=plan)


def _families(job: Job) -> list[str]:
    """What of `ALONE` can be held against both together: nothing, where only one of the two is
    offered."""
    offered = [option for options in job.options.values() for option in options]
    if not (any(map(pruner_of, offered)) and any(map(quantizer_of, offered))):
        return []
    return [
        name
        for name, (own, other) in ALONE.items()
        if any(own(o) and other(o) is None for o in offered)
    ]


def _options_of(job: Job, family: str) -> dict[str, set[str]]:
    """Layer → the options that a family of `ALONE` has for it: those without the other part, or
    all, where every one has it."""
    _, other = ALONE[family]
    without = {
        n: {o.key for o in options if other(o) is None} for n, options in job.options.items()
    }
    return {n: without[n] or {o.key for o in job.options[n]} for n in job.layers}


def _together(job: Job, bench: Bench, best: dict[str, Any]) -> list[dict[str, Any]]:
    """What pruning and rounding in one plan are worth: the best plan, and of each alone the best
    one by the same corrected prices within the same limits, measured as a control, at most as large
    as the best plan where ``max_drop`` decides the size. Or why there is none. ``more`` is the loss
    beyond the best plan's, paired by item."""
    assert job.ledger is not None and job.budget is not None

    def entry(family: str, trial: Mapping[str, Any]) -> dict[str, Any]:
        more = bench.beyond(trial, best)
        return {
            "name": family,
            "trial": trial["name"],
            **{
                key: trial[key]
                for key in ("bytes", "predicted", "predicted_stderr", "measured", "measured_stderr")
            },
            "more": more.drop,
            "more_stderr": _finite(more.stderr),
        }

    within = job.within
    if job.budget.max_drop is not None:
        most = best["bytes"] + within.fixed_bytes - job.fixed_bytes
        within = replace(within, max_bytes=most)
    prices, found = corrected(job.ledger.rows, job.factors), []
    for family in _families(job):
        options = _options_of(job, family)
        try:
            choices = cheapest([row for row in prices if row.option in options[row.layer]], within)
        except Infeasible as error:
            sizes = {(n, o.key): job.layer_bytes(n, o) for n in job.layers for o in job.options[n]}
            least = [
                min(sum(sizes[n, key] for n in group) for key in options[group[0]])
                for group in job.groups
            ]
            missed = [shortfall.name for shortfall in error.shortfalls]
            found.append(
                {
                    "name": family,
                    "trial": None,
                    "missed": missed,
                    "smallest_bytes": job.fixed_bytes + sum(least),
                }
            )
            continue
        found.append(entry(family, bench.measure(family, "control", choices)))
    return [entry("pruning and rounding", best), *found] if found else []


def _planned_again(job: Job, bench: Bench, best: dict[str, Any], most: int) -> dict[str, Any]:
    """Plan again by prices that everything measured so far, controls included, has corrected: with
    ``max_drop`` for the smallest plan expected to lose no more than the best one, else for the
    least loss. Measures at most ``most`` plans, until there is none that is new, and returns the
    best of all. Where no plan was accepted the most cautious one stays: the search has tried the
    lowest price there is."""
    assert job.budget is not None
    job.factors = _corrections(job, bench)
    for _ in range(most if best["accepted"] in (True, None) else 0):
        new = (
            plan
            for plan in _proposals(job, best)
            if not any(plan == trial["choices"] for trial in bench.trials)
        )
        if (choices := next(new, None)) is None:
            break
        plans = sum(t["kind"] == "plan" for t in bench.trials)
        again = bench.measure(f"plan {plans + 1}", "plan", choices)
        job.factors = _corrections(job, bench)
        if job.budget.max_drop is None:
            best = min(best, again, key=_lost)
        elif again["accepted"] and again["bytes"] < best["bytes"]:
            best = again
    return best


def _proposals(job: Job, best: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The next plans by corrected prices: with what pairs of layers do to each other, and without.
    Which of the two is nearer to the truth depends on how far the quadratic model holds; both are
    worth a measurement."""
    assert job.ledger is not None and job.budget is not None
    pairs, given = job.ledger.quadratic(), job.budget.max_drop is None
    if pairs is not None:
        prices = scaled(pairs, job.factors)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # about the steps on the way, which are no plans
                found = (
                    prices.cheapest(job.within)
                    if given
                    else prices.smaller(best["choices"], job.within)
                )
        except RuntimeError:  # the solver gave up on a step; the plan without pairs is still there
            found = None
        if found is not None:
            yield found
    at_most = None if given else job.expected(best["choices"])
    yield cheapest(corrected(job.ledger.rows, job.factors), job.within, max_loss=at_most)


def _corrections(job: Job, bench: Bench) -> dict[str, float]:
    """What everything measured says about the prices; where that is lost in noise, what was known
    before."""
    assert job.ledger is not None
    measured = [(t["choices"], t["measured"], t["measured_stderr"] or 0.0) for t in bench.trials]
    return corrections(job.ledger.rows, measured) or job.factors


def _clearly_less(more: Verdict) -> bool:
    return more.drop < -CLEAR * more.stderr


def _lost(trial: Mapping[str, Any]) -> float:
    return trial["measured"] if math.isfinite(trial["measured"]) else math.inf


def _best_measured(job: Job, bench: Bench, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, or the control that beats it, always one that keeps to the other limits. With
    ``max_drop`` the smallest that was accepted is wanted, and of several of one size the one that
    lost least; else the one that lost least. To have lost less than the plan, a control must differ
    by 1.645 standard errors: of several, one always lost less."""
    assert job.budget is not None
    controls = [
        t for t in bench.trials if t["kind"] == "control" and job.keeps_within(t["choices"])
    ]
    within = [plan, *controls]
    if job.budget.max_drop is not None:
        passing = [t for t in within if t["accepted"]]
        if not passing:
            job.notes.append(
                "no plan measured on select reached the wanted chance of being certified"
                + _leftover(job)
            )
        smallest = min(t["bytes"] for t in passing or [plan])
        within = [t for t in passing or within if t["bytes"] <= SAME_SIZE * smallest]
    if plan in within:
        within = [
            plan,
            *(t for t in within if t is not plan and _clearly_less(bench.beyond(t, plan))),
        ]
    best = min(within, key=_lost)
    if best is plan:
        return plan
    if plan in within:
        why = f"lost {best['measured']:.4g} on select, {plan['name']} {plan['measured']:.4g}"
    elif plan["accepted"]:
        why = f"has {best['bytes']:,} bytes, {plan['name']} {plan['bytes']:,}"
    else:
        why = f"has {best['bytes']:,} bytes; no plan was accepted"
    best["beats_plan"] = True
    best["note"] = f"a control beats the plan: it {why}"
    job.notes.append(f"the control {best['name']} beats the plan and was used instead: it {why}")
    return best


def reach_of(record: Mapping[str, Any]) -> float:
    bound = record["metric_bound"]
    return math.inf if bound is None else bound - record["metric_drop"]


def allowed_drop(job: Job, low: float, stderr: float, reach: float) -> float:
    """The drop from ``low`` to the budget at which a plan's chance falls to `ACCEPTABLE`, with this
    error on select and this distance from a drop to its bound."""
    assert job.budget is not None and job.budget.max_drop is not None
    high = job.budget.max_drop
    for _ in range(40):
        middle = (low + high) / 2
        chance = chance_at(job, middle, stderr, middle + reach)
        low, high = (middle, high) if chance >= ACCEPTABLE else (low, middle)
    return low


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
