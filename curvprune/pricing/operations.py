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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Loss, evaluating, padding_mask, steps_of, to_device
from curvprune.options import (
    DTYPE_BYTES,
    Cast,
    Option,
    PruneCast,
    option_from_key,
    pruner_of,
    quantizer_of,
)
from curvprune.planning import Budget, Limit, Priced

# Pattern of zeros -> share of the multiply-adds that sparse tensor cores are left with.
SKIPPED = {"2:4": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """Of one layer: its weights, the bits of the model's own type (of its activations too), and its
    multiply-adds for a token or item, ``None`` where they were not counted."""

    weights: int
    bits: int
    macs: float | None


def work_of(
    layers: Mapping[str, Layer], macs: Mapping[str, float] | None = None
) -> dict[str, LayerWork]:
    """The work of every layer, with its multiply-adds where they were counted (`multiply_adds`)."""
    work = {}
    for name, layer in layers.items():
        counted = None if macs is None else macs[name]
        work[name] = LayerWork(weights=layer.numel, bits=8 * DTYPE_BYTES[layer.dtype], macs=counted)
    return work


def limits_of(
    budget: Budget, rows: Iterable[Priced], work: Mapping[str, LayerWork]
) -> tuple[Limit, ...]:
    """The limits of a budget on the options of the rows, but for the bytes and the drop.

    Raises ``ValueError`` where multiply-adds are limited that were not counted, or nothing is known
    of a layer.
    """
    rows = list(rows)
    for row in rows:
        if row.layer not in work:
            raise ValueError(
                f"layer {row.layer!r}: its size is not known here; price it with curvprune.price"
            )
    options = {row.option: option_from_key(row.option) for row in rows}
    limits = []
    if budget.max_bits is not None:
        bits = {(row.layer, row.option): 8.0 * row.bytes for row in rows}
        layers = {row.layer for row in rows}
        weights = sum(work[layer].weights for layer in layers)
        limits.append(Limit(name="max_bits", most=budget.max_bits, use=bits, per=weights))
    if budget.max_macs is not None:
        macs = _uses(rows, work, options, _macs)
        limits.append(Limit(name="max_macs", most=budget.max_macs, use=macs))
    if budget.max_bops is not None:
        bops = _uses(rows, work, options, _bit_operations)
        limits.append(Limit(name="max_bops", most=budget.max_bops, use=bops))
    return (*limits, *budget.limits)


def _uses(
    rows: Iterable[Priced],
    work: Mapping[str, LayerWork],
    options: Mapping[str, Option],
    count: Callable[[LayerWork, Option], float],
) -> dict[tuple[str, str], float]:
    """A count of every layer under every option that it is offered."""
    uses = {}
    for row in rows:
        uses[row.layer, row.option] = count(work[row.layer], options[row.option])
    return uses


@torch.no_grad()
def multiply_adds(
    model: nn.Module, objective: Loss, batches: Iterable[Batch], layers: Mapping[str, Layer]
) -> dict[str, float]:
    """Multiply-adds of every layer: per token (padding left out) if the objective counts tokens,
    else per item.

    A convolution multiplies its weight once for each place of its output (a transposed one: of its
    input), a recurrent module each of its weights once for each step, a layer that is called
    several times once for each call, an expert once for each token that the router sends there.
    Cost: one forward pass.
    """
    macs = dict.fromkeys(layers, 0.0)
    positions = 0
    mask: Tensor | None = None

    def hook(layer: Layer) -> Callable[..., None]:
        def after(
            module: nn.Module,
            arguments: tuple[Any, ...],
            named: Mapping[str, object],
            output: Any,
        ) -> None:
            times = _times_used(layer, module, (*arguments, *named.values()), output, mask)
            macs[layer.name] += times * layer.numel

        return after

    # 1. Listen to every module that reads a layer: several where layers share their weight.
    handles = []
    for layer in layers.values():
        for reader in layer.readers:
            handles.append(reader.register_forward_hook(hook(layer), with_kwargs=True))
    # 2. Run the batches, and count the positions that the sums are shared by.
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                batch = to_device(batch, device)
                mask = padding_mask(batch)
                logits = objective.outputs(model, batch)
                # Classifiers have one position per item, whatever the shape of their logits.
                if objective.measure == "nats/token":
                    positions += _rows(logits.shape, mask)
                else:
                    positions += len(logits)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / positions for name, total in macs.items()}


def _times_used(
    layer: Layer, module: nn.Module, inputs: tuple[Any, ...], output: Any, mask: Tensor | None
) -> float:
    """How often one call of a module multiplies the whole of its layer's matrix."""
    if layer.kind == "recurrent":
        return steps_of(module, inputs, {}, mask)
    if layer.kind == "experts":
        # Each expert is one matrix of several in the weight, and sees the tokens sent to it.
        chosen: Tensor = inputs[1]  # (tokens, experts of each)
        tokens = len(chosen)
        if mask is not None and mask.numel() == tokens:
            tokens = int(mask.sum())
        return tokens * chosen.shape[1] / layer.groups
    if layer.convolves:
        return layer.places(inputs[0], output)
    return _rows(output.shape, mask)


def _rows(shape: torch.Size, mask: Tensor | None) -> int:
    """Rows of a tensor of this shape, its last dimension left out, without padding."""
    if mask is not None and len(shape) > 2 and shape[:2] == mask.shape:
        return int(mask.sum()) * shape[2:-1].numel()
    return shape[:-1].numel()


def macs_left(option: Option) -> float:
    """The share of a layer's multiply-adds that hardware must still do under an option."""
    prune = pruner_of(option)
    return 1.0 if prune is None or prune.pattern is None else SKIPPED.get(prune.pattern, 1.0)


def _macs(work: LayerWork, option: Option) -> float:
    if work.macs is None:
        raise ValueError(
            "the multiply-adds of these layers were not counted; price them again with "
            "curvprune.price"
        )
    return work.macs * macs_left(option)


def _bit_operations(work: LayerWork, option: Option) -> float:
    """Multiply-adds x bits of the weight x bits of the activations, which stay in the model's own
    type (van Baalen et al. 2020, Bayesian Bits, where activations may be rounded too)."""
    grid = quantizer_of(option)
    cast = option.cast if isinstance(option, PruneCast) else option
    # Weights that are not rounded keep the model's own type, unless they are cast.
    bits = work.bits
    if grid is not None:
        bits = grid.bits
    elif isinstance(cast, Cast):
        bits = 16
    return _macs(work, option) * bits * work.bits
