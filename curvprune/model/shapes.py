"""How a model differs in shape from the one it was made of, as JSON, and making another one differ
in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_COUNTED = ("num_hidden_layers", "layer_types")  # what a config says of the blocks
# where a model carries its changes, so that later steps on it save them as well
_ATTRIBUTE = "curvprune_changes"


def changes_of(model: nn.Module) -> list[dict[str, Any]]:
    """The records of `difference`, in order, that lead from a model's architecture to its shapes;
    copies keep them."""
    return list(getattr(model, _ATTRIBUTE, ()))


def remember_(model: nn.Module, changes: Sequence[Mapping[str, Any]]) -> None:
    """Let a model carry its changes."""
    setattr(model, _ATTRIBUTE, list(changes))


def difference(
    original: nn.Module, smaller: nn.Module, *, dropped: Sequence[str] = ()
) -> dict[str, Any]:
    """Shapes of tensors that changed, and whole-number attributes of modules (``in_features``,
    ``num_heads``) that did; or, where whole blocks were ``dropped``, which, and what the config
    said of them before. Otherwise both must have the same modules."""
    if dropped:
        config = getattr(original, "config", None)
        counted = {
            key: getattr(config, key) for key in _COUNTED if getattr(config, key, None) is not None
        }
        return {"dropped": list(dropped), "config": counted, "shapes": {}, "attributes": {}}
    before = {n: t.shape for n, t in _tensors(original).items()}
    shapes = {n: list(t.shape) for n, t in _tensors(smaller).items() if t.shape != before[n]}
    attributes: dict[str, dict[str, int]] = {}
    for (name, old), new in zip(original.named_modules(), smaller.modules(), strict=True):
        for key, value in vars(new).items():
            if type(value) is int and value != vars(old).get(key):
                attributes.setdefault(name, {})[key] = value
    return {"shapes": shapes, "attributes": attributes}


def architecture_config(model: nn.Module) -> dict[str, Any]:
    """What the config must say for the architecture that a model's changes start from, where
    `drop_` had it follow."""
    said: dict[str, Any] = {}
    for change in reversed(changes_of(model)):
        said.update(change.get("config", {}))
    return said


def reshape_(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Give a model of the original architecture the shapes of `difference`; tensors that change
    hold zeros afterwards.

    Raises ``ValueError`` naming a module or tensor that the model does not have.
    """
    drop_(model, record.get("dropped", ()))
    tensors, modules = _tensors(model), dict(model.named_modules())
    if strange := [n for n in record["shapes"] if n not in tensors] + [
        n for n in record["attributes"] if n not in modules
    ]:
        raise ValueError(
            f"{type(model).__name__} has no {strange[0]!r}: pass an instance of what was pruned "
            "as model="
        )
    for name, attributes in record["attributes"].items():
        for key, value in attributes.items():
            setattr(modules[name], key, value)
    for name, shape in record["shapes"].items():
        owner, _, key = name.rpartition(".")
        old = tensors[name]
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        value = (
            nn.Parameter(new, requires_grad=old.requires_grad)
            if isinstance(old, nn.Parameter)
            else new
        )
        setattr(modules[owner], key, value)
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
        holder, _, key = owner.rpartition(".")
        blocks = dict(model.named_modules()).get(owner)
        if not isinstance(blocks, nn.ModuleList) or max(gone) >= len(blocks):
            raise ValueError(
                f"{type(model).__name__} has no block {owner}.{max(gone)}; pass what was pruned "
                "as model="
            )
        left = [i for i in range(len(blocks)) if i not in gone]
        setattr(model.get_submodule(holder), key, nn.ModuleList(blocks[i] for i in left))
        for place, i in enumerate(left):
            for module in blocks[i].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = place  # type: ignore[assignment]
        config: Any = getattr(model, "config", None)
        if getattr(config, "num_hidden_layers", None) == len(blocks):
            config.num_hidden_layers = len(left)
            if len(getattr(config, "layer_types", None) or ()) == len(blocks):
                config.layer_types = [config.layer_types[i] for i in left]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
