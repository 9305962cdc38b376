"""torch-pruning's graph of a model, and the walk along it that finds what shares a dimension."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvprune.compat import hooks_kept
from curvprune.model import Batch, Loss, evaluating, is_conv1d
from curvprune.structured.cuts import Conv1DPruner, torch_pruning


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """Nodes of the graph that share a dimension: producers, readers, and what lies between."""

    producers: list[Any]
    readers: list[Any]
    between: list[Any]


class Graph:
    """torch-pruning's graph of a model.

    Raises:
        ValueError: the model cannot be traced; names the operation that is in the way.
    """

    def __init__(self, model: nn.Module, objective: Loss, batch: Batch) -> None:
        library = torch_pruning()
        self.types = library.ops.OPTYPE
        self.names = {module: name for name, module in model.named_modules()}
        self.order = {module: i for i, module in enumerate(model.modules())}
        # 1. The graph; torch-pruning reads it off autograd's, so everything needs gradients.
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(p.is_floating_point())
            # It warns of parameters outside known modules, which `spread` looks at itself.
            with (
                hooks_kept(model),
                evaluating(model),
                torch.enable_grad(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                self.graph = library.DependencyGraph().build_dependency(
                    model,
                    example_inputs=batch,
                    forward_fn=lambda m, b: objective.outputs(m, b),
                    verbose=False,
                    customized_pruners={
                        type(m): Conv1DPruner() for m in model.modules() if is_conv1d(m)
                    },
                )
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot trace {type(model).__name__}: {failed_at(error)}"
            ) from error
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        # 2. A model that leaves autograd's graph has no layers in this one: say where.
        self.nodes = self.graph.module2node
        if not any(self.makes(node) for node in self.nodes.values()):
            with evaluating(model), _Exits() as exits:
                objective.outputs(model, batch)
            reason = exits.first or "its outputs do not depend on a Linear or convolution"
            raise ValueError(f"torch-pruning cannot trace {type(model).__name__}: {reason}")

    def makes(self, node: Any) -> bool:
        """Whether a node's outputs are a dimension of its own."""
        return node.type == self.types.CONV or self.is_linear(node)

    def is_linear(self, node: Any) -> bool:
        # Conv1D is the one that we customise.
        return node.type in (self.types.LINEAR, self.types.CUSTOMIZED)

    def width(self, node: Any) -> int:
        return self.graph.get_pruner_of_module(node.module).get_out_channels(node.module)

    def name(self, node: Any) -> str:
        return self.names.get(node.module) or node.name.split(" ")[0]

    def in_order(self, nodes: Any) -> list[Any]:
        """As they stand in the model."""
        return sorted(nodes, key=lambda node: self.order[node.module])

    def spread(self, start: Any) -> Dimension:
        """All that shares the dimension that ``start`` puts out."""
        # Dicts are sets that remember the order.
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
            # What else goes into this node has the same dimension.
            for source in node.inputs:
                if not self.makes(source):
                    stack.append(source)
                elif source not in producers:
                    producers[source] = None
                    stack.extend(source.outputs)
        return Dimension(producers=list(producers), readers=list(readers), between=list(between))


class _Exits(TorchFunctionMode):
    """Watches for the first operation that leaves autograd's graph: inputs with a gradient, an
    output without."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if self.first is None and name != "__get__" and _leaves(name, args, result):
            frames = _of_model(traceback.extract_stack())
            self.first = f"`{name}` leaves autograd's graph, in `{frames[-1].line}`"
        return result


def _leaves(name: str, args: Any, result: Any) -> bool:
    if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return False
    if name in ("numpy", "tolist", "item"):
        return True
    return isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad


def failed_at(error: BaseException) -> str:
    """The operation at which a forward pass failed: the line of the model's own code, and the
    message."""
    frames = _of_model(traceback.extract_tb(error.__traceback__))
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not frames:
        return message
    return f"`{frames[-1].line}` in {frames[-1].name} ({message})"


def _of_model(frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames that are neither ours nor a library's underneath the model."""

    def of_model(filename: str) -> bool:
        path = Path(filename)
        libraries = {"torch", "jaxtyping", "beartype"} & {*path.parts}
        ours = path.parent == Path(__file__).parent
        return not (ours or libraries or filename.startswith("<"))

    return [frame for frame in frames if of_model(frame.filename)] or list(frames)
