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

import torch
from torch import nn

from curvprune.curvature.capture import capture, items_in, wide
from curvprune.curvature.diagnosis import Diagnosis, diagnose
from curvprune.curvature.estimates import Estimate, accurate
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
from curvprune.curvature.structure import Structure, find_structure
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
        ValueError: a layer that holds NaN, a model that is not deterministic.
    """
    _check_finite(layers)
    check_independent(model)
    # 1. What is exact for which layer. The first batch's forward pass serves the Fisher as well.
    batches = list(batches)
    wanted, layers = layers, dict(layers)
    unused = unused_layers(model, objective, batches, layers)
    for name in unused:
        del layers[name]
    taken = capture(model, objective, batches[0], layers) if asked.first_order else None
    structure = find_structure(model, objective, batches[0], layers, taken)
    request = AnalysisRequest(
        model=model,
        objective=objective,
        batches=batches,
        layers=layers,
        asked=asked,
        structure=structure,
        advance=advance,
        remember=remember,
    )

    request.notes += [*_of_loss(objective), *_of_altered(structure)]
    request.notes += [*_of_unused(unused), *_of_frozen(wanted)]

    # 2. Every layer, and the whole model.
    whole: ModelCurvature | None = None
    if taken is not None:
        if not set(asked.quantities) <= {"trace", "diagonal"}:
            request.notes.append(
                f"matrix={asked.matrix!r} gives trace and diagonal only; matrix='ggn' has the "
                "spectra as well"
            )
        found = _flagged(first_order(request, taken), asked.rtol)
    else:
        found = second_order(request)
        if asked.wants("density"):
            whole = whole_model(request)

    found |= {name: _nothing(wanted[name], asked) for name in unused}
    found = {name: found[name] for name in wanted}

    # 3. In words.
    diagnosis: Diagnosis | None = None
    if whole is not None:
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


def _nothing(layer: Layer, asked: AnalysisSettings) -> LayerCurvature:
    """What is asked of a layer on which the loss does not depend."""
    diagonal = None
    if asked.wants("diagonal"):
        weight = layer.weight
        diagonal = torch.zeros(layer.shape, dtype=wide(weight), device=weight.device)
    return LayerCurvature(
        trace=Estimate(value=0.0, stderr=0.0) if asked.wants("trace", "diagonal") else None,
        diagonal=diagonal,
        shape=layer.shape,
        method="exact",
        diagonal_error=0.0,
    )


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
