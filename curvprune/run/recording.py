"""The record of a run, from what its stages made."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import curvprune
from curvprune import artifact
from curvprune.compat import versions
from curvprune.curvature import AnalysisRecord
from curvprune.files import State
from curvprune.model import find_layers
from curvprune.options import option_from_key
from curvprune.planning import Budget, frontier
from curvprune.pricing import Ledger
from curvprune.record import (
    BudgetRecord,
    FrontierPoint,
    LayerRecord,
    LedgerRecord,
    LimitUse,
    NamedLimit,
    PriceRow,
    Provenance,
    RunRecord,
    Size,
)
from curvprune.run.certify import Shipped
from curvprune.run.folder import LOCK, MODEL, state_bytes
from curvprune.run.prepare import Prepared
from curvprune.run.price import PricedOptions
from curvprune.run.select import Selection
from curvprune.run.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the stages made; ``None`` for those that did not run."""

    priced: PricedOptions | None = None
    selection: Selection | None = None
    shipped: Shipped | None = None
    curvature: AnalysisRecord | None = None


def run_record(prepared: Prepared, outcome: Outcome, root: State) -> RunRecord:
    """Everything that a report says."""
    task, space = prepared.task, prepared.space
    shipped, selection = outcome.shipped, outcome.selection
    ledger = None if outcome.priced is None else outcome.priced.prices.ledger
    plan = None if shipped is None else shipped.plan
    used: Mapping[str, float] = {} if plan is None else plan.uses
    limits = []
    for name, most in task.most.items():
        limits.append(LimitUse(name=name, most=most, used=used.get(name)))
    trials = () if selection is None else selection.trials
    if shipped is not None:
        trials = (*trials, *shipped.applied)
    analysis = outcome.curvature
    if analysis is None and outcome.priced is not None:
        analysis = outcome.priced.analysis.to_record()
    return RunRecord(
        title=prepared.title,
        objective=task.objective.name,
        measure=task.objective.measure,
        budget=None if task.budget is None else _budget_record(task.budget),
        verdict=None if shipped is None else shipped.verdict,
        measured=None if shipped is None else shipped.measured,
        items=None if shipped is None else shipped.items,
        attempts=() if shipped is None else shipped.attempts,
        limits=tuple(limits),
        corrections={} if selection is None else dict(selection.prices.factors),
        together=() if selection is None else selection.together,
        recoveries=() if shipped is None else shipped.recoveries,
        size=_size(task, shipped, root),
        structured=prepared.removed,
        layers=layer_records(task, shipped, ledger),
        ledger=None if ledger is None else _ledger_record(ledger),
        trials=trials,
        frontier=_frontier(task, ledger),
        analysis=analysis,
        stages=tuple(space.log.log),
        peak_memory_bytes=_peak_memory(),
        state_bytes=state_bytes(root),
        provenance=_provenance(prepared),
        recipe=root.read_text(LOCK),
        notes=(*task.notes, *space.notes),
    )


def _budget_record(budget: Budget) -> BudgetRecord:
    return BudgetRecord(
        metric=budget.metric,
        max_drop=budget.max_drop,
        max_bytes=budget.max_bytes,
        max_bits=budget.max_bits,
        max_macs=budget.max_macs,
        max_bops=budget.max_bops,
        confidence=budget.confidence,
        limits=tuple(NamedLimit(name=limit.name, most=limit.most) for limit in budget.limits),
    )


def _size(task: Task, shipped: Shipped | None, root: State) -> Size:
    """Bytes on disk: of the uncompressed model as transformers would store it, and of what was
    written."""
    model = task.uncompressed
    on_disk = artifact.state_dict_on_disk(model, find_layers(model), {})
    before = sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values())
    parameters = sum(p.numel() for p in model.parameters())
    if shipped is None:
        return Size(before_bytes=before, parameters=parameters)
    folder = root.path(MODEL)
    return Size(
        before_bytes=before,
        parameters=parameters,
        after_bytes=artifact.weights_file(folder).stat().st_size,
        folder_bytes=artifact.folder_bytes(folder),
    )


def _ledger_record(ledger: Ledger) -> LedgerRecord:
    rows = []
    for row in ledger.rows:
        rows.append(
            PriceRow(
                layer=row.layer,
                option=row.option,
                bytes=row.bytes,
                price=row.price,
                stderr=row.stderr,
                model_stderr=row.model_stderr,
                measured=row.measured,
            )
        )
    return LedgerRecord(
        measure=ledger.measure,
        curvature=ledger.curvature,
        num_items=ledger.num_items,
        labels_per_item=ledger.labels,
        rows=tuple(rows),
        kept=ledger.kept,
    )


def _frontier(task: Task, ledger: Ledger | None) -> tuple[FrontierPoint, ...]:
    if ledger is None:
        return ()
    points = []
    for point in frontier(ledger.rows, same_option=task.same_option):
        predicted = ledger.predict(point.choices)
        points.append(
            FrontierPoint(
                bytes=point.bytes + task.fixed_bytes,
                predicted=predicted.value,
                predicted_stderr=predicted.stderr,
            )
        )
    return tuple(points)


def layer_records(
    task: Task, shipped: Shipped | None, ledger: Ledger | None
) -> tuple[LayerRecord, ...]:
    """What every layer got, and why."""
    if shipped is None:
        return ()
    group_of = {}
    for group in task.groups:
        group_of.update(dict.fromkeys(group, group))
    records = []
    for name, layer in task.layers.items():
        key = shipped.plan.choices[name]
        size = task.layer_bytes(name, option_from_key(key))
        row = None if ledger is None else ledger.layer_rows(name)[key]
        solved = shipped.solved.get(name)
        records.append(
            LayerRecord(
                name=name,
                kind=layer.kind,
                shape=layer.shape,
                parameters=layer.numel,
                option=key,
                bytes=size,
                bits=8 * size / layer.numel,
                price=None if row is None else row.price,
                stderr=None if row is None else row.stderr,
                damping=None if solved is None else solved.damping,
                reason=_reason(task, ledger, name, group_of[name], key),
                notes=() if solved is None else tuple(solved.notes),
            )
        )
    return tuple(records)


def _reason(task: Task, ledger: Ledger | None, name: str, group: tuple[str, ...], key: str) -> str:
    """Why a layer got its option: what the next smaller and the next larger one would have cost and
    saved, for all the layers that share it."""
    if len(task.options[name]) == 1:
        return "the only option offered"
    assert ledger is not None
    size: dict[str, int] = {}
    price: dict[str, float] = {}
    for member in group:
        for option, row in ledger.layer_rows(member).items():
            size[option] = size.get(option, 0) + row.bytes
            price[option] = price.get(option, 0.0) + row.price
    parts = []
    smaller = [option for option in size if size[option] < size[key]]
    larger = [option for option in size if size[option] > size[key]]
    if smaller:
        other = max(smaller, key=lambda option: size[option])
        saved, cost = size[key] - size[other], price[other] - price[key]
        parts.append(f"{other} would save {saved:,} bytes for {cost:+.2g} nats")
    if larger:
        other = min(larger, key=lambda option: size[option])
        spent, cost = size[other] - size[key], price[other] - price[key]
        parts.append(f"{other} would spend {spent:,} bytes for {cost:+.2g} nats")
    others = ", ".join(member.rpartition(".")[2] for member in group if member != name)
    shared = f"shared with {others}, together: " if others else ""
    return shared + "; ".join(parts)


def _provenance(prepared: Prepared) -> Provenance:
    inputs = prepared.inputs
    return Provenance(
        recipe_sha256=inputs.recipe_sha256,
        model_sha256=inputs.model_sha256,
        data_sha256=inputs.data_sha256,
        device=inputs.device,
        seed=prepared.task.settings.seed,
        curvprune=curvprune.__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        platform=platform.platform(),
        threads=torch.get_num_threads(),
        libraries=versions(),
    )


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes (Linux reports KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
