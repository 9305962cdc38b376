"""Packed and sparse storage: from solved layers to tensors on disk and back.

The packed layout is compressed-tensors' ``pack-quantized``: integer codes of ``bits`` bits packed
without gaps into little-endian int32 words along the inputs, float scales, zero points packed along
the outputs, and the shape. Plain transformers reads it for Linear layers of its own models;
`curvprune.load` reads it for every kind of layer of any module.

A pruned layer that only `curvprune.load` must read is stored sparse where that is smaller:
``weight_bitmask``, one bit for each weight, rows one after another, lowest bit first, set where a
weight is kept; and those weights alone in the same order, as ``weight_values`` or, rounded, as
``weight_packed`` in one run of codes, with the same scales and zero points. Exactly as many bits
are set as the option keeps, so that the size depends on option and shape alone: what is kept may be
zero.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Int8, UInt8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from curvprune.artifact.packed_modules import (
    HeldWeight,
    PackedWeight,
    SparseWeight,
    give_back_memory,
    pack_modules,
)
from curvprune.compression import HALF_WAY, Solved, dequantize, spread
from curvprune.files import State
from curvprune.model import Layer, changes_of, find_layers, key_of, remember_, reshape_
from curvprune.options import (
    Form,
    Option,
    Quantize,
    kept_weights,
    option_from_key,
    pruner_of,
    quantizer_of,
    stored_bytes,
    stored_dtype,
)

WEIGHTS = "model.safetensors"
# Of an artifact that is not portable: transformers would take the other name for its own, miss what
# is packed, and start it at random with no more than a warning.
FOREIGN_WEIGHTS = "packed.safetensors"
MANIFEST = "curvprune.json"

Portable = bool | Literal["engines"]


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one that transformers saves and loads itself (told without importing
    transformers)."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def reader_of(model: nn.Module, layer: Layer, *, portable: Portable = True) -> str | None:
    """Who must be able to read this layer packed besides `curvprune.load`: ``"transformers"``,
    ``"engines"``, ``None``.

    transformers' loader unpacks untied ``nn.Linear`` only (a packed Embedding crashes its weight
    initialisation), so a ``portable`` artifact stores other layers of its models dense after
    rounding; ``portable="engines"`` keeps the options of those that are packed to what serving
    engines have kernels for. An artifact that is not portable is for `curvprune.load` alone, and so
    is that of any module that is not transformers' own.
    """
    if _ours_alone(model, portable) or layer.kind != "linear" or layer.aliases:
        return None
    return "engines" if portable == "engines" else "transformers"


def portable_for(model: nn.Module, portable: Portable) -> Portable:
    """A model of transformers with shapes that its config cannot describe (`curvprune.model.shapes`) is
    never portable."""
    return False if is_transformers(model) and changes_of(model) else portable


def _ours_alone(model: nn.Module, portable: Portable) -> bool:
    """Whether nothing but `curvprune.load` must read the artifact."""
    return not portable_for(model, portable) or not is_transformers(model)


def form_of(model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True) -> Form:
    """How the artifact stores a layer under an option. Packed: every rounded layer, if only
    `curvprune.load` must read it; else those of `reader_of`, from 2 bits on (compressed-tensors'
    zero points are integers, which one bit has no use for). Sparse: a pruned layer that only
    `curvprune.load` must read, if that is smaller. Otherwise dense."""
    ours, quantize = _ours_alone(model, portable), quantizer_of(option)
    form: Form = "dense"
    if quantize is not None and (
        ours
        or (
            quantize.bits > 1
            and not _one_row_of_zero_points(layer, quantize)
            and reader_of(model, layer, portable=portable) is not None
        )
    ):
        form = "packed"
    if pruner_of(option) is not None and ours:
        form = min((form, "sparse"), key=lambda f: _bytes(layer, option, f))
    return form


def _one_row_of_zero_points(layer: Layer, quantize: Quantize) -> bool:
    """Whether all outputs' zero points fit into one word: compressed-tensors (0.20) cannot unpack a
    row of those."""
    out, width = layer.shape
    return (
        not quantize.symmetric
        and out * quantize.bits <= 32
        and width > (quantize.group_size or width)
    )


def _bytes(layer: Layer, option: Option, form: Form) -> int:
    return stored_bytes(option, layer.shape, dtype=layer.dtype, form=form, groups=layer.groups)


def pack(codes: Int8[Tensor, "_ _"], bits: int, *, dim: int = 1) -> Int[Tensor, "_ _"]:
    """Signed ``bits``-bit codes → int32 words along ``dim`` (1, or 0 for zero points), without
    gaps."""
    if dim == 0:
        return pack(codes.t().contiguous(), bits).t().contiguous()
    unsigned = (codes.cpu().numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    planes = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(len(unsigned), -1), axis=-1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack(
    words: Int[Tensor, "_ _"], bits: int, length: int, *, dim: int = 1
) -> Int8[Tensor, "_ _"]:
    """The inverse of `pack`; ``length`` is the number of codes along ``dim``."""
    if dim == 0:
        return unpack(words.t().contiguous(), bits, length).t().contiguous()
    raw = np.ascontiguousarray(words.cpu().numpy().astype("<i4")).view(np.uint8)
    planes = np.unpackbits(raw, axis=-1, bitorder="little")[:, : length * bits].reshape(
        len(raw), length, bits
    )
    unsigned = np.packbits(planes, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def bitmask(kept: Bool[Tensor, "_ _"]) -> UInt8[Tensor, " _"]:
    """One bit for each entry, rows one after another, lowest bit first."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy().reshape(-1), bitorder="little"))


def stored_tensors(layer: Layer, solved: Solved, *, form: Form) -> dict[str, Tensor]:
    """The tensors of one layer as they lie on disk, keyed by their full name."""
    option, quantize = solved.option, quantizer_of(solved.option)
    dtype = getattr(torch, stored_dtype(option, layer.dtype))
    if form == "dense":
        return {layer.keys[0]: layer.from_matrix(solved.weight).to(dtype).contiguous()}
    tensors = {"shape": torch.tensor(layer.shape, dtype=torch.int64)}
    if form == "sparse":
        if quantize is None:
            weight = solved.weight.to(dtype)
            kept = _kept(weight != 0, layer, option)
            tensors["values"] = weight[kept]
        else:
            assert solved.codes is not None
            kept = _kept(
                solved.codes != _code_of_zero(solved.zero, quantize, layer.shape[1]), layer, option
            )
            tensors["packed"] = pack(solved.codes[kept][None], quantize.bits)[0]
        tensors["bitmask"] = bitmask(kept)
    elif quantize is not None and solved.codes is not None:
        tensors["packed"] = pack(solved.codes, quantize.bits)
    if quantize is not None:
        assert solved.scale is not None
        tensors["scale"] = solved.scale.contiguous()
        if solved.zero is not None and not quantize.symmetric:
            one_bit = quantize.bits == 1
            tensors["zero_point"] = (
                solved.zero.contiguous() if one_bit else pack(solved.zero, quantize.bits, dim=0)
            )
    return {key_of(layer.name, f"weight_{key}"): tensor for key, tensor in tensors.items()}


def _code_of_zero(zero: Tensor | None, quantize: Quantize, width: int) -> Tensor | int:
    """The code that a pruned weight has: its group's zero point."""
    return 0 if zero is None else spread(zero, width, quantize.group_size, dim=1)


def _kept(mask: Bool[Tensor, "out in"], layer: Layer, option: Option) -> Bool[Tensor, "out in"]:
    """Exactly as many weights as the option keeps: those that are not zero, and as many zeros as
    are missing."""
    prune = pruner_of(option)
    assert prune is not None
    promised, found = kept_weights(prune, layer.shape, groups=layer.groups), int(mask.sum())
    if found > promised:
        raise ValueError(
            f"layer {layer.name}: {found} of {layer.numel} weights are not zero, but option "
            f"{option.key} keeps {promised}; compress the layer again"
        )
    mask, missing = mask.contiguous(), promised - found
    for part in mask.view(-1).split(
        1 << 20
    ):  # positions take eight bytes each: never those of a whole large layer
        if missing == 0:
            break
        places = (~part).nonzero()[:missing, 0]
        part[places] = True
        missing -= len(places)
    return mask


def state_dict_on_disk(
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    *,
    portable: Portable = True,
) -> dict[str, Tensor]:
    """Every tensor of the compressed model: packed layers, and all else as it is; shared tensors
    once."""
    replaced = {layer.keys[0]: name for name, layer in layers.items() if name in solved}
    covered = {_identity(layers[name].weight) for name in replaced.values()}
    aliases = {key for layer in layers.values() for key in layer.keys[1:]}
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, int]] = set()
    for key, value in model.state_dict().items():
        if key in replaced:
            layer = layers[replaced[key]]
            one = solved[layer.name]
            tensors.update(
                stored_tensors(
                    layer, one, form=form_of(model, layer, one.option, portable=portable)
                )
            )
            continue
        identity = _identity(value)
        if key in aliases or (value.numel() and (identity in seen or identity in covered)):
            continue
        seen.add(identity)
        tensors[key] = value.detach()
    return tensors


def _identity(tensor: Tensor) -> tuple[int, torch.Size, int]:
    """Tells whether two tensors are the same memory: a weight may be known under several names."""
    return tensor.data_ptr(), tensor.shape, int(tensor.storage_offset())


def other_bytes(model: nn.Module, layers: Mapping[str, Layer]) -> int:
    """Tensor bytes on disk of all that is not one of ``layers``."""
    inside = {_identity(layer.weight) for layer in layers.values()}
    tensors = state_dict_on_disk(model, layers, {}).values()
    return sum(t.numel() * t.element_size() for t in tensors if _identity(t) not in inside)


def header_bytes(model: nn.Module, layers: Mapping[str, Layer]) -> int:
    """Upper bound of the file's own header: one JSON entry per tensor, up to four instead of a
    layer's one if it is packed, five if it is sparse."""
    names = [
        *state_dict_on_disk(model, layers, {}),
        *(4 * [f"{n}.weight_zero_point" for n in layers]),
    ]
    return 64 + sum(len(name) + 110 for name in names)


def layer_bytes(
    model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True
) -> int:
    """Bytes on disk of one layer under one option."""
    return _bytes(layer, option, form_of(model, layer, option, portable=portable))


def save(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    plan: Mapping[str, Any],
    *,
    portable: Portable = True,
) -> None:
    """Write the weights and ``curvprune.json`` (which option each layer has) into ``folder``;
    `form_of` says what ``portable`` means. A model whose shapes are not its architecture's carries
    how they differ."""
    portable = portable_for(model, portable)
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder)
    mine, other = (WEIGHTS, FOREIGN_WEIGHTS) if portable else (FOREIGN_WEIGHTS, WEIGHTS)
    state.write_tensors(mine, state_dict_on_disk(model, layers, solved, portable=portable))
    (folder / other).unlink(missing_ok=True)  # of an artifact that was here before
    manifest = {
        "format": "pack-quantized",
        "version": 2,
        "portable": portable,
        "layers": {
            n: {
                "option": s.option.key,
                "form": form_of(model, layers[n], s.option, portable=portable),
            }
            for n, s in solved.items()
        },
        "plan": dict(plan),
        **({"changes": changes} if (changes := changes_of(model)) else {}),
    }
    state.write_json(MANIFEST, manifest)


def weights_file(folder: Path) -> Path:
    return folder / (WEIGHTS if is_portable(folder) else FOREIGN_WEIGHTS)


def is_portable(folder: Path) -> bool:
    """Whether transformers can load the folder by itself."""
    return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("portable", True))


def form_on_disk(entry: Mapping[str, Any]) -> Form:
    """From a layer's entry in the manifest, whose version 1 knew no sparse layers."""
    return entry.get("form", "packed" if entry.get("packed") else "dense")


@torch.no_grad()
def load_into(folder: Path, model: nn.Module, *, packed: bool = False) -> nn.Module:
    """Fill ``model`` (of the uncompressed architecture) with an artifact's weights, unpacked to the
    model's own types. With ``packed`` the modules of packed layers are replaced by ones that keep
    them packed (`curvprune.artifact.packed_modules`).

    Raises ``ValueError`` naming the first tensor that is missing, left over or of another shape.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a folder that curvprune saved")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    tensors = load_file(weights_file(folder))
    if (changes := manifest.get("changes", [])) != changes_of(model):
        for change in changes:
            reshape_(model, change)
        remember_(model, changes)
    held: list[tuple[Layer, HeldWeight]] = []
    for layer in find_layers(model).values():
        entry = manifest["layers"].get(layer.name)
        if entry is None or form_on_disk(entry) == "dense":
            continue
        option = option_from_key(entry["option"])
        stored = take_stored(folder, tensors, layer, option, form=form_on_disk(entry))
        if packed and not layer.name:
            raise ValueError(
                f"{folder}: the model is itself the packed layer; load it without packed=True"
            )
        if packed:
            held.append((layer, stored.held(layer.weight.dtype)))
        else:
            tensors[layer.keys[0]] = layer.from_matrix(stored.weight())
    own = model.state_dict()
    shared = {key for layer in find_layers(model).values() for key in layer.keys[1:]}
    if extra := sorted(set(tensors) - set(own)):
        raise ValueError(f"{folder}: tensor {extra[0]!r} has no place in {type(model).__name__}")
    loaded = {layer.weight.data_ptr() for layer, _ in held}
    for name, target in own.items():
        if name in tensors:
            if tensors[name].shape != target.shape:
                raise ValueError(
                    f"{folder}: {name} is {tuple(tensors[name].shape)}, the model has "
                    f"{tuple(target.shape)}"
                )
            target.copy_(tensors[name])
            loaded.add(target.data_ptr())
    missing = [
        n
        for n, t in own.items()
        if n not in tensors and n not in shared and t.data_ptr() not in loaded
    ]
    if missing:
        raise ValueError(f"{folder}: no tensor for {missing[0]!r} of {type(model).__name__}")
    del own, tensors  # the dense weights must go with their modules
    while held:
        pack_modules(model, *held.pop())
    if packed:
        give_back_memory()
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A packed or sparse layer, read back.

    Attributes:
        matrix: ``(out, in)`` codes where there is a grid, else weights.
        kept: of a sparse layer, which weights are stored; the others are zero.
        quantize, scale, zero: the grid, as in `curvprune.compression.solver.Solved`.
    """

    matrix: Tensor
    kept: Tensor | None = None
    quantize: Quantize | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    def weight(self) -> Tensor:
        if self.quantize is None or self.scale is None:
            return self.matrix
        return dequantize(self.matrix, self.scale, self.zero, self.quantize.group_size)

    def held(self, dtype: torch.dtype) -> HeldWeight:
        """The weight as it stays packed in memory, for a layer of type ``dtype``."""
        if self.kept is not None:
            return SparseWeight(self.matrix, self.kept, self.scale, self.zero, self.quantize, dtype)
        assert self.quantize is not None and self.scale is not None
        return PackedWeight(self.matrix, self.scale, self.zero, self.quantize, dtype)


def take_stored(
    folder: Path, tensors: dict[str, Tensor], layer: Layer, option: Option, *, form: Form
) -> Stored:
    """Read a packed or sparse layer; its tensors are removed from the folder's ``tensors``.

    Raises ``ValueError`` naming file and layer if they are not whole, of another shape, or do not
    fit each other.
    """
    where = f"{weights_file(folder)}: layer {layer.name}"
    quantize, (out, width) = quantizer_of(option), layer.shape

    def take(key: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None = None) -> Tensor:
        tensor = tensors.pop(key_of(layer.name, f"weight_{key}"), None)
        if tensor is None:
            raise ValueError(f"{where} lacks its weight_{key}; the file is damaged")
        if (dtype is not None and tensor.dtype != dtype) or (
            shape is not None and tuple(tensor.shape) != shape
        ):
            expected = f"{dtype or 'float'} {list(shape or ())}".removeprefix("torch.")
            found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
            raise ValueError(
                f"{where}: its weight_{key} is {found}, expected {expected}; the file is damaged"
            )
        return tensor

    if (shape := take("shape", torch.int64, (2,)).tolist()) != [out, width]:
        raise ValueError(f"{where} is {shape}, the model has {layer.shape}")
    scale = zero = kept = None
    if quantize is not None:
        groups = 1 if quantize.group_size is None else math.ceil(width / quantize.group_size)
        scale = take("scale", None, (out, groups))
        if quantize.bits == 1:
            zero = torch.full(scale.shape, HALF_WAY, dtype=torch.float16)
            zero = zero if quantize.symmetric else take("zero_point", torch.float16, (out, groups))
        elif not quantize.symmetric:
            words = take("zero_point", torch.int32, (math.ceil(out * quantize.bits / 32), groups))
            zero = unpack(words, quantize.bits, out, dim=0)
    if form == "sparse":
        mask = take("bitmask", torch.uint8, (math.ceil(out * width / 8),))
        bits = np.unpackbits(mask.numpy(), bitorder="little")
        kept = torch.from_numpy(bits[: out * width].astype(bool)).view(out, width)
        count = int(bits.sum())
        prune = pruner_of(option)
        if (
            prune is None
            or count != kept_weights(prune, layer.shape, groups=layer.groups)
            or bits[out * width :].any()
        ):
            raise ValueError(
                f"{where}: its bitmask keeps {count} weights, not what {option.key} keeps; the "
                "file is damaged"
            )
        if quantize is None:
            values = take("values", None, (count,))
            matrix = values.new_zeros(out, width)
        else:
            words = take("packed", torch.int32, (math.ceil(count * quantize.bits / 32),))
            values = unpack(words[None], quantize.bits, count)[0]
            matrix = values.new_zeros(out, width) + _code_of_zero(zero, quantize, width)
        matrix[kept] = values
    else:
        assert quantize is not None
        words = take("packed", torch.int32, (out, math.ceil(width * quantize.bits / 32)))
        matrix = unpack(words, quantize.bits, width)
    return Stored(matrix=matrix, kept=kept, quantize=quantize, scale=scale, zero=zero)


def copy_companions(folder: Path, out: Path) -> None:
    """What an export keeps as it is: the tokenizer, the generation config."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in (MANIFEST, "config.json", weights_file(folder).name):
            shutil.copy2(path, out / path.name)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensor_names(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes) of every tensor in the artifact, read from the header alone."""
    with safe_open(weights_file(folder), framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 — safe_open is not a dict
        width = {
            "I8": 1,
            "U8": 1,
            "BOOL": 1,
            "F16": 2,
            "BF16": 2,
            "I16": 2,
            "F32": 4,
            "I32": 4,
            "F64": 8,
            "I64": 8,
        }
        return {
            key: (tuple(s.get_shape()), math.prod(s.get_shape()) * width[s.get_dtype()])
            for key, s in slices.items()
        }
