"""What a layer costs to run under an option: multiply-adds, counted in one forward pass, and bit operations.

Counted are the products of the compressible weights with their inputs, W[out, in] times every row of inputs: for a
token of a language model, else for an item. Products of activations with one another (attention scores), sums,
normalisation and look-ups have no weight to compress and are left out.

A zero is multiplied like any other number unless hardware can skip it. Sparse tensor cores skip the zeros of pattern
2:4, which halves the multiply-adds; nothing is counted for zeros anywhere else, nor for other patterns. Whole hidden
units are removed by ``curvprune.prune(structured=...)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.layers import Layer
from curvprune.objective import Batch, Objective, evaluating, to_device
from curvprune.options import DTYPE_BYTES, Cast, Option, pruner_of, quantizer_of

SKIPPED = {"2:4": 0.5}  # pattern of zeros -> share of the multiply-adds that sparse tensor cores are left with


@torch.no_grad()
def multiply_adds(
    model: nn.Module, objective: Objective, batches: Iterable[Batch], layers: Mapping[str, Layer]
) -> dict[str, float]:
    """Multiply-adds of every layer: per token (padding left out) if the objective counts tokens, else per item.

    A convolution multiplies its weight once for each place of its output, a layer that is called several times once for
    each call, an expert once for each token that the router sends there. Cost: one forward pass.
    """
    macs = dict.fromkeys(layers, 0.0)
    positions = 0
    mask: Tensor | None = None

    def real(shape: torch.Size) -> int:
        """Rows of a tensor of this shape, its last dimension left out, without padding."""
        if mask is not None and len(shape) > 2 and shape[:2] == mask.shape:
            return int(mask.sum()) * shape[2:-1].numel()
        return shape[:-1].numel()

    def after(layer: Layer, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
        if layer.kind == "experts":
            chosen: Tensor = (*arguments, *named.values())[1]  # (tokens, experts of each)
            padded = mask is not None and mask.numel() == len(chosen)
            rows = (int(mask.sum()) if mask is not None and padded else len(chosen)) * chosen.shape[1]
            macs[layer.name] += rows * layer.numel / layer.groups
        elif layer.kind == "conv":
            macs[layer.name] += output.numel() // layer.shape[0] * layer.numel
        else:
            macs[layer.name] += real(output.shape) * layer.numel

    handles = [
        reader.register_forward_hook(
            lambda module, arguments, named, output, layer=layer: after(layer, arguments, named, output),
            with_kwargs=True,
        )
        for layer in layers.values()
        for reader in layer.readers
    ]
    try:
        with evaluating(model):
            for batch in batches:
                batch = to_device(batch, next(model.parameters()).device)
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                logits = objective.logits(model, batch)
                positions += real(logits.shape) if objective.unit == "nats/token" else len(logits)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / positions for name, total in macs.items()}


def macs_left(option: Option) -> float:
    """The share of a layer's multiply-adds that hardware must still do under an option."""
    prune = pruner_of(option)
    return 1.0 if prune is None or prune.pattern is None else SKIPPED.get(prune.pattern, 1.0)


def bit_operations(layer: Layer, option: Option, macs: float) -> float:
    """Multiply-adds x bits of the weight x bits of the activations, which stay in the model's own type (van Baalen et
    al. 2020, Bayesian Bits, appendix B.2, where activations may be rounded too)."""
    own = 8 * DTYPE_BYTES[layer.dtype]
    grid = quantizer_of(option)
    bits = grid.bits if grid is not None else 16 if isinstance(option, Cast) else own
    return macs * macs_left(option) * bits * own
