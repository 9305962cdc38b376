"""Read an artifact tensor by tensor, for views of it that are written the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvprune.artifact.folder import weights_file
from curvprune.artifact.manifest import MANIFEST, Manifest, read_manifest, verify
from curvprune.artifact.stored_layers import Stored, take_stored
from curvprune.artifact.transformers_folder import load_foreign
from curvprune.failures import tensors_error
from curvprune.files import check_header
from curvprune.model import find_layers, key_of
from curvprune.options import Keep, Option, option_from_key

_PARTS = ("packed", "scale", "zero_point", "shape", "bitmask", "values")  # of a layer's weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of the model that an artifact holds.

    Attributes:
        key: its name in the model's state dict.
        option: what was done to it.
        packed: it lies there as codes or sparse; `ArtifactFile.read` gives a `Stored` then.
        dtype: of the floats that lie there otherwise, such as ``"float16"``.
    """

    key: str
    shape: tuple[int, ...]
    option: Option
    packed: bool
    dtype: str


class ArtifactFile:
    """The weights of an artifact of a transformers model, of which one tensor at a time is in
    memory. `opened_file` makes it."""

    def __init__(self, folder: Path, model: Any, manifest: Manifest, file: Any) -> None:
        self.folder, self.config, self.manifest = folder, model.config, manifest
        self._file, self._keys = file, set(file.keys())
        self._layers = {layer.keys[0]: layer for layer in find_layers(model).values()}
        own: dict[str, Tensor] = model.state_dict()
        self.entries = {key: self._entry(key, own[key]) for key in own if self._holds(key)}
        # Further names of what is stored once.
        self.tied = {a for layer in self._layers.values() for a in layer.keys[1:]}
        self.tied |= set(manifest.shared)
        missing = [key for key in own if key not in self.entries and key not in self.tied]
        if missing:
            raise ValueError(f"{weights_file(folder)}: no tensor for {missing[0]!r}")

    def _holds(self, key: str) -> bool:
        return key in self._keys or self._packed(key)

    def _packed(self, key: str) -> bool:
        layer = self._layers.get(key)
        return layer is not None and key_of(layer.name, "weight_shape") in self._keys

    def _entry(self, key: str, tensor: Tensor) -> Entry:
        layer = self._layers.get(key)
        said = None if layer is None else self.manifest.layers.get(layer.name)
        option: Option = Keep() if said is None else option_from_key(said.option)
        shape = tuple(tensor.shape)
        if self._packed(key):
            assert layer is not None
            return Entry(key=key, shape=shape, option=option, packed=True, dtype=layer.dtype)
        found = self._file.get_slice(key)
        if tuple(found.get_shape()) != shape:
            raise ValueError(
                f"{weights_file(self.folder)}: {key} is {tuple(found.get_shape())}, the model has "
                f"{shape}"
            )
        dtype = _DTYPES.get(found.get_dtype(), found.get_dtype())
        return Entry(key=key, shape=shape, option=option, packed=False, dtype=dtype)

    def read(self, key: str) -> Tensor | Stored:
        """One tensor, or the codes and the grid of a packed layer.

        Raises ``ValueError`` naming file and layer where they do not fit each other.
        """
        entry = self.entries[key]
        if not entry.packed:
            tensor: Tensor = self._file.get_tensor(key)
            return tensor
        layer = self._layers[key]
        tensors: dict[str, Tensor] = {}
        for part in _PARTS:
            name = key_of(layer.name, f"weight_{part}")
            if name in self._keys:
                tensors[name] = self._file.get_tensor(name)
        form = self.manifest.layers[layer.name].form
        file = weights_file(self.folder)
        return take_stored(file, tensors, layer, entry.option, form=form)


# safetensors' names of types.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextmanager
def opened_file(folder: Path) -> Iterator[ArtifactFile]:
    """The artifact of a transformers model, every file of which is what was written.

    Raises ``ValueError`` for what is no such artifact, a damaged one, and a model of shapes that no
    config describes.
    """
    if not (folder / MANIFEST).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not an artifact of a transformers model: it lacks a manifest or a config"
        )
    manifest = read_manifest(folder)
    verify(folder, manifest)
    if manifest.changes:
        raise ValueError(
            f"{folder}: no config describes its shapes, as other readers need; prune with "
            "uniform=True"
        )
    # The shapes alone: no weight is in memory until it is asked for.
    with torch.device("meta"):
        model = load_foreign(folder, manifest.dtypes)
    path = weights_file(folder)
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield ArtifactFile(folder, model, manifest, file)
    except SafetensorError as error:
        raise tensors_error(error, path) from error
