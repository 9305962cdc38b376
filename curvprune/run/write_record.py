"""The record of a run, from what its stages made, and the files that hold it: ``report.json``,
``report.html``, ``plan.json``, ``verdict.json``, ``ledger.json``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import curvprune
from curvprune import artifact, report
from curvprune.compat import versions
from curvprune.curvature import AnalysisRecord
from curvprune.files import State, sha256_of_file
from curvprune.model import find_layers
from curvprune.options import option_from_key
from curvprune.planning import Budget, frontier
from curvprune.pricing import Ledger
from curvprune.record import (
    AuditRecord,
    BudgetRecord,
    FrontierPoint,
    LayerRecord,
    LedgerRecord,
    LimitUse,
    ModelCard,
    NamedLimit,
    PriceRow,
    Provenance,
    RunRecord,
    Size,
)
from curvprune.run.card import Shown, card_of
from curvprune.run.certify import Shipped
from curvprune.run.folder import (
    ANALYSIS,
    FINISHED,
    LEDGER,
    LOCK,
    MODEL,
    PLAN,
    REPORT_HTML,
    REPORT_JSON,
    VERDICT,
    VIEW,
    FinishedRecord,
    fingerprint,
    state_bytes,
)
from curvprune.run.prepare import Prepared
from curvprune.run.price import PricedOptions
from curvprune.run.published import as_text, publish_texts
from curvprune.run.recipe import Recipe
from curvprune.run.select import Selection
from curvprune.run.task import Task
from curvprune.schema import encode


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
    # 1. What every run has.
    record = RunRecord(
        title=prepared.title,
        objective=task.objective.name,
        measure=task.objective.measure,
        size=_size(prepared, outcome.shipped, root),
        structured=prepared.removed,
        stages=tuple(space.log.log),
        peak_memory_bytes=_peak_memory(),
        state_bytes=state_bytes(root),
        provenance=_provenance(prepared),
        recipe=root.read_text(LOCK),
        notes=(*task.notes, *space.notes),
    )
    if task.budget is not None:
        record = replace(record, budget=_budget_record(task.budget))
    # 2. What each stage has added.
    ledger = None
    if outcome.priced is not None:
        ledger = outcome.priced.prices.ledger
        record = replace(
            record,
            ledger=_ledger_record(ledger),
            frontier=_frontier(task, ledger),
        )
        if outcome.priced.analysis is not None:
            record = replace(record, analysis=outcome.priced.analysis.to_record())
    if outcome.curvature is not None:
        record = replace(record, analysis=outcome.curvature)
    if outcome.selection is not None:
        record = replace(
            record,
            trials=outcome.selection.trials,
            corrections=dict(outcome.selection.prices.factors),
            together=outcome.selection.together,
        )
    uses: Mapping[str, float] = {}
    if outcome.shipped is not None:
        uses = outcome.shipped.plan.uses
        record = _with_shipped(record, task, outcome.shipped, ledger)
    # 3. What the plan uses of each limit.
    limits = []
    for name, most in task.most.items():
        limits.append(LimitUse(name=name, most=most, used=uses.get(name)))
    return replace(record, limits=tuple(limits))


def _with_shipped(
    record: RunRecord, task: Task, shipped: Shipped, ledger: Ledger | None
) -> RunRecord:
    """The record with the model that ships, its verdict and its layers."""
    return replace(
        record,
        verdict=shipped.verdict,
        measured=shipped.measured,
        items=shipped.items,
        engine=shipped.engine,
        attempts=shipped.attempts,
        recoveries=shipped.recoveries,
        layers=_layer_records(task, shipped, ledger),
        trials=(*record.trials, *shipped.applied),
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
        quantile=budget.quantile,
        limits=tuple(NamedLimit(name=limit.name, most=limit.most) for limit in budget.limits),
    )


def _size(prepared: Prepared, shipped: Shipped | None, root: State) -> Size:
    """Bytes on disk: of the uncompressed model as transformers would store it, and of what was
    written."""
    model = prepared.task.uncompressed
    on_disk = artifact.state_dict_on_disk(model, find_layers(model), {})
    before = sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values())
    parameters = sum(p.numel() for p in model.parameters())
    if shipped is None:
        return Size(before_bytes=before, parameters=parameters, source_bytes=prepared.source_bytes)
    folder = root.path(MODEL)
    weights = artifact.weights_file(folder)
    if prepared.task.target.name == "gguf":
        weights = root.path(VIEW)
    return Size(
        before_bytes=before,
        parameters=parameters,
        source_bytes=prepared.source_bytes,
        after_bytes=weights.stat().st_size,
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
    audits = []
    for audit in ledger.audits:
        audits.append(
            AuditRecord(
                plan=audit.plan,
                shares=audit.shares,
                shares_stderr=audit.shares_stderr,
                divergence=audit.divergence,
                divergence_stderr=audit.divergence_stderr,
            )
        )
    return LedgerRecord(
        measure=ledger.measure,
        curvature=ledger.curvature,
        num_items=ledger.num_items,
        labels_per_item=ledger.labels,
        rows=tuple(rows),
        kept=ledger.kept,
        prices=ledger.prices,
        audits=tuple(audits),
    )


def _frontier(task: Task, ledger: Ledger) -> tuple[FrontierPoint, ...]:
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


def _layer_records(task: Task, shipped: Shipped, ledger: Ledger | None) -> tuple[LayerRecord, ...]:
    """What every layer got, and why."""
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
    """Peak resident memory of this process in bytes (Linux reports KiB, macOS bytes); 0 where the
    system does not tell, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------- the files


def write_prices(priced: PricedOptions, root: State) -> None:
    """Write ``ledger.json`` and, where there is one, ``analysis.json``."""
    texts = {LEDGER: as_text(priced.prices.ledger.to_dict())}
    if priced.analysis is not None:
        texts[ANALYSIS] = as_text(priced.analysis.to_dict())
    publish_texts(root, texts)


def write_results(
    recipe: Recipe, root: State, prepared: Prepared, record: RunRecord, shipped: Shipped
) -> None:
    """Write ``plan.json``, ``verdict.json`` and the report; last, that the run has ended."""
    whole = encode(record)
    trials = []
    for trial in whole["trials"]:
        trials.append({key: value for key, value in trial.items() if key != "choices"})
    plan = {
        **shipped.plan.to_dict(),
        "layers": whole["layers"],
        "corrections": whole["corrections"],
        "trials": trials,
    }
    verdict = whole["verdict"]
    if verdict is None:
        verdict = {"status": "NOT ASKED", "measured": whole["measured"]}
    if whole["engine"] is not None:
        verdict = {**verdict, "engine": whole["engine"]}
    # What it is about: no verdict goes with another model.
    of = {
        "model": sha256_of_file(root.path(MODEL) / artifact.MANIFEST),
        "recipe": sha256_of_file(root.path(LOCK)),
        "data": dict(prepared.inputs.data_sha256),
    }
    publish_texts(root, {PLAN: as_text(plan), VERDICT: as_text({**verdict, "of": of})})
    model = root.path(MODEL)
    artifact.write_card(model, report.model_card(_card(model, prepared, record, shipped)))
    write_report(root, record)
    ended = FinishedRecord(recipe=fingerprint(recipe), sources=prepared.sources)
    prepared.space.state.write_json(FINISHED, encode(ended))


def _card(folder: Path, prepared: Prepared, record: RunRecord, shipped: Shipped) -> ModelCard:
    shown = Shown(choices=shipped.plan.choices, verdict=shipped.verdict, trials=record.trials)
    return card_of(
        folder,
        prepared.task.uncompressed,
        shown,
        title=record.title,
        source_bytes=record.size.source_bytes,
    )


def write_report(root: State, record: RunRecord) -> None:
    """Write ``report.json`` and ``report.html``."""
    publish_texts(root, {REPORT_JSON: as_text(record.to_json()), REPORT_HTML: report.build(record)})
