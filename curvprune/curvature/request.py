"""What is asked of an analysis, and what its steps share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Protocol, TypeVar, get_args, runtime_checkable

import torch
from torch import nn

from curvprune.curvature.draws import Draws
from curvprune.curvature.products import MatrixFree, empirical_fisher, fisher, gauss_newton, hessian
from curvprune.curvature.ritz import Ends
from curvprune.curvature.structure import Structure
from curvprune.model import Batch, Layer, Loss

MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton",
    "fisher": "Fisher (labels sampled from the model)",
    "empirical-fisher": "empirical Fisher (the data's own labels, per item)",
}
BUILDERS = {"hessian": hessian, "ggn": gauss_newton, "empirical-fisher": empirical_fisher}
FIRST_ORDER = ("fisher", "empirical-fisher")
QUANTITIES = ("trace", "diagonal", "eigenvalues", "density")  # computed unless the user picks
ALL_QUANTITIES = (*QUANTITIES, "layer-densities")
SPECTRAL = {"eigenvalues", "density", "layer-densities"}

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Remember(Protocol):
    """Gives a part of an analysis as a record: computes it, or finds it where an interrupted
    analysis left it."""

    def __call__(self, key: str, kind: type[R], compute: Callable[[], R]) -> R:
        """The record of type ``kind`` under ``key``."""
        ...


# Called with (step, done, total).
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisSettings:
    """What to compute, and how well.

    Attributes:
        matrix: a key of `MATRICES`.
        quantities: some of `ALL_QUANTITIES`.
        rtol: relative standard error asked of every probed trace.
        max_products: most products for one layer's trace, and for one eigenvalue problem.
        labels: draws per position for the Fisher.
        seed: of all probes, starts and labels.
        which: ends of each layer's spectrum.
        vector_bytes: memory for vectors.

    Raises:
        ValueError: an unknown matrix, quantity or end of the spectrum; a tolerance that is not
            positive, or fewer than 8 products; spectra of a first-order matrix.
    """

    matrix: str = "hessian"
    quantities: Sequence[str] = QUANTITIES
    rtol: float = 0.05
    max_products: int = 32
    labels: int = 1
    seed: int = 0
    which: Ends = "BE"
    vector_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise ValueError(f"matrix={self.matrix!r}: expected one of {', '.join(MATRICES)}")
        if unknown := [q for q in self.quantities if q not in ALL_QUANTITIES]:
            raise ValueError(
                f"quantity {unknown[0]!r}: expected some of {', '.join(ALL_QUANTITIES)}"
            )
        if self.which not in get_args(Ends):
            raise ValueError(f"which={self.which!r}: expected one of {', '.join(get_args(Ends))}")
        if not self.rtol > 0 or self.max_products < 8:
            raise ValueError(
                "rtol must be positive and max_products at least 8, got "
                f"{self.rtol} and {self.max_products}"
            )
        # Spectra that the user did not pick are left out with a note.
        picked = set(self.quantities) != set(QUANTITIES)
        if self.first_order and picked and self.wants(*SPECTRAL):
            raise ValueError(
                f"matrix={self.matrix!r} gives trace and diagonal; for its spectrum pass "
                "matrix='ggn' (for these losses the same as the true Fisher), or build the "
                "operator: curvprune.fisher(...), curvprune.empirical_fisher(...)"
            )

    @property
    def first_order(self) -> bool:
        """The matrix is made of gradients: one of the Fishers."""
        return self.matrix in FIRST_ORDER

    @property
    def draws(self) -> Draws:
        return Draws(labels=self.labels, seed=self.seed)

    def wants(self, *quantities: str) -> bool:
        """Whether some of the quantities are asked for."""
        return not set(quantities).isdisjoint(self.quantities)


@dataclass(kw_only=True, slots=True)
class AnalysisRequest:
    """What the steps of an analysis share: the model, what is asked of it, what is known of its
    structure, and the notes so far."""

    model: nn.Module
    objective: Loss
    batches: Sequence[Batch]
    layers: Mapping[str, Layer]
    asked: AnalysisSettings
    structure: Structure
    advance: Advance
    remember: Remember | None
    notes: list[str] = field(default_factory=list)

    def generator(self, stream: int) -> torch.Generator:
        """Every step has its own stream: what one step draws does not depend on the others."""
        return self.asked.draws.generator(stream)

    def some(self, names: Sequence[str]) -> dict[str, Layer]:
        return {n: self.layers[n] for n in names}

    def parameter(self, name: str) -> str:
        """The parameter's name in ``model.named_parameters()``, where a shared weight has the first
        of its names."""
        weight = self.layers[name].weight
        return next(n for n, p in self.model.named_parameters() if p is weight)

    def operator(self, parameters: Sequence[str] | None = None) -> MatrixFree:
        """The matrix over all parameters, or over some."""
        # Parameters are globs for an operator.
        globs = ["*"] if parameters is None else [escape(n) for n in parameters]
        return self._build(self.batches, globs)

    def operator_of(self, batches: Sequence[Batch]) -> MatrixFree:
        """The same matrix over all parameters, of other batches."""
        return self._build(batches, ["*"])

    def _build(self, batches: Sequence[Batch], globs: Sequence[str]) -> MatrixFree:
        model, objective, asked = self.model, self.objective, self.asked
        if asked.matrix == "fisher":
            labels, seed = asked.labels, asked.seed
            return fisher(model, batches, objective, labels=labels, seed=seed, parameters=globs)
        build = BUILDERS[asked.matrix]
        return build(model, batches, objective, parameters=globs)

    def recall(
        self,
        key: str,
        kind: type[R],
        compute: Callable[[], T],
        *,
        to_record: Callable[[T], R],
        from_record: Callable[[R], T],
    ) -> T:
        """A part of the analysis: computed, or read back from the record of an interrupted one.

        What was computed is given as it is, with the tensors that its record leaves out.
        """
        # Nothing is kept: no record is made.
        if self.remember is None:
            return compute()
        # Filled if the record was computed, and left empty if it was read.
        fresh: list[T] = []

        def compute_record() -> R:
            fresh.append(compute())
            return to_record(fresh[0])

        record = self.remember(key, kind, compute_record)
        return fresh[0] if fresh else from_record(record)
