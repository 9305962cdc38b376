"""Put packed weights into an ONNX graph in the places of dense ones.

torch's exporter writes a Linear layer as ``Gemm``, or as ``Transpose`` and ``MatMul``, and a lookup
as ``Gather``. Where all that reads a weight is such a node, its place is taken by ``MatMulNBits``
and ``GatherBlockQuantized`` of ONNX Runtime. Otherwise the weight stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvprune.targets.onnx_blocks import Blocks, BlockTensors
from curvprune.targets.onnx_package import import_onnx_ir

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
FEW = 256  # numbers of a tensor, up to which it is not worth a node that casts it


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """A node that multiplies with a weight, or looks rows of it up."""

    node: Any
    does: Literal["multiplies", "looks up"]

    @property
    def input(self) -> Any:
        return self.node.inputs[0 if self.does == "multiplies" else 1]

    @property
    def bias(self) -> Any:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def put_blocks_(
    model: Any, names: Sequence[str], tensors: BlockTensors, *, transposed: bool
) -> bool:
    """Replace a dense weight, known in the graph by ``names``, by its codes.

    Args:
        transposed: the weight is ``[in, out]``.

    Returns: whether all that reads it could be replaced. Nothing is changed otherwise.
    """
    graph = model.graph
    weights = [graph.initializers[name] for name in names if name in graph.initializers]
    readers: list[_Reader] = []
    for weight in weights:
        found = _readers(weight, transposed)
        if found is None:
            return False
        readers += found
    if not readers:
        return False
    packed = _Packed(graph, weights[0].name, tensors)
    for reader in readers:
        if reader.does == "multiplies":
            packed.multiply_(reader)
        else:
            packed.look_up_(reader)
    for weight in weights:
        _drop_(graph, weight)
    model.opset_imports[CONTRIB] = 1
    return True


def _readers(weight: Any, transposed: bool) -> list[_Reader] | None:
    """All that reads a weight; ``None`` where one of them can read no codes."""
    if weight.is_graph_output():
        return None
    found: list[_Reader] = []
    for node, index in weight.uses():
        if node.op_type == "Gather" and index == 0 and not transposed:
            ready = _int(node, "axis", 0) == 0
            more = [_Reader(node=node, does="looks up")] if ready else None
        elif node.op_type == "Transpose" and not transposed:
            more = _products_of(node.outputs[0], turned=False)
        else:
            more = _product(node, index, turned=not transposed)
        if more is None:
            return None
        found += more
    return found


def _products_of(value: Any, *, turned: bool) -> list[_Reader] | None:
    """The products with a value, if it has no other use."""
    if value.is_graph_output():
        return None
    found: list[_Reader] = []
    for node, index in value.uses():
        more = _product(node, index, turned=turned)
        if more is None:
            return None
        found += more
    return found


def _product(node: Any, index: int, *, turned: bool) -> list[_Reader] | None:
    """A node that multiplies with its second input, ``turned``: of the shape ``[out, in]``."""
    if index != 1 or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MatMul" and not turned:
        shape = node.inputs[0].shape
        vector = shape is not None and len(shape) < 2
        return None if vector else [_Reader(node=node, does="multiplies")]
    if node.op_type != "Gemm" or _int(node, "transA", 0) != 0:
        return None
    plain = all(_float(node, name) == 1.0 for name in ("alpha", "beta"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    flat = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    if plain and flat and _int(node, "transB", 0) == int(turned):
        return [_Reader(node=node, does="multiplies")]
    return None


def _int(node: Any, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def _float(node: Any, name: str) -> float:
    found = node.attributes.get(name)
    return 1.0 if found is None else float(found.as_float())


def _drop_(graph: Any, weight: Any) -> None:
    """Take a weight away, and what turned it for nobody."""
    for node, _ in list(weight.uses()):
        graph.remove(node, safe=True)
    del graph.initializers[weight.name]


class _Packed:
    """A weight in the graph as codes, scales and zero points, and the nodes that read them."""

    def __init__(self, graph: Any, name: str, tensors: BlockTensors) -> None:
        self.ir, self.graph, self.name = import_onnx_ir(), graph, name
        self.form: Blocks = tensors.form
        self.codes = self._constant("codes", tensors.codes)
        scale = self._constant("scale", tensors.scale)
        kind = self.ir.AttrInt64("to", int(self.ir.DataType.FLOAT))
        # Float16 in the file; a session casts it once, when it is made.
        self.scale = self._node("Cast", [scale], [kind], before=graph[0])
        self.zero = None
        if tensors.zero is not None:
            self.zero = self._constant("zero_point", tensors.zero)
        self.rows: Any = None

    def multiply_(self, reader: _Reader) -> None:
        out, width = self.form.shape
        numbers = {"K": width, "N": out, "bits": self.form.bits, "block_size": self.form.size}
        inputs = [reader.input, self.codes, self.scale, self.zero, None, reader.bias]
        while inputs[-1] is None:
            inputs.pop()
        made = self._node(
            "MatMulNBits", inputs, self._numbers(numbers), before=reader.node, domain=CONTRIB
        )
        self._instead_(reader.node, made)

    def look_up_(self, reader: _Reader) -> None:
        out, width = self.form.shape
        if self.rows is None:
            # The same codes, a row for each output.
            shape = self._constant("rows", torch.tensor([out, -1]).numpy())
            self.rows = self._node("Reshape", [self.codes, shape], [], before=self.graph[0])
        numbers = {
            **{"bits": self.form.bits, "block_size": self.form.size},
            **{"gather_axis": 0, "quantize_axis": 1},
        }
        inputs = [self.rows, reader.input, self.scale]
        if self.zero is not None:
            inputs.append(self.zero)
        attributes, node = self._numbers(numbers), reader.node
        made = self._node("GatherBlockQuantized", inputs, attributes, before=node, domain=CONTRIB)
        if self.form.count * self.form.size != width:
            made = self._cut(made, width, before=node)
        self._instead_(node, made)

    def _cut(self, value: Any, width: int, *, before: Any) -> Any:
        """The first ``width`` entries of the last axis: without what fills up the last block."""
        ends = []
        for name, number in (("start", 0), ("end", width), ("axis", -1)):
            ends.append(self._constant(name, torch.tensor([number]).numpy()))
        return self._node("Slice", [value, *ends], [], before=before)

    def _constant(self, part: str, array: Any) -> Any:
        name = f"{self.name}_{part}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return _initializer(self.ir, self.graph, name, self.ir.tensor(array, name=name))

    def _numbers(self, numbers: Mapping[str, int]) -> list[Any]:
        return [self.ir.AttrInt64(name, number) for name, number in numbers.items()]

    def _node(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: Sequence[Any],
        *,
        before: Any,
        domain: str = "",
    ) -> Any:
        node = self.ir.Node(domain, kind, inputs, attributes, num_outputs=1)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _instead_(self, node: Any, made: Any) -> None:
        """``made`` in the place of what ``node`` gave, under its name."""
        old = node.outputs[0]
        made.name, made.shape, made.type = old.name, old.shape, old.type
        self.ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def _initializer(ir: Any, graph: Any, name: str, tensor: Any) -> Any:
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def narrow_(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Store tensors in the 16-bit types that their values came from, and cast them where they are
    read: a session does that once."""
    ir, graph = import_onnx_ir(), model.graph
    for name, tensor in weights.items():
        old = graph.initializers.get(name)
        if old is None or tensor.numel() <= FEW:
            continue
        # The old value goes on as what a node gives.
        del graph.initializers[name]
        held = ir.tensor(tensor.contiguous(), name=f"{name}_16")
        narrow = _initializer(ir, graph, f"{name}_16", held)
        kind = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        node = ir.Node("", "Cast", [narrow], [kind], num_outputs=1)
        graph.insert_before(graph[0], node)
        made = node.outputs[0]
        made.name, made.shape, made.type = name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)


def name_axes_(model: Any, axes: Iterable[Mapping[int, str]]) -> None:
    """Give the axes that may be of any length the names of the inputs' axes, wherever they
    occur."""
    ir, named = import_onnx_ir(), {}
    # 1. The exporter's own names, from the inputs.
    for value, names in zip(model.graph.inputs, axes, strict=True):
        for axis, name in names.items():
            named[str(value.shape[axis])] = name
    # 2. Inputs, outputs and all between.
    values = [*model.graph.inputs]
    for node in model.graph:
        values += node.outputs
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape([_renamed(dim, named) for dim in value.shape])


def _renamed(dim: Any, named: Mapping[str, str]) -> int | str:
    """A length, or an expression such as ``s0 + s21`` in other names."""
    if isinstance(dim, int):
        return dim
    return re.sub(r"\w+", lambda found: named.get(found[0], found[0]), str(dim))


def forget_sources_(model: Any) -> None:
    """Without the exporter's notes: stack traces name files of the machine that wrote it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def set_accuracy_(model: Any, level: int) -> None:
    """What the products may do to their inputs: 0 nothing, 4 round them to eight bits."""
    ir = import_onnx_ir()
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
