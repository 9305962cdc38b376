"""One forward pass that keeps every layer's inputs X and the way back to its output gradients G.

A layer computes ``s = x Wᵀ``, so the gradient of item b is ``Gᵦᵀ Xᵦ``. All first-order curvature
follows from these factors, and no pass over single items is needed:

    Fisher                 labels drawn from the model, one backward pass per label for all layers
    exact Gauss–Newton     one backward pass per column of a root of the outputs' own Hessian
    K-FAC, EKFAC           E[x xᵀ] and E[g gᵀ]; EKFAC's scales from a second pass

Source: Dangel, Kunstner & Hennig 2020 (BackPACK), §2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvprune.compat import full_float32
from curvprune.curvature.differentiation import differentiable
from curvprune.model import Batch, Layer, Loss, evaluating, items_in

# Kinds of which no hook sees inputs and output gradients, in words.
WITHOUT_FACTORS = {"experts": "stacked experts", "recurrent": "recurrent weights"}
ELEMENTS = 1 << 23  # numbers of one chunk of per-item matrices: bounds them at 32 MB


def wide(t: Tensor) -> torch.dtype:
    """The type in which products of ``t`` are added up: float64 for float64, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class Call:
    """One call of a layer.

    Attributes:
        x: the input of the layer's module.
        shape: of the output.
        edge: where the gradient of the output arrives.
    """

    module: nn.Module
    x: Tensor
    shape: torch.Size
    edge: GradientEdge


@dataclass(slots=True)
class Capture:
    """A batch after its forward pass.

    Attributes:
        items: items of the batch.
        outputs: what the loss is a function of, on the graph.
        calls: layer → the calls of its modules.
        uses: layer → how often its weight was used, in a call or elsewhere.
    """

    layers: Mapping[str, Layer]
    items: int
    outputs: Tensor
    calls: dict[str, list[Call]]
    uses: dict[str, int]

    def rows(
        self, name: str, items: slice = slice(None)
    ) -> Float[Tensor, "groups items places in"]:
        """The rows that multiply the layer's matrix, per item."""
        layer, call = self.layers[name], self.calls[name][0]
        x = call.x.unflatten(0, (self.items, -1))[items]
        rows = layer.rows(call.module, x.flatten(0, 1))
        return rows.unflatten(1, (len(x), -1))

    def gradients(
        self, name: str, g: Tensor, items: slice = slice(None)
    ) -> Float[Tensor, "groups items places out"]:
        """A gradient laid out like the layer's output, as rows per item."""
        layer = self.layers[name]
        g = g.unflatten(0, (self.items, -1))[items]
        if not layer.convolves:
            return g.reshape(1, len(g), -1, layer.shape[0])
        # (items, per item, channels, *places) -> (items, per item, places, channels)
        g = g.flatten(3).transpose(2, 3)
        width = layer.shape[0] // layer.groups
        return g.reshape(len(g), -1, layer.groups, width).permute(2, 0, 1, 3)

    def one_place(self, name: str) -> bool:
        """Whether the layer sees one row per item, so that the item's gradient is ``g xᵀ``."""
        layer, call = self.layers[name], self.calls[name][0]
        if layer.kind == "embedding" or layer.groups != 1:
            return False
        return call.shape.numel() == self.items * layer.shape[0]

    def chunks(self, name: str, columns: int = 1) -> Iterator[slice]:
        """Slices of items whose per-item matrices (``columns`` of each) and rows fit into
        `ELEMENTS`."""
        layer, call = self.layers[name], self.calls[name][0]
        places = call.shape.numel() // (self.items * layer.shape[0])
        largest = max(columns * layer.numel, places * layer.shape[1] * layer.groups)
        size = max(1, ELEMENTS // largest)
        for start in range(0, self.items, size):
            yield slice(start, min(start + size, self.items))

    def matrices(
        self, name: str, g: Sequence[Tensor], items: slice
    ) -> Float[Tensor, "items columns out in"]:
        """``Gᵀ X`` of each item for each of several backward passes."""
        layer = self.layers[name]
        if layer.kind == "embedding":
            return self._embedding(name, g, items)
        x = self.rows(name, items)
        # 1. Output gradients of all columns: (groups, items, columns, places, width).
        rows = torch.stack([self.gradients(name, c, items) for c in g], 2)
        groups, count, columns, places, width = rows.shape
        # 2. All columns share the rows of X: one product with columns·width on a side is faster
        # than one for each column.
        left = rows.permute(0, 1, 2, 4, 3).reshape(groups, count, columns * width, places)
        products = (left @ x.to(left.dtype)).reshape(groups, count, columns, width, -1)
        # 3. The groups' rows of the layer's matrix stand one below the other.
        return products.permute(1, 2, 0, 3, 4).reshape(count, columns, *layer.shape)

    def _embedding(
        self, name: str, g: Sequence[Tensor], items: slice
    ) -> Float[Tensor, "items columns out in"]:
        """The rows of X are one-hot: gradients are added to the rows of their tokens."""
        layer, call = self.layers[name], self.calls[name][0]
        tokens = call.x.unflatten(0, (self.items, -1))[items].flatten(1)
        matrices = call.x.new_zeros(len(tokens), len(g), *layer.shape, dtype=wide(g[0]))
        padding = getattr(call.module, "padding_idx", None)
        for k, c in enumerate(g):
            rows = c.reshape(self.items, -1, layer.shape[1])[items].to(matrices.dtype)
            # The module gives the padding token's row no gradient.
            if padding is not None:
                rows = rows * (tokens != padding).unsqueeze(-1)
            for i in range(len(tokens)):
                matrices[i, k].index_add_(0, tokens[i], rows[i])
        return matrices


class _WeightUses(TorchFunctionMode):
    """Counts the torch functions that receive a weight: a use outside the layer's own module must
    not go unseen."""

    # Reading an attribute such as .dtype is no use, but for the weight's transpose.
    NO_USE = ("__get__", "__set__", "detach")
    TRANSPOSES = ("T", "mT", "H", "mH")

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.count = dict.fromkeys(weights.values(), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") not in self.NO_USE or attribute in self.TRANSPOSES:
            for value in (*args, *kwargs.values()):
                name = self.weights.get(id(value))
                if name is not None and isinstance(value, Tensor):
                    self.count[name] += 1
        return func(*args, **kwargs)


@contextmanager
def _frozen(model: nn.Module, but: Iterable[Tensor]) -> Iterator[None]:
    """No parameter requires a gradient but some; the flags come back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    free = {id(weight) for weight in but}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in free)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def capture(
    model: nn.Module,
    objective: Loss,
    batch: Batch,
    layers: Mapping[str, Layer],
    *,
    weights: bool = False,
) -> Capture:
    """Run one forward pass in evaluation mode. The model comes back as it was, also after an
    error.

    Args:
        weights: the layers' weights are on the graph too.
    """
    calls: dict[str, list[Call]] = {n: [] for n in layers}

    def keep_calls_of(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> Any:
            given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
            # Of anything else there are no factors; its weight counts as used.
            if not given or not isinstance(output, Tensor):
                return output
            bare = output
            if not output.requires_grad:
                bare = output.detach().requires_grad_()
                output = bare.clone()  # a leaf may not be changed in place by what follows
            edge = get_gradient_edge(bare)
            calls[name].append(Call(module, given[0].detach(), bare.shape, edge))
            return output

        return hook

    # 1. Hooks on every module that reads a weight; of several weights, only uses are counted.
    uses = _WeightUses({id(layer.weight): n for n, layer in layers.items()})
    handles = []
    for name, layer in layers.items():
        if layer.kind in WITHOUT_FACTORS:
            continue
        modules = {id(m): m for m in (layer.module, *layer.readers)}
        for module in modules.values():
            handles.append(module.register_forward_hook(keep_calls_of(name), with_kwargs=True))
    # 2. The forward pass.
    free = [layer.weight for layer in layers.values()] if weights else []
    try:
        plain = differentiable(model)
        with evaluating(model), _frozen(model, free), torch.enable_grad(), plain, uses:
            found = objective.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return Capture(
        layers=layers, items=items_in(batch), outputs=found, calls=calls, uses=uses.count
    )


def backward(
    taken: Capture,
    names: Sequence[str],
    outputs: Tensor,
    seed: Tensor | None = None,
    *,
    retain: bool = False,
) -> list[Tensor]:
    """Gradients at the outputs of some layers, in at least float32.

    Args:
        names: the layers.
        outputs: what to go back from, with ``seed`` as its gradient: the outputs or a loss.
        retain: keep the graph for another backward pass.

    A layer on which ``outputs`` do not depend has zeros.

    Raises:
        ValueError: a kind without factors, or a layer that was not called, by name.
    """
    for name in names:
        if taken.layers[name].kind in WITHOUT_FACTORS:
            what = WITHOUT_FACTORS[taken.layers[name].kind]
            raise ValueError(f"layer {name}: {what} have no factors per item; leave it out")
    if idle := [n for n in names if not taken.calls[n]]:
        raise ValueError(f"layer {idle[0]} was not called on these items; leave it out")
    calls = [taken.calls[n][0] for n in names]
    found: tuple[Tensor | None, ...] = (None,) * len(names)
    if outputs.requires_grad:
        edges = [call.edge for call in calls]
        with full_float32():
            found = torch.autograd.grad(
                outputs, edges, seed, retain_graph=retain, allow_unused=True
            )
    gradients: list[Tensor] = []
    for call, g in zip(calls, found, strict=True):
        if g is None:
            weight = call.module.weight
            assert isinstance(weight, Tensor)
            g = torch.zeros(call.shape, dtype=weight.dtype, device=call.x.device)
        gradients.append(g.to(wide(g)))
    return gradients
