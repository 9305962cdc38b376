"""One pass over the data that yields, for every layer at once, the true Fisher's trace and diagonal
and its value along any number of given changes.

For item n with T_n positions, back-propagate from the logits of every position a random vector with
mean zero and the covariance of the score, ``diag(p) − p pᵀ`` (`curvprune.model.losses.signed_loss`:
signs instead of sampled labels), and let ``g`` be what arrives at a layer's weight. Positions are
independent, so ``E[g gᵀ]`` summed over items and divided by the number of positions is exactly the
Fisher matrix F of the mean loss (cross terms between positions vanish in expectation). Hence, per
position and in nats,

    ½ δᵀ F δ  =  ½ Σ_n E[⟨g_n, δ⟩²] / Σ_n T_n,        tr F = Σ_n E‖g_n‖² / Σ_n T_n,        diag F likewise.

Source: Amari 1998; Martens 2020, "New insights and perspectives on the natural gradient method",
§5, §9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature.estimates import Estimate
from curvprune.distributed import all_sum, my_share, shared, world
from curvprune.model import Batch, Layer, Objective, evaluating, signed_loss, to_device


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
        return torch.dot(gradient, self.values.to(gradient.dtype)) * self.scale

    def products(self, gradient: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """``⟨g, δ⟩`` and ``Σ (gᵢ δᵢ)²``."""
        parts = self.values.to(gradient.dtype) * gradient
        return parts.sum().double() * self.scale, torch.dot(parts, parts).double() * self.scale**2


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherPass:
    """What the pass measured. Sums are per item; divide by ``count.sum()`` for a value per
    position.

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
    residual = sums - value * count
    variance = n / (n - 1) * float((residual**2).sum()) / float(count.sum()) ** 2
    return Estimate(value=value, stderr=variance**0.5, num_items=n)


@contextmanager
def differentiating(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Only the layers' weights require gradients; flags, modes and ``.grad`` come back as they
    were."""
    parameters = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    wanted = {id(layer.weight) for layer in layers.values()}
    try:
        for p in parameters:
            p.grad = None
            p.requires_grad_(id(p) in wanted)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


def fisher_pass(
    model: nn.Module,
    objective: Objective,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    *,
    labels: int = 2,
    slopes: bool = False,
    seed: int = 0,
    resume: dict[str, Tensor] | None = None,
    after_item: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> FisherPass:
    """Run the pass. Cost: one forward and ``labels`` backward passes per item, one dot product per
    change and label;
    memory: one float32 diagonal of the layers, one weight gradient at a time.

    Args:
        items: batches of one item.
        changes: layer → changes to price; layers without changes get trace and diagonal only.
        slopes: also take the first-order term, for one more backward pass an item from the loss on
            its own labels.
        resume: the totals that ``after_item`` last received, to go on after that item with the same
            result.
        after_item: called with (items done, totals) after each item, for progress and checkpoints.

    Several processes share the items; each counts and resumes its own, and at the end all call
    ``after_item`` once more with the totals of all.

    Raises:
        ValueError: a layer that received no gradient (it is not on the way to the loss), by name.
        FloatingPointError: a non-finite gradient, naming the layer and the item.
    """
    if world() > max(1, len(items)):
        raise ValueError(
            f"{world()} processes for {len(items)} items: start at most one process for each item"
        )
    device = next(model.parameters()).device
    totals = resume or _empty_totals(layers, changes, len(items), labels, device)
    totals = {k: v.to(device) for k, v in totals.items()}
    position = {"item": 0, "label": 0, "slope": 0}

    def take(name: str, layer: Layer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = layer.as_matrix(parameter.grad)
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        i, flat = position["item"], gradient.reshape(-1)
        if position["slope"]:
            for k, change in enumerate(changes.get(name, ())):
                totals[f"slope/{name}"][i, k] = change.dot(flat).double()
            parameter.grad = None
            return
        totals[f"trace/{name}"][i] += torch.dot(flat, flat).double() / labels
        totals[f"diagonal/{name}"].addcmul_(gradient, gradient, value=1 / labels)
        for k, change in enumerate(changes.get(name, ())):
            along, squares = change.products(flat)
            totals[f"along/{name}"][i, position["label"], k] = along
            totals[f"diagonals/{name}"][i, k] += 0.5 * squares / labels
        parameter.grad = None

    with differentiating(model, layers):
        handles = []
        for name, layer in layers.items():
            hook = lambda p, name=name, layer=layer: take(name, layer, p)  # noqa: E731
            handles.append(layer.weight.register_post_accumulate_grad_hook(hook))
        try:
            mine = my_share(range(len(items)))
            done = int(totals["done"])
            for i in mine[done:] if done < len(items) else ():
                position["item"] = i
                # One generator per item: a resumed pass draws the signs that an uninterrupted one
                # would.
                generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
                batch = to_device(items[i], device)
                logits = objective.logits(model, batch)
                positions = objective.positions(logits, batch)
                totals["count"][i] = len(positions.item)
                for s in range(labels):
                    position["label"] = s
                    signed_loss(positions, generator).backward(
                        retain_graph=slopes or s + 1 < labels
                    )
                if slopes:
                    position["slope"] = 1
                    objective.loss_of(logits, batch)[0].backward()
                    position["slope"] = 0
                _check_finite(totals, layers, i)
                totals["done"] += 1
                if after_item is not None:
                    after_item(int(totals["done"]), totals)
        finally:
            for handle in handles:
                handle.remove()
    if shared() and int(totals["done"]) < len(items):
        for key in sorted(totals.keys() - {"done"}):
            all_sum(totals[key])
        totals["done"].fill_(len(items))
        if after_item is not None:
            after_item(len(items), totals)
    if silent := [n for n in layers if not bool(totals[f"trace/{n}"].any())]:
        raise ValueError(
            f"layer {silent[0]} received no gradient from any item: it is not on the way to the "
            "loss; leave it out"
        )
    count = totals["count"].cpu()
    return FisherPass(
        count=count,
        along={n: totals[f"along/{n}"].cpu() for n in layers},
        diagonals={n: totals[f"diagonals/{n}"].cpu() for n in layers},
        traces={n: totals[f"trace/{n}"].cpu() for n in layers},
        diagonal={n: totals[f"diagonal/{n}"] / float(count.sum()) for n in layers},
        labels=labels,
        slopes={n: totals[f"slope/{n}"].cpu() for n in layers if slopes},
    )


def _empty_totals(
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    items: int,
    labels: int,
    device: torch.device,
) -> dict[str, Tensor]:
    totals = {
        "done": torch.zeros((), dtype=torch.int64),
        "count": torch.zeros(items, dtype=torch.float64),
    }
    for name, layer in layers.items():
        wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        totals[f"diagonal/{name}"] = torch.zeros(layer.shape, dtype=wide, device=device)
        totals[f"trace/{name}"] = torch.zeros(items, dtype=torch.float64, device=device)
        width = len(changes.get(name, ()))
        totals[f"along/{name}"] = torch.zeros(
            items, labels, width, dtype=torch.float64, device=device
        )
        for kind in ("diagonals", "slope"):
            totals[f"{kind}/{name}"] = torch.zeros(items, width, dtype=torch.float64, device=device)
    return totals


def _check_finite(totals: dict[str, Tensor], layers: Mapping[str, Layer], item: int) -> None:
    finite = torch.isfinite(torch.stack([totals[f"trace/{n}"][item] for n in layers]))
    if not bool(finite.all()):
        name = next(n for n, ok in zip(layers, finite.tolist(), strict=True) if not ok)
        raise FloatingPointError(
            f"layer {name}: the gradient of item {item} is not finite; run the model in float32 "
            "or bfloat16"
        )
