"""Recovery: a short training that gives back a part of what a compression took and none of what it
saved.

Only what the stored form can say is trained (`curvprune.compression.trainable`), at the very model
that would be stored; so what is measured on the select split is what is written. Normalisation
statistics stay frozen and dropout stays off: the statistics of a few calibration batches are
noisier than those that are there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from curvprune.compat import multiplies_bfloat16_fast
from curvprune.compression.distillation import Distillation
from curvprune.compression.grids import dequantize
from curvprune.compression.rounding import Rounded
from curvprune.compression.solver import Solved
from curvprune.compression.trainable import FreeGrid, FreePart, free_parts
from curvprune.compression.training import Training
from curvprune.model import (
    Batch,
    ItemResults,
    LabelFree,
    Loss,
    Split,
    evaluate,
    evaluating,
    find_layers,
    to_device,
)
from curvprune.options import quantizer_of
from curvprune.schema import Json, Number, encode

# Most that bfloat16 products may change the first item's loss. SmolLM2-135M, cosine of the gradient
# with the one in float32: 3 bits .997 (the loss changed by 0.3 %), 6 bits .985 (6 %), 8 bits .84
# (it doubled).
HALF_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class RecoveryItems:
    """What a recovery reads.

    Attributes:
        train: items to train on. No part of the certify split.
        select: items that choose the best state.
        before: results of the compressed model on ``select``, if they are known: one measurement
            less.
    """

    train: Split
    select: Split
    before: ItemResults | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryStep:
    """A moment of a recovery at which the select split was evaluated.

    Attributes:
        step: steps done.
        training: mean training loss since the measurement before; ``None`` at the start.
        select: mean loss on the select split.
    """

    step: int
    training: Number | None
    select: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySummary:
    """A `Recovery` in numbers, as it is written: its fields, without the model."""

    loss_before: Number
    loss_after: Number
    measure: str
    steps: int
    best_step: int
    trained: int
    flipped: int
    seconds: float
    history: tuple[RecoveryStep, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What a recovery did.

    Attributes:
        model: the model in its best state on select: the one it came in, if no later one was
            better.
        solved: its compressed layers, zeros and, unless they were trained, codes as they were.
        loss_before, loss_after: mean loss on the select split, in ``measure``.
        results: the best state's results on the select split, item by item.
        measure: what losses are counted in.
        steps: steps done; ``best_step`` is the one whose state was kept (0: as it came).
        history: what was measured, at the start and every so many steps.
        trained: how many numbers were free.
        flipped: how many codes are not what they were.
        seconds: wall time.
        notes: what the report must say.
    """

    model: nn.Module
    solved: dict[str, Solved]
    loss_before: float
    loss_after: float
    results: ItemResults
    measure: str
    steps: int
    best_step: int
    history: tuple[RecoveryStep, ...]
    trained: int
    flipped: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> RecoverySummary:
        """The numbers, without the model."""
        return RecoverySummary(
            loss_before=self.loss_before,
            loss_after=self.loss_after,
            measure=self.measure,
            steps=self.steps,
            best_step=self.best_step,
            trained=self.trained,
            flipped=self.flipped,
            seconds=round(self.seconds, 2),
            history=self.history,
            notes=self.notes,
        )

    def to_dict(self) -> dict[str, Json]:
        """JSON-ready, without the model."""
        written: dict[str, Json] = encode(self.summary)
        return written


class Diverged(ValueError):
    """The training loss or its gradient is no longer finite.

    ``recovery`` holds the best state before that step.
    """

    def __init__(self, message: str, recovery: Recovery) -> None:
        super().__init__(message)
        self.recovery = recovery


# ----------------------------------------------------------------------------------------- training


def recover_(
    model: nn.Module,
    solved: Mapping[str, Solved] | None,
    baseline: nn.Module,
    objective: Loss,
    items: RecoveryItems,
    training: Training,
    *,
    advance: Callable[[int], None] = lambda step: None,
) -> Recovery:
    """Train ``model`` in place, and leave it in its best state on the select split.

    Args:
        model: the compressed model, holding what ``solved`` says.
        solved: its compressed layers; ``None`` if unknown: then all zeros of layers' weights stay
            zero.
        baseline: the uncompressed model; only run.
        objective: what is measured on the select split, and trained with ``loss="task"``.
        items: what to train on, and what chooses.
        advance: called with the number of steps done.

    Raises:
        ValueError: before training, for a model with nothing to train, models whose outputs differ
            in shape, too little data, labels that are not there.
        Diverged: the loss is no longer finite.

    Cost:
        a step runs the baseline forward and the model forward and backward on ``batch_size`` items;
        a measurement is a forward pass over the select split. Memory: five copies of what is free
        (values, gradient, Adam's moments, best state), besides the two models.
    """
    # 1. Find what the stored form leaves free, and bring the model onto it.
    originals = find_layers(baseline) if training.codes else None
    parts = free_parts(model, solved, originals)
    _check(model, baseline, objective, parts, items, training)
    for part in parts:
        part.write_()

    # 2. Choose the loss, and the precision of its products.
    loss = objective
    if training.loss == "distill":
        of = objective.declared if isinstance(objective, LabelFree) else None
        loss = Distillation(baseline, of=of)
    home = next(model.parameters()).device
    first = to_device(items.train.items[0], home)
    products, note = _products(loss, model, baseline, first, training)

    # 3. Know where it starts, then train; whatever happens, the best state comes back.
    run = _Run(model, parts, objective, items, training)
    batches = _batches(items.train, training)
    diverged = ""
    with _handed_over(parts), run.ending_at_its_best():
        while not run.over and not diverged:
            batch = to_device(next(batches), home)
            mean, norm = run.differentiate(loss, batch, products)
            if math.isfinite(mean) and math.isfinite(norm):
                run.step_(mean)
                advance(run.step)
            else:
                diverged = (
                    f"recover: loss {mean:g}, norm of its gradient {norm:g} at step {run.step}; "
                    f"lower lr={training.lr:g}"
                )

    # 4. Say what it has done.
    notes = [note] if note else []
    if diverged:
        notes.append(f"{diverged}; the state of step {run.best_step} was kept")
    recovery = run.result(solved or {}, tuple(notes))
    if diverged:
        raise Diverged(notes[-1], recovery)
    return recovery


class _Run:
    """A training under way: its optimizer, what was measured, and the best state so far.

    The first state is the best one until another is better.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[FreePart],
        objective: Loss,
        items: RecoveryItems,
        training: Training,
    ) -> None:
        self.model, self.parts, self.objective = model, parts, objective
        self.select, self.training = items.select, training
        self.started = time.monotonic()
        self.step, self.over = 0, False
        self.at_first = self._evaluated() if items.before is None else items.before
        if not math.isfinite(self.at_first.mean_loss):
            raise ValueError(
                "recover: the compressed model's loss on the select items is "
                f"{self.at_first.mean_loss:g}, which is no start"
            )
        self.masters: list[Tensor] = []
        for part in parts:
            self.masters += part.masters
        self.optimizer = torch.optim.Adam(self.masters, lr=training.lr, fused=True)
        self.best, self.best_step = self.at_first, 0
        self.best_state = [master.clone() for master in self.masters]
        self.waited = 0  # measurements since the best one
        start = RecoveryStep(step=0, training=None, select=self.at_first.mean_loss)
        self.history = [start]
        self.since: list[float] = []  # training losses since the last measurement

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def differentiate(
        self, loss: Loss, batch: Batch, products: Callable[[], AbstractContextManager[object]]
    ) -> tuple[float, float]:
        """Begin a step: the mean loss of a batch, and the norm of its gradient before clipping."""
        self.step += 1
        # 1. The rate falls with the steps done or the time passed, whichever is further.
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(self.step, self.elapsed)
        # 2. Forward and backward; the parameters' hooks hand each gradient to the masters.
        with evaluating(self.model), torch.enable_grad():
            with products():
                total, count = loss.loss(self.model, batch)
            mean = total / max(1, count)
            mean.backward()
        # 3. Clip: one strange batch must not undo what many have gained.
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.training.clip)
        return float(mean.detach()), float(norm)

    def step_(self, mean: float) -> None:
        """Make the step, and measure where it is time to."""
        # 1. Move the masters, and store them as they would be on disk.
        self.optimizer.step()
        # The next batch may not reach every parameter.
        self.optimizer.zero_grad()
        for part in self.parts:
            part.write_()
        # 2. Is this the last step?
        self.since.append(mean)
        seconds = self.training.seconds
        late = seconds is not None and self.elapsed >= seconds
        self.over = self.step == self.training.steps or late
        # 3. Measure now and then, and always at the end.
        if self.over or self.step % self.training.interval == 0:
            self._measure()

    def _measure(self) -> None:
        now = self._evaluated()
        mean = sum(self.since) / len(self.since)
        self.history.append(RecoveryStep(step=self.step, training=mean, select=now.mean_loss))
        self.since = []
        # A tie keeps the earlier state, at the start the one without training.
        if now.mean_loss < self.best.mean_loss:
            self.best, self.best_step, self.waited = now, self.step, 0
            for kept, master in zip(self.best_state, self.masters, strict=True):
                kept.copy_(master)
        else:
            self.waited += 1
        patience = self.training.patience
        self.over = self.over or (patience is not None and self.waited >= patience)

    def _evaluated(self) -> ItemResults:
        batches = self.select.batches(self.training.batch_size)
        return evaluate(self.model, batches, self.objective)

    @contextmanager
    def ending_at_its_best(self) -> Iterator[None]:
        """Bring the best state back, also after an exception."""
        try:
            yield
        finally:
            for kept, master in zip(self.best_state, self.masters, strict=True):
                master.copy_(kept)
            for part in self.parts:
                part.write_()

    def result(self, solved: Mapping[str, Solved], notes: tuple[str, ...]) -> Recovery:
        """What was done, with the model as it is now."""
        on_grid = [part for part in self.parts if isinstance(part, FreeGrid)]
        grids = {part.layer.name: part.stored() for part in on_grid}
        return Recovery(
            model=self.model,
            solved=_solved_now(self.model, solved, grids),
            loss_before=self.at_first.mean_loss,
            loss_after=self.best.mean_loss,
            results=self.best,
            measure=self.objective.measure,
            steps=self.step,
            best_step=self.best_step,
            history=tuple(self.history),
            trained=sum(part.free for part in self.parts),
            flipped=sum(part.flipped for part in on_grid),
            seconds=self.elapsed,
            notes=notes,
        )


@contextmanager
def _handed_over(parts: Sequence[FreePart]) -> Iterator[None]:
    """The dense gradient of a weight goes as soon as that of its free numbers is there."""

    def hand_over(part: FreePart, parameter: Tensor) -> None:
        assert parameter.grad is not None
        part.take_(parameter.grad)
        parameter.grad = None

    handles = [
        part.parameter.register_post_accumulate_grad_hook(partial(hand_over, part))
        for part in parts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(split: Split, training: Training) -> Iterator[Batch]:
    """Batches without end: every item once an epoch, in a new order each."""
    generator = torch.Generator().manual_seed(training.seed)
    # All batches are of one size: what is left of an epoch waits for the next one's order.
    size = min(training.batch_size, len(split.items))
    while True:
        order = torch.randperm(len(split.items), generator=generator).tolist()
        for i in range(0, len(order) - size + 1, size):
            yield split.together([split.items[j] for j in order[i : i + size]])


def _products(
    loss: Loss, model: nn.Module, baseline: nn.Module, item: Batch, training: Training
) -> tuple[Callable[[], AbstractContextManager[object]], str]:
    """What a step's forward passes run under, and a note if that is not what was asked for."""
    if not training.bfloat16 or not _bfloat16_pays(model, baseline):
        return nullcontext, ""
    half = partial(torch.autocast, next(model.parameters()).device.type, torch.bfloat16)
    # Try it on one item: it must run, and tell nearly the same loss.
    with torch.no_grad(), evaluating(model):
        exact = float(loss.loss(model, item)[0])
        try:
            with half():
                coarse = float(loss.loss(model, item)[0])
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            return nullcontext, f"recover: products in float32, because in bfloat16 {why}"
    if not abs(coarse - exact) <= HALF_TOLERANCE * abs(exact):
        return nullcontext, (
            f"recover: products in float32, because in bfloat16 an item's loss is {coarse:.4g} "
            f"instead of {exact:.4g}"
        )
    return half, ""


def _bfloat16_pays(model: nn.Module, baseline: nn.Module) -> bool:
    """Both models are float32 on one kind of device, which multiplies bfloat16 faster."""
    kind = next(model.parameters()).device.type
    for tensor in (*model.parameters(), *baseline.parameters()):
        if tensor.device.type != kind or tensor.dtype != torch.float32:
            return False
    return multiplies_bfloat16_fast(kind)


def _check(
    model: nn.Module,
    baseline: nn.Module,
    objective: Loss,
    parts: Sequence[FreePart],
    items: RecoveryItems,
    training: Training,
) -> None:
    if model is baseline:
        raise ValueError(
            "recover: the compressed model is the baseline itself; pass the model as it was before"
        )
    if not parts:
        raise ValueError(
            "recover: nothing to train: no parameter of the model wants a gradient (requires_grad)"
        )
    if not items.train.items or not items.select.items:
        raise ValueError(
            "recover: items to train on and items to select on are needed, at least one of each"
        )
    if training.loss == "task" and isinstance(objective, LabelFree):
        raise ValueError(
            "recover: loss='task' needs labels, and objective label-free has none; use "
            "loss='distill'"
        )
    home, other = next(model.parameters()).device, next(baseline.parameters()).device
    if home != other:
        raise ValueError(
            f"recover: the model is on {home}, the baseline on {other}; move one of them"
        )
    item = to_device(items.train.items[0], home)
    shapes: list[tuple[int, ...]] = []
    for which in (model, baseline):
        with torch.no_grad(), evaluating(which):
            shapes.append(tuple(objective.outputs(which, item).shape))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"recover: the compressed model's logits are {shapes[0]}, the baseline's "
            f"{shapes[1]}; expected one shape (the same vocabulary or classes): pass the model "
            "that was compressed"
        )


# -------------------------------------------------------------------------------------------- state


def trained_tensors(recovery: Recovery) -> dict[str, Tensor]:
    """All that `restore_` needs of a recovery.

    Scales and float zero points of rounded layers, their codes where some have changed, other
    parameters as they are.
    """
    layers = find_layers(recovery.model)
    tensors: dict[str, Tensor] = {}
    # 1. Rounded weights follow from their grids and codes.
    on_grid: set[int] = set()
    for name, one in recovery.solved.items():
        if one.codes is None or one.scale is None:
            continue
        on_grid.add(id(layers[name].weight))
        if recovery.flipped:
            tensors[f"{name}.weight_codes"] = one.codes
        tensors[f"{name}.weight_scale"] = one.scale
        if one.zero is not None and one.zero.is_floating_point():
            tensors[f"{name}.weight_zero_point"] = one.zero
    # 2. All others as they are, a tied one under its first name.
    for name, parameter in recovery.model.named_parameters():
        if id(parameter) not in on_grid:
            tensors[name] = parameter.detach()
    return tensors


@torch.no_grad()
def restore_(
    model: nn.Module, solved: Mapping[str, Solved], tensors: Mapping[str, Tensor]
) -> dict[str, Solved]:
    """Bring the model of before a recovery to its state afterwards; returns its solutions.

    Args:
        solved: the solutions of before.
        tensors: what `trained_tensors` gave.
    """
    layers = find_layers(model)
    grids: dict[str, Rounded] = {}
    for name, one in solved.items():
        quantize = quantizer_of(one.option)
        if one.codes is None or quantize is None:
            continue
        # What was not free is not stored twice: it is as it was.
        grid = Rounded(
            codes=tensors.get(f"{name}.weight_codes", one.codes),
            scale=tensors[f"{name}.weight_scale"],
            zero=tensors.get(f"{name}.weight_zero_point", one.zero),
        )
        size = quantize.group_size
        wide = torch.promote_types(layers[name].weight.dtype, torch.float32)
        layers[name].write_(dequantize(grid.codes, grid.scale, grid.zero, size, dtype=wide))
        grids[name] = grid
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    return _solved_now(model, solved, grids)


def _solved_now(
    model: nn.Module, solved: Mapping[str, Solved], grids: Mapping[str, Rounded]
) -> dict[str, Solved]:
    """The solutions of a model whose weights have moved; they share the memory of its weights."""
    layers = find_layers(model)
    now: dict[str, Solved] = {}
    for name, one in solved.items():
        weight = layers[name].as_matrix(layers[name].weight.detach())
        now[name] = replace(one, weight=weight)
    for name, grid in grids.items():
        now[name] = replace(now[name], codes=grid.codes, scale=grid.scale, zero=grid.zero)
    return now
