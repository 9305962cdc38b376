"""Find the weights that can be compressed, each as one matrix ``W[out, in]`` together with how its
inputs become rows.

Works on any ``nn.Module``: Linear, Conv1d, Conv2d, Embedding, transformers' ``Conv1D`` and its
stacked experts (told by their attributes, so that this file does not import transformers). Modules
that share one weight are one layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvprune.compat import activate_experts, is_stacked_experts


def key_of(module: str, part: str) -> str:
    """The name of a module's ``part`` in a state dict; the model itself, which may be a layer, has
    none of its own."""
    return f"{module}.{part}" if module else part


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """One compressible weight.

    Attributes:
        name: module name (of the first module, if several share the weight); of stacked experts,
            the parameter's name.
        kind: ``"linear"``, ``"conv"``, ``"conv1d"`` (transformers), ``"embedding"`` or
            ``"experts"`` (transformers).
        shape: ``(out, in)`` of the weight as a matrix; the experts' matrices stand one below the
            other.
        groups: input groups of a grouped convolution, or experts: rows ``out/groups`` at a time see
            their own inputs.
        module: the module that owns the weight.
        readers: modules whose inputs multiply the weight (empty for a lookup-only embedding).
        aliases: further such names under which the weight is known.
        parameter: the weight's name in its module.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    groups: int
    module: nn.Module
    readers: tuple[nn.Module, ...]
    aliases: tuple[str, ...]
    parameter: str = "weight"

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)

    @property
    def keys(self) -> tuple[str, ...]:
        """The weight's names in ``model.state_dict()``, the layer's own first."""
        names = (self.name, *self.aliases)
        return names if self.kind == "experts" else tuple(key_of(name, "weight") for name in names)

    @property
    def transposed(self) -> bool:
        """The weight is stored as ``[in, out]``, or ``[experts, in, out]``."""
        return self.kind == "conv1d" or (self.kind == "experts" and bool(self.module.is_transposed))

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> str:
        """The weight's own type as text, e.g. ``"float32"``."""
        return str(self.weight.dtype).removeprefix("torch.")

    def as_matrix(self, tensor: Tensor) -> Float[Tensor, "out in"]:
        """Reshape a tensor laid out like the weight (the weight itself, a gradient) to ``[out,
        in]``."""
        return (tensor.transpose(-1, -2) if self.transposed else tensor).reshape(self.shape)

    def from_matrix(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """The inverse of `as_matrix`."""
        return laid_out(matrix, self.weight.shape, transposed=self.transposed)

    @torch.no_grad()
    def write_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight in place, in its own type."""
        self.weight.copy_(self.from_matrix(matrix))

    def rows(self, reader: nn.Module, x: Tensor) -> Float[Tensor, "groups n in"]:
        """The inputs of one call of ``reader`` as rows that multiply the matrix; convolutions
        unfold their patches."""
        if self.kind != "conv":
            return x.reshape(1, -1, self.shape[1])
        assert isinstance(reader, (nn.Conv1d, nn.Conv2d))
        # 1. One dimension is two, of height one.
        if isinstance(reader, nn.Conv1d):
            x = x.unsqueeze(-2)
        kernel, dilation = _two(reader.kernel_size), _two(reader.dilation)
        # 2. Pads by hand: `unfold` knows none but zeros.
        mode = "constant" if reader.padding_mode == "zeros" else reader.padding_mode
        padded = F.pad(x, _padding(reader, kernel, dilation), mode=mode)
        # 3. What the kernel sees at each place: (batch, channels · kernel, places).
        patches = F.unfold(padded, kernel, dilation=dilation, stride=_two(reader.stride))
        # 4. Channels of a group stand together, so groups split the middle dimension.
        grouped = patches.reshape(len(patches), self.groups, self.shape[1], -1)
        return grouped.permute(1, 0, 3, 2).reshape(self.groups, -1, self.shape[1])

    def expert_rows(
        self, hidden: Float[Tensor, "tokens width"], chosen: Int[Tensor, "tokens k"]
    ) -> Iterator[Float[Tensor, "n in"]]:
        """Kind ``"experts"``: the inputs of each expert in turn, of the tokens that ``chosen``
        sends there.

        ``hidden`` and ``chosen`` are the first two arguments of the experts' module. What reaches
        an expert's second matrix comes from its first one as that is now. The formula is the one
        that transformers' implementations share (see ``batched_mm_experts_forward``), so that it
        does not matter which of them the model runs.
        """
        module: Any = self.module
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(self.groups):
            rows = hidden[torch.where(chosen == expert)[0]]
            if self.parameter != first:
                weight = getattr(module, first)[expert]
                bias = getattr(module, f"{first}_bias")[expert] if module.has_bias else None
                rows = F.linear(rows, weight.t() if module.is_transposed else weight, bias)
                rows = activate_experts(module, rows)
            yield rows


def laid_out(matrix: Tensor, shape: Sequence[int], *, transposed: bool) -> Tensor:
    """A layer's matrix ``[out, in]`` in the shape of its weight; a transposed weight is ``[in,
    out]`` at the end."""
    if not transposed:
        return matrix.reshape(*shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    """Geometry of a one-dimensional convolution seen as a two-dimensional one of height one."""
    return (value[0], value[1]) if len(value) == 2 else (1, value[0])


def _padding(
    conv: nn.Conv1d | nn.Conv2d, kernel: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Pads in the order of `torch.nn.functional.pad`: last dimension first."""
    if conv.padding == "valid":
        sides = [(0, 0)] * len(kernel)
    elif conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        # An odd pad has its larger half at the end, as torch has it.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        assert not isinstance(conv.padding, str)
        given = [0, *conv.padding] if len(conv.padding) < len(kernel) else list(conv.padding)
        sides = [(p, p) for p in given]
    return list(chain.from_iterable(reversed(sides)))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a Linear layer whose weight is stored as ``[in,
    out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weights(module: nn.Module) -> list[tuple[str, str]]:
    """(kind, parameter name) of the weights that a module owns, in the order in which it uses
    them."""
    if isinstance(module, nn.Linear):
        return [("linear", "weight")]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not getattr(module, "transposed", False):
        return [("conv", "weight")]
    if isinstance(module, nn.Embedding):
        return [("embedding", "weight")]
    if is_conv1d(module) and getattr(module, "weight", None) is not None:
        return [("conv1d", "weight")]
    if is_stacked_experts(module):
        # In the order of the forward pass: what is solved first is what the second one sees.
        first = "gate_up_proj" if module.has_gate else "up_proj"
        own = _own_parameters(module)
        if all(_is_stack(own.get(name)) for name in (first, "down_proj")):
            return [("experts", first), ("experts", "down_proj")]
    return []


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters. A weight that is computed from others is none of them."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _is_stack(weight: Tensor | None) -> bool:
    """Whether a parameter is one matrix an expert, or what packing has left of it: no numbers."""
    return weight is not None and (weight.ndim == 3 or not weight.numel())


def left_over(model: nn.Module) -> str | None:
    """What to tell the user if more than 1 % of the parameters are matrices that are no layer's
    weight, such as stacked experts of another layout."""
    inside: set[int] = set()
    for module in model.modules():
        own = _own_parameters(module)
        inside.update(id(own.get(parameter)) for _, parameter in _weights(module))
    # What is told of by `computed_weights` is told of there.
    for name in computed_weights(model):
        inside.update(id(weight) for weight in _module_of(model, name).parameters())
    # Biases and norms are few, and no matrices.
    outside = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in inside}
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in outside.values()) / max(1, total)
    if share <= 0.01:
        return None
    largest = max(outside, key=lambda n: outside[n].numel())
    return (
        f"{share:.0%} of the parameters are in {len(outside)} tensors that belong to no Linear, "
        f"convolution, embedding or known kind of experts (largest: {largest}, "
        f"{tuple(outside[largest].shape)}) and stay as they are"
    )


def _matrix_shape(kind: str, module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """``(out, in)`` of a weight as a matrix."""
    if kind == "conv1d":
        return weight.shape[1], weight.shape[0]
    if kind == "experts":
        width = weight.shape[1] if module.is_transposed else weight.shape[2]
        return weight.numel() // width, width
    return weight.shape[0], weight[0].numel()


def find_layers(
    model: nn.Module, globs: str | Sequence[str] = "*", *, exclude: str | Sequence[str] = ()
) -> dict[str, Layer]:
    """Every compressible layer whose module name (or an alias) matches one of the globs and none of
    ``exclude``, in the model's own order.

    A weight that is computed from others, or packed, is no layer: `computed_weights` names those.

    Raises ``ValueError`` for a glob that matches nothing, naming the nearest layer, and where all
    that a glob matches is computed or packed.
    """
    # 1. All weights, whether asked for or not: a weight may be known by another name.
    uses, computed = _uses_of_weights(model)
    layers = {layer.name: layer for layer in map(_layer_of, uses)}
    globs = [globs] if isinstance(globs, str) else list(globs)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    # 2. What is asked for must be there, as a parameter; what is left out must be there.
    for glob in globs:
        _check_matches(glob, layers, computed)
    for glob in exclude:
        if not _matches_any(computed, (glob,)):
            _check_matches(glob, layers, argument="exclude")
    # 3. In the model's order, not in that of the globs.
    found = {}
    for name, layer in layers.items():
        names = (name, *layer.aliases)
        if _matches_any(names, globs) and not _matches_any(names, exclude):
            found[name] = layer
    return found


def _module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a layer's name, or the one whose parameter it is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return modules[name] if name in modules else modules[name.rpartition(".")[0]]


def computed_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of what the weights of `computed_weights` are made of."""
    tensors: dict[int, Tensor] = {}
    for name in names:
        module = _module_of(model, name)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim > 1:
                tensors[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def computed_weights(model: nn.Module) -> list[str]:
    """Names of modules whose weight is no parameter that could be overwritten: it is computed from
    others (weight_norm, spectral_norm, a mask of `torch.nn.utils.prune`, any parametrization), or
    packed."""
    return _uses_of_weights(model)[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """One module's use of a weight, under the name that the weight has there."""

    name: str
    kind: str
    module: nn.Module
    parameter: str

    @property
    def groups(self) -> int:
        """Rows of the matrix that see inputs of their own."""
        if self.kind == "experts":
            return len(getattr(self.module, self.parameter))
        return getattr(self.module, "groups", 1) if self.kind == "conv" else 1


def _uses_of_weights(model: nn.Module) -> tuple[list[list[_Use]], list[str]]:
    """Every weight's uses, that of its owner first, in the model's order; and the names of weights
    that are no parameters."""
    uses: dict[int, list[_Use]] = {}
    computed: list[str] = []
    for module_name, module in model.named_modules(remove_duplicate=False):
        for kind, parameter in _weights(module):
            name = key_of(module_name, parameter) if kind == "experts" else module_name
            weight = _own_parameters(module).get(parameter)
            if weight is None or not weight.numel():  # nothing is left of a packed one
                computed.append(name)
                continue
            use = _Use(name=name, kind=kind, module=module, parameter=parameter)
            uses.setdefault(id(weight), []).append(use)
    return list(uses.values()), computed


def _layer_of(uses: Sequence[_Use]) -> Layer:
    """The layer that a weight is, from all of its uses."""
    first = uses[0]
    # By identity, as one module may have two names; an embedding looks up and multiplies nothing.
    readers = {id(use.module): use.module for use in uses if use.kind != "embedding"}
    weight: Tensor = getattr(first.module, first.parameter)
    return Layer(
        name=first.name,
        kind=first.kind,
        shape=_matrix_shape(first.kind, first.module, weight),
        groups=first.groups,
        module=first.module,
        readers=tuple(readers.values()),
        aliases=tuple(use.name for use in uses[1:]),
        parameter=first.parameter,
    )


def _matches_any(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name, glob in product(names, globs))


def _check_matches(
    glob: str,
    layers: Mapping[str, Layer],
    computed: Sequence[str] = (),
    *,
    argument: str = "layers",
) -> None:
    """A glob must match a layer's name or an alias, not one of a ``computed`` weight alone."""
    if any(_matches_any((name, *layer.aliases), (glob,)) for name, layer in layers.items()):
        return
    blocked = [name for name in computed if fnmatchcase(name, glob)]
    if blocked:
        raise ValueError(
            f"layer {blocked[0]}: its weight is not a parameter (weight_norm or another "
            "parametrization, or packed); remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations) or leave it out"
        )
    near = difflib.get_close_matches(glob, [*layers, *computed], n=1, cutoff=0.0)
    hint = "; the model has no compressible layers"
    if near:
        hint = f"; the nearest layer is {near[0]!r}"
    raise ValueError(
        f"{argument}={glob!r} matches none of the {len(layers)} compressible layers{hint}"
    )
