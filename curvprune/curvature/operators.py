"""Symmetric linear operators on a flat parameter space: what the estimators, solvers and prices see
of a curvature.

An operator is its product with vectors. What its structure gives for free (diagonal, trace, the
inverse of its damped form) is a closed form of the class; an operator known only by its products
raises :class:`NoClosedForm` and names the estimator to use instead. Vectors are flat, ``(n,)`` or
``(n, k)``; names and shapes live in :class:`ParamSpace`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_DENSE_LIMIT = 20_000
_DENSE_BLOCK = 256


class NoClosedForm(NotImplementedError):
    """The operator's structure does not give this quantity; estimate it from products instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpace:
    """Named parameters laid end to end, in order, each in row-major order, as one flat vector of
    length ``dim``.

    Attributes:
        shapes: name → shape. The order is the order of the coordinates.
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def dim(self) -> int:
        """Number of coordinates n."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def slices(self) -> dict[str, slice]:
        """name → its coordinates."""
        slices, start = {}, 0
        for name, shape in self.shapes.items():
            slices[name] = slice(start, start + math.prod(shape))
            start = slices[name].stop
        return slices

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*size"]:
        """One flat vector ``(n,)`` from tensors shaped as the parameters; ``(n, k)`` if all have a
        trailing axis k.

        Raises:
            ValueError: a missing or unknown name, or a shape that is not the parameter's, naming
                it.
        """
        if unknown := [name for name in tensors if name not in self.shapes]:
            raise ValueError(
                f"parameter {unknown[0]!r} is not in this space, which holds {list(self.shapes)}"
            )
        if missing := [name for name in self.shapes if name not in tensors]:
            raise ValueError(
                f"no tensor for parameter {missing[0]!r} of shape {self.shapes[missing[0]]}"
            )
        if not self.shapes:
            return torch.zeros(0)
        tails: dict[tuple[int, ...], str] = {}
        parts = []
        for name, shape in self.shapes.items():
            got = tuple(tensors[name].shape)
            tail = got[len(shape) :]
            if got[: len(shape)] != shape or len(tail) > 1:
                raise ValueError(
                    f"parameter {name!r}: expected shape {shape} or {(*shape, 'k')}, got {got}"
                )
            tails.setdefault(tail, name)
            parts.append(tensors[name].reshape(math.prod(shape), *tail))
        if len(tails) > 1:
            told = ", ".join(f"{name!r} {tuple(tensors[name].shape)}" for name in tails.values())
            raise ValueError(f"the tensors do not agree on the number of vectors: {told}")
        return torch.cat(parts)

    def split(self, v: Float[Tensor, "*size"]) -> dict[str, Tensor]:
        """name → view of ``v`` shaped as the parameter, ``(*shape, k)`` for a block ``(n, k)``.

        Raises:
            ValueError: ``v`` is not ``(n,)`` or ``(n, k)``.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self.dim:
            raise ValueError(
                f"expected a vector ({self.dim},) or a block ({self.dim}, k), got {tuple(v.shape)}"
            )
        slices = self.slices
        # unflatten always returns views, also of columns of a larger block
        return {
            name: v[slices[name]].unflatten(0, shape) if shape else v[slices[name]][0]
            for name, shape in self.shapes.items()
        }

    def restrict(self, names: Iterable[str]) -> ParamSpace:
        """The subspace of these parameters, in the order of this space whatever the order of
        ``names``.

        Raises:
            ValueError: an unknown name.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in wanted if name not in self.shapes]:
            raise ValueError(
                f"parameter {unknown[0]!r} is not in this space, which holds {list(self.shapes)}"
            )
        return ParamSpace(
            shapes={name: shape for name, shape in self.shapes.items() if name in wanted}
        )


class Operator(ABC):
    """A symmetric linear map A on a :class:`ParamSpace` of dimension n.

    Attributes:
        space: the parameters that the coordinates belong to.
        unit: what ``vᵀAv`` is measured in for a change v of the parameters, e.g. ``"nats per
            token"``.
        psd: known to be positive semidefinite. False means not known.
        dtype: of the vectors that it takes and returns. Nothing is cast silently.
        device: where its vectors live.
    """

    space: ParamSpace
    measure: str
    psd: bool
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        space: ParamSpace,
        *,
        measure: str,
        psd: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.space, self.measure, self.psd, self.dtype = space, measure, psd, dtype
        self.device = torch.empty(
            0, device=device
        ).device  # "cuda" becomes "cuda:0", as tensors have it
        if not dtype.is_floating_point:
            raise ValueError(f"an operator needs a floating-point dtype, got {dtype}")

    @abstractmethod
    def _matmat(self, v: Tensor) -> Tensor:
        """A v for a block ``(n, k)`` whose shape, dtype and device have been checked."""

    def __matmul__(self, v: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
        """A v. Shapes ``(n,) → (n,)`` or ``(n, k) → (n, k)``. Cost: one product per vector.

        Raises:
            ValueError: another shape, dtype or device than the operator's.
        """
        self._check(v)
        return self._matmat(v) if v.ndim == 2 else self._matmat(v.unsqueeze(1)).squeeze(1)

    def quad(self, v: Float[Tensor, "*size"]) -> Float[Tensor, "*columns"]:
        """``vᵀAv`` of a vector (a scalar tensor) or of each column of a block, ``(k,)``, in
        ``unit``.

        The curvature's share of the loss increase is half of it. Cost: one product per vector.
        """
        return (v * (self @ v)).sum(0)

    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal of A in closed form, without products.

        Raises:
            NoClosedForm: the operator is known only by its products.
        """
        raise NoClosedForm(
            f"{type(self).__name__} has no closed-form diagonal; use estimators.diagonal(op, ...)"
        )

    def trace(self) -> float:
        """tr A in closed form, without products.

        Raises:
            NoClosedForm: the operator is known only by its products.
        """
        raise NoClosedForm(
            f"{type(self).__name__} has no closed-form trace; use estimators.trace(op, ...)"
        )

    def solve(self, v: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
        """``A⁻¹v`` by an eigendecomposition, kept after the first call; ``op.damped(λ).solve(v)``
        is ``(A+λI)⁻¹v``.

        Raises:
            NoClosedForm: the operator is known only by its products.
            ValueError: A is singular to working precision, or ``v`` does not fit.
        """
        self._check(v)
        return self._solve(v, 0.0) if v.ndim == 2 else self._solve(v.unsqueeze(1), 0.0).squeeze(1)

    def restrict(self, names: Iterable[str]) -> Operator:
        """The diagonal block ``EᵀAE`` of these parameters, in the order of ``self.space``.

        Without a closed form, the product surrounds the vector with zeros and costs as much as the
        whole operator's.

        Raises:
            ValueError: an unknown name.
        """
        space = self.space.restrict(names)
        return self if len(space.shapes) == len(self.space.shapes) else self._restrict(space)

    def damped(self, value: float) -> Operator:
        """``A + value · I``."""
        return Sum([(1.0, self)], shift=value)

    def __add__(self, other: Operator) -> Operator:
        return Sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: Operator) -> Operator:
        return Sum([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> Operator:
        return Sum([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return self * -1.0

    def to_dense(self) -> Float[Tensor, "n n"]:
        """The matrix. Cost: n products and n² numbers.

        Raises:
            ValueError: n > 20000.
        """
        n = self.space.dim
        if n > _DENSE_LIMIT:
            raise ValueError(
                f"to_dense of dimension {n} needs {n}² numbers; the limit is {_DENSE_LIMIT}"
            )
        return self._dense()

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` with float64 NumPy vectors in and out, cast to
        ``dtype`` between."""
        from scipy.sparse.linalg import LinearOperator

        def apply(x: Any) -> Any:
            v = torch.as_tensor(x).to(dtype=self.dtype, device=self.device)
            return (self @ v).to(device="cpu", dtype=torch.float64).numpy()

        n = self.space.dim
        return LinearOperator(
            (n, n), matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype="float64"
        )

    def __repr__(self) -> str:
        parameters = len(self.space.shapes)
        return (
            f"{type(self).__name__}(n={self.space.dim}, parameters={parameters}, "
            f"measure={self.measure!r}, psd={self.psd}, dtype={self.dtype}, device={self.device})"
        )

    def _check(self, v: Tensor) -> None:
        n = self.space.dim
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(
                f"{type(self).__name__} takes ({n},) or ({n}, k), got {tuple(v.shape)}"
            )
        if v.dtype != self.dtype:
            raise ValueError(
                f"{type(self).__name__} takes {self.dtype}, got {v.dtype}; pass "
                f"v.to({self.dtype}) if that is meant"
            )
        if v.device != self.device:
            raise ValueError(f"{type(self).__name__} is on {self.device}, the vector on {v.device}")

    def _dense(self) -> Tensor:
        n = self.space.dim
        matrix = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, _DENSE_BLOCK):
            width = min(_DENSE_BLOCK, n - start)
            block = torch.zeros(n, width, dtype=self.dtype, device=self.device)
            block[start : start + width].fill_diagonal_(1)
            matrix[:, start : start + width] = self._matmat(block)
        return matrix

    def _restrict(self, space: ParamSpace) -> Operator:
        index = _coordinates(self.space, space, self.device)

        def product(v: Tensor) -> Tensor:
            whole = torch.zeros(self.space.dim, v.shape[1], dtype=self.dtype, device=self.device)
            whole[index] = v
            return self._matmat(whole)[index]

        return Function(
            product, space, measure=self.measure, psd=self.psd, dtype=self.dtype, device=self.device
        )

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        """``(A + shift·I)⁻¹ v`` for a checked block."""
        raise NoClosedForm(
            f"{type(self).__name__} has no closed-form inverse; use an iterative solver on its "
            "products"
        )


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
        index = _coordinates(self.space, space, self.device)
        return Dense(self.matrix[index][:, index], space, measure=self.measure, psd=self.psd)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def _solve(self, v: Tensor, shift: float) -> Tensor:
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
        return Diagonal(
            self.values[_coordinates(self.space, space, self.device)], space, measure=self.measure
        )

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return _nonsingular(self.values, shift).unsqueeze(1) * v


class Kronecker(Operator):
    """``G ⊗ A`` on one weight ``W [out, in]``, row-major: ``(G⊗A) vec V = vec(G V A)``; diagonal
    ``diag G · diag A``, trace ``tr G · tr A``. Cost of a product: ``out·in·(out+in)``
    multiply–adds.

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
        # Of a transposed weight, vec(Vᵀ) = vec(A Vᵀ G): the factors change sides and all else
        # stays.
        self.left, self.right = (
            (input_factor, output_factor) if transposed else (output_factor, input_factor)
        )
        space = _matrix_space(space, len(self.left), len(self.right))
        super().__init__(
            space, measure=measure, psd=psd, dtype=self.left.dtype, device=self.left.device
        )

    def _matmat(self, v: Tensor) -> Tensor:
        return _two_sided(self.left, v, self.right)

    def diagonal(self) -> Float[Tensor, " n"]:
        return torch.outer(self.left.diagonal(), self.right.diagonal()).reshape(-1)

    def trace(self) -> float:
        return float(
            self.left.diagonal().sum(dtype=torch.float64)
            * self.right.diagonal().sum(dtype=torch.float64)
        )

    @cached_property
    def _eigh(self) -> Ekfac:
        left, u = torch.linalg.eigh(self.left)
        right, w = torch.linalg.eigh(self.right)
        return Ekfac(u, w, torch.outer(left, right), self.space, measure=self.measure)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._eigh._solve(v, shift)


class Ekfac(Operator):
    """Curvature in a Kronecker eigenbasis with its own eigenvalues on one weight ``W [out, in]``:
    product ``Q_G (S ∘ (Q_Gᵀ V Q_A)) Q_Aᵀ``, diagonal ``Q_G² S (Q_A²)ᵀ``, trace ``Σ S``; ``psd`` is
    read off S.

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
            self.left, self.right, self.scales = input_basis, output_basis, eigenvalues.mT
        space = _matrix_space(space, len(self.left), len(self.right))
        psd = bool((eigenvalues >= 0).all())
        super().__init__(
            space, measure=measure, psd=psd, dtype=eigenvalues.dtype, device=eigenvalues.device
        )

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        inside = scales.reshape(-1, 1) * _two_sided(self.left.mT, v, self.right)
        return _two_sided(self.left, inside, self.right.mT)

    def _matmat(self, v: Tensor) -> Tensor:
        return self._scaled(v, self.scales)

    def diagonal(self) -> Float[Tensor, " n"]:
        return (self.left**2 @ self.scales @ (self.right**2).mT).reshape(-1)

    def trace(self) -> float:
        return float(self.scales.sum(dtype=torch.float64))

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._scaled(v, _nonsingular(self.scales, shift))


class BlockDiagonal(Operator):
    """Operators on disjoint sets of parameters side by side; the space is theirs, end to end, in
    order.

    Args:
        blocks: name → operator. The names are the caller's own, e.g. layers.

    Raises:
        ValueError: no block, a parameter in two blocks, or blocks that differ in unit, dtype or
            device.
    """

    def __init__(self, blocks: Mapping[str, Operator]) -> None:
        if not blocks:
            raise ValueError("BlockDiagonal needs at least one block")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, block in blocks.items():
            if twice := [p for p in block.space.shapes if p in shapes]:
                raise ValueError(
                    f"block {name!r}: parameter {twice[0]!r} is already in another block"
                )
            shapes.update(block.space.shapes)
        measure, dtype, device = _agreement(blocks)
        psd = all(block.psd for block in blocks.values())
        super().__init__(
            ParamSpace(shapes=shapes), measure=measure, psd=psd, dtype=dtype, device=device
        )
        self.blocks = dict(blocks)

    def _each(self, v: Tensor, function: Callable[[Operator, Tensor], Tensor]) -> Tensor:
        parts = v.split([block.space.dim for block in self.blocks.values()])
        return torch.cat(
            [function(block, part) for block, part in zip(self.blocks.values(), parts, strict=True)]
        )

    def _matmat(self, v: Tensor) -> Tensor:
        return self._each(v, lambda block, part: block._matmat(part))

    def diagonal(self) -> Float[Tensor, " n"]:
        return torch.cat([block.diagonal() for block in self.blocks.values()])

    def trace(self) -> float:
        return math.fsum(block.trace() for block in self.blocks.values())

    def _dense(self) -> Tensor:
        return torch.block_diag(*(block.to_dense() for block in self.blocks.values()))

    def _restrict(self, space: ParamSpace) -> Operator:
        held = {
            name: [p for p in block.space.shapes if p in space.shapes]
            for name, block in self.blocks.items()
        }
        if not space.shapes:
            return super()._restrict(space)
        return BlockDiagonal(
            {name: self.blocks[name].restrict(own) for name, own in held.items() if own}
        )

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        return self._each(v, lambda block, part: block._solve(part, shift))


class Function(Operator):
    """An operator known only by its product, e.g. Hessian-vector products of a model.

    Args:
        function: ``(n, k) → (n, k)``, linear and symmetric; neither is checked here.
        space: its parameters.
        psd: whether it is known to be positive semidefinite.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        space: ParamSpace,
        *,
        measure: str = "nats",
        psd: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(space, measure=measure, psd=psd, dtype=dtype, device=device)
        self.function = function

    def _matmat(self, v: Tensor) -> Tensor:
        result = self.function(v)
        if result.shape != v.shape or result.dtype != v.dtype:
            raise ValueError(
                f"the function of this operator must return {tuple(v.shape)} {v.dtype}, "
                f"got {tuple(result.shape)} {result.dtype}"
            )
        return result


class Sum(Operator):
    """``Σ cᵢ Aᵢ + shift · I``: what ``+``, ``-``, ``*`` and ``damped`` make. Nested sums are
    flattened.

    Diagonal and trace have a closed form where every part has one. ``psd`` is claimed only where
    every coefficient and the shift are non-negative and every part is psd. ``solve`` needs a single
    part that can solve.

    Raises:
        ValueError: no part, or parts that differ in space, unit, dtype or device.
    """

    parts: tuple[tuple[float, Operator], ...]
    shift: float

    def __init__(self, parts: Sequence[tuple[float, Operator]], *, shift: float = 0.0) -> None:
        if not parts:
            raise ValueError("Sum needs at least one operator")
        flat: list[tuple[float, Operator]] = []
        for factor, part in parts:
            if isinstance(part, Sum):
                flat += [(factor * inner, operator) for inner, operator in part.parts]
                shift += factor * part.shift
            else:
                flat.append((factor, part))
        space = flat[0][1].space
        for _, part in flat[1:]:
            # dicts that differ only in order are equal, the coordinates are not
            if list(part.space.shapes.items()) != list(space.shapes.items()):
                raise ValueError(
                    f"operators on different spaces: {space.shapes} and {part.space.shapes}"
                )
        measure, dtype, device = _agreement({str(i): part for i, (_, part) in enumerate(flat)})
        psd = shift >= 0 and all(factor >= 0 and part.psd for factor, part in flat)
        super().__init__(space, measure=measure, psd=psd, dtype=dtype, device=device)
        self.parts, self.shift = tuple(flat), float(shift)

    def _matmat(self, v: Tensor) -> Tensor:
        total = self.shift * v
        for factor, part in self.parts:
            total = total + factor * part._matmat(v)
        return total

    def diagonal(self) -> Float[Tensor, " n"]:
        total = torch.full((self.space.dim,), self.shift, dtype=self.dtype, device=self.device)
        for factor, part in self.parts:
            total = total + factor * part.diagonal()
        return total

    def trace(self) -> float:
        return self.shift * self.space.dim + math.fsum(
            factor * part.trace() for factor, part in self.parts
        )

    def _restrict(self, space: ParamSpace) -> Operator:
        parts = [(factor, part.restrict(space.shapes)) for factor, part in self.parts]
        return Sum(parts, shift=self.shift)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        if len(self.parts) > 1 or self.parts[0][0] == 0:
            return super()._solve(v, shift)
        ((factor, part),) = self.parts
        return part._solve(v, (self.shift + shift) / factor) / factor


def _coordinates(space: ParamSpace, part: ParamSpace, device: torch.device) -> Tensor:
    slices = space.slices
    ranges = [torch.arange(slices[name].start, slices[name].stop) for name in part.shapes]
    return (
        torch.cat(ranges).to(device) if ranges else torch.zeros(0, dtype=torch.int64, device=device)
    )


def _two_sided(left: Tensor, v: Tensor, right: Tensor) -> Tensor:
    """``left · V · right`` for every column V of ``v``, read as a row-major matrix."""
    rows, columns, k = len(left), len(right), v.shape[1]
    half = (left @ v.reshape(rows, columns * k)).reshape(rows, columns, k)
    return torch.einsum("rck,cd->rdk", half, right).reshape(rows * columns, k)


def _matrix_space(space: ParamSpace | None, rows: int, columns: int) -> ParamSpace:
    if space is None:
        return ParamSpace(shapes={"weight": (rows, columns)})
    if len(space.shapes) != 1 or space.dim != rows * columns:
        raise ValueError(
            f"expected one parameter with {rows}·{columns} elements, got {space.shapes}"
        )
    ((name, shape),) = space.shapes.items()
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
    scale = float(matrix.abs().max())
    off = float((matrix - matrix.mT).abs().max())
    if not off <= scale * torch.finfo(matrix.dtype).eps ** 0.5:
        raise ValueError(
            f"{what}: not symmetric, entries differ from their mirror image by up to {off:.3g} "
            f"(largest entry {scale:.3g}); pass (M + M.mT) / 2 if that is meant"
        )


def _check_orthogonal(what: str, basis: Tensor) -> None:
    if basis.ndim != 2 or basis.shape[0] != basis.shape[1]:
        raise ValueError(f"{what}: expected a square matrix, got {tuple(basis.shape)}")
    measure = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    off = float((basis.mT @ basis - measure).abs().max()) if basis.numel() else 0.0
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


def _agreement(operators: Mapping[str, Operator]) -> tuple[str, torch.dtype, torch.device]:
    kinds = {(op.measure, op.dtype, op.device): name for name, op in operators.items()}
    if len(kinds) > 1:
        told = "; ".join(
            f"{name}: {measure}, {dtype}, {device}"
            for (measure, dtype, device), name in kinds.items()
        )
        raise ValueError(f"operators differ in unit, dtype or device: {told}")
    ((measure, dtype, device),) = kinds
    return measure, dtype, device


def _nonsingular(eigenvalues: Tensor, shift: float) -> Tensor:
    """``1 / (eigenvalues + shift)``."""
    values = eigenvalues + shift
    if values.numel():
        size, largest = float(values.abs().min()), float(values.abs().max())
        if not size > largest * torch.finfo(values.dtype).eps:
            raise ValueError(
                f"singular to working precision: eigenvalues from {size:.3g} to {largest:.3g} in "
                "magnitude; solve a damped operator, op.damped(value)"
            )
    return values.reciprocal()
