"""vLLM: what it has kernels for, and what it runs as one.

The tables say what vLLM's own code says, and where: `KERNELS` which grids of a packed layer run on
which devices, `curvprune.targets.vllm_classes` which layers each of its classes fuses. This target
offers what runs on CPUs as well as on GPUs. `scripts/vllm_table.py` reads the tables from an
installed vLLM, and `benchmarks/engine_vllm.py` loads what the target accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import GroupError, Groups, Layer, Request, find_groups
from curvprune.options import Form, Option, Quantize, check_fits, option_from_key, quantizer_of
from curvprune.targets.target import TargetName
from curvprune.targets.vllm_classes import CLASSES, VERSION, known

# cpu.py in model_executor/kernels/linear/mixed_precision: 32 inputs and 32 outputs at a time.
MULTIPLE = 32
PACKED_ZEROS = 8  # zero points of 4 bits in a word of 32, along the outputs
EVERYWHERE = "CPUs and GPUs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What runs one kind of packed weights.

    Attributes:
        bits: widths.
        symmetric: without zero points or with them.
        group_sizes: inputs that share a scale; ``None``: one scale per output channel.
        devices: `EVERYWHERE`, or where alone it runs.
        names: the kernels, which are classes in ``mixed_precision``.
        activations: the bits that inputs are rounded to; ``None``: they stay floats.
    """

    bits: tuple[int, ...]
    symmetric: bool
    group_sizes: tuple[int | None, ...]
    devices: str
    names: tuple[str, ...]
    activations: int | None = None


# `_POSSIBLE_KERNELS` in kernels/linear/__init__.py and the kernels' `can_implement`, vLLM 0.32.
_MARLIN = (None, 32, 64, 128)
_TURING = "NVIDIA GPUs (Marlin, compute capability 7.5 and later)"
_HOPPER = "NVIDIA GPUs (Machete, compute capability 9.0)"
_HUMMING = "NVIDIA GPUs (Humming, which must be installed, compute capability 7.5 and later)"
KERNELS = (
    Kernel(
        bits=(4,),
        symmetric=True,
        group_sizes=_MARLIN,
        devices=EVERYWHERE,
        names=("CPUWNA16LinearKernel", "MarlinLinearKernel", "TritonW4A16LinearKernel"),
    ),
    Kernel(
        bits=(4,),
        symmetric=False,
        group_sizes=_MARLIN,
        devices=EVERYWHERE,
        names=("CPUWNA16LinearKernel", "MarlinLinearKernel", "TritonW4A16LinearKernel"),
    ),
    Kernel(
        bits=(8,),
        symmetric=True,
        group_sizes=_MARLIN,
        devices=_TURING,
        names=("MarlinLinearKernel",),
    ),
    Kernel(
        bits=(8,),
        symmetric=False,
        group_sizes=(None, 64, 128),
        devices=_HOPPER,
        names=("MacheteLinearKernel",),
    ),
    Kernel(
        bits=(2, 3, 5, 6, 7),
        symmetric=True,
        group_sizes=_MARLIN,
        devices=_HUMMING,
        names=("HummingLinearKernel",),
    ),
    Kernel(
        bits=(2, 3, 5, 6, 7),
        symmetric=False,
        group_sizes=_MARLIN,
        devices=_HUMMING,
        names=("HummingLinearKernel",),
    ),
)


def vllm_bits() -> tuple[int, ...]:
    """The widths that run on every device."""
    return tuple(sorted({b for k in KERNELS if k.devices == EVERYWHERE for b in k.bits}))


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmTarget:
    """See `curvprune.targets.target.Target`: bytes and forms are those of the folder."""

    name: TargetName = "vllm"
    portable: Portable = "engines"
    source: str = f"vLLM {VERSION}: kernels/linear/mixed_precision, models/registry.py"

    def groups(
        self, model: nn.Module, request: Request, offered: Mapping[str, Iterable[str]]
    ) -> Groups:
        """Those of the request, joined with the layers that vLLM runs as one: they have one
        scheme, which vLLM takes from the first."""
        keys = {name: frozenset(options) for name, options in offered.items()}
        asked = find_groups(request, keys)
        fused = []
        for group in fused_layers(model, keys):
            # Layers that are dense whatever is chosen are put together as floats.
            if any(_rounds(key) for name in group for key in keys[name]):
                _check_alike(model, group, keys)
                fused.append(group)
        choice = [group for group in fused if len(keys[group[0]]) > 1]
        return Groups(layers=_joined([*asked.layers, *choice], list(keys)), notes=asked.notes)

    def check(self, model: nn.Module, layer: Layer, option: Option) -> None:
        reader = artifact.reader_of(model, layer, portable=self.portable)
        quantize = quantizer_of(option)
        _check_class(model, layer, option)
        if quantize is not None and reader is not None:
            _check_kernel(quantize, layer)
        check_fits(option, layer.name, layer.shape, reader=reader)
        if quantize is not None and reader is not None:
            _check_shape(model, quantize, layer)

    def form_of(self, model: nn.Module, layer: Layer, option: Option) -> Form:
        return artifact.form_of(model, layer, option, portable=self.portable)

    def layer_bytes(self, model: nn.Module, layer: Layer, option: Option) -> int:
        return artifact.layer_bytes(model, layer, option, portable=self.portable)

    def other_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return artifact.other_bytes(model, layers)

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return artifact.header_bytes(model, layers)


VLLM = VllmTarget()


# ------------------------------------------------------------------------------ what is refused


def _check_class(model: nn.Module, layer: Layer, option: Option) -> None:
    """Whether vLLM has the model's class at all."""
    kind = type(model).__name__
    if not artifact.is_transformers(model):
        why = "is no model of transformers"
    elif known(kind) is None:
        near = get_close_matches(kind, CLASSES, n=1, cutoff=0.0)
        why = f"is none of the {len(CLASSES)} classes that were loaded there (nearest: {near[0]})"
    else:
        why = artifact.why_not_portable(model)
    if why:
        raise ValueError(
            f"layer {layer.name}: option {option.key}: vLLM {VERSION} may not load this folder: "
            f"{kind} {why}; choose target: transformers or curvprune (in Python "
            "Settings(target=...))"
        )


def _check_kernel(quantize: Quantize, layer: Layer) -> None:
    """Whether kernels for the grid run on every device."""
    width = layer.shape[1]
    # 1. The width.
    kernels = [k for k in KERNELS if k.symmetric == quantize.symmetric]
    able = [k for k in kernels if k.devices == EVERYWHERE]
    bits = sorted({b for k in able for b in k.bits})
    if quantize.bits not in bits:
        nearest = min(bits, key=lambda b: abs(b - quantize.bits))
        elsewhere = [k.devices for k in kernels if quantize.bits in k.bits]
        grid = f"{quantize.bits} bits{'' if quantize.symmetric else ' with zero points'}"
        where = f"runs {grid} only on {elsewhere[0]}" if elsewhere else f"has no kernel for {grid}"
        way = ""
        if elsewhere and quantize.symmetric:
            way = ", or target: transformers with same_option: fused, which vLLM reads there"
        raise ValueError(
            f"layer {layer.name}: option {quantize.key}: vLLM {VERSION} {where}; target: vllm "
            f"keeps to what runs on {EVERYWHERE}: {_or(bits)} bits; nearest: {nearest}{way}"
        )
    # 2. The groups.
    sizes = [size for k in able for size in k.group_sizes if size is not None]
    asked = quantize.group_size
    if asked is not None and asked not in sizes:
        fitting = sorted((s for s in sizes if width % s == 0), key=lambda s: (abs(s - asked), s))
        near = str(fitting[0]) if fitting else "null (one scale per channel)"
        raise ValueError(
            f"layer {layer.name}: option {quantize.key}: vLLM {VERSION} has kernels for groups of "
            f"{_or(sizes)} or one scale per channel, not {asked}; nearest that divides its "
            f"{width} inputs: {near}"
        )


def _check_shape(model: nn.Module, quantize: Quantize, layer: Layer) -> None:
    """Whether the layer, with those that it is fused with, has a shape that kernels take."""
    out, width = layer.shape
    # 1. What it is fused with; a part that is missing is one that vLLM would look for.
    parts = _parts(model, layer.name)
    linear = {name: _linear(model, name) for name in parts}
    there = {name: module.out_features for name, module in linear.items() if module is not None}
    if len(there) == 1:
        parts = (layer.name,)
    beside = "" if len(parts) == 1 else f" ({' + '.join(parts)}, which it runs as one)"
    missing = [name for name in parts if name not in there]
    total = sum(there.values())
    # 2. Whether that is a shape that kernels take.
    facts = known(type(model).__name__)
    problem = ""
    if facts is not None and layer.name.rpartition(".")[2] in facts.dense:
        problem = f"its class {type(model).__name__} reads this layer only dense"
    elif missing:
        problem = f"it runs {' and '.join(parts)} as one, and there is no {missing[0]}"
    elif width % MULTIPLE:
        problem = f"its kernel takes multiples of {MULTIPLE} inputs, not {width}"
    elif total % MULTIPLE:
        problem = f"its kernel takes multiples of {MULTIPLE} outputs, not {total}{beside}"
    elif not quantize.symmetric and out % PACKED_ZEROS:
        problem = f"zero points are packed by {PACKED_ZEROS} outputs, not {out}"
    if problem:
        raise ValueError(
            f"layer {layer.name}: option {quantize.key}: vLLM {VERSION} cannot run it packed: "
            f"{problem}; leave the layer out, offer it keep or a cast, or choose target: "
            "transformers"
        )


def _or(values: Iterable[int]) -> str:
    *most, last = map(str, sorted(set(values)))
    return f"{', '.join(most)} or {last}" if most else last


# ---------------------------------------------------------------------------------- fused layers


def fused_layers(model: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers, two or more each, that vLLM's class for a model runs as one, of those named."""
    known = dict.fromkeys(names)
    found: dict[tuple[str, ...], None] = {}
    for name in known:
        parts = tuple(part for part in _parts(model, name) if part in known)
        if len(parts) > 1:
            found.setdefault(parts)
    return list(found)


def _parts(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names of the layers that vLLM runs as one with a layer, itself among them."""
    parent, _, leaf = name.rpartition(".")
    facts = known(type(model).__name__)
    for names in () if facts is None else facts.fused:
        if leaf in names:
            return tuple(f"{parent}.{part}".lstrip(".") for part in names)
    return (name,)


def _linear(model: nn.Module, name: str) -> nn.Linear | None:
    """The Linear layer of a name, if there is one."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _rounds(key: str) -> bool:
    return quantizer_of(option_from_key(key)) is not None


def _check_alike(
    model: nn.Module, group: tuple[str, ...], offered: Mapping[str, frozenset[str]]
) -> None:
    """Layers that are fused have one scheme."""
    first = group[0]
    for other in group[1:]:
        if offered[first] == offered[other]:
            continue
        more, less = first, other
        if not offered[first] - offered[other]:
            more, less = other, first
        extra = ", ".join(sorted(offered[more] - offered[less]))
        raise GroupError(
            (),
            f"vLLM runs layers {' and '.join(group)} as one in {type(model).__name__}, but only "
            f"{more} is offered {extra}; offer all of them the same options, or leave all out",
            key="target",
        )


def _joined(groups: list[tuple[str, ...]], order: list[str]) -> tuple[tuple[str, ...], ...]:
    """Groups that share a layer put together, in the model's order."""
    place = {name: position for position, name in enumerate(order)}
    joined: list[set[str]] = []
    for group in groups:
        whole = set(group)
        apart = []
        for other in joined:
            if other & whole:
                whole |= other
            else:
                apart.append(other)
        joined = [*apart, whole]
    sorted_each = [tuple(sorted(group, key=place.__getitem__)) for group in joined]
    return tuple(sorted(sorted_each, key=lambda group: place[group[0]]))
