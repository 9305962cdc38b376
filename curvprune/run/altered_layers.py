"""Layers that are left as they are because their output is not their weight times their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from curvprune.model import Batch, Layer, Loss, deviations, to_device


def altered_layers(
    model: nn.Module, objective: Loss, item: Batch, layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Layer → what its module computes instead of its weight times its input.

    What would be rounded or pruned there is not what is used, and is solved for other inputs.
    Embeddings whose output is a row of their weight times a number are no such layers: their rows
    are rounded as they are. Cost: one forward pass of ``item``.
    """
    batch = to_device(item, next(model.parameters()).device)
    found = deviations(model, objective, batch, layers)
    return {name: one.what for name, one in found.items() if not one.used}


def with_groups(
    altered: Mapping[str, str], groups: Iterable[tuple[str, ...]]
) -> tuple[dict[str, str], tuple[tuple[str, ...], ...]]:
    """The same, with the other layers of their groups, which must have the same option; and the
    groups that are left."""
    dense, left = dict(altered), []
    for group in groups:
        cause = [name for name in group if name in altered]
        if not cause:
            left.append(group)
        for name in group if cause else ():
            dense.setdefault(name, f"it must have the same option as {cause[0]}")
    return dense, tuple(left)


def refusal(name: str, why: str) -> str:
    """What to say of a layer that was asked for by its name."""
    return (
        f"layer {name}: {why}. To round or prune its weight would change something else than "
        "what is used; leave it out, or put what it computes into its weight first "
        "(remove_parametrizations, merge an adapter, fold a factor)"
    )


def note(dense: Mapping[str, str]) -> str:
    """What the plan and the report say of such layers."""
    first, why = next(iter(dense.items()))
    return (
        f"{len(dense)} layer(s) stay as they are, because what they compute is not their weight "
        f"times their input (of {first}: {why}): {', '.join(dense)}"
    )
