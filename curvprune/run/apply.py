"""Stages *apply* and *recover*: a plan becomes a model."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from curvprune import artifact
from curvprune.compression import (
    Diverged,
    RecoveryItems,
    Solved,
    coarse_copy,
    recover_,
    restore_,
    trained_tensors,
)
from curvprune.model import ItemResults, carrying, find_layers
from curvprune.options import Option, option_from_key, pruner_of, quantizer_of
from curvprune.planning import Plan
from curvprune.record import RecoveryRecord
from curvprune.run.candidates import Sweep, solve_in_one_pass
from curvprune.run.evaluation import keep_results
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode

ENGINE_NOT_JUDGED = (
    "the verdict is about the weights: llama.cpp also rounds activations to 8 bits, by which "
    "SmolLM2-135M lost 0.0045 ± 0.0010 nats more; certify: {engine: llama.cpp} judges what runs"
)


def plan_key(choices: Mapping[str, str]) -> str:
    """A short name for a plan, for its files."""
    return hashlib.sha256(json.dumps(sorted(choices.items())).encode()).hexdigest()[:16]


def applied_in(choices: Mapping[str, str]) -> str:
    """The folder of the workspace where a plan's solutions lie."""
    return f"applied/{plan_key(choices)}"


def apply_plan(
    task: Task,
    space: Workspace,
    choices: Mapping[str, str],
    folder: str,
    *,
    title: str = "apply",
    inplace: bool = False,
    beside: Mapping[str, Sequence[Option]] | None = None,
) -> tuple[nn.Module, dict[str, Solved]]:
    """Solve the chosen options in one sequential forward pass: later layers see what earlier ones
    became.

    Args:
        choices: layer → option key.
        folder: where in the workspace the solutions go.
        inplace: over the task's own model instead of a copy; it then is compressed as far as the
            pass came.
        beside: layer → other options that are solved at the same point of the pass, for their
            errors alone; with it the workspace also keeps what a share is made of
            (`curvprune.run.candidates.read_rounding`).

    Returns the model and the solutions, which share the memory of its weights.
    """
    model = task.model if inplace else copy.deepcopy(task.model)
    own = find_layers(model)
    layers = {name: own[name] for name in task.layers}
    options: dict[str, list[Option]] = {}
    for name in layers:
        if choices[name] == "keep":
            options[name] = []
            continue
        others = () if beside is None else beside.get(name, ())
        options[name] = [option_from_key(choices[name])]
        options[name] += [option for option in others if option.key != choices[name]]
    changed = {name: layer for name, layer in layers.items() if options[name]}
    original = coarse_copy(model, changed) if inplace else task.model
    sweep = Sweep(
        model=model,
        layers=changed,
        options=options,
        folder=folder,
        title=title,
        original=original,
        shares=beside is not None,
    )
    found, solved = solve_in_one_pass(task, space, sweep), {}
    for name, layer in changed.items():
        (one,) = found.of(name)
        solved[name] = replace(one, weight=layer.as_matrix(layer.weight.detach()))
    return model, solved


def recover_plan(
    task: Task,
    space: Workspace,
    model: nn.Module,
    solved: Mapping[str, Solved],
    folder: str,
    *,
    name: str = "",
    before: ItemResults | None = None,
) -> tuple[dict[str, Solved], RecoveryRecord]:
    """Train a model in place, on the recover split if there is one, else on the calibration items;
    the select split keeps the best state.

    Args:
        name: of the plan.
        before: the model's results on the select split, if known.
    """
    assert task.recover is not None
    state = space.state
    tensors, record = f"{folder}/recovered.safetensors", f"{folder}/recovered.json"
    steps, done = task.recover.steps or 1, state.has(record)
    title = f"recover {name}".strip()
    with space.log.stage(title, steps, done=steps if done else 0) as advance:
        if not done:
            items = RecoveryItems(
                train=task.splits.training, select=task.splits.select, before=before
            )
            try:
                recovery = recover_(
                    model,
                    solved,
                    task.uncompressed,
                    task.objective,
                    items,
                    task.recover,
                    advance=advance,
                )
            except Diverged as error:
                # Its note says so; the run goes on with the best state.
                recovery = error.recovery
            state.write_tensors(tensors, trained_tensors(recovery))
            keep_results(space, f"{folder}/recovered-select.json", recovery.results)
            state.write_json(record, recovery.to_dict())
    # A run that reuses this recovery may call the plan otherwise.
    written = {**state.read_json(record), "plan": name or "the plan"}
    found = decode(RecoveryRecord, written, source=str(state.path(record)))
    space.note(*found.notes)
    return restore_(model, solved, state.read_tensors(tensors)), found


def write_artifact(
    task: Task,
    space: Workspace,
    folder: str,
    model: nn.Module,
    solved: Mapping[str, Solved],
    plan: Plan,
) -> Path:
    """Write the model into ``folder``/model of the workspace, unless an earlier process has."""
    path = space.state.path(f"{folder}/model")
    if not (path / "complete").exists():
        shutil.rmtree(path, ignore_errors=True)  # what an interrupted run left
        # The baseline's own module may be what is written.
        with carrying(model, task.splits.seen()):
            task.storage.write(path, model, solved, plan.to_dict())
        (path / "complete").touch()
    return path


def unpriced_plan(task: Task, space: Workspace, choices: Mapping[str, str]) -> Plan:
    """The one plan there is where there is no budget."""
    unknown = float("nan")
    return Plan(
        choices=dict(choices),
        bytes=task.bytes_of(choices),
        predicted=unknown,
        predicted_stderr=unknown,
        notes=(*task.notes, *space.notes, *notes_on_storage(task, choices)),
    )


def notes_on_storage(task: Task, choices: Mapping[str, str]) -> list[str]:
    """What to tell about the folder that a plan makes, where it is not what one may expect."""
    found = [*_notes_on_readers(task, choices), *notes_on_zeros(task, choices)]
    if task.target.name == "gguf" and task.settings.engine is None:
        found.append(ENGINE_NOT_JUDGED)
    return found


def _notes_on_readers(task: Task, choices: Mapping[str, str]) -> list[str]:
    """What transformers cannot read of it, and how many bytes that costs."""
    model = task.model
    if not task.target.portable or not artifact.is_transformers(model):
        return []
    why = artifact.why_not_portable(model)
    if why:
        return [artifact.unread_note(model, why)]
    found = artifact.readable(model)
    before = after = count = 0
    for name, key in choices.items():
        option, layer = option_from_key(key), task.layers[name]
        can = layer.kind != "linear" or layer.aliases or name in found.packed
        if can or quantizer_of(option) is None:
            continue
        count, before = count + 1, before + task.layer_bytes(name, option)
        after += artifact.layer_bytes(model, layer, option, portable=False)
    if not count:
        return []
    return [
        f"{count} rounded layer(s) are stored dense, because transformers cannot read them packed "
        f"in a {type(model).__name__} ({found.why_dense}): {before / 1e6:.1f} MB, which target: "
        f'curvprune (in Python Settings(target="curvprune")) would make {after / 1e6:.1f} MB, for '
        "curvprune.load alone"
    ]


def notes_on_zeros(task: Task, choices: Mapping[str, str]) -> list[str]:
    """What to tell about pruned layers that are larger on disk because transformers must read
    them."""
    before = after = count = 0
    for name, key in choices.items():
        option = option_from_key(key)
        if pruner_of(option) is None:
            continue
        now = task.layer_bytes(name, option)
        sparse = artifact.layer_bytes(task.model, task.layers[name], option, portable=False)
        if sparse < now:
            before, after, count = before + now, after + sparse, count + 1
    if not count:
        return []
    return [
        f"the zeros of {count} pruned layer(s) are stored, because transformers needs them: "
        f"{before / 1e6:.1f} MB, which target: curvprune (in Python "
        f'Settings(target="curvprune")) would make {after / 1e6:.1f} MB'
    ]
