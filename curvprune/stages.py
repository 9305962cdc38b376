"""The stages of a compression, from a model and its splits to plans, solved layers and a verdict.

    solve    every option of every layer, from one forward pass over the calibration items
    price    every solved change, from one forward and a few backward passes per item
    select   plans along the frontier, measured on the select split, beside controls
    apply    the chosen plans: one sequential forward pass each, later layers see what earlier ones became
    certify  those plans, cautious first, saved and loaded again, on items that nothing else has touched

Each stage leaves its results in ``state/``, layer by layer, and skips what it finds there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvprune import artifact
from curvprune.analysis import MATRICES, Analysis, LayerCurvature
from curvprune.apply import Moments, visit_layers
from curvprune.certificate import Verdict, certify_accuracy, certify_loss, fixed_sequence, probability_of_certifying
from curvprune.curvature.fisher import Change, FisherPass, fisher_pass
from curvprune.curvature.forms import FORMS, Forms, quadratic_forms
from curvprune.data import Split, Splits, collate
from curvprune.layers import Layer, find_layers
from curvprune.ledger import CURVATURES, Ledger, build_ledger
from curvprune.objective import ItemResults, Objective, evaluate, to_device
from curvprune.options import Cast, Keep, Option, option_from_key, pruner_of, quantizer_of
from curvprune.plan import Budget, Infeasible, Plan, cheapest, search
from curvprune.processes import rank, shared, wait, world
from curvprune.solve import Solved, solve
from curvprune.solve.grids import dequantize
from curvprune.state import StageLog, State

CHECKPOINT_SECONDS = 45.0  # the pricing pass writes its totals this often
ACCEPTABLE = 0.80  # predicted probability of being certified that a plan must have on select
SAFE = 0.95  # ... and that the first plan of the fixed sequence should have
CAUTION = 0.6  # a more cautious plan may cost so much of the next one's predicted loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Knobs of a run that are not part of the model, the data or the budget."""

    seed: int = 0
    labels: int = 2
    curvature: str = "fisher"  # a key of `curvprune.ledger.CURVATURES`: what prices are taken from
    trials: int = 6
    attempts: int = 2
    batch_size: int = 4
    portable: artifact.Portable = True  # see `curvprune.artifact.reader_of`

    def __post_init__(self) -> None:
        if self.portable not in (True, False, "engines"):
            raise ValueError(f'Settings: portable={self.portable!r} is unknown; choose True, False or "engines"')
        if self.curvature not in CURVATURES:
            raise ValueError(f"Settings: curvature={self.curvature!r} is unknown; expected {', '.join(CURVATURES)}")


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything that is fixed before the first long computation."""

    model: nn.Module
    objective: Objective
    layers: dict[str, Layer]
    options: dict[str, list[Option]]
    splits: Splits
    budget: Budget | None
    settings: Settings
    state: State
    stages: StageLog
    reload: Callable[[Path], nn.Module]
    write_model: Callable[[Path, Mapping[str, Solved], Mapping[str, Any]], None]
    same_option: tuple[tuple[str, ...], ...] = ()  # groups of layers; each is offered the same options
    notes: list[str] = field(default_factory=list)
    ledger: Ledger | None = None
    analysis: Analysis | None = None
    plan: Plan | None = None
    verdict: Verdict | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.settings.curvature == "input" and self.budget is not None and self.budget.max_drop is not None:
            raise ValueError(
                'curvature="input" prices the error of layers, in no unit of loss: it cannot plan for max_drop; pass '
                "max_bytes, or another curvature"
            )

    @property
    def fixed_bytes(self) -> int:
        return artifact.other_bytes(self.model, self.layers)

    @property
    def units(self) -> list[tuple[str, ...]]:
        """Layers that get one option together, and every other layer by itself."""
        grouped = {n for group in self.same_option for n in group}
        return [*self.same_option, *((n,) for n in self.layers if n not in grouped)]

    def smallest_bytes(self) -> int:
        """Bytes of the smallest model file that the options allow, header included."""
        sizes = [min(sum(self.layer_bytes(n, o) for n in unit) for o in self.options[unit[0]]) for unit in self.units]
        return self.fixed_bytes + artifact.header_bytes(self.model, self.layers) + sum(sizes)

    def bytes_of(self, choices: Mapping[str, str]) -> int:
        """Tensor bytes of the whole model on disk under a plan (the file adds its header)."""
        return self.fixed_bytes + sum(self.layer_bytes(n, option_from_key(key)) for n, key in choices.items())

    def layer_bytes(self, name: str, option: Option) -> int:
        """Bytes on disk of a layer under an option."""
        return artifact.layer_bytes(self.model, self.layers[name], option, portable=self.settings.portable)


# ---------------------------------------------------------------------------------------------------------------- solve


@contextmanager
def _one_thread(layer: Layer) -> Iterator[None]:
    """The column sweep makes many small calls. Below a few thousand inputs a second CPU thread gains nothing and, on a
    busy machine, waits at every one of them (measured: 6 times slower)."""
    threads = torch.get_num_threads()
    if layer.weight.device.type == "cpu" and layer.shape[1] < 4096:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def solve_layer(layer: Layer, options: list[Option], moments: Moments | None) -> list[Solved]:
    """Solve a layer's options; a grouped convolution is solved group by group, stacked experts one by one."""
    with _one_thread(layer):
        return _solve_layer(layer, options, moments)


def _solve_layer(layer: Layer, options: list[Option], moments: Moments | None) -> list[Solved]:
    weight = layer.as_matrix(layer.weight.detach())
    if moments is None:
        return solve(weight, options, layer=layer.name)
    height = layer.shape[0] // layer.groups
    parts = [
        solve(
            weight[g * height : (g + 1) * height],
            options,
            moments.second[g],
            layer=layer.name,
            drift=None if moments.drift is None else moments.drift[g],
        )
        for g in range(layer.groups)
    ]
    stacked = parts[0] if len(parts) == 1 else [_stack([part[k] for part in parts]) for k in range(len(options))]
    if not moments.notes:
        return stacked
    return [s if isinstance(s.option, (Keep, Cast)) else replace(s, notes=(*moments.notes, *s.notes)) for s in stacked]


def _stack(parts: list[Solved]) -> Solved:
    def rows(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    weight = rows("weight")
    assert weight is not None
    return Solved(
        option=parts[0].option,
        weight=weight,
        codes=rows("codes"),
        scale=rows("scale"),
        zero=rows("zero"),
        damping=max(p.damping for p in parts),
        notes=tuple(dict.fromkeys(note for p in parts for note in p.notes)),
    )


def _write_solved(state: State, name: str, solved: list[Solved]) -> None:
    """The tensors first, the small record last: the record's presence says that both are whole."""
    tensors, record = {}, []
    for k, s in enumerate(solved):
        parts = {"codes": s.codes, "scale": s.scale, "zero": s.zero}
        if s.codes is None and pruner_of(s.option) is not None:
            parts["weight"] = s.weight
        tensors.update({f"{k}.{part}": t for part, t in parts.items() if t is not None})
        record.append({"option": s.option.key, "damping": s.damping, "notes": list(s.notes)})
    state.write_tensors(f"{name}.safetensors", tensors)
    state.write_json(f"{name}.json", record)


def _read_solved(state: State, name: str, layer: Layer) -> list[Solved]:
    tensors = state.read_tensors(f"{name}.safetensors")
    solved = []
    for k, entry in enumerate(state.read_json(f"{name}.json")):
        option = option_from_key(entry["option"])
        quantize = quantizer_of(option)
        if quantize is not None:
            weight = dequantize(
                tensors[f"{k}.codes"], tensors[f"{k}.scale"], tensors.get(f"{k}.zero"), quantize.group_size
            ).to(layer.weight.device)
        elif f"{k}.weight" in tensors:
            weight = tensors[f"{k}.weight"].to(layer.weight.device)
        else:
            solved += solve_layer(layer, [option], None)
            continue
        solved.append(
            Solved(
                option=option,
                weight=weight,
                codes=tensors.get(f"{k}.codes"),
                scale=tensors.get(f"{k}.scale"),
                zero=tensors.get(f"{k}.zero"),
                damping=entry["damping"],
                notes=tuple(entry["notes"]),
            )
        )
    return solved


def _sweep(
    job: Job,
    model: nn.Module,
    layers: Mapping[str, Layer],
    options: Mapping[str, list[Option]],
    folder: str,
    *,
    title: str,
    sequential: bool,
) -> Callable[[str], list[Solved]]:
    """Visit the layers of ``model`` in one forward pass and solve them into ``state/folder``. If ``sequential``, write
    each layer's single option into the model on the way, so that later layers see it, and let the uncompressed model
    run beside it, so that they make up for it; otherwise the model is only read. Of several processes each solves its
    share of the layers, unless ``sequential``. Returns a reader of the results."""
    names = {n: f"{folder}/{i:04d}" for i, n in enumerate(layers)}
    mine = list(layers)[rank() :: world()]
    todo = {n for n in mine if options[n] and not job.state.has(f"{names[n]}.json")}
    own_state = replace(job.state, writes=True)

    def visit(layer: Layer, moments: Callable[[], Moments | None]) -> None:
        name = layer.name
        if name in todo:
            job_options = options[name]
            needs_moment = any(not isinstance(o, (Keep, Cast)) for o in job_options)
            _write_solved(own_state, names[name], solve_layer(layer, job_options, moments() if needs_moment else None))
            todo.discard(name)
            advance(len(mine) - len(todo))
        if sequential and options[name]:
            layer.write_(_read_solved(job.state, names[name], layer)[0].weight)

    with job.stages.stage(title, len(mine), done=len(mine) - len(todo)) as advance:
        if todo:
            batch = collate(job.splits.calibrate.items)
            visit_layers(
                model, job.objective, to_device(batch, next(model.parameters()).device), layers, visit,
                reference=(job.model, job.layers) if sequential else None,
            )  # fmt: skip
        elif sequential:
            for layer in layers.values():
                visit(layer, lambda: None)
    wait()
    return lambda name: _read_solved(job.state, names[name], layers[name])


def solve_options(job: Job) -> Callable[[str], list[Solved]]:
    """Stage *solve*: candidates of every layer from the uncompressed model's own inputs."""
    changing: dict[str, list[Option]] = {n: [o for o in job.options[n] if not isinstance(o, Keep)] for n in job.layers}
    return _sweep(job, job.model, job.layers, changing, "solved", title="solve options", sequential=False)


# ---------------------------------------------------------------------------------------------------------------- price


def price_options(job: Job, candidates: Callable[[str], list[Solved]] | None) -> None:
    """Stage *price*: the ledger and the analysis, from one pass over the price items."""
    items = job.splits.price.items
    name, done_name = "fisher.safetensors", "fisher.json"
    changed: dict[str, list[str]] = {n: [] for n in job.layers}
    changes: dict[str, list[Change]] = {}
    if candidates is not None:
        changed = {n: [o.key for o in job.options[n] if not isinstance(o, Keep)] for n in job.layers}
    wait()  # nobody looks at the folder while the first process is still writing its last file
    finished = job.state.has(done_name)
    own_state, own_name = job.state, name
    if shared():
        own_state, own_name = replace(job.state, writes=True), f"fisher.{rank()}of{world()}.safetensors"
    checkpoint = name if finished else own_name
    resume = job.state.read_tensors(checkpoint) if job.state.has(checkpoint) else None
    if candidates is not None and not finished:
        for n, layer in job.layers.items():
            if changed[n]:
                weight = layer.as_matrix(layer.weight.detach())
                wide = weight if weight.dtype == torch.float64 else weight.float()
                changes[n] = [Change.of(s.weight.to(wide.dtype) - wide) for s in candidates(n)]
    elif finished:
        # The pass is over; its totals already hold the squares, and empty changes only set their number.
        empty = Change(values=torch.zeros(0), scale=0.0)
        changes = {n: [empty] * len(keys) for n, keys in changed.items()}
    last = time.monotonic()

    def after_item(done: int, totals: dict[str, Tensor]) -> None:
        nonlocal last
        advance(done)
        if done == len(items):
            job.state.write_tensors(name, totals)
        elif time.monotonic() - last > CHECKPOINT_SECONDS:
            own_state.write_tensors(own_name, totals)
            last = time.monotonic()

    done = int(resume["done"]) if resume is not None else 0
    with job.stages.stage("price options", len(items), done=done) as advance:
        measured = fisher_pass(
            job.model,
            job.objective,
            items,
            job.layers,
            changes,
            labels=job.settings.labels,
            seed=job.settings.seed,
            resume=resume,
            after_item=after_item,
        )
    kind, prices = job.settings.curvature, None
    if candidates is not None and kind in FORMS:
        prices = _forms(job, kind, changes)
    job.state.write_json(done_name, {"items": len(items)})
    wait()
    sizes = {n: {o.key: job.layer_bytes(n, o) for o in job.options[n]} for n in job.layers}
    job.analysis = _analysis(measured, job.layers)
    if candidates is not None:
        job.ledger = build_ledger(prices or measured, sizes, changed=changed, unit=job.objective.unit, curvature=kind)


def _forms(job: Job, kind: str, changes: Mapping[str, list[Change]]) -> Forms:
    """The forms of another curvature, or those that an earlier process measured."""
    name = f"forms-{kind}.json"
    if not job.state.has(name):
        forms = quadratic_forms(
            kind, job.model, job.objective, job.splits.price.items, job.layers, changes, seed=job.settings.seed
        )
        sums = {n: s.tolist() for n, s in forms.sums.items()}
        job.state.write_json(name, {"count": forms.count.tolist(), "sums": sums})
        wait()
        return forms
    record = job.state.read_json(name)
    return Forms(
        count=torch.tensor(record["count"], dtype=torch.float64),
        sums={n: torch.tensor(s, dtype=torch.float64) for n, s in record["sums"].items()},
    )


def _analysis(measured: FisherPass, layers: Mapping[str, Layer]) -> Analysis:
    curvature = {
        n: LayerCurvature(trace=measured.trace(n), diagonal=measured.diagonal[n], shape=layer.shape)
        for n, layer in layers.items()
    }
    return Analysis(matrix=MATRICES["fisher"], layers=curvature, num_items=len(measured.count))


# --------------------------------------------------------------------------------------------------------------- select


def _results(job: Job, name: str, model: nn.Module, split: Split) -> ItemResults:
    """Evaluate a model on a split, or read what an earlier process measured."""
    if job.state.has(name):
        record = job.state.read_json(name)
        return ItemResults(**{k: torch.tensor(v, dtype=torch.float64) for k, v in record.items()})
    results = evaluate(model, split.batches(job.settings.batch_size), job.objective)
    job.state.write_json(
        name, {"loss": results.loss.tolist(), "count": results.count.tolist(), "correct": results.correct.tolist()}
    )
    return results


def compare(baseline: ItemResults, compressed: ItemResults, split: Split, budget: Budget, *, unit: str) -> Verdict:
    """Paired verdict on a split for a budget with ``max_drop``; documents with several items are clusters. Items in
    which no position counts (all labels ignored) say nothing and are left out."""
    counted = (baseline.count > 0).numpy()
    documents = np.array(split.documents)[counted]
    clusters = None if len(set(documents)) == len(documents) else documents
    assert budget.max_drop is not None
    if budget.metric == "loss":
        return certify_loss(
            baseline.loss.numpy()[counted],
            compressed.loss.numpy()[counted],
            baseline.count.numpy()[counted],
            clusters=clusters,
            max_drop=budget.max_drop,
            confidence=budget.confidence,
            unit=unit,
        )
    if float(baseline.count.max()) > 1:
        raise ValueError("metric 'accuracy' needs one prediction per item; for language models use metric 'loss'")
    return certify_accuracy(
        baseline.correct.numpy()[counted] > 0.5,
        compressed.correct.numpy()[counted] > 0.5,
        clusters=clusters,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
    )


def _chance(job: Job, verdict: Verdict) -> float:
    """Predicted probability that a plan with this verdict on select is certified on the certify split."""
    return _chance_at(job, verdict.drop, verdict.stderr)


def _chance_at(job: Job, drop: float, stderr: float) -> float:
    assert job.budget is not None and job.budget.max_drop is not None
    shrink = (len(set(job.splits.select.documents)) / len(set(job.splits.certify.documents))) ** 0.5
    return probability_of_certifying(
        drop,
        stderr,
        stderr * shrink,
        max_drop=job.budget.max_drop,
        confidence=job.budget.confidence,
    )


def _key(choices: Mapping[str, str]) -> str:
    """A short name for a plan, for its files."""
    return hashlib.sha256(json.dumps(sorted(choices.items())).encode()).hexdigest()[:16]


@dataclass(slots=True)
class _Bench:
    """A copy of the model whose layers are set to any plan's candidates, for measuring on the select split."""

    job: Job
    candidates: Callable[[str], list[Solved]]
    baseline: ItemResults
    model: nn.Module | None = None
    now: dict[str, str] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, name: str, kind: str, choices: Mapping[str, str], note: str = "") -> dict[str, Any]:
        """Measure a plan; returns its trial record (also appended to ``trials``)."""
        job = self.job
        path = f"select/{_key(choices)}.json"
        if not job.state.has(path):
            self._set(choices)
        results = _results(job, path, self.model or job.model, job.splits.select)
        self.trials.append(self.record(name, kind, choices, results, note))
        return self.trials[-1]

    def record(
        self, name: str, kind: str, choices: Mapping[str, str], results: ItemResults, note: str = ""
    ) -> dict[str, Any]:
        job = self.job
        budget = job.budget if job.budget is not None and job.budget.max_drop is not None else None
        compare_as = budget or Budget("loss", max_drop=0.0)
        verdict = compare(self.baseline, results, job.splits.select, compare_as, unit=job.objective.unit)
        predicted = job.ledger.predict(choices) if job.ledger is not None else None
        chance = _chance(job, verdict) if budget is not None else None
        return {
            "name": name,
            "kind": kind,
            "choices": dict(choices),
            "bytes": job.bytes_of(choices),
            "predicted": None if predicted is None else predicted.value,
            "predicted_stderr": None if predicted is None else _finite(predicted.stderr),
            "measured": float((results.loss.sum() - self.baseline.loss.sum()) / self.baseline.count.sum()),
            "measured_stderr": _finite(verdict.stderr) if compare_as.metric == "loss" else None,
            "metric_drop": verdict.drop,
            "metric_stderr": verdict.stderr,
            "chance": chance,
            "accepted": chance is not None and chance >= ACCEPTABLE,
            "items": len(self.baseline.loss),
            "note": note,
        }

    def _set(self, choices: Mapping[str, str]) -> None:
        job = self.job
        if self.model is None:
            self.model = copy.deepcopy(job.model)
        own = find_layers(self.model)
        for name, key in choices.items():
            if self.now.get(name, "keep") == key:
                continue
            layer = job.layers[name]
            if key == "keep":
                matrix = layer.as_matrix(layer.weight.detach())
            else:
                matrix = next(s.weight for s in self.candidates(name) if s.option.key == key)
            own[name].write_(matrix)
            self.now[name] = key


def select_plans(job: Job, candidates: Callable[[str], list[Solved]]) -> tuple[_Bench, dict[str, Any]]:
    """Stage *select*: trials along the frontier and controls. Returns the smallest acceptable one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        chosen = _select_plans(job, candidates)
    for w in caught:  # recorded to be noted, not to be hidden
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    job.notes += sorted({str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)})
    return chosen


def _select_plans(job: Job, candidates: Callable[[str], list[Solved]]) -> tuple[_Bench, dict[str, Any]]:
    assert job.budget is not None and job.ledger is not None
    budget, rows = job.budget, job.ledger.rows
    with job.stages.stage("measure on select", job.settings.trials + 5) as advance:
        baseline = _results(job, "select/baseline.json", job.model, job.splits.select)
        bench = _Bench(job, candidates, baseline)
        advance(1)
        if budget.max_bytes is not None:
            header = artifact.header_bytes(job.model, job.layers)
            choices = cheapest(
                rows,
                max_bytes=budget.max_bytes,
                fixed_bytes=job.fixed_bytes + header,
                same_option=job.same_option,
            )
            best = bench.measure("plan 1", "plan", choices)
        else:
            assert budget.max_drop is not None

            def measured(choices: dict[str, str]) -> tuple[bool, float]:
                trial = bench.measure(f"plan {len(bench.trials) + 1}", "plan", choices)
                advance(1 + len(bench.trials))
                return trial["accepted"], trial["metric_drop"]

            found = search(
                rows,
                measured,
                start=budget.max_drop,
                max_trials=job.settings.trials,
                same_option=job.same_option,
            )
            passing = next((t for t in bench.trials if t["choices"] == found.best), None)
            if passing is None:
                # The most cautious plan that was measured goes to the certificate all the same.
                passing = max(bench.trials, key=lambda t: (t["chance"], t["bytes"]))
                job.notes.append("no plan measured on select reached the wanted chance of being certified")
            best = passing
        for control in _controls(job, best):
            bench.measure(*control)
            advance(1 + len(bench.trials))
        if rivals := [t for t in bench.trials if t["accepted"] and t["bytes"] < best["bytes"]]:
            best = min(rivals, key=lambda t: t["bytes"])
            job.notes.append(f"{best['name']} is smaller than the best plan and was used instead")
        advance(job.settings.trials + 5)
    return bench, best


def _controls(job: Job, best: Mapping[str, Any]) -> list[tuple[str, str, dict[str, str]]]:
    """Plans that anyone could make without curvature, near the size of the best one: the two nearest uniform ones,
    and the best plan's own budget spent in the reversed order of sensitivity."""
    assert job.ledger is not None
    free = [n for n in job.layers if len(job.options[n]) > 1]
    controls: list[tuple[str, str, dict[str, str]]] = []
    if not free:
        return controls
    common = set.intersection(*({o.key for o in job.options[n]} for n in free)) - {"keep"}
    uniform = []
    for key in sorted(common):
        choices = {n: key if n in free else job.options[n][0].key for n in job.layers}
        uniform.append((job.bytes_of(choices), key, choices))
    above = min((u for u in uniform if u[0] > best["bytes"]), default=None)
    below = max((u for u in uniform if u[0] <= best["bytes"]), default=None)
    controls += [(f"uniform {u[1]}", "control", u[2]) for u in (below, above) if u is not None]
    # Reversed order: rank the layers (those that share an option as one) by the price of their cheapest-to-store option
    # per weight and swap the prices of the most and the least sensitive, then plan for the same bytes.
    rows_of = {n: job.ledger.layer_rows(n) for n in free}
    units = [unit for unit in job.units if unit[0] in rows_of]
    dearest = {u: max(sum(rows_of[n][key].price for n in u) for key in rows_of[u[0]]) for u in units}
    weights = {u: sum(job.layers[n].numel for n in u) for u in units}
    order = sorted(units, key=lambda u: dearest[u] / weights[u])
    scale = {
        n: dearest[other] / dearest[unit] * weights[unit] / weights[other] if dearest[unit] else 1.0
        for unit, other in zip(order, reversed(order), strict=True)
        for n in unit
    }
    rows = [replace(r, price=r.price * scale.get(r.layer, 1.0), stderr=0.0) for r in job.ledger.rows]
    choices = cheapest(rows, max_bytes=best["bytes"], fixed_bytes=job.fixed_bytes, same_option=job.same_option)
    if choices != best["choices"]:
        controls.append(("reversed order", "control", choices))
    return controls


# ---------------------------------------------------------------------------------------------------- apply and certify


def apply_plan(job: Job, choices: Mapping[str, str], folder: str, title: str) -> tuple[nn.Module, dict[str, Solved]]:
    """Stage *apply*: solve the chosen options in one sequential forward pass over a copy of the model. The solutions
    share the memory of the copy's weights, which hold the same values."""
    model = copy.deepcopy(job.model)
    own = find_layers(model)
    layers = {n: own[n] for n in job.layers}
    options = {n: [option_from_key(choices[n])] if choices[n] != "keep" else [] for n in layers}
    read = _sweep(
        job, model, {n: layers[n] for n in layers if options[n]}, options, folder, title=title, sequential=True
    )
    solved = {
        n: replace(s, weight=layers[n].as_matrix(layers[n].weight.detach()))
        for n in layers
        if options[n]
        for s in read(n)
    }
    return model, solved


@dataclass(frozen=True, kw_only=True, slots=True)
class _Applied:
    """A plan solved, written to disk and measured on select; ``record`` is its trial record."""

    record: dict[str, Any]
    folder: Path
    solved: dict[str, Solved]
    chance: float | None


def _apply_and_write(job: Job, bench: _Bench, name: str, choices: dict[str, str]) -> _Applied:
    """Apply a plan and write its artifact. If its candidates were measured on select and did better there than the
    sequential solution, they are written instead."""
    at = f"applied/{_key(choices)}"
    model, solved = apply_plan(job, choices, at, f"apply {name}")
    results = _results(job, f"{at}/select.json", model, job.splits.select)
    del model
    record = bench.record(f"{name}, applied", "applied", choices, results)
    chance = record["chance"]
    stitched = next((t for t in bench.trials if t["choices"] == choices), None)
    if stitched is not None and stitched["metric_drop"] < record["metric_drop"]:
        solved = {n: next(s for s in bench.candidates(n) if s.option.key == choices[n]) for n in solved}
        record["note"] = "one sequential pass measured worse than the candidates, which were kept"
        chance = stitched["chance"]
    folder = _written(job, at, solved, _plan_of(job, record))
    # What lies on disk packed need not be held in memory twice: codes and scales are enough for a later save.
    light = {
        n: replace(s, weight=torch.empty(0))
        if s.codes is not None and artifact.packs(job.model, job.layers[n], s.option, portable=job.settings.portable)
        else s
        for n, s in solved.items()
    }
    return _Applied(record=record, folder=folder, solved=light, chance=chance)


def _fixed_sequence(job: Job, bench: _Bench, best: dict[str, Any]) -> list[_Applied]:
    """The plans to certify, cautious first, fixed before the certify split is opened: everything here is judged on
    select alone. While the first is not safe, a more cautious plan goes before it; once it is, bolder ones follow, as
    far as the applied models leave room (applied sequentially, a plan usually costs less than its candidates did)."""
    assert job.ledger is not None
    sequence = [_apply_and_write(job, bench, best["name"], best["choices"])]
    left_out: list[_Applied] = []
    while job.budget is not None and job.budget.max_drop is not None:
        if len(sequence) + len(left_out) >= job.settings.attempts:
            break
        safe = (sequence[0].chance or 0.0) >= SAFE
        edge = sequence[-1] if safe else sequence[0]
        factor = _room(job, edge.record) if safe else CAUTION
        try:
            choices = cheapest(job.ledger.rows, max_loss=factor * edge.record["predicted"], same_option=job.same_option)
        except Infeasible:
            break
        if choices == edge.record["choices"] or (job.bytes_of(choices) < edge.record["bytes"]) != safe:
            break
        name = f"{best['name']}, {'bolder' if safe else 'more cautious'}"
        applied = _apply_and_write(job, bench, name, choices)
        if safe and (applied.chance or 0.0) < ACCEPTABLE:
            left_out.append(applied)
        else:
            sequence.insert(len(sequence) if safe else 0, applied)
    bench.trials += [applied.record for applied in (*sequence, *left_out)]
    return sequence


def _room(job: Job, record: Mapping[str, Any]) -> float:
    """By how much a bolder plan's predicted loss may exceed that of an applied one: half of the way (in logarithms) to
    where its chance falls to `ACCEPTABLE` if measured and predicted loss grow together."""
    assert job.budget is not None and job.budget.max_drop is not None
    drop = record["metric_drop"]
    low, high = drop, job.budget.max_drop
    for _ in range(40):
        middle = (low + high) / 2
        verdict_chance = _chance_at(job, middle, record["metric_stderr"])
        low, high = (middle, high) if verdict_chance >= ACCEPTABLE else (low, middle)
    # Half of the way on a logarithmic scale: that the applied plan measured well is partly luck.
    return min(2.0, low / drop) ** 0.5 if drop > 0 else 2.0**0.5


def certify_plans(job: Job, bench: _Bench, best: dict[str, Any]) -> Path:
    """Stages *apply* and *certify*: fix a sequence of plans, then test them, cautious first, up to the first that is
    not certified. Returns the folder of the model to ship: the last certified one, or the first if there is none."""
    assert job.budget is not None
    bench.model = None  # no candidates are measured any more: free a copy of the model
    sequence = _fixed_sequence(job, bench, best)
    judged = job.budget if job.budget.max_drop is not None else None
    verdicts: list[Verdict] = []
    for applied in sequence:
        name, key = applied.record["name"], _key(applied.record["choices"])
        verdicts.append(_verdict_of(job, applied.folder, f"certify/{key}.json", f"certify {name}", judged))
        if verdicts[-1].status != "CERTIFIED":
            break
    last = fixed_sequence(verdicts) if judged else 0
    shipped, verdict = sequence[last or 0], verdicts[last or 0]
    job.solved, job.plan = shipped.solved, _plan_of(job, shipped.record)
    if judged:
        job.verdict = verdict
        tested = zip(sequence, verdicts, strict=False)
        job.record["attempts"] = [{**v.to_dict(), "plan": a.record["name"]} for a, v in tested]
    job.record["measured"] = verdict.to_dict()
    return shipped.folder


def apply_and_measure(job: Job, choices: Mapping[str, str]) -> Path:
    """Without a budget: apply the one plan there is and measure it, paired, on the certify split."""
    _, job.solved = apply_plan(job, choices, "applied/1", "apply")
    job.plan = Plan(
        choices=dict(choices), bytes=job.bytes_of(choices), predicted=float("nan"), predicted_stderr=float("nan")
    )
    folder = _written(job, "applied/1", job.solved, job.plan)
    job.record["measured"] = _verdict_of(job, folder, "certify/1.json", "measure", None).to_dict()
    return folder


def _written(job: Job, at: str, solved: Mapping[str, Solved], plan: Plan) -> Path:
    folder = job.state.path(f"{at}/model")
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        job.write_model(folder, solved, plan.to_dict())
        (folder / "complete").touch()
    return folder


def _verdict_of(job: Job, folder: Path, path: str, title: str, budget: Budget | None) -> Verdict:
    """Paired verdict of a saved and reloaded model on the certify split; without a budget the bound is not judged."""
    with job.stages.stage(title, 2) as advance:
        baseline = _results(job, "certify/baseline.json", job.model, job.splits.certify)
        advance(1)
        model = job.model if job.state.has(path) else job.reload(folder)
        results = _results(job, path, model, job.splits.certify)
        advance(2)
    budget = budget or Budget("loss", max_drop=0.0, confidence=0.95 if job.budget is None else job.budget.confidence)
    return compare(baseline, results, job.splits.certify, budget, unit=job.objective.unit)


def _plan_of(job: Job, trial: Mapping[str, Any]) -> Plan:
    return Plan(
        choices=dict(trial["choices"]),
        bytes=trial["bytes"],
        predicted=trial["predicted"],
        predicted_stderr=float("nan") if trial["predicted_stderr"] is None else trial["predicted_stderr"],
        notes=tuple(job.notes),
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
