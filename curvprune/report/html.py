"""The record as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from curvprune.record import AnalysisRecord, OtherRun, RunRecord
from curvprune.report import charts
from curvprune.report.comparison import comparison
from curvprune.report.curvature import Overview, overview
from curvprune.report.diagnosis import Diagnosis, diagnosis
from curvprune.report.figures import clean, count
from curvprune.report.frontier import frontier_budget, frontier_chart, frontier_table
from curvprune.report.items import changed
from curvprune.report.prices import layers_table, prices
from curvprune.report.provenance import (
    notes,
    peak_fact,
    provenance_table,
    stages_table,
    state_text,
)
from curvprune.report.removed import removed
from curvprune.report.sizes import options_table, size_chart, size_facts
from curvprune.report.spectrum import Eigenvalues, Spectrum, eigenvalues, layer_spectra, spectrum
from curvprune.report.together import together_reading, together_table
from curvprune.report.traces import Traces, traces
from curvprune.report.trials import (
    recoveries_table,
    trial_points,
    trials_legend,
    trials_reading,
    trials_table,
)
from curvprune.report.verdict import (
    STATUSES,
    advice,
    attempts_table,
    statement,
    status_of,
    verdict_chart,
    verdict_facts,
)

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


def asset(name: str) -> str:
    return files("curvprune.report").joinpath(name).read_text(encoding="utf-8")


def _printable(value: object) -> object:
    """Every value that the template prints passes through here, then it is escaped."""
    return value if isinstance(value, Markup) else clean(value)


@cache
def template_of(name: str) -> Template:
    """A template whose every printed value is escaped."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(asset(name))


def _subtitle(record: RunRecord) -> str:
    parts = [
        f"objective: {record.objective}",
        f"losses in {record.measure}",
        f"{count(record.size.parameters)} parameters",
        f"curvprune {record.provenance.curvprune}",
    ]
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curvature:
    """What the section on curvature shows; ``None``: not looked for."""

    overview: Overview
    diagnosis: Diagnosis | None
    spectrum: Spectrum | None
    layer_spectra: Markup | None
    traces: Traces
    eigenvalues: Eigenvalues | None

    @classmethod
    def of(cls, analysis: AnalysisRecord) -> Curvature:
        return cls(
            overview=overview(analysis),
            diagnosis=diagnosis(analysis),
            spectrum=spectrum(analysis),
            layer_spectra=layer_spectra(analysis),
            traces=traces(analysis),
            eigenvalues=eigenvalues(analysis),
        )


def build(record: RunRecord, against: OtherRun | None = None) -> str:
    """The report as HTML: one file, no network access, no JavaScript needed.

    Args:
        record: the run. A section without content says so. All text in it is escaped.
        against: another run; adds a section that compares the two.

    Returns:
        The document. The same record gives the same text, byte for byte.
    """
    status = status_of(record)
    # The policy in the page's head allows this script alone, by its hash.
    script = "\n" + asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # A comparison is the last section, with its own place in the contents.
    contents = [*CONTENTS]
    if against is not None:
        contents.append(("against", f"Compared with {against.name}"))
    method = record.verdict.method if record.verdict is not None else ""
    return template_of("report.html.j2").render(
        title=record.title,
        subtitle=_subtitle(record),
        measure=record.measure,
        contents=contents,
        css=Markup(asset("report.css")),
        js=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        status=status,
        status_class=status.lower() if status in STATUSES else "",
        statement=statement(record),
        verdict_facts=verdict_facts(record),
        verdict_chart=verdict_chart(record),
        method=method,
        advice=advice(record),
        attempts=attempts_table(record),
        changed=changed(record),
        size_facts=size_facts(record),
        size_chart=size_chart(record),
        options=options_table(record),
        removed=removed(record),
        trials=trials_table(record),
        trials_reading=trials_reading(record),
        together=together_table(record),
        together_reading=together_reading(record),
        recoveries=recoveries_table(record),
        scatter=charts.scatter(trial_points(record), measure=record.measure),
        legend=trials_legend(record),
        frontier=frontier_chart(record),
        frontier_table=frontier_table(record),
        frontier_budget=frontier_budget(record),
        layers=layers_table(record),
        prices=prices(record),
        curvature=None if record.analysis is None else Curvature.of(record.analysis),
        stages=stages_table(record),
        peak=peak_fact(record),
        state=state_text(record),
        provenance=provenance_table(record),
        recipe=record.recipe,
        notes=notes(record),
        other=against,
        comparison=None if against is None else comparison(record, against),
    )
