"""Find the weights that can be compressed, each as one matrix ``W[out, in]`` together with how its
inputs become rows.

Works on any ``nn.Module``: Linear, convolutions of one to three dimensions, transposed or not,
LSTM, GRU and RNN, Embedding and EmbeddingBag, transformers' ``Conv1D`` and its stacked experts
(told by their attributes, so that this file does not import transformers). Modules that share one
weight are one layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvprune.compat import activate_experts, is_stacked_experts
from curvprune.model.patches import Convolution, Transposed, patches
from curvprune.model.recurrent import RECURRENT, recurrent_rows, recurrent_weights

# Kinds whose modules own several weights: such a layer has its parameter's name.
SEVERAL = ("experts", "recurrent")


def key_of(module: str, part: str) -> str:
    """The name of a module's ``part`` in a state dict; the model itself, which may be a layer, has
    none of its own."""
    return f"{module}.{part}" if module else part


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """One compressible weight.

    Attributes:
        name: module name (of the first module, if several share the weight); of stacked experts and
            of recurrent modules, the parameter's name.
        kind: ``"linear"``, ``"conv"``, ``"conv_transpose"``, ``"recurrent"`` (LSTM, GRU, RNN),
            ``"conv1d"`` (transformers), ``"embedding"`` or ``"experts"`` (transformers).
        shape: ``(out, in)`` of the weight as a matrix; the experts' matrices stand one below the
            other, and so do the gates' of a recurrent module.
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
        return names if self.kind in SEVERAL else tuple(key_of(name, "weight") for name in names)

    @property
    def transposed(self) -> bool:
        """The weight is stored as ``[in, out]``, or ``[experts, in, out]``."""
        return self.kind == "conv1d" or (self.kind == "experts" and bool(self.module.is_transposed))

    @property
    def convolves(self) -> bool:
        """Its rows are patches of its module's input, a row for each place of the output."""
        return self.kind in ("conv", "conv_transpose")

    @property
    def layout(self) -> Layout:
        """How the weight lies in memory."""
        swapped = self.groups if self.kind == "conv_transpose" else None
        return Layout(shape=self.weight.shape, transposed=self.transposed, swapped=swapped)

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
        return self.layout.matrix(tensor).reshape(self.shape)

    def from_matrix(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """The inverse of `as_matrix`."""
        return self.layout.tensor(matrix)

    @torch.no_grad()
    def write_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight in place, in its own type."""
        self.weight.copy_(self.from_matrix(matrix))

    def rows(self, reader: nn.Module, x: Tensor) -> Float[Tensor, "groups n in"]:
        """The inputs of one call of ``reader`` as rows that multiply the matrix; convolutions
        unfold their patches. Those of kind ``"recurrent"`` are rows already (`recurrent_rows`)."""
        if self.convolves:
            return patches(reader, x)
        return x.reshape(1, -1, self.shape[1])

    def places(self, x: Tensor, output: Tensor) -> int:
        """How often one call of a convolution multiplies its matrix: at each place of its output, a
        transposed one at each place of its input."""
        if self.kind == "conv_transpose":
            return x.numel() // len(self.weight)
        return output.numel() // self.shape[0]

    def recurrent_rows(
        self,
        reader: nn.Module,
        arguments: Sequence[Any],
        named: Mapping[str, object],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "n in"]:
        """Kind ``"recurrent"``: what one call of ``reader`` multiplies the matrix with, a row for
        every step that is no padding. See `curvprune.model.recurrent`."""
        return recurrent_rows(reader, self.parameter, arguments, named, mask)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a weight lies in memory, seen from its matrix ``[out, in]``.

    Attributes:
        shape: of the weight.
        transposed: it is ``[in, out]`` at the end.
        swapped: groups of a transposed convolution's weight, ``[in, out/groups, *kernel]``.
    """

    shape: torch.Size
    transposed: bool = False
    swapped: int | None = None

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the weight, its entries in the order of the matrix."""
        if self.swapped is not None:
            return tensor.unflatten(0, (self.swapped, -1)).transpose(1, 2)
        return tensor.transpose(-1, -2) if self.transposed else tensor

    def tensor(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """A matrix in the shape of the weight."""
        shape = self.shape
        if self.swapped is not None:
            groups = self.swapped
            grouped = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
            return grouped.transpose(1, 2).flatten(0, 1)
        if not self.transposed:
            return matrix.reshape(shape)
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a Linear layer whose weight is stored as ``[in,
    out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weights(module: nn.Module) -> list[tuple[str, str]]:
    """(kind, parameter name) of the weights that a module owns, in the order in which it uses
    them."""
    if isinstance(module, nn.Linear):
        return [("linear", "weight")]
    if isinstance(module, Convolution):
        return [("conv", "weight")]
    if isinstance(module, Transposed):
        return [("conv_transpose", "weight")]
    if isinstance(module, RECURRENT):
        return [("recurrent", name) for name in recurrent_weights(module)]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
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
    if kind == "conv_transpose":
        groups: Any = module.groups
        return groups * weight.shape[1], weight[:, 0].numel() // groups
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
        convolves = self.kind in ("conv", "conv_transpose")
        return getattr(self.module, "groups", 1) if convolves else 1


def _uses_of_weights(model: nn.Module) -> tuple[list[list[_Use]], list[str]]:
    """Every weight's uses, that of its owner first, in the model's order; and the names of weights
    that are no parameters."""
    uses: dict[int, list[_Use]] = {}
    computed: list[str] = []
    for module_name, module in model.named_modules(remove_duplicate=False):
        for kind, parameter in _weights(module):
            name = key_of(module_name, parameter) if kind in SEVERAL else module_name
            weight = _own_parameters(module).get(parameter)
            if weight is not None and is_lazy(weight):
                raise ValueError(
                    f"layer {name}: its {type(module).__name__} has no size yet; run the model "
                    "once on a batch, which gives it one, and start again"
                )
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
