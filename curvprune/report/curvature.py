"""What of the curvature was analysed: the matrix, the items, the whole model's figures."""

from __future__ import annotations

from dataclasses import dataclass

from curvprune.record import AnalysisRecord, ModelCurvatureRecord
from curvprune.report.figures import PLUS_MINUS, count, finite, plus_minus, sig
from curvprune.report.tables import Fact

GAUSS_NEWTON = "Gauss-Newton"
MANY_NAMES = 12  # more names than this say less than their number


def short_matrix(analysis: AnalysisRecord) -> str:
    """The matrix without what is said about it in brackets, for heads of columns."""
    return analysis.matrix.split(" (")[0]


def curvature_measure(analysis: AnalysisRecord) -> str:
    """What curvatures are counted in."""
    return f"{analysis.measure} per unit weight change squared"


def names_text(names: list[str]) -> str:
    """The layers' names, or how many there are."""
    return ", ".join(names) if len(names) <= MANY_NAMES else f"{count(len(names))} layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """``over``: number of items; ``not_asked``: the parts of an analysis that were left out, in a
    sentence."""

    matrix: str
    over: str
    measure: str
    facts: list[Fact]
    not_asked: str
    notes: tuple[str, ...]


def overview(analysis: AnalysisRecord) -> Overview:
    """What the section starts with."""
    facts = [] if analysis.model is None else _model_facts(analysis, analysis.model)
    return Overview(
        matrix=analysis.matrix,
        over=count(analysis.num_items),
        measure=curvature_measure(analysis),
        facts=facts,
        not_asked=_not_asked(analysis),
        notes=analysis.notes,
    )


def _model_facts(analysis: AnalysisRecord, model: ModelCurvatureRecord) -> list[Fact]:
    matrix = short_matrix(analysis)
    trace, stderr, hint = None, None, "sum of all eigenvalues of the whole model"
    if model.trace is not None:
        trace, stderr = finite(model.trace.value), model.trace.stderr
        hint += "; ± its standard error over probes, on these items"
        if model.trace.converged is False:
            hint += "; the tolerance asked for was not reached"
    facts = [
        Fact(
            "parameters",
            count(model.parameters),
            finite(model.parameters),
            "",
            "of the whole model",
        ),
        Fact(
            "loss", sig(model.loss, 5), finite(model.loss), analysis.measure, "mean over the items"
        ),
        Fact(
            "gradient norm",
            sig(model.gradient_norm),
            finite(model.gradient_norm),
            "",
            "length of the loss gradient over all weights; zero where training has converged on "
            "these items",
        ),
        Fact(
            f"{matrix} trace {PLUS_MINUS} se",
            plus_minus(trace, stderr),
            trace,
            "",
            f"{hint}, {curvature_measure(analysis)}",
        ),
    ]
    if model.trace is not None and model.trace.over_items is not None:
        over_items = finite(model.trace.over_items)
        hint = "what the trace of other items of this population would differ by"
        facts.append(Fact("its se over items", sig(over_items, 2), over_items, "", hint))
    return facts


def _not_asked(analysis: AnalysisRecord) -> str:
    """The parts that were left out, in one line; empty where nothing was."""
    # The diagnosis and the density are the whole model's; the rest may be of single layers.
    model, layers = analysis.model, analysis.layers.values()
    asked = {
        "the diagnosis of the whole model": analysis.diagnosis is not None,
        "its spectral density": model is not None and model.density is not None,
        "traces of the layers": any(layer.trace is not None for layer in layers),
        "extreme eigenvalues": any(layer.eigenvalues is not None for layer in layers)
        or (model is not None and model.eigenvalues is not None),
    }
    parts = [part for part, found in asked.items() if not found]
    return f"Not asked for: {', '.join(parts)}." if parts else ""
