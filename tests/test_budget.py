"""Budgets with several limits from the verbs and from recipes, and controls that beat the plan."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvprune as cp
from curvprune import run as runs
from curvprune.certificate import judge
from curvprune.cli import app
from curvprune.files import State
from curvprune.model import ItemResults, Split, evaluate
from curvprune.planning import corrections
from curvprune.record import Alternative, Trial
from curvprune.schema import decode
from tests import tiny
from tests.test_api import batches, trained  # noqa: F401

WEIGHTS = {"0": 64 * 48, "3": 48 * 48, "5": 48 * 10}


def every_plan(ledger: cp.Ledger) -> list[dict[str, str]]:
    """All plans of a small ledger."""
    table: dict[str, list[str]] = {}
    for row in ledger.rows:
        table.setdefault(row.layer, []).append(row.option)
    return [dict(zip(table, keys, strict=True)) for keys in itertools.product(*table.values())]


def operations(choices: dict[str, str]) -> float:
    """Bit operations per image of the network of three linear layers, written out."""
    bits = {n: 32 if key == "keep" else int(key[3]) for n, key in choices.items()}
    return sum(WEIGHTS[n] * bits[n] * 32 for n in choices)


def bits_per_weight(ledger: cp.Ledger, choices: dict[str, str]) -> float:
    stored = sum(ledger.layer_rows(n)[key].bytes for n, key in choices.items())
    return 8 * stored / sum(WEIGHTS.values())


def planned(result: cp.Result) -> Trial:
    return next(trial for trial in result.trials if trial.kind == "plan")


def test_without_a_drop_the_plan_is_the_best_within_all_limits(trained):  # noqa: F811
    model, data = trained
    budget = cp.Budget(max_bits=4.5, max_bops=7e5, max_bytes=7000)
    result = cp.quantize(model, batches(data), budget=budget)
    ledger = result.ledger
    assert ledger is not None and result.verdict is None
    within = [
        plan
        for plan in every_plan(ledger)
        if operations(plan) <= budget.max_bops and bits_per_weight(ledger, plan) <= budget.max_bits
    ]
    best = min(ledger.predict(plan).value for plan in within)
    assert planned(result).predicted == pytest.approx(best, rel=1e-9)
    unlimited = min(
        ledger.predict(p).value for p in every_plan(ledger) if bits_per_weight(ledger, p) <= 4.5
    )
    assert best > unlimited, "the second limit must matter"
    assert set(result.plan.uses) == {"max_bytes", "max_bits", "max_bops"}
    assert result.plan.uses["max_bops"] == operations(result.plan.choices) <= budget.max_bops
    assert result.plan.uses["max_bits"] == pytest.approx(
        bits_per_weight(ledger, result.plan.choices)
    )
    assert result.plan.uses["max_bits"] <= 4.5 and result.plan.uses["max_bytes"] <= 7000
    written = json.loads(json.dumps(result.plan.to_dict()))
    assert decode(cp.Plan, written, source="the plan") == result.plan


def test_a_drop_is_certified_within_the_other_limits(trained):  # noqa: F811
    model, data = trained
    free = cp.quantize(
        model, batches(data), bits=[2, 3, 4, 8], budget=cp.Budget("accuracy", max_drop=0.03)
    )
    latency = {(n, f"int{b}-pc-sym"): WEIGHTS[n] / 1000 for n in WEIGHTS for b in (2, 3, 4, 8)}
    latency |= {(n, "keep"): WEIGHTS[n] / 500 for n in WEIGHTS}
    for pair in free.plan.choices.items():
        latency[pair] += 5.0
    assert sum(latency[pair] for pair in free.plan.choices.items()) > 6.5, (
        "the limit must be in the way"
    )
    budget = cp.Budget(
        "accuracy",
        max_drop=0.03,
        max_bits=7,
        limits=[cp.Limit(name="milliseconds", most=6.5, use=latency)],
    )
    result = cp.quantize(model, batches(data), bits=[2, 3, 4, 8], budget=budget)
    assert result.verdict is not None and result.verdict.max_drop == 0.03
    assert result.plan.uses["milliseconds"] <= 6.5
    for trial in result.trials:
        assert trial.uses["milliseconds"] == pytest.approx(
            sum(latency[pair] for pair in trial.choices.items())
        )
        if trial.kind != "control":
            assert trial.uses["milliseconds"] <= 6.5 and trial.uses["max_bits"] <= 7
            assert math.isfinite(trial.expected) and math.isfinite(trial.loss)


def test_controls_are_run_and_named(trained):  # noqa: F811
    model, data = trained
    for budget in (cp.Budget("accuracy", max_drop=0.03), cp.Budget(max_bits=4.6)):
        result = cp.quantize(model, batches(data), budget=budget)
        controls = [trial for trial in result.trials if trial.kind == "control"]
        assert {"uniform", "static", "reversed"} == {trial.name.split(" ")[0] for trial in controls}
        for trial in controls:
            twins = [
                t.name
                for t in result.trials[: result.trials.index(trial)]
                if t.choices == trial.choices
            ]
            assert trial.beats_plan or trial.note == (f"the same as {twins[0]}" if twins else "")


def stages_of(
    model: nn.Module,
    data: Any,
    options: list[Any],
    budget: cp.Budget,
    settings: cp.Settings,
    folder: Path,
) -> tuple[runs.Task, runs.Workspace, cp.Ledger]:
    """A task as the verbs make it, priced."""
    told = runs.Arguments(settings=settings)
    task, space = runs.task_from(model, data, options, budget, folder, told)
    return task, space, runs.solve_and_price(task, space).prices.ledger


def rounded_to(*bits: int) -> list[Any]:
    return [*(cp.Quantize(bits=b) for b in bits), cp.Keep()]


@pytest.mark.parametrize(
    "budget", [cp.Budget(max_bits=6), cp.Budget("loss", max_drop=0.02, max_bits=6)]
)
def test_a_control_that_beats_the_plan_is_used(trained, tmp_path, budget):  # noqa: F811
    """With prices turned upside down the plan is bad, or large, and a uniform control is not."""
    model, data = trained
    settings = cp.Settings(trials=2)
    task, space, ledger = stages_of(
        model, batches(data), rounded_to(2, 4, 5), budget, settings, tmp_path
    )
    highest = max(row.price for row in ledger.rows)
    rows = tuple(replace(row, price=highest - row.price) for row in ledger.rows)
    upside_down = runs.Prices(ledger=replace(ledger, rows=rows))
    selection = runs.select_plans(task, space, upside_down)
    (better,) = [trial for trial in selection.trials if trial.beats_plan]
    assert better.kind == "control" and better is selection.best
    assert better.uses["max_bits"] <= 6
    assert any(f"the control {better.name} beats the plan" in note for note in space.notes)
    plan = next(trial for trial in selection.trials if trial.kind == "plan")
    assert better.loss < plan.loss
    shipped = runs.certify_plans(task, space, selection)
    assert any(t.choices == better.choices for t in shipped.applied)


def test_a_drop_that_the_other_limits_rule_out_is_said(trained):  # noqa: F811
    model, data = trained
    budget = cp.Budget("loss", max_drop=1e-4, max_bits=2.5)
    # Of quadratic prices trials alone say how far they are off.
    told = cp.Settings(prices="quadratic")
    result = cp.quantize(model, batches(data), bits=[2, 4], budget=budget, settings=told)
    assert result.verdict is not None and result.verdict.status != "CERTIFIED"
    note = next(
        note for note in result.plan.notes if note.startswith("no plan measured on select reached")
    )
    lowest = float(note.split("within max_bits is ")[1].split()[0])
    ledger = result.ledger
    assert ledger is not None
    tried = [(t.choices, t.loss, t.loss_stderr) for t in result.trials if t.kind != "applied"]
    factors = corrections(ledger.rows, tried)
    price = {(row.layer, row.option): factors[row.option] * row.price for row in ledger.rows}
    within = [plan for plan in every_plan(ledger) if bits_per_weight(ledger, plan) <= 2.5]
    assert lowest == pytest.approx(
        min(sum(price[pair] for pair in plan.items()) for plan in within), rel=0.01
    )


def test_the_frontier_keeps_to_a_budget(trained):  # noqa: F811
    model, data = trained
    options = [cp.Quantize(bits=bits) for bits in (2, 4, 8)]
    ledger = cp.price(model, batches(data)[:4], options=options)
    assert {n: work.macs for n, work in ledger.work.items()} == WEIGHTS
    assert cp.Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))).work == ledger.work
    whole = cp.frontier(ledger, points=100)
    for budget, kept in (
        (cp.Budget(max_bops=6e5), lambda plan: operations(plan.choices) <= 6e5),
        (
            cp.Budget(max_bits=5, max_bytes=3200),
            lambda plan: plan.bytes <= min(3200, 5 * sum(WEIGHTS.values()) / 8),
        ),
    ):
        some = cp.frontier(ledger, points=100, budget=budget)
        assert [plan.choices for plan in some] == [plan.choices for plan in whole if kept(plan)]
        assert 0 < len(some) < len(whole)
        few = cp.frontier(ledger, points=2, budget=budget)
        assert [plan.choices for plan in few] == [some[0].choices, some[-1].choices]
    assert set(some[0].uses) == {"max_bits"}
    with pytest.raises(ValueError, match="none of its plans keeps"):
        cp.frontier(ledger, budget=cp.Budget(max_bits=1))
    with pytest.raises(ValueError, match="without max_drop"):
        cp.frontier(ledger, budget=cp.Budget(max_drop=1))


def test_multiply_adds_fall_where_hardware_skips_zeros(trained):  # noqa: F811
    model, data = trained
    options = [cp.Prune(pattern="2:4"), cp.Prune(sparsity=0.9)]
    half = sum(WEIGHTS.values()) / 2
    result = cp.compress(
        model,
        batches(data),
        options=options,
        budget=cp.Budget(max_macs=1.2 * half),
        layers=["0", "3", "5"],
    )
    assert result.plan.uses["max_macs"] <= 1.2 * half
    assert "prune2:4" in result.plan.choices.values() and "keep" in planned(result).choices.values()


PAIRS = [(n, key) for n in WEIGHTS for key in ("int4-pc-sym", "keep")]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            cp.Budget(max_macs=5000),
            r"max_macs: at least 5,856 is needed, 5,000 allowed.*prune\(structured=\.\.\.\)",
        ),
        (
            cp.Budget(max_bits=4, max_bops=1),
            r"max_bits: at least 4\.\d+ is needed, 4 allowed; max_bops: .* 749,568 is",
        ),
        (cp.Budget(max_drop=1, max_bytes=900), "max_bytes: at least"),
        (
            cp.Budget(
                max_bits=20,
                limits=[
                    cp.Limit(
                        name="ms", most=3, use={pair: 2.0 - (pair[1] == "keep") for pair in PAIRS}
                    )
                ],
            ),
            r"each of max_bits, ms can be met, but not all together: raise max_bits from 20 to 32 "
            r"\(by 12\) or ms",
        ),
        (
            cp.Budget(limits=[cp.Limit(name="ms", most=3, use={("0", "keep"): 1.0})]),
            "no number for layer '0', .*int4",
        ),
    ],
)
def test_what_cannot_be_met_is_said_before_computing(trained, tmp_path, budget, message):  # noqa: F811
    model, data = trained
    with pytest.raises(ValueError, match=message):
        runs.task_from(model, batches(data), rounded_to(4), budget, tmp_path, runs.Arguments())
    with pytest.raises(ValueError, match=message):
        cp.quantize(model, batches(data), bits=[4], budget=budget)


def test_a_recipe_with_several_limits(tmp_path):
    path = tiny.write_recipe(
        tmp_path, budget="budget: {max_drop: 0.2, max_bits: 8.5, max_bops: 6.5e+6, limits: [LIMIT]}"
    )
    recipe = runs.load_recipe(path_without_table(path, tmp_path))
    task = runs.prepare(recipe, None, progress=False).task
    slow = {
        n: {o.key: layer.numel * (2.0 if "int2" in o.key else 1.0) for o in task.options[n]}
        for n, layer in task.layers.items()
    }
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    most = 1.2 * sum(layer.numel for layer in task.layers.values())
    limit = f"{{name: microseconds, most: {most}, table: {tmp_path / 'slow.json'}}}"
    path.write_text(path.read_text().replace("LIMIT", limit))
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert shown.exit_code == 0 and "budget: max_bits 8.5, at least 7.59" in shown.output, (
        shown.output
    )

    result = runs.run(path, tmp_path / "out", progress=False)
    limits = {limit.name: limit for limit in result.record.limits}
    assert set(limits) == {"max_bits", "max_bops", "microseconds"}
    assert all(limit.used <= limit.most for limit in limits.values())
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    used = sum(slow[n][key] for n, key in plan["choices"].items())
    assert limits["microseconds"].used == pytest.approx(used)
    assert plan["uses"] == {name: limit.used for name, limit in limits.items()}
    for trial in plan["trials"]:
        assert {"predicted", "expected", "loss", "accepted", "uses"} <= set(trial)
    assert set(plan["corrections"]) == {o.key for options in task.options.values() for o in options}
    assert (
        "max_bops" in result.summary
        and "microseconds" in (tmp_path / "out" / "report.html").read_text()
    )

    (tmp_path / "slow.json").write_text(json.dumps({n: {} for n in slow}))
    with pytest.raises(
        runs.RecipeError,
        match=r"recipe\.yaml:\d+: budget\.limits: .*no number for layer 'model",
    ):
        runs.check(path)
    (tmp_path / "slow.json").write_text("[1]")
    with pytest.raises(
        runs.RecipeError,
        match=r"recipe\.yaml:\d+: budget\.limits\[0\]\.table: .*expected JSON such as",
    ):
        runs.check(path)
    (tmp_path / "slow.json").unlink()
    with pytest.raises(
        runs.RecipeError,
        match=r"recipe\.yaml:\d+: budget\.limits\[0\]\.table: .*cannot be read",
    ):
        runs.check(path)


def path_without_table(path, folder):
    other = folder / "without.yaml"
    other.write_text(path.read_text().replace(", limits: [LIMIT]", ""))
    return other


def both_kinds() -> list[Any]:
    grid = cp.Quantize(bits=4)
    return [
        *(cp.Quantize(bits=b) for b in (2, 3, 4, 8)),
        *(cp.Prune(sparsity=s) for s in (0.3, 0.6, 0.9)),
        *(cp.PruneQuantize(prune=cp.Prune(sparsity=s), quantize=grid) for s in (0.3, 0.6, 0.9)),
    ]


def offered_both(data, budget: cp.Budget, model, **settings: Any) -> cp.Result:
    return cp.compress(
        model,
        batches(data),
        options=both_kinds(),
        budget=budget,
        settings=cp.Settings(portable=False, **settings),
    )


def test_each_alone_is_the_best_plan_of_its_options_within_the_limits(trained):  # noqa: F811
    model, data = trained
    result = offered_both(data, cp.Budget(max_bits=7), model, prices="quadratic")
    ledger = result.ledger
    assert ledger is not None
    before = [t for t in result.trials if t.kind != "applied" and "alone" not in t.name]
    factors = corrections(ledger.rows, [(t.choices, t.loss, t.loss_stderr) for t in before])
    price = {
        (row.layer, row.option): factors.get(row.option, 1.0) * row.price for row in ledger.rows
    }
    for name, lacking in (("rounding alone", "prune"), ("pruning alone", "int")):
        alone = next(trial for trial in result.trials if trial.name == name)
        assert alone.kind == "control" and bits_per_weight(ledger, alone.choices) <= 7
        assert not any(lacking in key for key in alone.choices.values())
        within = [
            sum(price[pair] for pair in choices.items())
            for choices in every_plan(ledger)
            if not any(lacking in key for key in choices.values())
            and bits_per_weight(ledger, choices) <= 7
        ]
        assert sum(price[pair] for pair in alone.choices.items()) == pytest.approx(min(within))


def test_with_a_drop_each_alone_is_no_larger_than_the_plan(trained):  # noqa: F811
    model, data = trained
    result = offered_both(data, cp.Budget("loss", max_drop=0.05), model, trials=3)
    plans = [trial for trial in result.trials if trial.kind == "plan" and trial.accepted]
    best = min(trial.bytes for trial in plans)
    alone = [trial for trial in result.trials if "alone" in trial.name]
    assert all(trial.bytes <= best for trial in alone)


def test_nothing_is_held_against_each_other_where_only_one_kind_is_offered(trained):  # noqa: F811
    model, data = trained
    budget, settings = cp.Budget(max_bits=7), cp.Settings(portable=False, trials=1)
    both = [
        cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=b)) for b in (3, 4)
    ]
    for options in (both, [cp.Quantize(bits=3), cp.Quantize(bits=4)]):
        result = cp.compress(
            model, batches(data), options=options, budget=budget, settings=settings
        )
        assert not any("alone" in trial.name for trial in result.trials)
    # A limit that even the uncompressed layers keep: what lacks rounding then is feasible, and
    # still is no pruning.
    budget, options = cp.Budget(max_bits=40), [*both, cp.Quantize(bits=4), cp.Keep()]
    result = cp.compress(model, batches(data), options=options, budget=budget, settings=settings)
    assert {trial.name for trial in result.trials if "alone" in trial.name} == {"rounding alone"}


@pytest.mark.parametrize("most", [8400, 4500])
def test_what_pruning_and_rounding_together_are_worth_is_measured(trained, tmp_path, most):  # noqa: F811
    """Losses of each alone beyond the best plan's: of the models that would ship, written, read
    again and evaluated here."""
    model, data = trained
    settings = cp.Settings(portable=False, trials=2)
    options = [*both_kinds(), cp.Keep()]
    task, space, ledger = stages_of(
        model, batches(data), options, cp.Budget(max_bytes=most), settings, tmp_path
    )
    selection = runs.select_plans(task, space, runs.Prices(ledger=ledger))
    both, *alone = selection.together
    assert both.name == "pruning and rounding" and both.more == 0
    assert [entry.name for entry in alone] == ["rounding alone", "pruning alone"]

    def losses(name: str) -> torch.Tensor:
        choices = next(t.choices for t in selection.trials if t.name == name)
        other = replace(space, state=State(tmp_path / f"alone, {name}"))
        shipped = runs.apply_and_measure(replace(task, budget=None), other, choices)
        changed = task.storage.read(shipped.folder)
        return evaluate(changed, task.splits.select.batches(4), task.objective).loss

    for entry in alone:
        if entry.trial is not None:
            difference = losses(entry.trial) - losses(both.trial)
            assert entry.more == pytest.approx(float(difference.mean()), abs=1e-7)
            stderr = float(difference.std()) / len(difference) ** 0.5
            assert entry.more_stderr == pytest.approx(stderr, rel=0.01, abs=1e-7)
    if most == 4500:  # the smallest zeros in float32 are larger than that
        kept = sum(-(-n // 8) + 4 * (n - round(0.9 * n)) + 16 for n in WEIGHTS.values())
        biases = 4 * (48 + 48 + 10)
        assert alone[1] == Alternative(
            name="pruning alone", trial=None, missed=("max_bytes",), smallest_bytes=kept + biases
        )


def test_only_a_difference_beyond_chance_is_a_reason_to_leave_the_plan():
    """1.645 standard errors of the paired difference: one-sided 95 %."""
    split = Split(items=(), documents=tuple(map(str, range(400))))
    count = torch.ones(400, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=rng, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()

    def beyond(standard_errors: float) -> cp.Verdict:
        losses = 0.01 * (noise - standard_errors / 20)  # 20: the root of 400 items
        before, after = (
            ItemResults(loss=loss, count=count, correct=count) for loss in (0 * noise, losses)
        )
        return judge(before, after, split, cp.Budget(max_drop=0.0), measure="nats")

    assert not runs.clearly_less(beyond(1.6)) and runs.clearly_less(beyond(1.7))
    assert not runs.clearly_less(beyond(-3.0))


def test_a_given_size_is_planned_again_with_corrected_prices(trained, tmp_path):  # noqa: F811
    """3 bits are priced at a sixth of what they cost: the first plan is full of them. Once it and
    the controls have been measured the next plan has fewer and loses less, nearly as little as the
    plan by the honest prices."""
    model, data = trained
    budget = cp.Budget(max_bits=5.5)
    task, space, ledger = stages_of(
        model, batches(data), rounded_to(2, 3, 4, 8), budget, cp.Settings(), tmp_path
    )
    honest = runs.select_plans(task, space, runs.Prices(ledger=ledger)).best
    rows = []
    for row in ledger.rows:
        rows.append(replace(row, price=row.price / 6) if "int3" in row.option else row)
    wrong = runs.Prices(ledger=replace(ledger, rows=tuple(rows)))
    selection = runs.select_plans(task, space, wrong)
    plans = [trial for trial in selection.trials if trial.kind == "plan"]
    assert 1 < len(plans) <= 6 and len({str(plan.choices) for plan in plans}) == len(plans)
    first = plans[0]
    assert selection.best.loss < first.loss
    assert selection.best.loss <= 1.25 * honest.loss + 1e-3
    assert selection.prices.factors["int3-pc-sym"] > selection.prices.factors["int4-pc-sym"]
    once = replace(task, settings=cp.Settings(trials=1))
    again = runs.select_plans(once, space, wrong)
    assert [t.choices for t in again.trials if t.kind == "plan"] == [first.choices]
