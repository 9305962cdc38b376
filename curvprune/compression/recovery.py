"""Recovery: a short training that gives back a part of what a compression took and none of what it
saved.

Only what the stored form can say is trained: the survivors of a pruned weight (its zeros stay), the
scales of a rounded one, its codes where that is asked for, and everything that is stored as floats.
The gradient is taken at the very model that would be stored, scales rounded to 16 bits and casts
rounded to their type, and moves wide copies of those numbers (of codes, straight through the
rounding); so what is measured on the select split is what is written. Normalisation statistics stay
frozen and dropout stays off: the statistics of a few calibration batches are noisier than those
that are there.

Step sizes are relative. A tensor is trained in units of a power of two near its root mean square, a
scale in units of itself, so that one learning rate serves tensors of any size (as in Adafactor,
arXiv 1804.04235) and nothing is rounded on the way in and out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compression.grids import code_range, dequantize, round_scale, spread
from curvprune.compression.solver import Solved
from curvprune.model import (
    Batch,
    ItemResults,
    LabelFree,
    Layer,
    Objective,
    Split,
    collate,
    evaluate,
    evaluating,
    find_layers,
    to_device,
)
from curvprune.options import Cast, PruneCast, pruner_of, quantizer_of

LOSSES = ("distill", "task")
STEPS = 200
WARM_UP = (
    10  # steps until the full rate, at most a tenth of them: Adam's second moments are noise before
)
# Most that bfloat16 products may change the first item's loss. SmolLM2-135M, cosine of the gradient
# with the one in float32: 3 bits .997 (the loss changed by 0.3 %), 6 bits .985 (6 %), 8 bits .84
# (it doubled).
HALF_TOLERANCE = 0.1
CODES_UP_TO = 4  # bits: what finer codes could gain the scales give
# Steps of the grid that a position moves for a relative change of one. SmolLM2-135M, 24 steps of 8
# x 256 tokens, loss added on select 0.1373: 0.0899 with scales alone, 0.0820 with 2, 0.0878 with 8.
CODE_UNIT = 2.0
SURE = (
    0.4999  # an uncompressed weight this near to its code's value tells where in the cell it lies
)
_ROWS = 64  # rows of logits compared at a time: some megabytes at vocabularies of 10^5
SMALLEST_UNIT = 2.0**-10  # a bias of zeros has no size of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How to train.

    Args:
        loss: ``"distill"``, KL from the uncompressed model's outputs (no labels), or ``"task"``,
            the objective itself.
        steps: optimizer steps; by default as many as fit into ``seconds``, or 200.
        seconds: stop, with the rate at its end, after so long. The result then depends on the
            machine's speed.
        lr: relative learning rate: the change of a number per step, over the root mean square of
            its tensor (over itself, for a scale). Cosine to zero after `WARM_UP` steps. Few steps
            want more of it: of the 0.104 nats of SmolLM2-135M at 2 to 6 bits 48 steps, with codes,
            leave 0.047 with 1e-3, 0.040 with 2e-3, 0.046 with 4e-3.
        batch_size: items per step.
        every: steps between measurements on the select split; by default a tenth of ``steps``, at
            least 10 (20 without ``steps``).
        patience: stop after so many measurements in a row that were no better than the best. By
            default the schedule runs to its end: its last steps, at small rates, often gain the
            most.
        clip: largest norm of the gradient with respect to the relative changes.
        bfloat16: multiply in bfloat16 while training, where both models are float32 on a device
            that does so twice as fast (a CPU with AVX512-BF16, a CUDA device) and the loss is large
            enough (see `HALF_TOLERANCE`). Measurements on the select split do not.
        codes: train the codes of layers of at most `CODES_UP_TO` bits as well, with the gradient
            straight through the rounding. Each weight has a position on its grid, which starts
            where the uncompressed weight lies in its code's cell, or in the middle where that is
            outside; the code is the nearest. Zeros of pruned weights stay.
        seed: of the order of the items.
    """

    loss: Literal["distill", "task"] = "distill"
    steps: int | None = None
    seconds: float | None = None
    lr: float = 1e-3
    batch_size: int = 8
    every: int | None = None
    patience: int | None = None
    clip: float = 1.0
    bfloat16: bool = True
    codes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"recover: loss={self.loss!r}: expected one of {LOSSES}")
        for name in ("steps", "batch_size", "every", "patience", "seconds", "lr", "clip"):
            value = getattr(self, name)
            whole = name in ("steps", "batch_size", "every", "patience")
            if value is None and name in ("steps", "every", "patience", "seconds"):
                continue
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
                raise ValueError(
                    f"recover: {name}={value!r} must be a positive {'whole ' if whole else ''}number"
                )
        if self.steps is None and self.seconds is None:
            object.__setattr__(self, "steps", STEPS)

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return self.every or (20 if self.steps is None else max(10, self.steps // 10))

    def rate(self, step: int, elapsed: float) -> float:
        """Learning rate of a step, the first being 1, after so many seconds."""
        by_steps = 0.0 if self.steps is None else (step - 1) / self.steps
        by_time = 0.0 if self.seconds is None else elapsed / self.seconds
        warm = WARM_UP if self.steps is None else min(WARM_UP, math.ceil(self.steps / 10))
        return (
            self.lr
            * min(1.0, step / warm)
            * (1 + math.cos(math.pi * min(1.0, max(by_steps, by_time))))
            / 2
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What a recovery did.

    Attributes:
        model: the model in its best state on select: the one it came in, if no later one was
            better.
        solved: its compressed layers, zeros and, unless they were trained, codes as they were.
        loss_before, loss_after: mean loss on the select split, in ``unit``.
        results: the best state's results on the select split, item by item.
        steps: steps done; ``best_step`` is the one whose state was kept (0: as it came).
        history: ``{"step", "training", "select"}`` of each measurement: the mean training loss
            since the one before, and the loss on select.
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
    history: tuple[dict[str, Any], ...]
    trained: int
    flipped: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the model."""
        names = ("loss_before", "loss_after", "measure", "steps", "best_step", "trained", "flipped")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 2),
            "history": list(self.history),
            "notes": list(self.notes),
        }


class Diverged(ValueError):
    """The training loss or its gradient is no longer finite. ``recovery`` holds the best state
    before that step."""

    def __init__(self, message: str, recovery: Recovery) -> None:
        super().__init__(message)
        self.recovery = recovery


# ---------------------------------------------------------------------------------- what is trained


@dataclass(slots=True)
class _Floats:
    """A parameter stored as floats; pruned weights keep their zeros, a cast weight its narrow
    type."""

    parameter: nn.Parameter
    mask: Tensor | None = None
    narrow: torch.dtype | None = None
    measure: float = 1.0
    masters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = _wide(self.parameter.detach())
        self.measure = _unit(values if self.mask is None else values[self.mask])
        self.masters = [values / self.measure]

    @property
    def free(self) -> int:
        return self.parameter.numel() if self.mask is None else int(self.mask.sum())

    def take_(self, gradient: Tensor) -> None:
        """Gradient of the masters from that of the parameter."""
        gradient = _wide(gradient) * self.measure
        self.masters[0].grad = gradient if self.mask is None else gradient * self.mask

    @torch.no_grad()
    def write_(self) -> None:
        """The parameter as it would be stored."""
        values = self.masters[0] * self.measure
        self.parameter.copy_(values if self.narrow is None else values.to(self.narrow))


@dataclass(slots=True)
class _OnGrid:
    """A rounded weight ``(codes − zero) · scale``: the scales are free, and the zero points of one
    bit, which are no integers. ``dL/ds = Σ dL/dw · (code − zero)`` over a group, ``dL/dz = −s Σ
    dL/dw``. With a ``target``, the uncompressed weight, the codes are free as well: the last master
    holds how far each weight's position is from its first code, and the gradient of a code, ``s
    dL/dw``, is taken for that of the position."""

    layer: Layer
    solved: Solved
    group_size: int | None
    target: Tensor | None = None
    codes: Tensor = field(init=False)
    first: Tensor = field(init=False)
    fixed: Tensor | None = None
    measure: Tensor = field(init=False)
    zero_unit: float = 1.0
    masters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.solved.scale is not None and self.solved.codes is not None
        weight = self.layer.weight
        self.codes = self.first = self.solved.codes.to(weight.device)
        self.measure = self.solved.scale.to(_wide(weight.detach()[:0]))
        self.masters = [torch.ones_like(self.measure)]
        if self.free_zero:
            zero = _wide(self.solved.zero).to(self.measure)  # type: ignore[arg-type]
            self.zero_unit = _unit(zero)
            self.masters.append(zero / self.zero_unit)
        if self.target is not None:
            if pruner_of(self.solved.option) is not None:
                self.fixed = self.layer.as_matrix(weight.detach()) == 0
            offset = self._spread(self.measure, self.target.to(self.measure), torch.div)
            if self.solved.zero is not None:
                offset = self._spread(self.solved.zero.to(self.measure), offset, torch.add)
            offset -= self.first
            self.masters.append(torch.where(offset.abs() < SURE, offset, 0.0) / CODE_UNIT)
            self.target = None

    def _spread(
        self, parameters: Tensor, values: Tensor, how: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        return how(values, spread(parameters, values.shape[1], self.group_size, dim=1))

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.weight

    @property
    def free_zero(self) -> bool:
        quantize, zero = quantizer_of(self.solved.option), self.solved.zero
        assert quantize is not None
        return zero is not None and zero.is_floating_point() and not quantize.symmetric

    @property
    def free_codes(self) -> bool:
        return len(self.masters) > 1 + self.free_zero

    @property
    def free(self) -> int:
        return sum(m.numel() for m in self.masters) - (
            0 if self.fixed is None else int(self.fixed.sum())
        )

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and zero as they lie on disk, where the solution's are."""
        assert self.solved.codes is not None
        return self.codes.to(self.solved.codes.device), *self._grid()

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        old, zero = self.solved.scale, self.solved.zero
        assert old is not None
        scale = round_scale(self.masters[0] * self.measure, old.dtype).to(old.dtype)
        if self.free_zero:
            assert zero is not None
            zero = (self.masters[1] * self.zero_unit).to(zero.dtype)
        return scale, zero

    def take_(self, gradient: Tensor) -> None:
        gradient = _wide(self.layer.as_matrix(gradient))
        scale, zero = self._grid()
        steps = self.codes.to(gradient)
        if zero is not None:
            steps = self._spread(zero.to(gradient), steps, torch.sub)
        self.masters[0].grad = _group_sums(gradient * steps, self.group_size) * self.measure
        if self.free_zero:
            sums = _group_sums(gradient, self.group_size)
            self.masters[1].grad = -self.zero_unit * scale.to(gradient) * sums
        if self.free_codes:
            moved = self._spread(scale.to(gradient) * CODE_UNIT, gradient, torch.mul)
            self.masters[-1].grad = (
                moved if self.fixed is None else moved.masked_fill_(self.fixed, 0)
            )

    @torch.no_grad()
    def write_(self) -> None:
        if self.free_codes:
            quantize = quantizer_of(self.solved.option)
            assert quantize is not None
            low, high = code_range(quantize.bits)
            # Half a step beyond the last values and no further: from there every position finds
            # back.
            lowest, highest = (
                (bound - self.first.to(self.measure)) / CODE_UNIT
                for bound in (low - 0.5, high + 0.5)
            )
            self.masters[-1].clamp_(lowest, highest)
            steps = (self.masters[-1] * CODE_UNIT).round_().add_(self.first)
            self.codes = steps.clamp_(low, high).to(torch.int8)
        scale, zero = self._grid()
        zero = None if zero is None else zero.to(self.measure.device)
        self.layer.write_(
            dequantize(self.codes, scale, zero, self.group_size, dtype=self.measure.dtype)
        )


_Part = _Floats | _OnGrid


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit(values: Tensor) -> float:
    """A power of two near the root mean square: dividing and multiplying by it are exact."""
    size = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(
        max(1, values.numel())
    )
    return (
        max(SMALLEST_UNIT, 2.0 ** round(math.log2(size))) if 0 < size < math.inf else SMALLEST_UNIT
    )


def _group_sums(
    values: Float[Tensor, "out in"], group_size: int | None
) -> Float[Tensor, "out groups"]:
    size = group_size or values.shape[1]
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size)).sum(2)


def _parts(
    model: nn.Module,
    solved: Mapping[str, Solved] | None,
    targets: Mapping[str, Layer] | None = None,
) -> list[_Part]:
    """Every floating-point parameter that wants a gradient, as what its stored form leaves free.
    ``solved=None``: the model's history is unknown, and zeros of any layer's weight are taken for
    pruned. ``targets``: the layers of the uncompressed model, where codes are to be trained."""
    parts: dict[int, _Part] = {}
    for name, layer in find_layers(model).items():
        weight = layer.weight
        if not weight.requires_grad:
            continue
        if solved is None:
            kept = weight.detach() != 0
            parts[id(weight)] = _Floats(weight, mask=None if bool(kept.all()) else kept)
        elif name in solved:
            one = solved[name]
            quantize = quantizer_of(one.option)
            if quantize is not None:
                target = None
                if targets is not None and quantize.bits <= CODES_UP_TO:
                    # Where units were removed, no weight of the uncompressed layer says where to
                    # start.
                    own = targets[name] if targets[name].shape == layer.shape else layer
                    target = own.as_matrix(own.weight.detach())
                parts[id(weight)] = _OnGrid(layer, one, quantize.group_size, target)
                continue
            mask = None if pruner_of(one.option) is None else weight.detach() != 0
            cast = one.option.cast if isinstance(one.option, PruneCast) else one.option
            narrow = getattr(torch, cast.dtype) if isinstance(cast, Cast) else None
            parts[id(weight)] = _Floats(weight, mask=mask, narrow=narrow)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in parts:
            parts[id(parameter)] = _Floats(parameter)
    return [part for part in parts.values() if part.free]


def _solved_now(
    model: nn.Module,
    solved: Mapping[str, Solved],
    grids: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
) -> dict[str, Solved]:
    """The solutions of a model whose weights have moved; they share the memory of its weights."""
    layers = find_layers(model)
    now = {
        n: replace(one, weight=layers[n].as_matrix(layers[n].weight.detach()))
        for n, one in solved.items()
    }
    for name, (codes, scale, zero) in grids.items():
        now[name] = replace(now[name], codes=codes, scale=scale, zero=zero)
    return now


# ----------------------------------------------------------------------------------------- training


def recover_(
    model: nn.Module,
    solved: Mapping[str, Solved] | None,
    baseline: nn.Module,
    objective: Objective,
    train: Split,
    select: Split,
    training: Training,
    *,
    before: ItemResults | None = None,
    advance: Callable[[int], None] = lambda step: None,
) -> Recovery:
    """Train ``model`` in place, and leave it in its best state on ``select``.

    Args:
        model: the compressed model, holding what ``solved`` says.
        solved: its compressed layers; ``None`` if unknown: then all zeros of layers' weights stay
            zero.
        baseline: the uncompressed model; only run.
        objective: what is measured on ``select``, and trained with ``loss="task"``.
        train: items to train on. No part of the certify split.
        before: results of ``model`` on ``select``, if they are known: one measurement less.
        advance: called with the number of steps done.

    Cost: a step runs the baseline forward and the model forward and backward on ``batch_size``
    items; a measurement is
    a forward pass over ``select``. Memory: five copies of what is free (values, gradient, Adam's
    moments, best state), besides the two models.

    Raises ``ValueError`` before training for a model with nothing to train, models whose outputs
    differ in shape, too little data, labels that are not there; `Diverged` where the loss is no
    longer finite.
    """
    home = next(model.parameters()).device
    parts = _parts(model, solved, find_layers(baseline) if training.codes else None)
    _check(model, baseline, objective, parts, train, select, training)
    for part in parts:
        part.write_()
    masters = [master for part in parts for master in part.masters]
    of = objective.of if isinstance(objective, LabelFree) else None
    loss = objective if training.loss == "task" else _Distillation(baseline, of=of)
    products, note = _products(loss, model, baseline, to_device(train.items[0], home), training)
    start = time.monotonic()

    def measure() -> ItemResults:
        return evaluate(model, select.batches(training.batch_size), objective)

    best = at_first = measure() if before is None else before
    if not math.isfinite(at_first.mean_loss):
        raise ValueError(
            f"recover: the compressed model's loss on the select items is {at_first.mean_loss:g}, "
            "which is no start"
        )
    optimizer = torch.optim.Adam(masters, lr=training.lr, fused=True)
    best_state, best_step, step, diverged = [m.clone() for m in masters], 0, 0, ""
    history: list[dict[str, Any]] = [{"step": 0, "training": None, "select": at_first.mean_loss}]
    since: list[float] = []
    batches, waited, over = _batches(train, training), 0, False
    handles = [p.parameter.register_post_accumulate_grad_hook(_hand_over(p)) for p in parts]
    try:
        while not over:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step, time.monotonic() - start)
            with evaluating(model), torch.enable_grad():
                with products():
                    total, count = loss.loss(model, to_device(next(batches), home))
                mean = total / max(1, count)
                mean.backward()
            norm = torch.nn.utils.clip_grad_norm_(masters, training.clip)
            if not (math.isfinite(float(mean.detach())) and bool(norm.isfinite())):
                diverged = (
                    f"recover: loss {float(mean.detach()):g}, norm of its gradient "
                    f"{float(norm):g} at step {step}; lower lr={training.lr:g}"
                )
                break
            optimizer.step()
            optimizer.zero_grad()  # the next batch may not reach every parameter
            for part in parts:
                part.write_()
            since.append(float(mean.detach()))
            over = step == training.steps or (
                training.seconds is not None and time.monotonic() - start >= training.seconds
            )
            if step % training.interval == 0 or over:
                now = measure()
                better = now.mean_loss < best.mean_loss
                entry = {
                    "step": step,
                    "training": sum(since) / len(since),
                    "select": _finite(now.mean_loss),
                }
                history.append(entry)
                since = []
                waited = 0 if better else waited + 1
                if better:
                    best, best_step = now, step
                    for kept, master in zip(best_state, masters, strict=True):
                        kept.copy_(master)
                over = over or (training.patience is not None and waited >= training.patience)
            advance(step)
    finally:
        for handle in handles:
            handle.remove()
        for kept, master in zip(best_state, masters, strict=True):
            master.copy_(kept)
        for part in parts:
            part.write_()
    grids = {p.layer.name: p.stored() for p in parts if isinstance(p, _OnGrid)}
    notes = [note] if note else []
    if diverged:
        notes.append(f"{diverged}; the state of step {best_step} was kept")
    recovery = Recovery(
        model=model,
        solved=_solved_now(model, solved or {}, grids),
        loss_before=at_first.mean_loss,
        loss_after=best.mean_loss,
        results=best,
        measure=objective.measure,
        steps=step,
        best_step=best_step,
        history=tuple(history),
        trained=sum(p.free for p in parts),
        flipped=sum(int((p.codes != p.first).sum()) for p in parts if isinstance(p, _OnGrid)),
        seconds=time.monotonic() - start,
        notes=tuple(notes),
    )
    if diverged:
        raise Diverged(notes[-1], recovery)
    return recovery


def _hand_over(part: _Part) -> Callable[[Tensor], None]:
    """The dense gradient of a weight goes as soon as that of its free numbers is there."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        part.take_(parameter.grad)
        parameter.grad = None

    return hook


def _batches(split: Split, training: Training) -> Iterator[Batch]:
    """Batches without end: every item once an epoch, in a new order each."""
    generator = torch.Generator().manual_seed(training.seed)
    size = min(training.batch_size, len(split.items))
    while True:
        order = torch.randperm(len(split.items), generator=generator).tolist()
        for i in range(0, len(order) - size + 1, size):
            yield collate([split.items[j] for j in order[i : i + size]])


class _Distillation(LabelFree):
    """The divergence from the baseline in one pass over the logits: of a language model they are
    the largest tensors, and autograd would keep several as large."""

    def loss_of(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad(), evaluating(self.reference):
            theirs = self.positions(self.logits(self.reference, batch), batch).logits
        ours = self.positions(logits, batch).logits
        return _Divergence.apply(ours, theirs), len(ours)


class _Divergence(torch.autograd.Function):
    """``Σ p (log p − log q)`` over rows of logits, ``p`` of theirs and ``q`` of ours; its gradient
    is ``q − p``."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        gradient, total = torch.empty_like(ours), _wide(ours[:0]).new_zeros(())
        for i in range(0, len(ours), _ROWS):
            rows = slice(i, i + _ROWS)
            log_q, log_p = (_wide(t[rows]).log_softmax(-1) for t in (ours, theirs))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * upstream, None


def _products(
    loss: Objective, model: nn.Module, baseline: nn.Module, item: Batch, training: Training
) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """What a training step's forward passes run under, and a note if it is not what was asked
    for."""
    tensors = (*model.parameters(), *baseline.parameters())
    kind = next(model.parameters()).device.type
    single = all(t.device.type == kind and t.dtype == torch.float32 for t in tensors)
    fast = {"cpu": torch.cpu._is_avx512_bf16_supported, "cuda": torch.cuda.is_bf16_supported}.get(
        kind, lambda: False
    )
    if not (training.bfloat16 and single and fast()):
        return nullcontext, ""
    half = partial(torch.autocast, kind, torch.bfloat16)
    with torch.no_grad(), evaluating(model):
        exact = float(loss.loss(model, item)[0])
        try:
            with half():
                coarse = float(loss.loss(model, item)[0])
        except RuntimeError as error:
            return (
                nullcontext,
                f"recover: products in float32, because in bfloat16 {str(error).splitlines()[0]}",
            )
    if not abs(coarse - exact) <= HALF_TOLERANCE * abs(exact):
        return nullcontext, (
            f"recover: products in float32, because in bfloat16 an item's loss is {coarse:.4g} "
            f"instead of {exact:.4g}"
        )
    return half, ""


def _check(
    model: nn.Module,
    baseline: nn.Module,
    objective: Objective,
    parts: list[_Part],
    train: Split,
    select: Split,
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
    if not train.items or not select.items:
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
    item = to_device(train.items[0], home)
    with torch.no_grad():
        shapes: list[tuple[int, ...]] = []
        for which in (model, baseline):
            with evaluating(which):
                shapes.append(tuple(objective.logits(which, item).shape))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"recover: the compressed model's logits are {shapes[0]}, the baseline's "
            f"{shapes[1]}; expected one shape (the same vocabulary or classes): pass the model "
            "that was compressed"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------- state


def trained_tensors(recovery: Recovery) -> dict[str, Tensor]:
    """All that `restore_` needs: the scales and float zero points of rounded layers, their codes
    where some have changed, other parameters as they are."""
    layers = find_layers(recovery.model)
    tensors, on_grid = {}, set()
    for name, one in recovery.solved.items():
        if one.codes is not None and one.scale is not None:
            on_grid.add(id(layers[name].weight))
            if recovery.flipped:
                tensors[f"{name}.weight_codes"] = one.codes
            tensors[f"{name}.weight_scale"] = one.scale
            if one.zero is not None and one.zero.is_floating_point():
                tensors[f"{name}.weight_zero_point"] = one.zero
    tensors |= {n: p.detach() for n, p in recovery.model.named_parameters() if id(p) not in on_grid}
    return tensors


@torch.no_grad()
def restore_(
    model: nn.Module, solved: Mapping[str, Solved], tensors: Mapping[str, Tensor]
) -> dict[str, Solved]:
    """Bring the model of before a recovery to its state afterwards; returns its solutions."""
    own, layers = dict(model.named_parameters()), find_layers(model)
    grids = {}
    for name, one in solved.items():
        if one.codes is not None:
            quantize = quantizer_of(one.option)
            assert quantize is not None
            scale, zero = (
                tensors[f"{name}.weight_scale"],
                tensors.get(f"{name}.weight_zero_point", one.zero),
            )
            codes = tensors.get(f"{name}.weight_codes", one.codes)
            wide = torch.promote_types(layers[name].weight.dtype, torch.float32)
            layers[name].write_(dequantize(codes, scale, zero, quantize.group_size, dtype=wide))
            grids[name] = codes, scale, zero
    for name, parameter in own.items():
        if name in tensors:
            parameter.copy_(tensors[name])
    return _solved_now(model, solved, grids)
