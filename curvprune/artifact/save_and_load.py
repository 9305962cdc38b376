"""Save and load whole models: weights, manifest and, for transformers models, what ``from_pretrained`` needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvprune.artifact import folder as artifact
from curvprune.artifact import transformers_folder as hf
from curvprune.compression import Solved
from curvprune.model import architecture_config, changes_of, difference, find_layers, remember_
from curvprune.options import quantizer_of


def write_model(
    folder: Path,
    model: nn.Module,
    solved: Mapping[str, Solved],
    plan: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    portable: artifact.Portable = True,
) -> None:
    """Write an artifact: weights, manifest and, for transformers models, what ``from_pretrained``
    needs. Files of an artifact that is already there are replaced; a folder that holds anything
    else is refused (``ValueError``). A model of transformers with shapes that its config cannot
    describe (`curvprune.model.shapes`) is never portable."""
    if folder.exists() and any(folder.iterdir()) and not (folder / artifact.MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not empty and holds no artifact of curvprune; save into a new folder"
        )
    layers = find_layers(model)
    portable = artifact.portable_for(model, portable)
    artifact.save(folder, model, layers, solved, plan, portable=portable)
    if artifact.is_transformers(model):
        forms = {n: artifact.form_of(model, layers[n], s.option) for n, s in solved.items()}
        grids = {n: quantizer_of(s.option) for n, s in solved.items() if forms[n] == "packed"}
        packed = {n: q for n, q in grids.items() if q is not None}
        # Without a config the folder is one for `curvprune.load(folder, model=...)`, which says so.
        if not portable or not packed or hf.loads_packed(model):
            hf.save_config(
                folder, model, packed if portable else {}, tokenizer, architecture_config(model)
            )


def describe(
    original: nn.Module,
    model: nn.Module,
    widths: Mapping[str, tuple[int, int]] | None,
    dropped: Sequence[str],
) -> str | None:
    """Write a structurally pruned model's shapes into its config, or, where no config says them,
    let the model carry how they differ; why, in words for the notes."""
    foreign = artifact.is_transformers(model)
    if widths is not None and foreign and hf.describe_(model, widths):
        return None
    remember_(model, [*changes_of(original), difference(original, model, dropped=dropped)])
    if not foreign:
        return f"once saved, curvprune.load(folder, model=...) reads it, with an instance of {type(model).__name__}"
    ours = "once saved, curvprune.load reads it and from_pretrained does not"
    kind = type(model.config).__name__
    if widths is None:
        return f"{ours}: {kind} has one width for all cuts of a kind; pass uniform=True, where the class can have one"
    left = " and ".join(
        f"{k} {after} (of {before})" for k, (before, after) in widths.items() if after != before
    )
    return f"{ours}: {kind} cannot say {left or 'what is left of the blocks'}"


def load_artifact(
    folder: Path, *, packed: bool = False, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a saved transformers model, portable or not, in evaluation mode, weights unpacked unless
    ``packed``."""
    if artifact.is_portable(folder) and not packed:
        return hf.load_portable(folder, device=device)
    return artifact.load_into(folder, hf.load_foreign(folder), packed=packed).to(device).eval()
