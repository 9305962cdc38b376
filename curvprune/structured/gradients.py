"""Gradients at the outputs of layers, for scores drawn from the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Loss, evaluating, to_device

# (name, layer, x rows or None, gradient rows)
Take = Callable[[str, Layer, Tensor | None, Tensor], None]


@contextmanager
def output_gradients(
    model: nn.Module, layers: Mapping[str, Layer], take: Take, *, inputs: bool
) -> Iterator[None]:
    """``take(name, layer, x rows or None, gradient rows)`` at every layer's output during a
    backward pass.

    No parameter requires gradients: graphs begin at the first of the layers.

    Args:
        inputs: whether ``take`` needs the rows of x, which are then kept.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def watch(name: str, layer: Layer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, named: Any, output: Any) -> Any:
            y = first_tensor(output)
            # No parameter requires a gradient: this layer is where the graph begins.
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            x = args[0] if args else next(iter(named.values()))
            kept = x.detach() if inputs and layer.kind != "experts" else None
            y.register_hook(
                lambda g: take(name, layer, _rows(layer, module, kept), _by_place(layer, g))
            )
            copied = y.clone()  # what follows may work in place
            return copied if isinstance(output, Tensor) else (copied, *output[1:])

        return hook

    handles = []
    for name, layer in layers.items():
        for reader in layer.readers:
            hook = watch(name, layer)
            handles.append(reader.register_forward_hook(hook, with_kwargs=True))
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)


def _rows(layer: Layer, module: nn.Module, x: Tensor | None) -> Tensor | None:
    return None if x is None else layer.rows(module, x)[0]


def first_tensor(output: Any) -> Tensor:
    """What a layer puts out; some subclasses of Linear return more beside it."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _by_place(layer: Layer, gradient: Tensor) -> Tensor:
    """One row for every place, as the rows of x; experts put out their sum."""
    if layer.convolves:
        gradient = gradient.flatten(2).transpose(1, 2)
    return gradient.reshape(-1, outputs_of(layer))


def outputs_of(layer: Layer) -> int:
    """How many numbers a layer puts out; its experts share them."""
    return layer.shape[0] // layer.groups if layer.kind == "experts" else layer.shape[0]


def draws(seed: int, i: int) -> torch.Generator:
    """The random numbers of batch or item ``i``, whatever came before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)


def row_costs(
    model: nn.Module,
    objective: Loss,
    batches: Iterable[Batch],
    layers: Mapping[str, Layer],
    *,
    seed: int,
) -> dict[str, Float[Tensor, " out"]]:
    """What an error of variance 1 in each output costs, twice, in nats.

    The sum over places of the squared gradient of each output, for scores drawn from the model, per
    position of the objective; zeros for a layer that is not on the way to the loss. Cost: one
    forward and one backward pass over ``batches``.
    """
    device = next(model.parameters()).device
    # 1. Squared gradients, summed over places, batch by batch.
    sums = {
        n: torch.zeros(outputs_of(layer), dtype=torch.float64, device=device)
        for n, layer in layers.items()
    }

    def take(name: str, layer: Layer, x: Tensor | None, gradient: Tensor) -> None:
        sums[name] += gradient.double().square().sum(0)

    count = 0.0
    with output_gradients(model, layers, take, inputs=False):
        for i, batch in enumerate(batches):
            batch = to_device(batch, device)
            outputs = objective.outputs(model, batch)
            objective.draw(outputs, batch, draws(seed, i)).sum().backward()
            count += float(objective.counts(outputs.detach(), batch).sum())
    # 2. Per position.
    return {n: s / count for n, s in sums.items()}
