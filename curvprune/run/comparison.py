"""`rebuild_report`: a run's report again, also beside another run's results on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from curvprune import report
from curvprune.certificate import ItemColumns, judge
from curvprune.files import State
from curvprune.model import ItemResults, LabelFree, Split
from curvprune.planning import Budget
from curvprune.record import OtherRun, PairedLoss, RunRecord
from curvprune.run.folder import REPORT_HTML, check_written, read_report
from curvprune.run.published import check_own, publish_texts


def rebuild_report(out: str | Path, against: str | Path | None = None) -> Path:
    """Write ``report.html`` again from ``report.json``, with a comparison if another run's folder
    is given as ``against`` (``report.json`` stays as it is).

    Raises ``ValueError`` if a folder holds no run, if a file of a run is not what it wrote, or if
    ``report.html`` is somebody else's."""
    root = State(Path(out))
    record, other = read_report(root), None
    check_written(root)
    check_own(root, (REPORT_HTML,))
    if against is not None:
        there = State(Path(against))
        found = read_report(there)
        check_written(there)
        other = _other_run(record, found, str(against))
    publish_texts(root, {REPORT_HTML: report.build(record, other)})
    return root.path(REPORT_HTML)


def _other_run(record: RunRecord, other: RunRecord, name: str) -> OtherRun:
    """The other's record and, on the same items, how much worse the first one's compressed model
    is, for every metric that both have."""
    here, there = record.items, other.items
    reason = _unpaired(record, other)
    if reason or here is None or there is None:
        return OtherRun(name=name, record=other, unpaired=reason)
    documents = tuple(here.documents[k] for k in here.document)
    split = Split(items=(), documents=documents)
    metrics: list[Literal["loss", "accuracy"]] = ["loss"]
    if here.right_after is not None and there.right_after is not None:
        metrics.append("accuracy")
    paired = []
    for metric in metrics:
        budget = Budget(metric, max_drop=0.0)
        before, after = _results(there), _results(here)
        verdict = judge(before, after, split, budget, measure=record.measure)
        # Without a budget there is nothing to judge.
        paired.append(
            PairedLoss(
                metric=verdict.metric,
                measure=verdict.measure,
                baseline=verdict.baseline,
                compressed=verdict.compressed,
                drop=verdict.drop,
                stderr=verdict.stderr,
                items=verdict.items,
                clusters=verdict.clusters,
            )
        )
    return OtherRun(name=name, record=other, paired=tuple(paired))


def _unpaired(record: RunRecord, other: RunRecord) -> str:
    """Why two runs' results cannot be compared item by item; empty if they can."""
    for which, side in (("this run", record), ("the other run", other)):
        if side.items is None:
            return f"{which} has no results of single items on record"
    assert record.items is not None and other.items is not None
    ours, theirs = record.provenance, other.provenance
    if ours.data_sha256.get("certify") != theirs.data_sha256.get("certify"):
        return "the two runs were not measured on the same certify split"
    if _counted(record.items) != _counted(other.items):
        return "other items or positions of the certify split counted in one run than in the other"
    if record.objective != other.objective or record.measure != other.measure:
        return f"the losses differ in kind: {record.objective} here, {other.objective} there"
    if record.objective == LabelFree.name and ours.model_sha256 != theirs.model_sha256:
        return "each loss is the divergence from the run's own uncompressed model, and those differ"
    return ""


def _counted(items: ItemColumns) -> tuple[tuple[object, ...], ...]:
    return items.documents, items.document, items.index, items.count


def _results(items: ItemColumns) -> ItemResults:
    """The compressed model's results of the items on record."""
    count = torch.tensor(items.count, dtype=torch.float64)
    right = items.right_after or (0,) * len(count)
    return ItemResults(
        loss=torch.tensor(items.after, dtype=torch.float64) * count,
        count=count,
        correct=torch.tensor(right, dtype=torch.float64),
    )
