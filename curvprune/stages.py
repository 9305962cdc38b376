"""The stages of a compression, from a model and its splits to plans, solved layers and a verdict.

    solve    every option of every layer, from one forward pass over the calibration items
    price    every solved change, from one forward and a few backward passes per item
    select   plans along the frontier, measured on the select split, beside controls
    apply    the chosen plans: one sequential forward pass each, later layers see what earlier ones became
    recover  those models, where it is asked for: a short training of what their stored form leaves free
    certify  those plans, cautious first, saved and loaded again, on items that nothing else has touched

Each stage leaves its results in ``state/``, layer by layer, and skips what it finds there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
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
from curvprune.apply import Moments, coarse_copy, visit_layers
from curvprune.certificate import Verdict, certify_accuracy, certify_loss, fixed_sequence, probability_of_certifying
from curvprune.controls import Control, controls
from curvprune.curvature.fisher import Change, FisherPass, fisher_pass
from curvprune.curvature.forms import FORMS, Forms, quadratic_forms
from curvprune.data import Split, Splits, collate
from curvprune.knapsack import Choice, Infeasible, Limit, cheapest
from curvprune.layers import Layer, find_layers
from curvprune.ledger import CURVATURES, Ledger, Row, build_ledger
from curvprune.objective import ItemResults, Objective, evaluate, to_device
from curvprune.options import Cast, Form, Keep, Option, Prune, kept_weights, option_from_key, pruner_of, quantizer_of
from curvprune.plan import Budget, Measurement, Plan, corrected, corrections, search
from curvprune.processes import rank, shared, wait, world
from curvprune.quadratic import scaled
from curvprune.recovery import Diverged, Training, recover_, restore_, trained_tensors
from curvprune.solve import Solved, solve
from curvprune.solve.grids import dequantize
from curvprune.state import StageLog, State
from curvprune.work import Work, limits_of, macs_left, multiply_adds, work_of

CHECKPOINT_SECONDS = 45.0  # the pricing pass writes its totals this often
ACCEPTABLE = 0.80  # predicted probability of being certified that a plan must have on select
SAFE = 0.95  # ... and that the first plan of the fixed sequence should have
CAUTION = 0.6  # a more cautious plan may cost so much of the next one's predicted loss
TRIALS_BESIDES = 9  # the uncompressed model, at most seven controls, and a plan after those
CLEAR = 1.645  # standard errors: one-sided 95 %
SAME_SIZE = 1.002  # two plans whose bytes differ by less are one size: what they lost on select decides
# What is held against a plan of both kinds, and the part that its options lack.
ALONE: dict[str, Callable[[Option], Any]] = {"rounding alone": pruner_of, "pruning alone": quantizer_of}


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
    write_model: Callable[[Path, nn.Module, Mapping[str, Solved], Mapping[str, Any]], None]
    original: nn.Module | None = None  # what is certified against, where units of it were removed to make the model
    recover: Training | None = None
    same_option: tuple[tuple[str, ...], ...] = ()  # groups of layers; each is offered the same options
    limits: tuple[Limit, ...] = ()  # what the budget limits besides bytes and the drop: `limit_plans`
    work: dict[str, Work] = field(default_factory=dict)  # of every layer, where it was counted: `count_work`
    notes: list[str] = field(default_factory=list)
    ledger: Ledger | None = None
    analysis: Analysis | None = None
    plan: Plan | None = None
    verdict: Verdict | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)  # option -> correction of its prices by the trials

    @property
    def uncompressed(self) -> nn.Module:
        """The model whose loss may rise by the budget."""
        return self.model if self.original is None else self.original

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
    def within(self) -> dict[str, Any]:
        """What every plan must keep to, as arguments of `cheapest` and `search`."""
        return {
            "max_bytes": None if self.budget is None else self.budget.max_bytes,
            "fixed_bytes": self.fixed_bytes + artifact.header_bytes(self.model, self.layers),
            "limits": self.limits,
            "same_option": self.same_option,
        }

    def uses(self, choices: Mapping[str, str]) -> dict[str, float]:
        """How much a plan uses of each limit of the budget, by name; bytes are those of the file, with
        the most that its header can take."""
        used = {limit.name: limit.used(choices) for limit in self.limits}
        if self.budget is None or self.budget.max_bytes is None:
            return used
        return {"max_bytes": self.bytes_of(choices) + artifact.header_bytes(self.model, self.layers), **used}

    @property
    def most(self) -> dict[str, float]:
        """The budget's limits on size and speed by name."""
        stored = {} if self.budget is None or self.budget.max_bytes is None else {"max_bytes": self.budget.max_bytes}
        return stored | {limit.name: limit.most for limit in self.limits}

    def least(self, name: str) -> float:
        """The least that any plan uses of a limit."""
        of = {limit.name: limit for limit in self.limits}.get(name)
        if of is None:
            return self.smallest_bytes()
        best = {
            n: min((o.key for o in self.options[n]), key=lambda key: sum(of.use[m, key] for m in unit))
            for unit in self.units
            for n in unit
        }
        return of.used(best)

    def keeps_within(self, choices: Mapping[str, str]) -> bool:
        """Whether a plan keeps to all limits of the budget but the drop."""
        return all(used <= self.most[name] for name, used in self.uses(choices).items())

    @property
    def units(self) -> list[tuple[str, ...]]:
        """Layers that get one option together, and every other layer by itself."""
        grouped = {n for group in self.same_option for n in group}
        return [*self.same_option, *((n,) for n in self.layers if n not in grouped)]

    def expected(self, choices: Mapping[str, str]) -> float:
        """What a plan costs by the prices as the trials have corrected them."""
        assert self.ledger is not None
        rows = corrected(self.ledger.rows, self.factors)
        return math.fsum(row.price for row in rows if choices[row.layer] == row.option)

    def smallest_bytes(self) -> int:
        """Bytes of the smallest model file that the options allow, header included."""
        sizes = [min(sum(self.layer_bytes(n, o) for n in unit) for o in self.options[unit[0]]) for unit in self.units]
        return self.fixed_bytes + artifact.header_bytes(self.model, self.layers) + sum(sizes)

    def bytes_of(self, choices: Mapping[str, str]) -> int:
        """Tensor bytes of the whole model on disk under a plan (the file adds its header)."""
        return self.fixed_bytes + sum(self.layer_bytes(n, option_from_key(key)) for n, key in choices.items())

    def form_of(self, name: str, option: Option) -> Form:
        """How a layer lies on disk under an option."""
        return artifact.form_of(self.model, self.layers[name], option, portable=self.settings.portable)

    def layer_bytes(self, name: str, option: Option) -> int:
        """Bytes on disk of a layer under an option."""
        return artifact.layer_bytes(self.model, self.layers[name], option, portable=self.settings.portable)


# --------------------------------------------------------------------------------------------------------------- limits


def limit_plans(job: Job) -> None:
    """Turn the budget's limits on size and speed into ``job.limits``, and see that the options can meet them together.

    Cost: one forward pass over the calibration items if multiply-adds or bit operations are limited. Raises
    `Infeasible`, and ``ValueError`` where a limit of the user's own has no number for a layer and option.
    """
    budget = job.budget
    if budget is None or not budget.limited:
        return
    if budget.max_macs is not None or budget.max_bops is not None:
        count_work(job)
    options = {(n, o.key): o for n in job.layers for o in job.options[n]}
    rows = [Choice(layer=n, option=key, bytes=job.layer_bytes(n, o), price=0.0) for (n, key), o in options.items()]
    job.limits = limits_of(budget, rows, job.work or work_of(job.layers))
    try:
        cheapest(rows, **job.within)
    except Infeasible as error:
        names = {shortfall.name for shortfall in error.shortfalls}
        if "max_macs" in names and all(macs_left(o) == 1.0 for o in options.values()):
            raise Infeasible(
                f"{error}. No option here lowers max_macs: zeros are multiplied like any other weight, except those of "
                'pattern "2:4" on sparse tensor cores; prune(structured=...) removes whole units',
                *error.shortfalls,
            ) from None
        raise


def count_work(job: Job) -> None:
    """The multiply-adds of every layer: one forward pass over the calibration items."""
    batches = job.splits.calibrate.batches(job.settings.batch_size)
    job.work = work_of(job.layers, multiply_adds(job.model, job.objective, batches, job.layers))


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
    original: nn.Module | None = None,
) -> Callable[[str], list[Solved]]:
    """Visit the layers of ``model`` in one forward pass and solve them into ``state/folder``. With the ``original``,
    write each layer's single option into the model on the way, so that later layers see it, and let the original run
    beside it, so that they make up for it; otherwise the model is only read. Without it, each of several processes
    solves its share of the layers. Returns a reader of the results."""
    sequential = original is not None
    names = {n: f"{folder}/{i:04d}" for i, n in enumerate(layers)}
    mine = list(layers) if sequential else list(layers)[rank() :: world()]
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
                reference=None if original is None else (original, find_layers(original)),
            )  # fmt: skip
        elif sequential:
            for layer in layers.values():
                visit(layer, lambda: None)
    if not sequential:
        wait()
    return lambda name: _read_solved(job.state, names[name], layers[name])


def solve_options(job: Job) -> Callable[[str], list[Solved]]:
    """Stage *solve*: candidates of every layer from the uncompressed model's own inputs."""
    changing: dict[str, list[Option]] = {n: [o for o in job.options[n] if not isinstance(o, Keep)] for n in job.layers}
    return _sweep(job, job.model, job.layers, changing, "solved", title="solve options")


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
        ledger = build_ledger(prices or measured, sizes, changed=changed, unit=job.objective.unit, curvature=kind)
        job.ledger = replace(ledger, work=job.work or work_of(job.layers))


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


def item_columns(baseline: ItemResults, compressed: ItemResults, split: Split) -> dict[str, Any]:
    """What two models did on every item of a split in which a position counts, by column: ``document`` (a number in
    ``documents``), ``index`` in the split, ``count`` of positions, loss per position ``before`` and ``after`` (to nine
    digits) and, where no item has more than one, ``right_before`` and ``right_after`` (1 or 0)."""
    at = torch.nonzero(baseline.count > 0).flatten()
    names = [split.documents[i] for i in at.tolist()]
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    count = baseline.count[at]
    columns = {
        "documents": list(number),
        "document": [number[name] for name in names],
        "index": at.tolist(),
        "count": count.int().tolist(),
        "before": [float(f"{v:.9g}") for v in (baseline.loss[at] / count).tolist()],
        "after": [float(f"{v:.9g}") for v in (compressed.loss[at] / count).tolist()],
    }
    if float(count.max()) > 1:
        return columns
    right = {"right_before": baseline.correct, "right_after": compressed.correct}
    return columns | {name: (correct[at] > 0.5).int().tolist() for name, correct in right.items()}


def _chance(job: Job, verdict: Verdict) -> float:
    """Predicted probability that a plan with this verdict on select is certified on the certify split."""
    return _chance_at(job, verdict.drop, verdict.stderr, verdict.bound)


def _chance_at(job: Job, drop: float, stderr: float, bound: float) -> float:
    """``bound`` is that of a test with this ``drop``: few documents and skewed losses push it further out than normal
    ones would, on select and on certify alike."""
    assert job.budget is not None and job.budget.max_drop is not None
    shrink = (len(set(job.splits.select.documents)) / len(set(job.splits.certify.documents))) ** 0.5
    return probability_of_certifying(
        drop,
        stderr,
        stderr * shrink,
        max_drop=job.budget.max_drop,
        confidence=job.budget.confidence,
        reach=(bound - drop) * shrink,
    )


def _key(choices: Mapping[str, str]) -> str:
    """A short name for a plan, for its files."""
    return hashlib.sha256(json.dumps(sorted(choices.items())).encode()).hexdigest()[:16]


@dataclass(slots=True)
class _Bench:
    """A copy of the model whose layers are set to any plan's candidates, for measuring on the select split."""

    job: Job
    candidates: Callable[[str], list[Solved]]
    baseline: ItemResults  # of the uncompressed model
    start: ItemResults  # of the model that the prices are of: the same, unless units were removed
    model: nn.Module | None = None
    now: dict[str, str] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, name: str, kind: str, choices: Mapping[str, str]) -> dict[str, Any]:
        """Measure a plan; returns its trial record (also appended to ``trials``)."""
        path = self._path(choices)
        if not self.job.state.has(path):
            self._set(choices)
        results = _results(self.job, path, self.model or self.job.model, self.job.splits.select)
        same = next((f"the same as {t['name']}" for t in self.trials if t["choices"] == choices), "")
        self.trials.append(self.record(name, kind, choices, results, same))
        return self.trials[-1]

    def beyond(self, trial: Mapping[str, Any], other: Mapping[str, Any]) -> Verdict:
        """What a measured plan loses beyond another one, paired by item."""
        split = self.job.splits.select
        first, second = (
            _results(self.job, self._path(t["choices"]), self.job.model, split)  # read, both have been measured
            for t in (other, trial)
        )
        return compare(first, second, split, Budget("loss", max_drop=0.0), unit=self.job.objective.unit)

    def _path(self, choices: Mapping[str, str]) -> str:
        return f"select/{_key(choices)}.json"

    def record(
        self, name: str, kind: str, choices: Mapping[str, str], results: ItemResults, note: str = ""
    ) -> dict[str, Any]:
        job = self.job
        budget = job.budget if job.budget is not None and job.budget.max_drop is not None else None
        compare_as = budget or Budget("loss", max_drop=0.0)
        verdict = compare(self.baseline, results, job.splits.select, compare_as, unit=job.objective.unit)
        predicted = job.ledger.predict(choices) if job.ledger is not None else None
        chance = _chance(job, verdict) if budget is not None else None
        of_loss = verdict
        if compare_as.metric != "loss" or self.start is not self.baseline:
            as_loss = Budget("loss", max_drop=0.0)
            of_loss = compare(self.start, results, job.splits.select, as_loss, unit=job.objective.unit)
        return {
            "name": name,
            "kind": kind,
            "choices": dict(choices),
            "bytes": job.bytes_of(choices),
            "predicted": None if predicted is None else predicted.value,
            "predicted_stderr": None if predicted is None else _finite(predicted.stderr),
            "expected": None if job.ledger is None else job.expected(choices),
            "measured": float((results.loss.sum() - self.start.loss.sum()) / self.start.count.sum()),
            "measured_stderr": _finite(of_loss.stderr),
            "metric_drop": verdict.drop,
            "metric_stderr": verdict.stderr,
            "metric_bound": _finite(verdict.bound),
            "chance": chance,
            "accepted": None if chance is None else chance >= ACCEPTABLE,
            "uses": job.uses(choices),
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
    with job.stages.stage("measure on select", job.settings.trials + TRIALS_BESIDES) as advance:
        baseline = start = _results(job, "select/baseline.json", job.uncompressed, job.splits.select)
        spent = 0.0
        if job.original is not None:
            start = _results(job, "select/start.json", job.model, job.splits.select)
            spent = _spent(job, baseline, start)
        bench = _Bench(job, candidates, baseline, start)
        advance(1)
        if budget.max_drop is None:
            best = bench.measure("plan 1", "plan", cheapest(rows, **job.within))
        else:

            def measured(choices: dict[str, str]) -> Measurement:
                trial = bench.measure(f"plan {len(bench.trials) + 1}", "plan", choices)
                advance(1 + len(bench.trials))
                reach = _reach(trial)
                return Measurement(
                    accepted=trial["accepted"],
                    drop=trial["metric_drop"] - spent,
                    loss=trial["measured"],
                    stderr=trial["measured_stderr"] or 0.0,
                    allowed=_allowed(job, min(0.0, spent), trial["metric_stderr"], reach) - spent,
                )

            start_at = max(0.0, budget.max_drop - spent)
            found = search(rows, measured, start=start_at, max_trials=job.settings.trials, **job.within)
            job.factors = found.factors
            for record, trial in zip(bench.trials, found.trials, strict=True):
                record["expected"] = trial.expected
            # Where none was accepted, the most cautious plan that was measured goes to the certificate all the same.
            best = max(bench.trials, key=lambda t: (t["choices"] == found.best, t["chance"], t["bytes"]))
        for control in _controls(job, best):
            bench.measure(control.name, "control", control.choices)
            advance(1 + len(bench.trials))
        best = _planned_again(job, bench, best, 1 if budget.max_drop is not None else job.settings.trials - 1)
        job.record["together"] = _together(job, bench, best)
        best = _best_measured(job, bench, best)
        advance(job.settings.trials + TRIALS_BESIDES)
    return bench, best


def _spent(job: Job, baseline: ItemResults, start: ItemResults) -> float:
    """What the removed units alone cost on the select split, in the budget's metric; it is noted."""
    assert job.budget is not None
    budget = job.budget if job.budget.max_drop is not None else Budget("loss", max_drop=0.0)
    verdict = compare(baseline, start, job.splits.select, budget, unit=job.objective.unit)
    unit = "of accuracy" if budget.metric == "accuracy" else job.objective.unit
    text = f"the removed units alone cost {verdict.drop:.4g} ± {verdict.stderr:.2g} {unit} on the select split"
    job.notes.append(f"{text}; prices, predictions and trials come on top of that, the verdict holds for both together")
    if job.budget.max_drop is not None and verdict.drop >= job.budget.max_drop:
        job.notes.append("that is more than the budget: remove fewer units")
    return verdict.drop


def _leftover(job: Job) -> str:
    """What the limits on size and speed leave possible, for a budget whose drop was missed."""
    assert job.ledger is not None
    if not job.most:
        return ""
    lowest = job.expected(cheapest(corrected(job.ledger.rows, job.factors), **job.within))
    return f"; the lowest loss expected within {', '.join(job.most)} is {lowest:.3g} {job.objective.unit}"


def _controls(job: Job, best: Mapping[str, Any]) -> list[Control]:
    """Controls near the size of the best plan, and what rounding alone and pruning alone can do at that size."""
    assert job.ledger is not None

    def plan(rows: list[Row], size: int) -> dict[str, str]:
        return cheapest(rows, max_bytes=size, same_option=job.same_option)

    size = best["bytes"] - job.fixed_bytes
    found = controls(job.ledger.rows, job.layers, job.units, size=size, plan=plan)
    prices = corrected(job.ledger.rows, job.factors)
    for name in _families(job):
        rows = [row for row in prices if row.option in _options_of(job, name)[row.layer]]
        try:
            choices = cheapest(rows, max_bytes=size, limits=job.limits, same_option=job.same_option)
        except Infeasible:
            continue  # `_together` says how small it gets
        found.append(Control(name, choices))
    return found


def _families(job: Job) -> list[str]:
    """Of `ALONE`, what can be held against both together: all, where there are options of both kinds, else none."""
    offered = [option for options in job.options.values() for option in options]
    return list(ALONE) if all(any(part(option) for option in offered) for part in ALONE.values()) else []


def _options_of(job: Job, family: str) -> dict[str, set[str]]:
    """Layer → the options that a family of `ALONE` has for it: those without the other part, or all, where every
    one has it."""
    other = ALONE[family]
    without = {n: {o.key for o in options if other(o) is None} for n, options in job.options.items()}
    return {n: without[n] or {o.key for o in job.options[n]} for n in job.layers}


def _together(job: Job, bench: _Bench, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What pruning and rounding in one plan are worth: that plan and each alone, at its size or, where it does not get
    that small, how small it gets; ``more`` is the loss beyond the plan's, paired by item."""

    def entry(family: str, trial: Mapping[str, Any]) -> dict[str, Any]:
        more = bench.beyond(trial, best)
        return {
            "name": family,
            "trial": trial["name"],
            **{key: trial[key] for key in ("bytes", "predicted", "predicted_stderr", "measured", "measured_stderr")},
            "more": more.drop,
            "more_stderr": _finite(more.stderr),
        }

    found = []
    for family in _families(job):
        trial = next((t for t in bench.trials if t["name"] == family), None)
        if trial is not None:
            found.append(entry(family, trial))
            continue
        options = _options_of(job, family)
        sizes = {(n, o.key): job.layer_bytes(n, o) for n in job.layers for o in job.options[n] if o.key in options[n]}
        least = [min(sum(sizes[n, key] for n in unit) for key in options[unit[0]]) for unit in job.units]
        found.append({"name": family, "trial": None, "smallest_bytes": job.fixed_bytes + sum(least)})
    return [entry("pruning and rounding", best), *found] if found else []


def _planned_again(job: Job, bench: _Bench, best: dict[str, Any], most: int) -> dict[str, Any]:
    """Plan again by prices that everything measured so far, controls included, has corrected, and with what pairs of
    layers do to each other: with ``max_drop`` for the
    smallest plan expected to lose no more than the best one, else for the least loss. Measures at most ``most`` plans,
    until there is none that is new, and returns the best of all."""
    assert job.ledger is not None and job.budget is not None
    job.factors = _corrections(job, bench)
    pairs = job.ledger.quadratic()
    for _ in range(most):
        if pairs is None:
            at_most = None if job.budget.max_drop is None else job.expected(best["choices"])
            choices = cheapest(corrected(job.ledger.rows, job.factors), max_loss=at_most, **job.within)
        else:
            prices = scaled(pairs, job.factors)
            if job.budget.max_drop is None:
                choices = prices.cheapest(**job.within)
            else:
                choices = prices.smaller(best["choices"], **job.within)
        if any(choices == trial["choices"] for trial in bench.trials):
            break
        plans = sum(t["kind"] == "plan" for t in bench.trials)
        again = bench.measure(f"plan {plans + 1}", "plan", choices)
        job.factors = _corrections(job, bench)
        if job.budget.max_drop is None:
            best = min(best, again, key=_lost)
        elif again["accepted"] >= best["accepted"] and again["bytes"] < best["bytes"]:
            best = again
    return best


def _corrections(job: Job, bench: _Bench) -> dict[str, float]:
    """What everything measured says about the prices; where that is lost in noise, what was known before."""
    assert job.ledger is not None
    measured = [(t["choices"], t["measured"], t["measured_stderr"] or 0.0) for t in bench.trials]
    return corrections(job.ledger.rows, measured) or job.factors


def _clearly_less(more: Verdict) -> bool:
    return more.drop < -CLEAR * more.stderr


def _lost(trial: Mapping[str, Any]) -> float:
    return trial["measured"] if math.isfinite(trial["measured"]) else math.inf


def _best_measured(job: Job, bench: _Bench, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, or the control that beats it, always one that keeps to the other limits. With ``max_drop`` the smallest
    that was accepted is wanted, and of several of one size the one that lost least; else the one that lost least. To
    have lost less than the plan, a control must differ by more than chance may explain: of several, one always does."""
    assert job.budget is not None
    controls = [t for t in bench.trials if t["kind"] == "control" and job.keeps_within(t["choices"])]
    within = [plan, *controls]
    if job.budget.max_drop is not None:
        passing = [t for t in within if t["accepted"]]
        if not passing:
            job.notes.append("no plan measured on select reached the wanted chance of being certified" + _leftover(job))
        smallest = min(t["bytes"] for t in passing or [plan])
        within = [t for t in passing or within if t["bytes"] <= SAME_SIZE * smallest]
    if plan in within:
        within = [plan, *(t for t in within if t is not plan and _clearly_less(bench.beyond(t, plan)))]
    best = min(within, key=_lost)
    if best is plan:
        return plan
    if plan in within:
        why = f"lost {best['measured']:.4g} on select, {plan['name']} {plan['measured']:.4g}"
    elif plan["accepted"]:
        why = f"has {best['bytes']:,} bytes, {plan['name']} {plan['bytes']:,}"
    else:
        why = f"has {best['bytes']:,} bytes; no plan was accepted"
    best["beats_plan"] = True
    best["note"] = f"a control beats the plan: it {why}"
    job.notes.append(f"the control {best['name']} beats the plan and was used instead: it {why}")
    return best


# ---------------------------------------------------------------------------------------------------- apply and certify


def spread_zeros(job: Job, sparsity: float) -> dict[str, str]:
    """The cheapest plan by the ledger with a share of ``sparsity`` of all weights of the layers pruned."""
    assert job.ledger is not None

    def left(prune: Prune, layer: Layer) -> int:
        return kept_weights(prune, layer.shape, groups=layer.groups)

    kept = {
        (n, o.key): float(left(prune, layer))
        for n, layer in job.layers.items()
        for o in job.options[n]
        if (prune := pruner_of(o)) is not None and prune.sparsity is not None
    }
    total = sum(layer.numel for layer in job.layers.values())
    alike = sum(left(Prune(sparsity=sparsity), layer) for layer in job.layers.values())  # each rounded by itself
    limit = Limit(name="weights kept", most=max(total - round(sparsity * total), alike), use=kept)
    return cheapest(job.ledger.rows, limits=[limit], same_option=job.same_option)


def apply_plan(
    job: Job, choices: Mapping[str, str], folder: str, title: str, *, inplace: bool = False
) -> tuple[nn.Module, dict[str, Solved]]:
    """Stage *apply*: solve the chosen options in one sequential forward pass over a copy of the model, or ``inplace``
    over the job's own, which then is compressed as far as the pass came. The solutions share the memory of the
    weights, which hold the same values."""
    model = job.model if inplace else copy.deepcopy(job.model)
    own = find_layers(model)
    layers = {n: own[n] for n in job.layers}
    options = {n: [option_from_key(choices[n])] if choices[n] != "keep" else [] for n in layers}
    changed = {n: layers[n] for n in layers if options[n]}
    original = coarse_copy(model, changed) if inplace else job.model
    read = _sweep(job, model, changed, options, folder, title=title, original=original)
    solved = {
        n: replace(s, weight=layers[n].as_matrix(layers[n].weight.detach()))
        for n in layers
        if options[n]
        for s in read(n)
    }
    return model, solved


@dataclass(frozen=True, kw_only=True, slots=True)
class _Applied:
    """A plan solved, recovered if that was asked for, written to disk and measured on select; ``record`` is its trial
    record, ``before`` that of before the recovery."""

    record: dict[str, Any]
    before: dict[str, Any] | None
    folder: Path
    solved: dict[str, Solved]
    chance: float | None


def _apply_and_write(job: Job, bench: _Bench, name: str, choices: dict[str, str]) -> _Applied:
    """Apply a plan, recover it if that was asked for, and write its artifact. If its candidates were measured on select
    and did better there than the sequential solution, they are taken instead."""
    at = f"applied/{_key(choices)}"
    model, solved = apply_plan(job, choices, at, f"apply {name}")
    results = _results(job, f"{at}/select.json", model, job.splits.select)
    record = bench.record(f"{name}, applied", "applied", choices, results)
    chance = record["chance"]
    stitched = next((t for t in bench.trials if t["choices"] == choices), None)
    if stitched is not None and stitched["metric_drop"] < record["metric_drop"]:
        solved = {n: next(s for s in bench.candidates(n) if s.option.key == choices[n]) for n in solved}
        record["note"] = "one sequential pass measured worse than the candidates, which were kept"
        chance = stitched["chance"]
    before = None
    if job.recover is None:
        model = job.model  # what is not solved is the same there; the copy can go
    else:
        own = find_layers(model)
        for n, s in solved.items():
            own[n].write_(s.weight)
        solved = _recovered(job, model, solved, at, name)
        results = _results(job, f"{at}/recovered-select.json", model, job.splits.select)
        before, record = record, bench.record(f"{name}, recovered", "applied", choices, results)
        chance = record["chance"]
    folder = _written(job, at, model, solved, _plan_of(job, record))
    # What lies on disk packed need not be held in memory twice: codes and scales are enough for a later save.
    light = {
        n: replace(s, weight=torch.empty(0)) if s.codes is not None and job.form_of(n, s.option) != "dense" else s
        for n, s in solved.items()
    }
    return _Applied(record=record, before=before, folder=folder, solved=light, chance=chance)


def _recovered(job: Job, model: nn.Module, solved: Mapping[str, Solved], at: str, name: str) -> dict[str, Solved]:
    """Stage *recover*: train a model in place on the calibration items, the select split keeping the best state."""
    assert job.recover is not None
    tensors, record = f"{at}/recovered.safetensors", f"{at}/recovered.json"
    steps, done = job.recover.steps or 1, job.state.has(record)
    with job.stages.stage(f"recover {name}".strip(), steps, done=steps if done else 0) as advance:
        if not done:
            try:
                recovery = recover_(
                    model, solved, job.uncompressed, job.objective, job.splits.calibrate, job.splits.select,
                    job.recover, advance=advance,
                )  # fmt: skip
            except Diverged as error:
                recovery = error.recovery  # its note says so; the run goes on with the best state
            job.state.write_tensors(tensors, trained_tensors(recovery))
            job.state.write_json(record, recovery.to_dict())
    found = job.state.read_json(record)
    job.notes += found["notes"]
    job.record.setdefault("recoveries", []).append({"plan": name or "the plan", **found})
    return restore_(model, solved, job.state.read_tensors(tensors))


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
            choices = cheapest(
                corrected(job.ledger.rows, job.factors), max_loss=factor * edge.record["expected"], **job.within
            )
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
    for applied in (*sequence, *left_out):
        bench.trials += [record for record in (applied.before, applied.record) if record is not None]
    return sequence


def _room(job: Job, record: Mapping[str, Any]) -> float:
    """By how much a bolder plan's predicted loss may exceed that of an applied one: half of the way (in logarithms) to
    where its chance falls to `ACCEPTABLE` if measured and predicted loss grow together."""
    drop = record["metric_drop"]
    allowed = _allowed(job, drop, record["metric_stderr"], _reach(record))
    # Half of the way on a logarithmic scale: that the applied plan measured well is partly luck.
    return min(2.0, allowed / drop) ** 0.5 if drop > 0 else 2.0**0.5


def _reach(record: Mapping[str, Any]) -> float:
    bound = record["metric_bound"]
    return math.inf if bound is None else bound - record["metric_drop"]


def _allowed(job: Job, low: float, stderr: float, reach: float) -> float:
    """The drop from ``low`` to the budget at which a plan's chance falls to `ACCEPTABLE`, with this error on select and
    this distance from a drop to its bound."""
    assert job.budget is not None and job.budget.max_drop is not None
    high = job.budget.max_drop
    for _ in range(40):
        middle = (low + high) / 2
        chance = _chance_at(job, middle, stderr, middle + reach)
        low, high = (middle, high) if chance >= ACCEPTABLE else (low, middle)
    return low


def certify_plans(job: Job, bench: _Bench, best: dict[str, Any]) -> Path:
    """Stages *apply* and *certify*: fix a sequence of plans, then test them, cautious first, up to the first that is
    not certified. Returns the folder of the model to ship: the last certified one, or the first if there is none."""
    assert job.budget is not None
    bench.model = None  # no candidates are measured any more: free a copy of the model
    sequence = _fixed_sequence(job, bench, best)
    judged = job.budget if job.budget.max_drop is not None else None
    verdicts: list[Verdict] = []
    items: list[dict[str, Any]] = []
    for applied in sequence:
        name, key = applied.record["name"], _key(applied.record["choices"])
        verdict, columns = _verdict_of(job, applied.folder, f"certify/{key}.json", f"certify {name}", judged)
        verdicts.append(verdict)
        items.append(columns)
        if verdict.status != "CERTIFIED":
            break
    last = fixed_sequence(verdicts) if judged else 0
    shipped, verdict = sequence[last or 0], verdicts[last or 0]
    job.notes += zeros_stored(job, shipped.record["choices"])
    job.solved, job.plan = shipped.solved, _plan_of(job, shipped.record)
    if judged:
        job.verdict = verdict
        if verdict.note:
            job.notes.append(f"certificate: {verdict.note}")
        tested = zip(sequence, verdicts, strict=False)
        job.record["attempts"] = [{**v.to_dict(), "plan": a.record["name"]} for a, v in tested]
    job.record |= {"measured": verdict.to_dict(), "items": items[last or 0]}
    return shipped.folder


def apply_and_measure(job: Job, choices: Mapping[str, str]) -> Path:
    """Without a budget: apply the one plan there is and measure it, paired, on the certify split."""
    model, job.solved = apply_plan(job, choices, "applied/1", "apply")
    if job.recover is not None:
        job.solved = _recovered(job, model, job.solved, "applied/1", "")
    job.plan = unpriced_plan(job, choices)
    job.notes = list(job.plan.notes)
    folder = _written(job, "applied/1", model, job.solved, job.plan)
    measured, items = _verdict_of(job, folder, "certify/1.json", "measure", None)
    job.record |= {"measured": measured.to_dict(), "items": items}
    return folder


def unpriced_plan(job: Job, choices: Mapping[str, str]) -> Plan:
    """The one plan there is where there is no budget."""
    unknown = float("nan")
    notes = (*job.notes, *zeros_stored(job, choices))
    return Plan(
        choices=dict(choices), bytes=job.bytes_of(choices), predicted=unknown, predicted_stderr=unknown, notes=notes
    )


def zeros_stored(job: Job, choices: Mapping[str, str]) -> list[str]:
    """What to tell the user about pruned layers that are larger on disk because transformers must read them."""
    before = after = count = 0
    for name, key in choices.items():
        option = option_from_key(key)
        now = job.layer_bytes(name, option)
        sparse = artifact.layer_bytes(job.model, job.layers[name], option, portable=False)
        if pruner_of(option) is not None and sparse < now:
            before, after, count = before + now, after + sparse, count + 1
    if not count:
        return []
    return [
        f"the zeros of {count} pruned layer(s) are stored, because transformers needs them: {before / 1e6:.1f} MB, "
        f"which portable: false (in Python Settings(portable=False)) would make {after / 1e6:.1f} MB"
    ]


def _written(job: Job, at: str, model: nn.Module, solved: Mapping[str, Solved], plan: Plan) -> Path:
    folder = job.state.path(f"{at}/model")
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        job.write_model(folder, model, solved, plan.to_dict())
        (folder / "complete").touch()
    return folder


def _verdict_of(job: Job, folder: Path, path: str, title: str, budget: Budget | None) -> tuple[Verdict, dict[str, Any]]:
    """Paired verdict of a saved and reloaded model on the certify split, and the `item_columns` behind it; without a
    budget the bound is not judged."""
    with job.stages.stage(title, 2) as advance:
        baseline = _results(job, "certify/baseline.json", job.uncompressed, job.splits.certify)
        advance(1)
        model = job.model if job.state.has(path) else job.reload(folder)
        results = _results(job, path, model, job.splits.certify)
        advance(2)
    budget = budget or Budget("loss", max_drop=0.0, confidence=0.95 if job.budget is None else job.budget.confidence)
    verdict = compare(baseline, results, job.splits.certify, budget, unit=job.objective.unit)
    return verdict, item_columns(baseline, results, job.splits.certify)


def _plan_of(job: Job, trial: Mapping[str, Any]) -> Plan:
    return Plan(
        choices=dict(trial["choices"]),
        bytes=trial["bytes"],
        predicted=trial["predicted"],
        predicted_stderr=float("nan") if trial["predicted_stderr"] is None else trial["predicted_stderr"],
        notes=tuple(job.notes),
        uses=trial["uses"],
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
