"""Write an artifact once more as an ordinary model, for tools that know no packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from curvprune.artifact.folder import copy_companions, load_into
from curvprune.artifact.manifest import MANIFEST, read_manifest, verify
from curvprune.artifact.readers import why_unread
from curvprune.artifact.transformers_folder import load_foreign
from curvprune.compat import quiet_libraries
from curvprune.failures import tensors_error
from curvprune.files import as_umask_says_, where_it_lies, written_beside
from curvprune.model import changes_of


def export_dense(folder: str | Path, out: str | Path) -> Path:
    """Write a saved artifact of a transformers model once more as an ordinary model: every weight a
    float of the model's own type, zeros included, for ``from_pretrained`` and converters (GGUF,
    ONNX).

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not.
        out: a new or empty folder. It gets its name when all is written.

    Returns:
        ``out``.

    Raises:
        ValueError: not an artifact of a transformers model, or a damaged one; shapes that no config
            describes; a class that transformers itself does not read as it saves it.
    """
    folder, out = where_it_lies(Path(folder)), Path(out)
    model = opened(folder, out)
    # Its own generation config is copied: `save_pretrained` refuses contradicting settings.
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = type(own)()
    with written_beside(out, MANIFEST) as fresh:
        try:
            with quiet_libraries():
                model.save_pretrained(fresh)
        except SafetensorError as error:
            raise tensors_error(error, fresh) from error
        for weights in fresh.glob("*.safetensors"):
            as_umask_says_(weights)
        copy_companions(folder, fresh)
        _check_readable(fresh, model)
    return out


def _check_readable(out: Path, model: Any) -> None:
    """What was written is what transformers reads: the same tensors, to the last bit where the
    model is not large."""
    tensors: dict[str, Tensor] = {}
    for weights in sorted(out.glob("*.safetensors")):
        tensors |= load_file(weights)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    why = why_unread(model, config, tensors, model.state_dict())
    if why:
        raise ValueError(
            f"{out}: transformers does not read {type(model).__name__} as it saves it ({why}); "
            "use the artifact with curvprune.load"
        )


def opened(folder: Path, out: Path) -> Any:
    """The artifact's model with all weights dense, if it and ``out`` are such that it can be
    exported."""
    if not (folder / MANIFEST).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not an artifact of a transformers model: it lacks a manifest or a config"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; export into a new folder")
    verify(folder)  # before anything is made of its config
    model = load_into(folder, load_foreign(folder, read_manifest(folder).dtypes), hashes=False)
    if changes_of(model):
        raise ValueError(
            f"{folder}: no config describes its shapes, as other readers need; prune with "
            "uniform=True"
        )
    return model
