"""Symmetric linear operators on a flat parameter space: what estimators and prices see of a
curvature.

An operator is its product with vectors. Some classes also know their diagonal, their trace or the
inverse of their damped form: these are their closed forms. An operator known only by its products
raises :class:`NoClosedForm`, which names the estimator to use instead. Vectors are flat, ``(n,)``
or ``(n, k)``; names and shapes live in :class:`ParamSpace`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.compat import full_float32
from curvprune.curvature.conjugate_gradients import conjugate_gradients

DENSE_LIMIT = 20_000  # largest dimension of a matrix that is written out
DENSE_WIDTH = 256  # columns of it that are computed at once


class NoClosedForm(NotImplementedError):
    """The operator's structure does not give this quantity; estimate it from products instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpace:
    """Named parameters laid end to end as one flat vector of length ``dim``, each in row-major
    order.

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
        slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            slices[name] = slice(start, start + math.prod(shape))
            start = slices[name].stop
        return slices

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*size"]:
        """One flat vector ``(n,)`` from tensors shaped as the parameters.

        Tensors with a trailing axis k give k vectors, ``(n, k)``.

        Raises:
            ValueError: a missing or unknown name, or a shape that is not the parameter's, naming
                it.
        """
        self._check_known(tensors)
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"no tensor for parameter {name!r} of shape {shape}")
        if not self.shapes:
            return torch.zeros(0)
        tails: dict[tuple[int, ...], str] = {}  # () or (k,), and the first parameter that has it
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
        """name → view of ``v`` shaped as the parameter; ``(*shape, k)`` for k vectors ``(n, k)``.

        Raises:
            ValueError: ``v`` is not ``(n,)`` or ``(n, k)``.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self.dim:
            raise ValueError(
                f"expected a vector ({self.dim},) or a block ({self.dim}, k), got {tuple(v.shape)}"
            )
        parts = {}
        for name, where in self.slices.items():
            shape = self.shapes[name]
            # unflatten, unlike reshape, always returns a view, also of columns of a larger block
            parts[name] = v[where].unflatten(0, shape) if shape else v[where][0]
        return parts

    def restrict(self, names: Iterable[str]) -> ParamSpace:
        """The subspace of these parameters, in the order of this space whatever the order of
        ``names``.

        Raises:
            ValueError: an unknown name.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self._check_known(wanted)
        shapes = {name: shape for name, shape in self.shapes.items() if name in wanted}
        return ParamSpace(shapes=shapes)

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.shapes:
                raise ValueError(
                    f"parameter {name!r} is not in this space, which holds {list(self.shapes)}"
                )


class Operator(ABC):
    """A symmetric linear map A on a :class:`ParamSpace` of dimension n.

    Attributes:
        space: the parameters that the coordinates belong to.
        measure: what ``vᵀAv`` is counted in for a change v of the parameters, e.g. ``"nats per
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
        # "cuda" becomes "cuda:0", as tensors have it
        self.device = torch.empty(0, device=device).device
        if not dtype.is_floating_point:
            raise ValueError(f"an operator needs a floating-point dtype, got {dtype}")

    @abstractmethod
    def _matmat(self, v: Tensor) -> Tensor:
        """A v for k columns ``(n, k)``, whose shape, dtype and device have been checked."""

    def __matmul__(self, v: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
        """A v. Shapes ``(n,) → (n,)`` or ``(n, k) → (n, k)``. Cost: one product per vector.

        Raises:
            ValueError: another shape, dtype or device than the operator's.
        """
        self.check(v)
        # Subclasses see columns only: a vector is one column.
        with full_float32():
            return self._matmat(v) if v.ndim == 2 else self._matmat(v.unsqueeze(1)).squeeze(1)

    def quad(self, v: Float[Tensor, "*size"]) -> Float[Tensor, "*columns"]:
        """``vᵀAv`` of a vector (a scalar tensor) or of each of k columns, ``(k,)``, in ``measure``.

        The curvature's share of the loss's rise is half of it. Cost: one product per vector.
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
        """``A⁻¹v`` by an eigendecomposition, which is kept after the first call.

        ``op.damped(λ).solve(v)`` is ``(A+λI)⁻¹v``.

        Raises:
            NoClosedForm: the operator is known only by its products.
            ValueError: A is singular to working precision, or ``v`` does not fit.
        """
        self.check(v)
        return self._solve(v, 0.0) if v.ndim == 2 else self._solve(v.unsqueeze(1), 0.0).squeeze(1)

    def inverse(
        self, damping: float = 0.0, *, tol: float = 1e-6, max_products: int = 1000
    ) -> Operator:
        """``(A + damping · I)⁻¹`` as an operator.

        In closed form where A has one (see `solve`); otherwise every vector is solved for by
        conjugate gradients, in about ``√(λmax + damping) / √(λmin + damping)`` products times the
        digits asked for. These need ``A + damping · I`` to be positive definite.

        >>> import torch
        >>> from curvprune.curvature import Dense
        >>> inverse = Dense(torch.tensor([[3.0, 1.0], [1.0, 3.0]])).inverse(damping=1.0)
        >>> (inverse @ torch.tensor([5.0, 5.0])).tolist()
        [1.0, 1.0]

        Args:
            tol: relative residual of a vector.
            max_products: for a vector.

        Raises:
            ValueError: a negative or infinite damping, or fewer than one product; from a product,
                an operator that is not positive definite or a residual that stays too large.
        """
        if not 0 <= damping < math.inf or not tol > 0 or max_products < 1:
            raise ValueError(
                f"inverse: damping={damping}, tol={tol} and max_products={max_products}; expected "
                "a finite damping ≥ 0, tol > 0 and at least one product"
            )
        shifted = self.damped(damping) if damping else self
        return Inverse(shifted, tol=tol, max_products=max_products)

    def restrict(self, names: Iterable[str]) -> Operator:
        """The diagonal block ``EᵀAE`` of these parameters, in the order of ``self.space``.

        Without a closed form, a product costs as much as the whole operator's: it fills the vector
        up with zeros.

        Raises:
            ValueError: an unknown name.
        """
        space = self.space.restrict(names)
        # All parameters, in whatever order they were named: nothing is cut out.
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
        if n > DENSE_LIMIT:
            raise ValueError(
                f"to_dense of dimension {n} needs {n}² numbers; the limit is {DENSE_LIMIT}"
            )
        return self._dense()

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``: float64 NumPy vectors in and out, ``dtype``
        between."""
        from scipy.sparse.linalg import LinearOperator

        def apply(x: Any) -> Any:
            # SciPy's solvers work in float64 on the CPU, wherever the operator lives.
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

    def check(self, v: Tensor) -> None:
        """Raises ``ValueError`` if ``v`` has another shape, dtype or device than the operator's
        vectors."""
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

    # What a subclass overrides where its structure gives a shorter way.

    def _dense(self) -> Tensor:
        # A times the identity, some columns at a time.
        n = self.space.dim
        matrix = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, DENSE_WIDTH):
            width = min(DENSE_WIDTH, n - start)
            block = torch.zeros(n, width, dtype=self.dtype, device=self.device)
            block[start : start + width].fill_diagonal_(1)
            matrix[:, start : start + width] = self._matmat(block)
        return matrix

    def _restrict(self, space: ParamSpace) -> Operator:
        index = coordinates(self.space, space, self.device)

        def product(v: Tensor) -> Tensor:
            # EᵀAE v: fill up with zeros, multiply, read off.
            whole = torch.zeros(self.space.dim, v.shape[1], dtype=self.dtype, device=self.device)
            whole[index] = v
            return self._matmat(whole)[index]

        return Function(
            product, space, measure=self.measure, psd=self.psd, dtype=self.dtype, device=self.device
        )

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        """``(A + shift·I)⁻¹ v`` for columns that have been checked."""
        raise NoClosedForm(
            f"{type(self).__name__} has no closed-form inverse; use the iterative solver "
            "op.inverse(damping)"
        )


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
        # A wrong shape would be broadcast later, a wrong dtype cast, both in silence.
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
        ValueError: no part, or parts that differ in space, measure, dtype or device.
    """

    parts: tuple[tuple[float, Operator], ...]
    shift: float

    def __init__(self, parts: Sequence[tuple[float, Operator]], *, shift: float = 0.0) -> None:
        if not parts:
            raise ValueError("Sum needs at least one operator")
        # 1. Flatten: c (Σ dᵢ Aᵢ + s·I) = Σ (c dᵢ) Aᵢ + (c s)·I.
        flat: list[tuple[float, Operator]] = []
        for factor, part in parts:
            if isinstance(part, Sum):
                flat += [(factor * inner, operator) for inner, operator in part.parts]
                shift += factor * part.shift
            else:
                flat.append((factor, part))
        # 2. All parts must act on the same vectors and be counted in the same measure.
        space = flat[0][1].space
        for _, part in flat[1:]:
            # dicts that differ only in order are equal, the coordinates are not
            if list(part.space.shapes.items()) != list(space.shapes.items()):
                raise ValueError(
                    f"operators on different spaces: {space.shapes} and {part.space.shapes}"
                )
        measure, dtype, device = agreement({str(i): part for i, (_, part) in enumerate(flat)})
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
        of_parts = math.fsum(factor * part.trace() for factor, part in self.parts)
        return self.shift * self.space.dim + of_parts

    def _restrict(self, space: ParamSpace) -> Operator:
        parts = [(factor, part.restrict(space.shapes)) for factor, part in self.parts]
        return Sum(parts, shift=self.shift)

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        # The inverse of a sum of several parts is not the sum of inverses.
        if len(self.parts) > 1 or self.parts[0][0] == 0:
            return super()._solve(v, shift)
        # (c A + s·I)⁻¹ = (A + s/c·I)⁻¹ / c
        factor, part = self.parts[0]
        return part._solve(v, (self.shift + shift) / factor) / factor


class Inverse(Operator):
    """``A⁻¹``, in closed form or by conjugate gradients; see `Operator.inverse`."""

    def __init__(self, operator: Operator, *, tol: float, max_products: int) -> None:
        super().__init__(
            operator.space,
            measure=f"1/({operator.measure})",
            psd=operator.psd,
            dtype=operator.dtype,
            device=operator.device,
        )
        self.operator, self.tol, self.max_products = operator, tol, max_products

    def _matmat(self, v: Tensor) -> Tensor:
        try:
            return self.operator.solve(v)
        except NoClosedForm:
            return conjugate_gradients(
                self.operator, v, tol=self.tol, max_products=self.max_products
            )

    def _solve(self, v: Tensor, shift: float) -> Tensor:
        # The inverse of the inverse is the operator itself.
        return self.operator @ v if shift == 0 else super()._solve(v, shift)


def coordinates(space: ParamSpace, part: ParamSpace, device: torch.device) -> Tensor:
    """Where the coordinates of ``part`` lie in ``space``, int64."""
    if not part.shapes:
        return torch.zeros(0, dtype=torch.int64, device=device)
    slices = space.slices
    ranges = [torch.arange(slices[name].start, slices[name].stop) for name in part.shapes]
    return torch.cat(ranges).to(device)


def agreement(operators: Mapping[str, Operator]) -> tuple[str, torch.dtype, torch.device]:
    """Measure, dtype and device, which must be the same for all. Raises ``ValueError``."""
    kinds = {(op.measure, op.dtype, op.device): name for name, op in operators.items()}
    if len(kinds) > 1:
        told = "; ".join(
            f"{name}: {measure}, {dtype}, {device}"
            for (measure, dtype, device), name in kinds.items()
        )
        raise ValueError(f"operators differ in unit, dtype or device: {told}")
    return next(iter(kinds))
