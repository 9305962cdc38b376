"""Which hidden units of a model can be removed, and the surgery: the only file that imports
torch-pruning.

A *cut* is a dimension inside the model whose units can be taken out one by one: the width of an
MLP, key-value heads with the query heads that read them, the channels of convolutions, tied by
residual connections and BatchNorm. The dependency graph comes from torch-pruning; a cut counts only
if the model without half of its units computes what the model computes when nothing reads those
units, which is tried.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvprune.model import Batch, Layer, Objective, drop_, evaluating, find_layers, is_conv1d

KINDS = ("mlp", "heads", "channels")
BLOCKS = "blocks"  # a kind of its own: whole blocks of a residual stream, each a cut of one unit
_HEAD_SIZE = ("head_dim", "attention_head_size")
_QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "split_size")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slot:
    """What each unit is in one module: rows of a tensor's output side (``"out"``) or of its input
    side (``"in"``)."""

    module: str
    side: str
    index: Int[Tensor, "units k"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """A dimension whose units can be removed.

    Attributes:
        name: of the module that holds all of it, or of its first producer.
        kind: ``"mlp"``, ``"heads"`` (a unit is one key-value head with its query heads),
            ``"channels"``, or ``"blocks"``: the one unit is the block called ``name``.
        units: how many there are.
        makes: where its units come out of or pass through: producers, BatchNorm, depthwise
            convolutions.
        reads: where its units go in; the columns are those of `Layer`'s matrix.
        counts: (module, attribute) → how much of it one unit is, such as heads.
    """

    name: str
    kind: str
    units: int
    makes: tuple[Slot, ...]
    reads: tuple[Slot, ...]
    counts: Mapping[tuple[str, str], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The cuts of a model; layer → BatchNorm that can hold a constant for a layer without a bias;
    why other dimensions are no cuts."""

    cuts: dict[str, Cut]
    sinks: dict[str, str]
    notes: list[str]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ValueError(
            "structured pruning needs the extra: pip install 'curvprune[structured]'"
        ) from error
    return torch_pruning


class _Conv1D:
    """What torch-pruning must know of transformers' ``Conv1D``, whose weight is stored as ``[in,
    out]``."""

    pruning_dim = 1  # torch-pruning writes it, nothing here reads it

    def get_out_channels(self, layer: Any) -> int:
        return layer.nf

    def get_in_channels(self, layer: Any) -> int:
        return layer.nx

    def prune_out_channels(self, layer: Any, units: Sequence[int]) -> None:
        left = sorted(set(range(layer.nf)) - set(units))
        layer.weight, layer.bias = (
            nn.Parameter(layer.weight.data[:, left]),
            nn.Parameter(layer.bias.data[left]),
        )
        layer.nf = len(left)

    def prune_in_channels(self, layer: Any, units: Sequence[int]) -> None:
        left = sorted(set(range(layer.nx)) - set(units))
        layer.weight = nn.Parameter(layer.weight.data[left])
        layer.nx = len(left)


def find_cuts(
    model: nn.Module, objective: Objective, batch: Batch, *, kinds: Sequence[str] = KINDS
) -> Found:
    """The cuts of a model, in its own order, and why other dimensions are none.

    Cost: a forward pass of ``batch`` with its graph, and two more on copies of the model to try the
    cuts.

    Raises ``ValueError`` if there is no cut of these kinds, naming the operation that is in the
    way.
    """
    found = _trace(model, objective, batch)
    cuts, failed = _tried(
        model, objective, batch, {n: c for n, c in found.cuts.items() if c.kind in kinds}
    )
    notes = found.notes + failed
    if not cuts:
        reasons = "; ".join(notes) if notes else "it has no layer that only other layers read"
        raise ValueError(f"no prunable {' or '.join(kinds)} in {type(model).__name__}: {reasons}")
    return Found(cuts=cuts, sinks=found.sinks, notes=notes)


# ------------------------------------------------------------------------------------------ tracing


class _Graph:
    """torch-pruning's graph of a model with the walk that finds what shares a dimension."""

    def __init__(self, tp: Any, model: nn.Module, objective: Objective, batch: Batch) -> None:
        self.tp, self.types = tp, tp.ops.OPTYPE
        self.names = {module: name for name, module in model.named_modules()}
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(p.is_floating_point())
            # It warns of parameters outside known modules, which `spread` looks at itself.
            with evaluating(model), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.graph = tp.DependencyGraph().build_dependency(
                    model, example_inputs=batch, forward_fn=lambda m, b: objective.logits(m, b), verbose=False,
                    customized_pruners={type(m): _Conv1D() for m in model.modules() if is_conv1d(m)},
                )  # fmt: skip
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot trace {type(model).__name__}: {_where(error)}"
            ) from error
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        self.nodes = self.graph.module2node
        if not any(self.makes(node) for node in self.nodes.values()):
            with evaluating(model), _Exits() as exits:
                objective.logits(model, batch)
            reason = exits.first or "its outputs do not depend on a Linear or convolution"
            raise ValueError(f"torch-pruning cannot trace {type(model).__name__}: {reason}")

    def makes(self, node: Any) -> bool:
        return node.type == self.types.CONV or self.is_linear(node)

    def is_linear(self, node: Any) -> bool:
        return node.type in (
            self.types.LINEAR,
            self.types.CUSTOMIZED,
        )  # Conv1D is the one that we customise

    def width(self, node: Any) -> int:
        return self.graph.get_pruner_of_module(node.module).get_out_channels(node.module)

    def spread(self, start: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Producers, readers and what lies between, of the dimension that ``start`` puts out."""
        producers: dict[Any, None] = {start: None}
        readers: dict[Any, None] = {}
        between: dict[Any, None] = {}
        stack = list(start.outputs)
        while stack:
            node = stack.pop()
            if self.makes(node):
                readers[node] = None
                continue
            if node in between:
                continue
            between[node] = None
            stack.extend(node.outputs)
            for source in node.inputs:
                if not self.makes(source):
                    stack.append(source)
                elif source not in producers:
                    producers[source] = None
                    stack.extend(source.outputs)
        return list(producers), list(readers), list(between)

    def name(self, node: Any) -> str:
        return self.names.get(node.module) or node.name.split(" ")[0]


class _Exits(TorchFunctionMode):
    """Watches for the first operation that leaves autograd's graph: inputs with a gradient, an
    output without."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        came = any(isinstance(a, Tensor) and (a.requires_grad) for a in args)
        floating = (
            isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad
        )
        if (
            self.first is None
            and came
            and (name in ("numpy", "tolist", "item") or floating)
            and name != "__get__"
        ):
            frames = _of_model(traceback.extract_stack())
            self.first = f"`{name}` leaves autograd's graph, in `{frames[-1].line}`"
        return result


def _of_model(frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames that are neither ours nor a library's underneath the model."""

    def stranger(filename: str) -> bool:
        path = Path(filename)
        return path.parent != Path(__file__).parent and not {"torch", "jaxtyping", "beartype"} & {
            *path.parts
        }

    return [f for f in frames if stranger(f.filename) and not f.filename.startswith("<")] or list(
        frames
    )


def _where(error: BaseException) -> str:
    """The operation at which a forward pass failed: the line of the model's own code, and the
    message."""
    frames = _of_model(traceback.extract_tb(error.__traceback__))
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"`{frames[-1].line}` in {frames[-1].name} ({text[0]})" if frames else text[0]


def _trace(model: nn.Module, objective: Objective, batch: Batch) -> Found:
    graph = _Graph(_torch_pruning(), model, objective, batch)
    layers = find_layers(model)
    order = {module: i for i, module in enumerate(model.modules())}
    cuts: list[Cut] = []
    streams: list[list[str]] = []
    notes: list[str] = []
    done: set[Any] = set()
    for node in sorted(
        (n for n in graph.nodes.values() if graph.makes(n)), key=lambda n: order[n.module]
    ):
        if node in done:
            continue
        producers, readers, between = graph.spread(node)
        done.update(producers)
        if not readers or any(n.type == graph.types.OUTPUT for n in between):
            continue  # the outputs of the model are not hidden
        producers.sort(key=lambda n: order[n.module])
        readers.sort(key=lambda n: order[n.module])
        streams.append([graph.name(n) for n in producers])
        try:
            attends = [
                n
                for n in between
                if any(w in n.name.lower() for w in ("scaleddot", "bmm", "softmax"))
            ]
            if attends:
                cut = _heads(graph, model, layers, producers, readers)
            else:
                cut = _channels(graph, layers, producers, readers, between)
        except _NoCut as reason:
            notes.append(f"{graph.name(node)}: {reason}")
            continue
        cuts.append(cut)
    named: dict[str, Cut] = {}
    for cut in cuts:
        parts = [slot.module.split(".") for slot in (*cut.makes, *cut.reads)]
        shared = "" if cut.kind == "channels" else _common(parts)
        name = shared if shared and shared not in named else cut.makes[0].module
        named[name] = replace(cut, name=name)
    named.update(_blocks(model, layers, streams))
    return Found(cuts=named, sinks=_sinks(graph), notes=notes)


def _blocks(
    model: nn.Module, layers: Mapping[str, Layer], streams: Sequence[Sequence[str]]
) -> dict[str, Cut]:
    """Members of a ``ModuleList`` that write into a dimension which others write into as well."""
    cuts = {}
    for owner, blocks in model.named_modules():
        for i in (
            range(len(blocks)) if isinstance(blocks, nn.ModuleList) and len(blocks) > 1 else ()
        ):
            name = f"{owner}.{i}"
            inside = [[w for w in writers if w.startswith(f"{name}.")] for writers in streams]
            writers = [
                w
                for own, all_ in zip(inside, streams, strict=True)
                if 0 < len(own) < len(all_)
                for w in own
            ]
            if writers and all(
                w in layers and layers[w].kind in ("linear", "conv1d") for w in writers
            ):
                reads = tuple(
                    Slot(module=w, side="in", index=torch.arange(layers[w].shape[1])[None])
                    for w in writers
                )
                cuts[f"{name} whole"] = Cut(
                    name=name, kind=BLOCKS, units=1, makes=(), reads=reads, counts={}
                )
    return cuts


def _common(paths: Sequence[Sequence[str]]) -> str:
    prefix = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


class _NoCut(Exception):
    """Why a dimension cannot be cut."""


def _layer(layers: Mapping[str, Layer], graph: _Graph, node: Any) -> Layer:
    name = graph.name(node)
    layer = layers.get(name)
    if layer is None or layer.aliases:
        raise _NoCut(f"{name} shares its weight with another module")
    return layer


def _columns(layer: Layer, channels: Tensor) -> Tensor:
    """Columns of the matrix ``W[out, in]`` that belong to input channels ``(units, k)``."""
    if layer.kind != "conv":
        return channels
    area = layer.weight[0, 0].numel()
    return (channels[:, :, None] * area + torch.arange(area)).flatten(1)


def _sinks(graph: _Graph) -> dict[str, str]:
    """Layers without a bias whose output goes to one BatchNorm and nowhere else."""
    found = {}
    for node in graph.nodes.values():
        if graph.makes(node) and node.module.bias is None:
            after = list(node.outputs)
            if (
                len(after) == 1
                and after[0].type == graph.types.BN
                and after[0].module.running_mean is not None
            ):
                found[graph.name(node)] = graph.name(after[0])
    return found


def _channels(
    graph: _Graph,
    layers: Mapping[str, Layer],
    producers: Sequence[Any],
    readers: Sequence[Any],
    between: Sequence[Any],
) -> Cut:
    """MLP widths and channels: the indices come from torch-pruning's group of the first
    producer."""
    t = graph.types
    passes = (
        t.BN,
        t.DEPTHWISE_CONV,
        t.ELEMENTWISE,
        t.RESHAPE,
        t.CONCAT,
        t.SPLIT,
        t.PRELU,
        t.SLICE,
        t.UNBIND,
    )
    for node in between:
        if node.type == t.PARAMETER or node.type not in passes:
            what = (
                "a parameter of its own" if node.type == t.PARAMETER else type(node.module).__name__
            )
            where = "" if node.type == t.PARAMETER else f" ({graph.name(node)})"
            raise _NoCut(f"its dimension passes {what}{where}, which mixes or counts it")
    root = producers[0]
    for node in (*producers, *readers):
        if getattr(node.module, "groups", 1) > 1:
            raise _NoCut(f"{graph.name(node)} is a grouped convolution")
        if getattr(node.module, "transposed", False):
            raise _NoCut(f"{graph.name(node)} is a transposed convolution")
    pruner, width = graph.graph.get_pruner_of_module(root.module), graph.width(root)
    group = graph.graph.get_pruning_group(
        root.module, pruner.prune_out_channels, list(range(width))
    )
    makes, reads = [], []
    for i, item in enumerate(group):
        node = item.dep.target
        if not graph.makes(node) and node.type not in (t.BN, t.DEPTHWISE_CONV, t.PRELU):
            continue
        into = graph.makes(node) and graph.graph.is_in_channel_pruning_fn(item.dep.handler)
        index = _by_unit(group[i].root_idxs, item.idxs, width, graph.name(node))
        if into:
            reads.append(
                Slot(
                    module=graph.name(node),
                    side="in",
                    index=_columns(_layer(layers, graph, node), index),
                )
            )
        else:
            makes.append(Slot(module=graph.name(node), side="out", index=index))
    if {s.module for s in reads} != {graph.name(n) for n in readers}:
        raise _NoCut("torch-pruning follows it to other readers than the graph has")
    kind = "mlp" if all(graph.is_linear(n) for n in (*producers, *readers)) else "channels"
    return Cut(name="", kind=kind, units=width, makes=tuple(makes), reads=tuple(reads), counts={})


def _by_unit(roots: Sequence[int | None], indices: Sequence[int], units: int, name: str) -> Tensor:
    found: list[list[int]] = [[] for _ in range(units)]
    for root, index in zip(roots, indices, strict=True):
        if root is None:
            raise _NoCut(f"torch-pruning lost track of its units in {name}")
        found[root].append(index)
    if len({len(f) for f in found}) != 1 or not found[0]:
        raise _NoCut(f"its units are not equally large in {name}")
    return torch.tensor(found)


def _heads(
    graph: _Graph,
    model: nn.Module,
    layers: Mapping[str, Layer],
    producers: Sequence[Any],
    readers: Sequence[Any],
) -> Cut:
    """Key-value heads with their query heads, laid out (heads, size) as is usual; that is tried
    later."""
    names = [graph.name(n) for n in producers]
    if len(readers) != 1 or not all(graph.is_linear(n) for n in (*producers, *readers)):
        raise _NoCut(
            "it looks like attention, but not between Linear layers with one output projection"
        )
    out = _layer(layers, graph, readers[0])
    owner = _common([n.split(".")[:-1] for n in names])
    attention = model.get_submodule(owner) if owner else model
    size = next((v for a in _HEAD_SIZE if isinstance(v := getattr(attention, a, None), int)), None)
    heads = next(
        (v for a in _QUERY_HEADS if isinstance(v := getattr(attention, a, None), int)), None
    )
    if size is None and heads is not None:
        size = out.shape[1] // heads
    if size is None or out.shape[1] % size:
        raise _NoCut(
            f"{owner or type(model).__name__} does not say how large its heads are; give it an "
            "attribute head_dim"
        )
    queries = out.shape[1] // size
    widths = [graph.width(n) for n in producers]
    if len(producers) == 1 and widths[0] == 3 * out.shape[1]:
        keys = queries
        rows = (
            torch.arange(widths[0]).reshape(3, queries, size).permute(1, 0, 2).reshape(queries, -1)
        )
        makes = [Slot(module=names[0], side="out", index=rows)]
    else:
        if len(producers) != 3 or any(w % size for w in widths):
            raise _NoCut(
                f"expected projections of query, key and value in {owner}, found {', '.join(names)}"
            )
        keys = min(widths) // size
        if any((w // size) % keys for w in widths):
            raise _NoCut(f"{owner}: the query heads do not divide among the key-value heads")
        makes = [
            Slot(module=n, side="out", index=torch.arange(w).reshape(keys, -1))
            for n, w in zip(names, widths, strict=True)
        ]
    counts = {}
    for group, part in (
        (_QUERY_HEADS, queries // keys),
        (_KEY_HEADS, 1),
        (_HEAD_WIDTHS, out.shape[1] // keys),
    ):
        for attribute in group:
            value = getattr(attention, attribute, None)
            if isinstance(value, int) and value == part * keys:
                counts[owner, attribute] = part
    read = Slot(module=out.name, side="in", index=torch.arange(out.shape[1]).reshape(keys, -1))
    return Cut(name="", kind="heads", units=keys, makes=tuple(makes), reads=(read,), counts=counts)


# ------------------------------------------------------------------------------------------ surgery


def remove_(
    model: nn.Module, cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> None:
    """Take units out of the model, in place, with torch-pruning's surgery: cut → units to
    remove."""
    tp = _torch_pruning()
    graph = tp.DependencyGraph()
    gone: dict[tuple[str, str], set[int]] = {}
    drop_(model, [cuts[n].name for n, units in removed.items() if cuts[n].kind == BLOCKS and units])
    for name, units in removed.items():
        if cuts[name].kind == BLOCKS:
            continue
        for slot in (*cuts[name].makes, *cuts[name].reads):
            where = gone.setdefault((slot.module, slot.side), set())
            where.update(slot.index[list(units)].flatten().tolist())
        for (owner, attribute), part in cuts[name].counts.items():
            module = model.get_submodule(owner)
            setattr(module, attribute, getattr(module, attribute) - part * len(units))
    for (name, side), indices in gone.items():
        if not indices:
            continue
        module = model.get_submodule(name)
        frozen = {n: p.requires_grad for n, p in module.named_parameters(recurse=False)}
        pruner = _Conv1D() if is_conv1d(module) else graph.get_pruner_of_module(module)
        if side == "in" and isinstance(module, (nn.Conv1d, nn.Conv2d)):
            area = module.weight[0, 0].numel()
            indices = {i // area for i in indices}
        (pruner.prune_in_channels if side == "in" else pruner.prune_out_channels)(
            module, sorted(indices)
        )
        for n, p in module.named_parameters(recurse=False):
            p.requires_grad_(frozen[n])


@torch.no_grad()
def silence_(
    layers: Mapping[str, Layer], cuts: Mapping[str, Cut], removed: Mapping[str, Sequence[int]]
) -> None:
    """Let nothing read these units, in place: their columns become zero."""
    for name, units in removed.items():
        for slot in cuts[name].reads:
            layer = layers[slot.module]
            matrix = layer.as_matrix(layer.weight.detach()).clone()
            matrix[:, slot.index[list(units)].flatten().to(matrix.device)] = 0
            layer.write_(matrix)
            if cuts[name].kind == BLOCKS and units and layer.module.bias is not None:
                layer.module.bias.zero_()  # type: ignore[operator]


def _tried(
    model: nn.Module, objective: Objective, batch: Batch, cuts: dict[str, Cut]
) -> tuple[dict[str, Cut], list[str]]:
    """The cuts that survive: without some units the model computes what it computes when nothing
    reads them."""
    cuts = {n: c for n, c in cuts.items() if c.units > 1 or c.kind == BLOCKS}
    if not cuts or _complaint(model, objective, batch, cuts) is None:
        return cuts, []
    good, notes = {}, []
    for name, cut in cuts.items():
        if (complaint := _complaint(model, objective, batch, {name: cut})) is None:
            good[name] = cut
        else:
            notes.append(f"{name}: {complaint}")
    return good, notes


@torch.no_grad()
def _complaint(
    model: nn.Module, objective: Objective, batch: Batch, cuts: dict[str, Cut]
) -> str | None:
    # Half of the units, not one, which might happen to matter little.
    removed = {n: list(range(c.units - c.units // 2, c.units)) for n, c in cuts.items()}
    for i, (n, c) in enumerate(cuts.items()):
        if c.kind == BLOCKS:
            removed[n] = [0] if i % 2 or len(cuts) == 1 else []
    trial = copy.deepcopy(model)
    silence_(find_layers(trial), cuts, removed)
    with evaluating(trial):
        expected = objective.logits(trial, batch).double()
    try:
        remove_(trial, cuts, removed)
        with evaluating(trial):
            found = objective.logits(trial, batch).double()
    except Exception as error:
        return f"with fewer units, the model fails at {_where(error)}"
    precise = {torch.float64: 1e-9, torch.float32: 1e-3}.get(next(model.parameters()).dtype, 0.05)
    if found.shape != expected.shape or not bool(
        (found - expected).abs().max() <= precise * expected.abs().max()
    ):
        return "with fewer units, the model computes something else: they are read in a way that the graph does not show"
    return None
