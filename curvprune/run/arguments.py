"""From the arguments of a Python verb to a task, as `curvprune.run.prepare` does from a recipe."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn

from curvprune import artifact
from curvprune.certificate import IN_THIS_PROCESS, loss_for
from curvprune.compression import Solved
from curvprune.files import StageLog, State
from curvprune.model import (
    Batch,
    Loss,
    LossLike,
    Split,
    Splits,
    as_split,
    check_independent,
    find_layers,
    make_loss,
    read_request,
    split_items,
    to_device,
)
from curvprune.options import Keep, Option
from curvprune.planning import Budget
from curvprune.run.task import Settings, Storage, Task, check_task
from curvprune.run.workspace import Workspace
from curvprune.targets import export_gguf, target_named

Data = Iterable[Batch] | Split | Splits


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What a verb was told besides the model, the data, the options and the budget."""

    loss: LossLike = "auto"
    layers: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    same_option: str | Sequence[str | Sequence[str]] = ()
    settings: Settings | None = None
    device: str | torch.device | None = None
    progress: bool = False

    @property
    def knobs(self) -> Settings:
        return self.settings or Settings()


def task_from(
    model: nn.Module,
    data: Data,
    options: Sequence[Option],
    budget: Budget | None,
    folder: Path,
    told: Arguments,
    *,
    priced: bool = False,
) -> tuple[Task, Workspace]:
    """The task of a verb, and a workspace in ``folder``.

    Args:
        priced: price on other items than those that layers are solved for.

    Raises ``ValueError`` for what cannot be; warns of what puts the result in doubt.
    """
    # 1. Layers, options and groups.
    settings = told.knobs
    found = find_layers(model, told.layers, exclude=told.exclude)
    if not found and told.exclude:
        raise ValueError(f"exclude={told.exclude!r} leaves no layer of layers={told.layers!r}")
    if not found:
        raise ValueError("layers is empty: expected names or globs, such as 'model.layers.*'")
    if not options:
        raise ValueError("options is empty: expected at least one, such as Quantize(bits=4)")
    target = target_named(settings.target)
    for layer in found.values():
        for option in options:
            target.check(model, layer, option)
    keys = [option.key for option in options]
    offered = {name: [Keep().key] for name in find_layers(model)} | dict.fromkeys(found, keys)
    groups = target.groups(model, read_request(told.same_option), offered)

    # 2. Splits of the data, and the model where it is to be worked on.
    splits = splits_from(data, seed=settings.seed, budget=budget, priced=priced)
    if told.device is not None:
        model = copy.deepcopy(model).to(told.device)
        own = find_layers(model)
        found = {name: own[name] for name in own if name in found}

    # 3. The task.
    task = Task(
        model=model,
        objective=objective_of(told.loss, model, splits.calibrate, budget),
        layers=found,
        options={name: tuple(options) for name in found},
        same_option=groups.layers,
        splits=splits,
        budget=budget,
        settings=settings,
        storage=_storage(model, settings),
        notes=(*groups.notes, *splits.calibrate.left_out()),
    )
    named = [told.layers] if isinstance(told.layers, str) else told.layers
    task = check_task(task, named=named, priced=priced)
    for text in task.warnings:
        warn_caller(text)
    log = StageLog(show=told.progress)
    return task, Workspace(state=State(folder / "state"), log=log, uses=IN_THIS_PROCESS)


def warn_caller(text: str) -> None:
    """Warn at the line of the user's that called a verb, however deep in the package this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("curvprune."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def _storage(model: nn.Module, settings: Settings) -> Storage:
    """Folders that hold an artifact and nothing for other readers."""
    portable = target_named(settings.target).portable

    def write(
        folder: Path,
        written: nn.Module,
        solved: Mapping[str, Solved],
        plan: Mapping[str, JsonValue],
    ) -> None:
        layers = find_layers(written)
        artifact.save(folder, written, layers, solved, plan, portable=portable)

    def read(folder: Path) -> nn.Module:
        return artifact.load_into(folder, copy.deepcopy(model)).eval()

    if settings.engine is None:
        return Storage(write=write, read=read)

    def write_whole(
        folder: Path,
        written: nn.Module,
        solved: Mapping[str, Solved],
        plan: Mapping[str, JsonValue],
    ) -> None:
        artifact.write_model(folder, written, solved, plan, portable=portable)

    # An engine runs the tokens as they are, and needs a config but no tokenizer.
    return Storage(write=write_whole, read=read, view=partial(export_gguf, tokenizer=False))


def objective_of(
    name: LossLike, model: nn.Module, split: Split, budget: Budget | None = None
) -> Loss:
    """The loss that a name stands for, told from the model and the first item if need be; where a
    budget is of the model's outputs, their divergence from this model's."""
    check_independent(model)
    first = to_device(split.first(), next(model.parameters()).device)
    return loss_for(budget, make_loss(name, model, first), model)


def check_metric(budget: Budget | None, objective: Loss) -> None:
    """Accuracy needs one prediction per item."""
    if budget is None or budget.metric != "accuracy":
        return
    if not objective.has_accuracy:
        raise ValueError(
            f"metric 'accuracy': loss {objective.name} has no predictions that are right or wrong; "
            "use metric 'loss'"
        )
    if objective.measure == "nats/token":
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )


def splits_from(data: Data, *, seed: int, budget: Budget | None, priced: bool) -> Splits:
    """The splits that were passed, or the data dealt out.

    With a budget the data are split into four. Without one every third item prices what the others
    solve; where nothing is priced, or there is one item, all items serve both.
    """
    if isinstance(data, Splits):
        return data
    if budget is not None:
        return split_items(data, seed=seed)
    split = as_split(data)
    calibrate = price = split
    if priced and len(split.items) > 2:
        calibrate = part_of(split, [i for i in range(len(split.items)) if i % 3 != 2])
        price = part_of(split, range(2, len(split.items), 3))
    return Splits(calibrate=calibrate, price=price, select=split, certify=split)


def part_of(split: Split, places: Iterable[int]) -> Split:
    """The items at some places of a split."""
    return split.some(places)
