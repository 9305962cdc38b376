"""What a layer costs to run under an option: multiply-adds, counted in one forward pass, and bit
operations.

Counted are the products of the compressible weights with their inputs, W[out, in] times every row
of inputs: for a token of a language model, else for an item. Products of activations with one
another (attention scores), sums, normalisation and look-ups have no weight to compress and are left
out.

A zero is multiplied like any other number unless hardware can skip it. Sparse tensor cores skip the
zeros of pattern 2:4, which halves the multiply-adds; nothing is counted for zeros anywhere else,
nor for other patterns. Whole hidden units are removed by ``curvprune.prune(structured=...)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Objective, evaluating, to_device
from curvprune.options import (
    DTYPE_BYTES,
    Cast,
    Option,
    PruneCast,
    option_from_key,
    pruner_of,
    quantizer_of,
)
from curvprune.planning import Budget, Limit, Row

SKIPPED = {
    "2:4": 0.5
}  # pattern of zeros -> share of the multiply-adds that sparse tensor cores are left with


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one layer: its weights, the bits of the model's own type (of its activations too), and its
    multiply-adds for a token or item, ``None`` where they were not counted."""

    weights: int
    bits: int
    macs: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def work_of(
    layers: Mapping[str, Layer], macs: Mapping[str, float] | None = None
) -> dict[str, Work]:
    """The work of every layer, with its multiply-adds where they were counted (`multiply_adds`)."""
    return {
        n: Work(
            weights=layer.numel,
            bits=8 * DTYPE_BYTES[layer.dtype],
            macs=None if macs is None else macs[n],
        )
        for n, layer in layers.items()
    }


def limits_of(budget: Budget, rows: Iterable[Row], work: Mapping[str, Work]) -> tuple[Limit, ...]:
    """The limits of a budget on the options of the rows, but for the bytes and the drop.

    Raises ``ValueError`` where multiply-adds are limited that were not counted, or nothing is known
    of a layer.
    """
    rows = list(rows)
    if unknown := next((row.layer for row in rows if row.layer not in work), None):
        raise ValueError(
            f"layer {unknown!r}: its size is not known here; price it with curvprune.price"
        )
    options = {row.option: option_from_key(row.option) for row in rows}
    limits = []
    if budget.max_bits is not None:
        bits = {(row.layer, row.option): 8.0 * row.bytes for row in rows}
        weights = sum(work[layer].weights for layer in dict.fromkeys(row.layer for row in rows))
        limits.append(Limit(name="max_bits", most=budget.max_bits, use=bits, per=weights))
    for name, most, of in (
        ("max_macs", budget.max_macs, _macs),
        ("max_bops", budget.max_bops, bit_operations),
    ):
        if most is not None:
            use = {
                (row.layer, row.option): of(work[row.layer], options[row.option]) for row in rows
            }
            limits.append(Limit(name=name, most=most, use=use))
    return (*limits, *budget.limits)


@torch.no_grad()
def multiply_adds(
    model: nn.Module, objective: Objective, batches: Iterable[Batch], layers: Mapping[str, Layer]
) -> dict[str, float]:
    """Multiply-adds of every layer: per token (padding left out) if the objective counts tokens,
    else per item.

    A convolution multiplies its weight once for each place of its output, a layer that is called
    several times once for each call, an expert once for each token that the router sends there.
    Cost: one forward pass.
    """
    macs = dict.fromkeys(layers, 0.0)
    positions = 0
    mask: Tensor | None = None

    def real(shape: torch.Size) -> int:
        """Rows of a tensor of this shape, its last dimension left out, without padding."""
        if mask is not None and len(shape) > 2 and shape[:2] == mask.shape:
            return int(mask.sum()) * shape[2:-1].numel()
        return shape[:-1].numel()

    def after(
        layer: Layer, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        if layer.kind == "experts":
            chosen: Tensor = (*arguments, *named.values())[1]  # (tokens, experts of each)
            padded = mask is not None and mask.numel() == len(chosen)
            rows = (int(mask.sum()) if mask is not None and padded else len(chosen)) * chosen.shape[
                1
            ]
            macs[layer.name] += rows * layer.numel / layer.groups
        elif layer.kind == "conv":
            macs[layer.name] += output.numel() // layer.shape[0] * layer.numel
        else:
            macs[layer.name] += real(output.shape) * layer.numel

    handles = [
        reader.register_forward_hook(
            lambda module, arguments, named, output, layer=layer: after(
                layer, arguments, named, output
            ),
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
                positions += (
                    real(logits.shape) if objective.measure == "nats/token" else len(logits)
                )
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / positions for name, total in macs.items()}


def macs_left(option: Option) -> float:
    """The share of a layer's multiply-adds that hardware must still do under an option."""
    prune = pruner_of(option)
    return 1.0 if prune is None or prune.pattern is None else SKIPPED.get(prune.pattern, 1.0)


def _macs(work: Work, option: Option) -> float:
    if work.macs is None:
        raise ValueError(
            "the multiply-adds of these layers were not counted; price them again with "
            "curvprune.price"
        )
    return work.macs * macs_left(option)


def bit_operations(work: Work, option: Option) -> float:
    """Multiply-adds x bits of the weight x bits of the activations, which stay in the model's own
    type (van Baalen et al. 2020, Bayesian Bits, where activations may be rounded too)."""
    grid = quantizer_of(option)
    cast = option.cast if isinstance(option, PruneCast) else option
    bits = grid.bits if grid is not None else 16 if isinstance(cast, Cast) else work.bits
    return _macs(work, option) * bits * work.bits
