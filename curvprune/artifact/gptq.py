"""Write an artifact once more, for other tools: as an ordinary model, or in the layout of GPTQ
checkpoints.

The latter (``checkpoint_format: gptq_v2``) is what GPTQModel and serving engines read;
docs/formats.md says what was tried. Of every Linear layer in the model's blocks it holds ``qweight
(in * bits / 32, out)``, unsigned codes packed without gaps into int32 words along the inputs;
``scales (groups, out)`` in float16; ``qzeros (groups, out * bits / 32)``, unsigned zero points
packed along the outputs (version 1 stored them less one); ``g_idx (in,)``, the group of each input.
A weight is ``(code - zero) * scale``. There is one grid for all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import curvprune
from curvprune.artifact import folder as artifact
from curvprune.artifact import transformers_folder as hf
from curvprune.files import State
from curvprune.model import Layer, changes_of, find_layers
from curvprune.options import Quantize, option_from_key, quantizer_of

BITS = (2, 3, 4, 8)  # GPTQModel packs 5, 6 and 7 bits in planes, which other readers do not know


def export_dense(folder: str | Path, out: str | Path) -> Path:
    """Write a saved artifact of a transformers model once more as an ordinary model: every weight a
    float of the model's own type, zeros included, for ``from_pretrained`` and converters (GGUF,
    ONNX).

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not.
        out: a new or empty folder.

    Returns:
        ``out``.

    Raises:
        ValueError: not an artifact of a transformers model; shapes that no config describes.
    """
    folder, out = Path(folder), Path(out)
    _opened(folder, out).save_pretrained(out)
    artifact.copy_companions(folder, out)
    return out


def export_gptq(folder: str | Path, out: str | Path) -> Path:
    """Write a saved artifact of a transformers model once more, as a GPTQ checkpoint.

    Every Linear layer of the model's blocks must have the same grid of 2, 3, 4 or 8 bits. The
    output head and layers of other kinds are written dense, rounded or not as they are in the
    artifact: GPTQ's readers expect them so. What a reader unpacks are the weights of the artifact.

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not.
        out: a new or empty folder.

    Returns:
        ``out``.

    Raises:
        ValueError: not an artifact of a transformers model; shapes that no config describes;
            stacked experts, or layers whose grids differ, by name; a width or a shape that the
            layout does not have.
    """
    folder, out = Path(folder), Path(out)
    model = _opened(folder, out)
    layers = find_layers(model)
    # Written dense they would be most of the model, and under names that engines which run experts
    # do not look for.
    if stacked := [n for n, layer in layers.items() if layer.kind == "experts"]:
        more = f" and {len(stacked) - 2} more" if len(stacked) > 2 else ""
        raise ValueError(
            f"{folder}: GPTQ's layout has no stacked experts, and this model has {', '.join(stacked[:2])}{more}; "
            "export_dense writes an ordinary model, portable=False packs them for "
            "curvprune.load"
        )
    blocks = tuple(
        f"{n}." for n, module in model.named_modules() if isinstance(module, nn.ModuleList)
    )
    linear = {
        n: x
        for n, x in layers.items()
        if x.kind == "linear" and not x.aliases and n.startswith(blocks)
    }
    quantize = _one_grid(folder, linear)
    on_disk, tensors = (
        load_file(artifact.weights_file(folder)),
        artifact.state_dict_on_disk(model, layers, {}),
    )
    entries = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))["layers"]
    for name, layer in linear.items():
        del tensors[f"{name}.weight"]
        option, form = (
            option_from_key(entries[name]["option"]),
            artifact.form_on_disk(entries[name]),
        )
        stored = artifact.take_stored(folder, on_disk, layer, option, form=form)
        tensors |= {f"{name}.{key}": t for key, t in _gptq_tensors(layer, stored, quantize).items()}
    State(out).write_tensors(artifact.WEIGHTS, tensors)
    settings = _config(quantize)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    State(out).write_json("config.json", {**config, "quantization_config": settings})
    State(out).write_json("quantize_config.json", settings)
    artifact.copy_companions(folder, out)
    return out


def _opened(folder: Path, out: Path) -> Any:
    """The artifact's model with all weights dense, if it and ``out`` are such that it can be
    exported."""
    if not (folder / artifact.MANIFEST).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not an artifact of a transformers model: it lacks a manifest or a config"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; export into a new folder")
    model = artifact.load_into(folder, hf.load_foreign(folder))
    if changes_of(model):
        raise ValueError(
            f"{folder}: no config describes its shapes, as other readers need; prune with "
            "uniform=True"
        )
    return model


def _one_grid(folder: Path, linear: dict[str, Layer]) -> Quantize:
    """The grid that all layers have."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))["layers"]
    grids = {
        n: quantizer_of(option_from_key(manifest[n]["option"])) if n in manifest else None
        for n in linear
    }
    counts = Counter(grid for grid in grids.values() if grid is not None)
    if not counts:
        raise ValueError(
            f"{folder}: none of the {len(linear)} Linear layers in its blocks is rounded; GPTQ "
            "needs one grid for all"
        )
    quantize = counts.most_common(1)[0][0]
    if others := [
        f"{n} ({'not rounded' if g is None else g.key})" for n, g in grids.items() if g != quantize
    ]:
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
    whole = 32 if quantize.bits == 3 else 32 // quantize.bits
    for name, layer in linear.items():
        if any(size % whole for size in layer.shape) or layer.shape[1] % (quantize.group_size or 1):
            groups = (
                f" and whole groups of {quantize.group_size} inputs" if quantize.group_size else ""
            )
            raise ValueError(
                f"layer {name}: GPTQ's layout at {quantize.bits} bits needs outputs and inputs "
                f"that are multiples of {whole}{groups}; it is {layer.shape[0]} x "
                f"{layer.shape[1]}"
            )
    return quantize


def _gptq_tensors(layer: Layer, stored: artifact.Stored, quantize: Quantize) -> dict[str, Tensor]:
    codes, scale, zero = stored.matrix, stored.scale, stored.zero
    assert scale is not None
    # bfloat16 reaches further down than float16: of tiny scales digits would be lost.
    if not torch.equal(scale.to(torch.float16).to(scale.dtype), scale):
        raise ValueError(
            f"layer {layer.name}: its scales do not fit into float16; compress a float16 or "
            "float32 model"
        )
    if zero is None:
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    inputs = torch.arange(layer.shape[1], dtype=torch.int32)
    return {
        "qweight": artifact.pack(codes, quantize.bits).t().contiguous(),
        "qzeros": artifact.pack(zero, quantize.bits, dim=0).t().contiguous(),
        "scales": scale.to(torch.float16).t().contiguous(),
        "g_idx": inputs // (quantize.group_size or layer.shape[1]),
    }


def _config(quantize: Quantize) -> dict[str, Any]:
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
