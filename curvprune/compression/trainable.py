"""What the stored form of a compressed model leaves free, and the numbers that are trained for it.

Free are the survivors of a pruned weight (its zeros stay), the scales of a rounded one, its codes
where that is asked for, and everything that is stored as floats. A gradient is taken at the model
as it would be stored: scales rounded to 16 bits, casts rounded to their type. It moves *masters*,
wide copies of the free numbers, and `write_` stores them again.

Masters are relative. A tensor is trained as a multiple of a power of two near its root mean square,
a scale as a multiple of what it was. So one learning rate serves tensors of any size (as in
Adafactor, arXiv 1804.04235), and nothing is rounded on the way in and out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compression.grids import code_range, dequantize, round_scale, spread
from curvprune.compression.rounding import Rounded
from curvprune.compression.solver import Solved
from curvprune.model import Layer, find_layers
from curvprune.options import Cast, PruneCast, pruner_of, quantizer_of

CODES_UP_TO = 4  # bits: what finer codes could gain the scales give
# Steps of the grid that a weight moves for a relative change of one. SmolLM2-135M, 24 steps of 8 x
# 256 tokens, loss added on select 0.1373: 0.0899 with scales alone, 0.0820 with 2, 0.0878 with 8.
CODE_STEP = 2.0
# An uncompressed weight this near to its code's value tells where in the cell it lies.
SURE = 0.4999
SMALLEST_SIZE = 2.0**-10  # a bias of zeros has no size of its own


class FreeFloats:
    """A parameter that is stored as floats.

    Args:
        mask: which of its numbers are free; the others are zeros of a pruned weight and stay.
        narrow: the type that a cast rounds it to.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        *,
        mask: Tensor | None = None,
        narrow: torch.dtype | None = None,
    ) -> None:
        self.parameter, self.mask, self.narrow = parameter, mask, narrow
        values = widened(parameter.detach())
        self.size = _size_near(values if mask is None else values[mask])
        self.masters = [values / self.size]

    @property
    def free(self) -> int:
        """How many numbers are free."""
        return self.parameter.numel() if self.mask is None else int(self.mask.sum())

    def take_(self, gradient: Tensor) -> None:
        """Gradient of the masters from that of the parameter."""
        gradient = widened(gradient) * self.size
        self.masters[0].grad = gradient if self.mask is None else gradient * self.mask

    @torch.no_grad()
    def write_(self) -> None:
        """The parameter as it would be stored."""
        values = self.masters[0] * self.size
        self.parameter.copy_(values if self.narrow is None else values.to(self.narrow))


class FreeGrid:
    """A rounded weight ``(codes − zero) · scale``.

    The scales are free, and the zero points of one bit, which are no integers. ``dL/ds = Σ dL/dw ·
    (code − zero)`` over a group, ``dL/dz = −s Σ dL/dw``.

    With a ``target`` the codes are free as well. Each weight then has a place on the line of its
    grid, and the nearest code is stored. The gradient of a place is that of a code, ``s dL/dw``:
    straight through the rounding.

    Args:
        solved: the layer's solution, which its weight holds.
        target: ``(out, in)`` the uncompressed weight. A place starts where that lies in its code's
            cell, or in the middle where it lies outside.
    """

    def __init__(self, layer: Layer, solved: Solved, target: Tensor | None = None) -> None:
        quantize = quantizer_of(solved.option)
        assert quantize is not None and solved.codes is not None and solved.scale is not None
        self.layer, self.solved, self.quantize = layer, solved, quantize
        weight = layer.weight.detach()
        self.codes = self.first_codes = solved.codes.to(weight.device)
        self.first_scale = solved.scale.to(widened(weight[:0]))
        # Masters: scales in units of the first ones, ...
        self.ratio = torch.ones_like(self.first_scale)
        self.masters = [self.ratio]
        # ... zero points of one bit, relative to their size, ...
        self.zero: Tensor | None = None
        self.zero_size = 1.0
        zero = solved.zero
        if zero is not None and zero.is_floating_point() and not quantize.symmetric:
            wide_zero = widened(zero).to(self.first_scale)
            self.zero_size = _size_near(wide_zero)
            self.zero = wide_zero / self.zero_size
            self.masters.append(self.zero)
        # ... and how far places are from the first codes.
        self.offset: Tensor | None = None
        self.fixed: Tensor | None = None
        if target is not None:
            if pruner_of(solved.option) is not None:
                self.fixed = layer.as_matrix(weight) == 0
            self.offset = self._first_offset(target)
            self.masters.append(self.offset)

    def _first_offset(self, target: Tensor) -> Tensor:
        place = target.to(self.first_scale) / self._for_inputs(self.first_scale)
        if self.solved.zero is not None:
            place = place + self._for_inputs(self.solved.zero.to(self.first_scale))
        offset = place - self.first_codes
        return torch.where(offset.abs() < SURE, offset, 0.0) / CODE_STEP

    def _for_inputs(self, parameters: Tensor) -> Tensor:
        width, size = self.first_codes.shape[1], self.quantize.group_size
        return spread(parameters, width, size, dim=1)

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.weight

    @property
    def free(self) -> int:
        """How many numbers are free."""
        fixed = 0 if self.fixed is None else int(self.fixed.sum())
        return sum(master.numel() for master in self.masters) - fixed

    @property
    def flipped(self) -> int:
        """How many codes are not what they were."""
        return int((self.codes != self.first_codes).sum())

    def stored(self) -> Rounded:
        """Codes, scale and zero as they lie on disk; codes where the solution's are."""
        assert self.solved.codes is not None
        scale, zero = self._grid()
        return Rounded(codes=self.codes.to(self.solved.codes.device), scale=scale, zero=zero)

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        old, zero = self.solved.scale, self.solved.zero
        assert old is not None
        scale = round_scale(self.ratio * self.first_scale, old.dtype).to(old.dtype)
        if self.zero is not None:
            assert zero is not None
            zero = (self.zero * self.zero_size).to(zero.dtype)
        return scale, zero

    def take_(self, gradient: Tensor) -> None:
        """Gradient of the masters from that of the weight."""
        gradient = widened(self.layer.as_matrix(gradient))
        size = self.quantize.group_size
        scale, zero = self._grid()
        # 1. Scales: every weight is so many of them.
        steps = self.codes.to(gradient)
        if zero is not None:
            steps = steps - self._for_inputs(zero.to(gradient))
        self.ratio.grad = _group_sums(gradient * steps, size) * self.first_scale
        # 2. Zero points move all weights of a group.
        if self.zero is not None:
            sums = _group_sums(gradient, size)
            self.zero.grad = -self.zero_size * scale.to(gradient) * sums
        # 3. Places, as if codes were not rounded.
        if self.offset is not None:
            moved = gradient * self._for_inputs(scale.to(gradient) * CODE_STEP)
            if self.fixed is not None:
                moved.masked_fill_(self.fixed, 0)
            self.offset.grad = moved

    @torch.no_grad()
    def write_(self) -> None:
        """The weight as it would be stored."""
        if self.offset is not None:
            low, high = code_range(self.quantize.bits)
            # Half a step beyond the last values and no further: from there every place finds back.
            first = self.first_codes.to(self.first_scale)
            lowest, highest = (low - 0.5 - first) / CODE_STEP, (high + 0.5 - first) / CODE_STEP
            self.offset.clamp_(lowest, highest)
            places = (self.offset * CODE_STEP).round_().add_(self.first_codes)
            self.codes = places.clamp_(low, high).to(torch.int8)
        scale, zero = self._grid()
        if zero is not None:
            zero = zero.to(self.first_scale.device)
        size, wide = self.quantize.group_size, self.first_scale.dtype
        self.layer.write_(dequantize(self.codes, scale, zero, size, dtype=wide))


FreePart = FreeFloats | FreeGrid


def free_parts(
    model: nn.Module,
    solved: Mapping[str, Solved] | None,
    originals: Mapping[str, Layer] | None = None,
) -> list[FreePart]:
    """Every floating-point parameter that wants a gradient, as what its stored form leaves free.

    Args:
        solved: the compressed layers. ``None``: the model's history is unknown, and zeros of any
            layer's weight are taken for pruned.
        originals: the layers of the uncompressed model, where codes are to be trained.
    """
    parts: dict[int, FreePart] = {}
    # 1. Weights of layers. A parameter that several modules share is trained once.
    for name, layer in find_layers(model).items():
        weight = layer.weight
        if not weight.requires_grad:
            continue
        if solved is None:
            kept = weight.detach() != 0
            parts[id(weight)] = FreeFloats(weight, mask=None if bool(kept.all()) else kept)
        elif name in solved and quantizer_of(solved[name].option) is not None:
            target = None if originals is None else _target(layer, solved[name], originals)
            parts[id(weight)] = FreeGrid(layer, solved[name], target)
        elif name in solved:
            parts[id(weight)] = _of_floats(weight, solved[name])
    # 2. All others are stored as they are.
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in parts:
            parts[id(parameter)] = FreeFloats(parameter)
    return [part for part in parts.values() if part.free]


def _of_floats(weight: nn.Parameter, solved: Solved) -> FreeFloats:
    option = solved.option
    mask = None if pruner_of(option) is None else weight.detach() != 0
    cast = option.cast if isinstance(option, PruneCast) else option
    narrow = getattr(torch, cast.dtype) if isinstance(cast, Cast) else None
    return FreeFloats(weight, mask=mask, narrow=narrow)


def _target(layer: Layer, solved: Solved, originals: Mapping[str, Layer]) -> Tensor | None:
    """The uncompressed weight of a layer whose codes are coarse enough to be trained."""
    quantize = quantizer_of(solved.option)
    assert quantize is not None
    if quantize.bits > CODES_UP_TO:
        return None
    original = originals[layer.name]
    # Where units were removed, no weight of the uncompressed layer says where to start.
    if original.shape != layer.shape:
        original = layer
    return original.as_matrix(original.weight.detach())


def widened(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _size_near(values: Tensor) -> float:
    """A power of two near the root mean square: dividing and multiplying by it are exact."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    size = norm / math.sqrt(max(1, values.numel()))
    if not 0 < size < math.inf:
        return SMALLEST_SIZE
    return max(SMALLEST_SIZE, 2.0 ** round(math.log2(size)))


def _group_sums(
    values: Float[Tensor, "out in"], group_size: int | None
) -> Float[Tensor, "out groups"]:
    size = group_size or values.shape[1]
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size)).sum(2)
