"""Cuts found by numbers, without a tracer: which outputs of layers, and which entries of other
parameters, move which inputs of the layers behind them.

One forward pass holds the output of every layer fixed, at random values that require gradients. So
a layer's input depends on nothing but the layers just before it, and a gradient that is exactly
zero says that two units are not connected.

    1. columns of a reader in blocks of d, for every divisor d of its width;
    2. for every bit of the block's number one backward pass from the blocks that have it and one
       from those that have not: a row that moves one block is seen in one of the two each time;
       rows that move all blocks are shared and stay;
    3. readers that are fed by the same rows are one cut.

What is found is tried on data afterwards, as all cuts are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.compat import experts_one_by_one
from curvprune.failures import is_machine
from curvprune.model import Batch, Layer, Loss, evaluating, find_layers
from curvprune.structured.cuts import Cut, Piece, Slot

_EXPERT_PARTS = ("gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A tensor whose entries move others: what a layer puts out, or a parameter of no layer."""

    name: str
    tensor: Tensor
    dim: int | None  # where a layer's outputs stand; None for parameters

    def touched(self, gradient: Tensor | None) -> Tensor:
        """Which rows of a layer, or entries of a parameter, have a gradient."""
        if gradient is None:
            size = self.tensor.numel() if self.dim is None else self.tensor.shape[self.dim]
            return torch.zeros(size, dtype=torch.bool)
        moved = gradient != 0
        if self.dim is not None:
            moved = moved.movedim(self.dim, -1).reshape(-1, moved.shape[self.dim]).any(0)
        return moved.flatten().cpu()


@dataclass(kw_only=True, slots=True)
class _Probe:
    """One forward pass with layers held fixed."""

    sources: list[_Source] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """A reader's columns in blocks, and what moves each: source → block of every entry, −1 for
    none and −2 for all."""

    reader: str
    blocks: int
    size: int
    moves: Mapping[str, Tensor]


def probed_cuts(
    model: nn.Module, objective: Loss, batch: Batch, *, taken: set[str]
) -> tuple[list[Cut], list[str]]:
    """Cuts of layers whose inputs are not in ``taken``, and why there are none.

    Cost: a forward pass of ``batch``; per reader some dozen backward passes between two layers.
    """
    layers = find_layers(model)
    try:
        with experts_one_by_one(model):
            probe = _probed(model, objective, batch, layers)
            return _layer_cuts(model, layers, probe, taken), []
    except Exception as error:
        if is_machine(error):
            raise
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [], [f"{type(model).__name__} cannot be probed ({message})"]


# experts


def expert_cuts(model: nn.Module) -> list[Cut]:
    """The inner width of stacked experts, one for all of them: unit i is unit i of every expert."""
    cuts = []
    for name, layer in find_layers(model).items():
        if layer.kind != "experts" or layer.parameter != "down_proj" or layer.aliases:
            continue
        owner, units, module = name.rpartition(".")[0], layer.shape[1], layer.module
        into = 1 if layer.transposed else 2
        pieces = [_piece(owner, "down_proj", into, torch.arange(units)[:, None])]
        # 1. Rows of the first matrix and of its bias: of gate and up, in turn or one after another.
        for part in _EXPERT_PARTS:
            tensor = getattr(module, part, None)
            if tensor is None:
                continue
            dim = 1 if part.endswith("bias") or not layer.transposed else 2
            rows = torch.arange(tensor.shape[dim])
            if getattr(module, "is_concatenated", True):
                index = rows.reshape(-1, units).T
            else:
                index = rows.reshape(units, -1)
            pieces.append(_piece(owner, part, dim, index))
        # 2. The numbers that the module keeps of them.
        counts = {}
        for key, value in vars(module).items():
            says = any(word in key for word in ("inter", "expert_dim", "ffn", "inner"))
            if says and type(value) is int and value in (units, 2 * units):
                counts[owner, key] = value // units
        read = Slot(module=name, side="in", index=torch.arange(units)[:, None])
        cuts.append(
            Cut(
                name="",
                kind="mlp",
                units=units,
                makes=(),
                reads=(read,),
                counts=counts,
                pieces=tuple(pieces),
                multiple=max(1, 16 // layer.weight.element_size()),
            )
        )
    return cuts


def _piece(module: str, tensor: str, dim: int, index: Tensor) -> Piece:
    return Piece(module=module, tensor=tensor, dim=dim, index=index)


# the forward pass


def _probed(model: nn.Module, objective: Loss, batch: Batch, layers: Mapping[str, Layer]) -> _Probe:
    probe = _Probe()
    generator = torch.Generator().manual_seed(0)
    called: set[str] = set()
    handles = []

    def watch(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, named: Any, y: Any) -> Any:
            x = args[0] if args else next(iter(named.values()))
            if not isinstance(y, Tensor) or not isinstance(x, Tensor):
                return y
            called.add(layer.name)
            probe.inputs.setdefault(layer.name, []).append(x)
            # Random values, so that no unit is silent in all places.
            noise = torch.randn(y.shape, generator=generator).to(y)
            leaf = (noise * (y.detach().std() + 0.1)).requires_grad_()
            dim = 1 if layer.kind == "conv" and y.ndim > 2 else y.ndim - 1
            probe.sources.append(_Source(name=layer.name, tensor=leaf, dim=dim))
            return leaf.clone()

        return hook

    for layer in layers.values():
        if layer.kind in ("linear", "conv1d", "conv") and layer.groups == 1:
            for reader in layer.readers:
                handles.append(reader.register_forward_hook(watch(layer), with_kwargs=True))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(p.is_floating_point())
        with evaluating(model), torch.enable_grad():
            probe.outputs = objective.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
    # Parameters of layers that were held fixed move nothing.
    fixed = {id(p) for n in called for p in layers[n].module.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if id(p) not in fixed and p.is_floating_point():
            probe.sources.append(_Source(name=name, tensor=p, dim=None))
    return probe


# readers


def _touched(
    x: Tensor, dim: int, columns: Tensor, sources: list[_Source], generator: torch.Generator
) -> dict[str, Tensor]:
    """Source → which of its entries move these columns of an input."""
    weight = torch.rand(x.shape, generator=generator).to(x) + 0.5
    shape = [1] * x.ndim
    shape[dim] = -1
    cotangent = weight * columns.to(x).reshape(shape)
    tensors = [source.tensor for source in sources]
    grads = torch.autograd.grad(x, tensors, cotangent, retain_graph=True, allow_unused=True)
    found: dict[str, Tensor] = {}
    for source, grad in zip(sources, grads, strict=True):
        seen = source.touched(grad)
        found[source.name] = found[source.name] | seen if source.name in found else seen
    return found


def _reading(
    layer: Layer, inputs: list[Tensor], sources: list[_Source], known: bool
) -> tuple[_Reading | None, dict[str, Tensor]]:
    """The reader's columns in the smallest blocks that rows of producers feed one by one; and all
    that moves any of them."""
    generator = torch.Generator().manual_seed(1)
    dim = 1 if layer.kind == "conv" and inputs[0].ndim > 2 else inputs[0].ndim - 1
    width = inputs[0].shape[dim]

    def touched(columns: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for x in inputs:
            if x.requires_grad:
                for name, seen in _touched(x, dim, columns, sources, generator).items():
                    found[name] = found[name] | seen if name in found else seen
        return found

    every = touched(torch.ones(width))
    near = [s for s in sources if s.name in every and bool(every[s.name].any())]
    sources = near
    for size in () if known else range(1, width // 2 + 1):
        if width % size == 0 and any(s.dim is not None for s in near):
            reading = _in_blocks(layer, width, size, touched, near)
            if reading is not None:
                return reading, every
    return None, every


def _in_blocks(
    layer: Layer, width: int, size: int, touched: Any, sources: list[_Source]
) -> _Reading | None:
    blocks = width // size
    number = torch.arange(width) // size
    # 1. For each bit of the block's number: what moves those with it, and those without. The
    # highest and the lowest come first: they tell soonest that a row moves some blocks of many.
    bits = list(range((blocks - 1).bit_length()))
    order = [bits.pop(), *bits]
    with_bit, without = [], []
    for bit in order:
        has = (number >> bit) & 1 == 1
        with_bit.append(touched(has))
        without.append(touched(~has))
        if _mixes(with_bit, without, sources):
            return None
    # 2. The block of every entry: one in all, or all of them; anything between is no block.
    moves: dict[str, Tensor] = {}
    whole = False
    for source in sources:
        ones = torch.stack([t[source.name] for t in with_bit])
        zeros = torch.stack([t[source.name] for t in without])
        some, shared = (ones | zeros).any(0), (ones & zeros).all(0)
        powers = 2 ** torch.tensor(order)[:, None]
        block = (ones * powers).sum(0)
        block = torch.where(shared, -2, torch.where(some, block, -1))
        if bool((block >= blocks).any()):
            return None
        moves[source.name] = block
        # 3. Rows of at least one producer feed every block, all equally many.
        if source.dim is not None and bool((block >= 0).any()):
            sizes = torch.bincount(block[block >= 0], minlength=blocks)
            if int(sizes.min()) != int(sizes.max()):
                return None
            whole = True
    if not whole:
        return None
    return _Reading(reader=layer.name, blocks=blocks, size=size, moves=moves)


# cuts


def _mixes(
    ones: list[dict[str, Tensor]], zeros: list[dict[str, Tensor]], sources: list[_Source]
) -> bool:
    """Whether an entry moves several blocks, but not all of them."""
    for source in sources:
        both = torch.stack(
            [one[source.name] & zero[source.name] for one, zero in zip(ones, zeros, strict=True)]
        )
        some = torch.stack(
            [one[source.name] | zero[source.name] for one, zero in zip(ones, zeros, strict=True)]
        )
        if bool((both.any(0) & (some & ~both).any(0)).any()):
            return True
    return False


def _layer_cuts(
    model: nn.Module, layers: Mapping[str, Layer], probe: _Probe, taken: set[str]
) -> list[Cut]:
    rows = {s.name: s.tensor.shape[s.dim] for s in probe.sources if s.dim is not None}
    held = {name: torch.zeros(width, dtype=torch.bool) for name, width in rows.items()}
    readings = {}
    # 1. What moves every reader; rows that mix in one of them cannot go.
    for name, inputs in probe.inputs.items():
        reading, every = _reading(layers[name], inputs, probe.sources, name in taken)
        if reading is not None:
            readings[name] = reading
            every = {n: block == -2 for n, block in reading.moves.items()}
        for source, seen in every.items():
            if source in held:
                held[source] |= seen
    # 2. Rows that reach the outputs of the model stay as well.
    if probe.outputs is not None and probe.outputs.requires_grad:
        y = probe.outputs
        columns = torch.ones(y.shape[-1])
        generator = torch.Generator().manual_seed(2)
        reached = _touched(y, y.ndim - 1, columns, probe.sources, generator)
        for source in held:
            held[source] |= reached[source]
    # 3. Readers that the same rows feed.
    cuts = []
    for family in _families(readings, held):
        cut = _cut(model, layers, family, rows)
        if cut is not None:
            cuts.append(cut)
    return cuts


# A reading and, for each of its blocks, the unit of the cut that it is.
_Family = list[tuple[_Reading, Tensor]]


def _families(readings: Mapping[str, _Reading], held: Mapping[str, Tensor]) -> Iterator[_Family]:
    """Readings that share rows, with one number for each unit over all of them; those with a row
    that must stay are left out."""
    # Units of one family have the same readers.
    groups: dict[tuple[str, ...], list[list[_Block]]] = defaultdict(list)
    for members in _units(readings):
        groups[tuple(sorted({name for name, _ in members}))].append(members)
    for names, found in groups.items():
        units = {name: torch.full((readings[name].blocks,), -1) for name in names}
        for number, members in enumerate(found):
            for name, block in members:
                units[name][block] = number
        family = [(readings[name], unit) for name, unit in units.items()]
        if len(found) > 1 and all(_is_free(reading, unit, held) for reading, unit in family):
            yield family


_Block = tuple[str, int]  # a reader, and the number of its block


def _units(readings: Mapping[str, _Reading]) -> list[list[_Block]]:
    """Blocks that share a row, or an entry of a parameter, are one unit."""
    parent: dict[_Block, _Block] = {}

    def root(node: _Block) -> _Block:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    owner: dict[tuple[str, int], _Block] = {}
    for name, reading in readings.items():
        for source, blocks in reading.moves.items():
            for entry in (blocks >= 0).nonzero()[:, 0].tolist():
                node = name, int(blocks[entry])
                parent[root(node)] = root(owner.setdefault((source, entry), node))
    units: dict[_Block, list[_Block]] = defaultdict(list)
    for name, reading in readings.items():
        for block in range(reading.blocks):
            units[root((name, block))].append((name, block))
    return list(units.values())


def _is_free(reading: _Reading, unit: Tensor, held: Mapping[str, Tensor]) -> bool:
    """Whether all of a reader's blocks belong to the family, and no row of them must stay."""
    if bool((unit < 0).any()):
        return False
    for source, blocks in reading.moves.items():
        if source in held and bool((held[source] & (blocks >= 0)).any()):
            return False
    return True


def _cut(
    model: nn.Module, layers: Mapping[str, Layer], family: _Family, rows: Mapping[str, int]
) -> Cut | None:
    count = int(max(unit.max() for _, unit in family)) + 1
    # 1. What reads its units.
    reads = []
    for reading, unit in family:
        columns = torch.arange(reading.blocks * reading.size)
        index = _by_unit(unit[columns // reading.size], count)
        if index is None:
            return None
        layer = layers[reading.reader]
        if layer.aliases:
            return None
        area = layer.shape[1] // len(columns)
        index = (index[:, :, None] * area + torch.arange(area)).flatten(1)
        reads.append(Slot(module=reading.reader, side="in", index=index))
    # 2. What makes them: rows of layers, and entries of other parameters.
    units_of: dict[str, Tensor] = {}
    for reading, unit in family:
        for source, blocks in reading.moves.items():
            mine = torch.where(blocks >= 0, unit[blocks.clamp(min=0)], -1)
            before = units_of.get(source)
            units_of[source] = mine if before is None else torch.maximum(before, mine)
    makes, pieces = [], []
    for source, of in units_of.items():
        if not bool((of >= 0).any()):
            continue
        if source in rows:
            index = _by_unit(of, count)
            if index is None or layers[source].aliases:
                return None
            makes.append(Slot(module=source, side="out", index=index))
        else:
            found = _pieces(model, source, of, count)
            if not found:
                return None
            pieces += found
    linear = all(layers[s.module].kind != "conv" for s in (*makes, *reads))
    kind = "channels"
    if linear:
        kind = "heads" if max(reading.size for reading, _ in family) > 1 else "mlp"
    return Cut(
        name="",
        kind=kind,
        units=count,
        makes=tuple(makes),
        reads=tuple(reads),
        counts={},
        pieces=tuple(pieces),
    )


def _by_unit(of: Tensor, count: int) -> Tensor | None:
    """``(units, k)``: which entries belong to each unit, if that is equally many."""
    found = [(of == unit).nonzero()[:, 0] for unit in range(count)]
    if len({len(f) for f in found}) != 1 or not len(found[0]):
        return None
    return torch.stack(found)


def _pieces(model: nn.Module, name: str, of: Tensor, count: int) -> list[Piece]:
    """Along which dimension of a parameter its units stand; buffers of the same width go along."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, key)
    for dim in range(parameter.ndim):
        flat = of.reshape(parameter.shape).movedim(dim, 0).reshape(parameter.shape[dim], -1)
        unit = flat.max(1).values
        # Entries that nothing moved say nothing.
        if bool(((flat != unit[:, None]) & (flat >= 0)).any()):
            continue
        index = _by_unit(unit, count)
        if index is None:
            continue
        pieces = [_piece(owner, key, dim, index)]
        for other, buffer in module.named_buffers(recurse=False):
            if buffer.ndim == 1 and parameter.ndim == 1 and len(buffer) == len(parameter):
                pieces.append(_piece(owner, other, 0, index))
        return pieces
    return []
