"""Solvers against exhaustive search, textbook inverse updates, closed forms and
compressed-tensors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize
from torch import Tensor

from curvprune.compression import (
    DRIFT,
    MIN_SCALE,
    RIDGE,
    Solved,
    code_range,
    column_order,
    dequantize,
    factor,
    quantize_to_grid,
    solve,
)
from curvprune.options import (
    Cast,
    Keep,
    Option,
    Prune,
    PruneQuantize,
    Quantize,
    pruner_of,
    quantizer_of,
)
from tests.matrices import (
    DAMPING,
    PRUNERS,
    QUANTIZERS,
    UNEVEN,
    damped,
    nearest,
    output_error,
    points,
    second_moment,
    weight,
)


def textbook(W: Tensor, H: Tensor, s: Solved, order: Tensor, pruned: Tensor) -> Tensor:
    """Optimal brain surgeon in a fixed order: the inverse Hessian of the columns left, updated
    explicitly (float64)."""
    W, pruned = W.double()[:, order].clone(), pruned[:, order]
    inverse = torch.linalg.inv(H.double()[order][:, order])
    for j in range(len(order)):
        q = torch.where(pruned[:, j], 0.0, nearest(s, int(order[j]), W[:, j]))
        change = (W[:, j] - q) / inverse[j, j]
        W[:, j:] -= change[:, None] * inverse[j, j:]
        W[:, j] = q
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    result = torch.empty_like(W)
    result[:, order] = W
    return result


@pytest.mark.parametrize("shape", [(1, 20), (6, 20), (3, 140), (4, 260)])
def test_sweep_equals_the_textbook(shape: tuple[int, int]) -> None:
    W, A = weight(*shape), second_moment(shape[1])
    order = column_order(A.diagonal())
    options: list[Option] = [*QUANTIZERS, *UNEVEN, *PRUNERS[4:]]
    for s in solve(W, options, A, layer="x", damping=DAMPING):
        start, prune = W, pruner_of(s.option)
        if prune is not None:
            (sparse,) = solve(W, [prune], A, layer="x", damping=DAMPING)
            start = sparse.weight
        expected = textbook(start, damped(A), s, order, start == 0)
        torch.testing.assert_close(s.weight, expected, rtol=1e-8, atol=1e-10)


def test_diagonal_second_moment_reaches_the_exhaustive_optimum() -> None:
    W, A = weight(1, 4), torch.diag(torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64))
    (s,) = solve(W, [Quantize(bits=2, symmetric=False)], A, layer="x")
    grid = [points(s, j)[0].tolist() for j in range(4)]
    best = min(
        output_error(torch.tensor([values], dtype=torch.float64), W, A)
        for values in itertools.product(*grid)
    )
    assert math.isclose(output_error(s.weight, W, A), best, rel_tol=1e-12)


def test_compensation_is_between_the_optimum_and_rounding() -> None:
    W, A = weight(200, 4), second_moment(4)
    (s,) = solve(W, [Quantize(bits=2)], A, layer="x")
    H = damped(A)
    combinations = torch.tensor(list(itertools.product(range(4), repeat=4)))
    plain = torch.stack([nearest(s, j, W[:, j]) for j in range(4)], dim=1)
    optimum = 0.0
    for row in range(len(W)):
        values = torch.stack([points(s, j)[row][combinations[:, j]] for j in range(4)], dim=1)
        d = values - W[row]
        optimum += float(((d @ H) * d).sum(dim=1).min())
    reached, rounded = output_error(s.weight, W, H), output_error(plain, W, H)
    assert optimum <= reached * (1 + 1e-12)
    assert reached < 0.9 * rounded


@pytest.mark.parametrize("width", [1, 40, 301])  # the last is inverted by halves, of odd size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factor_inverts(dtype: torch.dtype, width: int) -> None:
    A = second_moment(width, dtype=dtype)
    f = factor(A, column_order(A.diagonal()), layer="x", damping=DAMPING)
    H = damped(A.double())[f.order][:, f.order]
    assert torch.equal(f.U, f.U.triu())
    torch.testing.assert_close(
        f.U.double().T @ f.U.double() @ H,
        torch.eye(width, dtype=torch.float64),
        rtol=0,
        atol=1e-10 if dtype == torch.float64 else 1e-3,
    )
    assert (f.damping, f.notes) == (DAMPING, ())


def test_columns_go_by_descending_second_moment() -> None:
    diagonal = torch.tensor([1.0, 2.0, 5.0, 5.0, 9.0, 0.0, 3.0, 1.0])
    assert column_order(diagonal).tolist() == [4, 2, 3, 6, 1, 0, 7, 5]


def degenerate_weight(dtype: torch.dtype) -> Tensor:
    W = weight(8, 20, dtype=dtype)
    W[0] = 0
    W[1, 5:10] = 0
    W[2] = 0.25
    W[3] = -0.25
    W[4], W[4, 7] = 1e-4, 50.0
    W[5] = 2e-7  # below the smallest float16 for most grids
    W[6] *= 1e8
    return W


EVERY_GRID: list[Option] = [
    Quantize(bits=b, group_size=g, symmetric=s)
    for b, g, s in itertools.product((2, 4, 8), (5, None), (True, False))
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_degenerate_groups_have_grids(dtype: torch.dtype, with_inputs: bool) -> None:
    A = second_moment(20, dtype=dtype) if with_inputs else None
    for s in solve(degenerate_weight(dtype), EVERY_GRID, A, layer="x"):
        q = quantizer_of(s.option)
        assert q is not None and s.scale is not None and s.codes is not None
        assert bool(s.weight.isfinite().all())
        assert bool(s.scale.isfinite().all() and (s.scale > 0).all())
        assert bool((s.weight[0] == 0).all())
        if q.group_size == 5:
            assert bool((s.weight[1, 5:10] == 0).all())
        low, high = code_range(q.bits)
        for codes in (s.codes, s.codes if s.zero is None else s.zero):
            assert low <= int(codes.min()) and int(codes.max()) <= high


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_degenerate_groups_are_rounded_as_well_as_they_can_be(dtype: torch.dtype) -> None:
    W = degenerate_weight(dtype)
    for s in solve(W, EVERY_GRID, None, layer="x"):
        # A constant is a point of the grid up to the rounding of the scale.
        torch.testing.assert_close(s.weight[2:4], W[2:4], rtol=2**-10, atol=0)
        assert abs(float(s.weight[4, 7]) - 50) < 50 / 4
        assert float((s.weight[5] - W[5]).abs().max()) <= MIN_SCALE / 2
        assert float(s.weight[6].abs().max()) >= 65504, "saturates at the largest scale"


def test_damping_grows_on_a_singular_second_moment() -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    (s, p) = solve(
        weight(3, 12, dtype=torch.float32),
        [Quantize(bits=4), Prune(sparsity=0.5)],
        torch.outer(x, x),
        layer="mlp.up",
        damping=0.0,
    )
    assert s.damping > 0 and p.damping == s.damping
    assert any("mlp.up" in note and f"{s.damping:g}" in note for note in s.notes)
    assert bool(s.weight.isfinite().all()) and bool(p.weight.isfinite().all())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_are_rounded_to_nearest(damping: float) -> None:
    W, A = weight(5, 20), second_moment(20)
    A[:, [3, 11]] = 0
    A[[3, 11]] = 0
    s, p = solve(
        W, [Quantize(bits=4, group_size=5), Prune(sparsity=0.1)], A, layer="x", damping=damping
    )
    assert s.damping == damping and s.notes == ()
    for j in (3, 11):
        assert torch.equal(s.weight[:, j], nearest(s, j, W[:, j]))
    left = torch.where(p.weight[:, [3, 11]] == 0, 0.0, W[:, [3, 11]])
    torch.testing.assert_close(p.weight[:, [3, 11]], left, rtol=1e-12, atol=0)


BAD = [
    (
        lambda W, A: (W, [Quantize(bits=4)], A * math.nan),
        "layer mlp.up.*NaN or infinite.*calibrate",
    ),
    (lambda W, A: (W, [Quantize(bits=4)], A[:4, :4]), r"layer mlp.up.*12 inputs.*\(4, 4\)"),
    (
        lambda W, A: (W, [Quantize(bits=4)], -A),
        "layer mlp.up.*not positive definite.*more or other data.*leave",
    ),
    (lambda W, A: (W / 0, [Quantize(bits=4)], A), "layer mlp.up.*weight holds NaN"),
    (lambda W, A: (W[0], [Quantize(bits=4)], A), r"layer mlp.up.*\(out, in\).*\(12,\)"),
    (lambda W, A: (W, [Prune(pattern="2:5")], A), "layer mlp.up.*multiple of 5"),
    (
        lambda W, A: (W * 1e8, [Cast(dtype="float16")], A),
        "layer mlp.up.*overflow float16.*bfloat16",
    ),
]


def test_inputs_that_are_all_zero_make_every_change_free():
    """As without a moment: to nearest, and by magnitude."""
    W, options = weight(3, 12), [Quantize(bits=4), Prune(sparsity=0.5)]
    found = solve(W, options, torch.zeros(12, 12, dtype=W.dtype), layer="x")
    for one, other in zip(found, solve(W, options, None, layer="x"), strict=True):
        assert torch.equal(one.weight, other.weight)
    kept = W.abs() > W.abs().flatten().kthvalue(18).values
    assert torch.equal(found[1].weight != 0, kept)


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_name_the_layer_and_a_remedy(arguments, message):
    W, options, A = arguments(weight(3, 12), second_moment(12))
    with pytest.raises(ValueError, match=message):
        solve(W, options, A, layer="mlp.up")


def test_negative_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="layer x: damping=-1"):
        solve(weight(3, 12), [Keep()], None, layer="x", damping=-1)


@pytest.mark.parametrize(
    "option", [*QUANTIZERS, Quantize(bits=7, group_size=8), PRUNERS[4], PRUNERS[5]]
)
def test_compressed_tensors_reads_the_same_weight(option: Quantize | PruneQuantize) -> None:
    W, A = weight(6, 40, dtype=torch.float32), second_moment(40, dtype=torch.float32)
    (s,) = solve(W, [option], A, layer="x")
    q = quantizer_of(option)
    assert q is not None and s.codes is not None and s.scale is not None
    packed = pack_to_int32(s.codes, q.bits)
    codes = unpack_from_int32(packed, q.bits, s.codes.shape)
    zero = None
    if s.zero is not None:
        zero = unpack_from_int32(
            pack_to_int32(s.zero, q.bits, packed_dim=0), q.bits, s.zero.shape, packed_dim=0
        )
    args = QuantizationArgs(
        num_bits=q.bits,
        type="int",
        symmetric=q.symmetric,
        strategy="channel" if q.group_size is None else "group",
        group_size=q.group_size,
    )
    assert torch.equal(peer_dequantize(codes, s.scale.float(), zero, args), s.weight)
    assert torch.equal(dequantize(s.codes, s.scale, s.zero, q.group_size), s.weight)
    # Stored values are grid points: rounding them again changes nothing.
    assert torch.equal(
        quantize_to_grid(s.weight, s.scale, s.zero, bits=q.bits, group_size=q.group_size), s.codes
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    W, A = weight(6, 40, dtype=dtype), second_moment(40, dtype=torch.float32)
    options: list[Option] = [
        Keep(),
        Cast(dtype="bfloat16"),
        Quantize(bits=8, group_size=10, symmetric=False),
        Prune(sparsity=0.1),
    ]
    keep, cast, rounded, pruned = solve(W, options, A, layer="x")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(s.weight.dtype == compute for s in (keep, cast, rounded, pruned))
    assert torch.equal(keep.weight, W.to(compute))
    assert torch.equal(cast.weight, W.to(torch.bfloat16).to(compute))
    assert torch.equal(pruned.weight, pruned.weight.to(dtype).to(compute)), (
        "stored in the dtype of W"
    )
    assert output_error(rounded.weight, W, A) < 1e-3 * output_error(torch.zeros_like(W), W, A)
    assert rounded.scale is not None and rounded.scale.dtype == (
        dtype if dtype == torch.bfloat16 else torch.float16
    )


@pytest.mark.parametrize("out", [9, 1500])  # 16,384 rows of options are swept at a time
def test_options_and_rows_do_not_influence_each_other(out: int) -> None:
    W, A = weight(out, 140), second_moment(140)
    options: list[Option] = [
        Keep(),
        PRUNERS[0],
        QUANTIZERS[0],
        PRUNERS[2],
        QUANTIZERS[3],
        PRUNERS[4],
        PRUNERS[5],
        QUANTIZERS[1],
        *UNEVEN,
    ]
    before = W.clone(), A.clone(), torch.get_rng_state()
    together = solve(W, options, A, layer="x")
    for option, s in zip(options, together, strict=True):
        (alone,) = solve(W, [option], A, layer="x")
        assert s.option is option
        torch.testing.assert_close(s.weight, alone.weight, rtol=1e-9, atol=1e-12)
    assert torch.equal(W, before[0]) and torch.equal(A, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_without_inputs_rounds_to_nearest_and_prunes_by_magnitude() -> None:
    W = weight(6, 20)
    rounded, pruned, both = solve(
        W, [QUANTIZERS[0], Prune(sparsity=0.4), PRUNERS[4]], None, layer="x"
    )
    uneven = solve(W, UNEVEN, None, layer="x")
    for j in range(20):
        for s in (rounded, *uneven):
            torch.testing.assert_close(s.weight[:, j], nearest(s, j, W[:, j]), rtol=0, atol=0)
        kept = torch.where(both.weight[:, j] == 0, 0.0, nearest(both, j, W[:, j]))
        torch.testing.assert_close(both.weight[:, j], kept, rtol=0, atol=0)
    sizes = W.abs().flatten().sort().values
    least = sizes[round(0.4 * W.numel())]
    assert torch.equal(pruned.weight, torch.where(W.abs() >= least, W, 0.0))
    assert bool((both.weight[W.abs() < sizes[round(0.6 * W.numel())]] == 0).all())
    assert rounded.damping == 0


@pytest.mark.parametrize("option", [*QUANTIZERS, *UNEVEN])
def test_compensation_beats_rounding_on_correlated_inputs(option: Quantize) -> None:
    W, A = weight(16, 140, dtype=torch.float32), second_moment(140, dtype=torch.float32)
    (s,) = solve(W, [option], A, layer="x")
    assert s.scale is not None
    codes = quantize_to_grid(W, s.scale, s.zero, bits=option.bits, group_size=option.group_size)
    plain = dequantize(codes, s.scale, s.zero, option.group_size)
    assert output_error(s.weight, W, A) < 0.7 * output_error(plain, W, A)


def test_the_drift_moves_the_target_towards_what_undoes_it() -> None:
    """At 8 bits rounding is nearly exact, so what comes out is the moved weight: DRIFT of the way
    to the solution of ``min E|V x - W x~|^2 + ridge |V - W|^2``, found here as least squares on the
    inputs themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    original = x @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)).double() + 0.1
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    A, D = x.T @ x / 400, (original - x).T @ x / 400
    ridge = (RIDGE * float(A.diagonal().mean()) * 400) ** 0.5 * torch.eye(12, dtype=torch.float64)
    rows, outputs = torch.cat([x, ridge]), torch.cat([original @ W.T, ridge @ W.T])
    best = torch.linalg.lstsq(rows, outputs).solution.T
    options = [Quantize(bits=8, group_size=4), Prune(sparsity=0.5), Keep()]
    moved = solve(W, options, A, layer="a", damping=1e-9, drift=D)
    target = W + DRIFT * (best - W)
    assert float((moved[0].weight - target).abs().max()) < 0.02
    assert float((moved[0].weight - W).abs().max()) > 0.02
    assert torch.equal(moved[2].weight, W)
    # Pruning with the drift comes closer to the original outputs than without.
    still = solve(W, options, A, layer="a", damping=1e-9)
    errors = [float((x @ s[1].weight.T - original @ W.T).square().sum()) for s in (moved, still)]
    assert errors[0] < errors[1]


def test_a_fit_that_overflows_leaves_the_largest_weights_as_they_are():
    W = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    tiny, far = torch.eye(16) * 1e-34, torch.eye(16) * 1e8
    (found,) = solve(W, [Prune(sparsity=0.5)], tiny, layer="a", drift=far)
    middle = W.abs().flatten().median()
    assert torch.equal(found.weight, torch.where(W.abs() > middle, W, 0.0))
    assert any("layer a: what prune0.5 keeps was not refitted" in note for note in found.notes)
