"""Save and load whole models: weights, manifest and, for transformers models, what
``from_pretrained`` needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.artifact.bytes_on_disk import (
    Portable,
    form_of,
    is_transformers,
    portable_for,
    why_not_portable,
)
from curvprune.artifact.folder import (
    ForOthers,
    check_free,
    load_into,
    save,
    state_dict_on_disk,
)
from curvprune.artifact.manifest import read_manifest, verify
from curvprune.artifact.readers import why_unread
from curvprune.artifact.transformers_folder import (
    config_entries,
    describe_,
    load_foreign,
    quantization_config,
    save_config,
)
from curvprune.compression import Solved, dequantize
from curvprune.model import (
    Layer,
    architecture_config,
    changes_of,
    difference,
    find_layers,
    remember_,
)
from curvprune.options import Quantize, quantizer_of


def write_model(
    folder: Path,
    model: nn.Module,
    solved: Mapping[str, Solved],
    plan: Mapping[str, object],
    *,
    tokenizer: Any = None,
    portable: Portable = True,
) -> None:
    """Write an artifact: weights, manifest and, for transformers models, what ``from_pretrained``
    needs.

    An artifact that is already there is replaced as a whole, and stays until the new one is; a
    folder that holds anything else, or one of its files changed, is refused (``ValueError``). A
    model of transformers that its ``from_pretrained`` would not read, such as one with shapes that
    its config cannot describe, is never portable; the manifest and a warning say why.
    """
    check_free(folder)
    layers, asked = find_layers(model), portable
    if not is_transformers(model):
        save(folder, model, layers, solved, plan, portable=portable)
        return
    # 1. What the config says; of packed layers, where others shall read them.
    portable = portable_for(model, portable)
    entries = config_entries(model, architecture_config(model))
    packed = _packed_for_others(model, layers, solved, portable)
    if packed:
        zeros = portable == "engines"
        entries["quantization_config"] = quantization_config(model, packed, packed_zeros=zeros)
    # 2. Whether they do: the very tensors, read by transformers itself.
    unread = why_not_portable(model) if asked else ""
    if portable and not (portable == "engines" and _has_zero_points(packed)):
        tensors = state_dict_on_disk(model, layers, solved, portable=portable)
        unread = why_unread(model, entries, tensors, _compressed(model, layers, solved))
    if unread:
        entries.pop("quantization_config", None)
        warnings.warn(f"{folder}: {unread_note(model, unread)}", UserWarning, stacklevel=2)
    # 3. Weights, manifest and what `from_pretrained` needs.
    others = ForOthers(
        write=lambda fresh: save_config(fresh, model, entries, tokenizer), unread=unread
    )
    save(folder, model, layers, solved, plan, portable=portable, others=others)


def unread_note(model: nn.Module, why: str) -> str:
    """That a folder is not portable, for the notes."""
    return (
        f"transformers' from_pretrained does not read {type(model).__name__} as it is ({why}): "
        "curvprune.load reads what is saved, and nothing else does"
    )


def _packed_for_others(
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    portable: Portable,
) -> dict[str, Quantize]:
    """The grids of the layers that transformers is to unpack."""
    found: dict[str, Quantize] = {}
    for name, one in solved.items():
        grid = quantizer_of(one.option)
        form = form_of(model, layers[name], one.option, portable=portable)
        if portable and grid is not None and form in ("packed", "blocks"):
            found[name] = grid
    return found


def _has_zero_points(packed: Mapping[str, Quantize]) -> bool:
    """Packed zero points are for engines: transformers reads them in some versions only."""
    return any(not grid.symmetric for grid in packed.values())


def _compressed(
    model: nn.Module, layers: Mapping[str, Layer], solved: Mapping[str, Solved]
) -> dict[str, Tensor]:
    """Every tensor of the compressed model."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for name, one in solved.items():
        layer = layers[name]
        matrix, grid = one.weight, quantizer_of(one.option)
        if grid is not None and one.codes is not None and one.scale is not None:
            # Codes and scales say what the weight is; not all who solved it keep it.
            matrix = dequantize(one.codes, one.scale, one.zero, grid.group_size)
        weight = layer.from_matrix(matrix).to(layer.weight.dtype)
        tensors.update(dict.fromkeys(layer.keys, weight))
    return tensors


def describe(
    original: nn.Module,
    model: nn.Module,
    widths: Mapping[str, tuple[int, int]] | None,
    dropped: Sequence[str],
) -> str | None:
    """Write a structurally pruned model's shapes into its config, or, where no config says them,
    let the model carry how they differ; why, in words for the notes."""
    foreign = is_transformers(model)
    if widths is not None and foreign and describe_(model, widths):
        return None
    # What no config says, the model carries itself.
    remember_(model, [*changes_of(original), difference(original, model, dropped=dropped)])
    if not foreign:
        instance = f"an instance of {type(model).__name__}"
        return f"once saved, curvprune.load(folder, model=...) reads it, with {instance}"
    ours = "once saved, curvprune.load reads it and from_pretrained does not"
    config = type(model.config).__name__
    if widths is None:
        return (
            f"{ours}: {config} has one width for all cuts of a kind; pass uniform=True, where the "
            "class can have one"
        )
    changed = []
    for cut, (before, after) in widths.items():
        if after != before:
            changed.append(f"{cut} {after} (of {before})")
    left = " and ".join(changed) or "what is left of the blocks"
    return f"{ours}: {config} cannot say {left}"


def load_artifact(
    folder: Path,
    *,
    packed: bool = False,
    device: str | torch.device = "cpu",
    hashes: bool = True,
    kind: type[nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a saved transformers model, portable or not, in evaluation mode, weights unpacked unless
    ``packed``.

    The file is read in one way only, which does not depend on the version of transformers, and
    strictly: see `curvprune.artifact.folder.load_into`. With ``hashes`` every file is first seen to
    be what was written.

    Args:
        kind: the model's class, where it is known: one that came with its weights is not found by
            its name.
        dtype: the type of its floating-point numbers; as saved without.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, hashes=hashes)
    # The hashes have just been looked at.
    empty = load_foreign(folder, manifest.dtypes, kind)
    model = load_into(folder, empty, packed=packed, hashes=False, dtype=dtype)
    return model.to(device).eval()
