"""Stage *price*, by shares of the loss: what a sequential pass and the slope of its divergence say.

The first pass is that of the uniform plan nearest the budget. Further rounds are those of the plans
that the prices so far choose, until there is nothing to gain.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from curvprune.compression import solve_layer
from curvprune.curvature import Change, Checkpoint, DivergencePass, divergence_pass
from curvprune.distributed import rank, wait, world
from curvprune.model import find_layers
from curvprune.options import Cast, Keep, Option, option_from_key
from curvprune.planning import (
    Choice,
    Infeasible,
    MeasuredPlan,
    cheapest,
    corrected,
    corrections,
)
from curvprune.pricing import Ledger, Round, measured_loss, share_ledger, work_of
from curvprune.run.apply import applied_in, apply_plan, plan_key
from curvprune.run.baselines import Control, uniform_plans
from curvprune.run.candidates import StoredRounding, read_rounding
from curvprune.run.evaluation import divergences_on
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode, encode

CHECKPOINT_SECONDS = 45.0  # the pass over the items writes its totals this often
# A share of the loss by which runs scatter (SmolLM2 at 3 bits with its calibration items in another
# order: KL .217 ± .005): a round that gains less is not worth a pass.
SCATTER = 0.02
SAME_BYTES = 0.01  # of the bytes, likewise
PROBED = 4  # price items on which uniform plans are rounded to nearest, to find where to begin
# What one sequential pass leaves of the divergence of rounding to nearest: .2 to .4 for SmolLM2 at
# 3 and 4 bits.
LEFT = 1 / 3
EXACT = 1 / 40  # of the error of the next smaller option: a bit more leaves a fourth, two a 16th

NextPlan = Callable[[Ledger], "dict[str, str] | None"]


def by_shares(task: Task, *, chosen: bool) -> bool:
    """Whether this task's prices are shares: that is asked for, or left open where a plan will be
    ``chosen``; and its loss is known at outputs, and an option changes some layer."""
    asked = task.settings.prices
    if asked == "quadratic" or (asked is None and not chosen):
        return False
    if task.objective.curvature == "none" or task.settings.curvature != "fisher":
        return False
    return any(not isinstance(option, (Keep, Cast)) for option in task.offered)


def price_by_shares(
    task: Task,
    space: Workspace,
    *,
    reference: Mapping[str, str] | None = None,
    next_plan: NextPlan | None = None,
) -> tuple[Ledger, tuple[MeasuredPlan, ...]]:
    """The ledger of up to ``settings.rounds`` rounds, and what their plans lose on the price items.

    Args:
        reference: the plan of the first; by default the uniform one nearest the budget.
        next_plan: the plan that prices choose; by default by the task's budget.

    Cost: for each round one sequential pass over the calibration items, which of the later ones
    select and ship need anyway; two forward passes and one backward pass per price item.
    """
    rounds = [_first_round(task, space, reference)]
    ledger = _ledger_of(task, rounds)
    while len(rounds) < task.settings.rounds:
        choices = next_plan(ledger) if next_plan else _plan_for_budget(task, ledger, rounds)
        if choices is None or not _worth_a_round(task, ledger, rounds, choices):
            break
        try:
            rounds.append(_round(task, space, choices, len(rounds) + 1))
        except FloatingPointError as error:
            space.note(f"round {len(rounds) + 1} of the prices was left out: {error}")
            break
        ledger = _ledger_of(task, rounds)
    return ledger, tuple(map(measured_loss, rounds))


def _ledger_of(task: Task, rounds: Sequence[Round]) -> Ledger:
    sizes = {}
    for name in task.layers:
        options = task.options[name]
        sizes[name] = {option.key: task.layer_bytes(name, option) for option in options}
    ledger = share_ledger(rounds, sizes, measure=task.objective.measure)
    return replace(ledger, work=task.work or work_of(task.layers))


def _plan_for_budget(task: Task, ledger: Ledger, rounds: Sequence[Round]) -> dict[str, str] | None:
    """The plan that prices choose, as the rounds correct them. A drop of another measure is taken
    for nats, until trials say how the two go together."""
    if task.budget is None:
        return None
    rows = corrected(ledger.rows, corrections(ledger.rows, map(measured_loss, rounds)))
    try:
        return cheapest(rows, task.within, max_loss=task.max_drop)
    except Infeasible:
        return None


def _worth_a_round(
    task: Task, ledger: Ledger, rounds: Sequence[Round], choices: Mapping[str, str]
) -> bool:
    """Whether a plan is expected to be so much better than those of earlier rounds, or smaller,
    that a run would show it."""
    if any(choices == one.choices for one in rounds):
        return False
    if not any(_changes(key) for key in choices.values()):
        return False
    last = rounds[-1].choices
    before, after = ledger.predict(last).value, ledger.predict(choices).value
    bytes_before, bytes_after = task.bytes_of(last), task.bytes_of(choices)
    if abs(bytes_after - bytes_before) > SAME_BYTES * bytes_before:
        return True
    return before - after > SCATTER * before


def _changes(key: str) -> bool:
    """Whether an option rounds or prunes."""
    return not isinstance(option_from_key(key), (Keep, Cast))


# ------------------------------------------------------------------------------------- one round


def _first_round(task: Task, space: Workspace, reference: Mapping[str, str] | None) -> Round:
    """The round of the reference. Where a uniform plan breaks the model the next larger one takes
    its place; where it rounds nearly nothing away, the next smaller one."""
    if reference is not None:
        return _round(task, space, reference, 1)
    plans = references(task)
    place, broken = _nearest(task, plans), -1
    while True:
        try:
            found = _round(task, space, plans[place].choices, 1)
        except FloatingPointError as error:
            if place + 1 == len(plans):
                raise
            space.note(f"{plans[place].name} is no plan to take prices at: {error}")
            broken, place = place, place + 1
            continue
        if place - 1 in (-1, broken) or not _nearly_exact(found, plans[place - 1].choices):
            return found
        place -= 1


def _nearly_exact(found: Round, smaller: Mapping[str, str]) -> bool:
    """Whether most layers lie on the grids of a plan, as weights do that were rounded before: what
    is left of their errors says nothing of larger ones."""
    factors = []
    for name, errors in found.errors.items():
        own, other = errors.get(found.choices[name], 0.0), errors.get(smaller[name], 0.0)
        if other > 0:
            factors.append(own / other)
    return bool(factors) and sorted(factors)[len(factors) // 2] < EXACT


def _round(task: Task, space: Workspace, choices: Mapping[str, str], number: int) -> Round:
    """Apply a plan, and go back from its divergence; or read what an earlier process has done."""
    state, file = space.state, f"rounds/{plan_key(choices)}.json"
    beside = task.options if number == 1 else {}
    if state.has(file):
        earlier = decode(Round, state.read_json(file), source=str(state.path(file)))
        # What was a later round under another budget has no errors of other options.
        if _has_errors(earlier, beside):
            return earlier
    # 1. The pass; in the first round with the errors of every option. What there is to say of it
    # is said of what ships.
    quiet = replace(space, notes=[])
    at, title = applied_in(choices), f"round {number} of prices"
    model: nn.Module | None = None
    if rank() == 0:
        model, _ = apply_plan(task, quiet, choices, at, title=title, beside=beside)
    wait()
    if model is None:
        model, _ = apply_plan(task, quiet, choices, at, title=title, beside=beside)
    # 2. What was rounded away, and what made up for it.
    device = next(model.parameters()).device
    changes: dict[str, list[Change]] = {}
    stored: dict[str, StoredRounding] = {}
    changed = [name for name in task.layers if choices[name] != "keep"]
    for place, name in enumerate(changed):
        one = stored[name] = read_rounding(state, f"{at}/{place:04d}", device)
        changes[name] = [one.rounded, one.answered, *one.others.values()]
    # 3. The slope of the divergence along all of them.
    passed = _slopes(task, space, model, changes, file)
    found = _as_round(task, choices, stored, passed)
    wait()
    state.write_json(file, encode(found))
    wait()
    # 4. What the round was made of is as large as the model, and needed no more.
    if rank() == 0:
        for place in range(len(changed)):
            for ending in ("json", "safetensors"):
                state.path(f"{at}/{place:04d}.share.{ending}").unlink(missing_ok=True)
    return found


def _as_round(
    task: Task,
    choices: Mapping[str, str],
    stored: Mapping[str, StoredRounding],
    passed: DivergencePass,
) -> Round:
    zeros = [0.0] * len(passed.count)
    shares, answers = dict.fromkeys(task.layers, zeros), dict.fromkeys(task.layers, zeros)
    errors: dict[str, dict[str, float]] = {name: {} for name in task.layers}
    strangers: dict[str, dict[str, float]] = {name: {} for name in task.layers}
    for name, one in stored.items():
        along = passed.slopes[name].T
        shares[name], answers[name] = along[0].tolist(), along[1].tolist()
        for key, slopes in zip(one.others, along[2:], strict=True):
            strangers[name][key] = float(slopes.sum() / passed.count.sum())
        # An error of an output counts as much as the loss bends along it.
        weights = passed.rows[name]
        if not bool(weights.any()):
            weights = torch.ones_like(weights)
        for key, own in one.errors.items():
            errors[name][key] = float(weights @ own.double())
    return Round(
        choices=dict(choices),
        count=passed.count.tolist(),
        divergence=passed.divergence.tolist(),
        rises=passed.rises.tolist(),
        shares=shares,
        answers=answers,
        errors=errors,
        strangers=strangers,
    )


def _has_errors(found: Round, options: Mapping[str, Sequence[Option]]) -> bool:
    """Whether a round says how large the errors are of all these options of the layers that it
    changes."""
    for name, offered in options.items():
        known = found.errors.get(name, {})
        if found.choices[name] != "keep" and any(one.key not in known for one in offered):
            return False
    return True


def _slopes(
    task: Task,
    space: Workspace,
    model: nn.Module,
    changes: Mapping[str, Sequence[Change]],
    file: str,
) -> DivergencePass:
    """The pass over the price items, from where an earlier process left it."""
    items = task.splits.price.items
    # 1. Of several processes each keeps totals of its own until all are done.
    own_state = replace(space.state, writes=True)
    name = f"{file.removesuffix('.json')}.{rank()}of{world()}.safetensors"
    resume = own_state.read_tensors(name) if own_state.has(name) else None
    done = 0 if resume is None else int(resume["done"])
    last = time.monotonic()

    # 2. Totals are written now and then, so that a crash loses little.
    def after_item(finished: int, totals: dict[str, Tensor]) -> None:
        nonlocal last
        advance(finished)
        if finished < len(items) and time.monotonic() - last > CHECKPOINT_SECONDS:
            own_state.write_tensors(name, totals)
            last = time.monotonic()

    with space.log.stage("slope of the divergence", len(items), done=done) as advance:
        return divergence_pass(
            (task.model, model),
            task.objective,
            items,
            {layer: found for layer, found in find_layers(model).items() if layer in task.layers},
            changes,
            seed=task.settings.seed,
            checkpoint=Checkpoint(resume=resume, after_item=after_item),
        )


# ---------------------------------------------------------------------------- where to begin


def references(task: Task) -> list[Control]:
    """The uniform plans that change every layer that any option changes, smallest first."""
    rows = []
    for name in task.layers:
        options = task.options[name]
        lossy = [option for option in options if not isinstance(option, (Keep, Cast))]
        for option in lossy or options:
            size = task.layer_bytes(name, option)
            rows.append(Choice(layer=name, option=option.key, bytes=size, price=0.0))
    plans = uniform_plans(rows, task.layers, task.groups)
    return sorted(plans, key=lambda plan: task.bytes_of(plan.choices))


def _nearest(task: Task, plans: Sequence[Control]) -> int:
    """Which of the uniform plans is nearest the budget; the one in the middle without any."""
    sizes = [task.bytes_of(plan.choices) for plan in plans]
    budget = task.budget
    # 1. By the loss that it allows.
    if task.max_drop is not None:
        place = _nearest_by_loss(task, plans)
        if task.keeps_within(plans[place].choices):
            return place
    # 2. By bytes.
    if budget is not None and budget.max_bytes is not None:
        most = budget.max_bytes - task.header_bytes
        apart = [abs(math.log(max(most, 1) / size)) for size in sizes]
        return apart.index(min(apart))
    # 3. By other limits: the largest that keeps to them.
    if budget is not None:
        within = [i for i, plan in enumerate(plans) if task.keeps_within(plan.choices)]
        return within[-1] if within else 0
    return len(plans) // 2


def _nearest_by_loss(task: Task, plans: Sequence[Control]) -> int:
    """The smallest uniform plan whose loss in a sequential pass, as rounding to nearest foretells
    it, is no more than the budget's drop. It is only where to begin: cost: a forward pass of
    `PROBED` items for some plans."""
    assert task.max_drop is not None
    low, high = 0, len(plans) - 1
    # The smaller a plan, the more it loses.
    while low < high:
        middle = (low + high) // 2
        if LEFT * _loss_to_nearest(task, plans[middle].choices) <= max(task.max_drop, 1e-6):
            high = middle
        else:
            low = middle + 1
    return low


def _loss_to_nearest(task: Task, choices: Mapping[str, str]) -> float:
    """Divergence per position of the model with every layer rounded to nearest."""
    model = copy.deepcopy(task.model)
    own = find_layers(model)
    for name, key in choices.items():
        (solved,) = solve_layer(own[name], [option_from_key(key)], None)
        own[name].write_(solved.weight)
    items = task.splits.price.items[:PROBED]
    loss = divergences_on((task.model, model), task.objective, items).mean_loss
    return loss if math.isfinite(loss) else math.inf
