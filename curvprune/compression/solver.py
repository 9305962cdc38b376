"""``W_hat = solve(W, options, A)``: the weights each option would put on disk, chosen to keep the
layer's output.

All options of a layer are solved together: one factorisation of the second moment, one sweep over
the stacked rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvprune.compression import pruning as support
from curvprune.compression.gptq import Factor, Rows, column_order, damped, factor, sweep_columns
from curvprune.compression.grids import (
    code_range,
    dequantize,
    quantize_to_grid,
    scale_dtype,
    search_grid,
    spread,
)
from curvprune.options import (
    Cast,
    Keep,
    Option,
    Prune,
    check_fits,
    pruner_of,
    quantizer_of,
    stored_dtype,
)

__all__ = ["Solved", "dequantize", "quantize_to_grid", "search_grid", "solve"]

STACKED_ROWS = (
    16384  # rows swept at a time: enough to hide the cost of a column, few enough to bound memory
)

# Weight of 1 / U_jj^2 against diag(A) in the scale search: 1 trusts the calibration data too much.
# SmolLM2-135M (six layers, groups of 64), output error on other text than calibrated on, at 2 / 3 /
# 4 bits: .0258 / .00659 / .00170 with 0, .0245 / .00602 / .00151 with 0.75, .0248 / .00606 / .00153
# with 1.
ABSORBED = 0.75

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
      sweep in order of descending diag(A). Grids belong to the original positions of the inputs.
    * ``Prune`` and ``PruneCast``: ADMM for the support, least squares on it
      (`curvprune.compression.pruning`). A sparsity is met exactly.
    * ``PruneQuantize``: the same, then ``Quantize`` around what came out, with the support fixed.
    * Without ``A`` there is nothing to compensate: rounding to nearest, pruning by magnitude.

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
            ``A`` is not finite, ``A`` is zero or has another shape, or it stays singular at
            ``damping=1``; each names the layer and a remedy.

    Cost:
        ``in^3`` for the factor, ``in^2 * out / 2`` multiply-adds per grid, ``in^3`` and ``9 in^2 *
        out`` per way of pruning; no forward pass.

    Source:
        GPTQ, arXiv 2210.17323; ALPS, arXiv 2406.07831; targets from the uncompressed inputs: GPTAQ,
        arXiv 2504.02692, Qronos, arXiv 2505.11695.
    """
    _check(W, options, A, layer=layer, damping=damping)
    Wc = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    H = None if A is None else A.detach().to(Wc)
    solved: dict[int, Solved] = {}
    batch: list[int] = []
    for i, option in enumerate(options):
        if isinstance(option, Keep):
            solved[i] = Solved(option=option, weight=Wc)
        elif isinstance(option, Cast):
            solved[i] = Solved(option=option, weight=_cast(W, option, layer))
        else:
            batch.append(i)
    if batch:
        chosen = [options[i] for i in batch]
        Wt = Wc.T.contiguous()
        if H is None:
            results = [_uncompensated(W, Wt, option) for option in chosen]
        else:
            f = factor(H, column_order(H.diagonal()), layer=layer, damping=damping)
            target = Wt if drift is None else Wt + _moved(H, drift.to(Wt).T @ Wt, f.damping)
            results = _compensated(W, target, chosen, H, f)
        for one in results:
            _check_range(one, layer, str(W.dtype).removeprefix("torch."))
        solved.update(zip(batch, results, strict=True))
    return [solved[i] for i in range(len(options))]


def _moved(H: Tensor, gradient: Tensor, damping: float) -> Tensor:
    # The drift is that of all items: half of 16 x 512 tokens take a fifth less time, but 3 bits
    # lose 1.5 of perplexity, and 0.9 where the half is every second item and H its own second
    # moment.
    L = torch.linalg.cholesky(damped(H, max(damping, RIDGE)))
    return torch.cholesky_solve(gradient, L).mul_(DRIFT)


def _compensated(
    W: Tensor, target: Tensor, batch: Sequence[Option], H: Tensor, f: Factor
) -> list[Solved]:
    sparse: dict[str, Tensor] = {}
    for prune in map(pruner_of, batch):
        if prune is not None and prune.key not in sparse:
            sparse[prune.key] = support.prune(
                target, damped(H, f.damping), sparsity=prune.sparsity, nm=prune.nm
            )
    rounded = [option for option in batch if quantizer_of(option) is not None]
    codes = iter(
        _rounded(W, target, rounded, sparse, _importance(H.diagonal(), f), f) if rounded else ()
    )
    results: list[Solved] = []
    for option in batch:
        prune = pruner_of(option)
        if prune is None or quantizer_of(option) is not None:
            grid, result = next(codes)
        else:
            grid, result = None, sparse[prune.key]
        results.append(_packaged(W, option, grid, result.T.contiguous(), f.damping, f.notes))
    return results


def _rounded(
    W: Tensor,
    target: Tensor,
    batch: Sequence[Option],
    sparse: Mapping[str, Tensor],
    importance: Tensor,
    f: Factor,
) -> list[tuple[tuple[Tensor, Tensor | None], Tensor]]:
    """The grid of each option and its codes ``(in, out)``. Around a refitted sparse weight and
    around the target the objective is the same up to a constant, for all weights on its support;
    what is left to absorb is the rounding."""
    width, out = target.shape
    step = max(1, STACKED_ROWS // len(batch))
    pruners = [pruner_of(option) for option in batch]
    sources = [target if p is None else sparse[p.key] for p in pruners]
    grids = [
        _grid(W, source, option, importance) for source, option in zip(sources, batch, strict=True)
    ]
    results = [torch.empty(width, out, dtype=torch.int8, device=target.device) for _ in batch]
    for start in range(0, out, step):
        part = slice(start, start + step)
        rows: list[Rows] = []
        zeros: list[Tensor | None] = []
        for option, prune, source, grid in zip(batch, pruners, sources, grids, strict=True):
            quantize = quantizer_of(option)
            assert quantize is not None and grid is not None
            weight, size = source[:, part], quantize.group_size
            scale = grid[0][:, part].to(target)
            zero = torch.zeros_like(scale) if grid[1] is None else grid[1][:, part].to(target)
            if quantize.bits == 1:
                # The sweep knows integers only. It sees nothing but differences of weights and
                # their values, so both may be moved together, by what makes the zero point an
                # integer.
                weight = weight + spread(zero * scale, width, size, dim=0)
                zero = torch.zeros_like(scale)
            low, high = (bound - zero for bound in code_range(quantize.bits))
            zeros.append(None if grid[1] is None else zero)
            keep = None if prune is None else weight != 0
            rows.append(
                Rows(weight=weight, scale=scale, low=low, high=high, group_size=size, keep=keep)
            )
        for result, row, shift, value in zip(
            results, rows, zeros, sweep_columns(rows, f), strict=True
        ):
            result[:, part] = (
                value if shift is None else value + spread(shift, width, row.group_size, dim=0)
            )
    return [(grid, result) for grid, result in zip(grids, results, strict=True) if grid is not None]


def _importance(diagonal: Tensor, f: Factor) -> Tensor:
    """What an error of each input costs, for the grid search, ``(in,)``.

    Alone, it costs ``H_jj``. Inside the sweep the later columns absorb a part, and ``1 / U_jj^2``
    is left.
    """
    left = torch.empty_like(diagonal)
    left[f.order] = f.U.diagonal().square().reciprocal()
    return left**ABSORBED * (diagonal + f.damping * diagonal.mean()) ** (1 - ABSORBED)


def _uncompensated(W: Tensor, Wt: Tensor, option: Option) -> Solved:
    grid, prune, quantize = _grid(W, Wt, option, None), pruner_of(option), quantizer_of(option)
    result = Wt.T.contiguous()
    if prune is not None:
        result = _smallest_dropped(result, prune)
    if grid is not None and quantize is not None:
        scale, zero = (None if part is None else part.T for part in grid)
        assert scale is not None
        result = quantize_to_grid(
            result, scale, zero, bits=quantize.bits, group_size=quantize.group_size
        )
    return _packaged(W, option, grid, result, 0.0, ())


def _grid(
    W: Tensor, Wt: Tensor, option: Option, importance: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    quantize = quantizer_of(option)
    if quantize is None:
        return None
    return search_grid(
        Wt,
        bits=quantize.bits,
        group_size=quantize.group_size,
        symmetric=quantize.symmetric,
        importance=importance,
        stored=scale_dtype(W.dtype),
    )


def _packaged(
    W: Tensor,
    option: Option,
    grid: tuple[Tensor, Tensor | None] | None,
    result: Tensor,
    damping: float,
    notes: tuple[str, ...],
) -> Solved:
    compute = torch.promote_types(W.dtype, torch.float32)
    if grid is None:
        stored = getattr(torch, stored_dtype(option, str(W.dtype).removeprefix("torch.")))
        return Solved(
            option=option, weight=result.to(stored).to(compute), damping=damping, notes=notes
        )
    scale, zero = grid[0].T.contiguous(), None if grid[1] is None else grid[1].T.contiguous()
    quantize = quantizer_of(option)
    assert quantize is not None
    weight = dequantize(result, scale, zero, quantize.group_size, dtype=compute)
    return Solved(
        option=option,
        weight=weight,
        codes=result,
        scale=scale,
        zero=zero,
        damping=damping,
        notes=notes,
    )


def _smallest_dropped(W: Tensor, prune: Prune) -> Tensor:
    if prune.sparsity is not None:
        drop = (
            W.abs()
            .flatten()
            .topk(round(prune.sparsity * W.numel()), largest=False, sorted=False)
            .indices
        )
        return W.flatten().index_fill(0, drop, 0).view_as(W)
    assert prune.nm is not None
    n, m = prune.nm
    groups = W.reshape(len(W), -1, m)
    drop = groups.abs().topk(m - n, dim=2, largest=False, sorted=False).indices
    return groups.scatter(2, drop, 0).view_as(W)


def _cast(W: Tensor, option: Cast, layer: str) -> Tensor:
    narrow = W.detach().to(getattr(torch, option.dtype))
    if not bool(narrow.isfinite().all()):
        raise ValueError(
            f"layer {layer}: weights up to {float(W.abs().max()):g} overflow {option.dtype}; cast "
            "to bfloat16"
        )
    return narrow.to(torch.promote_types(W.dtype, torch.float32))


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
    if not bool(A.diagonal().any()):
        raise ValueError(
            f"layer {layer}: it received no inputs (their second moment is zero); "
            "calibrate with data that reaches it, or leave the layer out"
        )
