"""Find the weights that can be compressed, each as one matrix ``W[out, in]`` together with how its inputs become rows.

Works on any ``nn.Module``: Linear, Conv1d, Conv2d, transformers' ``Conv1D`` (told by its class name, so that this
file does not import transformers) and Embedding. Modules that share one weight are one layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """One compressible weight.

    Attributes:
        name: module name (of the first module, if several share the weight).
        kind: ``"linear"``, ``"conv"``, ``"conv1d"`` (transformers) or ``"embedding"``.
        shape: ``(out, in)`` of the weight as a matrix.
        groups: input groups of a grouped convolution: rows ``out/groups`` at a time see their own inputs.
        module: the module that owns the weight.
        readers: modules whose inputs multiply the weight (empty for a lookup-only embedding).
        aliases: names of further modules that share the weight.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    groups: int
    module: nn.Module
    readers: tuple[nn.Module, ...]
    aliases: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> str:
        """The weight's own type as text, e.g. ``"float32"``."""
        return str(self.weight.dtype).removeprefix("torch.")

    def as_matrix(self, tensor: Tensor) -> Float[Tensor, "out in"]:
        """Reshape a tensor laid out like the weight (the weight itself, a gradient) to ``[out, in]``."""
        return tensor.t() if self.kind == "conv1d" else tensor.reshape(self.shape)

    def from_matrix(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.t() if self.kind == "conv1d" else matrix.reshape(self.weight.shape)

    @torch.no_grad()
    def write_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight in place, in its own type."""
        self.weight.copy_(self.from_matrix(matrix))

    def rows(self, reader: nn.Module, x: Tensor) -> Float[Tensor, "groups n in"]:
        """The inputs of one call of ``reader`` as rows that multiply the matrix; convolutions unfold their patches."""
        if self.kind != "conv":
            return x.reshape(1, -1, self.shape[1])
        assert isinstance(reader, (nn.Conv1d, nn.Conv2d))
        kernel, dilation, stride = (_two(v) for v in (reader.kernel_size, reader.dilation, reader.stride))
        if isinstance(reader, nn.Conv1d):
            x = x.unsqueeze(-2)
        mode = "constant" if reader.padding_mode == "zeros" else reader.padding_mode
        padded = F.pad(x, _padding(reader, kernel, dilation), mode=mode)
        patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # (batch, channels·kernel, places)
        grouped = patches.reshape(len(patches), self.groups, self.shape[1], -1)
        return grouped.permute(1, 0, 3, 2).reshape(self.groups, -1, self.shape[1])


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    """Geometry of a one-dimensional convolution seen as a two-dimensional one of height one."""
    return (value[0], value[1]) if len(value) == 2 else (1, value[0])


def _padding(conv: nn.Conv1d | nn.Conv2d, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Pads in the order of `torch.nn.functional.pad`: last dimension first."""
    if conv.padding == "valid":
        sides = [(0, 0)] * len(kernel)
    elif conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        assert not isinstance(conv.padding, str)
        given = [0, *conv.padding] if len(conv.padding) < len(kernel) else list(conv.padding)
        sides = [(p, p) for p in given]
    return [side for pair in reversed(sides) for side in pair]


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not getattr(module, "transposed", False):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None:
        return "conv1d"
    return None


def left_over(model: nn.Module) -> str | None:
    """What to tell the user if more than 1 % of the parameters are matrices that are no layer's weight, such as
    stacked experts."""
    inside = {id(module._parameters.get("weight")) for module in model.modules() if _kind(module) is not None}
    outside = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in inside}
    share = sum(p.numel() for p in outside.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if share <= 0.01:
        return None
    largest = max(outside, key=lambda n: outside[n].numel())
    return (
        f"{share:.0%} of the parameters are in {len(outside)} tensors that belong to no Linear, convolution or "
        f"embedding (largest: {largest}, {tuple(outside[largest].shape)}) and stay as they are"
    )


def find_layers(model: nn.Module, globs: str | Sequence[str] = "*") -> dict[str, Layer]:
    """Every compressible layer whose module name (or an alias) matches one of the globs, in the model's own order.

    Raises ``ValueError`` for a glob that matches nothing, naming the nearest layer.
    """
    owners: dict[int, tuple[str, str, nn.Module]] = {}
    sharers: dict[int, list[tuple[str, str, nn.Module]]] = {}
    computed: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module)
        if kind is None:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            computed.append(name)
            continue
        if id(weight) in owners:
            sharers[id(weight)].append((name, kind, module))
        else:
            owners[id(weight)] = (name, kind, module)
            sharers[id(weight)] = []
    layers: dict[str, Layer] = {}
    for key, (name, kind, module) in owners.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        shape = (weight.shape[1], weight.shape[0]) if kind == "conv1d" else (weight.shape[0], weight[0].numel())
        readers = {id(m): m for _, k, m in [(name, kind, module), *sharers[key]] if k != "embedding"}
        layers[name] = Layer(
            name=name,
            kind=kind,
            shape=shape,
            groups=module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1,
            module=module,
            readers=tuple(readers.values()),
            aliases=tuple(n for n, _, _ in sharers[key]),
        )
    globs = [globs] if isinstance(globs, str) else list(globs)
    if blocked := [n for n in computed if any(fnmatchcase(n, glob) for glob in globs)]:
        raise ValueError(
            f"layer {blocked[0]}: its weight is not a parameter (weight_norm or another parametrization, or packed); "
            "remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations) or leave it out"
        )
    chosen: dict[str, Layer] = {}
    for glob in globs:
        names = [n for n, layer in layers.items() if any(fnmatchcase(x, glob) for x in (n, *layer.aliases))]
        if not names:
            near = difflib.get_close_matches(glob, list(layers), n=1, cutoff=0.0)
            hint = f"; the nearest layer is {near[0]!r}" if near else "; the model has no compressible layers"
            raise ValueError(f"layers={glob!r} matches none of the {len(layers)} compressible layers{hint}")
        chosen.update({n: layers[n] for n in names})
    return {n: layer for n, layer in layers.items() if n in chosen}
