"""Write an artifact once more in the layout of GPTQ checkpoints (``checkpoint_format: gptq_v2``),
which GPTQModel and serving engines read; docs/formats.md says what was tried.

Of every Linear layer in the model's blocks it holds

* ``qweight (in * bits / 32, out)``: unsigned codes, packed without gaps into int32 words along the
  inputs;
* ``scales (groups, out)`` in float16;
* ``qzeros (groups, out * bits / 32)``: unsigned zero points, packed along the outputs (version 1
  stored them less one);
* ``g_idx (in,)``: the group of each input.

A weight is ``(code - zero) * scale``. There is one grid for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import curvprune
from curvprune.artifact.dense import opened
from curvprune.artifact.folder import WEIGHTS, copy_companions, state_dict_on_disk, weights_file
from curvprune.artifact.manifest import MANIFEST, Manifest, read_manifest
from curvprune.artifact.packing import pack
from curvprune.artifact.stored_layers import Stored, take_stored
from curvprune.files import State, read_tensors_of, where_it_lies, written_beside
from curvprune.model import Layer, find_layers
from curvprune.options import Quantize, option_from_key, quantizer_of

BITS = (2, 3, 4, 8)  # GPTQModel packs 5, 6 and 7 bits in planes, which other readers do not know


def export_gptq(folder: str | Path, out: str | Path) -> Path:
    """Write a saved artifact of a transformers model once more, as a GPTQ checkpoint.

    Every Linear layer of the model's blocks must have the same grid of 2, 3, 4 or 8 bits. The
    output head and layers of other kinds are written dense, rounded or not as they are in the
    artifact: GPTQ's readers expect them so. What a reader unpacks are the weights of the artifact.

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not.
        out: a new or empty folder. It gets its name when all is written.

    Returns:
        ``out``.

    Raises:
        ValueError: not an artifact of a transformers model; shapes that no config describes;
            stacked experts, or layers whose grids differ, by name; a width or a shape that the
            layout does not have.
    """
    folder, out = where_it_lies(Path(folder)), Path(out)
    # 1. The model as it was rounded, and the layers that the layout has.
    model = opened(folder, out)
    layers = find_layers(model)
    _refuse_experts(folder, layers.values())
    linear = _linear_in_blocks(model, layers)
    manifest = read_manifest(folder)
    quantize = _one_grid(folder, manifest, linear)
    _check_shapes(quantize, linear)
    # 2. All other tensors as they are, and of these layers the codes as they lie on disk.
    file = weights_file(folder)
    on_disk, tensors = read_tensors_of(file), state_dict_on_disk(model, layers, {})
    for name, layer in linear.items():
        del tensors[f"{name}.weight"]
        entry = manifest.layers[name]
        option = option_from_key(entry.option)
        stored = take_stored(file, on_disk, layer, option, form=entry.form)
        for key, tensor in _gptq_tensors(layer, stored, quantize).items():
            tensors[f"{name}.{key}"] = tensor
    with written_beside(out, MANIFEST) as fresh:
        state = State(fresh)
        state.write_tensors(WEIGHTS, tensors)
        # 3. What a reader needs besides, in both places where one may look for it.
        settings = _config(quantize)
        config = State(folder).read_json("config.json")
        state.write_json("config.json", {**config, "quantization_config": settings})
        state.write_json("quantize_config.json", settings)
        copy_companions(folder, fresh)
    return out


def _refuse_experts(folder: Path, layers: Iterable[Layer]) -> None:
    """Written dense they would be most of the model, and under names that engines which run experts
    do not look for."""
    stacked = [layer.name for layer in layers if layer.kind == "experts"]
    if stacked:
        more = f" and {len(stacked) - 2} more" if len(stacked) > 2 else ""
        raise ValueError(
            f"{folder}: GPTQ's layout has no stacked experts, and this model has "
            f"{', '.join(stacked[:2])}{more}; export_dense writes an ordinary model, "
            'target="curvprune" packs them for curvprune.load'
        )


def _linear_in_blocks(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The Linear layers that are part of a block and share their weight with nothing."""
    # GPTQ's readers quantize what repeats: blocks, not the output head.
    modules = model.named_modules()
    blocks = tuple(f"{name}." for name, module in modules if isinstance(module, nn.ModuleList))
    found = {}
    for name, layer in layers.items():
        if layer.kind == "linear" and not layer.aliases and name.startswith(blocks):
            found[name] = layer
    return found


def _one_grid(folder: Path, manifest: Manifest, linear: Iterable[str]) -> Quantize:
    """The grid that all layers have, which must be one that the layout has."""
    grids: dict[str, Quantize | None] = {}
    for name in linear:
        entry = manifest.layers.get(name)
        grids[name] = None if entry is None else quantizer_of(option_from_key(entry.option))
    # The grid that most have is the one that the others should have had.
    counts = Counter(grid for grid in grids.values() if grid is not None)
    if not counts:
        raise ValueError(
            f"{folder}: none of the {len(grids)} Linear layers in its blocks is rounded; GPTQ "
            "needs one grid for all"
        )
    quantize = counts.most_common(1)[0][0]
    others = []
    for name, grid in grids.items():
        if grid != quantize:
            others.append(f"{name} ({'not rounded' if grid is None else grid.key})")
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise ValueError(
            f"{folder}: GPTQ needs one grid for all Linear layers; {counts[quantize]} have "
            f"{quantize.key}, but not {', '.join(others[:5])}{more}; compress with one option "
            "for all of them"
        )
    if quantize.bits not in BITS:
        nearest = min(BITS, key=lambda b: (abs(b - quantize.bits), -b))
        raise ValueError(
            f"{folder}: GPTQ's layout has 2, 3, 4 or 8 bits, not {quantize.bits}; nearest: "
            f"{nearest}"
        )
    return quantize


def _check_shapes(quantize: Quantize, linear: Mapping[str, Layer]) -> None:
    """Codes must fill whole words, and inputs whole groups."""
    # 3 bits do not divide a word: 32 codes fill three.
    whole = 32 if quantize.bits == 3 else 32 // quantize.bits
    size = quantize.group_size or 1
    for name, layer in linear.items():
        out, width = layer.shape
        if out % whole or width % whole or width % size:
            groups = f" and whole groups of {size} inputs" if quantize.group_size else ""
            raise ValueError(
                f"layer {name}: GPTQ's layout at {quantize.bits} bits needs outputs and inputs "
                f"that are multiples of {whole}{groups}; it is {out} x {width}"
            )


def _gptq_tensors(layer: Layer, stored: Stored, quantize: Quantize) -> dict[str, Tensor]:
    """A layer's tensors in the layout, all turned: inputs first, outputs second."""
    scale, zero = stored.scale, stored.zero
    assert scale is not None
    # bfloat16 reaches further down than float16: of tiny scales digits would be lost.
    if not torch.equal(scale.to(torch.float16).to(scale.dtype), scale):
        raise ValueError(
            f"layer {layer.name}: its scales do not fit into float16; compress a float16 or "
            "float32 model"
        )
    # Symmetric codes have their zero in the middle, which is 0 before it is made unsigned.
    if zero is None:
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    inputs = torch.arange(layer.shape[1], dtype=torch.int32)
    return {
        "qweight": pack(stored.matrix, quantize.bits).t().contiguous(),
        "qzeros": pack(zero, quantize.bits, dim=0).t().contiguous(),
        "scales": scale.to(torch.float16).t().contiguous(),
        "g_idx": inputs // (quantize.group_size or layer.shape[1]),
    }


def _config(quantize: Quantize) -> dict[str, object]:
    """What a reader must know of the layout."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": quantize.bits,
        "group_size": quantize.group_size or -1,
        "sym": quantize.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": f"curvprune:{curvprune.__version__}"},
    }
