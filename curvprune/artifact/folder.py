"""The folder of an artifact: all tensors of a compressed model, its manifest, and filling a model
from them."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from curvprune.artifact.bytes_on_disk import Portable, form_of, is_transformers, portable_for
from curvprune.artifact.manifest import (
    MANIFEST,
    Manifest,
    StoredLayer,
    is_own_card,
    not_written,
    read_manifest,
    verify,
    write_manifest,
)
from curvprune.artifact.packed_modules import HeldWeight, give_back_memory, pack_modules
from curvprune.artifact.readers import memory_of
from curvprune.artifact.stored_layers import Stored, stored_tensors, take_stored
from curvprune.artifact.transformers_folder import main_dtype
from curvprune.compression import Solved
from curvprune.files import State, check_header, read_tensors_of, written_beside
from curvprune.model import (
    Layer,
    changes_of,
    find_layers,
    remember_,
    remember_seen_,
    reshape_,
    seen_by,
)
from curvprune.options import option_from_key

WEIGHTS = "model.safetensors"
# Of an artifact that is not portable: transformers would take the other name for its own, miss what
# is packed, and start it at random with no more than a warning.
FOREIGN_WEIGHTS = "packed.safetensors"
# Bytes of safetensors' types.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F64", "I64"), 8),
}


def state_dict_on_disk(
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    *,
    portable: Portable = True,
) -> dict[str, Tensor]:
    """Every tensor of the compressed model: packed layers, and all else as it is; shared tensors
    once."""
    # Weights that are stored solved: by the key that they have, and wherever else they stand.
    replaced = {layer.keys[0]: name for name, layer in layers.items() if name in solved}
    covered = {memory_of(layers[name].weight) for name in replaced.values()}
    aliases = _aliases(layers)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, int]] = set()
    for key, value in model.state_dict().items():
        if key in replaced:
            layer, one = layers[replaced[key]], solved[replaced[key]]
            form = form_of(model, layer, one.option, portable=portable)
            tensors.update(stored_tensors(layer, one, form=form))
            continue
        # What is known under several names is stored under the first.
        identity = memory_of(value)
        if key in aliases or (value.numel() and (identity in seen or identity in covered)):
            continue
        seen.add(identity)
        tensors[key] = value.detach()
    return tensors


def _aliases(layers: Mapping[str, Layer]) -> set[str]:
    """Further names of the layers' weights, under which nothing is stored."""
    return set(chain.from_iterable(layer.keys[1:] for layer in layers.values()))


def other_bytes(model: nn.Module, layers: Mapping[str, Layer]) -> int:
    """Tensor bytes on disk of all that is not one of ``layers``."""
    inside = {memory_of(layer.weight) for layer in layers.values()}
    tensors = state_dict_on_disk(model, layers, {}).values()
    return sum(t.numel() * t.element_size() for t in tensors if memory_of(t) not in inside)


def header_bytes(model: nn.Module, layers: Mapping[str, Layer]) -> int:
    """Upper bound of the file's own header: one JSON entry per tensor, up to four instead of a
    layer's one if it is packed, five if it is sparse."""
    longest = [f"{name}.weight_zero_point" for name in layers]
    names = [*state_dict_on_disk(model, layers, {}), *4 * longest]
    return 64 + sum(len(name) + 110 for name in names)


def _nothing(_: Path) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ForOthers:
    """What an artifact holds for readers other than `curvprune.load`.

    Attributes:
        write: writes it into the folder.
        unread: why transformers does not read what is written, if so: the folder is then for
            `curvprune.load` alone, in the forms that ``portable`` says.
    """

    write: Callable[[Path], None] = _nothing
    unread: str = ""


def save(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, Layer],
    solved: Mapping[str, Solved],
    plan: Mapping[str, object],
    *,
    portable: Portable = True,
    others: ForOthers | None = None,
) -> None:
    """Write the weights and ``curvprune.json`` (which option each layer has, and every file's hash)
    into ``folder``; `form_of` says what ``portable`` means. A model whose shapes are not its
    architecture's carries how they differ.

    All is written beside ``folder`` and then renamed: what was there before is whole until then.

    Args:
        others: what readers other than `curvprune.load` need.

    Raises ``ValueError`` where the folder holds anything but an artifact as it was written.
    """
    check_free(folder)
    others = others or ForOthers()
    portable = portable_for(model, portable)
    named = bool(portable) and not others.unread
    tensors = state_dict_on_disk(model, layers, solved, portable=portable)
    entries = {}
    for name, one in solved.items():
        form = form_of(model, layers[name], one.option, portable=portable)
        entries[name] = StoredLayer(option=one.option.key, form=form)
    manifest = Manifest(
        portable=portable if named else False,
        layers=entries,
        plan=dict(plan),
        changes=tuple(changes_of(model)),
        seen=b"".join(sorted(seen_by(model))).hex(),
        dtypes=_other_types(model),
        shared=_shared(model, layers, tensors),
        unread=others.unread,
    )
    with written_beside(folder, MANIFEST) as fresh:
        State(fresh).write_tensors(WEIGHTS if named else FOREIGN_WEIGHTS, tensors)
        others.write(fresh)
        write_manifest(fresh, manifest)


def check_free(folder: Path) -> None:
    """Raises ``ValueError`` if to write a folder would lose a file that curvprune did not write, or
    that has changed since."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save into a new folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not empty and holds no artifact of curvprune; save into a new folder"
        )
    if others := not_written(folder):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{folder} holds {others[0]}{more}, which curvprune did not write or which has changed "
            "since; move it elsewhere, or save into a new folder"
        )


def _other_types(model: nn.Module) -> dict[str, str]:
    """The tensors whose float type is not the one that the config of a model of transformers
    names."""
    found: dict[str, str] = {}
    if not is_transformers(model):
        return found
    main = main_dtype(model)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != main:
            found[name] = str(tensor.dtype).removeprefix("torch.")
    return found


def _shared(
    model: nn.Module, layers: Mapping[str, Layer], tensors: Collection[str]
) -> dict[str, str]:
    """Tensors that are stored under the name of another one; further names of layers are told by
    the model itself, where it ties them."""
    first: dict[tuple[int, torch.Size, int], str] = {}
    for layer in layers.values():
        first[memory_of(layer.weight)] = layer.keys[0]
    found = {}
    for name, tensor in model.state_dict().items():
        owner = first.setdefault(memory_of(tensor), name)
        if tensor.numel() and owner != name and name not in tensors:
            found[name] = owner
    return found


def is_portable(folder: Path) -> bool:
    """Whether transformers can load the folder by itself."""
    return bool(read_manifest(folder).portable)


def weights_file(folder: Path) -> Path:
    return folder / (WEIGHTS if is_portable(folder) else FOREIGN_WEIGHTS)


@torch.no_grad()
def load_into(
    folder: Path,
    model: nn.Module,
    *,
    packed: bool = False,
    hashes: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Fill ``model`` (of the uncompressed architecture) with an artifact's weights, unpacked to the
    model's own types. With ``packed`` the modules of packed layers are replaced by ones that keep
    them packed (`curvprune.artifact.packed_modules`).

    Args:
        hashes: compare every file with the hash that was taken when it was written.
        dtype: the type of the loaded model's floating-point numbers; its own without.

    Raises ``ValueError`` naming the file that is damaged, or the first tensor that is missing, left
    over or of another shape or kind of number.
    """
    _refuse_meta(model)
    manifest = read_manifest(folder)
    verify(folder, manifest, hashes=hashes)
    tensors = read_tensors_of(weights_file(folder))
    # 1. The shapes of the model that was saved, if it does not have them yet.
    changes = list(manifest.changes)
    if changes != changes_of(model):
        for change in changes:
            reshape_(model, change)
        remember_(model, changes)
    remember_seen_(model, manifest.digests())
    # 2. What is packed or sparse, unpacked among the other tensors or held back.
    layers = find_layers(model)
    held: list[tuple[Layer, HeldWeight]] = []
    for name, stored in _take_layers(folder, manifest, tensors, layers):
        layer = layers[name]
        if not packed:
            tensors[layer.keys[0]] = layer.from_matrix(stored.weight())
            continue
        if not name:
            raise ValueError(
                f"{folder}: the model is itself the packed layer; load it without packed=True"
            )
        weight = stored.held(layer.weight.dtype)
        held.append((layer, weight if dtype is None else weight.to(dtype)))
    # 3. Everything else into its place.
    ready = {layer.weight.data_ptr() for layer, _ in held}
    for name, owner in manifest.shared.items():
        if name not in tensors and owner in tensors:
            tensors[name] = tensors[owner]
    _fill_(weights_file(folder), model, tensors, _aliases(layers), ready)
    # 4. Modules that unpack when they run. The dense weights must go with those they replace.
    tensors.clear()
    slow = []
    while held:
        layer, weight = held.pop()
        if pack_modules(model, layer, weight):
            slow.append(layer.name)
    if dtype is not None:
        model.to(dtype)
    if packed:
        give_back_memory()
        _note_slow(folder, sorted(slow))
    return model


def _note_slow(folder: Path, slow: Sequence[str]) -> None:
    """Say once which Linear layers are slower packed than dense."""
    if slow:
        more = "" if len(slow) < 4 else f" and {len(slow) - 3} more"
        warnings.warn(
            f"{folder}: {', '.join(slow[:3])}{more} unpack whenever they run, at about .4 of the "
            "speed of dense weights for single tokens. Kernels for packed weights take up to 4 "
            "bits in bfloat16 (dtype='bfloat16', groups of 32 or a multiple, outputs a multiple of "
            "16) or 8 bits per channel; without packed=True weights are dense",
            UserWarning,
            stacklevel=4,
        )


def _refuse_meta(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device and can hold no numbers; build the model "
                "without torch.device('meta'), or call model.to_empty(device='cpu') first"
            )


def coded_layers(folder: Path, model: nn.Module) -> dict[str, Stored]:
    """The layers that an artifact holds packed or sparse, by name, for views that keep their codes.

    ``model`` is of the shapes that were saved, as `load_into` leaves it. Raises as that does.
    """
    tensors = read_tensors_of(weights_file(folder))
    manifest = read_manifest(folder)
    return dict(_take_layers(folder, manifest, tensors, find_layers(model)))


def _take_layers(
    folder: Path, manifest: Manifest, tensors: dict[str, Tensor], layers: Mapping[str, Layer]
) -> Iterator[tuple[str, Stored]]:
    """The layers that are packed or sparse, in the model's order, each taken out of ``tensors``."""
    file = weights_file(folder)
    for name, layer in layers.items():
        entry = manifest.layers.get(name)
        if entry is not None and entry.form != "dense":
            option = option_from_key(entry.option)
            yield name, take_stored(file, tensors, layer, option, form=entry.form)


def _fill_(
    file: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    aliases: Collection[str],
    ready: Collection[int],
) -> None:
    """Copy tensors into a model's own.

    Args:
        aliases: further names of weights, which need no tensor of their own.
        ready: addresses of the weights that come from elsewhere.
    """
    own, kind = model.state_dict(), type(model).__name__
    # 1. Every tensor has a place, and every place a tensor.
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise ValueError(f"{file}: tensor {extra[0]!r} has no place in {kind}")
    filled = set(ready) | {own[name].data_ptr() for name in tensors}
    for name, target in own.items():
        if name not in tensors and name not in aliases and target.data_ptr() not in filled:
            raise ValueError(f"{file}: no tensor for {name!r} of {kind}")
    # 2. Numbers of that kind, in that shape.
    written: dict[int, str] = {}
    for name, tensor in tensors.items():
        target = own[name]
        if tensor.shape != target.shape:
            raise ValueError(
                f"{file}: {name} is {tuple(tensor.shape)}, the model has {tuple(target.shape)}"
            )
        if tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(
                f"{file}: {name} holds {tensor.dtype}, the model {target.dtype}; the file is "
                "damaged"
            )
        # 3. What is one tensor in the model must be one in the file.
        before = written.setdefault(target.data_ptr(), name) if target.numel() else name
        if before != name and not torch.equal(target, tensor.to(target)):
            raise ValueError(
                f"{file}: {before} and {name} differ, which {kind} holds as one tensor; untie "
                "them in model="
            )
        target.copy_(tensor)


def copy_companions(folder: Path, out: Path) -> None:
    """What an export keeps as it is: the tokenizer, the generation config. Links that lead out of
    the folder are not followed."""
    home, left = folder.resolve(), (MANIFEST, "config.json", weights_file(folder).name)
    for path in folder.iterdir():
        inside = path.resolve().is_relative_to(home)
        own = path.name in left or is_own_card(path)
        if path.is_file() and inside and not own:
            # The content alone: its mode is that of a new file.
            shutil.copyfile(path, out / path.name)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensor_names(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes) of every tensor in the artifact, read from the header alone."""
    found = {}
    check_header(weights_file(folder))
    with safe_open(weights_file(folder), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 — safe_open is not a dict
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            found[name] = (shape, math.prod(shape) * _WIDTHS[part.get_dtype()])
    return found
