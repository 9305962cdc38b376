"""How a model differs in shape from the one it was made of, and making another one differ in the
same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.schema import encode

_COUNTED = ("num_hidden_layers", "layer_types")  # what a config says of the blocks
# Where a model carries its changes, so that later steps on it save them as well.
_ATTRIBUTE = "curvprune_changes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeChange:
    """One step from a model's architecture to its shapes: blocks that are gone, or new shapes.

    Attributes:
        dropped: names of the blocks that are gone.
        config: what the config said of the blocks before, where some are gone.
        shapes: tensor → its new shape.
        attributes: module → its whole-number attributes (``in_features``, ``num_heads``) that
            changed, and their new values.
    """

    dropped: tuple[str, ...] = ()
    config: dict[str, int | list[str]] = field(default_factory=dict)
    shapes: dict[str, list[int]]
    attributes: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        record: dict[str, object] = encode(self)
        # Only where blocks are gone: so it was before blocks could be dropped.
        if not self.dropped:
            del record["dropped"], record["config"]
        return record


def changes_of(model: nn.Module) -> list[ShapeChange]:
    """The steps, in order, that lead from a model's architecture to its shapes; copies keep
    them."""
    return list(getattr(model, _ATTRIBUTE, ()))


def remember_(model: nn.Module, changes: Sequence[ShapeChange]) -> None:
    """Let a model carry its changes."""
    setattr(model, _ATTRIBUTE, list(changes))


def difference(
    original: nn.Module, smaller: nn.Module, *, dropped: Sequence[str] = ()
) -> ShapeChange:
    """What changed between two models with the same modules; or, where whole blocks were
    ``dropped``, which, and what the config said of them before."""
    if dropped:
        config = getattr(original, "config", None)
        said = {key: getattr(config, key, None) for key in _COUNTED}
        # Most configs have one kind of layer only, and say none.
        counted = {key: value for key, value in said.items() if value is not None}
        return ShapeChange(dropped=tuple(dropped), config=counted, shapes={}, attributes={})
    before = _tensors(original)
    shapes: dict[str, list[int]] = {}
    for name, tensor in _tensors(smaller).items():
        if tensor.shape != before[name].shape:
            shapes[name] = list(tensor.shape)
    attributes: dict[str, dict[str, int]] = {}
    for (name, old), new in zip(original.named_modules(), smaller.modules(), strict=True):
        changed = dict(_changed_numbers(old, new))
        if changed:
            attributes[name] = changed
    return ShapeChange(shapes=shapes, attributes=attributes)


def _changed_numbers(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, int]]:
    """Whole-number attributes of a module that are not what they were."""
    for key, value in vars(new).items():
        if type(value) is int and value != vars(old).get(key):
            yield key, value


def architecture_config(model: nn.Module) -> dict[str, int | list[str]]:
    """What the config must say for the architecture that a model's changes start from, where
    `drop_` had it follow."""
    said: dict[str, int | list[str]] = {}
    # What the first change found stood there before all others.
    for change in reversed(changes_of(model)):
        said.update(change.config)
    return said


def reshape_(model: nn.Module, change: ShapeChange) -> nn.Module:
    """Give a model of the original architecture the shapes of `difference`; tensors that change
    hold zeros afterwards.

    Raises ``ValueError`` naming a module or tensor that the model does not have, or one that would
    grow: nothing is allocated for what a damaged file asks.
    """
    drop_(model, change.dropped)
    tensors, modules = _tensors(model), dict(model.named_modules())
    strange = [name for name in change.shapes if name not in tensors]
    strange += [name for name in change.attributes if name not in modules]
    if strange:
        raise ValueError(
            f"{type(model).__name__} has no {strange[0]!r}: pass an instance of what was pruned "
            "as model="
        )
    for name, shape in change.shapes.items():
        old = tensors[name].shape
        fits = len(shape) == len(old) and all(0 <= n <= m for n, m in zip(shape, old, strict=True))
        if not fits:
            raise ValueError(
                f"{name} of {type(model).__name__} is {tuple(old)} and would become "
                f"{tuple(shape)}; removing units makes tensors smaller only: the record of the "
                "changes is damaged"
            )
    for name, attributes in change.attributes.items():
        for key, value in attributes.items():
            setattr(modules[name], key, value)
    for name, shape in change.shapes.items():
        owner, _, key = name.rpartition(".")
        before = tensors[name]
        new = torch.zeros(shape, dtype=before.dtype, device=before.device)
        if isinstance(before, nn.Parameter):
            new = nn.Parameter(new, requires_grad=before.requires_grad)
        setattr(modules[owner], key, new)
    return model


def drop_(model: nn.Module, names: Sequence[str]) -> None:
    """Take whole blocks out of their ``ModuleList``, in place; the numbers that layers and the
    config keep of their place follow. Raises ``ValueError`` naming a block that the model does not
    have."""
    places: dict[str, set[int]] = {}
    for name in names:
        owner, _, index = name.rpartition(".")
        places.setdefault(owner, set()).add(int(index))
    for owner, gone in places.items():
        blocks = dict(model.named_modules()).get(owner)
        if not isinstance(blocks, nn.ModuleList) or max(gone) >= len(blocks):
            raise ValueError(
                f"{type(model).__name__} has no block {owner}.{max(gone)}; pass what was pruned "
                "as model="
            )
        # 1. A shorter list in the old one's place.
        left = [i for i in range(len(blocks)) if i not in gone]
        holder, _, key = owner.rpartition(".")
        setattr(model.get_submodule(holder), key, nn.ModuleList(blocks[i] for i in left))
        # 2. Layers find their keys and values of earlier tokens by their place in it.
        for place, i in enumerate(left):
            _place_(blocks[i], place)
        # 3. The config, where it counted these blocks.
        config: Any = getattr(model, "config", None)
        if getattr(config, "num_hidden_layers", None) == len(blocks):
            config.num_hidden_layers = len(left)
            if len(getattr(config, "layer_types", None) or ()) == len(blocks):
                config.layer_types = [config.layer_types[i] for i in left]


def _place_(block: nn.Module, place: int) -> None:
    """Tell a block's layers where it stands now, if they keep that."""
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = place  # type: ignore[assignment]


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
