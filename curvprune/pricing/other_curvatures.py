"""What other curvature matrices say about given changes of the layers, beside the Fisher along
them.

    kfac      ½ tr(G δ A δᵀ)   A = E[x xᵀ] over rows, G = Σ g gᵀ / positions for sampled labels;
                               in nats
    input     ½ tr(δ A δᵀ)     half the squared error of the layer's outputs per row, GPTQ's
                               objective; not in nats
    hessian   ½ δᵀ H δ         H the block of the Hessian of the loss on the data's own labels; in
                               nats, of either sign

Sources: Martens & Grosse 2015 (kfac); Frantar et al. 2022, "GPTQ" (input); LeCun et al. 1990
(hessian).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature import Change, KfacSettings, hessian, kronecker_factored
from curvprune.model import Batch, Layer, Loss, evaluating, to_device

FORMS = ("kfac", "input", "hessian")

# (layer, δ) -> δᵀ M δ, for the matrix M over some of the items.
Form = Callable[[str, Tensor], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How ``kfac`` and ``input`` see the items: in interleaved parts, whose spread says how far the
    forms can be trusted.

    Attributes:
        count: parts, of which each has factors of its own.
        seed: of the labels drawn for ``kfac``.
    """

    count: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """Quadratic forms on parts of the items, which say how far they can be trusted.

    Attributes:
        count: positions of each part (rows of the layers' inputs count as positions for ``input``).
        sums: layer → what each part adds to the forms of the changes; divide by ``count.sum()``.
        left_out: layers without a form, and why: of stacked experts, a weight that is used in
            several ways or a layer that is not called there are no factors.
    """

    count: Float[Tensor, " parts"]
    sums: dict[str, Float[Tensor, "parts changes"]]
    left_out: Mapping[str, str] = field(default_factory=dict)


def quadratic_forms(
    kind: str,
    model: nn.Module,
    objective: Loss,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    *,
    parts: Parts = Parts(),
) -> Forms:
    """``½ δᵀ M δ`` of every change for the matrix that ``kind`` names (`FORMS`).

    ``kfac`` and ``input`` are taken on parts of the items: one forward and one backward pass in
    all, and for each part ``out·in·(out+in)`` multiply-adds per change. ``hessian`` is taken on
    single items: about two gradients for each item, layer and change. Layers without factors are
    left out; a layer on which the loss does not depend has forms of zero.

    Raises:
        ValueError: an unknown kind; no layer with factors, naming the first.
    """
    if kind not in FORMS:
        raise ValueError(
            f"curvature={kind!r} is unknown; expected fisher, diagonal, {', '.join(FORMS)}"
        )
    device = next(model.parameters()).device
    wanted = {n: layer for n, layer in layers.items() if changes.get(n)}
    counts: list[float] = []
    left_out: dict[str, str] = {}
    sums: dict[str, list[list[float]]] = {n: [] for n in wanted}
    for number, part in enumerate(_interleaved(kind, items, parts.count)):
        # 1. The matrix over this part.
        batches = [to_device(item, device) for item in part]
        if kind == "hessian":
            form = _hessian_form(model, objective, batches, wanted)
        else:
            form, reasons = _factored_form(
                kind, model, objective, batches, wanted, parts.seed + number
            )
            left_out |= reasons
            wanted = {n: layer for n, layer in wanted.items() if n not in reasons}
        # 2. Its positions.
        with torch.no_grad(), evaluating(model):
            count = 0.0
            for batch in batches:
                count += _positions(model, objective, batch)
        counts.append(count)
        # 3. The form along every change.
        for name, layer in wanted.items():
            dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            row = []
            for change in changes[name]:
                delta = (change.values.to(dtype) * change.scale).reshape(layer.shape)
                row.append(0.5 * form(name, delta) * count)
            sums[name].append(row)
    return Forms(
        count=torch.tensor(counts, dtype=torch.float64),
        sums={n: torch.tensor(sums[n], dtype=torch.float64) for n in wanted},
        left_out=left_out,
    )


def _positions(model: nn.Module, objective: Loss, batch: Batch) -> float:
    return float(objective.counts(objective.outputs(model, batch), batch).sum())


def _interleaved(kind: str, items: Sequence[Batch], parts: int) -> list[Sequence[Batch]]:
    """The items dealt to parts of equal size; single ones for the Hessian."""
    width = 1 if kind == "hessian" else -(-len(items) // min(parts, len(items)))
    count = -(-len(items) // width)
    return [items[i::count] for i in range(count)]


def in_parts(values: Float[np.ndarray, " items"], parts: int) -> Float[np.ndarray, " parts"]:
    """What single items add up to in each part, as `quadratic_forms` deals them."""
    return np.array([values[i::parts].sum() for i in range(parts)])


def _factored_form(
    kind: str,
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    seed: int,
) -> tuple[Form, dict[str, str]]:
    """``tr(G δ A δᵀ)``, or ``tr(δ A δᵀ)`` for ``input``; and the layers without, with reasons."""
    fisher = "forward-only" if kind == "input" else "mc"
    settings = KfacSettings(fisher=fisher, bias=False, seed=seed)
    factors = kronecker_factored(
        model, objective, batches, layers, settings, optional=layers.keys()
    )

    def along(name: str, delta: Tensor) -> float:
        block = factors.blocks[name]
        vector = layers[name].from_matrix(delta).to(block.dtype).reshape(-1)
        return float((vector * (block @ vector)).double().sum())

    return along, factors.left_out


def _hessian_form(
    model: nn.Module, objective: Loss, batches: Sequence[Batch], layers: Mapping[str, Layer]
) -> Form:
    """``δᵀ H δ`` with the layer's block of the Hessian."""
    names = {id(p): n for n, p in model.named_parameters()}
    own = {n: names[id(layer.weight)] for n, layer in layers.items()}
    operator = hessian(model, batches, objective, parameters=[escape(n) for n in own.values()])

    def along(name: str, delta: Tensor) -> float:
        vector = layers[name].from_matrix(delta).to(operator.dtype).reshape(-1)
        return float(operator.restrict([own[name]]).quad(vector))

    return along
