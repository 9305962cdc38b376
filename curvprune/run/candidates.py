"""Solved layers as files of the workspace, and the pass over a model that solves them.

Each layer's solutions lie in two files, the tensors first and a small record last: the record's
presence says that both are whole. A process that starts again solves only what is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """What the small file says of a layer's rounding: the options that have errors, and what 16-bit
    numbers are multiplied by."""

    options: list[str]
    rounded: float
    answered: float


def _write_rounding(state: State, name: str, layer: Layer, found: Rounding) -> None:
    """The distance of the first option from what it stands in for, and of that from the weight."""
    weight = layer.as_matrix(layer.weight.detach()).to(found.target)
    first = found.solved[0]
    rounded = Change.of(first.weight.to(found.target) - found.target)
    answered = Change.of(found.target - weight)
    tensors = {
        "rounded": rounded.values,
        "answered": answered.values,
        "errors": found.errors,
    }
    state.write_tensors(f"{name}.share.safetensors", tensors)
    options = [solved.option.key for solved in found.solved]
    record = RoundingRecord(options=options, rounded=rounded.scale, answered=answered.scale)
    state.write_json(f"{name}.share.json", encode(record))


def read_rounding(state: State, name: str) -> tuple[list[Change], dict[str, Tensor]]:
    """``[W_P − W̃, W̃ − W]`` of a layer, and every option's errors ``(out,)``."""
    file = f"{name}.share.json"
    record = decode(RoundingRecord, state.read_json(file), source=str(state.path(file)))
    tensors = state.read_tensors(f"{name}.share.safetensors")
    rounded = Change(values=tensors["rounded"], scale=record.rounded)
    answered = Change(values=tensors["answered"], scale=record.answered)
    return [rounded, answered], dict(zip(record.options, tensors["errors"], strict=True))


def solve_in_one_pass(task: Task, space: Workspace, sweep: Sweep) -> Candidates:
    """Visit the layers in one forward pass over the calibration items and solve them into files.

    Without an original, each of several processes solves its share of the layers.
    """
    state, layers, sequential = space.state, sweep.layers, sweep.original is not None
    files = {name: f"{sweep.folder}/{i:04d}" for i, name in enumerate(layers)}
    found = Candidates(state=state, layers=layers, files=files)

    # 1. What is left to do, and for this process.
    mine = list(layers) if sequential else list(layers)[rank() :: world()]
    last = "share.json" if sweep.shares else "json"
    todo = {name for name in mine if sweep.options[name] and not state.has(f"{files[name]}.{last}")}
    own_state = replace(state, writes=True)

    # 2. At every layer: solve it, and write its option into the model before later layers run.
    def visit(layer: Layer, moments: Callable[[], Moments | None]) -> None:
        name, options = layer.name, list(sweep.options[layer.name])
        if name in todo:
            needs_moments = any(not isinstance(option, (Keep, Cast)) for option in options)
            known = moments() if needs_moments else None
            if sweep.shares:
                found_here = round_layer(layer, options, known)
                solved = list(found_here.solved[:1])
            else:
                solved = solve_layer(layer, options, known)
            if known is not None and known.dead:
                own_state.write_json(f"{files[name]}.dead.json", known.dead)
            write_solved(own_state, files[name], solved)
            if sweep.shares:
                _write_rounding(own_state, files[name], layer, found_here)
            todo.discard(name)
            advance(len(mine) - len(todo))
        if sequential and options:
            layer.write_(found.of(name)[0].weight)

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
