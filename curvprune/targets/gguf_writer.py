"""Write an artifact as one GGUF file, which llama.cpp and all that is built on it run.

The file holds the values of the artifact bit for bit: what is stored as codes stays codes, in the
type of ggml that has them (`curvprune.targets.gguf_types`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvprune.artifact import ArtifactFile, Entry, Stored, opened_file
from curvprune.files import where_it_lies
from curvprune.options import quantizer_of
from curvprune.targets.gguf_like import like_fields
from curvprune.targets.gguf_names import (
    ROPE_FACTORS,
    Field,
    Shape,
    gguf_name,
    model_fields,
    rope_factors,
    row_order,
    shape_of,
)
from curvprune.targets.gguf_package import import_gguf
from curvprune.targets.gguf_sizes import GgufTensor, float_type
from curvprune.targets.gguf_tokenizer import no_tokenizer, tokenizer_fields
from curvprune.targets.gguf_types import (
    FILE_TYPES,
    FLOAT_BYTES,
    TYPE_NUMBERS,
    Bytes,
    block_rows,
    float_rows,
    gguf_type,
    recovered,
    type_bytes,
)


def export_gguf(
    folder: str | Path, out: str | Path, *, like: str | Path | None = None, tokenizer: bool = True
) -> Path:
    """Write a saved artifact of a causal language model once more, as a GGUF file.

    Every weight of the file is the artifact's, bit for bit: each tensor is dequantized by the
    ``gguf`` package and compared before the file gets its name. `gguf_type` says which type an
    option becomes. One tensor is in memory at a time. Cost: about 10 s for 135 million weights.

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not. A portable folder
            holds rounded embeddings as floats; they become codes again where that is exact.
        out: the new file, ``*.gguf``.
        like: a GGUF file of the same model, from which metadata, tokenizer and chat template are
            taken. Otherwise they are made of the folder's config and tokenizer.
        tokenizer: False writes a file without a vocabulary, which llama.cpp runs on token ids
            alone. It does nothing where ``like`` is given.

    Returns:
        ``out``.

    Raises:
        ValueError: not such an artifact, or a damaged one; a family or a tokenizer that is not
            known; an option that no type of ggml holds exactly, with the nearest that one does;
            ``like`` is of another model; ``out`` is there already.
    """
    folder, out = where_it_lies(Path(folder)), Path(out)
    _check_free(out)
    with opened_file(folder) as artifact:
        # 1. What the file will hold, without reading a weight.
        shape = shape_of(artifact.config)
        tensors = _tensors(artifact, shape)
        names = [one.name for one in tensors]
        words = folder if tokenizer else None
        fields = gguf_fields(shape, words, names, like=like, file_type=_most(tensors))
        # 2. The file, under another name until all of it is right.
        with _written_beside(out) as fresh:
            _write(fresh, shape, fields, _with_data(artifact, shape, tensors), tensors)
    return out


def _check_free(out: Path) -> None:
    if out.suffix.lower() != ".gguf":
        raise ValueError(f"{out}: expected the name of a new file that ends in .gguf")
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already; export into a new file")


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A new file beside ``out`` that takes its name at the end, or is removed after an
    exception."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.new-{os.getpid()}")
    try:
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.rename(out)
    finally:
        fresh.unlink(missing_ok=True)


def gguf_fields(
    shape: Shape,
    tokenizer: Path | None,
    tensors: Collection[str],
    *,
    like: str | Path | None = None,
    file_type: str = "F32",
) -> list[Field]:
    """The metadata of a file.

    Args:
        tokenizer: the folder of a tokenizer; ``None`` for a file without a vocabulary.
        tensors: the names of the file's tensors.
        like: a GGUF file from which metadata and tokenizer are taken instead.
        file_type: the type that most weights have; the bytes do not depend on it.
    """
    if like is not None:
        fields = like_fields(Path(like), shape, tensors)
    elif tokenizer is not None:
        fields = model_fields(shape) + tokenizer_fields(tokenizer, shape.vocabulary)
    else:
        fields = model_fields(shape) + no_tokenizer()
    number = FILE_TYPES[file_type]
    fields.append(Field(key="general.file_type", kind="UINT32", value=number))
    fields.append(Field(key="general.quantization_version", kind="UINT32", value=2))
    return fields


def _most(tensors: Iterable[GgufTensor]) -> str:
    """The type that most of the weights have."""
    counts: Counter[str] = Counter({"F32": 0})
    for one in tensors:
        if len(one.shape) > 1:
            counts[one.type] += math.prod(one.shape)
    return counts.most_common(1)[0][0]


# --------------------------------------------------------------------------------- tensors


def _tensors(artifact: ArtifactFile, shape: Shape) -> list[GgufTensor]:
    """Names, shapes and types of all tensors, in the model's order."""
    found = []
    for entry in artifact.entries.values():
        name = gguf_name(entry.key, shape)
        kind = _type_of(artifact, entry)
        found.append(GgufTensor(name=name, shape=entry.shape, type=kind, key=entry.key))
    factors = rope_factors(shape)
    if factors is not None:
        found.append(GgufTensor(name=ROPE_FACTORS, shape=tuple(factors.shape), type="F32"))
    names = {one.name for one in found}
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed not in names:
            raise ValueError(f"{artifact.folder}: the model has no tensor for {needed}")
    return found


def _type_of(artifact: ArtifactFile, entry: Entry) -> str:
    # llama.cpp multiplies and adds vectors in float32.
    if len(entry.shape) < 2:
        return "F32"
    rows = (entry.shape[0], entry.shape[1])
    form = gguf_type(entry.option, rows, dtype=entry.dtype)
    rounded = quantizer_of(entry.option)
    if rounded is not None and not entry.packed:
        # Stored as floats, in a type that may have rounded them once more.
        if form.type is not None and _codes_again(artifact, entry, form.type) is not None:
            return form.type
        return float_type(entry.dtype)
    if form.type is None:
        assert form.nearest is not None
        raise ValueError(
            f"tensor {entry.key}: option {entry.option.key} fits no type of GGUF: {form.why_not}; "
            f"compress it with {form.nearest.key}"
        )
    # Floats that are no codes have the type in which they lie there.
    return form.type if entry.packed else float_type(entry.dtype)


def _codes_again(artifact: ArtifactFile, entry: Entry, kind: str) -> Stored | None:
    """The codes of a rounded weight that is stored as floats, where they are exact."""
    quantize, weight = quantizer_of(entry.option), artifact.read(entry.key)
    if quantize is None or not isinstance(weight, Tensor):
        return None
    found = recovered(weight, quantize)
    return found if found is not None and block_rows(found, kind) is not None else None


def _with_data(
    artifact: ArtifactFile, shape: Shape, tensors: Sequence[GgufTensor]
) -> Iterator[tuple[GgufTensor, Bytes]]:
    """Every tensor with its bytes, seen to be the artifact's values."""
    for one in tensors:
        if not one.key:
            factors = rope_factors(shape)
            assert factors is not None
            yield one, float_rows(factors, "F32")
            continue
        rows, values = _rows(artifact, one)
        order = row_order(one.key, shape)
        if order is not None:
            rows, values = rows.reshape(len(order), -1)[order.numpy()], values[order]
        _check_values(artifact, one, rows, values)
        yield one, np.ascontiguousarray(rows)


def _rows(artifact: ArtifactFile, one: GgufTensor) -> tuple[Bytes, Tensor]:
    """The bytes of a tensor, and the values that they must have, in float32."""
    content, entry = artifact.read(one.key), artifact.entries[one.key]
    if isinstance(content, Stored) and content.quantize is None:
        content = content.weight()  # sparse floats: zeros and all
    if isinstance(content, Tensor):
        values = content.reshape(one.shape).to(torch.float32)
        if one.type in FLOAT_BYTES:
            return float_rows(content.reshape(one.shape), one.type), values
        again = _codes_again(artifact, entry, one.type)
        assert again is not None
        content = again
    else:
        values = content.weight()
    rows = block_rows(content, one.type)
    if rows is None:
        raise ValueError(
            f"tensor {one.key}: its scales do not fit into float16, which {one.type} has; compress "
            "a float16 or float32 model"
        )
    return rows, values


def _check_values(artifact: ArtifactFile, one: GgufTensor, rows: Bytes, values: Tensor) -> None:
    """What a reader gets is what the artifact holds, to the last bit."""
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType(TYPE_NUMBERS[one.type])
    found = np.ascontiguousarray(gguf.dequantize(_typed(one, rows), kind), dtype=np.float32)
    expected = values.contiguous().numpy()
    if not np.array_equal(found.reshape(-1).view(np.int32), expected.reshape(-1).view(np.int32)):
        raise ValueError(
            f"tensor {one.key}: {one.type} does not hold its values exactly; compress it with an "
            f"option that GGUF holds, or cast it ({artifact.folder})"
        )


def _typed(one: GgufTensor, rows: Bytes) -> Any:
    """The bytes as the numbers of a float type that NumPy has."""
    plain = {"F32": np.float32, "F16": np.float16}.get(one.type)
    return rows if plain is None else rows.view(plain)


# ----------------------------------------------------------------------------------- file


def _write(
    path: Path,
    shape: Shape,
    fields: Iterable[Field],
    data: Iterator[tuple[GgufTensor, Bytes]],
    tensors: Iterable[GgufTensor],
) -> None:
    """Header, metadata, the list of tensors, then the tensors one by one."""
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, shape.family.architecture)
    # 1. Metadata.
    kinds = gguf.GGUFValueType
    for field in fields:
        if field.array:
            writer.add_key_value(field.key, field.value, kinds.ARRAY, sub_type=kinds[field.kind])
        else:
            writer.add_key_value(field.key, field.value, kinds[field.kind])
    # 2. What is where.
    for one in tensors:
        kind = gguf.GGMLQuantizationType(TYPE_NUMBERS[one.type])
        count = type_bytes(one.type, one.shape)
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # 3. The tensors.
        for _, rows in data:
            writer.write_tensor_data(rows)
    finally:
        writer.close()
