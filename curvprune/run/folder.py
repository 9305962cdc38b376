"""A run's folder: which files it has, whose run it holds, and what another run may take over."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import curvprune
from curvprune import artifact
from curvprune.compat import versions
from curvprune.files import State
from curvprune.planning import OF_OUTPUTS, Budget
from curvprune.record import RunRecord
from curvprune.run.recipe import Recipe, load_recipe, lock_text
from curvprune.run.recipe_errors import RecipeError
from curvprune.schema import Json, decode, encode

LOCK, ANALYSIS, LEDGER = "recipe.lock.yaml", "analysis.json", "ledger.json"
PLAN, VERDICT = "plan.json", "verdict.json"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
MODEL, STATE = "model", "state"
INPUTS, FINISHED = "state/inputs.json", "state/done.json"
EARLIER = "earlier.json"  # in the state: plans that a reused run has recovered
RECOVER = "recover"  # the split that only a recovery sees
# Sections that may differ from those of a run that is reused.
MAY_DIFFER = ("title", "budget", "search", "recover", "same_option", "analyze")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run's results depend on."""

    recipe_sha256: str
    model_sha256: str
    data_sha256: dict[str, str]
    curvprune: str
    torch: str
    device: str
    limits_sha256: str | None = None
    # Sums are split among threads: with another number of them the last bits differ.
    threads: int | None = None

    @staticmethod
    def of(
        recipe: Recipe,
        *,
        model_sha256: str,
        data_sha256: Mapping[str, str],
        budget: Budget | None,
        device: str,
    ) -> Inputs:
        tables = None
        if budget is not None and budget.limits:
            tables = sha256_of([limit.to_dict() for limit in budget.limits])
        return Inputs(
            recipe_sha256=fingerprint(recipe),
            model_sha256=model_sha256,
            data_sha256=dict(data_sha256),
            curvprune=curvprune.__version__,
            torch=str(torch.__version__),
            device=device,
            limits_sha256=tables,
            threads=torch.get_num_threads(),
        )

    def to_json(self) -> dict[str, Json]:
        found: dict[str, Json] = encode(self)
        return {key: value for key, value in found.items() if value is not None}

    def differences(self, other: Inputs) -> list[str]:
        """Names of what differs, but for the number of threads."""
        ours, theirs = self.to_json(), other.to_json()
        return [key for key in ours if key != "threads" and theirs.get(key) != ours[key]]

    def solved_differences(self, other: Inputs) -> list[str]:
        """Of what solved options, prices and trials depend on: not the budget, nor what a recovery
        trains on."""
        ours, theirs = self._of_solving(), other._of_solving()
        return [key for key in ours if theirs.get(key) != ours[key]]

    def _of_solving(self) -> dict[str, Json]:
        others = ("recipe_sha256", "limits_sha256", "threads")  # of the budget, of the last bits
        found = {key: value for key, value in self.to_json().items() if key not in others}
        shared = {name: value for name, value in self.data_sha256.items() if name != RECOVER}
        return {**found, "data_sha256": dict(shared)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRecord:
    """Written last: the recipe whose run has ended."""

    recipe: str


def sha256_of(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(recipe: Recipe) -> str:
    """Hash of a recipe with every default written out."""
    return hashlib.sha256(lock_text(recipe, {}).encode()).hexdigest()


def read_inputs(root: State) -> Inputs:
    return decode(Inputs, root.read_json(INPUTS), source=str(root.path(INPUTS)))


def about_threads(inputs: Inputs, root: State) -> list[str]:
    """What to say where another number of threads has begun the run, which is then that of one
    without an interruption but for the last bits."""
    begun = read_inputs(root).threads
    if begun in (None, inputs.threads):
        return []
    return [
        f"the run began with {begun} threads and went on with {inputs.threads}: sums may differ in "
        f"their last bits from those of a run in one go; set OMP_NUM_THREADS={begun} to avoid it"
    ]


def read_report(root: State) -> RunRecord:
    """The record in ``report.json``. Raises ``ValueError`` if a folder holds no run."""
    if not root.has(REPORT_JSON):
        raise ValueError(
            f"{root.folder} has no {REPORT_JSON}: run `curvprune run RECIPE --out {root.folder}` "
            "(or analyze) first"
        )
    return RunRecord.from_json(root.read_json(REPORT_JSON), source=str(root.path(REPORT_JSON)))


def finished_record(recipe: Recipe, root: State) -> RunRecord | None:
    """The record of a run of this very recipe that has ended, without loading the model."""
    if not (root.has(FINISHED) and root.has(REPORT_JSON) and root.has(MODEL)):
        return None
    written = root.read_json(FINISHED)
    ended = decode(FinishedRecord, written, source=str(root.path(FINISHED)))
    if ended.recipe != fingerprint(recipe):
        return None
    return read_report(root)


def check_places(root: State) -> None:
    """Refuse at once a run folder in which something else has the name of what a run writes."""
    if root.folder.exists() and not root.folder.is_dir():
        raise RecipeError(f"{root.folder} is a file; give --out a folder")
    for name in (MODEL, STATE):
        _check_place(root.folder / name, folder=True)
    for name in (LOCK, ANALYSIS, LEDGER, PLAN, VERDICT, REPORT_JSON, REPORT_HTML):
        _check_place(root.folder / name, folder=False)


def _check_place(path: Path, *, folder: bool) -> None:
    wanted = "a folder" if folder else "a file"
    if path.is_symlink():
        raise RecipeError(
            f"{path} is a link, where the run writes {wanted}; remove it, or give --out a new "
            "folder"
        )
    fits = path.is_dir() if folder else path.is_file()
    if path.exists() and not fits:
        raise RecipeError(
            f"{path} is not {wanted}, which the run writes there; move it, or give --out a new "
            "folder"
        )


def state_bytes(root: State) -> int:
    """Bytes of the intermediate results of a run."""
    files = [path for path in root.path(STATE).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def publish(folder: Path, root: State) -> None:
    """Put the chosen artifact at ``model/``: a copy beside it, then two renames."""
    final, fresh, old = root.path(MODEL), root.path(".model.new"), root.path(".model.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("complete"))
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------- whose folder


def run_to_reuse(recipe: Recipe, folder: Path) -> State:
    """The run in ``folder``, if all that it has solved and priced is the same under this recipe."""
    source = State(folder)
    if not (source.has(LOCK) and source.has(INPUTS) and source.has("state/solved")):
        raise RecipeError(
            f"{folder} holds no run that has solved options: there is nothing to reuse"
        )
    before, now = _what_solving_reads(load_recipe(source.path(LOCK))), _what_solving_reads(recipe)
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        raise recipe.error(
            (changed[0],),
            f"{changed[0]} is not that of the run in {folder}, whose results would not fit; only "
            f"{', '.join(MAY_DIFFER)} may differ, otherwise run without --reuse",
        )
    if _judged_loss(load_recipe(source.path(LOCK))) != _judged_loss(recipe):
        raise recipe.error(
            ("budget", "metric"),
            f"the run in {folder} measured another loss, which its budget was of; run without "
            "--reuse",
        )
    return source


def _judged_loss(recipe: Recipe) -> str:
    """Which loss prices and trials are of: metrics of outputs have one of their own."""
    metric = "loss" if recipe.budget is None else recipe.budget.metric
    return "divergence" if metric in OF_OUTPUTS else "loss"


def _what_solving_reads(recipe: Recipe) -> dict[str, object]:
    """The sections that solved options and prices depend on."""
    sections = recipe.model_dump(mode="json", exclude=set(MAY_DIFFER))
    sections["data"].pop(RECOVER)  # what a recovery trains on solves nothing
    return sections


def claim(recipe: Recipe, root: State, inputs: Inputs, source: State | None) -> None:
    """Write the lock and take over the state of ``source``; or refuse a folder, this or that one,
    that holds a run of other inputs: its intermediate results would not fit."""
    # 1. A folder that has begun goes on, if it is the same run.
    if root.has(INPUTS):
        changed = inputs.differences(read_inputs(root))
        if changed:
            raise RecipeError(
                f"{root.folder} holds a run with another {', '.join(changed)}; "
                "give --out a new folder, or delete that one to start again"
            )
        return
    state = root.path(STATE)
    if any(file.is_file() and file.suffix != ".tmp" for file in state.rglob("*")):
        raise RecipeError(
            f"{state} holds results of an unknown run; delete it, or give --out a new folder"
        )
    # 2. What is taken over, beside it.
    new = root.path(".state.new")
    if source is not None:
        _check_inputs(inputs, source)
    shutil.rmtree(new, ignore_errors=True)  # what an interrupted copy left
    if source is not None:
        _take_over(recipe, inputs, source, new)
    # 3. Results never lie there without the inputs that they are of: one rename.
    State(new).write_json(Path(INPUTS).name, inputs.to_json())
    resolved = {**inputs.to_json(), **versions(), "python": platform.python_version()}
    root.write_text(LOCK, lock_text(recipe, resolved))
    shutil.rmtree(state, ignore_errors=True)
    new.rename(state)


def _check_inputs(inputs: Inputs, source: State) -> None:
    changed = inputs.solved_differences(read_inputs(source))
    if changed:
        raise RecipeError(
            f"{source.folder} holds a run with another {', '.join(changed)}, whose results would "
            "not fit; run without --reuse"
        )


def _take_over(recipe: Recipe, inputs: Inputs, source: State, new: Path) -> None:
    """Everything in a run's state that depends on the layers' options and the data alone, and of
    the same recovery on the same items what that made."""
    shutil.copytree(source.path(STATE), new, copy_function=_link, ignore=_not_reused)
    theirs = read_inputs(source).data_sha256.get(RECOVER)
    same_items = theirs == inputs.data_sha256.get(RECOVER)
    recovery = recipe.recover
    if recovery is None or not same_items:
        return
    if recovery == load_recipe(source.path(LOCK)).recover:
        _take_recovered(source, new)


# What depends on more than the layers' options and the data.
_not_reused = shutil.ignore_patterns(
    "applied", "certify", "curvature", "done.json", "inputs.json", EARLIER, ".*.tmp"
)
_not_applied = shutil.ignore_patterns("model", ".*.tmp")


def _take_recovered(source: State, new: Path) -> None:
    """The plans that a run has applied and recovered, which is most of its time: what they lost on
    select says how far this one may go, and they may be certified for its budget."""
    plans = []
    for folder in sorted(source.path("state/applied").glob("*")):
        written = folder / "model"
        if not (written / "complete").exists():
            continue
        target = new / "applied" / folder.name
        shutil.copytree(folder, target, copy_function=_link, ignore=_not_applied)
        plans.append(State(written).read_json(artifact.MANIFEST)["plan"]["choices"])
    State(new).write_json(EARLIER, plans)


def _link(source: str, target: str) -> None:
    """Files in a run's state are replaced, never changed, so two runs can share them."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
