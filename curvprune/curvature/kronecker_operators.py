"""What K-FAC puts together beside a Kronecker product: a weight with its bias, the groups of a
convolution, the rows of a lookup; and the inverse of all of them, damped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvprune.curvature.closed_forms import BlockDiagonal, Dense, Diagonal, Ekfac, Kronecker
from curvprune.curvature.operators import Operator, ParamSpace

SPLITS = ("exact", "factored", "each")


class Scattered(Operator):
    """Operators on sets of coordinates that partition a space, wherever these lie.

    Args:
        pieces: where each one's coordinates lie, in its own order, and the operator.
        space: whose coordinates they are.
    """

    def __init__(
        self, pieces: Sequence[tuple[Int[Tensor, " n"], Operator]], space: ParamSpace
    ) -> None:
        first = pieces[0][1]
        super().__init__(
            space,
            measure=first.measure,
            psd=all(piece.psd for _, piece in pieces),
            dtype=first.dtype,
            device=first.device,
        )
        self.pieces = tuple((where.to(first.device), piece) for where, piece in pieces)

    def _matmat(self, v: Tensor) -> Tensor:
        found = torch.empty_like(v)
        for where, piece in self.pieces:
            found[where] = piece._matmat(v[where])
        return found

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        found = torch.empty_like(v)
        for where, piece in self.pieces:
            found[where] = piece._solve(v[where], shift)
        return found

    def diagonal(self) -> Float[Tensor, " n"]:
        found = torch.empty(self.space.dim, dtype=self.dtype, device=self.device)
        for where, piece in self.pieces:
            found[where] = piece.diagonal()
        return found

    def trace(self) -> float:
        return sum(piece.trace() for _, piece in self.pieces)

    def _dense(self) -> Tensor:
        n = self.space.dim
        matrix = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        for where, piece in self.pieces:
            matrix[where.unsqueeze(1), where] = piece.to_dense()
        return matrix

    def _restrict(self, space: ParamSpace) -> Operator:
        # 1. Where each coordinate lies in the smaller space; −1 where it is left out.
        places = torch.full((self.space.dim,), -1, device=self.device)
        start = 0
        for name, part in self.space.slices.items():
            if name in space.shapes:
                length = part.stop - part.start
                places[part] = torch.arange(start, start + length, device=self.device)
                start += length
        # 2. A Kronecker product keeps its form on a grid of rows and columns.
        pieces = []
        for where, piece in self.pieces:
            kept = places[where] >= 0
            if not bool(kept.any()):
                continue
            inner = piece if bool(kept.all()) else _on_grid(piece, kept)
            if inner is None:
                return super()._restrict(space)
            pieces.append((places[where][kept], inner))
        return Scattered(pieces, space) if pieces else super()._restrict(space)


def _on_grid(piece: Operator, kept: Tensor) -> Operator | None:
    """The block of a Kronecker product on some rows and columns; ``None`` for anything else."""
    if not isinstance(piece, Kronecker):
        return None
    grid = kept.view(len(piece.left), len(piece.right))
    rows, columns = grid.any(1), grid.any(0)
    if not torch.equal(grid, torch.outer(rows, columns)):
        return None
    left, right = piece.left[rows][:, rows], piece.right[columns][:, columns]
    return Kronecker(left, right, measure=piece.measure, psd=piece.psd)


class Lookup(Operator):
    """Curvature of a table ``[rows, width]`` of which an input picks rows: its second moment is
    diagonal.

    ``V ↦ (S ∘ (V Q)) Qᵀ``, with ``S = a λᵀ`` for K-FAC: ``a`` how often each row is picked, and
    ``Q λ Qᵀ`` the second moment of the gradients.

    Args:
        basis: ``Q [width, width]``, orthonormal columns.
        eigenvalues: ``S [rows, width]``.
        space: one parameter of that size.
    """

    def __init__(
        self,
        basis: Float[Tensor, "width width2"],
        eigenvalues: Float[Tensor, "rows width"],
        space: ParamSpace,
        *,
        measure: str = "nats",
    ) -> None:
        super().__init__(
            space,
            measure=measure,
            psd=bool((eigenvalues >= 0).all()),
            dtype=eigenvalues.dtype,
            device=eigenvalues.device,
        )
        self.basis, self.scales = basis, eigenvalues

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        table = v.reshape(*scales.shape, -1)
        inside = torch.einsum("rwk,wj->rjk", table, self.basis) * scales.unsqueeze(-1)
        return torch.einsum("rjk,wj->rwk", inside, self.basis).reshape(v.shape)

    def _matmat(self, v: Tensor) -> Tensor:
        return self._scaled(v, self.scales)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._scaled(v, 1 / (self.scales + shift))

    def diagonal(self) -> Float[Tensor, " n"]:
        return (self.scales @ self.basis.mT**2).reshape(-1)

    def trace(self) -> float:
        return float(self.scales.sum(dtype=torch.float64))


class KroneckerFactored(BlockDiagonal):
    """K-FAC or EKFAC: an operator for each layer, side by side.

    Attributes:
        matrix: what it approximates, and how; for labels.
        stochastic: another seed gives another matrix.
        left_out: layers without factors, and why.
    """

    def __init__(
        self,
        blocks: Mapping[str, Operator],
        *,
        matrix: str = "K-FAC",
        stochastic: bool = False,
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(blocks)
        self.matrix, self.stochastic, self.left_out = matrix, stochastic, dict(left_out)

    def __repr__(self) -> str:
        said = f"matrix={self.matrix!r}, stochastic={self.stochastic}"
        if self.left_out:
            said += f", left out: {', '.join(self.left_out)}"
        return f"{super().__repr__()[:-1]}, {said})"

    def _restrict(self, space: ParamSpace) -> Operator:
        part = super()._restrict(space)
        if not isinstance(part, BlockDiagonal):
            return part
        return KroneckerFactored(part.blocks, matrix=self.matrix, stochastic=self.stochastic)

    def inverse(
        self,
        damping: float = 0.0,
        *,
        tol: float = 1e-6,
        max_products: int = 1000,
        split: str = "exact",
    ) -> KroneckerFactored:
        """The inverse of the damped matrix, in closed form, as an operator of the same blocks.

        Args:
            damping: λ > 0, in the unit of the matrix.
            split: how λ is given to the two factors of ``G ⊗ A``.

                ``"exact"``     (G ⊗ A + λ I)⁻¹, by the factors' eigenvectors
                ``"factored"``  (G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹ with π² the ratio of the mean
                                eigenvalues of A and G
                ``"each"``      (G + λ I)⁻¹ ⊗ (A + λ I)⁻¹

                Blocks without two factors (norms, biases, EKFAC, lookups) take the exact one.
            tol, max_products: of `Operator.inverse`; nothing is solved step by step here.

        Cost: an eigendecomposition of each factor, ``in³ + out³``.

        Raises:
            ValueError: a damping that is not positive, or an unknown split.

        Source: Martens & Grosse 2015, §6.3 (``factored``); Grosse & Martens 2016 (``exact``).

        Example:
            >>> import torch, curvprune as cp
            >>> model = torch.nn.Linear(4, 3)
            >>> data = [(torch.randn(8, 4), torch.arange(8) % 3)]
            >>> K = cp.kfac(model, data, fisher="type-2")
            >>> v = torch.randn(K.space.dim)
            >>> bool(torch.allclose(K.damped(0.1) @ (K.inverse(0.1) @ v), v, atol=1e-4))
            True
        """
        if not damping > 0:
            raise ValueError(f"damping={damping!r}: expected a number above 0, such as 1e-3")
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        blocks = {name: _inverted(block, damping, split) for name, block in self.blocks.items()}
        return KroneckerFactored(
            blocks,
            matrix=f"inverse of {self.matrix}, damped by {damping:g} ({split})",
            stochastic=self.stochastic,
            left_out=self.left_out,
        )


def _inverted(op: Operator, damping: float, split: str) -> Operator:
    """``(A + damping · I)⁻¹`` of one block."""
    measure = f"1 / ({op.measure})"
    if isinstance(op, Kronecker) and split == "exact":
        left, u = torch.linalg.eigh(op.left)
        right, w = torch.linalg.eigh(op.right)
        scales = torch.outer(left.clamp_min(0), right.clamp_min(0)) + damping
        return Ekfac(u, w, scales.reciprocal(), op.space, measure=measure)
    if isinstance(op, Kronecker):
        first, second = _shares(op, damping, split)
        inner, outer = _damped_inverse(op.left, first), _damped_inverse(op.right, second)
        return Kronecker(inner, outer, op.space, measure=measure)
    if isinstance(op, Ekfac):
        scales = (op.scales + damping).reciprocal()
        return Ekfac(op.left, op.right, scales, op.space, measure=measure)
    if isinstance(op, Lookup):
        return Lookup(op.basis, (op.scales + damping).reciprocal(), op.space, measure=measure)
    if isinstance(op, Scattered):
        pieces = [(where, _inverted(piece, damping, split)) for where, piece in op.pieces]
        return Scattered(pieces, op.space)
    if isinstance(op, Diagonal):
        return Diagonal((op.values + damping).reciprocal(), op.space, measure=measure)
    assert isinstance(op, Dense)
    return Dense(_damped_inverse(op.matrix, damping), op.space, measure=measure, psd=True)


def _shares(op: Kronecker, damping: float, split: str) -> tuple[float, float]:
    """What is added to the diagonal of the left and of the right factor."""
    means = float(op.left.diagonal().mean()), float(op.right.diagonal().mean())
    if split == "each" or min(means) <= 0:
        return damping, damping
    ratio = (means[0] / means[1]) ** 0.5
    return damping**0.5 * ratio, damping**0.5 / ratio


def _damped_inverse(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    values, vectors = torch.linalg.eigh(matrix)
    inverse = (vectors / (values.clamp_min(0) + damping)) @ vectors.mT
    return (inverse + inverse.mT) / 2
