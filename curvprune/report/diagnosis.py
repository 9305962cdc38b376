"""What the whole model's spectrum says: key figures with their meaning, and where Hessian and
Gauss-Newton disagree."""

from __future__ import annotations

from dataclasses import dataclass

from curvprune.record import AnalysisRecord, DiagnosisRecord, EstimateRecord, RunRecord
from curvprune.report.curvature import (
    GAUSS_NEWTON,
    curvature_measure,
    names_text,
    short_matrix,
)
from curvprune.report.figures import MISSING, THIN, finite, plus_minus, sig
from curvprune.report.tables import Cell, Column, Fact, Table, number_cell

_KINDS = {
    "minimum": "the gradient is no more than noise and no direction curves down",
    "saddle": "the gradient is no more than noise and along some directions the loss curves down, "
    "also on items that these were not chosen on",
    "maximum": "the gradient is no more than noise and the loss curves down in every direction",
    "flat": "the gradient is no more than noise, and the lowest curvature cannot be told from "
    "zero over these items: a minimum and a saddle are both possible",
    "not stationary": "the gradient is more than noise, so the loss still falls to first order: "
    "curvature is only half the picture here",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The figures with their meaning, lesser ones without, the sentences, the disagreements."""

    facts: list[Fact]
    lesser: list[Fact]
    text: tuple[str, ...]
    disagreements: Table


def diagnosis(analysis: AnalysisRecord) -> Diagnosis | None:
    """The whole model's diagnosis; ``None`` where there is none."""
    found = analysis.diagnosis
    if found is None:
        return None
    lesser = (
        ("gradient norm", finite(found.gradient_norm)),
        ("gradient noise over items", found.gradient_noise),
        ("relative gradient", found.relative_gradient),
        ("sharpness", found.sharpness),
    )
    return Diagnosis(
        facts=_figures(analysis, found),
        lesser=[Fact(label, sig(value), value) for label, value in lesser if value is not None],
        text=found.text,
        disagreements=_disagreements(analysis, found),
    )


def _figures(analysis: AnalysisRecord, found: DiagnosisRecord) -> list[Fact]:
    """The key figures; the hint of each says in one line what it means."""
    # 1. Hints that depend on what was found.
    smallest_hint = "the smallest curvature; below zero the loss curves down along that direction"
    if found.lambda_min is not None and found.lambda_min < 0:
        smallest_hint = "below zero: along this direction the loss of these items curves down"
    flat_hint = "share of all directions in which the loss is flat"
    if found.near_zero_below is not None:
        flat_hint += f": |λ| below {sig(found.near_zero_below)}"
    # 2. The figures, from the steepest direction to the shape of the whole.
    return [
        _end(
            "λmax",
            found.lambda_max,
            found.lambda_max_over_items,
            f"curvature along the steepest direction ({curvature_measure(analysis)})",
        ),
        _step(found),
        _end("λmin", found.lambda_min, found.lambda_min_over_items, smallest_hint),
        _share(
            "negative share",
            found.negative_share,
            "share of all directions along which the loss curves down",
        ),
        _share("near-zero share", found.near_zero_share, flat_hint),
        Fact(
            "effective rank",
            _with_error(found.effective_rank, found.effective_rank_stderr),
            found.effective_rank,
            "",
            "about how many directions hold the curvature; few against the parameters means most "
            "can move freely",
        ),
        Fact(
            "kind of point",
            found.kind or MISSING,
            None,
            "",
            _KINDS.get(found.kind or "", "what the run calls this point"),
        ),
    ]


def _end(label: str, value: float | None, over_items: float | None, hint: str) -> Fact:
    """An extreme eigenvalue with its standard error over items."""
    if over_items is not None:
        hint += "; ± its standard error over items"
    return Fact(label, _with_error(value, over_items, 4), value, "", hint)


def _with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    return plus_minus(value, error) if error else sig(value, digits)


def _step(found: DiagnosisRecord) -> Fact:
    """The largest learning rate at which plain gradient descent does not diverge."""
    # No limit is an answer, and another one than no number.
    label, step = "largest stable SGD step", found.max_learning_rate
    if step is None and found.lambda_max is not None and found.lambda_max <= 0:
        hint = "λmax is not positive, so curvature sets no limit to the step"
        return Fact(label, "no limit", None, "", hint)
    hint = "2/λmax: plain SGD with a larger learning rate diverges along the steepest direction"
    return Fact(label, sig(step), step, "", hint)


def _share(label: str, share: EstimateRecord | None, hint: str) -> Fact:
    """A share in per cent with its standard error on these items, of starts and quadrature."""
    value = None if share is None else finite(share.value)
    if share is None or value is None:
        return Fact(label, MISSING, None, "", hint)
    return Fact(label, plus_minus(100 * value, 100 * share.stderr), value, "%", hint)


def _disagreements(analysis: AnalysisRecord, found: DiagnosisRecord) -> Table:
    """Layers whose Hessian and Gauss-Newton traces disagree; no rows where none does."""
    measure = curvature_measure(analysis)
    columns = [
        Column("layer"),
        Column("Hessian trace", measure, "n"),
        Column(f"{GAUSS_NEWTON} trace", measure, "n"),
        Column("ratio", "of the two traces as recorded; 1 is agreement", "n"),
    ]
    rows = []
    for apart in found.disagreements:
        rows.append(
            [
                Cell(apart.layer, class_="mono"),
                number_cell(apart.hessian, sig(apart.hessian, 4)),
                number_cell(apart.gauss_newton, sig(apart.gauss_newton, 4)),
                number_cell(apart.ratio, sig(apart.ratio)),
            ]
        )
    return Table("disagreements", columns, rows)


def disagreeing(analysis: AnalysisRecord) -> set[str]:
    """Layers whose two traces disagree."""
    if analysis.diagnosis is None:
        return set()
    return {apart.layer for apart in analysis.diagnosis.disagreements}


def diagnosis_lines(record: RunRecord) -> list[str]:
    """The diagnosis for a terminal: figures, sentences, disagreements. Empty where there is
    none."""
    analysis = record.analysis
    if analysis is None or analysis.diagnosis is None:
        return []
    found, matrix = analysis.diagnosis, short_matrix(analysis)
    # The same texts as in the report, with their measure.
    texts = {}
    for fact in _figures(analysis, found):
        texts[fact.label] = f"{fact.text}{THIN}{fact.measure}" if fact.measure else fact.text
    flat = found.near_zero_below
    below = "" if flat is None else f" (|λ| below {sig(flat)})"
    lines = [
        f"{matrix}: λmax {texts['λmax']}, largest stable plain-SGD step "
        f"{texts['largest stable SGD step']}, λmin {texts['λmin']}; kind of point: "
        f"{texts['kind of point']}",
        f"directions: {texts['negative share']} negative, {texts['near-zero share']} near zero"
        f"{below}, effective rank {texts['effective rank']}",
        *found.text,
    ]
    if apart := sorted(disagreeing(analysis)):
        lines.append(f"{matrix} and {GAUSS_NEWTON} traces disagree in {names_text(apart)}")
    return lines
