"""What other items would say: standard errors over items of eigenvalues, traces and gradients.

An error over probes is about these data, one over items about the population that they come from.
Curvature is a mean over items, so a quadratic form ``vᵀHv`` has the standard error of the items'
own ``vᵀH_i v``, with v fixed. An extreme eigenvector is not fixed: it fits the noise of its items.
So the eigenvector of one half of the items is held against the other half, which is a fair test of
whether some direction curves up or down.

Source: Kato 1966, "Perturbation theory for linear operators" (first order: ``δλ = vᵀ δH v``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from curvprune.curvature.capture import items_in
from curvprune.curvature.estimates import (
    ENOUGH,
    End,
    Estimate,
    accurate,
    mean_and_stderr,
    samples_to_add,
)
from curvprune.curvature.products import MatrixFree, loss_and_gradient
from curvprune.curvature.random_vectors import moved, signs, widths
from curvprune.curvature.sampled_fisher import ratio_estimate
from curvprune.model import Batch, take

PARTS = 32  # parts of the data whose spread is looked at: no fewer where there are items enough
LEAST = 4  # below this there is no spread worth a number
FOLDS, LEAST_FOLDS = 8, 6  # of the gradient: 2⁷ patterns of signs; 2⁵ can still reject at 5 %
LEVEL = 0.05

# The operator of some batches.
Build = Callable[[Sequence[Batch]], MatrixFree]


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientNoise:
    """How long the gradient would be by the items' noise alone.

    Attributes:
        size: root of the mean square of the mean gradient's error over items.
        chance: of a mean gradient as long as this if its expectation were zero, by changing the
            signs of parts of the data; ``None`` for too few items.
    """

    size: float
    chance: float | None

    @property
    def significant(self) -> bool | None:
        """Whether the population's gradient is not zero, at 5 %."""
        return None if self.chance is None else self.chance <= LEVEL


@dataclass(kw_only=True)
class Parts:
    """Parts of the data, each by itself, in two halves.

    Attributes:
        given: the batches as they came.
        batches: the parts.
        half: 0 or 1 for each part.
        halves: the items of each half, in as few batches as they came in.
        build: the operator of some of them.
        count: positions of each part, once `gradients` has run.
    """

    given: Sequence[Batch]
    batches: list[Batch]
    half: list[int]
    halves: tuple[list[Batch], list[Batch]]
    build: Build
    count: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @staticmethod
    def of(batches: Sequence[Batch], build: Build) -> Parts:
        """Whole batches where they are many, else every so many-th item of each batch."""
        parts: list[Batch] = []
        half: list[int] = []
        halves: tuple[list[Batch], list[Batch]] = ([], [])
        wanted = 2 * math.ceil(PARTS / (2 * len(batches)))
        for number, batch in enumerate(batches):
            items = items_in(batch)
            pieces = min(wanted, items - items % 2)
            if len(batches) >= PARTS or pieces < 2:
                parts.append(batch)
                half.append(number % 2)
                halves[number % 2].append(batch)
                continue
            # Interleaved: a batch may be sorted.
            for side in (0, 1):
                halves[side].append(every(batch, side, 2))
            for piece in range(pieces):
                parts.append(every(batch, piece, pieces))
                half.append(piece % 2)
        return Parts(given=batches, batches=parts, half=half, halves=halves, build=build)

    @property
    def enough(self) -> bool:
        return len(self.batches) >= LEAST and all(self.halves)

    def fold(self, number: int, folds: int) -> list[Batch]:
        """One of several folds of the items; there must be as many parts."""
        # As few batches as there can be: each has a graph of its own.
        if min(items_in(batch) for batch in self.given) >= folds:
            return [every(batch, number, folds) for batch in self.given]
        return self.batches[number::folds]

    def gradients(self, *, keep: bool) -> GradientNoise | None:
        """Counts the positions of every part and, where vectors may be kept, compares the gradients
        of some folds. Cost: one gradient over the data; memory: 8 vectors."""
        folds: list[Tensor] = []
        weights = torch.zeros(min(FOLDS, len(self.batches)), dtype=torch.float64)
        counts = []
        for number, batch in enumerate(self.batches):
            found = loss_and_gradient(self.build([batch]))
            counts.append(found.positions)
            fold = number % len(weights)
            weights[fold] += found.positions
            total = found.gradient * found.positions
            if not keep:
                continue
            if fold < len(folds):
                folds[fold] += total
            else:
                folds.append(total)
        self.count = torch.tensor(counts, dtype=torch.float64)
        return _noise(torch.stack(folds), weights) if len(folds) > 1 else None

    def forms(self, vectors: Tensor) -> Tensor:
        """``vᵀH_i v`` of every part i and every column v, summed over the part's positions,
        ``(parts, columns)``. Cost: a gradient and one product per column, over the data."""
        rows = []
        for batch, positions in zip(self.batches, self.count, strict=True):
            op = self.build([batch])
            columns = vectors.split(widths(op, vectors.shape[1]), 1)
            quad = torch.cat([op.quad(moved(op, part)) for part in columns])
            rows.append(quad.to(device="cpu", dtype=torch.float64) * positions)
        return torch.stack(rows)

    def end(self, own: Tensor, crossed: tuple[Tensor, Tensor]) -> End:
        """An end of the spectrum.

        Args:
            own: forms along the eigenvector of all items.
            crossed: forms along the eigenvectors of the two halves.
        """
        influence = ratio_estimate(own, self.count)
        other = [crossed[1 - half][i] for i, half in enumerate(self.half)]
        held_out = ratio_estimate(torch.stack(other), self.count)
        # In sample the eigenvalue is too far out by some b, and by 2b with half the items; held out
        # it is that much too far in. So the two lie 3b apart.
        optimism = (influence.value - held_out.value) / 3
        return End(
            over_items=math.hypot(influence.stderr, optimism),
            held_out=held_out.value,
            held_out_error=held_out.stderr,
        )

    def probe(self, rtol: float, max_products: int, generator: torch.Generator) -> Tensor:
        """Forms along Hutchinson's probes, ``(parts, probes)``, the same for every part: as many as
        make the error over probes ``rtol`` of the trace."""
        op = self.build(self.batches[:1])
        forms = torch.zeros(len(self.batches), 0, dtype=torch.float64)
        add = ENOUGH
        while True:
            # 1. One round of probes.
            add = min(add, max_products - forms.shape[1])
            forms = torch.cat([forms, self.forms(signs(op, add, generator))], 1)
            # 2. The trace by each probe, and whether their spread will do.
            found = self.trace(forms, rtol)
            if found.converged or forms.shape[1] >= max_products:
                return forms
            add = samples_to_add(found.stderr, found.value, forms.shape[1], rtol)

    def trace(self, forms: Tensor, rtol: float) -> Estimate:
        """The trace from `probe`: errors over probes and over items."""
        probes = forms.shape[1]
        value, stderr = mean_and_stderr(forms.sum(0) / self.count.sum())
        return Estimate(
            value=value,
            stderr=stderr,
            num_items=probes,
            num_products=probes,
            converged=accurate(stderr, value, probes, rtol),
            over_items=self.spread(forms) if self.enough else None,
        )

    def spread(self, forms: Tensor) -> float:
        """Standard error over items of the mean of several probes' ratios, without what the probes
        add to it.

        Args:
            forms: sums of the parts by each probe, ``(parts, probes)``.
        """
        parts, probes = forms.shape
        # 1. What a part adds beyond its share of the positions, by each probe.
        ratios = forms.sum(0) / self.count.sum()
        rest = forms - self.count.unsqueeze(1) * ratios
        mean = rest.mean(1)
        raw = float(mean.square().sum())
        # 2. Its mean over probes varies for two reasons: the part, and the probes it met.
        noise = float((rest - mean.unsqueeze(1)).square().sum()) / (probes * (probes - 1))
        # No less than a quarter, since the difference is an estimate.
        variance = max(raw - noise, raw / 4) * parts / max(1, parts - 1)
        return math.sqrt(variance) / float(self.count.sum())


def every(batch: Batch, start: int, step: int) -> Batch:
    """Every so many-th item of a batch."""
    return take(batch, slice(start, None, step))


def _noise(folds: Tensor, weights: Tensor) -> GradientNoise:
    """From the gradients of folds, summed over positions."""
    count = len(folds)
    gram = (folds @ folds.mT).to(device="cpu", dtype=torch.float64)
    total = float(weights.sum())
    # 1. The spread of the folds about the mean, as that of a ratio.
    share = weights / total
    centre = gram @ torch.ones(count, dtype=torch.float64)
    squares = gram.diagonal() - 2 * share * centre + share**2 * gram.sum()
    variance = count / (count - 1) * float(squares.sum()) / total**2
    # 2. If the expectation is zero, the sign of each fold is as good as the other.
    chance = None
    if count >= LEAST_FOLDS:
        patterns = [(1.0, *rest) for rest in product((1.0, -1.0), repeat=count - 1)]
        flipped = torch.tensor(patterns, dtype=torch.float64)
        lengths = torch.einsum("pi,ij,pj->p", flipped, gram, flipped)
        chance = float((lengths >= lengths[0] * (1 - 1e-9)).double().mean())
    return GradientNoise(size=math.sqrt(max(0.0, variance)), chance=chance)
