"""Metadata, tokenizer and chat template of a GGUF file that a user gives, if it is of the same
model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curvprune.failures import is_machine, one_line
from curvprune.places import check_regular
from curvprune.targets.gguf_names import Field, Shape, model_fields
from curvprune.targets.gguf_package import import_gguf

# Entries that speak of the other file's weights, or of how it was split or made.
_NOT_COPIED = (
    "GGUF.",
    "split.",
    "quantize.",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
)
# What llama.cpp takes where an entry is missing, as a function of the model.
_UNSAID = {
    "attention.head_count_kv": lambda s: s.heads,
    "attention.key_length": lambda s: s.width // s.heads,
    "attention.value_length": lambda s: s.width // s.heads,
    "rope.dimension_count": lambda s: s.head_width,
    "rope.freq_base": lambda s: 10000.0,
}
_FREE = ("context_length", "vocab_size")  # the first says how far it was trained
_CLOSE = 1e-6  # float32 and what a config says of the same number


def like_fields(path: Path, shape: Shape, tensors: Iterable[str]) -> list[Field]:
    """The entries of a GGUF file, those left out that speak of its own weights.

    Args:
        tensors: names that the new file will have.

    Raises ``ValueError`` naming the file and what differs if it is of another model.
    """
    content = _read(path)
    fields = _fields(content)
    said = {field.key: field.value for field in fields}
    # 1. The same architecture, numbers and vocabulary.
    architecture = said.get("general.architecture")
    if architecture != shape.family.architecture:
        raise _differs(path, "general.architecture", architecture, shape.family.architecture)
    _check_numbers(path, said, shape)
    tokens = said.get("tokenizer.ggml.tokens")
    rows = len(tokens) if isinstance(tokens, list) else said.get(f"{architecture}.vocab_size")
    if rows is not None and rows != shape.vocabulary:
        raise _differs(path, "the number of tokens", rows, shape.vocabulary)
    # 2. The same tensors; an output layer is left out where it is the embedding.
    _check_tensors(path, {tensor.name for tensor in content.tensors}, set(tensors))
    # 3. What is not about its own weights.
    return [field for field in fields if not field.key.startswith(_NOT_COPIED)]


def _read(path: Path) -> Any:
    """The file, as the ``gguf`` package reads it."""
    gguf = import_gguf()
    if not path.exists():
        raise ValueError(f"{path} is not there; like needs a GGUF file of the same model")
    check_regular(path)
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # of any type: a file may say anything
        if is_machine(error):
            raise
        raise ValueError(f"{path} is not a whole GGUF file ({one_line(str(error))})") from error


def _fields(content: Any) -> list[Field]:
    """All entries, of the kinds that they have there."""
    gguf = import_gguf()
    found = []
    for key, field in content.fields.items():
        if key.startswith("GGUF."):
            continue
        kinds = [kind.name for kind in field.types]
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        value = field.contents()
        # An empty array says nothing, and cannot be written.
        if array and not value:
            continue
        if array and len(kinds) != 2:
            raise ValueError(f"{key}: an array of arrays, which is not copied; leave out like")
        found.append(Field(key=key, kind=kinds[-1], value=value, array=array))
    return found


def _check_numbers(path: Path, said: Mapping[str, object], shape: Shape) -> None:
    """Every number of the config is the file's, also those that a file leaves to llama.cpp."""
    a = shape.family.architecture
    ours = {field.key: field.value for field in model_fields(shape)}
    for key, value in ours.items():
        word = key.removeprefix(f"{a}.")
        if word in _FREE:
            continue
        found = said.get(key)
        if found is None and word in _UNSAID:
            found = _UNSAID[word](shape)
        if not _equal(found, value):
            raise _differs(path, key, found, value)
    # A rotary embedding that is stretched there and not here.
    for key in said:
        foreign = key.startswith(f"{a}.rope.scaling.") or key == f"{a}.expert_count"
        if foreign and key not in ours and said[key] not in ("none", 0):
            raise _differs(path, key, said[key], None)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return bool(np.isclose(one, other, rtol=_CLOSE, atol=0))
    # Some files say a number once for every block.
    if isinstance(one, list) and one:
        return all(_equal(each, other) for each in one)
    return bool(one == other)


def _check_tensors(path: Path, theirs: Collection[str], ours: Collection[str]) -> None:
    odd = {*theirs} ^ {*ours}
    odd -= {"output.weight"}
    if odd:
        name = sorted(odd)[0]
        where = "has" if name in theirs else "lacks"
        raise ValueError(
            f"{path} is of another model: it {where} {name}, unlike the artifact; give a GGUF of "
            "the same model, or leave out like"
        )


def _differs(path: Path, key: str, found: Any, expected: Any) -> ValueError:
    return ValueError(
        f"{path} is of another model: {key} is {found!r}, the artifact has {expected!r}; give a "
        "GGUF of the same model, or leave out like"
    )
