"""What can be done to one layer, and how many bytes each choice occupies on disk.

An option is a small frozen record with a stable text ``key`` (used in files and reports).
``OPTIONS`` maps the word that a recipe writes to its class; `parse_option` reads the YAML form,
`option_from_key` the text form.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 2  # scales are stored as float16
# The zero points of one bit are no integers: see `curvprune.compression.grids`.
ONE_BIT_ZERO_BYTES = 2
SHAPE_BYTES = 16  # pack-quantized stores `weight_shape` as two int64

# How a layer lies on disk: every weight as a float; every weight as a code (compressed-tensors'
# ``pack-quantized``), zero points packed or, as ``blocks``, one byte each; or a bitmask of the
# weights that were kept, and those alone, as floats or codes.
Form = Literal["dense", "packed", "blocks", "sparse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Leave the layer as it is."""

    @property
    def key(self) -> str:
        return "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Store the weight in a narrower float type (``"float16"`` or ``"bfloat16"``)."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"cast: unknown dtype {self.dtype!r}; choose float16 or bfloat16")

    @property
    def key(self) -> str:
        return self.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantize:
    """Round to a uniform integer grid.

    Args:
        bits: 1 to 8.
        group_size: inputs that share a scale; ``None`` means one scale per output channel. Where it
            does not divide the inputs, the last group is shorter.
        symmetric: zero is the middle of the grid; otherwise each group has a zero point of its own.
            The values of one bit are -s and s (symmetric), or any two.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        # A bool is an int to Python, and True would be one bit.
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in BITS:
            nearest = 4
            if isinstance(self.bits, int):
                nearest = min(BITS, key=lambda b: abs(b - self.bits))
            raise ValueError(
                f"quantize: bits={self.bits!r} is not offered; choose from {BITS} (nearest: "
                f"{nearest})"
            )
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"quantize: group_size={self.group_size!r} must be a positive integer or null "
                "(per channel)"
            )

    @property
    def key(self) -> str:
        grid = "pc" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}-{grid}-{'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Set weights to zero: a share of the layer (``sparsity``) or all but N of every M consecutive
    inputs (``pattern="2:4"``)."""

    sparsity: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                'prune: give exactly one of sparsity (for example 0.5) or pattern ("2:4")'
            )
        if self.sparsity is not None and not (
            isinstance(self.sparsity, (int, float)) and 0.0 < self.sparsity < 1.0
        ):
            raise ValueError(
                f"prune: sparsity={self.sparsity!r} must lie strictly between 0 and 1 (for "
                "example 0.5)"
            )
        if self.pattern is not None:
            match = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise ValueError(
                    f'prune: pattern={self.pattern!r} must be "N:M" with 0 < N < M (for example '
                    '"2:4")'
                )

    @property
    def nm(self) -> tuple[int, int] | None:
        """``(N, M)``: N of every M consecutive inputs are kept, or ``None`` for unstructured
        sparsity."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def key(self) -> str:
        return f"prune{self.sparsity if self.pattern is None else self.pattern}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneQuantize:
    """Prune and round in one sweep: pruned weights sit on the grid's zero."""

    prune: Prune
    quantize: Quantize

    def __post_init__(self) -> None:
        if self.quantize.bits == 1:
            raise ValueError(
                "prune with quantize: bits=1 has two values and no room for the zero of a pruned "
                "weight (nearest: 2)"
            )

    @property
    def key(self) -> str:
        return f"{self.prune.key}+{self.quantize.key}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneCast:
    """Prune and store what is kept in a narrower float type."""

    prune: Prune
    cast: Cast

    @property
    def key(self) -> str:
        return f"{self.prune.key}+{self.cast.key}"


Option = Keep | Cast | Quantize | Prune | PruneQuantize | PruneCast
OPTIONS: dict[str, type] = {"keep": Keep, "cast": Cast, "quantize": Quantize, "prune": Prune}


def quantizer_of(option: Option) -> Quantize | None:
    """The rounding part of an option, if it has one."""
    if isinstance(option, PruneQuantize):
        return option.quantize
    return option if isinstance(option, Quantize) else None


def pruner_of(option: Option) -> Prune | None:
    """The pruning part of an option, if it has one."""
    if isinstance(option, (PruneQuantize, PruneCast)):
        return option.prune
    return option if isinstance(option, Prune) else None


def stored_dtype(option: Option, dtype: str) -> str:
    """The float type in which an option's weights are stored; ``dtype`` is that of the layer."""
    cast = option.cast if isinstance(option, PruneCast) else option
    return cast.dtype if isinstance(cast, Cast) else dtype


def kept_weights(prune: Prune, shape: tuple[int, int], *, groups: int = 1) -> int:
    """How many of a layer's weights are kept. ``groups`` are pruned one by one, each to its
    share."""
    out, width = shape
    if prune.nm is not None:
        return out * width // prune.nm[1] * prune.nm[0]
    assert prune.sparsity is not None
    # Rounded group by group, as they are pruned.
    numel = out // groups * width
    return groups * (numel - round(prune.sparsity * numel))


def check_fits(
    option: Option, layer: str, shape: tuple[int, int], *, reader: str | None = None
) -> None:
    """Raise ``ValueError`` naming layer and nearest valid value if the option cannot apply to
    ``W[out, in]``.

    Args:
        reader: who must read the layer packed, besides curvprune: nobody (``None``),
            ``"transformers"`` or ``"vllm"``; see `curvprune.artifact.bytes_on_disk.reader_of`.
    """
    _, width = shape
    quantize, prune = quantizer_of(option), pruner_of(option)
    if quantize is not None and quantize.bits > 1 and reader is not None:
        asked = quantize.group_size
        if asked is not None and width % asked:
            nearest = min(_divisors(width), key=lambda d: (abs(d - asked), -d))
            raise ValueError(
                f"layer {layer}: group_size={asked} does not divide its {width} inputs, and "
                f"{reader} cannot read a shorter last group; nearest that does: {nearest} (or "
                "null for one scale per channel), or target: curvprune (in Python "
                'Settings(target="curvprune"))'
            )
    if prune is not None and prune.nm is not None and width % prune.nm[1]:
        raise ValueError(
            f"layer {layer}: pattern {prune.pattern} needs a multiple of {prune.nm[1]} inputs, "
            f"the layer has {width}; use prune: {{sparsity: {1 - prune.nm[0] / prune.nm[1]:g}}} "
            "there or leave the layer out"
        )


def _divisors(width: int) -> list[int]:
    return [d for d in range(1, width + 1) if width % d == 0]


def stored_bytes(
    option: Option, shape: tuple[int, int], *, dtype: str, form: Form, groups: int = 1
) -> int:
    """Bytes of the layer's weight tensors on disk.

    Args:
        shape: ``(out, in)`` of the weight as a matrix.
        dtype: the layer's own type, in which weights are stored that are neither cast nor rounded.
        form: how the layer lies on disk; `curvprune.artifact.bytes_on_disk.form_of` says which form
            an artifact takes.
        groups: see `kept_weights`.

    Packed (compressed-tensors ``pack-quantized``): codes in int32 words along the inputs, float16
    scales, zero points in int32 words along the outputs (float16 of one bit), the shape as two
    int64. Blocks: the same, with one byte for a zero point. Sparse: one bit a weight, the kept
    weights or their codes in one run, scales and zero points as packed, the shape.
    """
    out, width = shape
    prune, quantize = pruner_of(option), quantizer_of(option)
    each = DTYPE_BYTES[stored_dtype(option, dtype)]
    # Dense: every weight.
    if form == "dense":
        return out * width * each
    # Sparse: one bit a weight, and the kept ones, or their codes in words of 32 bits.
    if form == "sparse":
        if prune is None:
            raise ValueError(f"option {option.key} prunes nothing: it has no sparse form")
        kept = kept_weights(prune, shape, groups=groups)
        mask = math.ceil(out * width / 8)
        if quantize is None:
            return mask + kept * each + SHAPE_BYTES
        codes = math.ceil(kept * quantize.bits / 32) * 4
        return mask + codes + SHAPE_BYTES + _grid_bytes(quantize, shape)
    # Packed: every code, each row in words of its own.
    if quantize is None:
        raise ValueError(f"option {option.key} has no codes: it has no packed form")
    codes = out * math.ceil(width * quantize.bits / 32) * 4
    return codes + SHAPE_BYTES + _grid_bytes(quantize, shape, whole=form == "blocks")


def _grid_bytes(quantize: Quantize, shape: tuple[int, int], *, whole: bool = False) -> int:
    """Scales and zero points, these in ``whole`` bytes or packed."""
    out, width = shape
    groups = 1 if quantize.group_size is None else math.ceil(width / quantize.group_size)
    total = out * groups * SCALE_BYTES
    # Whole numbers are packed along the outputs, group by group.
    if not quantize.symmetric and quantize.bits == 1:
        total += out * groups * ONE_BIT_ZERO_BYTES
    elif not quantize.symmetric and whole:
        total += out * groups
    elif not quantize.symmetric:
        total += math.ceil(out * quantize.bits / 32) * 4 * groups
    return total


def parse_option(value: object) -> Option:
    """Read the YAML form: ``keep``, ``{cast: float16}``, ``{quantize: {bits: 4, group_size: 64}}``,
    ``{prune: {sparsity: 0.5}}``, or ``prune`` beside ``quantize`` or ``cast`` in one mapping."""
    if value == "keep":
        return Keep()
    if not isinstance(value, Mapping) or not value or not all(isinstance(k, str) for k in value):
        raise ValueError(
            f"option {value!r}: expected one of {sorted(OPTIONS)}, for example "
            "{quantize: {bits: 4}}"
        )
    unknown = set(value) - {"cast", "quantize", "prune"}
    if unknown or (len(value) > 1 and set(value) not in ({"prune", "quantize"}, {"prune", "cast"})):
        raise ValueError(
            f"option {dict(value)!r}: expected keep, cast, quantize, prune, or prune with "
            "quantize or with cast"
        )
    parts = {word: _parse_part(word, arguments) for word, arguments in value.items()}
    prune, other = parts.get("prune"), parts.get("quantize", parts.get("cast"))
    if isinstance(prune, Prune) and isinstance(other, Quantize):
        return PruneQuantize(prune=prune, quantize=other)
    if isinstance(prune, Prune) and isinstance(other, Cast):
        return PruneCast(prune=prune, cast=other)
    return next(iter(parts.values()))


def _parse_part(word: str, arguments: Any) -> Cast | Quantize | Prune:
    """One entry of the YAML form."""
    if word == "cast":
        return Cast(dtype=arguments)
    kind: type[Quantize] | type[Prune] = Quantize if word == "quantize" else Prune
    fields = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(arguments, Mapping) or set(arguments) - fields:
        raise ValueError(
            f"{word}: {arguments!r}: expected a mapping with keys from {sorted(fields)}"
        )
    return kind(**arguments)


def option_from_key(key: str) -> Option:
    """The inverse of ``option.key``."""
    if key == "keep":
        return Keep()
    if key in ("float16", "bfloat16"):
        return Cast(dtype=key)
    # Two in one: a pruned layer whose kept weights are cast or rounded.
    if "+" in key:
        prune, other = map(option_from_key, key.split("+"))
        if isinstance(prune, Prune) and isinstance(other, Cast):
            return PruneCast(prune=prune, cast=other)
        if isinstance(prune, Prune) and isinstance(other, Quantize):
            return PruneQuantize(prune=prune, quantize=other)
    if grid := re.fullmatch(r"int(\d+)-(pc|g(\d+))-(sym|asym)", key):
        group_size = int(grid[3]) if grid[3] else None
        return Quantize(bits=int(grid[1]), group_size=group_size, symmetric=grid[4] == "sym")
    if pattern := re.fullmatch(r"prune(\d+:\d+)", key):
        return Prune(pattern=pattern[1])
    if share := re.fullmatch(r"prune([0-9.e-]+)", key):
        return Prune(sparsity=float(share[1]))
    raise ValueError(
        f"{key!r} is not an option key such as int4-g64-asym, prune0.5, prune2:4+float16 or float16"
    )
