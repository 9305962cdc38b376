"""Save and load whole models: weights, manifest and, for transformers models, what
``from_pretrained`` needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvprune.artifact.bytes_on_disk import Portable, form_of, is_transformers, portable_for
from curvprune.artifact.folder import load_into, save, weights_file
from curvprune.artifact.manifest import read_manifest, verify
from curvprune.artifact.transformers_folder import (
    describe_,
    load_foreign,
    load_portable,
    loads_packed,
    save_config,
)
from curvprune.compression import Solved
from curvprune.files import check_header
from curvprune.model import (
    architecture_config,
    changes_of,
    difference,
    find_layers,
    remember_,
    remember_seen_,
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
    model of transformers with shapes that its config cannot describe (`curvprune.model.shapes`) is
    never portable.
    """
    layers = find_layers(model)
    portable = portable_for(model, portable)

    def companions(fresh: Path) -> None:
        if not is_transformers(model):
            return
        # transformers must know the grid of every layer that it is to unpack.
        packed: dict[str, Quantize] = {}
        for name, one in solved.items():
            grid = quantizer_of(one.option)
            if grid is not None and form_of(model, layers[name], one.option) == "packed":
                packed[name] = grid
        # Without a config the folder is for `curvprune.load(folder, model=...)`, which says so.
        if not portable or not packed or loads_packed(model):
            grids = packed if portable else {}
            save_config(fresh, model, grids, tokenizer, architecture_config(model))

    save(folder, model, layers, solved, plan, portable=portable, companions=companions)


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
) -> nn.Module:
    """Load a saved transformers model, portable or not, in evaluation mode, weights unpacked unless
    ``packed``. With ``hashes`` every file is first seen to be what was written."""
    manifest = read_manifest(folder)
    verify(folder, manifest, hashes=hashes)
    check_header(weights_file(folder))
    if manifest.portable and not packed:
        model = load_portable(folder, device=device)
        remember_seen_(model, manifest.digests())
        return model
    # The hashes have just been looked at.
    filled = load_into(folder, load_foreign(folder), packed=packed, hashes=False)
    return filled.to(device).eval()
