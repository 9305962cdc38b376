"""Curvature of a model's loss, per layer and for the whole: each quantity by the best method that
its structure allows.

    layers        `curvprune.curvature.layer_hessian` or `curvprune.curvature.layer_fisher`
    whole model   `curvprune.curvature.model_curvature`
    in words      `curvprune.curvature.diagnosis`

Standard errors of probes are about these data; those over items are about the population that the
items come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from curvprune.curvature.capture import Capture, capture, items_in
from curvprune.curvature.diagnosis import Diagnosis, diagnose
from curvprune.curvature.differentiation import check_same_twice
from curvprune.curvature.estimates import accurate
from curvprune.curvature.gradient_check import Uneven
from curvprune.curvature.layer_curvature import LayerCurvature
from curvprune.curvature.layer_fisher import first_order
from curvprune.curvature.layer_hessian import second_order
from curvprune.curvature.model_curvature import ModelCurvature, whole_model
from curvprune.curvature.plots import plot_analysis
from curvprune.curvature.records import AnalysisRecord
from curvprune.curvature.request import (
    MATRICES,
    Advance,
    AnalysisRequest,
    AnalysisSettings,
    Remember,
)
from curvprune.curvature.structure import TOGETHER, Structure, find_structure
from curvprune.curvature.unused import unused_layers
from curvprune.model import Batch, Layer, Loss, check_independent
from curvprune.schema import Json, encode

NAMED = 8  # layers that a note names


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Per-layer and whole-model curvature of the loss; ``matrix`` says of which matrix."""

    matrix: str
    layers: dict[str, LayerCurvature]
    measure: str = "nats"
    num_items: int = 0
    model: ModelCurvature | None = None
    diagnosis: Diagnosis | None = None
    notes: tuple[str, ...] = ()

    def to_record(self) -> AnalysisRecord:
        """Summaries of the diagonals, eigenvalues without their vectors."""
        return AnalysisRecord(
            matrix=self.matrix,
            measure=self.measure,
            num_items=self.num_items,
            layers={name: layer.to_record() for name, layer in self.layers.items()},
            model=None if self.model is None else self.model.to_record(),
            diagnosis=None if self.diagnosis is None else self.diagnosis.to_record(),
            notes=self.notes,
        )

    def plot(self) -> Any:
        """Traces by layer and the whole model's density, as a matplotlib figure. Raises
        ``ValueError`` where there is neither, or no matplotlib."""
        return plot_analysis(self.to_record())

    def to_dict(self) -> dict[str, Json]:
        """The record as JSON."""
        values: dict[str, Json] = encode(self.to_record())
        return values


def _silent(step: str, done: int, total: int) -> None:
    pass


def analyze_curvature(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    asked: AnalysisSettings,
    *,
    advance: Advance = _silent,
    remember: Remember | None = None,
) -> Analysis:
    """See `curvprune.analyze`.

    Args:
        asked: matrix, quantities and accuracy.
        advance: called with (step, done, total).
        remember: given each part that an interrupted analysis should keep: exact blocks, traces of
            a group of layers, eigenvalues or density of a layer.

    Raises:
        ValueError: a layer that holds NaN; a model that is not deterministic, whose items depend on
            each other (Fisher), or that gives other outputs where it can be differentiated twice;
            a function without a second derivative.
    """
    _check_finite(layers)
    check_independent(model)
    batches = list(batches)
    unused = unused_layers(model, objective, batches, layers)
    used = {name: layer for name, layer in layers.items() if name not in unused}
    # 1. What is exact for which layer. The first batch's forward pass serves the Fisher as well.
    taken = capture(model, objective, batches[0], used) if asked.first_order else None
    structure = find_structure(model, objective, batches[0], used, taken)
    if asked.first_order and structure.together:
        raise ValueError(
            f"{type(model).__name__}: {TOGETHER}, so an item has no gradient of its own and there "
            f"is no matrix={asked.matrix!r}; pass matrix='ggn', which takes the batches as they are"
        )
    if not asked.first_order:
        check_same_twice(model, objective, batches[0])

    # 2. Every layer, and the whole model; once more where a later batch shows another structure.
    while True:
        request = AnalysisRequest(
            model=model,
            objective=objective,
            batches=batches,
            layers=used,
            asked=asked,
            structure=structure,
            advance=advance,
            remember=remember,
        )
        request.notes += [*_of_loss(objective), *_of_model(structure, layers)]
        request.notes += [*_of_altered(structure), *_of_unused(unused), *_of_frozen(layers)]
        try:
            some, whole = _of_request(request, taken, alone=not layers)
        except Uneven as uneven:
            structure = structure.without(uneven.reasons)
            continue
        break
    some |= {name: LayerCurvature.zeros_of(layers[name], asked.quantities) for name in unused}
    found = {name: some[name] for name in layers}

    # 3. In words.
    diagnosis: Diagnosis | None = None
    if whole is not None and not asked.first_order:
        diagnosis = diagnose(MATRICES[asked.matrix], whole, found)
    return Analysis(
        matrix=MATRICES[asked.matrix],
        layers=found,
        measure=objective.measure,
        num_items=sum(items_in(batch) for batch in batches),
        model=whole,
        diagnosis=diagnosis,
        notes=tuple(request.notes),
    )


def _of_request(
    request: AnalysisRequest, taken: Capture | None, *, alone: bool
) -> tuple[dict[str, LayerCurvature], ModelCurvature | None]:
    """The layers and the model; of a model ``alone``, which has no layers, whatever is asked."""
    asked = request.asked
    if alone:
        return {}, whole_model(request)
    if taken is None:
        found = second_order(request)
        return found, whole_model(request) if asked.wants("density") else None
    if not set(asked.quantities) <= {"trace", "diagonal"}:
        request.notes.append(
            f"matrix={asked.matrix!r} gives trace and diagonal only; matrix='ggn' has the "
            "spectra as well"
        )
    return _flagged(first_order(request, taken), asked.rtol), None


def _check_finite(layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(
                f"layer {name}: its weight holds NaN or infinite values; repair the model or "
                "leave it out"
            )


def _of_loss(objective: Loss) -> list[str]:
    """How the loss's own curvature is known, where that is no closed form."""
    if objective.curvature == "closed form":
        return []
    how = "not known at outputs" if objective.curvature == "none" else "had by differentiation"
    return [f"the curvature of loss {objective.name} at the model's outputs is {how}"]


def _of_model(structure: Structure, layers: Mapping[str, Layer]) -> list[str]:
    """What there is no per-layer answer to."""
    notes = []
    if not layers:
        notes.append(
            "there is no layer of a known kind (Linear, convolution, embedding), so the curvature "
            "is that of the whole model, over all its parameters"
        )
    if structure.together:
        notes.append(
            f"{TOGETHER}: the curvature is that of the batches as they are, and nothing is exact"
        )
    return notes


def _of_altered(structure: Structure) -> list[str]:
    """Which layers are not taken for matrices."""
    names = structure.altered
    if not names:
        return []
    told = _named([f"{name} ({structure.reasons[name]})" for name in names])
    return [
        f"{len(names)} layer(s) compute more than their weight times their input, so their "
        f"curvature comes from gradients of the weight itself and is estimated: {told}"
    ]


def _of_unused(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} layer(s) are not on the way to the loss, so their curvature is zero: "
        f"{_named(names)}"
    ]


def _of_frozen(layers: Mapping[str, Layer]) -> list[str]:
    """Which layers are frozen, where others are not."""
    names = [name for name, layer in layers.items() if not layer.weight.requires_grad]
    if not names or len(names) == len(layers):
        return []
    return [
        f"{len(names)} of {len(layers)} layers are frozen (requires_grad=False) and counted like "
        f"the others; leave them out by layers= if that is not meant: {_named(names)}"
    ]


def _named(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _flagged(layers: Mapping[str, LayerCurvature], rtol: float) -> dict[str, LayerCurvature]:
    """Traces from items, whose error over items says whether they met the tolerance."""
    flagged = {}
    for name, layer in layers.items():
        trace = layer.trace
        if trace is not None and trace.stderr > 0:
            met = accurate(trace.stderr, trace.value, trace.num_items, rtol)
            layer = replace(layer, trace=replace(trace, converged=met))
        flagged[name] = layer
    return flagged
