"""Where a layer's weight multiplies something in a forward pass: in its module's call, or handed to
a function by somebody else.

``F.linear(h, embedding.weight)``, Mamba's convolution and the last projection of
``nn.MultiheadAttention`` multiply a weight without a call of its module, so that no hook on the
module fires. A `torch.overrides.TorchFunctionMode` sees such calls, with the very parameter or a
view or cast of it among the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvprune.model.forward import Batch, evaluating, to_device
from curvprune.model.layers import Layer
from curvprune.model.losses import Loss

Given = tuple[Any, ...]  # arguments of a function by their places
Named = Mapping[str, Any]  # and by their names

# Functions that return the same numbers in the same places, in another type or another memory.
_COPIES = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")
_CONVOLUTIONS: dict[Any, Any] = {
    torch.conv1d: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """One product of a layer's weight with an input, about to be computed.

    Attributes:
        layer: of the model; its kind is that of the product, so that `Layer.rows` fits the input.
        reader: the module whose call it is, or one of the same geometry.
        inputs: the arguments of the call; the first is what the weight multiplies.
        functional: it is outside of the module's call.
    """

    layer: Layer
    reader: nn.Module
    inputs: Given
    functional: bool = False


class Watcher(Protocol):
    """What is told of a weight's uses."""

    def read(self, read: Read) -> None:
        """A product, before it is computed."""

    def use(self, name: str, function: str) -> None:
        """Another use of the weight of layer ``name``: a lookup, or a function whose input is not
        known."""


@contextmanager
def watching(
    layers: Iterable[Layer], watcher: Watcher, *, functions: bool = True
) -> Iterator[None]:
    """Tell ``watcher`` of every use of the layers' weights in the forward passes inside.

    Args:
        functions: look at the arguments of torch's functions too, not at modules' calls alone.
            Costs some microseconds for each function that is called.
    """
    layers = list(layers)
    inside: list[int] = []  # weights of the modules that are being called
    seeing = _Functions(layers, watcher, inside)

    def before(layer: Layer, module: nn.Module, given: Any, named: Named) -> None:
        if layer.kind == "embedding" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            watcher.use(layer.name, LOOKUP)
        else:
            inputs = (*given, *_in_order(module, named))
            # What the watcher itself computes with a weight is no use of it.
            with seeing.closed():
                watcher.read(Read(layer=layer, reader=module, inputs=inputs))
        inside.append(id(layer.weight))

    def after(layer: Layer, *_: Any) -> None:
        if id(layer.weight) in inside:  # not if ``before`` ended the call
            inside.remove(id(layer.weight))

    with ExitStack() as stack:
        for layer in layers:
            owners = {id(module): module for module in (layer.module, *layer.readers)}
            for module in owners.values():
                hook, end = partial(before, layer), partial(after, layer)
                first = module.register_forward_pre_hook(hook, with_kwargs=True)
                last = module.register_forward_hook(end, always_call=True)
                stack.callback(first.remove)
                stack.callback(last.remove)
        if functions:
            stack.enter_context(seeing)
        yield


def _in_order(module: nn.Module, named: Named) -> list[Any]:
    """Arguments by name; a recurrent module's states come after its input."""
    if isinstance(module, nn.RNNBase):
        return [named[name] for name in ("input", "hx") if name in named]
    return [*named.values()]


LOOKUP = "a lookup"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """A tensor that holds a layer's weight: as it is stored, or with its two sides exchanged."""

    layer: Layer
    tensor: Tensor
    flipped: bool

    def is_matrix(self, *, flipped: bool) -> bool:
        """Whether the tensor is the layer's matrix ``[out, in]``, or ``[in, out]`` if
        ``flipped``."""
        shape = self.layer.shape[::-1] if flipped else self.layer.shape
        # A matrix with a side of one is its transpose in another shape.
        in_order = flipped == (self.flipped != self.layer.transposed) or 1 in shape
        return self.tensor.shape == shape and in_order


class _Functions(TorchFunctionMode):
    """Sees the functions that are called with a layer's weight outside of its module's call."""

    def __init__(self, layers: Iterable[Layer], watcher: Watcher, inside: list[int]) -> None:
        super().__init__()
        self.watcher, self.inside, self.shut = watcher, inside, False
        # The tensors are kept, so that no other gets the identity of one.
        self.known: dict[int, _Known] = {}
        for layer in layers:
            weight = layer.weight
            self.known[id(weight)] = _Known(layer=layer, tensor=weight, flipped=False)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """See nothing for a while."""
        self.shut = True
        try:
            yield
        finally:
            self.shut = False

    def __torch_function__(
        self, func: Any, types: Any, args: Given = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if self.shut:
            return func(*args, **named)
        if func is F.multi_head_attention_forward:
            return self._attention(args, named)
        uses = self._uses(args, named)
        # 1. A product is told of before it is computed.
        for use in uses:
            read = self._read(func, use, args, named)
            if read is not None:
                self.watcher.read(read)
        result = func(*args, **named)
        # 2. What else became of the weight: itself in another shape or type, or something unknown.
        for use in uses:
            self._follow(func, use, args, named, result)
        return result

    def _uses(self, args: Given, named: Named) -> list[_Known]:
        found: list[_Known] = []
        for value in (*args, *named.values()):
            parts = value if isinstance(value, (list, tuple)) else (value,)
            for part in parts:
                known = self.known.get(id(part))
                if known is not None and id(known.layer.weight) not in self.inside:
                    found.append(known)
        return found

    def _read(self, func: Any, use: _Known, args: Given, named: Named) -> Read | None:
        """The product that a function computes with a weight, if it is one."""
        layer = use.layer
        if layer.kind in ("experts", "conv_transpose"):
            return None
        if func in _CONVOLUTIONS:
            return _convolution(func, use, args, named)
        x = _multiplied(func, use, args, named)
        if x is None or x.shape[-1:] != layer.shape[1:] or layer.groups != 1:
            return None
        if layer.kind in ("conv", "recurrent"):
            layer = replace(layer, kind="linear")
        return Read(layer=layer, reader=layer.module, inputs=(x,), functional=True)

    def _follow(
        self,
        func: Any,
        use: _Known,
        args: tuple[Any, ...],
        named: Named,
        result: Any,
    ) -> None:
        """Remember a result that is the weight again; tell of a use that is no product."""
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if result is use.tensor or not any(isinstance(part, Tensor) for part in parts):
            return
        same = None
        if isinstance(result, Tensor):
            same = _same_numbers(func, use.tensor, result)
        if same is not None:
            flipped = use.flipped if same == "same" else not use.flipped
            self.known[id(result)] = _Known(layer=use.layer, tensor=result, flipped=flipped)
        elif func is F.embedding:
            self.watcher.use(use.layer.name, LOOKUP)
        elif not _says_little(func) and self._read(func, use, args, named) is None:
            self.watcher.use(use.layer.name, getattr(func, "__name__", str(func)))

    def _attention(self, args: Given, named: Named) -> Any:
        """`torch.nn.functional.multi_head_attention_forward`, with its last projection apart."""
        function = F.multi_head_attention_forward
        given = inspect.signature(function).bind(*args, **named).arguments
        weight, bias = given["out_proj_weight"], given.get("out_proj_bias")
        use = self.known.get(id(weight))
        if use is None or id(use.layer.weight) in self.inside:
            return function(*args, **named)
        # 1. What the projection reads, (tokens, items, width), by the identity in its place.
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        found, shares = function(
            **{**given, "out_proj_weight": identity, "out_proj_bias": None},
        )
        # 2. The items stand first everywhere else.
        rows = found.transpose(0, 1) if found.ndim == 3 else found
        layer = use.layer
        self.watcher.read(Read(layer=layer, reader=layer.module, inputs=(rows,), functional=True))
        return F.linear(found, weight, bias), shares


def _multiplied(func: Any, use: _Known, args: Given, named: Named) -> Tensor | None:
    """``x (…, in)`` of the product ``x Wᵀ`` that a function computes, whichever way it is
    written."""
    name, weight = getattr(func, "__name__", ""), use.tensor
    if func is F.linear:
        given = _bound(("input", "weight", "bias"), args, named)
        if given.get("weight") is weight and use.is_matrix(flipped=False):
            return given.get("input")
        return None
    if name in ("matmul", "mm"):
        given = _bound(("left", "right"), args, {})
    elif name == "addmm":
        given = _bound(("bias", "left", "right"), args, {})
    else:
        return None
    # Called by other names they are not known, and are told of as such.
    left, right = given.get("left"), given.get("right")
    if right is weight and use.is_matrix(flipped=True):
        return left
    # W x, with x (…, in, n).
    if left is weight and use.is_matrix(flipped=False) and isinstance(right, Tensor):
        return right.mT if right.ndim > 1 else right
    return None


def _convolution(func: Any, use: _Known, args: Given, named: Named) -> Read | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = _bound(names, args, named)
    weight, layer = use.tensor, use.layer
    fits = layer.kind == "conv" and given.get("weight") is weight and not use.flipped
    groups = given.get("groups", 1)
    if not fits or groups != layer.groups or weight.shape != layer.weight.shape:
        return None
    reader = _CONVOLUTIONS[func](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        given.get("stride", 1),
        given.get("padding", 0),
        given.get("dilation", 1),
        groups,
        bias=False,
        device="meta",
    )
    return Read(layer=layer, reader=reader, inputs=(given["input"],), functional=True)


def _bound(names: tuple[str, ...], args: Given, named: Named) -> Named:
    """Arguments of a function by name; torch's own have no signature."""
    return dict(zip(names, args, strict=False)) | dict(named)


def _same_numbers(func: Any, weight: Tensor, result: Tensor) -> str | None:
    """``"same"`` if a result has the weight's numbers in the same order, ``"flipped"`` if they are
    those of its transpose."""
    if result.numel() != weight.numel():
        return None
    if getattr(func, "__name__", "") in _COPIES and result.shape == weight.shape:
        return "same"
    if result.data_ptr() != weight.data_ptr() or result.dtype != weight.dtype:
        return None
    if result.is_contiguous() and weight.is_contiguous():
        return "same"
    if result.shape == weight.shape and result.stride() == weight.stride():
        return "same"
    turned = result.ndim == weight.ndim == 2 and result.shape == weight.shape[::-1]
    if turned and result.stride() == weight.stride()[::-1]:
        return "flipped"
    return None


def _says_little(func: Any) -> bool:
    """A function whose result does not depend on the numbers of a weight."""
    name = getattr(func, "__name__", "")
    return name.endswith(("_like", "__get__")) or name.startswith("new_")


# ------------------------------------------------------------------------------- what is used


@dataclass(kw_only=True, slots=True)
class WeightUses:
    """How one forward pass uses a layer's weight.

    Attributes:
        calls: products, the most of any pass.
        functional: some of them outside of its module's call.
        functions: other uses: lookups, and functions whose input is not known.
        item: the first of the items in whose pass it was used.
    """

    calls: int = 0
    functional: bool = False
    functions: set[str] = field(default_factory=set)
    item: int | None = None

    @property
    def reached(self) -> bool:
        return self.item is not None

    @property
    def unseen(self) -> set[str]:
        """Functions that use the weight in a way that is not known."""
        return self.functions - {LOOKUP}


class _Counting:
    """Counts the uses in one pass."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.functional: set[str] = set()
        self.functions: dict[str, set[str]] = {}

    def read(self, read: Read) -> None:
        name = read.layer.name
        self.calls[name] = self.calls.get(name, 0) + 1
        if read.functional:
            self.functional.add(name)

    def use(self, name: str, function: str) -> None:
        self.functions.setdefault(name, set()).add(function)


@torch.no_grad()
def weight_uses(
    model: nn.Module, objective: Loss, batches: Iterable[Batch], layers: Mapping[str, Layer]
) -> dict[str, WeightUses]:
    """Layer → how the forward pass uses its weight.

    Cost: a forward pass of the first batch; of further ones as long as some layer has not been
    used, as an expert may be that no router chose for the first item.
    """
    found = {name: WeightUses() for name in layers}
    device = next(model.parameters()).device
    for number, batch in enumerate(batches):
        left = [layer for name, layer in layers.items() if not found[name].reached]
        if not left:
            break
        counting = _Counting()
        with evaluating(model), watching(left, counting):
            objective.outputs(model, to_device(batch, device))
        for layer in left:
            uses = found[layer.name]
            uses.calls = counting.calls.get(layer.name, 0)
            uses.functional = layer.name in counting.functional
            uses.functions = counting.functions.get(layer.name, set())
            if uses.calls or uses.functions:
                uses.item = number
    return found
