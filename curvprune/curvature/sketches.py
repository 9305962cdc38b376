"""A sketch of an operator's range, and Hutch++, which probes only what the sketch leaves over.

Source: Meyer, Musco, Musco & Woodruff 2021, "Hutch++", Alg. 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvprune.curvature.estimates import (
    ENOUGH,
    Estimate,
    accurate,
    mean_and_stderr,
    samples_to_add,
)
from curvprune.curvature.hutchinson import exact_trace
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import moved, signs, widths
from curvprune.curvature.working_precision import complement, in_float64, rounding


class Sketch:
    """An orthonormal basis Q of the range of ``A Ω``, with ``H = QᵀAQ``. It grows, and keeps what
    it has.

    Attributes:
        q: ``Q [n, size]``.
        h: ``H [size, size]``, float64 on the CPU.
        products: spent so far, two for each column of Ω (fewer where its image is not new).
    """

    def __init__(self, op: Operator) -> None:
        self.op, self.products = op, 0
        self.q = torch.zeros(op.space.dim, 0, dtype=op.dtype, device=op.device)
        self.h = torch.zeros(0, 0, dtype=torch.float64)
        self._scale = 0.0  # length of the longest column of A Ω

    @property
    def size(self) -> int:
        """Columns of Q."""
        return self.q.shape[1]

    def grow(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in ``A Ω`` for new columns Ω; returns it and ``A`` times the new columns of Q."""
        # 1. The new columns of Q: the part of A Ω outside the old ones.
        y = self.op @ omega
        self._scale = max(self._scale, float(torch.linalg.vector_norm(y, dim=0).max()))
        new = complement(self.q, y, rounding(self.op) * self._scale)
        self.q = torch.cat([self.q, new], 1)

        # 2. Their image.
        w = self.op @ new if new.shape[1] else new
        self.products += omega.shape[1] + new.shape[1]

        # 3. The new rows and columns of H, symmetric also in their rounding errors.
        old = len(self.h)
        h = torch.zeros(self.size, self.size, dtype=torch.float64)
        column = in_float64(self.q.mT @ w)
        h[:old, :old] = self.h
        h[:, old:] = column
        h[old:, :] = column.mT
        h[old:, old:] = (column[old:] + column[old:].mT) / 2
        self.h = h
        return y, w


class _ProbedSketch:
    """A sketch Q and Hutchinson probes g of the rest, ``(I−QQᵀ) A (I−QQᵀ)``.

    A larger Q needs ``Qᵀg`` and ``(AQ)ᵀg`` of the probes made before it. So the probes are kept, a
    byte a sign, and with them ``qᵀg``, ``qᵀAg`` for each column q, and ``gᵀAg``.
    """

    def __init__(self, op: Operator, generator: torch.Generator) -> None:
        self.op, self.generator, self.sketch = op, generator, Sketch(op)
        self.signs = torch.zeros(op.space.dim, 0, dtype=torch.int8)
        self.along = torch.zeros(0, 0, dtype=torch.float64)  # qᵀg
        self.across = torch.zeros(0, 0, dtype=torch.float64)  # qᵀAg
        self.energy = torch.zeros(0, dtype=torch.float64)  # gᵀAg

    @property
    def probes(self) -> int:
        return self.signs.shape[1]

    @property
    def products(self) -> int:
        return self.sketch.products + self.probes

    def grow(self, count: int) -> None:
        """A larger sketch, by ``count`` columns."""
        old = self.sketch.size
        _, w = self.sketch.grow(moved(self.op, signs(self.op, count, self.generator)))
        new = self.sketch.q[:, old:]
        # What the probes so far have in the new columns.
        along = torch.zeros(new.shape[1], self.probes, dtype=torch.float64)
        across = torch.zeros_like(along)
        start = 0
        for width in widths(self.op, self.probes):
            g = moved(self.op, self.signs[:, start : start + width])
            along[:, start : start + width] = in_float64(new.mT @ g)
            across[:, start : start + width] = in_float64(w.mT @ g)
            start += width
        self.along = torch.cat([self.along, along])
        self.across = torch.cat([self.across, across])

    def probe(self, count: int) -> None:
        """``count`` further probes."""
        q = self.sketch.q
        for width in widths(self.op, count):
            drawn = signs(self.op, width, self.generator)
            g = moved(self.op, drawn)
            ag = self.op @ g
            self.along = torch.cat([self.along, in_float64(q.mT @ g)], 1)
            self.across = torch.cat([self.across, in_float64(q.mT @ ag)], 1)
            energy = (g * ag).sum(0, dtype=torch.float64).cpu()
            self.energy = torch.cat([self.energy, energy])
            self.signs = torch.cat([self.signs, drawn], 1)

    def result(self) -> tuple[float, float]:
        """``tr QᵀAQ + mean gᵀ(I−QQᵀ)A(I−QQᵀ)g``, and the standard error of the mean."""
        h, along = self.sketch.h, self.along
        rest = self.energy - 2 * (along * self.across).sum(0) + (along * (h @ along)).sum(0)
        value, stderr = mean_and_stderr(rest)
        return value + float(h.trace()), stderr


def hutch_plus_plus(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> Estimate:
    """See :func:`curvprune.curvature.trace`."""
    n, run = op.space.dim, _ProbedSketch(op, generator)
    # 1. A first round: a third of the products for A Ω, one for AQ, one for probes.
    run.grow(min(ENOUGH, max_products // 3))
    run.probe(min(ENOUGH, max_products - run.products))
    sketching = True
    while True:
        # 2. The value, and whether its error bar will do.
        value, stderr = run.result()
        met = accurate(stderr, value, run.probes, rtol)
        left = max_products - run.products
        if met or left < 1:
            return Estimate(
                value=value,
                stderr=stderr,
                num_items=run.probes,
                num_products=run.products,
                converged=met,
            )

        # 3. What the next round takes. Where n products are about as many, they give the exact
        #    value.
        columns = 0
        if sketching:
            size = run.sketch.size
            columns = min(math.ceil(size / 2), left // 2, (n - size) // 2)
        add = samples_to_add(stderr, value, run.probes, rtol)
        next_round = 2 * columns if columns else add
        if next_round >= n // 2 and n <= left:
            return exact_trace(op, run.products)

        # 4. A larger sketch, as long as that is the better use of the products: spent on probes,
        #    they would have taken the variance down by m / (m + 2·columns).
        if columns:
            before = stderr
            run.grow(columns)
            value, stderr = run.result()
            sketching = stderr**2 * (run.probes + 2 * columns) < before**2 * run.probes
            if accurate(stderr, value, run.probes, rtol):
                continue
            more = samples_to_add(stderr, value, run.probes, rtol)
            add = min(math.ceil(run.probes / 2), more)

        # 5. Further probes of what is left over.
        left = max_products - run.products
        if left > 0:
            run.probe(min(add, left))
