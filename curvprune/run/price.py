"""Stage *price*: the ledger and the analysis, from one pass over the price items."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from curvprune.curvature import (
    MATRICES,
    Analysis,
    Change,
    Checkpoint,
    Draws,
    FisherPass,
    LayerCurvature,
    fisher_pass,
)
from curvprune.distributed import rank, shared, wait, world
from curvprune.model import BROKEN
from curvprune.options import Keep, Prune, kept_weights, pruner_of
from curvprune.planning import Limit, MeasuredPlan, Priced, Within, cheapest, corrected
from curvprune.pricing import (
    FORMS,
    MEASURED_ROWS,
    Forms,
    Ledger,
    Parts,
    Row,
    build_ledger,
    divergences,
    in_parts,
    measure_highest,
    quadratic_forms,
    work_of,
)
from curvprune.run.candidates import Candidates, solve_options
from curvprune.run.shares import NextPlan, by_shares, price_by_shares
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode, encode

CHECKPOINT_SECONDS = 45.0  # the pricing pass writes its totals this often
TOTALS, DONE = "fisher.safetensors", "fisher.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """The ledger, and what measured plans say about its prices.

    Attributes:
        ledger: prices as they were first made.
        measured: plans that were measured while prices were made, on the price items.
        factors: option → what its prices must be multiplied by, as far as trials say.
    """

    ledger: Ledger
    measured: tuple[MeasuredPlan, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[Priced]:
        """The rows of the ledger with corrected prices."""
        return corrected(self.ledger.rows, self.factors)

    def expected(self, choices: Mapping[str, str]) -> float:
        """What a plan costs by the corrected prices, in the ledger's measure."""
        return math.fsum(row.price for row in self.rows if choices[row.layer] == row.option)

    def with_factors(self, factors: Mapping[str, float]) -> Prices:
        return replace(self, factors=factors)


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedOptions:
    """What the stage makes: prices, and where these are quadratic trace and diagonal of every layer
    from the same pass."""

    prices: Prices
    analysis: Analysis | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PassDone:
    """Written when the pass over the price items is over."""

    items: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FormsRecord:
    """The forms of another curvature: positions ``(items,)``, sums of each layer ``(items,
    options)``, and layers without forms with the reason."""

    count: list[float]
    sums: dict[str, list[list[float]]]
    left_out: dict[str, str] = field(default_factory=dict)


def solve_and_price(
    task: Task,
    space: Workspace,
    *,
    chosen: bool | None = None,
    reference: Mapping[str, str] | None = None,
    next_plan: NextPlan | None = None,
) -> PricedOptions:
    """Stage *price*: by shares of the loss where a plan will be chosen and shipped, else by
    quadratic forms along every solved change.

    Args:
        chosen: whether a plan will be chosen; by default where there is a budget.
        reference, next_plan: see `price_by_shares`.
    """
    if chosen is None:
        chosen = task.budget is not None
    if by_shares(task, chosen=chosen):
        try:
            ledger, measured = price_by_shares(
                task, space, reference=reference, next_plan=next_plan
            )
            return PricedOptions(prices=Prices(ledger=ledger, measured=measured))
        except FloatingPointError as error:
            space.note(f"prices are quadratic forms: there is no plan to take shares at ({error})")
    elif task.settings.prices == "shares":
        space.note(
            "prices are quadratic forms: shares need a loss that is known at outputs, "
            "curvature: fisher, and an option that rounds or prunes"
        )
    return price_options(task, space, solve_options(task, space))


def fisher_analysis(task: Task, space: Workspace) -> Analysis:
    """Trace and diagonal of every layer, without prices. Cost: as a pricing pass."""
    return _analysis(task, _pass_over_items(task, space, {}))


def price_options(task: Task, space: Workspace, candidates: Candidates) -> PricedOptions:
    """Price every solved change, and measure the highest prices.

    Cost: one forward and ``labels`` backward passes per price item; five forward passes more where
    the highest prices agree with what is measured.
    """
    offered = _changing(task)
    wait()  # nobody looks at the folder while the first process is still writing its last file
    changes = _changes(task, space, candidates, offered)
    passed = _pass_over_items(task, space, changes)
    forms = None
    kind = task.settings.curvature
    if kind in FORMS:
        forms = _forms(task, space, changes)
        for name, reason in forms.left_out.items():
            kept = task.layers[name].weight
            space.note(
                f"layer {name} has no price by curvature={kind!r} and stays as it is "
                f"({kept.numel() * kept.element_size()} bytes): {reason}"
            )
    space.state.write_json(DONE, encode(PassDone(items=len(task.splits.price.items))))
    wait()

    sizes = {}
    for name in task.layers:
        options = task.options[name]
        sizes[name] = {option.key: task.layer_bytes(name, option) for option in options}
    ledger = build_ledger(
        forms or passed,
        sizes,
        changed=offered,
        measure=task.objective.measure,
        curvature=kind,
    )
    named = ledger.curvature
    if task.objective.curvature == "differentiation":
        named += "; curvature of the loss by differentiation"
    ledger = replace(ledger, work=task.work or work_of(task.layers), curvature=named)
    ledger = _with_highest_measured(task, space, ledger, candidates)
    return PricedOptions(prices=Prices(ledger=ledger), analysis=_analysis(task, passed))


def _changing(task: Task) -> dict[str, list[str]]:
    """Layer → keys of the options that change its weight."""
    found = {}
    for name in task.layers:
        options = task.options[name]
        found[name] = [option.key for option in options if not isinstance(option, Keep)]
    return found


def _changes(
    task: Task, space: Workspace, candidates: Candidates, offered: Mapping[str, list[str]]
) -> dict[str, list[Change]]:
    """Layer → the change of its weight that each option makes."""
    changes: dict[str, list[Change]] = {}
    if space.state.has(DONE):
        # The pass is over; its totals already hold the squares, and empty changes only set their
        # number.
        empty = Change(values=torch.zeros(0), scale=0.0)
        return {name: [empty] * len(keys) for name, keys in offered.items()}
    for name, layer in task.layers.items():
        if not offered[name]:
            continue
        weight = layer.as_matrix(layer.weight.detach())
        wide = weight if weight.dtype == torch.float64 else weight.float()
        solved = candidates.of(name)
        changes[name] = [Change.of(one.weight.to(wide.dtype) - wide) for one in solved]
    return changes


def _pass_over_items(
    task: Task, space: Workspace, changes: Mapping[str, list[Change]]
) -> FisherPass:
    """The pass itself, from where an earlier process left it."""
    state, items = space.state, task.splits.price.items
    # 1. Of several processes each keeps totals of its own until all are done.
    own_state, own_name = state, TOTALS
    if shared():
        own_state = replace(state, writes=True)
        own_name = f"fisher.{rank()}of{world()}.safetensors"
    source = TOTALS if state.has(DONE) else own_name
    resume = state.read_tensors(source) if state.has(source) else None

    # 2. Totals are written now and then, so that a crash loses little.
    last = time.monotonic()

    def after_item(done: int, totals: dict[str, Tensor]) -> None:
        nonlocal last
        advance(done)
        if done == len(items):
            state.write_tensors(TOTALS, totals)
        elif time.monotonic() - last > CHECKPOINT_SECONDS:
            own_state.write_tensors(own_name, totals)
            last = time.monotonic()

    # 3. One forward and a few backward passes per item.
    done = int(resume["done"]) if resume is not None else 0
    with space.log.stage("price options", len(items), done=done) as advance:
        return fisher_pass(
            task.model,
            task.objective,
            items,
            task.layers,
            changes,
            draws=_draws(task),
            checkpoint=Checkpoint(resume=resume, after_item=after_item),
        )


def _draws(task: Task) -> Draws:
    """What the pass goes back from. Where another curvature prices and the loss cannot be drawn
    from, the data's own labels make the traces."""
    settings = task.settings
    unknown = task.objective.curvature == "none" and settings.curvature == "hessian"
    if settings.curvature == "empirical" or unknown:
        return Draws(labels=1, seed=settings.seed, empirical=True)
    return Draws(labels=settings.labels, seed=settings.seed)


def _forms(task: Task, space: Workspace, changes: Mapping[str, list[Change]]) -> Forms:
    """The forms of another curvature, or those that an earlier process measured."""
    kind = task.settings.curvature
    name = f"forms-{kind}.json"
    if space.state.has(name):
        source = str(space.state.path(name))
        record = decode(FormsRecord, space.state.read_json(name), source=source)
        sums = {n: torch.tensor(s, dtype=torch.float64) for n, s in record.sums.items()}
        count = torch.tensor(record.count, dtype=torch.float64)
        return Forms(count=count, sums=sums, left_out=record.left_out)
    forms = quadratic_forms(
        kind,
        task.model,
        task.objective,
        task.splits.price.items,
        task.layers,
        changes,
        parts=Parts(seed=task.settings.seed),
    )
    sums_of = {n: s.tolist() for n, s in forms.sums.items()}
    record = FormsRecord(count=forms.count.tolist(), sums=sums_of, left_out=dict(forms.left_out))
    space.state.write_json(name, encode(record))
    wait()
    return forms


def _analysis(task: Task, passed: FisherPass) -> Analysis:
    found = {}
    for name, layer in task.layers.items():
        found[name] = LayerCurvature(
            trace=passed.trace(name), diagonal=passed.diagonal[name], shape=layer.shape
        )
    matrix = MATRICES["empirical-fisher" if _draws(task).empirical else "fisher"]
    return Analysis(matrix=matrix, layers=found, num_items=len(passed.count))


# ------------------------------------------------------------------------------- measured prices


def _with_highest_measured(
    task: Task, space: Workspace, ledger: Ledger, candidates: Candidates
) -> Ledger:
    """The ledger with its highest prices measured: see `measure_highest`."""
    least = task.settings.measure_above
    alone = rank() == 0  # the first of several processes goes on alone
    if least is None or task.settings.curvature == "input" or not alone:
        return ledger
    if task.objective.curvature == "none":
        # What a change costs beyond the slope needs a loss that is known at outputs.
        space.note(f"no price was measured: loss {task.objective.name} is not known at outputs")
        return ledger
    with space.log.stage("measure prices", MEASURED_ROWS) as advance:

        def measure(rows: Sequence[Row], before: int) -> dict[tuple[str, str], np.ndarray]:
            sums = _measured_sums(task, space, candidates, rows, f"measured/{before}.json")
            advance(before + len(rows))
            return _by_row(space, rows, sums, ledger.count)

        ledger, note = measure_highest(ledger, measure, least=least)
        advance(MEASURED_ROWS)
    if note:
        space.note(note)
    return ledger


def _measured_sums(
    task: Task, space: Workspace, candidates: Candidates, rows: Sequence[Row], name: str
) -> list[list[float] | None]:
    """What the change of each row costs each price item, measured, or read; ``None`` for one that
    breaks the model."""
    state = space.state
    if not state.has(name):
        changed = []
        for row in rows:
            changed.append((row.layer, candidates.with_option(row.layer, row.option).weight))
        items = task.splits.price.items
        measured = divergences(task.model, task.objective, items, task.layers, changed).T
        kept: list[list[float] | None] = []
        for sums in measured:
            kept.append(sums.tolist() if bool(sums.isfinite().all()) else None)
        state.write_json(name, kept)
    return decode(list[list[float] | None], state.read_json(name), source=str(state.path(name)))


def _by_row(
    space: Workspace,
    rows: Sequence[Row],
    sums: Sequence[list[float] | None],
    count: np.ndarray,
) -> dict[tuple[str, str], np.ndarray]:
    """(layer, option) → cost of each item, or of each part of the items. Changes that break the
    model cost `BROKEN`, or ten times the highest cost where that is more, and are noted."""
    found = {}
    highest = 0.0
    for values in sums:
        if values is not None:
            costs = in_parts(np.array(values), len(count)) / np.maximum(count, 1)
            highest = max(highest, float(np.max(costs)))
    worst = max(BROKEN, 10 * highest)
    for row, values in zip(rows, sums, strict=True):
        if values is not None:
            found[row.layer, row.option] = in_parts(np.array(values), len(count))
            continue
        found[row.layer, row.option] = worst * count
        space.note(
            f"layer {row.layer}: with option {row.option} alone the model's outputs are no finite "
            f"numbers; its price is {worst:g} a position"
        )
    return found


# ------------------------------------------------------------------------------- zeros by price


def alike(task: Task, sparsity: float) -> dict[str, str]:
    """The plan in which every layer loses the share of its weights that is offered nearest to
    ``sparsity``."""
    found = {}
    for name, options in task.options.items():
        apart = {}
        for option in options:
            prune = pruner_of(option)
            share = 0.0 if prune is None or prune.sparsity is None else prune.sparsity
            apart[option.key] = abs(share - sparsity)
        found[name] = min(apart, key=lambda key: apart[key])
    return found


def spread_zeros(task: Task, ledger: Ledger, sparsity: float) -> dict[str, str]:
    """The cheapest plan by the ledger with a share of ``sparsity`` of all weights of the layers
    pruned."""
    # 1. How many weights every option keeps.
    kept: dict[tuple[str, str], float] = {}
    for name, layer in task.layers.items():
        for option in task.options[name]:
            prune = pruner_of(option)
            if prune is not None and prune.sparsity is not None:
                left = kept_weights(prune, layer.shape, groups=layer.groups)
                kept[name, option.key] = float(left)
    # 2. As many may stay as would if every layer were pruned alike, each rounded by itself.
    total = sum(layer.numel for layer in task.layers.values())
    common, alike = Prune(sparsity=sparsity), 0
    for layer in task.layers.values():
        alike += kept_weights(common, layer.shape, groups=layer.groups)
    most = max(total - round(sparsity * total), alike)
    # 3. The cheapest way to keep no more.
    limit = Limit(name="weights kept", most=most, use=kept)
    return cheapest(ledger.rows, Within(limits=(limit,), same_option=task.same_option))
