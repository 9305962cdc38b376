"""The record as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from . import charts, comparison, curvature, items, removed, sections, together
from .figures import count, num, size

CONTENTS = (
    ("verdict", "Verdict"),
    ("size", "Size"),
    ("trials", "Predicted and measured"),
    ("frontier", "Frontier"),
    ("layers", "Layers"),
    ("prices", "Prices"),
    ("curvature", "Curvature"),
    ("cost", "Time and memory"),
    ("provenance", "Provenance"),
    ("notes", "Notes"),
)


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html.j2"))


def _attempt(show: Callable[[sections.Record], Any], record: sections.Record) -> dict[str, Any]:
    try:
        return {"value": show(record), "missing": ""}
    except sections.Missing as reason:
        return {"value": None, "missing": str(reason)}


def _subtitle(record: sections.Record) -> str:
    parts = [
        f"objective: {sections.word(record.get('objective'))}",
        f"losses in {sections.measure_of(record)}",
    ]
    sizes, provenance = record.get("size"), record.get("provenance")
    if isinstance(sizes, Mapping) and num(sizes.get("parameters")) is not None:
        parts.append(f"{count(sizes['parameters'])} parameters")
    if isinstance(provenance, Mapping) and provenance.get("curvprune") is not None:
        parts.append(f"curvprune {sections.word(provenance['curvprune'])}")
    return ", ".join(parts)


def _comparison(record: sections.Record) -> dict[str, Any]:
    parts = ("figures", "paired", "flips", "layers", "recipes", "provenance")
    return {name: _attempt(getattr(comparison, name), record) for name in parts}


def _frontier_budget(record: sections.Record) -> str:
    if sections.loss_budget_of(record) is not None or sections.max_bytes_of(record) is not None:
        return "Dashed red: the budget."
    verdict = record.get("verdict")
    if isinstance(verdict, Mapping) and verdict.get("metric") == "accuracy":
        return "No budget line: the budget is one of accuracy, this axis is loss."
    return ""


def build(record: Mapping[str, Any]) -> str:
    """The report as HTML: one file, no network access, no JavaScript needed.

    Args:
        record: contents of ``report.json``. Any key may be missing, null or NaN; its section then
            says what is not available and why. All text in it is escaped. Beside them an
            ``against`` (see `curvprune.report.comparison`) adds a section that compares the run
            with another.

    Returns:
        The document. The same record gives the same text, byte for byte.
    """
    status = sections.status_of(record)
    verdict = record.get("verdict")
    method = (
        sections.word(verdict["method"])
        if isinstance(verdict, Mapping) and verdict.get("method")
        else ""
    )
    script = "\n" + _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    points = sections.trial_points(record)
    trials = _attempt(sections.trials_table, record)
    peak = num(record.get("peak_memory_bytes"))
    notes = sections.notes(record)
    recipe = record.get("recipe")
    other = comparison.name_of(record)
    contents = (*CONTENTS, ("against", f"Compared with {other}")) if other else CONTENTS
    return _template().render(
        title=sections.word(record.get("title") or "curvprune report"),
        subtitle=_subtitle(record),
        contents=contents,
        css=Markup(_asset("report.css")),
        js=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        status=status,
        status_class=status.lower() if status in sections.STATUSES else "",
        statement=sections.statement(record),
        verdict_facts=sections.verdict_facts(record),
        verdict_chart=sections.verdict_chart(record),
        method=method,
        advice=sections.advice(record),
        contradictions=sections.inconsistencies(record),
        attempts=_attempt(sections.attempts_table, record),
        changed=_attempt(items.changed, record),
        recoveries=sections.recoveries_table(record)
        if sections.items_or_none(record, "recoveries")
        else None,
        together=together.table(record) if sections.items_or_none(record, "together") else None,
        together_reading=together.reading(record),
        size=_attempt(sections.size_facts, record),
        size_chart=sections.size_chart(record),
        options=_attempt(sections.options_table, record),
        removed=None if record.get("structured") is None else _attempt(removed.removed, record),
        trials=trials,
        trials_reading=sections.trials_reading(record),
        measure=sections.measure_of(record),
        scatter=charts.scatter(points, measure=sections.measure_of(record)),
        scatter_missing=trials["missing"] or "no trial has both a predicted and a measured loss",
        legend=sections.trials_legend(record),
        frontier=_attempt(sections.frontier_chart, record),
        frontier_table=_attempt(sections.frontier_table, record),
        frontier_budget=_frontier_budget(record),
        layers=_attempt(sections.layers_table, record),
        heat=_attempt(sections.heat, record),
        ledger_facts=_attempt(sections.ledger_facts, record)["value"],
        ledger_table=_attempt(sections.ledger_table, record),
        curvature=_attempt(curvature.overview, record),
        diagnosis=_attempt(curvature.diagnosis, record),
        spectrum=_attempt(curvature.spectrum, record),
        layer_spectra=curvature.layer_spectra(record),
        traces=_attempt(curvature.traces, record),
        eigenvalues=_attempt(curvature.eigenvalues, record),
        disagreements=_attempt(curvature.disagreements, record),
        stages=_attempt(sections.stages_table, record),
        peak=None
        if peak is None
        else sections.Fact("peak", size(peak), peak, "", f"{count(peak)} B"),
        provenance=_attempt(sections.provenance_table, record),
        recipe=None if recipe is None else sections.word(recipe),
        notes=notes,
        warnings=len(notes),
        other=other,
        against=_comparison(record) if other else None,
    )
