"""Operators whose structure gives more than products: dense, diagonal, Kronecker-factored, and
blocks of these side by side.

Each knows its diagonal, its trace and the inverse of its damped form without a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.operators import Operator, ParamSpace, agreement, coordinates


class Dense(Operator):
    """A symmetric matrix.

    Args:
        matrix: ``(n, n)``.
        space: its parameters; one parameter ``"x"`` of shape ``(n,)`` if left out.

    Raises:
        ValueError: not square, not symmetric, or not of the space's dimension.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "n m"],
        space: ParamSpace | None = None,
        *,
        measure: str = "nats",
        psd: bool = False,
    ) -> None:
        _check_symmetric("matrix", matrix)
        space = space or ParamSpace(shapes={"x": (len(matrix),)})
        if space.dim != len(matrix):
            raise ValueError(
                f"a {tuple(matrix.shape)} matrix does not act on a space of dimension {space.dim}"
            )
        super().__init__(space, measure=measure, psd=psd, dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def _matmat(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def diagonal(self) -> Float[Tensor, " n"]:
        return self.matrix.diagonal().clone()

    def trace(self) -> float:
        return float(self.matrix.diagonal().sum(dtype=torch.float64))

    def _dense(self) -> Tensor:
        return self.matrix.clone()

    def _restrict(self, space: ParamSpace) -> Operator:
        index = coordinates(self.space, space, self.device)
        return Dense(self.matrix[index][:, index], space, measure=self.measure, psd=self.psd)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        # (QΛQᵀ + s·I)⁻¹ = Q (Λ + s·I)⁻¹ Qᵀ
        values, vectors = self._eigh
        return vectors @ (_nonsingular(values, shift).unsqueeze(1) * (vectors.mT @ v))


class Diagonal(Operator):
    """A diagonal matrix; ``psd`` is read off its entries.

    Args:
        values: the diagonal, ``(n,)``.
        space: its parameters; one parameter ``"x"`` of shape ``(n,)`` if left out.

    Raises:
        ValueError: not of the space's dimension.
    """

    def __init__(
        self, values: Float[Tensor, " n"], space: ParamSpace | None = None, *, measure: str = "nats"
    ) -> None:
        space = space or ParamSpace(shapes={"x": (len(values),)})
        if space.dim != len(values):
            raise ValueError(
                f"a diagonal of {len(values)} values does not act on a space of dimension "
                f"{space.dim}"
            )
        psd = bool((values >= 0).all())
        super().__init__(space, measure=measure, psd=psd, dtype=values.dtype, device=values.device)
        self.values = values

    def _matmat(self, v: Tensor) -> Tensor:
        return self.values.unsqueeze(1) * v

    def diagonal(self) -> Float[Tensor, " n"]:
        return self.values.clone()

    def trace(self) -> float:
        return float(self.values.sum(dtype=torch.float64))

    def _restrict(self, space: ParamSpace) -> Operator:
        index = coordinates(self.space, space, self.device)
        return Diagonal(self.values[index], space, measure=self.measure)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return _nonsingular(self.values, shift).unsqueeze(1) * v


class Kronecker(Operator):
    """``G ⊗ A`` on one weight ``W [out, in]``, row-major: ``(G⊗A) vec V = vec(G V A)``.

    Its diagonal is ``diag G · diag A``, its trace ``tr G · tr A``. Cost of a product:
    ``out·in·(out+in)`` multiply–adds.

    Args:
        output_factor: ``G [out, out]``, second moment of the output gradients.
        input_factor: ``A [in, in]``, second moment of the inputs.
        space: one parameter with ``out·in`` elements, e.g. a convolution ``(out, c, kh, kw)``;
            ``"weight"`` of shape ``(out, in)`` if left out.
        transposed: the weight is stored ``[in, out]``.
        psd: true for second moments; pass False for factors that may be indefinite.

    Raises:
        ValueError: a factor that is not square or not symmetric, factors of different dtypes or
            devices, a parameter that does not fit.

    Source: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature", §3.
    """

    def __init__(
        self,
        output_factor: Float[Tensor, "out out2"],
        input_factor: Float[Tensor, "inp inp2"],
        space: ParamSpace | None = None,
        *,
        transposed: bool = False,
        measure: str = "nats",
        psd: bool = True,
    ) -> None:
        _check_symmetric("output_factor", output_factor)
        _check_symmetric("input_factor", input_factor)
        _check_alike({"output_factor": output_factor, "input_factor": input_factor})
        self.left, self.right = output_factor, input_factor
        if transposed:
            # (G V A)ᵀ = A Vᵀ G: the factors change sides, all else stays.
            self.left, self.right = input_factor, output_factor
        space = _matrix_space(space, len(self.left), len(self.right))
        super().__init__(
            space, measure=measure, psd=psd, dtype=self.left.dtype, device=self.left.device
        )

    def _matmat(self, v: Tensor) -> Tensor:
        return _two_sided(self.left, v, self.right)

    def diagonal(self) -> Float[Tensor, " n"]:
        return torch.outer(self.left.diagonal(), self.right.diagonal()).reshape(-1)

    def trace(self) -> float:
        left = self.left.diagonal().sum(dtype=torch.float64)
        right = self.right.diagonal().sum(dtype=torch.float64)
        return float(left * right)

    @cached_property
    def _eigh(self) -> Ekfac:
        # The eigenvectors of G ⊗ A are those of its factors, the eigenvalues their products.
        left, u = torch.linalg.eigh(self.left)
        right, w = torch.linalg.eigh(self.right)
        return Ekfac(u, w, torch.outer(left, right), self.space, measure=self.measure)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._eigh._solve(v, shift)


class Ekfac(Operator):
    """Curvature of one weight ``W [out, in]``: a Kronecker eigenbasis, eigenvalues of its own.

    Its product is ``Q_G (S ∘ (Q_Gᵀ V Q_A)) Q_Aᵀ``, its diagonal ``Q_G² S (Q_A²)ᵀ``, its trace
    ``Σ S``; ``psd`` is read off S.

    Args:
        output_basis: ``Q_G [out, out]``, orthonormal columns.
        input_basis: ``Q_A [in, in]``, orthonormal columns.
        eigenvalues: ``S [out, in]``.
        space, transposed: as for :class:`Kronecker`.

    Raises:
        ValueError: a basis that is not orthogonal, shapes that do not fit, other dtypes or devices.

    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", §3.
    """

    def __init__(
        self,
        output_basis: Float[Tensor, "out out2"],
        input_basis: Float[Tensor, "inp inp2"],
        eigenvalues: Float[Tensor, "rows columns"],
        space: ParamSpace | None = None,
        *,
        transposed: bool = False,
        measure: str = "nats",
    ) -> None:
        _check_orthogonal("output_basis", output_basis)
        _check_orthogonal("input_basis", input_basis)
        _check_alike(
            {"output_basis": output_basis, "input_basis": input_basis, "eigenvalues": eigenvalues}
        )
        if tuple(eigenvalues.shape) != (len(output_basis), len(input_basis)):
            raise ValueError(
                f"eigenvalues: expected {(len(output_basis), len(input_basis))}, got "
                f"{tuple(eigenvalues.shape)}"
            )
        self.left, self.right, self.scales = output_basis, input_basis, eigenvalues
        if transposed:
            # As for `Kronecker`, the sides change; the eigenvalues are transposed with the weight.
            self.left, self.right, self.scales = input_basis, output_basis, eigenvalues.mT
        space = _matrix_space(space, len(self.left), len(self.right))
        psd = bool((eigenvalues >= 0).all())
        super().__init__(
            space, measure=measure, psd=psd, dtype=eigenvalues.dtype, device=eigenvalues.device
        )

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        # 1. Into the eigenbasis. 2. Scale each direction. 3. Back.
        inside = _two_sided(self.left.mT, v, self.right)
        scaled = scales.reshape(-1, 1) * inside
        return _two_sided(self.left, scaled, self.right.mT)

    def _matmat(self, v: Tensor) -> Tensor:
        return self._scaled(v, self.scales)

    def diagonal(self) -> Float[Tensor, " n"]:
        return (self.left**2 @ self.scales @ (self.right**2).mT).reshape(-1)

    def trace(self) -> float:
        return float(self.scales.sum(dtype=torch.float64))

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._scaled(v, _nonsingular(self.scales, shift))


class BlockDiagonal(Operator):
    """Operators on disjoint sets of parameters side by side; their spaces lie end to end, in order.

    Args:
        blocks: name → operator. The names are the caller's own, e.g. layers.

    Raises:
        ValueError: no block, a parameter in two blocks, or blocks that differ in measure, dtype or
            device.
    """

    def __init__(self, blocks: Mapping[str, Operator]) -> None:
        if not blocks:
            raise ValueError("BlockDiagonal needs at least one block")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, block in blocks.items():
            for parameter, shape in block.space.shapes.items():
                if parameter in shapes:
                    raise ValueError(
                        f"block {name!r}: parameter {parameter!r} is already in another block"
                    )
                shapes[parameter] = shape
        measure, dtype, device = agreement(blocks)
        psd = all(block.psd for block in blocks.values())
        super().__init__(
            ParamSpace(shapes=shapes), measure=measure, psd=psd, dtype=dtype, device=device
        )
        self.blocks = dict(blocks)

    def _each(self, v: Tensor, function: Callable[[Operator, Tensor], Tensor]) -> Tensor:
        # Each block acts on its own stretch of the coordinates.
        blocks = self.blocks.values()
        parts = v.split([block.space.dim for block in blocks])
        results = [function(block, part) for block, part in zip(blocks, parts, strict=True)]
        return torch.cat(results)

    def _matmat(self, v: Tensor) -> Tensor:
        return self._each(v, lambda block, part: block._matmat(part))

    def diagonal(self) -> Float[Tensor, " n"]:
        return torch.cat([block.diagonal() for block in self.blocks.values()])

    def trace(self) -> float:
        # fsum, so that many small blocks add up as exactly as one large one
        return math.fsum(block.trace() for block in self.blocks.values())

    def _dense(self) -> Tensor:
        return torch.block_diag(*(block.to_dense() for block in self.blocks.values()))

    def _restrict(self, space: ParamSpace) -> Operator:
        if not space.shapes:
            # No block is left, and `BlockDiagonal` needs one.
            return super()._restrict(space)
        parts = {}
        for name, block in self.blocks.items():
            if own := [parameter for parameter in block.space.shapes if parameter in space.shapes]:
                parts[name] = block.restrict(own)
        return BlockDiagonal(parts)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._each(v, lambda block, part: block._solve(part, shift))


def _two_sided(left: Tensor, v: Tensor, right: Tensor) -> Tensor:
    """``left · V · right`` for every column V of ``v``, read as a row-major matrix."""
    # The left product is one matrix product; the right one contracts an inner axis.
    rows, columns, k = len(left), len(right), v.shape[1]
    half = (left @ v.reshape(rows, columns * k)).reshape(rows, columns, k)
    return torch.einsum("rck,cd->rdk", half, right).reshape(rows * columns, k)


def _matrix_space(space: ParamSpace | None, rows: int, columns: int) -> ParamSpace:
    """``space``, which must hold one parameter of that size; ``"weight"`` if it is None."""
    if space is None:
        return ParamSpace(shapes={"weight": (rows, columns)})
    if len(space.shapes) != 1 or space.dim != rows * columns:
        raise ValueError(
            f"expected one parameter with {rows}·{columns} elements, got {space.shapes}"
        )
    name, shape = next(iter(space.shapes.items()))
    # A leading axis that disagrees with the factors is a weight stored the other way round.
    if len(shape) > 1 and shape[0] != rows:
        raise ValueError(
            f"parameter {name!r} of shape {shape} is not [{rows}, {columns}]; for a weight "
            "stored [in, out] pass transposed=True, for one stored [out, in] transposed=False"
        )
    return space


def _check_symmetric(what: str, matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{what}: expected a square matrix, got {tuple(matrix.shape)}")
    if matrix.numel() == 0:
        return
    # Half of the digits may be lost to the order in which a symmetric matrix was added up.
    scale = float(matrix.abs().max())
    off = float((matrix - matrix.mT).abs().max())
    # not … <=, so that a NaN is refused as well
    if not off <= scale * torch.finfo(matrix.dtype).eps ** 0.5:
        raise ValueError(
            f"{what}: not symmetric, entries differ from their mirror image by up to {off:.3g} "
            f"(largest entry {scale:.3g}); pass (M + M.mT) / 2 if that is meant"
        )


def _check_orthogonal(what: str, basis: Tensor) -> None:
    if basis.ndim != 2 or basis.shape[0] != basis.shape[1]:
        raise ValueError(f"{what}: expected a square matrix, got {tuple(basis.shape)}")
    if basis.numel() == 0:
        return
    identity = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    off = float((basis.mT @ basis - identity).abs().max())
    if not off <= torch.finfo(basis.dtype).eps ** 0.5:
        raise ValueError(
            f"{what}: not orthogonal, QᵀQ differs from the identity by up to {off:.3g}"
        )


def _check_alike(tensors: Mapping[str, Tensor]) -> None:
    (first, one), *rest = tensors.items()
    for name, other in rest:
        if other.dtype != one.dtype or other.device != one.device:
            raise ValueError(
                f"{first} is {one.dtype} on {one.device}, {name} is {other.dtype} on {other.device}"
            )


def _nonsingular(eigenvalues: Tensor, shift: float) -> Tensor:
    """``1 / (eigenvalues + shift)``."""
    values = eigenvalues + shift
    if values.numel() == 0:
        return values
    smallest, largest = float(values.abs().min()), float(values.abs().max())
    # An eigenvalue below rounding error of the largest has no digit that is right.
    if not smallest > largest * torch.finfo(values.dtype).eps:
        raise ValueError(
            f"singular to working precision: eigenvalues from {smallest:.3g} to {largest:.3g} in "
            "magnitude; solve a damped operator, op.damped(value)"
        )
    return values.reciprocal()
