"""The stages of a compression, from a model and its splits to plans, solved layers and a verdict.

    solve    every option of every layer, from one forward pass over the calibration items
    price    every solved change, from one forward and a few backward passes per item; the largest of them measured
    select   plans along the frontier, measured on the select split, beside controls (`curvprune.run.selection`)
    apply    the chosen plans: one sequential forward pass each, later layers see what earlier ones became
    recover  those models, where it is asked for: a short training of what their stored form leaves free
    certify  those plans, cautious first, saved and loaded again, on items that nothing else has touched

Each stage leaves its results in ``state/``, layer by layer, and skips what it finds there.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvprune import artifact
from curvprune.certificate import Verdict, compare, fixed_sequence, item_columns
from curvprune.compression import (
    Diverged,
    Moments,
    Solved,
    coarse_copy,
    dequantize,
    recover_,
    restore_,
    solve_layer,
    trained_tensors,
    visit_layers,
)
from curvprune.curvature import (
    MATRICES,
    Analysis,
    Change,
    Checkpoint,
    Draws,
    FisherPass,
    LayerCurvature,
    fisher_pass,
)
from curvprune.distributed import rank, shared, wait, world
from curvprune.files import State
from curvprune.model import BROKEN, ItemResults, Layer, collate, find_layers, to_device
from curvprune.options import (
    Cast,
    Keep,
    Option,
    Prune,
    kept_weights,
    option_from_key,
    pruner_of,
    quantizer_of,
)
from curvprune.planning import Budget, Infeasible, Limit, Plan, cheapest, corrected
from curvprune.pricing import (
    FORMS,
    MEASURED_ROWS,
    Forms,
    Ledger,
    Parts,
    Row,
    build_ledger,
    divergences,
    measure_highest,
    quadratic_forms,
    work_of,
)
from curvprune.run.selection import Bench, keep_results, plan_key, results_on
from curvprune.run.sequence import Tried, next_plan, to_test
from curvprune.run.task import Job

CHECKPOINT_SECONDS = 45.0  # the pricing pass writes its totals this often
# predicted probability of being certified that some plan of the fixed sequence should have
SAFE = 0.95
EARLIER = "earlier.json"  # plans that a reused run has recovered
CAUTION = 0.6  # a more cautious plan may cost so much of the next one's predicted loss


# -------------------------------------------------------------------------------------------- solve


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
                tensors[f"{k}.codes"],
                tensors[f"{k}.scale"],
                tensors.get(f"{k}.zero"),
                quantize.group_size,
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
    """Visit the layers of ``model`` in one forward pass and solve them into ``state/folder``. With
    the ``original``, write each layer's single option into the model on the way, so that later
    layers see it, and let the original run beside it, so that they make up for it; otherwise the
    model is only read. Without it, each of several processes solves its share of the layers.
    Returns a reader of the results."""
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
            _write_solved(
                own_state,
                names[name],
                solve_layer(layer, job_options, moments() if needs_moment else None),
            )
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
    changing: dict[str, list[Option]] = {
        n: [o for o in job.options[n] if not isinstance(o, Keep)] for n in job.layers
    }
    return _sweep(job, job.model, job.layers, changing, "solved", title="solve options")


# -------------------------------------------------------------------------------------------- price


def price_options(job: Job, candidates: Callable[[str], list[Solved]] | None) -> None:
    """Stage *price*: the ledger and the analysis, from one pass over the price items."""
    items = job.splits.price.items
    name, done_name = "fisher.safetensors", "fisher.json"
    changed: dict[str, list[str]] = {n: [] for n in job.layers}
    changes: dict[str, list[Change]] = {}
    if candidates is not None:
        changed = {
            n: [o.key for o in job.options[n] if not isinstance(o, Keep)] for n in job.layers
        }
    wait()  # nobody looks at the folder while the first process is still writing its last file
    finished = job.state.has(done_name)
    own_state, own_name = job.state, name
    if shared():
        own_state, own_name = (
            replace(job.state, writes=True),
            f"fisher.{rank()}of{world()}.safetensors",
        )
    checkpoint = name if finished else own_name
    resume = job.state.read_tensors(checkpoint) if job.state.has(checkpoint) else None
    if candidates is not None and not finished:
        for n, layer in job.layers.items():
            if changed[n]:
                weight = layer.as_matrix(layer.weight.detach())
                wide = weight if weight.dtype == torch.float64 else weight.float()
                changes[n] = [Change.of(s.weight.to(wide.dtype) - wide) for s in candidates(n)]
    elif finished:
        # The pass is over; its totals already hold the squares, and empty changes only set their
        # number.
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
            draws=Draws(labels=job.settings.labels, seed=job.settings.seed),
            checkpoint=Checkpoint(resume=resume, after_item=after_item),
        )
    kind, prices = job.settings.curvature, None
    if candidates is not None and kind in FORMS:
        prices = _forms(job, kind, changes)
    job.state.write_json(done_name, {"items": len(items)})
    wait()
    sizes = {n: {o.key: job.layer_bytes(n, o) for o in job.options[n]} for n in job.layers}
    job.analysis = _analysis(measured, job.layers)
    if candidates is not None:
        ledger = build_ledger(
            prices or measured,
            sizes,
            changed=changed,
            measure=job.objective.measure,
            curvature=kind,
        )
        job.ledger = _measured(
            job, replace(ledger, work=job.work or work_of(job.layers)), candidates
        )


def _measured(job: Job, ledger: Ledger, candidates: Callable[[str], list[Solved]]) -> Ledger:
    """The ledger with its highest prices measured: see `measure_highest`."""
    least = job.settings.measure_above
    if (
        least is None or job.settings.curvature == "input" or rank() != 0
    ):  # the first process goes on alone
        return ledger
    with job.stages.stage("measure prices", MEASURED_ROWS) as advance:

        def measure(rows: Sequence[Row], before: int) -> dict[tuple[str, str], np.ndarray]:
            found = _divergences(job, rows, candidates, f"measured/{before}.json", ledger.count)
            advance(before + len(rows))
            return found

        ledger, note = measure_highest(ledger, measure, least=least)
        advance(MEASURED_ROWS)
    job.notes += [note] if note else []
    return ledger


def _divergences(
    job: Job,
    rows: Sequence[Row],
    candidates: Callable[[str], list[Solved]],
    name: str,
    count: np.ndarray,
) -> dict[tuple[str, str], np.ndarray]:
    """What the changes of some rows cost each price item, with ``count`` positions, measured, or
    read. Those that break the model cost `BROKEN` and are noted."""
    if not job.state.has(name):
        weights = [
            next(s.weight for s in candidates(r.layer) if s.option.key == r.option) for r in rows
        ]
        changed = [(r.layer, weight) for r, weight in zip(rows, weights, strict=True)]
        sums = divergences(job.model, job.objective, job.splits.price.items, job.layers, changed).T
        job.state.write_json(name, [s.tolist() if bool(s.isfinite().all()) else None for s in sums])
    found = {}
    for row, values in zip(rows, job.state.read_json(name), strict=True):
        found[row.layer, row.option] = BROKEN * count if values is None else np.array(values)
        if values is None:
            what = f"with option {row.option} alone the model's outputs are no finite numbers"
            job.notes.append(f"layer {row.layer}: {what}; its price is {BROKEN:g} nats")
    return found


def _forms(job: Job, kind: str, changes: Mapping[str, list[Change]]) -> Forms:
    """The forms of another curvature, or those that an earlier process measured."""
    name = f"forms-{kind}.json"
    if not job.state.has(name):
        forms = quadratic_forms(
            kind,
            job.model,
            job.objective,
            job.splits.price.items,
            job.layers,
            changes,
            parts=Parts(seed=job.settings.seed),
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


# -------------------------------------------------------------------------------- apply and certify


def spread_zeros(job: Job, sparsity: float) -> dict[str, str]:
    """The cheapest plan by the ledger with a share of ``sparsity`` of all weights of the layers
    pruned."""
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
    alike = sum(
        left(Prune(sparsity=sparsity), layer) for layer in job.layers.values()
    )  # each rounded by itself
    limit = Limit(name="weights kept", most=max(total - round(sparsity * total), alike), use=kept)
    return cheapest(job.ledger.rows, limits=[limit], same_option=job.same_option)


def apply_plan(
    job: Job, choices: Mapping[str, str], folder: str, title: str, *, inplace: bool = False
) -> tuple[nn.Module, dict[str, Solved]]:
    """Stage *apply*: solve the chosen options in one sequential forward pass over a copy of the
    model, or ``inplace`` over the job's own, which then is compressed as far as the pass came. The
    solutions share the memory of the weights, which hold the same values."""
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
    """A plan solved, recovered if that was asked for, written to disk and measured on select;
    ``record`` is its trial record, ``before`` that of before the recovery; ``tried`` are those of
    what was written and of what was recovered: the candidates', where they were kept."""

    record: dict[str, Any]
    before: dict[str, Any] | None
    folder: Path
    solved: dict[str, Solved]
    tried: Tried

    @property
    def size_and_chance(self) -> tuple[int, float]:
        return self.record["bytes"], self.tried.record["chance"] or 0.0


def _apply_and_write(job: Job, bench: Bench, name: str, choices: dict[str, str]) -> _Applied:
    """Apply a plan, recover it if that was asked for, and write its artifact. If its candidates
    were measured on select and did better there than the sequential solution, they are taken
    instead."""
    at = f"applied/{plan_key(choices)}"
    model, solved = apply_plan(job, choices, at, f"apply {name}")
    results = results_on(job, f"{at}/select.json", model, job.splits.select)
    record = bench.record(f"{name}, applied", "applied", choices, results)
    start: Mapping[str, Any] = record
    stitched = next((t for t in bench.trials if t["choices"] == choices), None)
    # a run that reuses this plan may not have the trial, but has what came of it
    decision = f"{at}/start.json"
    if not job.state.has(decision):
        better = stitched is not None and stitched["metric_drop"] < record["metric_drop"]
        job.state.write_json(decision, {"candidates": better})
    if job.state.read_json(decision)["candidates"]:
        solved = {
            n: next(s for s in bench.candidates(n) if s.option.key == choices[n]) for n in solved
        }
        record["note"] = "one sequential pass measured worse than the candidates, which were kept"
        results = results_on(
            job, bench.path(choices), model, job.splits.select
        )  # read: they have been measured
        # What prices say of it now: those of the trial were not corrected by all that has been
        # measured since.
        start = {
            **(stitched or bench.record(name, "plan", choices, results)),
            "expected": record["expected"],
        }
    before, tried = None, Tried(start, None)
    if job.recover is None:
        model = job.model  # what is not solved is the same there; the copy can go
    else:
        own = find_layers(model)
        for n, s in solved.items():
            own[n].write_(s.weight)
        solved = _recovered(job, model, solved, at, name, results)
        results = results_on(job, f"{at}/recovered-select.json", model, job.splits.select)
        before, record = record, bench.record(f"{name}, recovered", "applied", choices, results)
        tried = Tried(record, start)
    folder = _written(job, at, model, solved, _plan_of(job, record))
    # What lies on disk packed need not be held in memory twice: codes and scales are enough for a
    # later save.
    light = {
        n: replace(s, weight=torch.empty(0))
        if s.codes is not None and job.form_of(n, s.option) != "dense"
        else s
        for n, s in solved.items()
    }
    return _Applied(record=record, before=before, folder=folder, solved=light, tried=tried)


def _recovered(
    job: Job,
    model: nn.Module,
    solved: Mapping[str, Solved],
    at: str,
    name: str,
    before: ItemResults | None = None,
) -> dict[str, Solved]:
    """Stage *recover*: train a model in place, on the recover split if there is one, else on the
    calibration items; the
    select split keeps the best state. ``before``: the model's results there, if known."""
    assert job.recover is not None
    tensors, record = f"{at}/recovered.safetensors", f"{at}/recovered.json"
    steps, done = job.recover.steps or 1, job.state.has(record)
    with job.stages.stage(f"recover {name}".strip(), steps, done=steps if done else 0) as advance:
        if not done:
            try:
                recovery = recover_(
                    model, solved, job.uncompressed, job.objective, job.splits.training, job.splits.select,
                    job.recover, before=before, advance=advance,
                )  # fmt: skip
            except Diverged as error:
                recovery = error.recovery  # its note says so; the run goes on with the best state
            job.state.write_tensors(tensors, trained_tensors(recovery))
            keep_results(job, f"{at}/recovered-select.json", recovery.results)
            job.state.write_json(record, recovery.to_dict())
    found = job.state.read_json(record)
    job.notes += found["notes"]
    job.record.setdefault("recoveries", []).append({"plan": name or "the plan", **found})
    return restore_(model, solved, job.state.read_tensors(tensors))


def _fixed_sequence(job: Job, bench: Bench, best: dict[str, Any]) -> list[_Applied]:
    """The plans to certify, cautious first, fixed before the certify split is opened: everything
    here is judged on select alone. Unless an earlier run has left a safe one, the best plan is
    applied, and more cautious ones until one is safe; then those that `next_plan` finds, for the
    applied models leave room (applied sequentially, and recovered, a plan costs less than its
    candidates did). ``attempts`` counts what this run applies."""
    assert job.ledger is not None and job.budget is not None
    applied = _applied_earlier(job, bench)
    left = 1 if job.budget.max_drop is None else job.settings.attempts
    if not _any_safe(applied) and all(a.record["choices"] != best["choices"] for a in applied):
        applied.append(_apply_and_write(job, bench, best["name"], best["choices"]))
        left -= 1
    for made in range(1, left + 1):
        if safe := _any_safe(applied):
            choices = next_plan(job, [a.tried for a in applied])
        else:
            choices = _more_cautious(job, max(applied, key=lambda a: a.record["bytes"]).record)
        if choices is None:
            break
        name = f"{best['name']}, {'bolder' if safe else 'more cautious'}{f' {made}' if made > 1 else ''}"
        applied.append(_apply_and_write(job, bench, name, choices))
    for one in applied:
        bench.trials += [record for record in (one.before, one.record) if record is not None]
    return [applied[i] for i in to_test([a.size_and_chance for a in applied])]


def _applied_earlier(job: Job, bench: Bench) -> list[_Applied]:
    """Plans that a reused run has recovered and that fit this budget's limits: read again, not
    made."""
    assert job.budget is not None
    if job.budget.max_drop is None or not job.state.has(EARLIER):
        return []
    fitting = [
        choices
        for choices in job.state.read_json(EARLIER)
        if job.keeps_within(choices)
        and all(len({choices[n] for n in group}) == 1 for group in job.groups)
    ]
    fitting.sort(key=job.bytes_of, reverse=True)
    if fitting:
        job.notes.append(
            f"{len(fitting)} plan(s) recovered by the reused run were candidates for this budget "
            "too"
        )
    return [
        _apply_and_write(job, bench, f"earlier plan {i}", choices)
        for i, choices in enumerate(fitting, 1)
    ]


def _any_safe(applied: Sequence[_Applied]) -> bool:
    return any(chance >= SAFE for _, chance in (a.size_and_chance for a in applied))


def _more_cautious(job: Job, record: Mapping[str, Any]) -> dict[str, str] | None:
    """A larger plan with `CAUTION` times the expected loss of an applied one, if there is any."""
    assert job.ledger is not None
    rows = corrected(job.ledger.rows, job.factors)
    try:
        choices = cheapest(rows, max_loss=CAUTION * record["expected"], **job.within)
    except Infeasible:
        return None
    return choices if job.bytes_of(choices) > record["bytes"] else None


def certify_plans(job: Job, bench: Bench, best: dict[str, Any]) -> Path:
    """Stages *apply* and *certify*: fix a sequence of plans, then test them, cautious first, up to
    the first that is
    not certified. Returns the folder of the model to ship: the last certified one, or the first if
    there is none."""
    assert job.budget is not None
    bench.model = None  # no candidates are measured any more: free a copy of the model
    sequence = _fixed_sequence(job, bench, best)
    judged = job.budget if job.budget.max_drop is not None else None
    verdicts: list[Verdict] = []
    items: list[dict[str, Any]] = []
    for applied in sequence:
        name, key = applied.record["name"], plan_key(applied.record["choices"])
        verdict, columns = _verdict_of(
            job, applied.folder, f"certify/{key}.json", f"certify {name}", judged
        )
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
    """Without a budget: apply the one plan there is and measure it, paired, on the certify
    split."""
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
        choices=dict(choices),
        bytes=job.bytes_of(choices),
        predicted=unknown,
        predicted_stderr=unknown,
        notes=notes,
    )


def zeros_stored(job: Job, choices: Mapping[str, str]) -> list[str]:
    """What to tell the user about pruned layers that are larger on disk because transformers must
    read them."""
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
        f"the zeros of {count} pruned layer(s) are stored, because transformers needs them: "
        f"{before / 1e6:.1f} MB, which portable: false (in Python Settings(portable=False)) "
        f"would make {after / 1e6:.1f} MB"
    ]


def _written(job: Job, at: str, model: nn.Module, solved: Mapping[str, Solved], plan: Plan) -> Path:
    folder = job.state.path(f"{at}/model")
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        job.write_model(folder, model, solved, plan.to_dict())
        (folder / "complete").touch()
    return folder


def _verdict_of(
    job: Job, folder: Path, path: str, title: str, budget: Budget | None
) -> tuple[Verdict, dict[str, Any]]:
    """Paired verdict of a saved and reloaded model on the certify split, and the `item_columns`
    behind it; without a budget the bound is not judged."""
    with job.stages.stage(title, 2) as advance:
        baseline = results_on(job, "certify/baseline.json", job.uncompressed, job.splits.certify)
        advance(1)
        model = job.model if job.state.has(path) else job.reload(folder)
        results = results_on(job, path, model, job.splits.certify)
        advance(2)
    budget = budget or Budget(
        "loss", max_drop=0.0, confidence=0.95 if job.budget is None else job.budget.confidence
    )
    verdict = compare(baseline, results, job.splits.certify, budget, measure=job.objective.measure)
    return verdict, item_columns(baseline, results, job.splits.certify)


def _plan_of(job: Job, trial: Mapping[str, Any]) -> Plan:
    return Plan(
        choices=dict(trial["choices"]),
        bytes=trial["bytes"],
        predicted=trial["predicted"],
        predicted_stderr=float("nan")
        if trial["predicted_stderr"] is None
        else trial["predicted_stderr"],
        notes=tuple(job.notes),
        uses=trial["uses"],
    )
