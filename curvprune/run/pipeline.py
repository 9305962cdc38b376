"""`run` and `analyze`: from a recipe to a certified model and a report.

`solve_and_price` (`curvprune.run.price`) and `choose_and_certify` are the whole road;
`curvprune.compress` goes it too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from curvprune import distributed, report
from curvprune.curvature import AnalysisRecord, AnalysisSettings, analyze_curvature
from curvprune.files import State
from curvprune.model import collate, to_device
from curvprune.places import only_here
from curvprune.record import RunRecord
from curvprune.run.certify import Shipped, apply_and_measure, certify_plans
from curvprune.run.engine_results import view_of
from curvprune.run.folder import (
    ANALYSIS,
    INPUTS,
    check_places,
    finished_record,
    publish,
    publish_view,
    run_to_reuse,
)
from curvprune.run.prepare import Prepared, prepare
from curvprune.run.price import PricedOptions, fisher_analysis, solve_and_price
from curvprune.run.published import as_text, publish_texts
from curvprune.run.recipe import Recipe, load_recipe
from curvprune.run.select import Selection, select_plans
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.run.write_record import (
    Outcome,
    run_record,
    write_prices,
    write_report,
    write_results,
)
from curvprune.schema import decode, encode

R = TypeVar("R")

# Parameters above which a layer's eigenvalues take minutes each on a CPU.
SPECTRA_UP_TO = 30_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a finished run says.

    Attributes:
        exit_code: 0 certified or no budget asked, 1 otherwise.
        record: what the report says; of several processes that worked only the first has one.
    """

    exit_code: int
    folder: Path
    record: RunRecord | None

    @property
    def summary(self) -> str:
        return "" if self.record is None else report.summary(self.record)


# -------------------------------------------------------------------------------------- the road


def choose_and_certify(
    task: Task, space: Workspace, priced: PricedOptions
) -> tuple[Selection, Shipped]:
    """Stages *select*, *apply* and *certify*."""
    selection = select_plans(task, space, priced.prices)
    return selection, certify_plans(task, space, selection)


# -------------------------------------------------------------------------------------- the verbs


def _alone_in(root: State) -> AbstractContextManager[None]:
    """No other job works in the run folder meanwhile; the processes of one job are one job."""
    return only_here(root.folder) if distributed.is_first() else nullcontext()


def run(
    recipe_path: str | Path,
    out: str | Path,
    *,
    progress: bool = True,
    reuse: str | Path | None = None,
) -> RunResult:
    """Run a recipe into the folder ``out``; a second call goes on where the first was interrupted.

    ``reuse`` is the folder of another run of the same recipe. Sections `MAY_DIFFER` of it may
    differ, such as the budget, and so may the items that a recovery trains on. What it has solved,
    priced and measured on the select split is not done again. With the same recovery on the same
    items the plans that it has recovered are candidates too, and tell how far the next may go;
    without, the result is that of a run from scratch. Where ``out`` has already begun, ``reuse`` is
    ignored.

    Of several processes (``torchrun``, one file system) each solves its share of the layers and
    prices its share of the items; the first goes on alone, and only its result has a record.

    Raises ``RecipeError`` before any long computation if the recipe, the model or the data do not
    fit each other or those of ``reuse``, or if ``out`` holds another run.
    """
    # 1. A run that has ended says so without loading the model.
    recipe, root = load_recipe(recipe_path), State(Path(out))
    check_places(root)
    if (record := finished_record(recipe, root)) is not None:
        return _result(root, record)
    with _alone_in(root):
        return _go_on(recipe, root, progress=progress, reuse=reuse)


def _go_on(recipe: Recipe, root: State, *, progress: bool, reuse: str | Path | None) -> RunResult:
    """A run from where it was interrupted, or from the start."""
    source = None
    if reuse is not None and not root.has(INPUTS):
        source = run_to_reuse(recipe, Path(reuse))

    # 2. What several processes share.
    priced = selection = None
    with distributed.together():
        first = distributed.rank() == 0
        root = replace(root, writes=first)
        prepared = prepare(recipe, root, progress=progress and first, reused=source)
        task, space = prepared.task, prepared.space
        if task.budget is not None:
            priced = solve_and_price(task, space)
            write_prices(priced, root)
    if not first:
        return RunResult(exit_code=0, folder=root.folder, record=None)

    # 3. The plan, the model and the verdict.
    if priced is None:
        only = {name: options[0].key for name, options in task.options.items()}
        shipped = apply_and_measure(task, space, only)
    else:
        selection, shipped = choose_and_certify(task, space, priced)
    publish(shipped.folder, root)
    if task.target.name == "gguf":
        publish_view(view_of(task, shipped.folder), root)
    outcome = Outcome(priced=priced, selection=selection, shipped=shipped)
    record = run_record(prepared, outcome, root)
    write_results(recipe, root, prepared, record, shipped)
    return _result(root, record)


def analyze(recipe_path: str | Path, out: str | Path, *, progress: bool = True) -> RunResult:
    """Curvature and sensitivities only: writes ``analysis.json``, ``ledger.json`` and a report;
    `run` goes on from there.

    Several processes (``torchrun``, one file system) share the layers and the data; only the first
    one's result has a record.
    """
    recipe, root = load_recipe(recipe_path), State(Path(out))
    check_places(root)
    if (record := finished_record(recipe, root)) is not None:
        return _result(root, record)
    with _alone_in(root):
        return _analyze(recipe, root, progress=progress)


def _analyze(recipe: Recipe, root: State, *, progress: bool) -> RunResult:
    with distributed.together():
        first = distributed.rank() == 0
        root = replace(root, writes=first)
        prepared = prepare(recipe, root, progress=progress and first, priced=True)
        priced = solve_and_price(prepared.task, prepared.space)
        analysis = priced.analysis or fisher_analysis(prepared.task, prepared.space)
        write_prices(priced, root)
        curvature = _curvature(prepared, recipe)
    if not first:
        return RunResult(exit_code=0, folder=root.folder, record=None)
    fisher = analysis.to_dict()
    publish_texts(root, {ANALYSIS: as_text({**encode(curvature), "fisher": fisher})})
    record = run_record(prepared, Outcome(priced=priced, curvature=curvature), root)
    write_report(root, record)
    return RunResult(exit_code=0, folder=root.folder, record=record)


# ------------------------------------------------------------------------------------- curvature


def _curvature(prepared: Prepared, recipe: Recipe) -> AnalysisRecord:
    """Second-order curvature of the model to compress on the first price items; finished parts are
    not repeated."""
    task, space, section = prepared.task, prepared.space, recipe.analyze
    parameters = sum(p.numel() for p in task.model.parameters())
    spectra = section.spectra
    if spectra is None:
        spectra = parameters <= SPECTRA_UP_TO
    quantities = ["trace", "diagonal"]
    if spectra:
        quantities += ["eigenvalues", "density"]
    items = task.splits.price.items[: section.items]
    device = next(task.model.parameters()).device
    size, batches = task.settings.batch_size, []
    for start in range(0, len(items), size):
        batches.append(to_device(collate(items[start : start + size]), device))
    asked = AnalysisSettings(
        matrix=section.matrix,
        quantities=tuple(quantities),
        rtol=section.rtol,
        max_products=section.max_products,
        seed=recipe.seed,
        vector_bytes=int(section.vector_gb * 1e9),
    )
    with space.log.steps() as advance:
        analysis = analyze_curvature(
            task.model,
            task.objective,
            batches,
            task.layers,
            asked,
            advance=advance,
            remember=partial(_remember, space.state),
        )
    record = analysis.to_record()
    if spectra or section.spectra is False:
        return record
    left_out = (
        f"eigenvalues and spectral density were left out ({parameters} parameters); "
        "write analyze: {spectra: true} for them"
    )
    return replace(record, notes=(*record.notes, left_out))


def _remember(state: State, key: str, kind: type[R], compute: Callable[[], R]) -> R:
    """A part of an analysis: read if an earlier run finished it, else computed and written.

    Of several processes the first one's view of the folder counts, because all must compute
    together or not at all.
    """
    name = f"curvature/{key}.json"
    if distributed.first_says(state.has(name)):
        return decode(kind, state.read_json(name), source=str(state.path(name)))
    value = compute()
    state.write_json(name, encode(value, kind))
    return value


def _result(root: State, record: RunRecord) -> RunResult:
    verdict = record.verdict
    passed = verdict is None or verdict.status == "CERTIFIED"
    return RunResult(exit_code=0 if passed else 1, folder=root.folder, record=record)
