"""One forward pass that stops at every layer, with all calibration tokens at hand.

A pre-hook on each layer sees the layer's inputs for all items at once, sums their second moment ``A = E[x xᵀ]`` in
chunks (layers that read the same tensor share it), hands it to a visitor that may overwrite the weight, and lets the
forward go on. Whatever the architecture, later layers then see what the earlier ones have become. The pass ends
before the last layer multiplies, so a language model's logits over all tokens never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.layers import Layer
from curvprune.objective import Batch, Objective, evaluating

_ROWS = 4096  # input rows per update of a Gram matrix: bounds the memory of unfolded convolutions and upcasts


class _Finished(Exception):
    """The last layer was visited; the rest of the forward pass is not needed."""


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    layers: Mapping[str, Layer],
    visit: Callable[[Layer, Callable[[], Float[Tensor, "groups in in"] | None]], None],
) -> None:
    """Call ``visit(layer, moment)`` for every layer just before it runs; ``moment()`` computes its input second moment.

    ``moment()`` is lazy (a resumed run skips it) and returns ``None`` for embeddings that are only looked up; those are
    visited after the pass. Layers called several times are visited at their first call.

    Raises:
        ValueError: layers that the forward pass never reached, by name.
    """
    pending = {name: layer for name, layer in layers.items() if layer.readers}
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    shared: dict[str, tuple[Tensor, int, Tensor]] = {}

    def before(layer: Layer, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if layer.name not in pending:
            return
        x = arguments[0] if arguments else next(iter(named.values()))

        def moment() -> Tensor:
            known = shared.get("last")
            if layer.kind != "conv" and known is not None and known[0] is x and known[1] == x._version:
                return known[2]
            value = _second_moment(layer, module, x, mask)
            if layer.kind != "conv":  # two convolutions may unfold the same tensor differently
                shared["last"] = (x, x._version, value)
            return value

        visit(layer, moment)
        del pending[layer.name]
        if not pending:
            raise _Finished

    handles = [
        reader.register_forward_pre_hook(
            lambda module, args, named, layer=layer: before(layer, module, args, named), with_kwargs=True
        )
        for layer in layers.values()
        for reader in layer.readers
    ]
    try:
        with evaluating(model):
            objective.logits(model, batch)
    except _Finished:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if pending:
        raise ValueError(
            f"the forward pass never reached {len(pending)} layer(s), first {next(iter(pending))}: leave them out"
        )
    for layer in layers.values():
        if not layer.readers:
            visit(layer, lambda: None)


def _second_moment(layer: Layer, module: nn.Module, x: Tensor, mask: Tensor | None) -> Float[Tensor, "groups in in"]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if layer.kind != "conv" and mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape and not bool(mask.all()):
        x = x[mask.bool()]
    total = torch.zeros(layer.groups, layer.shape[1], layer.shape[1], dtype=wide, device=x.device)
    count = 0
    # Convolutions unfold one item at a time at most; other inputs are already rows.
    parts = x.split(1) if layer.kind == "conv" else x.reshape(-1, layer.shape[1]).split(_ROWS)
    for part in parts:
        rows = layer.rows(module, part).to(wide)
        total.baddbmm_(rows.transpose(1, 2), rows)
        count += rows.shape[1]
    return total / count
