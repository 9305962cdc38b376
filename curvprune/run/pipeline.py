"""`run(recipe)`: from a recipe to a certified model and a report, and the three smaller jobs around
it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

import curvprune
from curvprune import artifact, distributed, report
from curvprune.artifact import describe, load_artifact, loads_packed, write_model
from curvprune.certificate import (
    compare,
    design_effect,
    items_needed_for_accuracy,
    power_for_accuracy,
    probability_of_certifying,
)
from curvprune.compat import versions
from curvprune.compression import Moments, Training, solve_layer
from curvprune.curvature import (
    QUANTITIES,
    AnalysisSettings,
    Draws,
    analyze_curvature,
    fisher_pass,
)
from curvprune.files import StageLog, State
from curvprune.model import (
    EXTRA,
    PURPOSES,
    ItemResults,
    LabelFree,
    Objective,
    Split,
    Splits,
    check_items,
    collate,
    evaluate,
    find_layers,
    left_over,
    make_objective,
    to_device,
)
from curvprune.options import Keep, Option, option_from_key, pruner_of, quantizer_of
from curvprune.planning import SIZES, Budget, Infeasible, Limit, frontier
from curvprune.pricing import MEASURED_TOGETHER
from curvprune.run import models, sources
from curvprune.run.recipe import (
    Recipe,
    RecipeError,
    assign_groups,
    assign_options,
    load_recipe,
    lock_text,
)
from curvprune.run.selection import TRIALS_BESIDES, select_plans
from curvprune.run.stages import (
    EARLIER,
    apply_and_measure,
    certify_plans,
    price_options,
    solve_options,
)
from curvprune.run.task import Job, Settings, limit_plans
from curvprune.schema import decode, encode
from curvprune.structured import Pruned, Structured, offered_widths, prune_units

LOCK, ANALYSIS, LEDGER, PLAN, VERDICT = (
    "recipe.lock.yaml",
    "analysis.json",
    "ledger.json",
    "plan.json",
    "verdict.json",
)
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
INPUTS = "state/inputs.json"
MAY_DIFFER = (
    "title",
    "budget",
    "search",
    "recover",
    "same_option",
    "analyze",
)  # from a run that is reused


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a finished run says: exit code (0 certified or no budget, 1 otherwise), folder and the
    report's record."""

    exit_code: int
    folder: Path
    record: dict[str, Any]

    @property
    def summary(self) -> str:
        return report.summary(self.record)


def run(
    recipe_path: str | Path,
    out: str | Path,
    *,
    progress: bool = True,
    reuse: str | Path | None = None,
) -> RunResult:
    """Run a recipe into the folder ``out``; a second call goes on where the first was interrupted.

    ``reuse`` is the folder of another run, of the same recipe but for the sections `MAY_DIFFER`, a
    budget for one, and for the items that a recovery trains on: what it has solved, priced and
    measured on the select split is not done again. With the same recovery on the same items the
    plans that it has recovered are candidates too, and tell how far the next may go; without, the
    result is that of a run from scratch. A folder that has begun goes on alone.

    Of several processes (``torchrun``, one file system) each solves its share of the layers and
    prices its share of the items; the first goes on alone, and only its result has a record.

    Raises ``RecipeError`` before any long computation if the recipe, the model or the data do not
    fit each other or those of ``reuse``, or if ``out`` holds another run.
    """
    recipe, root = load_recipe(recipe_path), State(Path(out))
    if (record := _finished(recipe, root)) is not None:
        return _result(root, record)
    source = None if reuse is None or root.has(INPUTS) else _run_to_reuse(recipe, Path(reuse))
    with distributed.together():
        first = distributed.rank() == 0
        root = replace(root, writes=first)
        job, about = prepare(recipe, root, progress=progress and first, reused=source)
        candidates = None
        if job.budget is not None:
            candidates = solve_options(job)
            price_options(job, candidates)
            _write_prices(job, root)
    if not first:
        return RunResult(exit_code=0, folder=root.folder, record={})
    if candidates is None:
        folder = apply_and_measure(job, {n: options[0].key for n, options in job.options.items()})
        bench_trials: list[dict[str, Any]] = []
    else:
        bench, best = select_plans(job, candidates)
        folder = certify_plans(job, bench, best)
        bench_trials = bench.trials
    _publish(folder, root)
    record = _record(job, about, bench_trials, root)
    assert job.plan is not None
    trials = [{k: v for k, v in t.items() if k != "choices"} for t in bench_trials]
    root.write_json(
        PLAN,
        {
            **job.plan.to_dict(),
            "layers": record["layers"],
            "corrections": job.factors,
            "trials": trials,
        },
    )
    root.write_json(
        VERDICT, record["verdict"] or {"status": "NOT ASKED", "measured": record["measured"]}
    )
    root.write_json(REPORT_JSON, record)
    root.write_text(REPORT_HTML, report.build(record))
    root.write_json("state/done.json", {"recipe": _fingerprint(recipe)})
    return _result(root, record)


def analyze(recipe_path: str | Path, out: str | Path, *, progress: bool = True) -> RunResult:
    """Curvature and sensitivities only: writes ``analysis.json``, ``ledger.json`` and a report;
    `run` goes on from there. Several processes (``torchrun``, one file system) share the layers and
    the data; only the first one's result has a record."""
    recipe, root = load_recipe(recipe_path), State(Path(out))
    if (record := _finished(recipe, root)) is not None:
        return _result(root, record)
    with distributed.together():
        first = distributed.rank() == 0
        root = replace(root, writes=first)
        return _analyze(recipe, root, progress=progress and first)


def _analyze(recipe: Recipe, root: State, *, progress: bool) -> RunResult:
    job, about = prepare(recipe, root, progress=progress)
    price_options(job, solve_options(job))
    _write_prices(job, root)
    curvature = _curvature(job, recipe)
    if not root.writes:
        return RunResult(exit_code=0, folder=root.folder, record={})
    assert job.analysis is not None
    root.write_json(ANALYSIS, {**curvature, "fisher": job.analysis.to_dict()})
    record = {**_record(job, about, [], root), "analysis": curvature}
    root.write_json(REPORT_JSON, record)
    root.write_text(REPORT_HTML, report.build(record))
    return RunResult(exit_code=0, folder=root.folder, record=record)


FEW_DOCUMENTS = 8  # on 4 an outlier moved a plan's bound from twice its drop to five times
SPECTRA_UP_TO = 30_000_000  # parameters: above, a layer's eigenvalues take minutes each on a CPU


def _curvature(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Second-order curvature of the uncompressed model on the first price items; finished parts are
    not repeated."""
    section = recipe.analyze
    parameters = sum(p.numel() for p in job.model.parameters())
    spectra = parameters <= SPECTRA_UP_TO if section.spectra is None else section.spectra
    items = job.splits.price.items[: section.items]
    device = next(job.model.parameters()).device
    size = job.settings.batch_size
    batches = [to_device(collate(items[i : i + size]), device) for i in range(0, len(items), size)]
    with job.stages.steps() as advance:
        analysis = analyze_curvature(
            job.model,
            job.objective,
            batches,
            job.layers,
            AnalysisSettings(
                matrix=section.matrix,
                quantities=QUANTITIES if spectra else ("trace", "diagonal"),
                rtol=section.rtol,
                max_products=section.max_products,
                seed=recipe.seed,
                vector_bytes=int(section.vector_gb * 1e9),
            ),
            advance=advance,
            remember=partial(_remember, job.state),
        )
    record: dict[str, Any] = encode(analysis.to_record())
    if not spectra:
        record["notes"].append(
            f"eigenvalues and spectral density were left out ({parameters} parameters); "
            "write analyze: {spectra: true} for them"
        )
    return record


R = TypeVar("R")


def _remember(state: State, key: str, kind: type[R], compute: Callable[[], R]) -> R:
    """A part of an analysis: read if an earlier run finished it, else computed and written. Of
    several processes the first one's view of the folder counts, because all must compute together
    or not at all."""
    name = f"curvature/{key}.json"
    if distributed.first_says(state.has(name)):
        return decode(kind, state.read_json(name), source=str(state.path(name)))
    value = compute()
    state.write_json(name, encode(value))
    return value


def rebuild_report(out: str | Path, against: str | Path | None = None) -> Path:
    """Write ``report.html`` again from ``report.json``, with a comparison if another run's folder
    is given as ``against`` (``report.json`` stays as it is). Raises ``ValueError`` if a folder
    holds no run."""
    record = _record_in(out)
    if against is not None:
        record["against"] = _against(record, _record_in(against), str(against))
    root = State(Path(out))
    root.write_text(REPORT_HTML, report.build(record))
    return root.path(REPORT_HTML)


def _record_in(folder: str | Path) -> dict[str, Any]:
    root = State(Path(folder))
    if not root.has(REPORT_JSON):
        raise ValueError(
            f"{folder} has no {REPORT_JSON}: run `curvprune run RECIPE --out {folder}` (or "
            "analyze) first"
        )
    record: dict[str, Any] = root.read_json(REPORT_JSON)
    return record


def _against(record: Mapping[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """What the report needs to compare a run with another: the other's record and, on the same
    items, how much worse the first one's compressed model is, with its standard error, for every
    metric that both have."""
    found: dict[str, Any] = {"name": name, "record": other}
    if reason := _unpaired(record, other):
        return {**found, "unpaired": reason}
    here, there = record["items"], other["items"]
    names = [here["documents"][k] for k in here["document"]]
    split = Split(items=(), documents=tuple(names))
    metrics = (
        ("loss", "accuracy") if all("right_after" in side for side in (here, there)) else ("loss",)
    )
    kept = ("metric", "measure", "baseline", "compressed", "drop", "stderr", "items", "clusters")
    paired = {}
    for metric in metrics:
        budget = Budget(metric, max_drop=0.0)
        verdict = compare(
            _after(there), _after(here), split, budget, measure=record["measure"]
        ).to_dict()
        paired[metric] = {
            key: verdict[key] for key in kept
        }  # without a budget there is nothing to judge
    return {**found, "paired": paired}


def _unpaired(record: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why two runs' results cannot be compared item by item; empty if they can."""
    sides = (record, other)
    for which, side in zip(("this run", "the other run"), sides, strict=True):
        if not side.get("items"):
            return f"{which} has no results of single items on record"
    data, models = (
        [(side.get("provenance") or {}).get(key) for side in sides]
        for key in ("data_sha256", "model_sha256")
    )
    splits = [(hashes or {}).get("certify") for hashes in data]
    if None in splits or splits[0] != splits[1]:
        return "the two runs were not measured on the same certify split"
    if any(
        record["items"][key] != other["items"][key]
        for key in ("documents", "document", "index", "count")
    ):
        return "other items or positions of the certify split counted in one run than in the other"
    if record["objective"] != other["objective"] or record["measure"] != other["measure"]:
        return f"the losses differ in kind: {record['objective']} here, {other['objective']} there"
    if record["objective"] == LabelFree.name and models[0] != models[1]:
        return "each loss is the divergence from the run's own uncompressed model, and those differ"
    return ""


def _after(items: Mapping[str, Any]) -> ItemResults:
    """The compressed model's results of the items on record."""
    count = torch.tensor(items["count"], dtype=torch.float64)
    correct = torch.tensor(items.get("right_after", [0] * len(count)), dtype=torch.float64)
    return ItemResults(
        loss=torch.tensor(items["after"], dtype=torch.float64) * count, count=count, correct=correct
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """Whether the certify split can decide the budget, judged before the run.

    ``chance``: probability that a model without any true loss would be certified, if its results
    differ from the uncompressed model's as much as those of a trial rounding (to nearest, measured
    on the select split) do; ``needed``: the items for 80 %. ``disagreement`` is the share of items
    on which the two models differ, for accuracy.
    """

    items: int
    documents: int
    chance: float
    needed: int
    trial_drop: float
    disagreement: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What `check` found: layers with their options, what the run will need, and what may go wrong
    (``warnings``)."""

    layers: list[dict[str, Any]]
    kept: list[str]
    cuts: dict[str, dict[str, Any]]
    minutes: dict[str, float]
    memory_bytes: int
    smallest_bytes: int
    dense_bytes: int
    limits: list[dict[str, Any]]
    power: Power | None
    warnings: tuple[str, ...]


def check(recipe_path: str | Path) -> Check:
    """Validate a recipe against its model and data; time one item and one layer to estimate the
    whole run, and round the layers to nearest (at most three times, on a copy) to see whether the
    certify split can decide the budget."""
    recipe = load_recipe(recipe_path)
    job, about = prepare(recipe, None, progress=False)
    rows = [
        {
            "name": n,
            "kind": layer.kind,
            "shape": layer.shape,
            "options": [o.key for o in job.options[n]],
        }
        for n, layer in job.layers.items()
    ]
    dense = sum(p.numel() * p.element_size() for p in job.model.parameters())
    minutes, memory = _estimate(job, dense, about.get("widths", {}))
    power, warnings = _power(job)
    if (leak := job.splits.leak()) is not None:
        warnings.append(leak)
    return Check(
        layers=rows,
        kept=about["kept"],
        cuts=about.get("widths", {}),
        minutes=minutes,
        memory_bytes=memory,
        smallest_bytes=job.smallest_bytes(),
        dense_bytes=dense,
        limits=[{"name": n, "most": most, "least": job.least(n)} for n, most in job.most.items()],
        power=power,
        warnings=tuple(warnings),
    )


# ---------------------------------------------------------------------------------------- preparing


def prepare(
    recipe: Recipe, root: State | None, *, progress: bool, reused: State | None = None
) -> tuple[Job, dict[str, Any]]:
    """Load model and data, find the layers, assign their options; everything that can be wrong is
    found here. ``reused`` is a run from whose state ``root`` starts."""
    if root is not None and recipe.model.path is not None:
        source = Path(recipe.model.path).resolve()
        if source.is_relative_to(root.folder.resolve()):
            raise recipe.error(
                ("model", "path"),
                f"{recipe.model.path} lies inside the run folder {root.folder}, whose model/ the "
                "run writes; give --out another folder",
            )
    device = _device(recipe)
    asked = _structured(recipe)
    model, tokenizer = _load_model(recipe)
    splits = _load_data(recipe, tokenizer)
    model.to(device)
    scratch = (
        State(root.path("state"), writes=root.writes)
        if root is not None
        else State(Path(os.devnull))
    )
    fit = partial(
        _fit,
        recipe,
        tokenizer=tokenizer,
        splits=splits,
        state=scratch,
        stages=StageLog(show=progress),
    )
    job = fit(model, final=asked is None)
    about: dict[str, Any] = {
        "title": recipe.title
        or Path(recipe.model.name or recipe.model.path or recipe.model.package or "").name,
        "recipe_sha256": _fingerprint(recipe),
        "model_sha256": models.model_sha256(model),
        "data_sha256": splits.sha256(),
        "limits_sha256": _sha256(job.budget.to_dict()["limits"])
        if job.budget and job.budget.limits
        else None,
        "device": str(device),
        "seed": recipe.seed,
    }
    if asked is not None and (root is None or root.writes) and not scratch.has(_REMOVED):
        about["widths"] = _offered(recipe, job, asked)
    if root is not None:
        if root.writes:
            _claim(recipe, root, about, reused)
        distributed.wait()
        if asked is not None:
            smaller, removed = _without_units(recipe, job, asked)
            job = fit(smaller, original=model)
            about["structured"] = removed
            job.notes[:0] = removed["notes"]
    about["kept"] = [n for n in find_layers(job.model) if n not in job.layers]
    return job, about


def _fit(
    recipe: Recipe,
    model: nn.Module,
    *,
    tokenizer: Any,
    splits: Splits,
    state: State,
    stages: StageLog,
    original: nn.Module | None = None,
    final: bool = True,
) -> Job:
    """Lay the recipe over a model: its layers, their options and groups, and whether they fit.
    Unless ``final`` units will be removed first, and sizes are not known yet."""
    device = next(model.parameters()).device
    found = find_layers(model)
    readers = {
        n: artifact.reader_of(model, layer, portable=recipe.portable) for n, layer in found.items()
    }
    assigned = assign_options(
        recipe, {n: layer.shape for n, layer in found.items()}, readers=readers
    )
    groups = assign_groups(recipe, found, assigned)
    kept = [n for n in found if n not in assigned]
    settings = Settings(
        seed=recipe.seed,
        labels=recipe.price.labels,
        curvature=recipe.price.curvature,
        measure_above=recipe.price.measure_above,
        trials=recipe.search.trials,
        attempts=recipe.search.attempts,
        portable=recipe.portable,
    )
    job = Job(
        model=model,
        original=original,
        objective=_objective(
            recipe, model if original is None else original, splits
        ),  # KL is from the original
        layers={n: found[n] for n in found if n in assigned},
        options=assigned,
        same_option=groups.layers,
        splits=splits,
        budget=_budget(recipe),
        settings=settings,
        state=state,
        stages=stages,
        reload=lambda folder: load_artifact(folder, device=device),
        write_model=lambda folder, written, solved, plan: write_model(
            folder, written, solved, plan, tokenizer=tokenizer, portable=recipe.portable
        ),
        recover=None
        if recipe.recover is None
        else Training(**recipe.recover.model_dump(), seed=recipe.seed),
    )
    job.notes += groups.notes
    if splits.recover is not None and job.recover is None:
        aside = f"data: recover: {len(splits.recover.items)} items are set aside and nothing trains on them"
        job.notes.append(f"{aside}: there is no recover section")
    if kept:
        job.notes.append(
            f"{len(kept)} layer(s) match no entry of compress: and stay as they are: {', '.join(kept)}"
        )
    if (message := left_over(model)) is not None:
        job.notes.append(message)
    for purpose in PURPOSES:
        try:
            check_items(model, job.objective, getattr(splits, purpose).items, purpose)
        except ValueError as error:
            raise recipe.error(("data",), str(error)) from error
    if job.budget is not None and (few := splits.too_few()) is not None:
        raise recipe.error(("data",), few)
    if job.budget is not None and job.budget.max_drop is not None:
        if (leak := splits.leak()) is not None:
            job.notes.append(leak)
        if (documents := len(set(splits.select.documents))) < FEW_DOCUMENTS:
            job.notes.append(
                f"the select split has items of {documents} documents only: what it says of a "
                "plan's chance is rough, and plans are chosen with more caution than need be; "
                "give more select items, or more documents"
            )
    _check_budget(recipe, job, size=final)
    if (
        job.recover is not None
        and job.recover.loss == "task"
        and isinstance(job.objective, LabelFree)
    ):
        raise recipe.error(
            ("recover", "loss"),
            f"task needs labels, which the objective {job.objective.name} has none of; write "
            "distill",
        )
    rounds = any(quantizer_of(o) for options in assigned.values() for o in options)
    if rounds and artifact.portable_for(model, recipe.portable) and not loads_packed(model):
        raise recipe.error(
            ("model",),
            f"transformers cannot load {type(model).__name__} with packed layers (it initialises "
            "their weights by name); write portable: false, for a folder that curvprune.load "
            "reads",
        )
    return job


# ----------------------------------------------------------------------------------- removing units

_REMOVED = "structured/removed.json"


def _structured(recipe: Recipe) -> Structured | None:
    if recipe.structured is None:
        return None
    asked = recipe.structured.model_dump(exclude_none=True)
    # Layers that read what is left must still fit the patterns and groups that they are offered.
    options = [option for entry in recipe.compress for option in entry.options]
    steps = [p.nm[1] for p in map(pruner_of, options) if p is not None and p.nm is not None]
    if recipe.portable:
        steps += [
            q.group_size
            for q in map(quantizer_of, options)
            if q is not None and q.group_size is not None
        ]
    if steps:
        asked.setdefault("round_to", math.lcm(8, *steps))
    try:
        return Structured(**asked)
    except ValueError as error:
        raise recipe.error(("structured",), str(error)) from error


def _offered(recipe: Recipe, job: Job, asked: Structured) -> dict[str, dict[str, Any]]:
    """The cuts and their widths; whatever is wrong with what was asked is found here."""
    try:
        found, _, widths, _ = offered_widths(job.model, job.objective, job.splits, asked)
    except ValueError as error:
        raise recipe.error(("structured",), str(error)) from error
    return {
        n: {"kind": cut.kind, "units": cut.units, "widths": widths[n]}
        for n, cut in found.cuts.items()
    }


def _without_units(recipe: Recipe, job: Job, asked: Structured) -> tuple[nn.Module, dict[str, Any]]:
    """Stage *remove units*: the smaller model, written to ``state/structured`` and read from there,
    and what is gone. Of several processes the first removes them."""
    folder = job.state.path("structured/model")
    if job.state.writes and not job.state.has(_REMOVED):
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        with job.stages.stage("remove units", 1) as advance:
            try:
                pruned = prune_units(
                    job.model, job.objective, job.splits, asked, seed=job.settings.seed
                )
            except ValueError as error:
                raise recipe.error(("structured",), str(error)) from error
            why = describe(job.model, pruned.model, pruned.uniform_widths(), pruned.dropped)
            write_model(folder, pruned.model, {}, {})
            advance(1)
        notes = (*pruned.notes, *([why] if why is not None else []))
        job.state.write_json(_REMOVED, _removed_record(replace(pruned, notes=notes)))
    distributed.wait()
    return load_artifact(folder, device=next(job.model.parameters()).device), job.state.read_json(
        _REMOVED
    )


def _removed_record(pruned: Pruned) -> dict[str, Any]:
    cuts = {
        n: {"kind": pruned.kinds[n], "left": w, "of": pruned.units[n]}
        for n, w in pruned.left.items()
    }
    shares = [
        f"{1 - after / before:.1%} of the {of}" for of, (before, after) in _work(pruned).items()
    ]
    timed = {} if pruned.latency is None else {"latency_seconds": list(pruned.latency)}
    predicted = pruned.predicted
    cost = (
        ""
        if predicted is None
        else f", predicted to cost {predicted.value:.4g} ± {predicted.stderr:.2g} nats"
    )
    gone = sum(pruned.units[n] - left for n, left in pruned.left.items())
    return {
        "cuts": cuts,
        **{of: list(both) for of, both in _work(pruned).items()},
        **timed,
        "predicted": None if predicted is None else predicted.value,
        "predicted_stderr": None
        if predicted is None or not np.isfinite(predicted.stderr)
        else predicted.stderr,
        "notes": [
            f"{gone} units of {len(cuts)} cuts were removed first: {' and '.join(shares)}{cost}",
            *pruned.notes,
        ],
    }


def _work(pruned: Pruned) -> dict[str, tuple[int, int]]:
    return {"multiply-adds": pruned.macs, "parameters": pruned.parameters}


def _device(recipe: Recipe) -> torch.device:
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.shared():
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise recipe.error(
            ("device",), f"{name!r} cannot be used here ({error}); write auto or cpu"
        ) from error
    return torch.device(name)


def _load_model(recipe: Recipe) -> tuple[nn.Module, Any]:
    section = recipe.model
    gguf = None
    try:
        if section.package is not None:
            source: str | Path = models.package_folder(section.package)
            if section.folder is not None:
                source = Path(source) / section.folder
            gguf = section.file
            if gguf is not None and not (Path(source) / gguf).is_file():
                raise ValueError(f"package {section.package} has no file {gguf!r} in {source}")
        elif section.path is not None:
            source = Path(section.path)
            if not source.is_dir():
                raise ValueError(
                    f"{source} is not a folder; make it first (examples/ has scripts) or correct "
                    "the path"
                )
        else:
            assert section.name is not None
            source = section.name
        model = models.load_model(
            source,
            task=section.task,
            dtype=section.dtype,
            gguf_file=gguf,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        tokenizer = None
        if section.task != "image-classification" and recipe.data.source != "digits":
            tokenizer = models.load_tokenizer(
                source, gguf_file=gguf, trust_remote_code=section.trust_remote_code
            )
    except (ValueError, OSError) as error:
        raise recipe.error(("model",), str(error)) from error
    return model, tokenizer


def _load_data(recipe: Recipe, tokenizer: Any) -> Splits:
    section = recipe.data
    counts = {purpose: getattr(section, purpose) for purpose in (*PURPOSES, EXTRA)}
    try:
        if section.source == "digits":
            return sources.digits_splits(counts=counts, seed=recipe.seed)
        if section.source == "python-docs":
            documents = sources.python_docs()
        elif section.source == "text":
            documents = sources.text_files([Path(f) for f in section.files])
        else:
            assert (
                section.name is not None
                and section.split is not None
                and section.column is not None
            )
            documents = sources.hub_documents(
                section.name, split=section.split, column=section.column
            )
        tokens = {
            n: tokenizer(text, add_special_tokens=False)["input_ids"]
            for n, text in documents.items()
            if text
        }
        return sources.text_splits(
            tokens, length=section.sequence_length, counts=counts, seed=recipe.seed
        )
    except ValueError as error:
        raise recipe.error(("data",), str(error)) from error


def _objective(recipe: Recipe, model: nn.Module, splits: Splits) -> Objective:
    try:
        batch = to_device(splits.calibrate.items[0], next(model.parameters()).device)
        return make_objective(recipe.objective, model, batch)
    except ValueError as error:
        raise recipe.error(("objective",), str(error)) from error


def _budget(recipe: Recipe) -> Budget | None:
    """The budget with the tables of its own limits read."""
    if recipe.budget is None:
        return None
    limits = []
    for index, limit in enumerate(recipe.budget.limits):
        key = ("budget", "limits", index, "table")
        try:
            table = json.loads(Path(limit.table).read_text(encoding="utf-8"))
            use = {
                (layer, option): float(v)
                for layer, values in table.items()
                for option, v in values.items()
            }
            limits.append(Limit(name=limit.name, most=limit.most, use=use))
        except OSError as error:
            raise recipe.error(
                key, f"{limit.table} cannot be read ({error.strerror}); expected a JSON file"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            expected = 'expected JSON such as {"model.layers.0.mlp.up_proj": {"keep": 0.8, "int4-g64-sym": 0.3}}'
            raise recipe.error(key, f"{limit.table}: {error}; {expected}") from None
    return Budget(**recipe.budget.model_dump(exclude={"limits"}), limits=tuple(limits))


def _check_budget(recipe: Recipe, job: Job, *, size: bool) -> None:
    if job.budget is None:
        return
    if job.budget.metric == "accuracy" and job.objective.measure == "nats/token":
        raise recipe.error(
            ("budget", "metric"),
            "accuracy needs one prediction per item; for language models write loss",
        )
    try:
        limit_plans(job)
    except Infeasible as error:
        if not size:  # the smaller model may meet it
            return
        where = (
            error.constraint if error.constraint in SIZES else "limits"
        )  # the line of the limit, or of the list
        raise recipe.error(("budget", where), str(error)) from error
    except ValueError as error:
        raise recipe.error(("budget", "limits"), str(error)) from error


# -------------------------------------------------------------------------------- a run's own files


def _sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256(lock_text(recipe, {}).encode()).hexdigest()


def _finished(recipe: Recipe, root: State) -> dict[str, Any] | None:
    """The record of a run of this very recipe that has ended, without loading the model."""
    if not (root.has("state/done.json") and root.has(REPORT_JSON) and root.has("model")):
        return None
    if root.read_json("state/done.json")["recipe"] != _fingerprint(recipe):
        return None
    record: dict[str, Any] = root.read_json(REPORT_JSON)
    return record


def _run_to_reuse(recipe: Recipe, folder: Path) -> State:
    """The run in ``folder``, if all that it has solved and priced is the same under this recipe."""
    source = State(folder)
    if not (source.has(LOCK) and source.has(INPUTS) and source.has("state/solved")):
        raise RecipeError(
            f"{folder} holds no run that has solved options: there is nothing to reuse"
        )
    free: Any = {
        **dict.fromkeys(MAY_DIFFER, True),
        "data": {EXTRA},
    }  # what a recovery trains on solves nothing
    before, now = (
        r.model_dump(mode="json", exclude=free) for r in (load_recipe(source.path(LOCK)), recipe)
    )
    if changed := [key for key in now if now[key] != before[key]]:
        raise recipe.error(
            (changed[0],),
            f"{changed[0]} is not that of the run in {folder}, whose results would not fit; only "
            f"{', '.join(MAY_DIFFER)} may differ, otherwise run without --reuse",
        )
    return source


def _claim(recipe: Recipe, root: State, about: Mapping[str, Any], source: State | None) -> None:
    """Write the lock and take over the state of ``source``; or refuse a folder, this or that one,
    that holds a run of other inputs: its intermediate results would not fit."""
    inputs = {
        "recipe_sha256": about["recipe_sha256"],
        "model_sha256": about["model_sha256"],
        "data_sha256": about["data_sha256"],
        "curvprune": curvprune.__version__,
        "torch": str(torch.__version__),
        "device": about["device"],
        **({"limits_sha256": about["limits_sha256"]} if about["limits_sha256"] else {}),
    }
    if root.has(INPUTS):
        before = root.read_json(INPUTS)
        if changed := [k for k in inputs if before.get(k) != inputs[k]]:
            raise RecipeError(
                f"{root.folder} holds a run with another {', '.join(changed)}; "
                "give --out a new folder, or delete that one to start again"
            )
        return
    state = root.path("state")
    if any(f.is_file() and f.suffix != ".tmp" for f in state.rglob("*")):
        raise RecipeError(
            f"{state} holds results of an unknown run; delete it, or give --out a new folder"
        )
    if source is not None:
        theirs = source.read_json(INPUTS)
        before, now = _solved_from(theirs), _solved_from(inputs)
        if changed := [k for k in now if before.get(k) != now[k]]:
            raise RecipeError(
                f"{source.folder} holds a run with another {', '.join(changed)}, whose results "
                "would not fit; run without --reuse"
            )
    new = root.path(".state.new")
    shutil.rmtree(new, ignore_errors=True)  # what an interrupted copy left
    if source is not None:
        shutil.copytree(source.path("state"), new, copy_function=_link, ignore=_not_reused)
        same_items = theirs["data_sha256"].get(EXTRA) == inputs["data_sha256"].get(EXTRA)
        if (
            recipe.recover is not None
            and recipe.recover == load_recipe(source.path(LOCK)).recover
            and same_items
        ):
            _take_recovered(source, new)
    State(new).write_json(Path(INPUTS).name, inputs)
    root.write_text(
        LOCK, lock_text(recipe, {**inputs, **versions(), "python": platform.python_version()})
    )
    shutil.rmtree(state, ignore_errors=True)
    new.rename(state)  # results never lie there without the inputs that they are of


def _solved_from(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's inputs, what its solved options, prices and trials depend on: not its budget, nor
    what a recovery trains on."""
    kept = {k: v for k, v in inputs.items() if k not in ("recipe_sha256", "limits_sha256")}
    return {**kept, "data_sha256": {k: v for k, v in inputs["data_sha256"].items() if k != EXTRA}}


# What depends on more than the layers' options and the data.
_not_reused = shutil.ignore_patterns(
    "applied", "certify", "curvature", "done.json", "inputs.json", EARLIER, ".*.tmp"
)


def _take_recovered(source: State, new: Path) -> None:
    """The plans that a run has applied and recovered, which is most of its time, for one with the
    same recovery: what they lost on select says how far its own may go, and they may be certified
    for its budget."""
    plans = []
    for folder in sorted(source.path("state/applied").glob("*")):
        written = folder / "model"
        if (written / "complete").exists():
            shutil.copytree(
                folder, new / "applied" / folder.name, copy_function=_link, ignore=_not_applied
            )
            plans.append(State(written).read_json(artifact.MANIFEST)["plan"]["choices"])
    State(new).write_json(EARLIER, plans)


_not_applied = shutil.ignore_patterns("model", ".*.tmp")


def _link(source: str, target: str) -> None:
    """Files in a run's state are replaced, never changed, so two runs can share them."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _publish(folder: Path, root: State) -> None:
    """Put the chosen artifact at ``model/``: a copy beside it, then two renames."""
    final, fresh, old = root.path("model"), root.path(".model.new"), root.path(".model.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("complete"))
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write_prices(job: Job, root: State) -> None:
    assert job.ledger is not None and job.analysis is not None
    root.write_json(LEDGER, job.ledger.to_dict())
    root.write_json(ANALYSIS, job.analysis.to_dict())


def _result(root: State, record: dict[str, Any]) -> RunResult:
    verdict = record.get("verdict")
    return RunResult(
        exit_code=0 if verdict is None or verdict["status"] == "CERTIFIED" else 1,
        folder=root.folder,
        record=record,
    )


# --------------------------------------------------------------------------------------- the record


def _record(
    job: Job, about: Mapping[str, Any], trials: list[dict[str, Any]], root: State
) -> dict[str, Any]:
    model = job.uncompressed
    on_disk = artifact.state_dict_on_disk(model, find_layers(model), {})
    before = sum(t.numel() * t.element_size() for t in on_disk.values())
    size: dict[str, Any] = {
        "before_bytes": before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if job.plan is not None:
        after = artifact.weights_file(root.path("model")).stat().st_size
        size |= {
            "after_bytes": after,
            "folder_bytes": artifact.folder_bytes(root.path("model")),
            "ratio": after / before,
        }
    ledger = None
    if job.ledger is not None:
        ledger = {
            k: v for k, v in job.ledger.to_dict().items() if k not in ("sums", "count", "along")
        }
    return {
        "title": about["title"],
        "objective": job.objective.name,
        "measure": job.objective.measure,
        "budget": None if job.budget is None else job.budget.to_dict(),
        "verdict": None if job.verdict is None else job.verdict.to_dict(),
        "measured": job.record.get("measured"),
        "items": job.record.get("items"),
        "attempts": job.record.get("attempts", []),
        "limits": _limits(job),
        "corrections": job.factors,
        "together": job.record.get("together", []),
        "recoveries": job.record.get("recoveries", []),
        "size": size,
        **({"structured": about["structured"]} if "structured" in about else {}),
        "layers": _layer_records(job),
        "ledger": ledger,
        "trials": [{k: v for k, v in t.items() if k != "choices"} for t in trials],
        "frontier": _frontier(job),
        "analysis": None if job.analysis is None else job.analysis.to_dict(),
        "stages": job.stages.log,
        "peak_memory_bytes": _peak_memory(),
        "provenance": {
            **{
                k: about[k]
                for k in ("recipe_sha256", "model_sha256", "data_sha256", "device", "seed")
            },
            "curvprune": curvprune.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            **versions(),
        },
        "recipe": root.read_text(LOCK),
        "notes": job.notes,
    }


def _limits(job: Job) -> list[dict[str, Any]]:
    """Every limit of the budget on size and speed, and what the plan uses of it."""
    used = {} if job.plan is None else job.plan.uses
    return [{"name": name, "most": most, "used": used.get(name)} for name, most in job.most.items()]


def _frontier(job: Job) -> list[dict[str, Any]]:
    if job.ledger is None:
        return []
    points = []
    for point in frontier(job.ledger.rows, same_option=job.same_option):
        predicted = job.ledger.predict(point.choices)
        points.append(
            {
                "bytes": point.bytes + job.fixed_bytes,
                "predicted": predicted.value,
                "predicted_stderr": predicted.stderr if np.isfinite(predicted.stderr) else None,
            }
        )
    return points


def _layer_records(job: Job) -> list[dict[str, Any]]:
    if job.plan is None:
        return []
    records = []
    group_of = {name: group for group in job.groups for name in group}
    for name, layer in job.layers.items():
        key = job.plan.choices[name]
        size = job.layer_bytes(name, option_from_key(key))
        row = None if job.ledger is None else job.ledger.layer_rows(name)[key]
        solved = job.solved.get(name)
        records.append(
            {
                "name": name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "parameters": layer.numel,
                "option": key,
                "bytes": size,
                "bits": 8 * size / layer.numel,
                "price": None if row is None else row.price,
                "stderr": None if row is None or not np.isfinite(row.stderr) else row.stderr,
                "damping": None if solved is None else solved.damping,
                "reason": _reason(job, name, group_of[name], key),
                "notes": [] if solved is None else list(solved.notes),
            }
        )
    return records


def _reason(job: Job, name: str, group: tuple[str, ...], key: str) -> str:
    """Why a layer got its option: what the next smaller and the next larger one would have cost and
    saved, for all the layers that share it."""
    if len(job.options[name]) == 1:
        return "the only option offered"
    assert job.ledger is not None
    size: dict[str, int] = {}
    price: dict[str, float] = {}
    for member in group:
        for option, row in job.ledger.layer_rows(member).items():
            size[option] = size.get(option, 0) + row.bytes
            price[option] = price.get(option, 0.0) + row.price
    parts = []
    smaller = [option for option in size if size[option] < size[key]]
    larger = [option for option in size if size[option] > size[key]]
    if smaller:
        o = max(smaller, key=lambda option: size[option])
        parts.append(
            f"{o} would save {size[key] - size[o]:,} bytes for {price[o] - price[key]:+.2g} nats"
        )
    if larger:
        o = min(larger, key=lambda option: size[option])
        parts.append(
            f"{o} would spend {size[o] - size[key]:,} bytes for {price[o] - price[key]:+.2g} nats"
        )
    others = ", ".join(member.rpartition(".")[2] for member in group if member != name)
    return (f"shared with {others}, together: " if others else "") + "; ".join(parts)


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes (Linux reports KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------- estimates


def _estimate(
    job: Job, dense: int, cuts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, float], int]:
    """Minutes per stage and peak bytes, from timing one item forward and backward and solving one
    layer."""
    device = next(job.model.parameters()).device
    item = to_device(job.splits.calibrate.items[0], device)
    forward = _seconds(lambda: _no_grad_loss(job, item))
    probe = sorted(job.layers.values(), key=lambda layer: layer.numel)[len(job.layers) // 2]

    def backward() -> None:
        draws = Draws(labels=1)
        fisher_pass(job.model, job.objective, [item], job.layers, {}, draws=draws)

    both = _seconds(backward)
    changing: list[Option] = [o for o in job.options[probe.name] if not isinstance(o, Keep)]
    moments = Moments(torch.eye(probe.shape[1], device=device).repeat(probe.groups, 1, 1))
    solving = _seconds(lambda: solve_layer(probe, changing, moments)) if changing else 0.0
    share = sum(layer.numel for layer in job.layers.values()) / probe.numel
    s, counts = job.settings, {k: len(getattr(job.splits, k).items) for k in PURPOSES}
    per_option = solving / max(1, len(changing))
    attempts = s.attempts if job.budget is not None else 1
    seconds = {
        "apply": attempts * (2.2 * counts["calibrate"] * forward + share * per_option),
        "certify": (1 + attempts) * counts["certify"] * forward,
    }
    if job.budget is not None:
        seconds |= {
            "solve": 1.6 * counts["calibrate"] * forward + share * solving,
            "price": counts["price"] * (forward + s.labels * max(both - forward, forward)),
            "select": (s.trials + TRIALS_BESIDES) * counts["select"] * forward,
        }
        if s.measure_above is not None:
            # As often as prices are wrong: once, where they are right.
            seconds["measure prices"] = counts["price"] * (1 + MEASURED_TOGETHER) * forward
    # two passes for moments, one for gradients and one for prices, and a few factors for each width
    if cuts:
        widest = max(layer.shape[1] for layer in job.layers.values())
        factor = _seconds(lambda: torch.linalg.cholesky(torch.eye(widest, device=device)))
        passes = counts["calibrate"] * (2.2 * forward + both) + counts["price"] * 2 * both
        seconds["remove units"] = passes + 4 * factor * sum(len(c["widths"]) for c in cuts.values())
        dense *= 2
    if job.recover is not None:
        seconds["recover"] = attempts * _recovery_seconds(
            job.recover, forward, both, counts["select"]
        )
    weights = sum(layer.numel for layer in job.layers.values())
    options = max(len(o) for o in job.options.values())
    # Two models, 16-bit changes and a float32 diagonal, three copies of an evaluation batch's
    # logits, libraries.
    with torch.no_grad():
        logits = job.objective.logits(job.model, item).numel() * job.settings.batch_size
    memory = (
        2 * dense
        + (weights * (2 * options + 4) if job.budget is not None else 0)
        + 12 * logits
        + 500_000_000
    )
    if (
        job.recover is not None
    ):  # values, gradient, two moments and the best state; less, where weights are on a grid
        memory += 20 * sum(p.numel() for p in job.model.parameters())
    return {k: v / 60 for k, v in seconds.items()}, memory


def _recovery_seconds(training: Training, forward: float, both: float, select: int) -> float:
    if training.steps is None:
        assert training.seconds is not None
        return training.seconds
    measuring = math.ceil(training.steps / training.interval) * select * forward
    return min(
        training.seconds or np.inf,
        training.steps * training.batch_size * (both + forward) + measuring,
    )


# parameters: above, rounding a copy of the model takes longer than a check should
POWER_UP_TO = 2_000_000_000
TRIAL_ITEMS = (
    16,
    256,
)  # at least and at most, in between as many as `TRIAL_SECONDS` are enough for
TRIAL_SECONDS = 10.0  # of forward passes, for each of up to four models
ENOUGH_POWER = 0.8


def _power(job: Job) -> tuple[Power | None, list[str]]:
    """The power of the certify split, and what to warn of."""
    budget = job.budget
    if budget is None or budget.max_drop is None:
        return None, []
    parameters = sum(p.numel() for p in job.model.parameters())
    if parameters > POWER_UP_TO:
        return None, [
            f"whether the certify split can decide was not estimated: {parameters:,} parameters "
            "to round"
        ]
    try:
        power = _measure_power(job, budget)
    except ValueError as error:
        return None, [f"whether the certify split can decide could not be estimated: {error}"]
    if power.chance >= ENOUGH_POWER:
        return power, []
    return power, [
        f"the certify split ({power.items} items of {power.documents} documents) is unlikely to "
        f"decide max_drop: {budget.max_drop:g}: even a model without any true loss would be "
        f"certified with probability {power.chance:.0%} only; write certify: {power.needed} or "
        "more (in more documents), or a larger max_drop"
    ]


def _measure_power(job: Job, budget: Budget) -> Power:
    """Round layers to nearest, at the level of options whose drop on the select split comes nearest
    to half the budget in three trials, and see how much the items' differences scatter."""
    assert budget.max_drop is not None
    select, certify = job.splits.select, job.splits.certify
    item = to_device(select.items[0], next(job.model.parameters()).device)
    affordable = int(TRIAL_SECONDS / max(_seconds(lambda: _no_grad_loss(job, item)), 1e-6))
    used = min(max(affordable, TRIAL_ITEMS[0]), TRIAL_ITEMS[1])
    split = Split(items=select.items[:used], documents=select.documents[:used])
    size = job.settings.batch_size
    baseline = evaluate(job.model, split.batches(size), job.objective)
    ordered = {
        n: sorted(o, key=lambda option: -job.layer_bytes(n, option)) for n, o in job.options.items()
    }
    levels = max(len(options) for options in ordered.values())
    model = copy.deepcopy(job.model)
    own = find_layers(model)
    low, high, target, tried = 0, levels - 1, budget.max_drop / 2, []
    for _ in range(3):
        level = (low + high) // 2
        for name, options in ordered.items():
            option = options[level * len(options) // levels]
            own[name].write_(solve_layer(job.layers[name], [option], None)[0].weight)
        results = evaluate(model, split.batches(size), job.objective)
        verdict = compare(baseline, results, split, budget, measure=job.objective.measure)
        tried.append((abs(verdict.drop - target), verdict, results))
        low, high = (low, level - 1) if verdict.drop > target else (level + 1, high)
        if low > high:
            break
    _, verdict, results = min(tried, key=lambda trial: trial[0])
    items, documents = len(certify.items), len(set(certify.documents))
    # The scatter of small differences grows with the change of the weights, their mean with its
    # square.
    milder = min(1.0, (target / verdict.drop) ** 0.5) if verdict.drop > 0 else 1.0
    if budget.metric == "accuracy":
        differ = int(((baseline.correct > 0.5) != (results.correct > 0.5)).sum())
        # One more than were seen: no disagreement among few items does not mean that there is none.
        share = milder * (differ + 1) / (len(baseline.correct) + 1)
        cost = design_effect(certify.documents)
        limits = {"max_drop": budget.max_drop, "confidence": budget.confidence}
        return Power(
            items=items,
            documents=documents,
            trial_drop=verdict.drop,
            chance=power_for_accuracy(items / cost, share, **limits),
            needed=int(np.ceil(cost * items_needed_for_accuracy(share, **limits))),
            disagreement=share,
        )
    shrink = milder * (len(set(split.documents)) / documents) ** 0.5
    stderr, reach = verdict.stderr * shrink, (verdict.bound - verdict.drop) * shrink
    chance = probability_of_certifying(
        0.0, 0.0, stderr, max_drop=budget.max_drop, confidence=budget.confidence, reach=reach
    )
    wanted = (
        np.inf
        if budget.max_drop == 0
        else items * ((reach + 0.8416 * stderr) / budget.max_drop) ** 2
    )
    if not np.isfinite(wanted):
        raise ValueError("max_drop: 0 can only be met by a model that is better")
    return Power(
        items=items,
        documents=documents,
        trial_drop=verdict.drop,
        chance=chance,
        needed=max(2, int(np.ceil(wanted))),
        disagreement=None,
    )


def _no_grad_loss(job: Job, item: Any) -> None:
    with torch.no_grad():
        job.objective.loss(job.model, item)


def _seconds(work: Any) -> float:
    work()
    start = time.monotonic()
    work()
    return time.monotonic() - start
