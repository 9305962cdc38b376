"""What other curvature matrices say about given changes of the layers, beside the Fisher along
them.

    kfac      ½ tr(G δ A δᵀ)   A = E[x xᵀ] over rows, G = Σ g gᵀ / positions for sampled labels; nats
    input     ½ tr(δ A δᵀ)     half the squared error of the layer's outputs per row: GPTQ's objective, no nats
    hessian   ½ δᵀ H δ         H the block of the Hessian of the loss on the data's own labels; nats, of either sign

Sources: Martens & Grosse 2015 (kfac); Frantar et al. 2022, "GPTQ" (input); LeCun et al. 1990
(hessian).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature import Change, Kronecker, hessian, kfac
from curvprune.model import Batch, Layer, Objective, evaluating, to_device

FORMS = ("kfac", "input", "hessian")


@dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """Quadratic forms measured on parts of the items, which say how far they can be trusted.

    Attributes:
        count: positions of each part (rows of the layers' inputs count as positions for ``input``).
        sums: layer → what each part adds to the forms of the changes; divide by ``count.sum()``.
    """

    count: Float[Tensor, " parts"]
    sums: dict[str, Float[Tensor, "parts changes"]]


def quadratic_forms(
    kind: str,
    model: nn.Module,
    objective: Objective,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    *,
    parts: int = 4,
    seed: int = 0,
) -> Forms:
    """``½ δᵀ M δ`` of every change for the matrix that ``kind`` names (`FORMS`).

    ``kfac`` and ``input`` are taken on ``parts`` interleaved parts of the items: one forward and
    one backward pass in all, and for each part ``out·in·(out+in)`` multiply-adds per change.
    ``hessian``: about two gradients for each item, layer and change.

    Raises:
        ValueError: an unknown kind; a layer without Kronecker factors (grouped, embedding,
            experts), by name.
    """
    if kind not in FORMS:
        raise ValueError(
            f"curvature={kind!r} is unknown; expected fisher, diagonal, {', '.join(FORMS)}"
        )
    device = next(model.parameters()).device
    wanted = {n: layer for n, layer in layers.items() if changes.get(n)}
    width = 1 if kind == "hessian" else -(-len(items) // min(parts, len(items)))
    groups = [items[i :: -(-len(items) // width)] for i in range(-(-len(items) // width))]
    counts, sums = [], {n: list[list[float]]() for n in wanted}
    for number, group in enumerate(groups):
        batches = [to_device(item, device) for item in group]
        form = _hessian_form if kind == "hessian" else _factored(kind, seed + number)
        along = form(model, objective, batches, wanted)
        with torch.no_grad(), evaluating(model):
            counts.append(
                sum(len(objective.positions(objective.logits(model, b), b).item) for b in batches)
            )
        for n, layer in wanted.items():
            deltas = (
                (c.values.to(_wide(layer)) * c.scale).reshape(layer.shape) for c in changes[n]
            )
            sums[n].append([0.5 * along(n, delta) * counts[-1] for delta in deltas])
    return Forms(
        count=torch.tensor(counts, dtype=torch.float64),
        sums={n: torch.tensor(s, dtype=torch.float64) for n, s in sums.items()},
    )


def _wide(layer: Layer) -> torch.dtype:
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def _factored(kind: str, seed: int) -> Callable[..., Callable[[str, Tensor], float]]:
    def build(
        model: nn.Module,
        objective: Objective,
        batches: Sequence[Batch],
        layers: Mapping[str, Layer],
    ) -> Callable[[str, Tensor], float]:
        blocks = kfac(model, objective, batches, layers, seed=seed).blocks

        def along(name: str, delta: Tensor) -> float:
            block = blocks[name]
            assert isinstance(block, Kronecker)
            g, a = (
                (block.right, block.left) if layers[name].transposed else (block.left, block.right)
            )
            spread = delta.to(a.dtype) @ a
            return float((delta * (spread if kind == "input" else g @ spread)).double().sum())

        return along

    return build


def _hessian_form(
    model: nn.Module, objective: Objective, batches: Sequence[Batch], layers: Mapping[str, Layer]
) -> Callable[[str, Tensor], float]:
    names = {id(p): n for n, p in model.named_parameters()}
    own = {n: names[id(layer.weight)] for n, layer in layers.items()}
    operator = hessian(model, batches, objective, parameters=[escape(n) for n in own.values()])

    def along(name: str, delta: Tensor) -> float:
        vector = layers[name].from_matrix(delta).to(operator.dtype).reshape(-1)
        return float(operator.restrict([own[name]]).quad(vector))

    return along
