"""Batches as users have them, in the forms that everything else takes; and items put together.

What comes in: dicts and what behaves like them, records with fields, pairs, bare tensors, NumPy
arrays. What goes out is a `Batch`, or a ``ValueError`` of one sentence that says what to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curvprune.model.forward import HIDDEN, TARGETS, Batch, Gathered, axis_of
from curvprune.model.losses.families import IGNORED

Collate = Callable[[Sequence[Batch]], Any]

# Entries that say how many items there are, whatever the rows of others.
_COUNTING = ("input_ids", "inputs_embeds", "decoder_input_ids", "input_features", "input_values")
# Entries that have a row for each item, or it is a mistake.
_PER_ITEM = (
    *_COUNTING,
    *TARGETS,
    *("attention_mask", "token_type_ids", "mm_token_type_ids", "decoder_attention_mask"),
)
_ANSWERS = ("labels", "label", "targets", "target", "y")  # what the second of a pair is called
_GO_ON = (
    "; where the rows of an entry are no items, such as patches of images or nodes of graphs, pass "
    "cp.Items(items) with one item each, or batches of one item"
)
# Whole numbers of images that lie one item after another; others may be places in what they count.
_OF_IMAGES = (
    *("_thw", "_hws", "_hw", "sizes", "shapes", "mask", "_types"),
    *("num_patches", "num_crops", "aspect_ratio_ids", "num_tiles"),
)


# --------------------------------------------------------------------------------------- one batch


def as_batch(given: Any) -> Batch:
    """A batch as the user gave it: a dict of tensors, ``(inputs, targets)``, a dict of inputs with
    its targets, which become its labels, or inputs alone.

    A dict is also what behaves like one (``BatchEncoding``, ``ModelOutput``), a dataclass or a
    named tuple; its entries may be NumPy arrays or lists of numbers. Entries that are None are as
    good as absent.

    Raises ``ValueError`` for anything else, saying what to pass instead.
    """
    if isinstance(given, Gathered):
        return given
    if isinstance(given, Mapping):
        return _dict_batch(given)
    if is_dataclass(given) and not isinstance(given, type):
        return _dict_batch({f.name: getattr(given, f.name) for f in fields(given)})
    if isinstance(given, (Tensor, np.ndarray)):
        return (_inputs(given),)
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return _named_batch(dict(zip(given._fields, given, strict=True)))
    if isinstance(given, (tuple, list)):
        known = _sequence_batch(given)
        if known is not None:
            return known
        kinds = ", ".join(type(part).__name__ for part in given)
        what = f"a {type(given).__name__} of {len(given)} ({kinds})"
    else:
        what = f"a {type(given).__name__}"
    raise ValueError(
        f"data: a batch is {what}; expected (inputs, targets), inputs alone, or a dict of tensors, "
        'named as the model\'s arguments: {"x": x} without targets, {"x": x, "labels": y} with '
        'them, and "sample_weight" for weights of items'
    )


def _named_batch(parts: Mapping[str, object]) -> Batch:
    """A named tuple: a pair where its names say so, else a dict."""
    values = list(parts.values())
    names = list(parts)
    if len(values) == 2 and names[1] in _ANSWERS and isinstance(values[0], (Tensor, np.ndarray)):
        return as_batch(tuple(values))
    return _dict_batch(parts)


def _sequence_batch(given: Sequence[Any]) -> Batch | None:
    """A tuple or a list of one or two; ``None`` for what is neither inputs nor a pair."""
    if len(given) == 1 or (len(given) == 2 and given[1] is None):
        inputs = given[0]
        return as_batch(inputs) if isinstance(inputs, (Mapping, Tensor, np.ndarray)) else None
    if len(given) != 2 or not isinstance(given[0], (Mapping, Tensor, np.ndarray)):
        return None
    inputs, targets = given
    if isinstance(targets, Mapping):
        return _dict_batch(_with_targets(inputs, targets))
    labels = _numbers(targets)
    if labels is None:
        raise ValueError(
            f"data: the targets of a batch are {_kind(targets)}; expected a tensor with a row for "
            "each item; where targets are no tensor, such as boxes of objects, put them into a "
            "dict of tensors and pass loss=cp.Loss.of(function), or leave them out"
        )
    if isinstance(inputs, Mapping):
        return _dict_batch(_with_targets(inputs, {"labels": labels}))
    return _inputs(inputs), labels


def _with_targets(inputs: Any, targets: Mapping[str, object]) -> dict[str, object]:
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"data: a batch is (tensor, dict with {sorted(targets)}); expected (tensor, tensor), "
            "or one dict of inputs, named as the model's arguments, and labels"
        )
    both = [name for name in targets if inputs.get(name) is not None]
    if both:
        raise ValueError(
            f"data: a batch is (dict, targets), and the dict has {both[0]} too; leave one of them "
            "out"
        )
    return {**inputs, **targets}


def _inputs(given: Tensor | np.ndarray) -> Tensor:
    tensor = torch.as_tensor(given)
    if tensor.ndim == 0:
        raise ValueError(
            "data: a batch is a single number; expected a tensor with a row for each item (is the "
            "data a tensor? pass [tensor])"
        )
    return tensor


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    if isinstance(value, Tensor):
        return "a number"
    return f"a {type(value).__name__}"


def _numbers(value: Any) -> Tensor | None:
    """A tensor of what are numbers; ``None`` for what has none, or rows of different length."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        same = all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value)
        return torch.stack(list(value)) if same else None
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    try:
        found = np.asarray(value)
    except ValueError:  # rows of different length
        return None
    if found.dtype.kind not in "biuf":
        return None
    # Of Python's own floats torch's type, as `torch.tensor` has it.
    is_array = isinstance(value, np.ndarray)
    tensor = torch.as_tensor(found)
    return tensor.float() if tensor.dtype == torch.float64 and not is_array else tensor


def _dict_batch(given: Mapping[Any, Any]) -> Batch:
    # 1. Every entry a tensor, or it would be lost.
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        if value is None:
            continue
        tensor = _numbers(value)
        if tensor is None or tensor.ndim == 0:
            raise ValueError(
                f"data: batch entry {name!r} is {_kind(value)}; expected a tensor with a row for "
                "each item. Leave it out, or give it to the model in a wrapper"
            )
        tensors[str(name)] = tensor
    if not tensors:
        raise ValueError(f"data: a batch without tensors, with keys {sorted(map(str, given))}")
    _check_sequences(tensors)
    # 2. A row for each item, or it would be lost or given to all.
    sizes = {name: value.shape[axis_of(name, value)] for name, value in tensors.items()}
    if len(set(sizes.values())) == 1:
        return tensors
    counting = [sizes[name] for name in _COUNTING if name in sizes]
    rest = {name: size for name, size in sizes.items() if size != 1}
    if counting and counting[0] == 1 and not any(name in _PER_ITEM for name in rest):
        return as_item(tensors)
    raise ValueError(
        f"data: the entries of a batch have different numbers of items, {sizes}{_GO_ON}"
    )


def _check_sequences(tensors: Mapping[str, Tensor]) -> None:
    tokens = tensors.get("input_ids")
    if tokens is not None and tokens.ndim == 1:
        raise ValueError(
            f"data: input_ids of shape {tuple(tokens.shape)}: expected (items, tokens); one "
            "sequence is input_ids[None], and cp.Items(items) adds that dimension itself"
        )
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = tensors.get(name)
        if mask is not None and mask.ndim == 1:
            raise ValueError(
                f"data: {name} of shape {tuple(mask.shape)}: expected (items, tokens); of one "
                f"sequence {name}[None]"
            )


# ------------------------------------------------------------------------------------------- items


def as_item(tensors: Mapping[str, Tensor]) -> Batch:
    """A dict that is one item, whatever rows its tensors have."""
    rows = {}
    for name, value in tensors.items():
        if value.shape[axis_of(name, value)] != 1:
            rows[name] = (len(value),)
    return Gathered(tensors, count=1, rows=rows) if rows else dict(tensors)


def one_of(given: Any, number: int) -> Batch:
    """What a processor made of one item, as a batch of one.

    Raises ``ValueError`` naming the item where it is several.
    """
    if isinstance(given, Gathered):
        return given
    if isinstance(given, Mapping):
        return as_item(_tensors_of_one(given, number))
    batch = as_batch(given)
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if any(len(part) != 1 for part in parts):
        raise ValueError(
            f"Items: item {number} has inputs of shape {tuple(parts[0].shape)}; expected one item, "
            "(1, ...); pass dicts where the rows of an item are no items"
        )
    return batch


def _tensors_of_one(given: Mapping[Any, Any], number: int) -> dict[str, Tensor]:
    # 1. Every entry a tensor; a label may be a number.
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in TARGETS and isinstance(value, (int, float)):
            value = torch.tensor(value)
        tensor = _numbers(value)
        if tensor is None or (tensor.ndim == 0 and name not in TARGETS):
            raise ValueError(
                f"Items: entry {name!r} of item {number} is {_kind(value)}; expected a tensor. "
                "Leave it out, or give it to the model in a wrapper"
            )
        tensors[str(name)] = tensor[None] if tensor.ndim == 0 else tensor
    if not tensors:
        raise ValueError(f"Items: item {number} has no tensors, with keys {sorted(given)}")
    # 2. An example without a dimension for items, as data sets have them.
    tokens = tensors.get("input_ids")
    if tokens is not None and tokens.ndim == 1:
        for name, tensor in tensors.items():
            if tensor.shape == tokens.shape:
                tensors[name] = tensor[None]
    _check_sequences(tensors)
    # 3. One item, not several.
    single = _PER_ITEM if tokens is not None else (*_PER_ITEM, "pixel_values")
    for name in single:
        if name in tensors and len(tensors[name]) != 1:
            raise ValueError(
                f"Items: item {number} has {name} of shape {tuple(tensors[name].shape)}; expected "
                "one item, (1, ...); make each item by a call of the processor of its own"
            )
    return tensors


# ------------------------------------------------------------------------------------ put together


def collate(items: Sequence[Batch]) -> Batch:
    """One batch from several items. Sequences of different length are padded on the right:
    ``input_ids`` and ``attention_mask`` with 0, ``labels`` with −100; a decoder's by themselves.

    Where the rows of an entry are no items, as those of images that stand in a text, one item's lie
    below the other's.

    Raises ``ValueError`` for items of different kinds or for ragged tensors that no mask can
    describe.
    """
    if not isinstance(items[0], Mapping):
        return _collate_tuples(items)
    names = items[0].keys()
    dicts = [dict(item) for item in items if isinstance(item, Mapping) and item.keys() == names]
    if len(dicts) != len(items):
        raise ValueError(
            f"collate: items must have the same keys as the first, {sorted(names)}; where some "
            "have images and others none, pass cp.Items(items, collate=...)"
        )
    # 1. Entries whose rows are no items, one item below the other.
    rows = _rows_of(items, dicts)
    # 2. Sequences are padded to the longest, with a mask that says where they end.
    sequences = [{n: t for n, t in item.items() if n not in rows} for item in dicts]
    for prefix in ("", "decoder_"):
        lengths = {_length(item, prefix) for item in sequences}
        if len(lengths) > 1 and 0 not in lengths:
            sequences = [_padded(item, max(lengths), prefix) for item in sequences]
    sequences = _with_labels_padded(sequences)
    # 3. What is left fits as it is.
    batch = {}
    for name in sequences[0] | dict.fromkeys(rows):
        parts = [item[name] for item in (dicts if name in rows else sequences)]
        axis = axis_of(name, parts[0])
        shapes = {tuple(part.shape[:axis] + part.shape[axis + 1 :]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"collate: {name!r} has different shapes and cannot be padded: {sorted(shapes)}"
            )
        batch[name] = torch.cat(parts, axis)
    return Gathered(batch, count=len(items), rows=rows) if rows else batch


def _rows_of(items: Sequence[Batch], dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, tuple]:
    """How many rows each item has of the entries whose rows are no items."""
    names: dict[str, None] = {}
    for item in items:
        if isinstance(item, Gathered):
            names |= dict.fromkeys(item.rows)
    rows = {}
    for name in names:
        parts = [item[name] for item in dicts]
        known = parts[0].is_floating_point() or name.endswith(_OF_IMAGES)
        # Without tokens to stand for them nothing tells the model whose rows they are.
        if "input_ids" not in dicts[0] or not known:
            raise ValueError(
                f"collate: the rows of {name!r} are no items, and how those of several items go "
                "together is not known; pass cp.Items(items, collate=...)"
            )
        rows[name] = tuple(len(part) for part in parts)
    return rows


def _collate_tuples(items: Sequence[Batch]) -> Batch:
    found = [item for item in items if isinstance(item, tuple)]
    if len(found) != len(items) or len({len(item) for item in found}) > 1:
        raise ValueError("collate: items must all be inputs, or all (inputs, targets)")
    if len({(item[0].shape[1:], item[0].dtype) for item in found}) > 1:
        raise ValueError(
            "collate: (inputs, targets) items must all have inputs of one shape; use dict "
            "batches with an attention_mask for sequences of different length"
        )
    if len({item[-1].shape[1:] for item in found}) > 1:
        raise ValueError("collate: targets have different shapes and cannot be put together")
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _length(item: Mapping[str, Tensor], prefix: str) -> int:
    tokens = item.get(f"{prefix}input_ids", item.get(f"{prefix}inputs_embeds"))
    return 0 if tokens is None or tokens.ndim < 2 else tokens.shape[1]


def _padded(item: Mapping[str, Tensor], longest: int, prefix: str) -> dict[str, Tensor]:
    """A sequence with everything that is as long as its tokens padded on the right."""
    length = _length(item, prefix)
    padded, more = {**item}, longest - length
    mask = f"{prefix}attention_mask"
    # A decoder sees nothing that comes later; its mask tells the loss alone what counts.
    if not prefix or "labels" not in item:
        tokens = item.get(f"{prefix}input_ids", item.get(f"{prefix}inputs_embeds"))
        assert tokens is not None
        padded.setdefault(mask, torch.ones(tokens.shape[:2], dtype=torch.long))
    for name, tensor in padded.items():
        # What belongs to the other sequence is as long by chance; labels come afterwards.
        other = name.startswith("decoder_") != bool(prefix) or name == "labels"
        if other or tensor.ndim < 2:
            continue
        if name == mask and tensor.shape[-1] == length:
            padded[name] = _padded_mask(tensor, length, more)
        elif tensor.shape[-1] == length and (tensor.ndim == 2 or name == "position_ids"):
            padded[name] = F.pad(tensor, (0, more))
        elif name in ("inputs_embeds", "bbox") and tensor.shape[1] == length:
            padded[name] = F.pad(tensor, (0, 0, 0, more))
    return padded


def _padded_mask(mask: Tensor, length: int, more: int) -> Tensor:
    """A mask with padding that nothing sees."""
    added = mask.is_floating_point() and not bool((mask > 0).any())
    lowest = max(torch.finfo(mask.dtype).min, 10 * HIDDEN) if added else 0
    if mask.ndim == 2:
        return F.pad(mask, (0, more), value=lowest)
    if mask.shape[-2] != length:
        return mask
    wide = F.pad(mask, (0, more, 0, more), value=lowest)
    # Padding sees the first position, because what sees nothing has no softmax.
    wide[..., length:, 0] = 0 if added else 1
    return wide


def _with_labels_padded(items: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Labels of tokens as long as the longest; what is added does not count."""
    labels = [item.get("labels") for item in items]
    found = [one for one in labels if one is not None and one.ndim == 2]
    lengths = {one.shape[1] for one in found}
    if len(found) != len(items) or len(lengths) < 2 or found[0].is_floating_point():
        return items
    result = []
    for item, one in zip(items, found, strict=True):
        more = max(lengths) - one.shape[1]
        result.append({**item, "labels": F.pad(one, (0, more), value=IGNORED)})
    return result
