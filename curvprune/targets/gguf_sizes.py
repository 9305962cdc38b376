"""How many bytes a GGUF file will take, without writing it: exactly, for planning."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvprune.targets.gguf_names import (
    ROPE_FACTORS,
    Field,
    gguf_name,
    rope_factors,
    shape_of,
)
from curvprune.targets.gguf_types import padded, type_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One tensor of a file; ``key`` is its name in the artifact, empty where it is not in there."""

    name: str
    shape: tuple[int, ...]
    type: str
    key: str = ""


def file_bytes(architecture: str, fields: Iterable[Field], tensors: Collection[GgufTensor]) -> int:
    """Bytes of a file: header, metadata and list of tensors, then the tensors, each padded."""
    total = header_bytes(architecture, fields, tensors)
    return total + sum(padded(type_bytes(one.type, one.shape)) for one in tensors)


def header_bytes(architecture: str, fields: Iterable[Field], tensors: Iterable[GgufTensor]) -> int:
    """Bytes before the first tensor. They do not depend on the tensors' types."""
    head = Field(key="general.architecture", kind="STRING", value=architecture)
    # 1. Magic, version and two counts.
    total = 4 + 4 + 8 + 8
    # 2. Metadata, then name, dimensions, type and place of every tensor.
    total += sum(field_bytes(field) for field in [head, *fields])
    for one in tensors:
        total += 8 + len(one.name.encode()) + 4 + 8 * len(one.shape) + 4 + 8
    return padded(total)


def gguf_other_bytes(model: Any, layers: Collection[str], fields: Iterable[Field]) -> int:
    """Bytes of a model's file besides the weights of some layers; with `gguf_layer_bytes` of each
    of those, the size of the file.

    Args:
        model: of transformers, in memory or on the meta device.
        layers: names of layers as `gguf_layer_bytes` prices them.
        fields: the metadata, as `gguf_fields` makes it.
    """
    shape = shape_of(model.config)
    priced = {f"{name}.weight" for name in layers}
    tensors = tensors_of(model)
    total = header_bytes(shape.family.architecture, fields, tensors)
    for one in tensors:
        if one.key not in priced:
            total += padded(type_bytes(one.type, one.shape))
    return total


def tensors_of(model: Any) -> list[GgufTensor]:
    """The tensors of a file of an uncompressed model; those with several names once."""
    shape, found, seen = shape_of(model.config), [], set()
    own: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for key, tensor in own.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind = float_type(dtype) if tensor.ndim > 1 else "F32"
        size = tuple(tensor.shape)
        found.append(GgufTensor(name=gguf_name(key, shape), shape=size, type=kind, key=key))
    factors = rope_factors(shape)
    if factors is not None:
        found.append(GgufTensor(name=ROPE_FACTORS, shape=tuple(factors.shape), type="F32"))
    return found


def float_type(dtype: str) -> str:
    """The type of ggml that holds floats of a type."""
    return {"float16": "F16", "bfloat16": "BF16"}.get(dtype, "F32")


_SIZES = {
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 1),
    **dict.fromkeys(("UINT16", "INT16"), 2),
    **dict.fromkeys(("UINT32", "INT32", "FLOAT32"), 4),
    **dict.fromkeys(("UINT64", "INT64", "FLOAT64"), 8),
}


def field_bytes(field: Field) -> int:
    """Bytes of one entry of the metadata."""
    total = 8 + len(field.key.encode()) + 4
    if not field.array:
        return total + _value_bytes(field.kind, field.value)
    assert isinstance(field.value, list)
    return total + 12 + sum(_value_bytes(field.kind, one) for one in field.value)


def _value_bytes(kind: str, value: object) -> int:
    return 8 + len(str(value).encode()) if kind == "STRING" else _SIZES[kind]
