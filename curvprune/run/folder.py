"""A run's folder: which files it has, whose run it holds, and what another run may take over."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import curvprune
from curvprune import artifact
from curvprune.compat import versions
from curvprune.files import State, sha256_of_file, written_beside
from curvprune.planning import OF_OUTPUTS, Budget
from curvprune.record import RunRecord
from curvprune.run.mend import damaged, mend_
from curvprune.run.published import (
    LIST,
    announce,
    check_listed,
    check_own,
    publish_texts,
    read_list,
    settle,
    start_list,
)
from curvprune.run.recipe import Recipe, load_recipe, lock_text
from curvprune.run.recipe_errors import RecipeError
from curvprune.run.source_files import other_sources, source_files
from curvprune.schema import Json, decode, encode

LOCK, ANALYSIS, LEDGER = "recipe.lock.yaml", "analysis.json", "ledger.json"
PLAN, VERDICT = "plan.json", "verdict.json"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
MODEL, STATE = "model", "state"
VIEW = "model.gguf"  # the artifact once more, for an engine
INPUTS, FINISHED = "state/inputs.json", "done.json"  # the second in the state
NEW_STATE = ".state.new"
# Of the inputs themselves; all else in the state is sealed with what solving depends on.
INPUTS_SEAL = "curvprune"
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
        ours, theirs = self.of_solving(), other.of_solving()
        return [key for key in ours if theirs.get(key) != ours[key]]

    def of_solving(self) -> dict[str, Json]:
        """What solved options, prices and trials depend on."""
        others = ("recipe_sha256", "limits_sha256", "threads")  # of the budget, of the last bits
        found = {key: value for key, value in self.to_json().items() if key not in others}
        shared = {name: value for name, value in self.data_sha256.items() if name != RECOVER}
        # Processes that share a job have a device each.
        kind = self.device.partition(":")[0]
        return {**found, "data_sha256": dict(shared), "device": kind}


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRecord:
    """Written last: the recipe whose run has ended, and the files that it had read."""

    recipe: str
    sources: dict[str, str] = field(default_factory=dict)


def sha256_of(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(recipe: Recipe) -> str:
    """Hash of a recipe with every default written out."""
    return hashlib.sha256(lock_text(recipe, {}).encode()).hexdigest()


def read_inputs(root: State) -> Inputs:
    state, name = State(root.path(STATE), seal=INPUTS_SEAL), Path(INPUTS).name
    try:
        found = state.read_json(name)
    except ValueError as error:
        raise RecipeError(
            f"{root.path(INPUTS)} is damaged: nothing says whose results lie beside it; delete "
            f"{root.path(STATE)} to start again"
        ) from error
    return decode(Inputs, found, source=str(root.path(INPUTS)))


def state_of(recipe: Recipe, root: State, inputs: Inputs) -> State:
    """The run's intermediate results, sealed with what solved options, prices and trials depend on:
    those of another model, data or options are not taken for its own."""
    solved: Json = [_what_solving_reads(recipe), _judged_loss(recipe), inputs.of_solving()]
    return State(root.path(STATE), writes=root.writes, seal=sha256_of(solved))


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
    """The record of a run of this very recipe that has ended, without loading the model: if all
    that it wrote is there and as it was, and so is all that it read.

    Raises ``ValueError`` naming a file of the run that has changed. Cost: 1 to 3 s/GB.
    """
    if not (root.has(INPUTS) and (root.folder / MODEL).is_dir()):
        return None
    state = state_of(recipe, root, read_inputs(root))
    if not state.has(FINISHED):
        return None
    try:
        written = state.read_json(FINISHED)
    except ValueError:  # of another run, or damaged: `claim` says which, or mends it
        return None
    ended = decode(FinishedRecord, written, source=str(state.path(FINISHED)))
    if ended.recipe != fingerprint(recipe) or not check_written(root):
        return None
    if other_sources(ended.sources, source_files(recipe)):
        return None
    return read_report(root)


def check_written(root: State) -> bool:
    """Whether all files that a run has written for its reader are there.

    Raises ``ValueError`` naming one that is not what was written, or of another run.
    """
    whole = check_listed(root)
    verdict, manifest = root.folder / VERDICT, root.folder / MODEL / artifact.MANIFEST
    if read_list(root) is None and (verdict.exists() or manifest.exists()):
        raise RecipeError(
            f"{root.folder} lacks {LIST}, the list of what a run has written there: nothing says "
            "that its files belong together; run the recipe into a new folder"
        )
    if verdict.is_file() and manifest.is_file():
        found = root.read_json(VERDICT)
        of = found.get("of", {}) if isinstance(found, dict) else {}
        if of.get("model") != sha256_of_file(manifest):
            raise RecipeError(
                f"{verdict} is not about the model in {root.folder / MODEL}; delete one of the two "
                "and run again"
            )
    return whole


def check_places(root: State) -> None:
    """Refuse at once a run folder in which something else has the name of what a run writes, or in
    which such a file was not written by a run, or was changed since."""
    if root.folder.exists() and not root.folder.is_dir():
        raise RecipeError(f"{root.folder} is a file; give --out a folder")
    for name in (MODEL, STATE):
        _check_place(root.folder / name, folder=True)
    files = (LOCK, ANALYSIS, LEDGER, PLAN, VERDICT, REPORT_JSON, REPORT_HTML, VIEW)
    for name in (*files, LIST):
        _check_place(root.folder / name, folder=False)
    state, begun = root.folder / STATE, root.has(INPUTS)
    if not begun and _has_results(state):
        raise RecipeError(
            f"{state} holds results of an unknown run; delete it, or give --out a new folder"
        )
    if begun:
        read_inputs(root)
    new = root.folder / NEW_STATE
    if not begun and new.exists() and read_list(root) is None:
        raise RecipeError(f"{new} is in the way; move it elsewhere, or give --out a new folder")
    check_own(root, (*files, MODEL), beside=(LOCK,) if begun else ())


def _has_results(state: Path) -> bool:
    """Whether a folder holds more than what was being written when a process was killed."""
    for path in state.rglob("*"):
        if not path.is_dir() and not (path.name.startswith(".") and path.suffix == ".tmp"):
            return True
    return False


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
    """Put the chosen artifact at ``model/``: a copy beside it, then two renames. Raises
    ``ValueError`` if it is not what was certified any more."""
    artifact.verify(folder)
    manifest = artifact.read_manifest(folder)
    hashes = {f"{MODEL}/{name}": sha256 for name, sha256 in manifest.files.items()}
    own = f"{MODEL}/{artifact.MANIFEST}"
    announce(root, {**hashes, own: sha256_of_file(folder / artifact.MANIFEST)})
    with written_beside(root.path(MODEL), artifact.MANIFEST) as fresh:
        for name in (*manifest.files, artifact.MANIFEST):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, fresh / name)
        artifact.verify(fresh)
    hashes[own] = sha256_of_file(root.path(MODEL) / artifact.MANIFEST)
    settle(root, hashes, instead_of=MODEL)


def publish_view(view: Path, root: State) -> None:
    """Put the file of an engine beside ``model/``: a copy, then one rename."""
    hashes = {VIEW: sha256_of_file(view)}
    announce(root, hashes)
    fresh = root.path(f".{VIEW}.tmp")
    shutil.copyfile(view, fresh)
    fresh.replace(root.path(VIEW))
    settle(root, hashes)


# ---------------------------------------------------------------------------------- whose folder


def run_to_reuse(recipe: Recipe, folder: Path) -> State:
    """The run in ``folder``, if all that it has solved and priced is the same under this recipe."""
    source = State(folder)
    begun = source.has(LOCK) and source.has(INPUTS)
    if not begun or not (source.has("state/solved") or source.has("state/rounds")):
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


def _what_solving_reads(recipe: Recipe) -> dict[str, Json]:
    """The sections that solved options and prices depend on."""
    sections = recipe.model_dump(mode="json", exclude=set(MAY_DIFFER))
    sections["data"].pop(RECOVER)  # what a recovery trains on solves nothing
    return sections


def claim(recipe: Recipe, root: State, inputs: Inputs, source: State | None) -> list[str]:
    """Write the lock and take over the state of ``source``; or refuse a folder, this or that one,
    that holds a run of other inputs: its intermediate results would not fit. Returns the files that
    were damaged, which are gone."""
    # 1. A folder that has begun goes on, if it is the same run.
    if root.has(INPUTS):
        changed = inputs.differences(read_inputs(root))
        if changed:
            raise RecipeError(
                f"{root.folder} holds a run with another {', '.join(changed)}; "
                "give --out a new folder, or delete that one to start again"
            )
        start_list(root)
        return mend_(state_of(recipe, root, inputs), taken_over=EARLIER)
    state = root.path(STATE)
    if source is not None:
        _check_inputs(inputs, source)
        _check_whole(recipe, source)
    # 2. What is taken over, beside it.
    new = root.path(NEW_STATE)
    start_list(root)
    shutil.rmtree(new, ignore_errors=True)  # what an interrupted copy left
    if source is not None:
        _take_over(recipe, inputs, source, new)
    # 3. Results never lie there without the inputs that they are of: one rename.
    State(new, seal=INPUTS_SEAL).write_json(Path(INPUTS).name, inputs.to_json())
    resolved = {**inputs.to_json(), **versions(), "python": platform.python_version()}
    publish_texts(root, {LOCK: lock_text(recipe, resolved)})
    shutil.rmtree(state, ignore_errors=True)
    new.rename(state)
    return []


def _check_inputs(inputs: Inputs, source: State) -> None:
    changed = inputs.solved_differences(read_inputs(source))
    if changed:
        raise RecipeError(
            f"{source.folder} holds a run with another {', '.join(changed)}, whose results would "
            "not fit; run without --reuse"
        )


def _check_whole(recipe: Recipe, source: State) -> None:
    """What is taken over must be what the other run wrote."""
    state = state_of(recipe, source, read_inputs(source))
    for name in damaged(state):
        if not name.startswith(("certify/", "curvature/", FINISHED)):
            raise RecipeError(
                f"{state.folder / name} is damaged; run that recipe into {source.folder} again, "
                "which mends it, or run without --reuse"
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
        _take_recovered(source, replace(state_of(recipe, source, inputs), folder=new))


# What depends on more than the layers' options and the data.
_not_reused = shutil.ignore_patterns(
    "applied", "certify", "curvature", "done.json", "inputs.json", EARLIER, ".*.tmp"
)
_not_applied = shutil.ignore_patterns("model", ".*.tmp")


def _take_recovered(source: State, new: State) -> None:
    """The plans that a run has applied and recovered, which is most of its time: what they lost on
    select says how far this one may go, and they may be certified for its budget."""
    plans = []
    for folder in sorted(source.path("state/applied").glob("*")):
        written = folder / "model"
        if not (written / "complete").exists():
            continue
        target = new.folder / "applied" / folder.name
        shutil.copytree(folder, target, copy_function=_link, ignore=_not_applied)
        plans.append(artifact.read_manifest(written).plan["choices"])
    new.write_json(EARLIER, plans)


def _link(source: str, target: str) -> None:
    """Files in a run's state are replaced, never changed, so two runs can share them."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
