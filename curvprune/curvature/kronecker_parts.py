"""What has a block of its own in K-FAC, and the rows of inputs and gradients behind the block.

    part      parameters        inputs x                      gradients g
    matrix    weight (bias)     rows of the layer's inputs    at its outputs, for each row
    bias      bias              ones                          the same
    lookup    table             one-hot, as numbers of rows   the same
    scale     weight (bias)     what the weight multiplies    the same

A layer that is called several times has the rows of all calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvprune.curvature.capture import Call, Capture
from curvprune.curvature.operators import ParamSpace
from curvprune.model import Layer, evaluating, find_layers

FISHERS = ("type-2", "mc", "empirical", "forward-only")
SHARINGS = ("expand", "reduce")
Form = Literal["matrix", "bias", "lookup", "scale"]
SCALE = "scale"  # the kind of a layer that is a norm's scale
FORMS: dict[str, Form] = {"embedding": "lookup", SCALE: "scale"}  # of kinds; others are matrices


@dataclass(frozen=True, kw_only=True, slots=True)
class KfacSettings:
    """What the factors are made of.

    Attributes:
        fisher: what is back-propagated: ``"type-2"`` columns of the Hessian at the outputs,
            ``"mc"`` labels drawn from the model, ``"empirical"`` the data's own labels,
            ``"forward-only"`` nothing (G = I).
        kfac_approx: how the rows of one item (tokens, patches) share the weight: ``"expand"`` takes
            them for items of their own, ``"reduce"`` takes their mean input and summed gradient.
        eigenvalues: EKFAC: eigenvalues fitted to the gradients of items.
        bias: ``True`` together with the weight, as the weight of an input that is 1; ``"separate"``
            a block of its own; ``False`` left out.
        labels: draws per position for ``"mc"``.
        seed: of the draws.

    Raises:
        ValueError: a value that is not among these.
    """

    fisher: str = "mc"
    kfac_approx: str = "expand"
    eigenvalues: bool = False
    bias: bool | str = True
    labels: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("fisher", FISHERS), ("kfac_approx", SHARINGS)):
            if getattr(self, name) not in words:
                offered = ", ".join(repr(word) for word in words)
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {offered}")
        if self.bias not in (True, False, "separate"):
            raise ValueError(f"bias={self.bias!r}: expected True, False or 'separate'")
        if self.labels < 1:
            raise ValueError(f"labels={self.labels!r}: expected at least 1 draw per position")


DEFAULT = KfacSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Parameters with a block of their own.

    Attributes:
        name: of the block.
        layer: whose inputs and gradients are behind it.
        form: see above.
        weight, bias: the names of its parameters, where it has them.
        own_bias: the bias of a part that is nothing else.
    """

    name: str
    layer: Layer
    form: Form
    weight: str | None
    bias: str | None
    own_bias: nn.Parameter | None = None

    @property
    def groups(self) -> int:
        """Rows of the matrix that see inputs of their own have factors of their own."""
        return self.layer.groups if self.form == "matrix" else 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the factors of one group."""
        out, width = self.layer.shape
        if self.form == "bias":
            return out, 1
        return out // self.layer.groups, width + (self.bias is not None)

    def calls(self, taken: Capture) -> list[Call]:
        """The calls of the layer; of a bias those of its own module only."""
        return [call for call in taken.calls[self.layer.name] if self.takes_part(call)]

    def takes_part(self, call: Call) -> bool:
        return self.own_bias is None or getattr(call.module, "bias", None) is self.own_bias

    def inputs(
        self, taken: Capture, call: Call, items: slice
    ) -> Float[Tensor, "groups items places in"]:
        """The rows x of one call, of some items."""
        layer = self.layer
        x = call.x.unflatten(0, (taken.items, -1))[items]
        if self.form == "bias":
            places = call.shape.numel() // (taken.items * layer.shape[0])
            return torch.ones(1, len(x), places, 1, dtype=layer.weight.dtype, device=x.device)
        rows = layer.rows(call.module, x.flatten(0, 1)).unflatten(1, (len(x), -1))
        if self.bias is None:
            return rows
        # A module without the bias that others have beside the same weight adds none.
        one = 0.0 if getattr(call.module, "bias", None) is None else 1.0
        return torch.cat([rows, rows.new_full((*rows.shape[:-1], 1), one)], -1)

    def gradients(
        self, taken: Capture, g: Tensor, items: slice
    ) -> Float[Tensor, "groups items places out"]:
        """A gradient at the outputs of one call, as rows of some items."""
        rows = taken.gradients(self.layer.name, g, items)
        if self.form == "bias" and len(rows) > 1:
            return rows.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
        return rows


def slope_of(call: Call) -> tuple[Tensor, int]:
    """``∂y/∂w`` of a norm ``y = s(x) ∘ w + b``, laid out as y, and the axis that w lies along;
    ``-k`` for the last k axes.

    Raises ``ValueError`` where the module is of another form.
    """
    module, weight = call.module, call.module.weight
    assert isinstance(weight, Tensor)

    def output(values: Tensor) -> Tensor:
        own = {"weight": values.view(weight.shape).to(weight.dtype)}
        if getattr(module, "bias", None) is not None:
            own["bias"] = torch.zeros_like(weight)
        with torch.no_grad(), evaluating(module):
            return torch.func.functional_call(module, own, (call.x,))

    # 1. The slope, and what a weight that grows from one entry to the next makes of it.
    ones = torch.ones_like(weight).flatten()
    growing = 1 + torch.arange(weight.numel(), device=weight.device) / weight.numel()
    zero = output(0 * ones)
    slope, grown = output(ones) - zero, output(growing) - zero
    # 2. The axis along which it grows.
    axes = [-weight.ndim] if weight.ndim > 1 else [-1, *range(1, slope.ndim - 1)]
    for axis in axes:
        shape = [1] * slope.ndim
        last = axis + weight.ndim
        shape[axis : last or None] = weight.shape
        if slope.shape[axis : last or None] == weight.shape and _near(
            grown, slope * growing.view(shape).to(slope.dtype)
        ):
            return slope, axis
    raise ValueError(
        f"{type(module).__name__}: its weight does not scale its output along one axis, as a "
        "norm's does; leave it out, with layers=..."
    )


def _near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of half precision."""
    near = 1e-2 * float(expected.abs().max()) + 1e-12
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=near)


def norms_of(model: nn.Module) -> dict[str, Layer]:
    """The scales of norms as layers of kind `SCALE`: modules named so that own a weight and at most
    a bias."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if weight is None or not own.keys() <= {"weight", "bias"} or any(module.children()):
            continue
        if "norm" in type(module).__name__.lower():
            found[name] = Layer(
                name=name,
                kind=SCALE,
                shape=(weight.numel(), 1),
                groups=1,
                module=module,
                readers=(),
                aliases=(),
            )
    return found


def layers_with_norms(model: nn.Module, globs: str | Sequence[str] = "*") -> dict[str, Layer]:
    """Layers and norms whose names match one of the globs, in the model's order.

    Raises ``ValueError`` for a glob that matches neither.
    """
    globs = [globs] if isinstance(globs, str) else list(globs)
    if not globs:
        raise ValueError("layers is empty: expected names or globs, such as '*'")
    # 1. Norms; a glob that means nothing else is not looked for among the layers.
    norms = norms_of(model)
    others = [n for n, m in model.named_modules() if n not in norms and hasattr(m, "weight")]
    chosen: dict[str, Layer] = {}
    left = []
    for glob in globs:
        matched = {n: norm for n, norm in norms.items() if fnmatchcase(n, glob)}
        chosen |= matched
        if not matched or any(fnmatchcase(n, glob) for n in others):
            left.append(glob)
    # 2. The layers.
    if left:
        chosen |= find_layers(model, left)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(chosen.items(), key=lambda pair: order.get(pair[0], len(order))))


def parts_of(model: nn.Module, layers: Mapping[str, Layer], settings: KfacSettings) -> list[Part]:
    """The blocks of some layers.

    Raises ``ValueError`` for modules with one weight and two biases, which have no block in common.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    parts: list[Part] = []
    for name, layer in layers.items():
        biases = _biases(layer, names) if settings.bias else {}
        joint = settings.bias is True
        if joint and len(biases) > 1:
            raise ValueError(
                f"layer {name}: its weight is used with {len(biases)} biases ({', '.join(biases)})"
                ", which have no block in common with it; pass bias='separate'"
            )
        form = FORMS.get(layer.kind, "matrix")
        both = joint or form == "scale"
        own = next(iter(biases)) if biases and both else None
        weight = names[id(layer.weight)]
        parts.append(Part(name=name, layer=layer, form=form, weight=weight, bias=own))
        if both:
            continue
        for bias, parameter in biases.items():
            parts.append(
                Part(
                    name=bias, layer=layer, form="bias", weight=None, bias=bias, own_bias=parameter
                )
            )
    return parts


def _biases(layer: Layer, names: Mapping[int, str]) -> dict[str, nn.Parameter]:
    """The biases beside a layer's weight, by name."""
    found: dict[str, nn.Parameter] = {}
    for module in (layer.module, *layer.readers):
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            found[names[id(bias)]] = bias
    return found


def space_of(model: nn.Module, part: Part) -> ParamSpace:
    """The parameters of a part, the weight before its bias."""
    own = dict(model.named_parameters())
    names = [name for name in (part.weight, part.bias) if name is not None]
    return ParamSpace(shapes={name: tuple(own[name].shape) for name in names})


def places_in(part: Part) -> Int[Tensor, "groups n"]:
    """Where each entry of the ``[out, in]`` of each group lies among the part's coordinates."""
    columns = []
    start = 0
    if part.weight is not None:
        start = part.layer.numel
        numbers = torch.arange(start, dtype=torch.float64).view(part.layer.weight.shape)
        columns.append(part.layer.as_matrix(numbers).long())
    if part.bias is not None:
        columns.append(start + torch.arange(part.layer.shape[0]).unsqueeze(1))
    return torch.cat(columns, 1).reshape(part.groups, -1)


def why_no_factors(name: str, taken: Capture, single: Capture | None) -> str:
    """Why a layer's calls do not say all about its weight; empty if they do.

    Args:
        single: the first item of the mini-batch alone, to see whether rows belong to one item.
    """
    layer, calls, uses = taken.layers[name], taken.calls[name], taken.uses[name]
    module = layer.module
    if layer.kind != SCALE and uses != len(calls):
        return f"its weight is used {uses} times, {len(calls)} of them by calling it"
    if layer.kind == "embedding" and any(c.x.is_floating_point() for c in calls):
        return "its weight is looked up and also multiplies inputs: it is tied to another layer"
    if getattr(module, "max_norm", None) or getattr(module, "scale_grad_by_freq", False):
        return "an embedding with max_norm or scale_grad_by_freq is not linear"
    alone = calls if single is None else single.calls[name]
    if len(alone) != len(calls):
        return "how often it is called depends on the items of a mini-batch"
    for one, call in zip(alone, calls, strict=True):
        several = len(one.x) * (1 if single is None else taken.items)
        if len(call.x) != several or len(call.x) % taken.items:
            return "the first dimension of its input does not count items"
    return ""
