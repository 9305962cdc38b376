"""What a run took, what it was made from, and what it noted on the way."""

from __future__ import annotations

import math
from dataclasses import fields

from curvprune.record import RunRecord
from curvprune.report import charts
from curvprune.report.figures import clean, count, duration, size, whole_percent
from curvprune.report.tables import Cell, Column, Fact, Table, number_cell


def total_seconds(record: RunRecord) -> float:
    return math.fsum(stage.seconds for stage in record.stages)


def stages_table(record: RunRecord) -> Table | None:
    """How long each stage took; ``None`` where none was timed."""
    if not record.stages:
        return None
    columns = [
        Column("stage"),
        Column("time", "wall clock", "n"),
        Column("share", "", "n"),
        Column(""),
        Column(""),
    ]
    # Shares of the total, which a bar beside them shows.
    total = total_seconds(record)
    rows = []
    for stage in record.stages:
        share = stage.seconds / total if total > 0 else None
        rows.append(
            [
                Cell(stage.name),
                number_cell(stage.seconds, duration(stage.seconds)),
                number_cell(share, whole_percent(share)),
                Cell("" if share is None else charts.progress(share)),
                Cell("resumed from the run folder" if stage.resumed else ""),
            ]
        )
    foot = [Cell("total"), number_cell(total, duration(total)), Cell(""), Cell(""), Cell("")]
    return Table("stages", columns, rows, foot)


def peak_fact(record: RunRecord) -> Fact:
    """Peak memory of the process."""
    peak = record.peak_memory_bytes
    return Fact("peak", size(peak), float(peak), "", f"{count(peak)} B")


def state_text(record: RunRecord) -> str:
    """How large the files are that a run keeps to go on from; empty where there are none."""
    if record.state_bytes <= 0:
        return ""
    return (
        f"The run folder's state/ takes {size(record.state_bytes)}; `curvprune clean RUN` removes "
        "it."
    )


def origins(record: RunRecord) -> dict[str, str]:
    """What → value: every hash, version and setting that the run was made with."""
    # The values of a mapping stand beside the fields: "data_sha256, certify", "transformers".
    found: dict[str, str] = {}
    for field in fields(record.provenance):
        value = getattr(record.provenance, field.name)
        if field.name == "libraries":
            found |= value
        elif isinstance(value, dict):
            found |= {f"{field.name}, {key}": inner for key, inner in value.items()}
        else:
            found[field.name] = str(value)
    return {clean(what): clean(value) for what, value in found.items()}


def provenance_table(record: RunRecord) -> Table:
    """Hashes, versions, device and seed."""
    rows = [[Cell(what), Cell(value, class_="mono")] for what, value in origins(record).items()]
    return Table("provenance", [Column("what"), Column("value")], rows)


def notes(record: RunRecord) -> list[tuple[str, str]]:
    """``(where, text)`` of every note: the run's, the layers' (equal texts together), the
    curvature's, the trials'."""
    found = [("run", text) for text in record.notes]
    # Layers with the same note share a line.
    layers_of: dict[str, list[str]] = {}
    for layer in record.layers:
        for text in layer.notes:
            layers_of.setdefault(text, []).append(layer.name)
    found += [(", ".join(names), text) for text, names in layers_of.items()]
    if record.analysis is not None:
        found += [("curvature", text) for text in record.analysis.notes]
    found += [(f"trial {trial.name}", trial.note) for trial in record.trials if trial.note]
    return found
