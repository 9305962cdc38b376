"""``W_hat = solve(W, options, A)``: the weights each option would put on disk, chosen to keep the
layer's output.

All options of a layer are solved together: one factorisation of the second moment, one sweep over
the stacked rows. A grouped convolution is solved group by group, stacked experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.compression.gptq import Factor, column_order, damped, factor
from curvprune.compression.grids import dequantize, scale_dtype
from curvprune.compression.moments import Moments
from curvprune.compression.pruning import prune_by_magnitude, prune_weight
from curvprune.compression.rounding import Rounded, Target, round_in_sweep, round_to_nearest
from curvprune.model import Layer
from curvprune.options import (
    Cast,
    Keep,
    Option,
    check_fits,
    pruner_of,
    quantizer_of,
    stored_dtype,
)

# Share of the way to the target that undoes the drift of a layer's inputs, and lambda over the mean
# of diag(A) in finding it. The whole way trusts the calibration data too much: SmolLM2-135M, 3 bits
# in groups of 64, 16 x 512 tokens, perplexity on another text 56.9 with 0, 53.0 with 0.3, 51.8 with
# 0.5, 55.8 with 1, all with a ridge of 0.01. A firmer ridge allows more of it: output error of
# eleven layers at 50 % sparse on other passages, over that with 0.5 and 0.01, is .997 with 0.75 and
# 0.01, 1.002 with 0.5 and 0.1, .987 with 0.75 and 0.1, .988 with 1 and 0.1. With 0.75 and 0.1
# perplexity at 3 bits went from 52.4 to 51.8 on the one calibration draw that was run both ways,
# which is no more than such runs scatter.
DRIFT = 0.75
RIDGE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """One option applied to one layer.

    Attributes:
        weight: ``(out, in)`` what a reader of the stored layer gets: ``(codes - zero) * scale`` if
            there is a grid. In the dtype of the given weight, at least float32. ``Keep`` shares
            memory with a float32 or float64 input.
        codes: ``(out, in)`` int8 in ``[-2^(b-1), 2^(b-1) - 1]``, or ``None`` without a grid.
        scale: ``(out, groups)`` float16 (bfloat16 for a bfloat16 weight).
        zero: ``(out, groups)`` int8 in the range of the codes; ``None`` for a symmetric grid. Of
            one bit it is float16, -1/2 for a symmetric grid (see `curvprune.compression.grids`).
        damping: the lambda over the mean of diag(A) really used; 0 when nothing was factorised.
        notes: what the report must say about this layer.
    """

    option: Option
    weight: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    damping: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What every option does to a layer at one point of a pass.

    Attributes:
        solved: one `Solved` per option.
        target: ``(out, in)`` what the options stand in for: the weight, moved to make up for the
            drift of the inputs.
        errors: of every option, the diagonal of ``Δ A Δᵀ / tr A``: the squared error of each of
            the layer's outputs, a mean over inputs, over their mean square. Δ is the distance to
            the target; of a cast, which makes up for nothing, to the weight. Without moments A is
            one.
    """

    solved: tuple[Solved, ...]
    target: Float[Tensor, "out in"]
    errors: Float[Tensor, "options out"]


def solve_layer(layer: Layer, options: Sequence[Option], moments: Moments | None) -> list[Solved]:
    """Apply every option to a layer of a model, around the weight that it has now.

    Args:
        moments: those of its inputs, for each of its groups; ``None``: nothing is compensated.

    Returns:
        one `Solved` per option, with the weight as `Layer.as_matrix` shapes it.

    Raises:
        ValueError: as `solve`.
    """
    weight = layer.as_matrix(layer.weight.detach())
    with _one_thread(layer):
        parts = []
        for rows, A, drift in _groups_of(layer, weight, moments):
            parts.append(_solve(rows, options, A, layer=layer.name, drift=drift)[0])
    return _of_groups(layer, parts, moments)


def round_layer(layer: Layer, options: Sequence[Option], moments: Moments | None) -> Rounding:
    """`solve_layer`, with what the options stand in for and how far they are from it.

    Cost: as `solve_layer`, and ``in^2 * out`` multiply-adds per option.
    """
    weight = layer.as_matrix(layer.weight.detach())
    parts, targets, errors = [], [], []
    with _one_thread(layer):
        for rows, A, drift in _groups_of(layer, weight, moments):
            solved, target = _solve(rows, options, A, layer=layer.name, drift=drift)
            parts.append(solved)
            targets.append(target)
            here = []
            for one in solved:
                straight = isinstance(one.option, (Keep, Cast))
                here.append(_squared_errors(one, rows if straight else target, A))
            errors.append(torch.stack(here))
    return Rounding(
        solved=tuple(_of_groups(layer, parts, moments)),
        target=torch.cat(targets),
        errors=torch.cat(errors, 1),
    )


def _groups_of(
    layer: Layer, weight: Tensor, moments: Moments | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The rows of each of a layer's groups, with the second moment and the drift of its inputs."""
    if moments is None:
        yield weight, None, None
        return
    height = layer.shape[0] // layer.groups
    for g in range(layer.groups):
        drift = None if moments.drift is None else moments.drift[g]
        yield weight[g * height : (g + 1) * height], moments.second[g], drift


def _of_groups(
    layer: Layer, parts: Sequence[list[Solved]], moments: Moments | None
) -> list[Solved]:
    """Every option's solution for the whole layer, with what there is to say of its inputs."""
    found = [_joined(of_option) for of_option in zip(*parts, strict=True)]
    if moments is None:
        return found
    notes = (*moments.notes, *_on_dead_inputs(layer, moments))
    for i, one in enumerate(found):
        # Only what was solved depends on the moments that the notes are about.
        if notes and not isinstance(one.option, (Keep, Cast)):
            found[i] = replace(one, notes=(*notes, *one.notes))
    return found


@torch.no_grad()
def _squared_errors(solved: Solved, target: Tensor, A: Tensor | None) -> Float[Tensor, " out"]:
    delta = solved.weight.to(target) - target
    if A is None:
        return delta.square().mean(1)
    # A may be short of rank, and its rounding errors negative.
    moved = delta @ A.to(delta)
    whole = A.diagonal().sum().to(delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return (moved * delta).sum(1).clamp_min_(0.0) / whole


def _on_dead_inputs(layer: Layer, moments: Moments) -> tuple[str, ...]:
    """What to say of inputs that are all zero, of the layer or of some of its groups."""
    if not moments.dead:
        return ()
    where = "" if layer.groups == 1 else f" of {moments.dead} of {layer.groups} groups"
    return (
        f"layer {layer.name}: the inputs{where} are all zero on the calibration items, so that no "
        "change costs anything there: rounded to nearest, or pruned by magnitude",
    )


@contextmanager
def _one_thread(layer: Layer) -> Iterator[None]:
    """Run small sweeps on the CPU with one thread.

    The column sweep makes many small calls. Below a few thousand inputs a second CPU thread gains
    nothing and, on a busy machine, waits at every one of them (6 times slower).
    """
    threads = torch.get_num_threads()
    if layer.weight.device.type == "cpu" and layer.shape[1] < 4096:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _joined(parts: Sequence[Solved]) -> Solved:
    """One option's solutions for the groups of a layer, below each other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    notes: list[str] = []
    for part in parts:
        notes += [note for note in part.notes if note not in notes]
    return replace(
        first,
        weight=torch.cat([part.weight for part in parts]),
        codes=_below_each_other([part.codes for part in parts]),
        scale=_below_each_other([part.scale for part in parts]),
        zero=_below_each_other([part.zero for part in parts]),
        damping=max(part.damping for part in parts),
        notes=tuple(notes),
    )


def _below_each_other(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@torch.no_grad()
def solve(
    W: Tensor,
    options: Sequence[Option],
    A: Tensor | None = None,
    *,
    layer: str,
    damping: float = 0.01,
    drift: Tensor | None = None,
) -> list[Solved]:
    """Apply every option to one layer, minimising ``tr((W_hat - W) (A + lambda I) (W_hat - W)^T)``.

    With ``drift``, the layer makes up for the error of earlier layers: ``W_hat x`` shall be what
    ``W x~`` was. As ``E|W_hat x - W x~|^2`` is the objective above around ``W + W D A^-1`` (plus a
    constant), the weight is moved by ``DRIFT`` of the way there before anything is rounded or
    pruned.

    * ``Keep`` returns ``W`` itself; ``Cast`` rounds through the narrower type.
    * ``Quantize``: scales by a search weighted with what an error costs in the sweep, then the GPTQ
      sweep in order of descending diag(A). Grids belong to the inputs in their original order.
    * ``Prune`` and ``PruneCast``: ADMM for the support, least squares on it
      (`curvprune.compression.pruning`). A sparsity is met exactly.
    * ``PruneQuantize``: the same, then ``Quantize`` around what came out, with the support fixed.
    * Without ``A``, or where it is zero, there is nothing to compensate: rounding to nearest,
      pruning by magnitude.

    Args:
        W: ``(out, in)`` float; computed in float32 unless it is float64. Not modified.
        options: any mix; all are solved on the same ``W``.
        A: ``(in, in)`` second moment of the inputs, ``E[x x^T]``, any scale; ``None`` for layers
            without one.
        layer: name used in errors and notes.
        drift: ``D (in, in)``, ``E[(x~ - x) x^T]`` with ``x~`` the inputs that the layer had in the
            uncompressed model.
        damping: lambda over the mean of diag(A). Grows tenfold, up to 1, while the Cholesky fails;
            that is noted.

    Returns:
        One `Solved` per option, in the order given.

    Raises:
        ValueError: the option does not fit the shape, a weight does not fit into its type, ``W`` or
            ``A`` is not finite, ``A`` has another shape, or it stays singular at ``damping=1``;
            each names the layer and a remedy.

    Cost:
        ``in^3`` for the factor, ``in^2 * out / 2`` multiply-adds per grid, ``in^3`` and ``9 in^2 *
        out`` per way of pruning; no forward pass.

    Source:
        GPTQ, arXiv 2210.17323; ALPS, arXiv 2406.07831; targets from the uncompressed inputs: GPTAQ,
        arXiv 2504.02692, Qronos, arXiv 2505.11695.
    """
    return _solve(W, options, A, layer=layer, damping=damping, drift=drift)[0]


@torch.no_grad()
def _solve(
    W: Tensor,
    options: Sequence[Option],
    A: Tensor | None = None,
    *,
    layer: str,
    damping: float = 0.01,
    drift: Tensor | None = None,
) -> tuple[list[Solved], Tensor]:
    """`solve`, and the target ``(out, in)`` that it stood in for."""
    _check(W, options, A, layer=layer, damping=damping)
    Wc = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    # 1. What is kept or cast asks for no decision.
    solved: dict[int, Solved] = {}
    for i, option in enumerate(options):
        if isinstance(option, Keep):
            solved[i] = Solved(option=option, weight=Wc)
        elif isinstance(option, Cast):
            solved[i] = Solved(option=option, weight=_cast(W, option, layer))
    left = [i for i in range(len(options)) if i not in solved]
    chosen = [options[i] for i in left]

    # 2. The others make up for what they change, where the inputs are known.
    results: list[Solved] = []
    around = Wc
    if A is None or not bool(A.diagonal().any()):
        # Inputs that are all zero make every change free.
        results = [_uncompensated(Wc, W.dtype, option) for option in chosen]
    elif chosen:
        H = A.detach().to(Wc)
        f = factor(H, column_order(H.diagonal()), layer=layer, damping=damping)
        target = Wc.T.contiguous()
        if drift is not None:
            target = target + _moved(H, drift.to(target).T @ target, f.damping)
            around = target.T
        results = _compensated(target, W.dtype, chosen, H, f)

    # 3. In the order that was asked for.
    for i, one in zip(left, results, strict=True):
        if _is_lost(one, W.dtype):
            note = (
                f"layer {layer}: what {one.option.key} keeps was not refitted, since the fit "
                "overflows (inputs nearly zero, or dependent): pruned by magnitude"
            )
            plain = _uncompensated(Wc, W.dtype, one.option)
            one = replace(plain, notes=(*plain.notes, note))
        _check_range(one, layer, _name(W.dtype))
        solved[i] = one
    return [solved[i] for i in range(len(options))], around


def _moved(H: Tensor, gradient: Tensor, damping: float) -> Tensor:
    # The drift is that of all items: half of 16 x 512 tokens take a fifth less time, but 3 bits
    # lose 1.5 of perplexity, and 0.9 where the half is every second item and H its own second
    # moment.
    L = torch.linalg.cholesky(damped(H, max(damping, RIDGE)))
    return torch.cholesky_solve(gradient, L).mul_(DRIFT)


def _compensated(
    target: Tensor, dtype: torch.dtype, options: Sequence[Option], H: Tensor, f: Factor
) -> list[Solved]:
    """Options that round or prune, around ``target (in, out)``, for a layer stored in ``dtype``."""
    # 1. Prune, once for all options that prune alike.
    sparse: dict[str, Tensor] = {}
    for prune in map(pruner_of, options):
        if prune is not None and prune.key not in sparse:
            sparse[prune.key] = prune_weight(target, damped(H, f.damping), prune)

    # 2. Round, all together.
    sources: list[Tensor] = []
    targets: list[Target] = []
    for option in options:
        prune, quantize = pruner_of(option), quantizer_of(option)
        source = target if prune is None else sparse[prune.key]
        sources.append(source)
        if quantize is not None:
            targets.append(Target(quantize=quantize, weight=source, sparse=prune is not None))
    rounded: Iterator[Rounded] = iter(())
    if targets:
        stored = scale_dtype(dtype)
        rounded = iter(round_in_sweep(targets, H.diagonal(), f, stored=stored))

    # 3. To each option its own.
    results: list[Solved] = []
    for option, source in zip(options, sources, strict=True):
        if quantizer_of(option) is not None:
            one = _on_grid(option, next(rounded), dtype)
        else:
            one = _as_floats(option, source.T.contiguous(), dtype)
        results.append(replace(one, damping=f.damping, notes=f.notes))
    return results


def _uncompensated(W: Tensor, dtype: torch.dtype, option: Option) -> Solved:
    prune, quantize = pruner_of(option), quantizer_of(option)
    weight = W if prune is None else prune_by_magnitude(W, prune)
    if quantize is None:
        return _as_floats(option, weight, dtype)
    target = Target(quantize=quantize, weight=W.T.contiguous())
    return _on_grid(option, round_to_nearest(weight, target, stored=scale_dtype(dtype)), dtype)


def _on_grid(option: Option, rounded: Rounded, dtype: torch.dtype) -> Solved:
    quantize = quantizer_of(option)
    assert quantize is not None
    codes, scale, zero = rounded.codes, rounded.scale, rounded.zero
    compute = torch.promote_types(dtype, torch.float32)
    weight = dequantize(codes, scale, zero, quantize.group_size, dtype=compute)
    return Solved(option=option, weight=weight, codes=codes, scale=scale, zero=zero)


def _as_floats(option: Option, weight: Tensor, dtype: torch.dtype) -> Solved:
    stored = getattr(torch, stored_dtype(option, _name(dtype)))
    compute = torch.promote_types(dtype, torch.float32)
    return Solved(option=option, weight=weight.to(stored).to(compute))


def _cast(W: Tensor, option: Cast, layer: str) -> Tensor:
    narrow = W.detach().to(getattr(torch, option.dtype))
    if not bool(narrow.isfinite().all()):
        raise ValueError(
            f"layer {layer}: weights up to {float(W.abs().max()):g} overflow {option.dtype}; cast "
            "to bfloat16"
        )
    return narrow.to(torch.promote_types(W.dtype, torch.float32))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_lost(solved: Solved, dtype: torch.dtype) -> bool:
    """Whether a fit overflows even in a type of float32's range: its equations are singular."""
    if solved.codes is not None or stored_dtype(solved.option, _name(dtype)) == "float16":
        return False
    return not bool(solved.weight.isfinite().all())


def _check_range(solved: Solved, layer: str, dtype: str) -> None:
    """What is kept makes up for what is pruned, and may grow beyond its type."""
    if solved.codes is None and not bool(solved.weight.isfinite().all()):
        raise ValueError(
            f"layer {layer}: option {solved.option.key}: weights overflow "
            f"{stored_dtype(solved.option, dtype)}; cast to bfloat16, or use a model in bfloat16 "
            "or float32"
        )


def _check(
    W: Tensor, options: Sequence[Option], A: Tensor | None, *, layer: str, damping: float
) -> None:
    if W.ndim != 2 or not W.is_floating_point() or W.numel() == 0:
        raise ValueError(
            f"layer {layer}: expected a float weight (out, in), got {W.dtype} of shape "
            f"{tuple(W.shape)}"
        )
    if not damping >= 0:
        raise ValueError(f"layer {layer}: damping={damping!r} must not be negative (0.01 is usual)")
    for option in options:
        check_fits(option, layer, (W.shape[0], W.shape[1]))
    if not bool(W.isfinite().all()):
        raise ValueError(
            f"layer {layer}: its weight holds NaN or infinite values; repair the model or leave "
            "the layer out"
        )
    if A is None:
        return
    if A.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"layer {layer}: expected the second moment of its {W.shape[1]} inputs, got shape "
            f"{tuple(A.shape)}"
        )
    if not bool(A.isfinite().all()):
        raise ValueError(
            f"layer {layer}: the second moment of its inputs holds NaN or infinite values; "
            "calibrate with other data or in float32, or leave the layer out"
        )
