"""Which hidden units of a model can be removed.

The dependency graph comes from torch-pruning. A cut counts only if the model without half of its
units computes what the model computes when nothing reads those units, which is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Loss, find_layers
from curvprune.structured.cuts import BLOCKS, KINDS, Cut, Found, Slot, torch_pruning
from curvprune.structured.probing import expert_cuts, probed_cuts
from curvprune.structured.tracing import Dimension, Graph
from curvprune.structured.trying import HEAD_WIDTHS, KEY_HEADS, QUERY_HEADS, tried

# What attention's operations are called in the graph.
_ATTENDS = ("scaleddot", "bmm", "softmax")
# Attributes of attention modules: the size of a head, and what is counted in heads.
_HEAD_SIZE = ("head_dim", "attention_head_size")


def find_cuts(
    model: nn.Module, objective: Loss, batch: Batch, *, kinds: Sequence[str] = KINDS
) -> Found:
    """The cuts of a model, in its own order, and why other dimensions are none.

    Cost: a forward pass of ``batch`` with its graph, and two more on copies of the model to try the
    cuts.

    Raises:
        ValueError: there is no cut of these kinds; names the operation that is in the way.
    """
    traced = _all_found(model, objective, batch)
    wanted = {n: c for n, c in traced.cuts.items() if c.kind in kinds}
    cuts, failed = tried(model, objective, batch, wanted)
    notes = traced.notes + failed
    if not cuts:
        reasons = "; ".join(notes) if notes else "it has no layer that only other layers read"
        raise ValueError(f"no prunable {' or '.join(kinds)} in {type(model).__name__}: {reasons}")
    return Found(cuts=cuts, sinks=traced.sinks, notes=notes)


def _all_found(model: nn.Module, objective: Loss, batch: Batch) -> Found:
    """What torch-pruning's graph shows, and of other layers what numbers show."""
    torch_pruning()  # or say how to get it
    try:
        traced = _trace(model, objective, batch)
        first, reasons = tried(model, objective, batch, traced.cuts)
        traced = replace(traced, cuts=first, notes=traced.notes + reasons)
    except ValueError as reason:
        traced = Found(cuts={}, sinks={}, notes=[str(reason)])
    taken: set[str] = set()
    inside: set[str] = set()
    for cut in traced.cuts.values():
        if cut.kind != BLOCKS:
            taken |= cut.readers
            inside |= cut.modules
    probed = expert_cuts(model)
    failed: list[str] = []
    if _much_outside(model, inside):
        more, failed = probed_cuts(model, objective, batch, taken=taken)
        probed += more
    made = {slot.module for cut in traced.cuts.values() for slot in cut.makes}
    probed = [c for c in probed if not made & {slot.module for slot in c.makes}]
    named = _named(probed, before=traced.cuts)
    # In the model's order, as they are passed.
    return replace(traced, cuts={**traced.cuts, **named}, notes=traced.notes + failed)


def _much_outside(model: nn.Module, inside: set[str]) -> bool:
    """Whether layers that no cut touches hold much of the weights, the largest of them (such as a
    head over a vocabulary) aside."""
    sizes, outside = [0], [0]
    for name, layer in find_layers(model).items():
        if layer.kind in ("embedding", "experts"):
            continue
        sizes.append(layer.numel)
        if name not in inside:
            outside.append(layer.numel)
    return sum(outside) - max(outside) > 0.05 * sum(sizes)


class _NoCut(Exception):
    """Why a dimension cannot be cut."""


def _trace(model: nn.Module, objective: Loss, batch: Batch) -> Found:
    graph = Graph(model, objective, batch)
    layers = find_layers(model)
    cuts: list[Cut] = []
    streams: list[list[str]] = []  # the producers of every dimension
    notes: list[str] = []
    done: set[Any] = set()
    for node in graph.in_order(n for n in graph.nodes.values() if graph.makes(n)):
        if node in done:
            continue
        # 1. Everything that shares the dimension that this node puts out.
        found = graph.spread(node)
        done.update(found.producers)
        if not found.readers or any(n.type == graph.types.OUTPUT for n in found.between):
            continue  # the outputs of the model are not hidden
        dimension = Dimension(
            producers=graph.in_order(found.producers),
            readers=graph.in_order(found.readers),
            between=found.between,
        )
        streams.append([graph.name(n) for n in dimension.producers])
        # 2. The cut along it, if it is one.
        try:
            if any(_attends(n) for n in dimension.between):
                cuts.append(_heads(graph, model, layers, dimension))
            else:
                cuts.append(_channels(graph, layers, dimension))
        except _NoCut as reason:
            notes.append(f"{graph.name(node)}: {reason}")
    named = _named(cuts)
    named.update(_blocks(model, layers, streams))
    return Found(cuts=named, sinks=_sinks(graph), notes=notes)


def _attends(node: Any) -> bool:
    return any(word in node.name.lower() for word in _ATTENDS)


def _named(cuts: Sequence[Cut], before: Iterable[str] = ()) -> dict[str, Cut]:
    """Called by the module that holds all of a cut, else by its first producer or reader."""
    named: dict[str, Cut] = {}
    for cut in cuts:
        paths = [slot.module.split(".") for slot in (*cut.makes, *cut.reads)]
        shared = "" if cut.kind == "channels" else _common(paths)
        name = shared if shared and shared not in {*named, *before} else cut.first
        named[name] = replace(cut, name=name)
    return named


def _common(paths: Sequence[Sequence[str]]) -> str:
    prefix = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


def _layer(layers: Mapping[str, Layer], name: str) -> Layer:
    layer = layers.get(name)
    if layer is None or layer.aliases:
        raise _NoCut(f"{name} shares its weight with another module")
    if layer.kind == "conv_transpose" or layer.weight.ndim > 4:
        raise _NoCut(f"{name} is a {type(layer.module).__name__}, whose inputs cannot be removed")
    return layer


def _sinks(graph: Graph) -> dict[str, str]:
    """Layers without a bias whose output goes to one BatchNorm and nowhere else."""
    found = {}
    for node in graph.nodes.values():
        if not graph.makes(node) or node.module.bias is not None or len(node.outputs) != 1:
            continue
        after = next(iter(node.outputs))
        if after.type == graph.types.BN and after.module.running_mean is not None:
            found[graph.name(node)] = graph.name(after)
    return found


# ------------------------------------------------------------------------------------------- blocks


def _blocks(
    model: nn.Module, layers: Mapping[str, Layer], streams: Sequence[Sequence[str]]
) -> dict[str, Cut]:
    """Members of a ``ModuleList`` that write into a dimension which others write into as well."""
    cuts = {}
    for owner, members in model.named_modules():
        if not isinstance(members, nn.ModuleList) or len(members) < 2:
            continue
        for i in range(len(members)):
            name = f"{owner}.{i}"
            writers = _writers(name, streams)
            if not writers or not all(_is_linear(layers.get(w)) for w in writers):
                continue
            reads = []
            for writer in writers:
                columns = torch.arange(layers[writer].shape[1])[None]
                reads.append(Slot(module=writer, side="in", index=columns))
            cuts[f"{name} whole"] = Cut(
                name=name, kind=BLOCKS, units=1, makes=(), reads=tuple(reads), counts={}
            )
    return cuts


def _writers(name: str, streams: Sequence[Sequence[str]]) -> list[str]:
    """Layers inside this module whose outputs are added to those of layers outside."""
    found: list[str] = []
    for stream in streams:
        inside = [w for w in stream if w.startswith(f"{name}.")]
        if 0 < len(inside) < len(stream):
            found += inside
    return found


def _is_linear(layer: Layer | None) -> bool:
    return layer is not None and layer.kind in ("linear", "conv1d")


# -------------------------------------------------------------------------------- MLPs and channels


def _channels(graph: Graph, layers: Mapping[str, Layer], dimension: Dimension) -> Cut:
    """MLP widths and channels: the indices come from torch-pruning's members of the first
    producer's dimension."""
    _check_passes(graph, dimension)
    # 1. torch-pruning's list of what goes with all units of the first producer.
    root = dimension.producers[0]
    width, library = graph.width(root), graph.graph
    prune = library.get_pruner_of_module(root.module).prune_out_channels
    members = library.get_pruning_group(root.module, prune, list(range(width)))
    # 2. What each unit is in each module.
    types = graph.types
    makes, reads = [], []
    for i, member in enumerate(members):
        node = member.dep.target
        if not graph.makes(node) and node.type not in (types.BN, types.DEPTHWISE_CONV, types.PRELU):
            continue
        name = graph.name(node)
        index = _by_unit(members[i].root_idxs, member.idxs, width, name)
        side = "in" if library.is_in_channel_pruning_fn(member.dep.handler) else "out"
        _check_inside(graph, node, side, index)
        if graph.makes(node) and side == "in":
            columns = _columns(_layer(layers, name), index)
            reads.append(Slot(module=name, side="in", index=columns))
        else:
            makes.append(Slot(module=name, side="out", index=index))
    # 3. Both views of the graph must agree.
    if {s.module for s in reads} != {graph.name(n) for n in dimension.readers}:
        raise _NoCut("torch-pruning follows it to other readers than the graph has")
    linear = all(graph.is_linear(n) for n in (*dimension.producers, *dimension.readers))
    return Cut(
        name="",
        kind="mlp" if linear else "channels",
        units=width,
        makes=tuple(makes),
        reads=tuple(reads),
        counts={},
    )


def _check_passes(graph: Graph, dimension: Dimension) -> None:
    """Everything between must leave units apart, and no convolution may tie them."""
    t = graph.types
    passes = {t.BN, t.DEPTHWISE_CONV, t.ELEMENTWISE, t.RESHAPE, t.CONCAT}
    passes |= {t.SPLIT, t.PRELU, t.SLICE, t.UNBIND}
    for node in dimension.between:
        if node.type == t.PARAMETER:
            raise _NoCut("its dimension passes a parameter of its own, which mixes or counts it")
        if node.type not in passes:
            what = f"{type(node.module).__name__} ({graph.name(node)})"
            raise _NoCut(f"its dimension passes {what}, which mixes or counts it")
    for node in (*dimension.producers, *dimension.readers):
        if getattr(node.module, "groups", 1) > 1:
            raise _NoCut(f"{graph.name(node)} is a grouped convolution")
        if getattr(node.module, "transposed", False):
            raise _NoCut(f"{graph.name(node)} is a transposed convolution")


def _by_unit(roots: Sequence[int | None], indices: Sequence[int], units: int, name: str) -> Tensor:
    """``(units, k)``: which of a module's indices belong to each unit."""
    found: list[list[int]] = [[] for _ in range(units)]
    for root, index in zip(roots, indices, strict=True):
        if root is None:
            raise _NoCut(f"torch-pruning lost track of its units in {name}")
        found[root].append(index)
    if len({len(f) for f in found}) != 1 or not found[0]:
        raise _NoCut(f"its units are not equally large in {name}")
    return torch.tensor(found)


def _check_inside(graph: Graph, node: Any, side: str, index: Tensor) -> None:
    """torch-pruning counts on past a module's width where halves of it are multiplied."""
    pruner = graph.graph.get_pruner_of_module(node.module)
    width = pruner.get_in_channels if side == "in" else pruner.get_out_channels
    if int(index.max()) >= (width(node.module) or 0):
        raise _NoCut(f"torch-pruning lost track of its units in {graph.name(node)}")


def _columns(layer: Layer, channels: Tensor) -> Tensor:
    """Columns of the matrix ``W[out, in]`` that belong to input channels ``(units, k)``."""
    if layer.kind != "conv":
        return channels
    area = layer.weight[0, 0].numel()
    return (channels[:, :, None] * area + torch.arange(area)).flatten(1)


# -------------------------------------------------------------------------------------------- heads


def _heads(
    graph: Graph, model: nn.Module, layers: Mapping[str, Layer], dimension: Dimension
) -> Cut:
    """Key-value heads with their query heads, laid out (heads, size) as is usual; that is tried
    later."""
    # 1. The projections in, the one out, and the module that they belong to.
    producers, readers = dimension.producers, dimension.readers
    if len(readers) != 1 or not all(graph.is_linear(n) for n in (*producers, *readers)):
        raise _NoCut(
            "it looks like attention, but not between Linear layers with one output projection"
        )
    out = _layer(layers, graph.name(readers[0]))
    widths = {graph.name(n): graph.width(n) for n in producers}
    owner = _common([name.split(".")[:-1] for name in widths])
    attention = model.get_submodule(owner) if owner else model

    # 2. How large a head is, and so how many there are.
    inputs = out.shape[1]
    size = _head_size(attention, inputs)
    if size is None or inputs % size:
        raise _NoCut(
            f"{owner or type(model).__name__} does not say how large its heads are; give it an "
            "attribute head_dim"
        )
    queries = inputs // size

    # 3. The rows of every head in the projections.
    if list(widths.values()) == [3 * inputs]:
        keys = queries
        makes = _fused_rows(widths, queries, size)
    else:
        keys = _key_heads(widths, size, owner)
        makes = _separate_rows(widths, keys)
    read = Slot(module=out.name, side="in", index=torch.arange(inputs).reshape(keys, -1))

    # 4. The numbers that the module keeps of its heads.
    counts = {}
    for attributes, part in (
        (QUERY_HEADS, queries // keys),
        (KEY_HEADS, 1),
        (HEAD_WIDTHS, inputs // keys),
    ):
        for attribute in attributes:
            value = getattr(attention, attribute, None)
            if isinstance(value, int) and value == part * keys:
                counts[owner, attribute] = part
    return Cut(name="", kind="heads", units=keys, makes=makes, reads=(read,), counts=counts)


def _head_size(attention: nn.Module, inputs: int) -> int | None:
    """What the module says of it, directly or by its number of query heads."""
    size = _first_int(attention, _HEAD_SIZE)
    heads = _first_int(attention, QUERY_HEADS)
    if size is None and heads is not None:
        return inputs // heads
    return size


def _first_int(module: nn.Module, attributes: Sequence[str]) -> int | None:
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    return None


def _fused_rows(widths: Mapping[str, int], heads: int, size: int) -> tuple[Slot, ...]:
    """One projection puts out queries, keys and values in turn."""
    ((name, width),) = widths.items()
    by_part = torch.arange(width).reshape(3, heads, size)
    return (Slot(module=name, side="out", index=by_part.permute(1, 0, 2).reshape(heads, -1)),)


def _key_heads(widths: Mapping[str, int], size: int, owner: str) -> int:
    """How many key-value heads three projections make."""
    if len(widths) != 3 or any(w % size for w in widths.values()):
        raise _NoCut(
            f"expected projections of query, key and value in {owner}, found {', '.join(widths)}"
        )
    keys = min(widths.values()) // size
    if any((w // size) % keys for w in widths.values()):
        raise _NoCut(f"{owner}: the query heads do not divide among the key-value heads")
    return keys


def _separate_rows(widths: Mapping[str, int], keys: int) -> tuple[Slot, ...]:
    makes = []
    for name, width in widths.items():
        makes.append(Slot(module=name, side="out", index=torch.arange(width).reshape(keys, -1)))
    return tuple(makes)
