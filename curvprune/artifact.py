"""Packed storage: from solved layers to tensors on disk and back.

The layout is compressed-tensors' ``pack-quantized``: integer codes of ``bits`` bits packed without gaps into
little-endian int32 words along the inputs, float scales, zero points packed along the outputs, and the shape. Plain
transformers reads it for Linear layers of its own models; `curvprune.load` reads it for every kind of layer of any
module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Int8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from curvprune.layers import Layer, find_layers
from curvprune.options import Cast, Option, Quantize, option_from_key, quantizer_of, stored_bytes
from curvprune.packed import PackedWeight, give_back_memory, pack_modules
from curvprune.shapes import changes_of, remember_, reshape_
from curvprune.solve import Solved
from curvprune.solve.grids import HALF_WAY, dequantize
from curvprune.state import State

WEIGHTS = "model.safetensors"
# Of an artifact that is not portable: transformers would take the other name for its own, miss what is packed, and
# start it at random with no more than a warning.
FOREIGN_WEIGHTS = "packed.safetensors"
MANIFEST = "curvprune.json"

Portable = bool | Literal["engines"]


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one that transformers saves and loads itself (told without importing transformers)."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def reader_of(model: nn.Module, layer: Layer, *, portable: Portable = True) -> str | None:
    """Who must be able to read this layer packed besides `curvprune.load`: ``"transformers"``, ``"engines"``, ``None``.

    transformers' loader unpacks untied ``nn.Linear`` only (a packed Embedding crashes its weight initialisation), so a
    ``portable`` artifact stores other layers of its models dense after rounding; ``portable="engines"`` keeps the
    options of those that are packed to what serving engines have kernels for. An artifact that is not portable is for
    `curvprune.load` alone, and so is that of any module that is not transformers' own.
    """
    if not portable or not is_transformers(model) or layer.kind != "linear" or layer.aliases:
        return None
    return "engines" if portable == "engines" else "transformers"


def packs(model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True) -> bool:
    """Whether the artifact stores this layer's codes packed under this option: every rounded layer, if only
    `curvprune.load` must read it; else those of `reader_of`, from 2 bits on (compressed-tensors' zero points are
    integers, which one bit has no use for)."""
    quantize = quantizer_of(option)
    if quantize is None:
        return False
    if not portable or not is_transformers(model):
        return True
    return quantize.bits > 1 and reader_of(model, layer, portable=portable) is not None


def pack(codes: Int8[Tensor, "_ _"], bits: int, *, dim: int = 1) -> Int[Tensor, "_ _"]:
    """Signed ``bits``-bit codes → int32 words along ``dim`` (1, or 0 for zero points), without gaps."""
    if dim == 0:
        return pack(codes.t().contiguous(), bits).t().contiguous()
    unsigned = (codes.cpu().numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    planes = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(len(unsigned), -1), axis=-1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack(words: Int[Tensor, "_ _"], bits: int, length: int, *, dim: int = 1) -> Int8[Tensor, "_ _"]:
    """The inverse of `pack`; ``length`` is the number of codes along ``dim``."""
    if dim == 0:
        return unpack(words.t().contiguous(), bits, length).t().contiguous()
    raw = np.ascontiguousarray(words.cpu().numpy().astype("<i4")).view(np.uint8)
    planes = np.unpackbits(raw, axis=-1, bitorder="little")[:, : length * bits].reshape(len(raw), length, bits)
    unsigned = np.packbits(planes, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def stored_tensors(layer: Layer, solved: Solved, *, packed: bool) -> dict[str, Tensor]:
    """The tensors of one layer as they lie on disk, keyed by their full name."""
    quantize = quantizer_of(solved.option)
    if quantize is None or not packed:
        weight = layer.from_matrix(solved.weight)
        dtype = getattr(torch, solved.option.dtype) if isinstance(solved.option, Cast) else layer.weight.dtype
        return {layer.keys[0]: weight.to(dtype).contiguous()}
    assert solved.codes is not None and solved.scale is not None
    tensors = {
        f"{layer.name}.weight_packed": pack(solved.codes, quantize.bits),
        f"{layer.name}.weight_scale": solved.scale.contiguous(),
        f"{layer.name}.weight_shape": torch.tensor(layer.shape, dtype=torch.int64),
    }
    if solved.zero is not None and not quantize.symmetric:
        zero = solved.zero.contiguous() if quantize.bits == 1 else pack(solved.zero, quantize.bits, dim=0)
        tensors[f"{layer.name}.weight_zero_point"] = zero
    return tensors


def state_dict_on_disk(
    model: nn.Module, layers: Mapping[str, Layer], solved: Mapping[str, Solved], *, portable: Portable = True
) -> dict[str, Tensor]:
    """Every tensor of the compressed model: packed layers, and all else as it is; shared tensors once."""
    replaced = {layer.keys[0]: name for name, layer in layers.items() if name in solved}
    covered = {_identity(layers[name].weight) for name in replaced.values()}
    aliases = {key for layer in layers.values() for key in layer.keys[1:]}
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, int]] = set()
    for key, value in model.state_dict().items():
        if key in replaced:
            layer = layers[replaced[key]]
            one = solved[layer.name]
            packed = packs(model, layer, one.option, portable=portable)
            tensors.update(stored_tensors(layer, one, packed=packed))
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
    """Upper bound of the file's own header: one JSON entry per tensor, up to four tensors per packed layer."""
    names = [*state_dict_on_disk(model, layers, {}), *(4 * [f"{n}.weight_zero_point" for n in layers])]
    return 64 + sum(len(name) + 110 for name in names)


def layer_bytes(model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True) -> int:
    """Bytes on disk of one layer under one option."""
    return stored_bytes(option, layer.shape, dtype=layer.dtype, packed=packs(model, layer, option, portable=portable))


def save(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    plan: Mapping[str, Any],
    *,
    portable: Portable = True,
) -> None:
    """Write the weights and ``curvprune.json`` (which option each layer has) into ``folder``; `packs` says what
    ``portable`` means. A model whose shapes are not its architecture's carries how they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder)
    state.write_tensors(
        WEIGHTS if portable else FOREIGN_WEIGHTS, state_dict_on_disk(model, layers, solved, portable=portable)
    )
    manifest = {
        "format": "pack-quantized",
        "version": 1,
        "portable": portable,
        "layers": {
            n: {"option": s.option.key, "packed": packs(model, layers[n], s.option, portable=portable)}
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


@torch.no_grad()
def load_into(folder: Path, model: nn.Module, *, packed: bool = False) -> nn.Module:
    """Fill ``model`` (of the uncompressed architecture) with an artifact's weights, unpacked to the model's own types.
    With ``packed`` the modules of packed layers are replaced by ones that keep them packed (`curvprune.packed`).

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
    held: list[tuple[Layer, PackedWeight]] = []
    for layer in find_layers(model).values():
        entry = manifest["layers"].get(layer.name)
        quantize = quantizer_of(option_from_key(entry["option"])) if entry else None
        if quantize is None or not entry["packed"]:
            continue
        codes, scale, zero = take_packed(folder, tensors, layer, quantize)
        if packed:
            held.append((layer, PackedWeight(codes, scale, zero, quantize, layer.weight.dtype)))
        else:
            matrix = dequantize(codes, scale, zero, quantize.group_size)
            tensors[layer.keys[0]] = layer.from_matrix(matrix)
    own = model.state_dict()
    shared = {key for layer in find_layers(model).values() for key in layer.keys[1:]}
    if extra := sorted(set(tensors) - set(own)):
        raise ValueError(f"{folder}: tensor {extra[0]!r} has no place in {type(model).__name__}")
    loaded = {layer.weight.data_ptr() for layer, _ in held}
    for name, target in own.items():
        if name in tensors:
            if tensors[name].shape != target.shape:
                raise ValueError(
                    f"{folder}: {name} is {tuple(tensors[name].shape)}, the model has {tuple(target.shape)}"
                )
            target.copy_(tensors[name])
            loaded.add(target.data_ptr())
    missing = [n for n, t in own.items() if n not in tensors and n not in shared and t.data_ptr() not in loaded]
    if missing:
        raise ValueError(f"{folder}: no tensor for {missing[0]!r} of {type(model).__name__}")
    del own, tensors  # the dense weights must go with their modules
    while held:
        pack_modules(model, *held.pop())
    if packed:
        give_back_memory()
    return model


def take_packed(
    folder: Path, tensors: dict[str, Tensor], layer: Layer, quantize: Quantize
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of a packed layer, as in `curvprune.solve.Solved`; its tensors are removed from the
    folder's ``tensors``.

    Raises ``ValueError`` naming the layer if they are not whole or of another shape.
    """
    packed, scale, shape, zero = (
        tensors.pop(f"{layer.name}.weight_{k}", None) for k in ("packed", "scale", "shape", "zero_point")
    )
    if packed is None or scale is None or shape is None:
        raise ValueError(f"{folder}: layer {layer.name} lacks its packed tensors; the file is damaged")
    if tuple(shape.tolist()) != layer.shape:
        raise ValueError(f"{folder}: layer {layer.name} is {shape.tolist()}, the model has {layer.shape}")
    codes = unpack(packed, quantize.bits, layer.shape[1])
    if quantize.bits == 1:
        return codes, scale, torch.full(scale.shape, HALF_WAY, dtype=torch.float16) if zero is None else zero
    return codes, scale, None if zero is None else unpack(zero, quantize.bits, layer.shape[0], dim=0)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensor_names(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes) of every tensor in the artifact, read from the header alone."""
    with safe_open(weights_file(folder), framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 — safe_open is not a dict
        width = {"I8": 1, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
        return {
            key: (tuple(s.get_shape()), math.prod(s.get_shape()) * width[s.get_dtype()]) for key, s in slices.items()
        }
