"""What transformers itself can read of a folder: tried before anything is planned, and once more
with the very tensors that are to be written.

``from_pretrained`` builds a class from its config, renames and converts what it finds, initialises
what is missing, and ties weights. Where one of these steps goes wrong, it mostly says nothing and
leaves random weights. So it is run: on the meta device, which takes neither memory nor numbers, and
before a folder is written with the numbers too, where the model is not large.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvprune.artifact.transformers_folder import config_entries, quantization_config
from curvprune.compat import decompress_, initialized_by, quiet_libraries, read_by_transformers
from curvprune.failures import is_machine
from curvprune.model import find_layers
from curvprune.options import Quantize

NUMBERS_UP_TO = 1 << 30  # bytes of a model whose numbers are compared as well
MOST_TRIALS = 40  # for a class that cannot read all of its Linear layers packed
_GRID = Quantize(bits=4)  # of the trial: any grid has the same modules


@dataclass(frozen=True, kw_only=True, slots=True)
class Readable:
    """What ``from_pretrained`` can read of a model.

    Attributes:
        packed: the Linear layers that it reads packed.
        why_dense: what it says of the others.
        why_not: what it says of the model even when every weight is dense; empty if it reads that.
    """

    packed: frozenset[str] = frozenset()
    why_dense: str = ""
    why_not: str = ""


_BY_MODEL: WeakKeyDictionary[nn.Module, Readable] = WeakKeyDictionary()
_BY_CONTENT: dict[str, Readable] = {}


def readable(model: nn.Module) -> Readable:
    """What ``from_pretrained`` can read of a model of transformers, tried without memory.

    Cost: some hundred milliseconds for a class that is new in this process; several trials where it
    cannot read all Linear layers packed.
    """
    if model not in _BY_MODEL:
        key = _content(model)
        if key not in _BY_CONTENT:
            _BY_CONTENT[key] = _tried(model)
        _BY_MODEL[model] = _BY_CONTENT[key]
    return _BY_MODEL[model]


def _content(model: nn.Module) -> str:
    """The same for models that are read in the same way: class, config, names, shapes, types and
    shared memory."""
    digest = hashlib.sha256(repr((type(model), sorted(_entries(model).items()))).encode())
    places: dict[tuple[object, ...], int] = {}
    for name, tensor in model.state_dict().items():
        place = places.setdefault(memory_of(tensor), len(places))
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {place}\n".encode())
    return digest.hexdigest()


def memory_of(tensor: Tensor) -> tuple[int, torch.Size, int]:
    """Tells whether two tensors are the same memory: a weight may be known under several names."""
    return tensor.data_ptr(), tensor.shape, int(tensor.storage_offset())


def _entries(model: Any) -> dict[str, object]:
    return config_entries(model)


def _tried(model: nn.Module) -> Readable:
    linear = {n for n, la in find_layers(model).items() if la.kind == "linear" and not la.aliases}
    try:
        # 1. Dense: names, shapes and types must be those of the model.
        why = _why_not(model, frozenset())
        if why:
            return Readable(why_not=why)
        # 2. All Linear layers packed, or as many of them as go together.
        refusals: list[str] = []

        def reads(names: frozenset[str]) -> bool:
            said = _why_not(model, names) if len(refusals) < MOST_TRIALS else "not tried"
            refusals.extend([said] if said else [])
            return not said

        packed = _largest(_alike(model, sorted(linear)), reads)
        if packed and len(packed) < len(linear) and not reads(packed):
            packed = frozenset()
    except ImportError:
        return Readable(packed=frozenset(linear))  # nothing can be tried here
    return Readable(packed=packed, why_dense=refusals[0] if len(packed) < len(linear) else "")


def _alike(model: nn.Module, names: Sequence[str]) -> list[frozenset[str]]:
    """Layers that are initialised by the same class, and whose names differ in numbers alone: one
    of them is read packed if all are."""
    owners, groups = initialized_by(model), dict[tuple[str, str], set[str]]()
    for name in names:
        key = (owners[name].__qualname__, re.sub(r"\d+", "#", name))
        groups.setdefault(key, set()).add(name)
    return [frozenset(groups[key]) for key in sorted(groups)]


def _largest(
    groups: Sequence[frozenset[str]], reads: Callable[[frozenset[str]], bool]
) -> frozenset[str]:
    """The layers that are read packed, by halves: a half that is refused is halved again."""
    names = frozenset[str]().union(*groups)
    if not names or reads(names):
        return names
    if len(groups) == 1:
        return frozenset()
    half = len(groups) // 2
    return _largest(groups[:half], reads) | _largest(groups[half:], reads)


def _why_not(model: nn.Module, packed: frozenset[str]) -> str:
    """What ``from_pretrained`` says of the model with some Linear layers packed and all numbers
    left out; empty if it reads that."""
    config, tensors = _entries(model), dict[str, Tensor]()
    seen: set[tuple[object, ...]] = set()
    for key, tensor in model.state_dict().items():
        name = key.removesuffix(".weight")
        if tensor.numel() and memory_of(tensor) in seen:
            continue
        seen.add(memory_of(tensor))
        if name in packed and name != key:
            tensors |= _packed_shapes(name, tensor)
        else:
            tensors[key] = torch.empty_like(tensor, device="meta")
    if packed:
        config["quantization_config"] = quantization_config(model, dict.fromkeys(packed, _GRID))
    return _said(model, config, tensors, model.state_dict(), packed)


def _packed_shapes(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What a packed layer's tensors look like."""
    out, width = weight.shape
    words = math.ceil(width * _GRID.bits / 32)
    shapes = {"packed": (out, words), "scale": (out, 1), "shape": (2,)}
    types = {"packed": torch.int32, "scale": torch.float16, "shape": torch.int64}
    return {
        f"{name}.weight_{part}": torch.empty(shape, dtype=types[part], device="meta")
        for part, shape in shapes.items()
    }


def why_unread(
    model: nn.Module,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> str:
    """What is wrong with the model that ``from_pretrained`` makes of a folder; empty if nothing is.

    Args:
        model: what was compressed.
        config: the entries of the folder's ``config.json``.
        tensors: what lies in the folder's weights file.
        expected: every tensor that the model read must have.

    A model of up to a gigabyte is read with its numbers, and they must be equal to the last bit; of
    a larger one, names, shapes and types are compared.
    """
    size = sum(t.numel() * t.element_size() for t in expected.values())
    numbers = size <= NUMBERS_UP_TO
    placed = {}
    for key, tensor in tensors.items():
        # Copies: what is read shares no memory with the user's model.
        placed[key] = tensor.detach().to("cpu", copy=True) if numbers else tensor.to("meta")
    packed = frozenset({"quantization_config"} & set(config))
    try:
        return _said(model, config, placed, expected, packed, numbers=numbers)
    except ImportError:
        return ""  # nothing can be tried here


def _said(
    model: nn.Module,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    packed: frozenset[str],
    *,
    numbers: bool = False,
) -> str:
    """What is wrong with what ``from_pretrained`` makes of a config and tensors."""
    try:
        read, problems = read_by_transformers(type(model), config, tensors, empty=not numbers)
        if problems:
            return problems[0]
        if packed and numbers:
            with quiet_libraries():
                decompress_(read)
    except ImportError:
        raise
    except Exception as error:  # whatever a class may raise, it does not read the folder
        if is_machine(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    found = read.state_dict()
    for key, tensor in expected.items():
        if key not in found and not numbers and packed:
            continue  # packed still
        difference = _difference(found.get(key), tensor, numbers=numbers)
        if difference:
            return f"{key} {difference}"
    return ""


def _difference(found: Tensor | None, expected: Tensor, *, numbers: bool) -> str:
    """How a tensor that was read differs from what it should be."""
    if found is None:
        return "is not there"
    if found.shape != expected.shape:
        return f"is {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if torch.promote_types(found.dtype, expected.dtype) != found.dtype:
        return f"becomes {found.dtype} from {expected.dtype}".replace("torch.", "")
    if numbers and not torch.equal(found.cpu(), expected.detach().cpu().to(found.dtype)):
        return "has other numbers"
    return ""
