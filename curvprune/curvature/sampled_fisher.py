"""One pass over the data that yields, for every layer at once, the true Fisher's trace and diagonal
and its value along any number of given changes.

For item n with T_n positions, back-propagate from the outputs of every position a random vector
with mean zero and the covariance of the score: of a softmax ``diag(p) − p pᵀ``, of any loss its
Hessian at the outputs (`curvprune.model.Loss.draw`: signs instead of sampled labels). Let ``g`` be
what arrives at a layer's weight. Positions are independent, so cross terms between positions vanish
in expectation. ``E[g gᵀ]`` summed over items
and divided by the number of positions is then exactly the Fisher matrix F of the mean loss. Hence,
per position and in nats,

    ½ δᵀ F δ  =  ½ Σ_n E[⟨g_n, δ⟩²] / Σ_n T_n,      tr F = Σ_n E‖g_n‖² / Σ_n T_n,

and likewise for diag F.

Source: Amari 1998; Martens 2020, "New insights and perspectives on the natural gradient method",
§5, §9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature.capture import wide
from curvprune.curvature.differentiation import differentiable
from curvprune.curvature.draws import TWO_LABELS, Draws
from curvprune.curvature.estimates import Estimate
from curvprune.distributed import all_sum, my_share, shared, world
from curvprune.model import Batch, Layer, Loss, evaluating, to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change δ of one layer's weight; kept as float16 with one scale where the model's precision
    allows it."""

    values: Float[Tensor, " n"]
    scale: float

    @staticmethod
    def of(delta: Float[Tensor, "out in"]) -> Change:
        """float64 changes are kept exactly; others to 11 bits relative to their largest entry, at
        half the memory."""
        flat = delta.reshape(-1)
        if flat.dtype == torch.float64:
            return Change(values=flat, scale=1.0)
        peak = float(flat.abs().max())
        return Change(values=(flat.float() / (peak or 1.0)).half(), scale=peak)

    def dot(self, gradient: Float[Tensor, " n"]) -> Tensor:
        """``⟨g, δ⟩``."""
        return torch.dot(gradient, self.values.to(gradient.dtype)) * self.scale

    def products(self, gradient: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """``⟨g, δ⟩`` and ``Σ (gᵢ δᵢ)²``."""
        # The scale comes last, in float64: in float32, squares of small changes would underflow.
        parts = self.values.to(gradient.dtype) * gradient
        return parts.sum().double() * self.scale, torch.dot(parts, parts).double() * self.scale**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where a pass goes on, and what it leaves behind after every item.

    Attributes:
        resume: the totals that ``after_item`` last received, to go on after that item with the same
            result; ``None`` starts at the first item.
        after_item: called with (items done, totals) after each item, for progress and checkpoints.
    """

    resume: dict[str, Tensor] | None = None
    after_item: Callable[[int, dict[str, Tensor]], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherPass:
    """What the pass found. Sums are per item; divide by ``count.sum()`` for a value per position.

    Attributes:
        count: positions of each item.
        along: layer → ``⟨g, δ⟩`` of every draw, ``(items, labels, changes)``.
        diagonals: layer → ½ mean over labels of ``Σ (gᵢ δᵢ)²``, the same with the diagonal of F
            alone.
        traces: layer → mean over labels of ``‖g‖²``, ``(items,)``.
        diagonal: layer → diagonal of F per position, ``(out, in)``.
        labels: draws per position.
        slopes: layer → ``⟨∇loss, δ⟩`` on the data's own labels, ``(items, changes)``, where they
            were asked for.
    """

    count: Float[Tensor, " items"]
    along: dict[str, Float[Tensor, "items labels changes"]]
    diagonals: dict[str, Float[Tensor, "items changes"]]
    traces: dict[str, Float[Tensor, " items"]]
    diagonal: dict[str, Float[Tensor, "out in"]]
    labels: int
    slopes: dict[str, Float[Tensor, "items changes"]]

    def squares(self, layer: str) -> Float[Tensor, "items changes"]:
        """½ mean over labels of ``⟨g, δ⟩²``: what each item adds to ½ δᵀFδ."""
        return 0.5 * self.along[layer].square().mean(1)

    def trace(self, layer: str) -> Estimate:
        """tr F of a layer in nats per position."""
        return ratio_estimate(self.traces[layer], self.count)


def ratio_estimate(sums: Float[Tensor, " items"], count: Float[Tensor, " items"]) -> Estimate:
    """``Σ sums / Σ count`` with the linearised (cluster) standard error over items; infinite for a
    single item."""
    n = len(sums)
    value = float(sums.sum() / count.sum())
    if n < 2:
        return Estimate(value=value, stderr=float("inf"), num_items=n)
    # An item's part in the error of a ratio: what it adds beyond its share of the positions.
    residual = sums - value * count
    variance = n / (n - 1) * float((residual**2).sum()) / float(count.sum()) ** 2
    return Estimate(value=value, stderr=variance**0.5, num_items=n)


def fisher_pass(
    model: nn.Module,
    objective: Loss,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    *,
    draws: Draws = TWO_LABELS,
    checkpoint: Checkpoint = Checkpoint(),
) -> FisherPass:
    """Run the pass. Cost: one forward and ``draws.labels`` backward passes per item (one more with
    ``draws.slopes``), one dot product per change and label; memory: one float32 diagonal of the
    layers, one weight gradient at a time.

    Args:
        items: batches of one item.
        changes: layer → changes to price; layers without changes get trace and diagonal only.
        draws: how many labels, from which seed.
        checkpoint: for long passes, see `Checkpoint`.

    Several processes share the items; each counts and resumes its own, and at the end all call
    ``after_item`` once more with the totals of all.

    A layer that received no gradient from any item has zeros: changes of it cost nothing.

    Raises:
        ValueError: changes of which none would cost anything, as no layer received a gradient.
        FloatingPointError: a non-finite gradient, naming the layer and the item.
    """
    if world() > max(1, len(items)):
        raise ValueError(
            f"{world()} processes for {len(items)} items: start at most one process for each item"
        )
    # 1. Totals, empty or from where an earlier pass was interrupted.
    device = next(model.parameters()).device
    totals = checkpoint.resume or _empty_totals(layers, changes, len(items), draws, device)
    totals = {k: v.to(device) for k, v in totals.items()}
    sums = _GradientSums(layers, changes, draws, totals)
    after_item = checkpoint.after_item or (lambda done, totals: None)

    # 2. This process's items, one after the other.
    with differentiating(model, layers), gradients_go_to(layers, sums.hook):
        done = int(totals["done"])
        mine = my_share(range(len(items)))
        left = mine[done:] if done < len(items) else ()
        for i in left:
            sums.take_item(model, objective, i, to_device(items[i], device))
            totals["done"] += 1
            after_item(int(totals["done"]), totals)

    # 3. The other processes' items.
    if shared() and int(totals["done"]) < len(items):
        for key in sorted(totals.keys() - {"done"}):
            all_sum(totals[key])
        totals["done"].fill_(len(items))
        after_item(len(items), totals)
    return _result(totals, layers, draws, priced=any(changes.values()))


def _result(
    totals: dict[str, Tensor], layers: Mapping[str, Layer], draws: Draws, *, priced: bool
) -> FisherPass:
    some = any(bool(totals[f"trace/{name}"].any()) for name in layers)
    if priced and layers and not some:
        raise ValueError(
            f"layer {next(iter(layers))} received no gradient from any item, nor did any other: "
            "they are not on the way to the loss, or the loss has no curvature at the model's "
            "outputs (an absolute error, or predictions that are all certain), so that every "
            "change would cost nothing; leave them out, or take another loss or "
            "curvature='empirical'"
        )
    count = totals["count"].cpu()
    sloped = layers if draws.slopes else ()
    return FisherPass(
        count=count,
        along={n: totals[f"along/{n}"].cpu() for n in layers},
        diagonals={n: totals[f"diagonals/{n}"].cpu() for n in layers},
        traces={n: totals[f"trace/{n}"].cpu() for n in layers},
        diagonal={n: totals[f"diagonal/{n}"] / float(count.sum()) for n in layers},
        labels=draws.labels,
        slopes={n: totals[f"slope/{n}"].cpu() for n in sloped},
    )


def _empty_totals(
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    items: int,
    draws: Draws,
    device: torch.device,
) -> dict[str, Tensor]:
    totals = {
        "done": torch.zeros((), dtype=torch.int64),
        "count": torch.zeros(items, dtype=torch.float64),
    }
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    for name, layer in layers.items():
        kept = len(changes.get(name, ()))
        dtype = wide(layer.weight)
        totals[f"diagonal/{name}"] = torch.zeros(layer.shape, dtype=dtype, device=device)
        totals[f"trace/{name}"] = zeros(items)
        totals[f"along/{name}"] = zeros(items, draws.labels, kept)
        totals[f"diagonals/{name}"] = zeros(items, kept)
        totals[f"slope/{name}"] = zeros(items, kept)
    return totals


class _GradientSums:
    """Takes in each weight's gradient as soon as it is complete, and lets it go, so that one
    gradient at a time is in memory."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        changes: Mapping[str, Sequence[Change]],
        draws: Draws,
        totals: dict[str, Tensor],
    ) -> None:
        self.layers, self.changes, self.draws, self.totals = layers, changes, draws, totals
        self.item = 0
        self.label: int | None = 0  # None: the gradient is that of the data's own label

    def take_item(self, model: nn.Module, objective: Loss, item: int, batch: Batch) -> None:
        """Forward and backward passes of one item."""
        self.item = item
        labels, slopes = self.draws.labels, self.draws.slopes
        # The item's own generator: a resumed pass draws what an uninterrupted one would.
        generator = self.draws.generator(item)
        if self.draws.empirical:
            self._take_own_labels(model, objective, batch)
            return
        # 1. Forward.
        found = objective.outputs(model, batch)
        self.totals["count"][item] = float(objective.counts(found.detach(), batch).sum())
        if not found.requires_grad:  # no layer is on the way to the loss
            return
        # 2. Back from random signs at every position, once per draw.
        for s in range(labels):
            self.label = s
            retain = slopes or s + 1 < labels
            objective.draw(found, batch, generator).sum().backward(retain_graph=retain)
        # 3. Back from the loss on the item's own labels.
        if slopes:
            self.label = None
            objective.loss_of(found, batch)[0].backward()
        self._check_finite()

    def _take_own_labels(self, model: nn.Module, objective: Loss, batch: Batch) -> None:
        """The gradient of the item's own loss in place of a draw."""
        self.label = 0
        loss, count = objective.loss(model, batch)
        self.totals["count"][self.item] = count
        if loss.requires_grad:  # else no layer is on the way to the loss
            loss.backward()
        self._check_finite()

    def hook(self, name: str) -> Callable[[Tensor], None]:
        layer = self.layers[name]

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = layer.as_matrix(parameter.grad)
            gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
            if self.label is None:
                self._add_slope(name, gradient)
            else:
                self._add_draw(name, gradient, self.label)
            parameter.grad = None

        return take

    def _add_slope(self, name: str, gradient: Float[Tensor, "out in"]) -> None:
        flat = gradient.reshape(-1)
        for k, change in enumerate(self.changes.get(name, ())):
            self.totals[f"slope/{name}"][self.item, k] = change.dot(flat).double()

    def _add_draw(self, name: str, gradient: Float[Tensor, "out in"], label: int) -> None:
        totals, i, labels = self.totals, self.item, self.draws.labels
        flat = gradient.reshape(-1)
        # 1. Trace and diagonal: means over draws.
        totals[f"trace/{name}"][i] += torch.dot(flat, flat).double() / labels
        totals[f"diagonal/{name}"].addcmul_(gradient, gradient, value=1 / labels)
        # 2. Along the changes: every draw is kept, for what layers do to each other.
        for k, change in enumerate(self.changes.get(name, ())):
            along, squares = change.products(flat)
            totals[f"along/{name}"][i, label, k] = along
            totals[f"diagonals/{name}"][i, k] += 0.5 * squares / labels

    def _check_finite(self) -> None:
        if not self.layers:
            return
        traces = torch.stack([self.totals[f"trace/{n}"][self.item] for n in self.layers])
        finite = torch.isfinite(traces)
        if bool(finite.all()):
            return
        for name, ok in zip(self.layers, finite.tolist(), strict=True):
            if not ok:
                raise FloatingPointError(
                    f"layer {name}: the gradient of item {self.item} is not finite; run the model "
                    "in float32 or bfloat16"
                )


@contextmanager
def gradients_go_to(
    layers: Mapping[str, Layer], hook: Callable[[str], Callable[[Tensor], None]]
) -> Iterator[None]:
    """Each layer's weight is handed to its hook as soon as its gradient is complete."""
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.weight.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiating(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Only the layers' weights require gradients; flags, modes and ``.grad`` come back as they
    were."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(layer.weight) for layer in layers.values()}
    try:
        # Gradients of the pass must not be added to the user's own.
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(id(p) in wanted)
        with evaluating(model), differentiable(model), torch.enable_grad():
            yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
