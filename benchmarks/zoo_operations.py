"""What the zoo does with a model, and the silent errors that it looks for on the way.

Each operation takes a `Patient` and returns what it found. A `SilentError` is what nobody would
have been told: a layer that no note names and that nothing was done to, a folder that says it can
be read and cannot, a model that comes back other than it went.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import curvprune as cp
from benchmarks.tiny_models import Inputs, logits_in, outputs
from curvprune.model import find_layers, left_over
from curvprune.options import kept_weights

ITEMS = 8
TOLERANCE = 1e-4  # of the largest output, for a model that was read back


class SilentError(RuntimeError):
    """A wrong result without a word."""


@dataclass
class Patient:
    """A model to operate on, and a folder that its operations share."""

    category: str
    model: nn.Module
    make: Callable[[int], Inputs]
    items: Callable[[int], list[Inputs]]
    folder: Path

    def data(self, items: int = ITEMS) -> list[Inputs] | cp.Items:
        # Rows of pixels may be patches: items as processors make them.
        return cp.Items(self.items(items)) if self.category == "image-text" else [self.make(items)]

    def loss(self) -> str | cp.LabelFree:
        """Encoders have no loss of their own: similarities to random anchors stand in for it."""
        if self.category != "encoder":
            return "auto"
        width = outputs(self.model, self.make(1)).shape[-1]
        anchors = torch.randn(16, width, generator=torch.Generator().manual_seed(3))
        anchors = anchors / anchors.norm(dim=-1, keepdim=True)

        def similarities(output: object, _: Inputs) -> Tensor:
            found = logits_in(output).mean(1)
            return found / found.norm(dim=-1, keepdim=True) @ anchors.T / 0.05

        return cp.LabelFree(self.model, of=similarities)


# -------------------------------------------------------------------------------------- operations


def quantize(patient: Patient) -> dict[str, object]:
    model, data = patient.model, patient.data()
    # 1. Groups of 16, or whole rows where a layer has no such groups.
    try:
        result = cp.quantize(model, data, bits=4, group_size=16, loss=patient.loss())
    except ValueError as error:
        if "group" not in str(error):
            raise
        result = cp.quantize(model, data, bits=4, loss=patient.loss())
    # 2. For the operation that reads it back, which also tells that it could not be saved.
    few = patient.make(2)
    expected = outputs(result.model, few)
    torch.save(expected.detach(), patient.folder / "expected.pt")
    try:
        result.save(patient.folder / "artifact")
    except Exception as error:
        (patient.folder / "unsaved").write_text(said(error))
    # 3. What was rounded: all that no note speaks of.
    before, after = find_layers(model), find_layers(result.model)
    same = [n for n in before if torch.equal(before[n].weight, after[n].weight)]
    notes, chosen = list(result.plan.notes), result.plan.choices
    untold = [n for n in same if chosen.get(n, "keep") != "keep" and not named_in(n, notes)]
    if untold:
        raise SilentError(f"unchanged and in no note: {len(untold)} layers, first {untold[0]}")
    if not bool(expected.isfinite().all()):
        raise SilentError("the rounded model's outputs are not finite")
    covered = {id(layer.weight): layer.numel for layer in before.values()}
    return {
        "share of parameters": sum(covered.values()) / sum(p.numel() for p in model.parameters()),
        "left over": left_over(model),
        "outputs moved by": distance(expected, outputs(model, few)),
        "unchanged layers": same,
        "notes": notes,
    }


def named_in(layer: str, notes: list[str]) -> bool:
    return any(layer in note for note in notes)


def read_back(patient: Patient) -> dict[str, object]:
    """The saved model, by every reader that shall take it."""
    model, artifact = patient.model, patient.folder / "artifact"
    if (patient.folder / "unsaved").is_file():
        raise RuntimeError((patient.folder / "unsaved").read_text())
    expected = torch.load(patient.folder / "expected.pt", weights_only=True)
    blank = copy.deepcopy(model)
    for p in blank.parameters():
        p.data.zero_()
    readers: dict[str, Callable[[], nn.Module]] = {
        "from_pretrained": lambda: type(model).from_pretrained(str(artifact)).eval(),
        "load": lambda: cp.load(artifact),
        "load(model=)": lambda: cp.load(artifact, model=blank),
    }
    # What the folder claims, not what it looks like.
    claimed = json.loads((artifact / "curvprune.json").read_text()).get("portable")
    has_config = (artifact / "config.json").is_file()
    if claimed is True and not has_config:
        raise SilentError("a folder without a config is called portable")
    names = ("from_pretrained", "load") if claimed is True else ("load(model=)",)
    wrong, gaps = [], {}
    for name in names:
        try:
            gaps[name] = distance(outputs(readers[name](), patient.make(2)), expected)
        except Exception as error:
            wrong.append(f"{name}: {said(error)}")
            continue
        if not gaps[name] <= TOLERANCE * max(1.0, float(expected.abs().max())):
            wrong.append(f"{name}: outputs differ by {gaps[name]:.1e}")
    if wrong:
        raise SilentError("; ".join(wrong))
    return {**gaps, "portable": claimed}


def prune(patient: Patient) -> dict[str, object]:
    result = cp.prune(patient.model, patient.data(), sparsity=0.5, loss=patient.loss())
    notes = list(result.plan.notes)
    large = {n: la for n, la in find_layers(result.model).items() if la.numel > 64}
    asked, zeros, other = cp.Prune(sparsity=0.5), {}, {}
    for name, layer in large.items():
        zeros[name] = float((layer.weight == 0).float().mean())
        # Groups are pruned one by one, each to the nearest number of weights.
        kept = kept_weights(asked, layer.shape, groups=layer.groups)
        if abs(zeros[name] - (1 - kept / layer.numel)) > 0.06:
            other[name] = zeros[name]
    chosen = result.plan.choices
    untold = [n for n in other if chosen.get(n, "keep") != "keep" and not named_in(n, notes)]
    if untold:
        first = f"{untold[0]} ({other[untold[0]]:.0%})"
        raise SilentError(f"not half zeros and in no note: {len(untold)} layers, first {first}")
    return {"not half zeros": other, "notes": notes}


def remove_units(patient: Patient) -> dict[str, object]:
    # Convolutions have many inputs for a compensation to fit.
    data = patient.data(64 if patient.category == "image-cls" else ITEMS)
    result = cp.prune(patient.model, data, structured=0.2, loss=patient.loss())
    # What comes back must run, and can be written.
    if not bool(outputs(result.model, patient.make(2)).isfinite().all()):
        raise SilentError("the smaller model's outputs are not finite")
    result.save(patient.folder / "smaller")
    work = result.macs[0] / max(1, result.macs[1])
    return {"work left": work, "cuts": len(result.cuts), "notes": list(result.notes)}


def hessian(patient: Patient) -> dict[str, object]:
    asked = {"quantities": ["trace", "eigenvalues"], "max_products": 8, "rtol": 0.3}
    return analyzed(patient, matrix="hessian", **asked)


def fisher(patient: Patient) -> dict[str, object]:
    return analyzed(patient, matrix="fisher", quantities=["trace"])


def analyzed(patient: Patient, **asked: object) -> dict[str, object]:
    found = cp.analyze(patient.model, patient.data(4), **asked, loss=patient.loss())
    layers = found.layers
    traces = {n: layer.trace for n, layer in layers.items()}
    bad = [n for n, t in traces.items() if t is None or not math.isfinite(t.value)]
    return {"layers": len(layers), "without a trace": bad, "notes": list(found.notes)}


def budgeted(patient: Patient) -> dict[str, object]:
    asked = {"bits": (3, 4, 8), "budget": cp.Budget("loss", max_drop=0.5)}
    result = cp.quantize(patient.model, patient.data(60), **asked, loss=patient.loss())
    options = Counter(result.plan.choices.values())
    notes = list(result.plan.notes)
    return {"verdict": result.verdict.status, "options": dict(options), "notes": notes}


OPERATIONS: dict[str, Callable[[Patient], dict[str, object]]] = {
    "quantize": quantize,
    "read back": read_back,
    "prune": prune,
    "structured": remove_units,
    "hessian": hessian,
    "fisher": fisher,
    "budget": budgeted,
}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else math.inf


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
