"""From a recipe to a task: load model and data, assign options, remove hidden units.

Whatever can be wrong with a recipe is found here, before the first long computation.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from curvprune import distributed
from curvprune.artifact import describe, load_artifact, write_model
from curvprune.certificate import loss_for
from curvprune.compression import Solved, Training
from curvprune.failures import is_machine, one_line
from curvprune.files import StageLog, State
from curvprune.model import (
    PURPOSES,
    Batch,
    LabelFree,
    Loss,
    Splits,
    Untold,
    check_device,
    check_independent,
    find_layers,
    make_loss,
    plain_model,
    to_device,
)
from curvprune.options import Option, pruner_of, quantizer_of
from curvprune.places import check_regular, check_regular_below
from curvprune.planning import SIZES, Budget, Infeasible, Limit
from curvprune.record import CutRecord, RemovedUnits
from curvprune.run import models, sources
from curvprune.run.folder import Inputs, about_threads, claim, state_of
from curvprune.run.recipe import Recipe
from curvprune.run.recipe_layers import assign_groups, assign_options
from curvprune.run.source_files import source_files
from curvprune.run.task import Settings, Storage, Task, TaskError, check_task
from curvprune.run.uses import FOLDER, UsesInFolder
from curvprune.run.workspace import Workspace
from curvprune.schema import decode, encode
from curvprune.structured import Pruned, Structured, offered_widths, prune_units
from curvprune.targets import export_gguf, gguf_header_bytes, target_named

REMOVED = "structured/removed.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Hidden units of one cut that could be removed: its kind, how many there are, and the widths
    that are offered, largest first."""

    kind: str
    units: int
    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A recipe made into a task.

    Attributes:
        inputs: hashes of what the run's results depend on.
        sources: path → sha256 of the files that were read.
        kept: layers that no entry of ``compress:`` matches.
        offered: cut → widths, where the recipe asks for hidden units to be removed and they are
            not yet.
        removed: the units that are gone, if so.
        source_bytes: of the files of weights that the model was read from; ``None`` from a hub.
    """

    task: Task
    space: Workspace
    title: str
    inputs: Inputs
    sources: dict[str, str]
    kept: tuple[str, ...]
    offered: Mapping[str, Widths]
    removed: RemovedUnits | None
    source_bytes: int | None = None


def prepare(
    recipe: Recipe,
    root: State | None,
    *,
    progress: bool,
    reused: State | None = None,
    priced: bool = False,
) -> Prepared:
    """Make a recipe's task.

    Args:
        root: the run folder, which is claimed for this run; ``None`` for a look at the recipe
            alone.
        reused: a run from whose state ``root`` starts.
        priced: prices are asked for, with or without a budget.
    """
    # 1. The model and the data.
    _check_folder(recipe, root)
    device = device_of(recipe)
    structured = _structured(recipe)
    # What changes from now on is not what was read.
    files = {} if root is None else source_files(recipe)
    model, tokenizer = _load_model(recipe)
    splits = _load_data(recipe, tokenizer)
    model.to(device)

    # 2. The recipe laid over the model, and whether it fits.
    fit = partial(_fit, recipe, tokenizer=tokenizer, splits=splits, priced=priced)
    task = fit(model, final=structured is None)
    inputs = Inputs.of(
        recipe,
        model_sha256=models.model_sha256(model),
        data_sha256=splits.sha256(),
        budget=task.budget,
        device=str(device),
    )
    state, uses = State(Path(os.devnull)), None
    if root is not None:
        state = state_of(recipe, root, inputs)
        uses = UsesInFolder(root.folder.resolve().parent / FOLDER)
        uses.check(splits.certify)
    space = Workspace(state=state, log=StageLog(show=progress), uses=uses)
    offered: dict[str, Widths] = {}
    if structured is not None and (root is None or root.writes) and not state.has(REMOVED):
        offered = _offered(recipe, task, structured)

    # 3. The folder; then hidden units are removed, and the recipe is laid over what is left.
    removed = None
    if root is not None:
        if root.writes:
            for name in claim(recipe, root, inputs, reused):
                space.log.say(f"{state.folder / name} was damaged and is made anew")
            space.note(*about_threads(inputs, root))
        distributed.wait()
        if structured is not None:
            smaller, removed = _without_units(recipe, task, space, structured)
            task = fit(smaller, original=model)
            task = replace(task, notes=(*removed.notes, *task.notes))
    kept = [name for name in find_layers(task.model) if name not in task.layers]
    source = recipe.model.name or recipe.model.path or recipe.model.package or ""
    return Prepared(
        task=task,
        space=space,
        title=recipe.title or Path(source).name,
        inputs=inputs,
        sources=files,
        kept=tuple(kept),
        offered=offered,
        removed=removed,
        source_bytes=_source_bytes(recipe),
    )


def _fit(
    recipe: Recipe,
    model: nn.Module,
    *,
    tokenizer: Any,
    splits: Splits,
    original: nn.Module | None = None,
    final: bool = True,
    priced: bool = False,
) -> Task:
    """The task of a recipe on a model. Unless ``final``, units will be removed first, and sizes are
    not known yet."""
    # 1. Layers, their options and groups.
    found = find_layers(model)
    target = target_named(recipe.target_name)
    shapes = {name: layer.shape for name, layer in found.items()}
    assigned = assign_options(
        recipe, shapes, check=lambda name, option: target.check(model, found[name], option)
    )
    groups = assign_groups(recipe, found, assigned, find=partial(target.groups, model))
    layers = {name: found[name] for name in found if name in assigned}

    # 2. What has to be said.
    notes = list(groups.notes)
    if splits.recover is not None and recipe.recover is None:
        notes.append(
            f"data: recover: {len(splits.recover.items)} items are set aside and nothing trains "
            "on them: there is no recover section"
        )
    kept = [name for name in found if name not in assigned]
    if kept:
        notes.append(
            f"{len(kept)} layer(s) match no entry of compress: and stay as they are: "
            f"{', '.join(kept)}"
        )

    # 3. The task; a divergence is from the original model.
    budget = _budget(recipe)
    task = Task(
        model=model,
        original=original,
        objective=_objective(recipe, model if original is None else original, splits, budget),
        layers=layers,
        options={name: tuple(options) for name, options in assigned.items()},
        same_option=groups.layers,
        splits=splits,
        budget=budget,
        settings=_settings(recipe),
        storage=_storage(recipe, tokenizer, model),
        recover=_training(recipe),
        notes=tuple(notes),
    )
    try:
        named = list(chain.from_iterable(entry.layers for entry in recipe.compress))
        task = check_task(task, final=final, named=named, priced=priced)
    except TaskError as error:
        raise recipe.error(error.key, str(error)) from error
    except Infeasible as error:
        # The line of the limit, or of the list of the user's own.
        where = error.constraint if error.constraint in SIZES else "limits"
        raise recipe.error(("budget", where), str(error)) from error
    return task


# ------------------------------------------------------------------------------- parts of a recipe


def _settings(recipe: Recipe) -> Settings:
    return Settings(
        seed=recipe.seed,
        labels=recipe.price.labels,
        curvature=recipe.price.curvature,
        prices=recipe.price.prices,
        rounds=recipe.price.rounds,
        measure_above=recipe.price.measure_above,
        trials=recipe.search.trials,
        attempts=recipe.search.attempts,
        target=recipe.target_name,
        engine=recipe.certify.engine,
    )


def _training(recipe: Recipe) -> Training | None:
    if recipe.recover is None:
        return None
    return Training(**recipe.recover.model_dump(), seed=recipe.seed)


def _storage(recipe: Recipe, tokenizer: Any, model: nn.Module) -> Storage:
    """Folders that transformers reads too, with the tokenizer."""
    portable = target_named(recipe.target_name).portable
    device = next(model.parameters()).device

    def write(
        folder: Path,
        written: nn.Module,
        solved: Mapping[str, Solved],
        plan: Mapping[str, JsonValue],
    ) -> None:
        write_model(folder, written, solved, plan, tokenizer=tokenizer, portable=portable)

    read = partial(load_artifact, device=device, kind=type(model))
    if recipe.target_name != "gguf" and recipe.certify.engine is None:
        return Storage(write=write, read=read)
    # What an engine reads is made like the file that the model came from, if it was one.
    source, gguf = _model_source(recipe)
    like = None if gguf is None else Path(source) / gguf
    view = partial(export_gguf, like=like)
    if recipe.target_name != "gguf":
        return Storage(write=write, read=read, view=view)
    try:
        header = gguf_header_bytes(model, like, tokenizer)
    except ValueError as error:
        raise recipe.error(("target",), str(error)) from error
    return Storage(write=write, read=read, view=view, header=header)


def _check_folder(recipe: Recipe, root: State | None) -> None:
    if root is None or recipe.model.path is None:
        return
    source = Path(recipe.model.path).resolve()
    if source.is_relative_to(root.folder.resolve()):
        raise recipe.error(
            ("model", "path"),
            f"{recipe.model.path} lies inside the run folder {root.folder}, whose model/ the run "
            "writes; give --out another folder",
        )


def device_of(recipe: Recipe) -> torch.device:
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.shared():
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        check_device(name)
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise recipe.error(
            ("device",), f"{name!r} cannot be used here ({error}); write auto or cpu"
        ) from error
    return torch.device(name)


def _load_model(recipe: Recipe) -> tuple[nn.Module, Any]:
    section = recipe.model
    try:
        source, gguf = _model_source(recipe)
        if isinstance(source, Path):
            check_regular_below(source)
        model = models.load_model(
            source,
            task=section.task,
            dtype=section.dtype,
            gguf_file=gguf,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        models.check_finite(model, source)
        tokenizer = _load_tokenizer(recipe)
    except (ValueError, OSError) as error:
        if is_machine(error):
            raise
        raise recipe.error(("model",), one_line(str(error))) from error
    return model, tokenizer


def _load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that the data need; ``None`` for images."""
    section = recipe.model
    if section.task == "image-classification" or recipe.data.source == "digits":
        return None
    source, gguf = _model_source(recipe)
    return models.load_tokenizer(
        source, gguf_file=gguf, trust_remote_code=section.trust_remote_code
    )


def load_model_of(recipe: Recipe) -> nn.Module:
    """The model that a recipe names, without its data."""
    return _load_model(recipe)[0]


def load_splits(recipe: Recipe) -> Splits:
    """The data of a recipe, without its model."""
    try:
        tokenizer = _load_tokenizer(recipe)
    except (ValueError, OSError) as error:
        if is_machine(error):
            raise
        raise recipe.error(("model",), one_line(str(error))) from error
    return _load_data(recipe, tokenizer)


def _model_source(recipe: Recipe) -> tuple[str | Path, str | None]:
    """A folder or a hub name, and the GGUF file in it, if the model is one."""
    section = recipe.model
    if section.package is not None:
        source = models.package_folder(section.package)
        if section.folder is not None:
            source = source / section.folder
        if section.file is not None and not (source / section.file).is_file():
            raise ValueError(f"package {section.package} has no file {section.file!r} in {source}")
        return source, section.file
    if section.path is not None:
        source = Path(section.path)
        if not source.is_dir():
            raise ValueError(
                f"{source} is not a folder; make it first (examples/ has scripts) or correct the "
                "path"
            )
        return source, None
    assert section.name is not None
    return section.name, None


def _source_bytes(recipe: Recipe) -> int | None:
    """Bytes of the files of weights that a recipe names, where they are on this machine."""
    source, gguf = _model_source(recipe)
    if gguf is not None:
        return (Path(source) / gguf).stat().st_size
    if not isinstance(source, Path):
        return None
    return sum(path.stat().st_size for path in source.glob("*.safetensors")) or None


def _load_data(recipe: Recipe, tokenizer: Any) -> Splits:
    section = recipe.data
    counts = {purpose: getattr(section, purpose) for purpose in (*PURPOSES, "recover")}
    try:
        if section.source == "digits":
            return sources.digits_splits(counts=counts, seed=recipe.seed)
        tokens = {}
        for name, text in _documents(recipe).items():
            if text:
                tokens[name] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return sources.text_splits(
            tokens,
            length=section.sequence_length,
            counts=counts,
            seed=recipe.seed,
            first=sources.first_token(tokenizer),
        )
    except ValueError as error:
        if is_machine(error):
            raise
        raise recipe.error(("data",), one_line(str(error))) from error


def _documents(recipe: Recipe) -> dict[str, str]:
    section = recipe.data
    if section.source == "python-docs":
        return sources.python_docs()
    if section.source == "text":
        return sources.text_files([Path(file) for file in section.files])
    assert section.name is not None
    return sources.hub_documents(section.name, split=section.split, column=section.column)


def _objective(recipe: Recipe, model: nn.Module, splits: Splits, budget: Budget | None) -> Loss:
    first = to_device(splits.calibrate.first(), next(model.parameters()).device)
    loss = loss_of(recipe, model, first)
    try:
        return loss_for(budget, loss, model)
    except ValueError as error:
        raise recipe.error(("budget", "metric"), str(error)) from error


def loss_of(recipe: Recipe, model: nn.Module, first: Batch) -> Loss:
    """The loss that a recipe names, told from the model and its first items."""
    try:
        check_independent(plain_model(model, rewritten=True))
        loss = make_loss(recipe.loss_name, model, first)
    except ValueError as error:
        raise recipe.error((recipe.loss_key,), str(error)) from error
    # What outputs are, the model's config tells; where it leaves that open, the task does.
    if isinstance(loss, LabelFree):
        try:
            loss.told(first)
        except Untold:
            loss = make_loss("label-free:classification", model, first)
        except ValueError as error:
            raise recipe.error((recipe.loss_key,), str(error)) from error
    return loss


def _budget(recipe: Recipe) -> Budget | None:
    """The budget with the tables of its own limits read."""
    if recipe.budget is None:
        return None
    limits = []
    for index, limit in enumerate(recipe.budget.limits):
        use = _table(recipe, index, limit.table)
        limits.append(Limit(name=limit.name, most=limit.most, use=use))
    return Budget(**recipe.budget.model_dump(exclude={"limits"}), limits=tuple(limits))


def _table(recipe: Recipe, index: int, file: str) -> dict[tuple[str, str], float]:
    """What every layer takes under every option, from a JSON file."""
    key = ("budget", "limits", index, "table")
    use = {}
    try:
        check_regular(Path(file))
        table = json.loads(Path(file).read_text(encoding="utf-8"))
        for layer, values in table.items():
            for option, value in values.items():
                use[layer, option] = float(value)
    except OSError as error:
        raise recipe.error(
            key, f"{file} cannot be read ({error.strerror}); expected a JSON file"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        expected = (
            'expected JSON such as {"model.layers.0.mlp.up_proj": {"keep": 0.8, "int4-g64-sym": '
            "0.3}}"
        )
        raise recipe.error(key, f"{file}: {one_line(str(error))}; {expected}") from None
    return use


# ---------------------------------------------------------------------------------- hidden units


def _structured(recipe: Recipe) -> Structured | None:
    if recipe.structured is None:
        return None
    asked = recipe.structured.model_dump(exclude_none=True)
    # Layers that read what is left must still fit the patterns and groups that they are offered.
    options = list(chain.from_iterable(entry.options for entry in recipe.compress))
    steps = _steps(options, groups=bool(target_named(recipe.target_name).portable))
    if steps:
        asked.setdefault("round_to", math.lcm(8, *steps))
    try:
        return Structured(**asked)
    except ValueError as error:
        raise recipe.error(("structured",), str(error)) from error


def _steps(options: Sequence[Option], *, groups: bool) -> list[int]:
    """Widths must be multiples of these: of patterns, and of groups of inputs."""
    steps = []
    for option in options:
        prune, quantize = pruner_of(option), quantizer_of(option)
        if prune is not None and prune.nm is not None:
            steps.append(prune.nm[1])
        if groups and quantize is not None and quantize.group_size is not None:
            steps.append(quantize.group_size)
    return steps


def _offered(recipe: Recipe, task: Task, asked: Structured) -> dict[str, Widths]:
    """The cuts and their widths; whatever is wrong with what was asked is found here."""
    try:
        found, _, widths, _ = offered_widths(task.model, task.objective, task.splits, asked)
    except ValueError as error:
        raise recipe.error(("structured",), str(error)) from error
    offered = {}
    for name, cut in found.cuts.items():
        offered[name] = Widths(kind=cut.kind, units=cut.units, widths=tuple(widths[name]))
    return offered


def _without_units(
    recipe: Recipe, task: Task, space: Workspace, asked: Structured
) -> tuple[nn.Module, RemovedUnits]:
    """Stage *remove units*: the smaller model, written to ``state/structured`` and read from there,
    and what is gone. Of several processes the first removes them."""
    state = space.state
    folder = state.path("structured/model")
    if state.writes and not state.has(REMOVED):
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        with space.log.stage("remove units", 1) as advance:
            try:
                pruned = prune_units(
                    task.model, task.objective, task.splits, asked, seed=task.settings.seed
                )
            except ValueError as error:
                raise recipe.error(("structured",), str(error)) from error
            why = describe(task.model, pruned.model, pruned.uniform_widths(), pruned.dropped)
            write_model(folder, pruned.model, {}, {})
            advance(1)
        if why is not None:
            pruned = replace(pruned, notes=(*pruned.notes, why))
        state.write_json(REMOVED, encode(_removed(pruned)))
    distributed.wait()
    device = next(task.model.parameters()).device
    smaller = load_artifact(folder, device=device, kind=type(task.model))
    removed = decode(RemovedUnits, state.read_json(REMOVED), source=str(state.path(REMOVED)))
    return smaller, removed


def _removed(pruned: Pruned) -> RemovedUnits:
    cuts, gone = {}, 0
    for name, left in pruned.left.items():
        cuts[name] = CutRecord(kind=pruned.kinds[name], left=left, of=pruned.units[name])
        gone += pruned.units[name] - left
    shares = []
    for what, (before, after) in (
        ("multiply-adds", pruned.macs),
        ("parameters", pruned.parameters),
    ):
        shares.append(f"{1 - after / before:.1%} of the {what}")
    predicted, cost = pruned.predicted, ""
    if predicted is not None:
        cost = f", predicted to cost {predicted.value:.4g} ± {predicted.stderr:.2g} nats"
    summary = f"{gone} units of {len(cuts)} cuts were removed first: {' and '.join(shares)}{cost}"
    return RemovedUnits(
        cuts=cuts,
        multiply_adds=pruned.macs,
        parameters=pruned.parameters,
        latency_seconds=pruned.latency,
        predicted=None if predicted is None else predicted.value,
        predicted_stderr=None if predicted is None else predicted.stderr,
        notes=(summary, *pruned.notes),
    )
