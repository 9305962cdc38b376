"""The task of a compression: everything that is fixed before the first long computation.

Arguments (`curvprune.api`) and recipes (`curvprune.run.prepare`) both make a `Task` and pass it
through `check_task`, so that the same is refused and noted on either road.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, JsonValue
from torch import nn

from curvprune.artifact import Portable
from curvprune.certificate import documents_needed
from curvprune.compression import Solved, Training
from curvprune.model import (
    PURPOSES,
    LabelFree,
    Layer,
    Loss,
    Splits,
    WeightUses,
    check_items,
    computed_weights,
    left_over,
    weight_uses,
)
from curvprune.options import Form, Option, option_from_key, stored_dtype
from curvprune.planning import OF_OUTPUTS, Budget, Choice, Infeasible, Limit, Within, cheapest
from curvprune.pricing import LayerWork, limits_of, macs_left, multiply_adds, work_of
from curvprune.run import off_path
from curvprune.run.altered_layers import altered_layers
from curvprune.run.models import not_finite
from curvprune.run.off_path import note, nothing_left, refusal, with_groups
from curvprune.schema import check_fields
from curvprune.targets import (
    EngineName,
    Target,
    TargetName,
    check_engine,
    named_before,
    target_named,
)

# Documents of the select split: on 4 an outlier moved a plan's bound from twice its drop to five
# times.
FEW_DOCUMENTS = 8

AtLeastOne = Annotated[int, Field(ge=1, description="a whole number of at least 1")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Knobs of a run that are not part of the model, the data or the budget.

    Attributes:
        seed: of every random draw.
        labels: draws per item for the prices.
        curvature: what prices are taken from, a key of `curvprune.pricing.CURVATURES`.
        prices: what an option costs: its ``"shares"`` of the loss of a plan as it ships, or a
            ``"quadratic"`` form of the curvature. ``None``: shares where a plan is chosen.
        rounds: passes that shares are taken from, at most.
        measure_above: nats below which no quadratic price is measured; ``None``: none is.
        trials: plans measured on the select split.
        attempts: plans applied, to be tested in order on the certify split.
        batch_size: items of one forward pass when a model is evaluated.
        target: what is to run the model; see `curvprune.targets`.
        engine: what runs the model for its verdict; ``None``: torch.
        portable: an earlier name of ``target``: true, ``"engines"`` (vllm) or false (curvprune).
    """

    seed: Annotated[int, Field(ge=0, description="a whole number of at least 0")] = 0
    labels: Annotated[
        int, Field(ge=1, description="draws per item, a whole number of at least 1")
    ] = 2
    curvature: Annotated[
        Literal["fisher", "diagonal", "kfac", "hessian", "input", "empirical"],
        Field(description="fisher, diagonal, kfac, hessian or input"),
    ] = "fisher"
    prices: Annotated[
        Literal["shares", "quadratic"] | None,
        Field(description="shares, quadratic, or null for the better one that applies"),
    ] = None
    rounds: Annotated[
        int, Field(ge=1, description="passes for shares, a whole number of at least 1")
    ] = 2
    measure_above: Annotated[
        float | None,
        Field(
            ge=0,
            description=(
                "nats below which no price is measured, a number of at least 0; null: none is"
            ),
        ),
    ] = 0.005
    trials: Annotated[
        int,
        Field(
            ge=1,
            description="plans measured on the select split, a whole number of at least 1",
        ),
    ] = 6
    attempts: Annotated[
        int,
        Field(
            ge=1,
            description=(
                "plans applied, to be tested in order on the certify split, a whole number of at "
                "least 1"
            ),
        ),
    ] = 2
    batch_size: AtLeastOne = 4
    target: Annotated[
        TargetName,
        Field(
            description=(
                "transformers (loads model/), gguf (llama.cpp), vllm (so do serving engines), onnx "
                "(ONNX Runtime, after curvprune export --target onnx) or curvprune (every kind of "
                "layer is packed, for curvprune.load)"
            )
        ),
    ] = "transformers"
    engine: Annotated[
        EngineName | None,
        Field(description="llama.cpp, vllm, or null: the verdict is about the weights in torch"),
    ] = None
    portable: InitVar[Portable | None] = None

    def __post_init__(self, portable: Portable | None) -> None:
        if portable is not None:
            if portable not in (True, False, "engines"):
                raise ValueError(
                    f"Settings: portable={portable!r}: expected a target in its place: "
                    "target='transformers' (true), 'vllm' (engines) or 'curvprune' (false)"
                )
            named = named_before(portable)
            if self.target not in ("transformers", named):
                raise ValueError(
                    f"Settings: target={self.target!r} and portable={portable!r} are two names of "
                    "one knob; pass target alone"
                )
            object.__setattr__(self, "target", named)
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How a compressed model is written to a folder, read back, and written once more as the file
    of an engine (``view``); ``header``: what that takes besides its tensors."""

    write: Callable[[Path, nn.Module, Mapping[str, Solved], Mapping[str, JsonValue]], None]
    read: Callable[[Path], nn.Module]
    view: Callable[[Path, Path], Path] | None = None
    header: int | None = None


class TaskError(ValueError):
    """A part of the task cannot be. ``key`` says which, as in a recipe: ``("budget",
    "metric")``."""

    def __init__(self, message: str, *key: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be done, to which model, on which data.

    Attributes:
        model: the model to compress.
        original: the model before hidden units were removed, where some were; the verdict compares
            with it.
        layers: the layers with options, by name; they belong to ``model``.
        options: layer → the options that it is offered.
        same_option: groups of layers; the layers of one get the same option.
        recover: the training after the compression, if any.
        nearest: layers that no forward pass reads, asked for by name: without inputs they are
            rounded to nearest or pruned by magnitude (`check_task` fills it in).
        limits: what the budget limits besides bytes and the drop (`check_task` fills it in).
        work: multiply-adds of every layer, where they were counted.
        notes: what the plan and the report must say.
        warnings: those of the notes that put the result in doubt.
    """

    model: nn.Module
    objective: Loss
    layers: Mapping[str, Layer]
    options: Mapping[str, tuple[Option, ...]]
    splits: Splits
    budget: Budget | None
    settings: Settings
    storage: Storage
    original: nn.Module | None = None
    same_option: tuple[tuple[str, ...], ...] = ()
    recover: Training | None = None
    nearest: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()
    work: Mapping[str, LayerWork] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def uncompressed(self) -> nn.Module:
        """The model whose loss may rise by the budget."""
        return self.model if self.original is None else self.original

    @property
    def offered(self) -> list[Option]:
        """All options of all layers, one layer after the other."""
        return list(chain.from_iterable(self.options.values()))

    @property
    def max_drop(self) -> float | None:
        """The drop that the budget allows, if it says."""
        return None if self.budget is None else self.budget.max_drop

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Layers that get one option together, and every other layer by itself."""
        grouped = set().union(*self.same_option)
        alone = [(name,) for name in self.layers if name not in grouped]
        return [*self.same_option, *alone]

    # ------------------------------------------------------------------------------ bytes on disk

    @property
    def target(self) -> Target:
        """What is to run the result, and so decides what its bytes are."""
        return target_named(self.settings.target)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of everything that no option changes."""
        return self.target.other_bytes(self.model, self.layers)

    @property
    def header_bytes(self) -> int:
        """The most that the header of the weights file can take."""
        if self.storage.header is not None:
            return self.storage.header
        return self.target.header_bytes(self.model, self.layers)

    def layer_bytes(self, name: str, option: Option) -> int:
        """Bytes on disk of a layer under an option."""
        return self.target.layer_bytes(self.model, self.layers[name], option)

    def form_of(self, name: str, option: Option) -> Form:
        """How a layer lies on disk under an option."""
        return self.target.form_of(self.model, self.layers[name], option)

    def bytes_of(self, choices: Mapping[str, str]) -> int:
        """Tensor bytes of the whole model under a plan (the file adds its header)."""
        sizes = [self.layer_bytes(name, option_from_key(key)) for name, key in choices.items()]
        return self.fixed_bytes + sum(sizes)

    def smallest_bytes(self) -> int:
        """Bytes of the smallest model file that the options allow, header included."""
        return self.fixed_bytes + self.header_bytes + self._least_of_groups(self.options)

    def smallest_of(self, offered: Mapping[str, set[str]]) -> int:
        """Tensor bytes of the smallest model if each layer is offered only some option keys."""
        options = {}
        for name in self.layers:
            options[name] = [o for o in self.options[name] if o.key in offered[name]]
        return self.fixed_bytes + self._least_of_groups(options)

    def _least_of_groups(self, options: Mapping[str, Sequence[Option]]) -> int:
        total = 0
        for group in self.groups:
            total += min(self._group_bytes(group, option) for option in options[group[0]])
        return total

    def _group_bytes(self, group: tuple[str, ...], option: Option) -> int:
        return sum(self.layer_bytes(name, option) for name in group)

    # ----------------------------------------------------------------------------------- limits

    @property
    def within(self) -> Within:
        """What every plan must keep to."""
        return Within(
            max_bytes=None if self.budget is None else self.budget.max_bytes,
            fixed_bytes=self.fixed_bytes + self.header_bytes,
            limits=self.limits,
            same_option=self.same_option,
        )

    @property
    def most(self) -> dict[str, float]:
        """The budget's limits on size and speed by name."""
        found: dict[str, float] = {}
        if self.budget is not None and self.budget.max_bytes is not None:
            found["max_bytes"] = self.budget.max_bytes
        return found | {limit.name: limit.most for limit in self.limits}

    def uses(self, choices: Mapping[str, str]) -> dict[str, float]:
        """How much a plan uses of each limit of the budget, by name; bytes are those of the file,
        with the most that its header can take."""
        found: dict[str, float] = {}
        if self.budget is not None and self.budget.max_bytes is not None:
            found["max_bytes"] = self.bytes_of(choices) + self.header_bytes
        return found | {limit.name: limit.used(choices) for limit in self.limits}

    def keeps_within(self, choices: Mapping[str, str]) -> bool:
        """Whether a plan keeps to all limits of the budget but the drop."""
        return all(used <= self.most[name] for name, used in self.uses(choices).items())

    def least(self, name: str) -> float:
        """The least that any plan uses of a limit."""
        named = {limit.name: limit for limit in self.limits}
        if name not in named:
            return self.smallest_bytes()
        limit, best = named[name], {}
        for group in self.groups:
            used = {}
            for option in self.options[group[0]]:
                used[option.key] = sum(limit.use[member, option.key] for member in group)
            lowest = min(used, key=lambda key: used[key])
            best.update(dict.fromkeys(group, lowest))
        return limit.used(best)


# --------------------------------------------------------------------------------------- checks


def check_task(
    task: Task, *, final: bool = True, named: Collection[str] = (), priced: bool = False
) -> Task:
    """The task with its limits and notes, if nothing is wrong with it.

    Args:
        final: False where hidden units are still to be removed: limits on size and speed that
            cannot be met yet are let pass.
        named: layers that were asked for by their names, not by globs.
        priced: prices are asked for, though there is no budget.

    Layers whose output is not their weight times their input stay as they are, with a note; so do
    those that the forward pass never uses and, where prices are made, those that the loss does not
    depend on.

    Cost: one forward pass over the longest item of each split and two more items; where a layer is
    not used by the first item, of all calibration items; with prices a forward and a backward pass
    of an item, of all price items where one says nothing of a layer. One over the calibration items
    where multiply-adds are limited. Raises `TaskError`, and `Infeasible` for limits that no plan
    meets.
    """
    _check_weights(task)
    _check_splits(task)
    _check_engine(task)
    task = _without_unknown(task, named, priced=priced or task.budget is not None)
    task = _with_notes(task)
    _check_budget(task)
    try:
        task = _with_limits(task)
    except Infeasible:
        if final:
            raise
    except ValueError as error:
        raise TaskError(str(error), "budget", "limits") from error
    _check_recovery(task)
    return task


def _check_weights(task: Task) -> None:
    """Refuse what would only show once layers are solved, and be blamed on another layer."""
    found = not_finite(task.model)
    if found is not None:
        name, kind = found
        raise TaskError(f"tensor {name!r} of the model holds {kind}; repair the model", "model")
    for name, options in task.options.items():
        _check_ranges(task.layers[name], options)


def _check_ranges(layer: Layer, options: Sequence[Option]) -> None:
    """Whether a layer's weights fit into the float types that it is offered."""
    own = str(layer.weight.dtype).removeprefix("torch.")
    for option in options:
        kind = stored_dtype(option, own)
        if kind == own:
            continue
        largest = layer.weight.detach().abs().max()
        if not bool(largest.to(getattr(torch, kind)).isfinite()):
            raise TaskError(
                f"layer {layer.name}: option {option.key}: weights overflow {kind}; cast to "
                f"bfloat16, or leave the layer out: they reach {float(largest):g}",
                "compress",
            )


def _check_splits(task: Task) -> None:
    for purpose in PURPOSES:
        items = getattr(task.splits, purpose).items
        if not items:
            raise TaskError(f"the {purpose} split has no items; every split needs some", "data")
        try:
            check_items(
                task.model, task.objective, items, purpose, measured=task.budget is not None
            )
        except ValueError as error:
            raise TaskError(str(error), "data") from error
    if task.budget is not None and (few := task.splits.too_few()) is not None:
        raise TaskError(few, "data")


def _check_engine(task: Task) -> None:
    try:
        if task.settings.engine is not None:
            told = task.settings.engine, task.settings.target
            check_engine(*told, task.model, task.splits.certify.items)
    except ValueError as error:
        raise TaskError(str(error), "certify", "engine") from error


def _without_unknown(task: Task, named: Collection[str], *, priced: bool) -> Task:
    """The task without layers that cannot be solved, or priced."""
    uses = weight_uses(task.model, task.objective, task.splits.calibrate.items, task.layers)
    # 1. What is used is not the weight times the input, or the input is not known.
    task = _leaving(task, _altered(task, uses), named)
    task = _leaving(task, off_path.of_unknown_input(uses, task.layers), named)
    # 2. The weight is not used at all. Who asks for it by name gets it rounded to nearest.
    unreached = {n: why for n, why in off_path.unreached(uses).items() if n in task.layers}
    asked = [] if priced else [name for name in unreached if name in named]
    for name in asked:
        del unreached[name]
    task = _leaving(task, unreached, named)
    if asked:
        text = off_path.nearest_note(asked)
        task = replace(task, nearest=frozenset(asked), notes=(*task.notes, text))
    # 3. Without a gradient there is no price.
    if priced:
        items = task.splits.price.items
        idle = off_path.without_gradient(task.model, task.objective, items, task.layers)
        task = _leaving(task, idle, named)
    # 4. What is known of a weight may not be all.
    text_of_two = off_path.in_two_ways(uses, task.layers)
    if text_of_two is None:
        return task
    return replace(task, notes=(*task.notes, text_of_two), warnings=(*task.warnings, text_of_two))


def _altered(task: Task, uses: Mapping[str, WeightUses]) -> dict[str, str]:
    """Layer → what is computed in place of the product, from the first item that uses it."""
    found: dict[str, str] = {}
    for number, item in enumerate(task.splits.calibrate.items):
        some = {name: task.layers[name] for name, use in uses.items() if use.item == number}
        if some:
            found |= altered_layers(task.model, task.objective, item, some)
    return {name: found[name] for name in task.layers if name in found}


def _leaving(task: Task, why: Mapping[str, str], named: Collection[str]) -> Task:
    """The task without some layers, and without those that must have the same option.

    Args:
        why: layer → why it stays as it is.
    """
    if not why:
        return task
    dense, groups = with_groups(why, task.same_option)
    asked = next((name for name in dense if name in named), None)
    if asked is not None:
        raise TaskError(refusal(asked, dense[asked]), "compress")
    if len(dense) == len(task.layers):
        raise TaskError(nothing_left(dense), "compress")
    text = note(dense, task.layers)
    return replace(
        task,
        layers={name: layer for name, layer in task.layers.items() if name not in dense},
        options={name: options for name, options in task.options.items() if name not in dense},
        same_option=groups,
        notes=(*task.notes, text),
        warnings=(*task.warnings, text),
    )


def _with_notes(task: Task) -> Task:
    """What the model and the data give reason to say."""
    doubts, rough = [], []
    if (message := left_over(task.model)) is not None:
        doubts.append(message)
    if computed := computed_weights(task.model):
        doubts.append(off_path.computed_note(task.model, computed))
    if task.budget is not None and (leak := task.splits.leak()) is not None:
        doubts.append(leak)
    documents = len(set(task.splits.select.documents))
    if task.max_drop is not None and documents < FEW_DOCUMENTS:
        rough.append(
            f"the select split has items of {documents} documents only: what it says of a plan's "
            "chance is rough, and plans are chosen with more caution than need be; give more "
            "select items, or more documents"
        )
    warnings = (*task.warnings, *doubts)
    return replace(task, notes=(*task.notes, *doubts, *rough), warnings=warnings)


def _check_budget(task: Task) -> None:
    if task.budget is None:
        return
    if task.budget.metric == "accuracy" and not task.objective.has_accuracy:
        raise TaskError(
            f"metric 'accuracy': loss {task.objective.name} has no predictions that are right or "
            "wrong; use metric 'loss'",
            "budget",
            "metric",
        )
    if task.budget.metric == "accuracy" and task.objective.measure == "nats/token":
        raise TaskError(
            "metric 'accuracy' needs one prediction per item; for language models use metric "
            "'loss'",
            "budget",
            "metric",
        )
    if task.budget.quantile is not None:
        least = documents_needed(task.budget.quantile, task.budget.confidence)
        found = len(set(task.splits.certify.clusters().tolist()))
        if found < least:
            raise TaskError(
                f"the certify split has items of {found} documents, and to bound the "
                f"{task.budget.quantile:g} quantile at {task.budget.confidence:g} confidence it "
                f"takes {least} at least; give more documents, or ask for a lower quantile",
                "budget",
                "quantile",
            )
    if task.settings.curvature == "input" and task.max_drop is not None:
        raise TaskError(
            'curvature="input" prices the error of layers, in no unit of loss: it cannot plan for '
            "max_drop; pass max_bytes, or another curvature",
            "price",
            "curvature",
        )


def _with_limits(task: Task) -> Task:
    """The task with the budget's limits on size and speed, seen to be met together by some plan."""
    budget = task.budget
    if budget is None or not budget.limited:
        return task
    # 1. What every option takes of every limit.
    if budget.max_macs is not None or budget.max_bops is not None:
        task = with_work(task)
    rows = []
    for name, options in task.options.items():
        for option in options:
            size = task.layer_bytes(name, option)
            rows.append(Choice(layer=name, option=option.key, bytes=size, price=0.0))
    task = replace(task, limits=limits_of(budget, rows, task.work or work_of(task.layers)))
    # 2. Whether some plan keeps to all of them.
    try:
        cheapest(rows, task.within)
    except Infeasible as error:
        raise _explained(task, error) from None
    return task


def _explained(task: Task, error: Infeasible) -> Infeasible:
    """Why no option lowers the multiply-adds, where that is what is missed."""
    missed = {shortfall.name for shortfall in error.shortfalls}
    if "max_macs" not in missed or any(macs_left(option) != 1.0 for option in task.offered):
        return error
    return Infeasible(
        f"{error}. No option here lowers max_macs: zeros are multiplied like any other weight, "
        'except those of pattern "2:4" on sparse tensor cores; prune(structured=...) removes whole '
        "units",
        *error.shortfalls,
    )


def with_work(task: Task) -> Task:
    """The task with the multiply-adds of every layer: one forward pass over the calibration
    items."""
    batches = task.splits.calibrate.batches(task.settings.batch_size)
    counted = multiply_adds(task.model, task.objective, batches, task.layers)
    return replace(task, work=work_of(task.layers, counted))


def _check_recovery(task: Task) -> None:
    if task.recover is None or task.recover.loss != "task":
        return
    if task.budget is not None and task.budget.metric in OF_OUTPUTS:
        raise TaskError(
            f"task trains on labels, and metric {task.budget.metric!r} measures how far outputs "
            "are from the uncompressed model's; write distill",
            "recover",
            "loss",
        )
    if isinstance(task.objective, LabelFree):
        raise TaskError(
            f"task needs labels, which the objective {task.objective.name} has none of; write "
            "distill",
            "recover",
            "loss",
        )
