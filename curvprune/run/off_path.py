"""Layers that stay as they are because nothing is known to multiply their weight, or because the
loss does not depend on it; and what to say of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from curvprune.curvature import unused_layers
from curvprune.model import Batch, Layer, Loss, WeightUses, computed_bytes, to_device

NAMED = 4  # layers that a note names
UNREACHED = "the forward pass over the calibration items never uses its weight"
NO_GRADIENT = "the loss of the price items does not depend on it, so that it has no price"
UNKNOWN_INPUT = "its weight goes to a function whose input is not known"


def unreached(uses: Mapping[str, WeightUses]) -> dict[str, str]:
    """Layer → why it stays as it is, of those whose weight no forward pass uses."""
    return {name: UNREACHED for name, use in uses.items() if not use.reached}


def of_unknown_input(uses: Mapping[str, WeightUses], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layer → why it cannot be solved, of those whose weight goes to a function whose input is not
    known, and nowhere else. Embeddings need none."""
    found = {}
    for name, layer in layers.items():
        use = uses[name]
        if use.unseen and not use.calls and layer.kind != "embedding":
            found[name] = f"{UNKNOWN_INPUT} ({', '.join(sorted(use.unseen))})"
    return found


def in_two_ways(uses: Mapping[str, WeightUses], layers: Iterable[str]) -> str | None:
    """What to say of layers that are solved for the inputs that are known, and used otherwise
    too."""
    found = [name for name in layers if uses[name].calls and uses[name].unseen]
    if not found:
        return None
    functions = ", ".join(sorted(uses[found[0]].unseen))
    return (
        f"{len(found)} layer(s) are solved for the inputs of their products alone, although their "
        f"weight also goes to other functions (of {found[0]}: {functions}): {some_names(found)}"
    )


def without_gradient(
    model: nn.Module, objective: Loss, items: Sequence[Batch], layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Layer → why it has no price, of those that the loss of no item depends on.

    Cost: a forward and a backward pass of one item; of all items where a layer gets no gradient
    from it.
    """
    device = next(model.parameters()).device
    batches = [to_device(item, device) for item in items]
    return dict.fromkeys(unused_layers(model, objective, batches, layers), NO_GRADIENT)


def with_groups(
    dense: Mapping[str, str], groups: Iterable[tuple[str, ...]]
) -> tuple[dict[str, str], tuple[tuple[str, ...], ...]]:
    """The same, with the other layers of their groups, which must have the same option; and the
    groups that are left."""
    found, left = dict(dense), []
    for group in groups:
        cause = [name for name in group if name in dense]
        if not cause:
            left.append(group)
        for name in group if cause else ():
            found.setdefault(name, f"it must have the same option as {cause[0]}")
    return found, tuple(left)


# ------------------------------------------------------------------------------------------ words


def some_names(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first = list(names)[:NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def note(dense: Mapping[str, str], layers: Mapping[str, Layer]) -> str:
    """What the plan and the report say of layers that stay as they are, and what that costs."""
    weights = [layers[name].weight for name in dense]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    first, why = next(iter(dense.items()))
    reason = why if len(dense) == 1 else f"of {first}: {why}"
    return (
        f"{len(dense)} layer(s) of {size:,} bytes stay as they are ({reason}): {some_names(dense)}"
    )


def nothing_left(dense: Mapping[str, str]) -> str:
    """What to say where no layer can be compressed."""
    first, why = next(iter(dense.items()))
    return (
        f"nothing is left to compress: all {len(dense)} layer(s) would stay as they are (layer "
        f"{first}: {why}); compress other layers, or give data and a loss that use these"
    )


def refusal(name: str, why: str) -> str:
    """What to say of a layer that was asked for by its name."""
    if why == UNREACHED:
        way_on = (
            "without a price or a budget it can be rounded to nearest by its name; leave it out, "
            "or give data that reach it"
        )
    elif why == NO_GRADIENT:
        way_on = (
            "leave it out, give data and a loss that depend on it, or compress it without a price "
            "or a budget"
        )
    else:
        way_on = (
            "to round or prune its weight would change something else than what is used; leave it "
            "out, or put what it computes into its weight first (remove_parametrizations, merge "
            "an adapter, fold a factor)"
        )
    return f"layer {name}: {why}; {way_on}"


def nearest_note(names: Collection[str]) -> str:
    """What to say of layers that were asked for by name although nothing reads them."""
    return (
        f"{len(names)} layer(s) that were asked for by name are never used by the forward pass "
        "over the calibration items, and are rounded to nearest or pruned by magnitude: "
        f"{some_names(names)}"
    )


def computed_note(model: nn.Module, names: Collection[str]) -> str:
    """What to say of weights that are no parameters."""
    size = computed_bytes(model, names)
    return (
        f"{len(names)} layer(s) of {size:,} bytes stay as they are, because their weight is "
        "computed from others (weight_norm, a mask, another parametrization) or packed: "
        f"{some_names(names)}; remove_parametrizations makes them layers"
    )
