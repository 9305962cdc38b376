"""Solved layers as files of the workspace, and the pass over a model that solves them.

Each layer's solutions lie in two files, the tensors first and a small record last: the record's
presence says that both are whole. A process that starts again solves only what is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compression import (
    Moments,
    Rounding,
    Solved,
    Visited,
    Visitor,
    dequantize,
    round_layer,
    solve_layer,
    visit_layers,
)
from curvprune.curvature import Change
from curvprune.distributed import rank, wait, world
from curvprune.files import State
from curvprune.model import Layer, find_layers, to_device
from curvprune.options import Cast, Keep, Option, option_from_key, pruner_of, quantizer_of
from curvprune.run.off_path import some_names
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode, encode

OTHERS = 2  # options whose distances say how noisy a share is; each is as large as the model


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedRecord:
    """What the small file says of one solution; its tensors are named by its place in the list."""

    option: str
    damping: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The solutions of layers, read from the workspace as they are asked for."""

    state: State
    layers: Mapping[str, Layer]
    files: Mapping[str, str]

    def of(self, layer: str) -> list[Solved]:
        """All solutions of a layer, in the order of its options."""
        return read_solved(self.state, self.files[layer], self.layers[layer])

    def with_option(self, layer: str, key: str) -> Solved:
        """The solution of one option."""
        return next(solved for solved in self.of(layer) if solved.option.key == key)


def write_solved(state: State, name: str, solved: Sequence[Solved]) -> None:
    tensors, records = {}, []
    for k, one in enumerate(solved):
        parts = {"codes": one.codes, "scale": one.scale, "zero": one.zero}
        if one.codes is None and pruner_of(one.option) is not None:
            parts["weight"] = one.weight
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{k}.{part}"] = tensor
        records.append(
            SolvedRecord(option=one.option.key, damping=one.damping, notes=tuple(one.notes))
        )
    state.write_tensors(f"{name}.safetensors", tensors)
    state.write_json(f"{name}.json", encode(records, list[SolvedRecord]))


def read_solved(state: State, name: str, layer: Layer) -> list[Solved]:
    tensors = state.read_tensors(f"{name}.safetensors")
    written = state.read_json(f"{name}.json")
    records = decode(list[SolvedRecord], written, source=str(state.path(f"{name}.json")))
    device, solved = layer.weight.device, []
    for k, record in enumerate(records):
        option = option_from_key(record.option)
        codes, scale = tensors.get(f"{k}.codes"), tensors.get(f"{k}.scale")
        zero, quantize = tensors.get(f"{k}.zero"), quantizer_of(option)
        if quantize is not None:
            assert codes is not None and scale is not None
            weight = dequantize(codes, scale, zero, quantize.group_size).to(device)
        elif f"{k}.weight" in tensors:
            weight = tensors[f"{k}.weight"].to(device)
        else:
            # A cast is a rule and no tensor: to read it is to solve it.
            solved += solve_layer(layer, [option], None)
            continue
        solved.append(
            Solved(
                option=option,
                weight=weight,
                codes=codes,
                scale=scale,
                zero=zero,
                damping=record.damping,
                notes=record.notes,
            )
        )
    return solved


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A pass over the layers of a model that solves them.

    Attributes:
        model: the model whose layers are visited.
        layers: those of its layers that have options here.
        options: layer → options to solve.
        folder: where in the workspace the solutions go.
        title: of the stage.
        original: the uncompressed model, which runs beside. With it each layer's first option is
            written into the model on the way, so that later layers see it and make up for it;
            without it the model is only read.
        shares: of each layer keep the first option's solution alone, with its distance from what
            it stands in for, and every option's error (`curvprune.compression.Rounding`).
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    options: Mapping[str, Sequence[Option]]
    folder: str
    title: str
    original: nn.Module | None = None
    shares: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingRecord:
    """What the small file says of a layer's rounding: the options that have errors, those of them
    whose distance is kept besides the first one's, and what 16-bit numbers are multiplied by."""

    options: list[str]
    others: list[str]
    scales: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRounding:
    """What a share is made of.

    Attributes:
        rounded: ``W_P − V``, from what the plan's option stands in for to what it is.
        answered: ``V − W``, what makes up for earlier layers.
        others: the distances of some other options from what they stand in for.
        errors: option → its error at each output.
    """

    rounded: Change
    answered: Change
    others: dict[str, Change]
    errors: dict[str, Float[Tensor, " out"]]


def _write_rounding(state: State, name: str, layer: Layer, found: Rounding) -> None:
    """The distance of the first option, and of those nearest to it, from what they stand in for,
    and of that from the weight."""
    weight = layer.as_matrix(layer.weight.detach()).to(found.target)
    others = _nearest_others(found)
    kept = [found.target - weight]
    for solved in (found.solved[0], *others):
        kept.append(solved.weight.to(found.target) - found.target)
    changes = [Change.of(one) for one in kept]
    tensors = {str(k): change.values for k, change in enumerate(changes)}
    state.write_tensors(f"{name}.share.safetensors", {**tensors, "errors": found.errors})
    record = RoundingRecord(
        options=[solved.option.key for solved in found.solved],
        others=[solved.option.key for solved in others],
        scales=[change.scale for change in changes],
    )
    state.write_json(f"{name}.share.json", encode(record))


def _nearest_others(found: Rounding) -> list[Solved]:
    """At most `OTHERS` options that round or prune as well, nearest to the first in error."""
    errors = found.errors.double().sum(1)
    apart: list[tuple[float, int, Solved]] = []
    for solved, error in zip(found.solved[1:], errors[1:], strict=True):
        lossy = not isinstance(solved.option, (Keep, Cast))
        if lossy and float(error) > 0 and float(errors[0]) > 0:
            apart.append((abs(float((error / errors[0]).log())), len(apart), solved))
    return [solved for _, _, solved in sorted(apart, key=lambda one: one[:2])[:OTHERS]]


def read_rounding(state: State, name: str, device: torch.device) -> StoredRounding:
    """What was written of a layer's rounding; its changes lie on ``device``."""
    record = _read_rounding_record(state, name)
    tensors = state.read_tensors(f"{name}.share.safetensors")
    changes = []
    for k, scale in enumerate(record.scales):
        changes.append(Change(values=tensors[str(k)].to(device), scale=scale))
    answered, rounded, *others = changes
    return StoredRounding(
        rounded=rounded,
        answered=answered,
        others=dict(zip(record.others, others, strict=True)),
        errors=dict(zip(record.options, tensors["errors"], strict=True)),
    )


def _read_rounding_record(state: State, name: str) -> RoundingRecord:
    file = f"{name}.share.json"
    return decode(RoundingRecord, state.read_json(file), source=str(state.path(file)))


def solve_in_one_pass(task: Task, space: Workspace, sweep: Sweep) -> Candidates:
    """Visit the layers in one forward pass over the calibration items and solve them into files.

    Without an original, each of several processes solves its share of the layers.
    """
    state, layers, sequential = space.state, sweep.layers, sweep.original is not None
    files = {name: f"{sweep.folder}/{i:04d}" for i, name in enumerate(layers)}
    found = Candidates(state=state, layers=layers, files=files)

    # 1. What is left to do, and for this process.
    mine = list(layers) if sequential else list(layers)[rank() :: world()]
    todo = {name for name in mine if not _is_solved(state, sweep, name, files[name])}
    own_state = replace(state, writes=True)
    changed: list[str] = []

    # 2. At every layer: solve it, and write its option into the model before later layers run.
    def visit(layer: Layer, moments: Callable[[], Moments | None]) -> None:
        name, options = layer.name, list(sweep.options[layer.name])
        if name in todo:
            known = moments() if _needs_moments(options) else None
            told: tuple[str, ...] = ()
            if changed and known is not None and not _is_finite(known):
                known, told = None, (_about_no_numbers(task, layer),)
            _solve_into(own_state, sweep, files[name], layer, known, told)
            todo.discard(name)
            advance(len(mine) - len(todo))
        if sequential and options:
            layer.write_(found.of(name)[0].weight)
            changed.append(name)

    # 3. The pass itself; where all is solved, only the writing. Its record is written last.
    record = f"{sweep.folder}/visited.json"
    with space.log.stage(sweep.title, len(mine), done=len(mine) - len(todo)) as advance:
        if todo or (any(sweep.options.values()) and not state.has(record)):
            visited = _visit(task, sweep, visit)
            if not state.has(record):
                state.write_json(record, encode(visited))
        elif sequential:
            for layer in layers.values():
                visit(layer, lambda: None)
    if not sequential:
        wait()
    _note_what_was_visited(space, found, record)
    return found


def _needs_moments(options: Sequence[Option]) -> bool:
    return any(not isinstance(option, (Keep, Cast)) for option in options)


def _solve_into(
    state: State,
    sweep: Sweep,
    file: str,
    layer: Layer,
    moments: Moments | None,
    told: tuple[str, ...],
) -> None:
    """Solve a layer's options and write them, with what there is to say of all."""
    options = list(sweep.options[layer.name])
    rounding: Rounding | None = None
    if sweep.shares:
        rounding = round_layer(layer, options, moments)
        solved = list(rounding.solved[:1])
    else:
        solved = solve_layer(layer, options, moments)
    solved = [replace(one, notes=(*one.notes, *told)) for one in solved]
    if moments is not None and moments.dead:
        state.write_json(f"{file}.dead.json", moments.dead)
    write_solved(state, file, solved)
    if rounding is not None:
        _write_rounding(state, file, layer, rounding)


def _about_no_numbers(task: Task, layer: Layer) -> str:
    """What to say of a layer in a plan whose earlier layers break the model. What it becomes
    changes nothing, and where there is a budget the plan is measured; else that is the end."""
    broken = (
        f"layer {layer.name}: its inputs are no finite numbers once the layers before it are "
        "compressed"
    )
    if task.budget is None:
        raise FloatingPointError(f"{broken}; ask less of those, or leave them out")
    return f"{broken}; it was rounded to nearest or pruned by magnitude"


def _is_finite(moments: Moments) -> bool:
    drift = moments.drift
    return bool(moments.second.isfinite().all() and (drift is None or drift.isfinite().all()))


def _is_solved(state: State, sweep: Sweep, layer: str, file: str) -> bool:
    """Whether all that a sweep makes of a layer is there."""
    options = sweep.options[layer]
    if not options:
        return True
    there = state.has(f"{file}.json")
    if not sweep.shares or not there or not state.has(f"{file}.share.json"):
        return there and not sweep.shares
    # The same plan may have been applied with fewer options beside.
    record = _read_rounding_record(state, file)
    return {option.key for option in options} <= set(record.options)


def _note_what_was_visited(space: Workspace, found: Candidates, record: str) -> None:
    state = space.state
    if not state.has(record):
        return
    visited = decode(Visited, state.read_json(record), source=str(state.path(record)))
    dead = [name for name in found.layers if state.has(f"{found.files[name]}.dead.json")]
    space.note(*_notes_on(visited, dead))


def _visit(task: Task, sweep: Sweep, visit: Visitor) -> Visited:
    """Visit the layers in one forward pass over the calibration items, and then those that it does
    not reach: what nothing reads has no inputs to make up for."""
    device = next(sweep.model.parameters()).device
    batch = to_device(task.splits.calibrate.calibration()[0], device)
    reference = None
    if sweep.original is not None:
        reference = (sweep.original, find_layers(sweep.original))
    read = {name: layer for name, layer in sweep.layers.items() if name not in task.nearest}
    visited = visit_layers(
        sweep.model, task.objective, batch, read, visit, reference=reference, required=False
    )
    for name, layer in sweep.layers.items():
        if name in visited.unreached or name in task.nearest:
            visit(layer, lambda: None)
    return visited


def _notes_on(visited: Visited, dead: Sequence[str]) -> list[str]:
    """What the plan and the report say of layers that were not solved as usual."""
    notes = []
    for names, what in (
        (
            visited.repeated,
            "are used several times in one forward pass and were solved for the inputs of all "
            "their uses in the uncompressed model, without making up for earlier layers",
        ),
        (
            dead,
            "have inputs that are all zero on the calibration items, in whole or in some of their "
            "groups, so that changes cost nothing there: rounded to nearest or pruned by magnitude",
        ),
        (
            visited.unreached,
            "were not reached by the forward pass over the calibration items together, and were "
            "rounded to nearest or pruned by magnitude",
        ),
        (
            visited.again,
            "were used again after they had been solved, for the inputs of their first use alone; "
            "leave them out (exclude) where that matters",
        ),
    ):
        if names:
            notes.append(f"{len(names)} layer(s) {what}: {some_names(names)}")
    return notes


def solve_options(task: Task, space: Workspace) -> Candidates:
    """Stage *solve*: every option of every layer, from the uncompressed model's own inputs.

    So any plan can be put together from these candidates without another solve. Cost: one forward
    pass over the calibration items, and the solves.
    """
    changing = {}
    for name in task.layers:
        changing[name] = [option for option in task.options[name] if not isinstance(option, Keep)]
    sweep = Sweep(
        model=task.model,
        layers=task.layers,
        options=changing,
        folder="solved",
        title="solve options",
    )
    return solve_in_one_pass(task, space, sweep)
